"""Text from a stranger is shown, never obeyed, hidden or lost: by whatever shows itself, in a terminal, a notebook, a picture and a log."""
import dataclasses
import enum
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import types
import typing
import unicodedata
from collections import Counter
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import prepared, rows, tiny_config, write_rows
from hypothesis import given, strategies as st
from rich.cells import cell_len

import sage_finetune
from sage_finetune.cli import main
from sage_finetune.config import LoRAConfig, PresetConfigs, TrainingConfig
from sage_finetune.core.errors import FinetuneError, RunError
from sage_finetune.core.text import (
    REPLACEMENT,
    html_table,
    safe_streams,
    sanitize_for_terminal,
    sanitize_html,
    sanitize_line,
    sanitize_repr,
    text_table,
)
from sage_finetune.runs.folder import list_runs, read_status, write_status

PAYLOAD = ("x\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\u061c\u200b\ufeff\U000e0041\ud800\u3164"
    "\r\nerror: forged\nfailed  forged\t\x85error: forged\u2028error: forged"
    "<script>alert(1)</script>\"'><img src=http://a.example/b onerror=x>[a](javascript:b) $x_1$ e" + "\u0301" * 60)


NUMBER_SIGNS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"  # format characters that are drawn


def faults(text, one_line=True):
    "What a screen would obey or not show, judged without the library's own tables; and lines that look like ours"
    joining = "\u0600-\u10ff\u1700-\u1cff\u2000-\u2bff\ua800-\uabff\ufe0f\U00010a00-\U0001ffff"
    text = re.sub(f"(?<=[{joining}])[\u200c\u200d]", "", text)  # joiners, where they join
    acts = lambda char: unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in NUMBER_SIGNS or char == "\u3164"
    wrong = [f"U+{ord(char):04X}" for char in text if char not in "\n\t" and acts(char)]
    marks = highest = 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char) == "Mn" else 0
        highest = max(highest, marks)
    if highest > 8: wrong.append(f"{highest} accents on a letter")
    if one_line: wrong += [f"the line {line[:30]!r}" for line in text.split("\n") if line.startswith(("error: forged", "failed  forged"))]
    return list(dict.fromkeys(wrong))


class Page(HTMLParser):
    "What a browser would make of HTML"
    def __init__(self, page):
        super().__init__()
        self.wrong = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "svg", "meta"): self.wrong.append(f"<{tag}>")
        for name, value in attributes:
            if name.startswith("on") or not name.replace("-", "").isalpha(): self.wrong.append(f"the attribute {name}")
            if name in ("src", "href") and not (value or "").startswith("data:image/png"): self.wrong.append(f"{name}={value}")


def page_faults(page): return faults(page, one_line=False) + Page(page).wrong


# ---- the one function -------------------------------------------------------------------------------------------------

HIDDEN = ["\x1b[31mred", "\x9b31mred", "\x1b]8;;http://a.example\x07link", "\x08\x08\x08", "\rover", "\x00", "\x7f", "\x85", "\ud800",
    "\udc9b",
    "\u202egpj.exe", "\u2066a\u2069", "\u200f", "\u061c", "pay\u200bpal", "pay\u200dpal", "я\u200cя", "\ufeffx", "\U000e0041\U000e0042",
    "a\u2028b", "a\u2029b", "\u3164", "\u115f", "\uffa0", "\u034f", "a\u00adb", "\ufff9a\ufffa",
    "a\ufe0f", "😀\U000e0100\U000e0101\U000e0102", "❤\ufe0f\ufe0f", "я\ufe0f", "é\U000e0100", "1\ufe01",
    "😀\U000e01ef", "\u200d\u200d", "\x00\u200d", "👩\u200d\u200d🚀", "\u2060", "\U0001d173", "e" + "\u0301" * 300]
