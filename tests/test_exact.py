"""Numbers against plain transformers, PEFT and torch, without any code of ours in between; and the same bytes from the same seed."""

import pytest
import torch
from helpers import (
    adapter,
    change,
    copy,
    ended,
    metrics,
    prepared,
    program,
    reference,
    rows,
    start,
    status,
    tiny_config,
    trained,
    write_rows,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune import Chat, LoRATrainer, merge, train_from_meta
from sage_finetune.config import tiny_path
from sage_finetune.inference.export import load_run
from sage_finetune.inference.generation import generate_batch
from sage_finetune.runs.folder import read_meta

QUESTIONS = [row["instruction"] for row in rows()] + ["Hello!", "What is seven plus five?", "Spell the word lamp."]


class Watched(LoRATrainer):
    "Notes every batch the model really sees"
    def __init__(self, config):
        super().__init__(config)
        self.trained, self.evaluated = [], []

    def loss(self, batch):
        (self.trained if self.model.training else self.evaluated).append(batch)
        return super().loss(batch)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A finished run and its trainer, the model still in memory"
    trainer = trained(tmp_path_factory.mktemp("tuned"))
    trainer.model.eval()
    return trainer


@pytest.fixture(scope="module")
def plain_base():
    "The base model as anybody loads it"
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)


@torch.no_grad()
def logits(model, tokenizer, question):
    text = tokenizer.apply_chat_template([dict(role="user", content=question)], tokenize=False, add_generation_prompt=True)
    return model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits


# ---- files for others -------------------------------------------------------------------------------------------------

def test_plain_peft_loads_the_adapter_with_the_same_logits(tuned, plain_base):
    folder = tuned.config.lora_dir
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(plain_base(), folder).eval()
    by_name = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = plain_base().eval()
    for question in QUESTIONS[:6]:
        ours = logits(tuned.model, tokenizer, question)
        assert torch.allclose(logits(loaded, tokenizer, question), ours, rtol=0, atol=1e-6)
        assert torch.allclose(logits(by_name, tokenizer, question), ours, rtol=0, atol=1e-6)
        assert (logits(base, tokenizer, question) - ours).abs().max() > 1e-3  # the adapter does something


def test_plain_transformers_says_the_same_from_the_merged_model(tuned):
    "Its own template, its own generation settings, its own end of turn"
    report = merge(tuned.config.output_dir)
    assert report.agrees and report.positions > 100
    folder = tuned.config.merged_dir
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    chat = Chat(*load_run(tuned.config.output_dir, merged=True), max_new_tokens=24)
    # the model that was trained, still in memory
    with_adapter = [answer.text for answer in generate_batch(tuned.model, tuned.tokenizer, QUESTIONS, max_new_tokens=24)]
    assert [answer.text for answer in generate_batch(*load_run(tuned.config.output_dir), QUESTIONS, max_new_tokens=24)] == with_adapter
    assert len(set(with_adapter)) > 1
    for question, ours in zip(QUESTIONS, with_adapter):
        asked = tokenizer.apply_chat_template([dict(role="user", content=question)], add_generation_prompt=True,
            return_tensors="pt", return_dict=True)
        said = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1]:]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == ours
        chat.reset()
        assert chat(question) == ours


