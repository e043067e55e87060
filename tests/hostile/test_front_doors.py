"""Whatever somebody passes at a public door works as they mean it, or is refused in one sentence of ours."""
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import rows, write_rows

import sage_finetune as sf
from sage_finetune import LoRATrainer, PresetConfigs, TrainingConfig
from sage_finetune.chat_format.rendering import render_prompt
from sage_finetune.cli import main
from sage_finetune.core.errors import ConfigError, DataError, FinetuneError
from sage_finetune.core.storage import describe_write_error, write_atomic
from sage_finetune.modeling.base import load_base
from sage_finetune.modeling.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
TEXTS = [f"Lamp {at} is lit at dusk and put out at dawn." for at in range(8)]
IDS = [TOKENIZER(text)["input_ids"] for text in TEXTS]
TALKS = [[dict(role="user", content=f"Which lamp is {at}?"), dict(role="assistant", content="The red one.")] for at in range(8)]
MASKED = [dict(input_ids=ids, labels=[-100] * 4 + ids[4:]) for ids in IDS]


def little(folder, **more):
    "A config of two steps on what the test brings"
    return PresetConfigs.tiny(
        **dict(output_dir=folder/"run", data_path=None, eval_ratio=0., max_steps=2, per_device_train_batch_size=4, device="cpu") | more)


def sentence(error):
    "One sentence of ours, with a way out: no traceback, no Python class of another library"
    said = str(error)
    assert (isinstance(error, FinetuneError) and said and "\n" not in said and "object at 0x" not in said
        and said.rstrip().endswith((".", "?", ")", '"'))), repr(error)
    return said


# ---- prepare_data ------------------------------------------------------------------------------------------------------

class Torch(torch.utils.data.Dataset):
    "A map-style data set"
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, at): return self.rows[at]


class Stream(torch.utils.data.IterableDataset):
    "One that is only read in order"
    def __init__(self, rows): self.rows = rows
    def __iter__(self): return iter(self.rows)


def padded():
    "What a tokenizer makes of several texts at once: one tensor, filled up on the right"
    return TOKENIZER(["Ada keeps the light.", *TEXTS[:7]], padding=True, return_tensors="pt")


BROUGHT = {
    "texts": lambda: TEXTS, "text rows": lambda: [dict(text=text) for text in TEXTS], "a tuple of texts": lambda: tuple(TEXTS),
    "instruction rows": lambda: rows(8),
    "conversations": lambda: [dict(messages=talk) for talk in TALKS], "bare conversations": lambda: TALKS,
    "question rows": lambda: [dict(question="a?", answer="b.")] * 8,
    "input_ids": lambda: [dict(input_ids=ids) for ids in IDS], "lists of ids": lambda: IDS, "labels too": lambda: MASKED,
    "tensors": lambda: [{name: torch.tensor(value) for name, value in row.items()} for row in MASKED],
    "tensors of one row each": lambda: [dict(TOKENIZER(text, return_tensors="pt")) for text in TEXTS], "a batch of tensors": padded,
    "a tokenizer's lists": lambda: TOKENIZER(TEXTS),
    "numpy arrays": lambda: [dict(input_ids=np.array(ids), attention_mask=np.ones(len(ids), bool)) for ids in IDS],
    "a dict of columns": lambda: dict(text=TEXTS),
    "a torch Dataset": lambda: Torch(MASKED), "a torch Dataset of texts": lambda: Torch(TEXTS), "a torch stream": lambda: Stream(MASKED),
    "a subset": lambda: torch.utils.data.Subset(Torch(MASKED), range(8)),
    "a Dataset": lambda: datasets.Dataset.from_list(rows(8)), "a Dataset of tokens": lambda: datasets.Dataset.from_list(MASKED),
    "a Dataset in torch's format": lambda: datasets.Dataset.from_list(MASKED).with_format("torch"),
    "a Dataset with a transform": lambda: datasets.Dataset.from_dict(dict(text=TEXTS)).with_transform(
        lambda batch: TOKENIZER(batch["text"])),
    "an IterableDataset": lambda: datasets.Dataset.from_list(rows(8)).to_iterable_dataset(),
    "a DatasetDict": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(rows(8))),
    "a generator": lambda: (row for row in rows(8)), "a generator of ids": lambda: iter(IDS), "a map": lambda: map(str, TEXTS),
    "a DataFrame": lambda: pd.DataFrame(rows(8)),
    "a DataFrame of tokens": lambda: pd.DataFrame(MASKED), "an arrow table": lambda: datasets.Dataset.from_list(rows(8)).data.table,
    "prepared": lambda: sf.prepare_dataset(rows(8), TOKENIZER, show=False)}


