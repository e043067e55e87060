"""A reader's way through the panels, in a real browser: what is clicked, typed, seen, and still there the next day."""
import pytest
import way
from browser import expect, opened

# ---- what all panels share --------------------------------------------------------------------------------------------

LAMP = '''
import io, threading
import ipywidgets as W
from matplotlib.figure import Figure
from sage_finetune.ui.panel import Panel, flex_row, heading, add_class, escape_text
class Lamp(Panel):
    name = "lamp"
    def __init__(self):
        self.times, self.word = 0, add_class(W.HTML("dark"), "lamp-word")
        buttons = [self.button(label, action, css=f"lamp-{label.lower()}") for label, action in (("Press", self.press), ("Smash", self.smash), ("Work", self.work))]
        super().__init__(heading("A lamp"), flex_row(*buttons), self.word)
    def press(self):
        self.times += 1
        self.word.value = escape_text(f"pressed {self.times} times")
    def smash(self): raise ValueError('<img src=x onerror="window.harmed = 1"> \\x1b[31mred')
    def work(self): threading.Thread(target=lambda: (self.press(), self.update_static_output())).start()
    def static_html(self): return escape_text(f"a lamp, pressed {self.times} times <img src=x onerror='window.harmed = 1'>")
    def static_png(self):
        figure, png = Figure(figsize=(2, 1)), io.BytesIO()
        figure.subplots().plot(range(self.times + 2))
        figure.savefig(png, format="png")
        return png.getvalue()
'''


@pytest.mark.timeout(300)
def test_a_panel_lives_fails_and_leaves_something_behind(tmp_path):
    """Live: the widget alone. A handler that fails: a red line. The next day:
    what `update_static_output` put there from a thread, and nothing of it runs"""
    (tmp_path/"book").mkdir()
    (tmp_path/"book"/"lamp.py").write_text(LAMP)
    with opened(tmp_path, ["from lamp import Lamp\nlamp = Lamp()", "lamp"], label="panel") as book:
        book.run_all()
        left, picture = book.find("[class^=sage-left]"), book.find(".jp-RenderedImage img")
        expect(book.find(".sage-lamp")).to_be_visible()
        expect(left).to_be_hidden(), expect(picture).to_be_hidden()
        book.find(".lamp-press").click()
        expect(book.find(".lamp-word")).to_have_text("pressed 1 times")
        book.find(".lamp-smash").click()
        expect(book.find(".sage-problem")).to_contain_text('ValueError: <img src=x onerror="window.harmed = 1">')
        book.shot("red-line")
        book.find(".lamp-work").click()
        expect(book.find(".lamp-word")).to_have_text("pressed 2 times")
        expect(book.find(".sage-problem")).to_have_text("")
        expect(left).to_have_text("a lamp, pressed 2 times <img src=x onerror='window.harmed = 1'>", use_inner_text=False)
        expect(left).to_be_hidden(), expect(picture).to_be_hidden()
        book.reopen()
        expect(left).to_be_visible(), expect(picture).to_be_visible()
        expect(book.find(".sage-lamp")).to_have_count(0)
        book.shot("next-day")
        assert "pressed 2 times" in left.inner_text() and not book.page.evaluate("window.harmed")
        assert book.find(".jp-OutputArea-output img:not(.jp-RenderedImage img)").count() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_questions_by_keyboard(tmp_path):
    "Typed, added and gone on with by Tab and Enter; nothing in the document runs; another kernel goes on; the table stays"
    (tmp_path/"book").mkdir()
    (tmp_path/"book"/"pot.md").write_text("# Pot\n\nThe pot holds four cups of tea.\n\n## A </textarea><script>harmed=1</script> lid\n\n"
        "It is <img src=x onerror='harmed=1'> made of clay.\n")
    with opened(tmp_path, ["from sage_finetune import QuestionPanel", "QuestionPanel('pot.md', 'rows.jsonl')"], label="questions") as book:
        book.run_all()
        keys, done = book.page.keyboard, book.find(".sage-question-panel .sage-progress")
        book.find(".sage-question textarea").click()
        for text in ("How much tea does the pot hold?", "Four cups."): keys.type(text), keys.press("Tab")
        keys.press("Tab"), keys.press("Enter")  # past the tick, to Add
        expect(done).to_have_text("piece 1 of 2 · 1 question")
        expect(book.find(".sage-question textarea")).to_be_focused()
        for _ in range(4): keys.press("Tab")
        expect(book.find(".sage-skip")).to_be_focused()
        keys.press("Enter")
        expect(done).to_have_text("piece 2 of 2 · 1 question")
        expect(book.find(".sage-piece")).to_contain_text("<img src=x")
        book.restart()
        book.run_all()
        expect(done).to_have_text("piece 2 of 2 · 1 question")
        book.reopen()
        expect(book.find("[class^=sage-left]")).to_contain_text("How much tea does the pot hold?")
        assert not book.page.evaluate("window.harmed")


# ---- the whole way ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_way_in_jupyterlab(tmp_path):
    """A config, a bad value, rows, a run that is stopped, left, found again, gone on with and finished;
    then what it learnt, and how strongly"""
    way.lay_out(tmp_path)
    with opened(tmp_path, way.CELLS) as book:
        book.run_all()
        way.walk(book)
        way.looks(book)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("front", ["notebook", "voila"])
def test_the_whole_way_through_the_studio(tmp_path, front):
    "The same in the tabs of one panel, by Notebook 7 and Voila"
    way.lay_out(tmp_path)
    with opened(tmp_path, way.STUDIO, front) as book:
        book.run_all()
        way.walk(book, studio=True)