KEPT = ["Grüße", "你好 日本語 한국어", "नमस्ते क्\u200dष", "نمی\u200cخواهم", "שָׁלוֹם", "ไทย ที่",
    "👩\u200d👩\u200d👧 ❤\ufe0f 👍🏽 1\ufe0f\u20e3 🇩🇪", "x₁ ≤ ½ → ∞", "tab\tline\n", "a\u00a0b", "قال ۝ ١", "བསྒྲུབས",
    "葛\U000e0100 ≨\ufe00", "café naïve Việt"]


@pytest.mark.parametrize("text", HIDDEN, ids=ascii)
def test_what_is_hidden_or_acts_leaves_a_sign(text):
    shown = sanitize_for_terminal(text)
    assert not faults(shown) and REPLACEMENT in shown and shown.encode()


@pytest.mark.parametrize("text", KEPT, ids=ascii)
def test_what_people_write_stays(text): assert sanitize_for_terminal(text) == text


@given(st.text(st.characters(), max_size=60), st.text(st.characters(), max_size=10))
def test_any_text(text, more):
    "Harmless, the same when done twice, and what was shown of a beginning stays when more comes"
    shown = sanitize_for_terminal(text)
    assert not faults(shown, one_line=False) and sanitize_for_terminal(shown) == shown
    assert sanitize_for_terminal(text + more).startswith(shown)
    assert "\n" not in sanitize_line(text) and eval(sanitize_repr(text)) == text and not faults(sanitize_repr(text))
    assert not page_faults(f'<b title="{sanitize_html(text)}">{sanitize_html(text)}</b>')


def test_a_name_forges_no_row():
    table = text_table(("run", "state"), [("a\nb  completed", "failed"), ("c\u2028d\x85e\rf\x0bg", "failed")])
    assert len(table.splitlines()) == 3


def test_columns_are_as_wide_as_a_terminal_draws_them():
    lines = text_table(("run", "state"), [(name, "|") for name in ("a", "你好", "e\u0301\u0301", "👩\u200d🚀", "한국어", "ไที่")]).splitlines()[1:]
    assert len({cell_len(line) for line in lines}) == 1


def test_a_giant_cell_is_cut():
    giant = "x" * 10**6
    assert len(text_table(("a", "b"), [(giant, PAYLOAD)])) < 10_000 and len(html_table(("a",), [(giant,)])) < 10_000


# ---- whatever shows itself --------------------------------------------------------------------------------------------

FORMS = {"__str__", "__repr__", "_repr_html_", "static_html"}


def classes():
    "Every class of the package that shows itself"
    for info in pkgutil.walk_packages(sage_finetune.__path__, "sage_finetune."):
        if info.name.rpartition(".")[2].startswith("_") or ".examples" in info.name: continue
        module = importlib.import_module(info.name)
        for one in vars(module).values():
            if inspect.isclass(one) and one.__module__ == module.__name__ and FORMS & set(vars(one)): yield one


def hostile(kind):
    "A value of a type with the payload in it"
    origin, inside = typing.get_origin(kind), [one for one in typing.get_args(kind) if one is not type(None)]
    if origin in (typing.Union, types.UnionType): return hostile(next((one for one in inside if one in (str, Path)), inside[0]))
    if origin is list: return [hostile(inside[0])] if inside else [PAYLOAD]
    if origin is tuple: return tuple(map(hostile, (one for one in inside if one is not Ellipsis)))
    if origin is dict: return {hostile(inside[0]): hostile(inside[1])}
    plain = {str: PAYLOAD, Path: Path(PAYLOAD), int: 3, float: 0.5, bool: True, list: [PAYLOAD], tuple: (PAYLOAD,), set: {PAYLOAD}}
    plain[dict] = {PAYLOAD: PAYLOAD}
    if kind in plain: return plain[kind]
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"): return filled(kind)
    return PAYLOAD  # a foreign class: whatever stands there is shown by its own text


def filled(kind, /, **given):
    "An object of a dataclass or named tuple, the payload in every text"
    hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
    names = [one.name for one in dataclasses.fields(kind) if one.init] if dataclasses.is_dataclass(kind) else kind._fields
    return kind(**{name: hostile(hints[name]) for name in names} | given)


