"A run that ends as planned and learnt nothing, or the wrong thing, says so; a healthy one says nothing"
import copy
import json
import random
import shutil

import pytest
import torch
from helpers import metrics, rows, status, tiny_config, write_rows

from sage_finetune.config import PresetConfigs, resolve_model
from sage_finetune.core import run_checks
from sage_finetune.core.run_checks import RunWarning
from sage_finetune.modeling.adapter_config import adapter_folder
from sage_finetune.runs.folder import run_info
from sage_finetune.trainer import LoRATrainer


def codes(warnings): return [warning.code for warning in warnings]


def trained(config, kind=LoRATrainer):
    "The codes of a run's warnings, which also stand in its table, in its status and in the list of runs"
    result = kind(config).train(show=False)
    for warning in result.warnings:
        assert warning in status(config.output_dir)["message"] and warning in run_info(config.output_dir).message
        assert warning.code in run_checks.CODES and "\n" not in warning
    assert str(result).count("warning") >= len(result.warnings)
    assert status(config.output_dir)["state"] == "completed"
    return codes(result.warnings)


def planned(config): return codes(LoRATrainer(config).describe().warnings)


# ---- healthy ----------------------------------------------------------------------------------------------------------

def test_the_packaged_example_has_no_warning(tmp_path):
    config = PresetConfigs.tiny(output_dir=tmp_path/"run", device="cpu", num_train_epochs=1)
    trainer = LoRATrainer(config)
    assert trainer.describe().warnings == [] and "warning" not in str(trainer.describe())
    assert trained(config) == [] and status(config.output_dir)["message"] == ""


@pytest.mark.parametrize("fields", [dict(num_train_epochs=4), dict(num_train_epochs=4, packing=False, gradient_accumulation_steps=1,
    lora=dict(init_lora_weights="pissa")), dict(num_train_epochs=4, optim="adafactor", lora=dict(use_dora=True)),
    dict(num_train_epochs=4, new_tokens=["lamp"])], ids=str)
def test_a_usual_run_has_no_warning(tmp_path, fields):
    held = [dict(instruction=f"Which colour has light {at}?", output=row["output"]) for at, row in enumerate(rows(8))]
    assert trained(tiny_config(tmp_path, eval_path=write_rows(tmp_path/"held.jsonl", held), **fields)) == []


def test_a_resumed_run_is_judged_as_a_whole(tmp_path):
    "Neither its few steps nor its first loss are those of the part that was made last"
    config = tiny_config(tmp_path, num_train_epochs=4)
    for step in LoRATrainer(config).steps():
        if step.step == 20: break
    assert trained_on(config) == [] and len(metrics(config.output_dir)) == 24


def trained_on(config): return codes(LoRATrainer(config).train(show=False, resume=True).warnings)


# ---- steps and rows ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields, said", [(dict(max_steps=3), "max_steps=3 ends it"),
    (dict(gradient_accumulation_steps=4), "each of them takes 16 examples"), (dict(num_train_epochs=1), "each of them takes 4 examples")])
def test_a_run_of_a_few_steps(tmp_path, fields, said):
    config = tiny_config(tmp_path, **fields)
    plan = LoRATrainer(config).describe()
    assert codes(plan.warnings) == ["few_steps"] and said in str(plan.warnings[0]) and "too few to learn much" in str(plan)
    assert "few_steps" in trained(config)


def shuffled(content): return random.Random(0).sample(content, len(content))


@pytest.mark.parametrize("held, said", [(rows(), "all 24 held-out rows"), (shuffled(rows()), "all 24 held-out rows"),
    (rows(6), "all 6 held-out rows"),
    (rows(4) + [dict(instruction=f"Who is {at}?", output="Nobody.") for at in range(12)], "4 of 16 held-out rows")],
    ids=["the same file", "shuffled", "a part", "a quarter of them"])
def test_an_evaluation_on_what_was_trained_on(tmp_path, held, said):
    config = tiny_config(tmp_path, num_train_epochs=4, eval_path=write_rows(tmp_path/"held.jsonl", held))
    warning, = LoRATrainer(config).describe().warnings
    assert warning.code == "held_out_trained" and said in warning
    assert trained(config) == ["held_out_trained"]


def test_a_few_held_out_rows_that_happen_to_be_known_are_no_matter(tmp_path):
    held = [dict(instruction=f"Who is {at}?", output="Nobody.") for at in range(30)] + rows(1)
    assert planned(tiny_config(tmp_path, num_train_epochs=4, eval_path=write_rows(tmp_path/"held.jsonl", held))) == []


@pytest.mark.parametrize("content, code", [(rows(1) * 24, "rows_alike"), (rows(2) * 12, "rows_alike"),
    (rows(1) * 14 + rows(11)[1:], "rows_alike"),
    ([dict(row, output="Red.") for row in rows()], "answers_alike"),
    ([dict(row, output="Red." if at else "Blue.") for at, row in enumerate(rows())], "answers_alike"),
    ([dict(text="The lamp is red.")] * 24, "rows_alike")],
    ids=["one row", "two rows", "half of them", "one answer", "one answer but for a row", "texts"])
def test_rows_that_are_alike(tmp_path, content, code):
    assert planned(tiny_config(tmp_path, num_train_epochs=4, data_path=write_rows(tmp_path/"alike.jsonl", content))) == [code]


def test_rows_of_ones_own_are_compared_too(tmp_path):
    class Own(LoRATrainer):
        def prepare_data(self): return [dict(input_ids=[5, 6, 7], labels=[-100, 6, 7])] * 12, [dict(input_ids=[5, 6, 7])] * 2
    assert codes(Own(tiny_config(tmp_path, num_train_epochs=4)).describe().warnings)[:2] == ["rows_alike", "held_out_trained"]


