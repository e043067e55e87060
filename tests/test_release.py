"""`make release` in a clone: what it refuses, what it leaves, and that it uploads and tags nothing."""
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile

import house
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def git(folder, *words):
    return subprocess.run(["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *words], cwd=folder,
        capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(root, tmp_path):
    "The project as a repository of one commit"
    folder = house.copy_project(root, tmp_path/"project")
    shutil.copy2(root/".gitignore", folder)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def tool(root):
    "The functions of .ci/release.py"
    spec = importlib.util.spec_from_file_location("release", root/".ci"/"release.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


LOG = "# Changelog\n\n## 0.2.0 (unreleased)\n\n### Added\n\n- A thing.\n\n## 0.1.0 - 2026-01-01\n\n### Added\n\n- All of it.\n"


@pytest.mark.parametrize("old, new, said", [
    ("0.2.0 (unreleased)", "0.2.0 - 2026-02-02", "0.2.0 was released .- 2026-02-02.*nbdev-bump-version"),
    ("0.2.0 (", "0.3.0 (", "begins with 0.3.0, the package is 0.2.0"),
    ("- A thing.\n", "", "does not say what 0.2.0 brings"), ("### Added\n\n- A thing.\n", "", "does not say what 0.2.0 brings"),
    ("### Added\n\n- A", "### Addded\n\n- A", "no section 'Addded'")])
def test_a_changelog_that_is_not_ready(tool, old, new, said):
    tool.check_log(LOG, "0.2.0")
    assert LOG.count(old) >= 1
    with pytest.raises(SystemExit, match=said): tool.check_log(LOG.replace(old, new, 1), "0.2.0")


def test_the_changelog_of_today_is_ready_or_released(root, tool):
    "An entry under a heading that nobody knows is seen before the day of the release"
    text, version = (root/"CHANGELOG.md").read_text(encoding="utf-8"), house.version_of(root)
    tool.check_log(re.sub(r"^(## \S+) - [\d-]+$", r"\1 (unreleased)", text, count=1, flags=re.M), version)


def test_a_tree_that_is_not_as_committed(tool, clone):
    "A file changed, a file that nobody knows, and a copy that is no checkout"
    tool.check_tree(clone)
    (clone/"planted.txt").write_text("")
    with pytest.raises(SystemExit, match=r"not as committed(.|\n)*planted.txt"): tool.release(clone)
    (clone/"planted.txt").unlink()
    with (clone/"README.md").open("a") as file: file.write("\nplanted\n")
    with pytest.raises(SystemExit, match="README.md"): tool.release(clone)
    shutil.rmtree(clone/".git")
    with pytest.raises(SystemExit, match="no checkout"): tool.release(clone)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_release(clone):
    """The version raised, the day in the changelog, both files built; nothing committed, nothing tagged.
    A house out of order leaves all as it was"""
    page = clone/"nbs"/"core"/"00_errors.ipynb"
    sound = page.read_text(encoding="utf-8")
    page.write_text(sound.replace("# ", "# planted ", 1), encoding="utf-8")
    (clone/"README.md").write_text("planted", encoding="utf-8")
    git(clone, "commit", "-qam", "planted")
    make = lambda: subprocess.run([sys.executable, ".ci/release.py", "--part", "1"], cwd=clone, capture_output=True, text=True)
    done = make()
    assert (done.returncode and "the house is not in order" in done.stderr and "stale_readme" in done.stderr
        and git(clone, "status", "--porcelain") == ""), done.stderr
    git(clone, "reset", "-q", "--hard", "HEAD~1")
    before, old = git(clone, "rev-parse", "HEAD"), house.version_of(clone)
    done = make()
    assert done.returncode == 0, done.stdout + done.stderr
    new = house.version_of(clone)
    assert new != old and "twine upload" in done.stdout and f"git tag -a v{new}" in done.stdout
    assert re.search(rf"^## {new} - 20\d\d-\d\d-\d\d$", (clone/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert git(clone, "status", "--porcelain").split() == ["M", "CHANGELOG.md", "M", "sage_finetune/__init__.py"]
    assert git(clone, "rev-parse", "HEAD") == before and git(clone, "tag") == ""
    names = sorted(path.name for path in (clone/"dist").iterdir())
    assert names == [f"sage_finetune-{new}-py3-none-any.whl", f"sage_finetune-{new}.tar.gz"] and f"dist/{names[0]}" in done.stdout
    assert f"sage_finetune-{new}.dist-info/METADATA" in zipfile.ZipFile(clone/"dist"/names[0]).namelist()
