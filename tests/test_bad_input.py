"""What goes wrong ends in one sentence that names the place, the value and the way out, with exit code 2, and leaves everything as it was."""
import json
import os
import re
import shutil
import subprocess

import pytest
from helpers import adapter, change, copy, file_limit, leftovers, metrics, mounted, one_sentence, prepared, recipe, rows, start, status, tree, write_rows

from sage_finetune import LoRATrainer, PresetConfigs, TrainingConfig, merge, train_from_meta
from sage_finetune.cli import main
from sage_finetune.config import ConfigError, ModelError, RunError
from sage_finetune.model import tiny_path
from sage_finetune.runs import read_meta


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of four steps, a checkpoint after each; tests take copies"
    return prepared(tmp_path_factory.mktemp("ready")/"run", max_steps=4, save_steps=1, save_total_limit=9)


@pytest.fixture(scope="module")
def finished(ready):
    "The same, trained and merged; tests take copies"
    run = copy(ready, ready.parent/"finished")
    train_from_meta(run, show=False)
    merge(run)
    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    "Run the program below tmp_path: it must end with 2, say one sentence with all these words, and change nothing"
    monkeypatch.chdir(tmp_path)
    def check(*arguments, says, changes=()):
        before = tree(tmp_path)
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        sentence = one_sentence(capfd.readouterr().err)
        for part in [says] if isinstance(says, str) else says: assert re.search(part, sentence), (part, sentence)
        after = tree(tmp_path)
        assert {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)} == set(changes)
        return sentence
    return check


# ---- data -------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(rows(1)[0])
BAD_DATA = [  # name, content, what the sentence says
    ("empty.jsonl", "", ["empty.jsonl holds no rows", "Put at least one"]),
    ("empty.json", "[]", ["empty.json holds no rows", "Put at least one"]),
    ("blank.jsonl", "\n  \n\n", ["blank.jsonl holds no rows"]),
    ("cut.jsonl", GOOD + "\n" + GOOD[:20], ["cut.jsonl, line 2: this is not JSON", "Mend or remove the line"]),
    ("cut.json", f"[{GOOD},\n {GOOD[:20]}", ["cut.json, line 2: this is not JSON", "Mend"]),
    ("prose.json", "Dear model, please learn this.", ["prose.json, line 1: this is not JSON"]),
    ("single.json", GOOD, ["single.json holds one JSON dict, not a list of rows", r"Put \[ and \]"]),
    ("binary.jsonl", b"\xff\xfe\x00\x01", ["binary.jsonl is not UTF-8", "Save it as UTF-8"]),
    ("keys.jsonl", GOOD + '\n{"instructon": "a", "output": "b"}', ["keys.jsonl, row 2", "instructon", "'instruction'"]),
    ("half.json", json.dumps([dict(question="a")]), ["half.json, row 1", "'question'", "also needs 'answer'", "Add it"]),
    ("foreign.csv", "colour,size\nred,3\n", ["foreign.csv, row 1", "'colour', 'size'", "instruction"]),
    ("numbers.json", "[1, 2]", ["numbers.json, row 1", "object", "int"]),
    ("silent.jsonl", json.dumps(dict(instruction="a", output=" ")), ["silent.jsonl, row 1", "answer .* is empty", "Remove the row or write its answer"]),
    ("talk.jsonl", json.dumps(dict(messages=[dict(role="usr", content="a")])), ["talk.jsonl, row 1", "role 'usr'", "known roles are .*user"]),
    ("rows.txt", GOOD, [r"rows.txt: files of kind '\.txt'", r"Use \.json"]),
    ("rows.parquet", "not parquet", ["rows.parquet is not a readable parquet file"]),
]


