"The doctor finds each fault when it is really there, never fails itself, and shows no secret; memory is given back"
import contextlib
import gc
import http.server
import json
import os
import subprocess
import sys
import threading
import weakref

import pytest
from helpers import mounted, tiny_config

from sage_finetune.ui.diagnosis import Check, check_folder_writable, doctor, free, redact_secrets, run_check


def ask(code, *path, **environment):
    "What Python code prints in a process of its own, folders first on its path"
    start = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=240, env=variables | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOKS = """
import json
from sage_finetune.ui.diagnosis import doctor, run_check, {check}
print(json.dumps([list(look) for look in run_check({check!r}, {check}{given})]))
"""


def looks(check, *path, given="", **environment):
    "The lines of one check in a process of its own"
    return [Check(*line)
        for line in json.loads(ask(LOOKS.format(check=check, given=", " + given if given else ""), *path, **environment).splitlines()[-1])]


def distribution(folder, name, version, module=True):
    "An installed library: its metadata, and a package to import"
    (folder/f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder/f"{name}-{version}.dist-info"/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if not module: return folder
    (folder/name).mkdir()
    (folder/name/"__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


@contextlib.contextmanager
def answering(answers):
    "A server on this machine: path -> status; 200 for the others"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answers.get(self.path.partition("?")[0], 200))
            self.send_header("Content-Length", "2")
            self.end_headers()
            if self.command == "GET": self.wfile.write(b"{}")
        do_HEAD = do_GET
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# ---- libraries --------------------------------------------------------------------------------------------------------

def test_colabs_torchao_is_a_problem_with_its_cure(tmp_path):
    code = ("from sage_finetune.ui.diagnosis import doctor; found = doctor(online=False); "
        "print(found.healthy, found.sentence); print(found['torchao'].run, '|', found['a step'].state)")
    said = ask(code, distribution(tmp_path, "torchao", "0.10.0"))
    assert said.startswith("False Not ready: ") and "the first is torchao: 0.10.0" in said
    assert 'pip install --no-deps -U "torchao>=0.16" | problem' in said  # the trial step fails for the same reason


@pytest.mark.parametrize("version, module, states", [("0.16.0", True, ["ok"]), ("0.10.0", False, []), ("0.10.0", True, ["problem"])])
def test_torchao_is_named_only_where_it_is_in_the_way(tmp_path, version, module, states):
    assert [look.state for look in looks("_torchao", distribution(tmp_path, "torchao", version, module))] == states


@pytest.mark.parametrize("name, version, state, said", [("peft", "0.9.0", "problem", "but >=0.20 is needed"),
    ("transformers", "6.1.0", "note", "newer than what was tried"), ("peft", "0.20.0", "ok", "0.20.0")])
def test_versions_outside_the_range(tmp_path, name, version, state, said):
    look = {one.what: one for one in looks("_versions", distribution(tmp_path, name, version, module=False))}[name]
    assert look.state == state and said in look.found and (state == "ok" or f"pip install -U \"{name}" in look.run), look


def test_a_library_that_was_updated_after_it_was_loaded(tmp_path):
    code = "import psutil, sys\n" + f"sys.path.insert(0, {str(distribution(tmp_path, 'psutil', '99.1', module=False))!r})\n" \
        "from sage_finetune.ui.diagnosis import check_version; print(*check_version('psutil'))"
    assert "99.1 is installed, but" in ask(code) and "restart the kernel" in ask(code)


def test_broken_libraries_are_lines_and_no_traceback(tmp_path):
    (tmp_path/"torch").mkdir()
    (tmp_path/"torch"/"__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    said = ask("from sage_finetune.ui.diagnosis import doctor; found = doctor(online=False); "
        "print(found['loading'].state, found); print(repr(found._repr_html_())[:40])", tmp_path)
    assert said.startswith("problem") and "libcudart.so.12" in said and "✗ Not ready" in said and "memory" in said


def test_extras_are_a_note_unless_asked_for(tmp_path):
    "On a path with the libraries the doctor needs and no others, so that they are really absent"
    import fastcore
    import packaging
    import psutil

    import sage_finetune
    for library in (fastcore, packaging, psutil, sage_finetune): (tmp_path/library.__name__).symlink_to(os.path.dirname(library.__file__))
    code = ("import sys; sys.path[:] = [one for one in sys.path if 'site-packages' not in one and one]\n"
        "from sage_finetune.ui.diagnosis import run_check, _extras, _versions\nfrom sage_finetune.config import TrainingConfig\n"
        "print([look.state for look in run_check('extras', _extras, None)], [look.state for look in run_check('extras', "
        "_extras, TrainingConfig(report_to='wandb'))])\n"
        "print(*run_check('versions', _versions), sep='\\n')")
    said = ask(code, tmp_path)
    assert said.startswith("['note', 'note', 'note'] ['note', 'problem', 'note']")
    assert "runs from its source" in said and "not installed" in said


def test_the_front_end_must_be_of_the_same_age(tmp_path):
    for name, version in (("ipywidgets", "8.1.0"), ("jupyterlab", "4.0.0"), ("jupyterlab_widgets", "1.1.0")):
        distribution(tmp_path, name, version, module=False)
    look, = looks("_front_end", tmp_path)
    assert look.state == "note" and "jupyterlab-widgets 3.*, and there is 1.1.0" in look.found


@pytest.mark.parametrize("lab, said", [("4.2.0", "JupyterLab 4.2.0 draws no panels of ipywidgets 7.7.1"), ("3.6.8", None)])
def test_the_page_must_know_widgets_of_that_age(tmp_path, lab, said):
    for name, version in (("ipywidgets", "7.7.1"), ("jupyterlab", lab), ("jupyterlab_widgets", "1.1.11"), ("notebook", "7.5.0")):
        distribution(tmp_path, name, version, module=False)
    found = looks("_front_end", tmp_path)
    assert ([(look.state, look.found.partition(":")[0]) for look in found] == [("note", said)] * bool(said)
        and all("ipywidgets>=8" in look.run for look in found))


# ---- a module of the same name -----------------------------------------------------------------------------------------

def module_copy(folder):
    "The package as pip installs it: a folder of files and a record of their digests"
    import base64
    import hashlib
    import shutil
    from pathlib import Path

    import sage_finetune
    shutil.copytree(Path(sage_finetune.__file__).parent, folder/"sage_finetune",
        ignore=shutil.ignore_patterns("__pycache__", "models", "examples"))
    distribution(folder, "sage_finetune", "0.1.0", module=False)
    digest = lambda path: base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    record = [f"{path.relative_to(folder).as_posix()},sha256={digest(path)},{path.stat().st_size}"
        for path in sorted((folder/"sage_finetune").rglob("*.py"))]
    (folder/"sage_finetune-0.1.0.dist-info"/"RECORD").write_text("\n".join(record) + "\n")
    return folder


def stranger(folder, name="isage-finetune", record="sage_finetune/__init__.py,,\n", declared=""):
    "Another distribution with files in the folder of this package"
    distribution(folder, name, "0.2.0", module=False)
    for file, text in (("RECORD", record), ("top_level.txt", declared)):
        if text: (folder/f"{name}-0.2.0.dist-info"/file).write_text(text)
    return folder


def test_a_whole_package_is_no_line(tmp_path):
    assert looks("_package", module_copy(tmp_path)) == []
    assert looks("_package") == []


@pytest.mark.parametrize("fields", [dict(), dict(name="finetune_bundle", record="", declared="sage_finetune\n"),
    dict(name="Other.Tool", record="other/x.py,,\nsage_finetune/trainer.py,,\n")], ids=str)
def test_a_stranger_in_the_package(tmp_path, fields):
    look, = looks("_package", stranger(tmp_path, **fields))
    name = fields.get("name", "isage-finetune")
    assert look.state == "problem" and f"{name} 0.2.0 installed a module of the same name" in look.found
    assert (look.run.startswith(f"pip uninstall -y {name}, then pip install --force-reinstall --no-deps")
        and "restart the kernel" in look.run)


FOREIGN = "__version__ = '0.2.0'\n__all__ = ['Finetuner']\n"


@pytest.mark.parametrize("file, content, said",
    [("__init__.py", FOREIGN, "sage_finetune/__init__.py missing, or not as installed"), ("__init__.py", None, "sage_finetune/__init__.py"),
        ("trainer.py", "class Trainer: pass\n", "sage_finetune/trainer.py"), ("core/text.py", "append", "sage_finetune/core/text.py")])
def test_files_that_were_overwritten_or_removed(tmp_path, file, content, said):
    "By a stranger who came, or by one who went"
    path = module_copy(tmp_path)/"sage_finetune"/file
    if content is None: path.unlink()
    else: path.write_text(path.read_text() + "\n" if content == "append" else content)
    look, = looks("_package", tmp_path)
    assert look.state == "problem" and said in look.found and "pip install --force-reinstall" in look.run and "uninstall" not in look.run


def test_the_doctor_of_a_damaged_package_says_it_first(tmp_path):
    path = stranger(module_copy(tmp_path))/"sage_finetune"/"__init__.py"
    path.write_text(FOREIGN)
    said = ask("from sage_finetune.ui.diagnosis import doctor; found = doctor(online=False); print(found.healthy, found.sentence)",
        tmp_path)
    assert said.startswith("False Not ready: ") and "isage-finetune 0.2.0" in said and "uninstall -y isage-finetune" in said


# ---- the disk ---------------------------------------------------------------------------------------------------------

def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path/"file").write_text("here")
    look, = check_folder_writable(tmp_path/"file"/"run")
    assert look.state == "problem" and "is a file, not a folder" in look.found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder nobody may write to, the administrator included")
