"""What an adapter reaches: every weight matrix of attention and MLP in dense models and in mixtures of experts,
at the rank asked for; and what is said about the rest."""
import json
import re
import warnings

import pytest
import torch
import transformers
from helpers import tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from test_methods import alike, learn, logits, saved, small, some_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune import LoRATrainer, merge
from sage_finetune.config import LoRAConfig, PresetConfigs, tiny_path
from sage_finetune.core.errors import ConfigError, DataError, ModelError
from sage_finetune.modeling.adapter import adapter_coverage, attach_lora
from sage_finetune.modeling.adapter_files import continue_adapter, load_adapter, restore_adapter
from sage_finetune.modeling.base import load_base
from sage_finetune.training.meta_model import build_meta_model

pytestmark = pytest.mark.filterwarnings("ignore:.*mamba|.*fast path|.*causal_conv1d|.*selective_state|.*falling back")
SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, moe_intermediate_size=16)
MAMBA = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, conv_kernel=4, expand=2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0)

# architecture -> (name of its classes, fields); every stack has four experts, each of which is asked for some of thirty tokens
MIXTURES = {
    "mixtral": ("Mixtral", SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": ("Qwen2Moe", SMALL | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3Moe", SMALL | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)),
    "gpt_oss": ("GptOss", SMALL | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "granitemoe": ("GraniteMoe", SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v2": ("DeepseekV2", SMALL | LATENT | ROUTED),
    "deepseek_v3": ("DeepseekV3", SMALL | LATENT | ROUTED),
    "glm4_moe": ("Glm4Moe", SMALL | ROUTED | dict(head_dim=8)),
    "jetmoe": ("JetMoe", dict(vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)),
    "jamba": ("Jamba", SMALL | dict(num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False)),
    "lfm2_moe": ("Lfm2Moe", SMALL | dict(num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        num_dense_layers=1, layer_types=["conv", "full_attention", "conv"])),
    "ernie4_5_moe": ("Ernie4_5_Moe", SMALL | dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_intermediate_size=16, moe_layer_start_index=1)),
    "dots1": ("Dots1", SMALL | ROUTED),
    "olmoe": ("Olmoe", SMALL | dict(num_experts=4, num_experts_per_tok=2)),
    "phimoe": ("Phimoe", SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "llama4_text": ("Llama4", SMALL | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size_mlp=24,
        interleave_moe_layer_step=2, attention_chunk_size=32)),
    # of the same kinds, and not named by whoever found the fault
    "qwen3_next": ("Qwen3Next",
        SMALL | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=24, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])),
    "minimax": ("MiniMax", SMALL | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        layer_types=["full_attention", "linear_attention"], block_size=16)),
    "hunyuan_v1_moe": ("HunYuanMoEV1", SMALL | dict(num_experts=4, moe_topk=2, head_dim=8)),
    "granitemoehybrid": ("GraniteMoeHybrid", SMALL | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24,
        layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)),
    "flex_olmo": ("FlexOlmo", SMALL | dict(num_experts=4, num_experts_per_tok=2)),
}
FAMILIES = list(MIXTURES)
# fused, shared, transposed, dense first layers, experts of attention, other names
SOME = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "jetmoe", "lfm2_moe", "llama4_text"]


def mixture(name, seed=0, dtype=torch.float32, **fields):
    "A random mixture of experts, always the same for the same arguments"
    kind, shape = MIXTURES[name]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Llama4" else f"{kind}Config")(**shape | fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for p in model.parameters(): p.data = p.data + 0.05 * torch.randn_like(p)
    return model.to(dtype).eval()


def ids_of(count=30): return some_ids(shape=(1, count))


def matrices_of(model):
    "Every weight of two dimensions or more that is no table, no bias and no convolution: name -> numbers; counted here without the package"
    tables = {id(p) for table in (model.get_input_embeddings(), model.get_output_embeddings()) for p in table.parameters()}
    return {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables
        and not name.endswith("bias") and "conv" not in name.split(".")[-2] and not name.endswith("A_log")}


# their blocks read these weights themselves, so that an adapter would change nothing
PAST = {"jamba": "mamba.dt_proj", "granitemoehybrid": "mamba.out_proj"}


