"""A run folder from a stranger, every file of it spoilt: whoever looks at it gets an answer or one sentence, and nothing else happens.

Nothing is written elsewhere, nobody is signalled, no program is started, none of its code is run, and nothing takes for ever.
"""
import copy as copies
import json
import math
import os
import shutil
import signal
import struct
import sys
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from helpers import change, tree
from hypothesis import Phase, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from sage_finetune import merge, train_from_meta
from sage_finetune.core.errors import DataError, FinetuneError, RunError
from sage_finetune.data.cache import checksum
from sage_finetune.data.run_data import prepare_run_data
from sage_finetune.inference.export import load_run, run_config
from sage_finetune.inference.generation import generate
from sage_finetune.modeling.tokenizer import load_tokenizer
from sage_finetune.runs.folder import is_running, list_runs, read_meta, read_metrics, read_status, run_info
from sage_finetune.runs.launch import follow, last_launch, log_lines, run_status, stop_run
from sage_finetune.runs.plot import compare_runs, plot_run
from sage_finetune.training.checkpoint import checkpoints, newest_checkpoint, read_state, write_state
from sage_finetune.training.memory import estimate_memory
from sage_finetune.ui.diagnosis import doctor
from sage_finetune.ui.forecast import previous_step_time
from sage_finetune.ui.form import ConfigForm
from sage_finetune.ui.run_control import RunControl, startup_message

EXPLORE = bool(os.environ.get("SAGE_EXPLORE"))


# ---- the watch --------------------------------------------------------------------------------------------------------

