"Run folders: SAGE's and ours, alive, dead and broken"
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from sage_finetune.config import TrainingConfig
from sage_finetune.core.errors import RunError
from sage_finetune.core.processes import start_mark
from sage_finetune.runs.folder import (
    STATES,
    MetricsTail,
    is_stale,
    list_runs,
    read_meta,
    read_metrics,
    read_status,
    run_info,
    write_meta,
    write_status,
)

SAGE = dict(task_type="code", model="Qwen/Qwen2.5-Coder-7B-Instruct", framework="llama-factory", format="alpaca",
            dataset="/home/ada/out/code/training_data_code_alpaca.json",
            config="/home/ada/out/code/llama-factory_config.json", output_dir="/home/ada/out/code", code_root="/home/ada/SAGE")


def folder_with(path, **files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path/name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- meta -------------------------------------------------------------------------------------------------------------

def test_a_folder_of_sage_is_read_where_it_lies_now(tmp_path):
    run = folder_with(tmp_path/"code", finetune_meta__json=SAGE, training_data_code_alpaca__json=[])
    (run/"llama-factory_config.json").write_text("{}")
    meta = read_meta(run)
    assert (meta.dataset, meta.config, meta.output_dir) == (run/"training_data_code_alpaca.json", run/"llama-factory_config.json", run)
    assert (meta.model, meta.framework, str(meta.code_root)) == (SAGE["model"], "llama-factory", "/home/ada/SAGE")
    assert meta.training_config is None and meta.to_config() == TrainingConfig(model_name=SAGE["model"],
        data_path=meta.dataset, output_dir=run)


def test_a_path_that_exists_is_taken_as_it_is(tmp_path):
    rows = folder_with(tmp_path/"data", rows__json=[])/"rows.json"
    run = folder_with(tmp_path/"run", finetune_meta__json=dict(SAGE, dataset=str(rows)), rows__json=[])
    assert read_meta(run).dataset == rows


@pytest.mark.parametrize("dataset", ["rows.json", "./rows.json", "out/run/rows.json", "C:\\Users\\ada\\run\\rows.json"])
def test_other_ways_to_write_a_path(tmp_path, dataset):
    run = folder_with(tmp_path/"run", finetune_meta__json=dict(SAGE, dataset=dataset), rows__json=[])
    assert read_meta(run).dataset.resolve() == run/"rows.json"


def test_relative_run_folders_give_absolute_paths(tmp_path, monkeypatch):
    folder_with(tmp_path/"run", finetune_meta__json=dict(SAGE, dataset="rows.json"), rows__json=[])
    monkeypatch.chdir(tmp_path)
    meta = read_meta("run")
    monkeypatch.chdir("/")
    assert meta.dataset.is_file() and meta.output_dir == tmp_path/"run"


@pytest.mark.parametrize("content, sentence", [
    ('{"task_', "cannot be read"), ("", "cannot be read"), ("[1]", "holds a JSON list, not an object"),
    ('{"name": "x"}', "does not say task_type, model, dataset"),
    (json.dumps(dict(SAGE, model=7)), "does not say model"),
    (json.dumps(dict(SAGE, task_type="poetry")), "task_type` 'poetry'; there are: code, qa")])
def test_broken_and_foreign_meta_files(tmp_path, content, sentence):
    run = folder_with(tmp_path/"run", finetune_meta__json=content)
    with pytest.raises(RunError, match=sentence): read_meta(run)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(RunError, match="no run folder .*nowhere"): read_meta(tmp_path/"nowhere")
    with pytest.raises(RunError, match="holds no finetune_meta.json"): read_meta(tmp_path)


def test_meta_round_trip_survives_a_move_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-for-the-file")
    run = folder_with(tmp_path/"run", rows__json=[])
    config = TrainingConfig(model_name="tiny", data_path=run/"rows.json", eval_path=run/"rows.json").save(run/"training_config.json")
    path = write_meta(run, "qa", "tiny", run/"rows.json", config, data_file=tmp_path/"rows.csv")
    text = path.read_text()
    assert "not-for-the-file" not in text and str(run) not in text
    assert set(json.loads(text)) == {"task_type", "model", "framework", "format", "dataset", "config", "output_dir", "data_file"}
    moved = run.rename(tmp_path/"moved")
    assert read_meta(moved).to_config() == TrainingConfig(model_name="tiny", data_path=moved/"rows.json",
        eval_path=moved/"rows.json", output_dir=moved)
    with pytest.raises(RunError, match="no task 'poetry'"): write_meta(moved, "poetry", "tiny", "rows.json")


def test_a_packaged_data_set_keeps_its_name(tmp_path, monkeypatch):
    "And a file of that name, beside the meta file or where one stands, is a file"
    write_meta(tmp_path/"run", "custom", "tiny", "example")
    assert str(read_meta(tmp_path/"run").dataset) == "example"
    (tmp_path/"run"/"example").write_text("[]")
    assert read_meta(tmp_path/"run").dataset == tmp_path/"run"/"example"


@pytest.mark.parametrize("name", ["ada/questions", "ada/questions-1.5:train"])
def test_a_data_set_on_the_hub_keeps_its_name(tmp_path, name):
    "And a folder of that name, beside the meta file or where one stands, is a folder"
    write_meta(tmp_path/"run", "custom", "tiny", name)
    assert str(read_meta(tmp_path/"run").dataset) == name
    (tmp_path/"run"/name).mkdir(parents=True)
    assert read_meta(tmp_path/"run").dataset == tmp_path/"run"/name


def test_two_files_that_name_different_models(tmp_path):
    run = folder_with(tmp_path/"run", finetune_meta__json=SAGE)
    TrainingConfig(model_name="tiny").save(run/"training_config.json")
    with pytest.raises(RunError, match="Make them agree"): read_meta(run).to_config()


# ---- status -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES)
def test_status_round_trip(tmp_path, state):
    write_status(tmp_path, state, 3, 10, "fine")
    status = read_status(tmp_path)
    assert (status.state, status.step, status.total, status.message) == (state, 3, 10, "fine")
    assert status.pid == (os.getpid() if state in ("preparing", "training") else None)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(status.updated)) < timedelta(seconds=60)


