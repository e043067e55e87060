"""The engine beside plain transformers and PEFT: the same losses in every architecture, packed or not,
in one process or two, and nothing that is faster but not equal."""
import copy
import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import MethodType

import pytest
import torch
import transformers
from helpers import adapter, metrics, prepared, reference, rows, tiny_config, train_here, write_rows
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune import LoRATrainer
from sage_finetune.config import TrainingConfig, tiny_path
from sage_finetune.data.collation import collate
from sage_finetune.modeling import allocator, compilation, fused_layers, loss, varlen
from sage_finetune.modeling.compilation import CompileGain, compile_decision, compile_layers
from sage_finetune.modeling.engine import check_equivalence, pick_engine
from sage_finetune.modeling.fused_layers import apply_fused_forwards
from sage_finetune.modeling.loss import chunked_cross_entropy
from sage_finetune.modeling.precision import plan_precision
from sage_finetune.modeling.varlen import flatten_batch

COMMON = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    max_position_embeddings=512)
FAMILIES = {
    "Qwen2": {}, "Llama": {}, "Mistral": dict(sliding_window=16), "Gemma": dict(head_dim=12), "Phi3": {},
    "GPT2": dict(n_embd=48, n_layer=2, n_head=4, n_positions=512),
    "Qwen3": dict(head_dim=12), "Gemma2": dict(head_dim=12, sliding_window=16), "Gemma3": dict(head_dim=12, sliding_window=16),
    "Granite": dict(logits_scaling=4.), "Cohere": dict(logit_scale=0.25),
    "Olmo2": {}, "StableLm": dict(partial_rotary_factor=0.5), "GPTNeoX": dict(num_key_value_heads=4), "Mixtral": dict(num_local_experts=2)}
CONFIGS, MODELS = {"Gemma3": "Gemma3TextConfig"}, {"GPT2": "GPT2LMHeadModel"}
ASKED = ("Qwen2", "Llama", "Mistral", "Gemma", "Phi3", "GPT2")


def make(family, folder):
    "A folder with a model of a family, random weights, and the packaged tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    special = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(
        **(special | (FAMILIES[family] if family == "GPT2" else COMMON | FAMILIES[family])))
    torch.manual_seed(0)
    model = getattr(transformers, MODELS.get(family, f"{family}ForCausalLM"))(config)
    for weights in model.parameters():
        if weights.dim() > 1: torch.nn.init.normal_(weights, std=0.08)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    "Folders of models, each made once"
    made = {}
    return lambda family: made.setdefault(family, make(family, tmp_path_factory.mktemp(family)))


def trainer_of(folder, model, **fields):
    "A trainer on 40 rows, in fp32 and without dropout of any kind"
    content = rows(40)
    fields = dict(model_name=str(model), data_path=write_rows(folder/"rows.jsonl", content), bf16=False, learning_rate=5e-3,
        warmup_ratio=0., lr_scheduler_type="constant", seed=3) | fields
    trainer = LoRATrainer(tiny_config(folder, **fields))
    trainer.setup()
    for part in trainer.model.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.  # GPT-2 has some
    return trainer, content


# ---- as plain transformers and PEFT -----------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_a_plain_loop(tmp_path, folder_of, family):
    trainer, content = trainer_of(tmp_path, folder_of(family))
    # the lean way is what is compared
    assert trainer.engine.head and (trainer.engine.lean.get("adapters") or family == "GPT2"), str(trainer.engine)
    order = [step.rows for step in trainer.plan]
    losses = [step.loss for step in trainer.steps()]
    base = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32)
    torch.manual_seed(3)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    # PEFT's "all-linear" leaves experts out and takes the router in
    if family == "Mixtral": lora = copy.deepcopy(trainer.model.peft_config["default"])
    model = get_peft_model(base, lora)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.
    plain = [loss for loss, _, _ in reference(model, AutoTokenizer.from_pretrained(tiny_path()), content, order,
        rate=5e-3, total=10**9, warmup=0, decay=0., longest=1.)]
    assert len(losses) == 20 and losses == pytest.approx(plain, rel=1e-4)
    assert losses[-1] < 0.97 * losses[0]


