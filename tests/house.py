"""Guards of the house: each looks at a project folder and returns a list of sentences, one for each thing that is wrong.

They take the folder as an argument so that a test can plant a fault in a copy and see that the guard speaks up (test_house.py).
"""
import ast
import functools
import hashlib
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

import yaml
from packaging.requirements import Requirement

PACKAGE = "sage_finetune"

# Which module or wing may import a library, and why. A library that is named here may be imported by nobody else.
# (Below `if TYPE_CHECKING:` anybody may: a type beside a parameter is for readers and never runs.)
MAY_IMPORT = {
    "ipywidgets": {
        "ui.panel": "what all panels share; everything below it also works in a terminal",
        "ui.fields": "a control for a field", "ui.presets": "the list of presets", "ui.upload": "a button for a file",
        "ui.memory_view": "a bar",
        "ui.form": "the settings", "ui.data_panel": "the rows", "ui.train_panel": "the run", "ui.chat_panel": "the conversation",
        "ui.question_panel": "questions made by hand", "ui.conversation_view": "what was said in it", "ui.chat_controls": "how it is said",
        "ui.studio": "all of them in one place"},
    "matplotlib": {"runs.plot": "the pictures; a run on a server needs none"},
    "detect_secrets": {"core.secrets": "rules that others keep, inside a function: "
        "they are asked for a text, never for a file or a service"},
    "typer": dict.fromkeys(("commands.program", "commands.preparing", "commands.starting", "commands.training", "commands.looking",
        "commands.using", "commands.keeping", "cli"), "the command line; the library is used without it"),
    "lxml": {"data.documents": "reads HTML, inside a function; libxml2 stays quick where Python's own parser does not"},
    "pypdf": {"data.documents": "reads PDF, inside a function; its words are silenced, for they come from the file"},
    "docx": {"data.documents": "reads DOCX, inside a function, once the archive was found small enough"},
    "gguf": {"inference.gguf_vocabulary": "writes GGUF files, inside a function"},
    "libgguf": {"inference.gguf_weights": "makes K-quants, inside a function"},
    "xllamacpp": {"inference.llama_cpp_process": "is llama.cpp, in a process of its own"},
    "yaml": {"core.yaml_files": "configs of other tools, read as plain values"},
    "transformers": {
        "modeling": "loads models and tokenizers, and offers them an attention function by the registry the library has for that",
        "training.meta_model": "reads a model's config.json and builds it without its weights",
        "training.rehearsal": "knows layers that keep their weights the other way round",
        "inference.generation": "streams answers: generation's streamer and stopping criteria are the library's",
        "tiny.pretrain": "makes the embedded model: a Qwen2 from nothing and its tokenizer, which is then loaded like any other"},
    "tokenizers": {"tiny.pretrain": "trains the embedded model's vocabulary"},
    "peft": {
        "modeling": "attaches, saves and merges adapters",
        "training.rehearsal": "knows an adapter's layers when it counts what they keep for the backward pass",
        "inference.generation": "turns an adapter down and up with the library's own switch"},
    "bitsandbytes": {"modeling": "8-bit and 4-bit weights, 8-bit optimizer"},
}
# Imported under another name than the one they are installed by.
INSTALLED_AS = {"yaml": "pyyaml", "IPython": "ipython"}
# Not there on every computer: imported inside a function, where its absence can be said in a sentence.
EXTRAS = {"tensorboard", "wandb", "lxml", "pypdf", "docx", "gguf", "libgguf", "xllamacpp"}
# These import no torch: a form, a prompt, a run folder or a corpus is looked at, and the command line helps, without waiting seconds.
LIGHT = (  # and all of core
    "config", "chat_format.tokens", "chat_format.template", "chat_format.rendering", "data.rows", "data.files", "runs.folder",
    "data.tasks", "ui.diagnosis", "ui.panel", "ui.fields", "ui.presets", "ui.upload", "ui.forecast", "ui.memory_worker",
    "ui.memory_view", "ui.form", "ui.answer_worker", "inference.history", "tiny.world", "cli")
