"""What a model does only in long rows: whatever engine is chosen, a row beyond a window, a chunk or a stretched
rotary embedding has the loss that it has alone."""
import copy
from types import MethodType

import pytest
import torch
import transformers
from helpers import rows, tiny_config, write_rows
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune import LoRATrainer
from sage_finetune.config import tiny_path
from sage_finetune.data.collation import collate
from sage_finetune.modeling import fused_layers, packing, varlen
from sage_finetune.modeling.compilation import compile_layers
from sage_finetune.modeling.engine import SAMPLE_BY_SAMPLE, Engine, check_equivalence, pick_engine
from sage_finetune.modeling.packing import (
    detect_packing_mode,
    dropout_disabled,
    find_limits,
    forget_lengths,
    long_trials,
    rope_limit,
    rope_mixes,
)

COMMON = dict(vocab_size=160, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"])


def longrope(limit, width=6):
    factors = dict(short_factor=[1.] * width, long_factor=[2. + at for at in range(width)])
    return dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=limit) | factors


def dynamic(limit): return dict(max_position_embeddings=limit, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.))


# name -> config class, its fields for a limit of so many tokens, how rows are kept apart below the limit and beyond it
FAMILIES = {
    "llama4": ("Llama4TextConfig", lambda limit: dict(attention_chunk_size=limit, floor_scale=limit, attn_temperature_tuning=True,
        num_hidden_layers=4, no_rope_layer_interval=4, moe_layers=[], num_local_experts=2, intermediate_size_mlp=96, head_dim=12),
        "positions", "none"),
    "phimoe": ("PhimoeConfig", lambda limit: dict(sliding_window=limit, num_local_experts=2), "samples", "positions"),
    "qwen2_moe": ("Qwen2MoeConfig", lambda limit: dict(sliding_window=limit, use_sliding_window=True, max_window_layers=1, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32), "samples", "positions"),
    "longrope": ("Phi3Config", lambda limit: dict(original_max_position_embeddings=limit, rope_parameters=longrope(limit)),
        "samples", "alone"),
    "dynamic rope": ("LlamaConfig", dynamic, "samples", "alone"),
    "doge": ("DogeConfig", lambda limit: dict(keep_window_size=limit), "positions", "alone"),
    "doge, window": ("DogeConfig", lambda limit: dict(sliding_window=limit), "positions", "positions"),
    "gemma2": ("Gemma2Config", lambda limit: dict(sliding_window=limit, head_dim=12), "positions", "positions"),
    "gemma3": ("Gemma3TextConfig", lambda limit: dict(sliding_window=limit, head_dim=12) | LAYERS, "samples", "samples"),
    "mistral": ("MistralConfig", lambda limit: dict(sliding_window=limit), "samples", "samples"),
    "cohere2": ("Cohere2Config", lambda limit: dict(sliding_window=limit) | LAYERS, "samples", "samples"),
    "qwen2, window": ("Qwen2Config", lambda limit: dict(sliding_window=limit, use_sliding_window=True, max_window_layers=1),
        "samples", "samples"),
}
LENGTHS = (40, 7, 18, 64, 6, 30)


def make(name, limit, dtype=torch.float32):
    "A model with an adapter that does something, at rest"
    kind, fields, *_ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**COMMON | fields(limit))
    model = AutoModelForCausalLM.from_config(config)
    for part, weights in model.named_parameters():
        if weights.dim() > 1: torch.nn.init.normal_(weights, std=0.08)
        elif part.endswith(".A"): torch.nn.init.normal_(weights, std=0.5)  # Doge's dynamic mask
    targets = ["qkv_proj", "o_proj"] if kind == "Phi3Config" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)).eval()