# event -> where its open folders stand
CHANGES = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 2, "os.chmod": 2, "os.rename": 2, "os.link": 2,
    "os.symlink": 2, "shutil.rmtree": 1}


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
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
                "socket.connect", "socket.getaddrinfo", "pickle.find_class"):
            return f"{event}{arguments}"
        if event == "exec" and self.inside(self.foreign, getattr(arguments[0], "co_filename", "")):
            return f"code of {arguments[0].co_filename} is run"
        if event == "compile" and self.inside(self.foreign, arguments[1] or ""): return f"code of {arguments[1]} is compiled"
        if event == "open" and self.writes(*arguments): return self.outside(event, arguments[0])
        if event in CHANGES:
            # names below a folder that is open, whose removal was looked at
            below = any(type(number) is int and number >= 0 for number in arguments[CHANGES[event]:])
            return next(filter(None, (self.outside(event, path) for path in arguments[:2] if not below)), None)

    @staticmethod
    def writes(path, mode, flags):
        "Whether a file is opened to be written"
        return any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool(isinstance(flags, int)
            and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

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
    WATCH.free = tuple(os.path.realpath(place) for place in (folder, os.environ["HF_HOME"], matplotlib.get_cachedir(),
        matplotlib.get_configdir()))
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
    if not is_running(run_status(run)): shown(list(islice(follow(run, every=0.01), 20)))


def look_through_the_panel(run):
    control = RunControl(run)
    control.poll()
    shown(control.summary), startup_message(control)


LOOKS = dict(run_info=lambda run: run_info(run).cells, list_runs=lambda run: list_runs(run.parent), read_meta=read_meta,
    to_config=lambda run: read_meta(run).to_config(),
    read_status=read_status, read_metrics=read_metrics, last_launch=last_launch, run_status=run_status, log_lines=log_lines,
    follow=follow_a_little, stop_run=stop_run,
    run_config=run_config, newest_checkpoint=lambda run: newest_checkpoint(run/"checkpoints") and None,
    panel=look_through_the_panel, pace=lambda run: previous_step_time(run_config(run)))

PICTURES = dict(plot_run=plot_run, compare_runs=lambda run: compare_runs([run, run]))


def say(run, merged=False):
    model, tokenizer = load_run(run, merged, device="cpu")
    generate(model, tokenizer, [dict(role="user", content="Which colour has lamp 1?")], max_new_tokens=3)


def open_form(run): ConfigForm(run_config(run), counts=False).close()


HEAVY = dict(chat=say, chat_merged=lambda run: say(run, True), merge=lambda run: merge(run, run.parent/"out", texts=1),
    memory=lambda run: estimate_memory(run_config(run)), form=open_form)


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
STRANGE = (None, True, False, 0, -1, 1.5, 10**30, -10**30, 2**63, 1e308, float("nan"), float("inf"), -float("inf"), "",
    " ", "text", "7", "training", "x" * 5000, "\x1b[2J\x1b]0;owned\x07", "\u202egpj.exe",
    "../../../../etc/passwd", "/etc/passwd", "/proc/self/mem", "~", "~nobody-of-that-name/x", "a\0b", LONE, "C:\\Windows",
    "owner/name", "{{ 1/0 }}", "%s%n", [], [[]], [1, "a", None], {}, {"": {}},
    {"a": {"b": [1, {"c": None}]}}, "checkpoint-3", [[["deep"]]])
WHOLE = dict(empty=b"", blank=b" \n\n", garbage=bytes(range(256)) * 8, null=b"null", number=b"3", huge_number=b"9" * 5000,
    text=b'"text"', listed=b"[]", object=b"{}", objects=b"[{}, {}]",
    deep=b"[" * 100_000, deep_objects=b'{"a":' * 50_000 + b"1" + b"}" * 50_000, nan=b"NaN", zeros=bytes(4096),
    utf16='{"state": "completed"}'.encode("utf-16"), latin=b'{"\xe4": 1}', newline=b"\n")


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


SHAPES = dict(gone=lambda path: path.unlink(), folder=to_folder, dangling=to_link("/nowhere/at/all"),
    loop=lambda path: to_link(path.name)(path), outside=to_link("/etc/passwd"), outside_folder=to_link("/etc"))


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
    shutil.copytree(run, to, copy_function=os.link, symlinks=True, ignore=shutil.ignore_patterns(".lock"))  # a lock has one name only
    return to


LOOKED_AT = ("finetune_meta.json", "training_config.json", "status.json", "launch.json", "metrics.jsonl", "train.log",
    "checkpoints/checkpoint-3/state.safetensors", "checkpoints/checkpoint-4/state.safetensors",
    "checkpoints/checkpoint-4/adapter_model.safetensors", "lora_weights/adapter_config.json", "merged_model/config.json",
    "training_data_custom_alpaca.json", "bad_rows.jsonl")
FIRST = [] if EXPLORE else [Phase.explicit, Phase.generate]  # a case is small enough to be read, and made smaller only by a search


def searched(few, many):
    "So many cases, always the same; SAGE_EXPLORE=1 looks for others"
    return settings(max_examples=many if EXPLORE else few, deadline=None, **{} if EXPLORE else dict(phases=FIRST))


@pytest.fixture
def spoilt(finished, tmp_path):
    "Give the finished run away, spoil it, and do something with it; what ends in anything but a sentence is a fault"
    def check(spoil, actions, seconds=40.):
        run = given_away(finished, tmp_path/"run")
        spoil(run)
        with watched(tmp_path, seconds): fallen = fall(actions, run)
        assert not fallen, fallen
        return run
    return check


@searched(60, 20_000)
@given(data=st.data())
def test_looking_at_a_spoilt_folder(data, finished, tmp_path_factory):
    place = tmp_path_factory.getbasetemp()/"looked_at"
    run = given_away(finished, place/"run")
    for name in data.draw(st.lists(st.sampled_from(LOOKED_AT), min_size=1, max_size=2, unique=True), label="files"):
        spoil(data.draw, run/name)
    with watched(place): fallen = fall(LOOKS, run)
    assert not fallen, fallen


@searched(12, 2_000)
@given(data=st.data())
def test_drawing_a_spoilt_folder(data, finished, tmp_path_factory):
    place = tmp_path_factory.getbasetemp()/"drawn"
    run = given_away(finished, place/"run")
    spoil(data.draw, run/data.draw(st.sampled_from(("metrics.jsonl", "metrics.jsonl", "status.json")), label="file"))
    with watched(place): fallen = fall(PICTURES, run)
    assert not fallen, fallen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*LOOKED_AT, "checkpoints", "lora_weights", "merged_model", "prepared", "logs"])
def test_files_that_are_something_else(spoilt, shape, name):
    def change(run):
        if (run/name).is_dir():
            shutil.rmtree(run/name)
            (run/name).write_text("a file")
        SHAPES[shape](run/name)
    spoilt(change, LOOKS)


# ---- one file of a list ---------------------------------------------------------------------------------------------------

