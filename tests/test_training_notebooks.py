"""Notebooks and scripts that train with Unsloth or TRL, as their users write them:
read by their syntax tree, never run; what is not known is asked for; and what Unsloth's own command takes"""
import dataclasses
import json
import time
from pathlib import Path

import pytest
import yaml

from sage_finetune import LoRATrainer, load_training_data
from sage_finetune.config import LoRAConfig, PresetConfigs, TrainingConfig
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data import unsloth
from sage_finetune.data.migrate import migrate, recognize
from sage_finetune.data.training_notebooks import prepare_training_notebook, read_training_notebook
from sage_finetune.data.unsloth import UNSLOTH_NAMES, unsloth_config, unsloth_remarks, write_unsloth
from sage_finetune.runs.folder import read_meta

INSTALL = """%%capture
import os
if "COLAB_" not in "".join(os.environ.keys()):
    !pip install unsloth
else:
    !pip install --no-deps bitsandbytes accelerate peft \\
        trl triton
"""
MODEL = """from unsloth import FastLanguageModel
import torch
max_seq_length = 2048 # Choose any! We auto support RoPE Scaling internally!
dtype = None # None for auto detection. Float16 for Tesla T4, V100, Bfloat16 for Ampere+
load_in_4bit = True # Use 4bit quantization to reduce memory usage. Can be False.

fourbit_models = [
    "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
    "unsloth/Mistral-Small-Instruct-2409",
] # More models at https://huggingface.co/unsloth

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Llama-3.2-3B-Instruct",
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
    # token = "hf_...", # use one if using gated models
)"""
ADAPTER = """model = FastLanguageModel.get_peft_model(
    model,
    r = 16, # Choose any number > 0 ! Suggested 8, 16, 32, 64, 128
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                      "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0, # Supports any, but = 0 is optimized
    bias = "none",    # Supports any, but = "none" is optimized
    use_gradient_checkpointing = "unsloth", # True or "unsloth" for very long context
    random_state = 3407,
    use_rslora = False,  # We support rank stabilized LoRA
    loftq_config = None, # And LoftQ
)"""
DATA = """from unsloth.chat_templates import get_chat_template
tokenizer = get_chat_template(tokenizer, chat_template = "llama-3.1")

def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False) for convo in convos]
    return { "text" : texts, }

from datasets import load_dataset
dataset = load_dataset("json", data_files = "talks.json", split = "train")
from unsloth.chat_templates import standardize_sharegpt
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched = True,)"""
TRAIN = """from trl import SFTTrainer
from transformers import TrainingArguments, DataCollatorForSeq2Seq
from unsloth import is_bfloat16_supported

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
    dataset_num_proc = 2,
    packing = False, # Can make training 5x faster for short sequences.
    args = TrainingArguments(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 5,
        # num_train_epochs = 1, # Set this for 1 full training run.
        max_steps = 60,
        learning_rate = 2e-4,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = "outputs",
        report_to = "none", # Use this for WandB etc
    ),
)"""
ANSWERS = """from unsloth.chat_templates import train_on_responses_only
trainer = train_on_responses_only(
    trainer,
    instruction_part = "<|start_header_id|>user<|end_header_id|>\\n\\n",
    response_part = "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
)"""
AFTER = """#@title Show current memory stats
gpu_stats = torch.cuda.get_device_properties(0)
trainer_stats = trainer.train()
model.save_pretrained("lora_model")
if False:
    from unsloth import FastLanguageModel
    model, tokenizer = FastLanguageModel.from_pretrained(model_name = "lora_model", max_seq_length = 1)"""
CELLS = dict(install=INSTALL, model=MODEL, adapter=ADAPTER, data=DATA, train=TRAIN, after=AFTER)
SCRIPT = """import argparse
from datasets import load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
import torch
import trl

MODEL = "Qwen/Qwen2.5-0.5B"

def main():
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=bits, device_map="auto", torch_dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    dataset = load_dataset("json", data_files={"train": "rows.jsonl"}, split="train").train_test_split(test_size=0.1, seed=1)
    peft_config = LoraConfig(r=8, lora_alpha=2 * 8, lora_dropout=0.05, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    args = trl.SFTConfig(output_dir=f"out-{MODEL.lower()}", num_train_epochs=2, per_device_train_batch_size=4, assistant_only_loss=True,
        eval_strategy="steps", eval_steps=5, save_strategy="epoch")
    trainer = trl.SFTTrainer(model, args=args, train_dataset=dataset["train"], eval_dataset=dataset["test"], peft_config=peft_config,
        processing_class=tokenizer)
    trainer.train()

if __name__ == "__main__":
    main()
"""
TALK = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "Pip."}]


@pytest.fixture
def place(tmp_path):
    "A folder with the rows the notebooks name"
    (tmp_path/"talks.json").write_text(json.dumps([dict(conversations=TALK, score=3)] * 8))
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(dict(prompt=f"Lamp {at}?", completion="Red.")) + "\n" for at in range(20)))
    return tmp_path


def notebook(place, *extra, **cells):
    "The notebook with other cells; None leaves one out"
    sources = [source for source in (CELLS | cells).values() if source is not None] + list(extra)
    made = [dict(cell_type="markdown", metadata={}, source="# Fine-tune")]
    made += [dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=source.splitlines(True)) for source in sources]
    (place/"unsloth.ipynb").write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    return place/"unsloth.ipynb"


