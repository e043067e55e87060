"Questions made by hand: checked, kept at once, found again in another process, whatever the documents hold"
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_rows
from test_data_panel import HOSTILE, click, control, shown

from sage_finetune import QuestionPanel
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data.annotation import AnnotationSession, DoubtfulQuestion
from sage_finetune.data.documents import Piece, read_document
from sage_finetune.data.files import load_training_data
from sage_finetune.data.questions import read_entries
from sage_finetune.data.tasks import prepare_run

MANUAL = """# The pot

The pot holds four cups of tea and weighs 900 grams.

## Cleaning

Rinse it with hot water. Never use soap.

## Repair

A new lid costs five coins.
"""


@pytest.fixture
def manual(tmp_path):
    (tmp_path/"manual.md").write_text(MANUAL)
    return tmp_path/"manual.md"


@pytest.fixture
def panel(manual): return QuestionPanel(manual, manual.with_name("rows.jsonl"))


def write(panel, question, answer, hold=None):
    "As somebody types it"
    panel.boxes.question.value, panel.boxes.answer.value = question, answer
    if hold is not None: panel.boxes.hold.value = hold


def add(panel, question, answer, hold=None):
    write(panel, question, answer, hold)
    click(panel, "sage-add")


def lines(path): return [json.loads(line) for line in path.read_text().splitlines()]


# ---- add, go on, go back ----------------------------------------------------------------------------------------------

def test_every_control_has_its_class_and_a_name(panel):
    for css in ("question", "answer", "hold", "add", "skip", "back", "remove", "keep", "problem"):
        one = control(panel, f"sage-{css}")
        assert css == "problem" or one.description and one.tabbable is not False
    assert {"sage", "sage-question-panel"} <= set(panel.box._dom_classes)


def test_a_question_is_a_row_at_once(panel, tmp_path):
    assert "piece 1 of 3 · 0 questions" in panel.progress.value and not (tmp_path/"rows.jsonl").exists()
    add(panel, " How much tea does the pot hold? ", "Four cups.\n")
    piece = panel.session.pieces[0]
    assert lines(tmp_path/"rows.jsonl") == [dict(question="How much tea does the pot hold?", answer="Four cups.", source=piece.source())]
    assert panel.boxes.typed == ("", "") and "1 question<" in panel.progress.value and "Four cups." in panel.listed.value
    assert load_training_data(tmp_path/"rows.jsonl")[0]["answer"] == "Four cups."
    assert read_entries(tmp_path/"rows.asked.jsonl")[0]["questions"] == [("How much tea does the pot hold?", "Four cups.")]


def test_to_the_end_and_back(panel, tmp_path):
    with pytest.raises(ConfigError, match="first piece"): click(panel, "sage-back")
    assert control(panel, "sage-skip").description == "Skip piece"
    add(panel, "What does it weigh?", "900 grams.")
    assert control(panel, "sage-skip").description == "Next open piece"
    for _ in range(3): click(panel, "sage-skip")
    assert "all 3 pieces are done · 1 question" in panel.progress.value and "rows.jsonl" in panel.shown.value
    assert panel.boxes.question.disabled
    for css in ("add", "remove"):
        with pytest.raises(ConfigError): click(panel, f"sage-{css}")
    click(panel, "sage-skip")  # there is nothing behind the end
    for at in (2, 1, 0):
        click(panel, "sage-back")
        assert panel.session.at == at and not panel.boxes.question.disabled
    click(panel, "sage-skip")
    assert panel.session.piece is None  # forward again is to where one was


def test_what_is_typed_is_not_passed_over(panel):
    write(panel, "What does it weigh?", "")
    for css in ("skip", "back"):
        with pytest.raises(ConfigError, match="was not added"): click(panel, f"sage-{css}")
    assert panel.boxes.typed[0] == "What does it weigh?" and panel.session.at == 0


