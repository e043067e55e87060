"""Packed weights: the same bytes, only where they are faster and fit, and never those of another weight."""
import pytest
import torch
from helpers import metrics, rows, tiny_config, write_rows
from test_engine import folder_of  # noqa: F401

from sage_finetune import LoRATrainer
from sage_finetune.modeling import engine as engines, packed_weights
from sage_finetune.modeling.engine import pack_weights, pick_engine, unpack_weights
from sage_finetune.modeling.loss import chunked_cross_entropy
from sage_finetune.modeling.packed_weights import PackedWeight, can_pack, packing_gain

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(8, 8, dtype=torch.bfloat16)), reason="torch has no packed products here")


@pytest.fixture
def always(monkeypatch):
    "Small shapes gain nothing that one can measure: here they count as faster where they are equal"
    monkeypatch.setattr(engines, "packing_gain", lambda weight, packed: float(packing_gain(weight, packed, repeats=1) != 0))


def trainer_of(folder, model, **fields):
    fields = dict(model_name=str(model), data_path=write_rows(folder/"rows.jsonl", rows(24)), bf16=True, max_steps=4, seed=3) | fields
    return LoRATrainer(tiny_config(folder/"run", **fields)).setup()


def packed_layers(trainer): return [layer for layer in trainer.model.modules() if layer.__dict__.get("packed_weight")]