@pytest.mark.parametrize("name, content, says", BAD_DATA, ids=[case[0] for case in BAD_DATA])
def test_bad_data_is_refused_before_a_folder_is_made(refused, tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("quickstart", "custom", "-d", name, "-o", "out", says=says)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/such/folder/rows.json"])
def test_a_data_file_that_is_not_there(refused, name):
    refused("quickstart", "custom", "-d", name, "-o", "out", says=[f"there is no data file {name}", 'Check data_path; the packaged example is data_path="example"'])


def test_a_folder_instead_of_a_data_file(refused, tmp_path):
    (tmp_path/"rows.json").mkdir()
    refused("quickstart", "custom", "-d", "rows.json", "-o", "out", says=["rows.json"])


def test_rows_that_do_not_suit_the_task(refused, tmp_path):
    write_rows(tmp_path/"rows.jsonl")
    refused("quickstart", "qa", "-d", "rows.jsonl", "-o", "out", says=["rows.jsonl, row 1", "'alpaca'", "task qa", "Use task custom"])
    refused("quickstart", "qa", "-o", "out", says=["task qa needs a data file", "Name it with data"])


@pytest.mark.parametrize("spoil, says", [
    (lambda data: data.unlink(), ["there is no data file .*training_data_custom_alpaca.json", "Check data_path"]),
    (lambda data: data.write_text(""), ["training_data_custom_alpaca.json", "not JSON|no rows"]),
    (lambda data: data.write_text(data.read_text()[:-9]), ["training_data_custom_alpaca.json, line", "not JSON"]),
    (lambda data: data.write_text('[{"instruction": "a", "ouput": "b"}]'), ["training_data_custom_alpaca.json, row 1", "'output'"]),
    (lambda data: data.write_text(json.dumps([dict(rows(1)[0], output="word " * 600)])), ["fits into max_length=512", "Raise max_length or shorten"])], ids=["gone", "empty", "cut", "keys", "long"])
def test_a_prepared_run_whose_data_went_bad(refused, tmp_path, ready, spoil, says):
    run = copy(ready, tmp_path/"run")
    spoil(run/"training_data_custom_alpaca.json")
    refused("run", "run", says=says)


# ---- model ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(tmp_path): return copy(tiny_path(), tmp_path/"model")


def without(*names): return lambda model: [(model/name).unlink() for name in names]


def halve(name): return lambda model: (model/name).write_bytes((model/name).read_bytes()[:5000])


BAD_MODELS = {  # what is wrong -> (how to make it so, what the sentence says)
    "no config": (without("config.json"), ["model", "config.json is missing", "Check model_name"]),
    "no config, other words": (lambda model: (model/"config.json").rename(model/"settings.json"), ["config.json is missing"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["tokenizer of model_name=", "lacks its files"]),
    "no tokenizer, other words": (without("tokenizer.json"), ["tokenizer of model_name="]),
    "no weights": (without("model.safetensors"), ["the model of model_name=", "lacks its files", "model.safetensors"]),
    "half the weights": (lambda model: (model/"model.safetensors").write_bytes((model/"model.safetensors").read_bytes()[:100_000]), ["the model of model_name="]),
    "half the config": (lambda model: (model/"config.json").write_text('{"model_type": "qwen2",'), ["model_name="]),
    "an unknown kind": (lambda model: (model/"config.json").write_text('{"model_type": "qwenty"}'), ["model_name=", "qwenty"]),
    "half the tokenizer": (halve("tokenizer.json"), ["tokenizer of model_name="]),
    "no template": (without("chat_template.jinja"), ["has no chat template", "Use an instruction-tuned model or set"])}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_model_folder_that_is_no_model(refused, tmp_path, ready, model, fault):
    spoil, says = BAD_MODELS[fault]
    spoil(model)
    run = copy(ready, tmp_path/"run")
    use_model(run, "./model")
    refused("run", "run", says=[r"\./model", *says])


def use_model(run, name):
    change(run, model_name=name)
    meta = json.loads((run/"finetune_meta.json").read_text())
    (run/"finetune_meta.json").write_text(json.dumps(dict(meta, model=name)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "models/of/mine"])
def test_a_model_folder_that_is_not_there(refused, tmp_path, ready, name):
    run = copy(ready, tmp_path/"run")
    use_model(run, name)
    refused("run", "run", says=[f"no model folder {name}", 'Check model_name; the packaged model is model_name="tiny"'])


def test_a_name_on_the_hub_without_network(refused, tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    use_model(run, "nobody/no-such-model")
    refused("run", "run", says=["model_name='nobody/no-such-model'", "check the spelling and the network", "HF_ENDPOINT"])


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model"])
def test_quickstart_makes_no_folder_for_a_model_that_is_not_there(refused, tmp_path, name):
    write_rows(tmp_path/"rows.jsonl")
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "out", "-m", name, says=[f"no model folder {name}", "Check model_name"])


def test_an_adapter_for_layers_the_model_does_not_have(refused, tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    change(run, lora=dict(target_modules=["query", "value"]))
    refused("run", "run", says=[r"lora.target_modules=\['query', 'value'\] fits no layer", "q_proj", '"all-linear" takes them all'])


# ---- settings ---------------------------------------------------------------------------------------------------------

def test_settings_that_do_not_exist():
    for wrong, says in [(lambda: TrainingConfig(learning_rat=1e-4), "learning_rat'.*'learning_rate'"), (lambda: PresetConfigs.tiny(epochs=3), "no field 'epochs'"),
                        (lambda: setattr(TrainingConfig(), "dataPath", "x"), "'dataPath'.*'data_path'"), (lambda: TrainingConfig(lora=dict(rank=8)), "LoRAConfig has no field 'rank'")]:
        with pytest.raises(ConfigError, match=says): wrong()
    from sage_finetune.config import preset
    for name in ("rtx_9999", "Tiny"):
        with pytest.raises(ConfigError, match=f"no preset '{name}'. There are: minimal, rtx_3060"): preset(name)


BAD_SETTINGS = [(dict(learning_rat=1e-4), ["training_config.json", "'learning_rat'", "'learning_rate'"]), (dict(lora=dict(rank=4)), ["training_config.json", "'rank'"]),
                (dict(learning_rate="fast"), ["learning_rate = 'fast'", "float, from"]), (dict(num_train_epochs=0), ["num_train_epochs = 0", "from 1"]),
                (dict(load_in_8bit=True, load_in_4bit=True), ["load_in_8bit", "load_in_4bit", "contradict", "Set one of them to False"]), (dict(fp16=True), ["fp16=True needs a graphics card", "None"])]


@pytest.mark.parametrize("fields, says", BAD_SETTINGS, ids=[next(iter(case[0])) for case in BAD_SETTINGS])
def test_a_config_file_with_a_wrong_setting(refused, tmp_path, ready, fields, says):
    run = copy(ready, tmp_path/"run")
    content = json.loads((run/"training_config.json").read_text())
    (run/"training_config.json").write_text(json.dumps(content | fields))
    refused("run", "run", says=says)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_file_that_is_no_config(refused, tmp_path, ready, content):
    run = copy(ready, tmp_path/"run")
    (run/"training_config.json").write_text(content)
    refused("run", "run", says=["training_config.json", r"config\.save\(path\)"])


def test_a_task_that_does_not_exist(refused):
    refused("quickstart", "poetry", "-o", "out", says=["poetry", "code, qa"])


# ---- folders ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_folder_that_cannot_be(refused, tmp_path, output):
    write_rows(tmp_path/"rows.jsonl")
    (tmp_path/"file").write_text("old")
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", output, says=[f"{output}( |:)", "file", "Choose another output_dir"])


@pytest.mark.parametrize("output", ["run", "run/below"])
def test_training_into_a_file(tmp_path, output):
    (tmp_path/"run").write_text("old")
    with pytest.raises(RunError, match="(?s)cannot write .*run.*Choose another output_dir"): LoRATrainer(recipe(tmp_path, output_dir=tmp_path/output, max_steps=1)).train(show=False)
    assert (tmp_path/"run").read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"run", "rows.jsonl"}


def test_a_disk_that_may_only_be_read(refused, tmp_path, ready):
    "Also for root, whom file permissions do not stop"
    run = copy(ready, tmp_path/"disk"/"run") if False else tmp_path/"disk"/"run"
    with mounted(tmp_path/"disk", "size=8m") as disk:
        copy(ready, run)
        write_rows(tmp_path/"rows.jsonl")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused("run", "disk/run", says=["cannot write .*disk/run", "no permission|read-only", "output_dir"])
        refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "disk/new", says=["cannot write .*disk/new", "no permission|read-only", "Choose an(other)? output_dir"])


def test_an_output_folder_that_holds_a_run(refused, tmp_path, finished):
    "In the words of each door"
    copy(finished, tmp_path/"run")
    write_rows(tmp_path/"rows.jsonl")
    refused("run", "run", says=["run already holds a run", "metrics.jsonl", "lora_weights", "Choose another output_dir", "resume"])
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "run", says=["run already holds a run", "Choose another output_dir", "overwrite"])


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=["again", "resume", "overwrite"])
def test_a_run_somebody_is_training(refused, tmp_path, finished, more):
    "A living process that says it trains there"
    run = copy(finished, tmp_path/"run")
    other = subprocess.Popen(["sleep", "600"])
    try:
        from datetime import datetime, timezone
        (run/"status.json").write_text(json.dumps(status(run) | dict(state="training", pid=other.pid, updated=datetime.now(timezone.utc).isoformat(timespec="seconds"))))
        refused("run", "run", *more, says=["in use", f"process {other.pid}", "Wait for it"])
    finally:
        other.kill()
        other.wait()


