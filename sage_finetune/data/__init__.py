"Rows of any shape become examples, checked and looked at; `from sage_finetune.data import prepare_dataset` finds every public name of the modules below"
from importlib import import_module

_modules = (  # those without torch first
    "rows", "files", "raw_rows", "archives", "encodings", "row_limits", "json_stream", "csv_tables", "arrow_memory", "parquet_files",
    "arrow_files", "tasks", "foreign", "llamafactory", "axolotl", "training_notebooks", "migrate", "unsloth", "llamafactory_files", "corpus",
    "code_sections", "documents", "chat_logs", "questions", "annotation", "dataset", "truncation", "eval_split", "report", "preprocessing", "writing", "store", "cache",
    "collation", "health", "findings", "read_back", "text_measures", "minhash", "question_match", "measurements",
    "length_checks", "answer_checks", "duplicate_checks", "split_checks", "character_checks", "run_data", "own_data")


def __getattr__(name):
    "Fetch a module of this package, or a public name from the module that defines it, the first time it is asked for"
    if name in _modules: return import_module(f"{__name__}.{name}")
    for module in () if name.startswith("_") else _modules:
        home = import_module(f"{__name__}.{module}")
        if name in home.__all__: return globals().setdefault(name, getattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
