"""Configs of LLaMA-Factory as its users write them, with the keys of its examples:
taken over, refused by name, never passed over in silence"""
import json
import time

import pytest

from sage_finetune import LoRATrainer, load_training_data
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data.llamafactory import foreign_rows, prepare_llamafactory, read_llamafactory
from sage_finetune.data.rows import read_row, to_messages
from sage_finetune.runs.folder import read_meta

SFT = """
### model
model_name_or_path: tiny
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity
template: qwen3_nothink
cutoff_len: 512
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 0

### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: false
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
IDENTITY = [dict(instruction="hi", input="", output="Hello! I am {{name}}."), dict(instruction="Sort them:", input="3 1 2", output="1 2 3")]
CALL = dict(name="add", arguments=dict(a=1, b=2))
TALK = dict(conversations=[{"from": "human", "value": "What is 1 + 2?"}, {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "3"}, {"from": "gpt", "value": "It is 3."}], tools=json.dumps([dict(name="add", parameters={})]))
INFO = dict(identity=dict(file_name="identity.json"),
    tools=dict(file_name="tools.json", formatting="sharegpt", columns=dict(messages="conversations", tools="tools")),
    own=dict(file_name="own.json", columns=dict(prompt="frage", query=None, response="antwort", system="rolle", history="vorher")),
    openai=dict(file_name="openai.json", formatting="openai", columns=dict(messages="messages")),
    pairs=dict(file_name="identity.json", ranking=True, columns=dict(chosen="chosen", rejected="rejected")),
    pictures=dict(file_name="tools.json", formatting="sharegpt", columns=dict(messages="conversations", images="images")),
    script=dict(script_url="demo_data"), outside=dict(file_name="../secret.json"), some=dict(file_name="identity.json", num_samples=1))


@pytest.fixture
def place(tmp_path):
    "A config beside its folder of data, as in a clone of that project"
    (tmp_path/"data").mkdir()
    files = dict(identity=IDENTITY, tools=[TALK],
        openai=[dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")])],
        own=[dict(frage="Wer?", antwort="Ada.", rolle="Kurz.", vorher=[["Was?", "Das."]])])
    for name, rows in files.items(): (tmp_path/"data"/f"{name}.json").write_text(json.dumps(rows))
    (tmp_path/"data"/"dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path/"secret.json").write_text(json.dumps(IDENTITY))
    (tmp_path/"examples").mkdir()
    return tmp_path


def written(place, **keys):
    "The example with other keys; None takes one out"
    import yaml
    content = yaml.safe_load(SFT) | keys
    path = place/"examples"/"sft.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not ...}))
    return path


def test_the_example_is_taken_over(place):
    "Every value, and what they take where the file is silent; permissions only by word"
    path = place/"examples"/"sft.yaml"
    path.write_text(SFT)
    found = read_llamafactory(path)
    ours = found.config
    assert ((ours.model_name, ours.lora.r, ours.lora.lora_alpha, ours.lora.target_modules, ours.max_length)
        == ("tiny", 8, 16, "all-linear", 512))
    assert (ours.per_device_train_batch_size, ours.gradient_accumulation_steps, ours.learning_rate,
        ours.num_train_epochs) == (1, 8, 1e-4, 3)
    assert ((ours.lr_scheduler_type, ours.warmup_ratio, ours.bf16, ours.gradient_checkpointing, ours.eval_ratio)
        == ("cosine", .1, False, True, 0))
    assert not ours.trust_remote_code and not ours.overwrite_output_dir and found.refused.keys() == {"trust_remote_code",
        "overwrite_output_dir"}
    assert read_llamafactory(path, trust_remote_code=True).config.trust_remote_code
    names = {key.name for key in found.keys}
    assert {"template", "ddp_timeout", "plot_loss", "lora_alpha (default)", "val_size (default)"} <= names and "lora_rank" in str(found)
    assert found._repr_html_().startswith("<table>")


@pytest.mark.parametrize("keys, fields", [
    (dict(lora_rank=..., learning_rate=..., per_device_train_batch_size=..., gradient_accumulation_steps=...,
        lr_scheduler_type=..., cutoff_len=...),
        dict(learning_rate=5e-5, per_device_train_batch_size=8, gradient_accumulation_steps=1,
            lr_scheduler_type="linear", max_length=2048)),
    (dict(disable_gradient_checkpointing=True), dict(gradient_checkpointing=False)),
    (dict(quantization_bit=4, quantization_method="bnb"), dict(load_in_4bit=True)), (dict(quantization_bit=8), dict(load_in_8bit=True)),
    (dict(max_steps=7), dict(max_steps=7)), (dict(max_steps=-1), dict(max_steps=None)),
    (dict(report_to=["tensorboard"]), dict(report_to="tensorboard")),
    (dict(report_to=["trackio", "tensorboard"]), dict(report_to="none")), (dict(optim="adamw_bnb_8bit"), dict(optim="adamw_8bit")),
    (dict(eval_strategy="steps", eval_steps=5, val_size=.1), dict(eval_steps=5)),
    (dict(eval_strategy="no", eval_steps=5), dict(eval_steps=None)),
    (dict(add_tokens="<a>,<b>"), dict(new_tokens=["<a>", "<b>"])), (dict(use_cpu=True), dict(device="cpu")),
    (dict(learning_rate="1e-3"), dict(learning_rate=1e-3)), (dict(deepspeed=None, use_galore=False, freeze_vision_tower=False), {})],
    ids=str)
def test_values_become_ours(place, keys, fields):
    config = read_llamafactory(written(place, **keys)).config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("keys, fields", [
    (dict(lora_alpha=5), dict(lora_alpha=5)), (dict(lora_rank=4), dict(r=4, lora_alpha=8)), (dict(lora_target="q_proj,v_proj"),
        dict(target_modules=["q_proj", "v_proj"])), (dict(additional_target="lm_head"), dict(modules_to_save=["lm_head"])),
    (dict(use_dora=True, use_rslora=True), dict(use_dora=True, use_rslora=True)),
    (dict(pissa_init=True), dict(init_lora_weights="pissa_niter_16")),
    (dict(pissa_init=True, pissa_iter=-1), dict(init_lora_weights="pissa"))], ids=str)
def test_values_of_the_adapter_become_ours(place, keys, fields):
    lora = read_llamafactory(written(place, **keys)).config.lora
    assert {name: getattr(lora, name) for name in fields} == fields


@pytest.mark.parametrize("keys, said", [
    (dict(stage="dpo", pref_beta=.1), "stage: 'dpo'"), (dict(stage="rm"), "stage: 'rm'"),
    (dict(finetuning_type="full"), "finetuning_type: 'full'"), (dict(deepspeed="examples/deepspeed/ds_z3_config.json"), "deepspeed: "),
    (dict(train_on_prompt=True), "train_on_prompt: "), (dict(mask_history=True), "mask_history: "), (dict(oft_rank=8), "oft_rank: "),
    (dict(image_max_pixels=262144), "image_max_pixels: "), (dict(freeze_vision_tower=True), "freeze_vision_tower: "),
    (dict(use_galore=True), "use_galore: "), (dict(resume_from_checkpoint="saves/checkpoint-5"), "resume_from_checkpoint: "),
    (dict(quantization_bit=2), "quantization_bit: 2"), (dict(quantization_bit=4, quantization_type="fp4"), "quantization_type: 'fp4'"),
    (dict(num_train_epochs=1.5), "max_steps"), (dict(report_to="swanlab"), "report_to: 'swanlab'"),
    (dict(lora_rnak=8), "lora_rnak: not known here"),
    (dict(streaming=True), "streaming: "), (dict(mix_strategy="interleave_under"), "mix_strategy: "),
    (dict(warmup_steps="some"), "warmup_steps"), (dict(ray_num_workers=4), "ray_num_workers: Runs share"),
    (dict(lora_rank=0), "LoRAConfig.r"), (dict(learning_rate="fast"), "learning_rate")], ids=str)
def test_what_would_train_another_model_is_refused_by_name(place, keys, said):
    with pytest.raises(ConfigError) as error: read_llamafactory(written(place, **keys))
    assert said in str(error.value)


def test_all_that_is_wrong_is_said_at_once(place):
    with pytest.raises(ConfigError) as error:
        read_llamafactory(written(place, stage="kto", oft_rank=8, neat_pakcing=True, deepspeed="a.json"))
    assert all(f"{name}: " in str(error.value) for name in ("stage", "oft_rank", "neat_pakcing", "deepspeed"))


@pytest.mark.parametrize("text", ["", "- a", "a: &x [1]\nb: *x", "a: !!python/name:os.system", "seed: 1\nseed: 2",
    "a: [", "{" * 3000, "1: 2", "\x00",
    "a: " + "x" * (1 << 21)], ids=range(10))
def test_a_file_that_is_no_config(place, text):
    path = place/"bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error: read_llamafactory(path)
    assert "bad.yaml" in str(error.value) and len(str(error.value)) < 600


def test_rows_are_read_as_they_read_them(place):
    "Question and input are two lines of one question; roles, tools, system prompts and earlier turns are kept"
    content = dict(dataset_dir="data")
    rows = list(foreign_rows("identity, tools, own, openai", content, place/"examples"/"sft.yaml"))
    assert len(rows) == 5 and rows[1]["messages"][0]["content"] == "Sort them:\n3 1 2"
    tools = read_row(rows[2])
    assert [turn["role"] for turn in tools.messages] == ["user", "assistant", "tool", "assistant"] and tools.tools
    assert [(turn["role"], turn["content"]) for turn in to_messages(rows[3])] == [("system", "Kurz."),
        ("user", "Was?"), ("assistant", "Das."),
        ("user", "Wer?"), ("assistant", "Ada.")]
    assert len(list(foreign_rows("identity,tools", content | dict(max_samples=1), place/"a.yaml"))) == 2
    system, = foreign_rows("openai", content | dict(default_system="Be brief."), place/"a.yaml")
    assert to_messages(system)[0] == dict(role="system", content="Be brief.")


@pytest.mark.parametrize("name, rows", [("openai", [dict(messages=[dict(role="system", content="Long."), dict(role="user", content="a"),
    dict(role="assistant", content="b")])]), ("tools", [dict(conversations=[{"from": "system", "value": "Long."},
    {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], tools="")])])
def test_a_row_keeps_its_own_system_prompt(place, name, rows):
    (place/"data"/f"{name}.json").write_text(json.dumps(rows))
    row, = foreign_rows(name, dict(dataset_dir="data", default_system="Be brief."), place/"a.yaml")
    assert [turn["content"] for turn in to_messages(row) if turn["role"] == "system"] == ["Long."]


def test_no_row_is_on_both_sides(place):
    with pytest.raises(DataError, match="holds out the questions it trains on"):
        prepare_llamafactory(written(place, dataset="identity", eval_dataset="identity", val_size=0), place/"run")
    assert not (place/"run").exists()
    assert prepare_llamafactory(written(place, dataset="identity", eval_dataset="own", val_size=0), place/"run").config.eval_path


@pytest.mark.parametrize("keys, said", [(dict(dataset_dir="~nobody_here/x"), "no such home folder"),
    (dict(dataset=[["a"]]), "no name of a data set"),
    (dict(max_samples=0), "max_samples: 0"), (dict(max_samples=-1), "max_samples: -1")], ids=str)
def test_what_would_read_other_rows_is_named(place, keys, said):
    with pytest.raises(ConfigError, match=said): prepare_llamafactory(written(place, **keys), place/"run")


@pytest.mark.parametrize("name, said", [("pairs", "pairs of answers"), ("pictures", "images"), ("script", "a script"),
    ("outside", "outside its folder"), ("some", "num_samples, rows chosen at random"),
    ("nothing", "no data set 'nothing'")])
def test_data_that_cannot_be_trained_on(place, name, said):
    with pytest.raises(ConfigError, match=said): list(foreign_rows(name, dict(dataset_dir="data"), place/"examples"/"sft.yaml"))


def test_a_run_of_it_trains(place):
    "From their file to an adapter; nothing is written where the file says"
    found = prepare_llamafactory(written(place, max_steps=2, val_size=1, bf16=False, disable_gradient_checkpointing=True), place/"run")
    run = found.config.output_dir
    assert run == place/"run" and found.config.eval_ratio == .5 and not (place/"saves").exists() and not (place/"examples"/"saves").exists()
    assert len(load_training_data(found.config.data_path)) == 2
    result = LoRATrainer(read_meta(run).to_config()).train(show=False)
    assert result.steps == 2 and (run/"lora_weights"/"adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="already holds a run"): prepare_llamafactory(place/"examples"/"sft.yaml", run)


@pytest.mark.parametrize("keys", [dict(max_samples="many"), dict(val_size="some"), dict(dataset=3),
    dict(dataset=dict(a=1)), dict(max_steps="x"),
    dict(optim=[]), dict(num_train_epochs=float("inf")), dict(num_train_epochs=float("nan")), dict(report_to=[[]]), dict(lora_rank={}),
    dict(lora_rank="x"), dict(dataset_dir=[]), dict(max_samples=True)], ids=str)
def test_values_of_another_kind_are_named(place, keys):
    with pytest.raises(ConfigError) as error: prepare_llamafactory(written(place, **keys), place/"run")
    assert next(iter(keys)) in str(error.value) or "LoRAConfig.r" in str(error.value)
    assert not (place/"run").exists()


def test_a_config_in_json_is_read_as_json(place):
    "With tabs, numbers YAML takes for texts, and no name twice"
    (place/"a.json").write_text(json.dumps(dict(model_name_or_path="tiny", stage="sft", do_train=True, finetuning_type="lora",
        learning_rate=1e-4, dataset="identity", lora_target="all"), indent="\t"))
    assert read_llamafactory(place/"a.json").config.learning_rate == 1e-4
    (place/"b.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ConfigError, match="seed stands in it twice"): read_llamafactory(place/"b.json")


def test_null_is_their_default(place):
    config = read_llamafactory(written(place, learning_rate=None, lora_alpha=None, lora_rank=None, cutoff_len=None)).config
    assert (config.learning_rate, config.lora.r, config.lora.lora_alpha, config.max_length) == (5e-5, 8, 16, 2048)


def test_many_keys_end_in_time(place):
    (place/"many.yaml").write_text("".join(f"k{number}: 1\n" for number in range(20_000)))
    began = time.monotonic()
    with pytest.raises(ConfigError): read_llamafactory(place/"many.yaml")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("row", ["text", 3, None, {}, dict(conversations=None), dict(conversations="hi"), dict(conversations=["hi"]),
    dict(conversations=[{"from": "human", "value": "a"}, "lost"]), dict(conversations=[{"from": "somebody", "value": "a"}])], ids=str)
def test_no_turn_is_lost_in_silence(place, row):
    "What is no conversation is refused before anything is written, and named by its place"
    (place/"data"/"tools.json").write_text(json.dumps([TALK, row]))
    with pytest.raises(DataError, match="tools.json"): prepare_llamafactory(written(place, dataset="tools"), place/"run")
    assert not (place/"run").exists()


@pytest.mark.parametrize("entry", [dict(hf_hub_url="/etc/hosts.json"), dict(hf_hub_url="../secret.json"),
    dict(hf_hub_url=3), dict(file_name="/etc/passwd"),
    dict(file_name="identity.json", columns=["a"]), dict(file_name="identity.json", tags="x"),
    dict(file_name="identity.json", num_samples="all"), dict(file_name="identity.json", revision="main"),
    dict(file_name="identity.json", columns=dict(promt="instruction")), dict(file_name="identity.json", tags=dict(bot_tag="gpt")),
    dict(file_name="identity.json", formatting="parquet"), dict(file_name="identity.json", formatting=["alpaca"])], ids=str)
def test_an_entry_of_another_kind_reads_nothing(place, entry):
    (place/"data"/"dataset_info.json").write_text(json.dumps(dict(odd=entry)))
    with pytest.raises(ConfigError, match="'odd'"): list(foreign_rows("odd", dict(dataset_dir="data"), place/"examples"/"sft.yaml"))


def test_nothing_is_written_when_the_rows_cannot_be_read(place):
    (place/"data"/"identity.json").write_text("[1, 2]")
    with pytest.raises(DataError): prepare_llamafactory(written(place), place/"run")
    with pytest.raises(ConfigError, match="names no dataset"): prepare_llamafactory(written(place, dataset=None), place/"run")
    with pytest.raises(ConfigError, match="more than half"): prepare_llamafactory(written(place, dataset="tools", val_size=1), place/"run")
    assert not (place/"run").exists()


# Entries of data/dataset_info.json and rows in the files they name, with the keys of LLaMA-Factory in August 2026 (ff6d4d1)
TAGS = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
DEMO_INFO = dict(identity=dict(file_name="identity.json"), alpaca_en_demo=dict(file_name="alpaca_en_demo.json"),
    glaive_toolcall_en_demo=dict(file_name="glaive_toolcall_en_demo.json", formatting="sharegpt",
        columns=dict(messages="conversations", tools="tools")),
    mllm_demo=dict(file_name="mllm_demo.json", formatting="sharegpt", columns=dict(messages="messages", images="images"), tags=TAGS),
    dpo_en_demo=dict(file_name="dpo_en_demo.json", ranking=True, formatting="sharegpt",
        columns=dict(messages="conversations", chosen="chosen", rejected="rejected")),
    kto_en_demo=dict(file_name="kto_en_demo.json", formatting="sharegpt", columns=dict(messages="messages", kto_tag="label"), tags=TAGS),
    c4_demo=dict(file_name="c4_demo.jsonl", columns=dict(prompt="text")),
    ultrachat_200k=dict(hf_hub_url="nobody/none_such", split="train_sft", formatting="sharegpt",
        columns=dict(messages="messages"), tags=TAGS))
ASKED = [dict(role="user", content="<image>Who is this?"), dict(role="assistant", content="Ada.")]
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
TALK_OF_TOOLS = [{"from": "human", "value": "I have rice."}, GPT, {"from": "human", "value": "And peppers."},
    {"from": "function_call", "value": json.dumps(dict(name="search_recipes", arguments=dict(ingredients=["rice", "peppers"])))},
    {"from": "observation", "value": json.dumps(dict(recipes=[dict(name="Fried rice")]))}, {"from": "gpt", "value": "Fried rice."}]
TOOLS = [dict(name="search_recipes", description="Search", parameters=dict(type="object",
    properties=dict(ingredients=dict(type="array", items=dict(type="string"))), required=["ingredients"]))]
DEMO_FILES = {"identity.json": IDENTITY, "alpaca_en_demo.json": [dict(instruction="Describe it.", input="", output="It is old.")],
    "glaive_toolcall_en_demo.json": [dict(conversations=TALK_OF_TOOLS, tools=json.dumps(TOOLS))],
    "mllm_demo.json": [dict(messages=ASKED, images=["mllm_demo_data/1.jpg"])],
    "dpo_en_demo.json": [dict(conversations=[HUMAN], chosen=GPT, rejected={"from": "gpt", "value": "No."})],
    "kto_en_demo.json": [dict(messages=ASKED, label=True)]}


@pytest.fixture
def demos(place):
    "A clone of that project as far as it matters: its demo data and a config"
    for name, rows in DEMO_FILES.items(): (place/"data"/name).write_text(json.dumps(rows))
    (place/"data"/"c4_demo.jsonl").write_text("".join(json.dumps(dict(text=f"Text {at}. " + "word " * at)) + "\n" for at in range(6)))
    (place/"data"/"dataset_info.json").write_text(json.dumps(DEMO_INFO))
    return place


def test_demo_data_becomes_rows(demos):
    "The example that stands in their README: identity and alpaca, and a talk that calls a tool"
    found = prepare_llamafactory(written(demos, dataset="identity,alpaca_en_demo,glaive_toolcall_en_demo"), demos/"run")
    rows = load_training_data(found.config.data_path)
    assert [len(read_row(row).messages) for row in rows] == [2, 2, 2, 6]
    tools = read_row(rows[-1])
    assert tools.tools[0]["function"]["name"] == "search_recipes"
    assert tools.messages[3]["tool_calls"][0]["function"] == dict(name="search_recipes", arguments=dict(ingredients=["rice", "peppers"]))
    assert tools.messages[4]["role"] == "tool"


@pytest.mark.parametrize("name, said", [("mllm_demo", "has images"), ("dpo_en_demo", "has pairs of answers"),
    ("kto_en_demo", "has kto_tag"), ("ultrachat_200k", "nobody/none_such:train_sft")])
def test_demo_data_of_other_trainings_is_refused(demos, name, said):
    with pytest.raises((ConfigError, DataError)) as error: prepare_llamafactory(written(demos, dataset=f"identity,{name}"), demos/"run")
    assert said in str(error.value)
    assert not (demos/"run").exists()


def test_plain_text_is_trained_on_whole(demos):
    "Stage pt, as examples/train_lora/qwen3_lora_pretrain.yaml has it: no template, all of the text, and what happens to long ones is said"
    path = written(demos, stage="pt", dataset="c4_demo", template=..., max_steps=2, per_device_train_batch_size=2, val_size=2)
    found = prepare_llamafactory(path, demos/"run")
    run = found.config.output_dir
    assert load_training_data(found.config.data_path)[1] == dict(text="Text 1. word ") and (run/"training_data_custom_text.json").is_file()
    packing = next(key for key in found.keys if key.name.startswith("packing"))
    assert packing.value is True and "split such texts" in packing.remark
    result = LoRATrainer(read_meta(run).to_config()).train(show=False)
    assert result.steps == 2


@pytest.mark.parametrize("name, said", [("glaive_toolcall_en_demo", "stage: sft"), ("dpo_en_demo", "pairs of answers")])
def test_stage_pt_takes_text_alone(demos, name, said):
    with pytest.raises(ConfigError, match=said): prepare_llamafactory(written(demos, stage="pt", dataset=name), demos/"run")


def test_a_text_without_its_column_is_named(demos):
    (demos/"data"/"c4_demo.jsonl").write_text(json.dumps(dict(content="a")) + "\n")
    with pytest.raises(DataError, match="c4_demo.jsonl"): prepare_llamafactory(written(demos, stage="pt", dataset="c4_demo"), demos/"run")


@pytest.mark.parametrize("keys, said", [  # of the other files in examples/train_lora
    (dict(stage="dpo", dataset="dpo_en_demo", pref_beta=.1, pref_loss="sigmoid"), "stage: 'dpo'"),
    (dict(stage="kto", dataset="kto_en_demo", pref_beta=.1), "stage: 'kto'"), (dict(stage="rm", dataset="dpo_en_demo"), "stage: 'rm'"),
    (dict(deepspeed="examples/deepspeed/ds_z3_config.json"), "deepspeed: Runs share"),
    (dict(ray_num_workers=4), "ray_num_workers: Runs share"),
    (dict(tokenized_path="saves/qwen3-4b/dataset/sft"), "tokenized_path: "),
    (dict(dataset="mllm_demo,identity", image_max_pixels=262144, video_max_pixels=16384), "image_max_pixels: Rows with images"),
    (dict(video_fps=1.0, video_maxlen=256, freeze_vision_tower=True), "freeze_vision_tower: ")], ids=str)
def test_their_other_examples_are_refused_by_name(demos, keys, said):
    with pytest.raises(ConfigError) as error: prepare_llamafactory(written(demos, **keys), demos/"run")
    assert said in str(error.value) and not (demos/"run").exists()


def test_warmup_in_steps_becomes_a_share(demos):
    path = written(demos, warmup_steps=2, max_steps=20, save_strategy="epoch", gradient_accumulation_steps=1)
    found = prepare_llamafactory(path, demos/"run")
    assert round(found.config.warmup_ratio * 20) == 2 and found.config.save_steps == 2 and "warmup_ratio=0.1" in str(found)
