"What a run takes: parts counted exactly, the whole beside a process that trains"
import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import adapter, tiny_config

from sage_finetune.config import TrainingConfig
from sage_finetune.core.errors import ConfigError, ModelError
from sage_finetune.core.text import format_bytes
from sage_finetune.modeling import fused_layers, varlen
from sage_finetune.modeling.adapter import attach_lora
from sage_finetune.modeling.base import load_base
from sage_finetune.modeling.engine import pick_engine
from sage_finetune.modeling.loss import _ChunkedLoss
from sage_finetune.modeling.optimizer import make_optimizer
from sage_finetune.modeling.packed_weights import cpu_can_pack
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training import memory, meta_model, rehearsal
from sage_finetune.training.batches import plan_batches
from sage_finetune.training.memory import (
    _state_bytes,
    cheapest_reduction,
    estimate_memory,
    fits,
    fitting_reductions,
    largest_micro_batch,
    suggest_reductions,
)
from sage_finetune.training.memory_errors import memory_error
from sage_finetune.training.memory_measurement import measure_memory
from sage_finetune.training.memory_tracker import MemoryTracker
from sage_finetune.training.meta_model import build_meta_model
from sage_finetune.training.rehearsal import _HeadSteps


def folder(path, **changes):
    "A model that exists as a config.json"
    shape = dict(model_type="qwen2", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, vocab_size=4000, tie_word_embeddings=True)
    path.mkdir(parents=True, exist_ok=True)
    (path/"config.json").write_text(json.dumps(shape | changes))
    return str(path)


def bytes_of(tensors): return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())




