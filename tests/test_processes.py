"Runs as processes of their own, and runs of several: real ones, that speak by gloo"
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import adapter, change, copy, ended, metrics, prepared, start, status, train_here, tree, write_rows

from sage_finetune.core.errors import RunError
from sage_finetune.runs.folder import is_running, read_status
from sage_finetune.runs.launch import follow, last_launch, log_lines, run_status, start_run, stop_run
from sage_finetune.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of 18 steps with dropout and rows held out; every test takes a copy"
    folder = tmp_path_factory.mktemp("processes")
    run = prepared(folder/"ready", num_train_epochs=3, save_steps=3, eval_steps=6, eval_path=write_rows(folder/"held.jsonl"),
        lora=dict(lora_dropout=0.1))
    change(run, device="auto")  # nobody says that there is no GPU: two processes must find each other all the same
    return run


@pytest.fixture(scope="module")
def straight(ready):
    "The same run by two processes, without any interruption"
    run = copy(ready, ready.parent/"straight")
    assert [row["step"] for row in follow(run, start_run(run, num_processes=2))] == list(range(1, 19))
    return run


def numbers(run): return [(row["step"], row["loss"], row["eval_loss"], row["grad_norm"], row["tokens"]) for row in metrics(run)]


def test_two_processes_share_the_steps(straight, ready, tmp_path):
    "The tokens of a step are counted once; without dropout the losses are those of one process"
    assert newest_checkpoint(straight/"checkpoints")[1]["identity"]["processes"] == 2
    runs = [copy(ready, tmp_path/str(count)) for count in (1, 2)]
    for run in runs: change(run, lora=dict(lora_dropout=0.), max_steps=6)
    list(follow(runs[1], start_run(runs[1], num_processes=2)))
    train_here(runs[0])
    one, two = map(metrics, runs)
    for field in ("loss", "tokens", "target_tokens", "grad_norm"):
        assert [row[field] for row in two] == pytest.approx([row[field] for row in one], rel=1e-4)


def workers(process):
    "The processes torchrun started, by rank"
    found = psutil.Process(process.pid).children()
    return sorted(found, key=lambda worker: int(worker.environ()["RANK"])) if len(found) == 2 else []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_one_of_two_is_killed(straight, ready, tmp_path, rank):
    "The other ends by itself, nothing hangs, and the run goes on to the same bytes"
    run = copy(ready, tmp_path/"run")
    process = start_run(run, num_processes=2)
    try:
        while process.poll() is None and not (run/"checkpoints"/"checkpoint-3").exists(): time.sleep(0.005)
        workers(process)[rank].kill()
        process.wait(timeout=60)
    finally: process.kill()
    with pytest.raises(RunError): list(follow(run, process))
    if rank: assert read_status(run).state == "failed" and "another process of this run ended" in read_status(run).message
    list(follow(run, start_run(run, num_processes=2, resume=True)))
    assert adapter(run) == adapter(straight) and numbers(run) == numbers(straight)


def test_stopped_and_resumed_by_two(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    steps = follow(run, start_run(run, num_processes=2))
    for row in steps:
        if row["step"] == 5: assert stop_run(run)
    assert 5 <= row["step"] < 18 and read_status(run).state == "cancelled"
    list(follow(run, start_run(run, num_processes=2, resume=True)))
    assert adapter(run) == adapter(straight) and numbers(run) == numbers(straight)


def test_accelerate_launch(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
        "1", "--num_cpu_threads_per_process", "1", "-m", "sage_finetune.trainer", str(run)]
    said = subprocess.run(launched, capture_output=True, text=True, timeout=300, env=dict(os.environ, ACCELERATE_USE_CPU="true"))
    assert said.returncode == 0, said.stderr
    assert status(run)["state"] == "completed" and len(metrics(run)) == 18
    assert numbers(run) == numbers(straight) and adapter(run) == adapter(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_with_two_processes_is_interrupted(ready, tmp_path, number):
    run = copy(ready, tmp_path/"run")
    child = start("run", run, "--num-processes", "2")
    try:
        while child.poll() is None and not (run/"checkpoints"/"checkpoint-3").exists(): time.sleep(0.005)
        child.send_signal(number)
        _, complained = child.communicate(timeout=60)
    finally: child.kill()
    assert child.returncode == 130 and "Traceback" not in complained, complained
    assert status(run)["state"] == "cancelled" and newest_checkpoint(run/"checkpoints")[1]["step"] == status(run)["step"]


def test_a_process_that_each_trains_the_whole(ready, tmp_path, monkeypatch):
    "A launcher nobody understands must not double the work silently"
    run = copy(ready, tmp_path/"run")
    said = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2",
        "--num_machines", "1", "-m", "sage_finetune.trainer", str(run)], capture_output=True, text=True, timeout=300)
    assert said.returncode != 0 and "error: " in said.stderr, said.stderr
    assert not (run/"metrics.jsonl").exists()