def test_remove_last(panel, tmp_path):
    with pytest.raises(ConfigError, match="no question to remove"): click(panel, "sage-remove")
    add(panel, "What does it weigh?", "900 grams.")
    add(panel, "How heavy is it?", "900 grams.", hold=True)
    assert len(lines(tmp_path/"rows_eval.jsonl")) == 1
    click(panel, "sage-remove")
    assert panel.boxes.typed == ("How heavy is it?", "900 grams.") and panel.boxes.hold.value
    assert not (tmp_path/"rows_eval.jsonl").exists() and len(lines(tmp_path/"rows.jsonl")) == 1
    write(panel, "a new one", "")
    click(panel, "sage-remove")
    assert panel.boxes.typed == ("a new one", "") and not (tmp_path/"rows.jsonl").exists()  # no file of no rows


# ---- what speaks against a question -----------------------------------------------------------------------------------

@pytest.mark.parametrize("question, answer, hold, said", [
    ("Who made it?", "Potters in Persia.", False, "“potters”, “persia” are not in it"),
    ("Does it weigh 950 grams?", "950 grams.", False, "“950” is not in it"),
    ("What does it weigh?", "900 grams.", True, "trained on, once more and in other words"),
    ("Whom do I ask about the pot?", "The pot: maker@pot.org", False, "personal data: e-mail address"),
    ("What is the password of the pot?", "password = 'kX9w2mQz7Lp4'", False, "secret or personal data: password")])
def test_a_doubt_is_said_and_overruled(panel, tmp_path, question, answer, hold, said):
    with pytest.raises(DoubtfulQuestion, match=said): add(panel, question, answer, hold)
    assert said in panel.problem.value and "sage-warning" in panel.problem.value and "“Keep anyway”" in panel.problem.value
    assert panel.boxes.typed == (question, answer) and not list(tmp_path.glob("rows*"))
    children = panel.box.children
    assert children[children.index(panel.problem) - 1].children[0] is panel.add_button  # directly below the buttons
    assert control(panel, "sage-keep").layout.display == ""
    click(panel, "sage-keep")
    assert panel.session.counts == (1, int(hold)) and not panel.problem.value and control(panel, "sage-keep").layout.display == "none"
    again = AnnotationSession(panel.session.pieces, tmp_path/"rows.jsonl")
    assert again.rows + again.held_out == panel.session.rows + panel.session.held_out  # what somebody insisted on stays


def test_a_doubt_is_gone_with_what_it_was_about(panel):
    with pytest.raises(DoubtfulQuestion): add(panel, "Who made it?", "Potters.")
    panel.boxes.answer.value = "Nobody knows."
    assert not panel.problem.value and control(panel, "sage-keep").layout.display == "none" and panel.failure is None
    with pytest.raises(DoubtfulQuestion, match="nobody"): click(panel, "sage-keep")  # a click that was on its way
    assert panel.session.counts == (0, 0) and not panel.boxes.question.continuous_update


@pytest.mark.parametrize("question, answer, said", [
    ("", "Four cups.", "the question is empty"), ("How much?", " \n", "the answer is empty"),
    ("How much?", "cups " * 2000, "at most 8,000"), ("what does it WEIGH", "900", "asked before")])
def test_what_cannot_be_kept(panel, question, answer, said):
    add(panel, "What does it weigh?", "900 grams.")
    with pytest.raises(ConfigError, match=said): add(panel, question, answer)
    assert said in panel.problem.value and "sage-error" in panel.problem.value and panel.session.counts == (1, 0)
    panel.session.skip()
    panel.show()
    with pytest.raises(ConfigError, match="asked before"): panel.session.add("What does it weigh?", "hot water", anyway=True)