@pytest.mark.parametrize("bits", [0, 8, 4])
def test_weights_and_adapter_are_exact(tmp_path, bits):
    config = tiny_config(tmp_path, load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base, _ = load_base(config)
    model, said = attach_lora(base, config.lora), estimate_memory(config)
    packed = [x for layer in model.modules() for x in constants(layer)]
    frozen = [p for p in model.parameters() if not p.requires_grad] + packed + list(model.buffers())
    assert said.parts["weights"] == pytest.approx(bytes_of(frozen), rel=0.002 if bits else 1e-9)
    assert said.parts["adapter"] == bytes_of(p for p in model.parameters() if p.requires_grad)


def constants(layer):
    "What a quantised layer needs to unpack its weight"
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is not None: return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return [layer.weight.SCB] if hasattr(layer, "init_8bit_state") else []


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
def test_optimizer_state_is_exact(tmp_path, optim):
    config = tiny_config(tmp_path, optim=optim)
    model = attach_lora(load_base(config)[0], config.lora)
    optimizer = make_optimizer(model, config)
    model(input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = [x for state in optimizer.state.values() for name, x in state.items() if torch.is_tensor(x) and name != "step"
        and not name.startswith("qmap")]
    assert sum(_state_bytes(p.shape, optim) for p in model.parameters() if p.requires_grad) == pytest.approx(bytes_of(kept),
        rel=1e-3, abs=0)


@pytest.mark.parametrize("overrides", [dict(), dict(bf16=True), dict(bf16=True, gradient_checkpointing=True),
    dict(gradient_checkpointing=True), dict(engine="plain"), dict(engine="plain", packing=False)],
    ids=lambda overrides: " ".join(f"{name}={value}" for name, value in overrides.items()) or "auto")
def test_a_rehearsed_step_takes_what_a_real_one_takes(tmp_path, overrides):
    "The same counter looks at the trainer's own step on real tensors"
    trainer = LoRATrainer(tiny_config(tmp_path, data_path="example", max_length=256, gradient_accumulation_steps=1,
        max_steps=3, **overrides)).setup()
    batch, = trainer._batches(trainer.dataset, [trainer.plan.longest])
    trainer.model.train()
    with MemoryTracker() as count:
        for one in (*trainer.model.parameters(), *trainer.model.buffers(), *batch.values()): count.add(one, "model")
        before = count.now
        (trainer.loss(batch) / 3).backward()
    share = float((batch["labels"][:, 1:] != -100).sum() / (batch["segments"] > 0).sum())
    said = estimate_memory(trainer.config, trainer.plan.lengths, target_fraction=share)
    counted = sum(said.parts[name] for name in ("gradients", "activations", "logits"))
    assert counted == pytest.approx(count.peak - before, rel=0.04)


def test_the_head_takes_what_the_chunked_loss_takes():
    hidden, weight, labels = torch.randn(700, 64, requires_grad=True), torch.randn(90_000, 64), torch.randint(9, (700,))
    peaks = []
    for loss in (lambda: _ChunkedLoss.apply(hidden, weight, None, labels, None, 1., 256, None),
            lambda: _HeadSteps.apply(hidden, weight, 4)):
        with MemoryTracker() as count:
            for one in (hidden, weight, labels): count.add(one, "given")
            before = count.now
            loss()
        peaks.append(count.peak - before)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def test_measuring_changes_nothing(tmp_path):
    trainer = LoRATrainer(tiny_config(tmp_path, max_steps=3)).setup()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    def state():
        return ([p.detach().clone() for p in trained], copy.deepcopy(trainer.optimizer.state_dict()), torch.get_rng_state(),
            [p.grad is None for p in trained], trainer.model.training)
    for _ in range(2):  # before the first step, and when the optimizer remembers something
        before, found = state(), measure_memory(trainer)
        after = state()
        assert found.measured_bytes >= 0 and all(torch.equal(one, two) for one, two in zip(before[0], after[0]))
        assert before[1].keys() == after[1].keys() and len(before[1]["state"]) == len(after[1]["state"])
        for number, kept in before[1]["state"].items():
            assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(after[1]["state"][number][name]))
                for name, value in kept.items())
        assert torch.equal(before[2], after[2]) and before[3:] == after[3:]
        batch = next(iter(trainer._batches(trainer.dataset, [trainer.plan.longest])))
        trainer.loss(batch).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def test_the_cheapest_fix_fits_and_is_the_first_that_does(tmp_path):
    config = TrainingConfig(model_name=folder(tmp_path/"model"), per_device_train_batch_size=8, packing=False, bf16=True, max_length=512)
    whole = estimate_memory(config, device="cuda").total
    for share in (0.99, 0.93, 0.85):
        sentence, changes = cheapest_reduction(config, share * whole, device="cuda")
        first = next(fix for fix in suggest_reductions(config, device="cuda") if fits(fix.estimate, share * whole))
        assert (changes == first.changes and fits(estimate_memory(config, device="cuda", **changes), share * whole)
            and all(name in sentence for name in changes))
    halved = cheapest_reduction(config, 0.99 * whole, device="cuda")[1]
    assert halved == dict(per_device_train_batch_size=4, gradient_accumulation_steps=32)
    sentence, changes = cheapest_reduction(config, 1e6, device="cuda")
    assert not changes and "smaller model" in sentence


def test_lengths_decide_when_they_are_known(tmp_path):
    config = TrainingConfig(model_name=folder(tmp_path/"model"), max_length=1024, per_device_train_batch_size=4, packing=False)
    assert (largest_micro_batch(config, [10, 700, 20, 30, 5]) == [[700], [30], [20], [10]]
        or [700] in largest_micro_batch(config, [10, 700, 20, 30, 5]))
    assert (estimate_memory(config, [20] * 50, device="cpu").parts["activations"]
        < 0.1 * estimate_memory(config, device="cpu").parts["activations"])


def test_wrong_fields_and_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_length"): estimate_memory(tiny_config(tmp_path), max_lenght=3)
    with pytest.raises(ModelError, match="config.json"): build_meta_model(tiny_config(tmp_path, model_name=str(tmp_path)))
    assert format_bytes(2.5e9) == "2.50 GB" and format_bytes(2.5e6) == "2.5 MB"


