"""Models from the Hub, against a real server on this machine that speaks the Hub's protocol.

`HF_ENDPOINT` is how users in schools and behind mirrors reach theirs; the same variable leads to the server here.
"""
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sage_finetune.config import tiny_path

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in tiny_path().iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}


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
    "One repository, house/tiny, with the packaged model's files"
    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append(self.path)
        place = self.path.partition("?")[0].strip("/").split("/")
        name = place[-1]
        # it has no folders
        if place[:4] == ["api", "models", "house", "tiny"] and "tree" in place[:-2]: self.reply(404, X_Error_Code="EntryNotFound")
        elif place[:4] == ["api", "models", "house", "tiny"]:
            listing = [dict(type="file", path=file, size=len(body), oid=hashlib.sha1(body).hexdigest()) for file, body in FILES.items()]
            info = dict(id="house/tiny", sha=COMMIT, private=False, tags=[], siblings=[dict(rfilename=file) for file in FILES])
            self.reply(200, json.dumps(listing if "tree" in place else info).encode(), Content_Type="application/json")
        elif place[:3] == ["house", "tiny", "resolve"] and name in FILES:
            self.reply(200, FILES[name], ETag=f'"{hashlib.sha256(FILES[name]).hexdigest()}"')
        elif place[:2] == ["house", "tiny"]: self.reply(404, X_Error_Code="EntryNotFound")
        elif fault := next((WRONG[one] for one in place if one in WRONG), None): fault(self)
        else: self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


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
