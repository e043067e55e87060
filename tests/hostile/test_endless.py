"What strangers give takes a bounded amount of time and memory: templates, rows, tables, packed files, pipes, trees, patterns and settings"
import bz2
import copy
import gzip
import json
import lzma
import os
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sage_finetune.chat_format.rendering import Renderer, template_notes
from sage_finetune.chat_format.template import ChatFormat, end_of_turn, prepare_conversation, template_text
from sage_finetune.config import LoRAConfig, PresetConfigs, TrainingConfig, tiny_path
from sage_finetune.core import limits, sandbox
from sage_finetune.core.errors import ConfigError, DataError, FinetuneError, ModelError, RunError
from sage_finetune.core.fingerprint import fingerprint_weights, weight_files
from sage_finetune.core.limits import check_patterns, walk_folder
from sage_finetune.core.sandbox import compile_template
from sage_finetune.core.text import text_table
from sage_finetune.data import corpus
from sage_finetune.data.corpus import code_rows, first_sentence
from sage_finetune.data.files import iter_rows, source_key, source_size
from sage_finetune.data.rows import read_row
from sage_finetune.modeling.adapter import attach_lora
from sage_finetune.modeling.adapter_files import load_adapter, save_adapter
from sage_finetune.modeling.base import load_base
from sage_finetune.modeling.tokenizer import adapter_tokenizer, load_tokenizer
from sage_finetune.runs.folder import list_runs, read_meta, read_metrics, read_status, run_info
from sage_finetune.runs.launch import LOG, log_lines
from sage_finetune.training.memory import estimate_memory
from sage_finetune.ui.diagnosis import doctor
from sage_finetune.ui.run_control import RunControl, status_line

pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
TALK = [dict(role="user", content="Which colour?"), dict(role="assistant", content="Blue.")]


@contextmanager
def within(seconds):
    "What happens here ends in time, on a busy machine too"
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("tiny")


@pytest.fixture
def with_template(tokenizer):
    def changed(template):
        other = copy.copy(tokenizer)
        other.chat_template = template
        return other
    return changed


# ---- templates ----------------------------------------------------------------------------------------------------------

LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "short loops in each other": "{% set x = range(50) %}" + "{% for a in x %}" * 9 + "{% endfor %}" * 9,
    "a filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop into itself": "{% for a in [0] * 60 recursive %}{% if loop.depth < 30 %}{{ loop([0] * 60) }}{% endif %}{% endfor %}",
    "sums in a loop": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "comparisons of long texts": "{% set x = 'x' * 10**7 %}{% for a in range(99999) %}{% if x == x | lower %}{% endif %}{% endfor %}",
    "a generator": "{% for a in range(99999) | map('string') %}{% for b in range(99999) | map('string') %}{% endfor %}{% endfor %}",
    "a filter that hands nothing on": "{% set s = range(99999) | list %}{{ range(99999) | reject('in', s) | first }}",
    "a filter of a few": "{{ ([0.5] * 9999) | select('in', range(99999) | list) | list }}",
    "searches": "{% set s = range(99999) | list %}" + "{% if -1 in s %}{% endif %}" * 1500,
    "comparisons of lists": "{% set s = range(99999) | list %}{% set t = range(99999) | list %}" + "{{ s == t }}" * 2000,
    "tests": "{% set s = range(99999) | list %}" + "{{ -1 is in(s) }}" * 1500,
    "methods of a list": "{% set s = range(99999) | list %}" + "{{ s.count(-1) }}" * 1500,
}
SIZES = {
    "times": "{{ 'x' * 10**9 }}", "a list times": "{{ [1] * 10**9 }}", "power": "{{ 2 ** 100000000 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}", "percent and star": "{{ '%*d' % (10**9, 1) }}",
    "many percents": "{{ ('%9999999d' * 99) % ((1,) * 99) }}",
    "format": "{{ '{:1000000000}'.format(1) }}", "format in format": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}", "the filter format": "{{ '%999999999s' | format(1) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}", "zfill": "{{ 'a'.zfill(10**9) }}", "center": "{{ 'a' | center(10**9) }}",
    "expandtabs": "{{ ('\\t' * 10000).expandtabs(10**6) }}", "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "replace": "{{ ('x' * 10000).replace('x', 'y' * 100000) }}", "the filter replace": "{{ ('x' * 10000) | replace('x', 'y' * 100000) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'x' * 10**6}) }}",
    "join": "{{ (['x' * 100000] * 10000) | join }}", "the method join": "{{ ('y' * 10**6).join(['x'] * 9999) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}", "indented JSON": "{{ [1] | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}", "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}", "wordwrap": "{{ ('a ' * 400000) | wordwrap(1, wrapstring='x' * 100000) }}",
    "a mapped filter": "{{ ['a'] | map('center', 10**9) | list }}", "a filter block": "{% filter center(10**9) %}x{% endfilter %}",
    "added to itself": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined to itself": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list in itself": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "a dictionary in itself": "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}"
        "{% endfor %}{{ n.x | tojson }}", "written often": "{% set x = 'x' * 10**7 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "slices": "{% set x = 'x' * 10**7 %}" + "".join(f"{{% set x{at} = x[1:] %}}" for at in range(2000)),
    "slices of a list": "{% set x = range(99999) | list %}" + "".join(f"{{% set x{at} = x[:] %}}" for at in range(2000)),
    "a long sum of texts": "{% set s = range(99999) | list %}{{ s" + " ~ s" * 2000 + " }}",
    "written in a macro": "{% set s = range(99999) | list %}{% macro f() %}" + "{{ s }}" * 2000 + "{% endmacro %}{{ f() }}",
    "escaped in a macro": "{% set s = range(99999) | list %}{% autoescape true %}{% macro f() %}" + "{{ s }}" * 2000
        + "{% endmacro %}{{ f() }}{% endautoescape %}",
    "long numbers": "{{ [2 ** 14000] * 99999 }}",
    "a block set": "{% set x %}{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}{% endset %}{{ x }}",
}
FAILS = {
    "division": "{{ 1 / 0 }}", "remainder": "{{ 1 % 0 }}", "range": "{{ range(10**9) | list }}", "float": "{{ 10.0 ** 400 }}",
    "int to float": "{{ 10 ** 400 * 1.0 }}", "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "digits": "{{ 10 ** 5000 }}", "encoding": "{{ 'a'.encode('nothing') }}", "include": "{% include 'x' %}",
    "width of a date": "{{ strftime_now('%1000000000d') }}", "cycler": "{{ cycler() }}", "an attribute": "{{ namespace(__init__=1) }}",
}
MANY = {
    "names and branches": "".join(f"{{% set a{at} = 1 %}}" for at in range(6000)) + "{% if a1 %}{% endif %}" * 5000,
    "names and loops": "".join(f"{{{{ a{at} }}}}" for at in range(6000)) + "{% for m in x %}{% endfor %}" * 5000,
    "names and includes": "{% for m in messages %}" + "".join(f"{{% set a{at} = 1 %}}" for at in range(4000))
        + "{% include 'x' %}" * 8000 + "{% endfor %}",
    "constants": "{{ 'x' | center(90000) }}" * 9000, "macros": "".join(f"{{% macro f{at}(a) %}}{{% endmacro %}}" for at in range(7500)),
}
UNREADABLE = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "ifs": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for a in b %}" * 60 + "{% endfor %}" * 60, "long": "x" * 10**8, "digits": "{{ " + "9" * 10**5 + " }}",
    "signs": "{{ " + "-" * 20_000 + "1 }}", "cut": "{% for", "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
}


