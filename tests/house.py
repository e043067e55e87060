"""Guards of the house: each looks at a project folder and returns a list of sentences, one for each thing that is wrong.

They take the folder as an argument so that a test can plant a fault in a copy and see that the guard speaks up (test_house.py).
"""
import ast
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import tokenize
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "sage_finetune"
# Wings from the ground up, each a package and a folder of notebooks; "" is the top level. A wing imports from itself and from those before it.
WINGS = ("core", "modeling", "")

# Who may import a library, and why. A library that is named here may be imported by nobody else.
# (Below `if TYPE_CHECKING:` anybody may: a type beside a parameter is for readers and never runs.)
MAY_IMPORT = {
    "ipywidgets": {
        "panel": "what all panels share; everything below it also works in a terminal",
        "form": "the settings", "data_panel": "the rows", "train_panel": "the run", "chat_panel": "the talk", "widgets": "all of them in one place"},
    "matplotlib": {"plot": "the pictures; a run on a server needs none"},
    "detect_secrets": {"core.secrets": "rules that others keep, inside a function: they are asked for a text, never for a file or a service"},
    "typer": {"cli": "the command line; the library is used without it"},
    "transformers": {
        "model": "loads models and tokenizers",
        "engine": "offers an attention function to models, by the registry the library has for that",
        "memory": "reads a model's config.json, to rehearse a step without its weights",
        "chat": "streams answers: generation's streamer and stopping criteria are the library's",
        "tiny": "makes the embedded model: a Qwen2 from nothing and its tokenizer, which `model` then loads like any other"},
    "tokenizers": {"tiny": "trains the embedded model's vocabulary"},
    "peft": {"model": "attaches, saves and merges adapters", "chat": "turns an adapter down and up with the library's own switch"},
    "bitsandbytes": {"model": "8-bit and 4-bit weights, 8-bit optimizer"},
}
# Imported under another name than the one they are installed by.
INSTALLED_AS = {"IPython": "ipython"}
# Not there on every computer: imported inside a function, where its absence can be said in a sentence.
EXTRAS = {"tensorboard", "wandb"}
# These import no torch: a form, a prompt, a run folder or a corpus is looked at, and the command line helps, without waiting seconds.
LIGHT = ("config", "tokens", "template", "prompt", "rows", "files", "runs", "tasks", "diagnosis", "panel", "form", "world", "cli")  # and all of core
# Names that were private to this project, and the field's: nobody takes them up again.
RETIRED = dict(pair.split("=") for pair in """
_alike_layers=_identical_layers _can_go_on=_check_continuable _Chance=_EpochShuffler _Copies=_ForkPool _dealt=_assign_to_ranks
_does_the_same=_outputs_match _Draw=_GumbelNoise _drawn_out=_extrapolate_layers _each_sample=_varlen_attention
_frozen_chance=_legacy_rng _Gate=_GatedMLP _Halted=_Cancelled _heard_between_layers=_interruptible
_is_plain_adapter=_is_vanilla_lora _last_words=_last_error_line _lean_adapter=_fused_lora_forward
_lean_gate=_fused_gated_mlp_forward _lean_norm=_fused_rms_norm_forward _looks_like=_matching_fused_forward
_loss_and_slopes=_loss_and_grad_logits _Making=_StreamingGeneration _meetings=_lsh_candidates _mix_samples=disable_varlen
_Mould=_ShapeCache _on_trial=_check_mode _reading_samples=_varlen_mode _ready_to_learn=_prepare_for_training _Recipe=_BatchArgs
_rehearse=_trace_step _retire=_detach _same_pace=_is_comparable _sample_slopes=_attention_backward _samples_apart=_varlen_sdpa
_ShortAttention=_VarlenAttention _Stage=_DryRun _surroundings=_process_env _unlearnt=_mask_labels _what_is_wrong=_why_rejected
adapter_strength=adapter_scale answers_directly=disable_thinking_by_default Audience=CallbackHandler
back_to_the_start_of_the_step=rewind_rng Batching=BatchPlanner BitsDial=QuantizationControl Bystander=NullRunWriter
cheapest_fix=cheapest_reduction chunked_loss=chunked_cross_entropy data_remarks=report_rows earlier_pace=previous_step_time
empty_model=build_meta_model evaluation_due=should_evaluate fields_row=flex_row find_leak=check_cross_contamination
find_model=resolve_model folder_atomic=atomic_directory forget_models=clear_model_cache free_memory=available_memory
go_on_with=prepare_resume hand_back=trim_memory help_phrases=field_help is_learnt=is_trained_on keep_memory=retain_freed_memory
keep_samples_apart=enable_varlen Keeper=CheckpointManager learnt_tokens=count_target_tokens lengths_of=token_lengths
likeliest_answers=greedy_generate line_html=alert_html line_layout=batch_layout longest_lines=largest_micro_batch
make_lean=apply_fused_forwards make_plain=restore_forwards make_room=resize_embeddings make_schedule=make_lr_scheduler
make_talk=prepare_conversation MemoryCount=MemoryTracker MemoryProcess=MemoryWorker never_stopped=uninterrupted_losses
open_run=load_run pace_line=progress_line packing_path=detect_packing_mode PackingPath=PackingMode
pass_seconds=time_forward_backward patience_is_over=should_stop_early plain_outcome=reference_loss_and_grad process_gone=is_stale
read_shape=load_model_config readable_rows=iter_valid_rows refuse_taken=ensure_empty renew_best=reevaluate_best
run_at_work=active_run run_here=run_in_foreground RunningMean=EMA said_by=error_message shared_model=load_cached_model
shown_text=escape_text size_text=format_bytes standing_line=status_line StandIns=Placeholders still_works=is_running
STRONGEST=MAX_SCALE sum_gradients=all_reduce_grads sum_over_processes=all_reduce_sum TalkView=ConversationView Ticker=RepeatingTimer
token_shift=logprob_diff TOKENS_AT_ONCE=MICRO_BATCH_TOKENS TokenShift=TokenLogprobDiff
try_engine=check_equivalence wants_best=tracks_best whole_room=memory_budget why_fixed=adapter_locked_reason
why_unwritable=describe_write_error words_of=alt_text
""".split())
COPIED = ("nbs", PACKAGE, "tests", "benchmarks", ".ci", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "README.md",
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")


# ---- the project's files --------------------------------------------------------------------------------------------

def copy_project(root, target):
    "A copy of what belongs to the project, without environments, caches and builds"
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = root/name
        if source.is_dir(): shutil.copytree(source, target/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".last_checked", "finetune_output"))
        elif source.exists(): shutil.copy2(source, target/name)
    return target