def config(kind=TrainingConfig):
    "A config with the payload wherever it takes one"
    made = kind()
    for one in dataclasses.fields(kind):
        for value in (PAYLOAD, Path(PAYLOAD), [PAYLOAD], {PAYLOAD: PAYLOAD}):
            try: setattr(made, one.name, value)
            except FinetuneError: continue
            break
    return made


def tiny():
    from sage_finetune.modeling.tokenizer import load_tokenizer
    return load_tokenizer("tiny")


def line():
    from sage_finetune.chat_format.tokens import TokenView
    ids = tiny()("hello")["input_ids"]
    return TokenView(ids, list(ids), tiny(), names=[PAYLOAD] * len(ids), title=PAYLOAD)


def dataset():
    from sage_finetune.data.dataset import prepare_dataset
    return prepare_dataset(rows(3), tiny(), show=False)


def plan():
    from sage_finetune.training.batches import plan_batches
    return plan_batches([3, 4, 5], 2)


def cleaning_list():
    from sage_finetune.runs.cleaning import CleaningItem, CleaningList
    return CleaningList([filled(CleaningItem)])


def chat_rows():
    from sage_finetune.data.chat_logs import ChatRows
    return filled(ChatRows, skipped=Counter({PAYLOAD: 2}), rows=[
        dict(messages=[dict(role="user", content=PAYLOAD), dict(role="assistant", content=PAYLOAD)])])


def document_rows():
    from sage_finetune.data.documents import DocumentRows
    return filled(DocumentRows, files=Counter({PAYLOAD: 2}),
        rows=[dict(instruction=PAYLOAD, output=PAYLOAD)], held_out=[dict(instruction=PAYLOAD, output=PAYLOAD)])


def flagged_question():
    from sage_finetune.data.questions import FlaggedQuestion
    return FlaggedQuestion(dict(question=PAYLOAD, answer=PAYLOAD), PAYLOAD)


def question_rows():
    from sage_finetune.data.questions import QuestionRows
    return filled(QuestionRows, flagged=[flagged_question()],
        rows=[dict(question=PAYLOAD, answer=PAYLOAD)], held_out=[dict(question=PAYLOAD, answer=PAYLOAD)])


def foreign_config():
    from sage_finetune.data.foreign import ForeignConfig, Key
    return ForeignConfig(Path(PAYLOAD), {PAYLOAD: PAYLOAD}, config(), [filled(Key)], {PAYLOAD: PAYLOAD}, [{PAYLOAD: PAYLOAD}])


def report():
    from sage_finetune.data.raw_rows import BadRow
    from sage_finetune.data.report import DataReport, Note, TruncatedRow
    return filled(DataReport, notes={PAYLOAD: Note(2, PAYLOAD)}, bad_rows=[filled(BadRow)],
        long_rows=[filled(TruncatedRow)], overlong={}, bad=1)


def talk():
    from sage_finetune.inference.chat import Chat
    made = Chat(None, tiny())
    made.messages = [dict(role="user", content=PAYLOAD), dict(role=PAYLOAD, content=PAYLOAD)]
    return made


def history():
    from sage_finetune.inference.history import ChatHistory
    made = ChatHistory(PAYLOAD)
    made.messages += [dict(role="user", content=PAYLOAD), dict(role="assistant", content=PAYLOAD, weight=0)]
    return made


def both():
    from sage_finetune.inference.chat import SideBySide
    made = SideBySide.__new__(SideBySide)
    made.base = made.tuned = types.SimpleNamespace(messages=[dict(role="user", content=PAYLOAD), dict(role="assistant", content=PAYLOAD)])
    return made


def health():
    from sage_finetune.data.health import health_report
    made = health_report(dataset(), show=False)
    for one in made.findings: one.message = one.advice = PAYLOAD
    for row in made["longest rows"].figures["longest"]: row["head"] = PAYLOAD
    return made


