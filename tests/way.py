"""The way of a reader through the panels, step by step; `test_browser.py` and `test_colab.py` walk it in browsers.

The rows are partly hostile: whoever runs what they say sets `window.harmed`.
"""
import json
import re

from browser import expect

HARM = '<img src=x onerror="harmed=1">'
QUESTION, TRUTH = "Which lamp is lit?", "The green lamp."
STORY = "Tell me a long story."
ROWS = [
    dict(instruction=QUESTION, output=TRUTH),
    dict(instruction="Write a picture.", output=HARM), dict(instruction="Write a picture, please.", output=HARM),
    dict(instruction=STORY, output="la " * 100),
    dict(instruction=f"What is {HARM}<script>harmed=1</script>?", output="Text."),
    dict(instruction="What is \x1b[31mred\x1b[0m?", output="Red."),
    dict(instruction="你好吗？", output="好。"),
    dict(instruction="مرحبا، كيف حالك؟", output="أنا بخير."),
    *[dict(instruction=f"Which colour has lamp {number}?", output=colour)
        for number, colour in enumerate(("Red.", "Green.", "Blue.", "Grey."))]]
SIGHTS = (HARM, "\ufffd[31m", "你好吗？", "كيف حالك")
FILE, FOLDER = "rows <img src=x onerror='harmed=1'> 数据.jsonl", "run <b>läuft 跑步"
STEPS = 150

CONFIG_CELL = f"""from sage_finetune import PresetConfigs
from sage_finetune.config import tiny_path
from sage_finetune.ui.chat_panel import ChatPanel
from sage_finetune.ui.form import ConfigForm
from sage_finetune.ui.data_panel import DataPanel
from sage_finetune.ui.studio import Studio
from sage_finetune.ui.train_panel import TrainPanel
config = PresetConfigs.tiny(model_name=str(tiny_path()), data_path={FILE!r}, eval_path="held.jsonl", output_dir={FOLDER!r}, max_steps={STEPS}, num_train_epochs=200, per_device_train_batch_size=16, learning_rate=0.003)
"""
CELLS = [CONFIG_CELL, "ConfigForm(config)", "DataPanel(config)", "train = TrainPanel(config)\ntrain", "ChatPanel(train.run_dir)"]
STUDIO = [CONFIG_CELL, "Studio(config)"]


def walk(book, studio=False):
    "All of it, with a panel in each cell or all in the tabs of a studio"
    turn = ((lambda title: book.find(".sage-tabs .p-TabBar-tab, .sage-tabs .lm-TabBar-tab").filter(has_text=title).click())
        if studio else lambda title: None)
    fill_in(book)
    turn("Data")
    look_at_rows(book)
    turn("Train")
    begins(book, studio)
    at = stops(book)
    attaches(book, (0, 1) if studio else (0, 3), lambda: turn("Train"), at)
    book.find(".sage-resume").click()
    goes_on(book)
    attaches(book, (0, 1) if studio else (0, 3, 4), lambda: turn("Train"), at)  # while it trains
    finishes(book, at)
    turn("Chat")
    talks(book)
    interrupts(book)
    weaker(book)


