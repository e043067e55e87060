"""Run folders as SAGE left them: its meta file and its training_config.json with the values it wrote on every machine, read and run"""
import json
import os
import warnings

import pytest
from helpers import rows, write_rows

from sage_finetune import LoRATrainer, TrainingConfig, train_from_meta
from sage_finetune.config import PermissionWarning
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.runs.folder import SAGE_FIELDS, list_runs, read_meta, read_status

# What SAGE's TrainingConfig.save wrote: `dataclasses.asdict` as JSON, paths as texts, the adapter's fields as an object
SAGE_LORA = dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], lora_dropout=.05, bias="none",
    task_type="CAUSAL_LM")
SAGE_CONFIG = dict(model_name="tiny", load_in_8bit=False, load_in_4bit=False, data_path="{folder}/training_data_qa_alpaca.json",
    max_length=1024,
    output_dir="{folder}", num_train_epochs=3, per_device_train_batch_size=1, gradient_accumulation_steps=16, learning_rate=5e-5,
    lr_scheduler_type="cosine", warmup_ratio=.1, fp16=True, bf16=False, gradient_checkpointing=True, optim="paged_adamw_8bit",
    logging_steps=10,
    save_steps=500, save_total_limit=2, report_to="tensorboard", lora=SAGE_LORA, seed=42, dataloader_num_workers=0)
SAGE_META = dict(task_type="qa", model="tiny", framework="native", format="alpaca", dataset="{folder}/training_data_qa_alpaca.json",
    config="{folder}/training_config.json", output_dir="{folder}", data_file="{folder}/../qa.json")
ABSENT = "/home/ada/.sage/finetune_output/qa"  # on another machine
QUICK = dict(num_train_epochs=1, gradient_accumulation_steps=4, max_length=256)


def sage_folder(place, written_as=ABSENT, meta=None, config=None, content=None):
    "A folder as SAGE prepared it; ... takes a key out, config=None leaves the file out"
    run = place/"qa"
    run.mkdir(parents=True)
    spelt = lambda value: value.replace("{folder}", str(written_as)) if isinstance(value, str) else value
    kept = lambda keys: {name: spelt(value) for name, value in keys.items() if value is not ...}
    (run/"training_data_qa_alpaca.json").write_text(json.dumps(rows(8) if content is None else content, indent=2))
    (run/"finetune_meta.json").write_text(json.dumps(kept(SAGE_META | (meta or {})), indent=2))
    if config is not None: (run/"training_config.json").write_text(json.dumps(kept(SAGE_CONFIG | config), indent=2))
    return run


def test_these_are_the_fields_of_sage():
    assert {*SAGE_CONFIG} == {*SAGE_FIELDS} and {*SAGE_FIELDS} <= {*TrainingConfig.__dataclass_fields__}


@pytest.mark.parametrize("written_as", [ABSENT, "finetune_output/qa", ".", "~/.sage/finetune_output/qa", "C:\\Users\\ada\\qa"])
def test_paths_of_another_machine_lead_into_the_folder(tmp_path, monkeypatch, written_as):
    "Absolute ones, relative ones from wherever the folder was made, a home folder, and backslashes"
    monkeypatch.chdir(tmp_path)
    meta = dict(dataset=f"{written_as}\\training_data_qa_alpaca.json") if "\\" in written_as else {}
    run = sage_folder(tmp_path/"runs", written_as, meta, config={})
    config = read_meta(run).to_config()
    assert (config.data_path, config.output_dir) == (run/"training_data_qa_alpaca.json", run)
    assert (config.lora.r, config.lora.target_modules, config.lora.lora_dropout) == (8, SAGE_LORA["target_modules"], .05)
    assert (config.optim, config.report_to, config.fp16, config.learning_rate) == ("paged_adamw_8bit", "tensorboard", True, 5e-5)
    assert not (tmp_path/"finetune_output").exists() and list_runs(tmp_path/"runs")[0].model == "tiny"


def test_rows_that_are_elsewhere_are_read_there(tmp_path):
    "SAGE names the rows by their whole path: where they still lie there, they are meant"
    data = write_rows(tmp_path/"data"/"own.jsonl", rows(3))
    run = sage_folder(tmp_path, meta=dict(dataset=str(data)), config={})
    with pytest.warns(UserWarning, match="only read"): assert read_meta(run).to_config().data_path == data


def test_what_sage_wrote_trains(tmp_path):
    "fp16 on a CPU, a paged 8-bit optimizer, TensorBoard, checkpointing, a dropout: as it stands"
    run = sage_folder(tmp_path, config=QUICK)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train_from_meta(run, show=False)
    assert result.steps == 2 and read_status(run).state == "completed" and not os.path.exists("/home/ada")
    assert (run/"lora_weights"/"adapter_model.safetensors").is_file() and any(run.joinpath("logs").glob("events*"))
    resolved = TrainingConfig.load(run/"training_config.json")
    assert (resolved.optim, resolved.report_to, resolved.gradient_accumulation_steps) == ("paged_adamw_8bit", "tensorboard", 4)
    if resolved.device == "cpu":
        assert not resolved.fp16 and any("says fp16, as SAGE wrote it" in str(one.message) for one in said)
    assert not any(issubclass(one.category, PermissionWarning) for one in said)


@pytest.mark.parametrize("config", [dict(load_in_8bit=True), dict(lora=..., optim=..., report_to="none", dataloader_num_workers=1),
    dict(lora=dict(r=4), save_steps=1, bf16=...)], ids=["8 bits", "less", "checkpoints"])