# Names that were private to this project, and the field's: nobody takes them up again.
RETIRED = dict(pair.split("=") for pair in """
_alike_layers=identical_layers _all_bytes=tensor_bytes _ask=_call_c_library _ask_the_hub=_check_hub_answers _bar=stacked_bar
_base_ends=_base_eos _can_go_on=_check_continuable _cannot_load=describe_load_failure _Chance=_EpochShuffler
_check_files=check_files _check_names=check_layer_names _check_numbers=read_checked_json _check_parameters=check_target_parameters
_check_weights=check_weights_size _choose_ways=choose_paths _Copies=_ForkPool _cpu_can_pack=cpu_can_pack _dealt=_assign_to_ranks
_does_the_same=outputs_match _doubled=_doubled_rank _Draw=_GumbelNoise _drawn_out=extrapolate_layers _DryRun=DryRun
_each_sample=_varlen_attention _embedding_modules=embedding_modules _EvenExperts=_EvenSplits
_extrapolate_layers=extrapolate_layers short_reason=first_line _fitting=_name_matcher _flat_inputs=varlen_inputs
_Found=_InputsFound _frozen_chance=_legacy_rng _fused_gated_mlp_forward=fused_gated_mlp_forward
_fused_lora_forward=fused_lora_forward _fused_rms_norm_forward=fused_rms_norm_forward _Gate=_GatedMLP _grow=grow_embeddings
_Halted=_Cancelled _heard_between_layers=_interruptible _identical_layers=identical_layers _idle_words=_unmatched_words
_in_short=_with_resolved_targets _inheritance=_describe_inheritance _is_meant=_is_targeted
_is_plain_adapter=is_vanilla_lora _is_vanilla_lora=is_vanilla_lora _keep_template=_use_adapter_template _keep_wide=_keep_in_fp32
_last_words=_last_error_line _lay_out=_choose_layout _layers=decoder_layers _lean_adapter=fused_lora_forward
_lean_gate=fused_gated_mlp_forward _lean_norm=fused_rms_norm_forward _listed=_as_list _looks=_layer_signature
_looks_like=matching_fused_forward _loss_and_slopes=_loss_and_grad_logits _make_lean=_fuse_layers _Making=StreamingGeneration
_mark_quantised=_mark_quantized _matching_fused_forward=matching_fused_forward _matrices=weight_matrices _Matrix=WeightMatrix
_MAY_BE=_ALLOWED_VALUES _meetings=_lsh_candidates _mended=keep_int8_scale _mix_samples=disable_varlen _moments=peak_moments
_MOST_ENTRIES=_MAX_ENTRIES _Mould=_ShapeCache _names=module_names _NearTies=_NearTieCounter _numbers=_iter_numbers
_on_trial=_check_mode _outputs_match=outputs_match _patterns=adapter_patterns _prepare_for_training=prepare_for_training
_quantisation=_quantization_config _quantised=quantized_weights _Quantised=_QuantizedWeight _READ=_READ_SUFFIXES
_read_past=_bypassed_layers _reading_samples=varlen_mode _ready_to_learn=prepare_for_training _Recipe=_BatchArgs
_rehearse=trace_step _resident=resident_bytes _retire=_detach _same_pace=_is_comparable _sample_slopes=_attention_backward
_samples_apart=_varlen_sdpa _saved_settings=read_adapter_config _shape=_read_shape _ShortAttention=_VarlenAttention
_shortest=_shortest_suffixes _spell=_format_number _stack=layer_stack _Stage=DryRun _STRENGTH=_SCALE_FIELDS
_surroundings=_process_env _switch=_switch_part _tokenizer_beside=_describe_tokenizer_failure _too_much=_why_too_large
_trace_step=trace_step _trains_tied=trains_tied_embeddings _uncountable=describe_uncountable _Unknown=_UnknownNumber
_unknown_without=_describe_code_needed _unlearnt=_mask_labels _unlogged=_quiet_fake_tensors _varlen_mode=varlen_mode
_warn_of_idle_words=warn_of_unmatched_words _ways=_reductions _ways_of=_paths_of _what_is_wrong=_why_rejected
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
STRONGEST=MAX_SCALE sum_gradients=all_reduce_grads sum_over_processes=all_reduce_sum TalkView=ConversationView
Ticker=RepeatingTimer token_shift=logprob_diff TOKENS_AT_ONCE=MICRO_BATCH_TOKENS TokenShift=TokenLogprobDiff
try_engine=check_equivalence whole_room=memory_budget why_fixed=adapter_locked_reason
why_unwritable=describe_write_error words_of=alt_text
_as_kind=_coerce _keep_names=_fsync_directories _speaker=_role _spelling=_vocab_kind _spelt_out=_piece_bytes
add_long_row=add_truncated_row describe_long_row=describe_truncated_row LongRow=TruncatedRow of_down=grad_A of_up=grad_B
own_slope=own_grad short_rate=format_lr slopes=grads time_text=approximate_duration TokenLine=TokenView
trained_mask=loss_mask report.said=report.messages chat.correct=chat.replace_answer chat.edit=chat.edit_and_regenerate
without_secrets=redact_secrets
""".split())
COPIED = ("nbs", PACKAGE, "tests", "benchmarks", ".ci", ".github", "settings.ini", "setup.py", "pyproject.toml",
    "MANIFEST.in", "Makefile", "constraints.txt", "README.md",
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")


# ---- the project's files --------------------------------------------------------------------------------------------

def copy_project(root, target):
    "A copy of what belongs to the project, without environments, caches and builds"
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = root/name
        if source.is_dir():
            shutil.copytree(source, target/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints",
                ".last_checked", "finetune_output"))
        elif source.exists(): shutil.copy2(source, target/name)
    return target


