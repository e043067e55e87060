"""Chats as apps export them: who said what, in which order, and which reply cannot be learnt from"""
import json
import time

import pytest

from sage_finetune.core.errors import ConfigError, DataError
from sage_finetune.data.chat_logs import chat_rows, read_chat
from sage_finetune.data.files import load_training_data
from sage_finetune.data.rows import read_row, to_messages


@pytest.fixture
def written(tmp_path):
    def write(content, name="chat.txt"):
        path = tmp_path.resolve()/name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path
    return write


def said(chat): return [(message.author, message.text) for talk in chat.conversations for message in talk.messages]


def turns(row): return [(turn["role"][0], turn["content"], turn.get("weight", 1)) for turn in row["messages"]]


# ---- WhatsApp ---------------------------------------------------------------------------------------------------------

STAMPS = ["[12.03.24, 14:05:33] ", "12/03/2024, 14:05 - ", "3/12/24, 2:05 PM - ", "3/12/24, 2:05\u202fpm - ",
    "[3/12/24, 2:05:33 p.\u00a0m.] ",
    "12.03.24, 14:05 - ", "2024/03/12 14:05 - ", "2024-03-12, 14:05 - ", "12/03/2024 à 14:05 - ", "\u200e[12.03.24, 14:05:33] ",
    "[12-03-2024, 14.05.33] "]


@pytest.mark.parametrize("stamp", STAMPS)
def test_stamps_of_many_countries(written, stamp):
    chat = read_chat(written(f"{stamp}Anna B: hi: there\nsecond line\n\nfourth\n{stamp}\u202a+49 30 1234567\u202c: ok\n"))
    assert said(chat) == [("Anna B", "hi: there\nsecond line\n\nfourth"), ("+49 30 1234567", "ok")]
    assert [message.place for message in chat.conversations[0].messages] == ["lines 1 to 4", "line 5"]


@pytest.mark.parametrize("days, apart", [(("13/3/24", "14/3/24"), 24), (("3/13/24", "3/14/24"), 24), (("1/2/24", "2/2/24", "1/3/24"), 24),
    (("2/1/24", "2/2/24", "3/1/24"), 24), (("12.03.24", "13.03.24"), 24)])
def test_day_and_month_by_the_whole_file(written, days, apart):
    messages = read_chat(written("".join(f"{day}, 14:05 - A: x\n" for day in days))).conversations[0].messages
    assert messages[1].time - messages[0].time == apart * 3600


def test_noon_and_midnight(written):
    hours = "12:10 AM", "1:10 AM", "12:10 PM", "1:10 PM"
    messages = read_chat(written("".join(f"1/13/24, {hour} - A: x\n" for hour in hours))).conversations[0].messages
    assert [(message.time - messages[0].time) / 3600 for message in messages] == [0, 1, 12, 13]


@pytest.mark.parametrize("line, expected", [
    ("A: <Media omitted>", ("", "media")), ("A: <Medien ausgeschlossen>", ("", "media")), ("A: \u200eBild weggelassen", ("", "media")),
    ("A: \u200eReport.pdf • \u200e2 pages \u200edocument omitted", ("", "media")), ("A: \u200e<attached: 1-PHOTO.jpg>", ("", "media")),
    ("A: IMG-20240312-WA0001.jpg (file attached)\nlook at this", ("look at this", "media")),
    ("A: null", ("", "media")), ("A: Waiting for this message. This may take a while.", ("", "a message that did not arrive")),
    ("A: This message was deleted by admin Ben", ("", "a deleted message")),
    ("A: This message was deleted", ("", "a deleted message")), ("A: \u200eYou deleted this message.", ("", "a deleted message")),
    ("A: Du hast diese Nachricht gelöscht.", ("", "a deleted message")),
    ("A: fine \u200e<This message was edited>", ("fine", "")), ("A: gut <Diese Nachricht wurde bearbeitet.>", ("gut", "")),
    ("A: I omitted it", ("I omitted it", "")), ("A: <b>bold</b>", ("<b>bold</b>", "")), ("A: x < y and z > w", ("x < y and z > w", ""))])
def test_marks_of_the_app(written, line, expected):
    message = read_chat(written(f"12/03/2024, 14:05 - {line}\n12/03/2024, 14:05 - B: x")).conversations[0].messages[0]
    assert (message.text, message.missing) == expected


@pytest.mark.parametrize("line", ["Messages and calls are end-to-end encrypted. Tap to learn more.", "Anna added Ben",
    "Group: \u200eAnna created this group", 'Anna changed the group name from "A: b" to "C: d"', "Anna:", "x" * 80 + ": hi"])