def test_the_asked_families_use_every_part(folder_of, tmp_path):
    "Chunked loss, lean layers and samples apart where the architecture has what they need"
    said = {family: trainer_of(tmp_path/family, folder_of(family))[0].engine for family in ASKED}
    assert all(engine.packing.name == "samples" and engine.head and not engine.remarks for engine in said.values()), {
        name: str(engine) for name, engine in said.items()}
    assert ({name for name, engine in said.items() if engine.lean.get("adapters") == 14} == {"Qwen2", "Llama", "Mistral", "Gemma"}
        and said["GPT2"].lean == {})
    assert all(said[name].lean["norms"] == 5 for name in ("Qwen2", "Llama", "Mistral", "Phi3")) and said["Qwen2"].lean["gates"] == 2


@pytest.mark.parametrize("family", ("Gemma2", "Mixtral", "GPTNeoX"))
def test_what_cannot_be_had_is_said(tmp_path, folder_of, family):
    engine = trainer_of(tmp_path, folder_of(family))[0].engine
    assert check_equivalence(engine).equal
    if family == "Gemma2":
        assert (engine.packing.name != "samples"
            and "no attention sample by sample: its attention is 'eager', which knows no borders" in str(engine))


def test_the_plain_engine_is_plain(tmp_path, folder_of):
    trainer, _ = trainer_of(tmp_path, folder_of("Qwen2"), engine="plain", max_steps=3)
    assert (str(trainer.engine) == "transformers and PEFT as they are"
        and not any("forward" in part.__dict__ for part in trainer.model.modules()))
    lean, _ = trainer_of(tmp_path/"lean", folder_of("Qwen2"), max_steps=3)
    assert [step.loss for step in trainer.steps()] == pytest.approx([step.loss for step in lean.steps()], rel=1e-5)


# ---- nothing that is not equal ----------------------------------------------------------------------------------------

def small(folder_of, family="Qwen2", **lora):
    "A model with an adapter"
    base = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32)
    return get_peft_model(base, LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | lora))


