"Questions read out of real source trees, and the run folders made of them"
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from sage_finetune.config import TrainingConfig
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.core.secrets import find_secret
from sage_finetune.data.corpus import PHRASINGS, PYTHON_KINDS, code_rows, first_sentence, own_source
from sage_finetune.data.files import load_training_data, packaged, packaged_held_out
from sage_finetune.data.rows import to_messages
from sage_finetune.data.tasks import TASKS, describe_health, describe_rows, prepare_run, run_parts
from sage_finetune.modeling.tokenizer import load_tokenizer
from sage_finetune.runs.folder import TASK_NAMES, read_meta, read_status, write_status

POT = ('"Pots and more."\nclass Pot:\n    "Holds tea."\n    def pour(self, cup: '
    'str) -> float:\n        "Fill a cup."\n\ndef brew(leaves, *, minutes=3) -> str:\n    "Make tea."\n')


def grow(root, files):
    "Write files (name -> text or bytes) below a folder"
    for name, content in files.items():
        path = root/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def reasons(corpus): return {skip.place: skip.reason for skip in corpus.skipped}


def answers(corpus, kind): return {fact.name: fact.answer for fact in corpus.facts if fact.kind == kind}


def everything(corpus): return json.dumps([corpus.rows, corpus.held_out, corpus.skipped]) + repr(corpus) + corpus._repr_html_()


# ---- what is asked ----------------------------------------------------------------------------------------------------

def test_the_table_of_tasks_is_complete():
    assert tuple(TASKS) == TASK_NAMES
    assert [task.name for task in TASKS.values() if not task.needs_file] == ["code"]
    assert "<td" in TASKS._repr_html_() and "conversation" in str(TASKS)


def test_phrasings_differ_and_always_name_their_subject():
    every = [phrasing for kind in PHRASINGS.values() for phrasing in kind]
    assert len(set(every)) == len(every) and all("{name}" in phrasing for phrasing in every)
    assert all(len(kind) >= 5 for kind in PHRASINGS.values())


def test_rows_of_a_small_tree(tmp_path):
    corpus = code_rows(grow(tmp_path, {"kitchen.py": POT}))
    assert answers(corpus, "does") == {"kitchen": "Pots and more.", "Pot": "Holds tea.", "Pot.pour": "Fill a cup.", "brew": "Make tea."}
    assert answers(corpus, "parameters") == {"Pot.pour": "cup", "brew": "leaves, minutes"}
    assert answers(corpus, "returns") == {"Pot.pour": "float", "brew": "str"}
    assert answers(corpus, "contents") == {"kitchen": "Pot, brew"}
    assert answers(corpus, "where") == {"Pot": "kitchen.py", "brew": "kitchen.py"}
    row = next(row for row in corpus.rows if row["instruction"] == "What does the method Pot.pour return?")
    assert row == dict(instruction="What does the method Pot.pour return?", output="float", file="kitchen.py",
        line=4, kind="returns", phrasing=0)


@pytest.mark.parametrize("name", ["fastcore", "json", "nbdev", "sage_finetune"])
def test_real_trees_give_one_answer_to_each_question(name):
    package = pytest.importorskip(name)
    corpus = code_rows(os.path.dirname(package.__file__))
    assert len(corpus.facts) > 50 and set(Counter(fact.kind for fact in corpus.facts)) >= {"does", "parameters", "contents", "where"}
    said = {}
    for row in corpus.rows + corpus.held_out: said.setdefault(row["instruction"], []).append(row["output"])
    assert all(len(given) == 1 for given in said.values())
    assert all(row["output"].strip() and "\n" not in row["output"] and len(row["output"]) <= 200 for row in corpus.rows)
    trained = {row["instruction"] for row in corpus.rows}
    assert not any(row["instruction"] in trained for row in corpus.held_out)
    facts = lambda rows: {(row["kind"], row["file"], row["line"], row["output"]) for row in rows}
    assert facts(corpus.rows) == facts(corpus.held_out)
    assert not [skip for skip in corpus.skipped if "secret" in skip.reason]


