"""What a row says about itself: marks that it is not to be trained on, pictures, thinking, two answers to compare;
and what nobody reads is named."""
import json
import re

import pytest

from sage_finetune.core.errors import DataError
from sage_finetune.data.dataset import prepare
from sage_finetune.data.eval_split import split
from sage_finetune.data.report import report_from_dict, report_to_dict
from sage_finetune.data.rows import RowError, Sample, UntrainedRow, detect_data_format, read_row, to_messages
from sage_finetune.data.tasks import TASKS, file_rows
from sage_finetune.modeling.tokenizer import load_tokenizer

ASK, TELL = dict(role="user", content="2 + 2?"), dict(role="assistant", content="Four.")
TALK = [ASK, TELL]
QA = dict(question="2 + 2?", answer="Four.")
NO = [dict(loss=False), dict(loss_weight=0), dict(loss_weight=0.0), dict(training=False), dict(masked=True),
      dict(trainable="false"), dict(weight=0), dict(train="False"), dict(loss_mask=0),
      dict(mask="1"), dict(is_trainable=0), dict(Loss="0"), dict(ignore=True), dict(compute_loss=False),
      dict(loss_scale="0.0"), dict(sample_weight=0)]
YES = [dict(loss=True), dict(loss_weight=1.0), dict(training="true"), dict(masked=False), dict(trainable=1),
       dict(weight="1"), dict(train=True), dict(loss_mask=1), dict(mask="User"), dict(loss=None),
       dict(weight=""), dict(train=float("nan"))]


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("tiny")


