"""README.md and the documentation site, both made from the notebooks.

    python .ci/docs.py             README.md, its pictures in nbs/index_files/, and the site in _docs/
    python .ci/docs.py --readme    README.md and its pictures only
    python .ci/docs.py --check     say whether README.md and its pictures are up to date (exit code 1 if not), write nothing

README.md is nbs/index.ipynb with the outputs stored in it: nothing is executed. On the site each room's page also shows the signature
(nbdev's show_doc) and the source of what it exports; for that, nbdev runs the exported cells and the imports. Sphinx makes the pages.
"""
import argparse
import ast
import os
import posixpath
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

os.environ["IN_TEST"] = "1"  # nbdev: a notebook's nbdev_export() does nothing here

import nbformat
from fastcore.nbio import read_nb
from jinja2 import DictLoader
from nbconvert import MarkdownExporter
from nbdev import processors as proc
from nbdev.config import nbpath2html
from nbformat.v4.rwbase import rejoin_lines
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
HEADER = "<!-- Made from nbs/index.ipynb by .ci/docs.py: edit the notebook, then run `make docs`. -->\n\n"
EXTRA_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
# Sources are shown as Python with magics; text output stands in a block of its own; HTML passes through whole.
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text | strip_ansi | trim('\n') }}
```
{% endblock %}
{% block data_text scoped %}
```text
{{ output.data['text/plain'] | strip_ansi | trim('\n') }}
```
{% endblock %}
{% block data_html scoped %}
HTML_BLOCK
{% endblock %}"""
SITE_HTML = "````{raw} html\n{{ output.data['text/html'] }}\n````"
README_HTML = "{{ output.data['text/html'] | replace('\n\n', '\n') | trim }}"


def settings():
    "The project's metadata, from settings.ini"
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


class ReadmeSteps(proc.FilterDefaults):
    "nbdev's steps for a page that is shown as it stands: hidden cells and directives go, nothing runs"
    def base_procs(self):
        return [proc.populate_language, proc.strip_ansi, proc.hide_line, proc.filter_stream_, proc.clean_magics,
            proc.hide_, proc.strip_hidden_metadata]


TYPES_ONLY, TYPES_NOW = "if TYPE_CHECKING:", "if TYPE_CHECKING or True:"

def import_types(cell):
    "Signatures are shown with their types, so imports that are otherwise for type checkers are run"
    if cell.cell_type == "code": cell.source = cell.source.replace(TYPES_ONLY, TYPES_NOW)


class run_exports(proc.exec_show_docs):
    "Run what signatures need: exported cells, imports, show_doc; not a lesson that also imports, for the lessons before it did not run"
    def __call__(self, cell):
        wanted = {"export", "exporti", "exports"} & set(getattr(cell, "directives_", None) or {}) or "show_doc(" in (cell.source or "")
        lesson = cell.cell_type == "code" and not wanted and any(not isinstance(one, (ast.Import, ast.ImportFrom))
            for one in cell.parsed_() or ())
        if not lesson: super().__call__(cell)


class SiteSteps(proc.FilterDefaults):
    "nbdev's steps for a page of the site: show_doc for what is exported, names in backticks become links"
    def base_procs(self):
        return [proc.populate_language, import_types, proc.add_show_docs, proc.strip_ansi, proc.hide_line,
            proc.filter_stream_, proc.clean_show_doc,
            run_exports, proc.clean_magics, proc.hide_, proc.add_links, proc.strip_hidden_metadata]


def markdown_cell(text): return nbformat.v4.new_markdown_cell(text)


def source_cell(cell):
    "What a cell exports, to be folded away below its documentation; imports and tables are shown as they are"
    defines = re.search(r"^(async def|def|class|@)", cell.source, flags=re.M)
    code = f"```python\n{cell.source}\n```"
    return markdown_cell(f"<details><summary>Source</summary>\n\n{code}\n\n</details>" if defines else code)


def documented_cell(cell):
    "What show_doc said: the exported things of this page live in no `__main__`, and link attributes are Quarto's"
    text = "\n\n".join(output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {}))
    text = re.sub(r"(\]\([^)]*\))\{[^}]*\}", r"\1", text.replace("__main__.", ""))
    text = re.sub(r"```python\n[^\n]*\(\n *\*args, \*\*kwargs\n\):\n```\n+", "", text)  # says nothing
    return markdown_cell(re.sub(r"^---\s*\n(\[source\].*)\n+(### .*)\n", r"\2\n\n\1\n", text))


def said(output):
    "What a cell marked `#| echo: false` shows: its output and not its code"
    return next((output.data[kind] for kind in ("text/markdown", "text/html") if kind in output.get("data", {})), "")


