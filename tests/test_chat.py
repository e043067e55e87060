"""The chat engine: how strong the adapter is, stopping, conversations as training rows, two answers side by side, models loaded once."""
import gc
import math
import shutil
import threading
import time
import weakref

import pytest
import torch
from helpers import copy, file_limit, trained

from sage_finetune import LoRAConfig, PresetConfigs, load_training_data, merge, to_messages
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.inference.chat import Chat, SideBySide
from sage_finetune.inference.evaluation import compare, logprob_diff
from sage_finetune.inference.export import load_run
from sage_finetune.inference.generation import SamplingParams, adapter_scale, generate, generate_batch
from sage_finetune.inference.model_cache import clear_model_cache, load_cached_model
from sage_finetune.modeling.adapter import attach_lora
from sage_finetune.modeling.base import load_base, resize_embeddings
from sage_finetune.modeling.tokenizer import NewTokens

HELLO = [dict(role="user", content="Which colour has lamp 2?")]
NASTY = "<img src=x onerror=alert(1)>\x1b[31m & שלום, 色 \"ü\" 🙂\nsecond line"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained run"
    return trained(tmp_path_factory.mktemp("chat")).config.output_dir


@pytest.fixture(scope="module")
def opened(run): return load_run(run)


@pytest.fixture
def base(): return load_base(PresetConfigs.tiny(device="cpu"))[0].eval()


@pytest.fixture(autouse=True)
def no_thread_stays():
    "Whatever a test does, no thread of it goes on"
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]


IDS = torch.tensor([[40, 60, 80, 100, 120, 140]])


@torch.no_grad()
def logits(model, strength=None):
    if strength is None: return model(IDS).logits
    with adapter_scale(model, strength): return model(IDS).logits


def said(model, tokenizer, strength=None): return "".join(generate(model, tokenizer, HELLO, max_new_tokens=16, strength=strength))


# ---- strength ---------------------------------------------------------------------------------------------------------

KINDS = {
    "plain": dict(), "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "whole": dict(modules_to_save=["norm"]),
    "dora and whole": dict(use_dora=True, modules_to_save=["norm"]), "tokens": dict()}


