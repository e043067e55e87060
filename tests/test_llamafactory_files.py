"""Files for LLaMA-Factory: no field of ours is forgotten, what can be said is read back equal, the same rows are held out,
and what would be passed over there is an error here"""
import dataclasses
import json
import os
import shutil

import pytest
import yaml
from helpers import write_rows

from sage_finetune import LoRAConfig, PresetConfigs, TrainingConfig
from sage_finetune.config import tiny_path
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data import llamafactory_files as files
from sage_finetune.data.dataset import prepare
from sage_finetune.data.llamafactory import foreign_rows, read_llamafactory
from sage_finetune.data.llamafactory_files import llamafactory_config, llamafactory_remarks, llamafactory_rows, write_llamafactory
from sage_finetune.data.rows import read_row
from sage_finetune.data.tasks import prepare_run
from sage_finetune.modeling.tokenizer import load_tokenizer
from sage_finetune.runs.cleaning import delete_run, look_at_run
from sage_finetune.runs.folder import read_meta

# What the dataclasses of llamafactory/hparams and transformers' TrainingArguments declare, of 0.9.5 and 5.6.0: key -> kind of its value
DECLARED = dict(model_name_or_path=str, stage=str, do_train=bool, finetuning_type=str, lora_rank=int, lora_alpha=int, lora_dropout=float,
    lora_target=str, additional_target=str, use_rslora=bool, use_dora=bool, pissa_init=bool, pissa_iter=int, pissa_convert=bool,
    adapter_name_or_path=str, quantization_bit=int, per_device_train_batch_size=int, per_device_eval_batch_size=int,
    gradient_accumulation_steps=int, learning_rate=float, lr_scheduler_type=str, warmup_ratio=float, weight_decay=float,
    max_grad_norm=float,
    save_steps=int, save_total_limit=int, save_strategy=str, save_only_model=bool, seed=int, optim=str, dataloader_num_workers=int,
    max_steps=int, fp16=bool, bf16=bool, loraplus_lr_ratio=float, neftune_noise_alpha=float, trust_remote_code=bool, num_train_epochs=int,
    disable_gradient_checkpointing=bool, logging_steps=int, report_to=(str, list), output_dir=str, plot_loss=bool, disable_tqdm=bool,
    use_cpu=bool, dataset=str, eval_dataset=str, dataset_dir=str, cutoff_len=int, overwrite_cache=bool, packing=bool, template=str,
    enable_thinking=bool, eval_strategy=str, eval_steps=int, load_best_model_at_end=bool, early_stopping_steps=int)

