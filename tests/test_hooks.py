"""Git hooks for notebooks: put into a clone by `make`, they leave nothing behind that git sees,
and nothing at all where there is no clone."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/local/bin", "LANG": "C.UTF-8"}  # .venv is not active
IN_A_CHECKOUT = shutil.which("git", path=ENVIRONMENT["PATH"]) and (Path(__file__).parents[1]/".gitattributes").exists()
pytestmark = pytest.mark.skipif(not IN_A_CHECKOUT, reason="needs git, and a checkout (an sdist has no .gitattributes)")


def notebook(*sources):
    cells = [{"cell_type": "code", "id": f"cell{at}", "metadata": {}, "execution_count": None, "outputs": [], "source": [source]}
        for at, source in enumerate(sources)]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


@pytest.fixture
def clone(root, tmp_path):
    "A small repository with the project's hooks; what `git` says in it, and the home folder"
    folder, home = tmp_path/"clone", tmp_path/"home"
    home.mkdir()
    shutil.copytree(root/".ci", folder/".ci", ignore=shutil.ignore_patterns("__pycache__"))
    (folder/"nbs").mkdir()
    (folder/"nbs"/"page.ipynb").write_text(notebook("one = 1", "two = 2", "three = 3"))
    for name in ("pyproject.toml", ".gitignore", ".gitattributes"): shutil.copy2(root/name, folder)
    for words in (["init", "-q", "-b", "main"], ["config", "user.name", "Ada"], ["config", "user.email", "ada@example.org"],
            ["add", "-A"], ["commit", "-qm", "first"]):
        run("git", *words, cwd=folder, home=home)
    return folder, home


def run(*command, cwd, home, code=0):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=ENVIRONMENT | {"HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def hook(folder, home): return run(sys.executable, ".ci/hooks.py", cwd=folder, home=home)


def commit(folder, home, branch, *sources):
    run("git", "switch", "-qc", branch, "main", cwd=folder, home=home)
    (folder/"nbs"/"page.ipynb").write_text(notebook(*sources))
    run("git", "commit", "-qam", branch, cwd=folder, home=home)


def test_a_clone_stays_clean(clone):
    "Twice too; and nothing is written into the home folder, where nbdev itself would have Jupyter ask it at every save"
    for _ in range(2): assert "cell by cell" in hook(*clone)
    folder, home = clone
    assert run("git", "status", "--porcelain", cwd=folder, home=home) == "" and list(home.iterdir()) == []
    assert os.access(folder/".git"/"hooks"/"post-merge", os.X_OK)


@pytest.mark.parametrize("there", [True, False])
def test_notebooks_are_merged_where_nothing_is_active(clone, there):
    "By nbdev at its full path; by git itself where .venv is gone"
    folder, home = clone
    hook(folder, home)
    if not there: (folder/".gitconfig").write_text((folder/".gitconfig").read_text().replace(os.path.dirname(sys.executable), "/nowhere"))
    commit(folder, home, "first", "one = 'first'", "two = 2", "three = 3")
    commit(folder, home, "second", "one = 1", "two = 2", "three = 'second'")
    run("git", "merge", "-q", "--no-edit", "first", cwd=folder, home=home)
    cells = json.loads((folder/"nbs"/"page.ipynb").read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ["one = 'first'", "two = 2", "three = 'second'"]
    assert "'first'" in run("git", "diff", "HEAD~1", cwd=folder, home=home)


def test_two_changes_of_one_cell_leave_a_notebook_that_opens(clone):
    "Where git alone would leave a file that is no JSON"
    folder, home = clone
    hook(folder, home)
    commit(folder, home, "first", "one = 'first'", "two = 2", "three = 3")
    commit(folder, home, "second", "one = 'second'", "two = 2", "three = 3")
    run("git", "merge", "first", cwd=folder, home=home, code=1)
    sources = ["".join(cell["source"]) for cell in json.loads((folder/"nbs"/"page.ipynb").read_text())["cells"]]
    assert "one = 'first'" in sources and "one = 'second'" in sources


def test_nothing_happens_where_there_is_no_clone(clone, tmp_path):
    "In an sdist or a copy, also one inside another repository, and in a second work tree, whose hooks are those of the first"
    folder, home = clone
    copies = [tmp_path/"copy", folder/"inside"]
    for copy in copies: shutil.copytree(folder/".ci", copy/".ci")
    run("git", "worktree", "add", "-q", tmp_path/"second", cwd=folder, home=home)
    for copy in (*copies, tmp_path/"second"): assert "not a clone of its own" in hook(copy, home) and not (copy/".gitconfig").exists()
    assert not (folder/".git"/"hooks"/"post-merge").exists()


def test_a_hook_of_ones_own_stays(clone):
    folder, home = clone
    own = folder/".git"/"hooks"/"post-merge"
    own.parent.mkdir(exist_ok=True)
    own.write_text("#!/bin/sh\necho mine\n")
    assert "is yours" in hook(folder, home) and "mine" in own.read_text() and not (folder/".gitconfig").exists()


def test_make_installs_them(root):
    assert ".ci/hooks.py" in (root/"Makefile").read_text().partition("$(VENV)/.dev:")[2]