def settings(root):
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(root): return sorted(path for path in (root/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(root).parts))


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def text_of(value): return "".join(value) if isinstance(value, list) else value


def code_of(notebook): return "\n\n".join(text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def modules(root):
    "The modules by name, those of a wing with its name before it: core.storage"
    found = sorted((root/PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(root/PACKAGE).with_suffix("").parts): path for path in found if not path.stem.startswith("_")}


def rooms(root):
    "The library notebooks: module name -> place in the order of reading, (wing, number), and path"
    found = {}
    for level, wing in enumerate(WINGS):
        for path in sorted((root/"nbs"/wing).glob("*.ipynb")):
            match = re.fullmatch(r"(\d\d)_(\w+)", path.stem)
            if match: found[".".join(filter(None, (wing, match[2])))] = ((level, int(match[1])), path)
    return found


def run_python(code, folder, **environment):
    "Run Python code in a folder (which comes first on its path), in a process of its own; its output, or AssertionError with what it said"
    variables = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **environment)
    variables.pop("IN_TEST", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- notebooks and modules ------------------------------------------------------------------------------------------

def exports_out_of_sync(root):
    "Modules that differ from what their notebooks export"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(root, Path(folder)/"project")
        for path in (copy/PACKAGE).rglob("*.py"):
            if not path.stem.startswith("__"): path.unlink()  # __init__ and __main__ are written by hand
        run_python("from nbdev.doclinks import nbdev_export; nbdev_export()", copy)
        names = {path.relative_to(base/PACKAGE).as_posix() for base in (root, copy) for path in (base/PACKAGE).rglob("*.py")}
        differ = [name for name in sorted(names) if _bytes(root/PACKAGE/name) != _bytes(copy/PACKAGE/name)]
    return [f"{PACKAGE}/{name} is not what the notebooks export; change the notebook, then run nbdev-export" for name in differ]


def _bytes(path): return path.read_bytes() if path.exists() else None


def not_clean(root):
    "Notebooks that nbdev-clean would change"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(root, Path(folder)/"project")
        run_python("from nbdev.clean import nbdev_clean; nbdev_clean()", copy)
        names = [path.relative_to(root) for path in notebooks(root)]
        return [f"{name} is not clean; run nbdev-clean" for name in names if (root/name).read_bytes() != (copy/name).read_bytes()]


def widget_state(root):
    "Notebooks with saved widgets: megabytes that no reader sees, and a broken picture on GitHub"
    found = []
    for path in notebooks(root):
        notebook, name = load(path), path.relative_to(root)
        if "widgets" in notebook["metadata"]: found.append(f"{name} holds the state of widgets in its metadata")
        kinds = {kind for cell in notebook["cells"] for output in cell.get("outputs", []) for kind in output.get("data", {}) if "widget" in kind}
        if kinds: found.append(f"{name} holds an output of kind {', '.join(sorted(kinds))}")
    return found


# "ada" is nobody's account: the user in examples that need a full path.
ABSOLUTE = re.compile(
    r"(?<![\w./:~<}\-])/(?:home/(?!ada\b)|root/|tmp/|work/|workspace/|content/|kaggle/|Users/(?!ada\b)|private/var/|var/folders/|var/tmp/)[\w.]"
    r"|(?<!\w)file:///|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Temp|Windows)\b")


def absolute_paths(root):
    "Paths of one computer in the sources or outputs of notebooks"
    found = []
    for path in notebooks(root):
        for number, cell in enumerate(load(path)["cells"]):
            shown = [text_of(output.get("text", "")) for output in cell.get("outputs", [])]
            shown += [text_of(value) for output in cell.get("outputs", []) for kind, value in output.get("data", {}).items()
                if kind.startswith("text/") or kind == "image/svg+xml"]
            shown += [text_of(output.get("traceback", "")) for output in cell.get("outputs", [])]
            for text in (text_of(cell["source"]), *shown):
                found += [f"{path.relative_to(root)}, cell {number}: {text[max(0, m.start() - 15):m.end() + 25]!r} is a path of one computer"
                    for m in ABSOLUTE.finditer(text)]
    return found


def unmatched(root):
    "Modules without their notebook, notebooks without their module, numbers used twice, tutorials that export"
    found, rooms_, modules_ = [], rooms(root), modules(root)
    for name, (_, path) in rooms_.items():
        said = re.findall(r"^#\|\s*default_exp:?\s+(\S+)", code_of(load(path)), flags=re.M)
        if said != [name]: found.append(f"{path.relative_to(root)} should export {name}, and says {said or 'nothing'}")
        if name not in modules_: found.append(f"{path.relative_to(root)} has no module {file_of(name)}")
    found += [f"{file_of(name)} has no notebook nbs/{'/'.join([*name.split('.')[:-1], 'NN_' + name.split('.')[-1]])}.ipynb" for name in modules_ if name not in rooms_]
    places = [place for place, _ in rooms_.values()]
    found += [f"two notebooks have the number {place[1]:02d}" for place in sorted({place for place in places if places.count(place) > 1})]
    library = {path for _, path in rooms_.values()}
    for path in notebooks(root):
        if path in library: continue
        code = code_of(load(path))
        if re.search(r"^#\|\s*(default_exp|exports?)\b", code, flags=re.M): found.append(f"{path.relative_to(root)} is not a library page and exports")
        if re.search(r"\bnbdev\b", code): found.append(f"{path.relative_to(root)} needs nbdev, which Colab does not have")
    return found


def file_of(name): return f"{PACKAGE}/{name.replace('.', '/')}.py"


def unintroduced(root):
    "Notebooks that do not open with a title and a one-line promise"
    found = []
    for path in notebooks(root):
        first = next((text_of(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "markdown"), "")
        if not re.match(r"# .+\n+> .+", first): found.append(f"{path.relative_to(root)} does not open with '# Title' and '> promise'")
    return found


# ---- imports --------------------------------------------------------------------------------------------------------

def homes(root):
    "The table of public names in __init__.py: name -> module"
    for node in ast.parse((root/PACKAGE/"__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_home": return ast.literal_eval(node.value)
    return {}


def imported(path):
    "Every import of a module: (name with dots, names taken from it, line, where: 'top', 'function' or 'types')"
    tree, where = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): where |= {id(one): "function" for one in ast.walk(node)}
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            where |= {id(one): "types" for statement in node.body for one in ast.walk(statement)}
    for node in ast.walk(tree):
        place = where.get(id(node), "top")
        if isinstance(node, ast.Import): yield from ((alias.name, [], node.lineno, place) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (_package(path, node.level) if node.level else "", node.module)))
            yield base, [alias.name for alias in node.names], node.lineno, place
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant): yield str(node.args[0].value), [], node.lineno, place


def _package(path, level):
    "The package that so many dots mean in a module: .errors in core/storage.py is sage_finetune.core.errors"
    inside = path.parts[len(path.parts) - path.parts[::-1].index(PACKAGE) - 1:-1]
    return ".".join(inside[:len(inside) - level + 1])


def targets(name, taken, root):
    "The rooms that an import of the package leads to"
    parts = name.split(".")
    if parts[0] != PACKAGE: return []
    if parts[1:] and parts[1] in WINGS: return [f"{parts[1]}.{parts[2]}"] if parts[2:] else [f"{parts[1]}.{one}" for one in taken]
    if len(parts) > 1: return [parts[1]]
    return [homes(root).get(one, one) for one in taken if not one.startswith("__")]


def upward_imports(root):
    "Imports of a room with an equal or higher number. (If all point downward there can be no cycle.)"
    found, rooms_ = [], rooms(root)
    for module, path in modules(root).items():
        for name, taken, line, _ in imported(path):
            for target in targets(name, taken, root):
                if target.startswith("_"): continue
                if target not in rooms_: found.append(f"{module}.py:{line} imports {target}, which is no room")
                elif module in rooms_ and rooms_[target][0] >= rooms_[module][0]:
                    found.append(f"{module}.py:{line} imports {target}: {rooms_[module][0][1]:02d} may not look up to {rooms_[target][0][1]:02d}")
    return found


def forbidden_imports(root):
    "Libraries in rooms where they do not belong, and libraries that the project does not ask for"
    found, info = [], settings(root)
    asked = {Requirement(one).name.replace("-", "_") for one in info["requirements"].split()}
    for module, path in modules(root).items():
        for name, _, line, place in imported(path):
            library = name.split(".")[0]
            if library == PACKAGE or library in sys.stdlib_module_names or place == "types": continue
            if library in MAY_IMPORT and module not in MAY_IMPORT[library]:
                found.append(f"{module}.py:{line} imports {library}, which belongs to {', '.join(MAY_IMPORT[library])}")
            if library in EXTRAS or name == "torch.utils.tensorboard":
                if place == "top": found.append(f"{module}.py:{line} imports {name} outside a function; it is an extra and may be missing")
            elif INSTALLED_AS.get(library, library) not in asked:
                found.append(f"{module}.py:{line} imports {library}, which settings.ini does not ask for")
    return found


def heavy_rooms(root):
    "Rooms that should be light and import torch or transformers all the same"
    names = [name for name in modules(root) if name in LIGHT or name.startswith("core.")]
    code = f"import sys, {', '.join(f'{PACKAGE}.{name}' for name in names)}; print(*({{'torch', 'transformers', 'datasets', 'matplotlib'}} & set(sys.modules)))"
    loaded = run_python(code, root).split()
    return [f"one of {', '.join(names)} imports {library}" for library in sorted(loaded)]


def heavy_package(root, limit=0.3, times=5):
    "What `import sage_finetune` should not load, and how long it takes (seconds, the median of several fresh processes)"
    code = f"import sys, time; start = time.perf_counter(); import {PACKAGE}; took = time.perf_counter() - start\n" \
        "print(took, *({'torch', 'transformers', 'peft', 'datasets', 'numpy', 'ipywidgets', 'matplotlib', 'typer', 'fastcore'} & set(sys.modules)))"
    runs = [run_python(code, root).split() for _ in range(times)]
    took = statistics.median(float(run[0]) for run in runs)
    found = [f"import {PACKAGE} loads {library}" for library in sorted(runs[0][1:])]
    return found + ([f"import {PACKAGE} takes {took:.2f} s, more than {limit} s"] if took > limit else [])


# A process that reports each attempt to write, create, delete, connect or look up, whoever makes it.
_WATCH = """
import os, sys
seen = []
def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and str(path) not in (os.devnull, "/dev/null"): seen.append(f"writes {path}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "tempfile.mkstemp", "tempfile.mkdtemp"): seen.append(f"{event} {args[0]}")
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind"): seen.append(f"{event} {args[1:]}")
sys.addaudithook(watch)
"""


# What libraries do by themselves when they are imported; none of it holds anything.
NOT_OURS = {
    "torchinductor_": "torch makes this empty folder in the temporary one when transformers or peft is imported",
    "tempfile": "Python finds out whether the temporary folder can be written to, and removes the try"}


def side_effects(root, names=("config",), tolerate=()):
    "What importing rooms and making every config writes, where it connects, and whether it wakes the GPU"
    code = _WATCH + f"""
import importlib, {PACKAGE}
for name in {list(names)!r}: importlib.import_module("{PACKAGE}." + name)
if "config" in {list(names)!r}:
    from {PACKAGE}.config import LoRAConfig, PresetConfigs, TrainingConfig
    made = [LoRAConfig(), TrainingConfig(), *(getattr(PresetConfigs, name)() for name in dir(PresetConfigs) if not name.startswith("_"))]
    said = [repr(config) for config in made]
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(): seen.append("starts CUDA")
sys.stdout.write("\\n".join(["", "SEEN", *seen]))
"""
    with tempfile.TemporaryDirectory() as folder:
        place = {name: Path(folder)/name for name in ("home", "here", "temp")}
        for path in place.values(): path.mkdir()
        said = run_python(code, place["here"], HOME=str(place["home"]), TMPDIR=str(place["temp"]), XDG_CACHE_HOME=str(place["home"]/".cache"),
            XDG_CONFIG_HOME=str(place["home"]/".config"), PYTHONPATH=str(root), HF_HOME=str(place["home"]/"hf"))
        left = [f"leaves {path.relative_to(folder)}" for path in sorted(Path(folder).rglob("*")) if path not in place.values()]
        seen = [line.replace(folder, "...") for line in said.partition("\nSEEN\n")[2].splitlines()]
    if "tempfile" in tolerate: seen = [line for line in seen if not re.fullmatch(r"(writes|os.remove) \.\.\./temp/\w{8}", line)]
    found = [f"importing {', '.join(names)}: {line}" for line in dict.fromkeys(seen + left)]
    return [line for line in found if not any(one in line for one in tolerate)]


# ---- text -----------------------------------------------------------------------------------------------------------

# Calls that turn text into bytes or back; where no encoding is named, it is the locale's. In binary mode there is none.
_CODING = {"open", "fdopen", "read_text", "write_text", "Popen", "run", "check_output", "check_call"}


def unsafe_text(root):
    "Text files and streams whose encoding nobody says, markup escaped by another function than core.text's, and tables written for a spreadsheet, which takes a cell for a formula"
    found = []
    for module, path in modules(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{module}.py:{node.lineno}: {ast.unparse(node)[:60]} says no encoding" for node in ast.walk(tree) if isinstance(node, ast.Call) and _locale_decides(node)]
        if module != "core.text":
            found += [f"{module}.py:{line} escapes markup itself; core.text has sanitize_html" for name, _, line, _ in imported(path) if name == "html"]
        writers = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (node.attr in ("to_csv", "to_excel", "DictWriter") or ast.unparse(node) == "csv.writer")]
        found += [f"{module}.py:{node.lineno} writes a table for a spreadsheet; a cell that begins with = + - @ would be a formula there" for node in writers]
    return found


def _locale_decides(call):
    "Whether a call reads or writes text and leaves its encoding to the locale"
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    named = {one.arg: ast.unparse(one.value) for one in call.keywords}
    if name not in _CODING or "encoding" in named: return False
    if name in ("read_text", "write_text"): return len(call.args) == (name == "write_text")  # a first word is the encoding, or, of an installed distribution, a file
    if name in ("Popen", "run", "check_output", "check_call"): return "True" in (named.get("text"), named.get("universal_newlines"))
    if ast.unparse(call.func) not in ("open", "io.open", "os.fdopen"): return False
    mode = named.get("mode") or next((ast.unparse(one) for one in call.args[1:2]), "'r'")
    return "b" not in mode


# ---- documentation --------------------------------------------------------------------------------------------------

def comments(source): return {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}


def undocumented(root):
    "Public functions, methods and dataclass fields without docstring, annotation or a phrase beside them"
    found = []
    for module, path in modules(root).items():
        source = path.read_text(encoding="utf-8")
        tree, said = ast.parse(source), comments(source)
        said |= {number + 1: line for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}  # the line above counts too
        helped = {ast.unparse(one.targets[0]) for one in tree.body if isinstance(one, ast.Assign) and "help=" in ast.unparse(one.value)}
        for node in tree.body: found += [f"{module}.py: {what}" for what in _gaps(node, said, helped)]
    return found


def _gaps(node, said, helped, owner=""):
    "What is missing at a definition and, for a class, in it"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if not isinstance(node, (*functions, ast.ClassDef)) or (node.name.startswith("_") and not (owner and node.name == "__init__")): return []
    name = f"{owner}.{node.name}" if owner else node.name
    missing = [] if ast.get_docstring(node) or node.name == "__init__" else [f"{name} has no docstring"]
    if isinstance(node, functions): return missing + _parameter_gaps(node, name, said, helped, method=bool(owner))
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list) or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_")]
        missing += [f"{name}.{ast.unparse(one.target)} has no phrase beside it" for one in fields if not _phrase(one, said, helped)]
    return missing + [gap for one in node.body for gap in _gaps(one, said, helped, name)]