NAMES = ["checkpoint-\u0661\u0662", "checkpoint-\u00b2", "checkpoint-99999999999999999999", "checkpoint--1", "checkpoint-1.5",
    "checkpoint-", "checkpoint-+7", "checkpoint-1_0", "checkpoint-4 ", "checkpoint-4\n", "checkpoint-\x1b[2J",
    "checkpoint-" + "9" * 200, "CHECKPOINT-9", "x" * 255, "\u202egpj.exe"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_names_that_are_no_checkpoint(spoilt, name, kind):
    def change(run):
        odd = run/"checkpoints"/name
        odd.mkdir() if kind == "folder" else odd.write_bytes(b"nothing")
    run = spoilt(change, LOOKS)
    assert [path.name for path in checkpoints(run/"checkpoints")] == ["checkpoint-3", "checkpoint-4"]
    assert newest_checkpoint(run/"checkpoints")[0].name == "checkpoint-4"


@pytest.mark.parametrize("spoil_one", [lambda run: replace(run/"status.json", as_json(dict(state=[], step="many"))),
    lambda run: replace(run/"finetune_meta.json", WHOLE["deep"]), lambda run: replace(run/"finetune_meta.json", b"[]"),
    lambda run: replace(run/"status.json", as_json(dict(state="training", updated="soon"))),
    lambda run: replace(run/"finetune_meta.json", as_json(dict(task_type="qa", model="x" * 5000, dataset="y" * 5000))),
    lambda run: to_folder(run/"metrics.jsonl")],
    ids=["types", "deep", "list", "time", "long", "folder"])
def test_a_broken_run_is_one_line_of_the_list(finished, tmp_path, spoil_one):
    spoil_one(given_away(finished, tmp_path/"a_broken"))
    given_away(finished, tmp_path/"b_whole")
    broken, whole = list_runs(tmp_path)
    assert (broken.state, whole.state) == ("unreadable", "completed") and broken.message
    assert len(str(list_runs(tmp_path)).splitlines()) == 3


def test_rows_keep_what_is_measured_and_nothing_else(finished, tmp_path):
    run = given_away(finished, tmp_path/"run")
    rows = [dict(step="1", loss="low", tokens=-3, note=5), dict(step=2, loss=math.nan, seconds=math.inf, total=10**30),
        dict(step=3, loss=1e300, eval_loss=[1]), dict(step=4, loss=2, epoch=True, learning_rate=None)]
    replace(run/"metrics.jsonl", b"".join(as_json(row) + b"\n" for row in rows))
    one, two, three, four = read_metrics(run)
    assert ((one, three, four) == ({}, dict(step=3), dict(step=4, loss=2, learning_rate=None))
        and set(two) == {"step", "loss"} and math.isnan(two["loss"]))


# ---- what a checkpoint holds ----------------------------------------------------------------------------------------------

def header(path):
    "Length and content of a safetensors header"
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + size]), data[8 + size:]


def with_header(path, change):
    "Write another header before the same numbers"
    told, rest = header(path)
    told = json.dumps(change(told) or told).encode()
    replace(path, struct.pack("<Q", len(told)) + told + rest)


def tensor_of(told): return next(name for name in sorted(told) if name != "__metadata__")


LIES = dict(beyond=lambda told: told[tensor_of(told)].update(data_offsets=[0, 10**12]),
    negative=lambda told: told[tensor_of(told)].update(data_offsets=[-8, 0]),
    turned=lambda told: told[tensor_of(told)].update(data_offsets=[64, 0]),
    overlapping=lambda told: [one.update(data_offsets=[0, 4]) for name, one in told.items() if name != "__metadata__"],
    kind=lambda told: told[tensor_of(told)].update(dtype="Q99"), narrow=lambda told: told[tensor_of(told)].update(dtype="I8"),
    shape=lambda told: told[tensor_of(told)].update(shape=[1, 2, 3]),
    huge=lambda told: told[tensor_of(told)].update(shape=[2**40, 2**40]), below=lambda told: told[tensor_of(told)].update(shape=[-1]),
    gone=lambda told: told.pop(tensor_of(told)) and None, renamed=lambda told: told.update({"../../x": told.pop(tensor_of(told))}),
    nothing=lambda told: {"__metadata__": {"format": "pt"}}, no_state=lambda told: told.update(__metadata__={"format": "pt"}),
    number=lambda told: told.update(__metadata__=7))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["state.safetensors", "adapter_model.safetensors"])
