"""The whole way on the packaged model: through Python, through the program, through a notebook; and what the run folder then holds."""
import json
import os
import sys

import nbformat
import pytest
from helpers import adapter, change, copy, ended, leftovers, metrics, program, rows, start, status, tiny_config, tree, write_rows
from nbclient import NotebookClient
from transformers import AutoTokenizer

from sage_finetune import (
    Chat,
    LoRAConfig,
    LoRATrainer,
    TrainingConfig,
    load_training_data,
    merge,
    plot_run,
    prepare_dataset,
    train_from_meta,
)
from sage_finetune.inference.evaluation import accuracy
from sage_finetune.inference.export import load_run

PARTS = {"prepared", "metrics.jsonl", "run_manifest.json", "status.json", "training_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


def names(folder): return {path.name for path in folder.iterdir()} - {".lock"}


# ---- Python -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of eleven steps that keeps two checkpoints; its trainer and result"
    trainer = LoRATrainer(tiny_config(tmp_path_factory.mktemp("finished"), max_steps=11, save_steps=2, save_total_limit=2))
    return trainer, trainer.train(show=False)


def test_from_rows_to_a_merged_model_that_chats(tmp_path):
    "Every room in turn, and the tuned model knows more of what it was taught than the base"
    content = rows(4)
    config = tiny_config(tmp_path, data_path=write_rows(tmp_path/"rows.jsonl", content), per_device_train_batch_size=1,
        num_train_epochs=20, learning_rate=3e-3)
    trainer = LoRATrainer(config).setup()
    before = accuracy(trainer.model, trainer.tokenizer, content)
    result = trainer.train(show=False)
    after = accuracy(trainer.model, trainer.tokenizer, content)
    assert before.n_correct < after.n_correct and result.losses[-1] < result.losses[0]
    assert (not result.stopped and result.steps == len(result.losses) == 80 and result.tokens > result.target_tokens > 80
        and result.tokens_per_second > 0 and result.peak_memory_gb > 0)
    report = merge(result.output_dir)
    assert report.agrees and json.loads((result.output_dir/"merged_model"/"merge_report.json").read_text())["positions"] == report.positions
    chat = Chat(*load_run(result.output_dir, merged=True))
    known = next(row for row in content if row["instruction"] not in [wrong[0] for wrong in after.wrong])
    assert (chat(known["instruction"]) == known["output"]
        and "".join(chat.stream(known["instruction"])).strip() == chat.messages[-1]["content"])
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"] * 2
    for shown in (result, report, plot_run(result.output_dir), trainer.describe(), chat):
        assert repr(shown) and (hasattr(shown, "_repr_png_") or "<table>" in shown._repr_html_())
    assert names(result.output_dir) == PARTS | {"checkpoints", "lora_weights", "merged_model"} and leftovers(tmp_path) == []


def test_the_files_of_a_run(finished):
    _, result = finished
    run = result.output_dir
    assert names(run) == PARTS | {"checkpoints", "lora_weights"} and leftovers(run) == []
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 12)) and [line["loss"] for line in lines] == result.losses
    assert (sum(line["tokens"] for line in lines) == result.tokens and lines[5]["epoch"] == 1
        and lines[-1]["epoch"] == pytest.approx(2, abs=0.2))
    assert {"learning_rate", "grad_norm", "target_tokens", "seconds", "tokens_per_second", "eval_loss", "total"} < set(lines[0])
    said = status(run)
    assert (said["state"], said["step"], said["total"], said["pid"]) == ("completed", 11, 11, None)


def test_checkpoints_are_kept_by_their_number(finished):
    "The two newest: 10 and the last, which a longer run would go on from; 8 is gone, although it stands behind 11 in the alphabet"
    folder = finished[1].output_dir/"checkpoints"
    assert names(folder) == {"checkpoint-10", "checkpoint-11"}
    assert all({"adapter_model.safetensors", "state.safetensors"} < names(checkpoint) for checkpoint in folder.iterdir())


def test_the_resolved_config_reads_back(finished, tmp_path):
    "What the machine decided stands in it, it reads back as written, and it makes the same adapter again"
    trainer, result = finished
    path = result.output_dir/"training_config.json"
    config = TrainingConfig.load(path)
    assert (config.fp16, config.bf16, config.device) == (False, False, "cpu") and isinstance(config.lora, LoRAConfig)
    assert config == trainer.resolved_config() and config.save(tmp_path/"again.json").read_bytes() == path.read_bytes()
    assert set(json.loads(path.read_text())) == set(TrainingConfig.__dataclass_fields__)
    config.output_dir = tmp_path/"again"
    LoRATrainer(config).train(show=False)
    assert adapter(tmp_path/"again") == adapter(result.output_dir)


def test_the_adapter_brings_tokenizer_and_template(finished):
    trainer, result = finished
    assert ADAPTER <= names(result.lora_dir)
    tokenizer, talk = AutoTokenizer.from_pretrained(result.lora_dir), [dict(role="system", content="Be kind."),
        dict(role="user", content="Hé, 2+2?")]
    for ask in (True, False):
        assert tokenizer.apply_chat_template(talk, add_generation_prompt=ask) == trainer.tokenizer.apply_chat_template(talk,
            add_generation_prompt=ask)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (trainer.tokenizer.eos_token,
        trainer.tokenizer.pad_token, len(trainer.tokenizer))


