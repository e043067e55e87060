"""The real LLaMA-Factory trains a run folder of ours, in an environment of its own, made once and kept in .venv-llamafactory:
`make test-full`. (Its processes are tried with a stand-in in test_llamafactory_run.py.)"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from sage_finetune import LoRATrainer, PresetConfigs
from sage_finetune.chat_format.rendering import render
from sage_finetune.config import tiny_path
from sage_finetune.data.files import load_training_data
from sage_finetune.data.tasks import prepare_run
from sage_finetune.modeling.tokenizer import load_tokenizer
from sage_finetune.runs.folder import read_meta, read_metrics, read_status, run_info

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT/".venv-llamafactory"
PINS = [line for line in (ROOT/".ci"/"llamafactory.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
ALONE = [line for line in PINS if line.startswith(("llamafactory=", "torchaudio=", "torchdata="))]  # without what they ask for
TORCH = next(line for line in (ROOT/"constraints.txt").read_text().splitlines() if line.startswith("torch=="))
COUNT = """
import json, sys
from transformers import AutoTokenizer
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=None, enable_thinking=False))
found = []
for row in json.load(open(sys.argv[2])):
    pairs = template.encode_multiturn(tokenizer, row["messages"], None, "")
    found.append([[id for source, target in pairs for id in (*source, *target)],
        [id for source, target in pairs for id in (*[-100] * len(source), *target)]])
print(json.dumps(found))
"""


def clean(**more):
    "This process's environment without what it says about Python"
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))} | more


def run(*command, **more):
    "What a command prints; fails with all it said"
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=clean(**more), capture_output=True, text=True,
        stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def program():
    "llamafactory-cli of an environment with those versions; made again when what it is made from has changed"
    sign, seal = hashlib.sha256("\n".join([*PINS, TORCH, sys.version]).encode()).hexdigest(), PLACE/"made-from"
    named = os.environ.get("SAGE_LLAMAFACTORY")
    if named: return Path(named)
    if not seal.exists() or seal.read_text() != sign:
        shutil.rmtree(PLACE, ignore_errors=True)
        venv.create(PLACE, with_pip=True)
        pip = [PLACE/"bin"/"python", "-m", "pip", "install", "--quiet", "--no-compile"]
        run(*pip, TORCH)
        run(*pip, "--no-deps", *ALONE)
        run(*pip, *(line for line in PINS if line not in ALONE), TORCH)
        if "+cpu" in run(PLACE/"bin"/"python", "-c", "import torch; print(torch.__version__)"):  # torchaudio's own code is made for CUDA
            for path in PLACE.glob("lib/python*/site-packages/torchaudio/lib/*.so"): path.unlink()
        seal.write_text(sign)
    return PLACE/"bin"/"llamafactory-cli"


@pytest.fixture(scope="module")
def trained(program, tmp_path_factory):
    "A run folder that LLaMA-Factory trained through the program, and what was printed"
    folder = tmp_path_factory.mktemp("real")
    (folder/"rows.json").write_text(json.dumps(load_training_data("example")[:48]))
    config = PresetConfigs.tiny(max_steps=24, eval_steps=12, device="cpu", eval_ratio=.15, per_device_train_batch_size=4)
    prepare_run("custom", folder/"run", "tiny", folder/"rows.json", config=config)
    said = run(sys.executable, "-m", "sage_finetune", "run", folder/"run", "--use-llamafactory", SAGE_LLAMAFACTORY=str(program),
        PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    return folder/"run", said


def encoded(program, folder, name):
    "(row, (ids, labels)) of the rows of a file, as LLaMA-Factory encodes them with the template it finds"
    path = folder/"llamafactory"/f"{name}.json"
    said = run(Path(program).parent/"python", "-c", COUNT, tiny_path(), path, HF_HUB_OFFLINE="1")
    return list(zip(json.loads(path.read_text()), json.loads(said.splitlines()[-1]), strict=True))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1500)
class TestEngine:
    "Everything that needs that environment"

    def test_its_curve_is_a_curve_of_ours(self, trained):
        rows, status = read_metrics(trained[0]), read_status(trained[0])
        assert [row["step"] for row in rows] == [*range(1, 25)] and {row["total"] for row in rows} == {24}
        assert [row["step"] for row in rows if row["eval_loss"] is not None] == [12, 24]
        assert sum(row["loss"] for row in rows[-4:]) < .8 * sum(row["loss"] for row in rows[:4])
        assert (status.state, status.step, status.message) == ("completed", 24, "trained by LLaMA-Factory")
        assert run_info(trained[0]).adapter and "Running training" in (trained[0]/"train.log").read_text()
        assert "Next: sage-finetune merge" in trained[1]

    def test_show_list_plot_chat_and_merge_work_on_it(self, trained):
        program = [sys.executable, "-m", "sage_finetune"]
        there = dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
        assert "completed" in run(*program, "list", trained[0].parent, **there)
        assert "trained by LLaMA-Factory" in run(*program, "show", trained[0], **there)
        run(*program, "plot", trained[0], "-o", trained[0].parent/"curve.png", **there)
        assert (trained[0].parent/"curve.png").stat().st_size > 1000
        assert run(*program, "chat", trained[0], "-p", "Who keeps the light?", "--max-new-tokens", "12", **there).strip()
        assert "the same" in run(*program, "merge", trained[0], **there)

    def test_the_same_tokens_are_trained_on_and_a_line_break_behind_each_answer(self, program, trained):
        "That line break is the one difference, and it is said beside the config"
        for name in ("train", "held_out"):
            for row, (ids, labels) in encoded(program, trained[0], name):
                ours = render(row["messages"], load_tokenizer("tiny"))
                assert ids[:len(ours.ids)] == ours.ids
                assert [one for one in labels if one != -100][:-1] == [one for one in ours.labels if one != -100]
        assert "what the chat template writes behind an answer" in (trained[0]/"llamafactory"/"llamafactory_config.yaml").read_text()

    def test_its_held_out_loss_is_ours(self, program, trained):
        "Once the line breaks are counted, which cost next to nothing; its batches are of different lengths, so nearly the same"
        config = read_meta(trained[0]).to_config(())
        config.continue_from, config.output_dir, config.max_steps = trained[0], trained[0].parent/"other", 1
        counts = [sum(one != -100 for one in labels) for _, (_, labels) in encoded(program, trained[0], "held_out")]
        expected = LoRATrainer(config).setup().evaluate() * (sum(counts) - len(counts)) / sum(counts)
        assert read_metrics(trained[0])[-1]["eval_loss"] == pytest.approx(expected, rel=.1)
