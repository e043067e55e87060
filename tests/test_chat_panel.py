"The chat panel, through the events of its widgets, with a model that was really trained"
import gc
import html
import json
import re
import shutil
import time
import weakref

import pytest
import torch
from helpers import rows, tiny_config, until, write_rows

from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data.files import load_training_data
from sage_finetune.inference.export import load_run, merge
from sage_finetune.inference.history import Exchange
from sage_finetune.inference.model_cache import clear_model_cache, load_cached_model
from sage_finetune.trainer import LoRATrainer
from sage_finetune.ui.chat_controls import strength_words
from sage_finetune.ui.chat_panel import ChatPanel
from sage_finetune.ui.conversation_view import ConversationView, StreamingText, turns_html

ASKED = "Which colour has lamp 2?"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"
RAMBLING = dict(temperature=5., seed=1, max_new_tokens=900)  # an answer that does not end by itself


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished and merged run that answers otherwise than its base"
    folder = tmp_path_factory.mktemp("talk")
    config = tiny_config(folder, data_path=write_rows(folder/"rows.jsonl", rows(4)), per_device_train_batch_size=1,
        num_train_epochs=6, learning_rate=4e-3)
    LoRATrainer(config).train(show=False)
    merge(config.output_dir)
    return config.output_dir


@pytest.fixture
def panels(run):
    "Makes panels, and takes them away"
    made = []
    def make(source=run, *more, **settings):
        made.append(ChatPanel(source, *more, **dict(dict(max_new_tokens=40), **settings)))
        return made[-1]
    yield make
    for panel in made:
        panel.close()
        assert not (panel.worker.thread and panel.worker.thread.is_alive())


@pytest.fixture
def panel(panels): return panels()


def typed(panel, text): panel.controls.say.value = text


def entered(panel, text):
    "The key comes first and the text behind it, as browsers send them"
    panel.controls.say._handle_custom_msg(dict(event="submit"), [])
    typed(panel, text)


def say(panel, text):
    typed(panel, text)
    panel.controls.send.click()
    assert panel.join(60)


def shown(panel): return html.unescape(re.sub("<[^>]*>", " ", panel.talk.past.value + panel.talk.live.value))


def growing(panel):
    "An answer that has begun and will not end for a while"
    typed(panel, "Hello!")
    panel.controls.send.click()
    until(lambda: panel.talk.draws > 3, 60)


# ---- asking -----------------------------------------------------------------------------------------------------------

def test_a_click_and_enter(panel):
    say(panel, ASKED)
    assert panel.failure is None and panel.controls.say.value == "" and panel.state == "ready"
    first, = panel.turns
    assert first.question == ASKED and first.answer and first.answer in shown(panel) and first.answer == panel.chat.messages[-1]["content"]
    entered(panel, "Hello!")
    assert panel.join(60) and [turn.question for turn in panel.turns] == [ASKED, "Hello!"] and panel.controls.say.value == ""
    panel.controls.say._handle_custom_msg(dict(event="submit"), [])  # an empty box
    assert panel.join(60) and len(panel.turns) == 2 and panel.failure is None


def test_ask_goes_the_same_way(panel, run):
    from sage_finetune.inference.chat import Chat
    assert panel.ask(ASKED) == Chat(*load_run(run), max_new_tokens=40)(ASKED) == panel.turns[0].answer
    with pytest.raises(DataError, match="empty"): panel.ask("  ")


def test_the_model_comes_in_a_thread(panels):
    clear_model_cache()
    panel, said = panels(), []
    panel.controls.status.observe(lambda change: said.append(change["new"]), "value")
    typed(panel, "Hello!")
    start = time.monotonic()
    panel.controls.send.click()
    assert (time.monotonic() - start < 0.5 and panel.state == "answering" and panel.controls.send.disabled
        and not panel.controls.halt.disabled)
    assert (panel.join(60) and [word for line in said for word in ("loading", "answering") if word in line]
        == ["loading", "answering"] and said[-1] == "")
    assert not panel.controls.send.disabled and panel.controls.halt.disabled