def test_data_of_ones_own_by_overriding_prepare_data(tmp_path):
    "As SAGE's documents show it: a subclass that makes `dataset` itself"
    class MyTrainer(LoRATrainer):
        def prepare_data(self):
            data = load_training_data(self.config.data_path)
            data = [row for row in data if "7" not in row["instruction"]]
            self.dataset = prepare_dataset(data, self.tokenizer, self.config.max_length)

    config = TrainingConfig(model_name="tiny", max_length=128, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        num_train_epochs=1, device="cpu", lora=LoRAConfig(r=4))
    config.data_path = str(write_rows(tmp_path/"rows.jsonl"))
    config.output_dir = str(tmp_path/"run")
    result = MyTrainer(config).train(show=False)
    assert (result.steps == 6 and sum(line["target_tokens"] for line in metrics(tmp_path/"run")) == result.target_tokens
        and result.eval_losses == [])
    assert ADAPTER <= names(tmp_path/"run"/"lora_weights")


def test_every_step_of_the_trainer_can_be_replaced(tmp_path):
    "SAGE's six methods are called, in their order"
    called = []
    def noting(name):
        def method(self, *arguments, **options):
            called.append(name)
            return getattr(LoRATrainer, name)(self, *arguments, **options)
        return method
    steps = ("load_model_and_tokenizer", "apply_lora", "prepare_data", "setup_trainer", "train", "save_model")
    Noting = type("Noting", (LoRATrainer,), {name: noting(name) for name in steps})
    Noting(tiny_config(tmp_path, max_steps=1)).train(show=False)
    assert called == ["train", *steps[:4], "save_model"]


def test_a_folder_prepared_by_sage(tmp_path):
    "Absolute paths of another machine, no training_config.json of ours, rows in a JSON list"
    run = tmp_path/"finetune_qa"
    run.mkdir()
    (run/"training_data_qa_alpaca.json").write_text(json.dumps(rows(8)))
    (run/"finetune_meta.json").write_text(json.dumps(dict(task_type="qa", model="tiny", framework="native", format="alpaca",
                                                          dataset="/home/ada/finetune_qa/training_data_qa_alpaca.json",
                                                          config="/home/ada/finetune_qa/native_config.json",
                                                          output_dir="/home/ada/finetune_qa", data_file="/home/ada/qa.json")))
    result = train_from_meta(run, show=False)
    assert result.output_dir == run and result.steps == 3 and status(run)["state"] == "completed" and ADAPTER <= names(run/"lora_weights")
    assert TrainingConfig.load(run/"training_config.json").gradient_accumulation_steps == 16  # SAGE's defaults
    assert {"finetune_meta.json", "training_data_qa_alpaca.json"} < names(run) and not os.path.exists("/home/ada")


def test_a_run_moves_to_another_folder(finished, tmp_path):
    "It is then merged and asked where it lies"
    moved = copy(finished[1].output_dir, tmp_path/"moved")
    before = tree(finished[1].output_dir)
    assert merge(moved).agrees and (moved/"merged_model"/"config.json").is_file()
    assert tree(finished[1].output_dir) == before


def test_plots_and_loops_see_the_same_steps(tmp_path):
    "A callback, the result and the file agree"
    seen = []
    result = LoRATrainer(tiny_config(tmp_path, max_steps=3)).train(show=False, on_step=seen.append)
    assert [step.loss for step in seen] == result.losses == [line["loss"] for line in metrics(result.output_dir)]
    assert [step.step for step in seen] == [1, 2, 3] and seen[-1].total == 3


def test_an_old_run_is_replaced_only_when_asked(finished, tmp_path):
    run = copy(finished[1].output_dir, tmp_path/"run")
    merge(run)
    config = tiny_config(tmp_path, max_steps=2, overwrite_output_dir=True)
    LoRATrainer(config).train(show=False)
    assert (names(run) == PARTS | {"checkpoints", "lora_weights"} and names(run/"checkpoints") == {"checkpoint-2"}
        and len(metrics(run)) == 2 and adapter(run) != adapter(finished[1].output_dir))


# ---- the program ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    "What was said on the way from a data file to an answer, each part by a process of its own"
    here = tmp_path_factory.mktemp("shell")
    write_rows(here/"rows.jsonl")
    said = dict(prepare=program("quickstart", "instruction", "-d", "rows.jsonl", "-o", "runs/lamps", "--prepare-only", cwd=here))
    run = here/"runs"/"lamps"
    assert status(run)["state"] == "pending" and names(run) == {"finetune_meta.json", "run_manifest.json", "status.json",
        "training_config.json", "training_data_instruction_alpaca.json"}
    change(run, num_train_epochs=4, device="cpu")
    copy(run, here/"twin")
    children = [start("run", "runs/lamps", cwd=here), start("twin", module="sage_finetune.trainer", cwd=here)]
    said["run"], said["module"] = map(ended, children)
    children = [start("merge", "runs/lamps", cwd=here),
        start("quickstart", "custom", "-d", "rows.jsonl", "-o", "runs/quick", "--epochs", 1, cwd=here)]
    said["merge"], said["quickstart"] = map(ended, children)
    children = [start("chat", "runs/lamps", "-p", "Which colour has lamp 3?", "--max-new-tokens", 12, *merged, cwd=here)
        for merged in ([], ["--merged"])]
    said["chat"], said["chat merged"] = map(ended, children)
    said["list"] = program("list", "runs", cwd=here)
    return here, said