CHILD = """
import ctypes, json, sys, tempfile
import datasets, torch
ctypes.CDLL(None).mallopt(-3, 262144)  # large tensors lie apart: a heap without fragmentation
from sage_finetune.config import TrainingConfig
from sage_finetune.training.memory import estimate_memory
from sage_finetune.training.memory_measurement import peak_growth
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.memory_errors import memory_error
overrides = json.loads(sys.argv[1])
trainer = LoRATrainer(TrainingConfig(output_dir=tempfile.mkdtemp(), device="cpu", **overrides))
rows = [[7] * overrides["max_length"]] * 8
trainer.dataset = datasets.Dataset.from_dict(dict(input_ids=rows, labels=rows))
with peak_growth(torch.device("cpu")) as growth:
    trainer.setup()
    batch, = trainer._batches(trainer.dataset, [trainer.plan.longest])
    trainer.model.train()
    for step in range(2):
        for part in range(2): (trainer.loss(batch) / 100).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
said = estimate_memory(trainer.config, [len(row) for row in rows])
print(growth[0], said.total - said.parts["fragmentation"])
"""
HELD_OUT = [  # shapes that nothing was fitted on
    (dict(hidden_size=640, num_hidden_layers=8, num_attention_heads=10, num_key_value_heads=2, intermediate_size=2560, vocab_size=65000),
        dict(max_length=768, bf16=True, pack_weights=False)),
    (dict(hidden_size=448, num_hidden_layers=10, num_attention_heads=7, num_key_value_heads=7, intermediate_size=1280,
        vocab_size=24000, tie_word_embeddings=False), dict(max_length=896, bf16=False)),
    (dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, intermediate_size=2816, vocab_size=120000),
        dict(max_length=640, bf16=False, gradient_checkpointing=True))]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident size is reset through /proc")
@pytest.mark.parametrize("shape, overrides", [*HELD_OUT[:2], pytest.param(*HELD_OUT[2], marks=pytest.mark.full)],
    ids=["bf16", "fp32", "checkpointing"])
def test_a_process_takes_what_was_predicted_but_for_fragmentation(tmp_path, shape, overrides):
    from transformers import AutoConfig, AutoModelForCausalLM

    from sage_finetune.config import tiny_path
    if overrides["bf16"] and not cpu_can_pack(): pytest.skip("without instructions for bf16 a product takes up to seventy times as long")
    place = folder(tmp_path/"model", **shape)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place),
        dtype=torch.bfloat16 if overrides["bf16"] else torch.float32).save_pretrained(place)
    for file in tiny_path().glob("*"):
        if "token" in file.name or "chat" in file.name: (tmp_path/"model"/file.name).write_bytes(file.read_bytes())
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(dict(model_name=place, gradient_accumulation_steps=2) | overrides)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured, predicted = map(int, done.stdout.split())
    assert measured > 300 * 2**20 and predicted == pytest.approx(measured, rel=0.1)


MANY = dict(num_hidden_layers=11, hidden_size=64, intermediate_size=256)


SHAPES = {"qwen2": dict(), "llama": dict(model_type="llama"), "of two kinds": dict(model_type="gemma2", head_dim=16)}
WAYS = {"auto": dict(), "checkpointing": dict(gradient_checkpointing=True), "4 bits padded": dict(load_in_4bit=True, packing=False),
    "gradients larger than activations": dict(max_length=32, gradient_accumulation_steps=1, per_device_train_batch_size=1,
        lora=dict(r=256))}
# Each shape and each way once; the other pairs, which take long, in make test-full.
ONCE = {("auto", "of two kinds"), ("checkpointing", "llama"), ("4 bits padded", "qwen2"), ("gradients larger than activations", "qwen2")}


@pytest.mark.parametrize("overrides, shape", [pytest.param(WAYS[way], SHAPES[name], id=f"{way}-{name}",
    marks=[pytest.mark.full] * ((way, name) not in ONCE)) for way in WAYS for name in SHAPES])
def test_a_few_layers_stand_for_all(tmp_path, monkeypatch, shape, overrides):
    "Whichever moment is the fullest; where the layers are of two kinds, all are rehearsed anyway"
    config = TrainingConfig(model_name=folder(tmp_path/"model", **MANY | shape), bf16=True, **dict(max_length=128) | overrides)
    rehearsed, hollow = [], rehearsal.build_probe_model
    monkeypatch.setattr(rehearsal, "build_probe_model", lambda *given: rehearsed.append(hollow(*given)[1]) or hollow(*given))
    few = estimate_memory(config, device="cuda").parts
    assert set(rehearsed) == ({0} if "head_dim" in shape else {8, 7})
    memory._counted.cache_clear()
    monkeypatch.setattr(memory, "PROBE_LAYERS", 100)
    assert few == estimate_memory(config, device="cuda").parts


