"What belongs to an adapter besides its numbers: the chat template it was trained behind, and the base it corrects"
import json
import shutil
import warnings

import pytest
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from sage_finetune import LoRATrainer, load_run, merge
from sage_finetune.chat_format.rendering import render_prompt
from sage_finetune.chat_format.template import template_of
from sage_finetune.config import tiny_path
from sage_finetune.core.errors import ModelError, RunError
from sage_finetune.inference.export import run_config

# As Qwen3's: every answer stands behind an empty thinking block, which the generation prompt has only when asked for.
THINKER = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{ m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
QUESTION = [dict(role="user", content="Which colour has lamp 1?")]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    "The packaged model with a template that thinks by default, as a folder of its own"
    folder = shutil.copytree(tiny_path(), tmp_path_factory.mktemp("base")/"thinker")
    (folder/"chat_template.jinja").write_text(THINKER, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(thinker, tmp_path_factory):
    "A short run on it, and the trainer that made it"
    folder = tmp_path_factory.mktemp("run")
    trainer = LoRATrainer(tiny_config(folder, model_name=str(thinker), max_steps=4, save_steps=2))
    trainer.train(show=False)
    return trainer


def prompt_of(tokenizer): return tokenizer.decode(render_prompt(QUESTION, tokenizer))


def test_the_template_that_was_promised_is_the_one_that_is_saved_and_asked(run):
    "Training, the trainer's own answers, the saved tokenizer and whoever opens the run ask behind the same prompt"
    _, tokenizer = load_run(run.config.output_dir)
    assert any("asks without thinking" in line for line in run.report.messages)
    assert prompt_of(run.tokenizer).endswith("<think>\n\n</think>\n\n") and prompt_of(tokenizer) == prompt_of(run.tokenizer)
    assert template_of(tokenizer) == template_of(run.tokenizer) == (run.config.lora_dir/"chat_template.jinja").read_text(encoding="utf-8")


def test_todays_template_of_the_base_does_not_count(run, thinker, tmp_path):
    "The base's template is another one after training: chat and merge ask as the run was trained"
    done = shutil.copytree(run.config.output_dir, tmp_path/"run")
    was = (thinker/"chat_template.jinja").read_text(encoding="utf-8")
    try:
        (thinker/"chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
        assert prompt_of(load_run(done)[1]) == prompt_of(run.tokenizer)
        merge(done)
    finally: (thinker/"chat_template.jinja").write_text(was, encoding="utf-8")
    assert prompt_of(load_run(done, merged=True)[1]) == prompt_of(run.tokenizer)


def change_norms(weights): return {name: value * 1.1 if "norm" in name else value for name, value in weights.items()}


def flip_embedding(weights): return {name: value.flip(0) if "embed_tokens" in name else value for name, value in weights.items()}


def all_but_the_first_numbers(weights):
    changed = {name: value.clone() for name, value in weights.items()}
    for value in changed.values(): value.view(-1)[64:] *= 1.01
    return changed


def one_bit(weights):
    changed = {name: value.clone() for name, value in weights.items()}
    changed["model.layers.3.self_attn.k_proj.weight"][-1, -1] += 1e-3
    return changed


@pytest.fixture
def moved(run, thinker, tmp_path):
    "The run and its base, to be spoilt"
    base, done = shutil.copytree(thinker, tmp_path/"base"), shutil.copytree(run.config.output_dir, tmp_path/"run")
    for name in ("training_config.json",):
        config = json.loads((done/name).read_text(encoding="utf-8"))
        (done/name).write_text(json.dumps(config | dict(model_name=str(base))), encoding="utf-8")
    return done, base


@pytest.mark.parametrize("change", [change_norms, flip_embedding, all_but_the_first_numbers, one_bit], ids=lambda change: change.__name__)
def test_a_base_with_other_weights_is_refused(moved, tmp_path, change):
    "Opening, merging, continuing and resuming say it; asked to, opening goes on and names the difference"
    done, base = moved
    assert load_run(done)
    save_file(change(load_file(base/"model.safetensors")), base/"model.safetensors", dict(format="pt"))
    for call in (lambda: load_run(done), lambda: merge(done)):
        with pytest.raises(ModelError, match="trained on other weights.*allow_other_base=True"): call()
    config = run_config(done)
    with pytest.raises(ModelError, match="trained on other weights.*delete adapter_identity.json"):
        LoRATrainer(tiny_config(tmp_path/"next", model_name=str(base), continue_from=done, max_steps=1)).train(show=False)
    config.max_steps = 6
    with pytest.raises(RunError, match="numbers of the base model have changed"): LoRATrainer(config).train(show=False, resume=True)
    with pytest.warns(UserWarning, match="trained on other weights"): load_run(done, allow_other_base=True)


def test_the_same_weights_in_another_cut_are_the_same_base(moved):
    done, base = moved
    weights = load_file(base/"model.safetensors")
    names = sorted(weights)
    (base/"model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: weights[name] for name in part}, base/f"model-{number:05}-of-00002.safetensors", dict(format="pt"))
    index = {name: f"model-{1 + at % 2:05}-of-00002.safetensors" for at, name in enumerate(names)}
    (base/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_run(done)


def edit_adapter(done, change):
    file = done/"lora_weights"/"adapter_model.safetensors"
    save_file(change(load_file(file)), file, dict(format="pt"))


def swap_layers(weights):
    one, other = "base_model.model.model.layers.0.", "base_model.model.model.layers.1."
    return {name.replace(one, "#").replace(other, one).replace("#", other): value for name, value in weights.items()}


def test_a_changed_adapter_is_said(moved):
    "Layers that changed places, a strength that was edited, an adapter that does nothing: they load, and that is said"
    done, _ = moved
    kept = (done/"lora_weights"/"adapter_model.safetensors").read_bytes()
    edit_adapter(done, swap_layers)
    with pytest.warns(UserWarning, match="was changed after training"): load_run(done)
    edit_adapter(done, lambda weights: {name: value * 0 if "lora_B" in name else value for name, value in weights.items()})
    with pytest.warns(UserWarning, match="changes nothing: all of its 42 lora_B"): load_run(done)
    (done/"lora_weights"/"adapter_model.safetensors").write_bytes(kept)
    settings = json.loads((done/"lora_weights"/"adapter_config.json").read_text(encoding="utf-8"))
    for change in (dict(lora_alpha=64), dict(use_rslora=True), dict(alpha_pattern=dict(q_proj=1))):
        (done/"lora_weights"/"adapter_config.json").write_text(json.dumps(settings | change), encoding="utf-8")
        with pytest.warns(UserWarning, match=f"adapter_config.json in .* was changed after training: {next(iter(change))}="): load_run(done)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_numbers_that_are_none_is_refused(moved, value):
    done, _ = moved

    def spoil(weights):
        next(iter(weights.values())).view(-1)[3] = value
        return weights
    edit_adapter(done, spoil)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match="not finite"): load_run(done)


def test_a_foreign_tokenizer_is_refused(moved):
    "One with more ids than the model has rows"
    done, _ = moved
    content = json.loads((done/"lora_weights"/"tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append(dict(id=9000, content="<|far|>", single_word=False, lstrip=False, rstrip=False,
        normalized=False, special=True))
    (done/"lora_weights"/"tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="rows of embeddings"): load_run(done)


# ---- merging measures what is left --------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, kept", [(1., "the same"), (1e-3, "refused")])
def test_what_rounding_takes_from_an_adapter_is_measured(moved, tmp_path, scale, kept):
    done, _ = moved
    config = json.loads((done/"training_config.json").read_text(encoding="utf-8"))
    (done/"training_config.json").write_text(json.dumps(config | dict(bf16=True)), encoding="utf-8")
    edit_adapter(done, lambda weights: {name: (20 if scale == 1. else scale) * value if "lora_B" in name else value
        for name, value in weights.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kept == "the same": assert merge(done, tmp_path/"out").verdict == "the same"
        else:
            with pytest.raises(ModelError, match=r"has kept only \d+%.*fp32=True, --fp32.*force=True, --force"): merge(done, tmp_path/"out")
            forced, exact = merge(done, tmp_path/"out", force=True), merge(done, tmp_path/"exact", fp32=True)
            assert forced.effect_kept < 0.8 and "NOT" in forced.verdict and exact.effect_kept > 0.99 and exact.dtype == "float32"


def test_an_adapter_that_changes_nothing_is_said_in_the_report(moved, tmp_path):
    done, _ = moved
    edit_adapter(done, lambda weights: {name: value * 0 if "lora_B" in name else value for name, value in weights.items()})
    with pytest.warns(UserWarning, match="changes nothing"): report = merge(done, tmp_path/"out")
    assert report.agrees and "the adapter changes nothing" in report.notes


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_run_on_a_quantised_base_is_compared_with_the_model_that_was_trained(tmp_path, bits):
    config = tiny_config(tmp_path, max_steps=8, **{bits: True})
    LoRATrainer(config).train(show=False)
    report = merge(config.output_dir, force=True)
    assert any("8 or 4 bits" in note for note in report.notes) and report.effect_kept > 0.99 and report.losses[1] < report.losses[0]


def test_templates_with_names_keep_them_all(thinker, tmp_path):
    "The one for tools stays, and asks without thinking too"
    from sage_finetune.data.dataset import prepare_dataset
    from sage_finetune.data.run_data import disable_thinking_by_default
    from sage_finetune.modeling.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(str(thinker))
    other = "{# without a switch #}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = {"default": THINKER, "tool_use": THINKER + "{# tools #}", "rag": other}
    disable_thinking_by_default(tokenizer,
        prepare_dataset([dict(instruction=f"Question {n}?", output=f"Answer {n}.") for n in range(4)], tokenizer).report)
    templates = tokenizer.chat_template
    assert list(templates) == ["default", "tool_use", "rag"] and templates["rag"] == other
    assert all("set enable_thinking = false" in templates[name] and templates[name].endswith(text)
        for name, text in (("default", THINKER), ("tool_use", "{# tools #}")))
    assert prompt_of(tokenizer).endswith("<think>\n\n</think>\n\n")