@pytest.mark.parametrize("way", ["returned", "set", "set as train_dataset"])
@pytest.mark.parametrize("kind", BROUGHT)
def test_data_of_ones_own_is_taken_in_every_shape(kind, way, tmp_path):
    "Set up only: what comes out are examples that the loop takes; one of each family is trained below"
    class Mine(LoRATrainer):
        def prepare_data(self):
            if way == "returned": return BROUGHT[kind]()
            setattr(self, "dataset" if way == "set" else "train_dataset", BROUGHT[kind]())
    trainer = Mine(little(tmp_path)).setup()
    assert len(trainer.dataset) == 8 and trainer.eval_dataset is None
    for row in map(trainer.dataset.__getitem__, range(8)):
        assert (len(row["input_ids"]) == len(row["labels"]) and any(label != -100 for label in row["labels"])
            and all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"])))


@pytest.mark.parametrize("kind", ["texts", "instruction rows", "lists of ids", "a batch of tensors", "a torch Dataset",
    "a Dataset in torch's format", "an IterableDataset", "a DataFrame"])
def test_data_of_ones_own_is_trained_on(kind, tmp_path):
    class Mine(LoRATrainer):
        def prepare_data(self): return BROUGHT[kind]()
    result = Mine(little(tmp_path)).train(show=False)
    assert result.steps == 2 and result.target_tokens and (result.lora_dir/"adapter_model.safetensors").exists()


def test_padding_is_never_trained_on(tmp_path):
    "With a mask, and without one"
    class Mine(LoRATrainer):
        def prepare_data(self): return padded()
    masked = Mine(little(tmp_path)).setup().dataset
    Mine.prepare_data = lambda self: padded()["input_ids"]
    bare = Mine(little(tmp_path)).setup().dataset
    assert list(masked["labels"]) == list(bare["labels"]) == [TOKENIZER(text)["input_ids"] for text in ["Ada keeps the light.", *TEXTS[:7]]]


def test_that_labels_were_missing_is_said(tmp_path):
    class Mine(LoRATrainer):
        def prepare_data(self): self.dataset = [dict(input_ids=ids) for ids in IDS]
    assert "8 rows have no labels, so all of their tokens are trained on" in str(Mine(little(tmp_path)).describe())


PAIRS = {"a pair": lambda: (rows(8), rows(4)), "splits": lambda: dict(train=rows(8), test=rows(4)),
    "tokens and texts": lambda: (MASKED, TEXTS[:4]),
    "a DatasetDict": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(MASKED),
        validation=datasets.Dataset.from_list(MASKED[:4])),
    "a frame and nothing": lambda: (pd.DataFrame(rows(8)), None)}


@pytest.mark.parametrize("kind", PAIRS)
def test_evaluation_data_comes_along(kind, tmp_path):
    class Mine(LoRATrainer):
        def prepare_data(self): return PAIRS[kind]()
    trainer = Mine(little(tmp_path)).setup()
    assert len(trainer.dataset) == 8 and (trainer.eval_dataset is None if "nothing" in kind
        else len(trainer.eval_dataset) == 4 and trainer.evaluate() > 0)