def test_headers_that_lie(finished, tmp_path, lie, name):
    run = given_away(finished, tmp_path/"run")
    for step in (3, 4): with_header(run/f"checkpoints/checkpoint-{step}"/name, LIES[lie])
    with watched(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: newest_checkpoint(run/"checkpoints")
        except RunError: pass
    if name == "state.safetensors":
        try: read_state(run/"checkpoints/checkpoint-4"/name)
        except RunError: pass


@pytest.mark.parametrize("start", [b"", b"\x00", b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 10**9) + b"{}",
    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 90_000) + b"[" * 90_000])
def test_headers_that_are_none(finished, tmp_path, start):
    run = given_away(finished, tmp_path/"run")
    replace(run/"checkpoints/checkpoint-4/state.safetensors", start)
    with pytest.raises(RunError, match="cannot be read"): read_state(run/"checkpoints/checkpoint-4/state.safetensors")
    with pytest.warns(UserWarning, match="goes on from checkpoint-3"): assert newest_checkpoint(run/"checkpoints")[0].name == "checkpoint-3"


TREES = ["7", "null", "[]", "{}", '{"tensor": "0"}', '{"tensor": "99999"}', '{"tensor": 7}', '{"tensor": "../../x"}',
    '{"eval": "1"}', '{"dict": 7}', '{"dict": [[1]]}', '{"dict": [[{"list": []}, 1]]}', '{"list": 7}', '{"dict": [], "list": []}',
    '{"dict": [["progress", 7]]}', '{"dict": [["optimizer", {"list": []}]]}', '{"dict": [["step", "x"]]}',
    '{"list":[' * 3000 + "]}" * 3000, "not json", '{"dict": [["progress", {"dict": [["step", -1]]}]]}',
    '{"dict": [["progress", {"dict": [["step", 9], ["best", {"tuple": [1.5, "../../elsewhere"]}]]}]]}',
    '{"dict": [["progress", {"dict": [["halvings", 1000000000]]}]]}']


@pytest.mark.parametrize("told", TREES, ids=lambda told: told[:40])
def test_trees_that_are_no_state(finished, tmp_path, told):
    run = given_away(finished, tmp_path/"run")
    with_header(run/"checkpoints/checkpoint-4/state.safetensors", lambda before: before.update(__metadata__=dict(state=told)))
    with watched(tmp_path):
        if told == "{}" or "dict" in told[:8]:
            pytest.raises(RunError, read_state, run/"checkpoints/checkpoint-4/state.safetensors") if told == "{}" else None
        with pytest.warns(UserWarning, match="checkpoint-4 cannot be read"):
            assert newest_checkpoint(run/"checkpoints")[0].name == "checkpoint-3"


RESUMES = dict(identity=lambda state: state.pop("identity"), no_progress=lambda state: state.pop("progress"),
    rng_state=lambda state: state.update(rng_state=[]), generators=lambda state: state["rng_state"][0].update(torch=torch.zeros(3)),
    numpy=lambda state: state["rng_state"][0].update(numpy=["MT19937", torch.zeros(2), 1, 2, 3.]),
    python=lambda state: state["rng_state"][0].update(python=["x", [], None]),
    no_groups=lambda state: state["optimizer"].pop("param_groups"),
    moments=lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1)),
    lr_scheduler=lambda state: state.update(lr_scheduler=dict(last_epoch="soon")),
    unlogged_step=lambda state: state["progress"].update(unlogged_step=dict(step="x")),
    fewer=lambda state: state["optimizer"]["param_groups"][0].update(params=[0]))


@pytest.mark.parametrize("spoil_state", RESUMES)
def test_going_on_from_a_spoilt_checkpoint(finished, tmp_path, spoil_state):
    run = Path(shutil.copytree(finished, tmp_path/"run"))
    place = run/"checkpoints/checkpoint-4/state.safetensors"
    shutil.rmtree(run/"checkpoints/checkpoint-3")
    state = read_state(place)
    RESUMES[spoil_state](state)
    write_state(place, state)
    with watched(tmp_path), pytest.raises(FinetuneError) as said: train_from_meta(run, resume=True, show=False)
    assert str(place.parent) in str(said.value) or "was begun with other settings" in str(said.value)