def refusal(row, **options):
    "The sentence with which a row is refused"
    with pytest.raises(RowError) as caught: read_row(row, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def trained_text(rows, tokenizer, **options):
    "What of some rows is trained on, and the report"
    prepared = prepare(rows, tokenizer, show=False, **options)
    ids = [token for row in prepared.train for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    return tokenizer.decode(ids), prepared.report


# ---- marks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark", NO, ids=str)
def test_a_turn_that_is_not_to_be_trained_on(mark):
    for key in ("messages", "conversations"):
        messages = to_messages({key: [*TALK, ASK, dict(TELL, **mark)]})
        assert messages[-1].get("weight") == 0 or messages[-1].get("train") is False
        assert messages[1] == TELL
        assert "so there is nothing to train on" in refusal({key: [ASK, dict(TELL, **mark)]})


@pytest.mark.parametrize("mark", NO, ids=str)
@pytest.mark.parametrize("row", [QA, dict(text="Four."), dict(messages=TALK), dict(prompt="2 + 2?", completion="Four."),
    dict(instruction="2 + 2?", output="Four.")], ids=lambda row: next(iter(row)))
def test_a_row_that_is_not_to_be_trained_on(mark, row):
    with pytest.raises(UntrainedRow, match="the row says that it is not to be trained on: "): read_row(row | mark)


@pytest.mark.parametrize("mark", YES, ids=str)
def test_marks_that_change_nothing(mark):
    assert read_row(QA | mark).messages == TALK and read_row(dict(text="Four.", **mark)).text == "Four."
    last = to_messages(dict(messages=[ASK, dict(TELL, **mark)]))[-1]
    assert last.get("weight", 1) == 1 and last.get("train", True) is True


@pytest.mark.parametrize("mark, says", [
    (dict(loss_weight=0.5), "has loss_weight=0.5. It is true (train on this"), (dict(weight=2), "has the weight 2"),
    (dict(loss="no idea"), "has loss='no idea'"), (dict(masked=[0.5]), "has masked"),
    (dict(masked="partly"), "has masked='partly'. It is true (do not) or false (train on this"), (dict(trainable={}), "has trainable={}"),
    (dict(loss=False, train=True), "marks that contradict each other: loss says do not train, train says train"),
    (dict(weight=1, masked=True), "contradict each other: weight says train, masked says do not train")], ids=str)
def test_marks_that_cannot_be_honoured(mark, says):
    if not isinstance(mark.get("masked"), list): assert says in refusal(QA | mark)
    assert says in refusal(dict(messages=[ASK, dict(TELL, **mark), *TALK]))


@pytest.mark.parametrize("name", ["loss_mask", "train", "weight"])
def test_a_list_of_marks_is_one_for_each_turn(name):
    four = [*TALK, dict(ASK, content="Sure?"), TELL]
    assert [turn.get("weight") for turn in to_messages(dict(messages=four, **{name: [0, 0, 0, 1]}))] == [None, 0, None, None]
    assert ([turn.get("weight") for turn in to_messages(dict(messages=four, system="Be brief.", **{name: [0, 1, 0, False]}))]
        == [None, None, None, None, 0])
    assert f"the field '{name}' has 3 marks for 4 turns. Write one mark a turn" in refusal(dict(messages=four, **{name: [0, 1, 0]}))
    assert "nothing to train on" in refusal(dict(messages=four, **{name: [0, 0, 0, 0]}))
    assert "a text has none" in refusal(dict(text="Four.", **{name: [0, 1]}))


def detail(*parts): return [dict(begin_offset=start, end_offset=end, train=train) for start, end, train in parts]


def test_marks_of_stretches_count_when_they_mean_the_whole_turn():
    read = lambda marks: to_messages(dict(messages=[*TALK, ASK, dict(TELL, train_detail=marks)]))[-1]
    assert read(detail((0, 4, False)))["weight"] == 0 and read(detail((0, 1, False), (2, 4, False)))["weight"] == 0
    assert read(json.dumps(detail((0, 4, True))))["weight"] == 1 and read([]) == read(None) == TELL
    for parts in (detail((0, 1, False)), detail((0, 1, False), (2, 4, True))):
        assert "train_detail of turn 2 marks a part of the text" in refusal(dict(messages=[ASK, dict(TELL, train_detail=parts)]))
    assert "train_detail of turn 2 cannot be read" in refusal(dict(messages=[ASK, dict(TELL, train_detail=["x"])]))


# ---- good and bad answers ---------------------------------------------------------------------------------------------

PAIR = dict(prompt="2 + 2?", completion="Five.")


@pytest.mark.parametrize("row", [PAIR | dict(label=False), PAIR | dict(label=0), PAIR | dict(label="false"),
    PAIR | dict(label="undesirable"), dict(messages=TALK, label=False), dict(messages=TALK, kto_tag=False),
    dict(conversations=TALK, kto_tag="false"), dict(instruction="a", output="b", kto_tag=False), QA | dict(label=False),
    QA | dict(undesirable=True), QA | dict(desirable=False), PAIR | dict(chosen=False), PAIR | dict(rejected=True),
    dict(prompt=[ASK], completion=[TELL], label=False)], ids=str)
def test_undesirable_answers_are_not_taught(row):
    with pytest.raises(UntrainedRow): read_row(row)


@pytest.mark.parametrize("row", [PAIR | dict(label=True), PAIR | dict(label=1), PAIR | dict(label="maths"),
    dict(messages=TALK, kto_tag=True), QA | dict(label=0), QA | dict(label="negative"), dict(text="a", label=0),
    dict(question="Is it?", answer="no", label=False), PAIR | dict(label=None), QA | dict(chosen=True)], ids=str)
def test_labels_that_say_nothing_against_an_answer(row):
    assert read_row(row)


def test_rows_that_are_not_to_be_trained_on_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [dict(prompt=f"{at} + 1?", completion=f"{'Right' if at % 4 else 'Wrong'} {at}.", label=bool(at % 4)) for at in range(200)]
    trained, report = trained_text(rows, tokenizer)
    assert ("Wrong" not in trained and trained.count("Right") == 150
        and (report.untrained, report.rows, report.examples, report.bad) == (50, 200, 150, 0))
    assert ("left out, as they say themselves that they are not to be trained on: 50 rows" in repr(report)
        and "first: the data, row 1" in repr(report))
    assert report_from_dict(json.loads(json.dumps(report_to_dict(report)))) == report
    training, held = split(rows, 0.5)
    assert len(training) + len(held) == 200
    path = tmp_path/"rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len(file_rows(TASKS["custom"], path)[0]) == 200
    with pytest.raises(DataError, match="all 50 rows say themselves that they are not to be trained on"):
        prepare(rows[::4], tokenizer, show=False)


def test_marks_hold_on_the_way_to_tokens(tokenizer):
    rows = [dict(messages=[ASK, dict(TELL, content="First."), ASK, dict(TELL, content="Second.", loss=False), ASK,
        dict(TELL, content="Third.", loss_weight=1.0)])]
    trained, _ = trained_text(rows, tokenizer)
    assert "First." in trained and "Third." in trained and "Second." not in trained


# ---- pictures, thinking, the rest -------------------------------------------------------------------------------------

@pytest.mark.parametrize("media", [dict(images=["cat.png"]), dict(image="cat.png"), dict(videos=[dict(path="a.mp4")]),
    dict(audios=["a.wav"]), dict(image_url="https://a/b.png"), dict(audio=dict(bytes=b"x", path=None)),
    dict(Image=b"png"), dict(image_1="cat.png"), dict(input_image="cat.png"), dict(image_b64="aGk="), dict(image_paths='["cat.png"]')],
    ids=str)
def test_rows_with_pictures_and_sound_are_refused(media):
    name = next(iter(media))
    for row in (QA, dict(text="<image> a cat"), dict(messages=TALK)):
        assert f"the row has '{name}', and only text can be trained on here" in refusal(row | media)
    assert f"turn 1 has '{name}'" in refusal(dict(messages=[dict(ASK, **media), TELL]))


@pytest.mark.parametrize("media", [dict(images=[]), dict(image=None), dict(videos=""), dict(audio=dict(bytes=None, path=None)),
    dict(images="[]"), dict(images=[None]), dict(image=False), dict(image_id="7"), dict(image_caption="a cat"),
    dict(audio_transcript="hello")], ids=str)
def test_empty_columns_of_pictures_are_nothing(media):
    assert read_row(QA | media).messages == to_messages(dict(messages=[dict(ASK, **media), TELL])) == TALK


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "Complex_CoT", "chain_of_thought"])
def test_thinking_beside_an_answer_belongs_to_it(name):
    unread = {}
    for row in (QA, dict(messages=TALK), dict(prompt="2 + 2?", completion="Four."), dict(instruction="2 + 2?", output="Four.")):
        assert read_row(row | {name: "2, then 2"}, unread=unread).messages == [ASK, dict(TELL, reasoning_content="2, then 2")]
    assert unread == {}
    for value in ("on", "", None, True, "high"): assert read_row(QA | {name: value}).messages == TALK
    read_row(dict(messages=[ASK, dict(TELL, reasoning_content="Mine.")], **{name: "Another."}), unread=unread)
    assert unread == {name: "Another."}
    unread = {}
    read_row(dict(text="Four.", **{name: "2, then 2"}), unread=unread)
    assert unread == {name: "2, then 2"}


