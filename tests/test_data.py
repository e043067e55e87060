"""From rows of any shape to examples on disk: nothing is lost in silence, nothing half is ever used,
and a million rows need no more memory than thousands"""
import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import file_limit, leftovers, rows, write_rows
from transformers import AutoTokenizer

from sage_finetune.chat_format.rendering import render, render_text
from sage_finetune.config import tiny_path
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data import cache as data_cache, dataset as data, preprocessing
from sage_finetune.data.cache import read_prepared
from sage_finetune.data.dataset import check_rows, encode, prepare, prepare_dataset
from sage_finetune.data.eval_split import prompt_key, split
from sage_finetune.data.preprocessing import Preprocessor
from sage_finetune.data.report import DataReport, report_from_dict, report_to_dict
from sage_finetune.data.rows import read_row
from sage_finetune.data.store import PreparedDataset


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(tiny_path())


def talk(turns, words=6):
    return dict(messages=[dict(role=role, content=f"{role} {turn} " + "word " * words) for turn in range(turns)
        for role in ("user", "assistant")])


def kept(dataset): return [(row["input_ids"], row["labels"], row["length"], row["row"]) for row in dataset]


def folders(cache): return sorted(path.name for path in Path(cache).iterdir() if path.name.startswith("prepared-"))


# ---- examples ---------------------------------------------------------------------------------------------------------

def test_what_is_on_disk_is_what_render_makes(tokenizer, tmp_path):
    mixed = [*rows(5), talk(3), dict(text="Ships pass by night."), dict(prompt="2 + 2 =", completion="4")]
    dataset = prepare_dataset(mixed, tokenizer, show=False)
    for at, row in enumerate(mixed):
        sample = read_row(row)
        expected = render(sample.messages, tokenizer) if sample.messages else render_text(sample.text, tokenizer)
        assert kept(dataset.select([at])) == [(expected.ids, expected.labels, len(expected.ids), at + 1)]
    assert (dataset.features["input_ids"].feature.dtype == dataset.features["labels"].feature.dtype
        == dataset.features["length"].dtype == "int32")
    assert dataset.report.tokens == sum(dataset["length"]) and dataset.report.target_tokens == sum(label != -100
        for labels in dataset["labels"] for label in labels)
    assert dataset.report.longest == max(dataset["length"]) and dataset.report.rows == len(mixed)


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "folder", "list", "dataset"])
def test_every_source_gives_the_same_examples(tokenizer, tmp_path, source):
    content, path = rows(), tmp_path/source
    if source == "rows.jsonl": write_rows(path, content)
    elif source == "rows.json": path.write_text(json.dumps(content))
    elif source == "rows.csv": Dataset.from_list(content).to_csv(path)
    elif source == "rows.parquet": Dataset.from_list(content).to_parquet(path)
    elif source == "folder": [write_rows(path/f"{at}.jsonl", content[at * 12:(at + 1) * 12]) for at in range(2)]
    made = prepare_dataset({"list": content, "dataset": Dataset.from_list(content)}.get(source, path), tokenizer, show=False)
    assert [one[:3] for one in kept(made)] == [one[:3] for one in kept(encode(content, tokenizer)[0])]


def test_the_row_column_is_the_line_of_the_file(tokenizer, tmp_path):
    write_rows(tmp_path/"rows.jsonl", rows(3))
    text = (tmp_path/"rows.jsonl").read_text().splitlines()
    (tmp_path/"rows.jsonl").write_text("\n\n".join(text))
    assert prepare_dataset(tmp_path/"rows.jsonl", tokenizer, show=False)["row"][:] == [1, 3, 5]


def test_many_chunks_keep_their_order(tokenizer):
    content = rows(1500)
    dataset, report = encode(content, tokenizer)
    assert dataset["row"][:] == list(range(1, 1501)) and report.examples == 1500
    assert dataset[1499]["input_ids"] == render(read_row(content[1499]).messages, tokenizer).ids


def test_weights_decide_and_rows_without_anything_to_learn_are_left_out(tokenizer):
    messages = [dict(role="user", content="a"), dict(role="assistant", content="no", weight=0),
        dict(role="user", content="b"), dict(role="assistant", content="yes", weight=1)]
    dataset, _ = encode([dict(messages=messages)], tokenizer)
    assert tokenizer.decode([label for label in dataset[0]["labels"] if label != -100]) == "yes<|im_end|>"
    silent = dict(messages=[dict(one, train=False) if one["role"] == "assistant" else one for one in talk(1)["messages"]])
    with pytest.raises(DataError, match="nothing to train on"): encode([silent], tokenizer)


