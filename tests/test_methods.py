"""Variants of LoRA, new tokens, adapters that are continued, optimizers, schedules, noise and quantised bases:
over many small models, and against PEFT, transformers and bitsandbytes themselves."""

import copy
import io
import json
import math
import random
import threading
import warnings

import pytest
import torch
from helpers import rows, tiny_config, write_rows
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_scheduler,
)
from transformers.integrations.neftune import neftune_post_forward_hook

from sage_finetune import LoRATrainer, merge
from sage_finetune.config import LoRAConfig, PresetConfigs, TrainingConfig
from sage_finetune.core.errors import ConfigError, ModelError
from sage_finetune.data.collation import collate
from sage_finetune.inference.model_cache import clear_model_cache, load_cached_model
from sage_finetune.modeling.adapter import attach_lora, count_parameters, weight_bytes
from sage_finetune.modeling.adapter_config import new_token_ids
from sage_finetune.modeling.adapter_files import continue_adapter, load_adapter, restore_adapter, save_adapter
from sage_finetune.modeling.base import LOADING, load_base, resize_embeddings
from sage_finetune.modeling.engine import pick_engine
from sage_finetune.modeling.optimizer import make_lr_scheduler, make_optimizer, neftune
from sage_finetune.modeling.tokenizer import add_tokens, inherited_tokens, load_tokenizer, run_tokenizer
from sage_finetune.training.meta_model import build_meta_model

pytestmark = [pytest.mark.filterwarnings("ignore:optim='paged"), pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]
CHOICES = {name: TrainingConfig.__dataclass_fields__[name].metadata["choices"] for name in ("optim", "lr_scheduler_type")}


def small(kind="qwen2", seed=0, tied=True, width=32, layers=2, heads=2, vocabulary=96, dtype=torch.float32):
    "A random model of a family, always the same for the same arguments"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = dict(hidden_size=width, intermediate_size=2 * width + 8, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=1, vocab_size=vocabulary, tie_word_embeddings=tied)
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocabulary,
                n_positions=64, tie_word_embeddings=tied))
        else: model = dict(qwen2=Qwen2ForCausalLM, llama=LlamaForCausalLM)[kind](dict(qwen2=Qwen2Config, llama=LlamaConfig)[kind](**shape))
        for p in model.parameters(): p.data += 0.05 * torch.randn_like(p)  # biases and norms that are nothing special
    return model.to(dtype).eval()


def some_ids(vocabulary=96, shape=(2, 9), seed=1): return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def learn(model, ids, steps=3, rate=1e-2):
    "A few steps of Adam; the losses"
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model, ids): return model.eval()(ids).logits.float()


def saved(model, folder, **options):
    save_adapter(model, folder, **options)
    return load_file(folder/"adapter_model.safetensors")


def said(folder): return json.loads((folder/"adapter_config.json").read_text())


def alike(one, two): return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


# ---- attaching --------------------------------------------------------------------------------------------------------

DRAWS = [random.Random(seed) for seed in range(14)]


def drawn(rng):
    "A model and an adapter's fields, by chance"
    kind = rng.choice(("qwen2", "llama", "gpt2"))
    names = dict(gpt2=["c_attn", "c_fc"]).get(kind, ["q_proj", "down_proj", "v_proj"])
    pattern = dict(gpt2=r".*\.h\.0\..*c_(attn|proj)").get(kind, r"model\.layers\.[01]\.(mlp|self_attn)\.(up|k)_proj")
    base = dict(kind=kind, seed=rng.randrange(99), tied=rng.random() < 0.5, width=16 * rng.randint(1, 3),
        layers=rng.randint(1, 2))
    overrides = dict(r=rng.choice((1, 2, 5, 8)), lora_alpha=rng.choice((1, 8, 32)), use_rslora=rng.random() < 0.5,
        use_dora=rng.random() < 0.4,
        init_lora_weights=rng.choice(("default", "gaussian", "pissa", "pissa_niter_16")),
        target_modules=rng.choice(("all-linear", rng.sample(names, 2 if kind != "gpt2" else 1), pattern)))
    return base, LoRAConfig(**overrides)


