"""Rows: every dialect becomes the same conversation, and what cannot be trained on is refused in a sentence."""
import json
import pickle
import re
import subprocess
import sys
from datetime import date

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sage_finetune.core.errors import DataError
from sage_finetune.data.rows import (
    FORMATS,
    RowError,
    Sample,
    detect_data_format,
    format_conversation_sample,
    format_text_sample,
    read_row,
    rename_columns,
    suggest_column_map,
    to_messages,
)

ASK, TELL = dict(role="user", content="2 + 2?"), dict(role="assistant", content="Four.")
TALK = [ASK, TELL]
CALL = dict(role="assistant", content=None,
    tool_calls=[dict(id="c1", type="function", function=dict(name="add", arguments='{"first": 2}'))])
RESULT = dict(role="tool", tool_call_id="c1", name="add", content="4")
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four."}]


def refusal(row, **options):
    "The sentence with which a row is refused"
    with pytest.raises(RowError) as caught: read_row(row, **options)
    assert (caught.value.found and caught.value.expected.endswith((".", "?"))
        and str(caught.value) == f"{caught.value.found}. {caught.value.expected}")
    return str(caught.value)


# ---- the dialects -----------------------------------------------------------------------------------------------------

DIALECTS = {  # what it is -> (format, row)
    "alpaca": ("alpaca", dict(instruction="2 + 2?", output="Four.")),
    "alpaca with an empty input": ("alpaca", dict(instruction="2 + 2?", input="", output="Four.")),
    "question and answer": ("qa", dict(question="2 + 2?", answer="Four.")),
    "conversations of role and content": ("conversation", dict(conversations=TALK)),
    "conversation in the singular": ("conversation", dict(conversation=TALK)),
    "ShareGPT": ("conversation", dict(conversations=SHAREGPT)),
    "ShareGPT as JSON text": ("conversation", dict(conversations=json.dumps(SHAREGPT))),
    "messages": ("messages", dict(messages=TALK)),
    "messages as JSON text": ("messages", dict(messages=json.dumps(TALK))),
    "content in parts": ("messages",
        dict(messages=[dict(role="user", content=[dict(type="text", text="2 + "), dict(type="text", text="2?")]), TELL])),
    "null-filled keys": ("messages",
        dict(messages=[dict(turn, tool_calls=None, name=None, weight=None, **{"from": None}) for turn in TALK], tools=None)),
    "ids and dates beside the turns": ("messages", dict(id=7, messages=[dict(turn, date="today") for turn in TALK])),
    "prompt and completion": ("prompt", dict(prompt="2 + 2?", completion="Four.")),
    "prompt and completion of messages": ("prompt", dict(prompt=[ASK], completion=[TELL])),
    "a text prompt, a completion of messages": ("prompt", dict(prompt="2 + 2?", completion=[TELL])),
    "empty columns of other formats": ("qa", dict(instruction="", output=None, text=float("nan"), question="2 + 2?", answer="Four."))}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_becomes_the_same_conversation(dialect):
    name, row = DIALECTS[dialect]
    before = json.dumps(row)
    assert detect_data_format(row) == name and name in FORMATS
    assert read_row(row) == Sample(TALK, None, None, [])
    assert to_messages(row) == to_messages(row, name) == TALK
    assert json.dumps(row) == before, "the row itself was changed"


@pytest.mark.parametrize("row, asked", [
    (dict(instruction="Add.", input="2 + 2", output="Four."), "Add.\n\n2 + 2"),
    (dict(question="2 + 2?", context="Whole numbers.", answer="Four."), "Whole numbers.\n\n2 + 2?")], ids=["input", "context"])
def test_what_belongs_to_the_question_stands_with_it(row, asked):
    assert to_messages(row)[0]["content"] == asked


@pytest.mark.parametrize("row", [row for name, row in DIALECTS.values() if "text" not in row], ids=lambda row: next(iter(row)))
def test_a_system_prompt_comes_first_in_every_dialect(row):
    assert to_messages(dict(row, system="Be brief.")) == [dict(role="system", content="Be brief."), *TALK]


