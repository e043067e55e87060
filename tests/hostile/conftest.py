"A run folder as one gets it from somebody, with everything in it that a run leaves"
import json

import pytest
from helpers import change, rows, write_rows

from sage_finetune import merge
from sage_finetune.data.tasks import prepare_run
from sage_finetune.runs.launch import start_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "Prepared, trained by a process of its own with a row that was skipped, evaluated, checkpointed, merged; never to be written to"
    base = tmp_path_factory.mktemp("finished")
    data, held = write_rows(base/"rows.jsonl"), write_rows(base/"eval.jsonl", rows(4))
    run = prepare_run("custom", base/"run", data=data, eval_path=held, per_device_train_batch_size=4, max_steps=4,
        save_steps=1, device="cpu", logging_steps=1)
    own = run/"training_data_custom_alpaca.json"
    own.write_text(json.dumps([*json.loads(own.read_text()), dict(instruction="A row without an answer")]))
    change(run, on_bad_row="skip", report_to="tensorboard")
    assert start_run(run).wait(timeout=300) == 0, (run/"train.log").read_text()
    merge(run)
    names = {path.name for path in run.rglob("*")}
    assert {"launch.json", "train.log", "bad_rows.jsonl", "state.safetensors", "train.arrow", "merge_report.json"} <= names
    return run