@pytest.mark.parametrize("folder, package", [("json", "json"), ("sage_finetune", "sage_finetune")])
def test_answers_agree_with_what_python_says_when_it_runs_the_code(folder, package):
    "The tree is read without running it; here the same things are imported and asked"
    corpus, checked = code_rows(os.path.dirname(importlib.import_module(folder).__file__)), 0
    light = {"config", "runs", "tasks", "decoder", "encoder", "scanner", "__init__"}
    for fact in corpus.facts:
        stem = fact.file.removesuffix(".py")
        if fact.noun not in ("function", "class", "method") or stem not in light or "." in stem: continue
        found = importlib.import_module(package if stem == "__init__" else f"{package}.{stem}")
        for part in fact.name.removeprefix(found.__name__ + ".").split("."): found = getattr(found, part)
        if fact.kind == "parameters":
            named = [{"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(o.kind.name, "") + o.name
                for o in inspect.signature(found).parameters.values()]
            if fact.noun == "method" and named[:1] == ["self"]: named = named[1:]
            assert fact.answer == (", ".join(named) or "no parameters"), fact
        elif fact.kind == "does":
            plain = lambda text: " ".join(text.split()).replace("``", "`")
            assert plain(inspect.getdoc(found)).startswith(fact.answer), fact
        elif fact.kind == "where": assert inspect.getsourcefile(inspect.unwrap(found)).endswith(fact.file), fact
        else: continue
        checked += 1
    assert checked > 30


def test_what_the_tree_does_not_say_is_not_asked(tmp_path):
    corpus = code_rows(grow(tmp_path, {"a.py": '''
def silent(x): return x
def lazy(): "TODO"
def later():
    """TODO: write this"""
def headed(x):
    """
    Args:
        x: a thing
    """
class Child(Base): ...
__all__ = [name for name in dir()]
'''}))
    assert answers(corpus, "does") == {} and answers(corpus, "returns") == {} and answers(corpus, "contents") == {}
    assert answers(corpus, "parameters") == dict(silent="x", lazy="no parameters", later="no parameters", headed="x")


@pytest.mark.parametrize("docstring, expected", [
    ("Pour tea. Then drink.", "Pour tea."), ("Is it? Yes.", "Is it?"), ("Uses e.g. Python. More.", "Uses e.g. Python."),
    ("Version 3.11 is needed. Really.", "Version 3.11 is needed."),
    ("Two lines\n    of one sentence\n\n    and a paragraph", "Two lines of one sentence"), ("Returns the pot.", "Returns the pot."),
    ("A title\n=======\n\nMore", "A title"), ("Calls :meth:`~pots.Pot.pour` twice.", "Calls `pots.Pot.pour` twice."),
    ("Fill ``cup`` now.", "Fill `cup` now."),
    ("Wait ... then pour. Done.", "Wait ... then pour."), ("Returns:\n    int: n", None),
    ("Parameters\n----------\nx : int", None), (":param x: y", None),
    ("pour(cup, n=1) -> float", None), ("As follows:\n - a", None), ("FIXME explain", None), ("...", None), ("Pour", None)])
def test_first_sentence(docstring, expected):
    assert first_sentence(docstring) == expected


def test_one_word_is_no_answer_but_two_are():
    assert first_sentence("Pour.") is None and first_sentence("Pour tea.") == "Pour tea."


def test_parameters_of_classes_come_from_their_own_init(tmp_path):
    corpus = code_rows(grow(tmp_path, {"a.py": '''
from dataclasses import dataclass, field, KW_ONLY
from typing import ClassVar, overload
class Plain:
    @overload
    def __init__(self, wrong): ...
    def __init__(self, size, *, lid=True): ...
@dataclass(frozen=True)
class Data:
    size: int
    shared: ClassVar[int] = 3
    _: KW_ONLY
    lid: bool = field(default=True)
    inside: str = field(default="", init=False)
@dataclass
class Child(Data):
    more: int = 0
@dataclass(init=False)
class Manual:
    size: int
'''}))
    assert answers(corpus, "parameters") == dict(Plain="size, lid", Data="size, lid")


def test_methods_of_every_sort(tmp_path):
    corpus = code_rows(grow(tmp_path, {"a.py": '''
from fastcore.basics import patch
from typing import overload
class Pot:
    @staticmethod
    def make(size) -> "Pot": ...
    @classmethod
    def empty(cls, size): ...
    @property
    def left(self) -> float: "What is left inside."
    @left.setter
    def left(self, value): ...
    async def wait(self, seconds): ...
    def _hidden(self, secret): ...
@patch
def shake(self: Pot, times): "Shake the pot."
@overload
def size(x: int) -> int: ...
@overload
def size(x: str) -> str: ...
def size(x): return x
'''}))
    assert answers(corpus, "parameters") == {"Pot.make": "size", "Pot.empty": "size", "Pot.wait": "seconds",
        "Pot.shake": "times", "size": "x"}
    assert answers(corpus, "returns") == {"Pot.make": "Pot", "Pot.left": "float"}
    assert {fact.noun for fact in corpus.facts if fact.name == "Pot.left"} == {"property"}


# ---- names mean one thing ---------------------------------------------------------------------------------------------

def test_a_name_in_several_modules_is_written_with_its_module(tmp_path):
    corpus = code_rows(grow(tmp_path, {"tea/__init__.py": "", "tea/a.py": 'def load(x): "Load tea."\n', "tea/deep/__init__.py": "",
                                       "tea/deep/b.py": 'def load(y): "Load more tea."\ndef once(): ...\n'}))
    assert answers(corpus, "parameters") == {"tea.a.load": "x", "tea.deep.b.load": "y", "once": "no parameters"}
    assert answers(corpus, "where") == {"once": "tea/deep/b.py"}  # a name with its module would give the file away
    assert not any(" load " in row["instruction"] or " load?" in row["instruction"] for row in corpus.rows)


def test_a_name_twice_in_one_module_is_left_out_and_counted(tmp_path):
    corpus = code_rows(grow(tmp_path,
        {"a.py": 'try:\n    import x\n    def load(a): ...\nexcept ImportError:\n    def load(b): ...\ndef kept(): ...\n'}))
    assert answers(corpus, "parameters") == dict(kept="no parameters")
    assert reasons(corpus) == {"a.py:3 load": "defined more than once under one name",
        "a.py:5 load": "defined more than once under one name"}


def test_scripts_of_one_name_and_a_function_named_like_its_module(tmp_path):
    corpus = code_rows(grow(tmp_path, {"one/run.py": '"The first script."', "two/run.py": '"The second script."',
        "pour.py": 'def pour(cup): "Pour it."\n'}))
    assert answers(corpus, "does") == {"one.run": "The first script.", "two.run": "The second script.", "pour.pour": "Pour it."}


def test_too_long_answers_are_left_out_and_counted(tmp_path):
    grow(tmp_path, {"a.py": f'def f(x): "Say {"very " * 60}much."\n'})
    corpus = code_rows(tmp_path)
    assert answers(corpus, "does") == {} and reasons(corpus)["a.py:1 f (does)"] == "answer longer than 200 characters"
    assert "f" in answers(code_rows(tmp_path, max_answer=1000), "does")


# ---- what is left out -------------------------------------------------------------------------------------------------

def join(*parts): return "".join(parts)  # so that this file does not hold what it looks for


SECRETS = {
    "private key": join("-----BEGIN RSA PRI", "VATE KEY-----"), "AWS key": join("AKI", "AZ7QXM3PLW2RTV5KB"),
    "GitHub token": join("gh", "p_", "a1B2" * 9), "OpenAI or Anthropic key": join("sk", "-proj-", "aB3dE5gH" * 4),
    "Hugging Face token": join("h", "f_", "aBcDeFgHiJ" * 3 + "kLmN"),
    "Slack token": join("xo", "xb-", "123456789012-abcdefGHIJ"), "Google key": join("AI", "za", "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q"),
    "Stripe key": join("sk", "_live_", "a1b2c3d4e5f6g7h8")}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_file_with_a_secret_is_left_out_and_the_secret_never_shown(tmp_path, kind):
    secret = SECRETS[kind]
    corpus = code_rows(grow(tmp_path, {"good.py": POT, "bad.py": f'def leak():\n    "Use {secret} to enter."\n'}))
    assert reasons(corpus) == {"bad.py": f"looks like a secret: {kind}"}
    assert secret not in everything(corpus) and "leak" not in everything(corpus)


@pytest.mark.parametrize("line", ['{} = "hunt{}2"', 'connect(user="ada", {}="S3cr3t!{}pot")', 'config = {{"{}": "tea4{}two"}}',
    '{}: str = "tea4{}two"', 'os.environ["DB_{}"] = "tea4{}two"'])
def test_passwords_in_code(line):
    assert find_secret("x = 1\n" + line.format(join("pass", "word"), "er")) == "password in line 2"


@pytest.mark.parametrize("line", ['url = "postgres://ada:tea4{}two@db/tea"', 'api_key = "f81d4fae7dec{}11d0a765"',
    'token = "8f14e45fceea167a{}5a36dedd4bea"', 'SECRET_KEY = "q9#{}vT7!x"'])
def test_other_credentials_in_code(line):
    assert find_secret(line.format("0")) == "password in line 1"


@pytest.mark.parametrize("value", ["...", "your-password-1", "<password1>", "${DB_PASS1}", "changeme1", "example123",
    "xxxxxxx1", "password1", "letmein", "%(pass1)s", "{secret1}", "", "a1", "my secret 1"])
def test_placeholders_are_no_secrets(value):
    word = join("pass", "word")
    assert find_secret(f'"""Call connect({word}="{value}")"""\n{word} = "{value}"\n') == ""


@pytest.mark.parametrize("line", ['eos_token = "<|im_end|>"', 'token = "hello1"', 'key = "model.layers.0.weight"',
                                  join('AWS = "AKI', 'AIOSFODNN7EXAMPLE"'), 'api_key = os.environ["KEY1"]',
                                  'if password == other1: pass', 'hf_hub_download = 1', 'x = "sk-learn-is-a-library-for-machine-learning"',
                                  'password: str = None', 'url = "https://user:password@host"'])
def test_harmless_lines_are_no_secrets(line):
    assert find_secret(line) == ""


def test_build_and_vendor_folders_are_left_out(tmp_path):
    tools = ["build", "dist", "node_modules", ".git", ".venv", "venv", "__pycache__", ".ipynb_checkpoints", "tea.egg-info",
        "lib/site-packages", "vendor", "tests"]
    grow(tmp_path, {"good.py": POT, "myenv/pyvenv.cfg": "", **{f"{folder}/copy.py": POT for folder in tools + ["myenv"]}})
    corpus = code_rows(tmp_path)
    assert corpus.files == 1 and {fact.file for fact in corpus.facts} == {"good.py"}
    assert {place.rstrip("/") for place in reasons(corpus)} == {*tools, "myenv"}


def test_a_tree_may_itself_lie_in_such_a_folder(tmp_path):
    assert code_rows(grow(tmp_path/"site-packages"/"tests"/"tea", {"pot.py": POT})).files == 1


def test_links_are_not_followed(tmp_path):
    outside = grow(tmp_path/"outside", {"private.py": 'def private(): "Not for you."\n'})
    tree = grow(tmp_path/"tree", {"good.py": POT, "sub/more.py": "def more(): ...\n"})
    (tree/"out").symlink_to(outside)
    (tree/"out.py").symlink_to(outside/"private.py")
    (tree/"sub"/"up").symlink_to(tree)
    (tree/"ping").symlink_to(tree/"pong")
    (tree/"pong").symlink_to(tree/"ping")
    (tree/"again.py").symlink_to(tree/"good.py")
    corpus = code_rows(tree)
    assert corpus.files == 2 and "private" not in answers(corpus, "does")
    assert reasons(corpus) == {"out/": "link that leaves the tree", "out.py": "link that leaves the tree",
                               "sub/up/": "link that loops", "again.py": "link to a place read under its own name",
                               "ping": "link that loops or leads nowhere", "pong": "link that loops or leads nowhere"}


def test_files_that_cannot_be_read_are_counted(tmp_path):
    corpus = code_rows(grow(tmp_path, {
        "good.py": POT, "broken.py": "def (:\n", "null.py": b"x = 1\0\n", "latin.py": b'"caf\xe9"\n',
        "cookie.py": b'# -*- coding: latin-1 -*-\ndef cafe(): "Un caf\xe9 noir."\n',
        "unknown.py": b"# -*- coding: klingon -*-\n", "mark.py": b'\xef\xbb\xbfdef bom(): "With a mark."\n',
        "huge.py": "x = 1\n" * 200_000, "deep.py": "x = " + "(" * 5000 + ")" * 5000 + "\n"}))
    assert reasons(corpus) == {"broken.py": "syntax error", "null.py": "syntax error", "latin.py": "not readable as text",
                               "unknown.py": "not readable as text",
                               "huge.py": "larger than 1,000,000 bytes", "deep.py": "syntax error"}
    assert answers(corpus, "does")["cafe"] == "Un café noir." and answers(corpus, "does")["bom"] == "With a mark."


@pytest.mark.timeout(30)
def test_a_pipe_named_like_a_file_does_not_block(tmp_path):
    os.mkfifo(grow(tmp_path, {"good.py": POT})/"pipe.py")
    assert reasons(code_rows(tmp_path)) == {"pipe.py": "not a regular file"}


def test_generated_files_are_left_out_but_nbdev_modules_are_welcome(tmp_path):
    corpus = code_rows(grow(tmp_path, {"_modidx.py": "d = {}", "tea_pb2.py": POT,
                                       "made.py": "# Code generated by a tool. DO NOT EDIT.\n" + POT,
                                       "nb.py": "# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/00_nb.ipynb.\n" + POT}))
    assert reasons(corpus) == {"_modidx.py": "generated", "tea_pb2.py": "generated", "made.py": "generated"}
    assert "nb" in answers(corpus, "does")


def test_warnings_in_foreign_code_stay_silent(tmp_path, recwarn):
    code_rows(grow(tmp_path, {"a.py": 'def f(): "A bad \\d escape."\n'}))
    assert not recwarn.list


# ---- what lies beside the Python files --------------------------------------------------------------------------------

README = """# Tea\nA small house for **tea** by the [river](map.md).\n\n## Opening\nIt opens on Monday, with the sun.\n"""
CALLS = 'from kitchen import Pot, brew\ndef test_brew(leaves):\n    brew(leaves)\n    assert brew("mint", minutes=5)\n'
BESIDE = {"kitchen.py": POT, "README.md": README, "docs/menu.rst": "Menu\n====\n\nWhat we serve, from ``tea`` to cake.\n",
    "tests/test_kitchen.py": CALLS, "web/pot.js": "/** Pours tea into a cup. */\nexport function pour(cup) {\n}\n",
    "cmd/brew.go": "package main\n\n// Brew makes a pot of tea.\nfunc Brew(leaves string) {\n}\n"}


def test_a_tree_is_more_than_its_python_files(tmp_path):
    corpus = code_rows(grow(tmp_path, BESIDE))
    assert answers(corpus, "section") == {"Tea of README.md": "A small house for tea by the river.",
        "Opening of README.md": "It opens on Monday, with the sun.", "Menu of docs/menu.rst": "What we serve, from `tea` to cake."}
    assert answers(corpus, "call") == {"brew": 'brew("mint", minutes=5)'}
    assert answers(corpus, "comment") == {"pour in web/pot.js": "Pours tea into a cup.", "Brew in cmd/brew.go": "Brew makes a pot of tea."}
    assert corpus.files == 6 and {kind for kind in PHRASINGS if f"facts: {kind}" in repr(corpus)} == {fact.kind for fact in corpus.facts}
    said = Counter(row["instruction"] for row in corpus.rows + corpus.held_out)
    assert max(said.values()) == 1 and "Show a call of brew." in said and "What does the section Tea of README.md say?" in said


@pytest.mark.parametrize("kinds", [("section",), ("call",), ("comment",), PYTHON_KINDS, ("does", "call")])
def test_each_kind_can_be_switched_off(tmp_path, kinds):
    corpus = code_rows(grow(tmp_path, BESIDE), kinds=kinds)
    assert {fact.kind for fact in corpus.facts} == set(kinds)
    if kinds == ("section",): assert corpus.rows and not any(row["file"].endswith((".py", ".js")) for row in corpus.rows)


def test_its_own_source_is_asked_about_as_before():
    corpus = code_rows()
    assert {fact.kind for fact in corpus.facts} == set(PYTHON_KINDS)
    assert not [skip for skip in corpus.skipped if "in one file" in skip.reason or "nearly the same" in skip.reason]


def test_what_is_beside_and_not_read_is_counted(tmp_path):
    secret = SECRETS["AWS key"]
    corpus = code_rows(grow(tmp_path, BESIDE | {"bad.md": f"# Key\nUse {secret} to enter.\n", "latin.md": b"# Caf\xe9\n",
        "CHANGES.md": README,
        "made.js": "// Code generated by a tool. DO NOT EDIT.\n/** Does a thing well. */\nfunction made() {\n}\n",
        "huge.md": "# x\n" * 300_000, "web/pot.min.js": BESIDE["web/pot.js"], "web/pot.test.js": BESIDE["web/pot.js"],
        "node_modules/a.js": BESIDE["web/pot.js"], "tests/test_leak.py": f'from kitchen import brew\nbrew("{secret}")\n'}))
    assert secret not in everything(corpus)
    assert reasons(corpus) == {"bad.md": "looks like a secret: AWS key", "latin.md": "not readable as text", "made.js": "generated",
        "huge.md": "larger than 1,000,000 bytes", "node_modules/": "folder made by a tool", "tests/": "tests",
        "tests/test_leak.py": "looks like a secret: AWS key"}
    assert len(answers(corpus, "section")) == 3 and len(answers(corpus, "comment")) == 2


def test_links_beside_are_not_followed(tmp_path):
    outside = grow(tmp_path/"outside", {"private.md": "# Private\nNot for your eyes at all.\n", "tests/test_a.py": CALLS})
    tree = grow(tmp_path/"tree", {"kitchen.py": POT})
    (tree/"out.md").symlink_to(outside/"private.md")
    (tree/"tests").symlink_to(outside/"tests")
    corpus = code_rows(tree)
    assert not answers(corpus, "section") and not answers(corpus, "call")
    assert reasons(corpus) == {"out.md": "link that leaves the tree", "tests/": "link that leaves the tree"}


@pytest.mark.timeout(30)
def test_a_pipe_named_like_a_document_does_not_block(tmp_path):
    os.mkfifo(grow(tmp_path, {"good.py": POT})/"README.md")
    assert reasons(code_rows(tmp_path)) == {"README.md": "not a regular file"}


def test_a_readme_that_would_act_on_a_screen_is_left_out(tmp_path):
    text = ("# Tea\nIt is \x1b[31mred\x1b[0m and hot.\n\n## <b>Bold</b> opening\n<script>alert(1)</script> The door is open.\n\n"
        "## Plain\nThe <i>door</i> is \u202eopen now.\n## Real\nThe <i>door</i> is open.\n")
    corpus = code_rows(grow(tmp_path, {"good.py": POT, "README.md": text}))
    assert reasons(corpus) == {"README.md:1 Tea": "characters that are not seen", "README.md:7 Plain": "characters that are not seen"}
    assert answers(corpus, "section") == {"Real of README.md": "The door is open."}
    assert "\x1b" not in everything(corpus) + str(corpus) and "<script" not in everything(corpus)


def test_a_name_two_modules_have_is_not_called(tmp_path):
    corpus = code_rows(grow(tmp_path, BESIDE | {"pub.py": "def brew(hops): ...\n"}))
    assert answers(corpus, "call") == {}


def test_a_call_of_another_library_is_no_call_of_the_tree(tmp_path):
    corpus = code_rows(grow(tmp_path, {"kitchen.py": "def run(x): ...\n", "tests/test_a.py": 'import subprocess\nsubprocess.run(["ls"])\n',
        "tests/test_b.py": "from os import run\nrun(3)\n", "tests/test_c.py": "from .kitchen import run\nrun(4)\n"}))
    assert answers(corpus, "call") == {"run": "run(4)"}


def test_files_under_an_unwanted_licence_are_left_out_and_counted(tmp_path):
    gpl = "# SPDX-License-Identifier: GPL-3.0-or-later\n"
    grow(tmp_path, {"free.py": POT, "gpl.py": gpl + 'def copied(): "Copied from far away."\n',
        "web/a.js": "// " + gpl[2:] + BESIDE["web/pot.js"],
        "lesser.py": "# SPDX-License-Identifier: LGPL-2.1-only\ndef lesser(x): ...\n",
        "doc.md": "<!-- SPDX-License-Identifier: GPL-2.0-only -->\n" + README})
    assert {"Copied from far away."} < set(answers(code_rows(tmp_path), "does").values())
    corpus = code_rows(tmp_path, skip_licences=["GPL"])
    assert reasons(corpus) == {"gpl.py": "licence GPL-3.0-or-later", "web/a.js": "licence GPL-3.0-or-later",
        "doc.md": "licence GPL-2.0-only"}
    assert "lesser.lesser" in answers(corpus,
        "parameters") and "copied" not in everything(corpus) and "licence GPL-3.0-or-later  2" in repr(corpus)
    assert code_rows(tmp_path, skip_licences="GPL").facts == corpus.facts
    assert "lesser.py" in reasons(code_rows(tmp_path, skip_licences=["lgpl-2.1-only"]))


def test_an_answer_that_was_given_already_is_left_out_and_counted(tmp_path):
    long = "Pour the tea into the cup, slowly and without a word, until nothing is left in the pot but {}."
    corpus = code_rows(grow(tmp_path, {f"m{name}.py": f'def {name}(): "{long.format(rest)}"\n' for name, rest in
        dict(a="wet leaves", b="wet leaves", c="dry leaves",
        d="a spoon").items()} | {"me.py": 'def e(): "Open every second window of the west wing."\n'}))
    assert set(answers(corpus, "does")) == {"a", "e"} and set(answers(corpus, "parameters")) == set("abcde")
    assert Counter(skip.reason for skip in corpus.skipped) == {"nearly the same answer as another": 3}


@pytest.mark.timeout(60)
def test_a_file_of_ten_thousand_functions_is_not_the_whole_tree(tmp_path):
    grow(tmp_path, {"good.py": POT, "huge.py": "".join(f"def table_{at}(x): ...\n" for at in range(10_000)),
        "huge.js": "".join(f"/// Returns row {at} of a table.\nfunction row{at}() {{\n" for at in range(3_000))})
    corpus = code_rows(tmp_path, max_per_file=50)
    per_file = Counter(fact.file for fact in corpus.facts)
    assert per_file["huge.py"] == per_file["huge.js"] == 50 and per_file["good.py"] > 5
    assert Counter(skip.reason for skip in corpus.skipped)["more than 50 facts in one file"] == 20_000 - 50 + 3_000 - 50
    assert len([fact for fact in corpus.facts if fact.file == "huge.py" and fact.kind == "where"]) == 25  # evenly over kinds


def test_more_files_than_are_read_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.corpus.MAX_OTHERS", 3)
    corpus = code_rows(grow(tmp_path, {"good.py": POT, **{f"d{at}.md": f"# Part {at}\nThis is part number {at}.\n" for at in range(5)}}))
    assert len(answers(corpus, "section")) == 3 and set(reasons(corpus)) == {"d3.md", "d4.md"}


# ---- choosing ---------------------------------------------------------------------------------------------------------

def test_chosen_facts_are_spread_over_kinds_and_files():
    full = code_rows()
    few = code_rows(max_facts=40, seed=3)
    kinds, files = Counter(fact.kind for fact in few.facts), Counter(fact.file for fact in few.facts)
    assert len(few.facts) == 40 and len(few.rows) == 160 and len(few.held_out) == 40 and few.available == len(full.facts)
    assert set(kinds) == set(PYTHON_KINDS) and max(kinds.values()) - min(count for kind, count in kinds.items() if kind != "contents") <= 2
    assert len(files) >= 5 and max(files.values()) <= 12
    assert few.facts == [fact for fact in full.facts if fact in set(few.facts)]


def test_the_seed_decides_and_nothing_else(tmp_path):
    "Another process, another hash seed and files written in another order give the same rows; another seed does not"
    files = {f"m{number}.py": POT.replace("brew", f"brew{number}").replace("Pot", f"Pot{number}") for number in range(9)}
    rows = []
    for turn, order in enumerate((sorted(files), sorted(files, reverse=True))):
        root = grow(tmp_path/str(turn)/"tea", {name: files[name] for name in order})
        code = (f"import json; from sage_finetune.data.corpus import code_rows; "
            f"print(json.dumps(code_rows({str(root)!r}, max_facts=12).rows))")
        rows.append(subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONHASHSEED=str(turn)),
            capture_output=True, text=True, check=True).stdout)
    assert rows[0] == rows[1]
    assert json.loads(rows[0]) == code_rows(root, max_facts=12).rows != code_rows(root, max_facts=12, seed=1).rows


