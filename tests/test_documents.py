"""Documents as people and strangers write them: every piece is found again where it says it stands, and nothing is followed, run or waited for"""
import json
import os
import sys
import time
import zipfile

import pytest

from sage_finetune.core.errors import ConfigError, DataError
from sage_finetune.core.personal_data import find_personal
from sage_finetune.data.documents import (
    MAX_BYTES,
    PHRASINGS,
    UnreadDocument,
    document_files,
    document_rows,
    document_text,
    read_document,
)
from sage_finetune.data.files import load_training_data
from sage_finetune.data.rows import read_row


@pytest.fixture
def folder(tmp_path): return tmp_path.resolve()


def headings(path, **options): return [piece.headings for piece in read_document(path, **options)]


def written(folder, text, name="a.md"):
    (folder/name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder/name


# ---- Markdown ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("# A\n\nx y z", [("A",)]),
    ("before\n# A #\nx\n## B ##\ny\n# C\nz", [(), ("A",), ("A", "B"), ("C",)]),
    ("### Deep\nx\n# A\ny", [("Deep",), ("A",)]),
    ("A\n===\nx\n\nB\n---\ny", [("A",), ("A", "B")]),
    ("A long\nheading\n===\nx", [("A long heading",)]),
    ("x\n\n---\n\ny", [()]),  # a line between two paragraphs is no heading
    ("- item\n---\nx", [()]), ("| a |\n|---|\n| b |", [()]), ("> quoted\n---\nx", [()]), ("    code\n---\nx", [()]),
    ("#hashtag\nx", [()]), ("####### seven\nx", [()]), ("    # indented\nx", [()]), ("\\# no\nx", [()]),
    ("```\n# no\n```\n# A\nx", [(), ("A",)]), ("~~~ python\n# no\n```\n# no\n~~~~\n# A\nx", [(), ("A",)]),
    ("````\n```\n# no\n````\n# A\nx", [(), ("A",)]), ("```\n# never closed\nx", [()]),
    ("---\ntitle: # no\n---\n# A\nx", [("A",)]), ("+++\na = 1\n+++\n# A\nx", [("A",)]), ("---\n# A\nx", [("A",)]),
    ("# [Install](a.html) `pip` **now** {#anchor}\nx", [("Install pip now",)]),
    ("\ufeff# A\r\n\r\nx\r\n", [("A",)]), ("# A\n\n## B\n\n## C\nx", [("A", "C")]), ("#\nx", [()])])
def test_headings_of_markdown(folder, text, expected):
    path = written(folder, text)
    assert headings(path) == expected
    whole = document_text(path)
    assert all(whole[piece.start:piece.end] == piece.text == piece.text.strip() != "" for piece in read_document(path))


def test_front_matter_and_headings_are_in_no_piece(folder):
    path = written(folder, "---\nkey: value\n---\n# Title\n\nThe text.\n")
    assert [piece.text for piece in read_document(path)] == ["The text."]


def test_what_is_cut_is_all_there(folder):
    text = "# A\n\n" + "\n\n".join(f"Paragraph {n} says the word {n * n}. " * (n % 7 + 1) for n in range(60)) + "\n\n" + "x" * 999
    pieces = read_document(written(folder, text), 300)
    assert all(len(piece.text) <= 300 for piece in pieces) and len(pieces) > 20
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(text[5:].split())
    assert [(piece.part, piece.parts) for piece in pieces] == [(n + 1, len(pieces)) for n in range(len(pieces))]
    assert all(one.end <= two.start for one, two in zip(pieces, pieces[1:]))


def test_fenced_code_stays_whole(folder):
    code = "```\n" + "line\n\n" * 400 + "```"
    pieces = read_document(written(folder, f"# A\n\nBefore.\n\n{code}\n\nAfter."), 200)
    assert [piece.text for piece in pieces] == ["Before.", code, "After."]