CASES = [dict(), dict(max_steps=7, load_in_4bit=True, bf16=True), dict(load_in_8bit=True, fp16=True, optim="adamw_8bit"),
    dict(gradient_checkpointing=True, report_to=["tensorboard", "trackio"], warmup_ratio=.3, lr_scheduler_type="polynomial"),
    dict(lora=LoRAConfig(r=4, lora_alpha=9, lora_dropout=.1, use_dora=True, target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"])),
    dict(lora=LoRAConfig(init_lora_weights="pissa", use_rslora=True)), dict(lora=LoRAConfig(init_lora_weights="pissa_niter_16")),
    dict(eval_steps=3, loraplus_lr_ratio=4., neftune_noise_alpha=5., weight_decay=.1, device="cpu", seed=7, max_grad_norm=.5)]
# fields that are not read back: decided by the rows, by where it is run, or of this package alone
NOT_READ = {*files._OURS, *files._BY_ROWS, *files._LACKS, "model_name", "output_dir", "trust_remote_code"}


@pytest.fixture
def place(tmp_path):
    (tmp_path/"rows.json").write_text(json.dumps([dict(question=f"Which colour has door {n}?", answer="Red.") for n in range(40)]))
    return tmp_path


def config_of(place, **fields):
    return PresetConfigs.tiny(**dict(data_path=place/"rows.json", output_dir=place/"run", eval_ratio=.2, device="auto") | fields)


def test_no_field_of_ours_is_forgotten():
    "Each is written, said, or concerns this package alone"
    named = [*files._WRITTEN, *files._LACKS, *files._OURS]
    assert {*named} == {one.name for one in dataclasses.fields(TrainingConfig)} and len(named) == len({*named})
    of_adapter = [*files._LORA_WRITTEN, *files._LORA_LACKS]
    assert {*of_adapter} == {one.name for one in dataclasses.fields(LoRAConfig)} and len(of_adapter) == len({*of_adapter})


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_all_that_is_written_is_declared_and_read_back_equal(place, fields):
    config = config_of(place, **fields)
    path = write_llamafactory(config)
    content = yaml.safe_load(path.read_text())
    for name, value in content.items():
        assert isinstance(value, DECLARED[name]) and (DECLARED[name] is bool or not isinstance(value, bool)), name
    back = read_llamafactory(path, report_to=config.report_to).config  # a file is no permission to send curves away
    compared = {one.name for one in dataclasses.fields(TrainingConfig)} - NOT_READ
    assert len(compared) > 20
    assert {name: getattr(back, name) for name in compared} == {name: getattr(config, name) for name in compared}
    assert content["model_name_or_path"] == str(tiny_path()) and "trust_remote_code" not in content and "template" not in content


@pytest.mark.parametrize("changes, said", [(dict(overlong="truncate"), "overlong='truncate': of a row that is too long"),
    (dict(new_tokens=["<|tool|>"]), "new_tokens"), (dict(eval_prompts=["Who?"]), "no questions are answered"),
    (dict(auto_find_batch_size=True), "too little memory"), (dict(lora=LoRAConfig(bias="all")), "lora.bias='all': no bias is trained"),
    (dict(lora=LoRAConfig(target_parameters=["experts.down_proj"])), "lora.target_parameters"),
    (dict(lora=LoRAConfig(init_lora_weights="gaussian")), "start as by default"),
    (dict(fp16=None, bf16=None), "not chosen from the hardware"),
    (dict(fp16=False, bf16=False), "stay so where the GPU has it"), (dict(device="cuda", bf16=True), "computes on what it finds"),
    (dict(early_stopping_patience=2, eval_steps=4), "a checkpoint is written at every evaluation"),
    (dict(load_best_model_at_end=True), "every epoch, to keep the best")], ids=str)
def test_what_means_something_else_is_said(place, changes, said):
    config = config_of(place, **changes)
    assert any(said in one for one in llamafactory_remarks(config)), llamafactory_remarks(config)
    if changes.get("lora", LoRAConfig()).target_parameters is None:
        whole = next(one for one in llamafactory_remarks(config) if said in one)
        assert f"# Not said here: {whole}." in write_llamafactory(config).read_text()


def test_the_best_adapter_is_kept_where_that_is_wanted(place):
    keys = llamafactory_config(config_of(place, early_stopping_patience=2, eval_steps=4))
    assert (keys["early_stopping_steps"], keys["load_best_model_at_end"], keys["save_steps"], keys["eval_steps"]) == (2, True, 4, 4)
    assert llamafactory_config(config_of(place, load_best_model_at_end=True))["save_strategy"] == "epoch"


@pytest.mark.parametrize("source", ["rows.json", "example"])
def test_the_same_rows_are_held_out_as_in_a_run_of_ours(place, source):
    config = config_of(place, data_path=place/source if source == "rows.json" else source)
    rows, tokenizer = llamafactory_rows(config), load_tokenizer("tiny")
    from sage_finetune.data.run_data import prepare_run_data
    train, held_out, _ = prepare_run_data(config, tokenizer)
    assert (len(rows.train), len(rows.held_out)) == (len(train), len(held_out)) and rows.held_out
    for theirs, ours in ((rows.train, train), (rows.held_out, held_out)):
        texts = [tokenizer.decode(ids) for ids in ours["input_ids"]]
        assert all(row["messages"][-1]["content"] in text and row["messages"][0]["content"] in text for row, text in zip(theirs, texts))


def test_a_file_of_held_out_rows_and_columns_with_names_of_their_own(place):
    (place/"rows.json").write_text(json.dumps([dict(frage=f"Wer ist {n}?", antwort="Ada.") for n in range(6)]))
    (place/"held.json").write_text(json.dumps([dict(frage="Wer bist du?", antwort="Pip.")]))
    config = config_of(place, eval_path=place/"held.json", column_map=dict(question="frage", answer="antwort"))
    rows = llamafactory_rows(config)
    assert len(rows.train) == 6 and [row["messages"][1]["content"] for row in rows.held_out] == ["Pip."]
    back = read_llamafactory(write_llamafactory(config))
    assert [read_row(row).messages for row in foreign_rows("train", back.content, back.path)] == [row["messages"] for row in rows.train]


def test_plain_text_is_another_stage(place):
    (place/"rows.json").write_text(json.dumps([dict(text=f"The lamp has the number {n}.") for n in range(6)]))
    path = write_llamafactory(config_of(place, eval_ratio=0.))
    content = yaml.safe_load(path.read_text())
    assert (content["stage"], content["packing"], "eval_dataset" in content) == ("pt", False, False)
    back = read_llamafactory(path)
    assert next(iter(foreign_rows("train", back.content, back.path))) == dict(text="The lamp has the number 0.")


CALL = dict(type="function", function=dict(name="add", arguments=dict(a=1, b=2)))
TURNS = [dict(role="user", content="1 + 2?"), dict(role="assistant", content="", tool_calls=[CALL]), dict(role="tool", content="3"),
    dict(role="assistant", content="It is 3.")]


def test_calls_of_tools_come_back(place):
    (place/"rows.json").write_text(json.dumps([dict(messages=TURNS, tools=[dict(name="add", parameters=dict(type="object"))])] * 3))
    config = config_of(place, eval_ratio=0.)
    back = read_llamafactory(write_llamafactory(config))
    sample = read_row(next(iter(foreign_rows("train", back.content, back.path))))
    assert sample.messages[1]["tool_calls"] == [CALL] and sample.messages[2] == TURNS[2] and sample.tools[0]["function"]["name"] == "add"
    assert any("tools" in one for one in llamafactory_remarks(config, llamafactory_rows(config)))


@pytest.mark.parametrize("turns", [[*TURNS[:3], dict(role="tool", content="4"), TURNS[3]],
    [TURNS[0], TURNS[1] | dict(content="Let me see."), *TURNS[2:]]], ids=["two results", "a call and a text"])
def test_rows_they_would_pass_over_stop_or_are_counted(place, turns):
    (place/"rows.json").write_text(json.dumps([dict(messages=turns), dict(question="a", answer="b")]))
    with pytest.raises(DataError, match="--framework native"): llamafactory_rows(config_of(place))
    config = config_of(place, on_bad_row="skip", eval_ratio=0.)
    rows = llamafactory_rows(config)
    assert (len(rows.train), rows.left_out) == (1, 1) and any("1 rows are left out" in one for one in llamafactory_remarks(config, rows))


def test_thinking_is_kept_or_left_out_as_the_config_says(place):
    think = [dict(role="user", content="a"), dict(role="assistant", content="b", reasoning_content="because")]
    (place/"rows.json").write_text(json.dumps([dict(messages=think)] * 3))
    kept = llamafactory_rows(config_of(place, eval_ratio=0.))
    assert kept.thinks and kept.train[0]["messages"][1]["content"] == "<think>\nbecause\n</think>\n\nb"
    assert "enable_thinking" not in llamafactory_config(config_of(place, eval_ratio=0.), kept)
    left = llamafactory_rows(config_of(place, eval_ratio=0., thinking="strip"))
    assert not left.thinks and llamafactory_config(config_of(place, eval_ratio=0.), left)["enable_thinking"] is False


def test_marked_turns_are_said(place):
    talk = [dict(role="user", content="a"), dict(role="assistant", content="b", weight=0), dict(role="user", content="c"),
        dict(role="assistant", content="d")]
    (place/"rows.json").write_text(json.dumps([dict(messages=talk), dict(question="a", answer="b")]))
    config = config_of(place, eval_ratio=0.)
    assert any("every answer is trained on" in one for one in llamafactory_remarks(config, llamafactory_rows(config)))


def test_a_template_is_named_only_where_the_model_has_none(place):
    shutil.copytree(tiny_path(), place/"base")
    config = config_of(place, model_name=str(place/"base"))
    assert "template" not in llamafactory_config(config)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = place/"base"/name
        if name.endswith("jinja"): path.unlink(missing_ok=True)
        else: path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}))
    assert llamafactory_config(config)["template"] == "default"