def test_one_model_for_all_and_none_is_held(panels, run):
    clear_model_cache()
    first, second, seen = panels(), panels(), []
    for panel in (first, second):
        panel.talk.live.observe(lambda change, panel=panel: seen.append(panel.chat.model) if panel.chat.model else None, "value")
        panel.ask(ASKED)
    model = load_cached_model(run)[0]
    assert seen and all(one is model for one in seen) and first.turns[0].answer == second.turns[0].answer
    watch = weakref.ref(model)
    clear_model_cache()
    seen.clear()
    del model
    gc.collect()
    assert watch() is None  # what free() is for


def test_two_panels_at_the_same_time(panels):
    first, second = panels(), panels()
    alone = first.ask(ASKED)
    first.controls.strength.value = 0.
    assert first.join(60)
    base = first.turns[0].answer
    for panel in (first, second): typed(panel, ASKED)
    for panel in (first, second): panel.controls.send.click()
    assert first.join(60) and second.join(60)
    assert second.turns[-1].answer == alone != base == first.turns[0].answer


def test_a_double_click_asks_once(panels):
    panel = panels(**RAMBLING)
    growing(panel)
    typed(panel, "Again?")
    for _ in range(2): panel.controls.send.click()
    panel.controls.say._handle_custom_msg(dict(event="submit"), [])
    assert len(panel.turns) == 1 and panel.controls.say.value == "Again?"  # what is typed meanwhile stays
    with pytest.raises(RunError, match="is being given"): panel.ask("And now?")
    with pytest.raises(RunError, match="is being given"): panel.use("elsewhere")
    panel.controls.halt.click()
    assert panel.join(60) and len(panel.turns) == 1


# ---- stopping ---------------------------------------------------------------------------------------------------------

def test_stop_is_heard_at_once(panels):
    "From the click to the last growth, at best of several times: the machine may be busy with other things"
    panel, took = panels(**RAMBLING), []
    for _ in range(5):
        growing(panel)
        changes = []
        watch = lambda change, changes=changes: changes.append(time.monotonic())
        panel.talk.live.observe(watch, "value")
        clicked = time.monotonic()
        panel.controls.halt.click()
        assert panel.join(60)
        panel.talk.live.unobserve(watch, "value")
        took.append(max(changes) - clicked)  # the last change empties it, when the answer has moved up
        assert "it was stopped" in panel.turns[-1].note and panel.turns[-1].answer in shown(panel)
        if took[-1] < 0.1: break
        panel.controls.clear.click()
    assert min(took) < 0.1, took
    assert panel.chat.rows() == []  # nobody learns to break off


def test_clear_stops_first(panels):
    panel = panels(**RAMBLING)
    growing(panel)
    panel.controls.clear.click()
    assert (panel.join(60) and panel.turns == [] and panel.chat.messages == [] and panel.talk.live.value == ""
        and "Hello!" not in shown(panel))
    panel.controls.longest.value = 12
    say(panel, ASKED)
    panel.controls.halt.click()  # nothing to stop
    panel.controls.clear.click()
    assert panel.turns == [] and panel.failure is None


def test_stopped_while_the_model_is_loaded(panels):
    clear_model_cache()
    panel = panels()
    typed(panel, ASKED)
    panel.controls.send.click()
    panel.controls.halt.click()
    assert panel.join(60) and panel.turns == [] and panel.controls.say.value == ASKED and panel.failure is None


def test_close_ends_the_thread_and_lets_go(run):
    panel = ChatPanel(run, **RAMBLING)
    growing(panel)
    thread, watch = panel.worker.thread, weakref.ref(panel)
    panel.close()
    assert not thread.is_alive()
    del panel
    gc.collect()
    assert watch() is None


# ---- otherwise --------------------------------------------------------------------------------------------------------

def test_again_draws_anew(panels):
    panel = panels(temperature=3., seed=4)
    said = {panel.ask("Hello!")}
    for _ in range(3):
        panel.controls.regenerate.click()
        assert panel.join(60) and len(panel.turns) == 1 == sum(turn["role"] == "user" for turn in panel.chat.messages)
        said.add(panel.turns[0].answer)
    assert len(said) > 2