# ---- HTML -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, sections", [
    ("<h1>A</h1><p>x y<h2>B</h2>z", {("A",): "x y", ("A", "B"): "z"}),
    ("<h1>A<p>x", {("A",): "x"}), ("<p>x<br>y", {(): "x\ny"}), ("<ul><li>a<li>b</ul>", {(): "- a\n- b"}),
    ("<table><tr><td>a<td>b<tr><td>c<td>d</table>", {(): "a | b\nc | d"}),
    ("<p>a  &lt;b&gt;\n c&nbsp;d", {(): "a <b> c d"}), ("<script>if (a < b) x()</script>y", {(): "y"}),
    ("<style>p {}</style><nav><nav>q</nav>r</nav>x", {(): "x"}), ("<!-- c --><p>x<!-- d -->y", {(): "xy"}),
    ("<pre>a\n  b\n</pre>", {(): "```\na\n  b\n```"}), ("<h2></h2><p>x", {(): "x"}), ("<h1>A <em>b</em></h1>x", {("A b",): "x"})])
def test_sections_of_html(folder, text, sections):
    pieces = read_document(written(folder, text, "a.html"))
    assert {piece.headings: piece.text for piece in pieces} == sections


def test_html_in_a_declared_encoding(folder):
    path = written(folder, '<meta charset="iso-8859-1"><p>Käse</p>'.encode("latin-1"), "a.html")
    assert [piece.text for piece in read_document(path)] == ["Käse"]
    path = written(folder, b'<meta charset="zip"><p>K\xe4se</p>', "b.html")
    with pytest.raises(UnreadDocument, match="save it as UTF-8"): read_document(path)


def test_html_of_which_nothing_is_left(folder):
    written(folder, "<nav><p>a menu that never ends", "a.html")
    written(folder, "# A\n\nSome text here.")
    assert ("a.html", "no text in it") in document_rows(folder).skipped


@pytest.mark.parametrize("text", ["<" * 300_000, "<!--" * 50_000, "<p " * 80_000, "<div>" * 50_000, "&" * 300_000,
    "<![" * 50_000, "<a b='" * 50_000,
    "</" * 100_000, "<b>" * 100_000 + "x", "<table>" * 20_000 + "x"], ids=lambda text: text[:5])
def test_html_made_to_be_slow(folder, text):
    start = time.perf_counter()
    try: read_document(written(folder, text, "a.html"))
    except UnreadDocument: pass
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("text", ["#" * 200_000, "# " + "[" * 100_000, "a\n" * 100_000 + "===", "`" * 200_000,
    "> " * 100_000, "#" + " " * 200_000 + "x",
    "# [" + "a](" * 50_000], ids=lambda text: text[:5])
def test_markdown_made_to_be_slow(folder, text):
    start = time.perf_counter()
    read_document(written(folder, text))
    assert time.perf_counter() - start < 2


# ---- PDF and DOCX -----------------------------------------------------------------------------------------------------

def write_pdf(path, *pages, **options):
    "A PDF of blank pages; with `text`, what is drawn on each"
    import pypdf
    from pypdf.generic import DictionaryObject, NameObject, StreamObject
    writer = pypdf.PdfWriter()
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
        NameObject("/BaseFont"): NameObject("/Helvetica")})
    for text in pages:
        page, stream = writer.add_blank_page(612, 792), StreamObject()
        stream.set_data(f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() * bool(text))
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
        page[NameObject("/Contents")] = writer._add_object(stream)
    if options: writer.encrypt(algorithm="RC4-128", **options)
    writer.write(path)
    return path


def test_pages_of_a_pdf(folder):
    path = write_pdf(folder/"a.pdf", "The first page.", "", "The third page.")
    pieces = read_document(path)
    assert [(piece.text, piece.page) for piece in pieces] == [("The first page.", 1), ("The third page.", 3)]
    assert [document_text(path)[piece.start:piece.end] for piece in pieces] == [piece.text for piece in pieces]
    report = document_rows(path, held_out=1)
    assert report.held_out[1]["instruction"] == "Give me the text of page 3 in a.pdf."
    assert ("a.pdf, page 2", "page without text, perhaps a picture") in report.skipped


