"""What goes wrong ends in one sentence that names the place, the value and the way out, with exit code 2,
and leaves everything as it was."""
import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from helpers import (
    adapter,
    change,
    copy,
    file_limit,
    leftovers,
    metrics,
    mounted,
    one_sentence,
    prepared,
    rows,
    start,
    status,
    tiny_config,
    tree,
    write_rows,
)

from sage_finetune import LoRATrainer, PresetConfigs, TrainingConfig, merge, train_from_meta
from sage_finetune.cli import main
from sage_finetune.commands.program import in_shell_words
from sage_finetune.config import preset, tiny_path
from sage_finetune.core.errors import ConfigError, RunError
from sage_finetune.data.run_data import prepare_run_data
from sage_finetune.modeling.tokenizer import load_tokenizer
from sage_finetune.runs.folder import read_meta, read_metrics
from sage_finetune.training.checkpoint import checkpoints


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of four steps, a checkpoint after each, its rows already examples; tests take copies"
    run = prepared(tmp_path_factory.mktemp("ready")/"run", max_steps=4, save_steps=1, save_total_limit=9)
    prepare_run_data(read_meta(run).to_config(), load_tokenizer("tiny"))
    return run


@pytest.fixture(scope="module")
def finished(ready):
    "The same, trained and merged; tests take copies"
    run = copy(ready, ready.parent/"finished")
    train_from_meta(run, show=False)
    merge(run)
    return run


def is_prepared(path):
    "Whether a path belongs to prepared rows"
    return "prepared" in path.split("/")


def typed(message): return in_shell_words(message, ["run"])


