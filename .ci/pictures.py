"""Pictures of the studio for the tutorial and README.md, taken in a real JupyterLab: python .ci/pictures.py

They go to nbs/images/. Wants Chromium and what `make test` installs; takes a few minutes.
"""
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests"))
from browser import expect, opened

CELLS = ["from sage_finetune import PresetConfigs, Studio", "Studio(PresetConfigs.tiny(output_dir='studio', max_steps=240, eval_steps=20))"]


def keep(book, name, height=900):
    "The studio as it is, at most so high, in few colours: small files"
    book.page.mouse.move(0, 0)
    book.page.wait_for_timeout(1000)
    box = book.find(".sage-studio").bounding_box()
    book.wide(1120, int(box["height"]) + 300)
    box = book.find(".sage-studio").bounding_box()
    shot = book.page.screenshot(clip=dict(x=box["x"], y=box["y"], width=box["width"], height=min(box["height"], height)))
    target = ROOT/"nbs"/"images"/f"studio_{name}.png"
    target.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target,
        optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size // 1024} KiB", flush=True)


def ask(book, text):
    "A question, and its answer awaited"
    expect(book.find(".sage-send")).to_be_enabled()
    book.find(".sage-say input").fill(text)
    book.find(".sage-say input").press("Enter")
    expect(book.find(".sage-talk .sage-asked").last).to_contain_text(text)
    expect(book.find(".sage-send")).to_be_enabled()


def take(book):
    "The four tabs, one after the other"
    tab = lambda title: book.find(".sage-tabs .p-TabBar-tab, .sage-tabs .lm-TabBar-tab").filter(has_text=title).click()
    expect(book.find(".sage-memory")).to_contain_text("fits")
    keep(book, "config", 980)
    tab("Data")
    expect(book.find(".sage-data-panel .sage-health")).to_contain_text("stop token")
    keep(book, "data")
    tab("Train")
    book.find(".sage-start").click()
    expect(book.find(".sage-progress")).to_contain_text("held out", timeout=200_000)
    book.page.wait_for_function("() => /step (9[0-9]|1[0-9][0-9]) of/.test(document.querySelector('.sage-progress').innerText)",
        timeout=300_000)
    keep(book, "train")
    expect(book.find(".sage-train-panel .sage-status")).to_contain_text("Done after step", timeout=400_000)
    tab("Chat")
    ask(book, "Who are you?")
    book.find(".sage-side input").check()
    book.find(".sage-colours input").check()
    ask(book, "What is the motto of the Pell Lighthouse?")
    ask(book, "Who is the cook of the Pell Lighthouse?")
    expect(book.find(".sage-chat-panel")).to_contain_text("more likely")
    keep(book, "chat")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder), CELLS, label="pictures", width=1120) as book:
        book.run_all()
        take(book)