@pytest.mark.parametrize("template", (LOOPS | SIZES).values(), ids=(LOOPS | SIZES).keys())
def test_a_template_that_is_too_much_is_stopped_in_a_sentence(with_template, monkeypatch, template):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
    with within(40), pytest.raises(ModelError, match="^the chat template was stopped: it "): template_text(TALK, tokenizer)


@pytest.mark.parametrize("template", FAILS.values(), ids=FAILS.keys())
def test_a_template_that_fails_says_so_in_a_sentence(with_template, template):
    tokenizer = with_template("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
    for look in (lambda: template_text(TALK, tokenizer), lambda: end_of_turn(tokenizer), lambda: template_notes(tokenizer),
            lambda: Renderer(tokenizer)):
        try: look()
        except FinetuneError as error: assert len(str(error)) < 1000 and "\n" not in str(error)
    with pytest.raises(FinetuneError): template_text(TALK, tokenizer)


@pytest.mark.parametrize("template", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_template_that_cannot_be_compiled_says_so_in_a_sentence(with_template, template):
    with within(20), pytest.raises(ModelError, match="^the chat template (cannot be read|has 100,000,000)"):
        template_text(TALK, with_template(template))


@pytest.mark.parametrize("template", MANY.values(), ids=MANY.keys())
def test_a_template_that_takes_long_to_compile_is_stopped_in_a_sentence(template):
    "Before it is rendered at all"
    with within(40), pytest.raises(ModelError, match="^the chat template was stopped: it"): compile_template(template)


def test_namespaces_in_each_other_are_not_spelt_out():
    made = ("".join(f"{{% set n{at} = namespace() %}}" for at in range(40))
        + "".join(f"{{% set n{at}.a = n{at + 1} %}}{{% set n{at}.b = n{at + 1} %}}" for at in range(39)))
    with within(20): assert compile_template(made + "{{ n0 }}{{ [n0] | string | length }}")() == "<Namespace>13"


def test_what_is_counted_is_what_jinja_writes():
    "Counters change no result: lists, slices, comparisons and lazy filters beside a plain environment"
    import jinja2
    source = ("{% set s = range(200) | list %}{{ s[3:9:2] }}{{ 3 in s[:5] }}{{ s[:2] == [0, 1] }}{{ 1 < 2 < s[5] }}"
        "{{ 'a' ~ s[:2] ~ none }}{{ s | select('in', s[190:]) | list }}{{ s | reject('gt', 3) | map('string') | join('-') }}")
    source += ("{{ [] | select | list }}{{ 'abc' | map('upper') | join }}{{ nothing | select | list }}"
        "{{ s | selectattr('x') | list }}{% autoescape true %}{{ '<' }}{% endautoescape %}{{ 1.5 }}{{ 'b' is in('abc') }}")
    assert compile_template(source)() == jinja2.Environment().from_string(source).render()


@pytest.mark.parametrize("given", [7, ["x"], {"default": 7}, {"default": "{{ 'x' * 10**9 }}"}, {"default": ["x"]}], ids=str)
def test_a_template_may_be_given_in_any_form(with_template, given):
    with pytest.raises(FinetuneError): template_text(TALK, with_template(given))


def test_limits_hold_in_every_thread():
    said = []
    def render():
        try: compile_template("{{ 'x' * 10**9 }}")()
        except ModelError as error: said.append(str(error))
    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(said) == 3


def test_a_long_conversation_is_no_endless_one(tokenizer):
    "What a template may do grows with what it is given"
    many = compile_template("{% for m in messages %}{{ m.content | trim | replace('a', 'b') ~ m.content.strip().upper() }}{% endfor %}")
    text = "a" * 1_000_000
    assert len(many(messages=[dict(role="user", content=text)] * 60)) == 2 * 60 * len(text)
    talk = [dict(role="assistant" if at % 2 else "user", content=f"word {at}") for at in range(4000)]
    assert prepare_conversation(talk, ChatFormat(tokenizer)).text().count("word") == 4000


def test_a_refusal_of_many_turns_is_found_by_halves(with_template):
    tokenizer = with_template("{% for m in messages %}{% if loop.index > 2000 %}{{ raise_exception('too long') }}"
        "{% endif %}{{ m.content }}{% endfor %}")
    talk = [dict(role="assistant" if at % 2 else "user", content="x") for at in range(20_000)]
    with within(60), pytest.raises(DataError, match="At message 2001") as said: template_text(talk, tokenizer)
    assert len(str(said.value)) < 1000


# ---- rows ---------------------------------------------------------------------------------------------------------------

def read_all(path):
    for raw in iter_rows(path): read_row(raw.row)


def write(path, text):
    path.write_text(text)
    return path


WIDE = 60_000
ROWS = {
    "columns.csv": lambda: ",".join(f"column{at}" for at in range(WIDE)) + "\n" + ",".join("x" * WIDE) + "\n",
    "same.csv": lambda: ",".join("a" * WIDE) + "\n" + ",".join("x" * WIDE) + "\n",
    "columns.tsv": lambda: "\t".join(f"une colonne {at}" for at in range(9000)) + "\n" + "\t".join("x" * 9000) + "\n",
    "keys.jsonl": lambda: json.dumps({f"questions {at}": "x" for at in range(WIDE)}) + "\n",
    "keys.json": lambda: json.dumps([{f"questions {at}": "x" for at in range(WIDE)}]),
    "deep.jsonl": lambda: '{"question": "a", "answer": "b", "tools": ' + "[" * 900 + "]" * 900 + "}\n",
    "deep.json": lambda: '[{"question": "a", "answer": "b", "tools": ' + "[" * 900 + "]" * 900 + "}]",
    "deeper.json": lambda: "[" * 100_000, "deeper.jsonl": lambda: '{"a":' * 100_000,
    "text.jsonl": lambda: json.dumps(dict(question="a", answer="b", tools="[" * 900 + "]" * 900)),
    "digits.jsonl": lambda: '{"question": ' + "9" * 1_000_000 + ', "answer": "b"}',
    "digits.json": lambda: '[{"question": ' + "9" * 1_000_000 + ', "answer": "b"}]',
    "role.jsonl": lambda: json.dumps(dict(messages=[dict(role="r" * 1_000_000, content="x")])),
    "open.csv": lambda: 'question,answer\n"' + "a\n" * 1_000_000,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_would_take_for_ever_are_refused_in_a_sentence(tmp_path, name):
    path = write(tmp_path/name, ROWS[name]())
    with within(20), pytest.raises(DataError) as said: read_all(path)
    assert len(str(said.value)) < 3000


def test_a_line_longer_than_any_row(tmp_path, monkeypatch):
    for module in ("json_stream", "csv_tables", "row_limits"):
        monkeypatch.setattr(f"sage_finetune.data.{module}.MAX_ROW_CHARACTERS", 100_000)
    for name, text in (("a.jsonl", '{"question": "' + "a" * 200_000 + '", "answer": "b"}\n'),
            ("a.json", '["' + "a" * 200_000 + '"]'), ("a.csv", "question,answer\n" + "a" * 200_000 + ",b\n")):
        with pytest.raises(DataError): read_all(write(tmp_path/name, text))


def packed(path, question, rows, **options):
    pq.write_table(pa.table(dict(question=question, answer=pa.array(["y"] * rows))), path, compression="zstd", **options)
    return path


def test_a_small_table_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.parquet_files.max_unpacked_size", lambda size: 2**27 + 1000 * size)
    said = "No data set is packed so tightly"
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 1_000_000]))
    with within(60), pytest.raises(DataError, match=said): read_all(packed(tmp_path/"words.parquet", words, 100_000))
    pq.write_table(pa.table(dict(question=pa.nulls(20_000_000, pa.string()))), tmp_path/"nothing.parquet", row_group_size=20_000_000)
    size = os.path.getsize(tmp_path/"nothing.parquet")
    assert size < 100_000
    with within(20), pytest.raises(DataError): read_all(tmp_path/"nothing.parquet")
    pq.write_table(pa.table(dict(question=pa.array([[None] * 30_000_000], pa.list_(pa.int8())))),
        tmp_path/"list.parquet", compression="zstd")
    if os.path.getsize(tmp_path/"list.parquet") < 25_000:
        with within(20), pytest.raises(DataError, match=said): read_all(tmp_path/"list.parquet")


