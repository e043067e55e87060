"LoRA fine-tuning that one can read, see and trust, in a notebook"
from importlib import import_module

__version__ = "0.1.0"

# Where each public name lives. Nothing is imported before it is asked for: `import sage_finetune` stays light.
_home = {
    "LoRAConfig": "config",
    "TrainingConfig": "config",
    "PresetConfigs": "config",
    "suggest_preset": "config",
    "FinetuneError": "core.errors",
    "render": "prompt",
    "render_all": "prompt",
    "render_prompt": "prompt",
    "load_training_data": "files",
    "prepare_dataset": "data",
    "to_messages": "rows",
    "show_batch": "batches",
    "health_report": "health",
    "load_base": "model",
    "attach_lora": "model",
    "estimate_memory": "memory",
    "measure_memory": "memory",
    "LoRATrainer": "trainer",
    "Step": "trainer",
    "TrainingResult": "trainer",
    "train_from_meta": "trainer",
    "load_run": "export",
    "merge": "export",
    "generate": "chat",
    "answers": "chat",
    "accuracy": "chat",
    "compare": "chat",
    "Chat": "chat",
    "adapter_scale": "chat",
    "logprob_diff": "chat",
    "SideBySide": "chat",
    "load_cached_model": "chat",
    "LossPlot": "plot",
    "plot_run": "plot",
    "compare_runs": "plot",
    "start_run": "launch",
    "follow": "launch",
    "stop_run": "launch",
    "attached": "launch",
    "doctor": "diagnosis",
    "free": "diagnosis",
    "ConfigForm": "form",
    "DataPanel": "data_panel",
    "TrainPanel": "train_panel",
    "ChatPanel": "chat_panel",
    "Studio": "widgets",
    "quickstart": "demo",
}
__all__ = ["__version__", *_home]


def __getattr__(name):
    "Fetch a public name from its module, the first time it is asked for"
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_home[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
