"""The shipped weights of the embedded model: what it is, what it can do, what it can be taught; and that its files are the generator's."""
import json
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from sage_finetune.config import PresetConfigs, tiny_path
from sage_finetune.data.files import load_training_data, packaged
from sage_finetune.modeling.base import load_base
from sage_finetune.tiny import pretrain as tiny, world
from sage_finetune.tiny.demo import quickstart

SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def base():
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    print(f"loaded in {time.perf_counter() - started:.2f} s")
    return model, tokenizer


@pytest.fixture(scope="module")
def record(): return json.loads((tiny_path()/"pretraining.json").read_text())


def test_it_is_a_small_qwen2(base):
    model, tokenizer = base
    assert isinstance(model, Qwen2ForCausalLM)
    assert sum(weights.numel() for weights in model.parameters()) <= 4_000_000
    assert model.config.hidden_size // model.config.num_attention_heads in (32, 64)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.max_position_embeddings >= 512
    assert len(tokenizer) == model.config.vocab_size


def test_its_files_are_small_and_hold_bf16():
    assert sum((tiny_path()/name).stat().st_size for name in SHIPPED) <= 9_000_000
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    assert model.dtype == torch.bfloat16


def test_its_format_is_chatml(base):
    model, tokenizer = base
    messages = [dict(role="system", content="Be kind."), dict(role="user", content="Hello!"), dict(role="assistant", content="Hi!")]
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True) == \
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) in ((2, 0), ([2], 0))
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好!")) == "Grüße, 你好!"


def test_the_tokenizer_is_what_the_generator_makes(base):
    made = tiny.train_tokenizer()
    assert made.get_vocab() == base[1].get_vocab()
    assert made.encode("What does `count_boats` do?") == base[1].encode("What does `count_boats` do?")


def test_200_probes_it_has_not_read(base, record):
    found = tiny.skills(*base)
    print(found)
    assert found["asked"] == 200 and found["right"] >= 180
    assert all(right >= .75 * asked for right, asked in found["skills"].values()), found["skills"]
    assert found["ends"] >= 198
    assert abs(found["right"] - record["right"]) <= 2  # another CPU may round a tie another way


@pytest.mark.slow
@pytest.mark.parametrize("theme, seed", [("railway", 0), *(pytest.param(*case, marks=pytest.mark.full)
    for case in (("bakery", 1), ("invented", 5)))])
def test_it_can_be_taught(theme, seed):
    gained = tiny.teach(theme, seed, forgotten=False)
    print(gained)
    assert gained["rows"] <= 100
    assert gained["before"] == 0
    assert gained["after"] >= .9 * gained["asked"]


@pytest.mark.slow
def test_the_packaged_example_keeps_the_old_skills():
    gained = tiny.teach("lighthouse")
    print(gained)
    assert gained["after"] >= .9 * gained["asked"] and gained["before"] == 0
    assert gained["skills_after"] >= .85 * gained["skills_before"]


@pytest.mark.slow
@pytest.mark.parametrize("task", [task if task == "qa" else pytest.param(task, marks=pytest.mark.full) for task in world.TASK_EXAMPLES])
def test_the_example_of_each_task_is_learnt_and_little_is_forgotten(tmp_path, task):
    report = quickstart(task, tmp_path/"run", data=None, show=False)
    print(report)
    assert report.before.n_correct == 0 and report.after.accuracy >= .85 and report.kept >= .8
    assert report.skills_before.total == 200 and report.result.seconds < 120
    assert "old skills, exactly right" in str(report) and "held-out questions, exactly right" in str(report)


def test_the_packaged_files_are_what_the_world_writes(tmp_path):
    for path in world.write_examples(tmp_path): assert path.read_bytes() == packaged(path.stem).read_bytes(), path.name
    assert len(load_training_data("example")) <= 100
    assert [row["messages"] for row in load_training_data("skills")] == [list(sample.messages) for sample in world.probes()]


def test_no_probe_is_among_the_replayed_rows():
    asked = {sample.question for sample in world.probes() if len(sample.messages) == 2}
    assert len(asked) > 150 and not asked & {sample.question for sample in world.replay(60)}
    assert not any(map(world.is_probe, world.replay(60)))


def test_the_card_is_made_from_the_record(record):
    assert tiny.model_card(record) == (tiny_path()/"README.md").read_text()


def test_it_loads_by_its_name():
    model, tokenizer = load_base(PresetConfigs.tiny())
    assert tokenizer.eos_token == "<|im_end|>" and model.config.model_type == "qwen2"


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    vocabulary = tiny.train_tokenizer(600, 500)
    sizes = dict(steps=6, batch=8, tokenizer=vocabulary, hidden=64, layers=1, heads=2, inner=64)
    through = tiny.Pretraining(tmp_path/"through", **sizes)
    for _ in tiny.pretrain(through, save_every=100): pass
    for progress in tiny.pretrain(tiny.Pretraining(tmp_path/"stopped", **sizes), save_every=3):
        if progress.step == 4: break  # one step after the checkpoint is lost, and done again
    after = tiny.Pretraining(tmp_path/"stopped", **sizes)
    assert after.progress.step == 3
    for _ in tiny.pretrain(after): pass
    assert torch.allclose(after.model.lm_head.weight, through.model.lm_head.weight, atol=1e-6)
