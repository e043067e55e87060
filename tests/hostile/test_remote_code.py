"""A run folder and its model come from a stranger: nothing in them runs code, whoever looks at them, chats,
merges or trains, until the user says so himself."""
import ast
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import copy, until, write_rows

from sage_finetune import cli, trainer
from sage_finetune.config import EFFECTS, PERMISSIONS, LoRAConfig, PermissionWarning, TrainingConfig, config_field, model_code, tiny_path
from sage_finetune.core.errors import ConfigError, FinetuneError, ModelError
from sage_finetune.core.places import note_files
from sage_finetune.core.trust import code_files, safe_environment, shadowing_files
from sage_finetune.data.tasks import prepare_run
from sage_finetune.inference.export import load_run, merge, run_config
from sage_finetune.inference.generation import generate_batch
from sage_finetune.modeling.base import load_base
from sage_finetune.runs.folder import list_runs
from sage_finetune.runs.launch import run_in_foreground, start_run, train_command
from sage_finetune.runs.plot import plot_run
from sage_finetune.tiny.demo import quickstart
from sage_finetune.trainer import LoRATrainer, train_from_meta
from sage_finetune.training.memory import estimate_memory
from sage_finetune.ui.diagnosis import doctor

CODE = '''
open({marker!r}, "a").write(__name__)
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
class OwnConfig(Qwen2Config): model_type = {kind!r}
class OwnModel(Qwen2ForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
def generate(*args, model, **kwargs): return Qwen2ForCausalLM.generate(model, *args, **kwargs)
'''
AUTO_MAP = dict(AutoConfig="own_code.OwnConfig", AutoModelForCausalLM="own_code.OwnModel", AutoTokenizer=[None, "own_code.OwnTokenizer"])


def edit(path, **fields):
    "Set fields of a JSON file"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def plant(model, marker, kind="qwen2"):
    "Let a model's folder bring code that leaves a mark; `kind` is known to transformers, or only to that code"
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (model/name).exists(): edit(model/name, auto_map=AUTO_MAP, custom_generate="custom_generate")
    edit(model/"config.json", model_type=kind)
    (model/"custom_generate").mkdir()
    for path in (model/"own_code.py", model/"custom_generate"/"generate.py"): path.write_text(CODE.format(marker=str(marker), kind=kind))
    return model


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    "A run that was trained and merged, and a model beside it, before a stranger had them"
    here = tmp_path_factory.mktemp("honest")
    run = prepare_run("custom", here/"run", data=write_rows(here/"rows.jsonl"), per_device_train_batch_size=4,
        max_steps=2, save_steps=1, device="cpu")
    train_from_meta(run, show=False)
    merge(run)
    shutil.copytree(tiny_path(), here/"model")
    return here


class Folder:
    "A stranger's run with its model, and what its code would leave behind"
    def __init__(self, honest, here, kind="qwen2", **asked):
        self.marker, self.model, self.run = here/"the code was run", here/"model", here/"run"
        shutil.copytree(honest, here, dirs_exist_ok=True)
        for folder in (self.model, self.run/"merged_model"): plant(folder, self.marker, kind)
        for name in ("tokenizer_config.json",):
            edit(self.run/"lora_weights"/name, auto_map=dict(AutoTokenizer=[None, "own_code.OwnTokenizer"]))
        shutil.copy(self.model/"own_code.py", self.run/"lora_weights")
        edit(self.run/"finetune_meta.json", model=str(self.model))
        edit(self.run/"training_config.json", model_name=str(self.model), **dict(trust_remote_code=True) | asked)
        note_files(self.run, ["lora_weights/tokenizer_config.json"])  # a stranger can write a manifest, too

    @property
    def config(self): return run_config(self.run, ())

    @property
    def trusting(self): return run_config(self.run, (), trust_remote_code=True)


def shown(panel):
    "What a panel shows, and what it says in text"
    return panel.static_html(), repr(panel)


def in_form(config):
    from sage_finetune.ui.form import ConfigForm
    form = ConfigForm(config)
    assert form.wait(120)
    return form


def in_data_panel(config):
    from sage_finetune.ui.data_panel import DataPanel
    return shown(DataPanel(config).join(120))


