"""GGUF files are read by llama.cpp itself: eight architectures with weights from nothing, tokenizers with hostile texts, each compared
with transformers. What a file cannot hold is refused, and nothing is left behind."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch
import transformers
from helpers import tiny_config, until, write_rows
from hypothesis import given, strategies as some
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sage_finetune import LoRATrainer
from sage_finetune.core.errors import ConfigError, ModelError, RunError
from sage_finetune.core.places import own_files
from sage_finetune.inference.export import load_run, merge
from sage_finetune.inference.gguf_export import GGUFReport, export_gguf
from sage_finetune.inference.gguf_vocabulary import RULES, gguf_vocabulary
from sage_finetune.inference.gguf_weights import PRECISIONS, interleave, llama3_factors, matrix_kind, write_gguf
from sage_finetune.inference.llama_cpp import (
    HOSTILE_TEXTS,
    compare_answer,
    compare_tokens,
    llama_cpp_server,
    next_logprobs,
    server_logprobs,
)

TEXTS = [*(text for text in HOSTILE_TEXTS[6:] if "\0" not in text),
    "The tiny model looks at the loss and learns the answers again and again, 1234 times.",
    "日本語 テスト 中文字符 " * 3, "don't we'll I'm they'd café naïve"] * 3
PATTERNS = {name: steps[0][1] for steps, name in RULES.items() if steps[0][0] == "Split"}


def fast(content, **tokens): return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **tokens)


def split(name):
    "A pre-tokenizer with the pattern of a family"
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def of_bytes(pre_tokenizer, normalizer=None):
    "A tokenizer of bytes as letters, with merges learnt from the texts"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer: backend.normalizer = normalizer
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def of_pieces(space_first):
    "A tokenizer of pieces, as SentencePiece makes them"
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_first else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    octets = [f"<0x{number:02X}>" for number in range(256)]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=700, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *octets]))
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in octets]
    return fast(content, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "qwen2": lambda: of_bytes(split("qwen2")), "qwen2 in NFC": lambda: of_bytes(split("qwen2"), normalizers.NFC()),
    "llama-bpe": lambda: of_bytes(split("llama-bpe")), "gpt-2": lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: of_bytes(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "pieces": lambda: of_pieces(False), "pieces after a space": lambda: of_pieces(True)}
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4., original_max_position_embeddings=64)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.] * 8, long_factor=[1., 1.5, 2., 3., 4., 5., 6., 8.],
    original_max_position_embeddings=256)
GEMMA3 = [*["sliding_attention"] * 5, "full_attention"]
# architecture, tokenizer, and what its config says besides
MODELS = {
    "qwen2": ("Qwen2", "qwen2", {}), "qwen2 tied": ("Qwen2", "qwen2 in NFC", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", "gpt-2", dict(head_dim=32)), "llama 3": ("Llama", "llama-bpe", dict(rope_parameters=LLAMA3)),
    "llama tied": ("Llama", "smollm", dict(tie_word_embeddings=True)),
    "llama yarn": ("Llama", "gpt-2", dict(rope_parameters=YARN, max_position_embeddings=256)),
    "mistral": ("Mistral", "pieces after a space", dict(sliding_window=None)),
    "gemma2": ("Gemma2", "pieces", dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=24)),
    "gemma3": ("Gemma3Text", "pieces",
        dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=24, num_hidden_layers=6, layer_types=GEMMA3)),
    "phi3": ("Phi3", "pieces after a space", {}), "phi3 long": ("Phi3", "pieces after a space",
        dict(rope_parameters=LONG, max_position_embeddings=1024, original_max_position_embeddings=256))}


def made(folder, architecture, tokenizer, **fields):
    "A model with weights from nothing, in a folder"
    torch.manual_seed(0)
    fields = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, vocab_size=len(tokenizer) + 4, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=2) | fields
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{architecture}Config")(**fields)).float().eval()
    for name, weight in model.named_parameters():
        around = 0. if architecture.startswith("Gemma") or name.endswith("bias") else 1.
        if weight.ndim == 1: torch.nn.init.normal_(weight, mean=around, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tokenizers_by_name(): return {name: make() for name, make in TOKENIZERS.items()}


# ---- what llama.cpp says ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_reads_and_says_the_same(tmp_path, tokenizers_by_name, kind):
    "Tokens, the expectations behind texts within and beyond every window, and a greedy answer"
    architecture, name, fields = MODELS[kind]
    tokenizer = tokenizers_by_name[name]
    model = made(tmp_path, architecture, tokenizer, **fields)
    file = write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", "f32").path
    context = 256 if "long" in kind else 2048  # in a context beyond the original one Phi 3 has other factors
    ids = tokenizer(" ".join(TEXTS[-3:]), add_special_tokens=False).input_ids[:200]
    with llama_cpp_server(file, context=context, exact=True) as server:
        assert compare_tokens(server, tokenizer) == []
        for end in (5, 30, len(ids)):
            theirs, ours = server_logprobs(server, ids[:end], 30), next_logprobs(model, ids[:end])
            # llama.cpp's GELU is a table in 16 bits
            assert max(abs(value - ours[token].item()) for token, value in theirs.items()) < (0.05 if "gemma" in kind else 1e-3)
        if "gemma" not in kind: assert compare_answer(server, model, tokenizer, ids[:30], 8).equal


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_fewer_bits_say_nearly_the_same(tmp_path, tokenizers_by_name, precision):
    "Each kind is what llama.cpp takes it for: the expectations stay close, the closer the more bits"
    tokenizer = tokenizers_by_name["qwen2"]
    model = made(tmp_path, "Qwen2", tokenizer, hidden_size=256, intermediate_size=512, num_hidden_layers=8, initializer_range=0.06)
    written = write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", precision)
    assert written.fell_back == {} and PRECISIONS[precision].kind in written.kinds
    ids = tokenizer(TEXTS[-3], add_special_tokens=False).input_ids[:40]
    with llama_cpp_server(written.path, exact=True) as server: theirs = server_logprobs(server, ids, 500)
    ours = next_logprobs(model, ids)
    apart = sum(math.exp(ours[token]) * abs(ours[token].item() - value) for token, value in theirs.items())
    assert apart < dict(f16=0.01, bf16=0.02, q8_0=0.03, q6_k=0.1, q5_k_m=0.2, q4_k_m=0.4)[precision]


def test_tokens_that_a_run_added(tmp_path):
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("lamp post", normalized=False)])
    made(tmp_path, "Qwen2", tokenizer)
    file = write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", "f32").path
    texts = ["a <tool>b", "lamp post<tool> lamp", "lamp  post"]
    with llama_cpp_server(file) as server: assert compare_tokens(server, tokenizer, texts) == []


def test_in_bf16_from_bf16(tmp_path, tokenizers_by_name):
    "Numbers of 16 bits are kept bit by bit"
    import gguf
    tokenizer = tokenizers_by_name["qwen2"]
    model = made(tmp_path/"fp32", "Qwen2", tokenizer).bfloat16()
    model.save_pretrained(tmp_path/"bf16")
    file = write_gguf(tmp_path/"bf16", tmp_path/"model.gguf", tokenizer, "", "bf16").path
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["blk.1.ffn_up.weight"]
    weight = model.get_decoder().layers[1].mlp.up_proj.weight
    assert torch.equal(torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()), weight.float())


@given(some.text(max_size=40))
def test_any_text_is_cut_alike(served, text):
    server, tokenizer = served
    assert compare_tokens(server, tokenizer, [text.encode("utf-8", "replace").decode()]) == []


@pytest.fixture(scope="module")
def served_path(tmp_path_factory, tokenizers_by_name):
    "A file of a Llama"
    folder, tokenizer = tmp_path_factory.mktemp("served"), tokenizers_by_name["llama-bpe"]
    made(folder, "Llama", tokenizer)
    return write_gguf(folder, folder/"model.gguf", tokenizer, "", "f32").path


@pytest.fixture(scope="module")
def served(served_path, tokenizers_by_name):
    "A file that is served, and its tokenizer"
    with llama_cpp_server(served_path) as server: yield server, tokenizers_by_name["llama-bpe"]


# ---- what is refused ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture, fields, said", [
    ("GPT2", dict(n_embd=64, n_head=4, n_layer=2), "gpt2 model cannot be written"),
    ("Gemma3Text", dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=24, layer_types=["full_attention"] * 3), "every 6th layer"),
    ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.)), "rope_type dynamic"),
    ("Qwen2", dict(vocab_size=100), "do not belong together")], ids=["GPT2", "Gemma3", "Llama", "Qwen2"])
def test_models_llama_cpp_cannot_run(tmp_path, tokenizers_by_name, architecture, fields, said):
    tokenizer = tokenizers_by_name["qwen2"]
    made(tmp_path, architecture, tokenizer, **fields)
    with pytest.raises(ModelError, match=said): write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", "f32")
    assert not (tmp_path/"model.gguf").exists()


@pytest.mark.parametrize("change, said", [
    (dict(pre_tokenizer=dict(type="Whitespace")), "Whitespace"), (dict(normalizer=dict(type="Lowercase")), "Lowercase"),
    (dict(model=dict(type="WordPiece", vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]", continuing_subword_prefix="##",
        max_input_chars_per_word=100)), "WordPiece")], ids=["words", "small letters", "word pieces"])
def test_tokenizers_llama_cpp_cannot_follow(tokenizers_by_name, change, said):
    content = json.loads(tokenizers_by_name["qwen2"].backend_tokenizer.to_str()) | change
    if "model" in change: content["added_tokens"] = []
    odd = fast(content)
    with pytest.raises(ModelError, match=said): gguf_vocabulary(odd, 1000)


def test_tokens_with_a_zero_character(tmp_path):
    "They would end llama.cpp's process"
    tokenizer = TOKENIZERS["pieces"]()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] |= {"a\0b": len(tokenizer), "a\0c": len(tokenizer) + 1}
    odd = fast(content, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made(tmp_path, "Mistral", odd, sliding_window=None)
    assert "2 tokens hold a zero character" in gguf_vocabulary(odd, len(odd) + 4).notes[0]
    file = write_gguf(tmp_path, tmp_path/"model.gguf", odd, "", "f32").path
    with llama_cpp_server(file) as server: assert compare_tokens(server, odd) == []


# ---- a run ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    "A run that was merged"
    folder = tmp_path_factory.mktemp("gguf")
    LoRATrainer(tiny_config(folder, num_train_epochs=4)).train(show=False)
    merge(folder/"run")
    return folder/"run"


def test_a_run_becomes_a_file_that_says_the_same(merged, tmp_path):
    report = export_gguf(merged, precision="f32")
    assert report.verdict == "the same" and report.path == str(merged/"exports"/"run-f32.gguf"), report
    assert "exports/run-f32.gguf" in own_files(merged)
    with pytest.raises(RunError, match="is there already"): export_gguf(merged, precision="f32")
    again = export_gguf(merged, tmp_path/"other.gguf", precision="Q8_0")
    assert again.reads_alike and again.size < report.size/3 and (tmp_path/"other.gguf").is_file()
    back = AutoModelForCausalLM.from_pretrained(merged/"exports", gguf_file="run-f32.gguf", dtype=torch.float32)
    model, tokenizer = load_run(merged, merged=True, device="cpu")
    ids = tokenizer.encode("Which colour has lamp 3?")
    with torch.no_grad(): assert torch.equal(back(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_a_file_that_is_not_the_same_is_not_kept(merged, tmp_path, monkeypatch):
    "Wrong rules, then weights in the wrong order: llama.cpp would load both"
    run = shutil.copytree(merged, tmp_path/"run", ignore=shutil.ignore_patterns("exports"))
    from sage_finetune.inference import gguf_export, gguf_weights
    written = gguf_weights._add_vocabulary
    def fewer(writer, vocabulary, *rest):
        vocabulary.merges = vocabulary.merges[:-300]
        written(writer, vocabulary, *rest)
    with monkeypatch.context() as patched:
        patched.setattr(gguf_weights, "_add_vocabulary", fewer)
        with pytest.raises(ModelError, match="other tokens"): export_gguf(run)
    with monkeypatch.context() as patched:
        def turned(shape, name, weight): return interleave(weight, 6) if "q_proj.weight" in name else weight
        patched.setattr(gguf_weights, "_as_stored", turned)
        with pytest.raises(ModelError, match="does not say the same"): export_gguf(run)
        assert list((run/"exports").iterdir()) == []
        assert not export_gguf(run, force=True).agrees  # kept all the same: it was asked for
    with monkeypatch.context() as patched:
        patched.setattr(gguf_export, "find_spec", lambda name: None)
        assert "not checked" in export_gguf(run, precision="f16").verdict
    assert [path.name for path in (run/"exports").iterdir() if path.name.startswith(".")] == []


def test_a_broken_file_in_few_bits_is_not_kept(merged, tmp_path, monkeypatch):
    "Its expectations lie outside of the thousand tokens that are compared one by one, or it prefers other tokens"
    from sage_finetune.inference import gguf_weights
    run, read = shutil.copytree(merged, tmp_path/"run", ignore=shutil.ignore_patterns("exports")), gguf_weights._read
    monkeypatch.setattr(gguf_weights, "_read", lambda path, name, shape: read(path, name, shape) * (0.2 if "down_proj" in name else 1.))
    for precision in ("q8_0", "q4_k_m"):
        with pytest.raises(ModelError, match="does not say the same"): export_gguf(run, precision=precision)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_server_goes_with_whoever_started_it(served_path, tmp_path):
    "However that ends"
    code = ("import sys; from sage_finetune.inference.llama_cpp_process import served_file\n"
        "with served_file(sys.argv[1]) as served: print(served.pid, flush=True); sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", code, served_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: not psutil.pid_exists(pid), 20)


def test_a_run_on_plain_text(tmp_path):
    "There is no question: beginnings are gone on with"
    said = "Lamp {} is red and the next one is blue, says the keeper of the lamps."
    data = write_rows(tmp_path/"rows.jsonl", [dict(text=said.format(at)) for at in range(24)])
    LoRATrainer(tiny_config(tmp_path, data_path=data, max_steps=2)).train(show=False)
    merge(tmp_path/"run", force=True)
    report = export_gguf(tmp_path/"run", precision="f32")
    assert report.verdict == "the same" and report.answers > 0 and report.kl_divergence is not None, report


def test_an_odd_name_of_a_run(merged, tmp_path):
    "The file has a name that the run may call its own; a family's name in it changes nothing"
    run = shutil.copytree(merged, tmp_path/"phi-3 (a)", ignore=shutil.ignore_patterns("exports"))
    report = export_gguf(run, precision="f32")
    assert report.verdict == "the same" and "exports/phi-3-a-f32.gguf" in own_files(run), report
    with pytest.raises(ConfigError, match="does not end in .gguf"): export_gguf(run, tmp_path/"model.bin")
    (run/"exports").rename(tmp_path/"elsewhere")
    (run/"exports").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(RunError, match="is a link"): export_gguf(run, precision="f16")


@pytest.mark.parametrize("fields, said", [(dict(hidden_act="relu"), "hidden_act"),
    (dict(rope_parameters=YARN | dict(beta_fast=16)), "beta_fast")])
def test_what_llama_cpp_takes_for_granted(tmp_path, tokenizers_by_name, fields, said):
    tokenizer = tokenizers_by_name["qwen2"]
    made(tmp_path, "Llama", tokenizer, **fields)
    with pytest.raises(ModelError, match=said): write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", "f32")


def test_a_run_that_was_trained_on_is_merged_again_first(merged, tmp_path):
    run = shutil.copytree(merged, tmp_path/"run", ignore=shutil.ignore_patterns("exports"))
    config = tiny_config(tmp_path, num_train_epochs=5)
    LoRATrainer(config).train(show=False, resume=True)
    for use in (export_gguf, lambda run: load_run(run, merged=True)):
        with pytest.raises(RunError, match="trained on since"): use(run)
    none = shutil.copytree(run, tmp_path/"none", ignore=shutil.ignore_patterns("merged_model"))
    with pytest.raises(RunError, match="Merge first"): export_gguf(none)


def test_a_new_run_takes_the_files_of_the_old_one_away(merged, tmp_path):
    "Else its folder would offer an adapter that is gone"
    run = shutil.copytree(merged, tmp_path/"run")
    export_gguf(run, precision="q8_0", overwrite=True)
    (run/"exports"/"mine.txt").write_text("mine")
    LoRATrainer(tiny_config(tmp_path, num_train_epochs=1, overwrite_output_dir=True)).train(show=False)
    assert [path.name for path in (run/"exports").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("precision, said", [("q3", "'q3' is not known"), (None, "not known"), ("Q4", "f32, f16")])
def test_precisions_by_name(merged, precision, said):
    with pytest.raises(ConfigError, match=said): export_gguf(merged, precision=precision)


def test_what_is_missing_is_named(merged, monkeypatch):
    from sage_finetune.inference import gguf_vocabulary as module
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"): export_gguf(merged, precision="f16", overwrite=True)


def test_from_a_shell(merged, tmp_path, capsys):
    from sage_finetune.cli import main
    def call(*words): return main(["gguf", str(merged), *map(str, words)]), capsys.readouterr()
    status, said = call("-o", tmp_path, "--json")
    answer = json.loads(said.out)
    assert status == 0 and answer["path"] == str(tmp_path/"run-q8_0.gguf") and answer["texts"] > 30 and not answer["other_tokens"], said
    status, said = call("-o", tmp_path)
    assert status == 2 and "--overwrite" in said.err and "overwrite=True" not in said.err, said
    status, said = call("-o", tmp_path, "--overwrite", "--precision", "f16")
    assert status == 0 and "verdict" in said.out and "Traceback" not in said.err, said
    assert call("--precision", "q1")[0] == 2


# ---- small things -----------------------------------------------------------------------------------------------------------

def test_rows_of_256():
    few = PRECISIONS["q4_k_m"]
    assert matrix_kind("blk.3.attn_q.weight", (64, 512), few, 6) == ("Q4_K", False)
    assert matrix_kind("blk.3.attn_q.weight", (64, 192), few, 6) == ("Q5_0", True)
    assert matrix_kind("blk.3.attn_q.weight", (64, 100), few, 6) == ("F16", True)
    assert matrix_kind("token_embd.weight", (64, 256), few, 6, tied=True) == ("Q6_K", False)
    assert matrix_kind("blk.3.attn_q.bias", (512,), few, 6) == ("F32", False)


def test_llama3_factors_as_transformers_has_them():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3, max_position_embeddings=512)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 1e4 ** (torch.arange(0, 16, 2).float() / 16)
    torch.testing.assert_close(plain / llama3_factors(LLAMA3, 16), stretched)


def test_a_report_shows_itself():
    report = GGUFReport("<b>.gguf", 10, "q8_0", {"Q8_0": 3}, texts=2, prompts=1, answers=2, equal_answers=1, gap=0.01,
        kl_divergence=1e-4, top1_agreement=1.)
    assert "1 of 2 answers the same, the others nearly tied" in str(report) and "&lt;b&gt;" in report._repr_html_()


def field_of(path, name):
    import gguf
    return gguf.GGUFReader(path).fields[name].contents()


@pytest.mark.parametrize("architecture, window, context", [("Mistral", 24, 24), ("Phi3", 24, 24), ("Mistral", None, 512)])
def test_a_file_stays_within_a_window_that_llama_cpp_does_not_have(tmp_path, tokenizers_by_name, architecture, window, context):
    tokenizer = tokenizers_by_name["pieces"]
    made(tmp_path, architecture, tokenizer, sliding_window=window)
    file = write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, "", "f32").path
    family = field_of(file, "general.architecture")
    assert field_of(file, f"{family}.context_length") == context


def test_the_end_of_a_turn_is_in_the_file(tmp_path):
    "Also where it is not the end of a sequence, and a text that llama.cpp knows from nowhere"
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens([AddedToken("<|over|>", special=True, normalized=False)])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|over|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    made(tmp_path, "Qwen2", tokenizer)
    file = write_gguf(tmp_path, tmp_path/"model.gguf", tokenizer, tokenizer.chat_template, "f32").path
    assert field_of(file, "tokenizer.ggml.eot_token_id") == tokenizer.convert_tokens_to_ids("<|over|>") != tokenizer.eos_token_id


def test_few_bits_must_prefer_the_same_tokens():
    close = GGUFReport("a.gguf", 10, "q8_0", {"Q8_0": 3}, texts=2, kl_divergence=0.001, top1_agreement=0.9)
    assert close.agrees and not replace(close, top1_agreement=0.5).agrees and not replace(close, kl_divergence=None).agrees