@pytest.mark.parametrize("rng", DRAWS, ids=range(len(DRAWS)))
def test_any_variant_starts_as_the_base_learns_and_fits_plain_peft(rng, tmp_path):
    """Over families, shapes and fields: no change at the start, a falling loss, no word from a library,
    and on the original base the same logits through plain PEFT"""
    shape, lora = drawn(rng)
    base, ids, before = small(**shape), some_ids(), copy.deepcopy(lora)
    plain = logits(base, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attach_lora(base, lora, seed=3)
        assert torch.allclose(logits(model, ids), plain, atol=2e-4)
        losses = learn(model, ids, steps=6, rate=min(1e-2, 1e-2 / lora.scaling))
        weights = saved(model, tmp_path)
        ours = load_adapter(small(**shape), tmp_path)
    assert min(losses) < losses[0] - 1e-3 and lora == before
    assert all(p.requires_grad == ("lora_" in name) and (p.dtype == torch.float32) for name, p in model.named_parameters())
    tuned, pissa = logits(model, ids), lora.init_lora_weights.startswith("pissa")
    assert (tuned - plain).abs().max() > 1e-3
    for loaded in (PeftModel.from_pretrained(small(**shape), tmp_path), ours): assert torch.allclose(logits(loaded, ids), tuned, atol=5e-4)
    layer = next(layer for layer in ours.modules() if hasattr(layer, "lora_A"))
    assert layer.scaling["default"] == pytest.approx(lora.scaling) and said(tmp_path)["r"] == (2 if pissa else 1) * lora.r
    assert said(tmp_path)["fan_in_fan_out"] == (shape["kind"] == "gpt2") and said(tmp_path)["use_dora"] == lora.use_dora
    assert any("magnitude" in name for name in weights) == lora.use_dora
    assert torch.allclose(logits(ours.merge_and_unload(safe_merge=True), ids), tuned, atol=5e-4)


def test_the_base_does_not_move(tmp_path):
    "Whatever learns, frozen weights stay to the bit; PiSSA's are changed once, at the start"
    for start in ("default", "pissa"):
        base, ids = small(), some_ids()
        model = attach_lora(base, LoRAConfig(init_lora_weights=start))
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        learn(model, ids)
        assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
        original = dict(small().named_parameters())["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight,
            original) == (start == "default")


@pytest.mark.parametrize("lora, sentence", [
    (dict(target_modules=["q_proj", "query"]), "'query'` fits no layer of this model. It has: down_proj"),
    (dict(target_modules=["query"]), "fits no layer of this model. It has: down_proj"),
    (dict(target_modules=[]), "fits no layer"),
    (dict(target_modules="q_proj"), "A pattern has to fit the whole name"),
    (dict(target_modules="(q_proj"), "is not a pattern that can be read"),
    (dict(target_modules=".*norm"), "also fits layers that can have no adapter"),
    (dict(modules_to_save=["lm_head", "head"]), "no layer 'head'. It has: down_proj, embed_tokens, gate_proj"),
    (dict(r=40, init_lora_weights="pissa"), "the smallest layer has 16 directions"),
], ids=str)
def test_what_does_not_fit_is_said(lora, sentence):
    with pytest.raises((ModelError, ConfigError)) as refused: attach_lora(small(), LoRAConfig(**lora))
    assert sentence in str(refused.value)


def test_biases_in_sixteen_bits_are_not_silent():
    with pytest.raises(ConfigError, match="lora.bias='all'` trains parameters that are kept in fp16"):
        attach_lora(small(dtype=torch.float16), LoRAConfig(bias="all"))
    with pytest.warns(UserWarning, match="biases are trained in bf16"):
        attach_lora(small(dtype=torch.bfloat16), LoRAConfig(bias="lora_only"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attach_lora(small(), LoRAConfig(bias="lora_only"))
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad and "bias" in name} == {"q_proj",
        "k_proj", "v_proj"}


# ---- PiSSA ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rslora", (False, True))
def test_pissa_is_translated_as_peft_does_it(rslora, tmp_path):
    """The same bytes as PEFT's own way, which needs the starting adapter on disk and a second adapter in the model;
    and the random generators are not touched"""
    lora = LoRAConfig(r=4, init_lora_weights="pissa_niter_16", use_rslora=rslora)
    model, ids = attach_lora(small(), lora, seed=5), some_ids()
    model.peft_config["default"].init_lora_weights = True  # what PEFT asks for before the start is saved
    model.save_pretrained(tmp_path/"start")
    model.peft_config["default"].init_lora_weights = "pissa_niter_16"
    learn(model, ids)
    rng_state = torch.get_rng_state()
    ours = saved(model, tmp_path/"ours")
    assert torch.equal(torch.get_rng_state(), rng_state) and model.peft_config["default"].r == 4
    model.save_pretrained(tmp_path/"theirs", path_initial_model_for_weight_conversion=str(tmp_path/"start"))
    assert alike(ours, load_file(tmp_path/"theirs"/"adapter_model.safetensors"))
    differ = {name for name, value in said(tmp_path/"ours").items() if value != said(tmp_path/"theirs")[name] and name != "target_modules"}
    assert not differ


@pytest.mark.parametrize("start", ("pissa", "pissa_niter_16"))
def test_a_resumed_pissa_run_is_the_same_to_the_byte(start, tmp_path):
    "Attached anew with the same seed, base and start are the same bytes; with the checkpoint in it, so is the next step"
    lora, ids = LoRAConfig(r=3, init_lora_weights=start), some_ids()
    first = attach_lora(small(), lora, seed=2)
    learn(first, ids)
    saved(first, tmp_path/"ours", for_resume=True)
    first.save_pretrained(tmp_path/"peft")
    torch.rand(5)
    for folder in ("ours", "peft"):
        second = attach_lora(small(), lora, seed=2)
        assert alike(first.pissa_start, second.pissa_start)
        restore_adapter(second, tmp_path/folder)
        assert alike(first.state_dict(), second.state_dict())
    assert learn(copy.deepcopy(first), ids) == learn(second, ids)
    other = attach_lora(small(seed=9), lora, seed=2)
    assert not alike(first.pissa_start, other.pissa_start)


def test_pissa_keeps_what_else_is_trained(tmp_path):
    "Layers trained whole, DoRA's lengths and new rows survive the translation"
    ids = some_ids()
    model = attach_lora(small(tied=False), LoRAConfig(r=4, init_lora_weights="pissa", use_dora=True, modules_to_save=["norm"]),
        new_tokens=[90, 91])
    learn(model, ids)
    saved(model, tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(small(tied=False), tmp_path), ids), logits(model, ids), atol=5e-4)


# ---- layers trained whole ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("names", (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]), ids="+".join)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_layers_trained_whole(names, tied, dtype, tmp_path):
    "They learn in fp32, travel with the adapter, and what was one table stays one table, merged and read back too"
    make, ids = lambda: small(tied=tied, dtype=dtype), some_ids()
    model = attach_lora(make(), LoRAConfig(modules_to_save=names))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = learn(model, ids)
    assert losses[-1] < losses[0] and model(ids).logits.dtype == dtype
    tuned = logits(model, ids)
    tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if names != ["norm"]: assert (tables[0] is tables[1]) == tied and (logits(make(), ids) - tuned).abs().max() > 1e-2
    saved(model, tmp_path/"adapter")
    loaded = load_adapter(make(), tmp_path/"adapter")
    room = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(logits(loaded, ids), tuned, atol=room)
    going_on = load_adapter(make(), tmp_path/"adapter", trainable=True)
    assert alike({name: p for name, p in model.named_parameters() if p.requires_grad},
        {name: p for name, p in going_on.named_parameters() if p.requires_grad})
    merged = loaded.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path/"merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged", dtype=dtype), ids), tuned, atol=room)


