"""The memory of every architecture can be estimated, in every precision: a number, or one sentence that says why not."""
import shutil
import warnings

import pytest
import torch
import transformers
from test_coverage import MIXTURES, STATES
from test_memory import bytes_of, constants
from test_packing import SHAPES

from sage_finetune.config import TrainingConfig, tiny_path
from sage_finetune.core.errors import FinetuneError
from sage_finetune.modeling.adapter import attach_lora
from sage_finetune.modeling.base import load_base
from sage_finetune.training.memory import estimate_memory

ARCHITECTURES = MIXTURES | STATES | {f"packing {name}": shape for name, shape in SHAPES.items()}
OVERRIDES = [dict(device="cpu", bf16=False), dict(device="cuda", bf16=True),
         dict(device="cpu", bf16=True, gradient_checkpointing=True), dict(device="cuda", bf16=True, load_in_4bit=True),
         dict(device="cpu", bf16=True, packing=False)]
# in some precisions: a step of them asks for numbers, or cannot be computed twice
REFUSED = {"mamba", "packing mamba", "jetmoe", "falcon_mamba", "mamba2"}


def configured(name):
    kind, fields = ARCHITECTURES[name]
    return getattr(transformers, {"Llama4": "Llama4TextConfig", "Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))(**fields)


@pytest.fixture
def model_of(tmp_path):
    def make(name):
        config = configured(name)
        config.architectures = [type(config).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
        config.save_pretrained(tmp_path/"model")
        return str(tmp_path/"model")
    return make


@pytest.mark.slow
@pytest.mark.parametrize("number, name", list(enumerate(ARCHITECTURES)), ids=str)
def test_every_architecture_has_an_estimate(model_of, number, name):
    "Each in one of the precisions, by turns"
    overrides = dict(OVERRIDES[number % len(OVERRIDES)])
    device, config = overrides.pop("device"), TrainingConfig(model_name=model_of(name), max_length=32,
        per_device_train_batch_size=2, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: estimate = estimate_memory(config, device=device)
        except FinetuneError as error:
            assert name in REFUSED and "\n" not in str(error) and ("max_steps" in str(error)
                or "gradient_checkpointing" in str(error)), str(error)
            return
    assert all(size > 0 for part, size in estimate.parts.items() if part in ("weights", "adapter", "gradients", "optimizer", "activations"))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [dict(bf16=False), dict(bf16=True)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "packing falcon", "packing gpt2"])
def test_weights_and_adapter_are_counted_to_the_byte(tmp_path, name, overrides):
    "Fused experts and the adapters on them too"
    transformers.AutoModelForCausalLM.from_config(configured(name), dtype=torch.float32).save_pretrained(tmp_path/"model")
    for path in tiny_path().glob("*"):
        if "token" in path.name or "chat" in path.name: shutil.copy(path, tmp_path/"model")
    config = TrainingConfig(model_name=str(tmp_path/"model"), device="cpu", max_length=16, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned, estimate = attach_lora(load_base(config)[0], config.lora), estimate_memory(config, [8] * 4)
    frozen = ([p for p in tuned.parameters() if not p.requires_grad]
        + [part for layer in tuned.modules() for part in constants(layer)] + list(tuned.buffers()))
    assert (bytes_of(frozen), bytes_of(p for p in tuned.parameters() if p.requires_grad)) == (estimate.parts["weights"],
        estimate.parts["adapter"])