@pytest.mark.parametrize("kind", KINDS)
def test_strength_goes_from_the_very_base_to_the_very_tuned_model(kind, base):
    fresh = logits(base)
    ids = []
    if kind == "tokens":
        new = NewTokens(["⟦a⟧", "⟦b⟧"], [40, 1600], [[3], [4]])
        resize_embeddings(base, new)
        fresh, ids = logits(base), new.ids
    model = attach_lora(base, LoRAConfig(**KINDS[kind]), new_tokens=ids or None).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("lora_A" not in name): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    flags, scalings = ([p.requires_grad for p in model.parameters()],
        [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")])
    tuned = logits(model)
    assert (tuned - fresh).abs().max() > 0.1
    assert torch.equal(logits(model, 0), fresh) and torch.equal(logits(model, 1), tuned)
    away = [(logits(model, value) - fresh).abs().mean().item() for value in (0.01, 0.5, 1, 1.5)]
    assert away == sorted(away) and away[0] < away[2] / 20  # near 0 it is near the base: there is no jump
    assert torch.allclose(logits(model, 0.999), tuned, atol=0.05) and torch.allclose(logits(model, 1.001), tuned, atol=0.05)
    with pytest.raises(KeyError), adapter_scale(model, 0.5): raise KeyError
    with pytest.raises(KeyError), adapter_scale(model, 0): raise KeyError
    assert torch.equal(logits(model), tuned)
    assert flags == [p.requires_grad for p in model.parameters()] and scalings == [dict(layer.scaling)
        for layer in model.modules() if hasattr(layer, "lora_A")]
    assert not any(module._forward_hooks for module in model.modules())


def test_half_strength_is_half_the_correction(opened, run, base):
    "Against the weights: base + strength · scaling · B A"
    model, _ = load_run(run)
    halved = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                halved[name].weight += 0.5 * layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(logits(model, 0.5), logits(base), atol=1e-3)
    assert not torch.allclose(logits(model, 1), logits(base), atol=0.1)


@pytest.mark.parametrize("value", (-0.1, 1.6, math.nan, math.inf, True, "1", None))
def test_a_strength_out_of_range_is_refused(value, opened):
    with pytest.raises(ConfigError, match="from 0 .the base alone. over 1"): logits(opened[0], value if value is not None else "none")


def test_models_without_a_scale_say_why(opened, run, base, tmp_path):
    with pytest.raises(DataError, match="Open the run with load_run"): logits(base, 0.5)
    merged = load_run(run)[0]
    merged.merge_adapter()
    with pytest.raises(DataError, match="unmerge_adapter"): logits(merged, 0)
    with pytest.raises(DataError, match="no adapter"): logits(merged.merge_and_unload(), 0)
    for lora, why in ((LoRAConfig(bias="all"), "overwrites biases of the base"),
            (LoRAConfig(init_lora_weights="pissa"), "PiSSA in training")):
        model = attach_lora(load_base(PresetConfigs.tiny(device="cpu"))[0], lora).eval()
        with pytest.raises(DataError, match=why): logits(model, 0)
        with pytest.raises(DataError, match=why): SideBySide(model, opened[1])
        with pytest.raises(DataError, match=why): compare(model, opened[1], ["Hello!"])
        assert torch.equal(logits(model, 1), logits(model))  # as trained is always possible


def test_while_one_sets_the_scale_the_others_wait(opened):
    model, tokenizer = opened
    plain, tuned, found = said(model, tokenizer, 0), said(model, tokenizer), []
    assert plain != tuned
    others = [threading.Thread(target=lambda: found.append(said(model, tokenizer))),
        threading.Thread(target=lambda: found.append(generate_batch(model, tokenizer, [HELLO], 16)[0].text))]
    with adapter_scale(model, 0):
        for other in others: other.start()
        assert said(model, tokenizer) == plain  # who has the turn goes on
        time.sleep(0.2)
        assert not found
    for other in others: other.join()
    assert [one.strip() for one in found] == [tuned.strip()] * 2


# ---- generation -------------------------------------------------------------------------------------------------------

def test_a_draw_is_repeatable_and_leaves_the_chance_of_others_alone(opened):
    draw = lambda seed: "".join(generate(*opened, HELLO, max_new_tokens=12, temperature=3., seed=seed))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = draw(1)
    assert torch.equal(torch.rand(3), expected)
    assert draw(1) == first and len({draw(seed) for seed in range(4)}) > 1 and len({draw(None) for _ in range(4)}) > 1
    assert "".join(generate(*opened, HELLO, max_new_tokens=16, temperature=3., top_p=0., seed=9)) == said(*opened)  # among the one best


@pytest.mark.parametrize("setting, says", (
    (dict(temperature=-1), "temperature = -1"), (dict(temperature="hot"), "temperature = 'hot'"),
    (dict(top_p=1.5), "top_p = 1.5"), (dict(seed=-1), "seed = -1"), (dict(seed=1.5), "seed = 1.5"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"), (dict(temprature=1), "Did you mean 'temperature'")))
def test_settings_are_refused_at_the_door(setting, says, opened):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")): Chat(*opened, **setting)
    if "temprature" in setting: return
    with pytest.raises(ConfigError, match=says): generate(*opened, HELLO, **setting)
    chat = Chat(*opened)
    with pytest.raises(ConfigError, match=says): setattr(chat.settings, *next(iter(setting.items())))
    assert chat.settings == SamplingParams()


def test_an_error_in_the_thread_reaches_the_reader(opened, base):
    base.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): list(generate(base, opened[1], HELLO))
    chat = Chat(base, opened[1])
    chat.messages = before = [*HELLO, dict(role="assistant", content="Red.")]
    for ask in (lambda: chat("And lamp 3?"), lambda: list(chat.regenerate()), lambda: list(chat.edit_and_regenerate(0, "And lamp 3?"))):
        with pytest.raises(ZeroDivisionError): ask()
        assert chat.messages == before


def test_stop_and_walking_away(opened):
    "The thread ends within a tenth of a second, best of a few on a busy machine"
    model, tokenizer = opened
    def taken(end):
        stop = threading.Event()
        pieces = generate(model, tokenizer, HELLO, max_new_tokens=400, temperature=9., seed=1, stop=stop)
        next(pieces)
        start = time.perf_counter()
        end(stop, pieces)
        assert list(pieces) == [] or stop.is_set()
        return time.perf_counter() - start
    assert min(taken(lambda stop, pieces: stop.set()) for _ in range(4)) < 0.1
    assert min(taken(lambda stop, pieces: pieces.close()) for _ in range(4)) < 0.1


def test_the_head_is_given_a_row_of_its_own(opened):
    "With the strides of a long prompt a 16-bit head takes a second for the first word; afterwards the model is as before"
    model, tokenizer = opened
    strides, head, hooks = [], model.get_output_embeddings(), lambda: len(model.get_output_embeddings()._forward_pre_hooks)
    before, seen = hooks(), head.register_forward_hook(lambda layer, given, scores: strides.append((given[0].shape, given[0].stride())))
    try:
        said(model, tokenizer)
        generate_batch(model, tokenizer, ["Hello!", "Which colour has lamp 2?"], max_new_tokens=3)
    finally: seen.remove()
    assert len(strides) > 5 and all(stride == (shape[1] * shape[2], shape[2], 1) for shape, stride in strides) and hooks() == before


def test_stop_is_heard_while_the_prompt_is_read(opened, base):
    seen, chat = [], Chat(base, opened[1])
    for layer in base.model.layers: layer.register_forward_pre_hook(lambda *_: (seen.append(1), len(seen) == 2 and chat.stop()) and None)
    assert chat("Which colour has lamp 1?") == "" and len(seen) == 2  # the third layer was never reached
    assert chat.cut == "it was stopped" and [turn["role"] for turn in chat.messages] == ["user", "assistant"] and chat.rows() == []
    list(chat.regenerate())
    assert len(seen) > 8 and chat.messages[-1]["content"]


def test_stop_is_heard_while_another_answer_is_given(opened):
    chat, ended = Chat(*opened), []
    with adapter_scale(opened[0], 0.5):
        waiting = threading.Thread(target=lambda: ended.append(chat("Hello!")))
        waiting.start()
        time.sleep(0.1)
        chat.stop()
        waiting.join(2)
        assert ended == [""]


def test_a_conversation_beyond_the_context_is_refused_and_kept(opened):
    chat = Chat(*opened, max_new_tokens=8)
    chat("Hello!")
    before, long = list(chat.messages), "lamp " * 3000
    for ask in (lambda: chat.stream(long), lambda: chat.edit_and_regenerate(0, long),
            lambda: logprob_diff(*opened, [dict(role="user", content=long), dict(role="assistant", content="Red.")])):
        with pytest.raises(DataError, match=r"this model reads at most [\d,]+"): ask()
    assert chat.messages == before


def test_an_answer_ends_where_the_context_ends(base, opened):
    base.config.max_position_embeddings = 24
    chat = Chat(base, opened[1], temperature=9., seed=4)
    chat("Hello!")
    assert chat.cut == "the model can read no further" and chat.messages[-1]["weight"] == 0
    chat = Chat(base, opened[1], max_new_tokens=2, temperature=9., seed=4)
    chat("Hello!")
    assert chat.cut == "max_new_tokens=2 was reached"


# ---- conversations ----------------------------------------------------------------------------------------------------

def test_again_draws_anew_and_repeatably(opened):
    def talk():
        chat = Chat(*opened, max_new_tokens=8, temperature=5., seed=3)
        return [chat("Hello!"), *("".join(chat.regenerate()).strip() for _ in range(3))], chat
    (first, chat), (second, _) = talk(), talk()
    assert first == second and len(set(first)) > 1
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"] and chat.messages[-1]["content"] == first[-1]
    with pytest.raises(DataError, match="nothing was asked yet"): Chat(*opened, "Be kind.").regenerate()


def test_edit_drops_what_came_behind(opened):
    chat = Chat(*opened, "Be brief.", max_new_tokens=16)
    for text in ("Which colour has lamp 1?", "Which colour has lamp 2?"): chat(text)
    expected = Chat(*opened, "Be brief.", max_new_tokens=16)
    expected("Which colour has lamp 3?")
    list(chat.edit_and_regenerate(1, "Which colour has lamp 3?"))
    assert chat.messages == expected.messages and len(chat.messages) == 3
    for number in (0, 2, 3, -1, "1", True):
        with pytest.raises(ConfigError, match="is no turn of the user; those are: 1"): chat.edit_and_regenerate(number, "Hm?")
    assert chat.messages == expected.messages
    chat.system = "Be long."
    assert chat.messages == [dict(role="system", content="Be long."), *expected.messages[1:]]
    chat.system = ""
    assert chat.messages == expected.messages[1:]


def test_strength_of_a_chat(opened):
    chat = Chat(*opened, max_new_tokens=16, strength=0)
    assert chat(HELLO[0]["content"]) == said(*opened, 0).strip()
    chat.strength = 1
    assert "".join(chat.regenerate()) == said(*opened)
    with pytest.raises(ConfigError, match="strength=2"): chat.strength = 2
    assert chat.strength == 1


def test_rows_are_read_back_as_the_conversation(opened, tmp_path):
    chat, file = Chat(*opened, f"Be kind. {NASTY}", max_new_tokens=30), tmp_path/"talks"/"said.jsonl"
    with pytest.raises(DataError, match="no whole answer"): chat.save_rows(file)
    chat(HELLO[0]["content"])
    chat(NASTY)
    chat.replace_answer(len(chat.messages) - 1, NASTY)
    assert chat.save_rows(file) == 1 and [to_messages(row) for row in load_training_data(file)] == [chat.messages]
    assert chat.save_rows(file) == 1  # not twice
    chat.settings.temperature, chat.settings.seed = 9., 1
    for _ in chat.stream("One more?"): chat.stop()
    assert chat.messages[-1]["weight"] == 0 and chat.save_rows(file) == 2
    assert [to_messages(row) for row in load_training_data(file)] == [chat.messages[:-2], chat.messages]
    before, chat.settings.temperature = file.read_bytes(), 0
    chat.reset()
    chat("Hello!")
    with file_limit(len(before) // 2), pytest.raises(RunError, match="is full"): chat.save_rows(file)
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == ["said.jsonl"]
    with pytest.raises(DataError, match="ends in .jsonl"): chat.save_rows(tmp_path/"said.json")
    file.write_text("not a row\n")
    with pytest.raises(DataError, match="said.jsonl"): chat.save_rows(file)
    assert file.read_text() == "not a row\n"


def test_rows_leave_out_questions_without_an_answer(opened):
    chat = Chat(*opened)
    chat.messages = [dict(role="user", content="a"), dict(role="assistant", content="", weight=0),
        dict(role="user", content="b"), dict(role="assistant", content="B"), dict(role="user", content="c")]
    assert chat.rows() == [dict(messages=[dict(role="user", content="b"), dict(role="assistant", content="B")])]
    assert to_messages(chat.rows()[0]) == chat.rows()[0]["messages"]


def test_what_is_shown_is_text(opened):
    chat = Chat(*opened)
    chat.messages = [dict(role="user", content=NASTY), dict(role="assistant", content=NASTY)]
    assert "<img" not in chat._repr_html_() and "&lt;img" in chat._repr_html_() and "\x1b" not in repr(chat)
    shift = logprob_diff(*opened, chat.messages)
    assert "<img" not in shift._repr_html_() and "\x1b" not in shift._repr_html_() + repr(shift)


# ---- what became more likely ------------------------------------------------------------------------------------------

def test_token_shift_is_the_difference_of_log_probabilities(opened, run, base):
    model, tokenizer = opened
    talk = [*HELLO, dict(role="assistant", content="Red and green and blue.")]
    shift = logprob_diff(model, tokenizer, talk)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    start, ids = (len(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
        tokenizer(prompt + talk[1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"])
    assert shift.ids == ids[start:]
    with torch.no_grad():
        for found, known in ((base, shift.base), (load_run(run)[0], shift.tuned)):
            expected = found(torch.tensor([ids])).logits[0].log_softmax(-1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]
            assert torch.allclose(torch.tensor(known), expected, atol=1e-4)
    assert sum(shift.shifts) > 0.5 and f"{sum(shift.shifts):+.1f} nats" in shift.summary()
    assert "▲" in repr(shift) and "underline" in shift._repr_html_() and shift._repr_html_().count("title=") == len(shift.ids) + 3
    cut = logprob_diff(model, tokenizer, [talk[0], talk[1] | dict(weight=0)])
    assert cut.shifts == shift.shifts
    for wrong in (HELLO, []):
        with pytest.raises(DataError, match="must be the assistant's"): logprob_diff(model, tokenizer, wrong)
    with pytest.raises(DataError, match="no adapter"): logprob_diff(base, tokenizer, talk)


# ---- side by side -----------------------------------------------------------------------------------------------------

def test_side_by_side_says_what_each_says_alone(opened):
    side = SideBySide(*opened, max_new_tokens=16)
    alone = [Chat(*opened, max_new_tokens=16, strength=strength) for strength in (0, 1)]
    for text in ("Which colour has lamp 2?", "And lamp 3?"):
        pieces = list(side.stream(text))
        expected = [chat(text) for chat in alone]
        assert ["".join(piece for who, piece in pieces if who == name).strip() for name in ("base", "tuned")] == expected
    assert alone[0].messages[1] != alone[1].messages[1]
    assert [side.base.messages, side.tuned.messages] == [chat.messages for chat in alone]
    side.settings.max_new_tokens = 2
    list(side.regenerate())
    assert side.base.cut == side.tuned.cut == "max_new_tokens=2 was reached"


def test_side_by_side_stays_in_step(opened):
    side = SideBySide(*opened, max_new_tokens=60, temperature=9., seed=1)
    roles = lambda: [[turn["role"] for turn in chat.messages] for chat in (side.base, side.tuned)]
    for _ in side.stream("Hello!"): side.stop()
    assert roles() == [["user", "assistant"]] * 2
    for _ in side.stream("Hello again!"): break  # the reader walks away
    assert roles() == [["user", "assistant"] * 2] * 2
    before = [list(side.base.messages), list(side.tuned.messages)]
    side.tuned.messages[0:0] = [dict(role="system", content="long " * 3000)]
    with pytest.raises(DataError, match="reads at most"): side.stream("Hm?")
    del side.tuned.messages[0]
    assert [side.base.messages, side.tuned.messages] == before


# ---- loaded once ------------------------------------------------------------------------------------------------------

def test_models_are_loaded_once_and_anew_when_trained_anew(run, tmp_path):
    clear_model_cache()  # what earlier tests left
    first, second = copy(run, tmp_path/"first"), copy(run, tmp_path/"second")
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_cached_model(first))) for _ in range(4)]  # noqa: F821
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len({id(model) for model, _ in found}) == 1 and load_cached_model(first/"lora_weights")[0] is found[0][0]
    model, _ = found[0]
    expected, other = logits(model), load_cached_model(second)[0]
    assert (other is not model and other.get_base_model().get_input_embeddings().weight
        is model.get_base_model().get_input_embeddings().weight)
    assert torch.equal(logits(other), expected)
    with adapter_scale(other, 0): assert torch.equal(logits(model), expected)  # what is done to one is not felt by the other
    from safetensors.torch import load_file, save_file
    file = first/"lora_weights"/"adapter_model.safetensors"
    save_file({name: weight * 0 for name, weight in load_file(file).items()}, file, metadata=dict(format="pt"))
    anew = load_cached_model(first)[0]
    assert anew is not model and torch.equal(logits(anew), logits(model, 0)) and torch.equal(logits(model), expected)
    gone = [weakref.ref(anew), weakref.ref(other), weakref.ref(other.get_base_model().get_input_embeddings().weight)]
    assert clear_model_cache() == 2 and clear_model_cache() == 0
    del anew, other, model, found, threads
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def test_a_merged_model_serves_where_there_is_no_adapter(run, tmp_path):
    merged = copy(run, tmp_path/"merged")
    merge(merged)
    expected = said(*load_cached_model(merged))
    shutil.rmtree(merged/"lora_weights")
    try:
        model, tokenizer = load_cached_model(merged/"merged_model")
        assert not hasattr(model, "disable_adapter") and said(model, tokenizer) == expected
        with pytest.raises(DataError, match="no adapter"): Chat(model, tokenizer, strength=0.5)
        shutil.rmtree(merged/"merged_model")
        with pytest.raises(RunError, match="no adapter yet"): load_cached_model(merged)
    finally: clear_model_cache()


# ---- answers and their neighbours ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [40, 7, 2])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(tmp_path, batch_size):
    "In 16 bits a near tie is decided by rounding, which depends on the batch"
    model, tokenizer = load_base(PresetConfigs.tiny(output_dir=tmp_path, bf16=True))
    prompts = [row["instruction"] for row in load_training_data("example_unseen")[:40]]
    assert generate_batch(model, tokenizer, prompts, 24, batch_size=batch_size) == [generate_batch(model, tokenizer, prompt, 24)[0]
        for prompt in prompts]


def test_a_near_tie_is_one_step_of_a_number_in_16_bits():
    from sage_finetune.modeling.decoding import NEAR_TIE, _NearTieCounter
    near = _NearTieCounter()
    for rows in ([[8., 1.], [8., 8 - 8 * NEAR_TIE]], [[0.5, 0.5 - NEAR_TIE / 2], [-8., -8.25]]): near(None, torch.tensor(rows).bfloat16())
    assert torch.stack(near.ties, 1).tolist() == [[False, True], [True, False]]


def test_in_32_bits_nobody_is_asked_twice(tmp_path, monkeypatch):
    from sage_finetune.inference import generation as room
    model, tokenizer = load_base(PresetConfigs.tiny(output_dir=tmp_path, bf16=False))
    asked, ask = [], room.likeliest_tokens
    monkeypatch.setattr(room, "likeliest_tokens",
        lambda model, tokenizer, prompts, *more: asked.append(len(prompts)) or ask(model, tokenizer, prompts, *more))
    generate_batch(model, tokenizer, [row["instruction"] for row in load_training_data("example_unseen")[:10]], 8)
    assert asked == [10]