def test_lines_of_the_app_are_no_messages(written, line):
    chat = read_chat(written(f"12/03/2024, 14:05 - {line}\n12/03/2024, 14:06 - Ben: hi\n"))
    assert said(chat) == [("Ben", "hi")] and chat.skipped.total() == 1


def talk(*lines, day="12/03/2024"): return "".join(f"{day}, {hour} - {line}\n" for hour, line in lines)


def test_turns_and_gaps(written):
    text = talk(("10:00", "Ben: hi"), ("10:01", "Ben: open?"), ("10:02", "Anna: yes"), ("10:03", "Anna: until six"),
        ("20:00", "Ben: still?"), ("20:01", "Anna: no"))
    rows = lambda **options: [turns(row) for row in chat_rows(written(text), "Anna", **options).rows]
    first, second = [("u", "hi\nopen?", 1), ("a", "yes\nuntil six", 1)], [("u", "still?", 1), ("a", "no", 1)]
    assert rows() == [first, second] and rows(gap=10) == [first + second]
    assert [turns(row) for row in chat_rows(written(text), "Ben", gap=10).rows] == [[("u", "yes\nuntil six", 1), ("a", "still?", 1)]]


def test_a_group_keeps_names(written):
    rows = chat_rows(written(talk(("10:00", "Ben: hi"), ("10:01", "Carl: hello"), ("10:02", "Anna: both of you!"))), "Anna").rows
    assert turns(rows[0]) == [("u", "Ben: hi\nCarl: hello", 1), ("a", "both of you!", 1)]


def test_flagged_replies(written):
    path = written(talk(("10:00", "Anna: alone"), ("10:01", "Ben: <Media omitted>"), ("10:02", "Anna: nice"), ("10:03", "Ben: thanks"),
        ("10:04", "Anna: welcome"), ("10:05", "Ben: This message was deleted"), ("10:06", "Anna: why?"), ("10:07", "Ben: so"),
        ("10:08", "Anna: <Media omitted>"), ("10:09", "Anna: here"), ("10:10", "Ben: bye")))
    report = chat_rows(path, "Anna")
    assert turns(report.rows[0]) == [("u", "[media]", 1), ("a", "nice", 0), ("u", "thanks", 1), ("a", "welcome", 1),
        ("u", "[a deleted message]", 1), ("a", "why?", 0), ("u", "so", 1), ("a", "[media]\nhere", 0)]
    assert [flag.reason for flag in report.flags] == ["reply before anybody asked", "reply to media", "reply to a deleted message",
        "reply with media in it"]
    assert [flag.place for flag in report.flags] == ["line 1", "line 3", "line 7", "line 9"]
    assert [turn.get("weight", 1) for turn in to_messages(report.rows[0])] == [1, 0, 1, 1, 1, 0, 1, 0]
    assert all("weight" not in turn for turn in chat_rows(path, "Anna", keep_flagged=True).rows[0]["messages"])
    assert "flagged: reply to media" in str(report) and "1 replies are trained on" in str(report)


def test_nothing_but_flagged_replies(written):
    path = written(talk(("10:00", "Ben: <Media omitted>"), ("10:01", "Anna: nice"), ("22:00", "Ben: hi"), ("22:01", "Anna: hello")))
    report = chat_rows(path, "Anna")
    assert len(report.rows) == 1 and report.skipped["conversation of flagged replies only"] == 1
    path = written(talk(("10:00", "Ben: hi"), ("10:01", "Ben: hello")))
    with pytest.raises(DataError, match="no conversation of"): chat_rows(path, "Ben")


def test_whose_messages_are_answers(written):
    path = written(talk(("10:00", "Ben: hi"), ("10:01", "Anna: hello"), ("10:02", "Ben: bye")))
    with pytest.raises(ConfigError, match=r"between people.*'Ben' \(2 messages\), 'Anna' \(1 messages\)"): chat_rows(path)
    with pytest.raises(ConfigError, match="assistant='anna' wrote nothing"): chat_rows(path, "anna")
    for gap in (0, -1, True, "6", float("nan")):
        with pytest.raises(ConfigError, match="gap="): chat_rows(path, "Anna", gap=gap)


# ---- ChatGPT ----------------------------------------------------------------------------------------------------------

def node(name, parent, role=None, text="", kind="text", **beside):
    "A node of a tree; beside: fields of its message"
    content = dict(content_type=kind, parts=[text]) if isinstance(text, str) else dict(content_type=kind, parts=text)
    message = dict(id=f"m-{name}", author=dict(role=role, name=None), content=content, create_time=1.7e9, recipient="all") | beside
    return name, dict(id=name, parent=parent, children=[], message=message if role else None)