def test_a_table_that_is_merely_repetitive_is_read(tmp_path):
    path = packed(tmp_path/"fine.parquet", pa.array(["Which colour has the lamp? " * 20] * 20_000), 20_000)
    assert sum(1 for _ in iter_rows(path)) == 20_000


# ---- tables and texts that are small until they are opened --------------------------------------------------------------------

def arrow(path, columns, **options):
    table = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, options.pop("kind", pa.ipc.new_file)(sink, table.schema,
            options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(table)
    return path


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, compression="zstd", **options)
    return path


SHARED = pa.array(range(200_000), pa.int64())
WORDS = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), pa.array(["x" * 100_000]))
TABLES = {
    "fixed list of nulls": lambda at: arrow(at/"a.arrow", dict(a=pa.FixedSizeListArray.from_arrays(pa.nulls(500_000_000), 500_000_000))),
    "fixed lists in each other": lambda at: arrow(at/"a.arrow",
        dict(a=pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.nulls(10**9), 10**5), 10**4))),
    "views of one list": lambda at: arrow(at/"a.arrow",
        dict(a=pa.ListViewArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([200_000] * 500, pa.int32()), pa.nulls(200_000)))),
    "views of views": lambda at: arrow(at/"a.arrow", dict(a=pa.LargeListViewArray.from_arrays(pa.array([0]), pa.array([3000]),
        pa.ListViewArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([200_000] * 3000, pa.int32()), SHARED)))),
    "words of a dictionary in a row": lambda at: arrow(at/"a.arrow", dict(a=pa.ListArray.from_arrays([0, 50_000], WORDS))),
    "packed buffers": lambda at: arrow(at/"a.arrow", dict(a=pa.array(np.zeros(36_000_000, np.int64))), compression="zstd"),
    "packed buffers in a stream": lambda at: arrow(at/"a.arrow", dict(a=pa.array(np.zeros(36_000_000, np.int64))),
        compression="zstd", kind=pa.ipc.new_stream),
    "a word in a row": lambda at: parquet(at/"a.parquet", dict(a=pa.ListArray.from_arrays([0, 50_000], WORDS))),
    "structs in a row": lambda at: parquet(at/"a.parquet", dict(a=pa.ListArray.from_arrays([0, 500_000],
        pa.StructArray.from_arrays([pa.array([0] * 500_000)] * 20, [f"f{one}" for one in range(20)])))),
    "a map in a row": lambda at: parquet(at/"a.parquet",
        dict(a=pa.MapArray.from_arrays([0, 3_000_000], pa.array(["k"] * 3_000_000), pa.nulls(3_000_000, pa.int8())))),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_weighed_before_its_rows_are_made(tmp_path, name):
    path = TABLES[name](tmp_path)
    size = os.path.getsize(path)
    with within(10), pytest.raises(DataError,
            match="row 1: the row holds more than|No data set is packed so tightly|in its lists; at most"):
        list(iter_rows(path))
    assert size < 20_000_000


