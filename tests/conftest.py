"Tests run offline and leave the home folder alone"
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports a Hugging Face library: no network, and a cache that goes away with the tests.
_cache = tempfile.TemporaryDirectory(prefix="sage_finetune_tests_")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=_cache.name, TOKENIZERS_PARALLELISM="false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Threads of a matrix product that wait for each other sleep: on two busy cores spinning makes everything up to eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Several workers share the cores.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1: os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

# Made-up cases are the same in every run, so that nothing fails by chance; SAGE_EXPLORE=1 looks for new ones. A busy machine is no fault.
settings.register_profile("sage", derandomize=not os.environ.get("SAGE_EXPLORE"), deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    torch, engine = sys.modules.get("torch"), sys.modules.get("sage_finetune.engine")
    if torch is None: return None
    found = dict(threads=torch.get_num_threads(), dtype=torch.get_default_dtype(), gradients=torch.is_grad_enabled(), onednn=torch.backends.mkldnn.enabled,
                 deterministic=torch.are_deterministic_algorithms_enabled(), precision=torch.get_float32_matmul_precision(), autocast=torch.is_autocast_enabled("cpu"))
    return found | dict(attention=engine is None or engine.ALL_ATTENTION_FUNCTIONS[engine.VARLEN] is engine._varlen_sdpa)


@pytest.fixture(autouse=True)
def computes_as_before():
    "A test that leaves other arithmetic behind would give every later run in this process other bytes than those of a child"
    before = arithmetic()
    yield
    after = arithmetic()
    assert after is None or (after["attention"] and (before is None or after == before)), f"the test left {after}, and found {before}"


@pytest.fixture(scope="session")
def root():
    "The project's folder"
    return Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    "Tests marked `gpu` are left out where there is no CUDA GPU"
    if not any(item.get_closest_marker("gpu") for item in items): return
    import torch
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("gpu"): item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