def test_other_values_of_sage_train(tmp_path, config):
    "Weights in 8 bits, and keys that an older version did not have"
    run = sage_folder(tmp_path, config=QUICK | dict(fp16=False, optim="adamw_torch", max_length=64) | config, content=rows(4))
    assert train_from_meta(run, show=False).steps == 1


def test_a_config_that_names_no_model_means_that_of_the_meta_file(tmp_path):
    "Read it is; trained it is not, for the file is neither SAGE's nor ours, and would be replaced"
    run = sage_folder(tmp_path, config=QUICK | dict(model_name=..., fp16=False))
    assert read_meta(run).to_config().model_name == "tiny"
    with pytest.raises(RunError, match="was not written by this toolkit"): train_from_meta(run, show=False)


def test_a_folder_without_a_config_has_our_defaults(tmp_path):
    run = sage_folder(tmp_path)
    config = read_meta(run).to_config()
    assert config == TrainingConfig(model_name="tiny", data_path=run/"training_data_qa_alpaca.json", output_dir=run)


@pytest.mark.parametrize("framework, name", [("llama-factory", "llama-factory_config.json"), ("unsloth", "unsloth_config.json")])
def test_a_config_of_another_framework_is_named(tmp_path, framework, name):
    "Its values are not used, and nobody should believe that they were"
    run = sage_folder(tmp_path, meta=dict(framework=framework, config="{folder}/" + name))
    (run/name).write_text(json.dumps(dict(learning_rate=.5)))
    with pytest.warns(UserWarning, match=f"is a config of {framework}, which is not read"): config = read_meta(run).to_config()
    assert config.learning_rate == TrainingConfig().learning_rate


def test_fp16_that_somebody_chose_is_not_changed(tmp_path):
    "A config with fields that SAGE did not have is ours: on a CPU its fp16 is an error with a way out"
    run = sage_folder(tmp_path, config=QUICK | dict(packing=True))
    assert not read_meta(run).is_sage_config
    config = read_meta(run).to_config()
    config.device = "cpu"
    with pytest.raises(ConfigError, match="`fp16=True` needs a GPU"): LoRATrainer(config).train(show=False)


@pytest.mark.parametrize("config, said", [
    (dict(use_flash_attention=True), "has no field 'use_flash_attention'"),
    (dict(lora=SAGE_LORA | dict(lora_rank=8)), "has no field 'lora_rank'"),
    (dict(lora=[8, 16]), "lora"), (dict(lora="r=8"), "lora"),
    (dict(lora=SAGE_LORA | dict(target_modules=None)), "LoRAConfig.target_modules"),
    (dict(fp16=True, bf16=True), "contradict each other"), (dict(load_in_8bit=True, load_in_4bit=True), "contradict each other"),
    (dict(optim="lion"), "TrainingConfig.optim = 'lion'"), (dict(learning_rate="fast"), "learning_rate"),
    (dict(num_train_epochs=0), "num_train_epochs"),
    (dict(warmup_ratio=.9), "warmup_ratio"), (dict(max_length=None), "max_length")], ids=lambda value: str(value)[:60])
def test_what_a_config_may_not_say_is_named(tmp_path, config, said):
    "Keys SAGE never had, values of another kind: by their name, with the file, before anything is trained"
    run = sage_folder(tmp_path, config=config)
    with pytest.raises(ConfigError) as error: train_from_meta(run, show=False)
    assert said in str(error.value) and not (run/"lora_weights").exists()


@pytest.mark.parametrize("meta, said", [
    (dict(model=...), "does not say model"), (dict(dataset=...), "does not say dataset"), (dict(task_type=...), "does not say task_type"),
    (dict(dataset=["a"]), "does not say dataset"), (dict(task_type="poetry"), "`task_type` 'poetry'"),
    (dict(dataset="\0"), "does not say dataset"),
    (dict(model="other/model"), "says model 'other/model'"), (dict(dataset="x" * 5000), "does not say dataset")],
    ids=lambda value: str(value)[:50])
def test_what_a_meta_file_lacks_is_named(tmp_path, meta, said):
    run = sage_folder(tmp_path, meta=meta, config={})
    with pytest.raises(RunError) as error: read_meta(run).to_config()
    assert said in str(error.value)


def test_keys_that_only_sage_knows_are_left_alone(tmp_path):
    "In the meta file more may stand than is read: it is somebody's note"
    run = sage_folder(tmp_path, meta=dict(created_at="2025-01-01", framework=..., format=..., output_dir=..., data_file=...), config={})
    meta = read_meta(run)
    assert (meta.framework, meta.format, meta.output_dir, meta.data_file) == ("native", "alpaca", run, None)


def test_weights_and_biases_only_by_your_word(tmp_path):
    run = sage_folder(tmp_path, config=dict(report_to="wandb"))
    with pytest.warns(PermissionWarning, match="report_to='wandb'"): assert read_meta(run).to_config().report_to == "none"
    assert read_meta(run).to_config(report_to="wandb").report_to == "wandb"


@pytest.mark.parametrize("content, said", [([], "holds no rows"), ([dict(instruction="a")], "'output'"),
    (dict(a=1), "training_data_qa_alpaca.json"),
    (["text"], "of type str")], ids=str)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, content, said):
    run = sage_folder(tmp_path, config=QUICK | dict(fp16=False), content=content)
    with pytest.raises((DataError, RunError, ConfigError)) as error: train_from_meta(run, show=False)
    assert said in str(error.value) and len(str(error.value)) < 1000


def test_rows_that_are_gone_are_named(tmp_path):
    run = sage_folder(tmp_path, config=QUICK | dict(fp16=False))
    (run/"training_data_qa_alpaca.json").unlink()
    with pytest.raises(DataError, match="there is no data file"): train_from_meta(run, show=False)
