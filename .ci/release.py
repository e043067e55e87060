"""A release, ready to be uploaded: `make release`. Nothing is uploaded and no tag is set; what to do next is said at the end.

    python .ci/release.py             the version that stands in the package
    python .ci/release.py --part N    that version raised first by nbdev-bump-version (0 major, 1 minor, 2 patch)

The tree must be as it was committed. CHANGELOG.md begins with `## VERSION (unreleased)` and says below it what was Added,
Changed or Fixed; the day takes the place of "(unreleased)".
Then the guards of what a wheel carries, `python -m build`, and `twine check --strict`.
Where one of them fails, the two files that were changed are put back.
"""
import argparse
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INIT, LOG = Path("sage_finetune/__init__.py"), Path("CHANGELOG.md")
# what a wheel would carry on; the others are `make test`'s
GUARDS = ("exports_out_of_sync", "not_clean", "stale_readme", "metadata_faults")
HEADING = re.compile(r"^## (\S+) (.+)$", re.M)


def run(*command, root):
    "What a program says; it fails with all of it"
    done = subprocess.run([str(word) for word in command], cwd=root, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"release: {' '.join(map(str, command[:4]))} failed.\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def version_of(root): return re.search(r'^__version__ = "(.+)"', (root/INIT).read_text(encoding="utf-8"), re.M)[1]


def check_tree(root):
    "Refuse what nobody could build again"
    if not (root/".git").exists(): raise SystemExit("release: this is no checkout. A release is made where its commit is.")
    if changed := run("git", "status", "--porcelain", root=root):
        raise SystemExit(f"release: these files are not as committed. Commit them or put them back.\n{changed}".rstrip())


def check_log(text, version):
    "Refuse a changelog whose first section is another version's, is released already, or says nothing"
    first, *later = HEADING.finditer(text)
    if first[1] != version: raise SystemExit(f"release: CHANGELOG.md begins with {first[1]}, the package is {version}.")
    if first[2] != "(unreleased)":
        raise SystemExit(f"release: {version} was released ({first[2]}). "
            f"Raise it with .venv/bin/nbdev-bump-version and begin CHANGELOG.md with a section '## VERSION (unreleased)'.")
    body = text[first.end():later[0].start() if later else len(text)]
    said = re.split(r"^### (.+)$", body, flags=re.M)[1:]
    if strange := set(said[::2]) - {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}:
        raise SystemExit(f"release: CHANGELOG.md has no section {min(strange)!r}; see keepachangelog.com.")
    if not said or not all(re.search(r"^- \S", entries, re.M) for entries in said[1::2]):
        raise SystemExit(f"release: CHANGELOG.md does not say what {version} brings: '### Added' and '- …' below it.")


def build(root):
    "An sdist and, from it, a wheel, looked at as an index would"
    for name in ("dist", "build"): shutil.rmtree(root/name, ignore_errors=True)
    run(sys.executable, "-m", "build", root=root)
    files = sorted((root/"dist").iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *files, root=root)
    return files


def release(root, part=None):
    "Version, changelog, guards, build, check; the files made"
    check_tree(root)
    check_log((root/LOG).read_text(encoding="utf-8"), old := version_of(root))
    try:
        if part is not None: run(Path(sys.executable).parent/"nbdev-bump-version", "--part", part, root=root)
        heading = f"## {version_of(root)} - {datetime.now().astimezone():%Y-%m-%d}"
        (root/LOG).write_text((root/LOG).read_text(encoding="utf-8").replace(f"## {old} (unreleased)", heading, 1), encoding="utf-8")
        if faults := run(sys.executable, "tests/house.py", *GUARDS, root=root):
            raise SystemExit(f"release: the house is not in order.\n{faults}".rstrip())
        return build(root)
    except BaseException:
        run("git", "checkout", "--quiet", "--", INIT, LOG, root=root)
        raise


def next_steps(version, files):
    "What a person does now"
    return f"""{version} is built and checked: {', '.join(f'dist/{path.name}' for path in files)}
Nothing was uploaded, no tag was set. Next:
  make test                                          # if it has not run on this commit
  git commit -am "Version {version}"
  git tag -a v{version} -m "Version {version}"
  git push origin main v{version}
  .venv/bin/twine upload dist/*
and to go on: .venv/bin/nbdev-bump-version, and a section '## NEXT (unreleased)' on top of CHANGELOG.md."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Version, changelog, build, check. Uploads nothing.")
    parser.add_argument("--part", type=int, choices=(0, 1, 2), help="raise the version first: 0 major, 1 minor, 2 patch")
    made = release(ROOT, parser.parse_args().part)
    print(next_steps(version_of(ROOT), made))