def settings(root):
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(root):
    return sorted(path for path in (root/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in path.relative_to(root).parts))


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def text_of(value): return "".join(value) if isinstance(value, list) else value


def code_of(notebook): return "\n\n".join(text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def modules(root):
    "The modules by name, those of a wing with its name before it: core.storage"
    found = sorted((root/PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(root/PACKAGE).with_suffix("").parts): path for path in found if not path.stem.startswith("_")}


def rooms(root):
    "The library notebooks: module name -> place in the order of reading, (wing, number), and path"
    order, found = wings(root), {}
    for wing in ("", *order):
        for path in sorted((root/"nbs"/wing).glob("*.ipynb")) if (root/"nbs"/wing).is_dir() else ():
            match = re.fullmatch(r"(\d\d)_(\w+)", path.stem)
            if not match: continue
            level = wing or match[2]  # a module of the top level stands between two wings, where settings.ini names it
            found[".".join(filter(None, (wing, match[2])))] = ((order.index(level) if level in order else len(order), int(match[1])), path)
    return found


def wings(root): return settings(root)["wings"].split()


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
    found = {path.relative_to(root/PACKAGE).as_posix(): path.read_bytes() for path in (root/PACKAGE).rglob("*.py")}
    by_hand = {name: content for name, content in found.items() if name.rpartition("/")[2].startswith("__")}  # __init__ and __main__
    made = _exported(root, by_hand)
    differ = [name for name in sorted(found | made) if found.get(name) != made.get(name)]
    return [f"{PACKAGE}/{name} is not what the notebooks export; change the notebook, then run nbdev-export" for name in differ]


_EXPORTS = {}


def _exported(root, by_hand):
    "Every module of the package as the notebooks export it, by name: made once for the same notebooks, settings and modules by hand"
    sources = [*notebooks(root), root/"settings.ini", root/"pyproject.toml"]
    key = hashlib.sha256(repr([by_hand, *((path.relative_to(root), path.read_bytes()) for path in sources)]).encode()).hexdigest()
    if key not in _EXPORTS:
        with tempfile.TemporaryDirectory() as folder:
            copy = copy_project(root, Path(folder)/"project")
            for path in (copy/PACKAGE).rglob("*.py"):
                if path.relative_to(copy/PACKAGE).as_posix() not in by_hand: path.unlink()
            run_python("from nbdev.doclinks import nbdev_export; nbdev_export()", copy)
            _EXPORTS[key] = {path.relative_to(copy/PACKAGE).as_posix(): path.read_bytes() for path in (copy/PACKAGE).rglob("*.py")}
    return _EXPORTS[key]


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
        kinds = {kind for cell in notebook["cells"] for output in cell.get("outputs", [])
            for kind in output.get("data", {}) if "widget" in kind}
        if kinds: found.append(f"{name} holds an output of kind {', '.join(sorted(kinds))}")
    return found


# "ada" is nobody's account: the user in examples that need a full path.
ABSOLUTE = re.compile(
    r"(?<![\w./:~<}\-])/(?:home/(?!ada\b)|root/|tmp/|work/|workspace/|content/|kaggle/|Users/(?!ada\b)|private/var/"
    r"|var/folders/|var/tmp/)[\w.]"
    r"|(?<!\w)file:///|(?<!\w)[A-Za-z]:\\{1,2}(?:Users|Temp|Windows)\b")


def absolute_paths(root):
    "Paths of one computer in the sources or outputs of notebooks"
    return [f"{path.relative_to(root)}, {what}" for path in notebooks(root) for what in _absolute(path.read_text(encoding="utf-8"))]


@functools.cache
def _absolute(source):
    found = []
    for number, cell in enumerate(json.loads(source)["cells"]):
        shown = [text_of(output.get("text", "")) for output in cell.get("outputs", [])]
        shown += [text_of(value) for output in cell.get("outputs", []) for kind, value in output.get("data", {}).items()
            if kind.startswith("text/") or kind == "image/svg+xml"]
        shown += [text_of(output.get("traceback", "")) for output in cell.get("outputs", [])]
        for text in (text_of(cell["source"]), *shown):
            found += [f"cell {number}: {text[max(0, m.start() - 15):m.end() + 25]!r} is a path of one computer"
                for m in ABSOLUTE.finditer(text)]
    return found


def unmatched(root):
    "Modules without their notebook, notebooks without their module, numbers used twice, tutorials that export"
    found, rooms_, modules_ = [], rooms(root), modules(root)
    for name, (_, path) in rooms_.items():
        said = re.findall(r"^#\|\s*default_exp:?\s+(\S+)", code_of(load(path)), flags=re.M)
        if said != [name]: found.append(f"{path.relative_to(root)} should export {name}, and says {said or 'nothing'}")
        if name not in modules_: found.append(f"{path.relative_to(root)} has no module {file_of(name)}")
    found += [f"{file_of(name)} has no notebook nbs/{'/'.join([*name.split('.')[:-1], 'NN_' + name.split('.')[-1]])}.ipynb"
        for name in modules_ if name not in rooms_]
    places = [(path.parent, place[1]) for place, path in rooms_.values()]
    found += [f"two notebooks have the number {number:02d}" for _, number in sorted({place for place in places if places.count(place) > 1})]
    found += [f"settings.ini names the wing {wing}, and nbs/{wing} is not there"
        for wing in wings(root) if wing not in rooms_ and not (root/"nbs"/wing).is_dir()]
    found += [f"{path.relative_to(root)} stands in no wing that settings.ini names" for place, path in rooms_.values()
        if place[0] == len(wings(root))]
    library = {path for _, path in rooms_.values()}
    for path in notebooks(root):
        if path in library: continue
        code = code_of(load(path))
        if re.search(r"^#\|\s*(default_exp|exports?)\b", code, flags=re.M):
            found.append(f"{path.relative_to(root)} is not a library page and exports")
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


def broken_links(root):
    "Links between pages that lead nowhere, to a page or to a heading of it"
    texts = {path: "\n".join(text_of(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
        for path in notebooks(root)}
    headings = {path: {"-".join(line.split()) for line in re.findall(r"^#+ (.+)$", text, flags=re.M)} for path, text in texts.items()}
    found = []
    for path, text in texts.items():
        for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            page = Path(os.path.normpath(path.parent/target)) if target else path
            if not page.exists(): found.append(f"{path.relative_to(root)} leads to {target}, which is not there")
            elif anchor and page in headings and anchor not in headings[page]:
                found.append(f"{path.relative_to(root)} leads to #{anchor}, which {page.name} has not")
    return found


# ---- imports --------------------------------------------------------------------------------------------------------

def homes(root):
    "The table of public names in __init__.py: name -> module"
    return _homes((root/PACKAGE/"__init__.py").read_text(encoding="utf-8"))


# What a guard finds in one file is kept by the file's text: the copies in which faults are planted are the project but for a file or two.
@functools.cache
def _homes(source):
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_home": return ast.literal_eval(node.value)
    return {}


def imported(path):
    "Every import of a module: (name with dots, names taken from it, line, where: 'top', 'function' or 'types')"
    return _imports(path.read_text(encoding="utf-8"), path.parts[len(path.parts) - path.parts[::-1].index(PACKAGE) - 1:-1])


@functools.cache
def _imports(source, inside): return list(_iter_imports(ast.parse(source), inside))


def _iter_imports(tree, inside):
    where = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): where |= {id(one): "function" for one in ast.walk(node)}
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            where |= {id(one): "types" for statement in node.body for one in ast.walk(statement)}
    for node in ast.walk(tree):
        place = where.get(id(node), "top")
        if isinstance(node, ast.Import): yield from ((alias.name, [], node.lineno, place) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (_package(inside, node.level) if node.level else "", node.module)))
            yield base, [alias.name for alias in node.names], node.lineno, place
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant): yield str(node.args[0].value), [], node.lineno, place


