"""The package as strangers get it: sdist and wheel are built, looked into, installed into an empty environment, and run from there."""
import os
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
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
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


def test_the_sdist_holds_what_building_needs(root, built):
    with tarfile.open(built[0]) as archive: names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {house.PACKAGE, "sage_finetune.egg-info"}


def test_the_wheel_holds_the_package_and_nothing_else(root, built):
    "Every module, the embedded model and the examples; no tests, no notebooks"
    inside = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    package = (root/house.PACKAGE).rglob("*")
    source = {path.relative_to(root).as_posix() for path in package if path.is_file() and "__pycache__" not in path.parts and path.name[0] != "."}
    assert inside == source
    assert f"{house.PACKAGE}/models/tiny/model.safetensors" in inside and f"{house.PACKAGE}/examples/example.jsonl" in inside


def test_the_wheel_says_what_settings_ini_says(root, built):
    wheel, info = zipfile.ZipFile(built[1]), house.settings(root)
    part = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    said = Parser().parsestr(part["METADATA"])
    asked = [Requirement(one) for one in said.get_all("Requires-Dist")]
    assert (said["Name"], said["Version"]) == (info["lib_name"], house.version_of(root))
    assert (said["License-Expression"], said["Author"], said["Requires-Python"]) == (info["license"], info["author"], f">={info['min_python']}")
    assert f"Repository, {info['git_url']}" in said.get_all("Project-URL")
    assert {str(one) for one in asked if not one.marker} == {str(Requirement(one)) for one in info["requirements"].split()}
    assert set(said.get_all("Provides-Extra")) == {"tensorboard", "wandb", "dev"}
    assert "sage-finetune = sage_finetune.cli:main" in part["entry_points.txt"] and "Apache License" in part["licenses/LICENSE"]
    assert said.get_payload().strip() == (root/"README.md").read_text(encoding="utf-8").strip()


def test_the_empty_environment_is_in_order(root, installed, tmp_path):
    "Requirements are complete, the package comes from there, and nothing of the tools for tests and docs came with it"
    run(installed/"python", "-m", "pip", "check", cwd=tmp_path)
    code = "import sage_finetune, importlib.util as find; print(sage_finetune.__file__, *[name for name in ('nbdev', 'pytest', 'jupytext') if find.find_spec(name)])"
    said = run(installed/"python", "-c", code, cwd=tmp_path).split()
    assert len(said) == 1 and said[0].startswith(str(installed.parent))
    names = ", ".join(sorted(f"sage_finetune.{name}" for name in house.modules(root)))
    run(installed/"python", "-c", f"import {names}", cwd=tmp_path)


def test_the_demo_runs_from_the_empty_environment(installed, tmp_path):
    "Offline, from a folder of its own, with an empty home folder"
    home, here = tmp_path/"home", tmp_path/"here"
    home.mkdir(), here.mkdir()
    offline = dict(HOME=str(home), HF_HUB_OFFLINE="1", HF_HOME=str(home/"hf"), http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert "demo" in run(installed/"sage-finetune", "--help", cwd=here, **offline)
    said = run(installed/"sage-finetune", "demo", cwd=here, **offline)
    assert list(here.rglob("adapter_model.safetensors")) and list(here.rglob("merged_model/model.safetensors")), said
    assert {path.name for path in home.iterdir()} <= {".cache", ".config", "hf"}, "only libraries may keep caches in the home folder"
    before, after = re.findall(r"held-out questions, exactly right +(\d+) of \d+ \(\d+%\) +(\d+) of \d+", said)[0]
    assert int(before) == 0 and int(after) >= 40, said
    kept = int(re.search(r"Of the old skills (\d+)% are left", said)[1])
    assert kept >= 85, said
    for promised in ("time      about", "verdict                   the same", "And the merged model says:", "sage-finetune quickstart code --code-root"): assert promised in said, said
