"""The oldest versions that settings.ini allows, all of them at once: they can be installed together, and a run there is the same run.

(The newest are those of constraints.txt, in which every other test runs.
torch is not taken at its oldest but at the tested version: other builds are gigabytes.)
"""
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT/".venv-lowest"
TRAIN = """
import json, sys
from sage_finetune import Chat, LoRATrainer, PresetConfigs, merge, load_run
result = LoRATrainer(PresetConfigs.tiny(output_dir=sys.argv[1], max_steps=12, eval_steps=6, device="cpu")).train(show=False)
said = Chat(*load_run(sys.argv[1]), max_new_tokens=12)("Who are you?")
print(json.dumps(dict(losses=result.losses, evaluations=result.eval_losses, same=merge(sys.argv[1]).agrees, said=said)))
"""


def tool():
    "The program that lists the versions"
    spec = importlib.util.spec_from_file_location("lowest", ROOT/".ci"/"lowest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean(**more):
    "This process's environment without what it says about Python"
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JUPYTER", "PYTEST"))} | more


def run(*command, **options):
    "What a command prints; fails with all it said"
    done = subprocess.run([str(part) for part in command], env=clean(**options.pop("env", {})), capture_output=True,
        text=True, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_requirement_has_a_lower_bound_that_is_a_version():
    "And the tested version is not below it; one that is named is taken at its tested version"
    lines, named = tool().lowest(ROOT), tool().lowest(ROOT, ["torch"])
    bounds, tested = (dict(line.split("==") for line in given) for given in (lines, named))
    assert (all(Version(version).release for version in bounds.values()) and len(bounds) >= 20
        and Version(tested.pop("torch")) > Version(bounds.pop("torch")) and tested == bounds)
    with pytest.raises(ValueError, match="not enough values"): tool().lower_bound(Requirement("planted<3"))


@pytest.fixture(scope="module")
def lowest():
    "The Python of an environment with those versions; made again when what it is made from has changed"
    lines = "\n".join(tool().lowest(ROOT, ["torch"])) + "\n"
    sign, seal = hashlib.sha256((lines + sys.version).encode()).hexdigest(), PLACE/"made-from"
    python = PLACE/("Scripts" if os.name == "nt" else "bin")/"python"
    if not seal.exists() or seal.read_text() != sign:
        shutil.rmtree(PLACE, ignore_errors=True)
        venv.create(PLACE, with_pip=True)
        (PLACE/"lowest.txt").write_text(lines)
        pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", PLACE/"lowest.txt"]
        run(*pip, "torch", cwd=ROOT)
        run(*pip, "--editable", ".", cwd=ROOT)
        seal.write_text(sign)
    return python


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1500)
class TestLowest:
    "Everything that needs that environment"

    def test_the_lower_bounds_are_met_together(self, lowest):
        "pip has found a set, nothing in it is broken, and it is the oldest one"
        assert "No broken requirements" in run(lowest, "-m", "pip", "check", cwd=PLACE)
        wanted = dict(line.split("==") for line in tool().lowest(ROOT, ["torch"]))
        code = "import json, sys, importlib.metadata as m; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
        there = json.loads(run(lowest, "-c", code, *wanted, cwd=PLACE))
        assert {name: Version(Version(version).public) for name, version in there.items()} == {
            name: Version(version) for name, version in wanted.items()}

    def test_a_run_there_is_the_same_run(self, lowest, tmp_path):
        "Losses, evaluation, merge and answer, from the oldest and from the tested versions"
        alike = dict(cwd=tmp_path, timeout=600, env=dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"))
        old = json.loads(run(lowest, "-c", TRAIN, tmp_path/"old", **alike).splitlines()[-1])
        new = json.loads(run(sys.executable, "-c", TRAIN, tmp_path/"new",
            **alike | dict(env=alike["env"] | dict(PYTHONPATH=str(ROOT)))).splitlines()[-1])
        assert old["losses"] == pytest.approx(new["losses"], rel=1e-4) and old["same"] and new["same"] and old["said"] == new["said"]
        assert [loss for _, loss in old["evaluations"]] == pytest.approx([loss for _, loss in new["evaluations"]], rel=1e-4)

    def test_the_program_starts_there(self, lowest, tmp_path):
        "The oldest typer, click and pandas too: help of every command, and a look at everything"
        for command in ([], ["run"], ["quickstart"], ["chat"]):
            assert "Usage" in run(lowest, "-m", "sage_finetune", *command, "--help", cwd=tmp_path)
        code = ("import json; from sage_finetune.ui.diagnosis import doctor; print([(look.what, look.found) "
            "for look in doctor(online=False).checks if look.state == 'problem'])")
        assert run(lowest, "-c", code, cwd=tmp_path).strip().splitlines()[-1] == "[]"