def test_an_example_without_a_trained_token_is_never_kept(tokenizer):
    maker = Preprocessor(tokenizer)
    batch = maker.renderer.batch
    def silence(talks):
        found = batch(talks)
        found[0][0].labels[:] = [-100] * len(found[0][0].labels)
        for at, turn in enumerate(found[0][0].turns): found[0][0].turns[at] = turn._replace(is_target=False)
        return found
    maker.renderer.batch = silence
    made = maker(next(preprocessing.chunks(rows(3))))
    assert made.report.without_targets == 1 and made.report.examples == 2


def test_an_answer_without_a_stop_token_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = ("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    with pytest.raises((DataError, ValueError), match="stop token"): encode(rows(2), bare)


def test_every_trained_turn_must_end_in_a_token_that_ends_it(tokenizer):
    maker = Preprocessor(tokenizer)
    batch = maker.renderer.batch
    def shorter(talks):
        found = batch(talks)
        found[1][0].turns[0] = found[1][0].turns[0]._replace(end=found[1][0].turns[0].end - 1)
        return found
    maker.renderer.batch = shorter
    with pytest.raises(DataError, match="the data, row 2: an answer does not end in a stop token"):
        maker(next(preprocessing.chunks(rows(3))))


def test_numbers_become_text_with_a_note(tokenizer):
    report = encode([dict(question="2 + 2?", answer=4), dict(question="2 + 3?", answer=5), *rows(1)], tokenizer)[1]
    assert [(kind, note.count, note.first) for kind, note in report.notes.items()] == [("number turned into text", 2, "the data, row 1")]
    assert "2 × number turned into text (first: the data, row 1)" in str(report)


# ---- too long ---------------------------------------------------------------------------------------------------------

def whole(row, tokenizer): return render(read_row(row).messages, tokenizer)


@pytest.fixture(scope="module")
def long_rows(tokenizer):
    "A short row, a long talk, a row whose first answer is too long, another short one; and the limit"
    return [rows(1)[0], talk(6), dict(instruction="Tell.", output="word " * 300), rows(2)[1]], 60


def test_whole_turns_go(tokenizer, long_rows):
    content, limit = long_rows
    dataset, report = encode(content, tokenizer, max_length=limit)
    assert dataset["row"][:] == [1, 2, 4] and report.overlong == {"shortened": 1, "left out": 1}
    expected = max((render(talk(turns)["messages"], tokenizer) for turns in range(1, 6)
        if len(render(talk(turns)["messages"], tokenizer).ids) <= limit), key=lambda one: len(one.ids))
    assert (dataset[1]["input_ids"], dataset[1]["labels"]) == (expected.ids, expected.labels)
    assert report.turns_dropped == 12 - 2 * len(expected.turns) and max(dataset["length"]) <= limit
    shortened, left_out = report.long_rows
    assert (shortened.what, shortened.tokens, shortened.kept, shortened.turns) == ("shortened",
        len(whole(content[1], tokenizer).ids), len(expected.ids), report.turns_dropped)
    assert (left_out.what, left_out.kept) == ("left out", 0) and left_out.place == "the data, row 3" and "Tell." in left_out.head
    assert "the data, row 2: " in str(report) and f"{report.turns_dropped} turns went" in str(report)


def test_every_limit_ends_with_a_whole_answer(tokenizer):
    "From far too short to long enough"
    row, lengths = talk(4, words=3), []
    for limit in range(10, len(whole(row, tokenizer).ids) + 3):
        made = prepare([row, rows(1)[0] | dict(output="ok")], tokenizer, max_length=limit, show=False) if limit > 40 else None
        if made is None or made.train["row"][0] != 1: continue
        labels = made.train[0]["labels"]
        last = max(at for at, label in enumerate(labels) if label != -100)
        assert labels[last] == tokenizer.convert_tokens_to_ids("<|im_end|>") and len(labels) <= limit
        lengths.append(len(labels))
    assert lengths == sorted(lengths) and len(set(lengths)) > 3 and lengths[-1] == len(whole(row, tokenizer).ids)


def test_a_line_break_too_many_costs_no_turn(tokenizer):
    row = talk(2)
    example = whole(row, tokenizer)
    dataset, report = encode([row], tokenizer, max_length=len(example.ids) - 1)
    assert dataset[0]["input_ids"] == example.ids[:-1] and dataset[0]["labels"] == example.labels[:-1] and report.overlong == {}


def test_drop(tokenizer, long_rows):
    content, limit = long_rows
    report = prepare(content, tokenizer, limit, overlong="drop", show=False).report
    assert report.overlong == {"left out": 2} and report.examples == 2


def test_error(tokenizer, long_rows):
    content, limit = long_rows
    with pytest.raises(DataError, match=r"the data, row 2: the row has \d+ tokens, more than `max_length=60`. "
            r"Raise `max_length`, shorten the row, or choose `overlong=\"drop_turns\"`"):
        prepare(content, tokenizer, limit, overlong="error", show=False)


def test_truncate(tokenizer, long_rows):
    content, limit = long_rows
    dataset = prepare(content, tokenizer, limit, overlong="truncate", show=False).train
    assert dataset.report.overlong == {"cut": 2} and dataset["length"][1:3] == [limit, limit]
    for at in (1, 2):
        assert (dataset[at]["input_ids"] == whole(content[at], tokenizer).ids[:limit]
            and dataset[at]["labels"] == whole(content[at], tokenizer).labels[:limit])
    lines = dataset.long_lines()
    assert ([line.kinds.count("cut") for line in lines] == [min(60, len(whole(content[at], tokenizer).ids) - limit) for at in (1, 2)]
        and "~~" in repr(lines[0]))
    question = dict(instruction="word " * 300, output="Yes.")
    # nothing to train on remains
    assert prepare([rows(1)[0], question], tokenizer, limit, overlong="truncate", show=False).report.overlong == {"left out": 1}


@pytest.mark.parametrize("overlong", preprocessing.OVERLONG)
def test_a_text_is_laid_into_pieces_and_nothing_is_lost(tokenizer, overlong):
    text = "Ships pass the lighthouse by night. " * 40
    expected = render_text(text, tokenizer).ids
    for limit in (16, 17, 50, len(expected) - 1, len(expected)):
        made = prepare([dict(text=text)], tokenizer, limit, overlong=overlong, show=False)
        ids = made.train["input_ids"][:]
        assert sum(ids, []) == expected and all(2 <= len(piece) <= limit for piece in ids) and made.train["labels"][:] == ids
        assert [tokenizer.eos_token_id in piece for piece in ids] == [False] * (len(ids) - 1) + [True]
        assert made.report.overlong == ({"in pieces": 1} if len(ids) > 1 else {})


def test_a_row_of_200_000_tokens(tokenizer):
    row, began = (dict(messages=[dict(role=role, content="lamp and " * 500) for _ in range(200) for role in ("user", "assistant")]),
        time.monotonic())
    dataset, report = encode([row, rows(1)[0]], tokenizer, max_length=8192)
    assert report.long_rows[0].tokens > 200_000 and dataset["row"][:] == [1, 2] and 0 < dataset["length"][0] <= 8192
    assert len(report.long_rows[0].ids) <= 120 and len(json.dumps(report_to_dict(report))) < 20_000 and time.monotonic() - began < 30


def test_a_field_of_ten_megabytes(tokenizer):
    began, text = time.monotonic(), "lamp and " * 1_165_085
    report = encode([rows(1)[0], dict(instruction="Copy.", output=text)], tokenizer)[1]
    assert report.overlong == {"left out": 1} and report.examples == 1 and len(str(report)) < 2000 and time.monotonic() - began < 60


def test_too_long_for_anything(tokenizer):
    with pytest.raises(DataError, match=r"no example of the 24 rows fits into max_length=8\. Raise max_length or shorten the answers"):
        encode(rows(), tokenizer, max_length=8)


# ---- bad rows ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def holes(tmp_path):
    "A file of forty rows of which lines 3, 5, 7, 9 and 11 are bad in five ways"
    lines = [json.dumps(row) for row in rows(40)]
    lines[2], lines[4], lines[6] = ('{"instruction": "half', json.dumps(dict(question="Who?", anwser="Ada.")),
        json.dumps(dict(instruction="Say nothing.", output=" ")))
    lines[8], lines[10] = ("[1, 2]",
        json.dumps(dict(messages=[dict(role="user", content="<script>alert(1)</script>\x1b[31m"), dict(role="robot", content="x")])))
    path = tmp_path/"holes.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_first_bad_row_stops(tokenizer, holes):
    with pytest.raises(DataError, match=r"holes.jsonl, line 3: this is not JSON"): prepare(holes, tokenizer, show=False)
    lines = holes.read_text().split("\n")
    holes.write_text("\n".join([*lines[:2], *lines[4:], '{"cut": ']))
    with pytest.raises(DataError, match=r"holes.jsonl, line 3: the row has the fields 'question', 'anwser'. "
            r"Format 'qa' also needs 'answer'"):
        prepare(holes, tokenizer, show=False)


@pytest.mark.parametrize("at", [2, 300, 700])
def test_the_first_bad_row_stops_also_before_a_broken_end(tokenizer, tmp_path, at):
    "Reading is ahead of making: a file that breaks off must not hide an earlier bad row"
    content = json.dumps([row if number != at else dict(question="x") for number, row in enumerate(rows(900))])
    (tmp_path/"rows.json").write_text(content[:-30])
    with pytest.raises(DataError, match=rf"rows.json, row {at + 1} .*also needs 'answer'"):
        prepare(tmp_path/"rows.json", tokenizer, on_bad_row="error", show=False)
    with pytest.raises(DataError, match=r"rows.json, line 1: this is not JSON"):
        prepare(tmp_path/"rows.json", tokenizer, on_bad_row="skip", show=False)


def test_bad_rows_are_skipped_counted_and_listed(tokenizer, holes, tmp_path):
    made = prepare(holes, tokenizer, on_bad_row="skip", show=False, bad_rows_path=tmp_path/"new"/"bad_rows.jsonl")
    report = made.report
    assert (report.bad, report.rows, report.examples) == (5, 40, 35) and [bad.line for bad in report.bad_rows] == [3, 5, 7, 9, 11]
    listed = [json.loads(line) for line in (tmp_path/"new"/"bad_rows.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [3, 5, 7, 9, 11] and all(one["file"] == str(holes) and one["found"]
        and one["expected"] for one in listed)
    assert "bad rows skipped: 5 of 40" in str(report) and "… 2 more, all in " in str(report) and str(report).count("holes.jsonl, line") == 3
    assert made.train["row"][:] == [line for line in range(1, 41) if line not in (3, 5, 7, 9, 11)]


def test_the_list_of_bad_rows_is_kept_in_the_cache(tokenizer, holes, tmp_path):
    for _ in range(2):
        report = prepare(holes, tokenizer, on_bad_row="skip", cache_dir=tmp_path/"cache", show=False).report
        assert len(Path(report.bad_rows_path).read_text().splitlines()) == report.bad == 5
    assert report.cached and len(report.bad_rows) == 5
    shutil.rmtree(tmp_path/"cache")


def test_a_hundred_thousand_bad_rows_are_not_kept_in_memory(tokenizer, tmp_path):
    report = prepare([*rows(1), *([{}] * 5000)], tokenizer, on_bad_row="skip", show=False, bad_rows_path=tmp_path/"bad.jsonl").report
    assert report.bad == 5000 and len(report.bad_rows) == 1000 and len((tmp_path/"bad.jsonl").read_text().splitlines()) == 5000


def test_all_rows_bad(tokenizer):
    with pytest.raises(DataError, match="all 3 rows are bad, so there is nothing to train on. The first: the data, row 1"):
        prepare([{}, {"a": 1}, {"text": None}], tokenizer, on_bad_row="skip", show=False)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_no_rows(tokenizer, tmp_path, content):
    (tmp_path/"rows.json").write_text(content)
    with pytest.raises(DataError, match="holds no rows|not JSON"):
        prepare(tmp_path/"rows.json", tokenizer, cache_dir=tmp_path/"cache", show=False)
    with pytest.raises(DataError, match="the data holds no rows"): prepare([], tokenizer, show=False)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_failure_leaves_no_empty_folders(tokenizer, tmp_path):
    "Neither the cache nor the run folder it was to lie in; a folder that was there stays"
    (tmp_path/"here").mkdir()
    for cache in ("run/deep/prepared", "here"):
        with pytest.raises(DataError): prepare([{}], tokenizer, cache_dir=tmp_path/cache, show=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_row_the_template_refuses_is_a_bad_row(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = ("{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system role here') }}{% endif %}{% endfor %}" + tokenizer.chat_template)
    refused = dict(instruction="x", output="y", system="Be kind.")
    with pytest.raises(DataError, match="the data, row 2: .*no system role here"): encode([*rows(1), refused], strict)
    report = prepare([*rows(1), refused], strict, on_bad_row="skip", show=False).report
    assert report.bad == 1 and report.examples == 1 and "no system role here" in str(report.bad_rows[0])


@pytest.mark.parametrize("wrong, says", [(dict(overlong="cut"), "overlong='cut' cannot be used: it takes one of 'drop_turns'"),
                                         (dict(on_bad_row="ignore"), "on_bad_row='ignore'"), (dict(thinking="no"), "thinking='no'"),
                                         (dict(format_type="alpaka"), "format_type='alpaka'.*'alpaca'"),
                                         (dict(max_length=0), "max_length=0"), (dict(eval_ratio=1.), "eval_ratio=1.0"),
                                         (dict(column_map=["a"]), "column_map=")])
def test_wrong_settings_are_refused_before_anything_is_read(tokenizer, wrong, says):
    with pytest.raises(ConfigError, match=says): prepare("nowhere.jsonl", tokenizer, **wrong)


def test_column_map_and_format(tokenizer):
    german = [dict(Frage="Was?", Antwort="Das.")]
    assert (kept(prepare_dataset(german, tokenizer, column_map=dict(question="Frage", answer="Antwort"), show=False))
        == kept(encode([dict(question="Was?", answer="Das.")], tokenizer)[0]))
    both = [dict(text="A text.", question="Was?", answer="Das.")]
    assert prepare_dataset(both, tokenizer, format_type="text", show=False)["input_ids"][0] == render_text("A text.", tokenizer).ids


def test_check_rows_names_the_row():
    assert check_rows(rows()) == rows()
    with pytest.raises(DataError, match="faq.jsonl, line 25: the answer in turn 2 is empty"):
        check_rows([*rows(), dict(question="x", answer="")], "faq.jsonl")


# ---- what is shown ----------------------------------------------------------------------------------------------------

def test_the_report_is_harmless(tokenizer, tmp_path):
    "Markup, escapes and direction marks in the data are shown, not obeyed"
    nasty = dict(instruction="<b onclick=x>\x1b[2J\u202e" + "long " * 300, output="<script>alert(1)</script>")
    made = prepare([nasty, dict(messages=[dict(role="<img src=x>", content="a")]), *rows(1)], tokenizer, 60, on_bad_row="skip", show=False)
    shown = made.report._repr_html_() + made._repr_html_() + made.train._repr_html_()
    assert "<script" not in shown and "<b onclick" not in shown and "<img" not in shown and "&lt;b onclick" in shown
    for text in (shown, str(made.report), repr(made.train)): assert not set(text) & {"\x1b", "\u202e"}
    report = prepare(write_rows(tmp_path/"a\x1b[31m<b>.jsonl"), tokenizer, show=False).report  # a file name is data, too
    assert "\x1b" not in str(report) + report._repr_html_() and "<b>" not in report._repr_html_() and "␛[31m" in str(report)


def test_the_report_goes_to_json_and_back(tokenizer, holes):
    report = prepare(holes, tokenizer, 40, on_bad_row="skip", eval_ratio=.2, show=False).report
    assert report.held_out.examples and report.examples
    back = report_from_dict(json.loads(json.dumps(report_to_dict(report))))
    assert back == report and str(back) == str(report) and isinstance(back, DataReport)


def test_show_prints_the_report_and_nothing_else(tokenizer, capfd):
    made = prepare_dataset(rows(), tokenizer)
    said, complained = capfd.readouterr()
    assert said == str(made.report) + "\n" and complained == "" and said.startswith("the data: 24 examples, ")
    prepare_dataset(rows(), tokenizer, show=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("environment, drawn", [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_a_bar_is_drawn_when_it_takes_long(tmp_path, environment, drawn):
    write_rows(tmp_path/"rows.jsonl", rows(3000))
    slow = ("import time; from sage_finetune.data import dataset as data, preprocessing\nfrom transformers import AutoTokenizer; "
            "from sage_finetune.config import tiny_path\n"
            "batch = preprocessing.Renderer.batch\ndef late(self, talks):\n    time.sleep(.3)\n    return batch(self, "
            "talks)\npreprocessing.Renderer.batch = late\n"
            "data.prepare('rows.jsonl', AutoTokenizer.from_pretrained(tiny_path()))")
    child = subprocess.run([sys.executable, "-c", slow], cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert ("rows/s" in child.stderr and "tokens" in child.stderr and "%" in child.stderr) == drawn
    assert child.stdout.startswith("rows.jsonl: 3,000 examples")


# ---- the data set -----------------------------------------------------------------------------------------------------

def test_it_is_a_dataset_that_shows_itself(tokenizer):
    dataset = prepare_dataset([talk(2), dict(text="Ships pass.")], tokenizer, show=False)
    assert (isinstance(dataset, PreparedDataset) and isinstance(dataset, Dataset) and dataset.max_length == 1024
        and dataset.tokenizer is tokenizer)
    line = dataset.example(0)
    assert line.ids == dataset[0]["input_ids"] and line.kinds.count("target") == sum(label != -100 for label in dataset[0]["labels"])
    assert ({name for name, label in zip(line.names, line.labels) if label != -100} == {"answer 1", "answer 2"}
        and line.names[0] == "before answer 1" and "⟦assistant 1 word" in repr(line))
    assert "<ins" in dataset._repr_html_() and "2 examples" in dataset._repr_html_() and "⟦Ships pass." in repr(dataset)


def test_select_and_shuffle_give_plain_datasets(tokenizer):
    dataset = encode(rows(), tokenizer)[0]
    assert type(dataset.select([3])) is Dataset and type(dataset.shuffle(seed=1)) is Dataset
    assert (sorted(dataset.shuffle(seed=1)["row"]) == dataset["row"][:]
        and dataset.with_format("numpy")["length"][:].sum() == dataset.report.tokens)
    assert dataset.map(lambda row: dict(size=len(row["labels"])))["size"][:] == dataset["length"][:]


def test_copies_share_tokenizer_and_report(tokenizer):
    dataset = encode(rows(), tokenizer)[0]
    for twin in (copy.deepcopy(dataset), dataset.with_format("torch")):
        assert twin.tokenizer is tokenizer and twin.report is dataset.report and len(twin) == 24


def test_it_can_be_pickled_and_read_by_workers(tokenizer):
    from torch.utils.data import DataLoader
    dataset = encode(rows(), tokenizer)[0]
    twin = pickle.loads(pickle.dumps(dataset))
    assert kept(twin) == kept(dataset) and twin.report == dataset.report and twin.tokenizer.chat_template == tokenizer.chat_template
    read = [row["row"] for rows_ in DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=list) for row in rows_]
    assert read == list(range(1, 25)) and len(dataset[0]["input_ids"])  # the workers took nothing away


def test_temporary_files_live_as_long_as_they_are_needed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    made = prepare(rows(100), tokenizer, eval_ratio=.2, show=False)
    derived = made.evaluation.shuffle(seed=3)
    assert len(list(tmp_path.iterdir())) == 1
    del made
    assert len(list(tmp_path.iterdir())) == 1 and derived[0]["input_ids"]
    del derived
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError): prepare([*rows(), {}], tokenizer, show=False)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_go_with_the_process(tmp_path):
    code = ("import os; from sage_finetune.data.dataset import prepare; from transformers import AutoTokenizer; "
        "from sage_finetune.config import tiny_path\nmade = prepare('example', AutoTokenizer.from_pretrained(tiny_path()), "
        "show=False)\nprint(len(os.listdir(os.environ['TMPDIR'])))")
    child = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert child.returncode == 0 and child.stdout == "1\n" and list(tmp_path.iterdir()) == [], child.stderr


# ---- held out ---------------------------------------------------------------------------------------------------------

def sums(count, start=0): return [dict(question=f"What is {at} plus {at}?", answer=str(2 * at)) for at in range(start, count)]


def questions(found): return {row["question"] for row in found}


def test_rows_stay_on_their_side_when_others_are_added(tokenizer):
    few, many = split(sums(200), .1), split(sums(400) + sums(100), .1)
    assert questions(few[1]) == questions(many[1]) & questions(sums(200)) and not questions(many[0]) & questions(many[1])
    assert 10 <= len(few[1]) <= 32 and len(many[0]) + len(many[1]) == 500


def test_the_same_question_is_on_one_side_only():
    "Whatever its answer, its blanks, its system prompt, what follows, and its shape"
    def key(row): return prompt_key(read_row(row))
    asked = key(dict(question="Who wrote it?", answer="Ada."))
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="Who  wrote\nit?"),
        dict(role="assistant", content="x"), dict(role="user", content="Why?"), dict(role="assistant", content="y")]
    assert {key(row) for row in (dict(instruction="Who wrote it?", output="Bob."), dict(question=" Who wrote  it?\n", answer=7),
        dict(messages=messages), dict(prompt="Who wrote it?", completion="z"))} == {asked}
    others = [dict(question="Who wrote It?", answer="Ada."), dict(question="Who wrote it? Say", answer="Ada."), dict(text="Who wrote it?")]
    assert asked not in {key(row) for row in others} and 0 <= asked < 1


def test_prepare_divides_as_split_does(tokenizer, tmp_path):
    content = sums(150) + sums(30)
    train, held = split(content, .2)
    made = prepare(write_rows(tmp_path/"rows.jsonl", content), tokenizer, eval_ratio=.2, show=False)
    for found, expected in ((made.train, train), (made.evaluation, held)):
        assert Counter(content[number - 1]["question"] for number in found["row"]) == Counter(row["question"] for row in expected)
    assert (made.report.examples, made.report.held_out.examples) == (len(train), len(held)) and f"held out: {len(held)}" in str(made.report)
    assert made.report.held_out.tokens == sum(made.evaluation["length"])


def test_all_or_none_held_out_is_said(tokenizer):
    low, high = (sorted(sums(50), key=lambda row: prompt_key(read_row(row)))[at] for at in (0, -1))
    made = prepare([low], tokenizer, eval_ratio=.5, show=False)
    assert (made.evaluation is None and len(made.train) == 1 and "would hold out every question, so none is held out" in str(made.report)
        and made.report.tokens == made.train[0]["length"])
    assert split([low], .5) == ([low], [])
    made = prepare([high], tokenizer, eval_ratio=.1, show=False)
    assert made.evaluation is None and len(made.train) == 1 and "holds out none of these questions" in str(made.report)
    assert prepare([high], tokenizer, show=False).report.messages == prepare([high], tokenizer, eval_ratio=0., show=False).report.messages


# ---- the cache --------------------------------------------------------------------------------------------------------

@pytest.fixture
def cached(tokenizer, tmp_path):
    "Prepare into a cache; (whether it was there already, the examples)"
    write_rows(tmp_path/"rows.jsonl", sums(100))
    def call(tokenizer=tokenizer, source=tmp_path/"rows.jsonl", **settings):
        made = prepare(source, tokenizer, **{"eval_ratio": .1, "cache_dir": tmp_path/"cache", "show": False} | settings)
        return made.report.cached, (kept(made.train), kept(made.evaluation) if made.evaluation else None)
    return call


def test_the_second_start_finds_everything(cached, tmp_path):
    (first, made), (second, found) = cached(), cached()
    assert (first, second) == (False, True) and made == found and len(folders(tmp_path/"cache")) == 1 and leftovers(tmp_path) == []
    assert sorted(path.name for path in next((tmp_path/"cache").iterdir()).iterdir()) == ["evaluation.arrow", "report.json", "train.arrow"]
    assert cached(cache_dir=None)[1] == made


def test_other_content_is_made_anew(cached, tmp_path):
    cached()
    write_rows(tmp_path/"rows.jsonl", sums(100)[:-1] + [dict(question="What is 99 plus 99?", answer="197")])
    assert not cached()[0] and cached()[0] and len(folders(tmp_path/"cache")) == 2
    write_rows(tmp_path/"rows.jsonl", sums(100))
    os.utime(tmp_path/"rows.jsonl", (1, 1))  # an old date is no other content
    assert cached()[0]


@pytest.mark.parametrize("changes", [dict(max_length=99), dict(eval_ratio=.2), dict(overlong="drop"), dict(thinking="as_is"),
    dict(on_bad_row="skip"), dict(allow_special_tokens=True), dict(format_type="qa"), dict(column_map={"context": "source"})],
    ids=lambda one: next(iter(one)))
def test_every_setting_counts(cached, changes):
    assert not cached()[0] and not cached(**changes)[0] and cached(**changes)[0] and cached()[0]


def test_template_and_tokenizer_count(cached, tokenizer):
    assert not cached()[0]
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("+ '\\n' }}", "+ '\\n\\n' }}") + " "
    assert other.chat_template != tokenizer.chat_template and not cached(other)[0]
    hidden = copy.deepcopy(tokenizer)  # differs only where nobody looks beforehand
    hidden.chat_template = tokenizer.chat_template + "{% if messages[0]['content'] == 'What is 7 plus 7?' %}{{ 'lucky' }}{% endif %}"
    assert not cached(hidden)[0]
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["lampshade"])
    assert not cached(grown)[0] and cached(copy.deepcopy(tokenizer))[0]


def test_a_template_with_todays_date_is_rendered_anew_tomorrow(cached, tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ '<|im_start|>system\n' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + tokenizer.chat_template
    from datetime import datetime

    import sage_finetune.core.sandbox as sandbox
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None): return cls(2031, 5, 4)
    assert not cached(dated)[0] and cached(dated)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "datetime", Tomorrow)
        assert not cached(dated)[0]


@pytest.mark.parametrize("spoil",
    [lambda folder: (folder/"train.arrow").write_bytes((folder/"train.arrow").read_bytes()[:-8]),
        lambda folder: (folder/"evaluation.arrow").unlink(), lambda folder: (folder/"report.json").write_text("{"),
        lambda folder: (folder/"report.json").unlink(), lambda folder: flip(folder/"train.arrow")],
    ids=["cut", "lost", "half a report", "no report", "one bit"])
def test_a_damaged_cache_is_made_anew_with_a_sentence(cached, tmp_path, tokenizer, spoil):
    _, made = cached()
    folder = next((tmp_path/"cache").iterdir())
    spoil(folder)
    with pytest.raises(DataError, match="damaged"): read_prepared(folder)
    again = prepare(tmp_path/"rows.jsonl", tokenizer, eval_ratio=.1, cache_dir=tmp_path/"cache", show=False)
    assert not again.report.cached and re.search(r"the prepared data in .*prepared-\w+ are damaged \(.*\). They were made anew",
        str(again.report)) and (kept(again.train), kept(again.evaluation)) == made
    assert cached() == (True, made) and len(list((tmp_path/"cache").iterdir())) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PREPARE = ("import sys; from sage_finetune.data.dataset import prepare; from transformers import AutoTokenizer; "
    "from sage_finetune.config import tiny_path\nmade = prepare('rows.jsonl', AutoTokenizer.from_pretrained(tiny_path()), "
    "cache_dir='cache', show=False)\nprint(made.report.cached, len(made.train), sum(made.train['length']))")


def test_killed_in_the_middle_leaves_nothing_usable(tokenizer, tmp_path):
    count = 15_000
    write_rows(tmp_path/"rows.jsonl", rows(count))
    child = subprocess.Popen([sys.executable, "-c", PREPARE], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        def written(): return sum(path.stat().st_size for path in tmp_path.glob("cache/.prepared-*/train.arrow"))
        while written() < 300_000 and child.poll() is None and time.monotonic() < until: time.sleep(.002)
        assert child.poll() is None and written() >= 300_000
    finally: child.send_signal(signal.SIGKILL)
    child.communicate()
    assert folders(tmp_path/"cache") == [] and len(leftovers(tmp_path)) > 0
    made = prepare(tmp_path/"rows.jsonl", tokenizer, cache_dir=tmp_path/"cache", show=False)
    assert not made.report.cached and len(made.train) == count and len(folders(tmp_path/"cache")) == 1
    left = next(tmp_path.glob("cache/.prepared-*"))
    os.utime(left, (1, 1))
    prepare(tmp_path/"rows.jsonl", tokenizer, max_length=99, cache_dir=tmp_path/"cache", show=False)
    assert not left.exists()  # swept away by a later start


def test_two_processes_at_once(tokenizer, tmp_path):
    write_rows(tmp_path/"rows.jsonl", rows(4000))
    children = [subprocess.Popen([sys.executable, "-c", PREPARE], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)]
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert len({out.split(maxsplit=1)[1] for out, _ in said}) == 1 and len(folders(tmp_path/"cache")) == 1 and leftovers(tmp_path) == []
    assert prepare(tmp_path/"rows.jsonl", tokenizer, cache_dir=tmp_path/"cache", show=False).report.cached


def test_a_file_that_changes_while_it_is_read_is_not_cached(tokenizer, tmp_path, monkeypatch):
    path = write_rows(tmp_path/"rows.jsonl", rows(2000))
    batch, grown, lock = preprocessing.Renderer.batch, [], threading.Lock()
    def meddle(self, talks):
        with lock:
            if len(talks) > 50 and not grown:
                with open(path, "a") as file: file.write(json.dumps(rows(1)[0]) + "\n")
                grown.append(True)
        return batch(self, talks)
    monkeypatch.setattr(preprocessing.Renderer, "batch", meddle)
    with pytest.raises(DataError, match="changed while it was read"): prepare(path, tokenizer, cache_dir=tmp_path/"cache", show=False)
    assert grown and not (tmp_path/"cache").exists()
    assert len(prepare(path, tokenizer, cache_dir=tmp_path/"cache", show=False).train) == 2001


def test_a_file_that_is_replaced_between_hashing_and_reading_is_not_cached(tokenizer, tmp_path, monkeypatch):
    path, key = write_rows(tmp_path/"rows.jsonl", rows(20)), data_cache.source_key
    calls = []
    def replaced(source):
        calls.append(key(source))
        if len(calls) == 1: write_rows(path, rows(21))
        return calls[-1]
    monkeypatch.setattr(data_cache, "source_key", replaced)
    with pytest.raises(DataError, match="changed while it was read"): prepare(path, tokenizer, cache_dir=tmp_path/"cache", show=False)
    assert len(calls) == 2 and not (tmp_path/"cache").exists()


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_a_full_disk_is_said_and_leaves_nothing(tokenizer, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path/"temporary"))
    (tmp_path/"temporary").mkdir()
    with file_limit(100_000), pytest.raises(RunError, match="(?s)cannot write .*the disk is full.*Free some space"):
        prepare(rows(5000), tokenizer, cache_dir=tmp_path/"cache" if cache else None, show=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and folders(tmp_path/"temporary") == []


# ---- memory -----------------------------------------------------------------------------------------------------------

PEAK = ("import sys; from pathlib import Path; from sage_finetune.data.dataset import prepare; "
        "from transformers import AutoTokenizer; from sage_finetune.config import tiny_path\n"
        "tokenizer = AutoTokenizer.from_pretrained(tiny_path()); prepare('example', tokenizer, show=False)\n"
        "def memory(which): return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() "
        "if line.startswith(which)) / 1024\n"
        "before = memory('VmRSS'); made = prepare(sys.argv[1], tokenizer, show=False); print(len(made.train), memory('VmHWM') - before)")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_four_times_the_rows_need_no_more_memory(tmp_path):
    "A list of Python integers would need a hundred megabytes more"
    peaks = []
    for count in (20_000, 80_000):
        with open(tmp_path/"rows.jsonl", "w") as file:
            for row in rows(count): file.write(json.dumps(row | dict(output=row["output"] * 4)) + "\n")
        child = subprocess.run([sys.executable, "-c", PEAK, "rows.jsonl"], cwd=tmp_path, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        made, peak = child.stdout.split()
        assert int(made) == count
        peaks.append(float(peak))
    assert peaks[1] < 200 and peaks[1] - peaks[0] < 25, peaks
