"""Models from the Hub, against a real server on this machine that speaks the Hub's protocol.

`HF_ENDPOINT` is how users in schools and behind mirrors reach theirs; the same variable leads to the server here.
"""
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from test_cli import in_terminal

from sage_finetune.config import tiny_path
from sage_finetune.runs.folder import read_status

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in tiny_path().iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def large_files():
    "The packaged model with a tensor nobody asks for, so that there is something to download; and what stands beside it on the Hub"
    tensors = load_file(tiny_path()/WEIGHTS)
    body = save(tensors | {"nobody.asks": torch.arange(10_000_000, dtype=torch.int32)}, dict(format="pt"))
    others = ("pytorch_model.bin", "model.pt", "consolidated.safetensors", "model.onnx", "tf_model.h5", "original/consolidated.00.pth")
    return FILES | {WEIGHTS: body} | dict.fromkeys(others, b"not wanted")


def sharded_files():
    "The packaged model in two files and an index"
    tensors = load_file(tiny_path()/WEIGHTS)
    names = sorted(tensors)
    parts = {f"model-0000{at}-of-00002.safetensors": names[at - 1::2] for at in (1, 2)}
    files = {file: save({name: tensors[name] for name in part}, dict(format="pt")) for file, part in parts.items()}
    index = dict(metadata={}, weight_map={name: file for file, part in parts.items() for name in part})
    return {name: body for name, body in FILES.items() if name != WEIGHTS} | files | {INDEX: json.dumps(index).encode()}


REPOS = {"tiny": FILES, "large": large_files(), "sharded": sharded_files(), "huge": FILES}
HUGE = 10**16  # bytes, so the server says


def drop(handler):
    "Begin an answer and hang up"
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.end_headers()
    if handler.command == "GET": handler.wfile.write(b"{")
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


# Repositories that are not given, and how the server says so.
WRONG = {"gated": lambda its: its.reply(403, X_Error_Code="GatedRepo"), "closed": lambda its: its.reply(403),
    "down": lambda its: its.reply(503), "busy": lambda its: its.reply(429), "dropped": drop, "slow": lambda its: time.sleep(4)}


class Hub(BaseHTTPRequestHandler):
    """Repositories, house/tiny and others, with the packaged model's files. `server.cut`: bytes of weights that are sent before it
    hangs up, `server.cuts`: how often; `server.pause`: seconds after each 100 kB of them; `server.served`: bytes of each file that were sent"""
    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def send_file(self, repository, name):
        body, asked = REPOS[repository][name], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        if self.command == "HEAD" or not name.endswith(".safetensors"):
            huge = {"Content-Length": HUGE} if repository == "huge" and name == WEIGHTS else {}
            return self.reply(200, body, ETag=tag, Accept_Ranges="bytes", **huge)
        begin = int(asked[1]) if asked else 0
        self.server.ranges.append((name, begin))
        cut = self.server.cuts > 0
        if cut and begin: return self.connection.shutdown(socket.SHUT_RDWR)  # and it does not come back
        self.send_response(206 if asked else 200)
        headers = {"X-Repo-Commit": COMMIT, "ETag": tag, "Content-Length": len(body) - begin}
        if asked: headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        for header in headers.items(): self.send_header(header[0], str(header[1]))
        self.end_headers()
        for at in range(begin, min(len(body), self.server.cut) if cut else len(body), 100_000):
            piece = body[at:at + 100_000]
            self.wfile.write(piece)
            self.server.served[name] = self.server.served.get(name, 0) + len(piece)
            time.sleep(self.server.pause)
        if cut:
            self.server.cuts -= self.server.comes_back
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        self.server.seen.append(self.path)
        place = self.path.partition("?")[0].strip("/").split("/")
        owner, name = (*place[2 if place[0] == "api" else 0:], "", "")[:2]
        files = REPOS.get(name) if owner == "house" else None
        # it has no folders
        if files and place[0] == "api" and "tree" in place[:-2]: self.reply(404, X_Error_Code="EntryNotFound")
        elif files and place[0] == "api":
            listing = [dict(type="file", path=file, size=len(body), oid=hashlib.sha1(body).hexdigest()) for file, body in files.items()]
            info = dict(id=f"house/{name}", sha=COMMIT, private=False, tags=[], siblings=[dict(rfilename=file) for file in files])
            self.reply(200, json.dumps(listing if "tree" in place else info).encode(), Content_Type="application/json")
        elif files and place[2] == "resolve" and (file := "/".join(place[4:])) in files: self.send_file(name, file)
        elif files: self.reply(404, X_Error_Code="EntryNotFound")
        elif fault := next((WRONG[one] for one in place if one in WRONG), None): fault(self)
        else: self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.ranges, server.served = [], [], {}
    server.cut, server.cuts, server.comes_back, server.pause = 0, 0, False, 0.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def calm(hub):
    "The server as it is, and as it was again afterwards"
    hub.seen, hub.ranges, hub.served = [], [], {}
    yield hub
    hub.cut, hub.cuts, hub.comes_back, hub.pause = 0, 0, False, 0.