def test_a_folder_nobody_may_write_to():
    from pathlib import Path
    look, = check_folder_writable(Path("/proc/self/run"))
    assert look.state == "problem" and "cannot write /proc/self/run" in look.found


def test_a_read_only_disk(tmp_path):
    with mounted(tmp_path/"disk", "size=64m,ro") as disk:
        look, = check_folder_writable(disk/"run")
        assert look.state == "problem" and "no permission" in look.found


def test_a_full_disk_and_a_nearly_full_one(tmp_path):
    with mounted(tmp_path/"disk", "size=2m") as disk:
        (disk/"filler").write_bytes(os.urandom(1_500_000))
        look, = check_folder_writable(disk/"run")
        assert look.state == "problem" and "the disk is full" in look.found and not list(disk.glob("tmp*"))
    with mounted(tmp_path/"disk", "size=64m") as disk:
        look, = check_folder_writable(disk/"run")
        assert look.state == "problem" and "0.1 GB free" in look.found


def test_looking_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor(tiny_config(tmp_path/"data"), online=False).healthy
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["data", "data/rows.jsonl"]


# ---- the Hub ----------------------------------------------------------------------------------------------------------

WANTS_MODEL = "__import__('sage_finetune.config').config.TrainingConfig(model_name='ada/lovelace', data_path='example')"