def test_what_a_checkpoint_says_of_the_optimizer_does_not_count(finished, tmp_path):
    losses = []
    for name in ("honest", "spoilt"):
        run = Path(shutil.copytree(finished, tmp_path/name))
        place = run/"checkpoints/checkpoint-4/state.safetensors"
        change(run, max_steps=5)
        state = read_state(place)
        for group in state["optimizer"]["param_groups"] if name == "spoilt" else ():
            group.update(lr="fast", weight_decay="much", betas=[9, 9], eps=None)
        write_state(place, state)
        with watched(tmp_path): losses.append(train_from_meta(run, resume=True, show=False).losses)
    assert losses[0] == losses[1] and len(losses[0]) == 1


# ---- prepared rows --------------------------------------------------------------------------------------------------------

def table_of(ids, labels, **columns):
    return pa.table(dict(input_ids=pa.array(ids, pa.list_(pa.int32())), labels=pa.array(labels, pa.list_(pa.int32())),
        length=pa.array([len(one or ()) for one in ids], pa.int32()), row=pa.array(range(len(ids)), pa.int64())) | columns)


TABLES = dict(vocabulary=lambda: table_of([[1, 10**6]], [[1, 2]]), negative=lambda: table_of([[-1, 2]], [[1, 2]]),
    labels=lambda: table_of([[1, 2]], [[-101, 2]]), shorter=lambda: table_of([[1, 2]], [[1]]), nothing=lambda: table_of([None], [None]),
    holes=lambda: table_of([[1, None]], [[1, 2]]),
    columns=lambda: pa.table(dict(text=["a"])), kinds=lambda: table_of([[1]], [[1]], input_ids=pa.array(["a"])),
    outside=lambda: table_of([[11, 12], [13]], [[11, 12], [13]]))
# lists that end where there is nothing; the library itself makes none
OFFSETS, OUTSIDE = struct.pack("<3i", 0, 2, 3), struct.pack("<3i", 0, 10**6, 3)


@pytest.mark.parametrize("how", TABLES)
def test_prepared_rows_that_only_seem_whole(finished, tmp_path, how):
    run = given_away(finished, tmp_path/"run")
    for folder in (run/"prepared").iterdir():
        (folder/"train.arrow").unlink()
        with pa.OSFile(str(folder/"train.arrow"), "wb") as file, pa.ipc.new_stream(file, TABLES[how]().schema) as writer:
            writer.write_table(TABLES[how]())
        if how == "outside": (folder/"train.arrow").write_bytes((folder/"train.arrow").read_bytes().replace(OFFSETS, OUTSIDE))
        told = json.loads((folder/"report.json").read_text())
        replace(folder/"report.json", as_json(told | dict(files=told["files"] | {"train.arrow": checksum(folder/"train.arrow")})))
    with watched(tmp_path), pytest.raises(DataError, match="are no examples of this tokenizer"):
        prepare_run_data(read_meta(run).to_config(), load_tokenizer("tiny"))


@pytest.mark.parametrize("fields", [dict(rows="many"), dict(bad_rows=[7]), dict(notes={"a": 7}), dict(held_out=[]),
    dict(said="x"), dict(strange=1), dict(max_length=None)], ids=str)
def test_reports_of_prepared_rows_that_are_none(finished, tmp_path, fields):
    run = given_away(finished, tmp_path/"run")
    for folder in (run/"prepared").iterdir():
        told = json.loads((folder/"report.json").read_text())
        replace(folder/"report.json", as_json(told | dict(report=told["report"] | fields)))
    with watched(tmp_path): shown(prepare_run_data(read_meta(run).to_config(), load_tokenizer("tiny")))


# ---- models -------------------------------------------------------------------------------------------------------------

def edit(name, **fields):
    "A change of a JSON file, fields that are ... are taken away"
    def change(run):
        content = {**json.loads((run/name).read_text()), **fields}
        replace(run/name, as_json({field: value for field, value in content.items() if value is not ...}))
    return change