def test_wrong_statuses(tmp_path):
    with pytest.raises(RunError, match="There are: pending"): write_status(tmp_path, "asleep")
    (tmp_path/"status.json").write_text('{"state": "asleep"}')
    with pytest.raises(RunError, match="says state 'asleep'"): read_status(tmp_path)
    (tmp_path/"status.json").write_text('{"sta')
    with pytest.raises(RunError, match="cannot be read"): read_status(tmp_path)


def claim(run, **changes):
    "A status that says it is training, with some fields changed"
    write_status(run, "training", 3, 10)
    content = json.loads((run/"status.json").read_text()) | changes
    (run/"status.json").write_text(json.dumps(content))
    return read_status(run)


def test_a_process_that_was_killed_is_noticed(tmp_path):
    "It holds the lock of the folder, as whoever trains there does: a living process alone is nobody's run"
    holds = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", holds, str(tmp_path/".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        mine = dict(pid=child.pid, start_mark=start_mark(child.pid))
        assert not is_stale(claim(tmp_path, **mine)) and run_info(tmp_path).state == "training"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has waited for it: a zombie
        assert is_stale(claim(tmp_path, **mine))
    finally:
        child.kill()
        child.wait()
    assert is_stale(claim(tmp_path, **mine)) and run_info(tmp_path).state == "failed"


def test_a_number_that_was_given_out_again_is_noticed(tmp_path):
    last_year = (datetime.now(UTC) - timedelta(days=365)).isoformat()
    assert is_stale(claim(tmp_path, updated=last_year)) and not is_stale(claim(tmp_path))


def test_what_is_not_certain_is_not_called_dead(tmp_path):
    for changes in (dict(pid=2**22 + 1, host="another machine"), dict(pid=None), dict(pid=2**22 + 1, state="completed")):
        assert not is_stale(claim(tmp_path, **changes))
    assert is_stale(claim(tmp_path, pid=2**22 + 1))


