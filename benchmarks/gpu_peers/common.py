"What the programs share on a GPU: the job, a watch that waits for the GPU, its memory, and running out of it as a result"
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from peers.common import LEARNING_RATE

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear layers but the head
NO_ROOM = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|cannot allocate memory", re.IGNORECASE)


def job():
    "What is asked, from the command line"
    asked = SimpleNamespace(**json.loads(sys.argv[1]))
    asked.folder, asked.rows, asked.cuda = Path(asked.folder), Path(asked.rows), asked.device == "cuda"
    return asked


def wait(asked):
    "The GPU has done what it was told: only then a clock means anything"
    import torch
    if asked.cuda: torch.cuda.synchronize()


def gpu_memory(asked):
    "The most the GPU held for tensors, and the most that was taken from it, in MiB; nothing without a GPU"
    import torch
    if not asked.cuda: return {}
    return dict(allocated_mib=torch.cuda.max_memory_allocated() / 2**20, reserved_mib=torch.cuda.max_memory_reserved() / 2**20)


def attention(asked):
    "The fastest attention that is installed"
    return "flash_attention_2" if asked.cuda and find_spec("flash_attn") else "sdpa"


def four_bits():
    "The settings of QLoRA: NF4, quantised twice, computing in bf16"
    import torch
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16)


def waiting(asked):
    "A callback that stands before the watch's and waits for the GPU at the end of each step"
    from transformers import TrainerCallback

    class Waits(TrainerCallback):
        "Nothing but that"
        def on_train_begin(self, *_, **__): wait(asked)
        def on_step_end(self, *_, **__): wait(asked)

    return Waits()


def trainer_settings(asked):
    """What TRL's trainer is told, by itself and under Unsloth:
    lines packed by best fit, or rows of similar length together; answers are trained on"""
    batch, accumulated = dict(padded=(asked.batch, 1), packed=(asked.lines, 1), lines=(1, asked.lines))[asked.variant]
    packing = dict(train_sampling_strategy="group_by_length") if asked.variant == "padded" else dict(packing=True, packing_strategy="bfd")
    return packing | dict(
        output_dir=str(asked.folder), max_length=asked.length, max_steps=asked.steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        bf16=True, completion_only_loss=True,
        gradient_checkpointing=asked.checkpointing, use_cpu=not asked.cuda, logging_steps=max(1, asked.steps // 4), save_strategy="no",
        report_to="none", disable_tqdm=True, seed=42) | asked.set


def no_room(error):
    "Whether an error, or one behind it, says that memory ran out"
    while error is not None:
        if isinstance(error, MemoryError) or NO_ROOM.search(str(error)): return True
        error = error.__cause__ or error.__context__
    return False


def told(program):
    "Run a program; that memory ran out is a result too"
    try: program(job())
    except Exception as error:
        if not no_room(error): raise
        first = (str(error).strip() or "MemoryError").splitlines()[0][:300]
        print("RESULT " + json.dumps(dict(outcome="out of memory", said=first)), flush=True)