def test_an_eval_dataset_that_was_set_is_taken_too(tmp_path):
    class Mine(LoRATrainer):
        def prepare_data(self): self.dataset, self.eval_dataset = TEXTS, [dict(text=text) for text in TEXTS[:3]]
    result = Mine(little(tmp_path)).train(show=False)
    assert len(result.eval_losses) == 1


def test_a_dataset_that_is_set_from_outside(tmp_path):
    trainer = LoRATrainer(little(tmp_path))
    trainer.dataset = TEXTS
    assert trainer.train(show=False).steps == 2


REFUSED = {
    "nothing": (lambda: None, "gave no data"), "an empty list": (list, "gave no rows"), "a number": (lambda: 7, "a int"),
    "numbers in a list": (lambda: [.5, 1.5], "row 1"), "a class": (lambda: Torch, "holds no rows"),
    "a function": (lambda: rows, "holds no rows"), "one row": (lambda: dict(instruction="a", output="b"), "Put rows into a list"),
    "None among rows": (lambda: [*TEXTS, None], "row 9"),
    "labels of another length": (lambda: [dict(input_ids=[5, 6, 7], labels=[5, 6])], "3 input_ids and 2 labels"),
    "a mask of another length": (lambda: [dict(input_ids=[5, 6], attention_mask=[1])], "2 input_ids and 1 attention_mask"),
    "an id beyond the vocabulary": (lambda: [dict(input_ids=[5, 10**6])], "1000000 among its input_ids"),
    "a negative id": (lambda: [dict(input_ids=[5, -1])], "-1 among its input_ids"),
    "a label that is none": (lambda: [dict(input_ids=[5, 6], labels=[5, -1])], "-1 among its labels"),
    "nothing to train on": (lambda: [dict(input_ids=[5, 6], labels=[-100, -100])], "token to train on"),
    "only the first token": (lambda: [dict(input_ids=[5, 6], labels=[5, -100])], "token to train on"),
    "no tokens": (lambda: [dict(input_ids=[])], "token to train on"), "floats": (lambda: [dict(input_ids=[.5])], "whole numbers"),
    "text as ids": (lambda: [dict(input_ids="abc")], "whole numbers"),
    "some rows without ids": (lambda: [dict(input_ids=[5, 6]), dict(text="a")], "row 2"),
    "a DataLoader": (lambda: torch.utils.data.DataLoader(Torch(MASKED)), "loader.dataset"),
    "splits without train": (lambda: datasets.DatasetDict(a=datasets.Dataset.from_list(MASKED), b=datasets.Dataset.from_list(MASKED)),
        "none is called train"),
    "a file that is not there": (lambda: "nowhere.jsonl", "nowhere.jsonl"),
    "rows of no format": (lambda: [dict(colour="red")], "colour"),
    "all masked": (lambda: [dict(input_ids=[5, 6], attention_mask=[0, 0])], "token to train on"),
    "a scalar": (lambda: torch.tensor(5), "holds no rows")}


@pytest.mark.parametrize("kind", REFUSED)
def test_data_that_cannot_be_trained_on_is_refused(kind, tmp_path):
    given, expected = REFUSED[kind]
    class Mine(LoRATrainer):
        def prepare_data(self): return given()
    with pytest.raises((ConfigError, DataError)) as caught: Mine(little(tmp_path)).train(show=False)
    assert expected in sentence(caught.value)


@pytest.mark.parametrize("overlong, examples, longest", [("drop_turns", 1, 5), ("drop", 1, 5), ("truncate", 2, 16)])
def test_rows_of_tokens_that_are_too_long(overlong, examples, longest, tmp_path):
    class Mine(LoRATrainer):
        def prepare_data(self): return [list(range(5, 45)), [5, 6, 7, 8, 9]]
    trainer = Mine(little(tmp_path, max_length=16, overlong=overlong)).setup()
    assert len(trainer.dataset) == examples and max(map(len, trainer.dataset["input_ids"])) == longest and trainer.report.overlong
    with pytest.raises(DataError, match="row 1 .* 40 tokens"): Mine(little(tmp_path, max_length=16, overlong="error")).setup()