FAULTS = {
    "a loss that is a little off": (loss, "_loss_and_grad_logits", lambda own: lambda *given: own(*given) * 1.001,
        "no chunked cross-entropy"),
    "gradients of the wrong size": (loss, "_loss_and_grad_logits",
        lambda own: lambda logits, *given: (own(logits, *given), logits.mul_(1.01))[0], "no chunked cross-entropy"),
    "samples that see each other": (varlen, "_varlen_attention",
        lambda own: lambda query, key, value, borders, *given: own(query, key, value, [borders[0], borders[-1]], *given),
        "no attention sample by sample"),
    "an adapter without its strength": (fused_layers, "fused_lora_forward",
        lambda own: lambda self, x: self.base_layer(x), "no lean layers")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_fast_path_is_found_and_the_path_left_out(folder_of, monkeypatch, fault):
    page, name, broken, said = FAULTS[fault]
    assert not pick_engine(small(folder_of)).remarks
    monkeypatch.setattr(page, name, broken(getattr(page, name)))
    model = small(folder_of)
    engine = pick_engine(model)
    assert [remark.split(":")[0] for remark in engine.remarks] == [said], str(engine)
    assert check_equivalence(engine).equal


def test_a_fault_in_the_way_back_of_sixteen_bit_attention_is_found(folder_of, monkeypatch):
    def half(): return small(folder_of).to(torch.bfloat16)
    assert not pick_engine(half(), dtype=torch.bfloat16).remarks
    own = varlen._attention_backward
    # a gradient 30 % off; below 10 % is the band of 16 bits
    monkeypatch.setattr(varlen, "_attention_backward", lambda query, *given: own(query * 3, *given))
    assert [remark.split(":")[0] for remark in pick_engine(half(), dtype=torch.bfloat16).remarks] == ["no attention sample by sample"]


def test_a_run_keeps_memory_and_hands_it_back_even_when_it_is_broken_off(folder_of, tmp_path, monkeypatch):
    asked, trainer = [], trainer_of(tmp_path, folder_of("Qwen2"))[0]
    monkeypatch.setattr(allocator, "_call_c_library", lambda function, *numbers: asked.append((function, *numbers)))
    steps = trainer.steps()
    next(steps)
    assert asked == [("mallopt", -4, 0), ("mallopt", -1, -1)]
    steps.close()
    assert asked[-1] == ("malloc_trim", 0) and ("mallopt", -4, 65536) in asked


def test_the_trial_leaves_the_model_as_it_was(folder_of):
    model = small(folder_of).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pick_engine(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    assert all(weights.grad is None for weights in model.parameters())


@pytest.mark.parametrize("fields, lean", ((dict(use_dora=True), 0), (dict(lora_bias=True), 0), (dict(use_rslora=True), 14),
    (dict(lora_dropout=0.1), 14), (dict(modules_to_save=["lm_head"]), 14)),
                         ids=("dora", "lora bias", "rslora", "dropout", "trained head"))
def test_adapters_of_other_kinds_are_left_to_peft(folder_of, fields, lean):
    engine = pick_engine(small(folder_of, **fields))
    assert engine.lean.get("adapters", 0) == lean and check_equivalence(engine).equal
    assert bool(engine.head) == ("modules_to_save" not in fields)


def test_a_lean_model_still_merges_and_switches_adapters_off(folder_of):
    model, ids = small(folder_of).eval(), torch.arange(10, 30)[None]
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name: weights.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        tuned = model(ids).logits
        apply_fused_forwards(model)
        assert torch.allclose(model(ids).logits, tuned, atol=1e-5)
        with model.disable_adapter(): base = model(ids).logits
        assert not torch.allclose(base, tuned, atol=1e-2)
        assert torch.allclose(model.merge_and_unload()(ids).logits, tuned, atol=1e-4)


def test_dropout_gives_the_gradient_of_what_was_kept(folder_of):
    "The same random numbers: the lean layer drops and learns exactly what PEFT's does"
    gradients = []
    for lean in (False, True):
        model = small(folder_of, lora_dropout=0.3).train()
        with torch.no_grad():
            [weights.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
                for name, weights in model.named_parameters() if "lora_" in name]
        if lean: assert apply_fused_forwards(model)["adapters"] == 14
        torch.manual_seed(5)
        model(torch.arange(10, 30)[None]).logits.logsumexp(-1).sum().backward()
        gradients.append(torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.requires_grad]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


# ---- the loss without the logits --------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 70), vocabulary=st.integers(2, 90), chunk=st.one_of(st.none(), st.integers(1, 80)),
       softcap=st.sampled_from((None, 5., 30.)), scale=st.sampled_from((1., 0.25, 3.)),
       bias=st.booleans(), target_tokens=st.sampled_from((0., 0.3, 1.)), size=st.sampled_from((1., 1e4)), seed=st.integers(0, 99))
def test_the_chunked_loss_is_the_loss(count, vocabulary, chunk, softcap, scale, bias, target_tokens, size, seed):
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(count, 8, generator=rng).requires_grad_(), torch.randn(vocabulary, 8, generator=rng) * size
    shift, labels = torch.randn(vocabulary, generator=rng) if bias else None, torch.randint(vocabulary, (count,), generator=rng)
    labels[torch.rand(count, generator=rng) >= target_tokens] = -100
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), shift.double() if bias else None) * scale
    if softcap: logits = softcap * torch.tanh(logits / softcap)
    plain = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    chunked = chunked_cross_entropy(hidden, weight, labels, shift, softcap, scale, chunk)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-4 * size)
    ours, theirs = torch.autograd.grad(chunked * 0.5, hidden)[0], torch.autograd.grad(plain * 0.5, hidden)[0]
    assert torch.isfinite(ours).all()
    if size == 1: assert torch.allclose(ours, theirs.float(), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    st.sampled_from([8, 24, 64]), st.integers(0, 2**16))
def test_sixteen_bit_attention_goes_back_as_torch_does_in_thirty_two(lengths, heads, width, seed):
    rng, borders = torch.Generator().manual_seed(seed), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    line = [torch.randn(1, count, borders[-1], width, generator=rng).bfloat16() for count in (heads[0], heads[1], heads[1])]
    grad_output = torch.randn(1, borders[-1], heads[0], width, generator=rng).bfloat16()

    def gradients(attention, dtype):
        parts = [x.detach().to(dtype).requires_grad_() for x in line]
        return torch.autograd.grad(attention(*parts, borders, width**-0.5), parts, grad_output.to(dtype))
    for own, plain in zip(gradients(varlen._VarlenAttention.apply, torch.bfloat16), gradients(varlen._varlen_attention, torch.float32)):
        # Of one token alone only the value has a gradient; fp32 leaves some rounding where zero belongs, as much as there are numbers.
        assert (own.float() - plain).norm() <= 8e-3 * plain.norm() + 5e-7 * plain.numel()**0.5