def test_every_tenth_is_held_out_where_there_is_one_to_ask_again(tmp_path):
    pieces = [Piece(f"The lamp {at} is red or green or blue.", "lamps.md", 50 * at, 50 * at + 30, (f"Lamp {at}",)) for at in range(3)]
    panel = QuestionPanel(pieces, tmp_path/"rows.jsonl")
    for at in range(9):
        assert not panel.boxes.hold.value
        add(panel, f"Question {'abcdefghi'[at]}?", "Red.")
    assert panel.boxes.hold.value and "every tenth" in panel.boxes.hint.value
    panel.skip()
    assert not panel.boxes.hold.value  # this piece has none yet
    add(panel, "Which colour?", "Green.")
    assert panel.boxes.hold.value
    add(panel, "Is it of a colour, and which?", "green")
    assert panel.session.counts == (11, 1) and not panel.boxes.hold.value
    assert [row["question"] for row in panel.session.held_out] == ["Is it of a colour, and which?"]
    assert "11 questions, 1 held out" in panel.progress.value


# ---- kept, and found again --------------------------------------------------------------------------------------------

def run(code, folder, **options):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, **options)


def test_a_new_process_goes_on(panel, tmp_path):
    add(panel, "What does it weigh?", "900 grams.")
    click(panel, "sage-skip")
    add(panel, "What must one never use?", "Soap.")
    done = run("from sage_finetune import QuestionPanel\npanel = QuestionPanel('manual.md', 'rows.jsonl')\n"
        "print(panel.session.progress); print(panel.session.questions()[0].answer)\n"
        "panel.session.add('What is it rinsed with?', 'Hot water.')", tmp_path)
    assert done.stdout.splitlines() == ["piece 2 of 3 · 2 questions", "Soap."], done.stderr
    write(panel, "And hot?", "Water.")
    with pytest.raises(RunError, match="changed meanwhile"): click(panel, "sage-add")
    assert len(lines(tmp_path/"rows.jsonl")) == 3  # nothing of the other was lost
    again = QuestionPanel(tmp_path/"manual.md", tmp_path/"rows.jsonl")
    assert [one.answer for one in again.session.questions()] == ["Soap.", "Hot water."]


def test_kill_9_between_two_adds(manual, tmp_path):
    "What `add` has come back from is there; the file of rows is whole, be it a question behind"
    code = ("import os\nfrom sage_finetune.data.annotation import AnnotationSession\nsession = AnnotationSession('manual.md', 'rows.jsonl')\n"
        "for at in range(len(session.rows), 10**6):\n    session.add(f'What does it weigh, {chr(97 + at % 26)}{chr(97 + at // 26)}?', '900 grams.',"
        " False)\n    os.write(1, b'x')")
    before = 0
    for turn in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        said = sum(len(os.read(process.stdout.fileno(), 1)) for _ in range(3 + turn))
        process.send_signal(signal.SIGKILL)
        said += len(process.stdout.read())
        process.wait()
        assert len(lines(tmp_path/"rows.jsonl")) >= before + said - 1
        session = AnnotationSession(manual, tmp_path/"rows.jsonl")
        assert before + said <= len(session.rows) <= before + said + 1
        assert lines(tmp_path/"rows.jsonl") == session.rows  # mended as it is opened
        before = len(session.rows)


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_line_costs_no_more_than_itself(panel, tmp_path, cut):
    add(panel, "What does it weigh?", "900 grams.")
    add(panel, "How much tea does it hold?", "Four cups.")
    kept = tmp_path/"rows.asked.jsonl"
    kept.write_bytes(kept.read_bytes()[:-cut])
    (tmp_path/"rows.jsonl").unlink()
    session = AnnotationSession(tmp_path/"manual.md", tmp_path/"rows.jsonl")
    assert len(session.rows) == (2 if cut == 1 else 1)
    session.add("What does the pot hold?", "Tea.")
    assert len(AnnotationSession(tmp_path/"manual.md", tmp_path/"rows.jsonl").rows) == len(session.rows)