def test_a_stream_without_end_is_refused(tmp_path, monkeypatch):
    import itertools

    from sage_finetune.data import own_data
    monkeypatch.setattr(own_data, "_MOST_ROWS", 1000)
    with pytest.raises(DataError, match="more than 1,000 rows"): own_data.own_rows(itertools.cycle(TEXTS))


# ---- the other methods of the trainer ------------------------------------------------------------------------------------

def loads(self): return load_base(self.config)
def loads_exchanged(self): return load_base(self.config)[::-1]
def loads_as_dict(self): return dict(zip(("model", "tokenizer"), load_base(self.config)))
def adapts(self): return sf.attach_lora(self.model, self.config.lora)
def saves(self, path): self.model.save_pretrained(path)
def saves_perhaps(self, output_dir=None): LoRATrainer.save_model(self, output_dir)
def sets_up(self): LoRATrainer.setup_trainer(self); return "done"
def trains(self): return dict(steps=LoRATrainer.train(self, show=False).steps)


@pytest.mark.parametrize("name, method", [("load_model_and_tokenizer", loads), ("load_model_and_tokenizer", loads_exchanged),
    ("load_model_and_tokenizer", loads_as_dict), ("apply_lora", adapts), ("save_model", saves),
    ("save_model", saves_perhaps), ("setup_trainer", sets_up)])
