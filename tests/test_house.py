"""The guards of the house: each finds nothing in this project, and each finds the fault planted for it in a copy."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys

import house
import pytest

import sage_finetune

GUARDS = house.all_guards()


@pytest.mark.parametrize("name", GUARDS)
def test_nothing_wrong(root, name):
    assert GUARDS[name](root) == []


# ---- faults, each planted in a fresh copy ---------------------------------------------------------------------------

@pytest.fixture
def copy(root, tmp_path): return house.copy_project(root, tmp_path/"project")


@pytest.fixture(scope="module")
def one_copy(root, tmp_path_factory):
    "A copy for all that is no fault: nothing planted in it is in the way of what comes next"
    return house.copy_project(root, tmp_path_factory.mktemp("one")/"project")


def append(path, text): path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is no longer in {path.name}: plant the fault somewhere else"
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit(path, change):
    notebook = house.load(path)
    change(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def code_cell(source, *outputs):
    return {"cell_type": "code", "id": "planted", "metadata": {}, "execution_count": None, "source": source, "outputs": list(outputs)}


def add_cell(path, cell): edit(path, lambda notebook: notebook["cells"].append(cell))


def config(copy): return copy/"nbs/00_config.ipynb"


def module(copy, name="config"): return copy/house.PACKAGE/f"{name}.py"


def workflow(copy, name): return copy/".github"/"workflows"/f"{name}.yml"


FAULTS = {
    "a module edited by hand": ("exports_out_of_sync", "config.py is not what", lambda copy: append(module(copy), "\nplanted = 1\n")),
    "a notebook changed and not exported": ("exports_out_of_sync", "config.py is not what",
        lambda copy: add_cell(config(copy), code_cell("#| export\ndef planted(): return 1"))),
    "a module that no notebook exports any more": ("exports_out_of_sync", "planted.py is not what",
        lambda copy: module(copy, "planted").write_text("")),
    "an execution count": ("not_clean", "00_config.ipynb is not clean",
        lambda copy: add_cell(config(copy), code_cell("1") | {"execution_count": 7})),
    "widget state in the metadata": ("widget_state", "state of widgets",
        lambda copy: edit(config(copy), lambda notebook: notebook["metadata"].update(widgets={"state": {}}))),
    "a widget as an output": ("widget_state", "application/vnd.jupyter.widget-view+json",
        lambda copy: add_cell(config(copy), code_cell("form",
            {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}}}))),
    "a path in a source": ("absolute_paths", "/home/planted/data.json",
        lambda copy: add_cell(config(copy), code_cell("path = '/home/planted/data.json'"))),
    "a path in what was printed": ("absolute_paths", "/tmp/tmpabc", lambda copy: add_cell(config(copy), code_cell("print(path)",
        {"output_type": "stream", "name": "stdout", "text": ["saved in ", "/tmp/tmpabc/run\n"]}))),
    "a path in an HTML output": ("absolute_paths", "/Users/planted", lambda copy: add_cell(config(copy), code_cell("path",
        {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/html": "<b>/Users/planted/x</b>"}}))),
    "a path of Windows": ("absolute_paths", "is a path of one computer",
        lambda copy: add_cell(config(copy), code_cell("path = r'C:\\Users\\planted'"))),
    "a module without notebook": ("unmatched", "planted.py has no notebook", lambda copy: module(copy, "planted").write_text("")),
    "a notebook without module": ("unmatched", "has no module sage_finetune/config.py", lambda copy: module(copy).unlink()),
    "a wing that is not there": ("unmatched", "names the wing attic",
        lambda copy: replace(copy/"settings.ini", "wings = core", "wings = core attic")),
    "a wing that nobody names": ("unmatched", "stands in no wing", lambda copy: replace(copy/"settings.ini", " commands cli", " commands")),
    "a notebook under another name": ("unmatched", "settings.ipynb should export settings",
        lambda copy: config(copy).rename(copy/"nbs/00_settings.ipynb")),
    "a number used twice": ("unmatched", "two notebooks have the number 00",
        lambda copy: (copy/"nbs/core/01_storage.ipynb").rename(copy/"nbs/core/00_storage.ipynb")),
    "an index that exports": ("unmatched", "is not a library page and exports",
        lambda copy: add_cell(copy/"nbs/index.ipynb", code_cell("#| export\ndef planted(): return 1"))),
    "an index that needs nbdev": ("unmatched", "needs nbdev",
        lambda copy: add_cell(copy/"nbs/index.ipynb", code_cell("from nbdev.showdoc import show_doc"))),
    "a notebook without promise": ("unintroduced", "index.ipynb does not open",
        lambda copy: edit(copy/"nbs/index.ipynb", lambda notebook: notebook["cells"][0].update(source="# Title\n\nand no promise"))),
    "a link to a page that moved": ("broken_links", "leads to 99_nowhere.ipynb",
        lambda copy: edit(config(copy), lambda notebook: notebook["cells"][1].update(source="[this](99_nowhere.ipynb)"))),
    "a link to a heading that is gone": ("broken_links", "#No-such-heading",
        lambda copy: edit(copy/"nbs/index.ipynb", lambda notebook: notebook["cells"][-1].update(cell_type="markdown",
            source="[this](00_config.ipynb#No-such-heading)"))),
    "an import that points upward": ("upward_imports", "data/10_files comes after 00_config",
        lambda copy: append(module(copy), "\nfrom .data.files import load_training_data\n")),
    "an import upward in a function": ("upward_imports", "data/10_files comes after 00_config",
        lambda copy: append(module(copy), "\ndef planted():\n    from sage_finetune.data import files\n")),
    "an import from a package and not from its module": ("upward_imports", "imports data.prepare_dataset, which is no room",
        lambda copy: append(module(copy), "\nfrom .data import prepare_dataset\n")),
    "an import upward through the package": ("upward_imports", "data/20_dataset comes after 00_config",
        lambda copy: append(module(copy), "\nfrom sage_finetune import prepare_dataset\n")),
    "an import upward by name": ("upward_imports", "chat_format/20_rendering comes after 00_config",
        lambda copy: append(module(copy), "\nimport importlib\nprompt = importlib.import_module('sage_finetune.chat_format.rendering')\n")),
    "a wing that looks up to the top level": ("upward_imports", "core.errors.py:",
        lambda copy: append(module(copy, "core/errors"), "\nfrom ..config import TrainingConfig\n")),
    "a module of a wing that looks up inside it": ("upward_imports", "core/01_storage comes after core/00_errors",
        lambda copy: append(module(copy, "core/errors"), "\nfrom .storage import write_json\n")),
    "a module of a wing without notebook": ("unmatched", "core/planted.py has no notebook nbs/core/NN_planted",
        lambda copy: module(copy, "core/planted").write_text("")),
    "a module of a wing out of step": ("exports_out_of_sync", "core/errors.py is not what",
        lambda copy: append(module(copy, "core/errors"), "\n# planted\n")),
    "two rooms that import each other": ("upward_imports", "10_trainer comes after 00_config",
        lambda copy: (append(module(copy), "\nfrom . import trainer\n"),
            append(module(copy, "trainer"), "\nfrom . import config\n"))),
    "matplotlib in the wrong room": ("forbidden_imports", "matplotlib, which belongs to runs.plot",
        lambda copy: append(module(copy), "\nimport matplotlib.figure\n")),
    "peft in a function of the wrong room": ("forbidden_imports", "peft, which belongs to modeling",
        lambda copy: append(module(copy), "\ndef planted():\n    from peft import PeftModel\n")),
    "nbdev at run time": ("forbidden_imports", "nbdev, which settings.ini does not ask for",
        lambda copy: append(module(copy), "\nfrom nbdev.showdoc import *\n")),
    "a library that only comes along with another": ("forbidden_imports", "dill, which settings.ini does not ask for",
        lambda copy: append(module(copy), "\nimport dill\n")),
    "a library whose requirement went": ("forbidden_imports", "psutil, which settings.ini does not ask for",
        lambda copy: replace(copy/"settings.ini", "    psutil>=5.9.5\n", "")),
    "an import under another name than the requirement's": ("forbidden_imports", "IPython, which settings.ini does not ask for",
        lambda copy: replace(copy/"settings.ini", "    ipython>=7.34\n", "")),
    "an extra on top": ("forbidden_imports", "wandb outside a function", lambda copy: append(module(copy), "\nimport wandb\n")),
    "torch in a light room": ("heavy_rooms", "imports torch", lambda copy: append(module(copy), "\nimport torch\n")),
    "torch in the package": ("heavy_package", "loads torch", lambda copy: append(module(copy, "__init__"), "\nimport torch\n")),
    "half a second in the package": ("heavy_package", "more than 0.3 s",
        lambda copy: append(module(copy, "__init__"), "\nimport time; time.sleep(.5)\n")),
    "a folder made by an import": ("side_effects", "os.mkdir .../home/.planted",
        lambda copy: append(module(copy), "\nPath.home().joinpath('.planted').mkdir()\n")),
    "a file written by an import": ("side_effects", "writes .../here/planted.txt",
        lambda copy: append(module(copy), "\nPath('.').resolve().joinpath('planted.txt').write_text('')\n")),
    "a file written by a config": ("side_effects", "leaves here/planted.txt",
        lambda copy: append(module(copy), "\nTrainingConfig.__repr__ = lambda config: str(Path('planted.txt').write_text(''))\n")),
    "a connection made by an import": ("side_effects", "socket.getaddrinfo",
        lambda copy: append(module(copy), "\nimport socket\ntry: socket.getaddrinfo('localhost', 80)\nexcept OSError: pass\n")),
    "a text file in the locale's encoding": ("unsafe_text", "read_text() says no encoding",
        lambda copy: append(module(copy), "\nplanted = lambda path: path.read_text()\n")),
    "a program heard in the locale's encoding": ("unsafe_text", "says no encoding",
        lambda copy: append(module(copy), "\nplanted = lambda: subprocess.run([], text=True)\n")),
    "markup escaped by hand": ("unsafe_text", "escapes markup itself", lambda copy: append(module(copy), "\nfrom html import escape\n")),
    "a table for a spreadsheet": ("unsafe_text", "writes a table for a spreadsheet",
        lambda copy: append(module(copy), "\nplanted = lambda table: table.to_csv('x')\n")),
    "a name that was given up": ("retired_names", "00_config.ipynb says Bystander; the field's word is NullRunWriter",
        lambda copy: add_cell(config(copy), code_cell("class Bystander: pass"))),
    "the same in a test": ("retired_names", "tests/helpers.py says open_run",
        lambda copy: append(copy/"tests/helpers.py", "\nfrom sage_finetune import open_run\n")),
    "a long cell": ("long_cells", "00_config.ipynb has a cell of 43 lines (planted)",
        lambda copy: add_cell(config(copy), code_cell("#| export\ndef planted():\n    'Said.'\n" + "    print()\n" * 40))),
    "a wide line": ("wide_lines", "tests/helpers.py has a line of 154 characters",
        lambda copy: append(copy/"tests/helpers.py", "\nplanted = [" + "1, " * 47 + "1]\n")),
    "a function without docstring": ("undocumented", "planted has no docstring",
        lambda copy: append(module(copy), "\ndef planted(): return 1\n")),
    "a parameter without phrase": ("undocumented", "planted(first) has no phrase",
        lambda copy: append(module(copy), "\ndef planted(\n    first: int,\n    second: int, # said\n):\n    'Said.'\n")),
    "a parameter without type": ("undocumented", "planted(first) has no type",
        lambda copy: append(module(copy), "\ndef planted(\n    first, # said\n):\n    'Said.'\n")),
    "two parameters with one phrase": ("undocumented", "planted has two parameters in line",
        lambda copy: append(module(copy), "\ndef planted(\n    first: int, second: int, # said\n):\n    'Said.'\n")),
    "a field without phrase": ("undocumented", "Planted.field has no phrase",
        lambda copy: append(module(copy), "\n@dataclass\nclass Planted:\n    'Said.'\n    field: int = 1\n")),
    "a method without docstring": ("undocumented", "Planted.method has no docstring",
        lambda copy: append(module(copy), "\nclass Planted:\n    'Said.'\n    def method(self): return 1\n")),
    "a patched method without phrase": ("undocumented", "planted(first) has no phrase",
        lambda copy: append(module(copy), "\n@patch\ndef planted(self: Planted,\n    first: int,\n    second: "
            "int, # said\n):\n    'Said.'\n")),
    "an index changed after README.md": ("stale_readme", "README.md", lambda copy: edit(copy/"nbs/index.ipynb",
        lambda notebook: notebook["cells"].append({"cell_type": "markdown", "id": "planted", "metadata": {}, "source": "More."}))),
    "README.md changed by hand": ("stale_readme", "README.md", lambda copy: append(copy/"README.md", "\nMore.\n")),
    "a line of code too wide for README.md": ("wide_readme", "a line of code of 100 characters",
        lambda copy: append(copy/"README.md", f"\n```python\nplanted = '{'x' * 88}'\n```\n")),
    "a new picture in the index": ("stale_readme", "nbs/index_files/", lambda copy: add_cell(copy/"nbs/index.ipynb", code_cell("figure",
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}))),
    "a picture left over": ("stale_readme", "nbs/index_files/old.png",
        lambda copy: ((copy/"nbs/index_files").mkdir(exist_ok=True), (copy/"nbs/index_files/old.png").write_bytes(b"old"))),
    "a version without its change": ("metadata_faults", "CHANGELOG.md begins with",
        lambda copy: module(copy, "__init__").write_text('__version__ = "99.0"\n')),
    "a requirement without tested version": ("metadata_faults", "no tested version of planted",
        lambda copy: replace(copy/"settings.ini", "    torch>=", "    planted>=1\n    torch>=")),
    "a tested version too old": ("metadata_faults", "settings.ini wants torch",
        lambda copy: replace(copy/"settings.ini", "    torch>=", "    torch>=99,>=")),
    "another Python in pyproject.toml": ("metadata_faults", "requires-python",
        lambda copy: replace(copy/"settings.ini", "min_python = ", "min_python = 2.")),
    "a workflow that is no YAML": ("workflow_faults", "test.yml is no YAML",
        lambda copy: append(workflow(copy, "test"), "\n\tplanted: 1\n")),
    "a workflow that runs what is not there": ("workflow_faults", "runs .ci/run, and .ci/run is no program",
        lambda copy: (copy/".ci/run").unlink()),
    "a workflow that makes what cannot be made": ("workflow_faults", "no target planted",
        lambda copy: replace(workflow(copy, "docs"), "make docs", "make planted")),
    "a workflow that may write": ("workflow_faults", "test.yml does not begin with the permission to read",
        lambda copy: replace(workflow(copy, "test"), "contents: read", "contents: write")),
    "a job that may write": ("workflow_faults", "docs.yml may write packages",
        lambda copy: replace(workflow(copy, "docs"), "pages: write", "packages: write")),
    "an action by a moving name": ("workflow_faults", "uses actions/checkout@main",
        lambda copy: replace(workflow(copy, "docs"), "checkout@v5", "checkout@main")),
    "an action of a stranger": ("workflow_faults", "uses somebody/checkout@v5",
        lambda copy: replace(workflow(copy, "docs"), "actions/checkout", "somebody/checkout")),
    "a Python that is not tested": ("workflow_faults", "takes Python '3.9'",
        lambda copy: replace(workflow(copy, "test"), '"3.11"', '"3.9"')),
    "another address of the project": ("metadata_faults", "points to somebody/sage-finetune",
        lambda copy: append(copy/"README.md", "\nhttps://github.com/somebody/sage-finetune\n")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(copy, fault):
    guard, sentence, plant = FAULTS[fault]
    plant(copy)
    found = GUARDS[guard](copy)
    assert any(sentence in line for line in found), found


def test_every_guard_has_a_planted_fault():
    assert {guard for guard, _, _ in FAULTS.values()} == set(GUARDS) - {"side_effects_of_all_rooms"}


@pytest.mark.parametrize("legitimate", [
    "see https://example.org/home/page and user/tmp/notes", "a/b/root/c", "half and/or work/life", "'/home/ada/data.json'",
    "</root>", "~/tmp/x", "${HOME}/tmp/x",
    "2/tmp/3", "`nbs/tutorials`", "/hometown", "x = 1/work/2", "C: users"])
def test_a_path_is_not_seen_where_there_is_none(one_copy, legitimate):
    add_cell(config(one_copy), code_cell(legitimate))
    assert house.absolute_paths(one_copy) == []


def test_types_may_be_imported_anywhere(copy):
    append(module(copy), "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel\n")
    assert not any("peft" in line and line.startswith("config.py") for line in house.forbidden_imports(copy))


# ---- names that are not there, and what nobody uses -------------------------------------------------------------------

def lint(root):
    return subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."],
        cwd=root, capture_output=True, text=True)


def test_ruff_finds_nothing(root):
    done = lint(root)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code, said", [
    ("def planted(): return nowhere\n", "F821"), ("import antigravity\n", "F401"), ("def planted():\n    unused = 1\n", "F841"),
    ("try: planted = 1\nexcept: pass\n", "E722"), ("def planted(kept=[]): return kept\n", "B006"),
    ("PLANTED = [lambda: at for at in range(3)]\n", "B023"),
    ("def planted():\n    global PLANTED\n    PLANTED = 1\n", "PLW0603"), ("class Planted:\n    kept = {}\n", "RUF012"),
    ("planted = [\n    'a'\n    'b', 'c']\n", "ISC004"),
    ("def planted(list): return list\n", "A002"), ("from datetime import datetime\nplanted = datetime.now()\n", "DTZ005"),
    ("from typing import Optional\nplanted: Optional[int] = None\n", "UP045"),
    ("def test_planted():\n    with pytest.raises(ValueError): int('a')\n", "PT011"), ("breakpoint()\n", "T100"),
    ("import sys\nimport ast\nPLANTED = ast, sys\n", "I001")])
def test_ruff_finds_a_planted_fault(copy, code, said):
    append(copy/"tests"/"helpers.py", "\n" + code)
    done = lint(copy)
    assert done.returncode == 1 and said in done.stdout and "helpers.py" in done.stdout


def test_imports_are_sorted_in_notebooks_too(copy):
    "Out of order, and too many for a line: the module and its notebook have them in order, and in step"
    edit(config(copy), lambda notebook: next(cell for cell in notebook["cells"] if "#| export" in "".join(cell["source"])).update(
        source="#| export\nimport zlib\nfrom sage_finetune.core.text import "
        + ", ".join(f"planted_{at:02d}" for at in range(12)) + "\nimport ast\n"))
    run_in(copy, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()")
    assert "config.py" in lint(copy).stdout and "I001" in lint(copy).stdout
    run_in(copy, ".ci/imports.py")
    text = module(copy).read_text()
    assert (text.index("import ast\nimport zlib\n") < text.index("from sage_finetune.core.text import (\n    planted_00,\n")
        and "I001" not in lint(copy).stdout)
    assert house.exports_out_of_sync(copy) == [] and house.not_clean(copy) == []


def run_in(folder, *words):
    done = subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- types ------------------------------------------------------------------------------------------------------------

PLANTED = {
    "a name that a module has not": ("from sage_finetune.core.errors import FinetunError\n", "attr-defined"),
    "a public name that is not there": ("from sage_finetune import LoRATrainr\n", "attr-defined"),
    "a field of a config that is not there": ("from sage_finetune import TrainingConfig\n\nTrainingConfig(max_lenght=8)\n", "call-arg"),
    "an argument that a function does not take": (
        "from sage_finetune.core.storage import write_json\n\ndef planted(): write_json('a.json', {}, mode='w')\n", "call-arg"),
    "a kind that a function does not take": (("from sage_finetune.core.protocols import Rows\n\ndef planted(rows: "
        "Rows) -> int: return len(rows)\n\nplanted(7)\n"), "arg-type"),
    "a tokenizer asked for what it has not": (
        ("from sage_finetune.core.protocols import Tokenizer\n\ndef planted(tokenizer: Tokenizer) -> list[int]: "
            "return tokenizer.encod('a')\n"), "attr-defined"),
    "what may be None": ("import re\n\ndef planted(text: str) -> str: return re.match('a', text).group()\n", "union-attr"),
    "another kind than was said comes back": ("def planted() -> int: return 'a'\n", "return-value"),
    "a kind of error that is let pass without its name": ("planted: int = 'a'  # type: ignore\n", "ignore-without-code"),
}


@pytest.mark.timeout(900)
def test_mypy_finds_what_is_planted_and_nothing_else(root, tmp_path):
    "One look at the package and at a module for each fault beside it: what mypy has once seen it keeps in .mypy_cache"
    (tmp_path/"planted").mkdir()
    for number, (source, _) in enumerate(PLANTED.values()): (tmp_path/"planted"/f"fault{number}.py").write_text(source)
    (tmp_path/"planted"/"__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-m", "mypy", "-p", house.PACKAGE, "-p", "planted"], cwd=root,
        env=os.environ | {"MYPYPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    for number, (what, (_, code)) in enumerate(PLANTED.items()):
        assert [line for line in found if f"fault{number}.py" in line and line.endswith(f"[{code}]")], (what, done.stdout)
    assert not [line for line in found if "planted/fault" not in line], done.stdout


# ---- the package's front door ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sage_finetune.__all__)
def test_every_public_name_is_there(root, name):
    "The table of lazy exports names what exists, and the module says itself that it is public"
    value = getattr(sage_finetune, name)
    if name == "__version__": return
    home = importlib.import_module(f"sage_finetune.{sage_finetune._home[name]}")
    assert value is getattr(home, name) and name in home.__all__ and name in dir(sage_finetune)
    assert not (root/house.PACKAGE/f"{name}.py").exists(), "a module of that name would hide it"


def test_type_checkers_are_told_the_same_table(root):
    "What they read below TYPE_CHECKING are the names of the table, each from its module"
    tree = ast.parse((root/house.PACKAGE/"__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {alias.asname: node.module for node in block.body for alias in node.names} == house.homes(root)
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)


def test_the_package_of_data_finds_what_its_modules_offer(root):
    import sage_finetune.data as data
    assert {name.removeprefix("data.") for name in house.modules(root) if name.startswith("data.")} == set(data._modules)
    for name in ("prepare_dataset", "load_training_data", "prepare", "health_report", "to_messages", "collate"):
        assert callable(getattr(data, name))
    with pytest.raises(AttributeError, match="no attribute 'prepare_datset'"): data.prepare_datset  # noqa: B018


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LoraTrainer'"): sage_finetune.LoraTrainer  # noqa: B018 (asking is the test)
    with pytest.raises(ImportError): exec("from sage_finetune import LoraTrainer")


def test_the_version_is_the_installed_one(root):
    from importlib.metadata import version
    assert version(house.settings(root)["lib_name"]) == sage_finetune.__version__ == house.version_of(root)


def test_workflows_test_and_publish(root):
    "What is tested is what .ci/run tests; what is published is what `make docs` has made"
    runs = {path.stem: [step.get("run") for job in house.yaml.safe_load(path.read_text())["jobs"].values()
        for step in job["steps"] if "run" in step]
        for path in sorted((root/".github"/"workflows").glob("*.yml"))}
    assert runs == {"docs": ["make docs"], "test": [".ci/run"]}
    assert "path: _docs" in workflow(root, "docs").read_text() and 'ROOT/"_docs"' in (root/".ci"/"docs.py").read_text()


# ---- commands -------------------------------------------------------------------------------------------------------

def test_make_names_every_target(root):
    said = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)", (root/"Makefile").read_text(), re.M)[1].split()
    assert set(re.findall(r"make ([a-z-]+)", said)) == set(phony)
    assert {"demo", "test", "lab", "docs", "notebooks", "tiny-model"} <= set(phony)


def test_the_readme_is_made_from_the_index(copy):
    "Pictures become files, links find their way from the project's folder, hidden cells stay hidden"
    index = copy/"nbs/index.ipynb"
    add_cell(index, {"cell_type": "markdown", "id": "links", "metadata": {},
        "source": "[fields](00_config.ipynb) [more](../CHANGELOG.md) [web](https://a.b/c)"})
    add_cell(index, code_cell("plot()", {"output_type": "display_data", "metadata": {},
        "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}}))
    add_cell(index, code_cell("print(1)", {"output_type": "stream", "name": "stdout", "text": "\x1b[1mone\x1b[0m\n"}))
    add_cell(index, code_cell("#| hide\nsecret = 1"))
    subprocess.run([sys.executable, ".ci/docs.py", "--readme"], cwd=copy, check=True, capture_output=True)
    text = (copy/"README.md").read_text()
    assert "[fields](nbs/00_config.ipynb) [more](CHANGELOG.md) [web](https://a.b/c)" in text and "secret = 1" not in text
    picture = re.findall(r"!\[png\]\((nbs/index_files/.+?\.png)\)", text)[-1]
    assert (copy/picture).read_bytes() == b"\x89PNG\r\n\x1a\n" and "```text\none\n```" in text
    assert house.stale_readme(copy) == []