@pytest.mark.parametrize("history", [[["1 + 1?", "Two."]], '[["1 + 1?", "Two."]]', [("1 + 1?", "Two.")]], ids=["lists", "JSON", "tuples"])
def test_alpaca_history_comes_before_the_question(history):
    assert ([turn["content"] for turn in to_messages(dict(instruction="2 + 2?", output="Four.", history=history))]
        == ["1 + 1?", "Two.", "2 + 2?", "Four."])


def test_plain_text_stays_text():
    assert read_row(dict(text="Two and two.")) == Sample(None, "Two and two.", None, [])
    assert format_text_sample(dict(text="Two.")) == dict(text="Two.")
    with pytest.raises(DataError, match="format 'text' has no turns. Formats with turns: alpaca, qa"): to_messages(dict(text="Two."))


def test_shapes_are_told_apart_row_by_row():
    rows = [row for _, row in DIALECTS.values()] + [dict(text="Two.")]
    assert [detect_data_format(row) for row in rows] == [name for name, _ in DIALECTS.values()] + ["text"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_kept_under_one_name(key):
    assert to_messages(dict(messages=[ASK, {**TELL, key: "2, then 2"}])) == [ASK, dict(TELL, reasoning_content="2, then 2")]
    assert to_messages(dict(messages=[{**ASK, key: "x"}, TELL])) == TALK  # only an assistant thinks


@pytest.mark.parametrize("mark", [dict(weight=0), dict(weight=1), dict(train=True), dict(train=False)], ids=str)
def test_marks_of_what_to_learn_are_kept(mark):
    more = [*TALK, dict(role="user", content="Sure?"), dict(TELL, **mark)]
    assert to_messages(dict(messages=more)) == more
    theirs = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four.", **mark}]
    assert to_messages(dict(conversations=SHAREGPT + theirs))[-1] == dict(TELL, **mark)


def test_a_mark_on_a_question_has_no_effect_and_is_said():
    assert read_row(dict(messages=[dict(ASK, weight=1), TELL])) == Sample(TALK, None, None,
        ["weight or train on a user turn has no effect"])
    assert read_row(dict(messages=[dict(ASK, weight=0), TELL])).notes == []


def test_only_the_completion_is_trained_on():
    "Answers inside the prompt are context"
    messages = to_messages(dict(prompt=[*TALK, ASK], completion=[TELL]))
    assert [turn.get("weight") for turn in messages] == [None, 0, None, None]


def test_developer_is_the_system():
    assert to_messages(dict(messages=[dict(role="developer", content="Be brief."), *TALK]))[0] == dict(role="system", content="Be brief.")


def test_the_same_system_prompt_twice_is_one():
    assert len(to_messages(dict(system="Be brief.", messages=[dict(role="system", content="Be brief."), *TALK]))) == 3
    assert "two system prompts" in refusal(dict(system="Be brief.", messages=[dict(role="system", content="Be long."), *TALK]))


def test_what_stands_behind_the_last_answer_is_cut_off_and_said():
    assert read_row(dict(messages=[*TALK, ASK])) == Sample(TALK, None, None, ["turns behind the last answer left out"])


@pytest.mark.parametrize("odd", ["a\0b", "a\ud800b", "\u202eright to left", "<script>alert(1)</script>", "\x1b[31mred",
    "<|im_end|>", "x" * 10_000_000], ids=lambda text: ascii(text)[:16])
def test_odd_text_is_text(odd):
    for row in (dict(instruction=odd, output=odd), dict(messages=[dict(role="user", content=odd), dict(role="assistant", content=odd)])):
        assert read_row(row) == Sample([dict(role="user", content=odd), dict(role="assistant", content=odd)], None, None, [])
    assert read_row(dict(text=odd)).text == odd


# ---- tools ------------------------------------------------------------------------------------------------------------

ADD = dict(name="add", parameters=dict(type="object", properties={}))


@pytest.mark.parametrize("arguments", ['{"first": 2}', dict(first=2)], ids=["JSON", "object"])
def test_arguments_become_an_object(arguments):
    call = dict(CALL, tool_calls=[dict(id="c1", type="function", function=dict(name="add", arguments=arguments))])
    sample = read_row(dict(messages=[ASK, call, RESULT, TELL], tools=[dict(type="function", function=ADD)]))
    assert sample.messages[1] == dict(role="assistant", content=None,
        tool_calls=[dict(id="c1", type="function", function=dict(name="add", arguments=dict(first=2)))])
    assert sample.messages[2] == RESULT and sample.tools == [dict(type="function", function=ADD)] and sample.notes == []


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [dict(type="function", function=ADD)]], ids=["bare", "JSON", "wrapped"])
def test_sharegpt_calls_and_observations(tools):
    call = dict(name="add", arguments=dict(first=2))
    for value in (json.dumps(call), json.dumps([call]), json.dumps(dict(name="add", arguments='{"first": 2}'))):
        turns = [SHAREGPT[0], {"from": "function_call", "value": value}, {"from": "observation", "value": "4"}, SHAREGPT[1]]
        sample = read_row(dict(conversations=turns, tools=tools))
        assert sample.messages == [ASK, dict(role="assistant", content=None, tool_calls=[dict(type="function", function=call)]),
            dict(role="tool", content="4"), TELL]
        assert sample.tools == [dict(type="function", function=ADD)]