def export(*nodes, current, **beside):
    tree = dict(nodes)
    for name, one in tree.items():
        if one["parent"] in tree: tree[one["parent"]]["children"].append(name)
    return dict(title="T", id="c", mapping=tree, current_node=current) | beside


def test_the_branch_that_was_shown_last(written):
    nodes = (node("root", None), node("s", "root", "system", "x"), node("q", "s", "user", "Which?"), node("a1", "q", "assistant", "one"),
        node("a2", "q", "assistant", "two"), node("q2", "a2", "user", "And?"), node("a3", "q2", "assistant", "three"))
    report = chat_rows(written([export(*nodes, current="a3"), export(*nodes, current="a1")], "conversations.json"))
    assert [turns(row) for row in report.rows] == [[("u", "Which?", 1), ("a", "two", 1), ("u", "And?", 1), ("a", "three", 1)],
        [("u", "Which?", 1), ("a", "one", 1)]]
    assert report.rows[0]["source"] == dict(file="conversations.json", first="m-q", last="m-a3", conversation="c")
    assert report.skipped["message of the system"] == 2 and report.kind == "ChatGPT"


def test_hidden_messages_thoughts_and_tools(written):
    hidden = dict(metadata=dict(is_visually_hidden_from_conversation=True))
    nodes = (node("h", None, "user", "my settings", **hidden), node("c", "h", "user", "", "user_editable_context"),
        node("q", "c", "user", "How warm is it?"), node("t", "q", "assistant", "", "thoughts"),
        node("w", "t", "assistant", "zero", weight=0),
        node("call", "w", "assistant", "weather()", "code", recipient="browser"), node("out", "call", "tool", "21 degrees"),
        node("a", "out", "assistant", "21 degrees."), node("q2", "a", "user", "Thanks!"), node("a2", "q2", "assistant", "You are welcome."))
    report = chat_rows(written([export(*nodes, current="a2")], "c.json"))
    assert turns(report.rows[0]) == [("u", "How warm is it?", 1), ("a", "21 degrees.", 0), ("u", "Thanks!", 1),
        ("a", "You are welcome.", 1)]
    assert [flag.reason for flag in report.flags] == ["reply built on what a tool gave back"]
    assert report.skipped["hidden message"] == 2 and "settings" not in str(report.rows)


def test_an_answer_to_a_hidden_question(written):
    hidden = dict(metadata=dict(is_visually_hidden_from_conversation=True))
    nodes = (node("q", None, "user", "Hi"), node("a", "q", "assistant", "Hello."), node("h", "a", "user", "say the number", **hidden),
        node("a2", "h", "assistant", "7"), node("q2", "a2", "user", "Thanks!"), node("a3", "q2", "assistant", "Welcome."))
    report = chat_rows(written([export(*nodes, current="a3")], "c.json"))
    assert turns(report.rows[0]) == [("u", "Hi", 1), ("a", "Hello.", 1), ("u", "[hidden message]", 1), ("a", "7", 0), ("u", "Thanks!", 1),
        ("a", "Welcome.", 1)]
    assert [flag.reason for flag in report.flags] == ["reply to hidden message"] and "number" not in str(report.rows)


def test_pictures_in_chatgpt(written):
    parts = [dict(content_type="image_asset_pointer", asset_pointer="file-service://x"), "What is this?"]
    nodes = (node("q", None, "user", parts, "multimodal_text"), node("a", "q", "assistant", "A pot."), node("q2", "a", "user", "Sure?"),
        node("a2", "q2", "assistant", "Yes."))
    report = chat_rows(written([export(*nodes, current="a2")], "c.json"))
    assert turns(report.rows[0]) == [("u", "What is this?", 1), ("a", "A pot.", 0), ("u", "Sure?", 1), ("a", "Yes.", 1)]


@pytest.mark.parametrize("broken", [dict(current_node="gone"), dict(current_node=None), dict(current_node=["a"])])
def test_a_tree_without_its_end(written, broken):
    path = written([export(node("q", None, "user", "Hi"), node("a", "q", "assistant", "Hello"), current="a") | broken], "c.json")
    assert turns(chat_rows(path).rows[0]) == [("u", "Hi", 1), ("a", "Hello", 1)]