def hub(given="None, True", **environment):
    "What is said about the Hub in a process with such variables, the last line"
    return looks("_hub", given=given, **environment)[-1]


def test_a_server_that_answers(tmp_path):
    with answering({}) as address:
        look = hub(HF_ENDPOINT=address, HF_HOME=str(tmp_path))
        assert look.state == "ok" and f"{address} answers" in look.found
        assert hub(f"{WANTS_MODEL}, True", HF_ENDPOINT=address, HF_HOME=str(tmp_path)).state in ("ok", "problem")


def test_a_port_nobody_listens_at(tmp_path):
    with answering({}) as address: pass
    look = hub(HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert look.state == "problem" and "is not reached" in look.found and "HF_ENDPOINT" in look.run


def test_a_mirror_without_the_model(tmp_path):
    with answering({"/api/models/ada/lovelace": 404}) as address:
        look = hub(f"{WANTS_MODEL}, True", HF_ENDPOINT=address, HF_HOME=str(tmp_path))
        assert look.state == "problem" and "ada/lovelace" in look.found


def test_a_mirror_out_of_order(tmp_path):
    with answering({"/": 503}) as address:
        assert "it says 503" in hub(HF_ENDPOINT=address, HF_HOME=str(tmp_path)).found


def test_a_server_that_never_answers_is_given_up(tmp_path):
    import socket
    import time
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        found = ask(f"from sage_finetune.ui.diagnosis import _ask_hub; print(_ask_hub('http://127.0.0.1:{silent.getsockname()[1]}'))",
            HF_HOME=str(tmp_path))
        took = float(found.strip().rstrip(")").split(", ")[-1])
    assert took < 4 and time.monotonic() > began and "imed" in found or "no answer" in found, found


def test_offline_is_a_wish_unless_the_model_is_missing(tmp_path):
    assert hub(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).state == "note"
    look = hub(f"{WANTS_MODEL}, True", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert look.state == "problem" and "model ada/lovelace must come from there" in look.found


def test_a_mirror_set_too_late(tmp_path):
    code = ("import huggingface_hub.constants, os; os.environ['HF_ENDPOINT'] = 'https://mirror.example'\nfrom "
        "sage_finetune.ui.diagnosis import _set_late; print(*_set_late())")
    assert "was set after the libraries were loaded: they ask https://huggingface.co" in ask(code, HF_HOME=str(tmp_path))


def test_no_secret_is_shown(tmp_path):
    secrets = dict(HF_TOKEN="hf_plantedplanted", WANDB_API_KEY="0123456789planted",
        HF_ENDPOINT="http://ada:s3cret-planted@127.0.0.1:9", HTTPS_PROXY="http://bob:pr0xy-planted@127.0.0.1:9")
    code = ("from sage_finetune.ui.diagnosis import doctor; from sage_finetune.config import TrainingConfig\n"
        "found = doctor(TrainingConfig(model_name='ada/lovelace', data_path='hf_plantedplanted.jsonl', "
        "output_dir='0123456789planted')); print(found, found._repr_html_(), found.sentence, found.checks)")
    said = ask(code, HF_HOME=str(tmp_path), **secrets)
    assert "127.0.0.1:9" in said and "planted" not in said


@pytest.mark.parametrize("text", ["http://a:b@h/x", "see https://user:p@ss@host:80/p?a=1&token=t0ken", "hf_abcdefghij",
    "Authorization: Bearer abc.def"])
def test_what_looks_like_a_secret(text):
    said = redact_secrets(text)
    assert "…" in said and not any(secret in said for secret in ("a:b", "p@ss", "t0ken", "abcdefghij", "abc.def"))


# ---- the config -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, what, said", [
    (dict(data_path="nowhere.jsonl"), "data_path", "there is no data file nowhere.jsonl"),
    (dict(data_path=None), "data_path", "not set"), (dict(model_name="./nowhere"), "model", "there is no model folder"),
    (dict(eval_path="nowhere.csv"), "eval_path", "there is no data file nowhere.csv"),
    (dict(continue_from="nowhere"), "continue_from", "there is no adapter"),
    (dict(device="mps"), "precision", "has none"), (dict(fp16=True, bf16=None), "precision", "needs a GPU")])