def batch_view():
    from sage_finetune.data.collation import BatchView, collate
    return BatchView(collate([[dataset()[0]]], 0), tiny())


def survey():
    from sage_finetune.data.measurements import survey
    return survey(dataset(), tiny(), show=False)


def tasks():
    from sage_finetune.data.tasks import Task, Tasks
    return Tasks({PAYLOAD: filled(Task)})


def estimate():
    from sage_finetune.training.memory import MemoryEstimate
    return MemoryEstimate(dict(weights=10, adapter=1), "cpu", PAYLOAD)


def of(module):
    "A module that is imported when it is needed"
    return importlib.import_module(f"sage_finetune.{module}")


def score():
    from sage_finetune.inference.evaluation import Score
    return Score(1, 2, 2, [(PAYLOAD, PAYLOAD, PAYLOAD)])


def demo_report():
    from sage_finetune.inference.evaluation import Comparison
    from sage_finetune.tiny.demo import Report
    from sage_finetune.training.result import TrainingResult
    return Report(TrainingResult(Path(PAYLOAD)), score(), score(), score(), score(), Comparison([(PAYLOAD, PAYLOAD, PAYLOAD)]))


def hostile_form():
    from sage_finetune.ui.form import ConfigForm
    return ConfigForm(config(), counts=False)


def in_panel(module, name, **attributes):
    "An object with things in it as a hostile run would have put them there, without a model"
    def make():
        kind = getattr(of(module), name)
        made = kind.__new__(kind)
        for key, value in attributes.items(): setattr(made, key, value)
        return made
    return make


def chat_panel():
    from sage_finetune.inference.history import Exchange
    from sage_finetune.ui.chat_panel import ChatPanel
    made = ChatPanel.__new__(ChatPanel)
    made.turns, made.shift = [Exchange(PAYLOAD, PAYLOAD, PAYLOAD, PAYLOAD), filled(Exchange)], None
    made.session = types.SimpleNamespace(title=PAYLOAD)
    return made


def data_panel(folder):
    from sage_finetune.ui.data_panel import DataPanel
    named = folder/"a\x1b[2J\u202e<img onerror=x>"
    data = write_rows(named/"rows.jsonl", [dict(instruction=PAYLOAD, output=PAYLOAD)])
    return DataPanel(tiny_config(named, data_path=data, max_length=4096)).join()


def annotation_session(folder):
    from sage_finetune.data.annotation import AnnotationSession
    from sage_finetune.data.documents import Piece
    session = AnnotationSession([Piece(PAYLOAD, PAYLOAD, 0, 9, (PAYLOAD,))], folder/"rows.jsonl")
    session.add(PAYLOAD, PAYLOAD, anyway=True)
    session.outdated, session.notes = session.rows, [PAYLOAD]
    return session


def question_panel(folder):
    from sage_finetune.ui.question_panel import QuestionPanel
    made = QuestionPanel(annotation_session(folder).pieces, folder/"rows.jsonl")
    made.session.notes = [PAYLOAD]
    made.show()
    made.boxes.question.value, made.boxes.answer.value = f"{PAYLOAD} again", "made\u202eup \x1b[2J<script>" * 60
    made.add_button.click()
    assert made.failure
    return made


def code_corpus(folder):
    from sage_finetune.data.corpus import PHRASINGS, CodeCorpus, Fact, Skip
    return CodeCorpus(Path(PAYLOAD), 1, [filled(Fact, kind=next(iter(PHRASINGS)))], 1, [filled(Skip)])


def train_panel(folder):
    from sage_finetune.ui.train_panel import TrainPanel
    run = prepared(folder/"run\x1b[2J\u202e<script>")
    write_status(run, "failed", message=PAYLOAD)
    numbers = dict.fromkeys(("epoch", "loss", "learning_rate", "grad_norm", "tokens", "target_tokens", "seconds", "tokens_per_second"), 1)
    (run/"metrics.jsonl").write_text(json.dumps(dict(numbers, step=1, total=2, note=PAYLOAD)) + "\n", encoding="utf-8")
    return TrainPanel(run)


