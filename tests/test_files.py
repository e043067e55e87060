"""Files: whatever rows are stored in, they come out one at a time with their place, and a file that is not what it seems says so."""
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sage_finetune.core.errors import DataError
from sage_finetune.data import archives, csv_tables, encodings, files, json_stream
from sage_finetune.data.files import iter_rows, load_training_data, packaged, packaged_held_out, source_key, source_name, source_size
from sage_finetune.data.raw_rows import BadRow, RawRow, place
from sage_finetune.data.rows import read_row

ROWS = [dict(question="2 + 2?", answer="Four."), dict(question="Wie heißt „né“ auf 日本語?", answer="生まれ 🎏")]
ODD = "\0 \ud800 \u202eright to left\u200f <script>alert(1)</script> \x1b[31mred\x1b[0m \x7f \u2028 <|im_end|>"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "Each test in a folder of its own, so that files have short names"
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, content, encoding="utf-8"):
    "A file of text, bytes or rows"
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    if isinstance(content, list): content = WRITERS[os.path.splitext(name)[1]](content)
    with open(name, "wb") as file: file.write(content if isinstance(content, bytes) else content.encode(encoding, "surrogatepass"))
    return name


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_csv(rows, delimiter=","):
    quoted = lambda cell: '"' + cell.replace('"', '""') + '"'
    return "\r\n".join(delimiter.join(map(quoted, line)) for line in [list(rows[0]), *(row.values() for row in rows)])


WRITERS = {".jsonl": lambda rows: "\n".join(map(json.dumps, rows)), ".json": json.dumps, ".csv": as_csv, ".parquet": as_parquet}


def refusal(source, **options):
    "The sentence with which a source is refused"
    with pytest.raises(DataError) as caught: list(iter_rows(source, **options))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "e"))
    return str(caught.value)


def collected(source):
    "The good rows and the sentences about the bad ones"
    bad = []
    return [raw.row for raw in iter_rows(source, bad.append)], [str(row) for row in bad]


# ---- kinds of files ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_rows(kind):
    assert load_training_data(write(f"rows{kind}", ROWS)) == ROWS
    assert load_training_data(write(f"ROWS{kind.upper()}".replace(kind.upper(), kind), ROWS)) == ROWS


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.JSONL", "rows.Json"])
def test_other_names_of_the_kinds(name):
    assert load_training_data(write(name, "\n".join(map(json.dumps, ROWS)))) == ROWS


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=4), json.dumps(ROWS, ensure_ascii=False),
    "\n\n " + json.dumps(ROWS) + "\n\n", "\n".join(map(json.dumps, ROWS)), "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "\n".join(json.dumps(row, indent=2) for row in ROWS), ",\n".join(json.dumps(row, indent=2) for row in ROWS)],
    ids=["list", "indented", "not escaped", "blank lines around", "an object a line", "blank lines between",
        "indented objects", "indented objects with commas"])
def test_what_stands_in_a_json_file(content):
    assert load_training_data(write("rows.json", content)) == ROWS


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n[" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"],
    ids=["one line", "indented", "an object a line"])
def test_a_list_in_a_jsonl_file_is_read_as_one(content):
    for name in ("rows.jsonl", "rows.ndjson"): assert load_training_data(write(name, content)) == ROWS
    assert "rows.jsonl, line 3: this is not JSON" in refusal(write("rows.jsonl", f"[{GOOD},\n\n{{"))


def test_a_list_on_every_line_is_said():
    turns = json.dumps([dict(role="user", content="Hi")])
    for content in (f"{turns}\n{turns}\n", "[1, 2]\n[3]"):
        assert re.search("rows.jsonl, line 1: the row is of type list. A row must be an object", refusal(write("rows.jsonl", content)))


@pytest.mark.parametrize("content", ["\n".join(map(json.dumps, ROWS)), "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "\n \n" + "\n\t\n\r\n".join(map(json.dumps, ROWS)) + "\n\n \n"], ids=["no last line end", "Windows", "blank lines"])
def test_lines(content):
    assert load_training_data(write("rows.jsonl", content)) == ROWS


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_every_encoding_of_unicode(encoding, kind):
    content = ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) if kind == ".jsonl"
        else json.dumps(ROWS, ensure_ascii=False) if kind == ".json" else as_csv(ROWS))
    assert load_training_data(write(f"rows{kind}", content, encoding)) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_a_mark_of_the_other_byte_order(encoding):
    content = "\ufeff" + json.dumps(ROWS) if encoding == "utf-16-be" else json.dumps(ROWS)
    assert load_training_data(write("rows.json", content, encoding)) == ROWS


@pytest.mark.parametrize("kind", WRITERS)
def test_odd_text_passes_through(kind):
    odd = ODD.replace("\ud800 ", "") if kind == ".parquet" else ODD  # parquet itself refuses it
    assert load_training_data(write(f"rows{kind}", [dict(text=odd)])) == [dict(text=odd)]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_odd_text_that_is_not_escaped(kind):
    "Raw control characters and half surrogates, which JSON forbids and programs write"
    text = json.dumps(dict(text=ODD + "\t."), ensure_ascii=False).replace("\\u0000", "\0").replace("\\u001b", "\x1b").replace("\\t", "\t")
    assert load_training_data(write(f"rows{kind}", text if kind == ".jsonl" else f"[{text}, {text}]"))[0] == dict(text=ODD + "\t.")


def test_values_json_does_not_know():
    assert str(load_training_data(write("rows.json", '[{"text": NaN}]'))[0]["text"]) == "nan"


# ---- tables -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_of_every_delimiter(delimiter):
    rows = [dict(question=f"{at}, {at}; {at}\t{at} | {at}?", answer='She said "yes",\r\nthen\nno.') for at in range(9)]
    assert load_training_data(write("rows.csv", as_csv(rows, delimiter))) == rows
    assert (load_training_data(write("plain.csv", f"question{delimiter}answer\n2 + 2?{delimiter}Four.\n"))
        == [dict(question="2 + 2?", answer="Four.")])
    assert load_training_data(write("foreign.csv", f"Frage{delimiter}Antwort\nWie geht es?{delimiter}Gut.\n\"Wie, "
        f"Herr A?\"{delimiter}\"Gut, danke; und |.\"\n"))[1] == dict(Frage="Wie, Herr A?", Antwort="Gut, danke; und |.")


def test_a_table_that_declares_its_delimiter():
    assert load_training_data(write("rows.csv", "sep=:\nquestion:answer\na:b\n")) == [dict(question="a", answer="b")]


