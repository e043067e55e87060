"""Packed rows that do not read each other, shown by planting; and the plan:
every row once, the same in every process, step k without the steps before it."""
import hashlib
import json
import math
import pickle
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer

from sage_finetune.chat_format.rendering import render
from sage_finetune.config import tiny_path
from sage_finetune.core.errors import ConfigError, DataError
from sage_finetune.data.collation import collate, count_target_tokens, show_batch
from sage_finetune.modeling.packing import attention_inputs, check_cross_contamination, detect_packing_mode
from sage_finetune.training.batches import BatchPlan, pack, plan_batches

VOCABULARY = 160
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=256)
OLD = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
SHAPES = {
    "qwen2": ("Qwen2", SMALL),
    "qwen2-window": ("Qwen2", SMALL | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "llama": ("Llama", SMALL),
    "mistral-wide": ("Mistral", SMALL | dict(sliding_window=4096)),
    "mistral-narrow": ("Mistral", SMALL | dict(sliding_window=5)),
    "gemma": ("Gemma", SMALL | dict(head_dim=8)),
    "gemma2": ("Gemma2", SMALL | dict(head_dim=8, sliding_window=5)),
    "gemma3": ("Gemma3", SMALL | dict(head_dim=8, sliding_window=5)),
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=256)),
    "phi3": ("Phi3", SMALL | dict(pad_token_id=0, sliding_window=4096)),
    "mixtral": ("Mixtral", SMALL | dict(num_local_experts=4)),
    "opt": ("OPT", OLD | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "falcon": ("Falcon", OLD),
    "bloom": ("Bloom", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": ("Mamba", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "lfm2": ("Lfm2", SMALL | dict(layer_types=["conv", "full_attention"])),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}
CONFINED = ["qwen2", "qwen2-window", "llama", "mistral-wide", "mistral-narrow", "gemma", "gemma2", "gemma3", "gpt2", "phi3", "mixtral"]
NARROW = ("qwen2-window", "mistral-narrow", "gemma2", "gemma3")
BY_POSITIONS = [(name, kernel, "positions") for name in CONFINED for kernel in ("sdpa", "eager") if (name, kernel) != ("gemma2", "sdpa")]
BY_MASK = [(name, kernel, "mask") for name in CONFINED + ["opt", "falcon"] for kernel in ("sdpa", "eager") if name not in NARROW]


def make(name, kernel="eager", seed=0):
    "A model of some architecture with random weights, as it is trained but without dropout"
    kind, fields = SHAPES[name]
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**fields)
    torch.manual_seed(seed)
    return getattr(transformers, MODELS.get(kind, f"{kind}ForCausalLM"))._from_config(config, attn_implementation=kernel).eval()


def sample(size, seed, target_tokens=None):
    "An example of random tokens of which the last `target_tokens` are trained on"
    ids = torch.randint(10, VOCABULARY, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return dict(input_ids=ids, labels=[-100] * (size - (target_tokens or size)) + ids[size - (target_tokens or size):])


A, OTHER_A, B, C = sample(9, 1), sample(9, 2), sample(12, 3), sample(5, 4)
assert all(one != two for one, two in zip(A["input_ids"], OTHER_A["input_ids"]))


def logits_of_second(model, lines, path):
    "The logits of the second sample in the first line"
    batch = collate(lines, 0, packed=True)
    return model(**attention_inputs(batch, path)).logits[0, (batch["segments"][0] == 2)]


def loss_of(logits, labels):
    "Cross-entropy summed over the trained tokens"
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def gradients_of_second(model, lines, path):
    "The gradient of every weight with respect to the second sample's loss alone"
    batch = collate(lines, 0, packed=True)
    model.zero_grad()
    loss_of(model(**attention_inputs(batch, path)).logits, batch["labels"].masked_fill(batch["segments"] != 2, -100)).backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.grad is not None}


def far(one, two): return float((one - two).detach().norm() / two.detach().norm().clamp(min=1e-9))


# ---- nothing leaks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, kernel, path", BY_POSITIONS + BY_MASK)
def test_changing_a_moves_neither_logits_nor_gradients_of_b(name, kernel, path):
    model = make(name, kernel)
    lines, changed = [[A, B], [C]], [[OTHER_A, B], [C]]  # the second line is padded
    assert torch.equal(logits_of_second(model, lines, path), logits_of_second(model, changed, path))
    gradients, moved = gradients_of_second(model, lines, path), gradients_of_second(model, changed, path)
    assert gradients.keys() == moved.keys() and len(gradients) > 10
    # A decides how many tokens an expert adds up, and in which order
    if name == "mixtral": assert all(far(gradients[one], moved[one]) < 1e-6 for one in gradients)
    else: assert all(torch.equal(gradients[one], moved[one]) for one in gradients)
    assert max(float(grad.abs().max()) for grad in gradients.values()) > 0


@pytest.mark.parametrize("name, kernel, path", BY_POSITIONS + BY_MASK)
def test_a_packed_line_learns_what_its_rows_learn_alone(name, kernel, path):
    model, results = make(name, kernel), []
    with torch.no_grad(): alone = model(input_ids=torch.tensor([B["input_ids"]])).logits[0]
    assert far(logits_of_second(model, [[A, B], [C]], path), alone) < 1e-5
    for lines, way in (([[A, B], [C]], path), ([[A], [B], [C]], "padded")):
        batch = collate(lines, 0, packed=way == path)
        model.zero_grad()
        loss = loss_of(model(**attention_inputs(batch, way)).logits, batch["labels"])
        loss.backward()
        results.append((loss.item(), torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.grad is not None])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert far(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("name", CONFINED)
def test_rows_glued_together_do_leak(name):
    model = make(name)
    inputs = [torch.tensor([first["input_ids"] + B["input_ids"]]) for first in (A, OTHER_A)]
    with torch.no_grad(): one, two = (model(input_ids=ids).logits[0, 9:] for ids in inputs)
    assert far(one, two) > 1e-3


def run_on(lines, pad_id, packed):
    "A wrong `collate`: positions run on through the line"
    batch = collate(lines, pad_id, packed)
    return batch | dict(position_ids=torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))


@pytest.mark.parametrize("name", CONFINED)
def test_positions_that_are_not_reset_are_caught(name):
    model = make(name)
    assert check_cross_contamination(model, "positions").tight
    assert not check_cross_contamination(model, "positions", make_batch=run_on).tight


def test_wrong_positions_are_caught_where_the_mask_is_right():
    leak = check_cross_contamination(make("gpt2"), "mask", make_batch=run_on)  # GPT-2 adds its positions to the tokens
    assert leak.moved == 0 and leak.apart > .01 and not leak.tight


def test_a_mask_that_opens_a_window_is_caught():
    leak = check_cross_contamination(make("mistral-narrow"), "mask")
    assert leak.moved == 0 and leak.apart > .01 and not leak.tight


# ---- which path -------------------------------------------------------------------------------------------------------

class Deaf(nn.Module):
    "A model that takes positions and does not listen to them"
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("name", CONFINED)
def test_positions_are_enough_for_most_models(name):
    way = detect_packing_mode(make(name), max_length=128)
    assert way.name == "positions" and "do not see each other" in way.reason


@pytest.mark.parametrize("name, path, reason", [
    ("opt", "mask", "written-out mask"), ("falcon", "mask", "written-out mask"), ("bloom", "none", "the model fails"),
    ("mamba", "none", "cannot be packed"), ("lfm2", "none", "a packed sample moves")])
def test_models_that_do_not_look_at_positions(name, path, reason):
    way = detect_packing_mode(make(name), max_length=128)
    assert way.name == path and reason in way.reason and "\n" not in way.reason


def test_a_deaf_model_needs_the_mask_and_a_deaf_one_with_a_window_is_not_packed():
    assert detect_packing_mode(Deaf(make("llama"))).name == "mask"
    way = detect_packing_mode(Deaf(make("mistral-narrow")), max_length=128)
    assert way.name == "none" and "attention window of 5 tokens" in way.reason
    assert detect_packing_mode(Deaf(make("mistral-wide")), max_length=1024).name == "mask"
    assert detect_packing_mode(Deaf(make("mistral-wide")), max_length=None).name == "none"  # lines may be longer than the window


def test_looking_leaves_the_model_as_it_was():
    model = get_peft_model(make("qwen2"), LoraConfig(target_modules="all-linear", lora_dropout=.5, init_lora_weights=False))
    model.train()
    model.base_model.model.lm_head.eval()
    modes, rng_state = [module.training for module in model.modules()], torch.get_rng_state()
    assert detect_packing_mode(model).name == "positions"  # dropout would have moved everything
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(rng_state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert all(weights.grad is None for weights in model.parameters())


def test_an_adapter_learns_nothing_from_the_neighbour():
    model = get_peft_model(make("llama", "sdpa"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    gradients, moved = (gradients_of_second(model, [[first, B], [C]], "positions") for first in (A, OTHER_A))
    assert all("lora" in name and torch.equal(gradients[name], moved[name]) for name in gradients) and len(gradients) == 28


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3", "mixtral"])
def test_half_precision_is_no_leak(name):
    leak = check_cross_contamination(make(name, "sdpa").to(torch.bfloat16))
    assert leak.tight and leak.moved == 0 and leak.rounding > 1e-3
    assert not check_cross_contamination(make(name, "sdpa").to(torch.bfloat16), make_batch=run_on).tight
    assert name == "gemma3" or check_cross_contamination(make(name, "sdpa").to(torch.bfloat16), "mask").tight


def test_the_packaged_model_is_packed_by_positions():
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    began = time.perf_counter()
    assert detect_packing_mode(model, 1024).name == "positions"
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("name, kernel", [(name, kernel) for name, kernel, _ in BY_POSITIONS])
@pytest.mark.parametrize("path", ["padded", "positions", "mask"])
def test_a_batch_of_nothing_gives_no_nan(name, kernel, path):
    model, batch = make(name, kernel), collate([], 0, packed=True)
    loss = loss_of(model(**attention_inputs(batch, path)).logits, batch["labels"])
    loss.backward()
    assert loss.item() == 0 and count_target_tokens(batch["labels"]) == 0 and int(batch["attention_mask"].sum()) == 0
    assert all(torch.isfinite(weights.grad).all() and not weights.grad.any() for weights in model.parameters() if weights.grad is not None)


# ---- collate ----------------------------------------------------------------------------------------------------------

def test_the_first_token_of_every_packed_sample_is_not_trained_on():
    batch = collate([[A, B, C], [C, A]], pad_id=7, packed=True)
    starts = batch["position_ids"] == 0
    # the padding is a stretch of its own
    assert (batch["labels"][starts] == -100).all() and int(starts[0].sum()) == 3 and int(starts[1].sum()) == 3
    assert count_target_tokens(batch["labels"]) == sum(count_target_tokens(collate([[one]], 7)["labels"]) for one in (A, B, C, C, A))
    padding = batch["segments"] == 0
    assert ((batch["input_ids"][padding] == 7).all() and (batch["labels"][padding] == -100).all()
        and not batch["attention_mask"][padding].any())
    assert all(values.dtype == torch.int64 and values.shape == (2, 26) for values in batch.values())
    assert batch["segments"].tolist()[1] == [1] * 5 + [2] * 9 + [0] * 12


def test_padding_is_not_trained_on_by_its_place_and_not_by_its_id():
    row = dict(input_ids=[5, 6, 2], labels=[-100, 6, 2])
    batch = collate([[row], [dict(input_ids=[8], labels=[8])]], pad_id=2)
    assert batch["labels"].tolist() == [[-100, 6, 2], [8, -100, -100]] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(DataError, match="packed=True"): collate([[row, row]], pad_id=2)
    arrays = {name: np.array(values) for name, values in row.items()}
    assert torch.equal(collate([[arrays]], 2)["labels"], collate([[row]], 2)["labels"])


def test_a_batch_shows_itself(tiny_tokenizer):
    view = show_batch([[A, B], [C]], tiny_tokenizer)
    assert "2 × 21 tokens, 3 samples" in view.caption and "16 padding" in repr(view) and "─" in repr(view)
    assert view._repr_html_().count("another example begins") == 1 and "\x1b[" in view.ansi()
    assert repr(show_batch(collate([[A, B], [C]], tiny_tokenizer.pad_token_id, packed=True), tiny_tokenizer)) == repr(view)


# ---- pack -------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 200))
@settings(deadline=None)
def test_packed_lines_hold_every_row_and_never_too_much(lengths, max_length):
    lines = pack(lengths, max_length)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    filled = sorted(sum(lengths[row] for row in line) for line in lines)
    assert all(0 < tokens <= max_length for tokens in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > max_length  # no two lines could have been one


@given(st.lists(st.integers(1, 50), min_size=1, max_size=400), st.integers(1000, 2000))
@settings(deadline=None)
def test_short_rows_leave_nearly_no_room(lengths, max_length):
    assert len(pack(lengths, max_length)) <= 1 + sum(lengths) / (max_length - 49)


@pytest.mark.parametrize("seed", range(4))
def test_real_lengths_need_hardly_more_lines_than_is_possible(seed):
    rng = np.random.RandomState(seed)
    lengths = np.minimum(rng.lognormal(4.5, .8, 5000).astype(int) + 8, 1024)
    assert len(pack(lengths, 1024)) <= 1 + 1.01 * math.ceil(lengths.sum() / 1024)


def test_a_million_rows_are_packed_in_seconds():
    lengths = np.minimum(np.random.RandomState(0).lognormal(5, .7, 1_000_000).astype(int) + 5, 1024)
    began = time.perf_counter()
    plan = plan_batches(lengths, 8, epochs=10, packing=True, max_length=1024, step_tokens=65536)
    assert len(plan) == 10 * math.ceil(len(plan._shuffler.pattern.starts[:-1]) / 64) and plan[len(plan) // 2].epoch == 5
    assert time.perf_counter() - began < 10
    assert plan.packing_efficiency > .99 and len(pickle.dumps(plan)) < 9_000_000


def test_a_row_that_fits_nowhere_is_named():
    with pytest.raises(DataError, match=r"row 1 has 30 tokens and a line holds `max_length=10`\. Raise `max_length`"): pack([5, 30], 10)
    assert pack([], 10) == [] and pack([10], 10) == [[0]]


# ---- the plan ---------------------------------------------------------------------------------------------------------

WAYS = [dict(), dict(accumulation=3), dict(batch_tokens=300), dict(packing=True, max_length=256),
    dict(packing=True, max_length=256, accumulation=4, batch_tokens=512),
    dict(packing=True, max_length=256, step_tokens=1024), dict(packing=True, max_length=200, step_tokens=500, batch_tokens=200),
    dict(step_tokens=800, batch_tokens=300), dict(step_tokens=700)]


def mixed_lengths(count=157, seed=0):
    rng = random.Random(seed)
    return [min(200, 5 + int(rng.lognormvariate(3, .9))) for _ in range(count)]


def as_it_always_was(lengths, batch_size, accumulation, epochs, seed):
    "The plan of runs that were made before packing: (epoch, epochs done, micro-batches of rows)"
    plan, step = [], batch_size * accumulation
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        starts = range(0, len(order), step)
        for number, start in enumerate(starts, 1):
            rows = sorted(order[start:start + step], key=lambda row: (-lengths[row], row))
            plan.append((epoch, epoch + number / len(starts), [rows[at:at + batch_size] for at in range(0, len(rows), batch_size)]))
    return plan


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None)
def test_without_packing_nothing_moved(lengths, batch_size, accumulation, epochs, seed):
    plan = plan_batches(lengths, batch_size, accumulation, epochs, seed)
    assert [(step.epoch, step.epochs_done, [[row for line in lines for row in line] for lines in step.micro_batches]) for step in plan] == \
        as_it_always_was(lengths, batch_size, accumulation, epochs, seed)
    assert all(len(line) == 1 for step in plan for lines in step.micro_batches for line in lines)


@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_seen_once_an_epoch(way):
    lengths = mixed_lengths()
    plan = plan_batches(lengths, 4, epochs=3, **way)
    for epoch in range(3): assert sorted(row for step in plan if step.epoch == epoch for row in step.rows) == list(range(len(lengths)))
    assert len(plan) == len(list(plan)) and plan.tokens == 3 * sum(lengths)
    assert [step.epochs_done for step in plan] == sorted(step.epochs_done for step in plan) and plan[-1].epochs_done == 3
    assert plan[0].rows != next(step for step in plan if step.epoch == 1).rows


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_made_without_those_before_it(way):
    lengths = mixed_lengths()
    steps = list(plan_batches(lengths, 4, epochs=3, **way))
    for number in (len(steps) - 1, 0, len(steps) // 2, -2): assert plan_batches(lengths, 4, epochs=3, **way)[number] == steps[number]
    plan = plan_batches(lengths, 4, epochs=3, **way)
    assert plan[3:7] == steps[3:7] and plan[::-1] == steps[::-1] and plan[len(plan):] == []
    assert list(plan.micro_batches(5)) == [lines for step in steps[5:] for lines in step.micro_batches]
    assert pickle.loads(pickle.dumps(plan)) == plan and list(pickle.loads(pickle.dumps(plan))) == steps
    with pytest.raises(IndexError): plan[len(plan)]


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_that_is_cut_short_is_the_beginning_of_the_whole(way):
    lengths = mixed_lengths()
    whole = plan_batches(lengths, 4, epochs=3, **way)
    for count in (1, len(whole) // 2, len(whole), len(whole) + 9):
        cut = plan_batches(lengths, 4, epochs=3, max_steps=count, **way)
        assert list(cut) == whole[:count] and cut.tokens == sum(lengths[row] for step in cut for row in step.rows)


@pytest.mark.parametrize("way", WAYS)
def test_no_rectangle_and_no_step_is_larger_than_was_said(way):
    lengths = mixed_lengths()
    plan = plan_batches(lengths, 4, epochs=2, **way)
    room = way.get("batch_tokens") or (4 * way["max_length"] if "packing" in way else None)
    for step in plan:
        widths = [plan.widths(lines) for lines in step.micro_batches]
        assert all(width <= way.get("max_length", 200) for lines in widths for width in lines)
        assert room is None or all(len(lines) * max(lines) <= room for lines in widths)
        assert "step_tokens" not in way or sum(map(sum, widths)) <= way["step_tokens"]
        assert widths == sorted(widths, key=max, reverse=True)
    largest = max(len(lines) * max(plan.widths(lines)) for step in plan if step.epoch == 0 for lines in step.micro_batches)
    assert len(plan.longest) * max(plan.widths(plan.longest)) == largest
    assert 0 < plan.packing_efficiency <= 1


def test_packing_does_not_change_the_rows_of_a_step():
    lengths = mixed_lengths()
    plain, packed = (plan_batches(lengths, 4, 4, epochs=2, packing=packing, max_length=256) for packing in (False, True))
    assert [sorted(step.rows) for step in plain] == [sorted(step.rows) for step in packed]
    assert packed.packing_efficiency > .9 > plain.packing_efficiency


def test_every_epoch_of_packed_lines_has_the_same_number_of_steps():
    lengths = mixed_lengths(1000)
    plan = plan_batches(lengths, 4, epochs=4, packing=True, max_length=256, step_tokens=1024)
    steps = [[step for step in plan if step.epoch == epoch] for epoch in range(4)]
    assert len({len(one) for one in steps}) == 1
    assert [[line for lines in step.micro_batches for line in lines] for step in steps[0]] != [
        [line for lines in step.micro_batches for line in lines] for step in steps[1]]
    partners = [{frozenset(line) for step in one for lines in step.micro_batches for line in lines} for one in steps[:2]]
    assert len(partners[0] & partners[1]) < .5 * len(partners[0])  # rows of one length change places, so rows meet others in every epoch


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_hold_every_line_once(way, world):
    plan = plan_batches(mixed_lengths(60), 4, epochs=2, **way)
    shards = [plan.shard(rank, world) for rank in range(world)]
    for step, *parts in zip(plan, *shards, strict=True):
        lines = lambda one: sorted(line for micro_batch in one.micro_batches for line in micro_batch)
        assert sorted(line for part in parts for line in lines(part)) == lines(step)
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert all((part.epoch, part.epochs_done) == (step.epoch, step.epochs_done) for part in parts)
        tokens = [sum(plan.widths(lines(part))) for part in parts]
        assert max(tokens) - min(tokens) <= max(plan.widths(lines(step)))
    if world == 1: assert list(shards[0]) == list(plan)
    assert list(shards[0].micro_batches(2)) == [lines for step in shards[0][2:] for lines in step.micro_batches]


def test_a_rank_that_does_not_exist_is_refused():
    plan = plan_batches([5, 6], 1)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="does not exist"): plan.shard(rank, world)


CHILD = """
import hashlib, json, sys
from sage_finetune.training.batches import plan_batches
lengths, ways = json.loads(sys.stdin.read())
print([hashlib.sha256(repr(list(plan_batches(lengths, 4, epochs=2, **way))).encode()).hexdigest() for way in ways])
"""


def test_another_process_makes_the_same_plan():
    lengths = mixed_lengths()
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps([lengths, WAYS]), capture_output=True,
        text=True, timeout=120, check=True)
    assert eval(done.stdout) == [hashlib.sha256(repr(list(plan_batches(lengths, 4, epochs=2, **way))).encode()).hexdigest() for way in WAYS]


def test_a_plan_never_changes():
    "Runs are resumed by later versions: these are the plans of this one"
    lengths = [1 + at * at % 61 for at in range(20)]
    firsts = [plan_batches(lengths, 2, **way)[0].rows
        for way in (dict(), dict(packing=True, max_length=256, step_tokens=512), dict(step_tokens=300))]
    assert firsts == FIRSTS


FIRSTS = [[19, 17], [11, 15, 5, 12, 4, 3, 19, 17, 6, 18, 16, 2, 0], [11, 19, 7, 13]]


@pytest.mark.parametrize("fields, said", [
    (dict(batch_size=0), "batch_size=0"), (dict(epochs=0), "epochs=0"), (dict(max_steps=-1), "max_steps=-1"),
    (dict(packing=True, max_length=100, batch_tokens=50), "batch_tokens=50 is less than a line of max_length=100"),
    (dict(packing=True, max_length=100, step_tokens=50), "step_tokens=50 is less than a line of max_length=100"),
    (dict(batch_tokens=20), r"batch_tokens=20 is less than the longest row \(60 tokens\)"),
    (dict(step_tokens=20), r"step_tokens=20 is less than the longest row \(60 tokens\)"),
    (dict(packing=True, max_length=40), "row 1 has 60 tokens and a line holds `max_length=40`")])
def test_what_contradicts_itself_is_said_at_the_door(fields, said):
    with pytest.raises((ConfigError, DataError), match=said): plan_batches([10, 60, 30], **dict(batch_size=2) | fields)


def test_a_plan_of_nothing():
    for way in WAYS:
        plan = plan_batches([], 4, **way)
        assert len(plan) == 0 and list(plan) == [] and plan.tokens == 0 and plan.longest == [] and "0 in 0 epochs" in repr(plan)


def test_a_plan_shows_itself():
    plan = plan_batches(mixed_lengths(), 4, epochs=2, packing=True, max_length=256, step_tokens=1024)
    assert isinstance(plan, BatchPlan) and "packed into lines of up to 256 tokens" in repr(plan) and "<table>" in plan._repr_html_()
    assert f"{plan.packing_efficiency:.1%} of the work" in repr(plan)


# ---- the packaged rows ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny_tokenizer(): return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def packaged_examples(tiny_tokenizer):
    files = [tiny_path().parents[1]/"examples"/f"{name}.jsonl" for name in ("example", "example_unseen", "skills")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    talks = [row.get("messages") or [dict(role="user", content=row["instruction"]), dict(role="assistant", content=row["output"])]
        for row in rows]
    return [dict(input_ids=one.ids, labels=one.labels) for one in (render(talk, tiny_tokenizer) for talk in talks)]


def test_packed_rows_of_the_package_are_useful_to_98_percent(packaged_examples):
    lengths = [len(one["input_ids"]) for one in packaged_examples]
    plan = plan_batches(lengths, 1, epochs=3, packing=True, max_length=1024, step_tokens=4096, batch_tokens=4096)
    area = sum(collate([[packaged_examples[row] for row in line] for line in lines], 0, packed=True)["input_ids"].numel()
        for lines in plan.micro_batches())
    assert plan.tokens / area >= .98 and plan.packing_efficiency >= .98
    assert (plan_batches(lengths, 8, epochs=3).packing_efficiency < .75 < .9
        < plan_batches(lengths, 8, epochs=3, batch_tokens=512, step_tokens=4096).packing_efficiency)


def test_a_step_of_the_package_learns_the_same_packed_and_not(packaged_examples):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    lengths, results = [len(one["input_ids"]) for one in packaged_examples], []
    for packing, path in ((False, "padded"), (True, "positions"), (True, "mask")):
        step, total = plan_batches(lengths, 4, 2, packing=packing, max_length=256)[1], 0.
        model.zero_grad()
        for lines in step.micro_batches:
            batch = collate([[packaged_examples[row] for row in line] for line in lines], 0, packed=packing)
            loss = loss_of(model(**attention_inputs(batch, path)).logits, batch["labels"])
            loss.backward()
            total += loss.item()
        results.append((total, torch.cat([weights.grad.flatten() for weights in model.parameters()])))
    for total, gradient in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5) and far(gradient, results[0][1]) < 1e-5
