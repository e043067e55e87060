"""Every notebook runs, each a case of its own, the way nbdev-test runs it and in this one process (torch is imported once)."""
import os
import shutil
from pathlib import Path

import house
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False  # nbdev's function is named like a test
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = house.notebooks(ROOT)
LONG = ("32_demo", "02_studio", "03_resume_and_continue", "04_several_processes")  # nearly a minute each


RUNS = "finetune_output"  # where the pages that use the package put their runs, as a reader's would; git ignores it


def files(folder):
    "What stands in a folder, hidden things and runs left out"
    return {path for path in folder.rglob("*") if not any(part[0] in "._" or part == RUNS for part in path.relative_to(folder).parts)}


@pytest.mark.parametrize("path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS], ids=lambda path: path.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_notebook(path, monkeypatch, tmp_path, capfd):
    "All cells run but those with a flag (gpu, slow), and nothing is left beside the notebook"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # what a notebook writes goes away with the test
    shutil.rmtree(path.parent/RUNS, ignore_errors=True)
    before = files(ROOT/"nbs")
    good, _ = run_notebook(path, skip_flags=get_config(ROOT).tst_flags.split(), basepath=ROOT, showerr=True)
    assert good, capfd.readouterr().err
    assert "IN_TEST" not in os.environ
    assert sorted(files(ROOT/"nbs") - before) == [], "the notebook writes into nbs/"
    assert path.stem == "index" or path.parent.name == "tutorials" or not (path.parent/RUNS).exists(), "a library page leaves its runs in nbs/"
