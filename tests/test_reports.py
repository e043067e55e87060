"TensorBoard, Weights & Biases and Trackio: what was sent is really in their files"
import struct
import subprocess
import sys

import pytest
from helpers import metrics, rows, tiny_config, write_rows

from sage_finetune.trainer import LoRATrainer

SENT = ("loss", "learning_rate", "grad_norm", "eval_loss")


def trained(folder, tool):
    config = tiny_config(folder, report_to=tool, max_steps=5, eval_steps=2, eval_path=write_rows(folder/"held.jsonl", rows(4)))
    LoRATrainer(config).train(show=False)
    return config


def check_tensorboard(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(next(config.log_dir.rglob("events.out.tfevents.*")).parent))
    found.Reload()
    for name in SENT:
        written = [(row["step"], row[name]) for row in metrics(config.output_dir) if row[name] is not None]
        assert ([(event.step, event.value) for event in found.Scalars(name)]
            == [(step, pytest.approx(value, rel=1e-6)) for step, value in written] and written)


def test_tensorboard(tmp_path):
    check_tensorboard(trained(tmp_path, "tensorboard"))


def test_trackio_and_tensorboard(tmp_path, monkeypatch):
    "Two tools at once; Trackio keeps its runs in a folder of its own, and starts no server"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path/"trackio"))  # read when it is first imported, which is here
    config = trained(tmp_path/"run", ["trackio", "tensorboard"])
    assert config.report_to == "tensorboard,trackio"
    check_tensorboard(config)
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    assert not trackio.context_vars.current_server.get()
    assert [run.name for run in trackio.Api().runs("sage_finetune")] == [config.output_dir.name]
    lines = SQLiteStorage.get_logs("sage_finetune", config.output_dir.name)
    for name in SENT:
        written = [(row["step"], row[name]) for row in metrics(config.output_dir) if row[name] is not None]
        assert [(line["step"], line[name]) for line in lines if name in line] == [(step, pytest.approx(value)) for step, value in written]


def records(path):
    """The payloads of a .wandb file: a 7-byte mark, then LevelDB's log of 32 KiB blocks;
    type 1 is a whole record, 2 to 4 its first, middle and last piece"""
    content, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7: at += left; continue
        size, kind = struct.unpack("<HB", content[at + 4:at + 7])
        if not kind: return
        pieces += content[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield pieces
            pieces = b""


def test_wandb_offline(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_API_KEY="x" * 40).items(): monkeypatch.setenv(name, value)
    config = trained(tmp_path, "wandb")
    path, = config.log_dir.rglob("run-*.wandb")
    lines = []
    for payload in records(path):
        record = Record()
        record.ParseFromString(payload)
        if record.HasField("history"):
            lines.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    for name in SENT:
        written = [(row["step"], row[name]) for row in metrics(config.output_dir) if row[name] is not None]
        assert ([(int(line["_step"]), float(line[name])) for line in lines if name in line]
            == [(step, pytest.approx(value)) for step, value in written] and written)
    assert not any(b"x" * 40 in file.read_bytes() for file in config.output_dir.rglob("*") if file.is_file())


WITHOUT = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *more): return None if name.split(".")[0] in ("tensorboard", "wandb", "trackio") else self.finder.find_spec(name, *more)
sys.meta_path[:] = map(Without, sys.meta_path)
from sage_finetune import LoRATrainer, PresetConfigs
config = PresetConfigs.tiny(data_path=sys.argv[1], output_dir=sys.argv[2], eval_ratio=0., max_steps=1)
LoRATrainer(config).train(show=False)
config.report_to, config.overwrite_output_dir = sys.argv[3], True
try: LoRATrainer(config).train(show=False)
except Exception as error: print(type(error).__name__, error)
"""


@pytest.mark.parametrize("tool", ["tensorboard", "wandb", "trackio"])
def test_a_tool_that_is_not_installed_is_missed_only_when_asked_for(tmp_path, tool):
    said = subprocess.run([sys.executable, "-c", WITHOUT, write_rows(tmp_path/"rows.jsonl"), tmp_path/"run", tool],
        capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("ConfigError `report_to=") and f"Run: pip install {tool}" in said.stdout, said.stdout + said.stderr
