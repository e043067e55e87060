"Runs as processes of their own, and runs of several: real ones, that speak by gloo"
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import adapter, change, copy, ended, metrics, prepared, start, status, write_rows

from sage_finetune.checkpoint import newest_checkpoint
from sage_finetune.config import RunError
from sage_finetune.launch import follow, start_run, stop_run, train_command
from sage_finetune.runs import read_meta, read_status


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of 18 steps with dropout and rows held out; every test takes a copy"
    folder = tmp_path_factory.mktemp("processes")
    run = prepared(folder/"ready", num_train_epochs=3, save_steps=3, eval_steps=6, eval_path=write_rows(folder/"held.jsonl"), lora=dict(lora_dropout=0.1))
    change(run, device="auto")  # nobody says that there is no card: two processes must find each other all the same
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
    for count, run in enumerate(runs, 1):
        change(run, lora=dict(lora_dropout=0.), max_steps=6)
        list(follow(run, start_run(run, num_processes=count)))
    one, two = map(metrics, runs)
    for field in ("loss", "tokens", "learnt", "grad_norm"): assert [row[field] for row in two] == pytest.approx([row[field] for row in one], rel=1e-4)


def workers(process):
    "The processes torchrun started, by rank"
    found = psutil.Process(process.pid).children()
    return sorted(found, key=lambda worker: int(worker.environ()["RANK"])) if len(found) == 2 else []


@pytest.mark.parametrize("rank", [0, 1])
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
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--num_cpu_threads_per_process", "1", "-m", "sage_finetune.trainer", str(run)]
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
        said, complained = child.communicate(timeout=60)
    finally: child.kill()
    assert child.returncode == 130 and "Traceback" not in complained, complained
    assert status(run)["state"] == "cancelled" and newest_checkpoint(run/"checkpoints")[1]["step"] == status(run)["step"]


def test_a_process_that_each_trains_the_whole(ready, tmp_path, monkeypatch):
    "A launcher nobody understands must not double the work silently"
    run = copy(ready, tmp_path/"run")
    said = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2", "--num_machines", "1", "-m", "sage_finetune.trainer", str(run)], capture_output=True, text=True, timeout=300)
    assert said.returncode != 0 and "error: " in said.stderr, said.stderr
    assert not (run/"metrics.jsonl").exists()


def test_in_the_background_and_found_again(ready, tmp_path):
    "Whoever started it is gone; somebody else sees the curve from its beginning and ends it"
    run = copy(ready, tmp_path/"run")
    ended(subprocess.Popen([sys.executable, "-c", "import sys; from sage_finetune.launch import start_run; start_run(sys.argv[1])", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
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