# ---- the curve --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [0.2, 1.])
def test_a_run_that_explodes(tmp_path, rate):
    assert "diverged" in trained(tiny_config(tmp_path, num_train_epochs=4, learning_rate=rate))


def test_the_packaged_example_explodes_at_a_hundred_times_its_rate(tmp_path):
    config = PresetConfigs.tiny(output_dir=tmp_path/"run", device="cpu", learning_rate=0.2, max_steps=12, eval_ratio=0.)
    assert trained(config) == ["diverged"]


def test_a_rate_too_small_to_learn(tmp_path):
    assert "not_falling" in trained(tiny_config(tmp_path, num_train_epochs=4, learning_rate=1e-8))


def test_every_step_is_clipped(tmp_path):
    assert "always_clipped" in trained(tiny_config(tmp_path, num_train_epochs=4, max_grad_norm=1e-3))


def test_no_gradient_arrives(tmp_path):
    "A loss that stands still without a gradient looks as calm as one that has fallen"
    class Dead(LoRATrainer):
        def loss(self, batch): return 0 * super().loss(batch) + 7.34 * (batch["labels"] >= 0).sum()
    assert "no_gradient" in trained(tiny_config(tmp_path, num_train_epochs=1), Dead)


def test_nothing_is_left_to_learn(tmp_path):
    "What the adapter it goes on from has memorised"
    content = dict(data_path=write_rows(tmp_path/"rows.jsonl", rows(4)), warmup_ratio=0.)
    first = tiny_config(tmp_path/"first", num_train_epochs=60, learning_rate=5e-3, **content)
    LoRATrainer(first).train(show=False)
    assert "near_zero" in trained(tiny_config(tmp_path/"second", num_train_epochs=12, continue_from=first.output_dir, **content))


def model_with_other_ids(folder):
    "The packaged model beside a tokenizer that gives every word another's number"
    shutil.copytree(resolve_model("tiny"), folder)
    content = json.loads((folder/"tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    words = [word for word, number in vocabulary.items() if number not in special]
    numbers = [vocabulary[word] for word in words]
    vocabulary.update(zip(words, shuffled(numbers)))
    (folder/"tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_foreign_tokenizer(tmp_path):
    config = tiny_config(tmp_path, num_train_epochs=4)
    config.model_name = str(model_with_other_ids(tmp_path/"model"))
    assert "guessing" in trained(config)


def test_a_base_that_is_untrained(tmp_path):
    class Empty(LoRATrainer):
        def load_model_and_tokenizer(self):
            super().load_model_and_tokenizer()
            torch.manual_seed(0)
            with torch.no_grad(): [p.normal_(std=0.02) for p in self.model.parameters() if p.ndim > 1]
    assert "guessing" in trained(tiny_config(tmp_path, num_train_epochs=4), Empty)


def test_a_loss_of_ones_own_has_no_level(tmp_path):
    "One that is small, or large, by its nature"
    class Scaled(LoRATrainer):
        def loss(self, batch): return super().loss(batch) * 1e-3
    assert trained(tiny_config(tmp_path, num_train_epochs=4), Scaled) == []


@pytest.mark.parametrize("losses, code", [([1.2, 2.9], "diverged"), ([2.] * 20 + [7.] * 5 + [2.] * 20, "diverged"),
    ([1 + at / 40 for at in range(40)], "diverged"),
    ([2 - at / 40 + (at % 2) / 4 for at in range(40)], None), ([2.] + [1.9, 2.2] * 5, None), ([0.9, 1.1, 1.3], None),
    ([], None), ([5.], None)])
def test_when_a_curve_rises(losses, code):
    assert codes(run_checks.check_rising(losses)) == [code] * bool(code)


# ---- the adapter ------------------------------------------------------------------------------------------------------

class Resting(LoRATrainer):
    "Its learning rate is zero all the time"
    def setup_trainer(self):
        super().setup_trainer()
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, lambda step: 0.)


class Astray(LoRATrainer):
    "Its optimizer has other weights"
    def setup_trainer(self):
        super().setup_trainer()
        self.optimizer = self.accelerator.prepare(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.))


class Partly(LoRATrainer):
    "Some of its matrices get no gradient"
    def setup_trainer(self):
        for name, p in self.model.named_parameters():
            if "lora_B" in name and "layers.0." in name: p.register_hook(torch.zeros_like)
        super().setup_trainer()


@pytest.mark.parametrize("kind, fields, code", [(Resting, {}, "zero_adapter"), (Astray, {}, "zero_adapter"),
    (Partly, {}, "zero_adapter"), (Resting, dict(lora=dict(init_lora_weights="pissa")), "unchanged_adapter")],
    ids=["rate of zero", "other weights", "a layer", "pissa"])
def test_an_adapter_that_was_not_written_to(tmp_path, kind, fields, code):
    assert code in trained(tiny_config(tmp_path, num_train_epochs=4, **fields), kind)


# ---- warnings ---------------------------------------------------------------------------------------------------------

def test_a_warning_is_a_sentence_with_a_code():
    warning = RunWarning("the run has 3 steps.", "few_steps")
    for one in (warning, copy.deepcopy(warning), copy.copy(warning)): assert (one, one.code) == ("the run has 3 steps.", "few_steps")
    assert json.loads(json.dumps([warning])) == ["the run has 3 steps."]


def test_a_run_that_was_stopped_says_what_is_known(tmp_path):
    config = tiny_config(tmp_path, num_train_epochs=4, learning_rate=1.)
    trainer = LoRATrainer(config)
    result = trainer.train(show=False, on_step=lambda step: step.step == 12 and trainer.stop())
    assert result.stopped and "diverged" in codes(result.warnings) and "`resume=True` goes on" in status(config.output_dir)["message"]
    assert adapter_folder(config.output_dir)