def test_tables_that_are_weighed_are_read_as_they_are(tmp_path):
    "Slices, nulls, views, maps, dictionaries and packed buffers: the rows are those the library itself makes"
    talks = [dict(messages=[dict(role="user", content="Which? " * (at % 7)), dict(role="assistant", content="é" * 20)] * (at % 3),
        tag="ab"[at % 2], n=[at, None]) for at in range(3000)]
    table = pa.Table.from_pylist(talks).append_column("word", pa.array(["long word"] * 3000).dictionary_encode()).append_column("m",
        pa.array([[("k", 1)]] * 3000, pa.map_(pa.string(), pa.int8())))
    views = pa.ListViewArray.from_arrays(pa.array([0, 1, 0] * 1000, pa.int32()), pa.array([2, 1, 0] * 1000, pa.int32()),
        pa.array(["x", None], pa.string_view()))
    batch = table.append_column("v", views).append_column("d", pa.array([None, b"ab"] * 1500)).combine_chunks().to_batches()[0]
    for kind in (pa.ipc.new_file, pa.ipc.new_stream):
        for compression in (None, "zstd", "lz4"):
            path = arrow(tmp_path/"a.arrow", dict(zip(batch.schema.names, batch.columns)), kind=kind, compression=compression)
            assert ([{key: value for key, value in raw.row.items() if key != "n"} for raw in iter_rows(path)][1:3]
                == [{key: value for key, value in row.items() if key != "n"} for row in batch.to_pylist()][1:3])
    pq.write_table(table, tmp_path/"a.parquet", row_group_size=700)
    assert [raw.row["messages"] for raw in iter_rows(tmp_path/"a.parquet")] == [row["messages"] for row in talks]


TEXTS = {
    "commas.csv": lambda: b"question,answer\na,b\n" + b"," * 5_000_000,
    "cells.csv": lambda: b"question,answer\n" + b'a,b,"\n",' * 2_000_000,
    "objects.jsonl": lambda: b'{"a": [' + b"{}," * 2_500_000 + b"1]}", "objects.json": lambda: b'[{"a": [' + b"{}," * 2_500_000 + b"1]}]",
    "lists.jsonl": lambda: b'{"a": ' + b"[[]," * 2_500_000 + b"1",
    "blank.csv": lambda: b"question,answer\n" + b"\n" * 1_200, "empty.csv": lambda: b"question,answer\n" + b",\n" * 1_200,
    "blank.jsonl": lambda: b"\n" * 1_200,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_tiny_values_is_refused_before_they_are_made(tmp_path, name, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.row_limits.MAX_BLANK_LINES", 1000)
    (tmp_path/name).write_bytes(TEXTS[name]())
    with within(10), pytest.raises(DataError,
            match="holds? more than 4,194,304|row has more than 4,194,304 cells|more than 1,000 empty lines"):
        read_all(tmp_path/name)


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.jsonl.gz", "rows.json.xz", "rows.csv.bz2"])
def test_a_packed_text_of_tiny_values_is_refused_while_it_is_unpacked(tmp_path, name):
    made = (b'{"a": "' + b"a" * (17 << 20) + b'", "b": [' + b"{}," * 2_700_000 if "json" in name
        else b"question,answer\n" + b"a" * (17 << 20) + b"," * 5_000_000)
    pack = dict(gz=lambda: gzip.compress(made), xz=lambda: lzma.compress(made, preset=0), bz2=lambda: bz2.compress(made, 1))
    (tmp_path/name).write_bytes(pack[name.rpartition(".")[2]]())
    with within(20), pytest.raises(DataError, match="lines and values. No data set is packed so tightly"):
        for _ in iter_rows(tmp_path/name, on_bad=lambda bad: None): pass


@pytest.mark.parametrize("name, head", [("a.csv", b""), ("b.csv", b'question,answer\nx,"'), ("a.jsonl", b""),
    ("b.jsonl", b'{"question": "a", "answer": "b"}\n'), ("a.json", b""), ("b.json", b'[{"question": "a", "answer": "b"},')])
def test_null_bytes_are_said_to_be_what_they_are(tmp_path, name, head):
    (tmp_path/name).write_bytes(head)
    os.truncate(tmp_path/name, 100 << 20)
    with within(10), pytest.raises(DataError, match="null bytes stand here, so the file was never written to its end"):
        read_all(tmp_path/name)


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="holes in files cannot be seen here")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.csv.gz"])
def test_a_file_that_was_never_written_is_neither_hashed_nor_read(tmp_path, name):
    (tmp_path/name).write_bytes(b'{"question": "a", "answer": "b"}\n')
    os.truncate(tmp_path/name, 10**12)
    for look in (read_all, source_key):
        with within(5), pytest.raises(DataError, match="of its 1,000,000,000,000 bytes only .* were ever written"): look(tmp_path/name)


# ---- pipes and devices ----------------------------------------------------------------------------------------------------

@pipes
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_rows_are_only_read_from_files(tmp_path, name):
    folder = tmp_path/"data"
    folder.mkdir()
    os.mkfifo(folder/name)
    os.symlink("/dev/zero", tmp_path/name)
    for source in (folder, folder/name, tmp_path/name, "/dev/zero", "/dev/random"):
        for look in (read_all, source_key):
            with within(10), pytest.raises(DataError, match="a named pipe|regular file|no data file"): look(source)
        try: source_size(source)
        except DataError: pass


@pipes
@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "training_config.json", "finetune_meta.json", "launch.json", LOG])
@pytest.mark.parametrize("make", [os.mkfifo if hasattr(os, "mkfifo") else None, lambda path: os.symlink("/dev/zero", path),
    lambda path: open(path, "wb").truncate(10**12)], ids=["pipe", "device", "a terabyte"])