def test_targets_chosen_by_their_number(tmp_path):
    "An adapter on one layer only is not drawn out to all"
    config = TrainingConfig(model_name=folder(tmp_path/"model", **MANY),
        lora=dict(target_modules=["layers.9.self_attn.q_proj"]), max_length=64)
    one = 4 * config.lora.r * (64 + 64)
    assert estimate_memory(config, device="cuda").parts["adapter"] == one


def test_what_was_counted_is_remembered_until_the_model_changes(tmp_path):
    config = TrainingConfig(model_name=folder(tmp_path/"model"), max_length=64)
    first = estimate_memory(config)
    before = memory._counted.cache_info().misses
    first.parts["weights"] = 0  # what somebody does with an answer does not change the next one
    again = estimate_memory(config, learning_rate=1e-3, num_train_epochs=9)
    assert memory._counted.cache_info().misses == before and again.parts["weights"] > 0
    folder(tmp_path/"model", vocab_size=8000)
    os.utime(tmp_path/"model"/"config.json", (1, 1))
    assert estimate_memory(config).parts["weights"] > again.parts["weights"]


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch):
    "The library would try for a minute"
    monkeypatch.setattr(meta_model.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ModelError, match="nobody/nothing.*does not answer.*network"):
        estimate_memory(TrainingConfig(model_name="nobody/nothing"))
    assert time.monotonic() - began < 15


def test_fixes_are_looked_for_within_their_time(tmp_path):
    config = TrainingConfig(model_name=folder(tmp_path/"model"), per_device_train_batch_size=8, packing=False, bf16=True, max_length=448)
    assert fitting_reductions(config, 1e9, seconds=0., device="cuda") == []
    whole = estimate_memory(config, device="cuda").total
    assert fitting_reductions(config, 2 * whole, device="cuda") == []  # it should have fitted: the estimate knows nothing of what happened
    fixes = fitting_reductions(config, 0.85 * whole, seconds=300, device="cuda")
    assert (fixes and all(fits(fix.estimate, 0.85 * whole) for fix in fixes)
        and fixes[0].changes == cheapest_reduction(config, 0.85 * whole, device="cuda")[1])


@pytest.mark.parametrize("share", [0, .1, .25, .4, .55, .65, .75, .85, .95, 1])
def test_given_up_at_any_moment_it_leaves_torch_as_it_was(monkeypatch, share):
    "On the way forward, back, and through layers that are computed again"
    config, asked, last = TrainingConfig(model_name="tiny", gradient_checkpointing=True), [], 0

    def check_time(cls):
        asked.append(len(asked) + 1)
        if asked[-1] == last: raise TimeoutError("now")

    def state(): return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), str(torch.ones(1).device)

    def trace(): return rehearsal.trace_step(config, "cpu", torch.bfloat16, [[8], [6]], 1., ("packs", "samples", "head", "layers"), 3)

    monkeypatch.setattr(MemoryTracker, "check_time", classmethod(check_time))
    trace()
    assert len(asked) > 100
    last, before = max(1, round(share * len(asked))), state()
    asked.clear()
    with pytest.raises(TimeoutError): trace()
    assert asked[-1] == last and state() == before


def test_out_of_memory_names_what_would_have_fitted(tmp_path):
    config = TrainingConfig(model_name=folder(tmp_path/"model"), per_device_train_batch_size=8, packing=False, bf16=True, max_length=448)
    planned, whole = plan_batches([448] * 8, 8)[0], estimate_memory(config, device="cuda").total
    said = str(memory_error(1, planned, config, MemoryError("none"), room=0.85 * whole, device="cuda", seconds=300))
    fixes = fitting_reductions(config, 0.85 * whole, seconds=300, device="cuda")
    assert "Predicted to fit" in said and all(str(fix) in said for fix in fixes)
    usual = [str(memory_error(1, planned, config, MemoryError("none"), **given))
        for given in (dict(), dict(room=2 * whole, device="cuda"), dict(room=1., lengths="no lengths", device="cuda"))]
    assert all("`per_device_train_batch_size=4` with `gradient_accumulation_steps=32`" in one and "Predicted" not in one for one in usual)