def test_pdf_with_a_password(folder):
    assert [piece.text for piece in read_document(write_pdf(folder/"a.pdf", "Open to all readers.", user_password="", owner_password="x"))]
    with pytest.raises(UnreadDocument, match="locked by a password"):
        read_document(write_pdf(folder/"b.pdf", "Secret.", user_password="tea", owner_password="pot"))


def test_pdf_that_is_none(folder, capfd, caplog):
    whole = write_pdf(folder/"whole.pdf", "Some text.").read_bytes()
    for content in (b"", b"%PDF-1.7", b"\0" * 1000, whole[:len(whole) // 2], b"%PDF-1.4\n\x1b[31m trailer << /Root 1 0 R >>"):
        with pytest.raises(UnreadDocument, match="a.pdf cannot be read as a document"): read_document(written(folder, content, "a.pdf"))
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_docx_by_its_headings(folder):
    import docx
    made = docx.Document()
    made.add_paragraph("Before all.")
    made.add_heading("Pot", 0)
    made.add_heading("Filling", 1)
    made.add_paragraph("Open the lid.")
    for item in ("water", "tea"): made.add_paragraph(item, style="List Bullet")
    cells = made.add_table(1, 2).rows[0].cells
    cells[0].merge(cells[1]).text = "merged"
    made.save(folder/"a.docx")
    pieces = {piece.headings: piece.text for piece in read_document(folder/"a.docx")}
    assert pieces[()] == "Before all." and pieces["Filling",].startswith("Open the lid.\n- water\n- tea")
    assert pieces["Filling",].endswith("\n\nmerged")


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def write_docx(folder, body):
    "A DOCX with a body of its own"
    import docx
    docx.Document().save(folder/"plain.docx")
    with zipfile.ZipFile(folder/"plain.docx") as old, zipfile.ZipFile(folder/"a.docx", "w") as new:
        for name in old.namelist():
            own = f'<?xml version="1.0"?><w:document {W}><w:body>{body}</w:body></w:document>'.encode()
            new.writestr(name, own if name == "word/document.xml" else old.read(name))
    return folder/"a.docx"


def said(text): return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def test_docx_cells_that_claim_to_be_wide(folder):
    wide = f'<w:tc><w:tcPr><w:gridSpan w:val="2000000000"/></w:tcPr>{said("wide")}</w:tc>'
    path = write_docx(folder, f'<w:tbl><w:tr>{wide}<w:tc>{said("narrow")}</w:tc></w:tr></w:tbl>')
    began = time.monotonic()
    assert document_text(path) == "wide | narrow" and time.monotonic() - began < 2


def test_docx_text_in_fields_changes_and_inner_tables(folder):
    path = write_docx(folder, f"""<w:sdt><w:sdtContent>{said("In a field.")}</w:sdtContent></w:sdt>
        <w:p><w:r><w:t>Old </w:t></w:r><w:ins w:id="1"><w:r><w:t>new</w:t></w:r></w:ins><w:del w:id="2"><w:r><w:delText>gone</w:delText></w:r>
        </w:del><w:sdt><w:sdtContent><w:r><w:tab/><w:t>held</w:t></w:r></w:sdtContent></w:sdt></w:p>
        <w:tbl><w:tr><w:tc><w:tbl><w:tr><w:tc>{said("inner")}</w:tc></w:tr></w:tbl>{said("outer")}</w:tc></w:tr></w:tbl>""")
    assert document_text(path) == "In a field.\n\nOld new\theld\n\ninner outer"


def test_docx_that_is_none_or_too_much(folder):
    with zipfile.ZipFile(folder/"bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(3): archive.writestr(f"word/{n}.xml", b"\0" * (100 << 20))
    with pytest.raises(UnreadDocument, match="unpacks to more than"): read_document(folder/"bomb.docx")
    with zipfile.ZipFile(folder/"other.docx", "w") as archive: archive.writestr("a.txt", "x")
    with pytest.raises(UnreadDocument, match="no readable DOCX"): read_document(folder/"other.docx")
    with pytest.raises(UnreadDocument, match="archive is broken"): read_document(written(folder, b"PK\3\4" + b"x" * 99, "c.docx"))


def test_docx_asks_for_no_other_file(folder):
    "An entity that names a file is not put in, and one that grows is refused"
    import docx
    docx.Document().save(folder/"plain.docx")
    (folder/"passwd.txt").write_text("root:x:0")
    for entity in (f'<!ENTITY e SYSTEM "file://{folder}/passwd.txt">', '<!ENTITY a "aaaaaaaaaa"><!ENTITY e "&a;&a;&a;">'):
        with zipfile.ZipFile(folder/"plain.docx") as old, zipfile.ZipFile(folder/"a.docx", "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "word/document.xml":
                    content = (f'<?xml version="1.0"?><!DOCTYPE d [{entity}]><w:document xmlns:w="http://schemas.openxmlformats.org/'
                        'wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>start &e; end</w:t></w:r></w:p></w:body></w:document>').encode()
                new.writestr(name, content)
        text = document_text(folder/"a.docx")
        assert text.startswith("start") and "root" not in text and "aaaa" not in text


@pytest.mark.parametrize("library, name", [("pypdf", "a.pdf"), ("docx", "a.docx"), ("lxml", "a.html")])
def test_a_missing_library_is_named_with_its_extra(folder, monkeypatch, library, name):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match='pip install lxml pypdf python-docx'): document_rows(written(folder, b"PK", name))


# ---- folders ----------------------------------------------------------------------------------------------------------

def test_a_folder_is_read_and_nothing_outside_of_it(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    written(outside, "# Outside\n\nNot one word of this.")
    inside = folder/"docs"
    (inside/"sub"/".hidden").mkdir(parents=True)
    written(inside, "# A\n\nThis is read.")
    written(inside/"sub", "# B\n\nThis is read too.", "b.txt")
    written(inside/"sub"/".hidden", "# C\n\nHidden from here.")
    (inside/"far").symlink_to(outside, target_is_directory=True)
    (inside/"far.md").symlink_to(outside/"a.md")
    (inside/"loop").symlink_to(inside, target_is_directory=True)
    os.mkfifo(inside/"pipe.md")
    written(inside, b"\xff\xfe\xfa", "broken.txt")
    written(inside, b"a\0b", "null.txt")
    with open(inside/"huge.md", "wb") as huge: huge.truncate(MAX_BYTES + 1)
    report = document_rows(inside)
    assert {row["source"]["file"] for row in report.rows} == {"a.md", "sub/b.txt"}
    reasons, links = dict(report.skipped), dict.fromkeys(("far/", "far.md", "loop/"), "link")
    assert (links | {"sub/.hidden/": "folder of a tool, or hidden"}).items() <= reasons.items()
    assert "named pipe" in reasons["pipe.md"] and "at most" in reasons["huge.md"] and "null bytes" in reasons["null.txt"]
    assert str(report).count("left out: link") == 1 and "Outside" not in str(report.rows)


def test_too_many_documents(folder, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.documents.MAX_FILES", 3)
    for n in range(4): written(folder, "# A\n\nSome text.", f"{n}.md")
    with pytest.raises(DataError, match="more than 3 documents"): document_files(folder)


def test_no_folder_of_everything(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for place in ("/", "~"):
        with pytest.raises(DataError, match="Name a smaller folder"): document_rows(place)
    with pytest.raises(DataError, match="is not there"): document_rows(folder/"gone")


def test_names_that_act_on_a_screen(folder):
    written(folder, "# <b>x</b>\x1b[31m\n\nThe text of it.", "\x1b[2J<img src=x>\n.md")
    report = document_rows(folder)
    shown = repr(report) + report._repr_html_() + str([piece.headings for piece in report.pieces])
    assert "\x1b" not in shown and "<img" not in report._repr_html_()
    assert "\x1b" not in report.rows[0]["instruction"] and "\n" not in report.rows[0]["instruction"]


# ---- rows -------------------------------------------------------------------------------------------------------------

GUIDE = "# Pot\n\nThe pot holds four cups.\n\n## Care\n\nRinse it with water.\n\n## Parts\n\nA lid and a handle.\n"


def test_rows_and_where_they_stand(folder):
    path = written(folder, GUIDE, "guide.md")
    report = document_rows(path, held_out=0.5)
    sections = [row for row in report.rows if "instruction" in row]
    assert len(sections) == 6 and len(report.rows) == 9 and len(report.held_out) == 2
    text = document_text(path)
    for row in report.rows + report.held_out:
        source = row["source"]
        assert text[source["start"]:source["end"]] == row.get("text", row.get("output"))
    asked = {row["instruction"] for row in sections}
    assert 'What does "Pot > Care" of guide.md say?' in asked
    assert not asked & {row["instruction"] for row in report.held_out}
    assert {row["output"] for row in report.held_out} <= {row["output"] for row in sections}
    assert document_rows(path, held_out=0.5).held_out == report.held_out
    assert len({str(document_rows(path, held_out=0.5, seed=seed).held_out) for seed in range(5)}) > 1
    assert "0" in str(report).split("questions made up")[1].split("\n")[0]


def test_source_is_read_by_nobody(folder):
    "The same row without it is the same conversation, and the field is reported as not read"
    report = document_rows(written(folder, GUIDE))
    for row in report.rows:
        unread = {}
        assert read_row(row, None, None, unread) == read_row({name: value for name, value in row.items() if name != "source"})
        assert set(unread) == {"source"}
    (folder/"rows.jsonl").write_text("\n".join(map(json.dumps, report.rows)))
    assert load_training_data(folder/"rows.jsonl") == report.rows


@pytest.mark.parametrize("kinds, keys", [("sections", {"instruction"}), ("text", {"text"}), ("both", {"instruction", "text"})])
def test_kinds_of_rows(folder, kinds, keys):
    report = document_rows(written(folder, GUIDE), kinds=kinds)
    assert {key for row in report.rows for key in row} & {"instruction", "text"} == keys
    assert bool(report.held_out) == ("instruction" in keys)


def test_two_sections_of_one_name_are_not_asked_for(folder):
    texts = ("A", "The first text."), ("B", "Other text here."), ("A", "Third of them.")
    report = document_rows(written(folder, "\n".join(f"# {name}\n\n## Use\n\n{text}\n" for name, text in texts)))
    asked = [row["instruction"] for row in report.rows if "instruction" in row]
    assert asked == [way.format(what='"B > Use"', file="a.md") for way in PHRASINGS[:2]]
    assert sum("text" in row for row in report.rows) == 3


def test_pieces_that_say_nothing(folder):
    report = document_rows(written(folder, "# A\n\n<!-- a note\n\nfor us alone -->\n\n# B\n\nSee C.\n\n# C\n\nThis is a text."))
    assert {row["source"]["headings"][0] for row in report.rows} == {"C"}
    assert [skip.reason for skip in report.skipped] == ["nothing but a comment", "fewer than three words"]


def test_text_between_two_comments_stays(folder):
    report = document_rows(written(folder, "# A\n\n<!-- a -->\nThis is a text.\n<!-- b -->\n\n# B\n\n<!-- c -->\n<!-- d e f -->"))
    assert [row["source"]["headings"] for row in report.rows if "text" in row] == [["A"]]
    began = time.monotonic()
    assert document_rows(written(folder, "# A\n\nThis is a text.\n\n# B\n\n" + "<!--" * 20_000 + "-->"), max_characters=100_000).rows
    assert time.monotonic() - began < 2


def test_a_folder_has_limits_as_a_whole(folder, monkeypatch):
    for name in ("a.md", "b.md", "c.md"): written(folder, GUIDE + name, name)
    monkeypatch.setattr("sage_finetune.data.documents.MAX_FOLDER_TEXT", len(GUIDE) + 20)
    with pytest.raises(DataError, match="characters of text. Name a smaller folder"): document_rows(folder)
    monkeypatch.setattr("sage_finetune.data.documents.MAX_FOLDER_TEXT", 1 << 20)
    monkeypatch.setattr("sage_finetune.data.documents.MAX_FOLDER_SECONDS", -1.)
    with pytest.raises(DataError, match="takes more than"): document_rows(folder)


def test_headings_that_ask_the_same_are_not_asked_for(folder):
    report = document_rows(written(folder, "# A\n\n## B\n\nThe first text.\n\n# A > B\n\nOther text here."), kinds="both")
    assert not any("instruction" in row for row in report.rows) and sum("text" in row for row in report.rows) == 2


def test_a_rule_on_top_is_no_front_matter(folder):
    assert read_document(written(folder, "---\nOnce upon a time.\n\n---\n\nThe end."))[0].text.startswith("---\nOnce")
    assert [piece.text for piece in read_document(written(folder, "---\ntitle: A\n---\n\nThe end."))] == ["The end."]


def test_the_same_text_counts_once(folder):
    for name in ("a.md", "b.md"): written(folder, GUIDE, name)
    report = document_rows(folder)
    assert {row["source"]["file"] for row in report.rows} == {"a.md"}
    assert [skip.reason for skip in report.skipped] == ["the same text once more"] * 3


def test_secrets_and_personal_data(folder):
    token = "ghp_" + "a1B2" * 9
    path = written(folder, f"# A\n\nThe token is {token}.\n\n# B\n\nWrite to ada@pot.org today.\n\n# C\n\nNothing else here.")
    where = lambda **options: {piece.headings[0] for piece in document_rows(path, **options).pieces}
    assert where() == {"B", "C"} and where(skip_secrets=False) == {"A", "B", "C"} and where(skip_personal=True) == {"C"}
    shown = str(document_rows(path)) + document_rows(path)._repr_html_()
    assert "1 × GitHub token" in shown and "1 × e-mail address" in shown and token not in shown and "ada@" not in shown
    path = written(folder, f"# Only {token}\n\nSome text below.", "b.md")
    with pytest.raises(DataError) as error: document_rows(path)
    assert token not in str(error.value) and "no row could be made" in str(error.value)


@pytest.mark.parametrize("options, named", [(dict(kinds="all"), "kinds='all'"), (dict(held_out=2), "held_out=2"),
    (dict(held_out="x"), "held_out='x'"), (dict(max_characters=1), "max_characters=1"),
    (dict(max_characters=True), "max_characters=True"), (dict(source=3), "source takes a path")])
def test_wrong_arguments(folder, options, named):
    with pytest.raises(ConfigError) as error: document_rows(**dict(source=written(folder, GUIDE)) | options)
    assert named in str(error.value)


# ---- personal data ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, kinds", [
    ("ada@pot.org", ["e-mail address"]), ("<ada.b+c@mail.pot.co.uk>,", ["e-mail address"]), ("a@example.com b@x.test git@pot.org", []),
    ("5500 0000 0000 0004 and 378282246310005", ["card number"] * 2), ("4111111111111112", []), ("ISBN 978-3-16-148410-0", []),
    ("GB29 NWBK 6016 1331 9268 19", ["bank account"]), ("DE89370400440532013000.", ["bank account"]), ("DE89 3704 0044 0532 0130 01", []),
    ("+44 20 7946 0958", ["phone number"]), ("call me at 030/1234567", ["phone number"]), ("(555) 234-5678", ["phone number"]),
    ("Room 12 4111 1111 1111 1111", ["card number"]), ("1 2 3 4 5 6 7 8 9 " * 9, []),
    ("2024-01-02 10:11:12", []), ("1,234,567.89", []), ("+1 -1 +22", []), ("0.0012 0123", []), ("078-05-1120", ["social security number"]),
    ("000-12-3456 123-00-4567", []), ("sha 1234567890123456", []), ("callback 12345678", [])])
def test_personal_data_by_its_form(text, kinds):
    assert [one.kind for one in find_personal(text)] == kinds
    assert [one.kind for one in find_personal(f"x {text} y")] == kinds