@pytest.mark.parametrize("fields", [{}, dict(gradient_checkpointing=True), dict(packing=False), dict(lora=dict(lora_dropout=0.1))], ids=str)
def test_a_run_ends_in_the_same_bytes(tmp_path, folder_of, always, fields):  # noqa: F811
    runs = [trainer_of(tmp_path/str(wanted), folder_of("Qwen2"), pack_weights=wanted, **fields) for wanted in (False, True)]
    assert not packed_layers(runs[0]) and len(packed_layers(runs[1])) == 14 and runs[1].engine.head.packed
    assert "frozen weights packed for the CPU" in str(runs[1].engine) and "packed" not in str(runs[0].engine)
    for trainer in runs: assert [step.loss for step in trainer.steps()]
    one, two = ((trainer.config.lora_dir/"adapter_model.safetensors").read_bytes() for trainer in runs)
    assert one == two and [row["loss"] for row in metrics(runs[0].config.output_dir)] == [
        row["loss"] for row in metrics(runs[1].config.output_dir)]
    assert not packed_layers(runs[1]) and runs[1].engine.head.packed is None, "their memory is given back with the run"


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Phi3", "Mixtral", "Cohere"])
def test_other_families_too(tmp_path, folder_of, always, family):  # noqa: F811
    losses = [[step.loss for step in trainer_of(tmp_path/str(wanted), folder_of(family), pack_weights=wanted).steps()]
        for wanted in (False, True)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("fields", [dict(bf16=False), dict(engine="plain"), dict(pack_weights=False), dict(load_in_8bit=True)], ids=str)
def test_where_nothing_is_packed(tmp_path, folder_of, always, fields):  # noqa: F811
    assert not packed_layers(trainer_of(tmp_path, folder_of("Qwen2"), **(dict(pack_weights=True) | fields)))


@pytest.mark.parametrize("fields", [dict(new_tokens=["<tool>"]), dict(lora=dict(modules_to_save=["lm_head"]))], ids=str)
def test_layers_are_packed_where_the_head_is_trained(tmp_path, folder_of, always, fields):  # noqa: F811
    trainer = trainer_of(tmp_path, folder_of("Qwen2"), pack_weights=True, **fields)
    assert trainer.engine.head is None and packed_layers(trainer) and len([step.loss for step in trainer.steps()]) == 4


def test_only_where_they_are_a_small_part_of_what_is_free(tmp_path, folder_of, always, monkeypatch):  # noqa: F811
    from sage_finetune.training import setup as training
    monkeypatch.setattr(training, "available_memory", lambda device: 1_000_000)
    assert not packed_layers(trainer_of(tmp_path/"a", folder_of("Qwen2")))
    monkeypatch.setattr(training, "available_memory", lambda device: 10**10)
    assert packed_layers(trainer_of(tmp_path/"b", folder_of("Qwen2")))
    assert not packed_layers(trainer_of(tmp_path/"c", folder_of("Qwen2"), gradient_checkpointing=True))


def test_what_is_not_faster_is_left_alone(tmp_path, folder_of, monkeypatch):  # noqa: F811
    monkeypatch.setattr(engines, "packing_gain", lambda weight, packed: 0.029)
    assert not packed_layers(trainer_of(tmp_path, folder_of("Qwen2"), pack_weights=True))


def test_a_product_that_is_not_equal_is_no_gain(monkeypatch):
    weight = torch.randn(64, 32).bfloat16()
    packed = PackedWeight(weight)
    monkeypatch.setattr(packed, "grad_product", lambda grad: (grad @ weight) * 1.01)
    assert packing_gain(weight, packed) == 0


@pytest.mark.parametrize("rows", [32, 128, 416])
def test_a_product_that_is_not_equal_for_some_number_of_rows_is_no_gain(monkeypatch, rows):
    "What is decided by a clock must not show in the bytes of a run"
    weight = torch.randn(64, 32).bfloat16()
    packed = PackedWeight(weight)
    monkeypatch.setattr(packed, "product", lambda x: (x @ weight.t()) * (1.01 if len(x) == rows else 1))
    assert packing_gain(weight, packed) == 0


@pytest.mark.parametrize("missing", ["_pack", "_multiply"])
def test_a_torch_without_the_operators(tmp_path, folder_of, monkeypatch, missing):  # noqa: F811
    monkeypatch.setattr(packed_weights, missing, None)
    monkeypatch.setattr(packed_weights, "cpu_can_pack", packed_weights.cpu_can_pack.__wrapped__)  # what was found before is kept
    trainer = trainer_of(tmp_path, folder_of("Qwen2"), pack_weights=True)
    assert not packed_layers(trainer) and len([step.loss for step in trainer.steps()]) == 4


@pytest.mark.parametrize("change", ["in place", "another tensor", "new data"])
def test_a_weight_that_changed_is_not_served_from_the_old_one(tmp_path, folder_of, always, change):  # noqa: F811
    trainer = trainer_of(tmp_path, folder_of("Qwen2"), pack_weights=True)
    batch = next(iter(trainer._batches(trainer.dataset, trainer.batching.part[0].micro_batches[:1])))
    before = trainer.loss(batch).item()
    with torch.no_grad():
        for layer in packed_layers(trainer):
            weight = layer.base_layer.weight
            if change == "in place": weight.mul_(0.5)
            elif change == "another tensor": layer.base_layer.weight = torch.nn.Parameter(weight * 0.5, requires_grad=False)
            else: weight.data = weight.data * 0.5
    changed = trainer.loss(batch).item()
    unpack_weights(trainer.engine)
    assert changed == trainer.loss(batch).item() != before


@pytest.mark.parametrize("softcap, scale, bias", [(None, 1., False), (5., 1., True), (None, 0.25, True)])
def test_the_head_of_every_kind(softcap, scale, bias):
    draw = torch.Generator().manual_seed(0)
    weight, offset = torch.randn(700, 64, generator=draw).bfloat16(), torch.randn(700, generator=draw).bfloat16() if bias else None
    hidden, labels = torch.randn(130, 64, generator=draw).bfloat16().requires_grad_(), torch.randint(0, 700, (130,), generator=draw)
    outcomes = []
    for packed in (None, PackedWeight(weight)):
        loss = chunked_cross_entropy(hidden, weight, labels, offset, softcap, scale, chunk=32, packed=packed)
        outcomes.append((loss.item(), *torch.autograd.grad(loss, hidden)))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-3 if bias else 0) and torch.allclose(outcomes[0][1],
        outcomes[1][1], atol=2e-2 if bias else 0)


def test_a_budget_of_nothing_packs_nothing(tmp_path, folder_of, always):  # noqa: F811
    from sage_finetune.modeling.adapter import attach_lora
    from sage_finetune.modeling.base import load_base
    config = tiny_config(tmp_path, model_name=str(folder_of("Qwen2")), bf16=True)
    engine = pick_engine(attach_lora(load_base(config)[0], config.lora, 0), dtype=torch.bfloat16)
    pack_weights(engine, 0)
    assert not engine.remarks and engine.head.packed is None
    pack_weights(engine, 10**9)
    assert engine.remarks and engine.head.packed.matches(engine.head.output.weight)