def test_other_spellings_of_calls():
    bare = [ASK, dict(role="assistant", content="", tool_calls=[dict(name="add", arguments={})]),
        dict(role="tool", content=dict(sum=4)), TELL]
    messages = to_messages(dict(messages=bare))
    assert (messages[1]["tool_calls"] == [dict(type="function", function=dict(name="add", arguments={}))]
        and messages[1]["content"] is None and messages[2]["content"] == '{"sum": 4}')
    old = [ASK, dict(role="assistant", content=None, function_call=dict(name="add", arguments="")),
        dict(role="function", name="add", content="4"), TELL]
    sample = read_row(dict(messages=old, functions=[ADD]))
    assert (sample.messages[1]["tool_calls"][0]["function"] == dict(name="add", arguments={})
        and sample.messages[2] == dict(role="tool", content="4", name="add") and sample.tools)


def test_a_call_may_end_a_conversation_and_several_results_may_follow():
    assert to_messages(dict(messages=[ASK, CALL]))[-1]["tool_calls"]
    two = dict(CALL, tool_calls=CALL["tool_calls"] + [dict(CALL["tool_calls"][0], id="c2")])
    assert len(to_messages(dict(messages=[ASK, two, RESULT, dict(RESULT, tool_call_id="c2"), TELL]))) == 5


def test_a_call_may_be_written_in_the_text():
    assert len(to_messages(dict(messages=[ASK, dict(TELL, content='<tool_call>{"name": "add"}</tool_call>'),
        dict(role="tool", content="4"), TELL]))) == 4


BAD_CALLS = {
    "no JSON": (dict(function=dict(name="add", arguments='{"first": ')),
        r"the arguments of the call of 'add' in turn 2 are not JSON \(.*\). Write them as a JSON object"),
    "no object": (dict(function=dict(name="add", arguments="[2]")), "the arguments of the call of 'add' in turn 2 are of type list"),
    "no name": (dict(function=dict(arguments={})), "a call in turn 2 does not name its function"),
    "no call": ("add", "a call in turn 2 does not name its function")}


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_calls_that_cannot_be_read(fault):
    call, says = BAD_CALLS[fault]
    assert re.search(says, refusal(dict(messages=[ASK, dict(CALL, tool_calls=[call]), RESULT, TELL])))


def test_results_without_a_call():
    assert "turn 3 is the result of a tool, but turn 2 does not call one. Put the call" in refusal(dict(messages=[ASK, TELL, RESULT, TELL]))
    assert "turn 1 is the result of a tool, but no turn calls one" in refusal(dict(messages=[RESULT, TELL]))
    assert "turn 3 answers the call 'c9', but turn 2 made 'c1'" in refusal(
        dict(messages=[ASK, CALL, dict(RESULT, tool_call_id="c9"), TELL]))
    two = dict(CALL, tool_calls=CALL["tool_calls"] + [dict(CALL["tool_calls"][0], id="c2")])
    assert "turn 4 answers the call 'c9'" in refusal(dict(messages=[ASK, two, RESULT, dict(RESULT, tool_call_id="c9"), TELL]))


