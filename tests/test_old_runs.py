"""A run folder as version 0.1.0 wrote it, kept byte by byte in tests/runs/: later versions read it, and go on with it."""
import json
import shutil
from pathlib import Path

import pytest

from sage_finetune import LoRATrainer, generate_batch, load_run, plot_run
from sage_finetune.core.errors import ConfigError
from sage_finetune.data.cache import read_prepared
from sage_finetune.data.report import report_from_dict, report_to_dict
from sage_finetune.inference.export import run_config
from sage_finetune.runs.folder import list_runs, read_meta, read_metrics, read_status
from sage_finetune.runs.launch import last_launch, log_lines, run_status
from sage_finetune.training.checkpoint import newest_checkpoint, parse_progress, read_state
from sage_finetune.ui.run_watch import RunWatch

KEPT = Path(__file__).parent/"runs"/"written_by_0.1.0"
OLD_KEYS = Path(__file__).parent/"runs"/"old_keys"  # metrics with `learnt` and `answers`, prepared data with `learnt` and `silent`


@pytest.fixture
def run(tmp_path): return Path(shutil.copytree(KEPT, tmp_path/"run"))


def test_it_is_listed_and_read(run):
    "State, meta file, metrics, log and start of the run say what they said"
    info, = list_runs(run.parent)
    assert (info.name, info.state, info.task, info.model, info.step, info.total, info.adapter) == ("run", "completed",
        "instruction", "tiny", 4, 4, True)
    assert f"{info.loss:.3f}" == "5.665"
    assert read_status(run).state == run_status(run).state == "completed"
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4] and read_metrics(run)[3]["eval_loss"] == pytest.approx(2.695743)
    assert last_launch(run).processes == 1 and log_lines(run, 1)[0].startswith("adapter")
    assert read_meta(run).task_type == "instruction" and run_config(run).lora.r == 1
    assert plot_run(run) is not None


def test_it_answers(run):
    "Base and adapter are opened and asked"
    model, tokenizer = load_run(run)
    assert len(generate_batch(model, tokenizer, ["What is the colour of door 1?"])) == 1


def test_it_goes_on_from_its_checkpoint(run):
    "A run that was to have four steps is given six; the curve it had stays"
    before, (path, _) = read_metrics(run), newest_checkpoint(run/"checkpoints")
    config = read_meta(run).to_config()
    config.max_steps = 6
    result = LoRATrainer(config).train(show=False, resume=True)
    rows = read_metrics(run)
    assert path.name == "checkpoint-4" and result.steps == 2 and rows[:4] == before and [row["step"] for row in rows] == list(range(1, 7))
    written = [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines()]
    assert written == rows and all(row.keys() == written[-1].keys() and not row.keys() & {"learnt", "answers"} for row in written)


def test_old_keys_of_its_config_are_read(run):
    "`auto_batch` is called as in transformers today; a file that says neither name right is still refused"
    assert run_config(run).auto_find_batch_size is False
    path = run/"training_config.json"
    path.write_text(path.read_text().replace('"auto_batch": false', '"auto_batch": true'))
    assert run_config(run).auto_find_batch_size is True
    path.write_text(path.read_text().replace('"auto_batch"', '"auto_batches"'))
    with pytest.raises(ConfigError, match="auto_find_batch_size"): run_config(run)


def test_old_keys_of_checkpoints_are_read(run):
    "The state of generators and of the learning rate, and what progress counts"
    for path in (run/"checkpoints").glob("*/state.safetensors"):
        assert {"chance", "schedule"} < read_state(path).keys() and {"waited", "pending"} < read_state(path)["progress"].keys()
    _, state = newest_checkpoint(run/"checkpoints")
    assert {"rng_state", "lr_scheduler"} < state.keys() and not state.keys() & {"chance", "schedule"}
    assert parse_progress(state["progress"], run).evals_since_best == state["progress"]["waited"]


def test_old_keys_of_metrics_are_read():
    "What was called `learnt` and `answers` comes under the names of today, in the list and in the panel's sums"
    old, rows = [json.loads(line) for line in (OLD_KEYS/"metrics.jsonl").read_text().splitlines()], read_metrics(OLD_KEYS)
    assert ([row["target_tokens"] for row in rows] == [row["learnt"] for row in old]
        and not any(row.keys() & {"learnt", "answers"} for row in rows))
    assert [row["generations"] for row in rows] == [row["answers"] for row in old] and rows[1]["generations"] == ["blue"]
    watch = RunWatch(OLD_KEYS)
    watch.poll()
    assert watch.summary().target_tokens == sum(row["learnt"] for row in old) == 25


def test_old_keys_of_prepared_data_are_read():
    "The report says the same as it did, and says it again under the names of today"
    folder, = (OLD_KEYS/"prepared").iterdir()
    report = read_prepared(folder)
    assert ((report.examples, report.tokens, report.target_tokens, report.without_targets, report.held_out.target_tokens)
        == (12, 279, 37, 3, 5))
    assert report_from_dict(report_to_dict(report)) == report and not report_to_dict(report).keys() & {"learnt", "silent"}