def examples(lengths=LENGTHS, seed=1):
    "Rows of random tokens, all of them trained on"
    ids = torch.randint(3, 160, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return [dict(input_ids=one.tolist(), labels=one.tolist()) for one in ids.split(lengths)]


def gradient(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def alone(model, content):
    "Loss and gradient of each row alone, summed; transformers and PEFT as they are, and a rotary embedding that has met no other row"
    total, slope = 0., 0.
    for row in content:
        fresh = copy.deepcopy(model)
        ids = torch.tensor([row["input_ids"]])
        loss = cross_entropy(fresh(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
        loss.backward()
        total, slope = total + loss.item(), slope + gradient(fresh)
    return total, slope


def trained(engine, content, lines):
    "What an engine makes of the same rows, laid out as it wants them"
    model, packed = engine.model, engine.packing.name != "none"
    model.zero_grad()
    loss = engine.loss(collate([[content[row] for row in line] for line in lines] if packed else [[row] for row in content], 0, packed))
    loss.backward()
    return loss.item(), gradient(model)


def way(engine): return "alone" if engine.row_by_row else engine.packing.name


# ---- equal, however long the rows are ---------------------------------------------------------------------------------

@pytest.mark.parametrize("packs", (True, False), ids=("packed", "padded"))
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_beyond_a_limit_learn_what_they_learn_alone(name, packs):
    model, content = make(name, 16), examples()
    total, slope = alone(model, content)
    engine = pick_engine(model, packs, max_length=70)
    own, own_grad = trained(engine, content, [[0, 1, 2], [3, 4], [5]])
    assert own == pytest.approx(total, rel=1e-5), str(engine)
    assert float((own_grad - slope).norm() / slope.norm()) < 1e-4
    assert way(engine) == (FAMILIES[name][3] if packs or FAMILIES[name][3] == "alone" else "none"), str(engine)


@pytest.mark.parametrize("name", FAMILIES)
def test_below_the_limit_the_fast_way_is_taken(name):
    model, content = make(name, 64), examples((20, 7, 11, 30, 6))
    total, slope = alone(model, content)
    engine = pick_engine(model, max_length=40)
    own, own_grad = trained(engine, content, [[0, 1, 2], [3, 4]])
    assert way(engine) == FAMILIES[name][2], str(engine)
    assert own == pytest.approx(total, rel=1e-5) and float((own_grad - slope).norm() / slope.norm()) < 1e-4


@pytest.mark.parametrize("name, limit, longest, expected", (
    ("phimoe", 16, 70, "positions"), ("phimoe", 200, 256, "positions"), ("qwen2_moe", 128, 176, "positions"), ("longrope", 16, 70, "alone"),
    ("doge", 64, 40, "positions"), ("gemma3", 16, 70, "samples"), ("mistral", 200, 256, "samples")))
def test_sixteen_bits_do_not_hide_what_is_lost(name, limit, longest, expected):
    engine = pick_engine(make(name, limit, torch.bfloat16), max_length=longest, dtype=torch.bfloat16)
    assert way(engine) == expected, str(engine)


@pytest.mark.parametrize("name", ("phimoe", "qwen2_moe"))
def test_a_short_trial_is_blind_for_a_window(name):
    model = make(name, 16)
    varlen.enable_varlen(model)
    engine = Engine(model, SAMPLE_BY_SAMPLE)
    assert check_equivalence(engine).equal
    engine.trials = long_trials(model, max_length=70, flattened=True)
    assert not check_equivalence(engine).equal and "beyond sliding_window=16" in str(check_equivalence(engine))


def test_the_rows_decide_where_they_are_known():
    assert way(pick_engine(make("phimoe", 16), max_length=70, longest=16)) == "samples"
    assert way(pick_engine(make("dynamic rope", 16), max_length=70, longest=16)) == "samples"
    assert way(pick_engine(make("dynamic rope", 16))) == "alone"  # any length


@pytest.mark.parametrize("kind", ("auto", "plain"))
def test_where_rows_change_each_other_they_go_one_at_a_time(kind):
    model, content = make("dynamic rope", 16), examples()
    engine = pick_engine(model, max_length=70, engine=kind)
    assert "one row at a time: a row beyond max_position_embeddings=16 changes shorter ones" in str(engine)
    first = trained(engine, content[1:3], [[0], [1]])[0]
    trained(engine, content, [[0]] * len(content))
    assert trained(engine, content[1:3], [[0], [1]])[0] == first  # no memory of the long rows
    assert first == pytest.approx(alone(model, content[1:3])[0], rel=1e-5)
    batch = collate([[row] for row in content], 0)
    with torch.no_grad(): logits, single = engine.logits(batch), engine.logits(collate([content[1:2]], 0))
    assert logits.shape == (6, 64, 160) and torch.equal(logits[1, :7], single[0]) and not logits[1, 7:].any()
    padded = Engine(model)
    assert padded.loss(batch).item() != pytest.approx(alone(model, content)[0], rel=1e-5)  # what the library does by itself
    assert engine.loss(collate([], 0)).item() == 0


# ---- what is too much to try ------------------------------------------------------------------------------------------

def test_what_cannot_be_tried_is_not_used_and_said(monkeypatch):
    monkeypatch.setattr(packing, "TRIAL_WORK", 1e5)
    model, widths = make("mistral", 64), []
    model.register_forward_pre_hook(lambda part, args, given: widths.append(given["input_ids"].numel()), with_kwargs=True)
    engine = pick_engine(model, max_length=128)
    assert way(engine) == "none" and max(widths) <= 44 and "lean" not in str(engine)
    refusal = "sliding_window=64 is shorter than max_length=128, and 129 tokens are too many to try"
    assert refusal in engine.remarks[0] and refusal in engine.packing.reason
    assert engine.remarks[0].startswith("no attention sample by sample: ") and engine.head and engine.lean["adapters"] == 8
    assert "the longest row of 100 tokens (max_length=128)" in pick_engine(model, max_length=128, longest=100).remarks[0]
    assert way(pick_engine(model, max_length=64)) == "samples" and not pick_engine(model, max_length=128, longest=64).remarks
    compile_layers(engine)
    assert engine.remarks[-1].startswith("not compiled: sliding_window=64 is shorter than max_length=128")


def test_stretched_rotary_embeddings_need_no_trial(monkeypatch):
    monkeypatch.setattr(packing, "TRIAL_WORK", 1)
    engine = pick_engine(make("longrope", 16), max_length=70)
    assert way(engine) == "alone" and engine.head and not any("too many" in remark for remark in engine.remarks)
    compile_layers(engine)
    assert engine.remarks[-1].startswith("not compiled: original_max_position_embeddings=16 is shorter than max_length=70")


def test_memory_that_runs_out_in_a_trial_ends_no_run():
    "A batch that cannot be tried is not trusted"
    model, own = make("mistral", 16), torch.nn.functional.scaled_dot_product_attention

    def small(query, *given, **named):
        if query.shape[2] > 20: raise torch.OutOfMemoryError("out of memory")
        return own(query, *given, **named)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", small)
        engine = pick_engine(model, max_length=70)
    assert way(engine) == "alone" and "a batch could not be tried (out of memory)" in engine.packing.reason and engine.head


@pytest.mark.parametrize("family, deep", ((transformers.Qwen2Config, 24), (None, 0)), ids=("the shape of Qwen2", "the packaged model"))
def test_a_model_without_limits_is_tried_as_before(family, deep):
    "One plain pass over 44 places, three of the engine over 32: not one more, whatever the length of the rows"
    if family: base = AutoModelForCausalLM.from_config(family(**COMMON | dict(num_hidden_layers=deep)))
    else: base = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    model, passes = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")), []
    def note(part, args, given): passes.append(tuple(given["input_ids"].shape))
    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    engine = pick_engine(model, max_length=100_000)
    assert way(engine) == "samples" and not engine.remarks and engine.trials == []
    assert passes == [(4, 11), (1, 32), (1, 32), (1, 32)]


def test_compiled_layers_are_tried_beyond_the_limit(monkeypatch):
    model, own = make("mistral", 16), varlen._varlen_attention
    engine = pick_engine(model, max_length=70)
    assert way(engine) == "samples"
    def compiled(self, **given):  # a compiler that forgets the window
        self._compiled_call_impl = MethodType(lambda self, *args, **named: type(self).forward(self, *args, **named), self)
        monkeypatch.setattr(varlen, "_varlen_attention", lambda *given: own(*given[:6]))
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    compile_layers(engine)
    remark, = engine.remarks
    assert remark.startswith("not compiled: it would be") and remark.endswith("beyond sliding_window=16")


# ---- the limits of a config -------------------------------------------------------------------------------------------

FIXED = dict(rope_theta=1e4, factor=8., original_max_position_embeddings=8192)


@pytest.mark.parametrize("kind, fields, limits", (
    ("Qwen2Config", {}, {}),
    ("Qwen2Config", dict(use_sliding_window=True), {"sliding_window": 4096}),
    ("LlamaConfig", dict(rope_parameters=FIXED | dict(rope_type="llama3", low_freq_factor=1., high_freq_factor=4.)), {}),
    ("LlamaConfig", dict(rope_parameters=FIXED | dict(rope_type="yarn")), {}),
    ("LlamaConfig", dynamic(2048), {"max_position_embeddings": 2048}),
    ("MistralConfig", {}, {"sliding_window": 4096}),
    ("MistralConfig", dict(sliding_window=None), {}),
    ("Llama4TextConfig", dict(floor_scale=4096), {"floor_scale": 4096, "attention_chunk_size": 8192}),
    ("Phi3Config", dict(max_position_embeddings=131072, rope_parameters=longrope(4096, 48)),
        {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}),
    ("Qwen2MoeConfig", {}, {}),
    ("Gemma3TextConfig", dict(sliding_window=512), {"sliding_window": 512}),
    ("GPTNeoConfig", {}, {"window_size": 256}),
    ("DogeConfig", {}, {"keep_window_size": 2048}),
    ("GPT2Config", {}, {}),
), ids=lambda value: value if isinstance(value, str) else "")
def test_limits_are_found_by_the_words_in_their_names(kind, fields, limits):
    found = {limit.field: limit.tokens for limit in find_limits(getattr(transformers, kind)(**fields))}
    assert {name: value for name, value in found.items() if name != "max_position_embeddings" or name in limits} == limits
    assert list(found.values()) == sorted(found.values())
    assert ("max_position_embeddings" in found) == ("max_position_embeddings" in limits)


def test_limits_are_found_in_nested_settings():
    class Config:
        def to_dict(self):
            full = dict(rope_type="longrope", original_max_position_embeddings=128)
            others = dict(max_window_layers=28, label2id=dict(window=3), vision_config=dict(window_size=7), sliding_window_pattern=6)
            per_layer = dict(full_attention=full, sliding_attention=dict(rope_type="default"))
            return dict(rope_parameters=per_layer, windows=[None, 32, 64]) | others
    limits = [str(limit) for limit in find_limits(Config())]
    assert limits == ["windows.1=32", "windows.2=64", "rope_parameters.full_attention.original_max_position_embeddings=128"]
    assert find_limits(None) == []


def test_a_table_tells_whether_rows_change_each_other():
    for name in FAMILIES:
        model, mixing = make(name, 16), name in ("longrope", "dynamic rope")
        before = {part: values.clone() for part, values in model.named_buffers()}
        assert rope_mixes(model, 64) == mixing and not rope_mixes(model, 16)
        assert (rope_limit(model, 64) is not None) == mixing == ("changes shorter rows" in detect_packing_mode(model, 64).reason)
        assert all(torch.equal(values, before[part]) for part, values in model.named_buffers())


def test_what_was_met_is_forgotten():
    model, ids = make("dynamic rope", 16), torch.arange(10, 40)[None]
    with torch.no_grad():
        fresh = model(ids).logits
        model(torch.arange(10, 100)[None])
        stale = model(ids).logits
        forget_lengths(model)
        again = model(ids).logits
    assert torch.equal(fresh, again) and not torch.allclose(fresh, stale, atol=1e-3)


# ---- a run ------------------------------------------------------------------------------------------------------------

def folder(path, name, limit):
    "A saved model and the packaged tokenizer"
    tokenizer, (kind, fields, *_) = AutoTokenizer.from_pretrained(tiny_path()), FAMILIES[name]
    special = dict(vocab_size=len(tokenizer), initializer_range=0.1)
    special |= {f"{name}_token_id": tokenizer.eos_token_id for name in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**COMMON | fields(limit) | special))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("packing", (True, False), ids=("packed", "padded"))
@pytest.mark.parametrize("name", ("dynamic rope", "phimoe", "mistral"))
def test_a_run_evaluates_every_row_as_if_it_were_alone(tmp_path, name, packing):
    content = [dict(row, output=" ".join([row["output"]] * (1 + at % 3))) for at, row in enumerate(rows(24))]
    fields = dict(model_name=str(folder(tmp_path/"model", name, 32)), data_path=write_rows(tmp_path/"rows.jsonl", content), bf16=False)
    trainer = LoRATrainer(tiny_config(tmp_path, **fields, eval_ratio=0.3, packing=packing, max_length=128)).setup()
    assert way(trainer.engine) == {"dynamic rope": "alone", "phimoe": "positions", "mistral": "samples"}[name] or not packing
    lean, total, count = trainer.evaluate(), 0., 0
    fused_layers.restore_forwards(trainer.model)
    varlen.disable_varlen(trainer.model)
    for at in range(len(trainer.eval_dataset)):
        row = trainer.eval_dataset[at]
        ids, labels = torch.tensor([list(row["input_ids"])]), torch.tensor([list(row["labels"])])
        with torch.no_grad(), dropout_disabled(trainer.model):
            forget_lengths(trainer.model)
            total += float(cross_entropy(trainer.model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100))
        count += int((labels[:, 1:] != -100).sum())
    assert lean == pytest.approx(total / count, rel=1e-5)


def test_a_run_whose_rows_are_short_does_not_mind_its_max_length(tmp_path):
    fields = dict(model_name=str(folder(tmp_path/"model", "phimoe", 64)), data_path=write_rows(tmp_path/"rows.jsonl", rows(16)), bf16=False)
    trainer = LoRATrainer(tiny_config(tmp_path, **fields, max_length=128)).setup()
    assert way(trainer.engine) == "samples" and trainer.engine.trials == []