@pytest.mark.slow
def test_the_program_trains_what_it_prepared(shell):
    here, said = shell
    run = here/"runs"/"lamps"
    assert "sage-finetune run runs/lamps" in said["prepare"]
    assert "steps of 8 × 1 rows" in said["run"] and "held-out loss" in said["run"] and "Next: sage-finetune merge runs/lamps" in said["run"]
    assert status(run)["state"] == "completed" and len(metrics(run)) == status(run)["total"] and ADAPTER <= names(run/"lora_weights")
    assert leftovers(here) == []


@pytest.mark.slow
def test_the_module_does_what_the_program_does(shell):
    "python -m sage_finetune.trainer and sage-finetune run: the same adapter"
    here, said = shell
    assert adapter(here/"twin") == adapter(here/"runs"/"lamps") and "result" in said["module"]


@pytest.mark.slow
def test_the_program_merges_and_proves_it(shell):
    here, said = shell
    assert "the same" in said["merge"] and "NOT" not in said["merge"]
    assert ({"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merge_report.json"}
        <= names(here/"runs"/"lamps"/"merged_model"))


@pytest.mark.slow
def test_the_program_answers_like_python(shell):
    here, said = shell
    chat = Chat(*load_run(here/"runs"/"lamps"), max_new_tokens=12)
    assert said["chat"].strip() == said["chat merged"].strip() == chat("Which colour has lamp 3?") != ""


@pytest.mark.slow
def test_quickstart_asks_before_and_after(shell):
    here, said = shell
    assert "before" in said["quickstart"] and "after" in said["quickstart"] and "sage-finetune chat runs/quick" in said["quickstart"]
    assert status(here/"runs"/"quick")["state"] == "completed" and ADAPTER <= names(here/"runs"/"quick"/"lora_weights")


@pytest.mark.slow
def test_the_program_lists_its_runs(shell):
    lamps, quick = (next(line for line in shell[1]["list"].splitlines() if line.startswith(name)) for name in ("lamps", "quick"))
    assert (lamps.split()[:4] == ["lamps", "completed", "instruction", "tiny"] and lamps.split()[6:8] == ["yes", "yes"]
        and quick.split()[6] == "yes" != "".join(quick.split()[7:8]))


@pytest.mark.slow
def test_a_conversation_from_a_pipe(shell, capsys, monkeypatch):
    "One answer a line, until the lines end"
    from io import StringIO

    from sage_finetune.cli import main
    monkeypatch.setattr(sys, "stdin", StringIO("Which colour has lamp 3?\nAnd lamp 5?\n"))
    assert main(["chat", str(shell[0]/"runs"/"lamps"), "--max-new-tokens", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == shell[1]["chat"].strip() and len(lines) == 2


# ---- a notebook -------------------------------------------------------------------------------------------------------

NOTEBOOK = ("from sage_finetune import Chat, LoRATrainer, PresetConfigs, merge",
            "config = PresetConfigs.tiny(data_path='rows.jsonl', output_dir='run', num_train_epochs=2)\nconfig",
            "trainer = LoRATrainer(config)\nresult = trainer.train()\nresult",
            "from sage_finetune import plot_run\nplot_run('run')",
            "merge('run')",
            ("from sage_finetune.inference.export import load_run\nchat = Chat(*load_run('run', merged=True), "
                "max_new_tokens=8)\nchat('Which colour has lamp 1?')"),
            "chat")


def test_ten_lines_in_a_notebook(tmp_path):
    "A real kernel: every cell runs, and what it ends in shows itself"
    write_rows(tmp_path/"rows.jsonl")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    shown = [{kind: text for output in cell.outputs if "data" in output for kind, text in output.data.items()} for cell in notebook.cells]
    assert shown[0] == {} and [next((kind for kind in ("image/png", "text/html", "text/plain") if kind in cell), None)
        for cell in shown[1:]] == ["text/html", "text/html", "image/png", "text/html", "text/plain", "text/html"]
    assert "num_train_epochs" in shown[1]["text/html"] and "held-out loss" in shown[2]["text/html"] and "the same" in shown[4]["text/html"]
    printed = "".join(output.text for output in notebook.cells[2].outputs if output.output_type == "stream" and output.name == "stdout")
    assert "rows, 2 epochs" in printed and "step" in printed
    assert (tmp_path/"run"/"merged_model"/"model.safetensors").is_file() and names(tmp_path) == {"rows.jsonl", "run"}