def is_router(name): return bool(re.search(r"\.(gate|router|wg|shared_expert_gate)\.|\.router\.layer\.", name))


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_reaches_every_matrix_but_the_routers(name):
    "Each at the rank asked for, and each learns: its adapter gets a gradient"
    base = mixture(name)
    matrices = matrices_of(base)
    wanted = {id(p): part for part, p in matrices.items() if not is_router(part) and PAST.get(name, " ") not in part}
    experts = sum(len(p) if p.dim() == 3 else 1 for p in matrices.values() if id(p) in wanted)
    model = attach_lora(base, LoRAConfig(r=3, lora_alpha=6))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    adapted = {id(layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight) for layer in layers}
    assert adapted == set(wanted), sorted(wanted[one] for one in set(wanted) - adapted)
    for layer in layers:
        stack = len(layer.get_param()) if hasattr(layer, "get_param") and layer.get_param().dim() == 3 else 1
        assert (layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == 3 * stack
            and layer.scaling["default"] == 2)
    reach = adapter_coverage(model)
    assert (reach.adapted == experts and reach.left_out["router"] == sum(map(is_router, matrices))
        and set(reach.left_out) <= {"router", "conv", "conv1d", "mamba.A_log", "dt_proj", "out_proj"})
    assert reach.share > 0.9 and str(reach).startswith(f"{experts} of {reach.matrices} matrices, ")
    with torch.no_grad():
        for layer in layers: layer.lora_B["default"].weight.normal_(std=0.05)  # the first matrix learns nothing while the second is zero
    model.train()(input_ids=ids_of(), labels=ids_of()).loss.backward()
    for part, p in model.named_parameters():
        if p.requires_grad: assert "lora_" in part and p.dtype == torch.float32 and p.grad.abs().max() > 0, part
        else: assert p.grad is None


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_mixtures_travel(name, tmp_path):
    "Saved, read back by us and by plain PEFT, put back into a run, continued and merged: the same numbers"
    model, ids = attach_lora(mixture(name), LoRAConfig(r=2), seed=5), ids_of()
    base = logits(mixture(name), ids)
    assert torch.allclose(logits(model, ids), base, atol=1e-5)
    losses = learn(model, ids, steps=4, rate=5e-3)
    tuned, weights = logits(model, ids), saved(model, tmp_path/"adapter")
    assert losses[-1] < losses[0] and (tuned - base).abs().max() > 1e-3
    assert (alike(saved(model, tmp_path/"again"), weights) and (tmp_path/"again"/"adapter_model.safetensors").read_bytes()
        == (tmp_path/"adapter"/"adapter_model.safetensors").read_bytes())
    loaded = load_adapter(mixture(name), tmp_path/"adapter")
    for one in (loaded, PeftModel.from_pretrained(mixture(name), tmp_path/"adapter")):
        assert torch.allclose(logits(one, ids), tuned, atol=1e-5)
    resumed = attach_lora(mixture(name), LoRAConfig(r=2), seed=6)
    restore_adapter(resumed, tmp_path/"adapter")
    assert alike(saved(resumed, tmp_path/"resumed"), weights)
    continued, sentence = continue_adapter(mixture(name), tmp_path/"adapter", LoRAConfig())
    assert alike(saved(continued, tmp_path/"continued"), weights) and all(one in sentence
        for one in json.loads((tmp_path/"adapter"/"adapter_config.json").read_text())["target_parameters"])
    assert adapter_coverage(continued) == adapter_coverage(model) == adapter_coverage(loaded)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged, ids), tuned, atol=1e-4)
    merged.save_pretrained(tmp_path/"merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged", dtype=torch.float32), ids), tuned, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_a_mixture_in_sixteen_bits(name):
    "The adapter stays in fp32 beside experts in 16 bits, and learns"
    model, ids = attach_lora(mixture(name, dtype=torch.bfloat16), LoRAConfig(r=2)), ids_of()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16): losses = learn(model, ids, steps=6, rate=5e-3)
    assert losses[-1] < losses[0]


# ---- names ------------------------------------------------------------------------------------------------------------

def reached(name, **fields):
    "The labels of what is adapted: those that are not left out"
    model = attach_lora(mixture(name), LoRAConfig(r=2, **fields))
    return {re.sub(r"\.base_layer", "", part).split(".lora_")[0].removeprefix("base_model.model.model.")
        for part, p in model.named_parameters() if p.requires_grad}, adapter_coverage(model)


