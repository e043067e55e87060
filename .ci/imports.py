"""Imports in order, also in notebooks: ruff sorts them in the exported modules, nbdev-update carries them back into the notebooks.

    python .ci/imports.py     after nbdev-export; both are in step again afterwards

nbdev makes `from sage_finetune.core.text import` a relative import, and back, where it stands on one line.
Over several lines it stays as it is, so in notebooks it has to be absolute.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sage_finetune"


def absolute(source, module):
    "Code of a notebook that exports `module`, without relative imports"
    package = [PACKAGE, *module.split(".")[:-1]]
    full = lambda found: f"{found[1]}from {'.'.join([*package[:len(package) - len(found[2]) + 1], *filter(None, [found[3]])])} import"
    return re.sub(r"^([ \t]*)from (\.+)([\w.]*) import\b", full, source, flags=re.M)


def mend(path):
    "Make the relative imports of a notebook absolute; whether there were some"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    module = re.search(r"^#\|\s*default_exp:?\s+(\S+)", "\n".join("".join(cell["source"]) for cell in cells), re.M)
    changed = {id(cell): new for cell in cells if module
        and (new := absolute("".join(cell["source"]), module[1])) != "".join(cell["source"])}
    for cell in cells:
        if id(cell) in changed: cell["source"] = changed[id(cell)].splitlines(keepends=True)
    if changed: path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return bool(changed)


def run(name, *words): subprocess.run([Path(sys.executable).parent/name, *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    for _ in range(2):  # an import that becomes absolute may have another place
        run("ruff", "check", "--quiet", "--no-cache", "--select", "I", "--fix", PACKAGE)
        run("nbdev-update")
        for page in sorted((ROOT/"nbs").rglob("*.ipynb")): mend(page)
        run("nbdev-export")
    run("ruff", "check", "--quiet", "--no-cache", "--select", "I", PACKAGE)
