"Real chat templates: those that the trl package ships, our masks beside its marks, and what they must not break"
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import templates_table as shown
from templates_table import TALKS, TOOLS, assistant, names, system, tokenizer_for, user
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sage_finetune.chat_format.rendering import (
    Renderer,
    check_prefix,
    loss_mask,
    render,
    render_all,
    render_prompt,
    render_text,
    stop_ids,
    template_notes,
)
from sage_finetune.chat_format.template import PLAIN_TEMPLATE, end_of_turn, replace_lone_surrogates, template_text
from sage_finetune.core.errors import DataError, ModelError

PAGE = Path(__file__).parent.parent/"nbs"/"chat_format"/"20_rendering.ipynb"
ANSWERS = [user("What colour is the sky?"), assistant("Blue."), user("And at night?"), assistant("\nBlack.")]


def tiny(template=None):
    tokenizer = AutoTokenizer.from_pretrained(shown.TINY)
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(examples, tokenizer):
    return {turn.message: tokenizer.decode([label for label in example.labels[turn.start:turn.end] if label != -100])
        for example in examples for turn in example.turns if turn.is_target}


# ---- beside the marks of the training versions ------------------------------------------------------------------------

def test_every_difference_from_the_training_templates_has_a_reason_and_stands_in_the_page():
    cells = {(name, kind): cell for name, row in shown.comparison().items() for kind, cell in row.items()}
    assert len(cells) >= 34 * 8
    assert not [where for where, cell in cells.items() if "?" in cell], "masks differ for a reason nobody has given"
    page = "\n".join("".join(cell["source"]) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown")
    assert shown.table() in page, ("the table has changed: "
        "run `python tests/templates_table.py` and put what it prints into nbs/chat_format/20_rendering.ipynb")


def test_where_the_texts_are_the_same_the_masks_differ_only_where_the_reasons_say():
    ours_more, theirs_more, compared = set("CH"), set("LEPT"), 0
    for name, row in shown.comparison().items():
        for kind, cell in row.items():
            examples, other = shown.ours(name, kind), shown.theirs(name, kind)
            if other is None or len(examples) > 1 or examples[0].ids != other[0]: continue
            pairs = list(zip(shown.prompt.loss_mask(examples[0]), map(bool, other[1])))
            assert (True, False) not in pairs or ours_more & set(cell), (name, kind, cell)
            assert (False, True) not in pairs or theirs_more & set(cell), (name, kind, cell)
            compared += 1
    assert compared > 200


# ---- what holds for all of them ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", names())
def test_the_promises_hold_for_every_template_and_conversation(name):
    tokenizer = tokenizer_for(name)
    batch = Renderer(tokenizer).batch(TALKS.values())
    stops = stop_ids(tokenizer) | {tokenizer.convert_tokens_to_ids(token) for token in ("<|tool_response>", "<|call|>")}
    for (messages, tools), found in zip(TALKS.values(), batch):
        if isinstance(found, DataError):
            assert "At message" in str(found)
            with pytest.raises(DataError, match="refuses this conversation"): render(messages, tokenizer, tools)
            continue
        assert found == render_all(messages, tokenizer, tools)
        taught = [turn.message for example in found for turn in example.turns if turn.is_target]
        left_out = any("tool calls" in note for example in found for note in example.notes)
        assert sorted(taught) == [at for at, message in enumerate(messages) if message["role"] == "assistant"
            and not (left_out and message.get("tool_calls"))]
        for example in found:
            check_prefix(example, messages, tokenizer, tools)
            for turn in example.turns:
                assert example.ids[turn.end - 1] in stops and messages[turn.message]["content"] or messages[turn.message].get("tool_calls")


@pytest.mark.parametrize("name", names())
def test_the_compiled_template_writes_what_the_library_writes(name):
    tokenizer = tokenizer_for(name)
    for messages, tools in TALKS.values():
        try: expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception: continue
        if "Blue" in expected or "dusk" in expected: assert template_text(messages, tokenizer, tools) == expected


def test_stop_tokens_are_those_the_models_stop_at():
    "As in the models' generation_config.json: the id lists there hold these tokens"
    known = {"cohere2": "<|END_OF_TURN_TOKEN|>", "gemma3": "<end_of_turn>", "gemma4": "<turn|>",
        "glm4moe": "<|user|>", "gptoss": "<|return|>",
        "llama3_1": "<|eot_id|>", "llava_next": "</s>", "phi3_5": "<|end|>", "qwen3": "<|im_end|>", "smolvlm": "<end_of_utterance>"}
    for name, stop in known.items(): assert tokenizer_for(name).decode([end_of_turn(tokenizer_for(name))]) == stop
    calls = {"gptoss": "<|call|>", "glm4moe": "<|observation|>", "gemma4": "<|tool_response>"}
    for name, stop in calls.items(): assert tokenizer_for(name).convert_tokens_to_ids(stop) in stop_ids(tokenizer_for(name))


def test_notes_name_what_templates_do():
    def said(name): return " ".join(template_notes(tokenizer_for(name)))
    assert "takes no system message" in said("gemma") and "strips blanks" in said("gemma")
    assert "puts the system message into the first user turn" in said("gemma3")
    assert "today's date" in said("llama3_2") and "today's date" in said("gptoss")
    assert "You are Qwen" in said("qwen2_5") and "that has no system message" in said("qwen2_5")
    assert "becomes several examples" in said("qwen3") and "drops the thinking of earlier answers" in said("qwen3")
    assert "generation begins with '<think>\\n'" in said("deepseek_r1_distill")
    assert "list of parts" in said("idefics3") and "<|user|>, is trained on as its end" in said("glm4moe")
    assert template_notes(tiny())[0].startswith("the tokenizer has no chat template")


@pytest.mark.parametrize("name, messages, said", [
    ("gemma", [system("Be brief."), user("a"), assistant("b")],
        "At message 1: it takes no system message. Put its text into the first user message."),
    ("gemma", [user("a"), user("b"), assistant("c")], "At message 2: it takes no two messages of 'user' in a row. Join them into one."),
    ("cohere", [assistant("a"), user("b"), assistant("c")], "At message 1: a conversation must begin with a user message"),
    ("gemma3", TALKS["tools"][0], "it takes no tool calls or no tool results"),
    ("qwen3_6", [user("a"), system("b"), assistant("c")], "At message 2: it takes a system message only as the first")])
def test_a_refusal_names_the_message_the_rule_and_the_way_out(name, messages, said):
    with pytest.raises(DataError) as failure: render(messages, tokenizer_for(name))
    assert said in str(failure.value)
    assert said in str(Renderer(tokenizer_for(name)).batch([(messages, None)])[0])


# ---- asked and trained behind the same prompt ---------------------------------------------------------------------------

def any_tokenizer(name): return shown.public_tokenizer(name) if name in shown.PUBLIC else tokenizer_for(name)


def prompts_and_examples(name, talks=TALKS):
    "(conversation, number of the answer, ids everybody asks with, ids before what is trained on, notes) of every answer that is trained on"
    tokenizer = any_tokenizer(name)
    for kind, (messages, tools) in talks.items():
        try: examples = render_all(messages, tokenizer, tools)
        except DataError: continue
        for example in examples:
            for turn in (turn for turn in example.turns if turn.is_target):
                first = next(at for at in range(turn.start, turn.end) if example.labels[at] != -100)
                yield kind, turn.message, render_prompt(messages[:turn.message], tokenizer, tools), example.ids[:first], example.notes


@pytest.mark.parametrize("name", [*shown.PUBLIC, *names()])
def test_the_generation_prompt_is_a_prefix_of_the_example_or_the_notes_say_why_not(name):
    found = list(prompts_and_examples(name))
    assert len(found) >= 8 and (name not in ("mistral_nemo", "reminder", "reminder_no_header", "last_is_marked", "hermes")
        or all(asked == before for _, _, asked, before, _ in found))
    for kind, message, asked, before, notes in found:
        if asked != before:
            assert any(note.startswith(("generation begins", "an empty thinking block")) for note in notes), (kind, message, notes)
    for note in [note for *_, notes in found for note in notes] + template_notes(any_tokenizer(name)):
        assert not re.search("[\U000F0000-\U0010FFFF]", note), f"a placeholder is shown: {note!r}"
        assert not any(text in note for text in ("colour", "dusk", "2+2", "briefly")), f"a row is quoted: {note!r}"


@pytest.mark.parametrize("name", ["mistral_nemo", "reminder", "reminder_no_header", "last_is_marked"])
def test_what_the_last_message_alone_is_given_is_trained_with(name):
    "A system prompt or a reminder that the template writes only where the conversation ends with the user"
    tokenizer, (messages, _) = any_tokenizer(name), TALKS["system"]
    examples = render_all(messages, tokenizer)
    for example in examples:
        for turn in (turn for turn in example.turns if turn.is_target):
            asked = tokenizer.apply_chat_template(messages[:turn.message], tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(example.ids[:turn.start]) == asked and "Answer briefly." in asked
            assert tokenizer.decode(example.ids[turn.start:turn.end]) == messages[turn.message]["content"] + tokenizer.eos_token
    assert sorted(turn.message for example in examples for turn in example.turns if turn.is_target) == [2, 4]
    assert Renderer(tokenizer).batch([(messages, None)] * 2) == [examples] * 2
    same = [user("Blue."), assistant("Blue."), user("Blue."), assistant("Blue.")]  # a question that stands there twice
    assert all(asked == before for _, _, asked, before, _ in prompts_and_examples(name, dict(same=(same, None))))


@pytest.mark.parametrize("name, block", [("closed_block", "<think>\n\n</think>\n\n"),
    ("closed_channel", "<|channel>thought\n<channel|>"), ("closing_tag", "</think>")])
def test_answers_stand_behind_a_closed_thinking_block_where_the_prompt_ends_in_one(name, block):
    tokenizer = any_tokenizer(name)
    for kind in ("single", "multi", "system", "thinking"):
        messages, _ = TALKS[kind]
        for _, message, asked, before, notes in prompts_and_examples(name, {kind: TALKS[kind]}):
            assert asked == before and tokenizer.decode(before).endswith(block) and not any("generation begins" in note for note in notes)
            assert tokenizer.decode(asked) == tokenizer.apply_chat_template(messages[:message], tokenize=False, add_generation_prompt=True)
    # an answer that thinks does not belong there
    for opened, closed in (("<think>\n", "\n</think>\n\n"), ("<|channel>thought\n", "<channel|>")):
        example = render([user("a"), assistant(f"{opened}because{closed}b")], tokenizer)
        assert "because" in trained_texts([example], tokenizer)[1] and any(note.startswith("generation begins") for note in example.notes)
    odd = render([user("a"), assistant("\nb")], tokenizer)  # the line break belongs to the answer
    assert trained_texts([odd], tokenizer)[1] == "\nb" + tokenizer.eos_token


@pytest.mark.parametrize("name", ["r1_distill", "qwq", "minimax_m2", "nemotron_nano_2", "deepseek_r1_distill", "deepseekv3"])
def test_an_open_thinking_block_is_named(name):
    notes = " ".join(render(TALKS["single"][0], any_tokenizer(name)).notes)
    assert "an open thinking block" in notes and "Train on answers with their thinking" in notes or "enable_thinking=False" in notes
    assert all(asked == before for kind, _, asked, before, _ in prompts_and_examples("minimax_m2", dict(thinking=TALKS["thinking"])))
    both = tiny("{% for m in messages %}{% if loop.last and m.role == 'user' %}{{ messages[0].content }}{% endif %}[{{ m.role }}] "
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] <think>\n{% endif %}")
    assert [note for note in render(TALKS["system"][0], both).notes if "'<think>', an open thinking block" in note
        and "briefly" not in note]


def test_no_mask_begins_inside_a_tag_or_a_word():
    tokenizer, (messages, tools) = any_tokenizer("nemotron_nano_2"), TALKS["tools"]
    assert trained_texts(render_all(messages, tokenizer, tools), tokenizer)[1].startswith('<TOOLCALL>[{"name": "look_up"')
    for call, other, shared in (("[TOOL_CALLS] ", "[TOOLS: none] ", ""), ("call: ", "calm: ", ""),
            ("<tool_call>", "<tool_free>", ""), ("Sure. <fn>", "Sure. <free>", "Sure. ")):
        own = tiny("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}" + call + "{{ m.tool_calls | tojson }}"
            "{% else %}{% if m.role == 'assistant' %}" + other + "{% endif %}{{ m.content }}{% endif %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
        taught = trained_texts(render_all(messages, own, tools), own)
        assert taught[1].startswith(call.removeprefix(shared)) and taught[3].startswith("It is")


@pytest.mark.parametrize("as_list", [False, True])
def test_a_template_for_tools_that_wants_a_list_of_them(as_list):
    named = dict(default=tiny_template(), tool_use=shown.PUBLIC["hermes"])
    both = tiny([dict(name=name, template=template) for name, template in named.items()] if as_list else named)
    messages, tools = TALKS["tools"]
    example = render(messages, both, tools)
    assert (trained_texts([example], both)[1] == '<tool_call>\n{"name": "look_up", "arguments": {"word": "dusk"}}\n</tool_call><|im_end|>'
        and not example.notes)
    assert render(TALKS["single"][0], both).ids == render(TALKS["single"][0], tiny(tiny_template())).ids
    assert stop_ids(both) == {both.eos_token_id} and end_of_turn(both) == both.eos_token_id
    assert Renderer(both).batch([TALKS["single"], TALKS["tools"]]) == [render_all(TALKS["single"][0], both),
        render_all(messages, both, tools)]
    alone = tiny(shown.PUBLIC["hermes"])  # and where it is the only one
    assert trained_texts([render(TALKS["single"][0], alone)], alone) == {1: "Blue, mostly.<|im_end|>"}
    assert render_prompt(messages[:1], alone) == alone.apply_chat_template(messages[:1], tools=[], add_generation_prompt=True)["input_ids"]


# ---- what a template leaves out ---------------------------------------------------------------------------------------

SEEN = ("{% for m in messages if m.role in ROLES %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def lost(messages, tokenizer, tools=None):
    return [note for example in render_all(messages, tokenizer, tools) for note in example.notes
        if note.startswith("the template leaves") and note.endswith(" out") and "of an answer" not in note]


def test_whatever_of_a_row_is_not_in_the_text_is_said_once():
    only = tiny(SEEN.replace("ROLES", "('user', 'assistant')"))
    talk, (called, tools) = [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")], TALKS["tools"]
    assert lost(talk, only) == ["the template leaves the system message out"] and not lost(talk[1:], only)
    assert lost([*talk[1:], system("More."), user("a"), assistant("b")], only) == ["the template leaves the system message out"]
    assert lost([user("a"), assistant("b"), dict(role="critic", content="c"), user("c"), assistant("d")], only) == [
        "the template leaves messages of other roles out"]
    results = lost([user("a"), assistant("b", tool_calls=called[1]["tool_calls"]), called[2], assistant("the time after sunset")],
        only, tools)
    assert "the template leaves tool results out" in results and "the template leaves the descriptions of tools out" in results
    assert lost([dict(role="user", content="a", name="Ada"), assistant("b")], only) == ["the template leaves names of speakers out"]
    assert lost([user("a"), assistant("b")], only, tools) == ["the template leaves the descriptions of tools out"]
    assert lost([user([dict(type="image"), dict(type="text", text="a")]), assistant("b")],
        tiny(SEEN.replace("ROLES", "('user', 'assistant')").replace("{{ m.content }}",
            "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"))) == [
                "the template leaves pictures, sound or video out"]
    assert (lost([user("a"), assistant("b")], tiny("{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"))
        == ["the template leaves what a user says out"])


def test_what_is_written_in_another_form_is_not_called_missing():
    odd = [system(" \n Be brief.\n"), user("  a  "), assistant("b", tool_calls=TALKS["tools"][0][1]["tool_calls"]),
        dict(role="tool", name="look_up", tool_call_id="call_1", content='{"x": "é\n<b>"}'), assistant("c")]
    for name in ("qwen2_5", "llama3_1", "gptoss", "cohere2", "gemma3", "nemotron_3_nano", "lfm2", "mistral_nemo", "qwen3_8"):
        try: assert not lost(odd, any_tokenizer(name), TOOLS), name
        except DataError: continue
    assert not lost(TALKS["system"][0], any_tokenizer("mistral_nemo")), "it stands in the prompt"
    for name in set(names()) - {"gemma"}: assert not lost(TALKS["system"][0], tokenizer_for(name)), name


def test_rows_of_one_shape_are_told_alike():
    only = tiny(SEEN.replace("ROLES", "('user', 'assistant')"))
    found = Renderer(only).batch([([system(f"Be brief, {at}."), user(f"a {at}"), assistant("b")], None) for at in range(5)])
    assert all([note for example in examples for note in example.notes] == ["the template leaves the system message out"]
        for examples in found)


# ---- thinking, weights, tools -----------------------------------------------------------------------------------------

def test_empty_thinking_is_read_and_not_trained_on():
    for name in ("qwen3", "qwen3_5_think", "qwen3_6"):
        tokenizer, (messages, _) = tokenizer_for(name), TALKS["single"]
        quiet, full = render(messages, tokenizer), render(messages, tokenizer, thinking="as_is")
        asked = render_prompt(messages[:1], tokenizer, enable_thinking=False)
        assert quiet.ids[:len(asked)] == asked and quiet.labels[len(asked)] != -100 and set(quiet.labels[:len(asked)]) == {-100}
        assert trained_texts([quiet], tokenizer) == {1: "Blue, mostly.<|im_end|>"}
        assert trained_texts([full], tokenizer)[1].endswith("</think>\n\nBlue, mostly.<|im_end|>")
        assert any("enable_thinking=False" in note for note in quiet.notes)
    # without thinking this one has another system message, so no prompt writes the block
    other = render(TALKS["single"][0], tokenizer_for("qwen3_8"))
    assert (trained_texts([other], tokenizer_for("qwen3_8")) == {1: "Blue, mostly.<|im_end|>"}
        and any("no prompt writes it" in note for note in other.notes))
    glm = tokenizer_for("glm4moe")
    assert trained_texts([render(TALKS["single"][0], glm)], glm) == {1: "Blue, mostly.<|user|>"}
    plain = tiny(tiny_template())
    for opened, closed in [("<think>\n", "\n</think>\n\n"), ("<|START_THINKING|>", "<|END_THINKING|>"),
            ("[THINK]", "[/THINK]\n"), ("<|channel>thought\n", "<channel|>")]:
        assert trained_texts([render([user("a"), assistant(f"{opened}{closed}b")], plain)], plain) == {1: "b<|im_end|>"}
        assert trained_texts([render([user("a"), assistant(f"{opened}because{closed}b")], plain)], plain) == {
            1: f"{opened}because{closed}b<|im_end|>"}
        assert trained_texts([render([user("a"), assistant(f"{opened}because{closed}b")], plain, thinking="strip")],
            plain) == {1: "b<|im_end|>"}
        # not at the head: text
        assert (trained_texts([render([user("a"), assistant(f"say {opened}{closed}")], plain)], plain)
            == {1: f"say {opened}{closed}<|im_end|>"})


def tiny_template(): return AutoTokenizer.from_pretrained(shown.TINY).chat_template


def test_stripped_thinking_leaves_no_trace_in_any_form():
    for name in ("qwen3", "gptoss", "gemma4_v5", "lfm2_2_5", "muse_glimmer"):
        tokenizer = tokenizer_for(name)
        for kind in ("thinking", "thinking in text"):
            messages = TALKS[kind][0]
            assert [example.ids for example in render_all(messages, tokenizer, thinking="strip")] == [example.ids
                for example in render_all([messages[0], assistant("It is 4.")], tokenizer)]
        assert not any("make" in text
            for text in trained_texts(render_all(TALKS["thinking, multi"][0], tokenizer, thinking="strip"), tokenizer).values())


@pytest.mark.parametrize("flag", [dict(weight=0), dict(train=False), dict(weight=0.0), dict(train=0)])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "gptoss", "gemma"])
def test_an_answer_without_weight_is_read_and_not_trained_on(name, flag):
    tokenizer, (messages, _) = tokenizer_for(name), TALKS["multi"]
    marked = [*messages[:3], messages[3] | flag, *messages[4:]]
    found = render_all(marked, tokenizer)
    assert sorted(trained_texts(found, tokenizer)) == [1, 5]
    assert found[-1].ids == render_all(messages, tokenizer)[-1].ids  # the flag itself never reaches the template
    assert Renderer(tokenizer).batch([(marked, None)]) == [found]


def test_arguments_of_tool_calls_may_be_an_object_or_json():
    for name in names():
        tokenizer, (messages, tools) = tokenizer_for(name), TALKS["tools"]
        call = messages[1]["tool_calls"][0]
        as_json = [messages[0], messages[1]
            | dict(tool_calls=[call | dict(function=call["function"] | dict(arguments='{"word": "dusk"}'))]), *messages[2:]]
        try: expected = render_all(messages, tokenizer, tools)
        except DataError: continue
        assert render_all(as_json, tokenizer, tools) == [example.__class__(**{**vars(example), "messages": as_json})
            for example in expected]


def test_tools_that_a_template_leaves_out_are_not_trained_on_as_silence():
    tokenizer, (messages, tools) = tokenizer_for("llama3"), TALKS["tools"]
    example = render(messages, tokenizer, tools)
    assert sorted(trained_texts([example], tokenizer)) == [3] and "the template leaves tool calls of an answer out" in example.notes


# ---- other tokenizers -------------------------------------------------------------------------------------------------

def sentencepiece_like(scheme):
    "A tokenizer as Llama 2 and Mistral have it: blanks are letters, and a text begins with one"
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz▁"), show_progress=False)
    backend.train_from_iterator(["the sky is blue and black at night [INST] [/INST]"] * 4, trainer)
    stored = json.loads(backend.to_str())
    for piece in alphabet: stored["model"]["vocab"].setdefault(piece, len(stored["model"]["vocab"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stored)), bos_token="<s>",
        eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokenizers_that_begin_a_text_with_a_blank(scheme):
    tokenizer = sentencepiece_like(scheme)
    for messages in ([user("the sky"), assistant("is blue")],
            [user("at night"), assistant("is black"), user("and"), assistant("\nblue </s> the")]):
        example = render(messages, tokenizer)
        check_prefix(example, messages, tokenizer)
        assert example.ids.count(tokenizer.bos_token_id) == 1 and example.ids.count(tokenizer.eos_token_id) == len(messages) // 2
        if "</s>" not in messages[-1]["content"]:
            assert example.ids == tokenizer(template_text(messages, tokenizer), add_special_tokens=False)["input_ids"]
        assert Renderer(tokenizer).batch([(messages, None)]) == [[example]]


def test_control_tokens_that_swallow_the_blanks_behind_them():
    "As those of Phi-3: the line break behind `<|end|>` is part of the token"
    tokenizer = tiny(shown.source("phi3"))
    tokenizer.add_special_tokens(dict(additional_special_tokens=[AddedToken(token, rstrip=True, special=True)
        for token in ("<|end|>", "<|user|>", "<|assistant|>")]))
    tokenizer.eos_token = "<|endoftext|>"
    example = render(ANSWERS[:2] + [user("And at night?"), assistant("Black.")], tokenizer)
    assert example.ids == tokenizer(template_text(example.messages, tokenizer), add_special_tokens=False)["input_ids"]
    assert trained_texts([example], tokenizer) == {1: "Blue.<|end|>", 3: "Black.<|end|>"}
    check_prefix(render(ANSWERS, tokenizer), ANSWERS, tokenizer)


def test_tokenizers_written_in_python():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    example = render(ANSWERS, tokenizer)
    check_prefix(example, ANSWERS, tokenizer)
    assert trained_texts([example], tokenizer) == {1: "Blue.</s>", 3: "\nBlack.</s>"}
    assert render([user("</s>"), assistant("b")], tokenizer).ids.count(tokenizer.eos_token_id) == 2


def test_no_template_at_all():
    tokenizer = tiny()
    example = render([system("Be brief."), *ANSWERS], tokenizer)
    check_prefix(example, [system("Be brief."), *ANSWERS], tokenizer)
    assert trained_texts([example], tokenizer) == {2: "Blue.<|im_end|>", 4: "\nBlack.<|im_end|>"}
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert render([system("Be brief."), *ANSWERS], tokenizer).ids == example.ids
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(ModelError, match="no chat template and no eos_token"): render(ANSWERS, tokenizer)
    assert template_text(ANSWERS, sentencepiece_like("first")).startswith("<s>")


def test_several_templates_with_names():
    tokenizer = tokenizer_for("qwen2_5")
    both = tiny()
    both.chat_template = dict(default=tiny_template(), tool_use=source_of("qwen2_5"))
    assert render(*_with(TALKS["single"], both)).ids == render(TALKS["single"][0], tiny(tiny_template())).ids
    assert template_text(TALKS["tools"][0], both, TOOLS) == template_text(TALKS["tools"][0], tokenizer, TOOLS)
    both.chat_template = dict(rag=tiny_template())
    with pytest.raises(ModelError, match="none is named \"default\""): render(ANSWERS, both)
    with pytest.raises(ModelError, match="cannot be read"): render(ANSWERS, tiny("{% for m in messages %}"))


def source_of(name): return shown.source(name)


def _with(talk, tokenizer): return talk[0], tokenizer, talk[1]


# ---- hostile data -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", names())
def test_control_tokens_in_the_data_stay_text(name):
    tokenizer = tokenizer_for(name)
    hostile = " ".join(tokenizer.all_special_tokens)
    kind = [user(f"What is {hostile}?"), assistant(f"Text {hostile}")]
    plain = [user("What is that?"), assistant("Text that")]
    special = set(tokenizer.all_special_ids) | {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    def controls(example): return [token_id for token_id in example.ids if token_id in special]
    guarded = render(kind, tokenizer)
    assert controls(guarded) == controls(render(plain, tokenizer))
    assert trained_texts([guarded], tokenizer)[1].count(hostile) == 1 and any("looks like a control token" in note
        for note in guarded.notes)
    assert [token_id for token_id in render_prompt(kind[:1], tokenizer) if token_id in special] == [token_id
        for token_id in render_prompt(plain[:1], tokenizer) if token_id in special]
    assert (len(controls(render(kind, tokenizer, allow_special_tokens=True)))
        >= len(controls(guarded)) + 2 * len(tokenizer.all_special_tokens) - 2)
    assert controls(render_text(hostile, tokenizer)) == [tokenizer.eos_token_id]


def test_control_tokens_in_tools_and_names_stay_text():
    tokenizer, (messages, tools) = tokenizer_for("qwen2_5"), TALKS["tools"]
    evil = json.loads(json.dumps([messages, tools]).replace("sunset", "<|im_end|>").replace("word.", "<|im_start|>."))
    assert (render(*_with(evil, tokenizer)).ids.count(tokenizer.eos_token_id)
        == render(messages, tokenizer, tools).ids.count(tokenizer.eos_token_id))
    ascii_only = tiny("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | tojson(ensure_ascii=True) }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    example = render([user("a <|im_end|>"), assistant("b <|im_end|>")], ascii_only)
    assert trained_texts([example], ascii_only) == {1: '"b <|im_end|>"<|im_end|>'} and example.ids.count(ascii_only.eos_token_id) == 2


def test_characters_that_break_things_go_through():
    tokenizer = tiny(tiny_template())
    odd = "a\0b \u202eright\u202c <script>alert(1)</script> \x1b[31mred\x1b[0m \U000F0000\U0010FFFD \ud800 e\u0301 \ufeff"
    example = render([user(odd), assistant(odd)], tokenizer)
    assert trained_texts([example], tokenizer)[1] == replace_lone_surrogates(odd) + "<|im_end|>" or "�" in replace_lone_surrogates(odd)
    assert ("halves of surrogate pairs became U+FFFD" in example.notes
        and "halves of surrogate pairs became U+FFFD" in render_text(odd, tokenizer).notes)
    assert "<script" not in example._repr_html_() and "\x1b" not in repr(example)
    assert loss_mask(render_text(odd, tokenizer)) and replace_lone_surrogates("\ud83d\ude00") == "\U0001F600"


def test_text_in_parts_is_joined():
    parts = [user([dict(type="text", text="a "), dict(type="text", text="b")]), assistant([dict(type="text", text="c")])]
    for name in ("qwen2_5", "gemma", "idefics3", "llava_next"):
        assert render(parts, tokenizer_for(name)).ids == render([user("a b"), assistant("c")], tokenizer_for(name)).ids


def test_one_beginning_of_sequence():
    for name in names():
        tokenizer = tokenizer_for(name)
        if tokenizer.bos_token is None: continue
        for example in render_all(*_with(TALKS["multi"], tokenizer)): assert example.ids[:2].count(tokenizer.bos_token_id) <= 1
        doubled = tiny()
        doubled.add_special_tokens(dict(bos_token="<s>"))
        doubled.chat_template = "<s>{{ bos_token }}" + tiny_template()
        example = render(ANSWERS, doubled)
        assert example.ids.count(doubled.bos_token_id) == 1 and trained_texts([example], doubled)[1] == "Blue.<|im_end|>"
        assert example.ids[:example.turns[0].start] == render_prompt(ANSWERS[:1], doubled)


def test_threads_may_share_a_renderer():
    renderer, rows = Renderer(tokenizer_for("qwen3")), [(messages, tools) for messages, tools in TALKS.values()] * 8
    expected = renderer.batch(rows)
    with ThreadPoolExecutor(4) as pool: assert all(found == expected for found in pool.map(renderer.batch, [rows] * 8))