def test_every_file_has_its_chance(tmp_path):
    "One fact a file: which files are asked about depends on the seed, not on the alphabet"
    grow(tmp_path, {f"m{number}.py": f"X{number} = 1\n" for number in range(20)})
    chosen = {fact.file for seed in range(20) for fact in code_rows(tmp_path, max_facts=4, seed=seed).facts}
    assert len(chosen) > 12


def test_importing_the_room_stays_light():
    code = "import sys, sage_finetune.data.tasks; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_its_own_source_is_the_default():
    assert code_rows(max_facts=5).root == own_source().resolve() and (own_source()/"data"/"tasks.py").is_file()


# ---- sentences --------------------------------------------------------------------------------------------------------

def test_trees_without_anything_to_ask(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder. Name a folder"): code_rows(tmp_path/"nowhere")
    with pytest.raises(DataError, match="a.py is not a folder"): code_rows(grow(tmp_path/"x", {"a.py": POT})/"a.py")
    with pytest.raises(DataError, match="no Python file to read in .*none. Name another code_root"):
        code_rows(grow(tmp_path/"none", {"readme.md": "hello"}))
    with pytest.raises(DataError, match="1 Python files were read .* nothing to ask about. Name another"):
        code_rows(grow(tmp_path/"quiet", {"a.py": "x = 1"}))
    with pytest.raises(DataError, match="Left out: 2 × folder made by a tool, 1 × syntax error"):
        code_rows(grow(tmp_path/"left", {"build/a.py": POT, "dist/a.py": POT, "b.py": "def (:"}))
    with pytest.raises(ConfigError, match="max_facts = 0 leaves nothing"): code_rows(max_facts=0)


# ---- run folders ------------------------------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path): return grow(tmp_path/"tea", {"pot.py": POT})


@pytest.fixture
def questions(tmp_path): return grow(tmp_path, {"questions.csv": "question,answer\nWho?,Nora\nWhere?,Under the mat\n"})/"questions.csv"


def names(folder): return sorted(path.name for path in folder.iterdir())


def test_a_code_run(tmp_path, tree):
    run = prepare_run("code", tmp_path/"run", code_root=tree, seed=5, num_train_epochs=2)
    assert names(run) == ["eval_data_code_alpaca.json", "finetune_meta.json", "run_manifest.json", "status.json",
        "training_config.json", "training_data_code_alpaca.json"]
    corpus, config, meta = code_rows(tree), TrainingConfig.load(run/"training_config.json"), read_meta(run)
    assert json.loads((run/"training_data_code_alpaca.json").read_text()) == corpus.rows
    assert json.loads((run/"eval_data_code_alpaca.json").read_text()) == corpus.held_out
    assert (config.seed, config.num_train_epochs, config.model_name, config.output_dir) == (5, 2, "tiny", run)
    assert (meta.task_type, meta.model, meta.format, meta.code_root, meta.data_file) == ("code", "tiny", "alpaca", tree, None)
    assert read_status(run).state == "pending"


def test_a_prepared_folder_can_be_moved(tmp_path, tree):
    moved = prepare_run("code", tmp_path/"run", code_root=tree).rename(tmp_path/"elsewhere")
    config = read_meta(moved).to_config()
    assert (config.data_path.is_file() and config.eval_path.is_file()
        and {config.data_path.parent, config.eval_path.parent, config.output_dir} == {moved})


@pytest.mark.parametrize("task, name, content, row_format", [
    ("qa", "a.jsonl", '{"question": "Who?", "answer": "Nora"}\n', "qa"),
    ("instruction", "a.json", '[{"instruction": "Sing", "output": "La"}]', "alpaca"),
    ("chat", "a.json", '[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]', "messages"),
    ("custom", "a.jsonl", '{"text": "Once upon a time"}\n{"question": "Who?", "answer": "Nora"}\n', "mixed")])
def test_runs_from_files(tmp_path, task, name, content, row_format):
    source = grow(tmp_path, {name: content})/name
    run = prepare_run(task, tmp_path/"run", data=source)
    meta = read_meta(run)
    assert meta.dataset.name == f"training_data_{task}_{row_format}.json" and meta.data_file == source and meta.format == row_format
    assert [*json.loads(meta.dataset.read_text())[0]] == [*json.loads(content.splitlines()[0].strip("[]"))]
    assert not TrainingConfig.load(run/"training_config.json").eval_path


@pytest.mark.parametrize("task, changes, error, sentence", [
    ("poetry", {}, ConfigError, "no task 'poetry'"), ("qa", dict(kinds=["does"]), ConfigError, "which only task code reads"),
    ("chat", dict(skip_licences=["GPL"]), ConfigError, "which only task code reads"),
    ("code", dict(kinds=["dose"]), ConfigError, "kinds names 'dose'.* There are: does, parameters"),
    ("code", dict(kinds=[]), ConfigError, "kinds is empty"), ("code", dict(max_per_file=0), ConfigError, "max_per_file = 0 leaves nothing"),
    ("qa", dict(data="nowhere.json"), DataError, "no data file nowhere.json"),
    ("qa", dict(code_root="."), ConfigError, "only task code reads"),
    ("code", dict(data="x.json"), ConfigError, "would be ignored"), ("code", dict(code_root="nowhere"), DataError, "is not a folder"),
    ("code", dict(sed=1), ConfigError, "Did you mean 'seed'"), ("code", dict(learning_rate=-1), ConfigError, "learning_rate = -1"),
    ("chat", dict(data="questions.csv"), DataError, "questions.csv, line 2 is of format 'qa', but task chat takes"),
    ("custom", dict(data="bad.jsonl"), DataError, "bad.jsonl, line 2: .*answer"),
    ("custom", dict(data="empty.jsonl"), DataError, "line 1: the answer in turn 2 is empty")])
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, monkeypatch, questions, task, changes, error, sentence):
    monkeypatch.chdir(tmp_path)
    grow(tmp_path, {"bad.jsonl": '{"question": "Who?", "answer": "Nora"}\n{"question": "Who?"}\n',
        "empty.jsonl": '{"question": "Who?", "answer": " "}\n'})
    with pytest.raises(error, match=sentence): prepare_run(task, "run", **changes)
    assert not (tmp_path/"run").exists()