def test_names_mean_experts_as_they_were_called_before():
    "What configs of earlier versions name is what is adapted: linear layers, and the stacks whose parts have these names"
    for name, names in (("qwen3_moe", ["gate_proj", "up_proj", "down_proj"]), ("mixtral", ["w1", "w2", "w3"]),
            ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"]), ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"])):
        _, all_mlp = reached(name, target_modules=names)
        attention = {label for label in all_mlp.left_out if "_proj" in label}
        assert attention and not {label for label in all_mlp.left_out if "experts" in label or label in names}, (name, all_mlp)


def test_stacks_by_their_own_names():
    for fields in (dict(target_modules=["experts.gate_up_proj"]), dict(target_modules=r".*experts\.gate_up_proj"),
            dict(target_modules=[], target_parameters=["experts.gate_up_proj"]), dict(target_modules=["gate_up_proj"])):
        _, reach = reached("gpt_oss", **fields)
        assert reach.adapted == 8 and "experts.gate_up_proj" not in reach.left_out and reach.left_out["experts.down_proj"] == 8
    _, reach = reached("gpt_oss", target_modules=["experts"])
    assert reach.adapted == 16
    _, reach = reached("mixtral", target_modules=["q_proj", "gate"])
    assert reach.adapted == 4 and "router" not in reach.left_out
    _, reach = reached("phimoe", target_modules=["router"])
    assert reach.adapted == 2
    _, reach = reached("olmoe", target_parameters=["experts.down_proj"])
    assert reach.left_out == {"router": 2, "experts.gate_up_proj": 8}
    _, reach = reached("deepseek_v3", target_parameters=[])
    assert {"experts.gate_up_proj", "gate_proj", "router"} <= set(reach.left_out)


@pytest.mark.parametrize("name, fields, sentence", [
    ("qwen3_moe", dict(target_modules=["gate_proj"]),
        "names 'gate_proj' alone, and in the experts of this model gate_proj and up_proj are one matrix, gate_up_proj"),
    ("mixtral", dict(target_modules=["w3", "w2"]), "names 'w3' alone"),
    ("gpt_oss", dict(target_modules=["sinks"]), "'sinks' is there but can have no adapter"),
    ("gpt_oss", dict(target_modules=["q_proj", "gate_up_proj_bias"]), "'gate_up_proj_bias' is there but can have no adapter"),
    ("gpt_oss", dict(target_modules=["query"]), "fits no layer of this model"),
    ("gpt_oss", dict(target_parameters=["experts.gate_proj"]),
        "'experts.gate_proj' fits no weight matrix of this model. Its experts in one piece: experts.down_proj, experts.gate_up_proj"),
    ("olmoe", dict(lora_dropout=0.1), "lora.lora_dropout=0.1 cannot be had for 'experts.down_proj'"),
    ("granitemoe", dict(use_dora=True), "lora.use_dora=True cannot be had for"),
    ("mixtral", dict(init_lora_weights="pissa"), "lora.init_lora_weights='pissa' cannot be had for"),
    ("deepseek_v3", dict(init_lora_weights="pissa_niter_16"),
        "Set it to 'default', or leave such matrices out: `lora.target_parameters=[]`"),
], ids=str)
def test_what_a_mixture_cannot_have_is_said(name, fields, sentence):
    with pytest.raises((ModelError, ConfigError), match=re.escape(sentence)): attach_lora(mixture(name), LoRAConfig(**fields))


@pytest.mark.parametrize("pattern, idle", [(r".*\.(q_proj|query)", "query"),
    (r".*\.(self_attn\.[qv]_proj|feed_forward\.w1)", "feed_forward"), (r".*(q_proj|experts\.wi)", "experts"),
    (r".*\.(q|k)_proj", ""), (r"model\.layers\.[01]\.(mlp|self_attn)\.(up|k)_proj", ""), (r".*(?<!lm_head)proj", ""),
    (r"(?:.*)\.(?P<part>q|v)_proj", "")])
def test_a_part_of_a_pattern_that_fits_nothing_is_said(pattern, idle):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        attach_lora(small(), LoRAConfig(target_modules=pattern))
    assert [str(one.message).split(" in it ")[0].rpartition(": ")[2] for one in heard] == [repr(idle)] * bool(idle)