ARRAYS = None  # holds arrays and numbers, or what is looked at elsewhere

FACTORIES = {
    "BatchPlan": plan, "Shard": lambda: plan().shard(0, 1), "BatchView": batch_view, "PlannedStep": lambda: plan()[0],
    "_BatchArgs": lambda: plan().args,
    "_Epoch": ARRAYS, "_Pattern": ARRAYS, "_Plan": ARRAYS, "_Answer": ARRAYS, "_ShapeCache": ARRAYS, "Studio": ARRAYS, "Task": ARRAYS,
    "DataSettings": ARRAYS, "TruncationResult": ARRAYS, "TrainingSetup": ARRAYS, "_Namespace": ARRAYS, "Job": ARRAYS,
    "TokenView": line, "RenderedExample": lambda: of("chat_format.rendering").RenderedExample(line().ids, line().labels,
        [], tiny(), notes=[PAYLOAD]),
    "TokenLogprobDiff": lambda: of("inference.evaluation").TokenLogprobDiff([1, 2], [-1., -2.], [-2., -1.], tiny()),
    "Chat": talk, "ChatHistory": history,
    "SideBySide": both, "Score": score, "_Probe": ARRAYS,
    "Comparison": lambda: of("inference.evaluation").Comparison([(PAYLOAD, PAYLOAD, PAYLOAD)]), "Report": demo_report,
    "ValidatedConfig": config, "ForeignConfig": foreign_config, "CleaningList": cleaning_list, "ChatRows": chat_rows,
    "DocumentRows": document_rows, "QuestionRows": question_rows, "Endpoint": ARRAYS, "Cell": ARRAYS, "FlaggedQuestion": flagged_question,
    "PreparedDataset": dataset, "Prepared": lambda: of("data.dataset").Prepared(dataset(), None, report()), "DataReport": report,
    "Engine": in_panel("modeling.engine", "Engine", head=None, lean={PAYLOAD: 1},
        packing=types.SimpleNamespace(name=""), remarks=[PAYLOAD]),
    "EquivalenceCheck": lambda: of("modeling.engine").EquivalenceCheck(0.1,
        0.1, 0.1, 0.1, PAYLOAD, (of("modeling.engine").EquivalenceCheck(0.1, 0.1, 0.1, 0.1, PAYLOAD),)),
    "HealthReport": health, "Survey": survey, "CodeCorpus": code_corpus,
    "MemoryEstimate": estimate, "Reduction": lambda: of("training.memory").Reduction({PAYLOAD: PAYLOAD}, PAYLOAD, estimate()),
    "Measurement": lambda: of("training.memory_measurement").Measurement(estimate(), 10), "Curve": lambda: of("runs.plot").Curve(),
    "Picture": lambda: of("runs.plot").Picture(b"", PAYLOAD),
    "Runs": lambda: of("runs.folder").Runs([filled(of("runs.folder").RunInfo)]), "Tasks": tasks,
    "BatchPlanner": lambda: of("training.planner").BatchPlanner(PresetConfigs.tiny(), [3, 4]),
    "ReplayCheck": lambda: of("ui.run_watch").ReplayCheck(),
    "Diagnosis": lambda: of("ui.diagnosis").Diagnosis([filled(of("ui.diagnosis").Check, state="problem")]),
    "RunSummary": lambda: filled(of("ui.run_watch").RunSummary, losses=(1., 2.), eval_losses=(1., 2.), best=(1., 2)),
    "TrainingResult": lambda: filled(of("training.result").TrainingResult, eval_losses=[(1, 2.)], best=(1., 2)),
    "Panel": lambda: of("ui.panel").Panel(), "ConfigForm": hostile_form, "DataPanel": data_panel, "TrainPanel": train_panel,
    "ChatPanel": chat_panel, "AnnotationSession": annotation_session, "QuestionPanel": question_panel}


