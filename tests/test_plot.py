"Pictures are decoded and their pixels looked at; a curve is held against all the steps it stands for"
import io
import json
import math
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from helpers import tiny_config
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from sage_finetune.core.errors import ConfigError, RunError
from sage_finetune.runs.folder import write_status
from sage_finetune.runs.plot import (
    Curve,
    Downsampler,
    LossPlot,
    Picture,
    RunFigure,
    compare_runs,
    draw_lengths,
    draw_run,
    drawable,
    plot_run,
    short_names,
    smooth,
)
from sage_finetune.trainer import LoRATrainer

BLUE, ORANGE, RED, GREEN, GREY = "tab:blue", "#d65f00", "#b30000", "#2a7f3f", "dimgray"


def step(number, total, every=20, **fields):
    "A step that never was; with 20 evaluations in a run unless told otherwise"
    noise = random.Random(number).random()
    look = every and number % max(1, total // every) == 0
    return dict(step=number, total=total, epoch=4 * number / total, loss=1 + 3 * 0.5 ** (8 * number / total) + 0.5 * noise,
        learning_rate=2e-4 * (1 - number / total), grad_norm=1.,
        tokens=1000, target_tokens=500, seconds=number / 9, tokens_per_second=9000 + 500 * noise,
        eval_loss=1.2 + 3 * (number / total - 0.6)**2 if look else None, generations=None, note="") | fields


def run_of(total, **options): return [step(number, total, **options) for number in range(1, total + 1)]


def filled(rows, **options):
    "A curve of rows"
    curve = Curve(**options)
    for row in rows: curve.add(row)
    return curve


def pixels(picture): return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA")).astype(int)


def of_colour(picture, colour, within=12):
    "How many pixels have a colour"
    wanted = np.array([round(255 * part) for part in to_rgb(colour)])
    return int((np.abs(pixels(picture)[..., :3] - wanted).max(-1) <= within).sum())


def folder_of(path, rows, state=None, **fields):
    "A run folder with metrics, and a status unless it has none"
    path.mkdir(parents=True, exist_ok=True)
    (path/"metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state: write_status(path, state, len(rows), rows[-1]["total"])
    if fields: (path/"status.json").write_text(json.dumps(json.loads((path/"status.json").read_text()) | fields))
    return path


# ---- thinning ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 5, 99, 100, 101, 777, 5000, 40_000])
def test_thinning_keeps_first_last_lowest_and_highest(count):
    heights = [random.Random(count + at).random() for at in range(count)]
    some = Downsampler(100)
    for place, height in enumerate(heights): some.add(height, lambda place=place: dict(place=place))
    kept = sorted(some.rows)
    assert len(kept) <= 100 and {0, count - 1, heights.index(min(heights)), heights.index(max(heights))} <= set(kept)
    assert all(two - one < 2 * some.stride for one, two in zip(kept, kept[1:])), "a gap of more than two stretches"
    if count <= 48: assert len(kept) == count


@pytest.mark.parametrize("total", [1, 30, 2500, 30_000])
def test_the_smoothed_curve_is_that_of_all_steps(total):
    rows = run_of(total)
    if total > 100: rows[70]["loss"] = math.nan
    means = smooth([row["loss"] for row in rows], memory=1 - 1 / max(10, total / 100))
    curve = filled(rows, limit=300)
    assert len(curve) == total and len(curve.rows) <= 300
    assert max(abs(row["smoothed"] - means[row["step"] - 1]) for row in curve.rows) < 1e-9
    assert all(row["tokens_seen"] == 1000 * row["step"] for row in curve.rows)


def test_a_curve_keeps_evaluations_first_and_last_jumps_and_what_is_no_number():
    rows = run_of(20_000)
    rows[12_345] |= dict(loss=30.)
    rows[15_000] |= dict(loss=math.nan)
    curve = filled(rows)
    kept = {row["step"] for row in curve.rows}
    assert len(kept) <= 2000 and {1, 12_346, 15_001, 20_000} <= kept and set(range(1000, 20_001, 1000)) <= kept


def test_many_evaluations_are_bounded_and_the_best_is_kept():
    rows = run_of(8000, every=8000)
    rows[5003]["eval_loss"] = 0.1
    curve = filled(rows, limit=500)
    looks = [row for row in curve.rows if row["eval_loss"] is not None]
    assert len(curve.rows) <= 500 and 5004 in {row["step"] for row in looks} and looks[-1]["step"] == 8000


def test_a_curve_of_a_long_run_stays_below_two_megabytes():
    "Answers of 20 kB at every evaluation included; the length of the run does not count"
    def rows(count):
        for number in range(1, count + 1):
            yield step(number, 576_000) | (dict(eval_loss=1. + number % 7, generations=["word " * 4000 + str(number)])
                if number % 50 == 0 else {})
    tracemalloc.start()
    try:
        curve, sizes = Curve(), []
        for row in rows(60_000):
            curve.add(row)
            if row["step"] in (15_000, 60_000): sizes.append(tracemalloc.get_traced_memory()[0])
        assert len(curve.rows) <= 2000
    finally: tracemalloc.stop()
    assert sizes[0] < 2e6 and sizes[1] < 2e6, sizes


def test_a_resumed_run_goes_back():
    "The curve is then that of a run that was never interrupted; a seam is remembered"
    whole = run_of(900)
    broken = [*whole[:700], whole[600] | dict(note="resumed after step 600"), *whole[601:]]
    curve, straight = filled(broken), filled(whole)
    assert [row["step"] for row in curve.rows] == list(range(1, 901)) and curve.count == 900 and curve.tokens == straight.tokens
    assert max(abs(one["smoothed"] - two["smoothed"]) for one, two in zip(curve.rows, straight.rows)) < 1e-9
    assert [row["step"] for row in curve.seams] == [601] and not straight.seams
    assert of_colour(draw_run(curve), "black", 40) > of_colour(draw_run(straight), "black", 40) + 50, "the seam is drawn"
    for row in whole[:5]: curve.add(row)  # another run from its beginning
    assert [row["step"] for row in curve.rows] == [1, 2, 3, 4, 5] and not curve.seams


def test_rows_of_other_programs_and_gaps_do_not_raise():
    odd = [{}, dict(step=None, loss="much"), dict(step=3, loss=None, eval_loss="?", tokens="many", note=7),
        dict(step=4, loss=math.inf), dict(step=5, loss=1e300, eval_loss=math.nan), dict(step=6, loss=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (odd, odd[:1], odd[4:5], []): assert pixels(draw_run(rows, speed=True, size=(7., 5.))).shape == (450, 630, 4)


def test_too_small_a_limit_is_refused():
    with pytest.raises(ConfigError, match="limit=10.*2000"): Curve(limit=10)


# ---- one run ----------------------------------------------------------------------------------------------------------

def test_the_picture_shows_what_it_should():
    plain, full = draw_run(run_of(300, every=0)), draw_run(run_of(300), "a title", speed=True)
    assert pixels(plain).shape == pixels(full).shape == (378, 630, 4)
    for picture in (plain, full):
        assert (pixels(picture)[..., 3] == 255).all() and tuple(pixels(picture)[0, 0, :3]) == (255, 255, 255), (
            "opaque and white, on any page")
        assert of_colour(picture, BLUE) > 300 and of_colour(picture, GREY) > 100 and of_colour(picture, "black", 60) > 300
    assert not of_colour(plain, ORANGE) and not of_colour(plain, RED) and not of_colour(plain, GREEN)
    assert of_colour(full, ORANGE) > 100 and of_colour(full, RED) > 20 and of_colour(full, GREEN) > 100
    assert full.title == f"loss of 300 steps, the last {step(300, 300)['loss']:.3f}, the lowest on held-out rows 1.200 at step 180"


def test_what_is_no_number_is_marked():
    rows = run_of(300, every=0)
    rows[200] |= dict(loss=math.nan)
    assert of_colour(draw_run(rows), RED) > 20 > 0 == of_colour(draw_run(run_of(300, every=0)), RED)


def test_a_single_step_is_a_point(): assert of_colour(draw_run(run_of(1)), BLUE) > 15


def test_a_figure_remembers_nothing_of_the_runs_before():
    "Lines, limits, legend, title: each picture is the one a new figure would give"
    odd = run_of(200)
    odd[50] |= dict(loss=math.nan)
    odd[60] |= dict(note="resumed after step 60")
    drawn = [([], "", "step"), (run_of(300), "$one$", "tokens"), (run_of(300), "two", "tokens"), (odd, "two", "seconds"),
        (run_of(1), "", "epoch"), (run_of(5000, every=0), "two", "step"), ([], "", "step")]
    for rows, title, by in drawn: assert draw_run(rows, title, by=by).png == RunFigure().draw(filled(rows), title, by).png


@pytest.mark.parametrize("by,label", [("step", "optimizer step"), ("epoch", "epoch (passes over the data)"),
    ("tokens", "tokens read (thousands)"), ("seconds", "time (seconds)")])
def test_every_axis_has_a_label(by, label, tmp_path):
    figure = plot_run(folder_of(tmp_path/"run", run_of(900)), by=by).figure
    assert isinstance(figure, Figure) and [axes.get_ylabel() for axes in figure.axes] == ["loss\n(nats per trained token)",
        "learning\nrate", "tokens\nper second"]
    assert figure.axes[-1].get_xlabel() == label
    figure.savefig(tmp_path/"run.svg")
    assert "<svg" in (tmp_path/"run.svg").read_text()


def test_an_unknown_x_axis_is_refused():
    with pytest.raises(ConfigError, match="by='day'.*step, epoch, tokens, seconds"): draw_run(run_of(3), by="day")


def redraw(count):
    "CPU time of the fastest redraw of a run that goes on, with so many steps behind it"
    rows, spent = run_of(count + 200, every=10), []
    curve = filled(rows[:count])
    for at in range(count, count + 200, 20):
        for row in rows[at:at + 20]: curve.add(row)
        start = time.process_time()
        draw_run(curve, "live")
        spent.append(time.process_time() - start)
    return min(spent)


def test_a_redraw_of_ten_thousand_points_costs_little_more_than_one_of_five_hundred():
    assert redraw(10_000) < 4 * redraw(500)


def test_one_thread_adds_while_others_draw():
    curve, failed = Curve(), []
    def draw():
        try:
            for _ in range(15): draw_run(curve, "live", speed=True)
        except Exception as error: failed.append(error)
    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads: thread.start()
    for row in run_of(4000): curve.add(row)
    for thread in threads: thread.join()
    assert not failed and draw_run(curve, "live").png == RunFigure().draw(curve, "live").png


def test_pictures_bring_words_for_those_who_cannot_see_them():
    from IPython.core.formatters import DisplayFormatter
    picture = draw_run(run_of(3))
    data, about = DisplayFormatter().format(picture)
    assert data["text/plain"] == repr(picture) == f"<picture: {picture.title}>" and about["image/png"] == dict(alt=picture.title)
    assert Picture(picture.png)._repr_png_() == picture.png and data["image/png"].startswith("iVBORw0KGgo")


# ---- names ------------------------------------------------------------------------------------------------------------

NAMES = ["$x_1$ and $\\frac{", "_hidden", "\x1b[31mred\x1b[0m\x00\x07", "two\nlines\tand a tab", "\u202egnp.exe",
    "\ud800 half", "中文微调 한국어 日本語", "مرحبا שלום", "नमस्ते ไทย", "😀🚀👩\u200d👩\u200d👧", "\U000e1234 \U0001f9ff \ue000",
    "<img onerror=alert(1)>", "a" * 5000, "e" + "\u0301" * 300, "", "%s {} \\u0041"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_is_shown_as_text(name, tmp_path):
    "Without a warning about missing glyphs or mathematics, and without an error"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, families = drawable(name)
        run = folder_of(tmp_path/"run", run_of(12))
        figure = compare_runs([run], labels=[name]).figure
        assert [one.get_text() for one in figure.legends[0].get_texts()] == [drawable(name, 78)[0]]
        titled, plain = draw_run(run_of(12), name), draw_run(run_of(12))
        assert (titled.png == plain.png) == (name == "")
        assert draw_lengths([0, 10], [3], title=name).png
    assert families[0] == "DejaVu Sans" and not any(char in text for char in "\x00\x1b\x07\n\t\u202e\U000e1234\ue000")
    if "$" in name or "_" in name: assert text == name


def test_long_names_lose_their_middle():
    assert (drawable("run-" + "x" * 90 + "-seed-1", 30)[0] == "run-" + "x" * 16 + "…" + "xx-seed-1"
        and drawable("中" * 40, 21)[0].count("中") == 10 or drawable("中", 8)[0].startswith("\\u"))


def test_what_no_font_has_becomes_an_escape(): assert drawable("a\U000e1234b\ue000")[0] == "a\\U000e1234b\\ue000"


def test_characters_of_installed_fonts_are_drawn():
    "Hebrew, Arabic and an old emoji are in the font that comes with the library"
    assert drawable("שלום مرحبا 😀")[0] == "שלום مرحبا 😀"


# ---- run folders ------------------------------------------------------------------------------------------------------

def title_of(picture): return picture.figure.axes[0].get_title("left")


def test_runs_in_every_state(tmp_path):
    rows = run_of(40)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert title_of(plot_run(folder_of(tmp_path/"done", rows, "completed"))) == "done: completed 40/40"
    assert title_of(plot_run(folder_of(tmp_path/"live", rows, "training"))) == "live: training 40/40"
    assert title_of(plot_run(folder_of(tmp_path/"dead", rows, "training", pid=gone.pid))) == "dead: failed 40/40: its process is gone"
    assert title_of(plot_run(folder_of(tmp_path/"old", rows))) == "old"
    cut = folder_of(tmp_path/"cut", rows, "failed")
    with open(cut/"metrics.jsonl", "a") as file: file.write('{"step": 41, "lo')
    assert plot_run(cut).title.startswith("loss of 40 steps")
    assert plot_run(folder_of(tmp_path/"one", run_of(1), "cancelled")).title.startswith("loss of 1 steps")
    rows[20] |= dict(loss=math.nan)
    assert of_colour(plot_run(folder_of(tmp_path/"nan", rows)), RED) > 20


def test_a_run_longer_than_one_portion_is_read_whole(tmp_path):
    assert plot_run(folder_of(tmp_path/"long", run_of(12_000))).title.startswith("loss of 12,000 steps")


def test_a_real_run_and_its_resumption(tmp_path):
    "A plot of steps and a plot of the folder show the same"
    plot = LossPlot(every=1e9)
    result = LoRATrainer(tiny_config(tmp_path, max_steps=4, save_steps=2)).train(show=False, on_step=plot)
    assert [row["loss"] for row in plot.rows] == result.losses
    assert RunFigure().draw(plot.curve).png == RunFigure().draw(
        filled(json.loads(line) for line in (result.output_dir/"metrics.jsonl").read_text().splitlines())).png
    assert title_of(plot_run(result.output_dir)).startswith("run: completed 4/4")


def test_folders_that_are_no_runs_are_named(tmp_path):
    run, empty = folder_of(tmp_path/"run", run_of(3)), tmp_path/"empty"
    empty.mkdir()
    for draw in (plot_run, lambda folder: compare_runs([run, folder])):
        with pytest.raises(RunError, match="no run folder .*nowhere"): draw(tmp_path/"nowhere")
        with pytest.raises(RunError, match="empty has no recorded steps.*sage-finetune run"): draw(empty)
    with pytest.raises(RunError, match="at least one"): compare_runs([])


# ---- several runs -----------------------------------------------------------------------------------------------------

def test_eight_runs_with_long_names_stay_apart(tmp_path):
    names = [f"llama-3.2-1b_lora_r16_alpha32_lr2e-4_cosine_warmup3_alpaca-cleaned-v2_{'x' * 40}_seed{at}" for at in range(8)]
    folders = [folder_of(tmp_path/name, run_of(50 + 10 * at), "completed") for at, name in enumerate(names)]
    picture = compare_runs(folders)
    shown = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert len(set(shown)) == 8 and all(one.endswith(f"_seed{at}") for at, one in enumerate(shown))
    looks = {(line.get_color(), line.get_linestyle()) for line in picture.figure.axes[0].lines}
    assert len(looks) == 8 and all(of_colour(picture, colour) > 30 for colour, _ in looks)
    legend = picture.figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 and legend.x1 <= 630 and 0 <= legend.y0 and legend.y1 < picture.figure.axes[-1].get_tightbbox().y0, (
        "below the axes and inside the picture")
    assert [axes.get_ylabel().split("\n")[0] for axes in picture.figure.axes] == ["loss", "held-out loss", "learning", "tokens"]
    assert len({axes.get_xlim() for axes in picture.figure.axes}) == 1 and picture.title.startswith("8 runs. llama-3.2-1b")


def test_runs_are_compared_by_what_one_asks_for(tmp_path):
    one, two = folder_of(tmp_path/"one", run_of(50, every=0)), folder_of(tmp_path/"two",
        [row | dict(tokens=2000) for row in run_of(50, every=0)], "failed")
    pictures = {by: compare_runs([one, two], labels=["a", "b"], by=by) for by in ("step", "tokens", "seconds", "epoch")}
    assert len({picture.png for picture in pictures.values()}) == 4
    assert (max(pictures["tokens"].figure.axes[0].lines[1].get_xdata()) == 100
        and len(pictures["step"].figure.axes) == 3), "nobody was evaluated"
    assert [text.get_text() for text in pictures["step"].figure.legends[0].get_texts()] == ["a", "b (failed 50/50)"]
    assert compare_runs(str(one)).title.startswith("1 runs. one: loss of 50 steps")
    for labels in (["a"], "ab", []):
        with pytest.raises(ConfigError, match="labels=.* for 2 runs"): compare_runs([one, two], labels=labels)


def test_folders_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = [tmp_path/"a"/"run", tmp_path/"b"/"run"]
    assert short_names(here) == ["a/run", "b/run"] and short_names([here[0]]) == ["run"]
    assert len(set(short_names([*here, here[0]]))) == 3