@pytest.mark.parametrize("fields", (dict(lora_dropout=0.1), dict(use_dora=True), dict(init_lora_weights="pissa", r=2)), ids=str)
def test_the_way_out_works(fields):
    "With target_parameters=[] the linear layers of a mixture have what they can have"
    model, ids = attach_lora(mixture("qwen3_moe"), LoRAConfig(**dict(r=2) | fields, target_parameters=[])), ids_of()
    losses = learn(model, ids, steps=4, rate=5e-3)
    assert losses[-1] < losses[0] and adapter_coverage(model).left_out == {"router": 2, "experts.gate_up_proj": 8, "experts.down_proj": 8}


def test_an_adapter_is_continued_by_the_names_it_was_asked_with(tmp_path):
    "The names of the config are compared with what they mean, not with how PEFT wrote them down"
    names = dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    saved(attach_lora(mixture("qwen2_moe"), LoRAConfig(r=2, **names)), tmp_path)
    continue_adapter(mixture("qwen2_moe"), tmp_path, LoRAConfig(r=2, **names))
    with pytest.raises(ConfigError, match="lora.lora_dropout=0.1 cannot be had for"):
        continue_adapter(mixture("qwen2_moe"), tmp_path, LoRAConfig(lora_dropout=0.1))
    with pytest.raises(ConfigError, match="lora.target_parameters"):
        continue_adapter(mixture("qwen2_moe"), tmp_path, LoRAConfig(target_parameters=["experts.down_proj"]))


# ---- state-space models -----------------------------------------------------------------------------------------------

STATES = {
    "mamba": ("Mamba", MAMBA | dict(use_mambapy=False)),
    "mamba2": ("Mamba2", MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16)),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "falcon_h1": ("FalconH1", SMALL | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16)),
    "nemotron_h": ("NemotronH", SMALL | dict(layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3, head_dim=8,
                                             ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=1, chunk_size=16,
                                             n_routed_experts=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16)),
}


@pytest.mark.parametrize("name", STATES)
def test_models_with_mamba_layers_train_with_all_linear(name, tmp_path):
    "Their out_proj is refused by PEFT, so it is left out and named; nothing that was not set is asked to be changed"
    kind, shape = STATES[name]
    make = lambda: getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape)).eval()
    torch.manual_seed(0)
    base = make()
    state, ids = {name: p.clone() for name, p in base.state_dict().items()}, ids_of()
    model = attach_lora(base, LoRAConfig(r=2))
    assert "out_proj" in adapter_coverage(model).left_out and "out_proj" in str(adapter_coverage(model))
    losses = learn(model, ids, steps=4, rate=5e-3)
    tuned = logits(model, ids)
    saved(model, tmp_path)
    again = make()
    again.load_state_dict(state)
    assert losses[-1] < losses[0] and torch.allclose(logits(load_adapter(again, tmp_path), ids), tuned, atol=1e-4)
    with pytest.raises(ModelError, match="out_proj.weight', which is there but can have no adapter: its weights are read past it"):
        attach_lora(make(), LoRAConfig(target_modules=["out_proj"]))


# ---- runs -------------------------------------------------------------------------------------------------------------

def on_disk(folder, name, **fields):
    "A random mixture with the packaged tokenizer, as a folder"
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    mixture(name, **dict(vocab_size=len(tokenizer), max_position_embeddings=512) | fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["qwen2_moe", "phimoe", pytest.param("llama4_text", marks=pytest.mark.full), "jetmoe"])
def test_a_run_on_a_mixture(name, tmp_path, capsys):
    "The plan says what is reached; training, resuming to the same bytes, and merging work"
    fields = dict(model_name=on_disk(tmp_path/"model", name), max_steps=4, save_steps=2, num_train_epochs=4, lora=dict(r=2))
    whole = LoRATrainer(tiny_config(tmp_path/"whole", **fields))
    result = whole.train()
    shown = capsys.readouterr().out
    assert "coverage" in shown and str(adapter_coverage(whole.model)) in shown and "left out: router" in shown and result.steps == 4
    halves = LoRATrainer(tiny_config(tmp_path/"halves", **fields))
    for step in halves.steps():
        if step.step == 3: break
    again = LoRATrainer(tiny_config(tmp_path/"halves", **fields))
    again.train(show=False, resume=True)
    one, two = (load_file(run.config.lora_dir/"adapter_model.safetensors") for run in (whole, again))
    assert alike(one, two)
    assert merge(whole.config.output_dir, texts=2).agrees