def _package(inside, level):
    "The package that so many dots mean in a module of these packages: .errors in core/storage.py is sage_finetune.core.errors"
    return ".".join(inside[:len(inside) - level + 1])


def targets(name, taken, root):
    "The rooms that an import of the package leads to"
    parts = name.split(".")
    if parts[0] != PACKAGE: return []
    if parts[1:] and (root/PACKAGE/parts[1]).is_dir():
        return [f"{parts[1]}.{parts[2]}"] if parts[2:] else [f"{parts[1]}.{one}" for one in taken]
    if len(parts) > 1: return [parts[1]]
    return [homes(root).get(one, one) for one in taken if not one.startswith("__")]


def _page(rooms_, module): return "/".join(rooms_[module][1].with_suffix("").parts[-2:]).removeprefix("nbs/")


def upward_imports(root):
    "Imports from a higher wing, or from an equal or higher number of the same one. (If all point downward there can be no cycle.)"
    found, rooms_ = [], rooms(root)
    for module, path in modules(root).items():
        for name, taken, line, _ in imported(path):
            for target in targets(name, taken, root):
                if target.startswith("_"): continue
                if target not in rooms_: found.append(f"{module}.py:{line} imports {target}, which is no room")
                elif module in rooms_ and rooms_[target][0] >= rooms_[module][0]:
                    found.append(f"{module}.py:{line} imports {target}, which stands above it: "
                        f"{_page(rooms_, target)} comes after {_page(rooms_, module)}")
    return found


