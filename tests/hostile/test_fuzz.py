"""A run folder from a stranger, every file of it spoilt: whoever looks at it gets an answer or one sentence, and nothing else happens.

Nothing is written elsewhere, nobody is signalled, no program is started, none of its code is run, and nothing takes for ever.
"""
import copy as copies
import json
import os
import shutil
import signal
import struct
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tree
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sage_finetune import merge
from sage_finetune.chat import generate
from sage_finetune.checkpoint import newest_checkpoint, read_state
from sage_finetune.core.errors import FinetuneError
from sage_finetune.diagnosis import doctor
from sage_finetune.export import open_run, run_config
from sage_finetune.form import ConfigForm, earlier_pace
from sage_finetune.launch import attached, follow, last_launch, log_lines, stop_run
from sage_finetune.memory import estimate_memory
from sage_finetune.plot import compare_runs, plot_run
from sage_finetune.runs import list_runs, read_meta, read_metrics, read_status, run_info, still_works
from sage_finetune.train_panel import RunControl

EXPLORE = bool(os.environ.get("SAGE_EXPLORE"))


# ---- the watch --------------------------------------------------------------------------------------------------------

CHANGES = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 2, "os.chmod": 2, "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1}  # event -> where its open folders stand


class Watch:
    "What happens in this process while somebody looks at a folder"
    def __init__(self): self.foreign, self.free, self.seen = None, (), []

    def hook(self, event, arguments):
        if self.foreign is None: return
        said = self.forbidden(event, arguments)
        if said:
            self.seen.append(said)
            raise PermissionError(said)  # so that it does not happen

    def forbidden(self, event, arguments):
        "A sentence about what may not happen"
        if event in ("os.kill", "os.killpg", "signal.pthread_kill") and arguments[1]: return f"{event}{arguments}"
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "socket.connect", "socket.getaddrinfo", "pickle.find_class"): return f"{event}{arguments}"
        if event == "exec" and self.inside(self.foreign, getattr(arguments[0], "co_filename", "")): return f"code of {arguments[0].co_filename} is run"
        if event == "compile" and self.inside(self.foreign, arguments[1] or ""): return f"code of {arguments[1]} is compiled"
        if event == "open" and self.writes(*arguments): return self.outside(event, arguments[0])
        if event in CHANGES:
            below = any(type(number) is int and number >= 0 for number in arguments[CHANGES[event]:])  # names below a folder that is open, whose removal was looked at
            return next(filter(None, (self.outside(event, path) for path in arguments[:2] if not below)), None)

    @staticmethod
    def writes(path, mode, flags):
        "Whether a file is opened to be written"
        return any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def outside(self, event, path):
        "A sentence, if the path is in none of the places that may be written"
        if not isinstance(path, (str, bytes, Path)): return None  # a file that is open already
        full = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))
        if full in ("/dev/null", "/dev/tty") or "__pycache__" in full or any(self.inside(place, full) for place in self.free): return None
        return f"{event} {full}"

    @staticmethod
    def inside(place, path): return str(path).startswith(f"{place}{os.sep}") or str(path) == str(place)


WATCH = Watch()
sys.addaudithook(WATCH.hook)


class Hung(BaseException): "Nobody may swallow it"


@contextmanager
def watched(folder, seconds=40.):
    "Only below this folder and in the caches of the libraries anything may be written; it ends in time"
    def ring(number, frame): raise Hung(f"more than {seconds:g} s")
    import matplotlib
    before, left = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    WATCH.free = tuple(os.path.realpath(place) for place in (folder, os.environ["HF_HOME"], matplotlib.get_cachedir(), matplotlib.get_configdir()))
    WATCH.seen, WATCH.foreign = [], os.path.realpath(folder)
    try: yield
    finally:
        WATCH.foreign = None
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
    assert not WATCH.seen, WATCH.seen


# ---- what one does with a folder ----------------------------------------------------------------------------------------

def shown(value):
    "Whatever shows itself does so"
    for show in (str, repr, lambda value: getattr(value, "_repr_html_", str)()): show(value)
    return value


def follow_a_little(run):
    if not still_works(attached(run)): shown(list(islice(follow(run, every=0.01), 20)))


def look_through_the_panel(run):
    control = RunControl(run)
    control.look()
    shown(control.summary), control.stage()


LOOKS = dict(run_info=lambda run: run_info(run).cells, list_runs=lambda run: list_runs(run.parent), read_meta=read_meta, to_config=lambda run: read_meta(run).to_config(),
    read_status=read_status, read_metrics=read_metrics, last_launch=last_launch, attached=attached, log_lines=log_lines, follow=follow_a_little, stop_run=stop_run,
    run_config=run_config, newest_checkpoint=lambda run: newest_checkpoint(run/"checkpoints") and None,
    panel=look_through_the_panel, pace=lambda run: earlier_pace(run_config(run)))

PICTURES = dict(plot_run=plot_run, compare_runs=lambda run: compare_runs([run, run]))


def say(run, merged=False):
    model, tokenizer = open_run(run, merged, device="cpu")
    generate(model, tokenizer, [dict(role="user", content="Which colour has lamp 1?")], max_new_tokens=3)


def open_form(run): ConfigForm(run_config(run), counts=False).close()


HEAVY = dict(chat=say, chat_merged=lambda run: say(run, True), merge=lambda run: merge(run, run.parent/"out", texts=1), memory=lambda run: estimate_memory(run_config(run)), form=open_form)


