"""Run notebooks and keep their outputs, so that a reader on GitHub sees what the code printed.

python .ci/notebooks.py [NOTEBOOK ...]     all of nbs/ without arguments
Temporary folders that a page made are shown by their last names only: a path of one computer says nothing to a reader.
"""
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOISE = re.compile(r"\x1b\[[0-9;]*m|[^\n]*\r(?!\n)")

NUMBER = re.compile(r"sage-left-[0-9a-f]+-[0-9]+")  # by which a live panel hides its saved form; another one in every run


def shown(text, scratch):
    "Text as a reader should see it: without the scratch folder and without progress bars that were overwritten"
    text = re.sub(re.escape(scratch) + r"/tmp\w+/?", "", text)
    return NOISE.sub("", text).replace(str(ROOT) + "/", "")


def tidy(notebook, scratch):
    "Keep what a page shows; drop warnings of libraries, progress bars, times of execution and this computer's paths"
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code": continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"
            and not any("widget" in kind for kind in output.get("data", {}))]
        # places kept for pictures that did not come
        kept = [output for output in kept if set(output.get("data", {"": 1})) != {"text/plain"} or output["data"]["text/plain"]]
        for output in kept:
            if "text" in output: output["text"] = shown(output["text"], scratch)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"): output["data"][kind] = NUMBER.sub("sage-left", shown(value, scratch))
        cell.outputs = kept


def run(path):
    "Execute one notebook in its own folder"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(TMPDIR=scratch, IN_TEST="1", TQDM_DISABLE="1")  # IN_TEST: the page's last cell does not export
        notebook = nbformat.read(path, 4)
        client = NotebookClient(notebook, timeout=900, kernel_name="python3", extra_arguments=["--log-level=40"], store_widget_state=False,
            resources=dict(metadata=dict(path=str(path.parent))))
        client.execute()
        tidy(notebook, scratch)
        nbformat.write(notebook, path)
    print(f"{path.relative_to(ROOT)}: done", flush=True)


if __name__ == "__main__":
    named = [Path(name).absolute() for name in sys.argv[1:]]
    for path in named or sorted((ROOT/"nbs").rglob("*.ipynb")):
        if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts): run(path)