def test_a_table_of_tabs_by_name():
    assert load_training_data(write("rows.tsv", "question\tanswer\na, b\tc\n")) == [dict(question="a, b", answer="c")]


def test_a_table_of_one_column():
    assert load_training_data(write("rows.csv", 'text\nShips pass.\n"By night, too."\n')) == [dict(text="Ships pass."),
        dict(text="By night, too.")]


def test_a_delimiter_nobody_knows_is_reported_by_its_names():
    row = load_training_data(write("rows.csv", "question~answer\na~b\n"))[0]
    with pytest.raises(DataError, match="the row has the fields 'question~answer'"): read_row(row)


def test_lines_of_a_table_are_those_of_the_file():
    content = 'question,answer\n"a\nb\nc",d\n\n,\ne,f\n'
    assert [(raw.row["answer"], raw.line, raw.number) for raw in iter_rows(write("rows.csv", content))] == [("d", 2, 1), ("f", 7, 2)]


def test_cells_that_lack_or_are_too_many():
    good, bad = collected(write("rows.csv", "question,answer\na\nb,c\nd,e, f\ng,h,\n\"i\"j,k\nl,m\n"))
    assert [row["question"] for row in good] == ["b", "g", "l"]
    assert [one.partition(". ")[0] for one in bad] == ["rows.csv, line 2: the row has 1 cell, the head has 2",
        "rows.csv, line 4: the row has 3 cells, the head has 2",
        "rows.csv, line 6: the quotes of this row do not match (',' expected after '\"')"]
    assert ("Expected are 'question', 'answer', with ',' between them; a text that holds ',' must stand in double quotes." in bad[1]
        and 'must be doubled: "she said' in bad[2])


def test_a_quote_that_is_never_closed():
    assert "rows.csv, line 3: a quote is opened in this row and never closed" in refusal(
        write("rows.csv", 'question,answer\na,b\nc,"d\ne,f\ng,h\n'))


def test_heads():
    assert load_training_data(write("index.csv", ",question,answer\n0,a,b\n")) == [dict(question="a", answer="b")]  # as pandas writes it
    assert "the column 'a' stands there twice. Rename one of them" in refusal(write("twice.csv", "a,b,a\n1,2,3\n"))
    assert refusal(write("head.csv", "question,answer\n")) == "head.csv holds no rows. Put at least one example into it."


# ---- parquet ----------------------------------------------------------------------------------------------------------

def test_nested_structs_lose_the_keys_of_other_rows():
    calls = [dict(name="weather", arguments=dict(city="Paris")), dict(name="add", arguments=dict(first=2, second=[dict(a=1), dict(b=2)]))]
    rows = [dict(messages=[dict(role="user", content="a"), dict(role="assistant", tool_calls=[dict(function=call)])])
        for call in calls] + [dict(text="b")]
    names = dict(messages=None, text=None)
    write("rows.parquet", [names | row for row in rows])
    assert pyarrow.parquet.read_table("rows.parquet").to_pylist()[0] != rows[0], ("parquet no longer fills in nulls: "
        "this test proves nothing")
    for source in ("rows.parquet", datasets.Dataset.from_parquet("rows.parquet")):
        assert load_training_data(source) == [names | row for row in rows], "only columns stay that are null"
    assert read_row(load_training_data("rows.parquet")[0]).messages[1]["tool_calls"][0]["function"] == calls[0]


def test_row_groups_are_streamed():
    pyarrow.parquet.write_table(pyarrow.table(dict(text=[f"{at}" for at in range(3000)])), "rows.parquet", row_group_size=700)
    raws = list(iter_rows("rows.parquet"))
    assert [raw.row["text"] for raw in raws] == [f"{at}" for at in range(3000)] and [raw.line for raw in raws] == list(range(1, 3001))
    assert raws[-1].done == os.path.getsize("rows.parquet") and source_size("rows.parquet") == (3000, os.path.getsize("rows.parquet"))


@pytest.mark.parametrize("content", [b"", b"not parquet", as_parquet(ROWS)[:-9],
    as_parquet(ROWS)[:60] + b"\0" * 60 + as_parquet(ROWS)[120:]], ids=["empty", "text", "cut off", "damaged"])
def test_parquet_that_is_none(content):
    assert re.match(r"rows.parquet is not a readable parquet file \(.*\)\. Copy it again or write it anew\.$",
        refusal(write("rows.parquet", content)))


# ---- Arrow, packed files, tables of pandas ----------------------------------------------------------------------------

def packings():
    "Content -> packed, by ending"
    import bz2
    import lzma
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_packed_files_are_read_as_what_is_in_them(kind, ending):
    rows = [dict(ROWS[at % 2], number=str(at)) for at in range(3000)]
    pack = packings()[ending]
    name = write(f"rows{kind}{ending}", pack(WRITERS[kind](rows).encode()) if ending != ".zst" else zstd(WRITERS[kind](rows).encode()))
    assert load_training_data(name) == rows
    raws = list(iter_rows(name))
    assert raws[5].line == [raw.line for raw in iter_rows(write(f"rows{kind}", WRITERS[kind](rows)))][5] and ("line" in raws[5].place())
    assert all(raw.done <= os.path.getsize(name) for raw in raws) and source_size(name) == (None, os.path.getsize(name))
    assert load_training_data(write(f"set/rows{kind}{ending}", open(name, "rb").read()) and "set") == rows


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream: stream.write(content)
    return sink.getvalue().to_pybytes()


def test_a_packed_file_that_unpacks_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(archives, "max_unpacked_size", lambda size: 10_000_000)
    name = write("rows.jsonl.gz", gzip.compress((GOOD + "\n").encode() * 300_000))
    assert "holds more than" in refusal(name) and "No data set is packed so tightly" in refusal(name)


def test_a_packed_file_in_another_encoding_is_said():
    assert "rows.csv.gz is not UTF-8 text: line 3, byte 11 of the file is 0xe9" in refusal(
        write("rows.csv.gz", gzip.compress("text\na\nCafé, né\n".encode("latin-1"))))


def test_what_save_to_disk_wrote_is_read(here):
    rows = [dict(ROWS[at % 2], number=at, none=None) for at in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk("saved", num_shards=2)
    write("saved/cache-1234.arrow", b"not read")
    assert load_training_data("saved") == rows and len(load_training_data("saved/data-00000-of-00002.arrow")) == 1250
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk("one")
    assert load_training_data("one") == rows
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows), train=datasets.Dataset.from_list(rows)).save_to_disk("both")
    told = 'the folder both has the splits test, train. Name one of them: `data_path="both/train"`, `eval_path="both/test"`.'
    assert told == refusal("both")
    assert len({source_key(name) for name in ("saved", "one")}) == 2