def weights(name, change):
    "A change of all tensors of a file"
    def spoil(run):
        tensors = {one: change(one, value) for one, value in load_file(run/name).items()}
        (run/name).unlink()
        save_file({one: value.contiguous() for one, value in tensors.items() if value is not None}, run/name, metadata=dict(format="pt"))
    return spoil


def with_bytes(name, content): return lambda run: replace(run/name, content)


ADAPTER, WEIGHTS = "lora_weights/adapter_config.json", "lora_weights/adapter_model.safetensors"
ADAPTERS = dict(rank_text=edit(ADAPTER, r="8"), rank_zero=edit(ADAPTER, r=0), rank_huge=edit(ADAPTER, r=10**9),
    rank_listed=edit(ADAPTER, r=[8]), alpha=edit(ADAPTER, lora_alpha=None), alpha_nan=edit(ADAPTER, lora_alpha=float("nan")),
    no_targets=edit(ADAPTER, target_modules=None),
    targets=edit(ADAPTER, target_modules=7), target_numbers=edit(ADAPTER, target_modules=[1]),
    pattern=edit(ADAPTER, target_modules="(("), kind=edit(ADAPTER, peft_type="EVIL"), kind_list=edit(ADAPTER, peft_type=[]),
    other_kind=edit(ADAPTER, peft_type="PROMPT_TUNING"),
    no_kind=edit(ADAPTER, peft_type=...), megatron=edit(ADAPTER, megatron_config={"a": 1}, megatron_core="this_is_imported"),
    mapping=edit(ADAPTER, auto_mapping={"parent_library": "os", "base_model_class": "system"}),
    tokens=edit(ADAPTER, trainable_token_indices={"embed_tokens": ["1"]}),
    far_tokens=edit(ADAPTER, trainable_token_indices=[10**9]), saved=edit(ADAPTER, modules_to_save=["nowhere"]),
    layers=edit(ADAPTER, layers_to_transform="x"),
    start=edit(ADAPTER, init_lora_weights="corda", corda_config={"cache_file": "/etc/passwd"}),
    ranks=edit(ADAPTER, rank_pattern={"(": "x"}), bias=edit(ADAPTER, bias="x"), task=edit(ADAPTER, task_type="SEQ_CLS"),
    revision=edit(ADAPTER, revision=7, base_model_name_or_path=7), deep=with_bytes(ADAPTER, WHOLE["deep"]),
    listed=with_bytes(ADAPTER, b"[]"), empty=with_bytes(ADAPTER, b""),
    shapes=weights(WEIGHTS, lambda name, value: value[:1]),
    some=weights(WEIGHTS, lambda name, value: value if "lora_A" in name else None),
    extra=weights(WEIGHTS, lambda name, value: value.to(torch.int8)), nothing=with_bytes(WEIGHTS, b""),
    lie=lambda run: with_header(run/WEIGHTS, LIES["beyond"]),
    folder=lambda run: to_folder(run/WEIGHTS), linked=lambda run: to_link("/etc/passwd")(run/WEIGHTS),
    config=edit("training_config.json", lora=[1]), config_model=edit("training_config.json", model_name="~nobody-of-that-name/x"),
    config_long=edit("training_config.json", model_name="x" * 5000),
    config_nul=edit("training_config.json", model_name="a\0b"), config_half=edit("training_config.json", eval_prompts=[LONE]),
    device=edit("training_config.json", device="cuda" if not torch.cuda.is_available() else "x"))


@pytest.mark.parametrize("how", ADAPTERS)
def test_talking_to_a_spoilt_adapter(spoilt, how): spoilt(ADAPTERS[how], dict(chat=HEAVY["chat"], form=HEAVY["form"]))


@pytest.mark.parametrize("how", [weights(WEIGHTS, lambda name, value: value * float("nan")),
    weights(WEIGHTS, lambda name, value: value * float("inf")), with_bytes("training_data_custom_alpaca.json", WHOLE["garbage"]),
    with_bytes("training_data_custom_alpaca.json", WHOLE["deep"]),
    edit("training_config.json", eval_path=".", column_map={"a": "b"}), edit("training_config.json", data_path="x" * 5000, eval_path="\0")],
    ids=["nan", "inf", "garbage", "deep", "folder", "long"])
def test_merging_a_spoilt_run(spoilt, how): spoilt(how, dict(merge=HEAVY["merge"]), 60.)