def short_run(folder, fields):
    "The engine and the adapter of three steps"
    trainer = LoRATrainer(tiny_config(folder, max_steps=3, **fields))
    trainer.train(show=False)
    return str(trainer.engine).partition(" frozen weights packed")[0].rstrip("0123456789"), adapter(folder/"run")


RUNS = [dict(bf16=True), dict(bf16=False), dict(bf16=True, gradient_checkpointing=True), dict(bf16=True, packing=False)]


@pytest.fixture(scope="module")
def runs_before(tmp_path_factory): return [short_run(tmp_path_factory.mktemp("before"), fields) for fields in RUNS]


@pytest.mark.parametrize("number", range(len(RUNS)), ids=lambda number: str(RUNS[number]))
@pytest.mark.parametrize("estimated", [dict(), dict(max_length=64), dict(engine="plain")], ids=str)
def test_an_estimate_changes_nothing_of_a_run_after_it(tmp_path, runs_before, number, estimated):
    "A rehearsal computes without numbers; nothing of it may stay where a run finds it"
    memory._counted.cache_clear(), memory._paths_of.cache_clear()
    estimate_memory(TrainingConfig(model_name="tiny", **RUNS[number]), device="cpu", **estimated)
    assert short_run(tmp_path, RUNS[number]) == runs_before[number]


@pytest.mark.parametrize("tokens", [100, 128, 160, 300])
def test_attention_in_blocks_after_an_estimate(tokens):
    "Also where blocks are longer than the samples of the trial, which would not notice"
    estimate_memory(TrainingConfig(model_name="tiny", bf16=True, max_length=tokens), device="cpu")
    q, k, v = (torch.randn(1, 4, tokens, 16, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()
        for seed in range(3))
    blocks, usual = (varlen._VarlenAttention.apply(q, k, v, [0, tokens], 0.25).transpose(1, 2),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    for one, other in zip((blocks, *torch.autograd.grad(blocks.float().square().sum(), (q, k, v))),
            (usual, *torch.autograd.grad(usual.float().square().sum(), (q, k, v)))):
        assert type(one) is torch.Tensor and ((one - other).detach().float().norm() / other.detach().float().norm()).item() < 2e-2


def test_packed_weights_are_counted_where_they_are_asked_for():
    sizes = {wanted: estimate_memory(TrainingConfig(model_name="tiny", bf16=True, pack_weights=wanted), device="cpu").parts.get("packed")
        for wanted in (None, True, False)}
    trainer = LoRATrainer(TrainingConfig(model_name="tiny", bf16=True, pack_weights=True))
    trainer.load_model_and_tokenizer()
    trainer.apply_lora()
    most = pick_engine(trainer.model, dtype=torch.bfloat16)
    weights = {layer.base_layer.weight.data_ptr(): layer.base_layer.weight for layer in trainer.model.modules()
        if getattr(layer.__dict__.get("forward"), "__func__", None) is fused_layers.fused_lora_forward}
    weights[most.head.output.weight.data_ptr()] = most.head.output.weight
    assert sizes == {None: None, False: None, True: sum(2 * weight.nbytes for weight in weights.values()) if cpu_can_pack() else 0}
    assert sizes[True] > 5e6 or not cpu_can_pack()
    assert estimate_memory(TrainingConfig(model_name="tiny", bf16=False, pack_weights=True), device="cpu").parts["packed"] == 0
    assert "packed" not in estimate_memory(TrainingConfig(model_name="tiny", bf16=True, pack_weights=True, engine="plain"),
        device="cpu").parts
    first = next(suggest_reductions(TrainingConfig(model_name="tiny", bf16=True, pack_weights=True, per_device_train_batch_size=1),
        device="cpu"))
    assert (first.changes == dict(pack_weights=False)) == cpu_can_pack()