def forbidden_imports(root):
    "Libraries in rooms where they do not belong, and libraries that the project does not ask for"
    found, info = [], settings(root)
    asked = {Requirement(one).name.replace("-", "_") for one in info["requirements"].split()}
    for module, path in modules(root).items():
        for name, _, line, place in imported(path):
            library = name.split(".")[0]
            if library == PACKAGE or library in sys.stdlib_module_names or place == "types": continue
            if library in MAY_IMPORT and not {module, module.partition(".")[0]} & set(MAY_IMPORT[library]):
                found.append(f"{module}.py:{line} imports {library}, which belongs to {', '.join(MAY_IMPORT[library])}")
            if library in EXTRAS or name == "torch.utils.tensorboard":
                if place == "top": found.append(f"{module}.py:{line} imports {name} outside a function; it is an extra and may be missing")
            elif INSTALLED_AS.get(library, library) not in asked:
                found.append(f"{module}.py:{line} imports {library}, which settings.ini does not ask for")
    return found


def heavy_rooms(root):
    "Rooms that should be light and import torch or transformers all the same"
    names = [name for name in modules(root) if name in LIGHT or name.startswith("core.")]
    code = (f"import sys, {', '.join(f'{PACKAGE}.{name}' for name in names)}; print(*({{'torch', 'transformers', "
        f"'datasets', 'matplotlib'}} & set(sys.modules)))")
    loaded = run_python(code, root).split()
    return [f"one of {', '.join(names)} imports {library}" for library in sorted(loaded)]