# ---- metrics ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, steps", [("", []), ("\n", []), ('{"step": 1}\n', [1]), ('{"step": 1}', [1]),
                                         ('{"step": 1}\n{"step": 2}\n{"st', [1, 2]), ('{"step": 1}\n\n{"step": 2}\n', [1, 2]),
                                         ('{"step": 1}\n{"step": 2, "note": "caf\u00e9', [1]), ('{"step": 1}\n12', [1])])
def test_metrics_up_to_the_last_whole_line(tmp_path, text, steps):
    (tmp_path/"metrics.jsonl").write_text(text, encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == steps


def test_a_last_line_cut_inside_a_letter(tmp_path):
    (tmp_path/"metrics.jsonl").write_bytes('{"step": 1}\n{"note": "é'.encode()[:-1])
    assert read_metrics(tmp_path) == [dict(step=1)]


def test_a_broken_line_in_the_middle_is_said(tmp_path):
    (tmp_path/"metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2, is not a JSON object"): read_metrics(tmp_path)


def lines(*steps, run=1): return "".join(json.dumps(dict(step=step, seconds=step / 7 + run)) + "\n" for step in steps)


def read_on(tail): return [row["step"] for row in tail.read()]


def test_a_tail_reads_what_was_appended(tmp_path):
    tail, path = MetricsTail(tmp_path/"run"), tmp_path/"run"/"metrics.jsonl"
    assert read_on(tail) == [] and not tail.restarted
    path.parent.mkdir()
    path.write_text(lines(1, 2))
    assert read_on(tail) == [1, 2] and read_on(tail) == []
    with open(path, "a") as file: file.write(lines(3, 4) + lines(5)[:9])
    assert read_on(tail) == [3, 4] and read_on(tail) == []
    with open(path, "a") as file: file.write(lines(5)[9:])
    assert read_on(tail) == [5] and not tail.restarted


def test_a_tail_opens_the_file_at_its_end(tmp_path, monkeypatch):
    "A look costs what is new, not what there is"
    (tmp_path/"metrics.jsonl").write_text(lines(*range(50_000)))
    tail, parsed, loads = MetricsTail(tmp_path), [], json.loads
    assert len(tail.read()) == 50_000
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    with open(tmp_path/"metrics.jsonl", "a") as file: file.write(lines(50_000))
    assert read_on(tail) == [50_000] and len(parsed) == 1


@pytest.mark.parametrize("cut", range(0, 130, 7))
def test_wherever_the_writer_is_interrupted(tmp_path, cut):
    "All looks together give every row once, also where a line ends without its line break and where letters take several bytes"
    text = (lines(1, 2) + "\n" + json.dumps(dict(step=3, note="é😀"), ensure_ascii=False) + "\n" + lines(4)).encode()
    (tmp_path/"metrics.jsonl").write_bytes(text[:cut])
    tail = MetricsTail(tmp_path)
    first = read_on(tail)
    assert first == [row["step"] for row in read_metrics(tmp_path)]
    with open(tmp_path/"metrics.jsonl", "ab") as file: file.write(text[cut:])
    assert first + read_on(tail) == [1, 2, 3, 4] and not tail.restarted


@pytest.mark.parametrize("after", [lines(1, 2), "", lines(1, 2) + lines(3, 4, run=2),
    lines(1, 2) + lines(3, 4, 5, 6, 7, run=2), lines(1, run=2), None])
def test_a_file_that_was_cut_or_replaced(tmp_path, after):
    "A resumed run cuts off what came after its checkpoint, and may have written more than that since; the rows begin anew, once"
    path, tail = tmp_path/"metrics.jsonl", MetricsTail(tmp_path)
    path.write_text(lines(1, 2, 3, 4, 5))
    assert read_on(tail) == [1, 2, 3, 4, 5]
    if after is None: path.unlink()
    else: path.write_text(after)
    assert read_on(tail) == [row["step"] for row in read_metrics(tmp_path)] and tail.restarted
    with open(path, "a") as file: file.write(lines(9))
    assert read_on(tail) == [9] and not tail.restarted


def test_a_file_that_was_cut_where_the_tail_stands(tmp_path):
    "Nobody has to draw anew what is still true"
    path, tail = tmp_path/"metrics.jsonl", MetricsTail(tmp_path)
    path.write_text(lines(1, 2))
    read_on(tail)
    new = tmp_path/"other"
    new.write_text(lines(1, 2, 3))
    os.replace(new, path)
    assert read_on(tail) == [3] and not tail.restarted


def test_a_tail_and_a_broken_line(tmp_path):
    "At the end it may still become whole; before others it is said, again and again until somebody mends it"
    path, tail = tmp_path/"metrics.jsonl", MetricsTail(tmp_path)
    path.write_text(lines(1) + "\n" + '{"st\n')
    assert read_on(tail) == [1]
    with open(path, "a") as file: file.write(lines(2))
    for _ in range(2):
        with pytest.raises(RunError, match="line 3, is not a JSON object"): tail.read()
    path.write_text(lines(1) + "\n" + lines(2))
    assert read_on(tail) == [2] and not tail.restarted


def test_a_tail_in_portions(tmp_path):
    (tmp_path/"metrics.jsonl").write_text(lines(*range(1, 8)))
    tail = MetricsTail(tmp_path)
    assert [[row["step"] for row in tail.read(at_most=3)] for _ in range(4)] == [[1, 2, 3], [4, 5, 6], [7], []]


# ---- lists ------------------------------------------------------------------------------------------------------------

def test_a_list_of_all_sorts(tmp_path):
    folder_with(tmp_path/"sage", finetune_meta__json=SAGE)
    folder_with(tmp_path/"sage"/"lora_weights", adapter_config__json={})
    folder_with(tmp_path/"mine", metrics__jsonl='{"loss": 3.5}\n{"eval_loss": 1.0}\n{"loss": 0.25}\n{"eval_loss": 0.5}\n')
    TrainingConfig(model_name="tiny").save(tmp_path/"mine"/"training_config.json")
    write_status(tmp_path/"mine", "completed", 4, 4)
    folder_with(tmp_path/"mine"/"merged_model", config__json={}, training_config__json={})
    folder_with(tmp_path/"mine"/"inner", finetune_meta__json=SAGE)
    folder_with(tmp_path/"broken", finetune_meta__json="{")
    folder_with(tmp_path/".hidden", finetune_meta__json=SAGE)
    folder_with(tmp_path/"other", readme__md="no run")
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert list(runs) == ["broken", "mine", "mine/inner", "sage"]
    assert (runs["sage"].state, runs["sage"].task, runs["sage"].adapter, runs["sage"].merged) == ("completed", "code", True, False)
    assert ((runs["mine"].state, runs["mine"].model, runs["mine"].loss, runs["mine"].step, runs["mine"].merged)
        == ("completed", "tiny", 0.25, 4, True))
    assert runs["mine/inner"].state == "pending" and runs["broken"].state == "unreadable" and "cannot be read" in runs["broken"].message


def test_the_search_ends(tmp_path):
    run = folder_with(tmp_path/"run", finetune_meta__json=SAGE)
    (run/"round").symlink_to(tmp_path)
    folder_with(tmp_path/"a"/"b"/"c"/"d", finetune_meta__json=SAGE)
    assert [run.name for run in list_runs(tmp_path)] == ["run"]
    assert [run.name for run in list_runs(run)] == ["."]
    assert str(list_runs(tmp_path/"a")) != "no runs" and str(list_runs(folder_with(tmp_path/"empty"))) == "no runs"
    with pytest.raises(RunError, match="there is no folder"): list_runs(tmp_path/"nowhere")


def test_foreign_text_is_escaped(tmp_path):
    folder_with(tmp_path/"run", finetune_meta__json=dict(SAGE, model="<script>alert(1)</script>"))
    runs = list_runs(tmp_path)
    for shown in (runs, runs[0], read_meta(tmp_path/"run")):
        assert "<script>" not in shown._repr_html_() and "&lt;script&gt;" in shown._repr_html_() and "<script>" in str(shown)