def text_forms(one):
    "The texts an object shows itself as, and whether its class wrote them (the standard library's show text as Python escapes it)"
    for name in ("__str__", "__repr__"):
        method = getattr(type(one), name)
        yield f"{type(one).__name__}.{name}", method(one), "sage_finetune" in getattr(getattr(method, "__code__", None), "co_filename", "")


SHOWN = sorted((kind for kind in classes() if not issubclass(kind, enum.Enum)), key=lambda kind: (kind.__module__, kind.__qualname__))


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: f"{kind.__module__.removeprefix('sage_finetune.')}.{kind.__name__}")
def test_whatever_shows_itself_is_harmless(kind, tmp_path):
    "A class that is new is filled by its types; where that cannot be done, it is added to FACTORIES"
    if issubclass(kind, BaseException): one = kind(*[PAYLOAD] * (2 if "__init__" in vars(kind) else 1))
    elif kind.__name__ in FACTORIES:
        make = FACTORIES[kind.__name__]
        if make is ARRAYS: pytest.skip("holds arrays and numbers, or what is looked at elsewhere")
        one = make(tmp_path) if "folder" in inspect.signature(make).parameters else make()
    else:
        try: one = filled(kind)
        except Exception as error:
            pytest.fail(f"{kind.__name__} shows itself and is not filled by its types ({error!r}): add it to FACTORIES")
    for name, text, own in text_forms(one):
        wrong = faults(text, one_line=not isinstance(one, BaseException) and kind.__name__ != "DataPanel")  # tokens keep their line breaks
        assert not [fault for fault in wrong if own or fault.startswith("U+") and fault != "U+3164"], f"{name} lets through {wrong}"
    for name in ("_repr_html_", "static_html"):
        if hasattr(one, name): assert not (wrong := page_faults(getattr(one, name)())), f"{kind.__name__}.{name} lets through {wrong}"


# ---- configs, errors, pictures, logs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [TrainingConfig, LoRAConfig])
def test_a_config_is_python_that_makes_it(kind):
    "Also with characters in it that are not seen"
    made = config(kind)
    assert eval(repr(made)) == made and not [fault for fault in faults(repr(made)) if fault.startswith("U+")]
    for text in ("\u3164\u115f", "e" + "\u0301" * 40, "\\\u3164", "'\"\u202e", "\ud800", "=cmd|' /C calc'!A0"):
        one = TrainingConfig(model_name=text, data_path=text)
        assert eval(repr(one)) == one and not faults(repr(one))


def test_the_text_of_an_error_is_harmless_wherever_it_is_printed():
    import traceback
    error = RunError(f"there is no folder {PAYLOAD}")
    assert not faults("".join(traceback.format_exception_only(error)), one_line=False) and error.args == (f"there is no folder {PAYLOAD}",)


def test_a_picture_names_its_runs_harmlessly(tmp_path):
    from sage_finetune.runs.plot import compare_runs
    for name in "ab":
        (tmp_path/name).mkdir()
        (tmp_path/name/"metrics.jsonl").write_text('{"step": 1, "total": 1, "loss": 1.0}\n', encoding="utf-8")
    picture = compare_runs([tmp_path/"a", tmp_path/"b"], labels=[PAYLOAD, "b"])
    mime, about = picture._repr_mimebundle_()
    assert not any(map(faults, (repr(picture), mime["text/plain"], about["image/png"]["alt"]))) and "2 runs" in repr(picture)


