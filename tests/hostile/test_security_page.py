"The page that names the tests which hold its promises names tests that are there"
import json
import re
from pathlib import Path

import house
import pytest

HERE = Path(__file__).parent
PAGE = "\n".join(house.text_of(cell["source"])
    for cell in json.loads((HERE.parents[1]/"nbs"/"security.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown")
NAMED = [(file, name) for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)", PAGE)
    for name in re.findall(r"`(test_\w+)`", names)]


@pytest.mark.parametrize("file, name", NAMED)
def test_a_named_test_is_there(file, name):
    assert re.search(rf"^def {name}\(", (HERE/file).read_text(encoding="utf-8"), re.M)


def test_every_file_of_hostile_tests_has_its_line():
    "Those that hold no threat of a foreign folder are named with the reason"
    others = {"test_security_page.py": "this one", "test_front_doors.py": "wrong calls of one's own", "test_windows.py": "the platform"}
    assert {path.name for path in HERE.glob("test_*.py")} - {file for file, _ in NAMED} == set(others)