def test_what_nobody_reads_is_named_once(tokenizer):
    rows = [QA | dict(source="web", id=17, empty="", none=None, tags=[]), QA | dict(source="book", id=18, score=0),
        dict(messages=[dict(ASK, date="today"), TELL], key=dict(a=1))]
    _, report = trained_text(rows, tokenizer)
    assert report.unread == {"source": '"web"', "id": "17", "score": "0", "key": '{"a": 1}', "messages[].date": '"today"'}
    assert 'source (first: "web")' in repr(report) and "id (first: 17)" in repr(report) and repr(report).count("fields not read") == 1
    assert "fields not read" not in repr(trained_text([QA], tokenizer)[1])
    assert "fields not read" in report._repr_html_()


def test_what_is_named_is_safe_to_show(tokenizer):
    secret = "ghp_" + "a1B2c3D4e5" * 4
    rows = [QA | {"<b>\x1b[31m": "\x1b[2J<script>", "api_key": secret, "many": ["x" * 10_000_000], "loop": 1}]
    _, report = trained_text(rows, tokenizer)
    assert ("\x1b" not in repr(report) and "<script>" not in report._repr_html_() and secret[:12] not in repr(report)
        and len(repr(report)) < 2000)
    _, report = trained_text([QA | {f"field {at}": at for at in range(5000)}], tokenizer)
    assert len(report.unread) <= 100 and "more" in repr(report)


def test_columns_named_by_a_map_are_read():
    unread = {}
    read_row(dict(Frage="2 + 2?", Antwort="Four.", Quelle="web"), column_map=dict(question="Frage", answer="Antwort"), unread=unread)
    assert unread == dict(Quelle="web")