def test_tools_that_cannot_be_read():
    assert "the field 'tools' is a text that is not JSON" in refusal(dict(messages=TALK, tools="[{"))
    assert "the field 'tools' is not a list of objects" in refusal(dict(messages=TALK, tools=["add"]))
    for nothing in (None, [], "", "[]"): assert read_row(dict(messages=TALK, tools=nothing)).tools is None


# ---- text where text is expected --------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, text, note",
    [(4, "4", "number turned into text"), (0, "0", "number turned into text"), (4.5, "4.5", "number turned into text"),
        (True, "true", "true/false turned into text"), (False, "false", "true/false turned into text")])
def test_numbers_become_text_with_a_note(value, text, note):
    for row in (dict(question="?", answer=value), dict(instruction="?", output=value), dict(prompt="?", completion=value),
            dict(messages=[dict(ASK, content="?"), dict(TELL, content=value)])):
        assert read_row(row) == Sample([dict(role="user", content="?"), dict(role="assistant", content=text)], None, None, [note])
    assert read_row(dict(text=value)) == Sample(None, text, None, [note])


def test_numbers_in_the_question_too():
    assert read_row(dict(instruction="Double.", input=2, output="4")) == Sample(
        [dict(role="user", content="Double.\n\n2"), dict(role="assistant", content="4")], None, None, ["number turned into text"])
    assert read_row(dict(question="Double 0", context=0, answer="0")).messages[0]["content"] == "0\n\nDouble 0"


def test_dates_become_text_with_a_note():
    assert read_row(dict(question="When?", answer=date(2024, 2, 29)))[0::3] == (
        [dict(role="user", content="When?"), dict(role="assistant", content="2024-02-29")], ["date turned into text"])


def test_nan_is_nothing():
    assert read_row(dict(instruction="2 + 2?", input=float("nan"), system=float("nan"), output="Four.")) == Sample(TALK, None, None, [])
    assert refusal(dict(question="2 + 2?", answer=float("nan"))).startswith("the field 'answer' is null")


@pytest.mark.parametrize("row, says", [
    (dict(question="2 + 2?", answer=dict(text="Four.")), "the field 'answer' is of type dict, not text"),
    (dict(text=b"Four."), "the field 'text' is of type bytes, not text"),
    (dict(messages=[ASK, dict(TELL, content=dict(text="Four."))]), "the content of turn 2 (assistant) is of type dict"),
    (dict(messages=[dict(ASK, content=[dict(type="image_url", image_url="x")]), TELL]),
        "the content of turn 1 (user) has a part of 'image_url'. Only text can be trained on"),
    (dict(messages="Hi"), "the field 'messages' is a text that is not JSON"),
    (dict(messages=7), "the field 'messages' is of type int. A conversation must be a list of turns"),
    (dict(instruction="a", output="b", history="c"), "the field 'history' is a text that is not JSON"),
    (dict(instruction="a", output="b", history=["c"]), "the field 'history' is not a list of pairs")], ids=lambda value: str(value)[:40])
def test_what_is_no_text_is_said(row, says):
    assert says in refusal(row)


# ---- rows that cannot be trained on ----------------------------------------------------------------------------------