def heavy_package(root, limit=0.3, times=5):
    "What `import sage_finetune` should not load, and how long it takes (seconds, the median of several fresh processes)"
    code = (f"import sys, time; start = time.perf_counter(); import {PACKAGE}; took = time.perf_counter() - start\n"
        "print(took, *({'torch', 'transformers', 'peft', 'datasets', 'numpy', 'ipywidgets', 'matplotlib', 'typer', "
        "'fastcore'} & set(sys.modules)))")
    runs = [run_python(code, root).split()]
    # With something heavy in it, time tells nothing.
    while not runs[0][1:] and len(runs) < times: runs.append(run_python(code, root).split())
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
        said = run_python(code, place["here"], HOME=str(place["home"]), TMPDIR=str(place["temp"]),
            XDG_CACHE_HOME=str(place["home"]/".cache"),
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
    """Text files and streams whose encoding nobody says, markup escaped by another function than core.text's,
    and tables written for a spreadsheet, which takes a cell for a formula"""
    found = []
    for module, path in modules(root).items():
        found += _unsafe(module, path.read_text(encoding="utf-8"))
        if module != "core.text":
            found += [f"{module}.py:{line} escapes markup itself; core.text has sanitize_html"
                for name, _, line, _ in imported(path) if name == "html"]
    return found


@functools.cache
def _unsafe(module, source):
    "What is wrong in a module's own lines"
    nodes = list(ast.walk(ast.parse(source)))
    found = [f"{module}.py:{node.lineno}: {ast.unparse(node)[:60]} says no encoding"
        for node in nodes if isinstance(node, ast.Call) and _locale_decides(node)]
    writers = [node for node in nodes if isinstance(node, ast.Attribute)
        and (node.attr in ("to_csv", "to_excel", "DictWriter") or ast.unparse(node) == "csv.writer")]
    return found + [f"{module}.py:{node.lineno} writes a table for a spreadsheet; a cell that begins with = + - @ would be a formula there"
        for node in writers]


def _locale_decides(call):
    "Whether a call reads or writes text and leaves its encoding to the locale"
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    named = {one.arg: ast.unparse(one.value) for one in call.keywords}
    if name not in _CODING or "encoding" in named: return False
    # a first word is the encoding, or, of an installed distribution, a file
    if name in ("read_text", "write_text"): return len(call.args) == (name == "write_text")
    if name in ("Popen", "run", "check_output", "check_call"): return "True" in (named.get("text"), named.get("universal_newlines"))
    if ast.unparse(call.func) not in ("open", "io.open", "os.fdopen"): return False
    mode = named.get("mode") or next((ast.unparse(one) for one in call.args[1:2]), "'r'")
    return "b" not in mode


# ---- documentation --------------------------------------------------------------------------------------------------

def comments(source):
    return {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT}


def undocumented(root):
    "Public functions, methods and dataclass fields without docstring, annotation or a phrase beside them"
    sources = {module: path.read_text(encoding="utf-8") for module, path in modules(root).items()}
    helped = frozenset(name for source in sources.values() for name in _helped(source))
    return [f"{module}.py: {what}" for module, source in sources.items() for what in _undocumented(source, helped)]


@functools.cache
def _helped(source):
    "Types that bring the help text of a command line along"
    tree = ast.parse(source)
    return {ast.unparse(one.targets[0]) for one in tree.body if isinstance(one, ast.Assign) and "help=" in ast.unparse(one.value)}


@functools.cache
def _undocumented(source, helped):
    tree, said = ast.parse(source), comments(source)
    # The line above counts too.
    said |= {number + 1: line for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    return [what for node in tree.body for what in _gaps(node, said, helped)]


def _gaps(node, said, helped, owner=""):
    "What is missing at a definition and, for a class, in it"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if not isinstance(node, (*functions, ast.ClassDef)) or (node.name.startswith("_") and not (owner and node.name == "__init__")):
        return []
    name = f"{owner}.{node.name}" if owner else node.name
    missing = [] if ast.get_docstring(node) or node.name == "__init__" else [f"{name} has no docstring"]
    patched = isinstance(node, functions) and any(ast.unparse(decorator).startswith("patch") for decorator in node.decorator_list)
    if isinstance(node, functions): return missing + _parameter_gaps(node, name, said, helped, method=bool(owner) or patched)
    if (any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases)):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and not ast.unparse(one.target).startswith("_")]
        missing += [f"{name}.{ast.unparse(one.target)} has no phrase beside it" for one in fields if not _phrase(one, said, helped)]
    return missing + [gap for one in node.body for gap in _gaps(one, said, helped, name)]


def _phrase(node, said, helped):
    "Whether a comment stands beside or above a parameter or field, or its type brings the help text of a command line"
    kind = ast.unparse(node.annotation) if node.annotation else ""
    return node.end_lineno in said or node.lineno in said or kind in helped or "help=" in kind


def _parameter_gaps(node, name, said, helped, method):
    arguments = [*node.args.posonlyargs, *node.args.args, *filter(None, [node.args.vararg]), *node.args.kwonlyargs,
        *filter(None, [node.args.kwarg])]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    if method and not static: arguments = arguments[1:]
    missing = [f"{name}({one.arg}) has no type" for one in arguments if not one.annotation]
    missing += [f"{name}({one.arg}) has no phrase beside it" for one in arguments if not _phrase(one, said, helped)]
    lines = [one.lineno for one in arguments]
    return missing + [f"{name} has two parameters in line {line}" for line in sorted({line for line in lines if lines.count(line) > 1})]


def retired_names(root):
    "Names that were given up for the field's own, in a page, a test or a benchmark"
    texts = {path: code_of(load(path)) for path in notebooks(root)}
    texts |= {path: path.read_text(encoding="utf-8") for folder in ("tests", "benchmarks")
        for path in (root/folder).rglob("*.py") if path.name not in ("house.py", "test_house.py")}
    word = re.compile(r"(?<!\w)(" + "|".join(RETIRED) + r")(?!\w)")
    return [f"{path.relative_to(root)} says {name}; the field's word is {RETIRED[name]}" for path, text in texts.items()
        for name in sorted({*word.findall(text)})]


