"""The work every peer is given: a model of Qwen2.5-0.5B's shape with random weights, and rows of alpaca shape.

    python benchmarks/reference.py FOLDER               the model, about 1 GB, and 24 rows
    python benchmarks/reference.py FOLDER --rows 1000   other sizes; --layers, --vocabulary and --longest make other models and rows

The tokenizer is the packaged model's: 1,536 of the vocabulary's ids occur. What a model costs does not depend on which ids occur.
"""
import argparse
import json
import random
import shutil
from pathlib import Path

SHAPE = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
    num_hidden_layers=24, vocab_size=151_936)


# ---- the model --------------------------------------------------------------------------------------------------------

def make_model(work, seed=0, **changes):
    "The folder of a model of that shape, made once: bf16 weights, seeded, and the packaged tokenizer"
    shape = SHAPE | changes
    folder = Path(work)/"models"/"-".join(str(size) for size in shape.values())
    if (folder/"config.json").exists(): return folder
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from sage_finetune.config import tiny_path
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.model_max_length = 32_768
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=32_768, rms_norm_eps=1e-6,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6),
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, dtype="bfloat16")
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try: model = Qwen2ForCausalLM(config)
    finally: torch.set_default_dtype(before)
    begun = folder.with_name(folder.name + ".part")
    shutil.rmtree(begun, ignore_errors=True)
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    begun.rename(folder)
    return folder


def linear_layers(shape=SHAPE):
    "Inputs and outputs of the linear layers of one block"
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]


def adapter_size(rank=8, shape=SHAPE):
    "The parameters of a LoRA over all linear layers"
    return shape["num_hidden_layers"] * sum(rank * (one + other) for one, other in linear_layers(shape))


def flops(tokens, target_tokens, rank=8, shape=SHAPE):
    """The operations a LoRA step over all linear layers cannot do without, two for each multiplication and addition.

    A token costs 2 N forward and 2 N backward (towards its input; frozen weights N have no gradient of their own), 6 A for an adapter of A
    numbers, whose gradient is a third product, and 4 H if it is trained on, where H is the size of the output head.
    Attention scores (1 to 2 % at
    this length), norms and the optimizer are left out; so is whatever a program computes twice or for padding.
    """
    weights = shape["num_hidden_layers"] * sum(one * other for one, other in linear_layers(shape))
    return tokens * (4 * weights + 6 * adapter_size(rank, shape)) + target_tokens * 4 * shape["vocab_size"] * shape["hidden_size"]


# ---- the rows ---------------------------------------------------------------------------------------------------------

class Text:
    "Sentences of so many tokens, of the words of the packaged example"
    def __init__(self, seed):
        from transformers import AutoTokenizer

        from sage_finetune.config import tiny_path
        self.tokenizer, self.rng = AutoTokenizer.from_pretrained(tiny_path()), random.Random(seed)
        example = (tiny_path().parents[1]/"examples"/"example.jsonl").read_text(encoding="utf-8")
        words = sorted(set("".join(letter if letter.isalpha() else " " for letter in example).lower().split()))
        self.words = [(word, len(ids)) for word, ids in zip(words,
            self.tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"])]

    def __call__(self, tokens):
        "A sentence of that many tokens, give or take a word"
        chosen, count = [], 0
        while count < tokens:
            word, size = self.rng.choice(self.words)
            chosen.append(word)
            count += size
        return " ".join(chosen).capitalize() + "."

    def length(self, row):
        "The tokens of the whole conversation"
        turns = [dict(role="user", content=row["instruction"]), dict(role="assistant", content=row["output"])]
        return len(self.tokenizer.apply_chat_template(turns, return_dict=False))


def make_rows(work, count=24, longest=512, exact=False, seed=0):
    """A .jsonl file of rows and the same as .json beside it, made once.
    Instructions have 20 to 120 tokens, answers are log-normal around 120,
    and no row is longer than `longest`; `exact` rows are all about as long as that."""
    path = Path(work)/"rows"/f"{count}-{longest}{'-exact' * exact}-{seed}.jsonl"
    if path.with_suffix(".json").exists(): return path
    text, rows = Text(seed), []
    for _ in range(count):
        asked = 40 if exact else min(text.rng.randint(20, 120), longest // 2)
        room = longest - asked - 40  # what the template adds, and the words that overshoot
        row = dict(instruction=text(asked), input="",
            output=text(room if exact else max(4, min(room, round(text.rng.lognormvariate(4.79, 0.75))))))
        rows.append(row)
        if len(rows) <= 100 and text.length(row) > longest: raise ValueError(f"a row has {text.length(row)} tokens, more than {longest}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(rows), encoding="utf-8")
    return path


def row_lengths(path):
    "The tokens of each row, its own: no padding, and nothing a program adds"
    text = Text(0)
    return [text.length(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder to make them in")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--exact", action="store_true", help="all rows about as long as that")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    asked = parser.parse_args()
    model, rows = (make_model(asked.work, num_hidden_layers=asked.layers, vocab_size=asked.vocabulary),
        make_rows(asked.work, asked.rows, asked.longest, asked.exact))
    print(json.dumps(dict(model=str(model), rows=str(rows), lengths=row_lengths(rows))))


if __name__ == "__main__": main()
