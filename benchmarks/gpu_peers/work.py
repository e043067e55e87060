"""The models, the rows and the operations of the work on a GPU.

Shapes are those of the published config.json of Qwen/Qwen2.5-0.5B, -1.5B and -7B; weights are random.
What a model costs depends neither on its
weights nor on which ids occur, so the packaged tokenizer serves them all.
"""
import json
import random
import shutil
import sys
from pathlib import Path

from reference import Text, flops

SHAPES = {
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=24,
                 vocab_size=151_936, tie_word_embeddings=True),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, num_hidden_layers=28,
                 vocab_size=151_936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28,
               vocab_size=152_064, tie_word_embeddings=False),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
                 vocab_size=1536, tie_word_embeddings=True)}
TEMPLATE = 40  # tokens a chat template may add to a row, at most


# ---- what a shape holds and costs -------------------------------------------------------------------------------------

def parameters(shape):
    "All parameters of a model: embeddings, head, linear layers with the biases of q, k and v, norms"
    hidden, wide, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide + hidden + 2 * narrow + 2 * hidden
    return (1 if shape["tie_word_embeddings"] else 2) * vocabulary * hidden + shape["num_hidden_layers"] * layer + hidden


def attention_flops(lengths, shape):
    """Scores and weighted sums of causal attention, forward and backward:
    six products of half a square per row and layer, each 2 length² hidden"""
    return 6 * shape["num_hidden_layers"] * shape["hidden_size"] * sum(length * length for length in lengths)


def training_flops(tokens, target_tokens, lengths, rank, shape):
    "What so many tokens of rows of those lengths need: reference.flops and attention; what is computed twice or for padding is not counted"
    return flops(tokens, target_tokens, rank=rank, shape=shape) + attention_flops(lengths, shape) * tokens / sum(lengths)


# ---- the model --------------------------------------------------------------------------------------------------------

class ShortOfDisk(Exception):
    "A model does not fit into the folder meant for it"


def check_disk(folder, needed):
    "Raise ShortOfDisk when a folder (or what will hold it) has less room than a model takes"
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free >= needed: return
    raise ShortOfDisk(f"its weights take {needed / 1e9:.1f} GB and {there} has {free / 1e9:.1f} GB free; --work names another folder")


def model_config(shape, tokenizer=None):
    "The config of a shape; everything else as Qwen2.5 has it"
    from transformers import Qwen2Config
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None) if tokenizer else {}
    rope = dict(rope_type="default", rope_theta=1e6)
    return Qwen2Config(**shape, max_position_embeddings=32_768, rms_norm_eps=1e-6, rope_parameters=rope, dtype="bfloat16", **ids)


def make_model(work, name, device="cpu", seed=0):
    "The folder of a model of that shape, made once, on the device itself: seeded bf16 weights in shards, and the packaged tokenizer"
    folder = Path(work)/"models"/f"gpu-{name}-{seed}"
    if (folder/"config.json").exists(): return folder
    check_disk(folder, 2.05 * parameters(SHAPES[name]))
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    from sage_finetune.config import tiny_path
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.model_max_length = 32_768
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device): model = Qwen2ForCausalLM(model_config(SHAPES[name], tokenizer))
    finally: torch.set_default_dtype(before)
    begun = folder.with_name(folder.name + ".part")
    shutil.rmtree(begun, ignore_errors=True)
    model.save_pretrained(begun, max_shard_size="4GB")
    tokenizer.save_pretrained(begun)
    begun.rename(folder)
    return folder


# ---- the rows ---------------------------------------------------------------------------------------------------------

def drawn_lengths(rng, kind, longest, tokens):
    "Lengths of rows that are at least so many tokens together: all `longest`, or log-normal around a quarter of it and never more than it"
    lengths, total = [], 0
    while total < tokens:
        spread = max(2 * TEMPLATE, min(longest, round(rng.lognormvariate(0, 0.75) * longest / 4)))
        lengths.append(longest if kind == "exact" else spread)
        total += lengths[-1]
    return lengths


def fitted(row, length, text):
    "A row whose conversation has exactly so many tokens: words of one token are added to its answer or taken from it"
    single = next(word for word, size in text.words if size == 1)
    words = row["output"].rstrip(".").split(" ")
    for _ in range(100):
        row["output"] = " ".join(words) + "."
        missing = length - text.length(row)
        if missing == 0: return row
        words = words + [single] * missing if missing > 0 else words[:max(1, len(words) - (-missing + 1) // 2)]
    raise ValueError(f"no row of {length} tokens could be made")


def make_rows(work, kind, longest, tokens, seed=0):
    "A .jsonl file of alpaca rows that are exactly as long as drawn, made once, and the lengths beside it"
    path = Path(work)/"rows"/f"gpu-{kind}-{longest}-{tokens}-{seed}.jsonl"
    if path.with_suffix(".json").exists(): return path
    text, rows = Text(seed), []
    lengths = drawn_lengths(random.Random(seed), kind, longest, tokens)
    for length in lengths:
        asked = max(8, min(64, length // 8))
        rows.append(fitted(dict(instruction=text(asked), input="", output=text(max(4, length - asked - TEMPLATE))), length, text))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(lengths), encoding="utf-8")
    return path


def main():
    "Make a model and its rows, in a process that ends and leaves the GPU empty"
    job = json.loads(sys.argv[1])
    try: model = make_model(job["work"], job["shape"], job["device"])
    except ShortOfDisk as error: return print("RESULT " + json.dumps(dict(outcome="left out", said=str(error))))
    wanted = [(kind, length) for kind in job["rows"] for length in job["lengths"]]
    rows = {f"{kind}-{length}": str(make_rows(job["work"], kind, length, job["tokens"])) for kind, length in wanted}
    print("RESULT " + json.dumps(dict(outcome="made", model=str(model), rows=rows)))


if __name__ == "__main__": main()