def _phrase(node, said, helped):
    "Whether a comment stands beside or above a parameter or field, or its type brings the help text of a command line"
    kind = ast.unparse(node.annotation) if node.annotation else ""
    return node.end_lineno in said or node.lineno in said or kind in helped or "help=" in kind


def _parameter_gaps(node, name, said, helped, method):
    arguments = [*node.args.posonlyargs, *node.args.args, *filter(None, [node.args.vararg]), *node.args.kwonlyargs, *filter(None, [node.args.kwarg])]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    if method and not static: arguments = arguments[1:]
    missing = [f"{name}({one.arg}) has no type" for one in arguments if not one.annotation]
    missing += [f"{name}({one.arg}) has no phrase beside it" for one in arguments if not _phrase(one, said, helped)]
    lines = [one.lineno for one in arguments]
    return missing + [f"{name} has two parameters in line {line}" for line in sorted({line for line in lines if lines.count(line) > 1})]


def retired_names(root):
    "Names that were given up for the field's own, in a page, a test or a benchmark"
    texts = {path: code_of(load(path)) for path in notebooks(root)}
    texts |= {path: path.read_text(encoding="utf-8") for folder in ("tests", "benchmarks") for path in (root/folder).rglob("*.py") if path.name not in ("house.py", "test_house.py")}
    word = re.compile(r"(?<!\w)(" + "|".join(RETIRED) + r")(?!\w)")
    return [f"{path.relative_to(root)} says {name}; the field's word is {RETIRED[name]}" for path, text in texts.items() for name in sorted({*word.findall(text)})]


