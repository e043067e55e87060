"""Every notebook runs, each a case of its own, the way nbdev-test runs it and in this one process (torch is imported once).

What README and the tutorials show is compared with what the run gave: figures and words that are those of an older program are found.
"""
import html
import os
import re
import shutil
from itertools import zip_longest
from pathlib import Path

import house
import nbformat
import pytest
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False  # nbdev's function is named like a test
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = house.notebooks(ROOT)
LONG = ("20_demo", "02_studio", "03_resume_and_continue", "04_several_processes")  # nearly a minute each


RUNS = "finetune_output"  # where the pages that use the package put their runs, as a reader's would; git ignores it


# ---- what a page shows, and what it would show today ----------------------------------------------------------------

# Cells of README and the tutorials whose output is another one each time, or on each computer, and why.
VARIES = {
    "02_studio": {
        "fa754e85": "what is installed on this computer, and its hardware",
        "5d21bae4": "a run stopped from outside ends a step sooner or later",
        **dict.fromkeys(("4dc70885", "2abecb4a"), "what a panel leaves in a page is drawn by Jupyter's kernel, which this shell is not")},
    "03_resume_and_continue": dict.fromkeys(("453195bf", "929980d8", "1eebb518"), "a run stopped from outside ends a step sooner or later"),
    "04_several_processes": {"e2468908": "a process killed from outside ends a step sooner or later"},
}
# What no run says twice, and what stands for it in both texts.
NOISE = {
    r"\x1b\[[0-9;]*m|[^\n]*\r(?!\n)": "",  # colours, and bars that were overwritten
    r"(?<![\w.])/(?:tmp|var|home|root|work)/[^\s'\"]*?(?=[\w.-]*(?:[\s'\"]|$))": "",  # the folders before a name
    r"\b0x[0-9a-f]+": "ADDRESS",
    r"\bsage-left-[\w-]+": "FORM",
    r"\b([Pp]rocess|pid)[ =:]+\d+": r"\1 NUMBER",
    r"\bseconds('?[:=] ?)[\d.]+": r"seconds\1TIME",
    r"\b\d{4}-\d\d-\d\dT[\d:.+]+|\b(?:\d+:)?\d+:\d\d\b|\b[\d.,]+ ?(?:ms|s|min|h|seconds|minutes)\b": "TIME",
    r"\b[\d.,]+(?: (?:tokens|steps|rows|tok))?(?:/s| (?:a|per) second)\b": "PACE",
    r"\b[\d.,]+ ?(?:[kKMGT]i?B|bytes)\b": "MEMORY",
    r"\b[\d.]+e-\d\d\b|\b0\.0e\+00\b": "NEXT TO NOTHING",
    r"fp32: (?:the config asks for it|this CPU has no fast 16-bit format)": "fp32: REASON",  # the preset's, and a processor's
}


class Recorder(CaptureShell):
    "nbdev's shell for a page; it keeps what the cells gave"
    ran = None

    def run_all(self, notebook, **options):
        Recorder.ran = notebook
        return super().run_all(notebook, **options)


def shown(cell):
    "The words and figures that a reader of a cell's outputs sees, one after the other; of the last picture its description"
    outputs, texts = cell.get("outputs", []), []
    drawn = [number for number, output in enumerate(outputs) if "image/png" in output.get("data", {})]
    for number, output in enumerate(outputs):
        if number in drawn[:-1]: continue  # a live plot: Jupyter puts each in the place of the one before
        kinds = output.get("data", {})
        if output.get("name") == "stderr" or any("widget" in kind for kind in kinds): continue
        if kinds.get("text/html"): text = without_markup(house.text_of(kinds["text/html"]))
        else: text = house.text_of(output.get("text") or kinds.get("text/markdown") or kinds.get("text/plain") or "")
        texts.append(text)
    text = "\n".join(texts)
    for noise, word in NOISE.items(): text = re.sub(noise, word, text)
    return text.split()


def without_markup(text): return html.unescape(re.sub(r"<style\b.*?</style>|<[^>]*>", " ", text, flags=re.S))


def alike(old, new):
    "Whether two words are the same; figures with a point may differ by 2%, as they do between processors"
    if old == new: return True
    numbers = [re.fullmatch(r"(\W*)(\d+\.\d+)(\W*)", word or "") for word in (old, new)]
    if not all(numbers) or numbers[0][1] + numbers[0][3] != numbers[1][1] + numbers[1][3]: return False
    old, new = (float(number[2]) for number in numbers)
    return abs(old - new) <= 0.02 * max(old, new) + 0.002