@pytest.mark.parametrize("names", (["embed_tokens", "q_proj"], ["lm_head"], r".*(q_proj|lm_head)"), ids=str)
def test_an_adapter_on_the_head(names, tmp_path):
    "It merges where the head has numbers of its own, and is refused where it is the table of embeddings"
    with pytest.raises(ModelError, match="are one table: an adapter on it cannot be merged"):
        attach_lora(small(), LoRAConfig(target_modules=names))
    make, ids = lambda: small(tied=False), some_ids()
    model = attach_lora(make(), LoRAConfig(target_modules=names))
    losses = learn(model, ids)
    saved(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert losses[-1] < losses[0] and torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-4)
    assert torch.allclose(logits(loaded.merge_and_unload(), ids), logits(model, ids), atol=5e-4)


# ---- new tokens -------------------------------------------------------------------------------------------------------

def test_new_tokens_are_one_token_wherever_they_stand():
    "Random words in random text: one id each, in order, and the text comes back"
    rng = random.Random(0)
    for _ in range(20):
        tokenizer = load_tokenizer("tiny")
        words = list({"".join(rng.choice("abcxyz<|>_ 中") for _ in range(rng.randint(5, 9))).strip() + str(at)
            for at in range(rng.randint(1, 4))})
        size, new = len(tokenizer), add_tokens(tokenizer, words)
        assert new.ids == list(range(size, size + len(words))) and new.texts == words
        assert [load_tokenizer("tiny").decode(pieces) for pieces in new.pieces] == words
        text = "".join(f" so {rng.choice('abc')}{word}," for word in words)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [one for one in ids if one >= size] == new.ids and tokenizer.decode(ids) == text
        assert not set(new.ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("tokens, sentence", [([""], "''"), (["the"], "is a single token already"),
    (["<|im_end|>"], "is a single token already"), (["<new>", "<new>"], "twice"),
    (["a<|im_start|>b"], "would hide it")], ids=str)
def test_tokens_that_are_refused(tokens, sentence):
    tokenizer = load_tokenizer("tiny")
    size = len(tokenizer)
    with pytest.raises(ConfigError, match="new_tokens") as refused: add_tokens(tokenizer, tokens)
    assert sentence in str(refused.value) and len(tokenizer) == size


def test_a_token_that_would_be_written_wrongly():
    "Byte-level tokenizers take the letters of an added token for bytes where they can"
    for word in ("Größe", "señor"):
        with pytest.raises(ConfigError, match="would write as"): add_tokens(load_tokenizer("tiny"), [word])


@pytest.mark.parametrize("kind, tied", [("qwen2", True), ("qwen2", False), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("spare", (0, 100), ids=("full", "spare rows"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_only_the_rows_of_new_tokens_are_trained(kind, tied, spare, dtype, tmp_path):
    "Start at the mean of the pieces, everything else untouched, a small file, a fresh base that makes room by itself, and merging"
    tokenizer = load_tokenizer("tiny")
    size, make = len(tokenizer), lambda: small(kind, tied=tied, vocabulary=len(load_tokenizer("tiny")) + spare, dtype=dtype)
    new, model = add_tokens(tokenizer, ["<|alpha|>", "<|beta|>", "<|gamma|>"]), make()
    old, rng_state = model.get_input_embeddings().weight.clone(), torch.get_rng_state()
    resize_embeddings(model, new)
    table = model.get_input_embeddings().weight
    assert (torch.equal(torch.get_rng_state(), rng_state)
        and len(table) == (size + spare if spare else -(-(size + 3) // 64) * 64) == model.config.vocab_size)
    assert torch.equal(table[:size], old[:size])
    for token_id, pieces in zip(new.ids, new.pieces):
        assert torch.allclose(table[token_id].float(), old[pieces].float().mean(0), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)

    before, ids = ({name: p.clone() for name, p in model.named_parameters()},
        torch.tensor([tokenizer.encode("so <|alpha|> and <|gamma|>", add_special_tokens=False)]))
    tuned, plain = attach_lora(model, LoRAConfig(), new_tokens=new.ids), attach_lora(make(), LoRAConfig())
    assert count_parameters(tuned).trainable - count_parameters(plain).trainable == (1 if tied else 2) * 3 * table.shape[1]
    assert all(p.dtype == torch.float32 for p in tuned.parameters() if p.requires_grad)
    losses = learn(tuned, ids)
    assert losses[-1] < losses[0]
    for name, p in tuned.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p,
                before[name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")]), name
    rows = [p for name, p in tuned.named_parameters() if "trainable_tokens_delta" in name]
    assert all((p[0] - table[new.ids[0]].float()).abs().max() > 1e-3 for p in rows) and len(rows) == (1 if tied else 2)

    saved(tuned, tmp_path/"new"), saved(plain, tmp_path/"plain")
    weigh = lambda name: (tmp_path/name/"adapter_model.safetensors").stat().st_size
    assert weigh("new") - weigh("plain") < 2 * 4 * 3 * table.shape[1] + 1000
    fresh = load_adapter(make(), tmp_path/"new")
    room = 1e-4 if dtype == torch.float32 else 0.05
    assert torch.allclose(logits(fresh, ids), logits(tuned, ids), atol=room) and fresh.get_base_model().config.vocab_size == len(table)
    assert torch.allclose(logits(fresh.merge_and_unload(safe_merge=True), ids), logits(tuned, ids),
        atol=room if dtype == torch.float32 else 0.2)
    assert new_token_ids(tmp_path/"new") == new.ids and new_token_ids(tmp_path/"plain") == []


def test_checkpoints_with_new_tokens(tmp_path):
    "Both kinds of checkpoint give the bytes back, though PEFT's also holds the whole table"
    tokenizer = load_tokenizer("tiny")
    new = add_tokens(tokenizer, ["<|alpha|>"])
    def make():
        model = small(vocabulary=1536)
        model.config._name_or_path = model.name_or_path = str(tmp_path/"base")
        resize_embeddings(model, new)
        return attach_lora(model, LoRAConfig(), new_tokens=new.ids)
    small(vocabulary=1536).save_pretrained(tmp_path/"base")
    first = make()
    learn(first, torch.tensor([[5, 6, new.ids[0], 7]]))
    saved(first, tmp_path/"ours", for_resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.save_pretrained(tmp_path/"peft")
    assert len(load_file(tmp_path/"peft"/"adapter_model.safetensors")) > len(load_file(tmp_path/"ours"/"adapter_model.safetensors"))
    for folder in ("ours", "peft"):
        second = make()
        restore_adapter(second, tmp_path/folder)
        assert alike(first.state_dict(), second.state_dict()), folder


# ---- going on ---------------------------------------------------------------------------------------------------------

def test_going_on_inherits_everything(tmp_path):
    "Also from files in 16 bits, and from a run folder; what was inherited is said"
    lora, ids = LoRAConfig(r=4, lora_alpha=12, use_rslora=True, use_dora=True, target_modules=["q_proj", "up_proj"],
        modules_to_save=["norm"]), some_ids()
    first = attach_lora(small(), lora)
    learn(first, ids)
    weights = saved(first, tmp_path/"run"/"lora_weights")
    halved = {name: p.to(torch.bfloat16) for name, p in weights.items()}
    save_file(halved, tmp_path/"run"/"lora_weights"/"adapter_model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        second, sentence = continue_adapter(small(dtype=dtype), tmp_path/"run", LoRAConfig(lora_dropout=0.2))
        trained = {name: p for name, p in second.named_parameters() if p.requires_grad}
        assert ({name for name, p in first.named_parameters() if p.requires_grad} == set(trained)
            and all(p.dtype == torch.float32 for p in trained.values()))
        again = saved(second, tmp_path/f"again {dtype}")
        assert set(again) == set(weights) and all(torch.equal(p, halved[name].float()) for name, p in again.items())
        assert {layer.p for layer in second.modules() if isinstance(layer, torch.nn.Dropout)} == {0.2}
    for part in ("r=4", "lora_alpha=12", "q_proj, up_proj", "rsLoRA", "DoRA", "whole: norm", "run"): assert part in sentence
    losses = learn(second, ids)
    assert losses[-1] < losses[0]
    assert continue_adapter(small(), tmp_path/"run", lora)[1]  # fields that say the same are no contradiction


def test_going_on_names_what_contradicts(tmp_path):
    first = attach_lora(small(), LoRAConfig(r=4, target_modules=["q_proj"]))
    saved(first, tmp_path/"run")
    for overrides, words in ((dict(r=16), ["lora.r=16 (it has 4)"]), (dict(target_modules=["v_proj"], use_rslora=True),
            ["lora.target_modules=['v_proj'] (it has ['q_proj'])", "lora.use_rslora=True"]),
            (dict(init_lora_weights="pissa"), ["has its start behind it"])):
        with pytest.raises(ConfigError) as refused: continue_adapter(small(), tmp_path/"run", LoRAConfig(**overrides))
        assert all(word in str(refused.value) for word in words) and "continue_from" in str(refused.value)
    for other in (small(width=48), small("gpt2"), small(layers=1)):
        with pytest.raises(ModelError, match="does not fit this base model"): continue_adapter(other, tmp_path/"run", LoRAConfig())
    with pytest.raises(ModelError, match="there is no adapter in"): continue_adapter(small(), tmp_path/"nothing", LoRAConfig())
    (tmp_path/"run"/"adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="its adapter_config.json is broken"): continue_adapter(small(), tmp_path/"run", LoRAConfig())
    saved(attach_lora(small(), LoRAConfig(init_lora_weights="pissa")), tmp_path/"checkpoint", for_resume=True)
    with pytest.raises(ModelError, match="Name the lora_weights of that run"):
        continue_adapter(small(), tmp_path/"checkpoint", LoRAConfig())


def test_another_name_of_the_base_is_said(tmp_path):
    "The same shapes under another name: it works, and the sentence says so"
    for name, part in (("zoo/qwen-a", "trained on qwen-a"), ("zoo/qwen-b", "it names zoo/qwen-a as its base and this is zoo/qwen-b")):
        base = small()
        base.config._name_or_path = base.name_or_path = name
        if name.endswith("a"): saved(attach_lora(base, LoRAConfig()), tmp_path/"run")
        base = small()
        base.config._name_or_path = name
        assert part in continue_adapter(base, tmp_path/"run", LoRAConfig())[1]


def test_going_on_with_new_tokens(tmp_path):
    "They are inherited with their ids; others cannot be added to an adapter"
    config = PresetConfigs.tiny(new_tokens=["<|alpha|>", "<|beta|>"], device="cpu")
    base, tokenizer = load_base(config)
    ids = torch.tensor([tokenizer.encode("<|alpha|> is <|beta|>", add_special_tokens=False)])
    first = attach_lora(base, config.lora, new_tokens=run_tokenizer(config)[1].ids)
    learn(first, ids)
    folder = tmp_path/"run"/"lora_weights"
    saved(first, folder)
    with pytest.raises(ModelError, match="Copy it there"): inherited_tokens(load_tokenizer("tiny"), tmp_path/"run")
    tokenizer.save_pretrained(folder)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(theirs, ids), logits(first, ids)[..., :len(tokenizer)], atol=1e-3)
    later = PresetConfigs.tiny(continue_from=tmp_path/"run", device="cpu")
    base, again = load_base(later)
    assert again.get_vocab() == tokenizer.get_vocab() and inherited_tokens(load_tokenizer("tiny"), tmp_path/"run") == config.new_tokens
    second, sentence = continue_adapter(base, later.continue_from, later.lora)
    assert torch.allclose(logits(second, ids), logits(first, ids), atol=1e-4) and "2 new tokens" in sentence
    assert {name for name, p in second.named_parameters() if p.requires_grad} == {name
        for name, p in first.named_parameters() if p.requires_grad}
    # as after that run was finished and the old one deleted
    done = PresetConfigs.tiny(continue_from=tmp_path/"gone", output_dir=tmp_path/"run", device="cpu")
    assert run_tokenizer(done)[1].texts == config.new_tokens
    with pytest.raises(ModelError, match="there is no adapter in .*gone"):
        run_tokenizer(PresetConfigs.tiny(continue_from=tmp_path/"gone", output_dir=tmp_path/"fresh"))
    later.new_tokens = ["<|alpha|>", "<|gamma|>"]
    with pytest.raises(ConfigError, match="'<|gamma|>', and the adapter of `continue_from`".replace("|", r"\|")): run_tokenizer(later)


# ---- optimizers and schedules -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CHOICES["optim"])
@pytest.mark.parametrize("ratio", (None, 16.), ids=("", "LoRA+"))
def test_every_optimizer_goes_on_to_the_byte(name, ratio):
    "Stopped after three steps and continued from what a file can hold, it takes the same next three"
    config, ids = PresetConfigs.tiny(optim=name, learning_rate=1e-3, weight_decay=0.1, loraplus_lr_ratio=ratio,
        lora=dict(r=64, use_dora=True)), some_ids()
    def run(model, optimizer, schedule, steps):
        losses = []
        for _ in range(steps):
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    def make(model):
        optimizer = make_optimizer(model, config)
        return model, optimizer, make_lr_scheduler(optimizer, config, 8)
    straight = make(attach_lora(small(width=64), config.lora, seed=1))
    assert len(run(*straight, 3)) == 3
    resumed = make(copy.deepcopy(straight[0]))
    for new, old in zip(resumed[1:], straight[1:]):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        new.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    losses = run(*straight, 4)
    assert losses == run(*resumed, 4) and losses[-1] < losses[0]
    assert alike(dict(straight[0].named_parameters()), dict(resumed[0].named_parameters()))


def test_loraplus_is_peft_s(tmp_path):
    "Each matrix has the rate that PEFT's own LoRA+ gives it; and at every step of a schedule the ratio stays"
    config = PresetConfigs.tiny(learning_rate=1e-3, loraplus_lr_ratio=8, weight_decay=0.2, warmup_ratio=0.2)
    model = attach_lora(small(), config.lora)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.2)
    by_parameter = lambda optimizer: {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    ours = make_optimizer(model, config)
    assert by_parameter(ours) == by_parameter(theirs) and len(by_parameter(ours)) == sum(p.requires_grad for p in model.parameters())
    schedule = make_lr_scheduler(ours, config, 10)
    for _ in range(10):
        first, second = (group["lr"] for group in ours.param_groups)
        assert second == pytest.approx(8 * first) and schedule.get_last_lr()[0] == first
        ours.step(), schedule.step()


@pytest.mark.parametrize("bias", ("all", "lora_only"))
def test_what_decays_and_what_does_not(bias):
    "Biases, norms and DoRA's lengths are not pulled towards zero, whatever rate they have"
    config = PresetConfigs.tiny(weight_decay=0.3, loraplus_lr_ratio=4, lora=dict(use_dora=True, bias=bias, modules_to_save=["norm"]))
    model = attach_lora(small(), config.lora)
    optimizer, names = make_optimizer(model, config), {p: name for name, p in model.named_parameters()}
    found = {names[p]: (group["weight_decay"], group["lr"] / config.learning_rate) for group in optimizer.param_groups
        for p in group["params"]}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (decay, rate) in found.items():
        assert decay == (0.3 if "lora_A" in name or "lora_B" in name else 0), name
        assert rate == pytest.approx(4 if "lora_B" in name else 1), name
    assert ({"bias" in name for name in found} == {"magnitude" in name for name in found}
        == {"norm" in name for name in found} == {True, False})


def test_an_optimizer_that_does_not_run_says_so():
    "On a device without its kernels"
    model = attach_lora(small(), LoRAConfig()).to("meta")
    with pytest.raises(ConfigError, match="`optim='adamw_8bit'` does not run here .*Use `optim=\"adamw_torch\"`"):
        make_optimizer(model, PresetConfigs.tiny(optim="adamw_8bit"))


@pytest.mark.filterwarnings("default:optim='paged")
def test_paging_on_a_processor_is_said():
    with pytest.warns(UserWarning, match="works as 'adamw_8bit'"):
        make_optimizer(attach_lora(small(), LoRAConfig()), PresetConfigs.tiny(optim="paged_adamw_8bit"))


@pytest.mark.parametrize("name", CHOICES["lr_scheduler_type"])
def test_every_schedule_is_transformers_own(name):
    for total, warmup in ((10, 0.), (37, 0.1), (60, 0.5)):
        config = PresetConfigs.tiny(lr_scheduler_type=name, learning_rate=3e-4, warmup_ratio=warmup, num_train_epochs=3)
        weights = [torch.nn.Parameter(torch.zeros(1))]
        ours, theirs = torch.optim.AdamW(weights, lr=3e-4), torch.optim.AdamW(weights, lr=3e-4)
        extra = dict(scheduler_specific_kwargs=dict(num_cycles=3)) if name == "cosine_with_restarts" else {}
        schedules = make_lr_scheduler(ours, config, total), get_scheduler(name, theirs, num_warmup_steps=round(total * warmup),
            num_training_steps=total, **extra)
        rates = []
        for _ in range(total):
            assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
            rates.append(schedules[0].get_last_lr()[0])
            for optimizer, schedule in zip((ours, theirs), schedules): optimizer.step(), schedule.step()
        assert max(rates) == pytest.approx(3e-4, rel=0.1)
        if name == "constant": assert set(rates) == {3e-4}
        elif name == "cosine_with_restarts":
            assert sum(later > 2 * earlier for earlier, later in zip(rates[round(total * warmup):], rates[round(total * warmup) + 1:])) == 2
        elif warmup: assert rates[0] == 0


def test_a_rate_below_the_end_of_polynomial():
    config = PresetConfigs.tiny(lr_scheduler_type="polynomial", learning_rate=1e-8)
    with pytest.raises(ConfigError, match="learning_rate=1e-08` is not above 1e-07"):
        make_lr_scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-8), config, 5)


# ---- noise ------------------------------------------------------------------------------------------------------------

def noise_of(model, alpha, inputs, training=True):
    "What was added to the embeddings, (lines, longest, width)"
    table, heard = model.get_input_embeddings(), []
    plain = table.weight.detach()[inputs["input_ids"]]
    with neftune(model, alpha), torch.no_grad():
        hook = table.register_forward_hook(lambda layer, args, out: heard.append(out.detach()))
        model.train(training)(**inputs)
        hook.remove()
    return heard[0] - plain


@pytest.mark.parametrize("kind", ("qwen2", "llama", "gpt2"))
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_bound_by_the_sample_it_is_in(kind, seed):
    "Packed and padded lines of random lengths: each token's noise fills its own sample's bound and keeps within it, padding gets none"
    rng, alpha, model = random.Random(seed), 5., attach_lora(small(kind, width=96), LoRAConfig())
    lengths = [[rng.randint(2, 12) for _ in range(3)] for _ in range(2)]
    sample = lambda size: dict(input_ids=[rng.randrange(96) for _ in range(size)], labels=[0] * size)
    packed = collate([[sample(size) for size in line] for line in lengths], 0, packed=True)
    noise = noise_of(model, alpha, dict(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False))
    for line, sizes in enumerate(lengths):
        for at, size in zip((sum(sizes[:at]) for at in range(3)), sizes):
            bound = alpha / math.sqrt(size * 96)
            assert 0.97 * bound < noise[line, at:at + size].abs().max() <= 1.0001 * bound
            assert noise[line, at:at + size].norm() == pytest.approx(alpha / math.sqrt(3), rel=0.25)
    padded = collate([[sample(size)] for line in lengths for size in line], 0)
    noise = noise_of(model, alpha, dict(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]))
    for line, size in enumerate(size for sizes in lengths for size in sizes):
        bound = alpha / math.sqrt(size * 96)
        assert 0.97 * bound < noise[line, :size].abs().max() <= 1.0001 * bound and not noise[line, size:].any()


def test_noise_equals_transformers_where_lines_are_full():
    "The same bound as the hook of transformers' own trainer, over many draws, for a sample that fills its line"
    model, inputs = small(width=64), dict(input_ids=some_ids(shape=(4, 16)))
    ours = torch.stack([noise_of(model, 7., inputs) for _ in range(20)])
    layer = torch.nn.Embedding(96, 64).train()
    layer.neftune_noise_alpha = 7.
    plain = layer(inputs["input_ids"]).detach()
    theirs = torch.stack([neftune_post_forward_hook(layer, (inputs["input_ids"],), plain) - plain for _ in range(20)])
    for measure in (lambda x: x.max(), lambda x: x.min(), lambda x: x.std(), lambda x: x.abs().mean()):
        assert measure(ours).item() == pytest.approx(measure(theirs).item(), rel=0.02)
    assert abs(ours.mean().item()) < 0.01 * ours.std().item() * 2


def test_noise_only_while_it_is_asked_for():
    model, inputs = attach_lora(small(), LoRAConfig()), dict(input_ids=some_ids())
    assert noise_of(model, 5., inputs).any() and not noise_of(model, 5., inputs, training=False).any()
    assert not noise_of(model, None, inputs).any() and not noise_of(model, 0., inputs).any()
    with pytest.raises(KeyError), neftune(model, 5.): raise KeyError
    base = model.get_base_model()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    torch.manual_seed(3)
    first, state, second = noise_of(model, 5., inputs), torch.get_rng_state(), noise_of(model, 5., inputs)
    torch.set_rng_state(state)
    # a resumed run hears what it would have heard
    assert not torch.equal(first, second) and torch.equal(noise_of(model, 5., inputs), second)


@pytest.mark.parametrize("overrides", (dict(new_tokens=[90]), dict(modules_to_save=["embed_tokens"]), {}), ids=str)
def test_noise_reaches_the_loss_on_every_path(overrides):
    "Also through the engine's ways, which call the body and not the model, and through embeddings that are wrapped"
    tokens = overrides.pop("new_tokens", None)
    model = attach_lora(small(width=48), LoRAConfig(**overrides), new_tokens=tokens)
    batch = collate([[dict(input_ids=some_ids(shape=(1, size))[0].tolist(), labels=some_ids(shape=(1, size))[0].tolist())
        for size in (5, 9)]], 0, packed=True)
    engine = pick_engine(model, packs=True)
    model.train()
    with torch.no_grad():
        quiet = engine.loss(batch).item()
        with neftune(model, 5.): loud = [engine.loss(batch).item() for _ in range(2)]
        assert engine.loss(batch).item() == quiet and quiet not in loud and loud[0] != loud[1]


# ---- the engine -------------------------------------------------------------------------------------------------------

class WithTokens(LoRATrainer):
    "Trains the rows of the config's new tokens too"
    def apply_lora(self): self.model = attach_lora(self.model, self.config.lora, self.config.seed, run_tokenizer(self.config)[1].ids)

    def load_model_and_tokenizer(self): self.model, self.tokenizer = load_base(self.config)


METHODS = {"rsLoRA": dict(lora=dict(use_rslora=True, r=16)), "DoRA": dict(lora=dict(use_dora=True)),
    "PiSSA": dict(lora=dict(init_lora_weights="pissa")),
    "whole head": dict(lora=dict(modules_to_save=["lm_head"])), "bias": dict(lora=dict(bias="all")),
    "new tokens": dict(new_tokens=["colour has lamp"]),
    "all at once": dict(lora=dict(use_rslora=True, use_dora=True, init_lora_weights="pissa_niter_16",
        modules_to_save=["norm"], lora_dropout=0.), new_tokens=["<|never|>"], loraplus_lr_ratio=4, optim="adafactor")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_alike_on_both_engines(method, tmp_path):
    "What the lean engine cannot do, it leaves to the plain one: the same losses and the same adapter, up to rounding"
    def run(engine):
        trainer = WithTokens(tiny_config(tmp_path/engine, engine=engine, max_steps=4, torch_compile=False, **METHODS[method]))
        return trainer, trainer.train(show=False).losses
    (lean, losses), (plain, expected) = run("auto"), run("plain")
    assert losses == pytest.approx(expected, rel=2e-4) and losses[-1] < losses[0]
    ids = torch.tensor([lean.tokenizer.encode("Which colour has lamp 3?")])
    assert torch.allclose(logits(lean.model, ids), logits(plain.model, ids), atol=2e-2)
    assert (logits(lean.model, ids) - logits(load_base(lean.config)[0], ids)).abs().max() > 0.1
    save_adapter(lean.model, lean.config.lora_dir)
    assert merge(lean.config.output_dir).agrees
    if tokens := lean.config.new_tokens: assert len(AutoTokenizer.from_pretrained(lean.config.merged_dir).encode(tokens[0])) == 1


# ---- quantised bases --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("variant", ({}, dict(use_dora=True, use_rslora=True)), ids=("LoRA", "DoRA"))
def test_a_quantised_base_trains_and_merges(bits, variant, tmp_path):
    "From a config to a merged model in fp32: what is quantised is counted, the adapter is in fp32, evaluation in between does no harm"
    config = tiny_config(tmp_path, **{f"load_in_{bits}bit": True}, max_steps=8,
        eval_path=write_rows(tmp_path/"held.jsonl", rows(4)), eval_steps=2, lora=variant)
    trainer = LoRATrainer(config)
    result = trainer.train(show=False)
    assert result.losses[-1] < result.losses[0] - 0.3 and len(result.eval_losses) == 4
    weights = weight_bytes(trainer.model)
    assert weights.quantised == 42 and weights.parameters == count_parameters(trainer.model).total
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    report = merge(config.output_dir)
    assert report.agrees and report.dtype == "float32" and report.positions >= 100
    assert not weight_bytes(AutoModelForCausalLM.from_pretrained(config.merged_dir)).quantised


@pytest.mark.parametrize("bits", (4, 8))
def test_new_tokens_and_whole_layers_beside_a_quantised_base(bits, tmp_path):
    config = PresetConfigs.tiny(device="cpu", **{f"load_in_{bits}bit": True}, new_tokens=["<|alpha|>"], lora=dict(modules_to_save=["norm"]))
    base, tokenizer = load_base(config)
    ids = torch.tensor([tokenizer.encode("so <|alpha|> it is")])
    model = attach_lora(base, config.lora, new_tokens=run_tokenizer(config)[1].ids)
    losses = learn(model, ids)
    assert losses[-1] < losses[0]
    saved(model, tmp_path)
    assert torch.allclose(logits(load_adapter(load_base(config)[0], tmp_path), ids), logits(model, ids), atol=0.1)
    with pytest.raises(ConfigError, match="cannot be done in 8 or 4 bits"):
        attach_lora(load_base(config)[0], LoRAConfig(init_lora_weights="pissa"))


# ---- several threads --------------------------------------------------------------------------------------------------

def in_threads(*jobs, rounds=4):
    "Run jobs at the same moment, each in a thread of its own, some rounds long; what went wrong"
    wrong, ready = [], threading.Barrier(len(jobs))
    def work(job):
        try:
            for _ in range(rounds):
                ready.wait(60)
                job()
        except BaseException as error:
            wrong.append(error)
            ready.abort()
    threads = [threading.Thread(target=work, args=[job]) for job in jobs]
    for thread in threads: thread.start()
    for thread in threads: thread.join(120)
    return ([error for error in wrong if not isinstance(error, threading.BrokenBarrierError)]
        + [thread for thread in threads if thread.is_alive()])


def is_whole(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight and torch.isfinite(logits(model, some_ids())).all()


def test_models_can_be_loaded_in_several_threads(tmp_path):
    "A load, a load that makes room, an adapter and a model without numbers, all at once; and transformers is as it was"
    saved(attach_lora(load_base(PresetConfigs.tiny(device="cpu"))[0], LoRAConfig(r=2)), tmp_path)
    before, loaded, bases = (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.kaiming_uniform_,
        torch.get_default_dtype()), [], [small() for _ in range(4)]
    def load(**fields): return loaded.append(load_base(PresetConfigs.tiny(device="cpu", **fields))[0]) or loaded[-1]
    def attach():
        weights = [p for name, p in attach_lora(bases.pop(), LoRAConfig(r=2), seed=7).named_parameters() if ".lora_A." in name]
        assert all(0 < p.abs().max() < 1 and p.dtype == torch.float32 for p in weights)
    def imagine(): assert build_meta_model(PresetConfigs.tiny(), torch.bfloat16).get_input_embeddings().weight.dtype == torch.bfloat16
    assert not in_threads(load, lambda: load(new_tokens=["<|tool|>"]), lambda: load(bf16=True), attach,
        lambda: load_adapter(load(), tmp_path), imagine)
    assert before == (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.kaiming_uniform_, torch.get_default_dtype())
    assert len(loaded) == 16 and all(is_whole(model) for model in loaded)


def test_a_panel_and_a_merge_load_at_once(tmp_path):
    "What a chat panel's thread and the main thread do: one opens the run while the other merges it"
    trainer = LoRATrainer(tiny_config(tmp_path, max_steps=1))
    trainer.train(show=False)
    def opened(): clear_model_cache(), load_cached_model(trainer.config.output_dir, "cpu")
    assert not in_threads(opened, lambda: merge(trainer.config.output_dir), rounds=2)
    assert is_whole(load_base(PresetConfigs.tiny(device="cpu"))[0])


def test_a_thread_that_loads_may_load(tmp_path):
    "The lock may be taken again by the thread that has it, and is free after a load that failed"
    with LOADING: assert is_whole(load_base(PresetConfigs.tiny(device="cpu"))[0])
    (tmp_path/"config.json").write_text("{}")
    with pytest.raises(ModelError): load_base(PresetConfigs.tiny(model_name=str(tmp_path)))
    assert not in_threads(lambda: load_base(PresetConfigs.tiny(device="cpu")), rounds=1)