def test_an_adapter_to_go_on_with_is_its_folder(place):
    (place/"old"/"lora_weights").mkdir(parents=True)
    for named in (place/"old", place/"old"/"lora_weights"):
        assert llamafactory_config(config_of(place, continue_from=named))["adapter_name_or_path"] == str(place/"old"/"lora_weights")


@pytest.mark.parametrize("fields, said", [(dict(data_path=None), "data_path"),
    (dict(lora=LoRAConfig(target_modules=".*q_proj|v")), "List them"),
    (dict(eval_ratio=0., load_best_model_at_end=True), "none are held out"), (dict(data_path="none.jsonl"), "none.jsonl")], ids=str)
def test_what_cannot_be_written_writes_nothing(place, fields, said):
    with pytest.raises((ConfigError, DataError), match=said): write_llamafactory(config_of(place, **fields))
    assert not (place/"run").exists()


def test_trust_is_written_only_where_it_was_given(place):
    assert llamafactory_config(config_of(place, trust_remote_code=True))["trust_remote_code"] is True


def test_files_appear_at_once_and_nothing_is_written_through_a_link(place):
    config = config_of(place)
    path = write_llamafactory(config)
    (path.parent/"mine.txt").write_text("stays")
    write_llamafactory(config_of(place, eval_ratio=0.))
    assert sorted(one.name for one in path.parent.iterdir()) == ["dataset_info.json", path.name, "mine.txt", "train.json"]
    shutil.rmtree(path.parent)
    (place/"elsewhere").mkdir()
    os.symlink(place/"elsewhere", path.parent)
    with pytest.raises(RunError, match="link"): write_llamafactory(config)
    assert not any((place/"elsewhere").iterdir())