def lay_out(folder):
    "The data files beside the notebook"
    (folder/"book").mkdir(parents=True)
    for name, rows in ((FILE, ROWS), ("held.jsonl", [dict(ROWS[0], instruction="Which lamp burns?")])):
        (folder/"book"/name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def unharmed(book):
    "Nothing that stands in the rows, the answers or the names has run, or become a tag"
    assert not book.page.evaluate("window.harmed")
    assert book.find(".sage img[src='x'], .sage script").count() == 0


def choose(book, css, start):
    "Choose the line of a dropdown that begins so"
    box = book.find(f"{css} select").first
    box.select_option(label=next(label for label in box.evaluate("box => [...box.options].map(one => one.label)")
        if label.startswith(start)))


def box(book, field):
    "Where a field of the form is typed"
    return book.find(f".sage-field-{field} input[type=text]").first


def types(book, field, text):
    "Type a value and leave the box"
    box(book, field).fill(text)
    box(book, field).press("Tab")


def tab_to(book, css):
    "Press Tab until a control has the focus"
    for _ in range(12):
        book.page.keyboard.press("Tab")
        if book.find(css).first.evaluate("one => one === document.activeElement"): return
    raise AssertionError(f"Tab does not reach {css}")


# ---- the form ---------------------------------------------------------------------------------------------------------

def fill_in(book):
    "Another config: a field and the memory bar change. A bad value: the reason at once, and gone when it is mended"
    memory, rate, length = book.find(".sage-memory"), box(book, "learning_rate"), box(book, "max_length")
    expect(memory).to_contain_text("this fits")
    before = memory.inner_text()
    book.shot("form")
    choose(book, ".sage-field-preset", "rtx_4090")
    expect(length).to_have_value("2048")
    expect(memory).not_to_have_text(before, use_inner_text=True)
    expect(memory).not_to_contain_text("counting")
    assert memory.inner_text() != before
    types(book, "learning_rate", "-1")
    why = book.find(".sage-field-learning_rate .sage-why")
    expect(why).to_contain_text("learning_rate")
    book.shot("refused", ".sage-config-form")
    choose(book, ".sage-field-preset", "tiny")
    expect(why).to_have_count(0)
    expect(rate).to_have_value("0.002")
    types(book, "learning_rate", "0.003")
    types(book, "num_train_epochs", "200")
    types(book, "per_device_train_batch_size", "16")
    types(book, "max_steps", str(STEPS))
    expect(book.find(".sage-summary")).to_contain_text(f"about {STEPS} ")
    unharmed(book)


def look_at_rows(book):
    "Rows one after the other, with coloured tokens; the hostile ones are text"
    panel, tokens = book.find(".sage-data-panel"), book.find(".sage-data-panel .sage-tokens")
    expect(tokens).to_contain_text("trained on")
    assert len(tokens.evaluate("all => [...new Set([...all.querySelectorAll('[style]')].map(one => "
        "getComputedStyle(one).backgroundColor))]")) > 2, "what is trained on looks like what is not"
    book.shot("rows", ".sage-data-panel")
    seen = ""
    for _ in ROWS:
        before = panel.locator(".sage-messages").inner_text()
        seen += before
        panel.locator(".sage-next").click()
        expect(panel.locator(".sage-messages")).not_to_have_text(before, use_inner_text=True)
        unharmed(book)
        if all(text in seen for text in SIGHTS): return book.shot("hostile-rows", ".sage-data-panel")
    raise AssertionError(f"the rows do not show all of {SIGHTS}: {seen}")


# ---- the run ----------------------------------------------------------------------------------------------------------

def step_of(book):
    "The step that the progress line says"
    said = re.search(r"step ([\d,]+) of", book.find(".sage-progress").inner_text())
    return int(said[1].replace(",", "")) if said else 0


def begins(book, studio):
    "Start by the keyboard: Tab leads from the studio's tabs to the button, Enter presses it. The curve changes while steps are made"
    if studio: tab_to(book, ".sage-start")
    else: book.find(".sage-start").focus()
    book.page.keyboard.press("Enter")
    expect(book.find(".sage-progress")).to_contain_text(re.compile(r"step \d+ of"))
    goes_on(book)
    book.shot("training", ".sage-train-panel")


def goes_on(book):
    "The picture changes, and so does the line with the step; long before the end"
    picture, line = book.find("img.sage-curve"), book.find(".sage-progress")
    expect(picture).not_to_have_js_property("naturalWidth", 1)  # nothing is drawn yet
    source, said = picture.get_attribute("src"), line.inner_text()
    expect(line).not_to_have_text(said, use_inner_text=True)
    expect(picture).not_to_have_attribute("src", source)
    assert step_of(book) < STEPS, "only the end was drawn"
    unharmed(book)


def stops(book):
    "Stop: saved, and the button for going on can be pressed"
    book.find(".sage-stop").click()
    expect(book.find(".sage-train-panel .sage-status")).to_contain_text("Cancelled after step")
    expect(book.find(".sage-resume")).to_be_enabled()
    assert 0 < step_of(book) < STEPS, "it was over before it could be stopped"
    book.shot("stopped", ".sage-train-panel")
    return step_of(book)


def attaches(book, cells, turn, at):
    "The kernel is restarted and the cells run again: the panel has the whole curve"
    book.restart()
    for number in cells: book.run(number)
    turn()
    expect(book.find(".sage-progress")).to_contain_text(re.compile(r"step \d+ of"))
    assert step_of(book) >= at
    picture = book.find("img.sage-curve")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 200
    book.shot("attached", ".sage-train-panel")


def finishes(book, at=0):
    "To the last step"
    expect(book.find(".sage-train-panel .sage-status")).to_contain_text("Done after step", timeout=400_000)
    assert step_of(book) == STEPS > at
    book.shot("finished", ".sage-train-panel")
    unharmed(book)


# ---- the chat ---------------------------------------------------------------------------------------------------------

def says(book, text, by="Enter"):
    "Ask something and wait for the whole answer"
    box, send = book.find(".sage-chat-panel .sage-say input"), book.find(".sage-send")
    expect(send).to_be_enabled()
    count = book.find(".sage-talk .sage-asked").count()
    box.fill(text)
    if by == "Enter": box.press("Enter")
    else:
        box.focus()
        tab_to(book, ".sage-send")
        book.page.keyboard.press("Enter")
    expect(book.find(".sage-talk .sage-asked")).to_have_count(count + 1)
    expect(send).to_be_enabled()


def talks(book):
    "The tuned model alone, then both side by side; hostile words of both sides stay words"
    said = book.find(".sage-talk .sage-said")
    says(book, QUESTION)
    expect(said.last).to_contain_text(TRUTH)
    says(book, "Write a picture.", by="Tab")
    expect(said.last).to_contain_text("img src")
    says(book, HARM)
    unharmed(book)
    book.find(".sage-side input").check()
    says(book, QUESTION)
    expect(said.last).to_contain_text("Tuned"), expect(said.last).to_contain_text(TRUTH)
    base = said.nth(-2)
    expect(base).to_contain_text("Base"), expect(base).not_to_contain_text(TRUTH)
    book.shot("side-by-side", ".sage-chat-panel")
    book.find(".sage-side input").uncheck()


def weaker(book):
    "Cleared, and asked again; then the strength slider, moved by a key: at 0 the last question is answered by the base"
    book.find(".sage-clear").click()
    expect(book.find(".sage-talk .sage-asked")).to_have_count(0)
    says(book, QUESTION)
    answer = book.find(".sage-talk .sage-said").last
    expect(answer).to_contain_text(TRUTH)
    book.find(".sage-strength .noUi-handle, .sage-strength .ui-slider-handle").first.press("Home")
    expect(book.find(".sage-strength")).to_contain_text("0.00")
    expect(answer).to_contain_text("strength 0.00")
    expect(book.find(".sage-send")).to_be_enabled()
    expect(answer).not_to_contain_text(TRUTH)
    book.shot("strength-0", ".sage-chat-panel")


def interrupts(book):
    "A long answer that grows, and ends where Stop is pressed"
    book.find(".sage-chat-panel .sage-say input").fill(STORY)
    book.find(".sage-send").click()
    answer = book.find(".sage-talk .sage-said").last
    expect(answer).to_contain_text("la la la la la la la la")
    book.find(".sage-halt").click()
    expect(book.find(".sage-send")).to_be_enabled(timeout=10_000)
    expect(answer).to_contain_text("stopped")
    assert answer.inner_text().count("la") < 99, "it was over before it could be stopped"
    book.shot("interrupted", ".sage-chat-panel")
    unharmed(book)


# ---- how it looks -----------------------------------------------------------------------------------------------------

# Texts whose colour is too near that of what lies behind them (WCAG asks 4.5 of small print;
# 3 is what cannot be overlooked); buttons that are off may be pale.
PALE = """() => {
    const parts = colour => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number)
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0)
    const behind = one => { for (; one; one = one.parentElement) { const c = parts(getComputedStyle(one).backgroundColor); if (c.length == 3 || c[3] > 0.5) return c } return [255, 255, 255] }
    return [...document.querySelectorAll('.sage *')].filter(one => one.checkVisibility() && !one.closest(':disabled, [disabled], style') && [...one.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
        .map(one => { const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))]; return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.innerText.slice(0, 40), one.className] })
        .filter(([ratio]) => ratio < 3).slice(0, 9) }"""
# Things that stick out of the page on the right, where nothing scrolls.
WIDE = """() => [...document.querySelectorAll('.sage')].flatMap(root => { const edge = root.closest('.jp-OutputArea-output').getBoundingClientRect().right + 4  // a margin is no fault
    return [...root.querySelectorAll('*')].filter(one => one.checkVisibility() && one.getBoundingClientRect().right > edge && !one.closest('[style*=overflow], .noUi-target, .sage-talk'))
        .map(one => [one.tagName, one.className, one.innerText?.slice(0, 40), Math.round(one.getBoundingClientRect().right - edge)]) }).slice(0, 9)"""


def looks(book):
    "Light and dark, wide and narrow: every text stands out from what lies behind it, and nothing sticks out of the page"
    for number in (1, 2): book.run(number)  # they died with the kernel
    faults = {}
    for dark in (False, True):
        book.dark(dark)
        for width in (1200, 700):
            book.wide(width)
            book.page.wait_for_timeout(500)
            for kind, script in (("pale", PALE), ("wide", WIDE)):
                found = book.page.evaluate(script)
                if found: faults[f"{kind}, {width} px, {'dark' if dark else 'light'}"] = found
            for panel in ("config-form", "data-panel", "train-panel", "chat-panel"):
                book.shot(f"{'dark' if dark else 'light'}-{width}-{panel}", f".sage-{panel}")
    assert faults == {}, "\n".join(f"{name}: {found}" for name, found in faults.items())