def test_a_config_that_cannot_run(tmp_path, change, what, said):
    config = tiny_config(tmp_path)
    for name, value in change.items(): setattr(config, name, value)
    look = doctor(config, online=False)[what]
    assert look.state == "problem" and said in look.found, look


def test_contradictions_and_a_bad_first_row(tmp_path):
    config = tiny_config(tmp_path)
    config.fp16 = config.bf16 = True
    (tmp_path/"rows.jsonl").write_text('{"question": "<b>What?</b>"}\n')
    found = doctor(config, online=False)
    assert found["config"].state == "problem" and "line 1" in found["data_path"].found and "Not ready" in found.sentence


def test_a_run_that_is_there_already_is_a_note(tmp_path):
    config = tiny_config(tmp_path)
    (config.output_dir/"lora_weights").mkdir(parents=True)
    (config.output_dir/"lora_weights"/"adapter_config.json").write_text("{}")
    config.save(config.output_dir/"training_config.json")
    found = doctor(config.output_dir, online=False)["output_dir"]  # nothing to go on from, so only replacing is left
    assert found.state == "problem" and "continue_from" in found.found
    config.overwrite_output_dir = True
    assert "was not written by this toolkit" in doctor(config, online=False)["output_dir"].found  # somebody's own
    config.overwrite_output_dir = False
    (config.output_dir/"checkpoints"/"checkpoint-1").mkdir(parents=True)
    assert doctor(config.output_dir, online=False)["output_dir"].state == "note"
    assert doctor(tmp_path/"none", online=False)["config"].state == "problem"
    assert doctor(17, online=False)["config"].state == "problem"


