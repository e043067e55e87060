"What holds for any conversation and any template"
import unicodedata
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from templates_table import assistant, names, system, tokenizer_for, user

from sage_finetune.chat_format.rendering import Renderer, check_prefix, loss_mask, render, render_all, stop_ids
from sage_finetune.chat_format.template import replace_lone_surrogates
from sage_finetune.core.errors import DataError

EDGES = ["", " ", "\n", "\n\n", "\t", "  ", "a", "Blue.", "Assistant:", "<|im_end|>", "<|im_start|>assistant\n",
    "<end_of_turn>", "<|eot_id|>", "</s>", "<|endoftext|>", "<|return|>",
    "<think>", "</think>", "<think>\n\n</think>\n\n", "[/INST]", "\0", "\ud800", "\u202e", "<script>alert(1)</script>",
    "\x1b[31m", "\U0001F600", "e\u0301", "ﬁ", "\U000F0000", "{{ x }}", "{% raw %}", "0", "12 345"]
texts = st.lists(st.one_of(st.sampled_from(EDGES), st.text(max_size=8)), min_size=1, max_size=4).map("".join)


@st.composite
def conversations(draw):
    "A question and an answer, one to three times, perhaps with a system message and with answers that do not count"
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(texts)), assistant(draw(texts),
            **draw(st.sampled_from([{}, {}, {}, {"weight": 0}, {"train": False}, {"reasoning_content": "because"}])))]
    return messages


@cache
def renderer_for(name, thinking, allowed): return Renderer(tokenizer_for(name), thinking, allowed)


def holds(examples, messages, tokenizer):
    "The promises for the examples of one conversation"
    wanted = [at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0
        and message.get("train") is not False]
    assert sorted(turn.message for example in examples for turn in example.turns if turn.is_target) == wanted
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for example in examples:
        assert len(example.ids) == len(example.labels) and all(label in (-100, token_id)
            for token_id, label in zip(example.ids, example.labels))
        assert tokenizer.bos_token_id is None or example.ids[:2] != [tokenizer.bos_token_id] * 2
        inside = [False] * len(example.ids)
        for turn in example.turns:
            if turn.is_target:
                inside[turn.start:turn.end] = [True] * (turn.end - turn.start)
                assert example.labels[turn.end - 1] == example.ids[turn.end - 1] and example.ids[turn.end - 1] in stop_ids(tokenizer)
                said(example, turn, messages[turn.message]["content"], tokenizer, special)
        assert all(within or not taught for within, taught in zip(inside, loss_mask(example)))
        check_prefix(example, messages, tokenizer)


def said(example, turn, content, tokenizer, special):
    "The trained tokens spell the answer, up to blanks at its edges; thinking tags are the template's own business"
    if "</think>" in content or "<think>" in content: return
    text = tokenizer.decode(example.ids[turn.start:turn.end])
    spelt = unicodedata.normalize("NFC", replace_lone_surrogates(content).strip())
    assert spelt in unicodedata.normalize("NFC", text), (spelt, text)
    assert tokenizer.decode([label for label in example.labels[turn.start:turn.end] if label != -100]).rstrip().endswith(
        tokenizer.decode([example.ids[turn.end - 1]]))


@pytest.mark.parametrize("name", names())
@settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), thinking=st.sampled_from(["ignore_empty", "ignore_empty", "as_is"]))
def test_the_promises_hold_for_any_conversation(name, messages, thinking):
    tokenizer = tokenizer_for(name)
    try: examples = render_all(messages, tokenizer, thinking=thinking)
    except DataError as error:
        assert "At message" in str(error)
        assert str(renderer_for(name, thinking, False).batch([(messages, None)])[0]) == str(error)
        return
    assert renderer_for(name, thinking, False).batch([(messages, None)]) == [examples]
    holds(examples, messages, tokenizer)
    whole = render(messages, tokenizer, thinking=thinking)
    assert {turn.message for turn in whole.turns if turn.is_target} <= {turn.message for example in examples
        for turn in example.turns if turn.is_target}


@pytest.mark.parametrize("name", names())
@settings(max_examples=5, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(talks=st.lists(conversations(), min_size=2, max_size=6), allowed=st.booleans(),
    thinking=st.sampled_from(["ignore_empty", "as_is", "strip"]))
def test_a_batch_gives_what_single_calls_give(name, talks, allowed, thinking):
    found = renderer_for(name, thinking, allowed).batch([(messages, None) for messages in talks])
    for messages, examples in zip(talks, found):
        try: expected = render_all(messages, tokenizer_for(name), thinking=thinking, allow_special_tokens=allowed)
        except DataError as error: assert isinstance(examples, DataError) and str(examples) == str(error)
        else: assert examples == expected