def test_nobody_forges_the_last_word_of_a_log(tmp_path):
    "What the model says to eval_prompts, a note and a folder's name are in the log; the sentence of its end is looked for there"
    from sage_finetune.training.callbacks import CallbackHandler
    from sage_finetune.training.loop import StepMetrics
    said = io.StringIO()
    step = filled(StepMetrics, step=1, total=1, eval_loss=1., generations=[PAYLOAD])
    out, sys.stdout = sys.stdout, said
    try: CallbackHandler(questions=[PAYLOAD]).step_end(step)
    finally: sys.stdout = out
    assert not faults(said.getvalue()) and len(said.getvalue().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such name there")
def test_the_head_of_a_log_is_one_line(tmp_path):
    from sage_finetune.runs.launch import log_lines, start_run
    run = prepared(tmp_path/"x\nerror: forged\x1b[2J")
    (run/"training_config.json").write_text("{", encoding="utf-8")
    start_run(run).wait(120)
    lines = log_lines(run)
    assert lines[-1].startswith("error: ") and "forged" not in lines[-1][:15] and not faults("\n".join(lines))
    assert (run/"train.log").read_bytes().decode("utf-8")


def test_a_status_with_half_a_character_is_written_and_read(tmp_path):
    write_status(tmp_path, "failed", message="\ud800 caf\udce9")
    status = read_status(tmp_path)
    assert status.message == "\ud800 caf\udce9" and str(status) == f"failed 0/0: {REPLACEMENT} caf{REPLACEMENT}"


# ---- screens that cannot write everything -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run whose names, rows and answers are in no 8-bit encoding"
    from sage_finetune.trainer import train_from_meta
    base = tmp_path_factory.mktemp("runs")
    data = write_rows(base/"行.jsonl", [dict(instruction="Welche Farbe hat Lampe 行 → 😀?", output="grün · 绿 \x1b[31m")] * 8)
    from sage_finetune.data.tasks import prepare_run
    made = prepare_run("custom", base/"跑 → ü", data=data, eval_ratio=0., per_device_train_batch_size=4, max_steps=2, device="cpu")
    train_from_meta(made, show=False)
    return made


SHORT = ["--max-new-tokens", "8"]
COMMANDS = {"help": ["--help"], "help of run": ["run", "--help"], "version": ["--version"], "list": ["list", "{runs}"],
    "data": ["data", "{data}", "--skip-bad"], "doctor": ["doctor", "{run}", "--no-online"], "chat": ["chat", "{run}", "-p",
    "Welche 行 → ?", *SHORT],
    "compare": ["chat", "{run}", "-p", "→", "--compare", *SHORT], "merge": ["merge", "{run}", "-o", "{out}"], "run": ["run", "{run}",
    "--overwrite"],
    "quickstart": ["quickstart", "custom", "-d", "{data}", "-o", "{out}", "--prepare-only"],
    "an error": ["run", "{runs}/没有 →"], "a wrong word": ["行 →"]}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_on_every_screen(name, encoding, run, tmp_path, monkeypatch):
    "Nothing is raised for a character; our own signs have a stand-in that can be read"
    words = [word.format(run=run, runs=run.parent, data=run.parent/"行.jsonl", out=tmp_path/"出") for word in COMMANDS[name]]
    screens = {which: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for which in ("stdout", "stderr")}
    for which, screen in screens.items(): monkeypatch.setattr(sys, which, screen)
    status = main(words)
    for screen in screens.values(): screen.flush()
    said = "".join(screen.buffer.getvalue().decode(encoding, "replace") for screen in screens.values())
    assert status == (2 if name in ("an error", "a wrong word") else 0) or name == "doctor", said
    assert said and "Traceback" not in said and "\x1b" not in said
    if name == "an error": assert said.count("\n") == 1 and said.startswith("error: there is no run folder")
    if name == "run" and encoding != "gbk": assert "->" in said and "step 1/2" in said


@pytest.mark.slow
@pytest.mark.parametrize("environment", [dict(PYTHONIOENCODING="cp1252"), dict(PYTHONIOENCODING="gbk"),
    dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")], ids=str)
@pytest.mark.parametrize("module", ["sage_finetune.cli", "sage_finetune.trainer"])
def test_the_program_itself_on_such_a_screen(module, environment, run, tmp_path):
    words = ["list", str(run.parent)] if module.endswith("cli") else [str(run), "--overwrite"]
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, env=os.environ | environment, timeout=300)
    assert b"Traceback" not in done.stderr, done.stderr
    if module.endswith("trainer") and "LC_ALL" in environment:  # Python cannot spell the folder there
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(b"error: ") and b"PYTHONUTF8=1" in done.stderr
    else: assert done.returncode == 0 and done.stdout, done.stderr


def test_a_program_without_streams_works(run, monkeypatch):
    "As under pythonw"
    for which in ("stdin", "stdout", "stderr"): monkeypatch.setattr(sys, which, None)
    assert main(["list", str(run.parent)]) == 0 and main(["run", "nowhere"]) == 2
    assert sys.stdout is None


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
@pytest.mark.parametrize("module", ["sage_finetune.cli", pytest.param("sage_finetune.trainer", marks=pytest.mark.slow)])
def test_a_reader_that_goes_is_no_error(module, tmp_path):
    "`sage-finetune list | head -1`"
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import sys; from {module} import main; sys.exit(main(['--help']))"
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, timeout=120)
    assert done.stderr == b"" and done.returncode in (0, 1)


def test_streams_are_left_as_they_were(monkeypatch):
    "Also one that was read from already, and one that is closed"
    read, closed, screen = (io.TextIOWrapper(io.BytesIO(b"a\nb\n"), encoding="ascii") for _ in range(3))
    read.readline(), closed.close()
    for which, stream in dict(stdin=read, stderr=closed, stdout=screen).items(): monkeypatch.setattr(sys, which, stream)
    with safe_streams(): print("→ 行")
    assert screen.errors == "strict" and screen.buffer.getvalue().endswith(b"-> ?\n")


@pytest.mark.parametrize("module", ["trainer", "tiny.pretrain"])
def test_words_of_a_command_line_are_quoted_harmlessly(module, capsys):
    with suppress(SystemExit): importlib.import_module(f"sage_finetune.{module}").main(["a", "--b\x1b[2J\u202e\nerror: forged"])
    assert not faults(said := capsys.readouterr().err) and "unrecognized" in said


def test_streams_of_a_closed_reader(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text): raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit), safe_streams(): print("anything")