def in_train_panel(folder, **allowed):
    from sage_finetune.ui.train_panel import TrainPanel
    return shown(TrainPanel(folder, **allowed))


def in_chat_panel(folder):
    from sage_finetune.ui.chat_panel import ChatPanel
    panel = ChatPanel(folder, max_new_tokens=2)
    panel.ask("Which colour has lamp 1?")
    return shown(panel)


def in_studio(folder):
    from sage_finetune.ui.studio import Studio
    studio = Studio(folder)
    for tab in ("data", "train", "chat"): studio.open(tab)
    studio.data.join(120)
    return shown(studio)


def measured(config):
    from sage_finetune.training.memory_measurement import measure_memory
    config.overwrite_output_dir = True
    return measure_memory(LoRATrainer(config).setup())


LOOKING = {
    "run_config": lambda its: its.config,
    "list": lambda its: str(list_runs(its.run.parent)),
    "plot": lambda its: plot_run(its.run),
    "doctor": lambda its: str(doctor(its.run, online=False)),
    "doctor, told to trust": lambda its: str(doctor(its.trusting, online=False)),
    "estimate": lambda its: str(estimate_memory(its.config)),
    "estimate, told to trust": lambda its: str(estimate_memory(its.trusting)),
    "form": lambda its: shown(in_form(its.config)),
    "form, told to trust": lambda its: shown(in_form(its.trusting)),
    "data panel": lambda its: in_data_panel(its.config),
    "data panel, told to trust": lambda its: in_data_panel(its.trusting),
    "train panel": lambda its: in_train_panel(its.run),
    "train panel, told to trust": lambda its: in_train_panel(its.run, trust_remote_code=True),
    "cli list": lambda its: cli.main(["list", str(its.run.parent)]),
    "cli doctor": lambda its: cli.main(["doctor", str(its.run), "--no-online"]),
    "cli data": lambda its: cli.main(["data", str(its.run.parent/"rows.jsonl"), "-m", str(its.model)]),
}
USING = {
    "load_run": lambda its: generate_batch(*load_run(its.run), ["Which colour has lamp 1?"], max_new_tokens=2),
    "load_run, merged": lambda its: generate_batch(*load_run(its.run, merged=True), ["Which colour has lamp 1?"], max_new_tokens=2),
    "merge": lambda its: merge(its.run, its.run.parent/"merged"),
    "chat panel": lambda its: in_chat_panel(its.run),
    "chat panel, merged": lambda its: in_chat_panel(its.run/"merged_model"),
    "chat panel, model": lambda its: in_chat_panel(its.model),
    "studio": lambda its: in_studio(its.run),
    "train": lambda its: train_from_meta(its.run, overwrite=True, show=False),
    "resume": lambda its: train_from_meta(its.run, show=False, resume=True),
    "measure": lambda its: measured(its.config),
    "continue_from": lambda its: LoRATrainer(TrainingConfig(model_name="tiny", data_path=its.run.parent/"rows.jsonl",
        max_steps=1, continue_from=its.run, output_dir=its.run.parent/"next", device="cpu")).train(show=False),
    "trainer": lambda its: trainer.main([str(its.run), "--overwrite"]),
    "cli run": lambda its: cli.main(["run", str(its.run), "--overwrite"]),
    "cli run, resumed": lambda its: cli.main(["run", str(its.run), "--resume"]),
    "cli merge": lambda its: cli.main(["merge", str(its.run), "-o", str(its.run.parent/"merged")]),
    "cli chat": lambda its: cli.main(["chat", str(its.run), "-p", "hello", "--max-new-tokens", "2"]),
    "cli chat, merged": lambda its: cli.main(["chat", str(its.run), "-p", "hello", "--merged", "--max-new-tokens", "2"]),
}


