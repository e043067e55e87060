"A folder that was passed on does not decide where is written; links to other disks are kept; ~ is the home folder"
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from helpers import copy, prepared, tiny_config, tree, write_rows

from sage_finetune import LoRATrainer, TrainingConfig, merge
from sage_finetune.cli import main
from sage_finetune.core.errors import FinetuneError, RunError
from sage_finetune.core.limits import walk_folder
from sage_finetune.core.places import check_links, is_inside, own_files
from sage_finetune.core.storage import atomic_directory, copy_atomic, expand_home, open_append, write_atomic
from sage_finetune.data.dataset import prepare
from sage_finetune.data.files import iter_rows
from sage_finetune.data.tasks import prepare_run
from sage_finetune.inference.export import run_config
from sage_finetune.runs.folder import list_runs, other_files, read_meta, read_status, run_info, write_meta
from sage_finetune.training.run_writer import check_folder
from sage_finetune.ui.diagnosis import doctor

PART_MANIFEST = ".linked_part.json"  # behind a part of a run that is a link
pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def error_message(function, *arguments, **options):
    "What was said on the way, and what came out"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, " ".join(str(one.message) for one in said)


@pytest.fixture
def run(tmp_path):
    "A prepared run of two steps"
    return prepared(tmp_path/"run", max_steps=2, save_steps=1)


@pytest.fixture
def victim(tmp_path):
    "Somebody's own files"
    folder = tmp_path/"home"
    folder.mkdir()
    (folder/".bashrc").write_text("export A=1\n")
    (folder/"prepared-0123456789abcdef").mkdir()
    (folder/".prepared-0123456789abcdef.abcdefgh").mkdir()
    os.utime(folder/".prepared-0123456789abcdef.abcdefgh", (0, 0))
    return folder


def edit(path, **fields): path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- a config decides nothing outside its folder ----------------------------------------------------------------------

@pytest.mark.parametrize("where", ["absolute", "up", "link", "here"])
def test_a_foreign_cache_is_not_written(run, victim, tmp_path, monkeypatch, where):
    monkeypatch.chdir(victim)
    (run/"out").symlink_to(victim)
    cache = dict(absolute=str(victim), up="../home", link=str(run/"out"/"cache"), here="cache")[where]
    edit(run/"training_config.json", data_cache=cache)
    before = tree(victim)
    config, said = error_message(lambda: read_meta(run).to_config())
    assert config.data_cache is None and "data_cache" in said and "Set `data_cache` yourself" in said
    assert run_config(run).data_cache is None
    LoRATrainer(config).train(show=False)
    assert tree(victim) == before and list((run/"prepared").iterdir())


def test_a_cache_of_ones_own_is_used(run, tmp_path):
    config = read_meta(run).to_config()
    config.data_cache = tmp_path/"cache"
    LoRATrainer(config).train(show=False)
    assert [path.name[:9] for path in (tmp_path/"cache").iterdir()] == ["prepared-"]
    edit(run/"training_config.json", data_cache=str(run/"mine"))
    assert read_meta(run).to_config().data_cache == run/"mine"


def test_output_dir_is_the_folder_that_was_opened(run, victim):
    for name in ("training_config.json", "finetune_meta.json"): edit(run/name, output_dir=str(victim))
    assert read_meta(run).to_config().output_dir == run_config(run).output_dir == read_meta(run).output_dir == run
    before = tree(victim)
    LoRATrainer(read_meta(run).to_config()).train(show=False)
    merge(run)
    assert tree(victim) == before and (run/"merged_model"/"config.json").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/environ", "fifo", "circle"])
@pytest.mark.parametrize("field", ["data_path", "eval_path", "continue_from"])
def test_no_device_is_read(run, tmp_path, field, path):
    os.mkfifo(tmp_path/"fifo")
    (tmp_path/"circle").symlink_to(tmp_path/"circle")
    named = path if path.startswith("/") else str(tmp_path/path)
    edit(run/"training_config.json", **{field: named})
    if field == "data_path": edit(run/"finetune_meta.json", dataset=named)
    if path == "circle":  # not there, as any other file that is missing
        with pytest.raises(FinetuneError): LoRATrainer(read_meta(run).to_config()).train(show=False)
    else:
        with pytest.raises(RunError, match="no ordinary file"): read_meta(run).to_config()


