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
    "render": "chat_format.rendering",
    "render_all": "chat_format.rendering",
    "render_prompt": "chat_format.rendering",
    "load_training_data": "data.files",
    "prepare_dataset": "data.dataset",
    "to_messages": "data.rows",
    "show_batch": "data.collation",
    "health_report": "data.health",
    "load_base": "modeling.base",
    "attach_lora": "modeling.adapter",
    "estimate_memory": "training.memory",
    "measure_memory": "training.memory_measurement",
    "LoRATrainer": "trainer",
    "StepMetrics": "training.loop",
    "TrainingResult": "training.result",
    "train_from_meta": "trainer",
    "load_run": "inference.export",
    "merge": "inference.export",
    "generate": "inference.generation",
    "generate_batch": "inference.generation",
    "accuracy": "inference.evaluation",
    "compare": "inference.evaluation",
    "Chat": "inference.chat",
    "adapter_scale": "inference.generation",
    "logprob_diff": "inference.evaluation",
    "SideBySide": "inference.chat",
    "load_cached_model": "inference.model_cache",
    "LossPlot": "runs.plot",
    "plot_run": "runs.plot",
    "compare_runs": "runs.plot",
    "start_run": "runs.launch",
    "follow": "runs.launch",
    "stop_run": "runs.launch",
    "run_status": "runs.launch",
    "doctor": "ui.diagnosis",
    "free": "ui.diagnosis",
    "ConfigForm": "ui.form",
    "DataPanel": "ui.data_panel",
    "QuestionPanel": "ui.question_panel",
    "TrainPanel": "ui.train_panel",
    "ChatPanel": "ui.chat_panel",
    "Studio": "ui.studio",
    "quickstart": "tiny.demo",
}
__all__ = ["__version__", *_home]  # noqa: PLE0604 (strings, all of them)

TYPE_CHECKING = False  # type checkers take it for True
if TYPE_CHECKING:  # the same for editors and type checkers, which run nothing
    # isort: off
    from .chat_format.rendering import render as render, render_all as render_all, render_prompt as render_prompt
    from .config import (
        LoRAConfig as LoRAConfig, PresetConfigs as PresetConfigs,
        TrainingConfig as TrainingConfig, suggest_preset as suggest_preset)
    from .core.errors import FinetuneError as FinetuneError
    from .data.collation import show_batch as show_batch
    from .data.dataset import prepare_dataset as prepare_dataset
    from .data.files import load_training_data as load_training_data
    from .data.health import health_report as health_report
    from .data.rows import to_messages as to_messages
    from .inference.chat import Chat as Chat, SideBySide as SideBySide
    from .inference.evaluation import accuracy as accuracy, compare as compare, logprob_diff as logprob_diff
    from .inference.export import load_run as load_run, merge as merge
    from .inference.generation import adapter_scale as adapter_scale, generate as generate, generate_batch as generate_batch
    from .inference.model_cache import load_cached_model as load_cached_model
    from .modeling.adapter import attach_lora as attach_lora
    from .modeling.base import load_base as load_base
    from .runs.launch import follow as follow, run_status as run_status, start_run as start_run, stop_run as stop_run
    from .runs.plot import LossPlot as LossPlot, compare_runs as compare_runs, plot_run as plot_run
    from .tiny.demo import quickstart as quickstart
    from .trainer import LoRATrainer as LoRATrainer, train_from_meta as train_from_meta
    from .training.loop import StepMetrics as StepMetrics
    from .training.memory import estimate_memory as estimate_memory
    from .training.memory_measurement import measure_memory as measure_memory
    from .training.result import TrainingResult as TrainingResult
    from .ui.chat_panel import ChatPanel as ChatPanel
    from .ui.data_panel import DataPanel as DataPanel
    from .ui.diagnosis import doctor as doctor, free as free
    from .ui.form import ConfigForm as ConfigForm
    from .ui.question_panel import QuestionPanel as QuestionPanel
    from .ui.studio import Studio as Studio
    from .ui.train_panel import TrainPanel as TrainPanel
    # isort: on
else:
    def __getattr__(name):
        "Fetch a public name from its module, the first time it is asked for"
        if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_home[name]}"), name)
        globals()[name] = value
        return value


def __dir__(): return sorted({*globals(), *__all__})
