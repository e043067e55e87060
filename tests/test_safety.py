"A run loses nothing: killed, stopped, out of disk, out of memory, without its folder, begun twice, or gone on with as something else"
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    adapter,
    change,
    copy,
    ended,
    file_limit,
    leftovers,
    metrics,
    mounted,
    prepared,
    rows,
    start,
    status,
    tiny_config,
    write_rows,
)

from sage_finetune.core.errors import ConfigError, RunError
from sage_finetune.core.storage import atomic_directory, write_atomic
from sage_finetune.runs.folder import read_meta
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.checkpoint import Progress, checkpoints, newest_checkpoint
from sage_finetune.training.run_writer import RunWriter

STEPS = 30


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of 30 steps with dropout and rows held out, a checkpoint after every second; every test takes a copy"
    folder = tmp_path_factory.mktemp("safe")
    return prepared(folder/"ready", num_train_epochs=5, save_steps=2, eval_steps=5,
        eval_path=write_rows(folder/"held.jsonl", rows(4)), lora=dict(lora_dropout=0.1))


@pytest.fixture(scope="module")
def straight(ready):
    "The same run without any interruption"
    run = copy(ready, ready.parent/"straight")
    trainer(run).train(show=False)
    return run


def trainer(run): return LoRATrainer(read_meta(run).to_config())


def same(run, straight):
    "Not a bit of the adapter and not a number of the curve is another"
    numbers = lambda folder: [(row["step"], row["loss"], row["eval_loss"], row["learning_rate"], row["grad_norm"], row["tokens"])
        for row in metrics(folder)]
    assert adapter(run) == adapter(straight) and numbers(run) == numbers(straight)
    assert (status(run)["state"], status(run)["step"], status(run)["pid"]) == ("completed", STEPS, None)
    assert not [name for name in leftovers(run) if not name.startswith("prepared")]


# ---- killed -----------------------------------------------------------------------------------------------------------

def killed(run, times, seed):
    said = subprocess.run([sys.executable, Path(__file__).with_name("killing.py"), run, str(times), str(seed)],
        capture_output=True, text=True, timeout=550)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["code"] == 0, said.stderr
    return told["killed"]