def test_nothing_that_was_found_runs_in_a_page(tmp_path):
    config = tiny_config(tmp_path)
    config.data_path = tmp_path/"<script>alert(1)<\x1b[31m.jsonl"
    found = doctor(config, online=False)
    assert "<script>" not in found._repr_html_() and "\x1b" not in str(found) + found._repr_html_() and "<script>" in str(found)


def test_a_check_that_fails_is_a_line():
    def check():
        yield Check("first", "fine")
        raise RuntimeError("broken\nmore")
    assert run_check("sensor", check) == [Check("first", "fine"), Check("sensor", "could not be looked at (RuntimeError: broken)", "note")]


# ---- memory -----------------------------------------------------------------------------------------------------------

CELLS = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell('''
import gc, torch, weakref
from sage_finetune.ui.diagnosis import free
from sage_finetune.modeling.base import load_base
from sage_finetune.config import PresetConfigs
seen = []
def train():
    model = load_base(PresetConfigs.tiny())[0]
    large = torch.ones(50_000_000)
    seen.extend([weakref.ref(model), weakref.ref(large)])
    raise RuntimeError("in the middle")
''', store_history=True).raise_error()
shell.run_cell('train()', store_history=True)
shell.run_cell('gc.collect(); kept = [one() is not None for one in seen]; freed = free(); print(kept, [one() is None for one in seen], freed.before["memory"] - freed.after["memory"] > 190e6, freed.gone, freed.held)', store_history=True).raise_error()
shell.run_cell('load_base(PresetConfigs.tiny())[0]', store_history=True).raise_error()
shell.run_cell('model = load_base(PresetConfigs.tiny())[0]; print(sorted(name for name in free(outputs=True).held), [name for name in Out if name > 1])', store_history=True).raise_error()
"""


def test_what_the_last_error_held_is_given_back_in_ipython():
    lines = ask(CELLS).splitlines()
    assert "[True, True] [True, True] True ['the last error'] []" in lines
    assert "['model'] []" in lines


def test_what_a_chain_of_errors_held_is_given_back():
    free()  # what earlier tests left
    held = []
    def inner():
        large = type("Large", (), {})()
        held.append(weakref.ref(large))
        raise ValueError("first")
    try:
        try: inner()
        except ValueError as error: raise RuntimeError("second") from error
    except RuntimeError as error:
        error.__cause__.__context__ = error  # a ring, as libraries make them
        sys.last_value = error
    gc.collect()
    assert held[0]() is not None
    assert free().gone == ["the last error"] and held[0]() is None and not hasattr(sys, "last_value")


def test_free_without_anything_to_free():
    freed = free()
    assert (set(freed.before) == set(freed.after) and freed.after["memory"] > 0 and "before" in str(freed)
        and "<table" in freed._repr_html_())


def test_free_does_not_load_what_was_not_loaded():
    assert ask("import sys; from sage_finetune.ui.diagnosis import free; free(); print('torch' in sys.modules)") == "False\n"
