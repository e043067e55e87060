"""The oldest versions that settings.ini allows, as constraints for pip: python .ci/lowest.py [NAME ...] > lowest.txt

A library that is named is taken at its tested version (constraints.txt) instead: other builds of torch are gigabytes.
"""
import sys
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def lowest(root=ROOT, tested=()):
    "A line `name==version` for each requirement, in their order"
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    pins = [line for line in (root/"constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"]
    newest = dict(line.split("==") for line in pins)
    return [f"{one.name}=={newest[one.name] if one.name in tested else lower_bound(one)}"
        for one in map(Requirement, parser["DEFAULT"]["requirements"].split())]


def lower_bound(requirement):
    "The version behind >=; ValueError where there is none, or more than one"
    bound, = [part.version for part in requirement.specifier if part.operator == ">="]
    return bound


if __name__ == "__main__": print("\n".join(lowest(tested=sys.argv[1:])))