def test_edit_drops_what_follows(panel):
    for text in ("Hello!", ASKED, "Who are you?"): panel.ask(text)
    panel.controls.number.value = 1
    panel.controls.edit_message.click()
    assert panel.controls.say.value == ASKED and len(panel.turns) == 3 and "replaces message 2" in panel.controls.status.value
    say(panel, "Which colour has lamp 3?")
    assert [turn.question for turn in panel.turns] == ["Hello!", "Which colour has lamp 3?"] == [turn["content"]
        for turn in panel.chat.messages if turn["role"] == "user"]
    panel.controls.edit_message.click()  # the last one, unless another is chosen
    assert panel.controls.say.value == "Which colour has lamp 3?"
    panel.controls.strength.value = 0.5  # does not end the editing
    assert panel.join(60) and panel.bar.editing == 1
    panel.controls.strength.value = 1.
    assert panel.join(60)
    panel.controls.edit_message.click()  # and left as it was
    assert panel.controls.say.value == "" and panel.controls.edit_message.description == "Edit"
    say(panel, "Hello!")
    assert len(panel.turns) == 3


def test_lines_are_kept(panel):
    panel.controls.several.value = True
    panel.controls.lines.value = "Hello!\nWho are you?"
    panel.controls.send.click()
    assert panel.join(60) and panel.turns[0].question == "Hello!\nWho are you?"
    panel.controls.several.value = False
    panel.controls.edit_message.click()
    assert panel.controls.several.value and panel.input.text == "Hello!\nWho are you?" and panel.controls.say.layout.display == "none"


def test_the_strength_answers_anew(panel, run):
    tuned = panel.ask(ASKED)
    panel.controls.strength.value = 0.
    assert panel.join(60) and "strength 0.00" in panel.turns[0].note
    with (model := load_run(run))[0].disable_adapter(): base = ChatPanel(model, max_new_tokens=40).ask(ASKED)
    assert panel.turns[0].answer == base != tuned and len(panel.turns) == 1
    panel.controls.strength.value = 1.
    assert panel.join(60) and panel.turns[0].answer == tuned and "strength" not in panel.turns[0].note
    assert [strength_words(value).split(":")[0] for value in (0, 0.5, 1, 1.5)] == ["0", "0.50", "1", "1.50"]


def test_the_strength_moved_while_an_answer_grows(panels):
    panel = panels(**RAMBLING)
    growing(panel)
    panel.controls.strength.value = 0.3
    until(lambda: panel.chat.strength == 0.3 and panel.talk.draws > 3, 60)
    assert len(panel.turns) == 1
    panel.controls.halt.click()
    assert panel.join(60) and "strength 0.30" in panel.turns[0].note


def test_side_by_side(panels):
    panel = panels()
    tuned = panel.ask(ASKED)
    panel.controls.side.value = True
    panel.controls.regenerate.click()
    assert panel.join(60)
    turn, = panel.turns
    assert (turn.answer == tuned != turn.base and turn.base and [who for who, *_ in turn.answers] == ["Base", "Tuned"]
        and turn.base in shown(panel))
    panel.controls.strength.value = 0.
    assert panel.join(60) and panel.turns[0].answer == panel.turns[0].base == turn.base
    panel.controls.strength.value = 1.
    assert panel.join(60)
    panel.ask("Hello!")
    # each remembers its own
    assert ([turn["content"] for turn in panel.session.both.base.messages if turn["role"] == "assistant"]
        == [one.base for one in panel.turns])
    panel.controls.side.value = False
    panel.ask("Who are you?")
    assert panel.turns[-1].base is None and panel.turns[0].base == turn.base


def test_colours(panel):
    panel.ask(ASKED)
    panel.controls.colours.value = True
    assert (panel.join(60) and panel.shift and max(panel.shift.shifts) > 0.5
        and panel.shift.summary() in html.unescape(panel.talk.under.value))
    panel.controls.strength.value = 0.
    assert panel.join(60) and max(map(abs, panel.shift.shifts)) == 0
    assert "tokens became more likely" in panel.static_html()
    panel.controls.colours.value = False
    assert panel.shift is None and panel.talk.under.value == ""