@pytest.mark.parametrize("kind", ["qwen2", "known_to_nobody"])
@pytest.mark.parametrize("way", [*LOOKING, *USING])
@pytest.mark.filterwarnings("ignore::sage_finetune.config.PermissionWarning")
def test_no_code_of_the_folder_runs(way, kind, honest, tmp_path, monkeypatch, capfd):
    "Its own config asks for it; what transformers knows works without, what it does not know is refused in a sentence"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody asked on the terminal whether to run it"))
    its = Folder(honest, tmp_path/"here", kind)
    try: result = {**LOOKING, **USING}[way](its)
    except FinetuneError as error: assert kind != "qwen2", error
    else: assert kind != "qwen2" or not way.startswith("cli") or way == "cli doctor" or result == 0, capfd.readouterr().err
    assert not its.marker.exists()
    assert "Traceback" not in capfd.readouterr().err


# ---- the caller's word --------------------------------------------------------------------------------------------------

GRANTED = {
    "load_run": lambda its: generate_batch(*load_run(its.run, trust_remote_code=True), ["Which colour has lamp 1?"], max_new_tokens=2),
    "load_run, merged": lambda its: load_run(its.run, merged=True, trust_remote_code=True),
    "train": lambda its: train_from_meta(its.run, overwrite=True, trust_remote_code=True, show=False),
    "cli merge": lambda its: cli.main(["merge", str(its.run), "-o", str(its.run.parent/"merged"), "--trust-remote-code"]),
    "cli chat": lambda its: cli.main(["chat", str(its.run), "-p", "hello", "--max-new-tokens", "2", "--trust-remote-code"]),
    "trainer": lambda its: trainer.main([str(its.run), "--overwrite", "--trust-remote-code"]),
    "quickstart": lambda its: quickstart("custom", its.run.parent/"new", model=str(its.model),
        data=its.run.parent/"rows.jsonl", max_steps=1, device="cpu", trust_remote_code=True, show=False),
}


@pytest.mark.parametrize("way", GRANTED)
def test_the_caller_can_allow_it(way, honest, tmp_path):
    "Also where the folder does not ask for it"
    its = Folder(honest, tmp_path/"here", "only_its_own_code_knows", trust_remote_code=False)
    assert GRANTED[way](its) != 2
    assert its.marker.exists()