def test_arrow_files_of_strangers(here):
    table = pyarrow.table(dict(question=["2 + 2?"], answer=["Four."]))
    with pyarrow.OSFile("a.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer: writer.write_table(table)
    assert load_training_data("a.arrow") == [ROWS[0]]
    write("cut.arrow", open("a.arrow", "rb").read()[:-30])
    assert "cut.arrow is not a readable Arrow file" in refusal("cut.arrow")
    nulls = pyarrow.table(dict(text=pyarrow.nulls(3_000_000)))
    with pyarrow.OSFile("nulls.arrow", "wb") as sink, pyarrow.ipc.new_stream(sink, nulls.schema) as writer: writer.write_table(nulls)
    assert "nulls.arrow has" in refusal("nulls.arrow") and "rows. No data set is packed so tightly" in refusal("nulls.arrow")
    for listing in ('{"_data_files": [{"filename": "../a.arrow"}]}', '{"_data_files": 3}', "[]", "{"):
        write("odd/state.json", listing)
        with pytest.raises(DataError): list(iter_rows("odd"))


def test_a_table_of_pandas():
    import pandas
    frame = pandas.DataFrame(dict(question=["2 + 2?", "Ask"], answer=["Four.", None], number=[1, 2],
        score=[0.5, float("nan")], messages=[[dict(role="user", n=None)], []]))
    rows = [dict(question="2 + 2?", answer="Four.", number=1, score=0.5, messages=[dict(role="user")]),
        dict(question="Ask", answer=None, number=2, score=None, messages=[])]
    assert (load_training_data(frame) == rows and source_size(frame) == (2, None)
        and source_key(frame) == source_key(frame.copy()) == source_key(rows))
    frame.to_parquet("frame.parquet")
    assert load_training_data(pandas.read_parquet("frame.parquet")) == load_training_data("frame.parquet") == rows


@pytest.mark.parametrize("source, line", [
    (lambda: (row for row in ROWS), "rows = list(data)."), (lambda: iter(ROWS), "rows = list(data)."),
    (lambda: dict(question=["a"], answer=["b"]), "rows = [dict(zip(data, values)) for values in zip(*data.values())]."),
    (lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "rows = list(data.take(10_000)), or list(data)"),
    (lambda: pyarrow.Table.from_pylist(ROWS), "rows = data.to_pylist()."), (lambda: lambda: ROWS, "rows = list(data()).")],
    ids=lambda value: value if isinstance(value, str) else "object")
def test_other_objects_have_a_line_that_makes_rows_of_them(source, line):
    data = source()
    assert f"To make a list of it: {line}" in refusal(data)
    rows = eval(line.removeprefix("rows = ").split(", or")[0].removesuffix("."), dict(data=data))
    assert load_training_data(rows) == (ROWS if not isinstance(data, dict) else [dict(question="a", answer="b")])


# ---- tables laid down as one object -----------------------------------------------------------------------------------

COLUMNAR = {
    "columns of pandas": lambda frame: frame.to_json(), "an index": lambda frame: frame.to_json(orient="index"),
    "a split": lambda frame: frame.to_json(orient="split"), "lists": lambda frame: json.dumps(frame.to_dict("list")),
    "a page of the viewer": lambda frame: json.dumps(
        dict(features=[], rows=[dict(row_idx=at, row=row) for at, row in enumerate(frame.to_dict("records"))])),
    "a list inside": lambda frame: json.dumps(dict(version=1, data=frame.to_dict("records"))),
    "rows inside": lambda frame: json.dumps(dict(rows=frame.to_dict("records")))}


@pytest.mark.parametrize("shape", COLUMNAR)
@pytest.mark.parametrize("count", [1, 2])
def test_a_table_that_is_one_object_has_a_line_that_converts_it(shape, count):
    import pandas
    said = refusal(write("table.json", COLUMNAR[shape](pandas.DataFrame(ROWS[:count]))))
    exec(said[said.index("import "):].removesuffix("."))
    assert load_training_data("rows.jsonl" if os.path.exists("rows.jsonl") else "rows.json") == ROWS[:count]


# ---- files that are not what they seem --------------------------------------------------------------------------------

GOOD = json.dumps(ROWS[0])
BROKEN = {  # what is wrong -> (name, content, what the sentence says)
    "empty lines file": ("rows.jsonl", "", "rows.jsonl holds no rows. Put at least one example into it."),
    "empty JSON file": ("rows.json", "", "rows.json holds no rows"),
    "empty list": ("rows.json", " [\n] ", "rows.json holds no rows"),
    "empty table": ("rows.csv", "", "rows.csv holds no rows"),
    "only a byte-order mark": ("rows.jsonl", b"\xef\xbb\xbf", "rows.jsonl holds no rows"),
    "only blank lines": ("rows.jsonl", "\n  \n\r\n", "rows.jsonl holds no rows"),
    "only blank lines in a table": ("rows.csv", "\n\n", "rows.csv holds no rows"),
    "only blanks in a JSON file": ("rows.json", " \n ", "rows.json holds no rows"),
    "one object": ("rows.json", GOOD, "rows.json holds one JSON dict, not a list of rows. Put [ and ] around it."),
    "one object over several lines": ("rows.json", json.dumps(ROWS[0], indent=2),
        "holds one JSON dict, not a list of rows. Put [ and ] around it."),
    "one conversation": ("rows.json", json.dumps(dict(messages=[dict(role="user")])), "Put [ and ] around it."),
    "rows inside an object": ("rows.json", json.dumps(dict(version=1, train=ROWS)),
        "rows.json holds one JSON dict, not a list of rows; the rows seem to stand under 'train'. Save that list alone"),
    "rows inside a long object": ("rows.json", json.dumps(dict(data=[dict(text="x" * 3_000_000)])), "the rows seem to stand under 'data'"),
    "truncated list": ("rows.json", f"[{GOOD},\n {GOOD[:20]}",
        "rows.json, line 2: this is not JSON (Unterminated string; the file ends there). Mend the file there."),
    "truncated behind a row": ("rows.json", f"[{GOOD},\n\n{GOOD}\n",
        "rows.json, line 4: this is not JSON (Expecting ',' or ']'; the file ends there)"),
    "truncated behind a comma": ("rows.json", f"[{GOOD},\n\n",
        "rows.json, line 3: this is not JSON (Expecting value; the file ends there)"),
    "truncated behind a key": ("rows.json", '[{"text":', "rows.json, line 1: this is not JSON (Expecting value; the file ends there)"),
    "truncated object": ("rows.json", '{"text": "a",\n "te', "rows.json, line 2: this is not JSON"),
    "truncated lines": ("rows.jsonl", f"{GOOD}\n{GOOD[:20]}", ("rows.jsonl, line 2: this is not JSON (Unterminated "
        "string at character 14). One JSON object a line is expected. Mend or remove the line.")),
    "a missing comma": ("rows.json", f"[{GOOD}\n\n{GOOD}]", "rows.json, line 3: this is not JSON (Expecting ',' or ']'). Mend"),
    "a missing quote": ("rows.json", f'[{GOOD},\n{{"text: "a"}},\n{GOOD}]',
        "rows.json, line 2: this is not JSON (Expecting ':' delimiter)"),
    "single quotes": ("rows.json", "[{'text': 'a'}]",
        "rows.json, line 1: this is not JSON (Expecting property name enclosed in double quotes"),
    "a comma too much": ("rows.json", f"[{GOOD},\n]", "rows.json, line 2: this is not JSON"),
    "something behind the list": ("rows.json", f"[{GOOD}]\n[{GOOD}]",
        "rows.json, line 2: this is not JSON (something stands behind the end of the list)"),
    "prose": ("rows.json", "Dear model, please learn this.", "rows.json, line 1: this is not JSON (Expecting value"),
    "prose in lines": ("rows.jsonl", f"{GOOD}\n\nDear model\n", "rows.jsonl, line 3: this is not JSON (Expecting value"),
    "numbers": ("rows.json", "[1, 2]", "rows.json, row 1 (line 1): the row is of type int. A row must be an object with named fields"),
    "a list among the rows": ("rows.jsonl", f"{GOOD}\n[{GOOD}]\n", "rows.jsonl, line 2: the row is of type list"),
    "null among the rows": ("rows.json", f"[{GOOD},\nnull]", "rows.json, row 2 (line 2): the row is of type NoneType"),
    "too deep": ("rows.jsonl", '{"a":' * 100_000, "rows.jsonl, line 1: this is not JSON (nested too deeply)"),
    "too deep in a list": ("rows.json", "[" * 100_000, "rows.json, line 1: this is not JSON (nested too deeply)"),
    "Latin-1 in lines": ("rows.jsonl", f"{GOOD}\n{{\"text\": \"né\"}}\n".encode("latin-1"),
        f"rows.jsonl is not UTF-8 text: line 2, byte {len(GOOD) + 13} of the file is 0xe9. Save it as UTF-8; from Windows-1252 `iconv"),
    "Latin-1 in a list": ("rows.json", f"[{GOOD},\n{{\"text\": \"né\"}}]".encode("latin-1"), "rows.json is not UTF-8 text: line 2, byte "),
    "Latin-1 in a table": ("rows.csv", "text\na\nCafé, né\n".encode("latin-1"),
        "rows.csv is not UTF-8 text: line 3, byte 11 of the file is 0xe9"),
    "Latin-1 at the very end": ("rows.csv", "text\né".encode("latin-1"), "rows.csv is not UTF-8 text: line 2, byte 6 of the file is 0xe9"),
    "half of UTF-16": ("rows.jsonl", f"{GOOD}\n{GOOD}".encode("utf-16")[:-1], "rows.jsonl is not UTF-16-LE text: line 2, byte "),
    "bytes": ("rows.jsonl", b"\x80\x81\x82\x83", "rows.jsonl is not UTF-8 text: line 1, byte 1 of the file is 0x80"),
    "an archive": ("rows.zip", b"PK",
        "rows.zip is a packed file. Unpack it with `python -m zipfile -e rows.zip .` and name the file that comes out."),
    "a packed archive": ("rows.tar.gz", b"x", "rows.tar.gz is a packed file. Unpack it with `tar -xf rows.tar.gz` and name"),
    "packed and nameless": ("rows.gz", gzip.compress(GOOD.encode()),
        "rows.gz is a packed file, and its name does not say of what kind. Name it like rows.jsonl.gz"),
    "a packed table of columns": ("rows.parquet.gz", b"x", "rows.parquet.gz is a packed file"),
    "damaged and packed": ("rows.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "rows.jsonl.gz is not a readable .gz file ("),
    "no packed file at all": ("rows.jsonl.gz", GOOD, "rows.jsonl.gz is not a readable .gz file ("),
    "a spreadsheet": ("rows.xlsx", b"PK", ("This line converts it: import pandas; "
        "pandas.read_excel('rows.xlsx').to_json(\"rows.jsonl\", orient=\"records\", lines=True).")),
    "a text": ("rows.txt", "x", "A text becomes a row with: rows = [{\"text\": open('rows.txt', encoding=\"utf-8\").read()}]."),
    "an Arrow file that is none": ("rows.arrow", b"x" * 99, "rows.arrow is not a readable Arrow file ("),
    "another kind": ("rows.docx", "x", "rows.docx: files of kind '.docx' are not read. Use .json, .jsonl, .csv or .parquet."),
    "no kind": ("rows", "x", "rows: files of kind '' are not read"),
    "a packed file by another name": ("rows.jsonl", gzip.compress(GOOD.encode()),
        "rows.jsonl is not UTF-8 text: line 1, byte 2 of the file is 0x8b. It is packed: name it rows.jsonl.gz.")}


@pytest.mark.parametrize("fault", BROKEN)
def test_files_that_are_not_what_they_seem(fault):
    name, content, says = BROKEN[fault]
    assert says in refusal(write(name, content))


OTHER_ENCODINGS = [("GBK", "gbk", "问题,答案\n今天天气怎么样？,很好，我们去公园散步吧。\n"), ("Shift_JIS", "cp932", "質問,答え\n今日の天気はどうですか,とても良いです。\n"),
    ("Big5", "big5", "問題,答案\n今天天氣怎麼樣？,很好，我們去公園散步吧。\n"),
    ("EUC-KR", "cp949", "질문,답변\n오늘 날씨는 어때요?,아주 좋습니다.\n"), ("EUC-JP", "euc_jp", "質問,答え\n今日の天気はどうですか,とても良いです。\n"),
    ("Windows-1251", "cp1251", "вопрос,ответ\nКакая сегодня погода?,Очень хорошая.\n"),
    ("KOI8-R", "koi8_r", "вопрос,ответ\nКакая сегодня погода?,Очень хорошая.\n"),
    ("Windows-1252", "cp1252", "question,answer\nComment ça va?,Très bien, merci – à bientôt.\n"),
    ("Windows-1252", "cp1252", "Frage,Antwort\nWas trägt er?,Käse für München.\n"),
    ("UTF-16LE", "utf-16-le", "问题,答案\n今天天气怎么样？,很好。\nHow, are, you,?\n"),
    ("UTF-16BE", "utf-16-be", "问题,答案\n今天天气怎么样？,很好。\nHow, are, you,?\n")]


@pytest.mark.parametrize("name, codec, text", OTHER_ENCODINGS,
    ids=[f"{name} {codec}" for name, codec, _ in OTHER_ENCODINGS[:8]] + ["German", "UTF-16LE", "UTF-16BE"])
def test_the_encoding_to_convert_from_is_named(name, codec, text):
    for content in (text, "plain,text\nalone,here\n" * 500 + text):
        said = refusal(write("rows.csv", content.encode(codec)))
        if codec.startswith("utf-16") and content != text: continue  # known by its beginning, and read
        assert f"from {name} `iconv -f {name.upper()} -t UTF-8 rows.csv` converts it." in said and "is not UTF-8 text: line" in said


@pytest.mark.parametrize("at", range(1, 60, 4))
def test_a_list_cut_off_anywhere_is_noticed(at):
    "Also at the borders of the chunks it is read in"
    whole = json.dumps([dict(ROWS[1], n=[1.5e-7, True, None, {}])] * 2, indent=1)
    assert re.match(r"rows.json, line \d+: this is not JSON \(.*; the file ends there\)\. Mend the file there\.$|rows.json, line",
        refusal(write("rows.json", whole[:-at])))


def test_the_line_of_a_wrong_byte_far_into_a_file():
    line = json.dumps(dict(text="ä" * 100), ensure_ascii=False).encode() + b"\n"
    content = line * 20_000 + b'{"text": "\xe9"}\n' + line
    assert f"line 20001, byte {20_000 * len(line) + 11} of the file is 0xe9" in refusal(write("rows.jsonl", content))
    assert f"line 20001, byte {20_000 * len(line) + 11} of the file is 0xe9" in refusal(write("rows.json", content))


def test_half_a_surrogate_is_not_the_wrong_byte():
    assert "line 2, byte 14 of the file is 0xe9" in refusal(
        write("rows.jsonl", '{"a": "\ud800"}\n'.encode("utf-8", "surrogatepass") + b"\xe9\n"))


def read_in_pieces(patch, size):
    "Files are read so many bytes or characters at a time"
    for module in (archives, csv_tables, encodings, json_stream): patch.setattr(module, "READ_SIZE", size)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_a_number_at_the_border_of_a_chunk_is_one_number(monkeypatch, chunk):
    read_in_pieces(monkeypatch, chunk)
    good, bad = collected(write("rows.json", '[1234, {"text": "a"}, 5678.25]'))
    assert good == [dict(text="a")] and [one.partition(":")[0] for one in bad] == ["rows.json, row 1 (line 1)", "rows.json, row 3 (line 1)"]


def test_bad_lines_do_not_hide_the_good_ones():
    good, bad = collected(write("rows.jsonl", f"{GOOD}\n{{\n[]\n\n7\n{GOOD}"))
    assert good == [ROWS[0]] * 2 and [one.partition(":")[0] for one in bad] == [f"rows.jsonl, line {line}" for line in (2, 3, 5)]
    good, bad = collected(write("rows.json", f"[{GOOD}, 7, {GOOD}]"))
    assert len(good) == 2 and bad[0].startswith("rows.json, row 2 (line 1): the row is of type int")
    assert collected([dict(text="a"), None])[1][0].startswith("the data, row 2: the row is of type NoneType")


def test_only_bad_rows_are_still_rows():
    assert collected(write("rows.jsonl", "{\n")) == ([], [("rows.jsonl, line 1: this is not JSON (Expecting property "
        "name enclosed in double quotes at character 3). One JSON object a line is expected. Mend or remove the line.")])


def test_what_breaks_a_file_stops_also_when_rows_are_skipped():
    for name in ("truncated list", "Latin-1 in lines", "half of UTF-16", "one object"):
        file, content, says = BROKEN[name]
        assert says in refusal(write(file, content), on_bad=lambda bad: None)


# ---- a file that changes ----------------------------------------------------------------------------------------------

def append():
    with open("rows.jsonl", "a") as file: file.write(GOOD + "\n")


def rewrite(): os.utime(write("rows.jsonl", (GOOD + "\n") * 9), ns=(0, 0))

def replace(): os.replace(write("other.jsonl", (GOOD + "\n") * 9), "rows.jsonl")

def cut(): os.truncate("rows.jsonl", 30)

def delete(): os.remove("rows.jsonl")


@pytest.mark.parametrize("change, says", [(append, "rows.jsonl changed while it was read. Start again when no program writes to it."),
    (rewrite, "changed while it was read"), (replace, "changed while it was read"),
    (cut, "changed while it was read"), (delete, "rows.jsonl cannot be read: No such file or directory")])
def test_a_file_that_changes_while_it_is_read(change, says):
    rows = iter_rows(write("rows.jsonl", (GOOD + "\n") * 9))
    next(rows)
    change()
    with pytest.raises(DataError, match=re.escape(says)): list(rows)


def test_a_fault_of_a_changing_file_is_the_change():
    rows = iter_rows(write("rows.json", json.dumps([dict(text="x" * 600_000)] * 9)))
    next(rows)
    os.truncate("rows.json", 4_000_000)
    with pytest.raises(DataError, match="rows.json changed while it was read"): list(rows)


def test_a_file_that_changes_while_its_key_is_made(monkeypatch):
    write("rows.jsonl", GOOD)
    real = hashlib.blake2b
    class Slow:
        def __init__(self, **options): self.real = real(**options)
        def update(self, data): self.real.update(data); append()
        def hexdigest(self): return self.real.hexdigest()
    monkeypatch.setattr(files.hashlib, "blake2b", Slow)
    with pytest.raises(DataError, match="rows.jsonl changed while it was read"): source_key("rows.jsonl")


def test_reading_only_the_beginning_is_no_fault():
    rows = iter_rows(write("rows.jsonl", (GOOD + "\n") * 9))
    next(rows)
    append()
    rows.close()


# ---- long and many ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("filler", ["x", '"\\\n', "é🎏"], ids=["plain", "escapes", "unicode"])
def test_ten_megabytes_in_one_field(kind, filler):
    long = [dict(question=filler * (10_000_000 // len(filler)), answer="Long."), *ROWS]
    name = write(f"rows{kind}", long)
    began = time.perf_counter()
    assert load_training_data(name) == long
    assert time.perf_counter() - began < 5


def test_reading_time_grows_with_the_length_only():
    "Four times the length must not take sixteen times as long"
    def seconds(size):
        name = write("rows.json", [dict(text="x" * size)] * 2)
        began = time.perf_counter()
        assert len(load_training_data(name)) == 2
        return time.perf_counter() - began
    seconds(1_000_000)
    assert min(seconds(16_000_000) for _ in range(2)) < 9 * min(seconds(4_000_000) for _ in range(3)) + .1


def peak(name, keep=lambda raw: None):
    "Memory that reading takes at its highest, in MB"
    tracemalloc.start()
    try:
        for raw in iter_rows(name): keep(raw)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally: tracemalloc.stop()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_memory_does_not_grow_with_the_file(kind):
    rows = [dict(question=f"{at} " * 200, answer="x" * 500) for at in range(15_000)]
    name = write(f"rows{kind}", rows)
    assert os.path.getsize(name) > 20_000_000 and peak(name) < 8


def test_an_object_longer_than_any_row_is_refused_early(monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_ROW_CHARACTERS", 4_000_000)
    assert "one value of more than" in refusal(write("rows.json", "[" + json.dumps(dict(text="x" * 30_000_000)) + "]"))


@pytest.mark.slow
def test_a_million_rows_in_a_list():
    with open("rows.json", "w") as file:
        file.write("[" + GOOD)
        for _ in range(999_999): file.write(",\n" + GOOD)
        file.write("]")
    code = ("import resource\nfrom sage_finetune.data.files import iter_rows\nheld = lambda: "
            "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = held()\nprint(sum(1 for _ in iter_rows('rows.json')), held() - before)")
    count, kilobytes = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert count == 1_000_000 and kilobytes < 30_000


def test_fast_enough():
    "50,000 rows in well under a second; three times that is allowed on a busy machine"
    name = write("rows.jsonl", [dict(instruction=f"Explain {at}. " * 5, input="", output="word " * 40) for at in range(50_000)])
    def seconds():
        began = time.perf_counter()
        assert sum(1 for _ in iter_rows(name)) == 50_000
        return time.perf_counter() - began
    assert min(seconds() for _ in range(3)) < 1


# ---- folders ----------------------------------------------------------------------------------------------------------

def test_a_folder_is_read_in_the_order_of_its_names():
    for name, row in {"set/b.jsonl": ROWS[0], "set/a.csv": ROWS[1], "set/c/a.json": ROWS[0], "set/c/b.parquet": ROWS[1]}.items():
        write(name, [row])
    for name in ("set/.hidden.jsonl", "set/.git/x.json", "set/notes.txt", "set/c/README.md"): write(name, "not a row")
    raws = list(iter_rows("set"))
    assert [(raw.file, raw.row) for raw in raws] == [("set/a.csv", ROWS[1]), ("set/b.jsonl", ROWS[0]),
        ("set/c/a.json", ROWS[0]), ("set/c/b.parquet", ROWS[1])]
    assert [raw.done for raw in raws][-1] == source_size("set")[1] and sorted(raw.done for raw in raws) == [raw.done for raw in raws]
    assert load_training_data("set/") == load_training_data("set")


def test_a_loop_of_links_ends_and_a_file_reached_twice_is_read_once(here):
    write("set/sub/a.jsonl", [ROWS[0]])
    for link, target in {"set/sub/up": "..", "set/round": ".", "set/other": "sub", "set/b.jsonl": "sub/a.jsonl",
            "set/self.jsonl": "self.jsonl"}.items():
        os.symlink(target, link)
    os.remove("set/self.jsonl")
    assert load_training_data("set") == [ROWS[0]]
    os.symlink("self.jsonl", "set/self.jsonl")
    assert re.search("set/self.jsonl cannot be read: Too many levels of symbolic links", refusal("set"))


def test_a_link_that_leads_out_of_the_folder():
    write("elsewhere/a.jsonl", [ROWS[1]])
    write("set/b.jsonl", [ROWS[0]])
    os.symlink("../elsewhere", "set/linked")
    assert load_training_data("set") == ROWS


def test_a_bad_row_of_a_folder_names_its_file():
    write("set/a.jsonl", [ROWS[0]])
    write("set/b.csv", "question,answer\na\n")
    assert "set/b.csv, line 2: the row has 1 cell, the head has 2" in refusal("set")
    assert "set/c.json, line 1: this is not JSON" in refusal(os.path.dirname(write("set/c.json", "[{")), on_bad=lambda bad: None)


def test_an_empty_file_in_a_folder_is_no_fault():
    write("set/a.jsonl", "")
    assert refusal("set") == "set holds no rows. Put at least one example into it."
    write("set/b.jsonl", [ROWS[0]])
    assert load_training_data("set") == [ROWS[0]]


SPLIT_FOLDERS = {  # files -> what is said
    ("train.jsonl", "test.jsonl"): '`data_path="set/train.jsonl"`, `eval_path="set/test.jsonl"`',
    ("train.jsonl", "validation.jsonl"): '`data_path="set/train.jsonl"`, `eval_path="set/validation.jsonl"`',
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"): 'eval_path="set/test-00000-of-00001.parquet"',
    ("train/a.jsonl", "test/a.jsonl"): '`data_path="set/train/a.jsonl"`, `eval_path="set/test/a.jsonl"`',
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/valid-00000-of-00001.parquet"):
        "Lay the files of each into a folder of its own",
    ("rows.jsonl", "rows_dev.jsonl"): '`data_path="set/rows.jsonl"`, `eval_path="set/rows_dev.jsonl"`',
    ("TRAIN.csv", "Eval.csv"): '`data_path="set/TRAIN.csv"`, `eval_path="set/Eval.csv"`',
    ("validation.jsonl", "test.jsonl"): "the splits test, validation", ("my.train.jsonl.gz", "my.heldout.jsonl.gz"): "my.heldout.jsonl.gz"}


@pytest.mark.parametrize("names", SPLIT_FOLDERS, ids=str)
def test_files_for_training_and_for_testing_are_not_laid_together(names):
    for name in names:
        write(f"set/{name}", as_parquet(ROWS) if name.endswith("parquet")
            else gzip.compress(GOOD.encode()) if name.endswith("gz") else GOOD if "csv" not in name else as_csv(ROWS))
    said = refusal("set")
    assert "the folder set has the splits" in said and "they would be trained on together" in said and SPLIT_FOLDERS[names] in said


@pytest.mark.parametrize("names", [("train-00000.jsonl", "train-00001.jsonl"), ("test.jsonl",), ("training.jsonl", "more.jsonl"),
    ("contest.jsonl", "latest.jsonl", "trained.jsonl"), ("value.jsonl", "devices.jsonl")], ids=str)
def test_folders_of_one_split_are_read(names):
    for name in names: write(f"set/{name}", GOOD)
    assert load_training_data("set") == [ROWS[0]] * len(names)


def test_folders_without_data():
    os.makedirs("empty.json")
    assert "the folder empty.json holds no data files (.json, .jsonl, .csv or .parquet). Check `data_path`." in refusal("empty.json")
    write("other/notes.txt", "x")
    write("other/rows.zip", "x")
    assert "it holds 2 of other kinds, such as notes.txt" in refusal("other")


# ---- other sources ----------------------------------------------------------------------------------------------------

def test_packaged_data_goes_by_its_name():
    assert len(load_training_data("example")) >= 100 and load_training_data("example") == load_training_data(packaged("example"))
    assert packaged_held_out("example") == packaged("example_unseen") and packaged_held_out("rows.jsonl") is None
    write("example/a.jsonl", [ROWS[0]])  # a folder of that name comes first
    assert load_training_data("example") == [ROWS[0]]


def test_rows_and_datasets():
    table = datasets.Dataset.from_list(ROWS)
    for source in (ROWS, tuple(ROWS), table, datasets.DatasetDict(train=table), table.with_format("numpy"), table.select([0, 1])):
        assert load_training_data(source) == ROWS
    assert load_training_data(table.select([1])) == [ROWS[1]]
    assert [raw[1:] for raw in iter_rows(table)] == [raw[1:] for raw in iter_rows(ROWS)] == [("the data", 1, 1, 1), ("the data", 2, 2, 2)]
    assert refusal(table.select([])) == refusal([]) == "the data holds no rows. Put at least one example into it."


@pytest.mark.parametrize("source, says", [
    ("nowhere.jsonl", 'there is no data file nowhere.jsonl. Check `data_path`; the packaged example is `data_path="example"`.'),
    ("no/such/folder/rows.json", "there is no data file no/such/folder/rows.json"),
    ("./nowhere", "there is no data file ./nowhere"), ("data/rows.jsonl", "there is no data file data/rows.jsonl"),
    ("", "there is no data file "),
    (dict(text="a"), "rows cannot be read from a dict. Give a path, a folder, a name on the Hub, a list of dicts or a datasets.Dataset."),
    (None, "rows cannot be read from a NoneType"),
    (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)),
        "this DatasetDict has the splits train, test. Pass one of them: data['train'].")], ids=lambda value: str(value)[:20])
def test_sources_that_are_none(source, says):
    if source == "": says = "names no data: it is empty"
    assert says in refusal(source)


def test_a_file_one_may_not_read(monkeypatch):
    write("rows.jsonl", [ROWS[0]])
    def forbidden(path, *options): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(archives, "open_regular", forbidden)
    assert refusal("rows.jsonl") == "rows.jsonl cannot be read: Permission denied. Check that the file is there and that you may read it."
    with pytest.raises(DataError, match="Permission denied"): source_key("rows.jsonl")


# ---- places, sizes, keys ----------------------------------------------------------------------------------------------

def test_places():
    assert [place(*where) for where in [("a.jsonl", 3), ("a.csv", 3, 2), ("a.json", 3, 2), ("a.json", 3),
        ("a.parquet", 3, 3), ("the data", 3, 3)]] == [
            "a.jsonl, line 3", "a.csv, line 3", "a.json, row 2 (line 3)", "a.json, line 3", "a.parquet, row 3", "the data, row 3"]
    raw = RawRow(ROWS[0], "a.json", 3, 2)
    bad = BadRow.of(raw, DataError("it is bad."))
    assert str(bad) == raw.place() + ": it is bad." and bad.to_dict() == dict(file="a.json", line=3,
        found="it is bad", expected="", number=2)
    with pytest.raises(DataError) as caught: read_row(dict(text=""))
    assert str(BadRow.of(raw, caught.value)) == "a.json, row 2 (line 3): the text is empty. Write it or remove the row."
    assert [source_name(source) for source in ("a.json", ROWS)] == ["a.json", "the data"]


def test_lines_of_every_kind():
    content = {"a.jsonl": f"\n{GOOD}\n\n{GOOD}", "a.json": f"\n[{GOOD},\n\n{GOOD}]", "b.json": f"\n{GOOD}\n\n{GOOD}",
        "a.csv": "question,answer\na,b\n\nc,d"}
    for name, text in content.items():
        for encoding in ("utf-8-sig", "utf-16"):
            assert [(raw.line, raw.number) for raw in iter_rows(write(name, text, encoding))] == [(2, 1), (4, 2)], (name, encoding)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_progress_runs_up_to_the_size(kind, encoding):
    name = write(f"rows{kind}", [dict(text=f"né {at}" * 50) for at in range(2000)], encoding)
    rows, size = source_size(name)
    done = [raw.done for raw in iter_rows(name)]
    assert size == os.path.getsize(name) and rows == (2000 if kind == ".parquet" else None)
    assert done == sorted(done) and size - 4 <= done[-1] <= size


def test_sizes_without_files():
    assert source_size(ROWS) == source_size(datasets.Dataset.from_list(ROWS)) == (2, None)
    assert source_size(write("broken.parquet", "x")) == (None, 1)
    with pytest.raises(DataError, match="no data file"): source_size("nowhere.json")


def test_keys_follow_the_content():
    keys = [source_key(write("a.jsonl", GOOD)), source_key(write("a.jsonl", GOOD + " ")), source_key(write("b.jsonl", GOOD)),
            source_key(write("set/a.jsonl", GOOD) and "set"),
            source_key(write("set/b.jsonl", "") and "set"), source_key(ROWS), source_key(ROWS[::-1]),
            source_key(datasets.Dataset.from_list(ROWS)), source_key(datasets.Dataset.from_list(ROWS[:1])),
            source_key([dict(text="ab")]), source_key([dict(text="a"), dict(text="b")])]
    keys.pop(3)  # a folder of one file may share its key
    assert len(set(keys)) == len(keys) and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)


def test_keys_stay():
    assert source_key(write("a.jsonl", GOOD)) == source_key(write("moved/a.jsonl", GOOD)) == source_key(write("a.jsonl", GOOD))
    for folder in ("one", "two"): write(f"{folder}/sub/a.jsonl", GOOD), write(f"{folder}/b.csv", "text\na\n")
    assert source_key("one") == source_key("two") == source_key("one/")
    assert source_key(ROWS) == source_key([dict(row) for row in ROWS])


def test_a_byte_that_moves_to_the_next_file_changes_the_key():
    write("one/a.jsonl", GOOD), write("one/b.jsonl", "\n" + GOOD), write("two/a.jsonl", GOOD + "\n"), write("two/b.jsonl", GOOD)
    assert source_key("one") != source_key("two")


def test_keys_are_made_fast():
    "Little more than the hash itself"
    name = Path(write("rows.jsonl", random.Random(0).randbytes(50_000_000)))
    def seconds(make):
        began = time.perf_counter()
        make()
        return time.perf_counter() - began
    def plain(): hashlib.blake2b(name.read_bytes(), digest_size=16).digest()
    pairs = [(seconds(lambda: source_key(name)), seconds(plain)) for _ in range(5)]
    assert min(key for key, _ in pairs) < 1.5 * min(alone for _, alone in pairs), pairs


# ---- anything at all --------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(["{", "}", "[", "]", ",", ":", '"', '"a"', '{"text": "a"}', "1", "-", "null", "tru", "\\", "\n",
    " ", "\t", ";", "\0", "\ufeff", "é", "\ud800", "question", "\r"])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES, max_size=12).map("".join) | st.binary(max_size=40), st.sampled_from([".json", ".jsonl", ".csv"]),
    st.sampled_from([None, 1, 7]))