def test_rows_elsewhere_are_read_and_said(run, tmp_path):
    "SAGE writes the full path of its rows"
    rows = write_rows(tmp_path/"data"/"rows.jsonl")
    edit(run/"finetune_meta.json", dataset=str(rows))
    config, said = error_message(lambda: read_meta(run).to_config())
    assert config.data_path == rows and str(rows) in said and "only read" in said
    edit(run/"finetune_meta.json", dataset="../data/rows.jsonl")
    assert "outside that folder" in error_message(lambda: read_meta(run).to_config())[1]
    (run/"rows.jsonl").symlink_to(rows)
    edit(run/"finetune_meta.json", dataset="rows.jsonl")
    assert "outside that folder" in error_message(lambda: read_meta(run).to_config())[1]


def test_looking_says_it_too(run, victim):
    edit(run/"training_config.json", data_cache=str(victim))
    before = tree(victim)
    assert "data_cache" in doctor(run, online=False)["paths"].found
    assert run_info(run).state == "pending" and tree(victim) == before


# ---- parts of a run that are links ------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["checkpoints", "lora_weights"])
def test_a_part_on_a_scratch_disk_is_kept(tmp_path, part):
    """Trained, resumed, replaced, prepared anew and merged:
    the link stays, what is behind it is written, what somebody puts there later stays"""
    scratch = tmp_path/"scratch"
    scratch.mkdir()
    run = prepared(tmp_path/"run", max_steps=2, save_steps=1)
    (run/part).symlink_to(scratch)
    def holds(): return (run/part).is_symlink() and (scratch/"precious.txt").read_text() == "mine" and len(list(scratch.iterdir())) > 2
    LoRATrainer(read_meta(run).to_config()).train(show=False)
    (scratch/"precious.txt").write_text("mine")
    assert holds() and [path.name for path in scratch.iterdir() if path.name[0] == "."] == [PART_MANIFEST]
    config = read_meta(run).to_config()
    config.max_steps = 3
    LoRATrainer(config).train(show=False, resume=True)
    assert holds() and (run/"checkpoints"/"checkpoint-3"/"state.safetensors").exists()
    for _ in range(2):
        config.overwrite_output_dir = True
        config.max_steps = 1
        error_message(LoRATrainer(config).train, show=False)
        assert holds() and [path.name for path in (run/"checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    merge(run)
    error_message(prepare_run, "custom", run, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert (run/part).is_symlink() and sorted(path.name for path in scratch.iterdir()) == [PART_MANIFEST, "precious.txt"]


@pytest.mark.parametrize("part", ["prepared", "logs"])
def test_rows_and_curves_on_a_scratch_disk(tmp_path, part):
    "The link stays and the files are behind it; a second run takes the prepared rows from there"
    run, scratch = prepared(tmp_path/"run", max_steps=1, report_to="tensorboard"), tmp_path/"scratch"
    scratch.mkdir()
    (run/part).symlink_to(scratch)
    for _ in range(2):
        config = read_meta(run).to_config(report_to="tensorboard")
        config.overwrite_output_dir = True
        LoRATrainer(config).train(show=False)
        others = [path.name for path in scratch.iterdir() if path.name != PART_MANIFEST]
        assert (run/part).is_symlink() and (scratch/PART_MANIFEST).exists() and (len(others) == 1 if part == "prepared" else others)


@pytest.mark.parametrize("part", ["logs", "merged_model"])
def test_a_part_that_leads_to_a_whole_disk(run, tmp_path, monkeypatch, part):
    "What lies behind a link is looked at within a limit, and said"
    disk = tmp_path/"disk"
    for number in range(30): (disk/f"{number}/deeper").mkdir(parents=True)
    (run/part).symlink_to(disk)
    monkeypatch.setattr(walk_folder, "__defaults__", (40,))
    with pytest.raises(RunError, match="holds more than 40 files and folders"): other_files(run)


def test_a_merged_model_on_a_scratch_disk(run, tmp_path):
    LoRATrainer(read_meta(run).to_config()).train(show=False)
    scratch = tmp_path/"scratch"
    scratch.mkdir()
    (run/"merged_model").symlink_to(scratch)
    for _ in range(2): merge(run)
    assert (run/"merged_model").is_symlink() and (scratch/"model.safetensors").exists() and (scratch/"merge_report.json").exists()
    (scratch/"thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="thesis.txt"): merge(run)


def test_a_run_folder_that_is_a_link(tmp_path):
    (tmp_path/"scratch").mkdir()
    (tmp_path/"run").symlink_to(tmp_path/"scratch")
    config = tiny_config(tmp_path, max_steps=1)
    LoRATrainer(config).train(show=False)
    assert (tmp_path/"run").is_symlink() and (tmp_path/"scratch"/"lora_weights"/"adapter_model.safetensors").exists()
    with pytest.raises(RunError, match="is a link to"): check_folder(tiny_config(tmp_path, overwrite_output_dir=True))


BAD_LINKS = dict(gone="which is not there", circle="not there", root="the root of a disk", home="a home folder",
    file="is no folder|no folder", other="into another run", inside_other="into another run", project="the root of a project")


@pytest.mark.parametrize("part", ["checkpoints", "lora_weights", "merged_model", "logs", "prepared"])
@pytest.mark.parametrize("kind", BAD_LINKS)
def test_links_that_are_not_written_through(tmp_path, monkeypatch, kind, part):
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    for name in ("home", "other/checkpoints", "project/.git"): (tmp_path/name).mkdir(parents=True)
    (tmp_path/"other"/"status.json").write_text("{}")
    (tmp_path/"file").write_text("mine")
    folder = tmp_path/"run"
    folder.mkdir()
    target = dict(circle=folder/part, root=Path("/"), inside_other=tmp_path/"other"/"checkpoints").get(kind, tmp_path/kind)
    (folder/part).symlink_to(target)
    before = tree(tmp_path/"other"), tree(tmp_path/"home"), tree(tmp_path/"project")
    for resume in (False, "auto"):
        with pytest.raises(RunError, match=BAD_LINKS[kind]): check_folder(tiny_config(tmp_path), resume)
    with pytest.raises(RunError, match=BAD_LINKS[kind]): prepare_run("custom", folder, data=write_rows(tmp_path/"rows.jsonl"))
    assert (tree(tmp_path/"other"), tree(tmp_path/"home"), tree(tmp_path/"project")) == before and (folder/part).is_symlink()


def test_a_copy_that_points_back_deletes_nothing(run, tmp_path):
    "The manifest of the copy knows the files, but they are another run's"
    LoRATrainer(read_meta(run).to_config()).train(show=False)
    twin = copy(run, tmp_path/"twin")
    shutil.rmtree(twin/"checkpoints")
    (twin/"checkpoints").symlink_to(run/"checkpoints")
    before = tree(run)
    with pytest.raises(RunError, match="into another run"):
        prepare_run("custom", twin, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert tree(run) == before


# ---- links below a part -----------------------------------------------------------------------------------------------

BELOW = ("checkpoints/checkpoint-1", "checkpoints/checkpoint-2", "checkpoints/checkpoint-3", "checkpoints/best-3",
    "checkpoints/checkpoint-2/deep", "checkpoints/deep/er/and/deeper", "checkpoints/.replaced-abcdefgh",
    "prepared/prepared-0123456789abcdef", "prepared/deep/x", "lora_weights/adapter_model.safetensors", "lora_weights/deep",
    "logs/run", "logs/deep/events.out.tfevents.1", "merged_model/deep")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two steps; tests take copies"
    run = prepared(tmp_path_factory.mktemp("trained")/"run", max_steps=2, save_steps=1)
    LoRATrainer(read_meta(run).to_config()).train(show=False)
    return run


@pytest.fixture
def gift(trained, tmp_path):
    "The run of a stranger, and somebody's files with names that a run has"
    victim = tmp_path/"victim"
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "state.safetensors", "report.json",
                 "train.arrow", "config.json", "mine.txt",
                 ".checkpoint-9.abcdefgh.part/x", "checkpoint-1/adapter_model.safetensors", "checkpoint-2/notes.txt"):
        (victim/name).parent.mkdir(parents=True, exist_ok=True)
        (victim/name).write_text(f"MINE {name}")
    return copy(trained, tmp_path/"run"), victim


def put_link(path, target):
    "A link in the place of whatever is there"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def go_on(run, part=""):
    "Everything that writes into a run folder, merging where that is about the part; the sentences that refused it"
    def train(**how):
        config = read_meta(run).to_config()
        for name, value in dict(max_steps=3, eval_ratio=0.2, eval_steps=1, load_best_model_at_end=True,
                overwrite_output_dir=not how).items():
            setattr(config, name, value)
        LoRATrainer(config).train(show=False, **how)
    said = []
    actions = (lambda: train(resume=True), lambda: merge(run) if part == "merged_model" else None, train,
        lambda: prepare_run("custom", run, data=write_rows(run.parent/"rows.jsonl"), overwrite=True))
    for action in actions:
        try: error_message(action)
        except FinetuneError as error: said.append(str(error))
    return said


@pytest.mark.parametrize("name", BELOW)
def test_links_below_a_part_are_refused(gift, name):
    "Before anything is loaded, with the link's name, for folders and for files; what it leads to stays as it is"
    run, victim = gift
    put_link(run/name, victim/"README.md" if name.endswith(("safetensors", ".1")) else victim)
    def rest(): return {path: value for path, value in tree(run).items() if not path.startswith(("run_manifest", "merged_model"))}
    before, kept = tree(victim), rest()
    for resume in (True, "auto"):
        with pytest.raises(RunError, match=f"{name} is a link.*Remove it"): check_folder(tiny_config(run.parent), resume)
    said = go_on(run, name.split("/")[0])
    assert tree(victim) == before and (run/name).is_symlink() and rest() == kept
    assert len(said) >= 3 and all(name in sentence for sentence in said)


@pytest.mark.parametrize("name", BELOW[:3] + BELOW[7:9])
def test_links_below_a_part_in_a_run_that_was_not_trained(run, victim, name):
    put_link(run/name, victim)
    before = tree(victim)
    with pytest.raises(RunError, match=f"{name} is a link"): LoRATrainer(read_meta(run).to_config()).train(show=False)
    assert tree(victim) == before


def test_wandb_keeps_links_to_its_newest_files(gift):
    "They lead to its own folder; one that leads elsewhere is refused like any other"
    run, _ = gift
    (run/"logs"/"wandb"/"run-1").mkdir(parents=True)
    (run/"logs"/"wandb"/"latest-run").symlink_to("run-1")
    (run/"logs"/"wandb"/"debug.log").symlink_to("run-1/logs/debug.log")
    check_links(run)
    (run/"logs"/"wandb"/"latest").symlink_to("../../../victim")
    with pytest.raises(RunError, match="logs/wandb/latest is a link"): check_links(run)


def test_a_folder_that_may_not_be_listed(run, monkeypatch):
    "An archive can hold one that may be written to and not read, with links in it"
    hidden, scan = run/"logs"/"hidden", os.scandir
    hidden.mkdir(parents=True)
    check_links(run)
    def refuse(path):
        if Path(path) == hidden: raise PermissionError(13, "Permission denied")  # root may list everything
        return scan(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RunError, match="logs/hidden cannot be listed .Permission denied., so it may hold links"): check_links(run)


def test_who_writes_a_folder_asks_by_himself(gift):
    "Also where nobody has looked before: a checkpoint, the best adapter, prepared rows, and a folder within a folder behind a link"
    from sage_finetune.modeling.tokenizer import load_tokenizer
    from sage_finetune.training.checkpoint import save_checkpoint
    run, victim = gift
    trainer = LoRATrainer(tiny_config(run.parent, data_path=write_rows(run.parent/"rows.jsonl"), output_dir=run.parent/"other")).setup()
    before = tree(victim)
    put_link(run/"checkpoints"/"checkpoint-7", victim)
    with pytest.raises(RunError, match="it is a link"): save_checkpoint(run/"checkpoints", 7, trainer.model, {})
    cache = run.parent/"cache"
    prepare(run.parent/"rows.jsonl", load_tokenizer("tiny"), show=False, cache_dir=cache)
    put_link(next(cache.glob("prepared-*")), victim)
    with pytest.raises(RunError, match="it is a link"):
        prepare(run.parent/"rows.jsonl", load_tokenizer("tiny"), show=False, cache_dir=cache)
    put_link(run.parent/"model", run.parent/"behind")
    put_link(run.parent/"behind"/"deep", victim)
    with pytest.raises(RunError, match="it is a link"), atomic_directory(run.parent/"model", through_link=True) as temp:
        (temp/"deep").mkdir()
        (temp/"deep"/"README.md").write_text("evil")
    assert tree(victim) == before


# ---- parts that lead to somebody's files -------------------------------------------------------------------------------

def listed(folder, below=""):
    "What a manifest says of the files in a folder"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {below + name: [dict(size=(folder/name).stat().st_size, sha256=hashlib.sha256((folder/name).read_bytes()).hexdigest())]
        for name in names}


PARTS = ("checkpoints", "lora_weights", "merged_model", "logs", "prepared")


@pytest.mark.parametrize("manifest", ["right", "none", "report"])
@pytest.mark.parametrize("part", PARTS)
def test_a_manifest_proves_nothing_of_what_lies_behind_a_link(gift, part, manifest):
    "Whatever the run folder says, with sizes and hashes: the files are refused, named, and stay"
    run, victim = gift
    put_link(run/part, victim)
    content = json.loads((run/"run_manifest.json").read_text())
    content["files"] |= listed(victim, f"{part}/")
    if manifest == "right": (run/"run_manifest.json").write_text(json.dumps(content))
    if manifest == "none": (run/"run_manifest.json").unlink()
    if manifest == "report": (victim/"merge_report.json").write_text(json.dumps(dict(files=listed(victim))))
    before = tree(victim)
    assert not [name for name in own_files(run) if name.startswith(f"{part}/")]
    with pytest.raises(RunError, match=f"{part} is a link to {victim}, which holds .*adapter_config.json.*empty folder"):
        check_folder(tiny_config(run.parent), "auto")
    assert go_on(run, part) and tree(victim) == before and (run/part).is_symlink()


@pytest.mark.parametrize("part", PARTS)
def test_one_file_of_somebody_is_enough(run, victim, part):
    "A run that was never trained does not fill a folder that is in use"
    put_link(run/part, victim)
    before = tree(victim)
    with pytest.raises(RunError, match="which holds .*bashrc"): LoRATrainer(read_meta(run).to_config()).train(show=False)
    assert tree(victim) == before


def test_the_folder_of_another_run(gift):
    "A manifest behind the link counts for one part of one run: not for a copy, not for another part"
    run, _ = gift
    scratch = run.parent/"scratch"
    scratch.mkdir()
    shutil.rmtree(run/"checkpoints")
    (run/"checkpoints").symlink_to(scratch)
    error_message(lambda: LoRATrainer(tiny_config(run.parent, overwrite_output_dir=True, max_steps=1)).train(show=False))
    before = tree(scratch)
    assert [name for name in own_files(run) if name.startswith("checkpoints/")]
    twin = run.parent/"twin"
    shutil.copytree(run, twin, symlinks=True)
    with pytest.raises(RunError, match="belongs to another run or part .*moved"):
        check_folder(tiny_config(run.parent, output_dir=twin), "auto")
    assert go_on(twin) and not [name for name in own_files(twin) if name.startswith("checkpoints/")]
    put_link(run/"lora_weights", scratch)
    with pytest.raises(RunError, match="lora_weights is a link .*belongs to another"): check_folder(tiny_config(run.parent), "auto")
    assert tree(scratch) == before
    (run/"lora_weights").unlink()
    shutil.rmtree(twin)
    run.rename(twin)
    edit(scratch/PART_MANIFEST, run=str(twin))  # the way out that was named
    check_folder(tiny_config(run.parent, output_dir=twin), "auto")
    assert [name for name in own_files(twin) if name.startswith("checkpoints/")]


@pytest.mark.parametrize("content", ["[]", "{", "7", '{"files": 7}', '{"files": {}}',
    '{"files": {}, "run": "/elsewhere", "part": "checkpoints"}', '{"files": {"a": 7}, "run": 7}', "link"])
def test_a_manifest_behind_a_link_that_is_none(run, tmp_path, content):
    put_link(run/"checkpoints", tmp_path/"scratch")
    (tmp_path/"scratch").mkdir()
    (tmp_path/"scratch"/"checkpoint-1").mkdir()
    if content == "link":
        (tmp_path/"real.json").write_text(json.dumps(dict(files={}, run=str(run.resolve()), part="checkpoints")))
        (tmp_path/"scratch"/PART_MANIFEST).symlink_to(tmp_path/"real.json")
    else: (tmp_path/"scratch"/PART_MANIFEST).write_text(content)
    with pytest.raises(RunError, match="checkpoints is a link to .*nothing is written there"): check_links(run)


def test_names_behind_a_link_are_bound_like_all_others(run, tmp_path):
    "A manifest behind a link that was tampered with reaches no further than the folder, and no file that a run does not have"
    scratch = tmp_path/"scratch"
    (scratch/"deep").mkdir(parents=True)
    put_link(run/"checkpoints", scratch)
    for path in (tmp_path/"mine.json", scratch/"mine.json", scratch/"deep"/"mine.json"): path.write_text("mine")
    entry = listed(scratch)["mine.json"]
    content = dict(files=dict.fromkeys(("../mine.json", "mine.json", "deep/mine.json", "checkpoint-1/../../mine.json",
        str(tmp_path / "mine.json")), entry), run=str(run.resolve()), part="checkpoints")
    (scratch/PART_MANIFEST).write_text(json.dumps(content))
    assert own_files(run) == ["training_data_custom_alpaca.json"]
    error_message(prepare_run, "custom", run, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert (tmp_path/"mine.json").exists() and (scratch/"mine.json").exists() and (scratch/"deep"/"mine.json").exists()


def test_a_link_to_the_run_itself(run):
    for target in (".", "../run", ".."):
        put_link(run/"checkpoints", target)
        with pytest.raises(RunError, match="the run folder, or one above it"): check_links(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "training_config.json", "finetune_meta.json",
    "run_manifest.json", "bad_rows.jsonl", "launch.json", "train.log", ".lock"])
@pytest.mark.parametrize("there", [True, False])
def test_no_file_is_written_through_a_link(run, victim, name, there):
    "The link is replaced by the file, or refused; what it leads to stays as it is"
    target = victim/".bashrc" if there else victim/"new"
    content = (run/name).read_text() if (run/name).exists() else None
    if there and content is not None: target.write_text(content)  # so that it is read as what it should be
    (run/name).unlink(missing_ok=True)
    (run/name).symlink_to(target)
    before = tree(victim)
    try: error_message(lambda: LoRATrainer(read_meta(run).to_config()).train(show=False))
    except FinetuneError: pass
    try: error_message(prepare_run, "custom", run, data=write_rows(run.parent/"rows.jsonl"), overwrite=True)
    except FinetuneError: pass
    assert tree(victim) == before


def test_helpers_do_not_follow_links(tmp_path, victim):
    before = tree(victim)
    for write in (lambda path: write_atomic(path, "x"), lambda path: copy_atomic(write_rows(tmp_path/"rows.jsonl"), path)):
        (tmp_path/"link").symlink_to(victim/".bashrc")
        write(tmp_path/"link")
        assert not (tmp_path/"link").is_symlink()
        (tmp_path/"link").unlink()
    (tmp_path/"link").symlink_to(victim/".bashrc")
    with pytest.raises(RunError, match="it is a link"): open_append(tmp_path/"link")
    os.mkfifo(tmp_path/"pipe")
    with pytest.raises(RunError, match="cannot write"): open_append(tmp_path/"pipe")
    for temporary in (".status.json.part", ".status.json.tmp", "status.json.part"): (tmp_path/temporary).symlink_to(victim/".bashrc")
    write_atomic(tmp_path/"status.json", "{}")
    with pytest.raises(RunError):
        error_message(atomic_directory(tmp_path/"status.json").__enter__) and atomic_directory(tmp_path/"status.json"/"x").__enter__()
    assert tree(victim) == before


def test_bad_rows_do_not_leave_by_a_link(tmp_path, victim):
    "The list of rows that were skipped goes where it was asked for, as a file"
    from sage_finetune.modeling.tokenizer import load_tokenizer
    data = tmp_path/"rows.jsonl"
    data.write_text('{"instruction": "Who?", "output": "Nora."}\n{"instruction": 7}\n')
    (tmp_path/"bad_rows.jsonl").symlink_to(victim/".bashrc")
    before = tree(victim)
    prepare(data, load_tokenizer("tiny"), on_bad_row="skip", show=False, bad_rows_path=tmp_path/"bad_rows.jsonl")
    assert tree(victim) == before and not (tmp_path/"bad_rows.jsonl").is_symlink() and (tmp_path/"bad_rows.jsonl").read_text()


def test_inside_and_outside(tmp_path):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"up").symlink_to("..")
    (tmp_path/"run"/"circle").symlink_to("circle")
    (tmp_path/"run"/"self").symlink_to(".")
    inside = ("a", "a/../b", "self/self/a", tmp_path/"run"/"a", ".")
    outside = ("..", "../run2", "up/x", "self/up/x", "/", tmp_path, "a/../../x", "circle", "a\0b", "../runner")
    assert [is_inside(tmp_path/"run", path) for path in inside] == [True] * 5
    assert not any(is_inside(tmp_path/"run", path) for path in outside)
    check_links(tmp_path/"run")


# ---- ~ ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path/"ada").mkdir()
    (tmp_path/"work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path/"ada"))
    monkeypatch.chdir(tmp_path/"work")
    yield tmp_path/"ada"
    assert list((tmp_path/"work").iterdir()) == []  # above all no folder named ~


def test_every_path_field_of_a_config(home):
    fields = [name for name, field in TrainingConfig.__dataclass_fields__.items() if "Path" in str(field.type)]
    assert {"data_path", "eval_path", "data_cache", "output_dir", "continue_from"} <= set(fields)
    config = TrainingConfig(**{name: f"~/{name}" for name in fields})
    for name in fields:
        assert getattr(config, name) == home/name
        setattr(config, name, "~")
        assert getattr(config, name) == home
        with pytest.raises(FinetuneError, match="no such home folder"): setattr(config, name, "~nobody_at_all/x")
        with pytest.raises(FinetuneError): setattr(config, name, "a\0b")


def test_every_function_that_takes_a_path(home):
    write_rows(home/"rows.jsonl")
    run = prepare_run("custom", "~/runs/one", data="~/rows.jsonl", eval_ratio=0., max_steps=1, device="cpu")
    assert run == home/"runs"/"one" and read_meta("~/runs/one").data_file == home/"rows.jsonl"
    assert ([info.state for info in list_runs("~/runs")] == ["pending"]
        and run_info("~/runs/one").state == read_status("~/runs/one").state == "pending")
    LoRATrainer(read_meta("~/runs/one").to_config()).train(show=False)
    merge("~/runs/one", "~/merged")
    assert (home/"merged"/"config.json").exists() and run_config("~/runs/one").output_dir == run
    assert len(list(iter_rows("~/rows.jsonl"))) == 24
    write_meta("~/runs/two", "custom", "tiny", "~/rows.jsonl")
    assert read_meta(home/"runs"/"two").dataset == home/"rows.jsonl"
    TrainingConfig().save("~/config.json")
    assert TrainingConfig.load("~/config.json") == TrainingConfig.load(home/"config.json")
    (home/"tree").mkdir()
    (home/"tree"/"tea.py").write_text('def pour(cup, hot=True):\n    "Pour a cup of tea."\n')
    assert prepare_run("code", "~/runs/code", code_root="~/tree").is_relative_to(home)


def test_the_command_line(home, capsys):
    write_rows(home/"rows.jsonl")
    assert main(["quickstart", "custom", "--data=~/rows.jsonl", "--output=~/cli", "--prepare-only"]) == 0
    assert (home/"cli"/"status.json").exists()
    assert main(["list", "~"]) == 0 and "cli" in capsys.readouterr().out
    assert main(["list", "~nobody_at_all"]) == 2 and "no such home folder" in capsys.readouterr().err


def test_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the system knows no home folder for this user
    with pytest.raises(FinetuneError, match="no such home folder"): expand_home("~/x")
    assert expand_home("x/~") == Path("x/~")


def test_an_upload_stays_in_the_folder(run, victim):
    from sage_finetune.ui.upload import save_upload
    (run/"uploads").symlink_to(victim)
    before = tree(victim)
    with pytest.raises(RunError, match="is a link out of the run folder"): save_upload("rows.jsonl", b"{}\n", run)
    assert tree(victim) == before


def test_the_command_line_says_it_in_one_sentence(run, victim, capsys):
    edit(run/"training_config.json", data_cache=str(victim), max_steps=1)
    assert main(["run", str(run)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "data_cache" in line]
    assert len(said) == 1 and said[0].startswith("note: ") and "Warning" not in said[0]
