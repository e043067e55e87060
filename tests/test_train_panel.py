"The training panel on real runs: child processes, kills, new kernels; and what it costs to look"
import json
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
from helpers import adapter, copy, ended, metrics, prepared, status, tiny_config, until, write_rows

from sage_finetune.core.errors import DataError, RunError
from sage_finetune.core.processes import start_mark
from sage_finetune.runs.folder import write_status
from sage_finetune.trainer import LoRATrainer
from sage_finetune.ui.run_control import make_run, prepare_resume, resolve_paths
from sage_finetune.ui.run_watch import RunWatch
from sage_finetune.ui.train_panel import TrainPanel

HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> \x1b[31mred"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of 72 steps without any interruption"
    config = tiny_config(tmp_path_factory.mktemp("panel"), num_train_epochs=8, save_steps=10, eval_steps=12,
        eval_ratio=0.2, lora=dict(lora_dropout=0.1), per_device_train_batch_size=2, max_steps=72)
    LoRATrainer(config).train(show=False)
    return config


def like(straight, folder, **fields):
    "The same config for another folder"
    config = resolve_paths(straight)
    for name, value in dict(fields, output_dir=folder/"run").items(): setattr(config, name, value)
    return config


def losses(run): return [(row["step"], row["loss"], row["eval_loss"]) for row in metrics(run)]


def enabled(panel): return {name for name in ("start", "stop", "resume") if not panel.buttons[name].disabled}


def killed(panel):
    """End a run's process by force, some steps beyond its last checkpoint, when the panel has seen them all;
    the steps of the checkpoint and of the end"""
    kept, made = (lambda: max((step_of(path) for path in (panel.run_dir/"checkpoints").glob("checkpoint-*")), default=0),
        lambda: metrics(panel.run_dir)[-1]["step"])
    until(lambda: kept())
    while True:
        until(lambda: made() - kept() >= 2)
        panel.control.worker.process.send_signal(signal.SIGSTOP)
        if made() - kept() >= 2 and not list((panel.run_dir/"checkpoints").glob(".*")): break
        panel.control.worker.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    until(lambda: panel.control.watch.row.get("step") == made())
    panel.control.worker.process.kill()
    return kept(), made()


def step_of(path): return int(path.name.rpartition("-")[2])


# ---- a child process ------------------------------------------------------------------------------------------------

def test_started_stopped_and_resumed(straight, tmp_path, capfd):
    "The curve grows, the run stops with everything saved, and ends with the bytes and losses of one that was never stopped"
    panel = TrainPanel(like(straight, tmp_path))
    assert panel.state == "ready" and enabled(panel) == {"start"} and not tmp_path.joinpath("run").exists()
    panel.buttons["start"].click()
    assert panel.failure is None and panel.state == "starting" and enabled(panel) == {"stop"} and "libraries" in panel.view.line.value
    until(lambda: panel.control.watch.curve.count > 2 and panel.static_png())
    first, drawn = panel.control.watch.curve.count, panel.view.curve.widget.value
    assert (panel.state == "training" and f"Process {panel.control.status.pid} trains" in panel.view.line.value
        and "tokens/s" in panel.view.pace.value and panel.view.bar.max == 72)
    until(lambda: panel.control.watch.curve.count > first + 4 and panel.view.curve.widget.value != drawn)
    panel.buttons["stop"].click()
    assert panel.failure is None and enabled(panel) == set()
    half = panel.join(300)
    assert half.stopped and panel.state == status(panel.run_dir)["state"] and first < half.steps < 72
    assert (f"after step {half.steps} of 72" in panel.view.line.value and f"checkpoint-{half.steps} (" in panel.view.line.value
        and enabled(panel) == {"start", "resume"})
    # the GPU is free
    assert (psutil.Process(panel.control.worker.process.pid).status() == "zombie"
        if psutil.pid_exists(panel.control.worker.process.pid) else True)
    panel.buttons["compare"].click()
    until(lambda: not panel.comparing)
    again = panel.control.watch.losses.replay
    assert (panel.failure is None and again.same and again.last == half.steps
        and "that was not stopped goes on with" in panel.view.proof.value)
    compared, ahead = again.count, [loss for loss, seconds in panel.control.watch.losses.earlier.values() if seconds is None]
    assert ahead == [loss for step, loss, _ in losses(straight.output_dir) if half.steps < step <= half.steps + len(ahead)] and ahead
    panel.buttons["resume"].click()
    assert panel.failure is None and panel.control.watch.curve.count == half.steps  # the same curve
    assert f"checkpoint-{half.steps}" in panel.view.proof.value and "very bytes" in panel.view.proof.value
    done = panel.join(300)
    assert (done.state, done.steps, panel.state, panel.view.bar.value) == ("completed", 72, "completed", 72) and enabled(panel) == {"start"}
    assert (again.same and again.count == compared + len(ahead)
        and f"–{half.steps + len(ahead)} were computed again: the same losses" in panel.view.proof.value)
    assert adapter(panel.run_dir) == adapter(straight.output_dir) and losses(panel.run_dir) == losses(straight.output_dir)
    assert [row["step"] for row in panel.rows] == list(range(1, 73)) and done.losses == (metrics(panel.run_dir)[0]["loss"],
        metrics(panel.run_dir)[-1]["loss"])
    assert panel.static_png().startswith(b"\x89PNG") and "completed" in panel.static_html() and "lora_weights" in repr(panel)
    assert not panel.poller.is_polling and capfd.readouterr() == ("", "")


NEW_KERNEL = """
import sys, time
from sage_finetune.ui.train_panel import TrainPanel
panel = TrainPanel(sys.argv[1])
assert panel.state in ("starting", "training"), panel.state
while panel.control.watch.curve.count < 8 or not panel.static_png(): time.sleep(0.02)
assert panel.rows[0]["step"] == 1
panel.stop()
done = panel.join(300)
print(panel.state, done.steps, panel.control.worker.process)
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.full), 3])
def test_found_again_by_a_new_kernel(straight, tmp_path, steps):
    "Also before the first step; it sees the whole curve, and its Stop is heard"
    panel = TrainPanel(like(straight, tmp_path, max_steps=5000, num_train_epochs=1000))
    panel.start()
    until(lambda: panel.control.watch.curve.count >= steps)
    said = ended(subprocess.Popen([sys.executable, "-c", NEW_KERNEL, str(panel.run_dir)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)).split()
    assert said[0] == "cancelled" and 8 <= int(said[1]) < 5000 and said[2] == "None"
    assert panel.join(300).stopped and panel.summary.steps == int(said[1])


def test_stopped_before_it_began(straight, tmp_path):
    "Nothing was made yet, so nothing is saved; Start begins"
    panel = TrainPanel(like(straight, tmp_path))
    panel.start()
    panel.stop()
    assert (panel.join(300).steps == 0 and panel.state == "cancelled" and "before the first step" in panel.view.line.value
        and enabled(panel) == {"start"} and panel.failure is None)


@pytest.mark.slow
def test_killed_and_resumed(straight, tmp_path):
    "A red line; then the steps after the checkpoint are made again, and are seen to be the same"
    panel = TrainPanel(like(straight, tmp_path))
    panel.start()
    saved, reached = killed(panel)
    with pytest.raises(RunError, match="is gone.*SIGKILL"): panel.join(300)
    assert (panel.state == "failed" and enabled(panel) == {"start", "resume"} and "role=\"alert\"" in panel.problem.value
        and f"checkpoint-{saved} (" in panel.view.line.value)
    again = TrainPanel(panel.run_dir)  # as a new kernel would
    assert (again.state == "failed" and "is gone" in again.problem.value
        and again.control.watch.curve.count == reached == again.summary.steps)
    again.buttons["resume"].click()
    again.join(300)
    assert (again.problem.value == "" and adapter(again.run_dir) == adapter(straight.output_dir)
        and losses(again.run_dir) == losses(straight.output_dir))
    seen = again.control.watch.losses.replay
    assert ((seen.first, seen.last, seen.same) == (saved + 1, reached, True)
        and "the same losses, to the last digit" in again.view.proof.value and again.control.watch.curve.count == 72)


def test_a_difference_is_seen(straight, tmp_path):
    "A step that gives another loss the second time is told"
    run = copy(straight.output_dir, tmp_path/"run")
    watch, rows = RunWatch(run), metrics(run)
    watch.poll()
    rows[40] |= dict(loss=rows[40]["loss"] + 1e-9)
    (run/"metrics.jsonl").write_text("".join(json.dumps(row | dict(seconds=row["seconds"] + (row["step"] > 38))) + "\n" for row in rows))
    watch.poll()
    assert ((watch.losses.replay.first, watch.losses.replay.count, watch.losses.replay.differ, watch.losses.replay.example[0])
        == (39, 34, 1, 41) and "1 of 34 losses differ" in str(watch.losses.replay))


def test_overfitting_is_told(straight, tmp_path):
    "The loss falls and the held-out one rises: a warning, live and in what is left behind; none when the best adapter was kept"
    run = copy(straight.output_dir, tmp_path/"run")
    rows, last = metrics(run), [row["step"] for row in metrics(run) if row["eval_loss"] is not None][-1]
    best = min((row["eval_loss"], row["step"]) for row in rows if row["eval_loss"] is not None and row["step"] != last)
    assert "overfitting" not in TrainPanel(run).view.proof.value
    (run/"metrics.jsonl").write_text(
        "".join(json.dumps(row | dict(eval_loss=2 * best[0] if row["step"] == last else row["eval_loss"])) + "\n" for row in rows))
    panel = TrainPanel(run)
    assert all(f"lowest at step {best[1]}" in text and "load_best_model_at_end" in text
        for text in (panel.view.proof.value, panel.static_html(), repr(panel)))
    write_status(run, "completed", 72, 72, f"the adapter is that of step {best[1]}, where the held-out loss was lowest", best_restored=True)
    assert "overfitting" not in TrainPanel(run).view.proof.value
    # as older versions wrote it
    (run/"status.json").write_text(json.dumps({name: value for name, value in status(run).items() if name != "best_restored"}))
    assert "overfitting" not in TrainPanel(run).view.proof.value
    write_status(run, "completed", 72, 72)
    assert "overfitting" in TrainPanel(run).view.proof.value


def test_refused_at_the_door(straight, tmp_path):
    "The run's own sentence, in red; and a run that is there keeps its config"
    config = like(straight, tmp_path,
        data_path=write_rows(tmp_path/"bad.jsonl", [dict(instruction="What?", output=HOSTILE), dict(wrong=HOSTILE)]))
    panel = TrainPanel(config)
    panel.start()
    with pytest.raises(RunError, match="bad.jsonl, line 2"): panel.join(300)
    assert (panel.state == "failed" and "bad.jsonl, line 2" in panel.problem.value
        and "<script" not in panel.problem.value + panel.view.log.value and not panel.run_dir.joinpath("metrics.jsonl").exists())
    assert enabled(panel) == {"start"}
    run = copy(straight.output_dir, tmp_path/"good")
    before = (run/"training_config.json").read_bytes()
    panel.look_at(type(config)(**config.to_dict() | dict(output_dir=str(run))))
    assert panel.state == "completed"
    panel.buttons["start"].click()
    assert "already holds a run" in panel.problem.value and isinstance(panel.failure, RunError)
    panel.replace.value = True
    panel.buttons["start"].click()
    with pytest.raises(RunError, match="line 2"): panel.join(300)
    assert ((run/"training_config.json").read_bytes() == before and not (run/"finetune_meta.json").exists()
        and losses(run) == losses(straight.output_dir))


def test_replaced(straight, tmp_path):
    "What is there is replaced only when that was said; the old curve is not taken for the new one"
    run = copy(straight.output_dir, tmp_path/"run")
    panel = TrainPanel(like(straight, tmp_path, max_steps=4))
    assert panel.state == "completed" and panel.control.watch.curve.count == 72
    panel.replace.value = True
    panel.buttons["start"].click()
    assert panel.failure is None and panel.control.watch.curve.count == 0 and not panel.replace.value
    assert panel.join(300).steps == 4 and len(metrics(run)) == 4 and not panel.control.watch.losses.replay.count


def test_resumed_with_another_config(straight, tmp_path):
    run = copy(straight.output_dir, tmp_path/"run")
    with pytest.raises(RunError, match="learning_rate was 0.002, now 0.1"): prepare_resume(run, like(straight, tmp_path, learning_rate=0.1))
    with pytest.raises(RunError, match="data_path was"):
        prepare_resume(run, like(straight, tmp_path, data_path=write_rows(tmp_path/"other.jsonl")))
    assert resolve_paths(straight).to_dict() | dict(output_dir=str(run), max_steps=80) == config_of(
        prepare_resume(run, like(straight, tmp_path, max_steps=80)))


def config_of(run):
    "The config of a run as a user would have written it: what was chosen for it undone"
    content = json.loads((run/"training_config.json").read_text())
    return content | dict(overwrite_output_dir=False)


def test_relative_paths(tmp_path, monkeypatch):
    "A config with relative paths means the same to a process that stands somewhere else"
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl")), write_rows(Path("held.jsonl"))
    run = make_run(tiny_config(Path("."), data_path="rows.jsonl", eval_path="held.jsonl", output_dir="run"))
    content = json.loads((run/"training_config.json").read_text())
    assert [content[name] for name in ("data_path", "eval_path", "output_dir")] == [str(tmp_path/name)
        for name in ("rows.jsonl", "held.jsonl", "run")]


# ---- in this process ------------------------------------------------------------------------------------------------

def test_in_this_process(straight, tmp_path, capfd):
    "The same panel, the same bytes, nothing printed; a second panel finds the thread"
    panel = TrainPanel(like(straight, tmp_path), in_process=True)
    panel.start()
    until(lambda: panel.control.watch.curve.count > 3)
    second = TrainPanel(panel.run_dir)
    assert second.state == "training" and "This kernel trains" in second.view.line.value
    with pytest.raises(RunError, match="is being trained already"): second.resume()
    second.stop()
    assert second.join(300).stopped and panel.join(300).stopped
    second.look_at(panel.run_dir)
    panel.watch()
    panel.resume()
    assert (panel.join(300).steps == 72 and adapter(panel.run_dir) == adapter(straight.output_dir)
        and losses(panel.run_dir) == losses(straight.output_dir))
    assert capfd.readouterr() == ("", "") and "loss" in panel.view.log.value


def test_an_error_in_this_process(straight, tmp_path):
    panel = TrainPanel(like(straight, tmp_path, data_path=write_rows(tmp_path/"bad.jsonl", [dict(wrong="row")])), in_process=True)
    panel.start()
    with pytest.raises(DataError, match="line 1"): panel.join(300)
    assert "line 1" in panel.problem.value and panel.state == "failed" and isinstance(panel.failure, DataError)


def test_stopping_somebody_elses_kernel(tmp_path):
    "A signal would end the notebook that trains; it is refused"
    run = prepared(tmp_path/"run")
    holds = ("import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[2]); lock.acquire(); "
        "print(flush=True); time.sleep(100)")
    kernel = subprocess.Popen([sys.executable, "-c", holds, "ipykernel_launcher", str(run/".lock")], stdout=subprocess.PIPE)
    try:
        kernel.stdout.readline()  # it holds the folder, as a run in a notebook does
        write_status(run, "training", 3, 10)
        (run/"status.json").write_text(json.dumps(status(run) | dict(pid=kernel.pid, start_mark=start_mark(kernel.pid))))
        panel = TrainPanel(run)
        assert panel.state == "training"
        panel.buttons["stop"].click()
        assert "Stop it there" in panel.problem.value and kernel.poll() is None
        with pytest.raises(RunError, match="is being trained already"): panel.start()
        panel.close()
    finally: kernel.kill()


# ---- windows --------------------------------------------------------------------------------------------------------

def test_a_cell_run_ten_times(straight, tmp_path):
    "One thread, the newest panel watches, the first can take it back; closed, none is left"
    run = prepared(tmp_path/"run")
    write_status(run, "training", 0, 10)  # this process trains, as far as anybody can see
    before = threading.active_count()
    panels = [TrainPanel(run) for _ in range(10)]
    until(lambda: threading.active_count() == before + 1, 10)
    assert ([panel.poller.is_polling for panel in panels] == [False] * 9 + [True] and "newer panel" in panels[0].view.line.value
        and panels[0].buttons["here"].layout.display == "")
    panels[0].buttons["here"].click()
    assert panels[0].poller.is_polling and not panels[9].poller.is_polling and panels[0].buttons["here"].layout.display == "none"
    panels[0].close()
    until(lambda: threading.active_count() == before, 10)
    assert all(widget.comm is None for widget in (panels[0].box, panels[0].view.curve.widget, panels[0].view.bar,
        *panels[0].buttons.values())) and panels[1].box.comm is not None


def test_text_is_text(straight, tmp_path):
    "In log lines, messages and folder names"
    run = copy(straight.output_dir, tmp_path/"<img src=x onerror=alert(1)>")
    write_status(run, "failed", 3, 72, HOSTILE)
    (run/"train.log").write_text(HOSTILE + "\n" + "x" * 200_000 + "\n" + "\u202eevil\n")
    panel = TrainPanel(run)
    shown = [panel.view.head.value, panel.view.line.value, panel.problem.value, panel.view.log.value, panel.static_html()]
    for text in shown: assert "<img" not in text and "<script" not in text and "\x1b" not in text and len(text) < 20_000
    assert "&lt;script&gt;" in panel.problem.value and "\x1b" not in repr(panel)


def test_a_broken_folder_is_told(straight, tmp_path):
    run = copy(straight.output_dir, tmp_path/"run")
    (run/"metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    panel = TrainPanel(run)
    assert "line 2, is not a JSON object" in panel.problem.value and not panel.poller.is_polling
    (run/"metrics.jsonl").write_text('{"step": "<b>", "loss": null}\n[1]\n{"loss": 1}\n{"step": 2, "loss": '
        'NaN, "tokens": null}\n'.replace("[1]\n", ""))
    panel = TrainPanel(run)
    assert panel.problem.value == "" and panel.control.watch.curve.count == 1


# ---- what it costs --------------------------------------------------------------------------------------------------

def long_run(folder, steps, line):
    "A run that is said to be training, its file growing by chunks"
    for start in range(0, steps, 5000):
        with open(folder/"metrics.jsonl", "a") as file:
            file.writelines(json.dumps(dict(line, step=step, total=steps, seconds=step / 20, loss=2 + step % 7 / 10)) + "\n"
                for step in range(start + 1, start + 5001))
        yield start + 5000


def test_memory_of_a_long_run(straight, tmp_path):
    "Sixty thousand steps take no more than twenty thousand; eight hours at twenty steps a second are 576,000"
    write_status(tmp_path, "training", 0, 60_000)
    panel, line, held = TrainPanel(tmp_path), metrics(straight.output_dir)[0], {}
    panel.poller.stop()
    tracemalloc.start()
    for step in long_run(tmp_path, 60_000, line):
        panel.poller.poll()
        while panel.control.watch.behind: panel.poller.poll()
        held[step] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    panel.close()
    assert panel.control.watch.curve.count == 60_000 and len(panel.rows) <= 2000
    early, late = (max(size for step, size in held.items() if (step > 30_000) == after) for after in (False, True))
    assert late < 1.25 * early and late < 8e6, held  # a saw: thinned by halves


def test_what_a_look_costs(straight, tmp_path):
    "A redraw of ten thousand points takes hardly more of a thread's time than one of five hundred"
    line, costs = metrics(straight.output_dir)[0], {}
    for count in (500, 10_000):
        folder = tmp_path/str(count)
        folder.mkdir()
        for step in range(1, count + 1):
            with open(folder/"metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(line, step=step, total=20_000, seconds=step, loss=2 + step % 7 / 10)) + "\n")
        write_status(folder, "training", count, 20_000)
        panel = TrainPanel(folder)
        panel.poller.stop()
        while panel.control.watch.behind: panel.poller.poll()
        costs[count] = min(redraw(panel) for _ in range(8))
        panel.close()
    assert costs[10_000] < 4 * costs[500], costs


def redraw(panel):
    "Seconds of this thread's time that one drawing takes"
    panel.view.curve.shown = (None,)
    began = time.thread_time()
    panel.view.curve.draw(panel.control, at_once=True)
    return time.thread_time() - began


def test_a_log_of_a_gigabyte(straight, tmp_path):
    "Only its end is read"
    run = copy(straight.output_dir, tmp_path/"run")
    with open(run/"train.log", "wb") as log:
        log.truncate(10**9)
        log.seek(10**9)
        log.write(b"\nthe last line\n")
    began = time.thread_time()
    panel = TrainPanel(run)
    assert "the last line" in panel.view.log.value and time.thread_time() - began < 2 and len(panel.view.log.value) < 20_000