# ---- two answers to compare -------------------------------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "Four."}
BAD = dict(role="assistant", content="Five.")
OLDER = [dict(role="user", content="1 + 1?"), dict(role="assistant", content="Two."), ASK]
COMPARED = {  # shape -> row, of which the better answer is "Four."
    "texts": dict(prompt="2 + 2?", chosen="Four.", rejected="Five."),
    "message lists": dict(prompt=[ASK], chosen=[TELL], rejected=[BAD]),
    "whole conversations": dict(chosen=TALK, rejected=[ASK, BAD]),
    "a prompt and whole conversations": dict(prompt="2 + 2?", prompt_id="x", chosen=TALK, rejected=[ASK, BAD],
        score_chosen=1.5, score_rejected=0.5),
    "messages and texts": dict(messages=[ASK], chosen="Four.", rejected="Five."),
    "messages and a message": dict(messages=[ASK], chosen=TELL, rejected=BAD),
    "older turns": dict(messages=OLDER, chosen="Four.", rejected="Five."),
    "older turns as JSON": dict(messages=json.dumps(OLDER), chosen=json.dumps(TELL), rejected=json.dumps(BAD)),
    "ShareGPT": dict(conversations=[HUMAN], chosen=GPT, rejected={"from": "gpt", "value": "Five."}),
    "conversation in the singular": dict(conversation=[HUMAN], chosen=[GPT], rejected=[]),
    "instruction": dict(instruction="2 + 2?", input="", chosen="Four.", rejected="Five."),
    "instruction and messages": dict(instruction="2 + 2?", chosen=[TELL], rejected=[BAD]),
    "question": dict(question="2 + 2?", chosen="Four.", rejected="Five."),
    "input": dict(input="2 + 2?", chosen="Four.", rejected="Five."),
    "responses": dict(prompt="2 + 2?", chosen_response="Four.", rejected_response="Five."),
    "answers of j and k": dict(question="2 + 2?", response_j="Four.", response_k="Five."),
    "nothing rejected": dict(messages=[ASK], chosen="Four.", rejected=None),
    "correct and incorrect": dict(question="2 + 2?", correct_answer="Four.", incorrect_answer="Five."),
    "OpenAI": dict(input=dict(messages=[ASK]), preferred_output=[TELL], non_preferred_output=[BAD]),
    "one of a talk": dict(chosen="\n\nHuman: 2 + 2?\n\nAssistant: Four.", rejected="\n\nHuman: 2 + 2?\n\nAssistant: Five."),
    "numbers": dict(instruction="2 + 2?", input="", output_1="Five.", output_2="Four.", preference=2),
    "ids": dict(prompt="2 + 2?", response_0="Five.", response_1="Four.", better_response_id=1),
    "an arena": dict(conversation_a=[ASK, BAD], conversation_b=TALK, winner="model_b"),
    "scores": dict(prompt="2 + 2?", responses=["Five.", "Four."], scores=[0.1, 0.9]),
    "ranks": dict(prompt="2 + 2?", responses=["Five.", "Four."], rank=[2, 1]),
    "a winner": dict(prompt="2 + 2?", y_w="Four.", y_l="Five."),
    "a selected one": dict(messages=[ASK], selected_response="Four.", rejected_response="Five."),
    "completions of models": dict(instruction="2 + 2?",
        completions=[dict(model="a", response="Four.", rating=5), dict(model="b", response="Five.", rating=1)]),
    "rewards": dict(prompt="2 + 2?", completions=["Five.", "Four."], rewards=[-1.5, 2]),
    "a ranking": dict(prompt="2 + 2?", answers=[dict(answer="Four.", rank=1), dict(answer="Five.", rank=2)])}


def followed(row, said):
    "The row made as the sentence says"
    if "column_map=" in said:
        start = said.index("column_map=") + 11
        return read_row(row, column_map=json.loads(said[start:said.index("}", start) + 1]))
    line = re.search(r"rows = (\[.*\])\. Comparing", said)[1]
    (made,) = eval(line, dict(rows=[row], re=re))
    return read_row(made)


@pytest.mark.parametrize("shape", COMPARED)
def test_every_shape_of_preference_rows_is_recognised_and_the_way_out_works(shape):
    row = COMPARED[shape]
    said = refusal(row)
    assert ("so it is a preference row, made for training by comparison. Here a row has one answer." in said
        and "Comparing answers (DPO, RLHF) is not done here" in said)
    with pytest.raises(RowError, match="preference row"): detect_data_format(row)
    messages = followed(row, said).messages
    assert messages[-1]["content"] == "Four." and messages[-2]["content"] == "2 + 2?"
    if "older" in shape: assert len(messages) == 4 and messages[1]["weight"] == 0, "older answers are context"


def test_the_chosen_answer_is_refused_whatever_format_is_asked_for():
    assert "preference row" in refusal(dict(messages=TALK, chosen="Four.", rejected="Five."), data_format="messages")
    assert "preference row" in refusal(QA | dict(chosen="Four.", rejected="Five."))