def test_a_document_that_was_changed(panel, manual, tmp_path):
    "An answer that is still there moves with its text; one that is not is named, and in no row; neither comes twice"
    add(panel, "How much tea does it hold?", "Four cups.")
    add(panel, "What does it weigh?", "900 grams.")
    click(panel, "sage-skip")
    add(panel, "What must one never use?", "Soap.")
    manual.write_text("Read this first, please.\n\n" + MANUAL.replace("900", "800").replace("## Cleaning", "## Washing up"))
    for _ in range(2):
        changed = QuestionPanel(manual, tmp_path/"rows.jsonl")
        rows, text = changed.session.rows, manual.read_text()
        assert [row["answer"] for row in rows] == ["Four cups.", "Soap."] and rows == lines(tmp_path/"rows.jsonl")
        for row in rows: assert row["answer"].lower().strip(".") in text[row["source"]["start"]:row["source"]["end"]].lower()
        assert rows[1]["source"]["headings"] == ["The pot", "Washing up"]
        assert "a question is about text that has changed" in changed.notes.value and "900 grams." in changed.static_html()
        assert "text has changed: in no row" in changed.static_html() and changed.session.at == 0
    changed.session.skip()
    changed.session.remove_last()
    assert "Four cups." not in str(AnnotationSession(manual, tmp_path/"rows.jsonl").rows)  # and does not come back out of the older text
    manual.write_text(MANUAL)
    assert [row["answer"] for row in AnnotationSession(manual, tmp_path/"rows.jsonl").rows] == ["900 grams.", "Soap."]


def test_documents_one_after_the_other_into_one_file(panel, tmp_path):
    add(panel, "What does it weigh?", "900 grams.")
    (tmp_path/"other.md").write_text("# Lamp\n\nThe lamp is green.\n")
    other = QuestionPanel(tmp_path/"other.md", tmp_path/"rows.jsonl")
    add(other, "Which colour is it?", "Green.")
    assert [row["source"]["file"] for row in lines(tmp_path/"rows.jsonl")] == ["other.md", "manual.md"]
    with pytest.raises(ConfigError, match="asked before"): other.session.add("What does it weigh?", "The lamp.")


def test_rows_of_somebody_else_stay(manual, panel, tmp_path):
    for name in ("theirs.jsonl", "side_eval.jsonl"):
        write_rows(tmp_path/name, [dict(question="Mine?", answer="Yes.")])
        with pytest.raises(ConfigError, match="were not made by hand here"): QuestionPanel(manual, tmp_path/name.replace("_eval", ""))
        assert lines(tmp_path/name) == [dict(question="Mine?", answer="Yes.")]
    (tmp_path/"text.jsonl").write_text("hello\n")
    with pytest.raises(ConfigError, match="were not made by hand here"): QuestionPanel(manual, tmp_path/"text.jsonl")
    add(panel, "What does it weigh?", "900 grams.")
    edited = (tmp_path/"rows.jsonl").read_text().replace("900", "901")
    (tmp_path/"rows.jsonl").write_text(edited)
    write(panel, "How much does it hold?", "Four cups.")
    with pytest.raises(ConfigError, match="were not made by hand here"): click(panel, "sage-add")
    assert (tmp_path/"rows.jsonl").read_text() == edited and panel.boxes.typed[1] == "Four cups."


def test_beside_the_questions_of_a_model(manual, tmp_path):
    "One file for both: neither reads the other's lines as its own, neither loses them"
    from sage_finetune.data.questions import keep_entry
    theirs = dict(key="0" * 32, model="m", source=dict(file="manual.md", start=0, end=9), questions=[dict(question="A?", answer="B.")])
    keep_entry(tmp_path/"rows.asked.jsonl", theirs)
    session = AnnotationSession(manual, tmp_path/"rows.jsonl")
    session.add("What does it weigh?", "900 grams.")
    assert len(session.rows) == 1 and [entry["questions"][0][0] for entry in read_entries(session.file)] == ["A?", "What does it weigh?"]
    assert len(AnnotationSession(manual, tmp_path/"rows.jsonl").rows) == 1


