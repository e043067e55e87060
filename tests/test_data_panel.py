"The data panel shows what will be trained on, whatever stands in the data, and prepares it once"
import json
import re
import time

import ipywidgets
import pytest
from helpers import rows, tiny_config, write_rows

from sage_finetune.core.errors import DataError
from sage_finetune.data.run_data import prepare_run_data
from sage_finetune.modeling.tokenizer import run_tokenizer
from sage_finetune.ui.data_panel import HEALTH_ROWS, DataPanel, decoded_row, source_row


def widgets(box):
    "Every widget below another"
    yield box
    for child in getattr(box, "children", ()): yield from widgets(child)


def control(panel, css):
    "The widget of a CSS class"
    return next(one for one in widgets(panel.box) if css in one._dom_classes)


def click(panel, css):
    "As the browser does it, errors not swallowed"
    control(panel, css).click()
    if panel.failure: raise panel.failure


def shown(panel): return panel.static_html() + "".join(one.value for one in widgets(panel.box) if isinstance(one, ipywidgets.HTML))


HOSTILE = ('<img src=x onerror="alert(1)">', "<script>alert(1)</script>", "\x1b[2J\x1b[31mred", "\u202egnorw",
    "</div></table><h1>", "&lt;b&gt;")


@pytest.fixture
def panel(tmp_path): return DataPanel(tiny_config(tmp_path, eval_ratio=0.2)).join()


def test_every_control_has_its_class(panel):
    for css in ("next", "previous", "random", "longest", "row", "messages", "tokens", "lengths", "health", "problem"):
        assert control(panel, f"sage-{css}")
    assert {"sage", "sage-data-panel"} <= set(panel.box._dom_classes) and control(panel, "sage-lengths").value[:4] == b"\x89PNG"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(tmp_path, text):
    data = write_rows(tmp_path/"rows.jsonl", [dict(instruction=text, output=f"{text} again")])
    panel = DataPanel(tiny_config(tmp_path, data_path=data)).join()
    page = shown(panel)
    assert not any(bad in page for bad in ("<img", "<script", "\x1b", "</table><h1>")) and "again" in page
    assert json.loads(data.read_text())["instruction"] == text


def test_hostile_names_of_files_are_text(tmp_path):
    data = write_rows(tmp_path/"<img src=x onerror=alert(1)>.jsonl", [dict(question="only this")])
    panel = DataPanel(tiny_config(tmp_path, data_path=data))
    with pytest.raises(DataError): panel.join()
    assert "<img" not in shown(panel) and "&lt;img" in panel.problem.value


def test_long_rows_are_cut_and_what_is_left_out_is_counted(tmp_path):
    data = write_rows(tmp_path/"rows.jsonl", [dict(instruction="short?", output="yes " * 25_000)])
    panel = DataPanel(tiny_config(tmp_path, data_path=data, max_length=120_000)).join()
    assert re.search(r"… 80,00\d more characters", panel.static_html())
    assert "tokens …" in control(panel, "sage-tokens").value and len(panel.static_html()) < 200_000