def test_what_is_said_while_colours_are_made_is_heard(panel):
    "Enter right behind the click; and while it still answers Enter does nothing, and the text stays"
    panel.ask(ASKED)
    panel.controls.colours.value = True
    entered(panel, "Who are you?")
    assert (panel.join(60) and [turn.question for turn in panel.turns] == [ASKED, "Who are you?"]
        and panel.controls.say.value == "" and panel.shift.summary() in html.unescape(panel.talk.under.value))
    panel.controls.colours.value, panel.controls.temperature.value, panel.controls.longest.value = False, 5., 900
    typed(panel, "Hello!")
    panel.controls.send.click()
    until(lambda: panel.talk.live.value)
    entered(panel, "And you?")
    panel.stop()
    assert panel.join(60) and len(panel.turns) == 3 and panel.controls.say.value == "And you?"


def test_system_seed_and_length(panels):
    panel = panels(temperature=3., seed=4, max_new_tokens=12)
    said = panel.ask("Hello!")
    panel.controls.clear.click()
    assert panel.ask("Hello!") == said and "the longest answer, 12 tokens, was reached" in panel.turns[0].note
    panel.controls.seed.value, panel.controls.longest.value, panel.controls.temperature.value = "", 30, 0.
    panel.controls.system.value = "You are a pirate."
    panel.ask("And you?")
    assert [turn["role"] for turn in panel.chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    panel.controls.seed.value = "lucky"
    say(panel, "Hello?")
    assert (isinstance(panel.failure, ConfigError) and "lucky" in panel.problem.value
        and panel.controls.say.value == "Hello?" and len(panel.turns) == 2)
    panel.controls.seed.value = ""
    panel.controls.send.click()
    assert panel.join(60) and panel.failure is None and panel.problem.value == "" and len(panel.turns) == 3


def test_rows_to_train_on(panel, tmp_path):
    with pytest.raises(DataError, match="no whole answer"): panel.show_rows()
    panel.ask(ASKED)
    panel.controls.copy.click()
    row, = map(json.loads, panel.controls.rows.value.splitlines())
    assert row["messages"] == panel.chat.messages and panel.controls.training.layout.display == ""
    panel.controls.file.value = str(tmp_path/"said.jsonl")
    save = panel.controls.training.children[1].children[1]
    save.click()
    save.click()  # not twice
    assert load_training_data(tmp_path/"said.jsonl") == [row] and "1 row<" in panel.controls.saved.value
    panel.controls.file.value = str(tmp_path/"said.txt")
    save.click()
    assert isinstance(panel.failure, DataError) and ".jsonl" in panel.problem.value


# ---- what is there, and what is not -----------------------------------------------------------------------------------

def test_a_merged_model(panels, run, tmp_path):
    tuned = panels().ask(ASKED)
    only = shutil.copytree(run, tmp_path/"only")
    shutil.rmtree(only/"lora_weights")
    for source in (only, run/"merged_model", load_run(run, merged=True)):
        panel = panels(source)
        its = panel.controls
        assert its.strength.disabled and its.side.disabled and its.colours.disabled and "no adapter" in its.why.value
        assert panel.ask(ASKED) == tuned and its.strength.disabled
    free = panels().controls
    assert not free.strength.disabled and free.why.value == ""


def test_an_opened_run(panels, run):
    model, tokenizer = load_run(run)
    assert panels((model, tokenizer)).ask(ASKED) == panels(model, tokenizer).ask(ASKED)
    with pytest.raises(ConfigError, match="tokenizer is missing"): ChatPanel(model)


def test_without_an_adapter(panels, run, tmp_path):
    "The file is gone, the question stays; it is back, and so is the answer"
    broken = shutil.copytree(run, tmp_path/"broken")
    shutil.rmtree(broken/"merged_model")
    weights = broken/"lora_weights"/"adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    panel = panels(broken)
    say(panel, ASKED)
    assert isinstance(panel.failure, RunError) and "holds no adapter yet" in panel.problem.value and "Train it first" in panel.problem.value
    assert panel.controls.say.value == ASKED and panel.turns == [] and panel.state == "ready"
    with pytest.raises(RunError, match="no adapter"): panel.ask("Hello!")
    weights.write_bytes(content)
    panel.controls.send.click()
    assert panel.join(60) and panel.failure is None and panel.turns[-1].answer
    weights.unlink()  # the conversation so far outlives the fault
    say(panel, "And now?")
    assert panel.failure and [turn.question for turn in panel.turns] == ["Hello!"] and panel.controls.say.value == "And now?"


def test_no_run_at_all(panels, tmp_path):
    panel = panels(tmp_path/"nowhere")
    say(panel, ASKED)
    assert isinstance(panel.failure, RunError) and "not a run folder" in panel.problem.value and panel.controls.say.value == ASKED


def test_a_full_context(panel):
    panel.ask("Hello!")
    say(panel, "word " * 3000)
    assert isinstance(panel.failure, DataError) and "at most 1,024" in panel.problem.value and "with Clear" in panel.problem.value
    assert panel.controls.say.value == ("word " * 3000).strip() and len(panel.turns) == 1 and len(panel.chat.messages) == 2
    typed(panel, "")
    assert panel.ask("Hello!")


def test_memory_runs_out(panels, run):
    model, tokenizer = load_run(run)
    panel = panels(model, tokenizer)
    panel.ask("Hello!")
    def full(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    hook = model.get_base_model().register_forward_pre_hook(full)
    say(panel, ASKED)
    hook.remove()
    assert ("memory ran out" in panel.problem.value and "shorter answer" in panel.problem.value
        and panel.controls.say.value == ASKED and len(panel.turns) == 1)
    panel.controls.send.click()
    assert panel.join(60) and len(panel.turns) == 2 and panel.failure is None


# ---- other people's words ---------------------------------------------------------------------------------------------

def test_foreign_text_is_text(panel):
    asked = f"{EVIL} \x1b[31mred\x1b[0m שלום 你好 🙂"
    panel.ask(asked)
    for page in (panel.talk.past.value, panel.static_html()):
        assert "<img" not in page and "<script" not in page and "\x1b" not in page and "שלום 你好 🙂" in page and 'dir="auto"' in page
    assert "\x1b" not in repr(panel)
    view = ConversationView(every=0.)
    for piece in (EVIL, "\x1b[2J", "one\ntwo"): view.grow(EVIL, piece)
    assert ("<img" not in view.live.value and "<script" not in view.live.value and "\x1b" not in view.live.value
        and "one\ntwo" in view.live.value and "pre-wrap" in view.live.value)
    panel.session.source.folder = panel.session.source.folder/EVIL.partition("<script")[0]  # a slash would begin another folder
    assert "<img" not in panel.static_html() and "&lt;img" in panel.static_html().partition("</caption>")[0]


def test_a_hundred_thousand_characters():
    "Every look costs the same, and what is sent grows with the answer and not with its square"
    sent = {}
    for size in (20_000, 100_000):
        view, sent[size] = ConversationView(every=0.), 0
        def count(change, size=size): sent[size] += len(change["new"])
        view.live.observe(count, "value")
        for _ in range(size // 100): view.grow("Model", "<b>word </" * 10)
    assert sent[100_000] < 6 * sent[20_000] and max(map(len, view.live.value.split("\n"))) < 60_000
    assert "96,000 characters" in view.live.value
    view.show([Exchange("?", "x" * 100_000)])
    assert len(view.past.value) < 30_000 and "80,000 more characters" in view.past.value
    assert len(turns_html([Exchange(str(at), "y") for at in range(500)])) < 60_000
    text = StreamingText(10)
    for piece in "abcdefghijklmno": text.add(piece)
    assert text.end == "fghijklmno" and text.length == 15


def test_looks_are_fifty_milliseconds_apart(panels):
    panel, times = panels(**RAMBLING), []
    panel.talk.live.observe(lambda change: times.append(time.monotonic()), "value")
    growing(panel)
    until(lambda: len(times) > 12, 60)
    panel.controls.halt.click()
    panel.join(60)
    gaps = [later - earlier for earlier, later in zip(times[2:-1], times[3:-1])]
    assert len(gaps) > 8 and min(gaps) > 0.045


def test_what_stays(panel):
    panel.ask(ASKED)
    page, words = panel.static_html(), repr(panel)
    assert page.startswith("<table>") and panel.turns[0].answer in html.unescape(page) and "widget" not in page
    assert words.splitlines()[0] == "chat with run" and ASKED in words and panel.turns[0].answer in words