def test_methods_may_return_what_they_make(name, method, tmp_path):
    Mine = type("Mine", (LoRATrainer,), {name: method})
    result = Mine(little(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl"))).train(show=False)
    assert result.steps == 2 and (result.lora_dir/"adapter_model.safetensors").exists()


def test_train_may_return_what_it_likes(tmp_path):
    Mine = type("Mine", (LoRATrainer,), dict(train=trains))
    assert Mine(little(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl"))).train() == dict(steps=2)


def test_the_adapter_can_be_saved_elsewhere(tmp_path):
    trainer = LoRATrainer(little(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl"))).setup()
    trainer.save_model(tmp_path/"elsewhere")
    assert (tmp_path/"elsewhere"/"adapter_model.safetensors").exists()


@pytest.mark.parametrize("name, method, expected", [
    ("load_model_and_tokenizer", lambda self: None, "there is no model"),
    ("load_model_and_tokenizer", lambda self: load_base(self.config)[0], "there is no tokenizer"),
    ("load_model_and_tokenizer", lambda self: setattr(self, "model", "tiny"), "there is no model"),
    ("apply_lora", lambda self: None, "has no adapter"), ("apply_lora", lambda self: self, "has no adapter"),
    ("setup_trainer", lambda self: None, "super().setup_trainer()"), ("prepare_data", lambda self, folder: folder, "cannot be called"),
    ("load_model_and_tokenizer", lambda self, name, kind: None, "cannot be called")])
def test_methods_that_leave_something_out_are_told(name, method, expected, tmp_path):
    Mine = type("Mine", (LoRATrainer,), {name: method})
    with pytest.raises(ConfigError) as caught: Mine(little(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl"))).train(show=False)
    assert expected in sentence(caught.value)


# ---- natural wrong types ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run, opened: folder, config, result, model, tokenizer"
    folder = tmp_path_factory.mktemp("doors")
    config = little(folder, data_path=write_rows(folder/"rows.jsonl"))
    result = LoRATrainer(config).train(show=False)
    return folder/"run", config, result, *sf.load_run(folder/"run")


WORKS = {
    "generate with a text": lambda folder, config, result, model, tok: "".join(sf.generate(model, tok, "hi", max_new_tokens=4)) is not None,
    "generate with a turn": lambda folder, config, result, model,
    tok: list(sf.generate(model, tok, dict(role="user", content="hi"), max_new_tokens=4)) is not None,
    "generate_batch with a text": lambda folder, config, result, model, tok: len(sf.generate_batch(model, tok, "hi", max_new_tokens=2))
        == 1,
    "generate_batch with a conversation": lambda folder, config, result, model,
    tok: len(sf.generate_batch(model, tok, TALKS[0][:1], max_new_tokens=2)) == 1,
    "generate_batch with both": lambda folder, config, result, model,
    tok: len(sf.generate_batch(model, tok, ["hi", TALKS[0][:1]], max_new_tokens=2)) == 2,
    "generate_batch with nothing": lambda folder, config, result, model, tok: sf.generate_batch(model, tok, []) == [],
    "compare with a text": lambda folder, config, result, model, tok: sf.compare(model, tok, "hi", max_new_tokens=2).rows[0][0] == "hi",
    "accuracy with a row": lambda folder, config, result, model, tok: sf.accuracy(model, tok, rows(1)[0], max_new_tokens=2).total == 1,
    "accuracy with a file": lambda folder, config, result, model,
    tok: sf.accuracy(model, tok, config.data_path, max_new_tokens=2).total == 24,
    "render_prompt with a text": lambda folder, config, result, model,
    tok: render_prompt("hi", tok) == render_prompt([dict(role="user", content="hi")], tok),
    "load_run with a config": lambda folder, config, result, model, tok: len(sf.load_run(config)) == 2,
    "load_run with a result": lambda folder, config, result, model, tok: len(sf.load_run(result)) == 2,
    "load_run with a trainer": lambda folder, config, result, model, tok: len(sf.load_run(LoRATrainer(config))) == 2,
    "merge with a config": lambda folder, config, result, model, tok: sf.merge(config).agrees, "plot_run with a config": lambda folder,
    config, result, model, tok: sf.plot_run(config) is not None,
    "compare_runs with a result": lambda folder, config, result, model, tok: sf.compare_runs(result) is not None,
    "run_status with a result": lambda folder, config, result, model, tok: sf.run_status(result).state == "completed",
    "stop_run with a config": lambda folder, config, result, model, tok: sf.stop_run(config) is False,
    "a trainer from a dict": lambda folder, config, result, model, tok: LoRATrainer(config.to_dict()).config == config,
    "follow with a config": lambda folder, config, result, model, tok: len(list(sf.follow(config))) == 2}


@pytest.mark.parametrize("call", WORKS)
def test_what_is_clear_works(call, run): assert WORKS[call](*run)


SAID = {
    "exchanged": lambda run, model, tok: list(sf.generate(tok, model, "hi")), "exchanged in answers": lambda run, model,
    tok: sf.generate_batch(tok, model, ["hi"]), "exchanged in compare": lambda run, model, tok: sf.compare(tok, model, ["hi"]),
    "exchanged in accuracy": lambda run, model, tok: sf.accuracy(tok, model, rows(1)), "exchanged in Chat": lambda run, model,
    tok: sf.Chat(tok, model), "exchanged in SideBySide": lambda run, model, tok: sf.SideBySide(tok, model),
    "exchanged in logprob_diff": lambda run, model, tok: sf.logprob_diff(tok, model, TALKS[0]), "a folder for a model": lambda run, model,
    tok: sf.Chat(run, tok), "None for a tokenizer": lambda run, model, tok: sf.generate_batch(model, None, ["hi"]),
    "the pair for a model": lambda run, model, tok: sf.Chat((model, tok), None), "a prompt first": lambda run, model,
    tok: sf.generate_batch("hi", model, tok), "a number to say": lambda run, model, tok: sf.Chat(model, tok)(7),
    "nothing to say": lambda run, model, tok: sf.Chat(model, tok).stream(None), "numbers as prompts": lambda run, model,
    tok: sf.generate_batch(model, tok, [1, 2]), "None as prompts": lambda run, model, tok: sf.generate_batch(model, tok, None),
    "texts in a conversation": lambda run, model, tok: sf.generate(model, tok, ["hi"]), "a number to generate from": lambda run, model,
    tok: sf.generate(model, tok, 5), "an empty conversation": lambda run, model, tok: sf.generate(model, tok, []),
    "render a text": lambda run, model, tok: sf.render("hi", tok), "render None": lambda run, model, tok: sf.render(None, tok),
    "render without tokenizer": lambda run, model, tok: sf.render(TALKS[0], "tiny"), "render_all a text": lambda run, model,
    tok: sf.render_all("hi", tok),
    "logprob_diff of a text": lambda run, model, tok: sf.logprob_diff(model, tok, "hi"), "accuracy of numbers": lambda run, model,
    tok: sf.accuracy(model, tok, [1, 2]), "accuracy of None": lambda run, model, tok: sf.accuracy(model, tok, None),
    "prepare_dataset of a text": lambda run, model, tok: sf.prepare_dataset("text", tok), "prepare_dataset of None": lambda run, model,
    tok: sf.prepare_dataset(None, tok), "prepare_dataset exchanged": lambda run, model, tok: sf.prepare_dataset(tok, rows(3)),
    "prepare_dataset with a model": lambda run, model, tok: sf.prepare_dataset(rows(3), model), "prepare_dataset with a name": lambda run,
    model, tok: sf.prepare_dataset(rows(3), "tiny"),
    "load_training_data of a number": lambda run, model, tok: sf.load_training_data(5), "load_training_data of None": lambda run, model,
    tok: sf.load_training_data(None), "load_training_data of a row": lambda run, model, tok: sf.load_training_data(rows(1)[0]),
    "load_training_data of bytes": lambda run, model, tok: sf.load_training_data(b"rows.jsonl"), "load_training_data of texts": lambda run,
    model, tok: sf.load_training_data(["a"]), "a trainer from a folder": lambda run, model, tok: LoRATrainer(run),
    "a trainer from a text": lambda run, model, tok: LoRATrainer("finetune_output/run"), "a trainer from a preset": lambda run, model,
    tok: LoRATrainer(PresetConfigs.rtx_3060), "a trainer from a class": lambda run, model, tok: LoRATrainer(TrainingConfig),
    "a trainer from None": lambda run, model, tok: LoRATrainer(None), "a trainer from a dict of nonsense": lambda run, model,
    tok: LoRATrainer(dict(nonsense=1)), "a trainer from a dict of numbers": lambda run, model, tok: LoRATrainer({1: 2}),
    "open None": lambda run, model, tok: sf.load_run(None), "open a number": lambda run, model, tok: sf.load_run(7),
    "open the class": lambda run, model, tok: sf.load_run(TrainingConfig), "open nothing": lambda run, model, tok: sf.load_run(""),
    "merge a model": lambda run, model, tok: sf.merge(model), "merge to a number": lambda run, model, tok: sf.merge(run, out=7),
    "merge to nothing": lambda run, model, tok: sf.merge(run, out=""),
    "no output_dir": lambda run, model, tok: TrainingConfig(output_dir=None), "an empty output_dir": lambda run, model,
    tok: TrainingConfig(output_dir=""), "no lora": lambda run, model, tok: TrainingConfig(lora=None), "a number for lora": lambda run,
    model, tok: TrainingConfig(lora=8),
    "an unknown task": lambda run, model, tok: sf.quickstart("nope"), "no task": lambda run, model, tok: sf.quickstart(None),
    "a folder for a task": lambda run, model, tok: sf.quickstart(run), "train_from_meta of a config's class": lambda run, model,
    tok: sf.train_from_meta(TrainingConfig),
    "train_from_meta of None": lambda run, model, tok: sf.train_from_meta(None), "start_run of None": lambda run, model,
    tok: sf.start_run(None), "stop_run of a number": lambda run, model, tok: sf.stop_run(3), "run_status of a list": lambda run, model,
    tok: sf.run_status([run]),
    "plot_run of None": lambda run, model, tok: sf.plot_run(None), "compare_runs of None": lambda run, model, tok: sf.compare_runs(None),
    "estimate_memory of a preset": lambda run, model, tok: sf.estimate_memory(PresetConfigs.rtx_3060),
    "estimate_memory of a folder": lambda run, model, tok: sf.estimate_memory(run), "load_base of a name": lambda run, model,
    tok: sf.load_base("tiny"), "load_base of a preset": lambda run, model, tok: sf.load_base(PresetConfigs.tiny),
    "attach_lora with a config": lambda run, model, tok: sf.attach_lora(model, PresetConfigs.tiny()),
    "attach_lora to a tokenizer": lambda run, model, tok: sf.attach_lora(tok, PresetConfigs.tiny().lora), "a form of a preset": lambda run,
    model, tok: sf.ConfigForm(PresetConfigs.tiny),
    "a studio of a folder": lambda run, model, tok: sf.Studio(7),
    "load_cached_model of None": lambda run, model, tok: sf.load_cached_model(None),
    "to_messages of a text": lambda run, model, tok: sf.to_messages("hi"), "to_messages of None": lambda run, model,
    tok: sf.to_messages(None),
    "health_report of None": lambda run, model, tok: sf.health_report(None, tokenizer=tok), "adapter_scale of a tokenizer": lambda run,
    model, tok: sf.adapter_scale(tok, 0).__enter__()}


@pytest.mark.parametrize("call", SAID)
def test_what_is_not_clear_is_said(call, run):
    folder, _, _, model, tokenizer = run
    with pytest.raises(FinetuneError) as caught: SAID[call](folder, model, tokenizer)
    sentence(caught.value)


# ---- names --------------------------------------------------------------------------------------------------------------

BAD_NAMES = {"empty": "", "300 letters": "x" * 300, "300 letters below": "runs/" + "y" * 300,
    "128 letters of three bytes": "\N{EURO SIGN}" * 128, "NUL": "a\0b", "too deep": "d/" * 2500}
NAMES = {"a newline": "first\nsecond", "an emoji": "run \N{OWL}", "a dash": "-rf", "255 letters": "z" * 255,
    "quotes": "it's \"run\"", "dots": "a..b", "a dot at the end": "run."}
PLACES = {
    "output_dir": lambda name: TrainingConfig(output_dir=name), "data_path": lambda name: TrainingConfig(data_path=name),
    "data_cache": lambda name: TrainingConfig(data_cache=name), "model_name": lambda name: load_tokenizer(name), "load_run": sf.load_run,
    "train_from_meta": sf.train_from_meta, "merge": sf.merge, "run_status": sf.run_status, "stop_run": sf.stop_run,
    "start_run": sf.start_run,
    "plot_run": sf.plot_run, "load_training_data": sf.load_training_data, "load_cached_model": sf.load_cached_model,
    "continue_from": lambda name: TrainingConfig(continue_from=name),
    "quickstart": lambda name: sf.quickstart("custom", name, data="example", show=False),
    "quickstart's data": lambda name: sf.quickstart("custom", "run", data=name, show=False),
    "code_root": lambda name: sf.quickstart("code", "run", code_root=name, show=False),
    "write_atomic": lambda name: write_atomic(name, "text"),
    "list_runs": lambda name: __import__("sage_finetune.runs.folder").runs.folder.list_runs(name)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_is_said(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FinetuneError) as caught: PLACES[place](BAD_NAMES[name])
    assert len(sentence(caught.value)) < 500 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_that_can_be_works(name, tmp_path):
    "Written, listed, opened and merged under it"
    folder = tmp_path/NAMES[name]
    config = little(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl"), max_steps=1)
    config.output_dir = folder
    LoRATrainer(config).train(show=False)
    assert sf.run_status(folder).state == "completed" and len(sf.load_run(folder)) == 2


@pytest.mark.parametrize("name", [".", "..", "a/../b"])
def test_dots_are_folders(name, tmp_path, monkeypatch):
    (tmp_path/"a").mkdir()
    monkeypatch.chdir(tmp_path/"a")
    with pytest.raises(FinetuneError) as caught: sf.load_run(name)
    sentence(caught.value)


@pytest.mark.parametrize("number, expected", [("ENAMETOOLONG", "a shorter one"), ("EISDIR", "a folder stands there"),
    ("ELOOP", "leads in a circle"), ("EINVAL", "takes no such name"), ("EROFS", "no permission"), ("ENOSPC", "is full"),
    ("EIO", "Choose another")])
def test_every_reason_not_to_write_has_a_sentence(number, expected):
    import errno
    import os
    code = getattr(errno, number)
    assert expected in describe_write_error("run/x.json", OSError(code, os.strerror(code)))


# ---- the program ----------------------------------------------------------------------------------------------------------

def program(*arguments, cwd, module="sage_finetune"):
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=120)


@pytest.mark.parametrize("module", ["sage_finetune", "sage_finetune.cli"])
def test_the_package_is_a_program(module, tmp_path):
    helped, version, nowhere, unknown = (program(*arguments, cwd=tmp_path, module=module)
        for arguments in (["--help"], ["--version"], ["list", "nowhere"], ["nowhere"]))
    assert helped.returncode == 0 and "sage-finetune" in helped.stdout and version.stdout.strip() == sf.__version__
    assert (nowhere.returncode == 2 and nowhere.stderr.startswith("error: there is no folder nowhere")
        and unknown.returncode == 2 and "there is no command 'nowhere'" in unknown.stderr)


COMMANDS = [("list",), ("run",), ("merge",), ("chat",), ("doctor", "--no-online"), ("data",), ("quickstart", "custom", "-o"),
    ("quickstart", "custom", "-d"), ("quickstart", "code", "--code-root"), ("data", "example", "-m"), ("merge", "run", "-o")]


@pytest.mark.parametrize("name", ["300 letters", "300 letters below"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_bad_name_on_the_command_line_is_a_sentence(command, name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main([*command, BAD_NAMES[name]]) == 2
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out and (said.err + said.out).strip(), said


@pytest.mark.slow
@pytest.mark.parametrize("command", [("run",), ("quickstart", "code", "--code-root")], ids=" ".join)
def test_a_bad_name_in_a_shell_is_a_sentence(command, tmp_path):
    said = program(*command, BAD_NAMES["300 letters below"], cwd=tmp_path)
    assert said.returncode == 2 and "Traceback" not in said.stderr + said.stdout, said.stdout + said.stderr


def test_nothing_advises_a_name_of_the_index_that_may_be_somebody_elses(root):
    "What is missing is named itself, or this project by its address or folder"
    import json
    import re
    advice = re.compile(r"pip3? install[^\n|]*?(?<![\w/.])sage[-_]finetune(?!\s*@)(\[|\b(?!/|\.))")
    texts = {path: path.read_text(encoding="utf-8") for pattern in ("*.md", "*.txt", "sage_finetune/**/*.py", "benchmarks/**/*.md")
        for path in root.glob(pattern)}
    texts |= {path: "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        for path in (root/"nbs").rglob("*.ipynb") if path.name[0] not in "._"}
    found = [f"{path.relative_to(root)}: {match[0]}" for path, text in texts.items() for match in advice.finditer(text)]
    assert not found and advice.search('pip install "sage-finetune[wandb]"') and advice.search(
        "pip install -c constraints.txt sage-finetune") and not advice.search('pip install "sage-finetune @ git+https://x/sage-finetune"')
