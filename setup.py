"Package metadata comes from settings.ini, the version from the package, where nbdev-bump-version keeps it"
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(root/"settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
library = settings["lib_path"]
version = re.search(r'^__version__\s*=\s*"([^"]+)"', (root/library/"__init__.py").read_text(encoding="utf-8"), re.M)[1]
extras = [key.removesuffix("_requirements") for key in settings if key.endswith("_requirements")]
pythons = ["Programming Language :: Python :: 3", "Programming Language :: Python :: 3 :: Only",
    *(f"Programming Language :: Python :: {number}" for number in settings["python_versions"].split())]


def absolute_links(text, git_url):
    "A page of the repository for readers elsewhere: pictures by their raw address, files by their page, both as of main"
    raw = git_url.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    page = git_url + "/blob/main/"

    def swap(found):
        start, target, end = found.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|//|#", target, re.I): return found[0]  # an address already, or a place on this page
        picture = re.search(r"\.(png|jpe?g|gif|svg|webp)$", target.partition("#")[0].partition("?")[0], re.I)
        return f"{start}{raw if picture else page}{posixpath.normpath(target).lstrip('/')}{end}"

    parts = re.split(r"(^(?:```|~~~).*?^(?:```|~~~)[ ]*$)", text, flags=re.M | re.S)  # text, block, text ...
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"(\]\(\s*<?)([^()<>\s]+)([^()]*\))", swap, parts[number])
        parts[number] = re.sub(r"^(\[[^]]+\]:[ ]*<?)([^<>\s]+)(.*)$", swap, parts[number], flags=re.M)
        parts[number] = re.sub(r"""(\b(?:src|href)=["'])([^"']+)(["'])""", swap, parts[number])
    return "".join(parts)


setup(
    name=settings["lib_name"],
    version=version,
    description=settings["description"],
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license_expression=settings["license"],
    project_urls={"Repository": settings["git_url"], "Documentation": settings["doc_url"]},
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[library, f"{library}.*"]),
    include_package_data=True,
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in extras},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Education", "Intended Audience :: Developers",
        "Framework :: Jupyter", "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed", *pythons],
    long_description=absolute_links((root/"README.md").read_text(encoding="utf-8"), settings["git_url"]),
    long_description_content_type="text/markdown",
    entry_points={"console_scripts": [f"{settings['lib_name']} = {library}.cli:main"], "nbdev": [f"{library} = {library}._modidx:d"]},
)