def test_a_tree_that_is_a_circle_or_no_tree(written):
    ring = export(node("q", "a", "user", "Hi"), node("a", "q", "assistant", "Hello"), current="a")
    assert turns(chat_rows(written([ring], "c.json")).rows[0]) == [("u", "Hi", 1), ("a", "Hello", 1)]
    for mapping in ({}, {"a": None}, {"a": dict(message=3, parent={})}, {"a": dict(message=dict(content=[], author=7), parent=None)},
            {"a": dict(message=dict(content=dict(parts={}), author=dict(role=[])), parent="a")}):
        with pytest.raises(DataError): chat_rows(written([dict(mapping=mapping, current_node="a")], "c.json"))


def test_a_deep_tree_is_read_in_time(written):
    nodes = [node(str(n), str(n - 1) if n else None, ("user", "assistant")[n % 2], f"text {n}") for n in range(20_000)]
    path, start = written([export(*nodes, current="19999")], "c.json"), time.perf_counter()
    assert len(chat_rows(path).rows[0]["messages"]) == 20_000
    assert time.perf_counter() - start < 3


# ---- other JSON -------------------------------------------------------------------------------------------------------

PAIR = [("Ben", "hi"), ("Anna", "hello")]


@pytest.mark.parametrize("content, name", [
    ([dict(sender=who, text=text) for who, text in PAIR], "a.json"),
    (dict(messages=[dict(author=dict(name=who), content=text, timestamp="2024-03-12T10:00:00+00:00")
        for who, text in PAIR]), "discord.json"),
    (dict(name="Chat", type="personal_chat", messages=[dict(id=1, type="service", action="created"),
        *(dict(id=2, type="message", text_entities=[], text=[text], **{"from": who}) for who, text in PAIR)]), "telegram.json"),
    ([dict(user=who, text=text, ts="1710252300.000100", type="message") for who, text in PAIR], "slack.json"),
    ("\n".join(json.dumps(dict(speaker=who, value=text)) for who, text in PAIR) + "\n\n", "log.jsonl"),
    (dict(conversations=[dict(id="x", messages=[{"from": who, "message": text} for who, text in PAIR])]), "nested.json"),
    ([[1]], "no.json")])
def test_logs_of_people(written, content, name):
    path = written(content, name)
    if name == "no.json":
        with pytest.raises(DataError, match="holds no messages"): read_chat(path)
        return
    assert said(read_chat(path)) == PAIR
    assert turns(chat_rows(path, "Anna").rows[0]) == [("u", "hi", 1), ("a", "hello", 1)]


@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt"), ("Human", "Assistant"), ("prompter", "bot")])
def test_messages_with_roles(written, roles):
    lists = [[dict(role="system", content="Be short."), dict(role=roles[0], content="Hi"), dict(role=roles[1], content="Yes")]] * 2
    report = chat_rows(written("\n".join(json.dumps(dict(messages=one)) for one in lists), "a.jsonl"))
    assert [turns(row) for row in report.rows] == [[("s", "Be short.", 1), ("u", "Hi", 1), ("a", "Yes", 1)]] * 2
    assert [row["source"]["conversation"] for row in report.rows] == ["1", "2"]


def test_calls_of_tools_in_messages(written):
    messages = [dict(role="user", content="1 + 2?"), dict(role="assistant", content=None, tool_calls=[dict(id="x")]),
        dict(role="tool", content="3"), dict(role="assistant", content="It is 3."), dict(role="user", content="ok"),
        dict(role="assistant", content="Good.")]
    assert turns(chat_rows(written([dict(messages=messages)], "a.json")).rows[0]) == [
        ("u", "1 + 2?", 1), ("a", "It is 3.", 0), ("u", "ok", 1), ("a", "Good.", 1)]


def test_times_of_a_log_cut_it(written):
    log = [dict(sender=who, text=text, time=at) for at, (who, text) in zip((0, 1, 8 * 3600, 8 * 3600 + 1), PAIR * 2)]
    times = [dict(one, time=1_700_000_000_000 + one["time"] * 1000) for one in log]
    assert len(chat_rows(written(times, "a.json"), "Anna").rows) == 2 and len(chat_rows(written(times, "a.json"), "Anna", gap=9).rows) == 1


def test_times_cut_an_object_of_people_but_none_of_roles(written):
    "Telegram and Discord have one object for years; what a model and its user said stays together"
    at = [dict(text=text, date=1_700_000_000 + seconds, **{"from": who}) for seconds, (who, text) in zip((0, 1, 90_000, 90_001), PAIR * 2)]
    assert len(chat_rows(written(dict(name="A", messages=at), "a.json"), "Anna").rows) == 2
    roles = dict(Ben="user", Anna="assistant")
    assert len(chat_rows(written(dict(messages=[one | {"from": roles[one["from"]]} for one in at]), "b.json")).rows) == 1


