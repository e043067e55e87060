"What several tests need: rows, run folders, the program as a child process, a disk that fills up"
import errno
import hashlib
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sage_finetune.config import PresetConfigs, TrainingConfig
from sage_finetune.data.tasks import prepare_run

COLOURS = ("red", "green", "blue", "grey")


def rows(count=24):
    "Alpaca rows with answers of different lengths"
    return [dict(instruction=f"Which colour has lamp {at}?", output=" and ".join(COLOURS[:at % 4 + 1]).capitalize() + ".")
        for at in range(count)]


def write_rows(path, content=None):
    "A .jsonl file of rows"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows() if content is None else content)), encoding="utf-8")
    return path


def tiny_config(folder, **overrides):
    "The tiny config on the rows above, all of them trained on"
    data = overrides.pop("data_path", None) or write_rows(folder/"rows.jsonl")
    fields = dict(data_path=data, output_dir=folder/"run", eval_ratio=0., per_device_train_batch_size=4, num_train_epochs=2, device="cpu")
    return PresetConfigs.tiny(**fields | overrides)


def trained(folder):
    "A trainer that has learnt the rows above"
    from sage_finetune import LoRATrainer
    trainer = LoRATrainer(tiny_config(folder, num_train_epochs=4))
    result = trainer.train(show=False)
    assert result.losses[-1] < result.losses[0]
    return trainer


def train_here(run):
    "Train a prepared run folder in this process"
    from sage_finetune import train_from_meta
    return train_from_meta(run, show=False)


def until(true, seconds=300):
    "Wait for something"
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def prepared(folder, **fields):
    "A prepared run folder, and in its training_config.json what a user may have written there"
    data = write_rows(folder.parent/"rows.jsonl")
    run = prepare_run("custom", folder, data=data, eval_ratio=0., per_device_train_batch_size=4, num_train_epochs=2, device="cpu")
    change(run, **fields)
    return run


def change(run, **fields):
    "Edit the training_config.json of a run folder"
    config = TrainingConfig.load(run/"training_config.json")
    for name, value in fields.items(): setattr(config, name, value)
    config.save(run/"training_config.json")


def copy(run, to):
    "A run folder somewhere else"
    return Path(shutil.copytree(run, to))


def adapter(run): return (run/"lora_weights"/"adapter_model.safetensors").read_bytes()


def metrics(run): return [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines()]


def status(run): return json.loads((run/"status.json").read_text())


# ---- a training loop without any code of ours ---------------------------------------------------------------------------

def encoded(row, tokenizer):
    "Ids and labels of a row, from the pieces of its conversation: the prompt, the answer with its end of turn, what follows"
    talk = [dict(role="user", content=row["instruction"]), dict(role="assistant", content=row["output"])]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    answer = row["output"] + "<|im_end|>"
    assert text.startswith(prompt + answer)
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (prompt, answer, text[len(prompt + answer):])]
    return torch.tensor([sum(ids, [])]), torch.tensor([[-100] * len(ids[0]) + ids[1] + [-100] * len(ids[2])])


def reference(model, tokenizer, content, order, *, rate, total, warmup, decay, longest):
    "Losses, gradient lengths and learning rates of the first steps; one row at a time, so without any padding"
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
    model.train()
    for step, row_numbers in enumerate(order):
        examples = [encoded(content[row], tokenizer) for row in row_numbers]
        target_tokens = [int((labels != -100).sum()) for _, labels in examples]
        loss = sum(model(input_ids=ids, labels=labels).loss * count
            for (ids, labels), count in zip(examples, target_tokens)) / sum(target_tokens)
        optimizer.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(weights, longest)
        for group in optimizer.param_groups:
            group["lr"] = rate * (step/warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))
        optimizer.step()
        yield loss.item(), length.item(), optimizer.param_groups[0]["lr"]


# ---- the program ------------------------------------------------------------------------------------------------------

def start(*arguments, module="sage_finetune.cli", cwd=None):
    "The program as a child process"
    return subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)], cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(child):
    "Wait for a child that must end well; what it printed"
    try: said, complained = child.communicate(timeout=300)
    finally: child.kill()
    assert child.returncode == 0, f"{child.args} ended with {child.returncode}\n{said}\n{complained}"
    return said


def program(*arguments, **options): return ended(start(*arguments, **options))


def one_sentence(complained):
    "The sentence behind `error: `, which must be all that was said"
    lines = [line for line in complained.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), complained
    assert "Traceback" not in complained
    return lines[0].removeprefix("error: ")


# ---- the disk ---------------------------------------------------------------------------------------------------------

def tree(folder):
    "Every file below a folder, hidden ones too, by its content; folders by None"
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*") if path.name != ".lock"}


def leftovers(folder):
    "Temporary files somebody forgot; the lock of a run folder stays, free, because removing it would be a race"
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")
        if path.name.startswith(".") and path.name != ".lock" or path.name.endswith((".tmp", ".old"))]


@contextmanager
def mounted(folder, options):
    "A small file system of its own in a folder; the test is skipped where one may not mount"
    folder.mkdir(parents=True, exist_ok=True)
    asked = (subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
        if shutil.which("mount") else None)
    if not asked or asked.returncode: pytest.skip("mounting is not permitted here")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def file_limit(size):
    "No file may grow beyond `size` bytes (a quota): the operating system refuses the write"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN and errno.EFBIG  # Python's default: an OSError instead of a dead process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