def test_what_was_refused_is_said(honest, tmp_path, capsys):
    "Once, with the file that asked, the code that would run, and both ways to allow it; looking at one thing does not complain of another"
    its = Folder(honest, tmp_path/"here", report_to="wandb", overwrite_output_dir=True, allow_special_tokens=True)
    with pytest.warns(PermissionWarning) as said: config = run_config(its.run)
    texts = [str(one.message) for one in said]
    assert len(texts) == 4 and all(str(its.run/"training_config.json") in text for text in texts)
    assert any("own_code.py" in text and "--trust-remote-code" in text and "trust_remote_code=True" in text for text in texts)
    assert any("--report-to wandb" in text and "report_to='wandb'" in text for text in texts)
    assert ((config.trust_remote_code, config.report_to, config.overwrite_output_dir, config.allow_special_tokens)
        == (False, "none", False, False))
    with pytest.warns(PermissionWarning) as said: load_run(its.run)
    assert len(said) == 1
    assert cli.main(["chat", str(its.run), "-p", "hello", "--max-new-tokens", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("note: ") and "--trust-remote-code" in lines[0]
    looks = [look.found for look in doctor(its.run, online=False).checks if look.what in ("permission", "model code")]
    assert len(looks) == 5 and "own_code.py" in looks[-1]


@pytest.mark.parametrize("asked, stays, way_out", [(["tensorboard"], "tensorboard", None), (["none"], "none", None),
    (["wandb", "tensorboard"], "none", "--report-to tensorboard,wandb"), ("trackio", "none", "--report-to trackio"),
    (["tensorboard", "swanlab"], "none", "it takes one of 'none', 'tensorboard', 'wandb', 'trackio', or a list of them")])
def test_curves_that_a_file_sends_to_several_tools(tmp_path, asked, stays, way_out):
    "What stays in the run folder needs nobody's word, and nothing else passes beside it"
    path = tmp_path/"config.json"
    path.write_text(json.dumps(dict(model_name="tiny", report_to=asked)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert TrainingConfig.load(path).report_to == stays
    assert [way_out in str(one.message) for one in said] == [True] * bool(way_out)


def test_what_the_user_sets_himself_is_kept(tmp_path):
    "In memory, in a copy, and in a run that was prepared and is trained with the same word"
    config = TrainingConfig(model_name="tiny", trust_remote_code=True, report_to="wandb")
    assert TrainingConfig(**config.to_dict()) == config == eval(repr(config))
    path = config.save(tmp_path/"config.json")
    assert TrainingConfig.load(path, trust_remote_code=True, report_to="wandb") == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (TrainingConfig.load(TrainingConfig(report_to="tensorboard", seed=7).save(path))
            == TrainingConfig(report_to="tensorboard", seed=7))
        assert TrainingConfig.load(path, (), report_to="none").report_to == "none"
    with pytest.raises(ConfigError, match="the list of permissions has no field 'seed'"): TrainingConfig.load(path, seed=1)


@pytest.mark.parametrize("value", [1, "yes", [True], {"a": 1}, "1"])
def test_a_permission_of_another_type_is_none(value, tmp_path):
    "Neither a way around it nor a raw error"
    path = tmp_path/"training_config.json"
    path.write_text(json.dumps(dict.fromkeys(PERMISSIONS, value)))
    with pytest.warns(PermissionWarning): assert TrainingConfig.load(path) == TrainingConfig()


def test_every_field_is_classed():
    "A new one cannot be forgotten: it has no class until somebody gives it one, and paths, free texts and switches are looked at"
    with pytest.raises(TypeError): config_field(False)
    with pytest.raises(ValueError, match="no effect 'nothing'"): config_field(False, effect="nothing")
    fields = {o.name: o for o in dataclasses.fields(TrainingConfig)}
    effect = {name: o.metadata["effect"] for name, o in fields.items()}
    assert set(effect.values()) == set(EFFECTS)
    assert {o.metadata["effect"] for o in dataclasses.fields(LoRAConfig)} == {"harmless"}
    assert {name for name, o in fields.items() if "Path" in str(o.type)} | {"model_name"} == {name
        for name, one in effect.items() if one in ("read", "write")}
    harmless_switches = {"load_in_8bit", "load_in_4bit", "packing", "gradient_checkpointing",
        "load_best_model_at_end", "auto_find_batch_size"}
    assert {name for name, o in fields.items() if o.type is bool} == harmless_switches | {"trust_remote_code",
        "overwrite_output_dir", "allow_special_tokens"}
    free_texts = {name for name, o in fields.items() if o.type is str and not o.metadata["choices"]}
    assert free_texts == {"model_name"}


def test_a_file_does_not_overwrite(honest, tmp_path):
    "overwrite_output_dir in a file removes nothing; the caller's word does"
    run = copy(honest/"run", tmp_path/"run")
    edit(run/"training_config.json", overwrite_output_dir=True)
    kept = (run/"metrics.jsonl").read_bytes(), (run/"lora_weights"/"adapter_model.safetensors").read_bytes()
    with pytest.warns(PermissionWarning, match="--overwrite"):
        with pytest.raises(FinetuneError, match="already holds a run"): train_from_meta(run, show=False)
    assert kept == ((run/"metrics.jsonl").read_bytes(), (run/"lora_weights"/"adapter_model.safetensors").read_bytes())
    assert train_from_meta(run, overwrite=True, show=False).steps == 2


def test_a_file_does_not_report(honest, tmp_path, monkeypatch):
    "Neither while it trains nor by importing wandb"
    run = copy(honest/"run", tmp_path/"run")
    edit(run/"training_config.json", report_to="wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(PermissionWarning, match="--report-to wandb"): assert train_from_meta(run, overwrite=True, show=False).steps == 2
    assert not list(run.rglob("*.wandb"))


def test_the_word_is_passed_on():
    "To a child, to several, by flags that the trainer takes"
    allowed = dict(trust_remote_code=True, allow_special_tokens=True, report_to="wandb")
    for command in (train_command("run", overwrite=True, **allowed), train_command("run", 2, **allowed)):
        assert {"--trust-remote-code", "--allow-special-tokens", "wandb"} <= set(command)
    assert train_command("run", trust_remote_code=False, report_to=None)[-1] == "run"
    with pytest.raises(ConfigError): train_command("run", model_name="other")


# ---- the form -------------------------------------------------------------------------------------------------------------

def test_the_tick_names_the_file(honest, tmp_path):
    "It is not set by the run; it says what it lets run, and does not outlive the model it was set for"
    its = Folder(honest, tmp_path/"here")
    from sage_finetune.ui.form import ConfigForm
    form = ConfigForm(its.config, counts=False)
    assert not form.config.trust_remote_code and "own_code.py" in form.code.value and "not run" in form.code.value
    form.fields["trust_remote_code"].value = True
    assert form.config.trust_remote_code and "own_code.py" in form.code.value and "not run" not in form.code.value
    form.fields["model_name"].value = "tiny"
    assert not form.config.trust_remote_code and form.code.value == ""
    assert not its.marker.exists()


# ---- adapters ---------------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "megatron": dict(megatron_config=dict(a=1), megatron_core="own_code"),
    "another kind": dict(peft_type="PROMPT_TUNING", prompt_tuning_init="TEXT", tokenizer_name_or_path="MODEL",
        tokenizer_kwargs=dict(trust_remote_code=True), num_virtual_tokens=2, prompt_tuning_init_text="x"),
    "X-LoRA": dict(peft_type="XLORA", adapters={"a": "/somewhere"}, hidden_size=1),
    "no kind": dict(peft_type=None),
    "a cache": dict(corda_config=dict(cache_file="/somewhere/cache.pt")),
    "eva": dict(eva_config=dict(rho=2.)),
    "a key of tomorrow": dict(loader="own_code.Loader"),
}


@pytest.mark.parametrize("how", ADAPTERS)
@pytest.mark.parametrize("way", ["load_run", "merge", "continue_from"])
def test_an_adapter_is_lora_and_nothing_else(how, way, honest, tmp_path):
    "Settings by which PEFT imports a module, loads another model or unpickles a cache are refused by name"
    its = Folder(honest, tmp_path/"here", trust_remote_code=False)
    edit(its.run/"lora_weights"/"adapter_config.json", **ADAPTERS[how])
    with pytest.raises(ModelError, match="Only LoRA adapters|asks for more than LoRA"): USING[way](its)
    assert not its.marker.exists()


def test_an_adapter_may_name_a_module_in_vain(honest, tmp_path):
    "auto_mapping, by which AutoPeftModel imports, is not kept; what it names is never imported"
    its = Folder(honest, tmp_path/"here", trust_remote_code=False)
    edit(its.run/"lora_weights"/"adapter_config.json", auto_mapping=dict(base_model_class="OwnModel", parent_library="own_code"),
        task_type=None, base_model_name_or_path=str(its.model), revision="main")
    model, _ = load_run(its.run)
    assert model.peft_config["default"].auto_mapping is None and "own_code" not in sys.modules and not its.marker.exists()


# ---- pickles ------------------------------------------------------------------------------------------------------------------

class Bomb:
    "A pickle that leaves a mark when it is read"
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return open, (str(self.marker), "w")


def pickled(path, marker):
    "A file of torch's kind, or a plain pickle"
    import torch
    torch.save(dict(weights=Bomb(marker)), path)


@pytest.mark.parametrize("names", [("lora_weights/adapter_model.bin",), ("lora_weights/training_args.bin",
    "lora_weights/optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt", "merged_model/pytorch_model.bin"),
                                   ("checkpoints/checkpoint-2/optimizer.pt", "checkpoints/checkpoint-2/state.pt",
                                       "checkpoints/checkpoint-2/pytorch_model.bin", "prepared/rows.pkl", "logs/events.pkl")])
def test_pickles_in_a_run_are_not_read(names, honest, tmp_path):
    "Beside what is used they lie untouched"
    its = Folder(honest, tmp_path/"here", trust_remote_code=False)
    for name in names:
        (its.run/name).parent.mkdir(exist_ok=True)
        pickled(its.run/name, its.marker)
    for way in ("load_run", "load_run, merged", "resume", "continue_from", "doctor"): LOOKING.get(way, USING.get(way))(its)
    assert not its.marker.exists()


@pytest.mark.parametrize("way, gone, pickle", [("load_run", "lora_weights/adapter_model.safetensors", "lora_weights/adapter_model.bin"),
    ("load_run, merged", "merged_model/model.safetensors", "merged_model/pytorch_model.bin"),
    ("train", "../model/model.safetensors", "../model/pytorch_model.bin"),
    ("resume", "checkpoints/checkpoint-2/adapter_model.safetensors", "checkpoints/checkpoint-2/adapter_model.bin")])
def test_pickles_do_not_take_the_place_of_weights(way, gone, pickle, honest, tmp_path):
    "Where only a pickle is there, it is refused in a sentence"
    its = Folder(honest, tmp_path/"here", trust_remote_code=False)
    (its.run/gone).unlink()
    pickled(its.run/pickle, its.marker)
    if way == "resume": shutil.rmtree(its.run/"checkpoints"/"checkpoint-1")
    with pytest.raises(FinetuneError, match="pickle|is missing|holds no adapter|cannot be read"): USING[way](its)
    assert not its.marker.exists()


# ---- kernels, modules that lie around ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked", ["somebody/kernel", "somebody/kernel@main:function", {"": "somebody/kernel"}])
def test_a_model_does_not_choose_a_kernel(asked, tmp_path):
    "A repository of compiled code by another door; a plain name of transformers' own is none"
    model = Path(shutil.copytree(tiny_path(), tmp_path/"model"))
    edit(model/"config.json", attn_implementation=asked)
    config = TrainingConfig(model_name=str(model), device="cpu")
    for way in (load_base, estimate_memory):
        with pytest.raises(ModelError, match="kernel"): way(config)
    edit(model/"config.json", attn_implementation="eager")
    assert load_base(config)[0].config._attn_implementation == "eager"


SHADOWS = ("json.py", "torch.py", "transformers/__init__.py", "sitecustomize.py", "sage_finetune.py", "psutil/__init__.py", "typing.py")


def shadowed(folder, marker):
    "Put files into a folder that Python would import in the place of its own and of ours"
    for name in SHADOWS:
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text(f"open({str(marker)!r}, 'a').write({name!r})\nraise ImportError('a file of the "
            f"run folder was imported')\n")


def test_child_processes_do_not_import_from_the_folder(honest, tmp_path, monkeypatch):
    "A run that is started while one stands in its folder; the trainer itself, and the process that counts memory for forms"
    run, marker = copy(honest/"run", tmp_path/"run"), tmp_path/"imported"
    shadowed(run, marker)
    monkeypatch.chdir(run)
    process = start_run(run, overwrite=True)
    until(lambda: process.poll() is not None, 120)
    assert process.returncode == 0, (run/"train.log").read_text()
    assert "memory is not known" not in in_form(TrainingConfig(model_name="tiny", data_path="example", device="cpu")).memory.view.value
    assert not marker.exists()


def test_the_same_child_would_import_without_the_switch(tmp_path):
    "So the test above can fail"
    marker = tmp_path/"imported"
    shadowed(tmp_path, marker)
    for environment, imports in ((None, True), (safe_environment(), False)):
        marker.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", "import json, psutil"], cwd=tmp_path, env=environment, capture_output=True)
        assert marker.exists() == imports == bool(done.returncode)


def test_doctor_names_what_lies_in_the_way(honest, tmp_path, monkeypatch):
    "Files with the name of a module, and none of the others"
    run = copy(honest/"run", tmp_path/"run")
    for name in ("json.py", "my_notes.py", "torch.so", "readme.txt"): (run/name).write_text("")
    assert shadowing_files(run) == ["json.py", "torch.so"]
    look = doctor(run, online=False)["Python files"]
    assert look.state == "note" and "json.py, torch.so" in look.found
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert doctor(run, online=False)["Python files"].state == "problem"


@pytest.mark.parametrize("auto_map", [None, "own_code.Model", ["own_code.A", None, 3], {"AutoModel": {"deep": ["own_code.A"]}},
    {"AutoModel": "owner/name--own_code.A"}, 7, {"AutoModel": ""}, {"A": "..//own_code"}])
def test_the_names_of_code_are_read_from_anything(auto_map, tmp_path):
    "Whatever stands there; names, or nothing"
    (tmp_path/"config.json").write_text(json.dumps(dict(auto_map=auto_map)))
    names = model_code(str(tmp_path))
    assert (bool(names) == ("own_code" in json.dumps(auto_map)) and all(name.endswith(".py") for name in names)
        and code_files(tmp_path) == names)
    for text in ("{", "[]", "[" * 100_000, '{"auto_map": ' * 50_000, ""):
        (tmp_path/"config.json").write_text(text)
        assert model_code(str(tmp_path)) == []


def test_data_folders_with_scripts_are_data(tmp_path, honest):
    "A loading script and its like lie in a folder of rows, and are no rows"
    folder, marker = tmp_path/"rows", tmp_path/"script"
    write_rows(folder/"rows.jsonl")
    for name in ("rows.py", "dataset.py", "__init__.py"): (folder/name).write_text(f"open({str(marker)!r}, 'w')")
    (folder/"dataset_infos.json.bak").write_text("{}")
    config = TrainingConfig(model_name="tiny", data_path=folder, output_dir=tmp_path/"run", max_steps=1, device="cpu")
    assert LoRATrainer(config).train(show=False).steps == 1 and not marker.exists()


@pytest.mark.slow
def test_from_a_shell(honest, tmp_path):
    """The trainer and the program as child processes, standing in the folder:
    `run .` trains, imports nothing from there, and says what it did not allow"""
    its = Folder(honest, tmp_path/"here")
    (its.run/"json.py").write_text(f"open({str(its.marker)!r}, 'a').write('json')")
    done = subprocess.run([sys.executable, "-P", "-m", "sage_finetune.cli", "run", ".", "--overwrite"], cwd=its.run,
        capture_output=True, text=True, timeout=300, env=safe_environment())
    assert done.returncode == 0 and done.stderr.count("To allow it: --trust-remote-code") == 1, done.stderr
    assert not its.marker.exists()
    assert run_in_foreground(its.run, overwrite=True, trust_remote_code=True) == 0
    assert its.marker.exists()


# ---- the package itself ---------------------------------------------------------------------------------------------------------

def calls(source):
    "Every call in a module: its name with dots, its keywords, its line"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call): yield ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}, node.lineno


def faults(source):
    "Calls that could run what a file says, and loads that leave the decision to a library, which may ask on the terminal"
    for name, given, line in calls(source):
        if name in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "marshal.loads",
                "joblib.load", "runpy.run_path"):
            yield f"{line}: {name}"
        if name.startswith("pickle."): yield f"{line}: {name}"
        if name == "torch.load" and given.get("weights_only") != "True": yield f"{line}: torch.load without weights_only=True"
        if name == "np.load" and given.get("allow_pickle", "False") != "False": yield f"{line}: np.load with pickles"
        if (name.split(".")[0].startswith("Auto") and name.split(".")[-1] in ("from_pretrained", "from_config")
                and "trust_remote_code" not in given):
            yield f"{line}: {name} decides nothing about trust_remote_code"


@pytest.mark.parametrize("source, fault", [("eval(text)", "eval"), ("import pickle\npickle.loads(x)", "pickle"),
    ("torch.load(path)", "weights_only"), ("torch.load(path, weights_only=False)", "weights_only"),
    ("AutoTokenizer.from_pretrained(folder)", "trust"), ("AutoConfig.from_pretrained(folder, revision='x')", "trust"),
    ("np.load(p, allow_pickle=True)", "pickles"), ("model.eval()", ""), ("torch.load(p, weights_only=True)", "")])
def test_the_guard_below_finds(source, fault): assert fault in " ".join(faults(source)) and bool(fault) == bool(list(faults(source)))


def test_the_package_runs_nothing_it_reads(root):
    "No pickles, no eval, and trust is decided at each load"
    found = [f"{path.name}:{fault}" for path in sorted((root/"sage_finetune").rglob("*.py")) if path.name != "_modidx.py"
        for fault in faults(path.read_text(encoding="utf-8"))]
    assert not found, found