@pytest.mark.parametrize("beside", [dict(), dict(source=[]), dict(source=dict(file=["x"])), dict(source=dict(file="manual.md"), held_out=7),
    dict(source=dict(file="manual.md", headings=7), done="?"), dict(source=dict(file="manual.md"), questions=[])])
def test_lines_that_nobody_wrote(manual, tmp_path, beside):
    entry = dict(key="a", by_hand=True, questions=[dict(question="a", answer="b")]) | beside
    (tmp_path/"rows.asked.jsonl").write_text(json.dumps(entry) + "\n")
    session = QuestionPanel(manual, tmp_path/"rows.jsonl").session
    assert session.rows == [] and session.at == 0


def test_a_run_of_it(panel, tmp_path):
    add(panel, "What does it weigh?", "900 grams.")
    add(panel, "How heavy is it?", "900 grams.", hold=True)
    folder = prepare_run("qa", tmp_path/"run", data=tmp_path/"rows.jsonl", eval_path=tmp_path/"rows_eval.jsonl")
    made = next(folder.glob("training_data_*"))
    assert "What does it weigh?" in made.read_text() and "How heavy" not in made.read_text()
    held_out = Path(json.loads((folder/"training_config.json").read_text())["eval_path"])
    assert held_out.parent == folder and "How heavy" in held_out.read_text()


# ---- hostile, empty, unwritable ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [*HOSTILE, "</textarea><script>alert(1)</script>", "' onfocus=alert(1) x='"])
def test_hostile_text_is_text(tmp_path, text):
    document = tmp_path/"<img src=x onerror=alert(1)>.md"
    document.write_text(f"# A {text} heading\n\nThree words of {text} here.\n")
    panel = QuestionPanel(document, tmp_path/"rows.jsonl")
    panel.session.add(f"What is {text}?", f"Three words {text}.", anyway=True)
    panel.show()
    with pytest.raises(DoubtfulQuestion): add(panel, f"Who {text}?", f"alpha beta gamma delta epsilon zeta eta theta {text}")
    page = shown(panel)
    assert not re.search(r"(?i)<(img|script|/textarea|h1|/table><h1)|\x1b|\u202e", page.replace("</table></div>", "")), page
    assert "Three words" in page and lines(tmp_path/"rows.jsonl")[0]["question"] == f"What is {text}?"


def test_lines_that_only_some_programs_break(panel, tmp_path):
    "U+2028 and the like inside a text end no line of a file"
    add(panel, "What does it\u2028weigh\x85?", "900 grams.")
    panel.session.add("How\u2029heavy?", "900 grams.")
    assert len(AnnotationSession(tmp_path/"manual.md", tmp_path/"rows.jsonl").rows) == 2 == len(load_training_data(tmp_path/"rows.jsonl"))


