"""How LLaMA-Factory's process is started, watched and ended. A stand-in plays the program here, for its processes alone:
the real one trains in test_llamafactory_engine.py"""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import rows, until

from sage_finetune import PresetConfigs, train_from_meta
from sage_finetune.core.errors import ConfigError, RunError
from sage_finetune.data.tasks import prepare_run
from sage_finetune.runs.folder import read_metrics, read_status, run_info
from sage_finetune.runs.launch import stop_run
from sage_finetune.training.llamafactory import WHERE, prepare_job, sensible_line, train_with_llamafactory

pytestmark = pytest.mark.filterwarnings("ignore:LLaMA-Factory.*:UserWarning")

# It reads the config it is given, tells of three steps, and then does what STAND_IN says.
STAND_IN = """#!{python}
import json, os, pathlib, shutil, subprocess, sys, time
import yaml
assert sys.argv[1] == "train", sys.argv
keys, mode = yaml.safe_load(open(sys.argv[2])), os.environ["STAND_IN"]
output = pathlib.Path(keys["output_dir"])
output.mkdir()
print("loading", os.environ["PYTHONSAFEPATH"], flush=True)
log = open(output/"trainer_log.jsonl", "a")
def say(**keys): print(json.dumps(dict(total_steps=6) | keys), file=log, flush=True)
for step in (1, 2, 3): say(current_steps=step, loss=3. - step / 2, lr=1e-4, epoch=step / 3, elapsed_time=f"0:00:0{{step}}")
say(current_steps=3, eval_loss=1.25, epoch=1., elapsed_time="0:00:04")
if mode == "wait":
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (output/"helper").write_text(str(helper.pid))
    (output/"checkpoint-3").mkdir()
    print("waiting", flush=True)
    time.sleep(300)
if mode == "fail": raise RuntimeError("CUDA error: no kernel image")
if mode.startswith("/"):
    for name in ("adapter_model.safetensors", "adapter_config.json"): shutil.copy(pathlib.Path(mode)/name, output)
if mode == "pickle": (output/"adapter_model.bin").write_bytes(b"x")
if mode == "link":
    (output/"adapter_model.safetensors").symlink_to("/etc/hostname")
    (output/"adapter_config.json").write_text("{{}}")
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path/"bin"/"llamafactory-cli"
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv(WHERE, str(path))
    return lambda mode: monkeypatch.setenv("STAND_IN", str(mode))


@pytest.fixture
def run(tmp_path):
    return made(tmp_path/"run")


def made(folder):
    "A prepared run folder"
    folder.parent.mkdir(exist_ok=True)
    (folder.parent/"rows.json").write_text(json.dumps(rows(24)))
    config = PresetConfigs.tiny(max_steps=3, device="cpu", eval_ratio=.2)
    prepare_run("instruction", folder, "tiny", folder.parent/"rows.json", config=config)
    return folder


def without_notes(run, **options):
    with pytest.warns(UserWarning, match="LLaMA-Factory: overlong"): return train_with_llamafactory(run, **options)


def test_without_the_program_nothing_is_written(run, monkeypatch):
    monkeypatch.delenv(WHERE, raising=False)
    monkeypatch.setenv("PATH", str(run))
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(RunError, match=r"neither on the PATH nor beside this Python.*pip install llamafactory"):
        train_with_llamafactory(run)
    assert sorted(path.name for path in run.rglob("*")) == before
    assert run_info(run).state == "failed" and "llamafactory-cli is not there" in run_info(run).message


def test_a_failure_is_its_own_sentence(run, program):
    program("fail")
    with pytest.raises(RunError, match="ended with 1: RuntimeError: CUDA error: no kernel image"): without_notes(run)
    status = read_status(run)
    assert (status.state, status.step, status.total) == ("failed", 3, 6) and "no kernel image" in status.message
    assert "loading 1" in (run/"train.log").read_text() and not (run/"lora_weights").exists()
    assert [path.name for path in (run/"llamafactory").iterdir() if path.is_dir()] == []


def test_its_log_becomes_ours(run, program):
    program("fail")
    with pytest.raises(RunError): without_notes(run)
    first, _, last = read_metrics(run)
    assert first == dict(step=1, total=6, epoch=1 / 3, loss=2.5, learning_rate=1e-4, grad_norm=None, tokens=None, target_tokens=None,
        seconds=1., tokens_per_second=None, eval_loss=None, note="")
    assert (last["loss"], last["eval_loss"], last["seconds"]) == (1.5, 1.25, 4.)


@pytest.mark.parametrize("mode, said", [("nothing", "left no adapter_model.safetensors"), ("pickle", "left no adapter_model.safetensors"),
    ("link", "is no ordinary file")])
def test_only_an_adapter_in_ordinary_files_is_taken(run, program, mode, said):
    program(mode)
    with pytest.raises(RunError, match=said): without_notes(run)
    assert read_status(run).state == "failed" and not (run/"lora_weights").exists()


@pytest.mark.slow
def test_an_adapter_lies_where_ours_would_and_replaces_only_when_asked(run, program, tmp_path):
    native = made(tmp_path/"ours"/"run")
    train_from_meta(native, show=False)
    program(native/"lora_weights")
    result = without_notes(run)
    assert (result.steps, result.losses, result.eval_losses) == (3, [2.5, 2., 1.5], [(3, 1.25)])
    names = [{path.name for path in (one/"lora_weights").iterdir()} for one in (run, native)]
    assert names[0] == names[1] - {"README.md"}  # PEFT's card of a model it has in memory
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (run/"lora_weights"/name).read_bytes() == (native/"lora_weights"/name).read_bytes(), name
    assert json.loads((run/"lora_weights"/"adapter_identity.json").read_text()) == json.loads(
        (native/"lora_weights"/"adapter_identity.json").read_text())
    assert read_status(run).state == "completed" and read_status(run).message == "trained by LLaMA-Factory"
    with pytest.raises(RunError, match="already holds a run"): train_with_llamafactory(run)
    without_notes(run, overwrite=True)
    assert read_status(run).state == "completed" and len(read_metrics(run)) == 3


def started(run):
    "The command in a process of its own, once its program waits"
    child = subprocess.Popen([sys.executable, "-m", "sage_finetune", "run", str(run), "--use-llamafactory"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    until(lambda: (run/"train.log").exists() and "waiting" in (run/"train.log").read_text())
    until(lambda: read_status(run).step == 2)  # the third step waits for what follows
    return child


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "sigterm", "stop_run"])
def test_whoever_ends_it_ends_all_of_it(run, program, how):
    program("wait")
    child = started(run)
    place = run/"llamafactory"
    helper = int((place/"output"/"helper").read_text())
    assert read_status(run).state == "training" and psutil.pid_exists(helper)
    if how == "stop_run": assert stop_run(run)
    else: child.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130, said
    status = read_status(run)
    assert status.state == "cancelled" and "after step 3 of 6" in status.message and "Its checkpoints are in" in status.message
    until(lambda: not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE, 20)
    assert not (place/"process.json").exists() and "loading 1" in said and not (run/"lora_weights").exists()


@pytest.mark.slow
def test_a_process_that_outlived_its_run_is_not_joined_by_another(run, program):
    program("wait")
    child = started(run)
    noted = json.loads((run/"llamafactory"/"process.json").read_text())
    child.kill()
    child.wait()
    try:
        with pytest.raises(RunError, match=f"still runs there as process {noted['pid']}"): train_with_llamafactory(run, overwrite=True)
    finally: os.killpg(noted["pid"], signal.SIGKILL)
    until(lambda: not psutil.pid_exists(noted["pid"]) or psutil.Process(noted["pid"]).status() == psutil.STATUS_ZOMBIE, 20)
    program("fail")
    (run/"metrics.jsonl").unlink()  # of a killed run, it is in no manifest: moved away by hand, as for every run
    with pytest.raises(RunError, match="no kernel image"): without_notes(run, overwrite=True)
    assert (run/"llamafactory"/"output").exists()  # the checkpoints of the killed one are nobody's to remove


def test_what_would_be_another_adapter_is_refused(run, program):
    program("fail")
    config = json.loads((run/"training_config.json").read_text()) | dict(new_tokens=["<|tool|>"])
    (run/"training_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="new_tokens"): prepare_job(run)
    assert not (run/"llamafactory").exists() and not (run/"train.log").exists()


@pytest.mark.parametrize("lines, said", [(["a", "ValueError: b", "more", ""], "ValueError: b"), (["x\x1b[2J", "  last  "], "last"),
    (["torch.OutOfMemoryError: CUDA out of memory."], "torch.OutOfMemoryError: CUDA out of memory."), ([" 50%|█████"], "")])
def test_the_line_that_says_it(lines, said): assert sensible_line(lines) == said


@pytest.mark.parametrize("arguments", [["--resume"], ["--auto-resume"], ["--num-processes", "2"], ["--use-native"]], ids=" ".join)
def test_wrong_calls_end_before_anything(run, program, arguments, capsys):
    from sage_finetune import cli  # noqa: F401  (puts the commands into the program)
    from sage_finetune.commands.program import run_program
    program("fail")
    before = time.time()
    assert run_program(["run", str(run), "--use-llamafactory", *arguments]) == 2
    assert "--use-" in capsys.readouterr().err and read_status(run).state == "pending" and time.time() - before < 60