def script(place, source=SCRIPT, **changes):
    "The script with some of its texts replaced"
    for old, new in changes.values():
        assert old in source
        source = source.replace(old, new)
    (place/"train.py").write_text(source)
    return place/"train.py"


def trained(place, old="", new="", **cells):
    "A notebook whose trainer cell is changed"
    assert old in TRAIN
    return notebook(place, **dict(train=TRAIN.replace(old, new)) | cells)


# ---- what is taken over ---------------------------------------------------------------------------------------------

def test_a_notebook_of_unsloth_is_taken_over(place):
    "All of it as it stands on the web: arguments, what they leave out, and what is different here"
    found = read_training_notebook(notebook(place))
    ours = found.config
    assert (ours.model_name, ours.max_length, ours.load_in_4bit, ours.gradient_checkpointing) == ("unsloth/Llama-3.2-3B-Instruct", 2048,
        True, True)
    assert (ours.lora.r, ours.lora.lora_alpha, ours.lora.lora_dropout, len(ours.lora.target_modules)) == (16, 16, 0, 7)
    assert (ours.per_device_train_batch_size, ours.gradient_accumulation_steps, ours.max_steps, ours.learning_rate, ours.optim,
        ours.weight_decay,
        ours.lr_scheduler_type, ours.seed, ours.fp16, ours.bf16) == (2, 4, 60, 2e-4, "adamw_8bit", .01, "linear", 3407, None, None)
    assert found.steps == dict(warmup=5) and found.rows.steps == ("standardize_sharegpt", "map") and not found.on_answers
    lines = {key.name: key for key in found.keys}
    assert lines["the loss"].here == "only answers are trained on" and "questions are trained on too" in lines["the loss"].remark
    assert "chat template of the model" in lines["get_chat_template.chat_template"].remark
    assert {"TrainingArguments.fp16", "get_peft_model.r", "from_pretrained.load_in_4bit", "SFTTrainer.packing"} <= lines.keys()
    assert "max_steps=60" in str(found) and "<table>" in found._repr_html_()


@pytest.mark.parametrize("cells, on_answers", [
    (dict(train=TRAIN + "\n" + ANSWERS), True), (dict(), False),
    (dict(train=TRAIN.replace("TrainingArguments(", "SFTConfig(assistant_only_loss=True, ")), True),
    (dict(train=TRAIN.replace("TrainingArguments(", "SFTConfig(completion_only_loss=True, ")), True),
    (dict(train=TRAIN.replace("DataCollatorForSeq2Seq(tokenizer", "DataCollatorForCompletionOnlyLM('### Response:', tokenizer")), True)],
    ids=["responses_only", "nothing", "assistant_only_loss", "completion_only_loss", "collator"])
def test_what_the_loss_is_computed_on_is_said(place, cells, on_answers):
    found = read_training_notebook(notebook(place, **cells))
    assert found.on_answers is on_answers
    assert next(key for key in found.keys if key.name == "the loss").remark == "" if on_answers else "questions" in found.keys[0].remark


def test_a_script_of_trl_is_taken_over(place):
    "Functions, a module's own names, LoraConfig, bitsandbytes, a split"
    found = prepare_training_notebook(script(place, model=('"Qwen/Qwen2.5-0.5B"', '"tiny"')), place/"run")
    ours = found.config
    assert (ours.load_in_4bit, ours.lora.r, ours.lora.lora_alpha, ours.lora.target_modules, ours.max_length) == (True, 8, 16, "all-linear",
        1024)
    assert (ours.learning_rate, ours.gradient_checkpointing, ours.lr_scheduler_type, ours.optim) == (2e-5, True, "linear",
        "adamw_torch_fused")
    assert (ours.eval_ratio, ours.eval_steps, ours.save_steps, ours.num_train_epochs) == (.1, 5, 5, 2)  # 18 rows, 4 at once
    assert found.on_answers and len(load_training_data(ours.data_path)) == 20


def test_what_a_notebook_leaves_out_is_what_its_library_takes(place):
    bare = 'trainer = SFTTrainer(model, train_dataset=dataset)'
    of_unsloth = read_training_notebook(notebook(place, train=bare, adapter="model = FastLanguageModel.get_peft_model(model)"))
    ours = of_unsloth.config
    assert (ours.per_device_train_batch_size, ours.gradient_accumulation_steps, ours.learning_rate, ours.optim, ours.weight_decay,
        ours.seed,
        ours.lora.r, ours.lora.lora_alpha, ours.num_train_epochs) == (4, 2, 5e-5, "adamw_8bit", .001, 3407, 16, 16, 3)
    assert of_unsloth.steps == dict(warmup=.1) and ours.max_length == 2048
    of_trl = script(place, "from trl import SFTTrainer\nfrom peft import LoraConfig\nSFTTrainer('tiny', train_dataset=rows, "
        "peft_config=LoraConfig(target_modules=['q_proj']))")
    ours = read_training_notebook(of_trl).config
    assert (ours.model_name, ours.per_device_train_batch_size, ours.gradient_accumulation_steps, ours.learning_rate, ours.lora.r,
        ours.lora.lora_alpha,
        ours.warmup_ratio, ours.max_length, ours.gradient_checkpointing, ours.load_in_4bit) == ("tiny", 8, 1, 2e-5, 8, 8, 0, 1024, True,
        False)