def stale_readme(root):
    "README.md or its pictures differ from nbs/index.ipynb"
    done = subprocess.run([sys.executable, ".ci/docs.py", "--check"], cwd=root, capture_output=True, text=True, timeout=120)
    return [] if done.returncode == 0 else [(done.stdout + done.stderr).strip()]


# ---- metadata -------------------------------------------------------------------------------------------------------

def version_of(root): return re.search(r'^__version__ = "(.+)"', (root/PACKAGE/"__init__.py").read_text(encoding="utf-8"), re.M)[1]


def metadata_faults(root):
    "Version, requirements, tested versions and addresses that contradict each other"
    info, found = settings(root), []
    project = (root/"pyproject.toml").read_text(encoding="utf-8")
    for key, line in {"name": f'name = "{info["lib_name"]}"', "min_python": f'requires-python = ">={info["min_python"]}"'}.items():
        if line not in project: found.append(f"pyproject.toml lacks {line}, which settings.ini says ({key})")
    newest = re.search(r"^## (\S+)", (root/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if not newest or newest[1] != version_of(root): found.append(f"CHANGELOG.md begins with {newest and newest[1]}, the package is {version_of(root)}")
    wanted = [Requirement(one) for key in info if key.endswith("requirements") for one in info[key].split()]
    lines = [line for line in (root/"constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    for one in wanted:
        if one.name not in pinned: found.append(f"constraints.txt has no tested version of {one.name}")
        elif not one.specifier.contains(pinned[one.name]): found.append(f"constraints.txt has {one.name} {pinned[one.name]}, settings.ini wants {one}")
    return found + foreign_addresses(root)


def foreign_addresses(root):
    "Addresses of this project on GitHub that are not the one in settings.ini"
    own, found = settings(root)["git_url"].removeprefix("https://github.com/"), []
    texts = {path: path.read_text(encoding="utf-8") for path in [*notebooks(root), root/"README.md", root/"CONTRIBUTING.md", root/"Makefile"] if path.exists()}
    for path, text in texts.items():
        for said in re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/[\w.-]+)", text):
            said = said.removesuffix(".git")
            if "sage" in said.lower() and said != own: found.append(f"{path.relative_to(root)} points to {said}, the project is {own}")
    return found


def all_guards():
    "Every guard by name; the last two run over all rooms, where libraries do things of their own"
    plain = (exports_out_of_sync, not_clean, widget_state, absolute_paths, unmatched, unintroduced, upward_imports, forbidden_imports, heavy_rooms,
        heavy_package, side_effects, unsafe_text, undocumented, retired_names, stale_readme, metadata_faults)
    return {guard.__name__: guard for guard in plain} | {"side_effects_of_all_rooms": lambda root: side_effects(root, sorted(modules(root)), NOT_OURS)}


if __name__ == "__main__":
    # python tests/house.py [guard ...]: what is wrong in this project, a line each
    project, guards = Path(__file__).resolve().parents[1], all_guards()
    for name in sys.argv[1:] or guards:
        for fault in guards[name](project): print(f"{name}: {fault}")