def test_any_file_is_read_or_refused_in_a_sentence(content, kind, chunk):
    with pytest.MonkeyPatch.context() as patch:
        if chunk: read_in_pieces(patch, chunk)
        write(f"any{kind}", content)
        try: rows = [raw.row for raw in iter_rows(f"any{kind}", lambda bad: str(bad))]
        except DataError as error: assert "any" in str(error) and "\n" not in str(error)
        else: assert all(isinstance(row, dict) for row in rows)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(st.text(max_size=3), st.recursive(st.text(max_size=5) | st.integers() | st.floats(allow_nan=False)
    | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=2), max_leaves=4), max_size=3), min_size=2, max_size=5),
    st.sampled_from([1, 2, 3, 5, 17, 1 << 20]), st.sampled_from([None, 1]))
def test_a_list_read_in_pieces_is_the_list(rows, chunk, indent):
    "However it is cut"
    with pytest.MonkeyPatch.context() as patch:
        read_in_pieces(patch, chunk)
        assert load_training_data(write("any.json", json.dumps(rows, indent=indent))) == rows
        assert load_training_data(write("any.json", json.dumps(rows, indent=indent, ensure_ascii=False), "utf-16")) == rows


# ---- the Hub ----------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOS = {"house/rows": {"train.jsonl": WRITERS[".jsonl"](ROWS).encode()},
    "house/parts": {"train.jsonl": GOOD.encode(), "test.jsonl": WRITERS[".jsonl"](ROWS).encode()},
    "house/tongues": {"README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: "
        b"de\n  data_files: de.jsonl\n---\n", "en.jsonl": GOOD.encode(), "de.jsonl": GOOD.encode()}}