def fall(actions, run):
    "Which actions end in anything but a sentence"
    fallen = {}
    for name, act in actions.items():
        try: shown(act(run))
        except FinetuneError as error:
            if not str(error).strip(): fallen[name] = error
        except Exception as error: fallen[name] = error
    return fallen


# ---- how files are spoilt -----------------------------------------------------------------------------------------------

LONE = "\ud800"  # half of a pair: JSON may say it, no file can hold it
STRANGE = (None, True, False, 0, -1, 1.5, 10**30, -10**30, 2**63, 1e308, float("nan"), float("inf"), -float("inf"), "", " ", "text", "7", "training", "x" * 5000, "\x1b[2J\x1b]0;owned\x07", "‮gpj.exe",
    "../../../../etc/passwd", "/etc/passwd", "/proc/self/mem", "~", "~nobody-of-that-name/x", "a\0b", LONE, "C:\\Windows", "owner/name", "{{ 1/0 }}", "%s%n", [], [[]], [1, "a", None], {}, {"": {}},
    {"a": {"b": [1, {"c": None}]}}, "checkpoint-3", [[["deep"]]])
WHOLE = dict(empty=b"", blank=b" \n\n", garbage=bytes(range(256)) * 8, null=b"null", number=b"3", huge_number=b"9" * 5000, text=b'"text"', listed=b"[]", object=b"{}", objects=b"[{}, {}]",
    deep=b"[" * 100_000, deep_objects=b'{"a":' * 50_000 + b"1" + b"}" * 50_000, nan=b"NaN", zeros=bytes(4096), utf16='{"state": "completed"}'.encode("utf-16"), latin=b'{"\xe4": 1}', newline=b"\n")


def replace(path, content):
    "Another content; the file itself is shared with other copies and stays"
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def places(content, depth=3):
    "Where in a JSON tree something could be changed, the first few of each list"
    inside = content.items() if isinstance(content, dict) else list(enumerate(content))[:3] if isinstance(content, list) else ()
    for name, value in list(inside)[:60]:
        yield (name,)
        if depth > 1: yield from ((name, *rest) for rest in places(value, depth - 1))


def changed(content, place, value):
    "The tree with a value in that place; without it, where the value is ..."
    content = copies.deepcopy(content)
    inner = content
    for name in place[:-1]: inner = inner[name]
    if value is ...: del inner[place[-1]]
    else: inner[place[-1]] = value
    return content


def as_json(content): return json.dumps(content).encode()


def cut(data, at): return data[:int(len(data) * at)]


def flipped(data, at):
    at = min(int(len(data) * at), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:] if data else data


def to_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path/"inside").write_text("x")


def to_link(target):
    def change(path):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    return change


SHAPES = dict(gone=lambda path: path.unlink(), folder=to_folder, dangling=to_link("/nowhere/at/all"), loop=lambda path: to_link(path.name)(path), outside=to_link("/etc/passwd"), outside_folder=to_link("/etc"))


def spoil(draw, path):
    "A change to one file, drawn by hypothesis, and its name"
    data, kinds = path.read_bytes(), ["whole", "cut", "flip", "shape", "twice"]
    lines = path.suffix == ".jsonl"
    try: content = [json.loads(line) for line in data.splitlines()] if lines else json.loads(data)
    except ValueError: content = None
    kind = draw(st.sampled_from(kinds if content is None else [*["value"] * 12, "two", "bom", *kinds]), label="kind")
    join = lambda tree: b"".join(as_json(row) + b"\n" for row in tree) if lines else as_json(tree)
    if kind in ("value", "two"):
        for _ in range(2 if kind == "two" else 1):
            place = draw(st.sampled_from(list(places(content)) or [()]), label="place")
            if place: content = changed(content, place, draw(st.sampled_from((..., *STRANGE)), label="value"))
        return replace(path, join(content))
    if kind == "shape": return SHAPES[draw(st.sampled_from(sorted(SHAPES)), label="shape")](path)
    if kind == "whole": return replace(path, WHOLE[draw(st.sampled_from(sorted(WHOLE)), label="whole")])
    if kind == "bom": return replace(path, b"\xef\xbb\xbf" + data)
    if kind == "twice": return replace(path, data + data)
    at = draw(st.floats(0, 1, exclude_max=True), label="at")
    replace(path, cut(data, at) if kind == "cut" else flipped(data, at))


def given_away(run, to):
    "A copy whose files are the same until they are replaced"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, copy_function=os.link, symlinks=True)
    return to


LOOKED_AT = ("finetune_meta.json", "training_config.json", "status.json", "launch.json", "metrics.jsonl", "train.log", "checkpoints/checkpoint-3/state.safetensors", "checkpoints/checkpoint-4/state.safetensors",
    "checkpoints/checkpoint-4/adapter_model.safetensors", "lora_weights/adapter_config.json", "merged_model/config.json", "training_data_custom_alpaca.json", "bad_rows.jsonl")


@settings(max_examples=20_000 if EXPLORE else 150, deadline=None)
@given(data=st.data())
def test_looking_at_a_spoilt_folder(data, finished, tmp_path_factory):
    place = tmp_path_factory.getbasetemp()/"looked_at"
    run = given_away(finished, place/"run")
    for name in data.draw(st.lists(st.sampled_from(LOOKED_AT), min_size=1, max_size=2, unique=True), label="files"): spoil(data.draw, run/name)
    with watched(place): fallen = fall(LOOKS, run)
    assert not fallen, fallen