def test_nothing_to_read(tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(DataError, match="no row could be made"): QuestionPanel(tmp_path/"empty", tmp_path/"rows.jsonl")
    with pytest.raises(DataError, match="is not there"): QuestionPanel(tmp_path/"nowhere", tmp_path/"rows.jsonl")
    with pytest.raises(DataError, match="no pieces"): QuestionPanel([], tmp_path/"rows.jsonl")
    for path in ("rows.csv", "rows.asked.jsonl"):
        with pytest.raises(ConfigError, match="no file for rows"): QuestionPanel(tmp_path/"empty", tmp_path/path)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_left_out_is_said(tmp_path):
    (tmp_path/"docs").mkdir()
    (tmp_path/"docs"/"a.md").write_text("# Key\n\npassword = 'kX9w2mQz7Lp4' is the key.\n\n# Lamp\n\nThe lamp is green.\n")
    (tmp_path/"docs"/"b.pdf").write_bytes(b"no pdf")
    panel = QuestionPanel(tmp_path/"docs", tmp_path/"rows.jsonl")
    said = panel.notes.value
    assert len(panel.session.pieces) == 1 and "1 piece with what seems to be a secret is left out" in said and "b.pdf" in said
    assert "kX9w2mQz7Lp4" not in shown(panel)


def test_two_documents_of_one_name(tmp_path):
    "Each keeps its questions, whichever is opened"
    for name in ("first", "second"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"README.md").write_text(f"# The {name} project\n\nThe {name} project needs four cups of tea.\n")
        session = AnnotationSession(tmp_path/name/"README.md", tmp_path/"rows.jsonl")
        session.add(f"How much tea does the {name} project need?", "Four cups.")
    for name in ("first", "second"):
        session = AnnotationSession(tmp_path/name/"README.md", tmp_path/"rows.jsonl")
        assert len(session.rows) == 2 == len(lines(tmp_path/"rows.jsonl")) and len(session.questions()) == 1 and not session.outdated


def test_a_column_that_somebody_added_is_not_lost(manual, tmp_path):
    AnnotationSession(manual, tmp_path/"rows.jsonl").add("What does it weigh?", "900 grams.")
    row, = lines(tmp_path/"rows.jsonl")
    (tmp_path/"rows.jsonl").write_text(json.dumps(row | dict(context="Of the pot.")) + "\n")
    with pytest.raises(ConfigError, match="were not made by hand here"): AnnotationSession(manual, tmp_path/"rows.jsonl")


def test_pieces_that_are_given_are_asked_about_once_and_without_secrets(manual):
    pieces = AnnotationSession(manual).pieces
    secret = pieces[0]._replace(text="password = 'kX9w2mQz7Lp4'")
    session = AnnotationSession([*pieces, pieces[0], secret])
    assert session.pieces == pieces and "1 piece with what seems to be a secret" in session.notes[0]
    with pytest.raises(DataError, match="seem to hold a secret"): AnnotationSession([secret])


def test_a_place_that_cannot_be_written(manual, tmp_path):
    panel = QuestionPanel(manual, tmp_path/"file"/"rows.jsonl")
    (tmp_path/"file").write_text("")
    write(panel, "What does it weigh?", "900 grams.")
    with pytest.raises(RunError, match="is a file, not a folder"): click(panel, "sage-add")
    assert "name for the rows" in panel.problem.value and "output_dir" not in panel.problem.value
    assert panel.boxes.typed[1] == "900 grams." and panel.session.counts == (0, 0)


def test_the_page_that_stays(panel):
    assert "piece 1 of 3" in panel.static_html() and "sage-line" not in panel.static_html()
    add(panel, "What does it weigh?", "900 grams.")
    add(panel, "How heavy is it?", "900 grams.", hold=True)
    page = panel.static_html()
    assert page.count("<tr>") == 3 and "held out" in page and "manual.md › The pot" in page
    assert repr(panel).startswith("QuestionPanel: piece 1 of 3 · 2 questions, 1 held out\n")


def test_many_questions(tmp_path):
    "A file is read and written in time, and the table says what it leaves out"
    pieces = [Piece(f"Lamp number {at} is green.", "lamps.md", 40 * at, 40 * at + 25) for at in range(3)]
    session = AnnotationSession(pieces, tmp_path/"rows.jsonl")
    for at in range(210): session.add(f"Which colour has lamp {at}?", "Green.", held_out=False)
    session.skip()
    again = AnnotationSession(pieces, tmp_path/"rows.jsonl")
    assert (again.at, len(again.rows)) == (1, 210) and "10 more" in repr(again)


def test_pieces_are_those_of_the_document(manual, tmp_path):
    assert AnnotationSession(manual, tmp_path/"rows.jsonl").pieces == read_document(manual)
    assert len(AnnotationSession(Path(manual), tmp_path/"rows.jsonl", max_characters=100).pieces) == 3