def plain_cell(cell):
    "A cell with nothing but what nbformat knows, and without its directive lines"
    keys = [key for key in ("cell_type", "id", "source", "outputs") if key in cell and (key != "outputs" or cell.cell_type == "code")]
    fields = {key: cell[key] for key in keys} | {"metadata": {}} | ({"execution_count": None} if cell.cell_type == "code" else {})
    plain = rejoin_lines(nbformat.from_dict({"cells": [fields]})).cells[0]
    plain.source = re.sub(r"^#\|.*\n?", "", plain.source, flags=re.M).strip().replace(TYPES_NOW, TYPES_ONLY)
    return plain


def plain_notebook(path, steps):
    "The notebook after nbdev's steps, with standard cells only: for each exported cell first what it offers, then its source"
    notebook, cells, exported_at = steps().nb_proc(read_nb(path)), [], 0
    notebook.process()
    for cell in notebook.nb.cells:
        if not cell.source: continue
        directives, plain = set(getattr(cell, "directives_", None) or {}), plain_cell(cell)
        if getattr(cell, "has_sd", False): cells.insert(exported_at, documented_cell(plain))  # nbdev puts them last one first
        elif "default_exp" in directives or not plain.source: continue
        elif directives & {"export", "exporti", "exports"}:
            exported_at = len(cells)
            cells.append(source_cell(plain))
        elif "echo" in directives: cells += [markdown_cell(shown) for shown in map(said, plain.get("outputs", [])) if shown]
        else: cells.append(plain)
    return nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "ipython3"}})


def to_markdown(notebook, name, html_block, priority):
    "Markdown of a notebook and its pictures {path: bytes}, which lie in a folder `name`_files beside it"
    config = Config({"NbConvertBase": {"display_data_priority": priority}})
    exporter = MarkdownExporter(config=config, extra_loaders=[DictLoader({"page.md.j2": TEMPLATE.replace("HTML_BLOCK", html_block)})],
        template_file="page.md.j2")
    text, resources = exporter.from_notebook_node(notebook, resources={"unique_key": name, "output_files_dir": f"{name}_files"})
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources.get("outputs", {})


def map_links(text, change):
    "Apply `change` to each relative link target of a Markdown page, code blocks left alone"
    def swap(match):
        target = match[2]
        return match[0] if re.match(r"[a-z]+:|#", target) else f"{match[1]}{change(target)}{match[3]}"
    parts = re.split(r"(^(```+).*?^\2[ ]*$)", text, flags=re.M | re.S)
    for number in range(0, len(parts), 3):  # text, block, fence, text, block, fence ...
        parts[number] = re.sub(r"(\]\()([^()\s]+)(\))", swap, parts[number])
        parts[number] = re.sub(r'(\b(?:src|href)=")([^"]+)(")', swap, parts[number])
    return "".join(part for number, part in enumerate(parts) if number % 3 != 2)


def readme():
    "README.md and its pictures: {path: bytes}, nothing written"
    notebook = plain_notebook(ROOT/"nbs/index.ipynb", ReadmeSteps)
    notebook.metadata.language_info.name = "python"
    text, pictures = to_markdown(notebook, "index", README_HTML, ["text/markdown", "image/svg+xml", "image/png", "text/html", "text/plain"])
    text = re.sub(r"<style\b.*?</style>\s*", "", text, flags=re.S)
    text = HEADER + map_links(text, lambda target: posixpath.normpath(f"nbs/{target}"))
    return {"README.md": text.encode()} | {f"nbs/{path}": content for path, content in pictures.items()}


def stale(files):
    "What differs from the files made from the index notebook, or is left over from an older one"
    found = [path for path, content in files.items() if not (ROOT/path).exists() or (ROOT/path).read_bytes() != content]
    left = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT/"nbs/index_files").glob("*"))]
    return found + [path for path in left if path not in files]


def write_readme():
    "Bring README.md and its pictures up to date"
    files = readme()
    for path in stale(files):
        if path not in files: (ROOT/path).unlink(); continue
        (ROOT/path).parent.mkdir(exist_ok=True)
        (ROOT/path).write_bytes(files[path])
        print("written:", path)


def page_of(path):
    "The page a notebook becomes: 00_config.ipynb -> config, tutorials/01_first.ipynb -> tutorials/first"
    return nbpath2html(Path(path)).with_suffix("").as_posix()


def anchor_in(text, wanted):
    "The heading of a page that a link means, itself or the class it belongs to; empty if there is none"
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ +(.+)$", text, flags=re.M)}
    for name in (wanted, wanted.replace(".", ""), wanted.partition(".")[0]):
        if name.lower() in headings: return f"#{name.lower()}"
    return ""