# ---- the loss, computed again -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", (False, True), ids=("padded", "packed"))
def test_the_first_steps_equal_a_plain_loop(tmp_path, plain_base, packing):
    """Warm-up, accumulation, clipping, AdamW, padding and packing;
    the reference starts from PEFT's own adapter after torch.manual_seed(seed)"""
    content = rows(30)
    # micro-batches of different weight
    content[::3] = [dict(row, output=row["output"] + " It hangs in the long corridor.") for row in content[::3]]
    trainer = LoRATrainer(tiny_config(tmp_path, data_path=write_rows(tmp_path/"content.jsonl", content),
                                 per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=5e-3,
                                 warmup_ratio=0.2, max_grad_norm=0.1, weight_decay=0.1, seed=7, packing=packing)).setup()
    total = len(trainer.plan)
    assert total == 10 and [len(step.micro_batches) for step in trainer.plan] == [1 if packing else 3] * 10 and trainer.packs == packing
    order = [step.rows for step in trainer.plan]
    assert sorted(sum(order[:5], [])) == sorted(sum(order[5:], [])) == list(range(30)) and order[:5] != order[5:]
    steps = [step for step, _ in zip(trainer.steps(), range(7))]

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    torch.manual_seed(7)
    model = get_peft_model(plain_base(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = list(reference(model, tokenizer, content, order[:7], rate=5e-3, total=total, warmup=2, decay=0.1, longest=0.1))
    assert [step.loss for step in steps] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx([length for _, length, _ in expected], rel=1e-3)
    assert [step.learning_rate for step in steps] == pytest.approx([rate for _, _, rate in expected], rel=1e-6)
    # clipped, risen, fallen
    assert all(length > 0.1 for _, length, _ in expected) and expected[0][2] == 0 < expected[-1][2] < expected[2][2] == 5e-3
    assert abs(steps[6].loss - steps[0].loss) > 0.05  # it went somewhere


def test_the_number_of_rows_at_once_changes_nothing(tmp_path):
    "Four at once or one by one: the same steps, up to rounding"
    together, alone = (LoRATrainer(tiny_config(tmp_path/name, per_device_train_batch_size=size,
        gradient_accumulation_steps=4//size, max_steps=4)) for name, size in (("four", 4), ("one", 1)))
    assert together.train(show=False).losses == pytest.approx(alone.train(show=False).losses, rel=1e-5)


# ---- what is trained on ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", (False, True), ids=("padded", "packed"))
def test_the_answer_and_its_end_are_trained_on_and_nothing_else(tmp_path, packing):
    "On the batches the model really saw: no prompt, no padding, every turn of the assistant with its end"
    content = rows(16)
    content += [dict(messages=[dict(role="system", content="Be short."), dict(role="user", content=f"Lamp {at}?"),
                               dict(role="assistant", content="It is lit."),
                               dict(role="user", content="And now?"), dict(role="assistant", content=f"Dark {at}.")]) for at in range(8)]
    trainer = Watched(tiny_config(tmp_path, data_path=write_rows(tmp_path/"content.jsonl", content), num_train_epochs=1, packing=packing))
    result = trainer.train(show=False)
    tokenizer, end = AutoTokenizer.from_pretrained(tiny_path()), "<|im_end|>"
    end_id, found, padded = tokenizer.convert_tokens_to_ids(end), [], 0
    batches = trainer.trained[-result.steps:]  # those before measured the speed
    for batch in batches:
        for ids, segments, labels in zip(batch["input_ids"], batch["segments"], batch["labels"]):
            assert ((labels == -100) | (labels == ids)).all()
            assert (labels[segments == 0] == -100).all() and (ids[segments == 0] == tokenizer.pad_token_id).all()
            padded += int((segments == 0).sum())
            for number in range(1, int(segments.max()) + 1):
                own = segments == number
                target_tokens = labels[own & (labels != -100)]
                assert target_tokens[-1] == end_id
                found.append(tokenizer.decode(target_tokens))
                masked = tokenizer.decode(ids[own & (labels == -100)])
                assert masked.count("<|im_start|>assistant\n") == found[-1].count(end) and found[-1].removesuffix(end) not in masked
    expected = [row["output"] + end if "output" in row
        else "".join(turn["content"] + end for turn in row["messages"] if turn["role"] == "assistant") for row in content]
    assert sorted(found) == sorted(expected) and (packing or padded > 0)
    assert (result.target_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
        and result.tokens == sum(int((batch["segments"] > 0).sum()) for batch in batches))


def texts(batches, tokenizer):
    return [tokenizer.decode(ids[segments == number]) for batch in batches
        for ids, segments in zip(batch["input_ids"], batch["segments"]) for number in range(1, int(segments.max()) + 1)]


def test_held_out_rows_are_never_trained_on(tmp_path):
    "Neither a row nor, where a question has several answers, its question"
    content = rows(40) + [dict(row, output="I do not know.") for row in rows(40)]
    trainer = Watched(tiny_config(tmp_path, data_path=write_rows(tmp_path/"content.jsonl", content), eval_ratio=0.3,
        num_train_epochs=2, per_device_train_batch_size=16, eval_steps=3))
    result = trainer.train(show=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    question = lambda text: text.partition("<|im_start|>assistant")[0]
    trained, held = texts(trainer.trained, tokenizer), texts(trainer.evaluated, tokenizer)
    assert len({*trained}) + len({*held}) == 80 and len({*held}) >= 10
    assert not {question(text) for text in trained} & {question(text) for text in held}
    assert [step for step, _ in result.eval_losses] == [*range(3, result.steps, 3), result.steps]


def test_looking_at_held_out_rows_changes_no_step(tmp_path):
    "Evaluation draws no random numbers and leaves the model in training: with dropout on, the adapter stays the same"
    rare, often = (tiny_config(tmp_path/name, eval_path=write_rows(tmp_path/name/"held.jsonl", rows(6)), max_steps=6,
        eval_steps=steps, lora=dict(lora_dropout=0.2)) for name, steps in (("rare", 6), ("often", 1)))
    for config in (rare, often): LoRATrainer(config).train(show=False)
    assert adapter(rare.output_dir) == adapter(often.output_dir)
    assert ([row["eval_loss"] is None for row in metrics(often.output_dir)] == [False] * 6
        and metrics(rare.output_dir)[4]["eval_loss"] is None)


# ---- the same seed ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A prepared run of 30 steps with dropout; every test takes a copy"
    return prepared(tmp_path_factory.mktemp("seed")/"ready", num_train_epochs=5, save_steps=4, lora=dict(lora_dropout=0.1))


@pytest.fixture(scope="module")
def straight(ready):
    "The same run twice, in two processes, without any interruption"
    first, second = copy(ready, ready.parent/"first"), copy(ready, ready.parent/"second")
    children = [start("run", first), start(second, module="sage_finetune.trainer")]
    for child in children: ended(child)
    return first, second


def test_the_same_seed_gives_the_same_bytes(straight):
    first, second = straight
    assert adapter(first) == adapter(second)
    assert [row["loss"] for row in metrics(first)] == [row["loss"] for row in metrics(second)] and len(metrics(first)) == 30


def test_the_same_seed_twice_in_one_process(straight, ready, tmp_path):
    "What was drawn before does not matter: the second run is the first one's twin"
    torch.rand(7)
    runs = [copy(ready, tmp_path/name) for name in ("one", "two")]
    for run in runs: train_from_meta(run, show=False)
    assert adapter(runs[0]) == adapter(runs[1]) == adapter(straight[0])


@pytest.mark.parametrize("fields", [dict(seed=43), dict(learning_rate=1.9e-3)])
def test_another_seed_or_field_gives_other_bytes(straight, ready, tmp_path, fields):
    run = copy(ready, tmp_path/"run")
    change(run, **fields)
    train_from_meta(run, show=False)
    assert adapter(run) != adapter(straight[0])


@pytest.mark.parametrize("last", [4, 11])
def test_interrupted_by_break_and_resumed_gives_the_same_bytes(straight, ready, tmp_path, last):
    "Once right behind a checkpoint, once between two"
    run = copy(ready, tmp_path/"run")
    for step in LoRATrainer(read_meta(run).to_config()).steps():
        if step.step == last: break
    assert status(run)["state"] == "cancelled" and status(run)["step"] == last and not (run/"lora_weights").exists()
    torch.rand(3)
    result = LoRATrainer(read_meta(run).to_config()).train(show=False, resume=True)
    assert result.steps == 30 - last  # what was done is saved, wherever it ends
    same_as(run, straight[0])


def same_as(run, straight):
    assert adapter(run) == adapter(straight)
    numbers = lambda folder: [(row["step"], row["loss"], row["learning_rate"], row["tokens"]) for row in metrics(folder)]
    assert numbers(run) == numbers(straight)
    assert status(run)["state"] == "completed" and (status(run)["step"], status(run)["total"], status(run)["pid"]) == (30, 30, None)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(straight, ready, tmp_path):
    "kill -9 from outside, wherever the run happens to be behind its second checkpoint; then another process goes on"
    run = copy(ready, tmp_path/"run")
    child = start("run", run)
    try:
        while child.poll() is None and not (run/"checkpoints"/"checkpoint-8").exists(): pass
        assert child.poll() is None, child.communicate()
        child.kill()
    finally:
        child.kill()
        child.communicate()
    assert status(run)["state"] == "training" and not (run/"lora_weights").exists()
    assert "is gone" in program("list", tmp_path)
    (run/"checkpoints"/".checkpoint-12.half").mkdir()  # what a kill in the middle of writing one leaves behind
    (run/"checkpoints"/".checkpoint-12.half"/"adapter_model.safetensors").write_bytes(b"half")
    program("run", run, "--resume")
    same_as(run, straight[0])