LOAD = """
import torch
from sage_finetune.config import PresetConfigs
from sage_finetune.core.errors import ModelError
from sage_finetune.modeling.base import load_base
try: model, tokenizer = load_base(PresetConfigs.tiny(model_name={name!r}))
except ModelError as error: print('ModelError:', error)
else:
    packaged, _ = load_base(PresetConfigs.tiny())
    print(all(torch.equal(a, b) for a, b in zip(model.parameters(), packaged.parameters())), len(tokenizer))
"""


def load(names, cache, **variables):
    "Load models by name in a process of its own that has this cache; a line for each"
    environment = dict({variable: value for variable, value in os.environ.items() if "OFFLINE" not in variable},
        HF_HOME=str(cache), HF_HUB_DISABLE_TELEMETRY="1", **variables)
    code = "".join(LOAD.format(name=name) for name in names)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(names), said
    return said


@pytest.fixture(scope="module")
def loaded(hub, tmp_path_factory):
    "What two processes say, online with an empty cache, then offline, each of what there is and of what there is not; what each asked"
    cache, address = tmp_path_factory.mktemp("cache"), f"http://127.0.0.1:{hub.server_port}"
    online = load(["house/tiny", "house/tyni"], cache, HF_ENDPOINT=address)
    asked = [*hub.seen]
    offline = load(["house/tiny", "house/other"], cache, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    return online, offline, asked, hub.seen[len(asked):]


def test_a_model_comes_from_the_hub_and_then_from_the_cache(loaded):
    (first, _), (again, _), asked, asked_offline = loaded
    assert first.startswith("True"), first
    assert any("model.safetensors" in path for path in asked)
    assert again == first  # offline, from the cache
    assert asked_offline == []


@pytest.mark.parametrize("at, name", [(0, "house/tyni"), (1, "house/other")], ids=["misspelt", "offline and not in the cache"])
def test_what_the_hub_does_not_give_is_said(loaded, at, name):
    said = loaded[at][1]
    assert said.startswith("ModelError:") and name in said and ("Check the spelling" in said or "HF_HUB_OFFLINE is set" in said), said


@pytest.fixture(scope="module")
def refused(hub, tmp_path_factory):
    "What one process says of each repository that is not given, and how long that took"
    names, began = ["house/tyni", *(f"house/{name}" for name in WRONG)], time.monotonic()
    said = load(names, tmp_path_factory.mktemp("cache"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    return dict(zip(names, said)), time.monotonic() - began


@pytest.mark.parametrize("name, sentence", [("tyni", "there is no house/tyni on the Hub, or it is private"),
    ("gated", "accepted its licence. Accept it at https://huggingface.co/house/gated"), ("closed", "you may not read house/closed"),
    ("down", "out of order (503)"), ("busy", "asked too often"), ("dropped", "was dropped. Start again"),
    ("slow", "does not answer in time")])
def test_every_refusal_has_a_sentence_of_its_own(refused, name, sentence):
    said = refused[0][f"house/{name}"]
    assert said.startswith("ModelError: ") and sentence in said and "Traceback" not in said, said


def test_the_hub_is_asked_for_seconds_only(refused): assert refused[1] < 90


def test_a_mirror_without_scheme_and_a_network_that_is_off(tmp_path, hub):
    "Both before anything is downloaded"
    said = load(["house/tiny"], tmp_path, HF_ENDPOINT=f"127.0.0.1:{hub.server_port}")[0]
    assert "it begins with https://" in said, said
    with socket.socket() as nobody:  # a port nobody listens at
        nobody.bind(("127.0.0.1", 0))
        said = load(["house/tiny"], tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{nobody.getsockname()[1]}")[0]
    assert "is not reached. Check the network" in said, said
    said = load(["house/tiny"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")[0]
    assert "HF_HUB_OFFLINE is set, and house/tiny was not downloaded before" in said, said


# ---- what breaks off goes on ----------------------------------------------------------------------------------------

def address(hub): return f"http://127.0.0.1:{hub.server_port}"


def partial(cache):
    "Bytes that are kept of files that are not whole"
    return sum(path.stat().st_size for path in Path(cache).rglob("*.incomplete"))


def test_a_download_that_breaks_off_goes_on_from_there(calm, tmp_path):
    "The sentence says what is kept, and the second try is sent only the rest"
    whole = len(REPOS["large"][WEIGHTS])
    calm.cut, calm.cuts = 25_000_000, 1
    said = load(["house/large"], tmp_path, HF_ENDPOINT=address(calm))[0]
    kept = partial(tmp_path)
    assert 10_000_000 < kept <= calm.served[WEIGHTS] < whole
    assert said.startswith("ModelError: the download of `model_name='house/large'` broke off: the connection to http://127.0.0.1"), said
    assert f"{kept / 1e6:.1f} MB of {whole / 1e6:.1f} MB are kept in {tmp_path}" in said and "the next try goes on from there" in said, said
    calm.cuts, calm.ranges, calm.served = 0, [], {}
    said = load(["house/large"], tmp_path, HF_ENDPOINT=address(calm))[0]
    assert said.startswith("True"), said
    assert calm.ranges == [(WEIGHTS, kept)] and calm.served[WEIGHTS] == whole - kept and partial(tmp_path) == 0


def test_a_short_break_is_not_even_said(calm, tmp_path):
    "It goes on by itself, and nothing is sent twice but what was on its way"
    calm.cut, calm.cuts, calm.comes_back = 25_000_000, 1, True
    assert load(["house/large"], tmp_path, HF_ENDPOINT=address(calm))[0].startswith("True")
    assert len(calm.ranges) == 2 and calm.ranges[1][1] > 10_000_000


def test_only_what_a_model_is_loaded_from_is_downloaded(calm, tmp_path):
    "No pickle, no copy of the weights in another format; of a model in several files all of them, each once"
    said = load(["house/large", "house/sharded"], tmp_path, HF_ENDPOINT=address(calm))
    assert all(one.startswith("True") for one in said), said
    assert not [path for path in calm.seen if "not-wanted" in path or path.endswith((".bin", ".pt", ".pth", ".onnx", ".h5"))]
    here = {path.name for path in tmp_path.rglob("snapshots/*/*")}
    assert {path.suffix for path in map(Path, here)} <= {".json", ".safetensors", ".jinja"} and "consolidated.safetensors" not in here
    assert calm.served == {name: len(body) for repository in ("large", "sharded") for name, body in REPOS[repository].items()
        if name.startswith("model") and name.endswith(".safetensors")}


def test_a_model_that_does_not_fit_the_disk_is_refused_before_it_is_downloaded(calm, tmp_path):
    said = load(["house/huge"], tmp_path, HF_ENDPOINT=address(calm))[0]
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert "`model_name='house/huge'` needs a download of 10000000.00 GB, and " in said and f"free in {tmp_path}" in said, said
    assert abs(float(re.search(r"and ([\d.]+) GB are free", said)[1]) - free) < 5 and "HF_HOME" in said and WEIGHTS not in calm.served


def test_pieces_of_another_file_are_not_used(calm, tmp_path):
    "Deleted, said, and downloaded anew"
    blob = hashlib.sha256(REPOS["tiny"][WEIGHTS]).hexdigest()
    folder = tmp_path/"hub"/"models--house--tiny"/"blobs"
    folder.mkdir(parents=True)
    (folder/f"{blob}.incomplete").write_bytes(bytes(1000))
    said = load(["house/tiny", "house/tiny"], tmp_path, HF_ENDPOINT=address(calm))
    assert "model.safetensors arrived damaged, and its pieces were deleted. Start again." in said[0] and said[1].startswith("True"), said


def test_two_processes_download_it_once(calm, tmp_path):
    calm.pause = 0.005
    said = [None, None]
    def one(at): said[at] = load(["house/large"], tmp_path, HF_ENDPOINT=address(calm))[0]
    threads = [threading.Thread(target=one, args=(at,)) for at in (0, 1)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert all(one.startswith("True") for one in said), said
    assert calm.served[WEIGHTS] == len(REPOS["large"][WEIGHTS])


# ---- what is seen of it ---------------------------------------------------------------------------------------------

ROWS = [dict(instruction=f"Which colour has door {n}?", output=["Red.", "Blue."][n % 2]) for n in range(12)]
BAR = re.compile(r"house/large: +(\d+)%\|.*?\[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kM]B/s\]")  # with time left and rate


@pytest.fixture
def train(calm, tmp_path):
    "A training of two steps of house/large, in a shell that has a cache of its own"
    (tmp_path/"rows.json").write_text(json.dumps(ROWS))
    variables = dict(HF_ENDPOINT=address(calm), HF_HOME=str(tmp_path/"home"), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
    line = ["quickstart", "custom", "-d", "rows.json", "-m", "house/large", "-o", "run", "--overwrite", "--set", "max_steps=2"]
    return lambda *more, columns=120, **options: in_terminal([*line, *more], [], tmp_path, columns, variables=variables, **options)


def test_ctrl_c_while_it_downloads(calm, train, tmp_path):
    "One sentence, 130; the next try goes on, and shows how fast and how long"
    calm.pause = 0.01
    said, status = train(interrupt=re.compile(r"house/large: +[4-9]\d%"))
    kept, whole = partial(tmp_path), len(REPOS["large"][WEIGHTS])
    assert status == 130 and "Traceback" not in said and 0 < kept < whole, said
    told = [line for line in said.replace("\r", "\n").splitlines() if "interrupted" in line]
    sentence = f"interrupted. the download of house/large: {kept / 1e6:.1f} MB of {whole / 1e6:.1f} MB are kept"
    assert len(told) == 1 and sentence in told[0], told
    assert read_status(tmp_path/"run").state == "cancelled"
    calm.ranges, calm.served = [], {}
    said, status = train()
    assert status == 0 and calm.ranges == [(WEIGHTS, kept)] and calm.served[WEIGHTS] == whole - kept, said
    shown = [int(share) for share in BAR.findall(said)]
    assert shown and min(shown) >= 100 * kept // whole, said


def test_a_script_sees_no_bar(calm, train, tmp_path):
    "In a terminal with --json, and in a pipe"
    calm.pause = 0.005
    said, status = train("--json")
    assert status == 0 and "%|" not in said and "B/s" not in said, said
    assert json.loads(said[said.index("{\n"):])["status"]["state"] == "completed"  # behind what was complained
    shutil.rmtree(tmp_path/"home")
    environment = dict({name: value for name, value in os.environ.items() if "OFFLINE" not in name},
        HF_ENDPOINT=address(calm), HF_HOME=str(tmp_path/"home"))
    line = ["quickstart", "custom", "-d", "rows.json", "-m", "house/large", "-o", "piped", "--set", "max_steps=2"]
    program = [sys.executable, "-m", "sage_finetune.cli", *line]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "%|" not in done.stdout + done.stderr and "B/s" not in done.stdout + done.stderr, done.stderr