def test_in_the_background_and_found_again(ready, tmp_path):
    "Whoever started it is gone; somebody else sees the curve from its beginning and ends it"
    run = copy(ready, tmp_path/"run")
    ended(subprocess.Popen([sys.executable, "-c", "import sys; from sage_finetune.runs.launch import start_run; start_run(sys.argv[1])",
        str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    while not (run/"metrics.jsonl").exists(): time.sleep(0.02)
    with pytest.raises(RunError, match="in use: process"): start_run(run)
    assert [row["step"] for row in follow(run)] == list(range(1, 19)) and status(run)["state"] == "completed"
    assert "step " in (run/"train.log").read_text()


def test_a_background_process_that_is_killed(ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    process = start_run(run)
    steps = follow(run)
    while not (run/"metrics.jsonl").exists(): time.sleep(0.02)
    next(steps)
    process.kill()
    process.wait()
    with pytest.raises(RunError, match="is gone.*goes on from its last checkpoint"): list(steps)


# ---- one start after another in the same folder ----------------------------------------------------------------------

def elsewhere(code, run):
    "A line of Python in a kernel of its own, which knows nothing but the folder"
    head = "import sys, json; from sage_finetune.runs.launch import follow, run_status, start_run, stop_run; run = sys.argv[1]; "
    return subprocess.Popen([sys.executable, "-c", head + code, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def halfway(ready):
    "The run, stopped by itself after six of its eighteen steps, with a sentence of that in the log"
    run = copy(ready, ready.parent/"halfway")
    process = start_run(run)
    for row in follow(run, process):
        if row["step"] == 5: stop_run(run)
    assert process.wait() == 130 and read_status(run).state == "cancelled" and len(metrics(run)) < 18
    return run


def test_whoever_follows_at_once_waits_for_the_beginning(halfway, tmp_path):
    "With the process, without it, and from another kernel: nobody takes the end of the run before for the end of this one"
    run = copy(halfway, tmp_path/"run")
    process = start_run(run, resume=True)
    assert run_status(run).state == "preparing" and run_status(run).pid == process.pid and is_running(run_status(run))
    other = elsewhere("print(json.dumps([row['step'] for row in follow(run)]))", run)
    assert [row["step"] for row in follow(run)] == list(range(1, 19))
    assert [row["step"] for row in follow(run, process)] == list(range(1, 19)) and process.returncode == 0
    assert ended(other).split("\n")[0] == str(list(range(1, 19)))


def test_rows_that_a_new_run_replaces_are_not_taken_for_its_own(halfway, tmp_path):
    run = copy(halfway, tmp_path/"run")
    old = [row["seconds"] for row in metrics(run)]
    new = [row["seconds"] for row in follow(run, start_run(run, overwrite=True))]
    assert len(new) == 18 and not set(old) & set(new)


@pytest.mark.parametrize("known", [True, False])
def test_a_process_that_is_refused_at_the_door(halfway, tmp_path, known):
    "Its own sentence is said, not that of the run before; the run is as it was"
    run = copy(halfway, tmp_path/"run")
    (run/"status.json").write_text((run/"status.json").read_text().replace('"cancelled"', '"failed"').replace("SIGTERM", "an old sentence"))
    before = tree(run)
    process = start_run(run)  # neither resume nor overwrite
    rows = []
    with pytest.raises(RunError, match="already holds a run .*resume=True") as told:
        for row in follow(run, process if known else None): rows.append(row["step"])
    assert "an old sentence" not in str(told.value) and rows == [row["step"] for row in metrics(run)]
    assert run_status(run).state == "failed" and "already holds a run" in run_status(run).message
    after = {name: content for name, content in tree(run).items() if name not in ("launch.json", "train.log")}
    assert after == {name: content for name, content in before.items() if name not in ("launch.json", "train.log")}


def test_last_words_are_those_of_the_last_start(halfway, tmp_path):
    "A sentence of an earlier start is not repeated when a later process is killed"
    run = copy(halfway, tmp_path/"run")
    with open(run/"train.log", "a") as log: log.write("error: an old sentence")
    process = start_run(run, resume=True)
    steps = follow(run, process)
    next(steps)
    process.kill()
    with pytest.raises(RunError, match="is gone.*It said last: .*goes on from its last checkpoint") as told: list(steps)
    assert "an old sentence" not in str(told.value) and not any("old sentence" in line or "=====" in line for line in log_lines(run))
    said = (run/"train.log").read_text()
    marks = [line for line in said.splitlines() if line.startswith("===== ")]
    assert (len(marks) == 2 and all(" UTC: python -m sage_finetune.trainer " in line for line in marks)
        and "--resume" in marks[1] and said.index("an old sentence") < said.index(marks[1]))


def test_the_log_holds_no_secret(halfway, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_the_file")
    run = copy(halfway, tmp_path/"run")
    with pytest.raises(RunError): list(follow(run, start_run(run)))
    assert not [path for path in run.rglob("*") if path.is_file() and b"hf_not_for_the_file" in path.read_bytes()]


@pytest.mark.parametrize("count", [1, 2])
def test_stopped_before_it_began(halfway, tmp_path, count):
    "Start and Stop, one click after the other: nothing is left behind, nothing is an error, and the run goes on from where it was"
    run = copy(halfway, tmp_path/"run")
    process = start_run(run, num_processes=count, resume=True)
    with pytest.raises(RunError, match="in use"): start_run(run, resume=True)
    assert stop_run(run)
    assert [row["step"] for row in follow(run, process)] == [row["step"] for row in metrics(run)]
    assert run_status(run).state == "cancelled" and not is_running(run_status(run)) and not stop_run(run)
    assert last_launch(run).stopped and "before it began" in run_status(run).message


def test_who_trains_it(halfway, ready, tmp_path):
    "Somebody who comes later learns from the folder in how many processes it is trained, and may end it"
    run = copy(ready, tmp_path/"run")
    process = start_run(run, num_processes=2)
    asks = "status = run_status(run); print(json.dumps([status.state, status.pid, status.processes]))"
    assert ended(elsewhere(asks, run)).split() == ['["preparing",', f"{process.pid},", "2]"]
    steps = follow(run, process)
    next(steps)
    found = run_status(run)
    assert (found.state, found.processes) == ("training", 2) and found.pid in [worker.pid for worker in workers(process)]
    assert "true" in ended(elsewhere("print(json.dumps(stop_run(run)))", run))
    list(steps)
    assert run_status(run).state == "cancelled"


def test_a_run_on_another_machine_is_left_alone(halfway, tmp_path):
    "The number of its process may be anybody's here"
    run, bystander = copy(halfway, tmp_path/"run"), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (run/"status.json").write_text((run/"status.json").read_text().replace('"cancelled"', '"training"').replace('"pid": null',
            f'"pid": {bystander.pid}').replace(f'"host": "{read_status(run).host}"', '"host": "elsewhere"'))
        with pytest.raises(RunError, match="on elsewhere. Stop it there"): stop_run(run)
        with pytest.raises(RunError, match="in use"): start_run(run, resume=True)
        assert bystander.poll() is None
    finally: bystander.kill()