MODEL = "merged_model/config.json"
MERGED = dict(layers=edit(MODEL, num_hidden_layers=10**9, layer_types=...), wide=edit(MODEL, hidden_size=10**8),
    words=edit(MODEL, vocab_size=10**9), heads=edit(MODEL, num_attention_heads=10**6), no_heads=edit(MODEL, num_key_value_heads=0),
    text=edit(MODEL, hidden_size="wide"), kind=edit(MODEL, model_type="evil"),
    kind_list=edit(MODEL, model_type=[1]), no_kind=edit(MODEL, model_type=..., architectures=...), other=edit(MODEL, model_type="gpt2"),
    autocast=edit(MODEL, dtype="float99"), ends=edit("merged_model/generation_config.json", eos_token_id={}),
    ends_text=edit("merged_model/generation_config.json", eos_token_id=["x"]),
    places=edit(MODEL, max_position_embeddings=-1), quantised=edit(MODEL, quantization_config=dict(quant_method="gptq")),
    code=edit(MODEL, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}),
    deep=with_bytes(MODEL, WHOLE["deep"]), listed=with_bytes(MODEL, b"[]"), empty=with_bytes(MODEL, b""),
    words_deep=with_bytes("merged_model/tokenizer.json", WHOLE["deep"]), words_empty=with_bytes("merged_model/tokenizer.json", b"{}"),
    words_cut=lambda run: replace(run/"merged_model/tokenizer.json", cut((run/"merged_model/tokenizer.json").read_bytes(), .5)),
    words_model=edit("merged_model/tokenizer.json", model={}),
    words_none=edit("merged_model/tokenizer.json", model=dict(type="BPE", vocab={}, merges=[])),
    words_added=edit("merged_model/tokenizer.json", added_tokens=[dict(id=-1, content=7)]),
    words_class=edit("merged_model/tokenizer_config.json", tokenizer_class="Evil"),
    words_code=edit("merged_model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T"),
    words_list=edit("merged_model/tokenizer_config.json", tokenizer_class=[7]),
    words_end=edit("merged_model/tokenizer_config.json", eos_token=7, pad_token=[]),
    words_far=edit("merged_model/tokenizer_config.json", added_tokens_decoder={"x": 7}),
    template=with_bytes("merged_model/chat_template.jinja", b"{{ messages | nothing }}"),
    template_open=with_bytes("merged_model/chat_template.jinja", b"{% for"),
    template_bytes=with_bytes("merged_model/chat_template.jinja", b"\xff\xfe"),
    lie=lambda run: with_header(run/"merged_model/model.safetensors", LIES["beyond"]),
    fewer=lambda run: with_header(run/"merged_model/model.safetensors", LIES["gone"]),
    nothing=with_bytes("merged_model/model.safetensors", b""),
    index=with_bytes("merged_model/model.safetensors.index.json", as_json(dict(weight_map={"a": "../../../etc/passwd"}))),
    pickled=lambda run: ((run/"merged_model/model.safetensors").unlink(),
        (run/"merged_model/pytorch_model.bin").write_bytes(b"\x80\x04N.")))


@pytest.mark.parametrize("how", MERGED)
def test_talking_to_a_spoilt_merged_model(spoilt, how): spoilt(MERGED[how], dict(chat=HEAVY["chat_merged"]))


@pytest.mark.parametrize("how", ["layers", "wide", "kind_list", "no_kind", "deep", "listed", "empty", "text", "quantised"])
def test_the_memory_of_a_spoilt_model(spoilt, how):
    def change(run):
        MERGED[how](run)
        edit("training_config.json", model_name=str(run/"merged_model"))(run)
    spoilt(change, dict(memory=HEAVY["memory"]))


def test_the_doctor_looks_at_a_spoilt_folder(spoilt):
    for how in (with_bytes("training_config.json", WHOLE["deep"]),
            edit("training_config.json", model_name="x" * 5000, continue_from="a\0b"), edit("training_config.json", lora="x")):
        run = spoilt(how, {})
        shown(doctor(run, online=False))


def test_the_run_that_was_given_away_is_as_it_was(finished):
    "Copies share its files: none was written into"
    assert sorted(tree(finished)) and not merge(finished, finished.parent/"again", texts=1).kl_divergence > 1e-4
