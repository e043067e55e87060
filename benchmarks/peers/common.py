"What all peers share: what they are asked, the watch that times and counts their steps, and the line they print at the end"
import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STARTED = float(os.environ.get("BENCH_STARTED") or time.time())  # when the process began, before a line of Python ran
LEARNING_RATE = 2e-4


# ---- what a peer is asked ---------------------------------------------------------------------------------------------

def arguments(*variants):
    "The work, as the command line gives it"
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--rows", type=Path, required=True, help=".jsonl file of alpaca rows; the same as .json lies beside it")
    parser.add_argument("--folder", type=Path, required=True, help="where the program may write")
    parser.add_argument("--steps", type=int, help="stop after so many optimizer steps; else every row once")
    parser.add_argument("--passes", type=int, default=1, help="how often every row is seen")
    parser.add_argument("--batch", type=int, default=4, help="rows behind an optimizer step")
    parser.add_argument("--lines", type=int, default=2, help="for peers that pack by themselves: lines that hold as many rows on average")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8, help="of the adapter; its strength alpha is twice that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", default=variants[0] if variants else None, choices=variants or None)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE",
        help="further settings of the program; values in JSON, or plain text")
    asked = parser.parse_args()
    asked.set = {name: value_of(text) for name, text in (one.split("=", 1) for one in asked.set)}
    import torch
    torch.set_num_threads(asked.threads)
    return asked


def value_of(text):
    "true, 3 or 1e-4 as such, everything else as text"
    try: return json.loads(text)
    except ValueError: return text


def conversations(rows):
    "Alpaca rows as a prompt and a completion of one turn each"
    turns = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return [dict(prompt=[dict(role="user", content=row["instruction"])], completion=[dict(role="assistant", content=row["output"])])
        for row in turns]


def training_arguments(asked):
    "What transformers' Trainer and those who inherit from it are told alike"
    return dict(output_dir=str(asked.folder), per_device_train_batch_size=asked.batch, gradient_accumulation_steps=1,
                num_train_epochs=asked.passes,
                max_steps=asked.steps or -1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
                report_to="none", use_cpu=True, disable_tqdm=True, seed=42)


def row_by_row(asked):
    "The rows of a step one after the other: nothing is padded, and only one row's activations are kept at a time"
    return dict(per_device_train_batch_size=1, gradient_accumulation_steps=asked.batch)


# ---- the watch --------------------------------------------------------------------------------------------------------

class Watch:
    "When each optimizer step ended, what it read, and what it lost"
    def __init__(self):
        self.marks, self.losses, self.tokens, self.target_tokens, self.area, self.first, self.model = [], [], [], [], [], None, {}

    def look(self, model):
        "What is trained, and in which precisions"
        kinds = {learns: [one for one in model.parameters() if one.requires_grad == learns] for learns in (True, False)}
        formats = {learns: ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in found})) for learns, found in kinds.items()}
        self.model = dict(trained=sum(one.numel() for one in kinds[True]), adapter_format=formats[True], base_format=formats[False])

    def begin(self):
        "Training begins now"
        self.processor, self.machine, self.marks = time.process_time(), machine_seconds(), [time.perf_counter()]

    def read(self, tokens, target_tokens, area):
        "A micro-batch of the step that is being made: its real tokens, those trained on, and its rectangle with padding"
        if len(self.tokens) < len(self.marks):
            for counts in (self.tokens, self.target_tokens, self.area): counts.append(0)
        for counts, count in ((self.tokens, tokens), (self.target_tokens, target_tokens), (self.area, area)): counts[-1] += count

    def step(self):
        "The optimizer has made its step"
        self.marks.append(time.perf_counter())
        if self.first is None: self.first = time.time() - STARTED

    def report(self, *packages, **more):
        "Print everything as one line"
        seconds, busy = self.marks[-1] - self.marks[0], time.process_time() - self.processor
        others = max(0, machine_seconds() - self.machine - busy) / (seconds * (os.cpu_count() or 1))
        found = dict(steps=len(self.marks) - 1, tokens=self.tokens, target_tokens=self.target_tokens, area=self.area,
                     losses=self.losses, seconds=seconds,
                     step_seconds=[after - before for before, after in zip(self.marks, self.marks[1:])], to_first_step=self.first,
                     compile_seconds=compile_seconds(), cpu_seconds=busy, others=others, peak_mib=peak_memory(),
                     versions={name: installed(name) for name in ("torch", "transformers", "peft", *packages)})
        print("RESULT " + json.dumps(found | self.model | more), flush=True)


def peak_memory():
    "The most memory this process held at once, in MiB"
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    # ru_maxrss would count what the parent held, too
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def machine_seconds():
    "Work of all cores for everybody, so far; 0 where that cannot be known"
    try: fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError: return 0
    return sum(int(fields[at]) for at in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def compile_seconds():
    "What torch spent on compiling in this process"
    compiler = sys.modules.get("torch._dynamo.utils")
    return compiler.calculate_time_spent().get("total_wall_time", 0.) if hasattr(compiler, "calculate_time_spent") else 0.


def installed(package):
    "The version that is installed"
    try: return version(package)
    except PackageNotFoundError: return "source"


def watched(pad_id):
    "A watch over transformers' Trainer and whatever inherits from it, and the callback that it needs there"
    from transformers import Trainer, TrainerCallback
    watch, training_step = Watch(), Trainer.training_step

    def counted_step(self, model, inputs, *rest, **more):
        "What a row is filled up with is no part of it; the first label of a line is predicted by nothing"
        ids, labels = inputs["input_ids"], inputs["labels"]
        watch.read(int((ids != pad_id).sum()), int((labels[:, 1:] != -100).sum()), ids.numel())
        return training_step(self, model, inputs, *rest, **more)

    class Marks(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            watch.look(model)
            watch.begin()

        def on_step_end(self, *_, **__): watch.step()
        def on_log(self, args, state, control, logs, **_): watch.losses += [logs["loss"]] if "loss" in logs else []

    Trainer.training_step = counted_step
    return watch, Marks()
