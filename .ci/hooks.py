"""Git that understands notebooks: nbdev's drivers merge and compare them cell by cell, in this clone only.

`nbdev-install-hooks` does it. Around it: nothing happens where there is no clone (an sdist, a copy, a second work tree),
a hook of one's own stays, the home folder is
left alone (nbdev would have Jupyter ask it at every save), and the drivers are called by their full path,
so that they are found in a shell where .venv is not active.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# Where .venv is gone again git falls back on comparing lines.
MERGE = 'if [ -x "{bin}/nbdev-merge" ]; then "{bin}/nbdev-merge" %O %A %B %P; else git merge-file %A %O %B; fi'
DIFF = (
    'compare() {{ if [ -x "{bin}/nbdev-diff-driver" ]; then "{bin}/nbdev-diff-driver" "$@"; else diff -u "$2" "$5"; true; fi; }}; compare')
TRUST = '#!/bin/sh\nif [ -x "{bin}/nbdev-trust" ]; then "{bin}/nbdev-trust"; fi\n'


def git(*words, root=ROOT):
    "What git says; empty where it fails or is not there"
    try: done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError: return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def obstacle(root):
    "Why no hooks are installed into a folder; nothing where they are"
    if not (root/".git").is_dir() or Path(git("rev-parse", "--show-toplevel", root=root) or "/").resolve() != root:
        return "not a clone of its own"
    hook = root/".git"/"hooks"/"post-merge"
    if hook.exists() and "nbdev-trust" not in hook.read_text(encoding="utf-8", errors="replace"):
        return f"{hook.relative_to(root)} is yours; `nbdev-install-hooks` would replace it"
    return ""


def install(root):
    "nbdev's hooks, then their commands by full path"
    kept = os.environ.get("GIT_CONFIG_GLOBAL") or str(Path.home()/".gitconfig")  # it may say whose folders git trusts
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([BIN/"nbdev-install-hooks"], cwd=root, check=True, capture_output=True,
            env=os.environ | dict(HOME=home, GIT_CONFIG_GLOBAL=kept))
    for name, command in {"merge.jupyternotebook.driver": MERGE, "diff.jupyternotebook.command": DIFF}.items():
        subprocess.run(["git", "config", "--file", ".gitconfig", name, command.format(bin=BIN)], cwd=root, check=True)
    (root/".git"/"hooks"/"post-merge").write_text(TRUST.format(bin=BIN), encoding="utf-8")


if __name__ == "__main__":
    why = obstacle(ROOT)
    if not why: install(ROOT)
    print(f"git: no hooks for notebooks ({why})" if why else "git: notebooks are merged and compared cell by cell (.gitconfig)")