def says_why(status, sentence):
    "Whether a run that waited to begin says now that it failed, and why"
    said = json.loads(status.read_text())
    return said["state"] == "failed" and said["total"] == 0 and typed(said["message"])[:20] == sentence[:20]


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Run the program below tmp_path: it must end with 2, say one sentence with all these words,
    and change nothing (prepared rows, which are whole, may stay)"""
    monkeypatch.chdir(tmp_path)
    def check(*arguments, says, changes=()):
        before = tree(tmp_path)
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        sentence = one_sentence(capfd.readouterr().err)
        for part in [says] if isinstance(says, str) else says: assert re.search(part, sentence), (part, sentence)
        after = tree(tmp_path)
        changed = {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)}
        waited = {path for path in changed if path.endswith("status.json") and says_why(tmp_path/path, sentence)}
        assert {path for path in changed if not is_prepared(path)} - waited == set(changes)
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
    ("latin.jsonl", "{\"text\": \"Grüße\"}".encode("latin-1"), ["latin.jsonl.*not UTF-8", "Save it as UTF-8"]),
    ("keys.jsonl", GOOD + '\n{"instructon": "a", "output": "b"}', ["keys.jsonl, line 2", "instructon", "'instruction'", "column_map="]),
    ("half.json", json.dumps([dict(question="a")]), ["half.json, row 1", "'question'", "also needs 'answer'", "Add it"]),
    ("foreign.csv", "colour,size\nred,3\n", ["foreign.csv, line 2", "'colour', 'size'", "instruction"]),
    ("numbers.json", "[1, 2]", ["numbers.json, row 1", "object", "int"]),
    ("silent.jsonl", json.dumps(dict(instruction="a", output=" ")),
        ["silent.jsonl, line 1", "answer .* is empty", "Remove the row or write its answer"]),
    ("talk.jsonl", json.dumps(dict(messages=[dict(role="usr", content="a")])),
        ["talk.jsonl, line 1", "role 'usr'", "Did you mean 'user'", "known roles are .*user"]),
    ("rows.txt", GOOD, [r"rows.txt: files of kind '\.txt'", r"Use \.json"]),
    ("rows.parquet", "not parquet", ["rows.parquet is not a readable parquet file"]),
]


@pytest.mark.parametrize("name, content, says", BAD_DATA, ids=[case[0] for case in BAD_DATA])
def test_bad_data_is_refused_before_a_folder_is_made(refused, tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("quickstart", "custom", "-d", name, "-o", "out", says=says)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/such/folder/rows.json"])
def test_a_data_file_that_is_not_there(refused, name):
    refused("quickstart", "custom", "-d", name, "-o", "out",
        says=[f"there is no data file {name}", "Check --data; the packaged example is --data example"])


def test_a_folder_instead_of_a_data_file(refused, tmp_path):
    (tmp_path/"rows.json").mkdir()
    refused("quickstart", "custom", "-d", "rows.json", "-o", "out", says=["rows.json"])


def test_rows_that_do_not_suit_the_task(refused, tmp_path):
    write_rows(tmp_path/"rows.jsonl")
    refused("quickstart", "qa", "-d", "rows.jsonl", "-o", "out", says=["rows.jsonl, line 1", "'alpaca'", "task qa", "Use task custom"])


@pytest.mark.parametrize("spoil, says", [
    (lambda data: data.unlink(), ["there is no data file .*training_data_custom_alpaca.json", "Check --set data_path=…"]),
    (lambda data: data.write_text(""), ["training_data_custom_alpaca.json", "not JSON|no rows"]),
    (lambda data: data.write_text(data.read_text()[:-9]), ["training_data_custom_alpaca.json, line", "not JSON"]),
    (lambda data: data.write_text('[{"instruction": "a", "ouput": "b"}]'), ["training_data_custom_alpaca.json, row 1", "'output'"]),
    (lambda data: data.write_text(json.dumps([dict(rows(1)[0], output="word " * 600)])),
        ["fits into max_length=512", "Raise max_length or shorten"])], ids=["gone", "empty", "cut", "keys", "long"])
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
    "no config": (without("config.json"), ["model", "config.json is missing", "Check --set model_name=…"]),
    "no config, other words": (lambda model: (model/"config.json").rename(model/"settings.json"), ["config.json is missing"]),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), ["tokenizer of --set model_name=", "lacks its files"]),
    "no tokenizer, other words": (without("tokenizer.json"), ["tokenizer of --set model_name="]),
    "no weights": (without("model.safetensors"), ["the model of --set model_name=", "lacks its files", "model.safetensors"]),
    "half the weights": (lambda model: (model/"model.safetensors").write_bytes((model/"model.safetensors").read_bytes()[:100_000]),
        ["the model of --set model_name="]),
    "half the config": (lambda model: (model/"config.json").write_text('{"model_type": "qwen2",'), ["model_name="]),
    "an unknown kind": (lambda model: (model/"config.json").write_text('{"model_type": "qwenty"}'), ["model_name=", "qwenty"]),
    "half the tokenizer": (halve("tokenizer.json"), ["tokenizer of --set model_name="]),
    "no way to end": (lambda model: (model/"chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: "
        "{{ m.content }}\n{% endfor %}"), ["ends no answer with a stop token", "Add the end-of-sequence token"])}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_model_folder_that_is_no_model(refused, tmp_path, ready, model, fault):
    spoil, says = BAD_MODELS[fault]
    spoil(model)
    run = copy(ready, tmp_path/"run")
    use_model(run, "./model")
    refused("run", "run", says=["model", *says])


def use_model(run, name):
    change(run, model_name=name)
    meta = json.loads((run/"finetune_meta.json").read_text())
    (run/"finetune_meta.json").write_text(json.dumps(dict(meta, model=name)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "models/of/mine"])
def test_a_model_folder_that_is_not_there(refused, tmp_path, ready, name):
    run = copy(ready, tmp_path/"run")
    use_model(run, name)
    refused("run", "run", says=[f"no model folder {name}", "Check --set model_name=…; the packaged model is --set model_name=tiny"])


def test_a_name_on_the_hub_without_network(refused, tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    use_model(run, "nobody/no-such-model")
    refused("run", "run", says=["--set model_name=nobody/no-such-model", "HF_HUB_OFFLINE is set", "Unset it, or download it"])


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model"])
def test_quickstart_makes_no_folder_for_a_model_that_is_not_there(refused, tmp_path, name):
    write_rows(tmp_path/"rows.jsonl")
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "out", "-m", name,
        says=[f"no model folder {name}", "Check --model; the packaged model is --model tiny"])


def test_an_adapter_for_layers_the_model_does_not_have(refused, tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    change(run, lora=dict(target_modules=["query", "value"]))
    refused("run", "run", says=["--set lora.target_modules=query,value fits no layer", "q_proj", '"all-linear" takes them all'])


# ---- settings ---------------------------------------------------------------------------------------------------------

def test_settings_that_do_not_exist():
    for wrong, says in [(lambda: TrainingConfig(learning_rat=1e-4), "learning_rat'.*'learning_rate'"),
                        (lambda: PresetConfigs.tiny(epochs=3), "no field 'epochs'"),
                        (lambda: setattr(TrainingConfig(), "dataPath", "x"), "'dataPath'.*'data_path'"),
                        (lambda: TrainingConfig(lora=dict(rank=8)), "lora.*'rank'|'rank'.*lora")]:
        with pytest.raises(ConfigError, match=says): wrong()
    for name in ("rtx_9999", "Tiny"):
        with pytest.raises(ConfigError, match=f"no preset '{name}'. There are: minimal, rtx_3060"): preset(name)


BAD_SETTINGS = [(dict(learning_rat=1e-4), ["training_config.json", "'learning_rat'", "'learning_rate'"]),
                (dict(lora=dict(rank=4)), ["training_config.json", "'rank'"]),
                (dict(learning_rate="fast"), ["--lr fast", "a number from 1e-09 to 1"]),
                (dict(num_train_epochs=0), ["--epochs 0", "from 1"]),
                (dict(load_in_8bit=True, load_in_4bit=True), ["--bits 8 and --bits 4 contradict", "Set one of them to False"]),
                (dict(fp16=True), ["--set fp16=true needs a GPU", "None"])]


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
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", output, says=[f"{output}( |:)", "file", "Choose another --output"])


@pytest.mark.parametrize("output", ["run", "run/below"])
def test_training_into_a_file(tmp_path, output):
    (tmp_path/"run").write_text("old")
    with pytest.raises(RunError, match="(?s)cannot write .*run.*Choose another `output_dir`"):
        LoRATrainer(tiny_config(tmp_path, output_dir=tmp_path/output, max_steps=1)).train(show=False)
    assert (tmp_path/"run").read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"run", "rows.jsonl"}


def test_a_disk_that_may_only_be_read(refused, tmp_path, ready):
    "Also for root, whom file permissions do not stop"
    with mounted(tmp_path/"disk", "size=8m") as disk:
        copy(ready, disk/"run")
        write_rows(tmp_path/"rows.jsonl")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused("run", "disk/run", says=["cannot write .*disk/run", "no permission|read-only", "Choose another RUN"])
        refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "disk/new",
            says=["cannot write .*disk/new", "no permission|read-only", "Choose another --output"])


def test_an_output_folder_that_holds_a_run(refused, tmp_path, finished):
    "In the words of each door"
    copy(finished, tmp_path/"run")
    write_rows(tmp_path/"rows.jsonl")
    refused("run", "run", says=["run already holds a run", "metrics.jsonl", "lora_weights", "Choose another RUN", "--resume"])
    refused("quickstart", "custom", "-d", "rows.jsonl", "-o", "run",
        says=["run already holds a run", "Choose another --output", "--overwrite"])


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]], ids=["again", "resume", "overwrite"])
def test_a_run_somebody_is_training(refused, tmp_path, finished, more):
    "A living process that holds the folder's lock and says it trains there"
    run = copy(finished, tmp_path/"run")
    holds = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", holds, str(run/".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        (run/"status.json").write_text(json.dumps(status(run)
            | dict(state="training", pid=other.pid, updated=datetime.now(UTC).isoformat(timespec="seconds"))))
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
    refused("chat", "run", "-p", "Hi", "--merged", says=["run holds no adapter yet", "sage-finetune run run"])
    refused("run", "run", "--resume", says=["no run in .*run, so nothing to resume"])


def test_an_adapter_that_was_cut_off(refused, tmp_path, finished):
    run = copy(finished, tmp_path/"run")
    path = run/"lora_weights"/"adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    for command in (["merge", "run"], ["chat", "run", "-p", "Hi"]):
        refused(*command, says=["adapter in .*lora_weights", "does not fit|cannot be read"])


def test_checkpoints_that_were_cut_off(refused, tmp_path, finished):
    "One is passed over, with a word; when none is left the run says so"
    run = copy(finished, tmp_path/"run")
    states = [path/"state.safetensors" for path in checkpoints(run/"checkpoints")]
    for path in states[1:]: path.write_bytes(path.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="checkpoint-4 cannot be read .*goes on from checkpoint-1"):
        assert train_from_meta(run, show=False, resume=True).steps == 3
    assert adapter(run) == adapter(finished)
    for path in checkpoints(run/"checkpoints"): (path/"state.safetensors").write_bytes(b"half")
    refused("run", "run", "--resume", "--epochs", "9",
        says=["checkpoint-1 cannot be read", "Restore one from a copy, or start anew with --overwrite"])


@pytest.mark.parametrize("arguments, says", [(["quickstart", "custom", "-d", "nowhere.jsonl"], "there is no data file nowhere.jsonl"),
    (["run", "nowhere"], "no run folder nowhere"), (["merge", "nowhere"], "no run folder nowhere")],
                         ids=["quickstart", "run", "merge"])
def test_the_real_program_ends_with_2(tmp_path, arguments, says):
    child = start(*arguments, cwd=tmp_path)
    said, complained = child.communicate(timeout=300)
    assert child.returncode == 2 and says in one_sentence(complained) and said == "" and tree(tmp_path) == {}


def test_the_module_ends_with_2(tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    (run/"training_data_custom_alpaca.json").unlink()
    before = tree(tmp_path)
    child = start(run, module="sage_finetune.trainer", cwd=tmp_path)
    _, complained = child.communicate(timeout=300)
    assert child.returncode == 2 and "there is no data file" in one_sentence(complained)
    assert says_why(run/"status.json", one_sentence(complained))
    assert {path: hashed for path, hashed in tree(tmp_path).items() if path != "run/status.json"} \
        == {path: hashed for path, hashed in before.items() if path != "run/status.json"}


# ---- a full disk ------------------------------------------------------------------------------------------------------

def short_of_space(sentence): return all(part in sentence for part in ("cannot write", "disk is full", "quota", "Free some space"))


@pytest.fixture
def failed(capsys):
    "Run the program: it must end with a status and say in one sentence that there is no room for `what`"
    def check(*arguments, what, status=2):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        sentence = one_sentence(capsys.readouterr().err)
        assert short_of_space(sentence) and what in sentence, sentence
        return sentence
    return check


def test_no_room_for_the_rows(failed, tmp_path):
    write_rows(tmp_path/"rows.jsonl")
    before = tree(tmp_path)
    with file_limit(500):
        failed("quickstart", "custom", "-d", tmp_path/"rows.jsonl", "-o", tmp_path/"run", what="training_data_custom_alpaca.json")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("limit", [0, 100, 700], ids=["nothing", "the status", "the config"])
def test_no_room_to_begin(failed, tmp_path, ready, limit):
    "Not even for the little files at the start: the run does not claim to be training"
    run = copy(ready, tmp_path/"run")
    before = tree(run)
    with file_limit(limit): failed("run", run, what="run/")
    assert status(run)["state"] != "training" and leftovers(run) == []
    assert {name: content for name, content in tree(run).items() if name not in ("status.json", "metrics.jsonl")} == {name: content
        for name, content in before.items() if name != "status.json"}


def test_no_room_for_the_metrics(failed, tmp_path, ready):
    "In the middle of training; what was written stays readable"
    run = copy(ready, tmp_path/"run")
    change(run, max_steps=12, save_steps=500)
    with file_limit(2400): sentence = failed("run", run, what="metrics.jsonl", status=1)
    said = status(run)
    assert said["state"] == "failed" and typed(said["message"]) == sentence and not (run/"lora_weights").exists() and leftovers(run) == []
    assert 3 <= len(read_metrics(run)) < 12


def fails_at_the_adapter(failed, run):
    data = tree(run)
    sentence = failed("run", run, what="lora_weights", status=1)
    assert not any((run/"checkpoints").iterdir())
    assert {path.name for path in run.iterdir()} - {".lock", "checkpoints"} == {"finetune_meta.json", "metrics.jsonl",
        "prepared", "run_manifest.json", "status.json", "training_config.json", "training_data_custom_alpaca.json"}
    assert (status(run)["state"], typed(status(run)["message"])) == ("failed", sentence)
    assert len(metrics(run)) == 4 and leftovers(run.parent) == []
    assert tree(run)["training_data_custom_alpaca.json"] == data["training_data_custom_alpaca.json"]


def test_no_room_for_the_adapter_on_a_full_disk(failed, tmp_path, ready):
    with mounted(tmp_path/"disk", "size=300k") as disk:
        run = copy(ready, disk/"run")
        change(run, save_steps=500)
        fails_at_the_adapter(failed, run)


def test_no_room_for_the_adapter_under_a_quota(failed, tmp_path, ready):
    run = copy(ready, tmp_path/"run")
    change(run, save_steps=500)
    with file_limit(300_000): fails_at_the_adapter(failed, run)


@pytest.fixture(scope="module")
def interrupted(ready):
    "The run, stopped behind its first checkpoint; tests take copies"
    run = copy(ready, ready.parent/"interrupted")
    for step in LoRATrainer(read_meta(run).to_config()).steps():
        if step.step == 2: break
    shutil.rmtree(run/"checkpoints"/"checkpoint-2", ignore_errors=True)
    return run


def fails_at_the_checkpoint(failed, run):
    first = tree(run/"checkpoints"/"checkpoint-1")
    sentence = failed("run", run, "--resume", what="checkpoint-2", status=1)
    assert tree(run/"checkpoints"/"checkpoint-1") == first and [path.name for path in (run/"checkpoints").iterdir()] == ["checkpoint-1"]
    assert ((status(run)["state"], typed(status(run)["message"])) == ("failed", sentence) and not (run/"lora_weights").exists()
        and leftovers(run.parent) == [])


def goes_on(run, finished):
    assert main(["run", str(run), "--resume"]) == 0
    assert adapter(run) == adapter(finished) and [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("spare", ["300k", "900k"], ids=["its adapter", "its optimizer"])
def test_no_room_for_a_checkpoint_on_a_full_disk(failed, tmp_path, interrupted, finished, spare):
    "The one before stays, and once there is room again the run goes on from it to the same adapter"
    with mounted(tmp_path/"disk", "size=64m") as disk:
        run = copy(interrupted, disk/"run")
        used = sum(-(-path.stat().st_size // 4096) * 4 for path in run.rglob("*") if path.is_file())
        subprocess.run(["mount", "-o", f"remount,size={used + int(spare[:-1])}k", str(disk)], check=True)
        fails_at_the_checkpoint(failed, run)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        goes_on(run, finished)


@pytest.mark.parametrize("limit", [300_000, 1_000_000], ids=["its adapter", "its optimizer"])
def test_no_room_for_a_checkpoint_under_a_quota(failed, tmp_path, interrupted, finished, limit):
    run = copy(interrupted, tmp_path/"run")
    with file_limit(limit): fails_at_the_checkpoint(failed, run)
    goes_on(run, finished)


def test_no_room_for_the_merged_model_on_a_full_disk(failed, tmp_path, finished, capsys):
    "Seen before anything is written"
    before = tree(finished)
    with mounted(tmp_path/"disk", "size=6m") as disk:
        assert main(["merge", str(finished), "-o", str(disk/"merged")]) == 2
        sentence = one_sentence(capsys.readouterr().err)
        assert re.search(r"the merged model needs .* and .*disk has .* free. Free some space or choose another folder", sentence)
        assert tree(disk) == {}
    assert tree(finished) == before


def test_no_room_for_the_merged_model_under_a_quota(failed, tmp_path, finished):
    "Noticed while writing: the merged model of before stays"
    run = copy(finished, tmp_path/"run")
    before = tree(run)
    with file_limit(4_000_000): failed("merge", run, what="merged_model")
    assert tree(run) == before


def test_an_unwritable_place_for_the_merged_model(refused, tmp_path, finished):
    copy(finished, tmp_path/"run")
    (tmp_path/"file").write_text("old")
    for output in ("file/merged", "file"):
        refused("merge", "run", "-o", output, says=[f"cannot write .*{output}|{output} exists and is not", "Choose another"])


def test_merge_replaces_nothing_but_an_earlier_merge(refused, tmp_path, finished):
    "A folder of somebody's, the run itself, a model of another origin: all stay"
    copy(finished, tmp_path/"run")
    (tmp_path/"home").mkdir()
    (tmp_path/"home"/"diary.txt").write_text("mine")
    copy(tiny_path(), tmp_path/"model")
    for output in ("home", "run", "model"): refused("merge", "run", "-o", output, says=[f"{output} ", "Choose another folder"])
    (tmp_path/"new").mkdir()
    for output in ("new", "new", "run/merged_model"):
        assert main(["merge", "run", "-o", output]) == 0 and (tmp_path/output/"merge_report.json").is_file()
    assert leftovers(tmp_path) == []
