"""The package as strangers get it: sdist and wheel are built, looked into, installed into an empty environment, and run from there."""
import ast
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser

import house
import pytest
from packaging.requirements import Requirement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(*command, cwd, **environment):
    "Run a command with little in its environment; returns what it said, fails with all of it"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JUPYTER", "COV_"))}
    kept["PIP_NO_COMPILE"] = "1"  # of what is installed little is imported, and that is compiled then
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True,
        text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    "The sdist, and the wheel built from the sdist, from a copy of the project without git and caches"
    project = house.copy_project(root, tmp_path_factory.mktemp("source")/"project")
    run(sys.executable, "-m", "build", "--outdir", "dist", ".", cwd=project)
    (sdist,), (wheel,) = (project/"dist").glob("*.tar.gz"), (project/"dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(root, built, tmp_path_factory):
    "An empty environment with the wheel and what it asks for, at the tested versions; the folder of its programs"
    folder = tmp_path_factory.mktemp("empty")/"venv"
    venv.create(folder, with_pip=True)
    programs = folder/("Scripts" if os.name == "nt" else "bin")
    pip = [programs/"python", "-m", "pip", "install", "--quiet", "--constraint", root/"constraints.txt"]
    run(*pip, "torch", cwd=folder)
    run(*pip, built[1], cwd=folder)
    yield programs
    shutil.rmtree(folder)  # more than a gigabyte


CACHES = re.compile(r"(^|/)(__pycache__|\.ipynb_checkpoints|\.pytest_cache|\.hypothesis|finetune_output|_screens)(/|$)|\.py[cod]$")


def test_the_sdist_is_the_project(root, built):
    "Notebooks, tests, tools and benchmarks too, whatever a module is made from; no caches and no runs"
    with tarfile.open(built[0]) as archive: names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
        "constraints.txt", "Makefile"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {house.PACKAGE, "sage_finetune.egg-info", "nbs", "tests", "benchmarks", ".ci"}
    source = {path.relative_to(root).as_posix() for folder in ("nbs", "tests", ".ci")
        for path in (root/folder).rglob("*") if path.is_file()}
    assert {name for name in source if not CACHES.search(name) and "/." not in name.removeprefix(".ci")} <= names
    assert not [name for name in names if CACHES.search(name)]


def test_the_unpacked_sdist_is_in_order(built, tmp_path):
    "The guards speak as they do in the checkout, and what is built from it is the same wheel"
    with tarfile.open(built[0]) as archive: archive.extractall(tmp_path, filter="data")
    project, = tmp_path.iterdir()
    guards = ("exports_out_of_sync", "not_clean", "unmatched", "upward_imports", "forbidden_imports", "undocumented",
        "stale_readme", "metadata_faults")
    assert run(sys.executable, "tests/house.py", *guards, cwd=project, PYTHONPATH=str(project)) == ""
    run(sys.executable, "-m", "build", "--wheel", "--outdir", "again", ".", cwd=project)
    wheel, = (project/"again").glob("*.whl")
    inside = lambda path: {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()
        if not name.endswith("/RECORD")}
    assert inside(wheel) == inside(built[1])


def test_the_wheel_holds_the_package_and_nothing_else(root, built):
    "Every module, the embedded model and the examples; no tests, no notebooks"
    inside = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    package = (root/house.PACKAGE).rglob("*")
    source = {path.relative_to(root).as_posix() for path in package if path.is_file()
        and "__pycache__" not in path.parts and path.name[0] != "."}
    assert inside == source
    assert {f"{house.PACKAGE}/{name}" for name in ("models/tiny/model.safetensors", "examples/example.jsonl", "py.typed")} <= inside


def test_the_wheel_says_what_settings_ini_says(root, built):
    wheel, info = zipfile.ZipFile(built[1]), house.settings(root)
    part = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    said = Parser().parsestr(part["METADATA"])
    asked = [Requirement(one) for one in said.get_all("Requires-Dist")]
    assert (said["Name"], said["Version"]) == (info["lib_name"], house.version_of(root))
    assert (said["License-Expression"], said["Author"], said["Requires-Python"]) == (info["license"],
        info["author"], f">={info['min_python']}")
    assert f"Repository, {info['git_url']}" in said.get_all("Project-URL")
    assert {str(one) for one in asked if not one.marker} == {str(Requirement(one)) for one in info["requirements"].split()}
    assert set(said.get_all("Provides-Extra")) == {"tensorboard", "wandb", "trackio", "docs", "gguf", "dev"}
    assert "sage-finetune = sage_finetune.cli:main" in part["entry_points.txt"] and "Apache License" in part["licenses/LICENSE"]
    words = lambda text: re.sub(r"\]\([^)]*\)|(src|href)=\"[^\"]*\"", "", text).split()
    assert words(said.get_payload()) == words((root/"README.md").read_text(encoding="utf-8"))


LINK = re.compile(r"\]\(\s*<?([^()<>\s]+)|^\[[^]]+\]:[ ]*<?([^<>\s]+)|\b(?:src|href)=[\"']([^\"']+)", re.M)


def links(text):
    "Where Markdown and the HTML in it point to, code aside"
    plain = re.sub(r"^(```|~~~).*?^\1[ ]*$", "", text, flags=re.M | re.S)
    return ["".join(found) for found in LINK.findall(plain)]


def test_the_page_on_the_index_links_to_the_repository(root, built):
    "A link that is relative to README.md leads nowhere there; pictures are given by their bytes, pages by their page"
    wheel, info = zipfile.ZipFile(built[1]), house.settings(root)
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
    said, here = links(Parser().parsestr(text).get_payload()), links((root/"README.md").read_text(encoding="utf-8"))
    assert len(said) == len(here) and not [link for link in said if not re.match("https?://|#|mailto:", link)]
    raw, page = info["git_url"].replace("github.com", "raw.githubusercontent.com") + "/main/", info["git_url"] + "/blob/main/"
    moved = {old: new for old, new in zip(here, said) if old != new}
    assert moved, "README.md has no relative link any more: this test has nothing to look at"
    for old, new in moved.items():
        assert (new == (raw if re.search(r"\.(png|svg|jpe?g|gif)$", old) else page) + old
            and (root/old.partition("#")[0]).exists()), (old, new)


@pytest.mark.parametrize("text, expected", [
    ("[a](docs/x.md#part)", "[a](PAGE/docs/x.md#part)"), ("![a](./nbs/p.png)", "![a](RAW/nbs/p.png)"),
    ('<img alt="" src="p.SVG">', '<img alt="" src="RAW/p.SVG">'),
    ("<a href='LICENSE'>x</a>", "<a href='PAGE/LICENSE'>x</a>"), ('[a](x.md "title")', '[a](PAGE/x.md "title")'),
    ("[![b](p.png)](x.ipynb)", "[![b](RAW/p.png)](PAGE/x.ipynb)"),
    ("[a]: nbs/x.ipynb", "[a]: PAGE/nbs/x.ipynb"),
    ("[a](#here) [b](https://x.org/y) [c](mailto:a@b.c)", "[a](#here) [b](https://x.org/y) [c](mailto:a@b.c)"),
    ("```\n[a](x.md)\n```\n[a](x.md)", "```\n[a](x.md)\n```\n[a](PAGE/x.md)"), ("[a](/nbs/x.md)", "[a](PAGE/nbs/x.md)")])
def test_links_become_absolute(root, text, expected):
    "Every way Markdown has of pointing to a file"
    source = (root/"setup.py").read_text(encoding="utf-8")
    function = next(ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    exec(function, scope := dict(re=re, posixpath=posixpath))
    said = scope["absolute_links"](text, "https://github.com/a/b")
    assert said == expected.replace("RAW", "https://raw.githubusercontent.com/a/b/main").replace("PAGE", "https://github.com/a/b/blob/main")


def test_the_wheel_asks_for_everything_it_imports(root, built):
    "A library that only comes along with another may be gone with its next version"
    wheel = zipfile.ZipFile(built[1])
    said = Parser().parsestr(wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode())
    asked = {Requirement(one).name.lower().replace("-", "_") for one in said.get_all("Requires-Dist") if not Requirement(one).marker}
    used = {house.INSTALLED_AS.get(first := name.partition(".")[0], first).lower() for path in house.modules(root).values()
        for name, _, _, place in house.imported(path) if place != "types"}
    assert used - {name.lower() for name in sys.stdlib_module_names} - {house.PACKAGE, *house.EXTRAS} <= asked


def test_the_empty_environment_is_in_order(root, installed, tmp_path):
    "Requirements are complete, the package comes from there, and nothing of the tools for tests and docs came with it"
    run(installed/"python", "-m", "pip", "check", cwd=tmp_path)
    code = ("import sage_finetune, importlib.util as find; print(sage_finetune.__file__, *[name for name in ('nbdev', "
        "'pytest', 'jupytext') if find.find_spec(name)])")
    said = run(installed/"python", "-c", code, cwd=tmp_path).split()
    assert len(said) == 1 and said[0].startswith(str(installed.parent))
    names = ", ".join(sorted(f"sage_finetune.{name}" for name in house.modules(root)))
    run(installed/"python", "-c", f"import {names}", cwd=tmp_path)


def test_the_demo_runs_from_the_empty_environment(installed, tmp_path):
    "Offline, from a folder of its own, with an empty home folder"
    home, here = tmp_path/"home", tmp_path/"here"
    home.mkdir(), here.mkdir()
    offline = dict(HOME=str(home), HF_HUB_OFFLINE="1", HF_HOME=str(home/"hf"), http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9")
    assert "demo" in run(installed/"sage-finetune", "--help", cwd=here, **offline)
    said = run(installed/"sage-finetune", "demo", cwd=here, **offline)
    assert list(here.rglob("adapter_model.safetensors")) and list(here.rglob("merged_model/model.safetensors")), said
    assert {path.name for path in home.iterdir()} <= {".cache", ".config", "hf"}, "only libraries may keep caches in the home folder"
    before, after = re.findall(r"held-out questions, exactly right +(\d+) of \d+ \(\d+%\) +(\d+) of \d+", said)[0]
    assert int(before) == 0 and int(after) >= 40, said
    kept = int(re.search(r"Of the old skills (\d+)% are left", said)[1])
    assert kept >= 85, said
    for promised in (r"\ntime +about \d", r"\nverdict +the same", "And the merged model says:",
            "sage-finetune quickstart code --code-root"):
        assert re.search(promised, said), said