# ---- packaged examples, and a look at the rows -------------------------------------------------------------------------

@pytest.mark.parametrize("task, row_format", [("qa", "qa"), ("instruction", "alpaca"), ("chat", "messages"), ("custom", "mixed")])
def test_without_a_file_a_task_has_its_packaged_example(tmp_path, monkeypatch, task, row_format):
    monkeypatch.chdir(tmp_path)
    (tmp_path/f"example_{task}").mkdir()  # a folder of that name is not meant
    with pytest.warns(UserWarning, match="no data file was named: the packaged example is used"): run = prepare_run(task, "run")
    meta, config = read_meta(run), TrainingConfig.load(run/"training_config.json")
    rows, held_out = (json.loads(path.read_text()) for path in (config.data_path, config.eval_path))
    assert (meta.format, meta.data_file, meta.code_root) == (row_format, None, None)
    assert rows == load_training_data(packaged(f"example_{task}")) and held_out == load_training_data(packaged(f"example_{task}_unseen"))
    asked = [{json.dumps(to_messages(row)[:-1]) for row in some} for some in (rows, held_out)]
    assert 40 <= len(rows) <= 80 and not asked[0] & asked[1] and packaged_held_out(f"example_{task}") == packaged(f"example_{task}_unseen")
    assert {to_messages(row)[-1]["content"] for row in held_out} <= {turn["content"] for row in rows for turn in to_messages(row)}