@pytest.mark.parametrize("old, new, fields", [
    ("max_steps = 60", "num_train_epochs = 1", dict(num_train_epochs=1, max_steps=None)),
    ("max_steps = 60", "max_steps = -1", dict(max_steps=None)),
    ("learning_rate = 2e-4", "learning_rate = 1e-4 * 2", dict(learning_rate=2e-4)), ("seed = 3407", "seed = int_seed", dict(seed=7)),
    ('optim = "adamw_8bit"', 'optim = "paged_adamw_8bit"', dict(optim="paged_adamw_8bit")),
    ("bf16 = is_bfloat16_supported()", "bf16 = torch.cuda.is_bf16_supported()", dict(bf16=None)),
    ("fp16 = not is_bfloat16_supported(),", "fp16 = True,", dict(fp16=True, bf16=None)),
    ('report_to = "none"', 'report_to = ["tensorboard"]', dict(report_to="tensorboard")),
    ("max_seq_length = max_seq_length,", "", dict(max_length=2048)),
    ("max_seq_length = max_seq_length,", "max_seq_length = 512,", dict(max_length=512)),
    ('lr_scheduler_type = "linear"', 'lr_scheduler_type = "cosine", warmup_ratio = 0.03',
    dict(lr_scheduler_type="cosine", warmup_ratio=.03)),
    ("weight_decay = 0.01", "**dict(weight_decay = 0.5)", dict(weight_decay=.5))], ids=str)