@pytest.mark.parametrize("row", [QA | dict(positive="a", negative="b"), QA | dict(good="a", bad="b"),
    QA | dict(answer_1="a", answer_2="b"), QA | dict(chosen_model="a", rejected_model="b"), QA | dict(response_0="a"),
    QA | dict(choices=["a", "b"]), dict(messages=TALK, chosen=True), QA | dict(winner="a"), QA | dict(responses=["a", "b"])], ids=str)
def test_rows_with_one_answer_are_no_preference_rows(row):
    assert to_messages(row) == TALK


# ---- rows that are read as what they are ------------------------------------------------------------------------------

@pytest.mark.parametrize("row, says", [
    (dict(instruction="2 + 2?", input="", output="", text="Below is an instruction: 2 + 2?"),
        "the answer in the field 'output' is empty, beside a text and the question in 'instruction'"),
    (dict(instruction="2 + 2?", output=None, text="Something."), "the answer in the field 'output' is null"),
    (dict(question="2 + 2?", answer=float("nan"), text="Something."), "the answer in the field 'answer' is null"),
    (dict(prompt="2 + 2?", completion="", text="2 + 2? Four."), "the answer in the field 'completion' is empty"),
    (dict(instruction="2 + 2?", response="", text="### 2 + 2?"), "the answer in the field 'response' is empty"),
    (dict(instruction="2 + 2?", response="Four.", text="### 2 + 2? ### Four."),
        'Pass `column_map={"output": "response"}` to train on the answer'),
    (dict(query="2 + 2?", text="2 + 2? Four."), "the text of the row holds the question in 'query' too, which would be trained on")],
    ids=str)
def test_a_question_without_its_answer_is_no_document(row, says):
    assert says in refusal(row)
    assert read_row(row, column_map=dict(text="text")).text == row["text"]
    with pytest.raises(RowError): detect_data_format(row)


@pytest.mark.parametrize("row", [dict(text="Ships pass.", source="web"), dict(text="Ships pass.", instruction="", output=None),
    dict(text="Ships pass.", prompt="Write about ships!"), dict(text="Ships pass.", output="x"),
    dict(text="Ships pass.", input="other")], ids=str)
def test_documents_stay_documents(row):
    assert read_row(row).text == "Ships pass."


@pytest.mark.parametrize("answers", [["nice", "nasty"], ("nice", "nasty"), ["a", "b", "c"]], ids=str)
def test_a_list_of_answers_is_not_glued_together(answers):
    for row in (dict(question="a", answer=answers), dict(instruction="a", output=answers), dict(prompt="a", completion=answers),
            dict(messages=[ASK, dict(TELL, content=answers)]), dict(text=answers)):
        assert (f"is a list of {len(answers)} texts. Which of them is meant is not guessed. Write a row for each, or keep one."
            in refusal(row))
    assert read_row(dict(question="2 + 2?", answer=["Four."])) == Sample(TALK, None, None, ["list of one text turned into text"])


def test_null_padding_is_not_trained_on_whatever_it_is_stored_in():
    padded = dict(x=1, y=None, deep=dict(a=None, b=[dict(c=None, d=2)]))
    call = dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="add", arguments=padded))])
    tool = dict(name="add", parameters=dict(type="object", properties=dict(x=dict(type="integer", enum=None), y=None)))
    sample = read_row(dict(messages=[ASK, call, dict(role="tool", content=dict(sum=4, rest=None)), TELL], tools=[tool]))
    assert sample.messages[1]["tool_calls"][0]["function"]["arguments"] == dict(x=1, deep=dict(b=[dict(d=2)]))
    assert sample.messages[2]["content"] == '{"sum": 4}' and sample.tools[0]["function"]["parameters"] == dict(type="object",
        properties=dict(x=dict(type="integer")))
    call["tool_calls"][0]["function"]["arguments"] = '{"x": 1, "y": null}'  # a text says what it says
    assert read_row(dict(messages=[ASK, call])).messages[1]["tool_calls"][0]["function"]["arguments"] == dict(x=1, y=None)


# ---- dialects of turns ------------------------------------------------------------------------------------------------

def parts(*texts): return [dict(text=text) for text in texts]