def test_killed_six_times_it_ends_with_the_same_bytes(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    moments = killed(run, 6, seed=1)
    assert sum(bool(where) for where, _, _ in moments) >= 5 and any(half for _, _, half in moments), moments
    same(run, straight)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_thirty_times_it_ends_with_the_same_bytes(straight, ready, tmp_path, seed):
    run = copy(ready, tmp_path/"run")
    change(run, save_steps=1)
    moments = killed(run, 30, seed)
    assert sum(bool(where) for where, _, _ in moments) >= 12 and sum(bool(half) for _, _, half in moments) >= 6, moments
    change(run, save_steps=2)
    same(run, straight)


# ---- stopped ----------------------------------------------------------------------------------------------------------

def goes_on(run, straight, result):
    assert result.stopped and "`resume=True` goes on" in result.message and status(run)["state"] == "cancelled"
    at = result.steps
    assert checkpoints(run/"checkpoints")[-1].name == f"checkpoint-{at}" and (run/"lora_weights").exists()
    assert trainer(run).train(show=False, resume=True).steps == STEPS - at
    same(run, straight)


def test_stop_from_another_thread(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    mine = trainer(run)
    result = mine.train(show=False, on_step=lambda step: step.step == 7 and threading.Thread(target=mine.stop).start())
    assert 7 <= result.steps < STEPS
    goes_on(run, straight, result)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_this_process(straight, ready, tmp_path, number):
    run = copy(ready, tmp_path/"run")
    before = signal.getsignal(number)
    result = trainer(run).train(show=False, on_step=lambda step: step.step == 5 and os.kill(os.getpid(), number))
    assert result.steps == 5 and signal.getsignal(number) == before
    goes_on(run, straight, result)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_signal_from_outside(straight, ready, tmp_path, number, code):
    run = copy(ready, tmp_path/"run")
    child = start(run, module="sage_finetune.trainer")
    try:
        while child.poll() is None and not (run/"checkpoints"/"checkpoint-4").exists(): time.sleep(0.002)
        child.send_signal(number)
        _, complained = child.communicate(timeout=60)
    finally: child.kill()
    assert child.returncode == code and "Traceback" not in complained, complained
    assert ("goes on" in status(run)["message"] and newest_checkpoint(run/"checkpoints")[1]["step"]
        == status(run)["step"] == len(metrics(run)))
    ended(start(run, "--resume", module="sage_finetune.trainer"))
    same(run, straight)


def test_the_second_interrupt_does_not_wait(straight, ready, tmp_path):
    "In the middle of a step: the step before it is what is kept"
    run = copy(ready, tmp_path/"run")

    class Impatient(LoRATrainer):
        def loss(self, batch):
            if self.progress.step == 5 and self.model.training: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
            return super().loss(batch)

    with pytest.raises(KeyboardInterrupt): Impatient(read_meta(run).to_config()).train(show=False)
    assert status(run)["state"] == "cancelled" and newest_checkpoint(run/"checkpoints")[1]["step"] == 5
    assert trainer(run).train(show=False, resume=True).steps == STEPS - 5
    same(run, straight)


def test_an_error_in_the_loops_own_body(straight, ready, tmp_path):
    "A loop that was broken off by an error, and whose variable still holds the run, gives way to the next one"
    run, kept = copy(ready, tmp_path/"run"), None
    kept = trainer(run).steps()
    for step in kept:
        if step.step == 3: break
    assert trainer(run).train(show=False, resume=True).steps == STEPS - 2  # the iterator could not know that nobody would come back
    same(run, straight)
    with pytest.raises(RunError, match="gave .* up to another one"): next(kept)
    same(run, straight)


# ---- longer, or another run -------------------------------------------------------------------------------------------

def test_a_finished_run_goes_on_for_more_epochs(straight, ready, tmp_path):
    run = copy(straight, tmp_path/"run")
    assert trainer(run).train(show=False, resume=True).steps == 0
    change(run, num_train_epochs=6, save_steps=1, save_total_limit=3, logging_steps=1)
    result = trainer(run).train(show=False, resume=True)
    assert result.steps == 6 and [row["step"] for row in metrics(run)] == list(range(1, 37)) and adapter(run) != adapter(straight)
    assert [path.name for path in checkpoints(run/"checkpoints")] == ["checkpoint-34", "checkpoint-35", "checkpoint-36"]


@pytest.mark.parametrize("fields, says", [
    (dict(seed=1), "seed: 42 then, 1 now"), (dict(per_device_train_batch_size=2), "per_device_train_batch_size: 4 then, 2 now"),
    (dict(learning_rate=1e-3), "learning_rate: 0.002 then, 0.001 now"),
    (dict(lora=dict(r=4)), "lora: {'r': 8"), (dict(max_length=128), "max_length: 512 then, 128 now"),
    (dict(optim="sgd"), "optim: 'adamw_torch' then, 'sgd' now")])
def test_what_must_not_change(straight, tmp_path, fields, says):
    run = copy(straight, tmp_path/"run")
    change(run, **fields)
    kept = adapter(run), metrics(run)
    with pytest.raises(RunError) as refused: trainer(run).train(show=False, resume=True)
    assert says in str(refused.value) and "continue_from" in str(refused.value) and (adapter(run), metrics(run)) == kept


def test_rows_that_were_edited(straight, tmp_path):
    run = copy(straight, tmp_path/"run")
    data = read_meta(run).dataset
    content = json.loads(data.read_text())
    content[3]["output"] = content[3]["output"].swapcase()
    data.write_text(json.dumps(content))
    with pytest.raises(RunError, match="the rows are others"): trainer(run).train(show=False, resume=True)


def test_nothing_to_resume(tmp_path):
    config = tiny_config(tmp_path, max_steps=2)
    with pytest.raises(RunError, match="nothing to resume"): LoRATrainer(config).train(show=False, resume=True)
    assert not config.output_dir.exists()
    assert LoRATrainer(config).train(show=False, resume="auto").steps == 2
    assert LoRATrainer(config).train(show=False, resume="auto").steps == 0


def test_a_run_that_died_before_its_first_checkpoint(ready, straight, tmp_path):
    run = copy(ready, tmp_path/"run")
    (run/"metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    assert trainer(run).train(show=False, resume=True).steps == STEPS
    same(run, straight)


# ---- two at once ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_runs_into_one_folder(straight, ready, tmp_path):
    "Both look at the same moment; one trains, the other says who"
    run = copy(ready, tmp_path/"run")
    children = [start(run, "--resume", "auto", module="sage_finetune.trainer") for _ in range(2)]
    results = [(*child.communicate(timeout=120), child.returncode, child.pid) for child in children]
    (winner, loser) = sorted(results, key=lambda result: result[2])
    assert (winner[2], loser[2]) == (0, 2) and f"process {winner[3]}" in loser[1], results
    same(run, straight)


RACE = """
import sys, time
from pathlib import Path
from sage_finetune.training.run_writer import RunWriter
from sage_finetune.config import PresetConfigs
from sage_finetune.core.errors import RunError
print("ready", flush=True)
begin, held = float(sys.stdin.readline()), []
for turn in range(20):
    while time.time() < begin + turn / 10: pass
    try: held.append(RunWriter(PresetConfigs.tiny(output_dir=Path(sys.argv[1])/str(turn)), total=1))
    except RunError: print("refused", flush=True)
    else: print("holds it", flush=True)
sys.stdin.readline()
"""


def test_twenty_races_for_a_folder(tmp_path):
    "Two processes take a new folder in the same instant, again and again: one has it, never both"
    racers = [subprocess.Popen([sys.executable, "-c", RACE, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)]
    try:
        for racer in racers: assert racer.stdout.readline() == "ready\n"
        begin = time.time() + 0.5
        for racer in racers: print(begin, file=racer.stdin, flush=True)
        told = [[racer.stdout.readline().strip() for _ in range(20)] for racer in racers]
    finally:
        for racer in racers: racer.kill(); racer.communicate()
    assert [sorted(pair) for pair in zip(*told)] == [["holds it", "refused"]] * 20


# ---- what breaks ------------------------------------------------------------------------------------------------------

class Spoilt(LoRATrainer):
    "Its loss is not a number behind step 5, in training or in evaluation"
    in_training = True
    def loss(self, batch):
        return super().loss(batch) * (float("nan") if self.progress.step == 5 and self.model.training == self.in_training else 1.)


def test_a_loss_that_is_no_number(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    with pytest.raises(RunError) as stopped: Spoilt(read_meta(run).to_config()).train(show=False)
    assert ("step 6 has loss nan" in str(stopped.value) and "Lower `learning_rate`" in str(stopped.value)
        and "examples are" in str(stopped.value))
    assert status(run)["state"] == "failed" and newest_checkpoint(run/"checkpoints")[1]["step"] == 5
    assert trainer(run).train(show=False, resume=True).steps == STEPS - 5
    same(run, straight)


class SpoiltEvaluation(Spoilt): in_training = False


def test_a_held_out_loss_that_is_no_number(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    with pytest.raises(RunError, match="held-out loss is nan after step 5.*step 5 of 30, which is saved"):
        SpoiltEvaluation(read_meta(run).to_config()).train(show=False)
    assert len(metrics(run)) == 4 and trainer(run).train(show=False, resume=True).steps == STEPS - 4
    same(run, straight)


def test_a_folder_deleted_under_the_run(straight, ready, tmp_path):
    run = copy(ready, tmp_path/"run")
    def delete(step):
        if step.step == 5: shutil.rmtree(run)
    with pytest.raises(RunError, match="was deleted or replaced .*step 6 of 30, which is saved"):
        trainer(run).train(show=False, on_step=delete)
    again = copy(ready, tmp_path/"again")
    shutil.copytree(run/"checkpoints", again/"checkpoints")
    assert trainer(again).train(show=False, resume=True).steps == STEPS - 5  # the sixth is in the adapter, but nobody had written it down
    assert adapter(again) == adapter(straight)


def test_a_disk_that_fills_up(straight, ready, tmp_path):
    with mounted(tmp_path/"disk", "size=24m") as disk:
        run, filler = copy(ready, disk/"run"), disk/"filler"
        def fill(step):
            if step.step == 5: filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * 8))
        with pytest.raises(RunError, match="disk is full.*could not be saved"): trainer(run).train(show=False, on_step=fill)
        assert newest_checkpoint(run/"checkpoints")[1]["step"] == 4
        filler.unlink()
        assert trainer(run).train(show=False, resume=True).steps == STEPS - 4
        same(run, straight)


# ---- memory -----------------------------------------------------------------------------------------------------------

HUNGRY = """
import json, resource, sys
import torch
import transformers
from sage_finetune.config import PresetConfigs
from sage_finetune.trainer import LoRATrainer
torch.set_num_threads(1)
config = PresetConfigs.tiny(data_path=sys.argv[1], output_dir=sys.argv[2], eval_ratio=0., per_device_train_batch_size=16, num_train_epochs=1, packing=False, engine="plain", device="cpu", **json.loads(sys.argv[3]))
trainer = LoRATrainer(config).setup()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if float(sys.argv[4]): resource.setrlimit(resource.RLIMIT_AS, (used + int(float(sys.argv[4]) * 2**20),) * 2)
try: result = trainer.train(show=False)
except Exception as error: print(json.dumps(dict(error=f"{type(error).__name__}: {error}")))
else: print(json.dumps(dict(losses=result.losses, eval_losses=result.eval_losses)))
"""


def hungry(folder, name, room=0., words=300, **fields):
    content = [dict(instruction=f"Say {at}.", output=" ".join(["word"] * words)) for at in range(48)]
    said = subprocess.run([sys.executable, "-c", HUNGRY, write_rows(folder/"long.jsonl", content), folder/name,
        json.dumps(fields), str(room)], capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_that_runs_out(tmp_path):
    "The operating system refuses memory; with auto_find_batch_size the run goes on in smaller pieces to the same losses"
    free = hungry(tmp_path, "free")["losses"]
    told = hungry(tmp_path, "told", room=350)["error"]
    assert "memory ran out in step 1 (examples" in told, told
    assert "per_device_train_batch_size=8` with `gradient_accumulation_steps=2" in told, told
    assert status(tmp_path/"told")["state"] == "failed"
    smaller = hungry(tmp_path, "smaller", room=350, auto_find_batch_size=True)
    assert "losses" in smaller, smaller
    assert smaller["losses"] == pytest.approx(free, rel=1e-4)
    assert any("memory ran out, so batches are half as large" in row["note"] for row in metrics(tmp_path/"smaller"))


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_that_runs_out_for_held_out_rows(tmp_path):
    "They are long, and the rows that are trained on are short, so the operating system refuses memory only in the evaluation"
    long = [dict(instruction=f"Tell {at}.", output=" ".join(["word"] * 450)) for at in range(16)]
    fields = dict(words=5, eval_path=str(write_rows(tmp_path/"held.jsonl", long)))
    free = hungry(tmp_path, "free", **fields)
    told = hungry(tmp_path, "told", room=120, **fields)["error"]
    assert ("memory ran out in the evaluation after step 3 (16 held-out rows of up to" in told
        and "auto_find_batch_size=True` with `resume=True" in told), told
    smaller = hungry(tmp_path, "smaller", room=120, auto_find_batch_size=True, **fields)
    assert "losses" in smaller, smaller
    assert smaller["losses"] == free["losses"] and smaller["eval_losses"][0][1] == pytest.approx(free["eval_losses"][0][1], rel=1e-5)


class Narrow(LoRATrainer):
    "Evaluations have no memory for more than `room` tokens at once, steps none for more than `step_room`"
    room, step_room, passes = 10**6, 10**6, 0
    def loss(self, batch):
        if not self.model.training: self.passes += 1
        if batch["input_ids"].numel() > (self.step_room if self.model.training else self.room):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return super().loss(batch)


def narrow(config, **limits):
    trainer = Narrow(config)
    for name, value in limits.items(): setattr(trainer, name, value)
    return trainer


LAYOUTS = [dict(packing=False, engine="plain"), dict(packing=True), dict(packing=True, engine="plain"),
    dict(packing=False, per_device_train_batch_size=3)]


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_memory_that_runs_out_in_an_evaluation(tmp_path, fields):
    "The same held-out losses from smaller batches, found once, and not a bit of the adapter is another"
    fields = dict(eval_path=write_rows(tmp_path/"held.jsonl", rows(7)), eval_steps=2, max_steps=4, **fields)
    usual = tiny_config(tmp_path/"usual", **fields)
    expected = LoRATrainer(usual).train(show=False)
    trainer = narrow(tiny_config(tmp_path/"narrow", auto_find_batch_size=True, **fields), room=60)
    result = trainer.train(show=False)
    assert ([loss for _, loss in result.eval_losses] == pytest.approx([loss for _, loss in expected.eval_losses], rel=1e-5)
        and len(result.eval_losses) == 2)
    assert adapter(trainer.config.output_dir) == adapter(usual.output_dir) and result.losses == expected.losses
    assert ["memory ran out in the evaluation" in row["note"] for row in metrics(trainer.config.output_dir)] == [False, True, False, False]
    saved = newest_checkpoint(trainer.config.checkpoint_dir)[1]["progress"]
    assert saved["eval_halvings"] == trainer.batching.eval_halvings > 0 == saved["halvings"]


def test_a_run_whose_evaluation_ran_out_of_memory_goes_on(tmp_path):
    "The sentence names what helps there and may be changed, and a later resume begins with batches that were small enough"
    fields = dict(eval_path=write_rows(tmp_path/"held.jsonl", rows(7)), eval_steps=2, max_steps=6, packing=False, save_steps=2)
    straight = tiny_config(tmp_path/"straight", **fields)
    expected = LoRATrainer(straight).train(show=False)
    config = tiny_config(tmp_path/"run", **fields)
    with pytest.raises(RunError, match="memory ran out in the evaluation after step 2 .7 held-out "
            "rows.*auto_find_batch_size=True` with `resume=True") as told:
        narrow(config, room=60).train(show=False)
    assert "gradient_checkpointing" not in str(told.value) and "per_device_train_batch_size" not in str(told.value)
    config.auto_find_batch_size = True
    for step in narrow(config, room=60).steps(resume=True):
        if step.step == 4: break
    again = narrow(config, room=60)
    result = again.train(show=False, resume=True)
    assert result.best == pytest.approx(expected.best) and adapter(config.output_dir) == adapter(straight.output_dir)
    assert again.passes == len(again.batching.once([30] * 7)) and not any(row["note"].endswith("from here on")
        for row in metrics(config.output_dir)[-1:])


def test_held_out_rows_that_fit_in_no_batch(tmp_path):
    "What is on already is not what helps; shorter held-out rows do, and the run goes on with them"
    long = [dict(row, output=row["output"] * 12) for row in rows(3)]
    config = tiny_config(tmp_path, eval_path=write_rows(tmp_path/"held.jsonl", long), eval_steps=2, max_steps=4, auto_find_batch_size=True)
    with pytest.raises(RunError, match="each row is already a batch of its own.*shorter rows in `eval_path`") as told:
        narrow(config, room=60).train(show=False)
    assert "auto_find_batch_size=True" not in str(told.value) and status(config.output_dir)["state"] == "failed"
    config.eval_path = write_rows(tmp_path/"short.jsonl", rows(3))
    assert narrow(config, room=60).train(show=False, resume=True).eval_losses[-1][0] == 4


def test_memory_that_runs_out_while_questions_are_answered(tmp_path):
    class Speechless(LoRATrainer):
        def generate(self, questions, max_new_tokens=64): raise MemoryError("no room for the cache")
    config = tiny_config(tmp_path, eval_path=write_rows(tmp_path/"held.jsonl", rows(4)), eval_steps=2, max_steps=4,
        auto_find_batch_size=True, eval_prompts=["Which?"])
    with pytest.raises(RunError, match="when `eval_prompts` were answered after step 2"): Speechless(config).train(show=False)
    config.eval_prompts = None
    assert Speechless(config).train(show=False, resume=True).eval_losses[-1][0] == 4


@pytest.mark.parametrize("size, batch", [(3, (1, 3)), (9, (3, 3)), (6, (3, 2))])
def test_batches_that_have_no_half(tmp_path, size, batch):
    "An odd number of rows is divided by what divides it: the same steps"
    fields = dict(packing=False, engine="plain", per_device_train_batch_size=size, max_steps=4)
    expected = LoRATrainer(tiny_config(tmp_path/"usual", **fields)).train(show=False)
    trainer = narrow(tiny_config(tmp_path/"narrow", auto_find_batch_size=True, **fields), step_room=45 * batch[0])
    assert trainer.train(show=False).losses == pytest.approx(expected.losses, rel=1e-4) and trainer.batching.batch == batch
    with pytest.raises(RunError, match=f"per_device_train_batch_size={batch[0]}` with `gradient_accumulation_steps={batch[1]}` "
            f".the same gradient; `auto_find_batch_size=True"):
        narrow(tiny_config(tmp_path/"told", **fields), step_room=45 * batch[0]).train(show=False)


# ---- evaluation, best and early stop ----------------------------------------------------------------------------------

def held(tmp_path, **fields):
    "The usual rows, evaluated on rows that contradict them, so that the held-out loss soon rises"
    wrong = [dict(row, output="Purple, nothing but purple.") for row in rows(6)]
    return tiny_config(tmp_path, eval_path=write_rows(tmp_path/"held.jsonl", wrong), eval_steps=2, num_train_epochs=8, **fields)


def test_early_stopping_keeps_the_best(tmp_path):
    flat = dict(lr_scheduler_type="constant", warmup_ratio=0.)
    config = held(tmp_path/"long", early_stopping_patience=3, **flat)
    result = LoRATrainer(config).train(show=False)
    losses = [loss for _, loss in result.eval_losses]
    lowest = losses.index(min(losses))
    assert result.best == (losses[lowest], result.eval_losses[lowest][0]) and len(losses) - 1 - lowest == 3
    assert result.stopped and "stopped early" in result.message and status(config.output_dir)["state"] == "completed"
    short = held(tmp_path/"short", max_steps=result.best[1], **flat)
    LoRATrainer(short).train(show=False)
    assert adapter(config.output_dir) == adapter(short.output_dir)


def test_killed_behind_the_best_it_still_finds_it(tmp_path):
    straight = held(tmp_path/"straight", early_stopping_patience=3, save_steps=1)
    whole = LoRATrainer(straight).train(show=False)
    config = held(tmp_path/"cut", early_stopping_patience=3, save_steps=3)
    for step in LoRATrainer(config).steps():
        if step.step == whole.best[1] + 3: break
    result = LoRATrainer(config).train(show=False, resume=True)
    assert result.best == whole.best and adapter(config.output_dir) == adapter(straight.output_dir)


# ---- other held-out rows than before ----------------------------------------------------------------------------------

def half_way(tmp_path, name, at=6, **fields):
    """A run that was evaluated on rows that contradict it, so that its lowest held-out loss is an early one,
    left in its middle; and other rows"""
    config = held(tmp_path/name, save_steps=2, **fields)
    for step in LoRATrainer(config).steps():
        if step.step == at: break
    config.eval_path = write_rows(tmp_path/name/"other.jsonl", rows(6))
    return config


def test_the_best_counts_for_the_rows_it_was_measured_on(tmp_path):
    "With others its adapter is measured anew, and the new rows decide"
    config = half_way(tmp_path, "run", at=14, load_best_model_at_end=True)
    old = newest_checkpoint(config.checkpoint_dir)[1]["progress"]["best"]
    result = LoRATrainer(config).train(show=False, resume=True)
    straight = tiny_config(tmp_path/"straight", eval_path=config.eval_path, eval_steps=2, num_train_epochs=8, load_best_model_at_end=True)
    expected = LoRATrainer(straight).train(show=False)
    assert old[1] < 14 and result.best == expected.best and adapter(config.output_dir) == adapter(straight.output_dir)
    anew = next(loss for step, loss in expected.eval_losses if step == old[1])
    assert (f"lowest at step {old[1]} ({old[0]:.3f}); on the new rows that adapter has {anew:.3f}" in result.message
        and status(config.output_dir)["message"] == "; ".join([result.message, *result.warnings]))
    assert "the held-out rows are others" in metrics(config.output_dir)[14]["note"]


def test_a_best_whose_adapter_was_not_kept_is_forgotten(tmp_path):
    config = half_way(tmp_path, "run")
    result = LoRATrainer(config).train(show=False, resume=True)
    assert result.best == min((loss, step) for step, loss in result.eval_losses) and "the lowest is looked for anew" in result.message


def test_patience_begins_anew_with_other_rows(tmp_path):
    "Evaluations that were waited for on the old rows do not end the run"
    config = half_way(tmp_path, "run", at=14, early_stopping_patience=20)
    config.early_stopping_patience = newest_checkpoint(config.checkpoint_dir)[1]["progress"]["evals_since_best"]
    result = LoRATrainer(config).train(show=False, resume=True)
    assert config.early_stopping_patience and result.steps > 10 and result.best[1] > 14


def test_a_finished_run_is_judged_by_other_rows(tmp_path):
    "No step is left, but the adapter that is kept is now another"
    config = held(tmp_path, load_best_model_at_end=True)
    before = LoRATrainer(config).train(show=False)
    kept, last = adapter(config.output_dir), newest_checkpoint(config.checkpoint_dir)[1]["step"]
    config.eval_path = write_rows(tmp_path/"other.jsonl", rows(6))
    result = LoRATrainer(config).train(show=False, resume=True)
    assert before.best[1] < last == result.best[1] and result.steps == 0 and adapter(config.output_dir) != kept
    assert "the held-out rows are others" in result.message


@pytest.mark.parametrize("fields", [dict(eval_path=None), dict(load_best_model_at_end=True)],
    ids=["no rows any more", "the best is wanted only now"])
def test_a_best_that_can_no_longer_be_had(tmp_path, fields):
    config = held(tmp_path, save_steps=2)
    for step in LoRATrainer(config).steps():
        if step.step == 20: break
    for name, value in fields.items(): setattr(config, name, value)
    result = LoRATrainer(config).train(show=False, resume=True)
    assert result.best is None or result.best[1] > 20
    assert "looked for anew" in result.message and status(config.output_dir)["state"] == "completed"


def test_the_same_rows_are_not_measured_again(tmp_path):
    "Also where the checkpoint is of a version that did not note which they were"
    config = held(tmp_path, save_steps=2, load_best_model_at_end=True)
    for step in LoRATrainer(config).steps():
        if step.step == 6: break
    assert newest_checkpoint(config.checkpoint_dir)[1]["progress"]["held_out"] and Progress(**dict(step=3)).held_out == ""
    result = LoRATrainer(config).train(show=False, resume=True)
    assert "held-out rows are others" not in result.message + "".join(row["note"] for row in metrics(config.output_dir))


@pytest.mark.parametrize("fields", [dict(early_stopping_patience=2), dict(load_best_model_at_end=True), dict(eval_prompts=["Which?"])])
def test_nothing_to_evaluate_on(tmp_path, fields):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))} needs rows to evaluate on"):
        LoRATrainer(tiny_config(tmp_path, **fields)).train(show=False)


def test_fixed_questions_are_answered_at_every_evaluation(tmp_path):
    config = held(tmp_path, eval_prompts=["Which colour has lamp 1?", "Which colour has lamp 2?"])
    result = LoRATrainer(config).train(show=False)
    assert [step for step, _ in result.generations] == [step for step, _ in result.eval_losses]
    assert [row["generations"] for row in metrics(config.output_dir) if row["eval_loss"] is not None] == [
        answers for _, answers in result.generations]
    assert result.generations[0][1] != result.generations[-1][1] and result.generations[-1][1][0].startswith("Red")


class Listener:
    def __init__(self): self.heard = []
    def on_train_begin(self, trainer): self.heard.append("begin")
    def on_step_end(self, step): self.heard.append(step.step)
    def on_train_end(self, result): self.heard.append(result.steps)


def test_callbacks(tmp_path):
    listener = Listener()
    LoRATrainer(tiny_config(tmp_path, max_steps=3)).train(show=False, callbacks=[listener])
    assert listener.heard == ["begin", 1, 2, 3, 3]


class ForTransformers(transformers.TrainerCallback):
    pass


@pytest.mark.parametrize("callback, said", [(object(), "object has none of the methods on_train_begin"),
                                            (type("Old", (), dict(on_step=print))(), "Old has none"), (Listener, "Listener is a class"),
                                            (print, "has none of the methods"), (ForTransformers(), "written for transformers' Trainer")])
def test_a_callback_that_would_never_be_called(tmp_path, callback, said):
    "Said before anything is loaded"
    trainer = LoRATrainer(tiny_config(tmp_path, max_steps=3))
    with pytest.raises(ConfigError, match=said): trainer.train(show=False, callbacks=[callback])
    assert trainer.model is None and not (tmp_path/"run").exists()


# ---- other ways to train, kept and gone on with -----------------------------------------------------------------------

METHODS = [dict(lora=dict(use_rslora=True, use_dora=True)), dict(lora=dict(init_lora_weights="pissa", lora_dropout=0.1)),
           dict(lora=dict(modules_to_save=["lm_head"])),
           dict(new_tokens=["lamp", "Which colour"]), dict(neftune_noise_alpha=5., loraplus_lr_ratio=8.),
           dict(optim="adafactor"), dict(optim="sgd", learning_rate=0.1), dict(load_in_4bit=True), dict(load_in_8bit=True)]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: ", ".join(f"{name}" for name in (fields.get("lora") or fields)))
def test_every_way_to_train_is_resumed_to_the_same_bytes(tmp_path, fields):
    whole, cut = (tiny_config(tmp_path/name, max_steps=6, save_steps=2, **fields) for name in ("whole", "cut"))
    LoRATrainer(whole).train(show=False)
    for step in LoRATrainer(cut).steps():
        if step.step == 3: break
    assert LoRATrainer(cut).train(show=False, resume=True).steps == 3
    assert adapter(cut.output_dir) == adapter(whole.output_dir) and len({row["loss"] for row in metrics(whole.output_dir)}) == 6
    assert [row["loss"] for row in metrics(cut.output_dir)] == [row["loss"] for row in metrics(whole.output_dir)]


@pytest.mark.parametrize("fields", METHODS[:5], ids=lambda fields: ", ".join(f"{name}" for name in (fields.get("lora") or fields)))
def test_an_old_adapter_goes_on_with_new_rows(tmp_path, fields):
    first = tiny_config(tmp_path/"first", num_train_epochs=6, **fields)
    before = LoRATrainer(first).train(show=False)
    kept = {name: value for name, value in fields.items() if name == "neftune_noise_alpha"}
    second = LoRATrainer(tiny_config(tmp_path/"second", continue_from=first.output_dir, num_train_epochs=1,
        warmup_ratio=0., learning_rate=1e-5, **kept))
    after = second.train(show=False)
    assert (after.losses[0] < before.losses[0] / 4 and "goes on from" in str(second.describe())
        and adapter(first.output_dir) != adapter(second.config.output_dir))
    with pytest.raises(ConfigError, match="lora.r=3 .it has"):
        LoRATrainer(tiny_config(tmp_path/"third", continue_from=first.output_dir, lora=dict(r=3))).train(show=False)


def test_no_adapter_to_continue(tmp_path):
    from sage_finetune.core.errors import ModelError
    with pytest.raises(ModelError, match="there is no adapter in"):
        LoRATrainer(tiny_config(tmp_path, continue_from=tmp_path/"nowhere")).train(show=False)
    assert not (tmp_path/"run"/"metrics.jsonl").exists()


# ---- names on the disk ------------------------------------------------------------------------------------------------

@pytest.fixture
def events(monkeypatch):
    "What is forced onto the disk, and what is renamed, in order; the system does it all the same"
    seen, sync, rename = [], os.fsync, os.rename
    def watch(name, function):
        def both(*paths):
            done = function(*paths)
            seen.append((name, Path(paths[1]).name))
            return done
        monkeypatch.setattr(os, name, both)
    monkeypatch.setattr(os, "fsync",
        lambda handle: (seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name)), sync(handle))[1])
    for name, function in (("rename", rename), ("replace", os.replace)): watch(name, function)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the system what a handle is open for")