def test_values_become_ours(place, old, new, fields):
    config = read_training_notebook(trained(place, old, new, install="int_seed = 7")).config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("old, new, fields", [
    ("r = 16,", "r = 8 if load_in_4bit else 16,", dict(r=8)), ("lora_alpha = 16", "lora_alpha = 2 * 16", dict(lora_alpha=32)),
    ("use_rslora = False", "use_rslora = True, modules_to_save = ['lm_head']", dict(use_rslora=True, modules_to_save=["lm_head"])),
    ("target_modules = [", "target_modules = list_of + [",
    dict(target_modules=["x", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj"]))], ids=str)
def test_values_of_the_adapter_become_ours(place, old, new, fields):
    assert old in ADAPTER
    lora = read_training_notebook(notebook(place, install="list_of = ['x']", adapter=ADAPTER.replace(old, new))).config.lora
    assert {name: getattr(lora, name) for name in fields} == fields


# ---- what is not known, and what is refused -------------------------------------------------------------------------

@pytest.mark.parametrize("old, new, said", [
    ("2e-4", 'float(os.environ["LR"])', "TrainingArguments.learning_rate (float(os.environ"),
    ("= 60", "= steps()", "TrainingArguments.max_steps (steps()"),
    ("weight_decay = 0.01", "**more", "TrainingArguments.** (more"),
    ("seed = 3407", "seed = random.randint(0, 9)", "TrainingArguments.seed"),
    ("max_steps = 60", "max_steps = len(dataset) // 8", "TrainingArguments.max_steps (len(dataset) // 8"),
    (")", ")\ntrainer.args.learning_rate = 1", "trainer.args.learning_rate (set afterwards")], ids=str)
def test_what_only_running_would_tell_is_asked_for(place, old, new, said):
    path = notebook(place, train=TRAIN + "\ntrainer.args.learning_rate = 1" if old == ")" else TRAIN.replace(old, new))
    with pytest.raises(ConfigError) as error: read_training_notebook(path)
    assert said in str(error.value) and "known=" in str(error.value)


def test_answers_are_taken(place):
    path = trained(place, "2e-4", "lr()", adapter=ADAPTER.replace("r = 16", "r = rank()"))
    with pytest.raises(ConfigError, match=r"get_peft_model.r \(rank\(\), cell 3\).*TrainingArguments.learning_rate"):
        read_training_notebook(path)
    config = read_training_notebook(path, known={"get_peft_model.r": 4, "TrainingArguments.learning_rate": 1e-3}).config
    assert (config.lora.r, config.learning_rate) == (4, 1e-3)


def test_answers_to_what_is_not_said_at_all(place):
    "Layers that only PEFT would choose, a length that is not limited there; and answers nobody asked for"
    path = script(place, layers=('target_modules="all-linear", ', ""), limit=("num_train_epochs=2", "num_train_epochs=2, max_length=None"))
    config = read_training_notebook(path, known={"LoraConfig.target_modules": ["q_proj"], "SFTConfig.max_length": 64}).config
    assert (config.lora.target_modules, config.max_length) == (["q_proj"], 64)
    with pytest.raises(ConfigError, match="known has 'learning_rate'"): read_training_notebook(path, known={"learning_rate": 1})
    with pytest.raises(ConfigError, match="lr: not known here"): read_training_notebook(path, known={"SFTConfig.lr": 1})


@pytest.mark.parametrize("code, value", [
    ("r = 4\nr = 8", 8), ("r = 4\nif flag: r = 8", None), ("r = 4\nif True: r = 8", 8), ("r = 4\nif flag: r = 4", 4),
    ("for r in (4, 8): pass", None), ("r = 4\nfor at in range(3): r = r * 2", None), ("r = 4\nr += 4", 8), ("r, s = 4, 8", 4),
    ("r: int = 4", 4),
    ("try: r = 4\nexcept Exception: r = 8", None), ("with a as b: r = 4", 4), ("r = [4][0]", 4), ("r = dict(a=4)['a']", 4),
    ("sizes = {'r': 4}\nr = sizes['r']", 4), ("sizes = {'r': 4}\nsizes['r'] = 8\nr = sizes['r']", None), ("r = int(f'{4}')", None),
    ("r = 4\ndel r", None), ("while x: r = 4", None), ("(r := 4)", 4), ("r = -(-4)", 4), ("r = 9 // 2", 4),
    ("r = 4 if 'a' == 'b' else 8", 8),
    ("import os\nr = os.cpu_count()", None), ("def f(r=4): pass\nr = f()", None), ("r = (lambda: 4)()", None),
    ("r = [x for x in [4]][0]", None)],
    ids=lambda value: str(value)[:50])
def test_names_have_the_value_that_is_certain(place, code, value):
    path = notebook(place, install=code, adapter=ADAPTER.replace("r = 16", "r = r"))
    if value is not None: assert read_training_notebook(path).config.lora.r == value
    else:
        with pytest.raises(ConfigError, match=r"get_peft_model\.r "): read_training_notebook(path)


@pytest.mark.parametrize("cells, said", [
    (dict(train=TRAIN.replace("SFTTrainer(", "DPOTrainer(")), "DPOTrainer"),
    (dict(train=TRAIN.replace("SFTTrainer(", "MyTrainer(")), "MyTrainer"),
    (dict(train=None), "no call of SFTTrainer"), (dict(train=TRAIN + "\n" + TRAIN), "2 trainers (cell 5, cell 5)"),
    (dict(adapter=None), "no adapter"),
    (dict(model=MODEL.replace("FastLanguageModel", "FastVisionModel")), "images"), (dict(model=None), "loads no model"),
    (dict(model=MODEL.replace("dtype = dtype", "full_finetuning = True")), "full_finetuning: Only LoRA"),
    (dict(model=MODEL.replace("dtype = dtype", "revision = 'main'")), "revision: Download"),
    (dict(adapter=ADAPTER.replace("r = 16", "finetune_mlp_modules = False")), "finetune_mlp_modules: False"),
    (dict(adapter=ADAPTER.replace("loftq_config = None", "loftq_config = dict(bits=4)")), "loftq_config: "),
    (dict(adapter=ADAPTER.replace("r = 16", "layers_to_transform = [0]")), "layers_to_transform: Name the layers as a pattern"),
    (dict(train=TRAIN.replace("seed = 3407", "deepspeed = 'ds.json'")), "deepspeed: Runs share"),
    (dict(train=TRAIN.replace("seed = 3407", "label_smoothing_factor = 0.1")), "label_smoothing_factor: 0.1"),
    (dict(train=TRAIN.replace("seed = 3407", "adam_beta2 = 0.95")), "adam_beta2: 0.95"),
    (dict(train=TRAIN.replace("seed = 3407", "sede = 3407")), "sede: not known here"),
    (dict(train=TRAIN.replace("seed = 3407", "num_train_epochs = 1.5")), "max_steps"),
    (dict(train=TRAIN.replace('optim = "adamw_8bit"', 'optim = "galore_adamw"')), "optim"),
    (dict(train=TRAIN.replace("packing = False", "compute_loss_func = f")), "compute_loss_func"),
    (dict(train=TRAIN.replace('report_to = "none"', 'report_to = "swanlab"')), "swanlab")], ids=lambda value: str(value)[-60:])
def test_what_would_train_another_model_is_refused_by_name(place, cells, said):
    with pytest.raises(ConfigError) as error: prepare_training_notebook(notebook(place, **cells), place/"run")
    assert said in str(error.value) and not (place/"run").exists()


def test_fp4_and_unnamed_layers_are_not_guessed(place):
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type: 'fp4'"): read_training_notebook(script(place, bits=('"nf4"', '"fp4"')))
    with pytest.raises(ConfigError, match="LoraConfig.target_modules .*PEFT chooses"):
        read_training_notebook(script(place, layers=('target_modules="all-linear", ', "")))
    with pytest.raises(ConfigError, match="SEQ_CLS"): read_training_notebook(script(place, task=("TaskType.CAUSAL_LM", "TaskType.SEQ_CLS")))
    with pytest.raises(ConfigError, match="max_length .None: no limit"):
        read_training_notebook(script(place, limit=("num_train_epochs=2", "num_train_epochs=2, max_length=None")))


def test_a_notebook_is_never_a_permission(place):
    path = trained(place, 'report_to = "none"', 'report_to = "wandb"',
        model=MODEL.replace("dtype = dtype", "trust_remote_code = True, token = 'hf_abc'"))
    found = read_training_notebook(path)
    assert {*found.refused} == {"report_to", "trust_remote_code"} and not found.config.trust_remote_code and "hf_abc" not in str(found)
    assert read_training_notebook(path, trust_remote_code=True).config.trust_remote_code


def test_tokens_that_are_added(place):
    assert read_training_notebook(notebook(place, install="tokenizer.add_special_tokens({'pad_token': '<p>'})")).config.new_tokens is None
    path = notebook(place, install="add_new_tokens(model, tokenizer, new_tokens=['<a>', '<b>'])")
    assert read_training_notebook(path).config.new_tokens == ["<a>", "<b>"]
    with pytest.raises(ConfigError, match="the tokens it adds"): read_training_notebook(notebook(place,
        install="tokenizer.add_tokens(words())"))


# ---- the rows -------------------------------------------------------------------------------------------------------

def test_a_notebook_trains(place):
    path = trained(place, "max_steps = 60", "max_steps = 2", model=MODEL.replace("unsloth/Llama-3.2-3B-Instruct", "tiny").replace(
        "load_in_4bit = True", "load_in_4bit = False").replace("2048", "128"))
    path.write_text(path.read_text().replace("adamw_8bit", "adamw_torch").replace('\\"unsloth\\", # True', "False, #"))
    found = prepare_training_notebook(path, place/"run")
    assert not (place/"outputs").exists() and round(found.config.warmup_ratio * 2) == 1  # 5 of 2 steps is more than half
    assert "not possible here" in str(found) and "not run" in found.keys[-2].remark
    result = LoRATrainer(read_meta(place/"run").to_config()).train(show=False)
    assert result.steps == 2 and (place/"run"/"lora_weights"/"adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="already holds a run"): prepare_training_notebook(path, place/"run")


TWO_SETS = """one = load_dataset("json", data_files="talks.json", split="train")
other = load_dataset("json", data_files="rows.jsonl", split="train")
dataset = concatenate_datasets([one, other])"""
TINY = MODEL.replace("unsloth/Llama-3.2-3B-Instruct", "tiny")


@pytest.mark.parametrize("data, count", [
    ('dataset = load_dataset("json", data_files="talks.json")["train"]', 8),
    ('dataset = load_dataset("json", data_files=["talks.json"] * 1)', None),
    ('dataset = load_dataset("json", data_files=["talks.json", "talks.json"], split="train")', 16),
    ('dataset = load_dataset("talks.json", split="train")', 8), ('dataset = Dataset.from_json("talks.json")', 8),
    ('dataset = load_dataset("json", data_files="talks.json", split="train[:5]")', 5),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").select(range(3))', 3),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").shuffle(seed=1).map(f).take(3)', None),
    ('dataset = concatenate_datasets([load_dataset("json", data_files="talks.json", split="train")] + [])', 8),
    ('a, b = [load_dataset("json", data_files=name, split="train") for name in x]\ndataset = a', None),
    (TWO_SETS, 28), (TWO_SETS + ".select(range(9))", 9), (TWO_SETS + '["train"].select(range(9)).select(range(4))', 4),
    ('dataset = load_dataset("json", data_files=["talks.json", "rows.jsonl"], split="train[:9]")', 9),
    *((f'dataset = load_dataset("json", data_files="talks.json", split="{split}")', None)
        for split in ("train[:90%]", "train[90%:]", "train[100:]", "train[1:3]", "train+test", "test", "train[-3:]")),
    ('dataset = load_dataset("json", data_files=dict(train="talks.json"), split="test")', None),
    ('dataset = load_dataset("json", data_files=dict(test="talks.json"), split="test")', 8),
    ('dataset = load_dataset("talks.json", split="test")', None),
    ('dataset = keep_good(load_dataset("json", data_files="talks.json", split="train"))', None),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").train_test_split(train_size=f(3))["train"]', None),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").train_test_split(.1)["test"]', None),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").train_test_split(.1)["train"].select(range(2))', None),
    ('dataset = load_dataset("json", data_files="talks.json", split="train").filter(lambda row: row["score"] > 2)', None),
    ('dataset = load_dataset("json", data_files="https://host/rows.json", split="train")', None),
    ('dataset = load_dataset("owner/none_such")', None),
    ('dataset = load_dataset("owner/name", "subset", split="train")', None), ('dataset = load_dataset(name_of(), split="train")', None),
    ('dataset = load_dataset("text", data_files="a.txt")', None), ('dataset = load_dataset("json", data_files="none.json")', None),
    ('dataset = Dataset.from_list(make())', None), ('dataset = load_dataset("json", data_files="/dev/zero", split="train")', None)],
    ids=lambda value: str(value)[:70])
def test_rows_are_read_or_asked_for(place, data, count):
    "Where the notebook names a file, that; else a file that stands in for what only running would make"
    path = notebook(place, model=TINY, data=data)
    if count is None:
        with pytest.raises((ConfigError, RunError)) as error: prepare_training_notebook(path, place/"run")
        assert "name it with data" in str(error.value) or "no ordinary file" in str(error.value)
        assert not (place/"run").exists()
    found = prepare_training_notebook(path, place/"run", data=place/"talks.json" if count is None else None)
    assert len(load_training_data(found.config.data_path)) == (count or 8)


def test_columns_and_texts(place):
    "Columns of their own, and plain text in a column that is not called text"
    (place/"own.json").write_text(json.dumps([dict(frage="a", antwort="b")] * 4))
    names = dict(question="frage", answer="antwort")
    path = notebook(place, model=TINY, data='dataset = load_dataset("json", data_files="own.json", split="train")')
    with pytest.raises(DataError, match="column_map"): prepare_training_notebook(path, place/"run")
    found = prepare_training_notebook(path, place/"run", column_map=names)
    assert load_training_data(found.config.data_path)[0] == dict(question="a", answer="b")
    (place/"own.json").write_text(json.dumps([dict(body="a text")] * 4))
    path.write_text(path.read_text().replace('dataset_text_field = \\"text\\"', 'dataset_text_field = \\"body\\"'))
    found = prepare_training_notebook(path, place/"texts")
    assert load_training_data(found.config.data_path)[0] == dict(text="a text")


def test_held_out_rows(place):
    "A split of the notebook, rows of their own, and rows that only code makes"
    data = 'dataset = load_dataset("json", data_files="talks.json", split="train")\nothers = load_dataset("json", data_files="rows.jsonl", split="train")'
    evaluated = trained(place, "train_dataset = dataset", "train_dataset = dataset, eval_dataset = others", model=TINY, data=data)
    assert len(load_training_data(prepare_training_notebook(evaluated, place/"a").config.eval_path)) == 20
    unknown = trained(place, "train_dataset = dataset", "train_dataset = dataset, eval_dataset = make()", model=TINY, data=data)
    found = prepare_training_notebook(unknown, place/"b")
    assert found.config.eval_ratio == 0 and "not known: none are held out" in str(found)
    found = prepare_training_notebook(unknown, place/"c", eval_data=place/"rows.jsonl")
    assert len(load_training_data(found.config.eval_path)) == 20


SPLIT = 'dataset = load_dataset("json", data_files="rows.jsonl", split="train").train_test_split({})\n'


@pytest.mark.parametrize("size, ratio", [("train_size=0.9", .1), ("test_size=0.2", .2), ("4", .2), ("", .25), ("None, 0.8", .2)])
def test_the_share_that_is_split_off(place, size, ratio):
    "As datasets has it: the rest, where only the size of the other side is said; nothing said is a quarter"
    path = trained(place, "train_dataset = dataset", 'train_dataset = dataset["train"], eval_dataset = dataset["test"]', model=TINY,
        data=SPLIT.format(size))
    assert prepare_training_notebook(path, place/"run").config.eval_ratio == ratio


def test_held_out_rows_of_another_file_are_read(place):
    "A split of the rows to train on is not what the notebook measures by, then"
    data = SPLIT.format("0.1") + 'others = load_dataset("json", data_files="talks.json", split="train")'
    path = trained(place, "train_dataset = dataset", 'train_dataset = dataset["train"], eval_dataset = others', model=TINY, data=data)
    found = prepare_training_notebook(path, place/"run")
    assert found.config.eval_ratio == 0 and len(load_training_data(found.config.eval_path)) == 8
    assert "eval_dataset is something else" in str(found)


@pytest.mark.parametrize("added, said", [(", eval_dataset = dataset", "holds out the questions it trains on: all 20 rows"),
    (", eval_dataset = dataset.select(range(3))", "all 3 rows")])
def test_no_row_is_on_both_sides(place, added, said):
    data = 'dataset = load_dataset("json", data_files="rows.jsonl", split="train")'
    path = trained(place, "train_dataset = dataset", "train_dataset = dataset" + added, model=TINY, data=data)
    with pytest.raises(DataError, match=said): prepare_training_notebook(path, place/"run")
    assert not (place/"run").exists()


def test_rows_on_both_sides_are_taken_from_the_held_out_ones(place):
    (place/"more.jsonl").write_text("".join(json.dumps(dict(prompt=f"Lamp  {at}?", completion="Blue.")) + "\n" for at in range(15, 24)))
    data = 'dataset = load_dataset("json", data_files="rows.jsonl", split="train")\nothers = load_dataset("json", data_files="more.jsonl", split="train")'
    path = trained(place, "train_dataset = dataset", "train_dataset = dataset, eval_dataset = others", model=TINY, data=data)
    found = prepare_training_notebook(path, place/"run")
    assert len(load_training_data(found.config.eval_path)) == 4 and "5 ask what is trained on" in str(found)


def test_secrets_of_held_out_rows_are_left_out_too(place):
    token = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ12345678"
    (place/"more.jsonl").write_text(json.dumps(dict(prompt="A?", completion=token)) + "\n" + json.dumps(dict(prompt="B?", completion="b")))
    path = trained(place, "", "", model=TINY)
    with pytest.warns(UserWarning, match="left out"):
        found = prepare_training_notebook(path, place/"run", eval_data=place/"more.jsonl", skip_secrets=True)
    assert load_training_data(found.config.eval_path) == [dict(prompt="B?", completion="b")]


def test_data_without_a_row(place):
    (place/"talks.json").write_text("[]")
    with pytest.raises(DataError): prepare_training_notebook(notebook(place, model=TINY), place/"run")


def test_a_password_in_an_address_is_not_shown(place):
    secret = "https://me:pa55word99@host/rows.json"
    path = trained(place, "train_dataset = dataset", f"train_dataset = rows_of('{secret}')", model=TINY)
    with pytest.raises(ConfigError) as error: prepare_training_notebook(path, place/"run")
    assert "pa55word99" not in str(error.value) and "rows_of(" in str(error.value)
    path = notebook(place, model=TINY, data=f"dataset = load_dataset('{secret}', split='train')")
    with pytest.raises(ConfigError) as error: prepare_training_notebook(path, place/"run")
    assert "pa55word99" not in str(error.value)


# ---- hostile --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": 3}', '{"cells": [1]}', '{"cells": [{"cell_type": "code"}]}', "\x00",
    "{" * 5000,
    '{"cells": [{"cell_type": "code", "source": 3}]}', "x" * (1 << 22)], ids=range(10))
def test_a_file_that_is_no_notebook(place, text):
    (place/"bad.ipynb").write_text(text)
    with pytest.raises(ConfigError) as error: read_training_notebook(place/"bad.ipynb")
    assert "bad.ipynb" in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("code", ["(" * 5000, "-" * 100_000 + "1", "1" + "+1" * 100_000, "x = " + "[" * 300 + "]" * 300,
    "a" + ".a" * 50_000, "f(" * 80 + ")" * 80,
    "r = 2 ** 2 ** 2 ** 2 ** 2 ** 2", "x = 'a' * 10 ** 10", "if True:\n" * 90, "x = 1\nx = x + x\n" * 5000,
    "x = 'a'\n" + "x = x + x\n" * 200,
    "concatenate_datasets([" * 40 + "a" + "])" * 40, "load = " + "concatenate_datasets([load_dataset('a', split=" * 40 + "b" + ")])" * 40,
    "\n" * 1_000_000 + "x = 1", " " * 1_000_000 + "!", "(\n" + "a" * 1_000_000, "=".join(["a"] * 5000) + " = " + "+".join("1" * 900),
    "try:\n" + " x = 1\n" * 20_000 + "finally: pass",
    "".join(f"if a: x{at} = 1\n" for at in range(5000)), "def f(): return f()\nf()", "\x0c\x0b", "é = 1", "x: " + "9" * 5000],
    ids=range(23))
def test_no_code_takes_long_or_is_run(place, code):
    "Deep, long and growing code: read in bounded time, or named as no Python"
    began = time.monotonic()
    try: read_training_notebook(notebook(place, install=code))
    except ConfigError as error: assert "nested too deeply" in str(error)
    assert time.monotonic() - began < 20


def test_nothing_of_a_notebook_is_run(place):
    "Not even what looks like a constant"
    mark = place/"mark"
    code = f"open({str(mark)!r}, 'w').write('x')\nr = eval('1')\nimport os; os.system('touch {mark}')\nclass A:\n    x = open({str(mark)!r}, 'w')\n"
    read_training_notebook(notebook(place, install=code + f"!touch {mark}\n%run {mark}"))
    assert not mark.exists()


def test_a_text_that_looks_like_a_magic_stays(place):
    "Lines of a text, and a remainder at the beginning of a line"
    path = notebook(place, install='text = """\n! 8\n%x = 3\n"""\nr = (28\n    % 20)\nname = text[1]',
        adapter=ADAPTER.replace("r = 16", "r = r"),
        train=TRAIN.replace('output_dir = "outputs"', "run_name = name, output_dir = 'outputs'"))
    found = read_training_notebook(path)
    assert found.config.lora.r == 8 and next(key.value for key in found.keys if key.name.endswith("run_name")) == "!"


def test_cells_that_are_no_python_are_named(place):
    found = read_training_notebook(notebook(place, "this is no python", "%%bash\nrm -rf /\n(",
        "files = !ls\nmodel?\n?model\n%matplotlib inline"))
    assert [key.name for key in found.keys if "no Python" in key.here] == ["cell 7"]
    assert "\x1b" not in str(read_training_notebook(trained(place, '"outputs"', '"\\x1b[2J<b>"')))


# ---- one door -------------------------------------------------------------------------------------------------------

def test_whose_file_it_is(place):
    (place/"a.yml").write_text("base_model: tiny\nadapter: lora\nlora_r: 8\nlearning_rate: 1e-4\n")
    (place/"b.json").write_text(json.dumps(dict(model_name_or_path="tiny", stage="sft", dataset="x", learning_rate=1e-4)))
    assert [recognize(path) for path in (place/"a.yml", place/"b.json", notebook(place), script(place))] == ["axolotl", "llamafactory",
        "notebook", "notebook"]


@pytest.mark.parametrize("name, text, said", [("c.yaml", "a: 1", "llamafactory has model_name_or_path"),
    ("c.toml", "a = 1", "Configs end in .yaml"),
    ("c.yaml", "base_model: a\nmodel_name_or_path: b", "or for several"),
    ("c.json", '{"model_name": "tiny", "lora": {}}', "config of this package"),
    ("c.yaml", "- a", "holds a list"), ("c.yaml", None, "there is no config file"), ("c.ipynb", None, "there is no notebook")], ids=str)
def test_a_file_of_nobody(place, name, text, said):
    if text is not None: (place/name).write_text(text)
    with pytest.raises(ConfigError, match=said): migrate(place/name, place/"run")


def test_migrate_gives_each_what_it_takes(place):
    path = notebook(place, model=TINY, data="dataset = make()")
    found = migrate(path, place/"run", notebook=dict(data=place/"talks.json", eval_data=None))
    assert found.config.output_dir == place/"run" and "as you say" in str(found)
    with pytest.raises(ConfigError, match="is a run folder already"): migrate(place/"run", place/"other")
    with pytest.raises(ConfigError, match="notebook has no 'rows'"): migrate(path, place/"other", notebook=dict(rows=3))


# ---- for Unsloth ----------------------------------------------------------------------------------------------------

# What unsloth_cli/config.py of Unsloth 2026.8.19 (015bdef) declares: section -> key -> kind of its value
DECLARED = dict(
    data=dict(dataset=(str, type(None)), local_dataset=(list, type(None)), format_type=str),
    training=dict(training_type=str, max_seq_length=int, load_in_4bit=bool, output_dir=str, num_epochs=int, learning_rate=float,
    batch_size=int,
        gradient_accumulation_steps=int, warmup_steps=int, max_steps=int, save_steps=int, weight_decay=float, random_seed=int, packing=bool,
        train_on_completions=bool, gradient_checkpointing=str),
    lora=dict(lora_r=int, lora_alpha=int, lora_dropout=float, target_modules=str, vision_all_linear=bool, use_rslora=bool, use_loftq=bool,
        use_dora=bool, finetune_vision_layers=bool, finetune_language_layers=bool, finetune_attention_modules=bool,
        finetune_mlp_modules=bool),
    logging=dict(enable_wandb=bool, wandb_project=str, wandb_token=str, enable_tensorboard=bool, tensorboard_dir=str, hf_token=str))
CHOICES = dict(training_type={"lora", "full"}, format_type={"auto", "alpaca", "chatml", "sharegpt"},
    gradient_checkpointing={"unsloth", "true", "none"})


def test_the_names_are_those_it_declares():
    assert UNSLOTH_NAMES == {section: tuple(keys) for section, keys in DECLARED.items()}


@pytest.mark.parametrize("fields", [dict(), dict(load_in_4bit=True, max_steps=7),
    dict(gradient_checkpointing=True, report_to="tensorboard"),
    dict(lora=LoRAConfig(r=4, lora_dropout=.1, use_dora=True, target_modules=["q_proj", "v_proj"])),
    dict(data_path="owner/name:train", max_steps=3)], ids=str)
@pytest.mark.parametrize("row_format", ["alpaca", "messages", "conversation", "qa", "mixed"])
def test_all_that_is_written_is_accepted(place, fields, row_format):
    "Every section, key and kind of value is one that its classes declare"
    config = PresetConfigs.tiny(**dict(data_path=place/"rows.jsonl", output_dir=place/"run") | fields)
    content = yaml.safe_load(write_unsloth(config, place/"unsloth.yaml", row_format).read_text())
    assert {*content} == {"model", *DECLARED} and Path(content.pop("model")).is_dir()
    for section, keys in content.items():
        for name, value in keys.items():
            assert isinstance(value, DECLARED[section][name]), name
            assert not isinstance(value, bool) or DECLARED[section][name] is bool
            if name in CHOICES: assert value in CHOICES[name]


def test_no_field_of_ours_is_forgotten():
    "Each is written, said, or concerns this package alone"
    fields = {one.name for one in dataclasses.fields(TrainingConfig)}
    named = [*unsloth._WRITTEN, *unsloth._LACKS, *unsloth._OURS]
    assert {*named} == fields and len(named) == len(fields)
    of_adapter = [*unsloth._LORA_WRITTEN, *unsloth._LORA_LACKS]
    assert {*of_adapter} == {one.name for one in dataclasses.fields(LoRAConfig)} and len(of_adapter) == len({*of_adapter})


@pytest.mark.parametrize("mark", [dict(weight=0), dict(train=False)], ids=str)
def test_turns_that_are_not_trained_on_are_said(place, mark):
    path = place/"marked.json"
    for more in ({}, mark):
        path.write_text(json.dumps([dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b") | more])]))
        said = " ".join(unsloth_remarks(PresetConfigs.tiny(data_path=path)))
        assert ("every answer is trained on" in said) is bool(more)


def test_values_are_its_own(place):
    "20 rows in eights are 3 steps an epoch; all of them are trained on there"
    config = PresetConfigs.tiny(data_path=place/"rows.jsonl", num_train_epochs=4, warmup_ratio=.25, eval_ratio=.5,
        early_stopping_patience=2, seed=5)
    content = unsloth_config(config, "alpaca")
    training = content["training"]
    assert training["warmup_steps"] == 3 and training["train_on_completions"] and training["random_seed"] == 5
    said = " ".join(unsloth_remarks(config))
    assert all(text in said for text in ("eval_ratio=0.5: no rows are held out", "early_stopping_patience=2", "lr_scheduler_type='cosine'"))
    text = write_unsloth(config, place/"unsloth.yaml").read_text()
    assert text.startswith("# For Unsloth 2026.8.19") and "# Not said here: early_stopping_patience=2" in text
    with pytest.raises(ConfigError, match="data_path is not set"): unsloth_config(PresetConfigs.tiny(data_path=None))
    with pytest.raises(ConfigError, match="is a pattern"): unsloth_config(PresetConfigs.tiny(lora=LoRAConfig(target_modules=".*q_proj|v")))
    with pytest.raises((ConfigError, DataError)): unsloth_config(PresetConfigs.tiny(data_path=place/"none.jsonl"))