def test_prepared_rows_are_counted_the_same(place):
    "When all rows would be held out, none is: as `prepare` does it"
    (place/"rows.json").write_text(json.dumps([dict(question="Which colour has door 7?", answer="Red.")] * 3))
    for ratio in (.0, .5):
        found = prepare(place/"rows.json", load_tokenizer("tiny"), eval_ratio=ratio, cache_dir=place/f"cache-{ratio}", show=False)
        rows = llamafactory_rows(config_of(place, eval_ratio=ratio))
        assert (len(rows.train), len(rows.held_out)) == (len(found.train), len(found.evaluation or ()))


def test_what_was_written_goes_with_the_run(tmp_path):
    "And what somebody put beside it stays"
    prepare_run("custom", tmp_path/"run", "tiny", write_rows(tmp_path/"rows.jsonl"))
    write_llamafactory(read_meta(tmp_path/"run").to_config(()))
    (tmp_path/"run"/"llamafactory"/"notes.txt").write_text("mine")
    assert any(name.startswith("llamafactory/") for name in look_at_run(tmp_path/"run").files)
    delete_run(tmp_path/"run")
    left = [path.relative_to(tmp_path/"run").as_posix() for path in (tmp_path/"run").rglob("*") if path.is_file()]
    assert left == ["llamafactory/notes.txt"]