def test_folders_that_are_no_run(refused, tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"broken").mkdir()
    (tmp_path/"broken"/"finetune_meta.json").write_text('{"model": ')
    for command in ("run", "merge", "chat"):
        refused(command, "nowhere", says=["nowhere", "sage-finetune list"])
        refused(command, "empty", says=["empty", "sage-finetune (list|quickstart)"])
        refused(command, "broken", says=["finetune_meta.json cannot be read", "prepare the run anew"])
    refused("list", "nowhere", says=["no folder nowhere", "Name the folder"])


def test_too_early(refused, tmp_path, ready):
    copy(ready, tmp_path/"run")
    refused("merge", "run", says=["run holds no adapter yet", "sage-finetune run run"])
    refused("chat", "run", "-p", "Hi", says=["run holds no adapter yet", "sage-finetune run run"])
    refused("chat", "run", "-p", "Hi", "--merged", says=["merged_model holds no model", "sage-finetune merge run"])
    refused("run", "run", "--resume", says=["no checkpoint in .*checkpoints"])


def test_an_adapter_that_was_cut_off(refused, tmp_path, finished):
    run = copy(finished, tmp_path/"run")
    path = run/"lora_weights"/"adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    for command in (["merge", "run"], ["chat", "run", "-p", "Hi"]): refused(*command, says=["adapter in .*lora_weights", "does not fit|cannot be read"])