def test_a_run_folder_is_only_read_from_files(tmp_path, name, make):
    run = tmp_path/"run"
    run.mkdir()
    PresetConfigs.tiny(data_path="example", output_dir=run).save(run/"training_config.json")
    (run/name).unlink(missing_ok=True)
    make(run/name)
    for look in (run_info, lambda run: list_runs(run.parent), read_status, read_metrics, log_lines,
            lambda run: TrainingConfig.load(run/"training_config.json")):
        try:
            with within(10): look(run)
        except FinetuneError as error: assert "cannot be read" in str(error) or "not a readable JSON file" in str(error)


@pipes
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "model.safetensors", "chat_template.jinja"])
def test_a_model_is_only_read_from_files(tmp_path, name):
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (folder/name).unlink(missing_ok=True)
        make(folder/name)
        config = PresetConfigs.tiny(model_name=str(folder), data_path="example", output_dir=tmp_path/"run", device="cpu")
        for look, what in ((load_tokenizer, str(folder)), (load_base, config), (estimate_memory, config)):
            with within(10), pytest.raises(ModelError, match="not a regular file"): look(what)


def test_metrics_of_a_stranger(tmp_path):
    (tmp_path/"metrics.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    with pytest.raises(RunError, match="line 1, is not a JSON object"): read_metrics(tmp_path)
    (tmp_path/"status.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="nested"): read_status(tmp_path)
    assert len(text_table(["a"], [["x" * 10**7], *[["y"]] * 500])) < 10**5


@pytest.fixture
def listed(tmp_path):
    "A run that is as it should be, and one whose metrics are given"
    def list_them(metrics):
        for name in ("a", "b"):
            (tmp_path/name).mkdir(exist_ok=True)
            PresetConfigs.tiny(data_path="example", output_dir=tmp_path/name).save(tmp_path/name/"training_config.json")
            (tmp_path/name/"metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        (tmp_path/"a"/"metrics.jsonl").write_bytes(metrics)
        with within(15): first, second = list_runs(tmp_path)
        assert second.loss == 2.5
        return first
    return list_them


def test_long_metrics_are_read_at_their_end(listed, monkeypatch):
    run = listed(b'{"step": 1, "loss": 1}\n' * 4_000_000 + b'{"step": 2, "loss": 0.5}\n{"step": 3, "eval_loss": 7}\n{"ste')
    assert (run.state, run.loss) == ("pending", 0.5)
    monkeypatch.setattr("sage_finetune.runs.folder.MAX_LINES", 1000)
    with within(20), pytest.raises(RunError, match="more than 1,000 lines"): read_metrics(run.folder)


@pytest.mark.parametrize("metrics", [b"\n" * (300 << 20), b"x" * (30 << 20), b"[]\n" * 10**6, b"\0" * (2 << 20)],
    ids=["blank lines", "one line", "lists", "zeros"])
def test_metrics_without_rows_are_a_remark_on_one_run(listed, metrics):
    run = listed(metrics)
    assert run.state == "unreadable" and "ends without a row" in run.message


def test_a_forged_step_is_no_step_of_the_run(tmp_path):
    PresetConfigs.tiny(data_path="example", output_dir=tmp_path).save(tmp_path/"training_config.json")
    (tmp_path/"status.json").write_text(json.dumps(dict(state="failed", step=4, total=4)))
    said = []
    for step in (4, 2**63 - 1):
        (tmp_path/"metrics.jsonl").write_text(json.dumps(dict(step=step, loss=1.5, total=4)) + "\n")
        control = RunControl(tmp_path)
        while control.poll() and not control.watch.row: pass
        said.append(status_line(control))
    assert ("after step 4 of 4" in said[0] and "of 4" not in said[1]
        and "after 4 steps; its metrics name step 9,223,372,036,854,775,807" in said[1])


def test_a_list_that_takes_too_long_names_every_run(listed, tmp_path, monkeypatch):
    listed(b"")
    monkeypatch.setattr("sage_finetune.runs.folder.MAX_LIST", -1.)
    assert [(run.name, run.state) for run in list_runs(tmp_path)] == [("a", "unreadable"), ("b", "unreadable")]


# ---- settings ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value", [("vocab_size", 10**12), ("num_hidden_layers", 10**9), ("hidden_size", 10**9),
                                          ("intermediate_size", 10**12), ("num_attention_heads", 10**9),
                                          ("max_position_embeddings", 10**15), ("num_experts", 10**9),
                                          ("layer_types", ["full_attention"] * 200_000), ("head_dim", 1e300),
                                          ("vocab_size", 10**400), ("hidden_size", -10**400),
                                          ("rope_theta", 10**4000), ("head_dim", float("nan")), ("num_hidden_layers", float("inf")),
                                          ("rope_scaling", {str(at): at for at in range(200_000)}),
                                          ("initializer_range", {"a" * 10**6: 10**400})], ids=lambda value: str(value)[:24])
def test_a_model_of_numbers_nobody_trained(tmp_path, field, value):
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    (folder/"config.json").write_text(json.dumps(json.loads((folder/"config.json").read_text()) | {field: value}))
    config = PresetConfigs.tiny(model_name=str(folder), data_path="example", output_dir=tmp_path/"run", device="cpu")
    for look in (lambda: load_base(config), lambda: estimate_memory(config), lambda: load_tokenizer(str(folder))):
        with within(10), pytest.raises(ModelError, match="a{59}…=a number of 401 digits" if field == "initializer_range"
                else f"{field}=") as said:
            look()
        assert len(str(said.value)) < 1000


@pytest.mark.parametrize("field, value", [("num_key_value_heads", 0), ("attention_dropout", 1.5),
    ("attention_dropout", 2**31), ("hidden_size", -5), ("num_attention_heads", "x"), ("hidden_size", None)], ids=str)
def test_a_model_that_cannot_take_a_step(tmp_path, field, value):
    "In a sentence with its reason and a way out for a folder"
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    (folder/"config.json").write_text(json.dumps(json.loads((folder/"config.json").read_text()) | {field: value}))
    with pytest.raises(ModelError) as said:
        estimate_memory(PresetConfigs.tiny(model_name=str(folder), data_path="example", output_dir=tmp_path/"run", device="cpu"))
    assert ("config.json" in str(said.value) and ":)." not in str(said.value) and "network" not in str(said.value)
        and "Restore" in str(said.value))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"vocab_size": ' + "9" * 5000 + "}"], ids=lambda text: text[:16])
def test_a_model_config_that_is_none(tmp_path, content):
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    (folder/"config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"): load_tokenizer(str(folder))


def test_a_model_that_says_more_than_its_weights_hold(tmp_path):
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    (folder/"config.json").write_text(json.dumps(json.loads((folder/"config.json").read_text())
        | dict(vocab_size=2**23, hidden_size=2**16)))
    with pytest.raises(ModelError, match="do not belong together"):
        load_base(PresetConfigs.tiny(model_name=str(folder), data_path="example", output_dir=tmp_path/"run", device="cpu"))
    (folder/"tokenizer.json").open("wb").truncate(500_000_000)
    with pytest.raises(ModelError, match="500,000,000 bytes"): load_tokenizer(str(folder))


def test_a_header_of_eight_exabytes(tmp_path):
    folder = shutil.copytree(tiny_path(), tmp_path/"model")
    (folder/"model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError):
        load_base(PresetConfigs.tiny(model_name=str(folder), data_path="example", output_dir=tmp_path/"run", device="cpu"))


def weights(path, places, size):
    "A safetensors file whose tensors lie where it says"
    header = json.dumps({f"t{at}": dict(dtype="U8", shape=[24], data_offsets=place) for at, place in enumerate(places)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize("places, size", [([[0, 50 << 20]] * 10_000, 50 << 20), ([[0, 24], [12, 36], [24, 48]], 48),
    ([[0, 24], [30, 54]], 54), ([[0, 24], [24, 48]], 60), ([[4, 24]], 24), ([[0, 24], [24, 12], [12, 24]], 24),
    ([["a", "b"]], 24), ([[0]], 24)],
                         ids=["ten thousand", "overlap", "gap", "more at the end", "gap in front", "backwards", "texts", "one"])
def test_no_byte_of_weights_is_hashed_twice(tmp_path, places, size):
    weights(tmp_path/"model.safetensors", places, size)
    with within(10), pytest.raises(ModelError, match="cannot be read as safetensors") as said: fingerprint_weights(tmp_path)
    assert len(str(said.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="holes are not seen here")
def test_weights_that_were_never_written(tmp_path):
    weights(tmp_path/"model.safetensors", [[0, 4 << 40]], 4 << 40)
    if os.stat(tmp_path/"model.safetensors").st_blocks * 512 > 1 << 30: pytest.skip("this file system has no holes")
    with within(10), pytest.raises(ModelError, match="were ever written"): fingerprint_weights(tmp_path)


def test_one_file_under_many_names_is_hashed_once(tmp_path):
    weights(tmp_path/"a.safetensors", [[0, 24], [24, 24], [24, 48]], 48)
    one = fingerprint_weights(tmp_path)
    for at in range(50): os.link(tmp_path/"a.safetensors", tmp_path/f"b{at}.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors"] and fingerprint_weights(tmp_path) == one
    for content in ("[" * 100_000, "[]", '{"weight_map": 7}', "9" * 100_000):
        (tmp_path/"model.safetensors.index.json").write_text(content)
        with within(10), pytest.raises(ModelError, match="cannot be read"): weight_files(tmp_path)


PATTERNS = ["(.*)*x", "(.+)+x", "((a|.)*)*x", r"(\w+\.?)+:", ".*.*.*.*.*.*.*.*.*.*.*.*.*x", ".?" * 40 + "!",
    "(?:.|)" * 40 + "!", ".{0,9}" * 9 + "!"]


@pytest.fixture(scope="module")
def base(): return load_base(PresetConfigs.tiny(data_path="example", output_dir="unused", device="cpu"))[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_would_never_end_is_refused(base, monkeypatch, pattern):
    monkeypatch.setattr(limits.check_patterns, "__defaults__", (1.,))
    with within(20), pytest.raises(ConfigError, match="does not end within 1 seconds"):
        attach_lora(copy.deepcopy(base), LoRAConfig(target_modules=pattern))


def test_patterns_of_other_kinds_work():
    names = [f"model.layers.{at}.mlp.{kind}_proj" for at in range(200) for kind in ("up", "down")]
    assert check_patterns([("fullmatch", r".*\.(up|down)_proj"), ("fullmatch", r"(model|layers|\.|\d)+\.mlp\.up_proj"),
        ("match", r"(?:[a-z]+\.)+\d+")], names) == ""
    assert ("cannot be tried" in check_patterns([("match", "(a)*(")], names)
        and "longer than" in check_patterns([("match", "a" * 5000)], names))
    assert check_patterns([("match", rf"(.*\.)?({name})$") for name in names], names) == ""  # each layer by its own name
    with within(5): assert "1,000 patterns for 400 layers" in check_patterns([("match", f"key{at}") for at in range(1000)], names)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(attach_lora(copy.deepcopy(base), LoRAConfig(r=4)), folder)
    return folder


@pytest.mark.parametrize("fields", [dict(target_modules="(.*)*x"), dict(exclude_modules="(.*)*x"), dict(rank_pattern={"(.*)*x": 8}),
                                    dict(rank_pattern={".?" * 40 + "!": 8}), dict(rank_pattern={f"key{at}": 8 for at in range(50_000)}),
                                    dict(alpha_pattern={f"key{at}": 8 for at in range(300_000)}), dict(alpha_pattern={"(.*)*x": 8}),
                                    dict(layers_pattern="(.*)*x", layers_to_transform=[1]),
                                    dict(modules_to_save=["(.*)*x"]), dict(r=10**9), dict(r=10**6),
                                    dict(rank_pattern=dict(q_proj=10**6)), dict(trainable_token_indices=[10**9]),
                                    dict(trainable_token_indices=dict(embed_tokens=[10**7])), dict(target_modules=["x"] * 10**6),
                                    dict(lora_alpha=1e308)], ids=lambda fields: str(fields)[:40])
def test_an_adapter_of_endless_settings_is_refused(base, adapter, tmp_path, monkeypatch, fields):
    monkeypatch.setattr(limits.check_patterns, "__defaults__", (1.,))
    folder = shutil.copytree(adapter, tmp_path/"adapter")
    (folder/"adapter_config.json").write_text(json.dumps(json.loads((folder/"adapter_config.json").read_text()) | fields))
    with within(20), pytest.raises(ModelError): load_adapter(copy.deepcopy(base), folder)


def test_an_adapter_as_it_was_saved_is_loaded(base, adapter):
    assert load_adapter(copy.deepcopy(base), adapter).peft_config["default"].r == 4


def test_a_tokenizer_that_brings_code_beside_an_adapter(tokenizer, adapter, tmp_path):
    "Says that code beside an adapter never runs, and what to do"
    folder = shutil.copytree(adapter, tmp_path/"adapter")
    tokenizer.save_pretrained(folder)
    content = json.loads((folder/"tokenizer_config.json").read_text())
    (folder/"tokenizer_config.json").write_text(json.dumps(content
        | dict(tokenizer_class="OwnTokenizer", auto_map=dict(AutoTokenizer=["tokenization_own.OwnTokenizer", None]))))
    (folder/"tokenization_own.py").write_text("raise SystemExit('code was run')\n")
    with pytest.raises(ModelError, match=r"needs Python code \(tokenization_own.py\), and code beside an adapter never runs. "
            r"Delete its tokenizer_config.json"):
        adapter_tokenizer(folder, tokenizer)


@pytest.mark.parametrize("target", [".?" * 40 + "!", ["no_such_proj"], "(unclosed"], ids=str)
def test_the_doctor_finds_layers_that_cannot_be(tmp_path, monkeypatch, target):
    monkeypatch.setattr(limits.check_patterns, "__defaults__", (1.,))
    config = PresetConfigs.tiny(data_path="example", output_dir=tmp_path/"run", device="cpu", lora=dict(target_modules=target))
    seen = doctor(config, online=False)
    assert not seen.healthy and any("target_modules" in look.found for look in seen.problems), str(seen)


@pytest.mark.parametrize("fields", [dict(eval_prompts=["a"] * 100_000), dict(new_tokens=[f"<{at}>" for at in range(100_000)])],
    ids=lambda fields: next(iter(fields)))
def test_a_config_of_very_many_entries(tmp_path, fields):
    content = PresetConfigs.tiny(data_path="example", output_dir=tmp_path).to_dict()
    (tmp_path/"training_config.json").write_text(json.dumps(content | fields, default=str))
    with within(10), pytest.raises(ConfigError, match="100,000 entries"): TrainingConfig.load(tmp_path/"training_config.json")


LONG = ["9" * 200_000, "x" * 200_000, ["x" * 200_000], {"x" * 200_000: 1}, ["x"] * 900, 10**4000, "\x1b[2J\u202e" * 30_000]


@pytest.mark.parametrize("value", LONG, ids=lambda value: repr(value)[:12])
def test_a_sentence_never_quotes_megabytes(tmp_path, value):
    run = tmp_path/"run"
    run.mkdir()
    whole = PresetConfigs.tiny(data_path="example", output_dir=run).to_dict()
    fields = [("status.json", dict(state="training"), name) for name in ("state", "pid", "updated", "message")] + [
        ("finetune_meta.json", dict(task_type="qa", model="tiny", dataset="example"), name)
        for name in ("task_type", "model", "dataset", "x" * 200_000)]
    fields += ([("training_config.json", whole, name) for name in (*whole, "x" * 200_000)]
        + [("training_config.json", whole | dict(lora=whole["lora"] | {name: value}), "seed") for name in (*whole["lora"], "y" * 200_000)])
    looks = dict(zip(("status.json", "finetune_meta.json", "training_config.json"),
        (read_status, lambda run: read_meta(run).to_config(), lambda run: TrainingConfig.load(run/"training_config.json"))))
    refused = 0
    for name, content, field in fields:
        (run/name).write_text(json.dumps(content | {field: value}))
        try: looks[name](run)
        except FinetuneError as error:
            assert len(str(error)) < 5000, (name, field[:60])
            refused += 1
        assert len(str(list_runs(tmp_path)[0])) < 20_000
        (run/name).unlink()
    assert refused > 50


# ---- source trees -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("docstring", ["a\n" * 200_000, "\n" * 10**6, ":a" * 10**6, " . " * 10**6, "(" * 10**6 + ". a",
                                       "x. " * 10**6, "`" * 10**6, ":aa:`" + "x" * 10**6, "a(" + ")" * 10**6, "\n \t" * 10**6,
                                       "a\n" + " " * 10**6 + "x", "." + ")" * 10**6, ":a:`b" * 10**5, "-" * 10**6, "W\n" + "1" * 10**6],
    ids=range(15))
def test_a_docstring_is_read_in_linear_time(docstring):
    with within(3): first_sentence(docstring)


def test_a_tree_that_is_too_much(tmp_path, monkeypatch):
    for root in ("/", os.path.expanduser("~")):
        with within(10), pytest.raises(DataError, match="Name the folder of one project"): code_rows(root)
    for at in range(30): (tmp_path/f"m{at}.py").write_text("def f():\n    'Return one number.'\n")
    monkeypatch.setattr(corpus, "MAX_FILES", 20)
    with pytest.raises(DataError, match="more than 20 Python files"): code_rows(tmp_path)
    monkeypatch.setattr(corpus, "MAX_FILES", 100), monkeypatch.setattr(corpus, "MAX_SECONDS", 0.)
    with pytest.raises(DataError, match="more than 0 seconds"): code_rows(tmp_path)


def test_a_folder_that_is_too_much(tmp_path):
    for at in range(30): (tmp_path/f"{at}").mkdir()
    with pytest.raises(RunError, match="more than 20 files and folders. Name another."):
        list(walk_folder(tmp_path, "Name another.", RunError, entries=20))
    (tmp_path/"1"/"loop").symlink_to(tmp_path)
    with within(10), pytest.raises(DataError): list(iter_rows(tmp_path))
    assert len(list_runs(tmp_path)) == 0


@pytest.mark.parametrize("code", ["def f() -> " + "a" + ".b" * 2000 + ": 'Return one thing.'", "def f() -> 0x" + "f" * 20_000
                                  + ": 'Return one thing.'", "if a: pass\n" + "elif a: pass\n" * 3000, "__all__ = " + "[" * 150 + "]" * 150,
                                  "x = " + "(" * 5000, "def f(a=" + "-" * 3000 + "1): 'Return one thing.'"], ids=range(6))
def test_a_source_file_nested_without_end_is_left_out(tmp_path, code):
    (tmp_path/"odd.py").write_text(code), (tmp_path/"good.py").write_text("def brew(leaves):\n    'Return a pot of tea.'\n")
    with within(20): found = code_rows(tmp_path)
    assert any(fact.name == "brew" for fact in found.facts)


@pipes
def test_source_files_are_files(tmp_path):
    (os.mkfifo(tmp_path/"pipe.py"), os.symlink("/dev/zero", tmp_path/"zero.py"),
        (tmp_path/"good.py").write_text("def brew(leaves):\n    'Return a pot of tea.'\n"))
    with within(10): assert code_rows(tmp_path).files == 1


SOURCES = {
    "numbers": b"__all__ = [1, 2]", "a dictionary": b"__all__ = {'f': 1}", "lists": b"__all__ = [['f']]", "a text": b"__all__ = 'f'",
    "half a character": b"__all__ = ['a\\ud800']\ndef g(x) -> '\\ud800':\n    'Does a \\ud800 thing.'",
    "endless names": b"class " + b"C" * 300_000 + b":\n" + b"".join(b"    def a%d(self): 0\n" % at for at in range(5_000)),
    "numbers as types": b"def g(x: 1, *y: {2: [3]}) -> 4: 0",
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_source_file_says_of_itself_may_be_anything(tmp_path, name):
    (tmp_path/"a.py").write_bytes(SOURCES[name] + b"\ndef f(x): 'Does a thing well.'\n")
    with within(10): found = code_rows(tmp_path)
    assert len(json.dumps(found.rows, ensure_ascii=False).encode()) < 10**5 and any("f do?" in row["instruction"] for row in found.rows)


def test_values_of_secrets_are_looked_up_and_not_compared_one_by_one():
    facts = [corpus.Fact("where", "function", f"name{at}", f"a/{at:08}.py", "a.py", at) for at in range(20_000)]
    with within(10):
        kept, left = corpus.drop_secret_facts(facts, [f"value-{at:012}" for at in range(40_000)] + ["a/00000007.py", "/00000009"])
    assert [skip.place for skip in left] == ["a.py:7 name7", "a.py:9 name9"] and len(kept) == 19_998
    with pytest.raises(DataError, match="takes more than 120 seconds"): corpus.drop_secret_facts(facts, ["a/00000007.py"], until=0)


def test_a_name_that_is_defined_very_often_is_left_out_in_time(tmp_path):
    (tmp_path/"a.py").write_text("def a(): 0\n" * 5_000 + "def f(x): 0\n")
    with within(15): assert len(code_rows(tmp_path).skipped) == 5_000


@pytest.mark.parametrize("start", ["pissa_niter_999999999", "pissa_niter_1_0_0_0", "pissa_x_niter_9", "pissa_niter_-1"])
def test_an_adapter_does_not_ask_for_endless_iterations(tmp_path, start):
    base = load_base(PresetConfigs.tiny(device="cpu"))[0]
    save_adapter(attach_lora(copy.deepcopy(base), LoRAConfig(r=4)), tmp_path)
    fields = json.loads((tmp_path/"adapter_config.json").read_text()) | dict(init_lora_weights=start)
    (tmp_path/"adapter_config.json").write_text(json.dumps(fields))
    with within(10), pytest.raises(ModelError, match="init_lora_weights="): load_adapter(base, tmp_path)