@pytest.mark.parametrize("rows_, columns, pieces",
    [(1024, 896, 2), (1000, 576, 3), (640, 896, 1), (1024, 128, 1), (2048, 896, 1), (1, 512, 1)])
def test_a_product_in_pieces_is_the_product(rows_, columns, pieces):
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=rng).bfloat16() for shape in ((rows_, 64), (64, columns), (columns,)))
    assert -(-rows_ // fused_layers._rows_at_once(x, columns)) == pieces
    for own, plain in ((fused_layers._product(x, weight), x @ weight),
            (fused_layers._product(x, weight, bias), torch.addmm(bias, x, weight))):
        torch.testing.assert_close(own, plain, rtol=1e-2, atol=1e-1)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux is asked")
def test_memory_is_kept_while_a_run_lasts_and_handed_back_after():
    code = """
import resource, torch
from sage_finetune.modeling.allocator import trim_memory, retain_freed_memory
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20
def work(): return [torch.ones(2**22) for _ in range(16)] and None  # 256 MB
start = held(); retain_freed_memory(torch.device('cpu')); work(); work(); before = pages(); work(); again = pages() - before
kept = held() - start; trim_memory(torch.device('cpu')); print(again, kept, held() - start)"""
    again, kept, left = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert again < 10_000 and kept > 200 and left < 60, (again, kept, left)  # 65,536 pages without


def test_a_line_without_padding_holds_every_token_once():
    samples = [dict(input_ids=list(range(10, 10 + size)), labels=list(range(10, 10 + size))) for size in (5, 3, 9, 4)]
    batch = collate([samples[:2], samples[2:]], 0, packed=True)
    line = flatten_batch(batch, pad_to_multiple_of=32)
    assert line["borders"].tolist() == [0, 5, 8, 17, 21, 32] and line["input_ids"].shape == (1, 32)
    assert line["input_ids"][0, :21].tolist() == sum((one["input_ids"] for one in samples), [])
    assert ((line["labels"][0, [0, 5, 8, 17]] == -100).all() and (line["labels"][0, 21:] == -100).all()
        and int((line["labels"] != -100).sum()) == 17)


# ---- however a step is put together -----------------------------------------------------------------------------------

@pytest.mark.parametrize("other, close", ((dict(per_device_train_batch_size=1, gradient_accumulation_steps=4), 1e-5),
                                          (dict(packing=False), 1e-4), (dict(gradient_checkpointing=True), 1e-6),
                                          (dict(gradient_checkpointing=True, packing=False, engine="plain"), 1e-4)),
    ids=("accumulated", "padded", "checkpointed", "plain, padded, checkpointed"))
def test_the_same_rows_are_the_same_step(tmp_path, folder_of, other, close):
    one, _ = trainer_of(tmp_path/"one", folder_of("Qwen2"), eval_ratio=0.2)
    two, _ = trainer_of(tmp_path/"two", folder_of("Qwen2"), eval_ratio=0.2, **other)
    ours, theirs = list(one.steps()), list(two.steps())
    assert len(ours) == 16 and [step.loss for step in ours] == pytest.approx([step.loss for step in theirs], rel=close)
    assert ours[-1].eval_loss == pytest.approx(theirs[-1].eval_loss, rel=close) and ours[-1].eval_loss > 0


def test_dropout_does_not_hide_that_layers_are_alike(tmp_path, folder_of):
    "In training it draws by chance, so a layer would not even equal itself"
    kinds = [trainer_of(tmp_path/str(share), folder_of("Qwen2"), lora=dict(lora_dropout=share))[0].engine.lean for share in (0., 0.3)]
    assert kinds[0] == kinds[1] and set(kinds[1]) == {"adapters", "gates", "norms"}


def test_checkpointing_in_16_bits(tmp_path, folder_of):
    "Made twice is made the same: not a bit of the losses is another"
    runs = [trainer_of(tmp_path/str(on), folder_of("Qwen2"), bf16=True, fp16=None, max_steps=4, gradient_checkpointing=on)[0]
        for on in (False, True)]
    assert all(run.engine.lean and run.engine.packing.name == "samples" for run in runs)
    assert [step.loss for step in runs[0].steps()] == [step.loss for step in runs[1].steps()]


def test_evaluation_is_the_plain_loss(tmp_path, folder_of):
    trainer, _ = trainer_of(tmp_path, folder_of("Llama"), eval_ratio=0.3)
    model, total, target_tokens = trainer.model, 0., 0
    lean = trainer.evaluate()
    fused_layers.restore_forwards(model)
    with torch.no_grad():
        for at in range(len(trainer.eval_dataset)):
            row = trainer.eval_dataset[at]
            ids, labels = torch.tensor([list(row["input_ids"])]), torch.tensor([list(row["labels"])])
            count = int((labels[:, 1:] != -100).sum())
            total, target_tokens = total + float(model(input_ids=ids, labels=labels).loss) * count, target_tokens + count
    assert lean == pytest.approx(total / target_tokens, rel=1e-5)


def test_bf16_follows_fp32(tmp_path):
    """The band: on the packaged model, the mean of ten steps' losses stays within 3 % or 0.02 nats of that in fp32
    (bf16 keeps 8 bits, a relative rounding of 0.4 % an operation)"""
    if plan_precision(TrainingConfig(device="cpu")).name != "bf16": pytest.skip("this CPU has no fast bf16")
    curves = [[step.loss for step in LoRATrainer(tiny_config(tmp_path/name, bf16=bf16, num_train_epochs=10)).steps()]
        for name, bf16 in (("half", True), ("full", False))]
    means = [torch.tensor(curve).view(-1, 10).mean(1).tolist() for curve in curves]
    assert len(means[0]) == 6 and means[0] == pytest.approx(means[1], rel=0.03, abs=0.02)
    assert curves[0] != curves[1] and means[1][-1] < 0.5 * means[1][0]


# ---- several processes ------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("size, accumulation", ((4, 1), (3, 1)), ids=("even", "uneven"))
def test_two_processes_are_one(tmp_path, size, accumulation):
    "Real processes that speak by gloo: the same losses, the same adapter, one set of files"
    runs = [prepared(tmp_path/name/"run", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        bf16=False, eval_ratio=0.2, eval_steps=3) for name in ("one", "two")]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sage_finetune.trainer", str(runs[1])]
    ended = subprocess.run([sys.executable, "-m", *launch], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    train_here(runs[0])  # the one process is this one; that another computes the same bytes is seen in test_exact
    one, two = map(metrics, runs)
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, len(one) + 1))
    for field in ("loss", "grad_norm", "tokens", "target_tokens"):
        assert [row[field] for row in two] == pytest.approx([row[field] for row in one], rel=1e-4)
    assert [row["eval_loss"] for row in two if row["eval_loss"]] == pytest.approx(
        [row["eval_loss"] for row in one if row["eval_loss"]], rel=1e-4)
    ours, theirs = (load_file(run/"lora_weights"/"adapter_model.safetensors") for run in runs)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in ours)
    assert sorted(path.name for path in runs[0].iterdir()) == sorted(path.name for path in runs[1].iterdir())