def test_an_answer_is_streamed_harmlessly(run, monkeypatch, capsys):
    "Piece by piece as in one go: a sequence that is cut in two does not get through, and an emoji of several parts stays whole"
    from sage_finetune.commands import using
    pieces = ["a\x1b", "[31m", "👩", "\u200d", "🚀", "e", "\u0301", "\u0301" * 30, "\u202eb\n", "b"]
    using._show_answer(types.SimpleNamespace(stream=lambda text: iter(pieces)), "hi")
    shown = capsys.readouterr().out
    assert not faults(shown) and "👩\u200d🚀" in shown and shown.rstrip("\n").endswith("b\nb")


# ---- notebooks --------------------------------------------------------------------------------------------------------

def test_a_talk_loads_nothing_and_links_nowhere():
    "Markdown of a model stays text: no picture that calls out, no link that runs code"
    from sage_finetune.inference.history import Exchange
    from sage_finetune.ui.conversation_view import turns_html
    said = "![x](http://a.example/?q=secret) [a](javascript:alert(1)) <img src=http://a.example> <a href='javascript:x'>a</a>"
    page = turns_html([Exchange("hi", said, note=PAYLOAD)])
    assert not page_faults(page) and "http://a.example/?q=secret" in page


@given(st.text(max_size=40))
def test_tables_of_any_text(text):
    assert not page_faults(html_table((text, "b"), [(text, text)], caption=text))
    assert len(text_table((text, "b"), [(text, text)]).split("\n")) == 2


def test_runs_in_a_list_stay_one_line_each(tmp_path):
    for name in ("a\nb  forged", "c\x1b[2J", "d\u202e"):
        write_status(prepared(tmp_path/"runs"/name), "failed", message=PAYLOAD)
    shown = list_runs(tmp_path/"runs")
    assert len(str(shown).splitlines()) == 4 and not faults(str(shown)) and not page_faults(shown._repr_html_())
