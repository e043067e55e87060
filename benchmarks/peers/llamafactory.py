"""LLaMA-Factory, in an environment of its own: it asks for older versions of what the others use. `environment` makes it.

packed   rows packed into lines of cutoff_len and kept apart by a mask (neat_packing), as many lines a step as hold its rows on average
padded   rows padded to the longest of the batch
rows     the rows of a step one after the other
All in bf16 and without gradient checkpointing, which it would switch on by itself.
"""
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .common import arguments, row_by_row, training_arguments, watched

VERSION = "0.9.5"
# torch is installed first; the rest serves pictures, sound and the web
UNUSED = {"torch", "torchaudio", "torchvision", "gradio", "modelscope", "av", "hf-transfer", "fastapi", "uvicorn", "sse-starlette"}
VARIANTS = ("packed", "padded", "rows")


# ---- its environment --------------------------------------------------------------------------------------------------

def environment(folder, say=print):
    "The Python of an environment with LLaMA-Factory in it, made once. Raises RuntimeError saying what to do when that fails"
    folder = Path(folder)
    python, done = folder/"bin"/"python", folder/f"llamafactory-{VERSION}"
    if done.exists(): return python
    say(f"making an environment for LLaMA-Factory {VERSION} in {folder} (once; some minutes and 2 GB)")
    def install(*what):
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], f"pip install {' '.join(what)}")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], "making the environment")
    install(f"torch=={version('torch').partition('+')[0]}")  # the same as everybody else's
    install("--no-deps", f"llamafactory=={VERSION}")
    asked = _run([python, "-c", "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('llamafactory')))"],
        "reading its requirements")
    needed = [one for one in json.loads(asked) if "extra ==" not in one and re.match(r"[\w.-]+", one).group() not in UNUSED]
    install(*needed)
    packages = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "finding its packages").strip()
    (Path(packages)/"torchaudio.py").write_text('"A stand-in: LLaMA-Factory imports torchaudio for sound alone, '
        'and its wheels load beside one build of torch each"\n')
    _run([python, "-c", "import llamafactory.train.tuner"], "importing it")
    done.touch()
    return python


def _run(command, what):
    "What a command printed. Raises RuntimeError with the end of what it complained about"
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ended.returncode: raise RuntimeError(f"LLaMA-Factory is left out: {what} failed.\n{ended.stderr.strip()[-2000:]}")
    return ended.stdout


# ---- its training -----------------------------------------------------------------------------------------------------

def settings(asked):
    "What LLaMA-Factory is told; without a template it reads the tokenizer's"
    found = training_arguments(asked) | dict(
        model_name_or_path=str(asked.model), stage="sft", do_train=True, finetuning_type="lora", lora_target="all", lora_rank=asked.rank,
        lora_alpha=2 * asked.rank, lora_dropout=0., dataset="rows", dataset_dir=str(asked.folder), output_dir=str(asked.folder/"output"),
        cutoff_len=asked.max_length, bf16=True, disable_gradient_checkpointing=True, overwrite_cache=True, plot_loss=False)
    if asked.variant == "packed": found |= dict(packing=True, neat_packing=True, per_device_train_batch_size=asked.lines)
    if asked.variant == "rows": found |= row_by_row(asked)
    return found | asked.set


def main():
    asked = arguments(*VARIANTS)
    from llamafactory.train.tuner import run_exp
    from transformers import AutoTokenizer
    watch, marks = watched(AutoTokenizer.from_pretrained(asked.model).pad_token_id)
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder/"dataset_info.json").write_text(json.dumps(dict(rows=dict(file_name=str(asked.rows.with_suffix(".json").absolute())))))
    run_exp(settings(asked), callbacks=[marks])
    watch.report("llamafactory", settings=asked.set)


if __name__ == "__main__": main()
