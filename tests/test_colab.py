"""What Colab brings along: an old torchao that gets in the way, and older libraries than the tested ones.

The second half runs in an environment of its own with Colab's versions (.ci/colab.txt),
made once and kept in .venv-colab: `make test-full`.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution, version
from pathlib import Path

import house
import nbformat
import pytest
import way
from browser import opened
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT/".venv-colab"
TOOLS = ("pytest", "pytest-timeout", "hypothesis")
WANTED = dict(line.split("==") for line in (ROOT/".ci"/"colab.txt").read_text().splitlines() if line and line[0] != "#")
full = [pytest.mark.full, pytest.mark.timeout(1500)]


# ---- an old library that is in the way --------------------------------------------------------------------------------

ATTACH = """
from sage_finetune import PresetConfigs, attach_lora, load_base
from sage_finetune.core.errors import ModelError
config = PresetConfigs.tiny()
try: attach_lora(load_base(config)[0], config.lora)
except ModelError as error: print(error)
"""


def attach(path):
    "What attaching an adapter says in a process of its own, with a folder first on its path"
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{ATTACH}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_torchao_is_named_with_its_cure(tmp_path):
    (tmp_path/"torchao").mkdir()
    (tmp_path/"torchao"/"__init__.py").write_text("__version__ = '0.10.0'\n")
    (tmp_path/"torchao-0.10.0.dist-info").mkdir()
    (tmp_path/"torchao-0.10.0.dist-info"/"METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    said = attach(tmp_path)
    assert "torchao" in said and 'pip install --no-deps -U "torchao>=0.16"' in said, said


def test_without_it_the_adapter_is_attached(tmp_path): assert attach(tmp_path) == ""


# ---- an environment with Colab's versions -----------------------------------------------------------------------------

def shared(name):
    "A distribution and the libraries of the GPU's maker that it asks for: gigabytes, and the same in both environments"
    found = distribution(name)
    asked = [one for one in map(Requirement, found.requires or []) if not one.marker or one.marker.evaluate(dict(extra=""))]
    return [found, *(each for one in asked if re.match("nvidia|cuda|triton", one.name) for each in shared(one.name))]


def link(found, target):
    "A distribution's files, seen from another environment"
    for name in {path.parts[0] for path in found.files} - {"..", "__pycache__"}:
        if not (target/name).exists(): (target/name).symlink_to(found.locate_file(name))


def clean(**more):
    "This process's environment without what it says about Python and Jupyter"
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JUPYTER", "PYTEST"))} | more


def make(place):
    "An empty environment, then Colab's versions, then this project: pip refuses where our bounds exclude them"
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, symlinks=True)
    packages = next((place/"lib").glob("python*"))/"site-packages"
    for name in ("torch", "bitsandbytes"):
        for found in shared(name): link(found, packages)
    asked = ["-r", ".ci/colab.txt", "-e", ".", *(f"{name}=={version(name)}" for name in TOOLS)]
    done = subprocess.run([sys.executable, "-m", "pip", "--python", place/"bin"/"python", "install", "-q", "--no-compile", *asked],
        cwd=ROOT, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def colab():
    "The Python of that environment; it is made again when what it is made from has changed"
    parts = [(ROOT/name).read_text() for name in (".ci/colab.txt", "settings.ini")] + [sys.version,
        *map(version, ("torch", "bitsandbytes", *TOOLS))]
    sign, seal = hashlib.sha256("\n".join(parts).encode()).hexdigest(), PLACE/"made-from"
    if not seal.exists() or seal.read_text() != sign:
        make(PLACE)
        seal.write_text(sign)
    return PLACE/"bin"/"python"


def printed_by(python, *arguments, **options):
    "What a process of that environment prints"
    done = subprocess.run([python, *arguments], cwd=ROOT, env=clean(), capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The core, everything that can be clicked, and what readers open first.
PAGES = ["00_config", "data/20_dataset", "10_trainer", "inference/10_chat", "runs/10_plot", "ui/00_diagnosis",
    "ui/10_panel", "ui/12_fields",
    "ui/20_form", "ui/30_data_panel", "ui/40_train_panel", "ui/50_chat_panel", "ui/60_studio",
    "tutorials/00_lora_by_hand", "tutorials/01_first_adapter", "tutorials/02_studio"]
LEFT_OUT = re.compile(r"^#\|\s*(gpu|slow|eval:\s*false)\b|\bnbdev\b", re.M)  # as nbdev-test leaves them out; and nbdev itself is not there


def run_page(name, python, folder, monkeypatch):
    "All cells of a page in a kernel of another environment, from a copy"
    (folder/"kernels"/"colab").mkdir(parents=True)
    (folder/"kernels"/"colab"/"kernel.json").write_text(json.dumps(
        dict(argv=[str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="colab", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns("finetune_output", "_*", ".*"))
    (folder/"tmp").mkdir()
    page = folder/"nbs"/f"{name}.ipynb"
    notebook = nbformat.read(page, 4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code" and not LEFT_OUT.search(cell.source)]
    where = clean(IN_TEST="1", TMPDIR=str(folder/"tmp"), JUPYTER_PATH=str(folder))
    NotebookClient(notebook, timeout=300, kernel_name="colab", resources=dict(metadata=dict(path=str(page.parent)))).execute(env=where)


class TestColab:
    "Everything that needs that environment"
    pytestmark = full

    def test_the_versions_are_colabs_and_ours_is_content(self, colab):
        code = "import json, sys, importlib.metadata as m; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
        assert json.loads(printed_by(colab, "-c", code, *WANTED)) == WANTED
        assert "No broken requirements" in subprocess.run([sys.executable, "-m", "pip", "--python", colab, "check"],
            env=clean(), capture_output=True, text=True).stdout
        where = printed_by(colab, "-c", "import sage_finetune, ipywidgets; print(sage_finetune.__file__, ipywidgets.__file__)").split()
        assert [Path(path).is_relative_to(folder) for path, folder in zip(where, (ROOT/house.PACKAGE, PLACE))] == [True, True]

    @pytest.mark.parametrize("name", ["form", "data_panel", "train_panel", "chat_panel"])
    def test_the_tests_of_a_panel(self, colab, name):
        said = printed_by(colab, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"tests/test_{name}.py", timeout=900)
        assert re.search(r"[1-9]\d* passed", said) and "failed" not in said, said

    @pytest.mark.parametrize("name", PAGES)
    def test_a_page(self, colab, name, tmp_path, monkeypatch): run_page(name, colab, tmp_path, monkeypatch)

    def test_the_whole_way_through_the_studio(self, colab, tmp_path):
        "In the JupyterLab that draws widgets of ipywidgets 7"
        way.lay_out(tmp_path)
        with opened(tmp_path, way.STUDIO, python=colab, label="colab") as book:
            book.run_all()
            way.walk(book, studio=True)