def test_many_turns_are_bounded(tmp_path):
    turns = [dict(role="assistant" if at % 2 else "user", content=f"turn {at} " + "x" * 500) for at in range(200)]
    panel = DataPanel(tiny_config(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl", [dict(messages=turns)]), max_length=100_000)).join()
    page = control(panel, "sage-messages").value
    assert "140 more messages" in page and len(page) < 60_000


def test_buttons_and_the_number_go_through_the_rows(panel):
    total, row = len(panel.dataset), control(panel, "sage-row")
    lengths = panel.dataset["length"][:]
    click(panel, "sage-next")
    assert (panel.number, row.value) == (1, 2)
    click(panel, "sage-previous"), click(panel, "sage-previous")
    assert (panel.number, row.value) == (0, 1)
    row.value = total
    click(panel, "sage-next")
    assert panel.number == total - 1
    click(panel, "sage-longest")
    first = panel.number
    assert lengths[first] == max(lengths)
    click(panel, "sage-longest")
    assert panel.number != first and lengths[panel.number] == sorted(lengths)[-2]
    assert len({(click(panel, "sage-random"), panel.number)[1] for _ in range(30)}) > 3


def test_every_row_shows_its_own_messages(panel):
    for name, side in panel.loaded.sets.items():
        control(panel, "sage-split").value = name
        for number in range(len(side)):
            panel.show(number)
            row = rows()[side[number]["row"] - 1]
            assert row["instruction"] in control(panel, "sage-messages").value and row["output"] in control(panel, "sage-messages").value


def test_rows_of_a_folder_are_told_apart(tmp_path):
    for at in range(3):
        write_rows(tmp_path/"data"/f"part{at}.jsonl",
            [dict(question=f"File {at}, question {row}?", answer=f"{at}-{row}") for row in range(4)])
    panel = DataPanel(tiny_config(tmp_path, data_path=tmp_path/"data")).join()
    seen = []
    for number in range(len(panel.dataset)):
        panel.show(number)
        seen.append(panel.view.sample.messages[-1]["content"])
    assert sorted(seen) == sorted(f"{at}-{row}" for at in range(3) for row in range(4))


def test_the_held_out_file_is_read_for_held_out_rows(tmp_path):
    other = write_rows(tmp_path/"other.jsonl", [dict(question="Held out?", answer="It is.")])
    panel = DataPanel(tiny_config(tmp_path, eval_path=other)).join()
    control(panel, "sage-split").value = "held out"
    assert "Held out?" in control(panel, "sage-messages").value and panel.failure is None


def test_a_row_out_of_reach_is_decoded(tmp_path):
    config = tiny_config(tmp_path)
    tokenizer = run_tokenizer(config)[0]
    train, _, _ = prepare_run_data(config, tokenizer)
    assert source_row(config, config.data_path, train[3], tokenizer, seconds=-1.) is None
    assert rows()[3]["output"] in decoded_row(train[3], tokenizer).messages[1]["content"]


def test_bad_data_is_a_sentence_that_stays(tmp_path):
    data = write_rows(tmp_path/"rows.jsonl", [dict(question="What?", answer="That."), dict(question="And?")])
    panel = DataPanel(tiny_config(tmp_path, data_path=data))
    with pytest.raises(DataError, match="line 2"): panel.join()
    for css in ("next", "longest", "random", "previous"):
        with pytest.raises(DataError, match="line 2"): click(panel, f"sage-{css}")
        assert "line 2" in panel.problem.value
    write_rows(data, [dict(question="What?", answer="That."), dict(question="And?", answer="This.")])
    click(panel, "sage-read")
    assert len(panel.join().dataset) == 2 and not panel.problem.value
    with pytest.raises(Exception, match="there is no row 3"): panel.show(2)


@pytest.mark.parametrize("change, said", [(dict(data_path=None), "`data_path` is not set"),
    (dict(model_name="./nowhere"), "no model folder"), (dict(data_path="nowhere.jsonl"), "no data file")])
def test_what_cannot_be_prepared(tmp_path, change, said):
    config = tiny_config(tmp_path)
    for name, value in change.items(): setattr(config, name, value)
    panel = DataPanel(config)
    with pytest.raises(Exception, match=said): panel.join()
    shown = said.replace("`", "")
    assert shown in panel.problem.value and panel.dataset is None and shown in repr(panel).replace("`", "")


def test_training_finds_it_prepared(panel):
    config = panel.config
    made = sorted((config.output_dir/"prepared").iterdir())
    assert prepare_run_data(config, run_tokenizer(config)[0])[2].cached and sorted((config.output_dir/"prepared").iterdir()) == made


def test_only_what_touches_the_data_is_prepared_again(panel, tmp_path):
    before, config = panel.loaded.report, panel.config
    config.learning_rate, config.lora.r = 1e-3, 4
    panel.config = config
    assert panel.background.thread is None and panel.loaded.report is before and panel.config.learning_rate == 1e-3
    config.max_length = 64
    panel.config = config
    assert panel.join().loaded.report is not before and panel.dataset.max_length == 64


def test_of_many_configs_the_last_one_is_shown(tmp_path):
    panel = DataPanel(tiny_config(tmp_path))
    for length in range(40, 80): panel.config = tiny_config(tmp_path, max_length=length, data_path=tmp_path/"rows.jsonl")
    assert panel.join().dataset.max_length == 79
    assert len(list((panel.config.output_dir/"prepared").iterdir())) <= 4  # those between were passed over


def test_the_thread_prints_nothing(tmp_path, capfd):
    panel = DataPanel(tiny_config(tmp_path, eval_ratio=0.2)).join()
    panel.next()
    assert capfd.readouterr() == ("", "") and "trained on" in repr(panel)


def test_many_rows(tmp_path):
    content = [dict(question=f"Lamp {at}?", answer=f"{at}") for at in range(HEALTH_ROWS + 2000)]
    panel = DataPanel(tiny_config(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl", content))).join()
    assert "evenly spread" in control(panel, "sage-health").value and len(panel.loaded.health["trained tokens"].rows) > 0
    began = time.monotonic()
    panel.show(len(panel.dataset) - 1)
    assert time.monotonic() - began < 3 and f"Lamp {len(content) - 1}?" in control(panel, "sage-messages").value