SYSTEM = dict(role="system", content="Be brief.")
BAD_TALKS = {
    "the assistant first": ([TELL, *TALK], "the assistant speaks before the user. Begin with a user turn"),
    "the assistant behind the system": ([SYSTEM, TELL], "the assistant speaks before the user"),
    "two assistants, one marked": ([*TALK, dict(TELL, weight=0)], "turns 2 and 3 are both of role 'assistant'. Join them into one turn"),
    "two users with names": ([dict(ASK, name="Ada"), dict(ASK, name="Bob"), TELL], "turns 1 and 2 are both of role 'user'. Join them"),
    "two systems": ([SYSTEM, SYSTEM, *TALK], "turns 1 and 2 are both of role 'system'"),
    "no assistant": ([ASK], "the assistant never speaks, so there is nothing to train on. Add its answer"),
    "only a system": ([SYSTEM], "the row holds only a system prompt. Add a user turn and the assistant's answer"),
    "no turns": ([], "the conversation has no turns"),
    "an empty answer": ([ASK, dict(TELL, content=" \n")], "the answer in turn 2 is empty. Remove the row or write its answer"),
    "an empty answer with thinking": ([ASK, dict(TELL, content="", reasoning="2")], "the answer in turn 2 is empty"),
    "an empty answer later": ([*TALK, ASK, dict(TELL, content="")], "the answer in turn 4 is empty"),
    "null content": ([dict(ASK, content=None), TELL], "the content of turn 1 (user) is null, not text. Write it or remove the row"),
    "no content": ([ASK, dict(role="assistant")], "the content of turn 2 (assistant) is null"),
    "a null result": ([ASK, CALL, dict(RESULT, content=None), TELL], "the content of turn 3 (tool) is null"),
    "an unknown role": ([dict(ASK, role="robot"), TELL], "turn 1 has the role 'robot'. The known roles are user, assistant"),
    "a misspelt role": ([dict(ASK, role="usr"), TELL], "turn 1 has the role 'usr'. Did you mean 'user'?"),
    "a misspelt role in capitals": ([dict(ASK, role="USR"), TELL], "Did you mean 'user'?"),
    "no role": ([dict(speaker="user", content="Hi"), TELL], "turn 1 does not say who speaks; it has 'speaker', 'content'"),
    "mixed dialects": ([dict(role="user", value="Hi"), TELL],
        "turn 1 mixes two dialects: it has 'role', 'value'. Write role and content, or from and value"),
    "both dialects": ([ASK, {**TELL, "from": "gpt"}], "turn 2 mixes two dialects"),
    "a turn of text": (["Hi", TELL], "turn 1 is of type str. A turn must be an object"),
    "a weight of a half": ([ASK, dict(TELL, weight=0.5)], "turn 2 has the weight 0.5. A weight is 1 (train on this turn) or 0"),
    "a weight of text": ([ASK, dict(TELL, weight="heavy")], "turn 2 has the weight 'heavy'"),
    "train of text": ([ASK, dict(TELL, train="yes")], "turn 2 has train='yes'. It is true (train on this turn) or false"),
    "nothing to train on by weight": ([*TALK[:1], dict(TELL, weight=0)],
        "every answer has weight 0 or train false, so there is nothing to train on. Give weight 1"),
    "nothing to train on by train": ([*TALK[:1], dict(TELL, train=False)], "every answer has weight 0 or train false")}


@pytest.mark.parametrize("fault", BAD_TALKS)
def test_conversations_that_teach_nothing_or_nonsense(fault):
    turns, says = BAD_TALKS[fault]
    for key in ("messages", "conversations"): assert says in refusal({key: turns})


def test_turns_are_counted_as_they_stand_in_the_row():
    "A system prompt from a field of its own is no turn of the list"
    assert "the answer in turn 2 is empty" in refusal(dict(system="Be brief.", messages=[ASK, dict(TELL, content="")]))
    assert "the answer in turn 3 is empty" in refusal(dict(messages=[SYSTEM, ASK, dict(TELL, content="")]))
    assert "the assistant speaks before the user" in refusal(dict(system="Be brief.", messages=[TELL]))


def test_one_weight_is_enough():
    assert len(to_messages(dict(messages=[ASK, dict(TELL, weight=0), ASK, TELL]))) == 4