def site_link(target, folder, pages, git_url):
    "A link of a notebook as a link of the site: to a page, to the source, or to the repository"
    path, _, anchor = target.partition("#")
    if path.startswith("/blob/"): return f"{git_url}{target}"
    if path.startswith("/"): name = path.strip("/").removesuffix(".html")      # a name in backticks, linked by nbdev
    elif path.endswith(".ipynb"): name = page_of(posixpath.normpath(posixpath.join(folder, path)))
    elif path.startswith(".."): return f"{git_url}/blob/main/{posixpath.normpath(posixpath.join('nbs', folder, path))}"
    else: return target
    if name not in pages: return f"{git_url}/blob/main/nbs/{posixpath.normpath(posixpath.join(folder, path))}"
    return f"{posixpath.relpath(name, folder or '.')}.md{anchor_in(pages[name], anchor) if anchor else ''}"


def under_title(text, line):
    "Put a line below the title and the promise of a page"
    head = re.match(r"(# .+\n+(?:>.*\n)*)", text)
    return f"{head[1].rstrip()}\n\n{line}\n\n{text[head.end():].lstrip()}" if head else text


def contents(caption, names):
    "A table of contents for Sphinx' side bar"
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"


def site_pages(source, git_url):
    "Write every page as Markdown into a folder; returns their names in reading order"
    pages, origin = {}, {}
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts): continue
        name = page_of(path.relative_to(ROOT/"nbs"))
        print("page:", name)
        text, pictures = to_markdown(plain_notebook(path, SiteSteps), name, SITE_HTML,
            ["text/html", "text/markdown", "image/svg+xml", "image/png", "text/plain"])
        folder = posixpath.dirname(name)
        pages[name], origin[name] = text.replace(f"]({folder}/", "](") if folder else text, path.relative_to(ROOT).as_posix()
        for picture, content in pictures.items():
            (source/picture).parent.mkdir(parents=True, exist_ok=True)
            (source/picture).write_bytes(content)
    slug = git_url.removeprefix("https://github.com/")
    for name, text in pages.items():
        text = map_links(text, lambda target, name=name: site_link(target, posixpath.dirname(name), pages, git_url))
        links = f"[This page as a notebook]({git_url}/blob/main/{origin[name]})"
        if name.startswith("tutorials/"):
            links += f" · [Open in Colab](https://colab.research.google.com/github/{slug}/blob/main/{origin[name]})"
        if name != "index": text = under_title(text, links)
        (source/f"{name}.md").parent.mkdir(parents=True, exist_ok=True)
        (source/f"{name}.md").write_text(text, encoding="utf-8")
    return list(pages)


def copy_files(source, git_url):
    "Pictures that notebooks refer to, and the project's own pages"
    for path in (ROOT/"nbs").rglob("*"):
        if path.suffix in (".png", ".svg", ".jpg", ".gif"):
            target = source/path.relative_to(ROOT/"nbs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for page in EXTRA_PAGES:
        text = map_links((ROOT/page).read_text(encoding="utf-8"), lambda target: f"{git_url}/blob/main/{target}")
        (source/page.lower()).write_text(text, encoding="utf-8")


def site():
    "The site in _docs/, from Markdown pages in _proc/"
    from sphinx.application import Sphinx
    info, source, target = settings(), ROOT/"_proc", ROOT/"_docs"
    git_url = info["git_url"]
    for folder in (source, target): shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    names = site_pages(source, git_url)
    copy_files(source, git_url)
    tutorials = [name for name in names if name.startswith("tutorials/")]
    with open(source/"index.md", "a", encoding="utf-8") as index:
        if tutorials: index.write(contents("Tutorials", tutorials))
        for wing in info["wings"].split():
            index.write(contents(wing.replace("_", " ").capitalize(),
                [name for name in names if name == wing or name.startswith(f"{wing}/")]))
        index.write(contents("About", [name for name in names if name in ("architecture", "glossary", "security")]))
        index.write(contents("Project", [page.lower().removesuffix(".md") for page in EXTRA_PAGES]))
    options = dict(
        project=info["title"], author=info["author"], html_title=info["title"], html_theme="furo", extensions=["myst_parser"],
        myst_heading_anchors=4, myst_enable_extensions=["dollarmath"], html_copy_source=False, html_show_sphinx=False,
        suppress_warnings=["myst.header", "misc.highlighting_failure"])
    Sphinx(source, None, target, source/".doctrees", "html", options, status=None, warningiserror=True).build()
    print("site:", (target/"index.html").relative_to(ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="README.md and its pictures only")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md or a picture is stale")
    options = parser.parse_args()
    if options.check:
        found = stale(readme())
        print(f"stale, run `make docs`: {', '.join(found)}" if found else "README.md is up to date")
        sys.exit(1 if found else 0)
    write_readme()
    if not options.readme: site()


if __name__ == "__main__": main()