# Exported cells that stay longer, each with the reason. (Cells of imports may be as long as they are.)
LONG_CELLS = {
    "TrainingConfig": "a dataclass: a field each line, its phrase above it",
    "CausalLM": "a protocol: what is asked of a model, one member after the other",
    "Engine": "one object with one state; what can stand outside it does",
    "BatchPlan": "a sequence: Python's own methods over one list of steps",
    "MemoryTracker": "torch calls its one method; the others keep its counts",
    "Curve": "adding a row and reading it are one state machine",
    "ConfigForm": "the panel that wires; its parts have pages of their own"}
MOST_CELL_LINES, MOST_COLUMNS = 40, 140


def long_cells(root):
    "Exported cells of more lines than one takes in at a glance"
    found = []
    for path in notebooks(root):
        for cell in load(path)["cells"]:
            source = text_of(cell["source"])
            if cell["cell_type"] != "code" or not re.search(r"^#\|\s*exports?\b", source, re.M): continue
            count, body = sum(bool(line.strip()) for line in source.splitlines()), ast.parse(source).body
            names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            imports = not names and all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Try, ast.If)) for node in body)
            if count > MOST_CELL_LINES and not imports and not set(names) & set(LONG_CELLS):
                found.append(f"{path.relative_to(root)} has a cell of {count} lines "
                    f"({', '.join(names) or 'no name'}); {MOST_CELL_LINES} are the most")
    return found


def wide_lines(root):
    "Lines of code that are wider than a screen; imports and the inside of long strings are left alone"
    texts = {path: [text_of(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "code"] for path in notebooks(root)}
    texts |= {path: [path.read_text(encoding="utf-8")] for folder in ("tests", "benchmarks", ".ci") for path in (root/folder).rglob("*.py")}
    found = []
    for path, sources in texts.items():
        for source in sources:
            wide = {number: line for number, line in enumerate(source.splitlines(), 1) if len(line) > MOST_COLUMNS}
            if not wide: continue
            for token in _tokens_of(source):
                # a chat template, a page of text
                long = token.type == tokenize.STRING and (token.start[0] < token.end[0] or len(token.string) > MOST_COLUMNS - 20)
                for number in range(token.start[0], token.end[0] + 1) if long else (): wide.pop(number, None)
            found += [f"{path.relative_to(root)} has a line of {len(line)} characters: {line.strip()[:60]}" for line in wide.values()
                if not re.match(r"\s*(from|import) ", line)]
    return found


def _tokens_of(source):
    "Tokens of a cell; none where it is no plain Python"
    try: return list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError): return []


def measures(root):
    "How the pages read, in figures: a line each"
    pages = {path: load(path)["cells"] for path in notebooks(root)}
    code = [text_of(cell["source"]) for cells in pages.values() for cell in cells if cell["cell_type"] == "code"]
    prose = sum(cell["cell_type"] == "markdown" for cells in pages.values() for cell in cells)
    exported = sorted(sum(bool(line.strip()) for line in source.splitlines())
        for source in code if re.search(r"^#\|\s*exports?\b", source, re.M))
    lines = [line for source in code for line in source.splitlines() if line.strip()]
    wide = sum(len(line) > 120 for line in lines)
    return [
        (f"pages {len(pages)}, modules {len(modules(root))}; cells a page {statistics.median(map(len, pages.values())):.0f}; "
            f"text : code {prose / len(code):.2f}"),
        (f"exported cell lines, median / p90 / longest: "
            f"{statistics.median(exported):.0f} / {exported[len(exported) * 9 // 10]} / {exported[-1]}"),
        f"lines over 120 characters: {wide / len(lines):.1%}; over {MOST_COLUMNS}: see the guard `wide_lines`"]


def stale_readme(root):
    "README.md or its pictures differ from nbs/index.ipynb"
    done = subprocess.run([sys.executable, ".ci/docs.py", "--check"], cwd=root, capture_output=True, text=True, timeout=120)
    return [] if done.returncode == 0 else [(done.stdout + done.stderr).strip()]


COLUMN = 88  # characters of code that GitHub shows beside its file list without a scroll bar