@pytest.mark.parametrize("row, says", [
    (dict(question="Who?", anwser="Ada."), ("the row has the fields 'question', 'anwser'. Format 'qa' also needs 'answer'. "
        "Pass `column_map={\"answer\": \"anwser\"}` or rename the field")),
    (dict(instructon="a", output="b"), "Format 'alpaca' also needs 'instruction'. Pass `column_map={\"instruction\": \"instructon\"}`"),
    (dict(Instruction="a", Output="b"), '`column_map={"instruction": "Instruction", "output": "Output"}`'),
    ({"prompt ": "a", "completion": "b"}, '`column_map={"prompt": "prompt "}`'),
    (dict(Frage="a", Antwort="b"), 'column_map={"question": "Frage", "answer": "Antwort"}'),
    (dict(input_text="a", target="b"), 'column_map={"question": "input_text", "answer": "target"}'),
    (dict(prompt="a", response="b"), 'column_map={"completion": "response"}'),
    (dict(dialogue=TALK), 'column_map={"messages": "dialogue"}'),
    (dict(content="a"), 'column_map={"text": "content"}'),
    (dict(question="a"), "Format 'qa' also needs 'answer'. Add it or rename the field that holds it"),
    (dict(instructions="a"), "Did you mean 'instruction' by 'instructions'?"),
    (dict(colour="red", size=3), "the row has the fields 'colour', 'size', which is no known format"),
    ({}, "the row has no fields"),
    (dict(prompt="a", chosen="b", rejected="c"),
        ("the row has 'chosen' and 'rejected', so it is a preference row, made for training by comparison. Here a row has one answer. "
            'To train on the chosen ones pass `column_map={"completion": "chosen"}`')),
    (dict(chosen=TALK, rejected=TALK), '`column_map={"messages": "chosen"}`'),
    (dict(instruction="a", output=None), "the field 'output' is null. Format 'alpaca' needs text there. Fill it or remove the row"),
    (["a"], "the row is of type list. A row must be an object with named fields"),
    (7, "the row is of type int"),
    (dict(text=" \n"), "the text is empty. Write it or remove the row")], ids=lambda value: str(value)[:40])
def test_rows_of_no_known_shape(row, says):
    assert says in refusal(row)


def test_a_suggestion_works_when_it_is_followed():
    for row in (dict(Frage="2 + 2?", Antwort="Four."), dict(Instruction="2 + 2?", Output="Four."),
                {"prompt ": "2 + 2?", "completion": "Four."}, dict(input="2 + 2?", output="Four."),
                dict(query="2 + 2?", response="Four."), dict(Messages=TALK), dict(pregunta="2 + 2?", respuesta="Four."),
                dict(prompt="2 + 2?", chosen="Four.", rejected="Five.")):
        said = refusal(row)
        column_map = json.loads(said[said.index("column_map=") + 11:said.index("}") + 1])
        assert read_row(row, column_map=column_map).messages == TALK


def test_a_format_that_was_asked_for():
    row = dict(question="2 + 2?", answer="Four.", instruction="a", output="b")
    assert read_row(row, "qa").messages == TALK
    assert "the row has no 'text', which format 'text' needs. It has 'question', 'answer'" in refusal(row, data_format="text")
    assert "the field 'answer' is null" in refusal(dict(question="a", answer=None), data_format="qa")
    with pytest.raises(DataError, match="there is no format 'poem'. The known ones: alpaca, qa"): read_row(row, "poem")
    assert "of type list" in refusal(["a"], data_format="qa")


# ---- column_map -------------------------------------------------------------------------------------------------------

def test_a_column_map_names_the_columns():
    row = dict(Frage="2 + 2?", Antwort="Four.", id=7)
    column_map = dict(question="Frage", answer="Antwort")
    assert detect_data_format(row, column_map) == "qa"
    assert read_row(row, column_map=column_map).messages == to_messages(row, column_map=column_map) == TALK
    assert rename_columns(row, column_map) == dict(question="2 + 2?", answer="Four.", id=7)
    assert row == dict(Frage="2 + 2?", Antwort="Four.", id=7)


def test_a_mapped_column_wins_over_one_of_the_known_name():
    assert rename_columns(dict(output="short", long="Four.", instruction="2 + 2?"), dict(output="long")) == dict(output="Four.",
        instruction="2 + 2?")
    assert rename_columns(dict(question="a", answer="b"), dict(question="answer", answer="question")) == dict(question="b", answer="a")


def test_a_row_that_already_has_the_known_name_stays():
    assert read_row(dict(question="2 + 2?", answer="Four."), column_map=dict(question="Frage", answer="Antwort")).messages == TALK