def test_a_checkpoint_that_was_cut_off(refused, tmp_path, finished):
    run = copy(finished, tmp_path/"run")
    path = run/"checkpoints"/"checkpoint-3"/"state.pt"
    path.write_bytes(path.read_bytes()[:5000])
    refused("run", "run", "--resume", says=["checkpoint-3 is not a checkpoint that can be read", "Delete it; an older one is then used"])


@pytest.mark.parametrize("arguments, says", [(["quickstart", "custom", "-d", "nowhere.jsonl"], "there is no data file nowhere.jsonl"), (["run", "nowhere"], "no run folder nowhere"), (["merge", "nowhere"], "nowhere is not a run folder")],
                         ids=["quickstart", "run", "merge"])
def test_the_real_program_ends_with_2(tmp_path, arguments, says):
    child = start(*arguments, cwd=tmp_path)
    said, complained = child.communicate(timeout=120)
    assert child.returncode == 2 and says in one_sentence(complained) and said == "" and tree(tmp_path) == {}


def test_the_module_ends_with_2(tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    (run/"training_data_custom_alpaca.json").unlink()
    before = tree(tmp_path)
    child = start(run, module="sage_finetune.trainer", cwd=tmp_path)
    _, complained = child.communicate(timeout=120)
    assert child.returncode == 2 and "there is no data file" in one_sentence(complained) and tree(tmp_path) == before


# ---- a full disk ------------------------------------------------------------------------------------------------------

FULL = "the disk is full|a quota|larger than .* allowed"


@pytest.fixture(params=["disk", "quota"])
def scarce(request, tmp_path):
    "A place with so many bytes: a small disk of its own, or a limit on the size of files"
    from contextlib import contextmanager
    @contextmanager
    def place(size, largest):
        if request.param == "quota":
            with file_limit(largest): yield tmp_path/"place"
        else: yield tmp_path/"place"
    return place