def test_the_estimate_attaches_what_the_run_attaches(tmp_path):
    "A model without numbers gets the adapters the real one gets"
    config = tiny_config(tmp_path, model_name=on_disk(tmp_path/"model", "qwen2_moe"), lora=dict(r=2))
    assert adapter_coverage(build_meta_model(config)) == adapter_coverage(attach_lora(load_base(config)[0], config.lora))


def test_experts_that_stay_in_sixteen_bits_are_named(tmp_path):
    "bitsandbytes makes linear layers smaller and no stacks: the coverage says so"
    config = tiny_config(tmp_path, model_name=on_disk(tmp_path/"model", "olmoe", hidden_size=64),
        load_in_4bit=True, bf16=True, lora=dict(r=2))
    model = attach_lora(load_base(config)[0], config.lora)
    reach = adapter_coverage(model)
    assert (reach.unquantised == {"experts.gate_up_proj": 8, "experts.down_proj": 8}
        and "not quantised, for bitsandbytes reaches linear layers only: experts.gate_up_proj (8)" in str(reach))
    assert learn(model, ids_of(), steps=4, rate=5e-3)[-1] < 10
    assert not adapter_coverage(attach_lora(load_base(PresetConfigs.tiny(load_in_4bit=True, device="cpu"))[0], LoRAConfig())).unquantised


def test_quantised_layers_that_cannot_be_reached_are_left_out(tmp_path):
    """A shared expert whose name PEFT takes for the experts' is reached as a parameter, and not when it is in 4 bits:
    left out and said, refused where it is named"""
    config = tiny_config(tmp_path, model_name=on_disk(tmp_path/"model", "dots1", hidden_size=64),
        load_in_4bit=True, bf16=True, lora=dict(r=2))
    reach = adapter_coverage(attach_lora(load_base(config)[0], config.lora))
    assert {"gate_proj", "up_proj", "down_proj", "router"} == set(reach.left_out)
    with pytest.raises(ModelError, match="is in 8 or 4 bits"):
        attach_lora(load_base(config)[0], LoRAConfig(target_modules=["shared_experts.gate_proj", "shared_experts.up_proj"]))


# ---- a tokenizer that knows more than the model -----------------------------------------------------------------------

def test_a_vocabulary_smaller_than_the_tokenizer_is_said_before_training(tmp_path):
    "Ids beyond the embeddings are refused with the token, in rows of a file and in rows of one's own; without such ids the run goes on"
    short = on_disk(tmp_path/"short", "qwen3_moe", vocab_size=400)
    with pytest.raises(ModelError, match=r"has embeddings for 400 tokens, and the rows hold the token 1?,?\d+ \("):
        LoRATrainer(tiny_config(tmp_path, model_name=short)).train(show=False)
    class Own(LoRATrainer):
        def prepare_data(self): self.dataset = [dict(input_ids=[5, 6, 400], labels=[5, 6, 7])] * 4
    with pytest.raises((ModelError, DataError), match="400"): Own(tiny_config(tmp_path/"own", model_name=short)).train(show=False)
    class Known(LoRATrainer):
        def prepare_data(self): self.dataset = [dict(input_ids=[5, 6, 7, 8], labels=[5, 6, 7, 8])] * 4
    assert Known(tiny_config(tmp_path/"known", model_name=short, max_steps=2)).train(show=False).steps == 2


def test_padding_beyond_the_vocabulary_is_harmless(tmp_path):
    "A padding token that was added to a tokenizer and never to its model: padding is masked, so any id will do"
    folder = on_disk(tmp_path/"model", "qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(dict(pad_token="<|pad|>"))
    tokenizer.save_pretrained(folder)
    losses = [LoRATrainer(tiny_config(tmp_path/name, model_name=model, packing=False, max_steps=3, lora=dict(r=2))).train(show=False).losses
        for name, model in (("padded", folder), ("plain", on_disk(tmp_path/"plain model", "qwen3_moe")))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