def test_a_new_name_reaches_the_disk_too(tmp_path, events):
    "First what stands in a file, then its name, then the folder that holds the name; before that an old folder is not deleted"
    write_atomic(tmp_path/"run"/"status.json", "{}")
    assert [what for what, _ in events] == ["sync", "replace", "sync"] and events[-1] == ("sync", "run")
    for _ in range(2):
        with atomic_directory(tmp_path/"run"/"model") as temp:
            (temp/"part").mkdir()
            (temp/"part"/"weights").write_text("all")
            events.clear()
    names = [name for what, name in events if what == "sync"]
    assert {"weights", "part"} < set(names) and events[-2:] == [("rename", "model"), ("sync", "run")]


def test_a_disk_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    "Some network disks refuse it; the file is written all the same"
    sync = os.fsync
    def refuse(handle):
        if Path(f"/proc/self/fd/{handle}").is_dir(): raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)
    monkeypatch.setattr(os, "fsync", refuse)
    assert write_atomic(tmp_path/"note.json", "{}").read_text() == "{}"


def test_a_curve_survives_a_disk_that_fills_up_at_a_resume(tmp_path):
    "What a killed run wrote after its checkpoint is cut off, in a new file that takes the place of the old one only when it is whole"
    config = tiny_config(tmp_path)
    config.output_dir.mkdir()
    (config.output_dir/"metrics.jsonl").write_text("".join(json.dumps(dict(step=step, note="x" * 200)) + "\n" for step in range(1, 101)))
    before = (config.output_dir/"metrics.jsonl").read_bytes()
    with file_limit(10_000), pytest.raises(RunError, match="disk is full"): RunWriter(config, 100, resumed_at=90)
    assert (config.output_dir/"metrics.jsonl").read_bytes() == before and leftovers(config.output_dir) == []
    RunWriter(config, 100, resumed_at=90).close("cancelled")
    assert len(metrics(config.output_dir)) == 90