def test_rows_are_shown_before_anything_is_written(tmp_path, capsys, monkeypatch, questions):
    monkeypatch.setenv("COLUMNS", "70")
    prepare_run("qa", tmp_path/"run", data=questions, show=True)
    assert capsys.readouterr().out == "2 of 2 rows:\n1  Who?  →  Nora\n2  Where?  →  Under the mat\n\n"
    with pytest.raises(DataError): prepare_run("qa", tmp_path/"other", data=tmp_path/"nowhere.json", show=True)
    prepare_run("chat", tmp_path/"chat", show=True)
    said = capsys.readouterr().out
    assert said.startswith("no data file was named: the packaged example is used, 57 rows") and "10 of 57 rows:" in said
    assert max(map(len, said.split("\n\n")[1].splitlines())) <= 70
    prepare_run("chat", tmp_path/"quiet", data="example_chat")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("row, line", [
    (dict(text="Once \x1b[2J\nupon"), "Once \ufffd[2J ⏎ upon"), (dict(question="a\u202eb", answer="<b>"), "a\ufffdb  →  <b>"),
    (dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")] * 2), "(4 turns) a  →  b"),
    (dict(question="q" * 1_000_000, answer="x"), "q" * 36 + "…"), (dict(question="鍵" * 100, answer="x"), "鍵" * 18 + "…")],
    ids=["text", "hidden", "turns", "endless", "wide"])
def test_a_row_is_one_harmless_line(row, line):
    assert describe_rows([row], 40) == f"1 of 1 rows:\n1  {line}"


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_in_a_row_is_not_shown(kind):
    shown = describe_rows([dict(question="Which key?", answer=f"It is {SECRETS[kind]}")], 200)
    assert SECRETS[kind] not in shown and "It is" in shown


def test_ten_rows_from_the_first_to_the_last():
    lines = describe_rows([dict(question=str(at), answer="x") for at in range(1_000)], 80).splitlines()
    assert lines[0] == "10 of 1,000 rows:" and lines[1] == "   1  0  →  x" and lines[-1] == "1000  999  →  x" and len(lines) == 11


def test_health_in_short(tmp_path, capsys):
    tokenizer = load_tokenizer("tiny")
    rows = [dict(question="Who keeps the light?", answer="Ada Pell.")] * 3
    said = describe_health(rows, tokenizer, rows[:1], width=60)
    assert "error" in said and "in both splits" in said and "exact duplicates" in said and max(map(len, said.splitlines())) <= 60
    assert "of the first 2,000 of 2,001 rows" in describe_health(rows * 667, tokenizer)
    assert describe_health([dict(question="?", answer="x " * 9000)], tokenizer,
        max_length=64).startswith("the health of these rows cannot be told")
    prepare_run("instruction", tmp_path/"run", show=True, tokenizer=tokenizer)
    assert "Health of 73 rows:" in capsys.readouterr().out


def test_a_folder_with_a_run_is_refused(tmp_path, tree, questions):
    run = prepare_run("code", tmp_path/"run", code_root=tree)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(RunError, match="already holds a run .* Choose another `output_dir`, or pass `overwrite=True`"):
        prepare_run("qa", run, data=questions)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("part", ["lora_weights/adapter_config.json", "checkpoints/checkpoint-5/state.pt",
    "metrics.jsonl", "training_data_qa_qa.json"])
def test_any_part_of_a_run_makes_it_one(tmp_path, questions, part):
    grow(tmp_path/"run", {part: "{}"})
    with pytest.raises(RunError, match="already holds a run"): prepare_run("qa", tmp_path/"run", data=questions)


def test_overwriting_takes_the_old_run_and_nothing_else(tmp_path, tree, questions):
    run = prepare_run("code", tmp_path/"run", code_root=tree)
    grow(run, {"notes.txt": "mine", "plots/loss.png": "mine", "metrics.jsonl": "{}\n", "lora_weights/adapter_config.json": "{}",
        "checkpoints/checkpoint-1/x": "", "logs/x": ""})
    prepare_run("qa", run, data=questions, overwrite=True)
    kept = ["checkpoints", "finetune_meta.json", "logs", "lora_weights", "metrics.jsonl", "notes.txt", "plots",
        "run_manifest.json", "status.json", "training_config.json", "training_data_qa_qa.json"]
    assert names(run) == kept  # the rows of the old run are gone; what somebody put there is not, whatever its name


def test_a_folder_of_other_things_is_no_run(tmp_path, questions):
    run = grow(tmp_path/"run", {"logs/mine.txt": "mine", "notes.txt": "mine"})
    assert run_parts(run) == []
    prepare_run("qa", run, data=questions)
    assert (run/"logs"/"mine.txt").read_text() == "mine"


def test_a_run_at_work_is_not_overwritten(tmp_path, tree, questions):
    run = prepare_run("code", tmp_path/"run", code_root=tree)
    write_status(run, "training", 3, 10)
    holds = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", holds, str(run/".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        (run/"status.json").write_text(json.dumps(dict(vars(read_status(run)), pid=other.pid, start_mark="")))
        with pytest.raises(RunError, match=f"process {other.pid} .* is working on the run"):
            prepare_run("qa", run, data=questions, overwrite=True)
        assert read_meta(run).task_type == "code"
    finally:
        other.kill()
        other.wait()
    prepare_run("qa", run, data=questions, overwrite=True)  # its process is gone


def test_a_place_that_is_a_file(tmp_path, questions):
    with pytest.raises(RunError, match="is a file, not a folder. Choose another"): prepare_run("qa", questions, data=questions)
    with pytest.raises(RunError, match="is a file, not a folder"): prepare_run("qa", questions/"below", data=questions)


FULL_DISK = """
import resource, signal, sys
from sage_finetune.data.tasks import prepare_run
from sage_finetune.core.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))   # no file may grow beyond this
try: prepare_run('code', {run!r}, code_root={tree!r}, overwrite=True)
except RunError as error: print('said:', error)
"""


@pytest.mark.parametrize("limit", [0, 1500, 5000])
def test_when_the_disk_refuses_nothing_half_written_stays(tmp_path, tree, questions, limit):
    "The limit stops the rows, the evaluation rows or a later file; a new folder goes away, an old run comes back as it was"
    old = prepare_run("qa", tmp_path/"old", data=questions)
    grow(old, {"lora_weights/adapter_config.json": "{}", "notes.txt": "mine"})
    before = {str(path.relative_to(old)): path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
    grow(tree, {"more.py": "\n".join(f'def pour_{number}(cup): "Pour cup {number}."' for number in range(20))})
    for run in (tmp_path/"new", old):
        code = FULL_DISK.format(limit=limit, run=str(run), tree=str(tree))
        done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
        assert "said: cannot write" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path/"new").exists()
    assert {str(path.relative_to(old)): path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()} == before
    assert not [path for path in old.iterdir() if path.name.startswith(".")]


def test_the_given_config_is_not_touched(tmp_path, tree):
    mine = TrainingConfig(model_name="tiny", seed=9)
    run = prepare_run("code", tmp_path/"run", code_root=tree, config=mine, learning_rate=1e-3)
    assert mine == TrainingConfig(model_name="tiny", seed=9)
    assert (TrainingConfig.load(run/"training_config.json").seed,
        TrainingConfig.load(run/"training_config.json").learning_rate) == (9, 1e-3)