OTHER_DIALECTS = {
    "Gemini": dict(contents=[dict(role="user", parts=parts("2 + ", "2?")), dict(role="model", parts=parts("Four."))]),
    "turns of text": dict(messages=[dict(role="user", text="2 + 2?"), dict(role="assistant", text="Four.")]),
    "LLaMA-Factory": dict(messages=[dict(role="user", content=[dict(type="text", value="2 + 2?")]),
        dict(role="assistant", content=[dict(type="text", value="Four.")])]),
    "OpenAI's responses": dict(messages=[dict(role="user", content=[dict(type="input_text", text="2 + 2?")]),
        dict(role="assistant", content=[dict(type="output_text", text="Four.")])]),
    "capitals": dict(messages=[dict(role="USER", content="2 + 2?"), dict(role="Assistant", content="Four.")]),
    "a bot": dict(conversations=[{"from": "Human", "value": "2 + 2?"}, {"from": "bot", "value": "Four."}]),
    "a refusal": dict(messages=[ASK, dict(role="assistant", content=None, refusal="Four.")]),
    "a part that refuses": dict(messages=[ASK, dict(role="assistant", content=[dict(type="refusal", refusal="Four.")])])}


@pytest.mark.parametrize("dialect", OTHER_DIALECTS)
def test_other_dialects_become_the_same_conversation(dialect):
    assert to_messages(OTHER_DIALECTS[dialect]) == TALK


def test_thinking_and_calls_among_the_parts():
    turn = dict(role="assistant", content=[dict(type="reasoning", value="2, then 2"), dict(type="text", value="Four."),
        dict(type="tool_call", value='{"name": "add", "arguments": {"x": 2}}')])
    assert to_messages(dict(messages=[ASK, turn]))[1] == dict(TELL, reasoning_content="2, then 2",
        tool_calls=[dict(type="function", function=dict(name="add", arguments=dict(x=2)))])
    assert to_messages(dict(messages=[ASK, dict(role="assistant", content=[dict(type="thinking", thinking="2, then 2"),
        dict(type="text", text="Four.")])]))[1] == dict(TELL, reasoning_content="2, then 2")
    assert to_messages(dict(contents=[dict(role="user", parts=parts("2 + 2?")), dict(role="model", parts=parts("Four."))],
        systemInstruction=dict(parts=parts("Be brief."))))[0] == dict(role="system", content="Be brief.")


def test_turns_of_one_role_are_joined_and_that_is_said():
    more = dict(role="user", content="Please.")
    assert read_row(dict(messages=[ASK, more, TELL])) == Sample([dict(role="user", content="2 + 2?\n\nPlease."), TELL],
        None, None, ["user turns in a row joined into one"])
    assert to_messages(dict(messages=[ASK, TELL, dict(TELL, content="Sure."), more]))[1]["content"] == "Four.\n\nSure."
    assert "the answer in turn 4 is empty" in refusal(dict(messages=[ASK, more, TELL, dict(TELL, content="")])), (
        "turns are counted as they stand")
    for second in (dict(TELL, reasoning_content="Hm."), dict(TELL, train=False)):
        assert "both of role 'assistant'" in refusal(dict(messages=[ASK, TELL, second]))


def test_a_greeting_has_a_line_that_drops_it():
    row = dict(messages=[dict(role="assistant", content="Hello!"), *TALK])
    said = refusal(row)
    assert 'Begin with a user turn; row["messages"] = row["messages"][1:] drops a greeting.' in said
    row["messages"] = row["messages"][1:]
    assert to_messages(row) == TALK


# ---- from a shell -----------------------------------------------------------------------------------------------------

def test_columns_are_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    from sage_finetune.cli import main
    monkeypatch.chdir(tmp_path)
    (tmp_path/"rows.csv").write_text("Frage,Antwort,Quelle\n2 = 2?,Yes.,web\n3 + 3?,Six.,web\n", encoding="utf-8")
    assert main(["data", "rows.csv", "--column-map", "question=Frage", "--column-map", "answer=Antwort", "--show", "0"]) == 0
    assert "2 examples" in capsys.readouterr().out
    for pair in ("Frage", "=Frage", "question="):
        assert main(["data", "rows.csv", "--column-map", pair]) == 2
        assert (f"--column-map '{pair}' is no pair. Write the known name first, as in --column-map question=Frage."
            in capsys.readouterr().err)
    assert main(["data", "rows.csv", "--column-map", "Frage=question"]) == 2
    assert "wrong way round" in capsys.readouterr().err