@pytest.mark.parametrize("scale", [1, 1000, 10**6, 10**9])
def test_a_file_with_the_newest_first(written, scale):
    talk = [("Ben", "hi"), ("Anna", "hello"), ("Ben", "bye"), ("Anna", "see you")]
    log = [dict(sender=who, text=text, time=(1_700_000_000 + at) * scale) for at, (who, text) in enumerate(talk)]
    report = chat_rows(written(log[::-1], "a.json"), "Anna")
    assert turns(report.rows[0]) == [("u", "hi", 1), ("a", "hello", 1), ("u", "bye", 1), ("a", "see you", 1)]
    assert report.skipped["order of the file, which has the newest message first"] == 1
    assert not chat_rows(written(log, "a.json"), "Anna").skipped


# ---- all of them ------------------------------------------------------------------------------------------------------

def test_source_is_read_by_nobody(written, tmp_path):
    report = chat_rows(written(talk(("10:00", "Ben: hi"), ("10:01", "Anna: hello"))), "Anna")
    unread = {}
    assert read_row(report.rows[0], None, None, unread) == read_row(dict(messages=report.rows[0]["messages"])) and set(unread) == {"source"}
    (tmp_path/"rows.jsonl").write_text(json.dumps(report.rows[0]))
    assert load_training_data(tmp_path/"rows.jsonl") == report.rows


def test_secrets_and_personal_data(written):
    token = "ghp_" + "a1B2" * 9
    path = written(talk(("01:00", "Ben: hi"), ("01:01", f"Anna: take {token}"), ("10:00", "Ben: mail?"), ("10:01", "Anna: ada@pot.org"),
        ("20:00", "Ben: open?"), ("20:01", "Anna: yes")))
    answers = lambda **options: [row["messages"][-1]["content"] for row in chat_rows(path, "Anna", **options).rows]
    assert answers() == ["ada@pot.org", "yes"] and answers(skip_personal=True) == ["yes"] and len(answers(skip_secrets=False)) == 3
    shown = str(chat_rows(path, "Anna")) + chat_rows(path, "Anna")._repr_html_()
    assert "1 × GitHub token" in shown and "1 × e-mail address" in shown and token not in shown and "ada@" not in shown


def test_names_that_act_on_a_screen(written):
    log = [dict(sender="\x1b[31m<img src=x>\nEve", text="hi", id="\x1b[2J<b>"), dict(sender="Anna", text="hello"),
        dict(sender="\x1b[31m<img src=x>\nEve", text="<Media omitted>", file="x"), dict(sender="Anna", text="seen", id="\x1b[2J<b>")]
    path = written(log, "a.json")
    with pytest.raises(ConfigError) as error: chat_rows(path)
    report = chat_rows(path, "Anna")
    assert "\x1b" not in str(error.value) + str(report) + report._repr_html_() and "<b>" not in report._repr_html_()


@pytest.mark.parametrize("text, name", [("", "a.txt"), ("hello\nthere", "a.txt"), ("{", "a.json"), ("[" * 100_000, "a.json"),
    ("{\n{\n", "a.jsonl"),
    ("3", "a.json"), ("[null, 1, [], {}]", "a.json"), ('{"messages": {}}', "a.json"), ("x", "a.csv"), ("x", "a.zip")])
def test_what_is_no_chat(written, text, name):
    with pytest.raises(DataError): chat_rows(written(text, name))


def test_no_file_a_folder_and_bytes(tmp_path):
    with pytest.raises(DataError, match="there is no file"): chat_rows(tmp_path/"gone.txt")
    (tmp_path/"folder.txt").mkdir()
    with pytest.raises(DataError, match="a folder"): chat_rows(tmp_path/"folder.txt")
    (tmp_path/"a.txt").write_bytes(b"\xc3\x28")
    with pytest.raises(DataError, match="Save it as UTF-8"): chat_rows(tmp_path/"a.txt")


@pytest.mark.parametrize("line", ["[" * 50_000, "12/03/2024, 14:05 - " + "a " * 50_000 + ": x", "12/03/2024, 14:05 - A: <" + "x " * 50_000,
    "1/1/1, " * 20_000, "12/03/2024, 14:05 - A: \u200e" + "a" * 100_000, "99/99/9999, 99:99 - A: x"], ids=range(6))
def test_lines_made_to_be_slow(written, line):
    path, start = written(f"{line}\n" * 3 + talk(("10:00", "Ben: hi"), ("10:01", "Anna: hello"))), time.perf_counter()
    read_chat(path)
    assert time.perf_counter() - start < 2