def wide_readme(root):
    "Lines of code or of printed text in README.md that do not fit its column"
    text = (root/"README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()]
    return [f"README.md has a line of code of {len(line)} characters, more than {COLUMN}: {line[:60]}..."
        for line in lines if len(line) > COLUMN]


# ---- metadata -------------------------------------------------------------------------------------------------------

def version_of(root): return re.search(r'^__version__ = "(.+)"', (root/PACKAGE/"__init__.py").read_text(encoding="utf-8"), re.M)[1]


def metadata_faults(root):
    "Version, requirements, tested versions and addresses that contradict each other"
    info, found = settings(root), []
    project = (root/"pyproject.toml").read_text(encoding="utf-8")
    for key, line in {"name": f'name = "{info["lib_name"]}"', "min_python": f'requires-python = ">={info["min_python"]}"'}.items():
        if line not in project: found.append(f"pyproject.toml lacks {line}, which settings.ini says ({key})")
    newest = re.search(r"^## (\S+)", (root/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if not newest or newest[1] != version_of(root):
        found.append(f"CHANGELOG.md begins with {newest and newest[1]}, the package is {version_of(root)}")
    wanted = [Requirement(one) for key in info if key.endswith("requirements") for one in info[key].split()]
    lines = [line for line in (root/"constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    for one in wanted:
        if one.name not in pinned: found.append(f"constraints.txt has no tested version of {one.name}")
        elif not one.specifier.contains(pinned[one.name]):
            found.append(f"constraints.txt has {one.name} {pinned[one.name]}, settings.ini wants {one}")
    return found + foreign_addresses(root)


def foreign_addresses(root):
    "Addresses of this project on GitHub that are not the one in settings.ini"
    own, found = settings(root)["git_url"].removeprefix("https://github.com/"), []
    texts = {path: path.read_text(encoding="utf-8")
        for path in [*notebooks(root), root/"README.md", root/"CONTRIBUTING.md", root/"Makefile"] if path.exists()}
    for path, text in texts.items():
        for said in re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/[\w.-]+)", text):
            said = said.removesuffix(".git")
            if "sage" in said.lower() and said != own: found.append(f"{path.relative_to(root)} points to {said}, the project is {own}")
    return found


# What a workflow may do beyond reading the repository, and why.
MAY_WRITE = {"pages": "publishes the site", "id-token": "says to Pages which workflow it comes from"}


def workflow_faults(root):
    """Workflows that call what is not there, take actions by a moving name or from strangers,
    or may do more than they need. (An sdist has none.)"""
    found, info = [], settings(root)
    targets_ = re.search(r"^\.PHONY: (.*)", (root/"Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    for path in sorted((root/".github"/"workflows").glob("*.y*ml")):
        try: flow = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            found.append(f"{path.name} is no YAML: {error}")
            continue
        jobs = flow["jobs"].values()
        if flow.get("permissions") != {"contents": "read"}:
            found.append(f"{path.name} does not begin with the permission to read and no other")
        for kind in {kind for job in jobs for kind, value in job.get("permissions", {}).items() if value == "write"} - set(MAY_WRITE):
            found.append(f"{path.name} may write {kind}")
        for step in (step for job in jobs for step in job["steps"]):
            if not re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1")):
                found.append(f"{path.name} uses {step['uses']}, not one of GitHub's own by its major version")
            version = step.get("with", {}).get("python-version", info["min_python"])
            if version not in info["python_versions"].split():
                found.append(f"{path.name} takes Python {version!r}; settings.ini has {info['python_versions']}")
            for command in step.get("run", "").splitlines():
                found += [f"{path.name} runs {command}, {why}" for why in [_why_not_run(root, command, targets_)] if why]
    return found


def _why_not_run(root, command, targets_):
    "What is missing for a command of a workflow: a target of the Makefile, or a program of the project"
    words = command.split()
    if words[0] == "make": return "" if words[1] in targets_ else f"and the Makefile has no target {words[1]}"
    return "" if os.access(root/words[0], os.X_OK) else f"and {words[0]} is no program of this project"


def all_guards():
    "Every guard by name; the last two run over all rooms, where libraries do things of their own"
    plain = (
        exports_out_of_sync, not_clean, widget_state, absolute_paths, unmatched, unintroduced, broken_links,
        upward_imports, forbidden_imports, heavy_rooms, heavy_package, side_effects, unsafe_text, undocumented,
        long_cells, wide_lines, retired_names, stale_readme, wide_readme, metadata_faults, workflow_faults)
    return ({guard.__name__: guard for guard in plain}
        | {"side_effects_of_all_rooms": lambda root: side_effects(root, sorted(modules(root)), NOT_OURS)})


if __name__ == "__main__":
    # python tests/house.py [guard ...]: what is wrong in this project, a line each
    project, guards = Path(__file__).resolve().parents[1], all_guards()
    for name in sys.argv[1:] or guards:
        for fault in guards[name](project): print(f"{name}: {fault}")