def test_column_maps_that_cannot_work():
    row = dict(Frage="2 + 2?", Antwort="Four.")
    assert "the row has no column 'Fage', which `column_map` gives for 'question'. It has: 'Frage', 'Antwort'." == refusal(row,
        column_map=dict(question="Fage"))
    for column_map, says in [(dict(quesion="Frage"), "`column_map` has no name 'quesion'.*Known names: instruction, output"),
                             (dict(Frage="question"), "wrong way round.*Pass `column_map={'question': 'Frage'}`"),
                             (dict(question=3), "its column 3 is no text")]:
        with pytest.raises(DataError, match=says): read_row(row, column_map=column_map)


def test_an_optional_column_may_lack_and_that_is_said():
    sample = read_row(dict(Frage="2 + 2?", Antwort="Four."), column_map=dict(question="Frage", answer="Antwort", context="Kontext"))
    assert sample == Sample(TALK, None, None, ["column 'Kontext', which `column_map` gives for 'context', is not in the row"])


def test_no_suggestion_out_of_thin_air():
    for fields in ([], ["colour", "size"], ["id", "url"], ["question"], [3, None]): assert suggest_column_map(fields) == {}


# ---- the room ---------------------------------------------------------------------------------------------------------

def test_errors_survive_another_process():
    error = pickle.loads(pickle.dumps(RowError("a", "B.")))
    assert (error.found, error.expected, str(error)) == ("a", "B.", "a. B.")


def test_what_is_read_shares_no_turn_with_the_row():
    for row in (dict(messages=[dict(ASK), dict(TELL)]), dict(prompt=[dict(ASK)], completion=[dict(TELL)])):
        turns = row.get("messages") or row["prompt"] + row["completion"]
        read_row(row).messages[0]["content"] = "changed"
        assert turns == TALK


def test_conversations_are_read_without_changing_them():
    row = dict(conversations=[dict(ASK), dict(CALL), dict(RESULT), dict(TELL)])
    before = json.dumps(row)
    format_conversation_sample(row)
    read_row(row)
    assert json.dumps(row) == before


def test_the_rooms_of_rows_and_files_are_light():
    heavy = "torch, datasets, transformers, pyarrow, pandas, numpy"
    code = (f"import sys, sage_finetune.data.rows, sage_finetune.data.files; "
        f"print([name for name in {heavy.split(', ')} if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- anything at all --------------------------------------------------------------------------------------------------

NAMES = sorted({key for needed, may in FORMATS.values() for key in (*needed, *may)}
    | {"conversation", "functions", "chosen", "rejected", "role", "content", "from", "value", "weight",
        "train", "tool_calls", "function_call", "function", "name", "arguments", "id", "tool_call_id", "thinking",
        "type", "text", "Frage", "Output"})
WORDS = st.sampled_from(["", " ", "a", "user", "assistant", "system", "tool", "human", "gpt", "function_call",
    "observation", "[]", "{}", '[{"role": "user", "content": "a"}]', "[1", "\ud800", "\0"])
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=True) | WORDS | st.binary(max_size=2)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=25)
TURNS = st.lists(st.fixed_dictionaries(dict(role=WORDS, content=LEAVES)) | st.fixed_dictionaries({"from": WORDS, "value": VALUES})
    | st.fixed_dictionaries(dict(role=WORDS, content=VALUES, tool_calls=VALUES)), max_size=5)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | st.dictionaries(
    st.sampled_from(["messages", "conversations", "prompt", "completion"]), TURNS, min_size=1, max_size=2)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(ROWS | VALUES)
def test_any_row_is_read_or_refused_in_a_sentence(row):
    try: sample = read_row(row)
    except DataError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return
    assert (sample.messages is None) != (sample.text is None) and all(isinstance(note, str) for note in sample.notes)
    if sample.text is not None: return
    roles = [turn["role"] for turn in sample.messages]
    assert roles[-1] == "assistant" and set(roles) <= {"system", "user", "assistant", "tool"} and "user" in roles
    for turn in sample.messages:
        assert set(turn) <= {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "weight", "train"}
        assert isinstance(turn["content"], str) or (turn["content"] is None and turn["tool_calls"])
        for call in turn.get("tool_calls", []):
            assert isinstance(call["function"]["name"], str) and isinstance(call["function"]["arguments"], dict)
    assert read_row(dict(messages=sample.messages)).messages == sample.messages, "what was read can be read again"