# ---- compiling --------------------------------------------------------------------------------------------------------

def test_the_decision_to_compile_depends_on_the_work():
    assert compile_decision(None, 10**9, 10**3, "cpu")[0] is False and compile_decision(False, 10**12, 10**9, "cpu") == (False,
        "not compiled, as torch_compile=False asks")
    assert compile_decision(True, 1, 1, "cuda")[0] and not compile_decision(None, 10**9, 10**6, "cuda")[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_decision_to_compile_is_measured_where_the_run_is_long(device):
    pays, costs = CompileGain(0.05, 0.04, 30., 10_000), CompileGain(0.05, 0.049, 30., 10_000)
    assert compile_decision(None, 10**10, 10**8, device, lambda: pays) == (True, f"compiled: {pays}")
    assert compile_decision(None, 10**10, 10**8, device, lambda: costs) == (False, f"not compiled: {costs}")
    assert compile_decision(None, 10**10, 10**8, device, lambda: 1 / 0) == (False, "not compiled: ZeroDivisionError: division by zero")
    assert compile_decision(None, 10**10, 10**8, device)[0] is False


@pytest.mark.full
def test_a_long_run_measures_one_layer_and_a_resumed_one_keeps_the_answer(tmp_path, folder_of, monkeypatch):
    monkeypatch.setattr(compilation, "COMPILE_MIN_FLOPS", 1.)
    trainer, _ = trainer_of(tmp_path/"run", folder_of("Qwen2"), max_steps=4, save_steps=2)
    assert re.match(r"(not )?compiled: a compiled layer takes [0-9.]+ ms instead of [0-9.]+, -?[0-9,]+ s over the run, "
        r"and the compiler took [0-9]+ s", trainer.compiling), trainer.compiling
    layers = [part for part in trainer.model.modules() if part._compiled_call_impl]
    assert bool(layers) == trainer.compiled and trainer.engine.lean["adapters"] and all(p.grad is None for p in trainer.model.parameters())
    for step in trainer.steps():
        if step.step == 2: break
    for answer in (True, False):
        saved = Path(trainer.config.output_dir)/"training_config.json"
        saved.write_text(json.dumps(json.loads(saved.read_text()) | dict(torch_compile=answer)))
        again, _ = LoRATrainer(trainer.config), monkeypatch.setattr("sage_finetune.training.setup.measure_compile",
            lambda *given: pytest.fail("measured again"))
        again.setup(resume=True)
        assert again.compiled is answer and again.compiling.endswith("compiled, as the run began")


@pytest.mark.slow
def test_compiled_layers_learn_the_same(tmp_path, folder_of):
    plain, _ = trainer_of(tmp_path/"plain", folder_of("Qwen2"), torch_compile=False, max_steps=6)
    compiled, _ = trainer_of(tmp_path/"compiled", folder_of("Qwen2"), torch_compile=True, max_steps=6)
    assert not compiled.engine.remarks and any(part._compiled_call_impl for part in compiled.model.modules())
    assert [step.loss for step in compiled.steps()] == pytest.approx([step.loss for step in plain.steps()], rel=1e-4)
    adapter(compiled.config.output_dir)


def test_a_compiler_that_fails_is_said_and_left_out(folder_of, monkeypatch):
    model = small(folder_of)
    engine = pick_engine(model)
    monkeypatch.setattr(torch.nn.Module, "compile",
        lambda self, **given: setattr(self, "_compiled_call_impl", MethodType(lambda self, *a, **k: 1 / 0, self)))
    compile_layers(engine)
    assert (engine.remarks == ["not compiled: ZeroDivisionError: division by zero"] and check_equivalence(engine).equal
        and engine.lean["norms"] == 5)


# ---- what a process shares --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("sage_finetune.engine_again", "__main__", "sage_finetune.deeper.engine"))
def test_a_page_that_defines_the_engine_again_leaves_the_packages_alone(name, tmp_path):
    "A notebook's cells register functions with transformers, too: a run of the package in the same kernel has the bytes it had before"
    before = varlen.ALL_ATTENTION_FUNCTIONS[varlen.VARLEN], varlen.ALL_MASK_ATTENTION_FUNCTIONS[varlen.VARLEN]
    def bytes_of(folder):
        LoRATrainer(tiny_config(folder, max_steps=3, eval_ratio=0.)).train(show=False)
        return adapter(folder/"run")
    one = bytes_of(tmp_path/"one")
    again = importlib.util.module_from_spec(importlib.util.spec_from_file_location("sage_finetune.engine_again", varlen.__file__))
    again.__name__ = name
    exec(compile(Path(varlen.__file__).read_text(encoding="utf-8").replace("from ..", "from sage_finetune.").replace("from .",
        "from sage_finetune.modeling."), varlen.__file__, "exec"), again.__dict__)
    assert again.VARLEN in varlen.ALL_ATTENTION_FUNCTIONS.valid_keys() and again._varlen_sdpa is not varlen._varlen_sdpa
    assert (varlen.ALL_ATTENTION_FUNCTIONS[varlen.VARLEN], varlen.ALL_MASK_ATTENTION_FUNCTIONS[varlen.VARLEN]) == before
    assert bytes_of(tmp_path/"two") == one


def test_a_thread_that_chats_keeps_its_masks():
    "While one thread trains without a mask, a model in another asks for its own"
    found, inside, asked = [], threading.Event(), threading.Event()
    def chats():
        assert inside.wait(60)
        found.append(varlen._varlen_enabled.get())
        asked.set()
    other = threading.Thread(target=chats)
    other.start()
    with varlen.varlen_mode():
        inside.set()
        assert asked.wait(60) and varlen._varlen_enabled.get()
    other.join(60)
    assert found == [False] and not varlen._varlen_enabled.get()
