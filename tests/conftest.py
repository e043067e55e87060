"Tests run offline and leave the home folder alone"
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import house
import pytest
from hypothesis import HealthCheck, settings

# Before anything imports a Hugging Face library: no network, and a cache that goes away with the tests.
_cache = tempfile.TemporaryDirectory(prefix="sage_finetune_tests_")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=_cache.name,
    TOKENIZERS_PARALLELISM="false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Threads of a matrix product that wait for each other sleep: on two busy cores spinning makes everything up to eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Several workers share the cores.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

# Made-up cases are the same in every run, so that nothing fails by chance; SAGE_EXPLORE=1 looks for new ones. A busy machine is no fault.
settings.register_profile("sage", derandomize=not os.environ.get("SAGE_EXPLORE"), deadline=None,
    suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sage")


@pytest.fixture(scope="session", autouse=True)
def hears_interrupts():
    "A shell starts background jobs deaf to Ctrl-C, and so would be everything they start"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def stays_here():
    "A test that leaves another working folder behind would break those after it"
    here = os.getcwd()
    yield
    there, _ = os.getcwd(), os.chdir(here)
    assert there == here, f"the test left {there} as working folder"


def arithmetic():
    "What this process computes with; None before torch is loaded"
    torch, engine = sys.modules.get("torch"), sys.modules.get("sage_finetune.modeling.varlen")
    if torch is None: return None
    found = dict(threads=torch.get_num_threads(), dtype=torch.get_default_dtype(), gradients=torch.is_grad_enabled(),
                 onednn=torch.backends.mkldnn.enabled,
                 deterministic=torch.are_deterministic_algorithms_enabled(), precision=torch.get_float32_matmul_precision(),
                 autocast=torch.is_autocast_enabled("cpu"))
    return found | dict(attention=engine is None or engine.ALL_ATTENTION_FUNCTIONS[engine.VARLEN] is engine._varlen_sdpa)


def _restore(found):
    "One test fails, and not every one after it"
    import torch
    torch.set_grad_enabled(found["gradients"])
    torch.set_num_threads(found["threads"])
    torch.set_default_dtype(found["dtype"])
    torch.set_float32_matmul_precision(found["precision"])
    torch.use_deterministic_algorithms(found["deterministic"])
    torch.backends.mkldnn.enabled = found["onednn"]


@pytest.fixture(autouse=True)
def computes_as_before():
    "A test that leaves other arithmetic behind would give every later run in this process other bytes than those of a child"
    before = arithmetic()
    yield
    after = arithmetic()
    if before and after != before: _restore(before)
    assert after is None or (after["attention"] and (before is None or after == before)), f"the test left {after}, and found {before}"


@pytest.fixture(scope="session")
def root():
    "The project's folder"
    return Path(__file__).resolve().parents[1]


# What each test took when it was last written down, in seconds: `SAGE_SECONDS=1 make test`. What is short is left out.
SECONDS = Path(__file__).with_name("seconds.json")
SLOW, SHORT = 5, 1


def unit(nodeid):
    "What one worker takes as a whole: a file with what its tests share, the tutorials, which write into one folder, or the other pages"
    file, _, case = nodeid.partition("::")
    return file + "::tutorials" * (file.endswith("test_notebooks.py") and "[tutorials/" in case)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Units are handed out in the order in which tests are collected, whatever --dist says"
    from xdist.scheduler import LoadScopeScheduling
    class InOrder(LoadScopeScheduling):
        def _split_scope(self, nodeid): return unit(nodeid)
    config.option.loadscopereorder = False
    return InOrder(config, log)


class Stopwatch:
    "Writes down what each test took, with what was made for it"
    def __init__(self): self.took = {}

    def pytest_runtest_logreport(self, report): self.took[report.nodeid] = self.took.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self):
        before = {nodeid: took for nodeid, took in written_down().items() if nodeid not in self.took}
        took = before | {nodeid: round(took) for nodeid, took in self.took.items() if took >= SHORT}
        SECONDS.write_text(json.dumps(dict(sorted(took.items(), key=lambda one: (-one[1], one[0]))), indent=1) + "\n", encoding="utf-8")


def written_down(): return json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}


def pytest_configure(config):
    if os.environ.get("SAGE_SECONDS") and "PYTEST_XDIST_WORKER" not in os.environ: config.pluginmanager.register(Stopwatch())


# Cases that are left to `make test-full`: beginnings of ids.
FURTHER = Path(__file__).with_name("further.txt")


def mark_further(items):
    "The cases that are named as further ones get the mark `full`; a name that fits none is out of date"
    named = [line for line in FURTHER.read_text(encoding="utf-8").splitlines() if line.startswith("tests/")]
    used = set()
    for item in items:
        if found := next((name for name in named if item.nodeid.startswith(name)), None):
            used.add(found)
            item.add_marker(pytest.mark.full)
    if len(items) > 5000 and (gone := [name for name in named if name not in used]): raise pytest.UsageError(f"{FURTHER} names {gone}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "What took long is slow, and with several workers it comes first. Tests marked `gpu` are left out where there is no CUDA GPU"
    took, units = written_down(), Counter()
    mark_further(items)
    for item in items:
        units[unit(item.nodeid)] += took.get(item.nodeid, 0)
        if took.get(item.nodeid, 0) >= SLOW: item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ: items.sort(key=lambda item: (-units[unit(item.nodeid)], unit(item.nodeid)))
    if not any(item.get_closest_marker("gpu") for item in items): return
    import torch
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("gpu"): item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    "How the pages read, below the results of a whole run"
    if hasattr(terminalreporter.config, "workerinput") or len(terminalreporter.stats.get("passed", ())) < 1000: return
    terminalreporter.write_sep("-", "how the pages read")
    for line in house.measures(Path(__file__).resolve().parents[1]): terminalreporter.write_line(line)