def stale_outputs(saved, ran, varies=()):
    "Cells of a saved page that show something else than a run of them gave"
    found, gave = [], {cell["id"]: cell for cell in ran["cells"]}
    for cell in saved["cells"]:
        if cell["cell_type"] != "code" or cell["id"] in varies: continue
        pairs = list(zip_longest(shown(cell), shown(gave[cell["id"]])))
        at = next((place for place, pair in enumerate(pairs) if not alike(*pair)), None)
        if at is None: continue
        old, new = (" ".join(filter(None, side[max(0, at - 3):at + 6])) for side in zip(*pairs))
        found.append(f"cell {cell['id']} shows {old!r}; today it gives {new!r}. Run .ci/notebooks.py for this page")
    return found


def files(folder):
    "What stands in a folder, hidden things and runs left out"
    return {path for path in folder.rglob("*") if not any(part[0] in "._" or part == RUNS for part in path.relative_to(folder).parts)}


@pytest.mark.parametrize("path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS],
    ids=lambda path: path.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_notebook(path, monkeypatch, tmp_path, capfd):
    "All cells run but those with a flag (gpu, slow), and nothing is left beside the notebook"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # what a notebook writes goes away with the test
    monkeypatch.setattr("nbdev.test.CaptureShell", Recorder)
    shutil.rmtree(path.parent/RUNS, ignore_errors=True)
    before = files(ROOT/"nbs")
    good, _ = run_notebook(path, skip_flags=get_config(ROOT).tst_flags.split(), basepath=ROOT, showerr=True)
    assert good, capfd.readouterr().err
    assert "IN_TEST" not in os.environ
    assert sorted(files(ROOT/"nbs") - before) == [], "the notebook writes into nbs/"
    assert path.stem == "index" or path.parent.name == "tutorials" or not (path.parent/RUNS).exists(), (
        "a library page leaves its runs in nbs/")
    if path.stem != "index" and path.parent.name != "tutorials": return
    assert stale_outputs(house.load(path), Recorder.ran, VARIES.get(path.stem, {})) == []


# A cell, what is saved below it, and what the guard says of it.
PLANTED = {
    "the same": ("print('12 rows are trained on')", "12 rows are trained on\n", None),
    "another time, pace, memory, address and folder": (
        "print(f'{object()} 0:07 3.2 s 1,918 tok/s 4.1 GB', '/tmp/x1/run')",
        "<object object at 0x7f00> 1:19 340 ms 12 tok/s 39 MB /var/y2/run\n", None),
    "a loss of another processor": ("print('loss 0.5121')", "loss 0.5118\n", None),
    "a word that was given up": ("print('12 tokens are trained on')", "12 tokens are learnt\n",
        "today it gives '12 tokens are trained on'"),
    "another count": ("print('12 rows')", "13 rows\n", "shows '13 rows'"),
    "another loss": ("print('loss 0.51')", "loss 0.73\n", "shows 'loss 0.73'"),
    "a line that is gone": ("print('one')", "one\ntwo\n", "shows 'one two'"),
    "nothing saved": ("print('one')", "", "shows ''"),
}


def test_cells_that_vary_are_there():
    "Each has its page, and outputs that would be compared"
    for name, cells in VARIES.items():
        page = next(path for path in NOTEBOOKS if path.stem == name)
        ids = {cell["id"] for cell in house.load(page)["cells"] if cell["cell_type"] == "code" and shown(cell)}
        assert set(cells) <= ids and all(cells.values()), name


@pytest.mark.parametrize("fault", PLANTED)
def test_outputs_of_an_older_program_are_found(fault, monkeypatch, tmp_path):
    "A page of one cell is run and compared with what was saved in it"
    source, saved, sentence = PLANTED[fault]
    outputs = [nbformat.v4.new_output("stream", text=saved)] if saved else []
    kernel = dict(name="python3", language="python", display_name="python3")
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="planted", outputs=outputs)],
        metadata=dict(kernelspec=kernel))
    nbformat.write(page, tmp_path/"page.ipynb")
    monkeypatch.setattr("nbdev.test.CaptureShell", Recorder)
    assert run_notebook(tmp_path/"page.ipynb", basepath=ROOT, profile=False)[0]
    found = stale_outputs(house.load(tmp_path/"page.ipynb"), Recorder.ran)
    assert found == [] if sentence is None else len(found) == 1 and sentence in found[0], found
    assert stale_outputs(house.load(tmp_path/"page.ipynb"), Recorder.ran, {"planted": "a reason"}) == []