class Hub(BaseHTTPRequestHandler):
    "Three small data sets behind the Hub's protocol"
    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        asked = "/".join(parts[2:4] if parts[0] == "api" else parts[1:3])
        held, name = REPOS.get(asked), parts[-1]
        if held is None: self.reply(404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api":
            listing = [dict(type="file", path=file, size=len(body), oid=hashlib.sha1(body).hexdigest()) for file, body in held.items()]
            info = dict(id=asked, sha=COMMIT, private=False, tags=[], siblings=[dict(rfilename=file) for file in held])
            self.reply(200, json.dumps(listing if "tree" in parts else info).encode(), Content_Type="application/json")
        elif name in held: self.reply(200, held[name], ETag=f'"{hashlib.sha256(held[name]).hexdigest()}"')
        else: self.reply(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "Reads names in a process of its own; the rows as JSON or the sentence, one a line"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("cache")
    code = ("import sys, json\nfrom sage_finetune.data.files import DataError, load_training_data\nfor name in sys.argv[1:]:\n"
            "    try: print(json.dumps(load_training_data(name)))\n    except DataError as error: print(error)")
    def ask(*names, **variables):
        environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name} | dict(HF_HOME=str(cache),
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_DISABLE_TELEMETRY="1")
        done = subprocess.run([sys.executable, "-c", code, *names], env=environment | variables,
            capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()
    yield ask
    server.shutdown()


def test_data_sets_from_the_hub(hub):
    one, part, several, tongues, missing, typo = hub("house/rows", "house/parts:test", "house/parts", "house/tongues",
        "house/rosw", "house/parts:tset")
    assert json.loads(one) == json.loads(part) == ROWS
    assert (several == 'the data set house/parts has the splits train, test. Name one: "house/parts:train".'
        or several == 'the data set house/parts has the splits test, train. Name one: "house/parts:test".')
    assert (tongues.startswith("there is no data file house/tongues, and the Hub does not give") and "'en'" in tongues
        and "load_dataset('house/tongues', config, split=…)" in tongues)
    assert "house/rosw" in missing and "Check the spelling and the network; behind a mirror set HF_ENDPOINT" in missing
    assert 'Unknown split "tset"' in typo and 'Name one of the splits behind a colon: "house/parts:train".' in typo
    cached, out_of_reach = hub("house/rows", "house/more", HF_HUB_OFFLINE="1")  # what was read before comes from the cache
    assert json.loads(cached) == ROWS
    assert (out_of_reach.startswith("there is no data file house/more, and the Hub does not give a data set of that name")
        and out_of_reach.endswith("for a private data set HF_TOKEN."))
