"""Models from the Hub, against a real server on this machine that speaks the Hub's protocol.

`HF_ENDPOINT` is how users in schools and behind mirrors reach theirs; the same variable leads to the server here.
"""
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sage_finetune.config import tiny_path

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in tiny_path().iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}


class Hub(BaseHTTPRequestHandler):
    "One repository, house/tiny, with the packaged model's files"
    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append(self.path)
        place = self.path.partition("?")[0].strip("/").split("/")
        name = place[-1]
        if place[:4] == ["api", "models", "house", "tiny"] and "tree" in place[:-2]: self.reply(404, X_Error_Code="EntryNotFound")  # it has no folders
        elif place[:4] == ["api", "models", "house", "tiny"]:
            listing = [dict(type="file", path=file, size=len(body), oid=hashlib.sha1(body).hexdigest()) for file, body in FILES.items()]
            info = dict(id="house/tiny", sha=COMMIT, private=False, tags=[], siblings=[dict(rfilename=file) for file in FILES])
            self.reply(200, json.dumps(listing if "tree" in place else info).encode(), Content_Type="application/json")
        elif place[:3] == ["house", "tiny", "resolve"] and name in FILES: self.reply(200, FILES[name], ETag=f'"{hashlib.sha256(FILES[name]).hexdigest()}"')
        elif place[:2] == ["house", "tiny"]: self.reply(404, X_Error_Code="EntryNotFound")
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
from sage_finetune.model import load_base
try: model, tokenizer = load_base(PresetConfigs.tiny(model_name={name!r}))
except ModelError as error: print('ModelError:', error)
else:
    packaged, _ = load_base(PresetConfigs.tiny())
    print(all(torch.equal(a, b) for a, b in zip(model.parameters(), packaged.parameters())), len(tokenizer))
"""


def load(name, cache, **variables):
    "Load a model by name in a process of its own with an empty cache; what it printed"
    environment = dict({variable: value for variable, value in os.environ.items() if "OFFLINE" not in variable}, HF_HOME=str(cache), HF_HUB_DISABLE_TELEMETRY="1", **variables)
    done = subprocess.run([sys.executable, "-c", LOAD.format(name=name)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_comes_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    first = load("house/tiny", tmp_path, HF_ENDPOINT=address)
    assert first.startswith("True"), first
    assert any("model.safetensors" in path for path in hub.seen)
    asked = len(hub.seen)
    assert load("house/tiny", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1") == first  # offline, from the cache
    assert len(hub.seen) == asked


@pytest.mark.parametrize("name, variables", [("house/tyni", {}), ("house/tiny", dict(HF_HUB_OFFLINE="1"))], ids=["misspelt", "offline and not in the cache"])
def test_what_the_hub_does_not_give_is_said(hub, tmp_path, name, variables):
    said = load(name, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", **variables)
    assert said.startswith("ModelError:") and name in said and "HF_ENDPOINT" in said, said
