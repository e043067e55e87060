"Only what this toolkit wrote is ever removed, and only in a folder that is a run"
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import copy, prepared, tiny_config, tree, write_rows

from sage_finetune import LoRATrainer, TrainingConfig, merge
from sage_finetune.core.errors import FinetuneError, RunError
from sage_finetune.core.places import MANIFEST, bring_back, is_own_name, own_files, put_aside, read_manifest, remove_own, why_protected
from sage_finetune.core.storage import atomic_directory
from sage_finetune.data.tasks import prepare_run
from sage_finetune.runs.folder import is_run, other_files, run_files
from sage_finetune.tiny.demo import demo_example
from sage_finetune.training.run_writer import RunWriter, check_folder, remove_stale_files

MINE = ("checkpoints/checkpoint-30/optimizer.pt", "checkpoints/notes.txt", "lora_weights/adapter_model.safetensors",
    "merged_model/config.json", "metrics.jsonl",
    "training_data_thesis_final.json")


def put(folder, *names, content="mine"):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(content)
    return folder


def quiet(function, *arguments, **options):
    "Call something that may say what it leaves alone; what it gave, and what was said"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, " ".join(str(one.message) for one in said)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A prepared run that was trained and merged; tests take copies"
    folder = tmp_path_factory.mktemp("run")
    done = prepared(folder/"run", num_train_epochs=1, save_steps=3)
    config = TrainingConfig.load(done/"training_config.json")
    LoRATrainer(config).train(show=False)
    merge(done)
    return done


# ---- a folder that never was a run ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MINE)
def test_overwriting_leaves_a_folder_alone_that_is_no_run(tmp_path, name):
    data, folder = write_rows(tmp_path/"rows.jsonl"), put(tmp_path/"thesis", name)
    before = tree(folder)
    with pytest.raises(RunError, match="is no run of this toolkit"): prepare_run("custom", folder, data=data, overwrite=True)
    if "training_data" not in name:
        with pytest.raises(RunError, match="is no run of this toolkit"):
            check_folder(tiny_config(tmp_path, output_dir=folder, overwrite_output_dir=True))
        with pytest.raises(RunError, match="is no run of this toolkit"):
            RunWriter(tiny_config(tmp_path, output_dir=folder, overwrite_output_dir=True), total=3)
    assert tree(folder) == before


@pytest.mark.parametrize("name, content", [("training_config.json", '{"model_name_or_path": "llama"}'),
    ("finetune_meta.json", '{"task": "x"}'), ("status.json", '{"status": "ok"}'),
    ("run_manifest.json", '{"files": {"checkpoints/checkpoint-30/optimizer.pt": []}}'),
    ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n'), ("status.json", "[]"), ("training_config.json", "{")])
def test_a_file_of_that_name_makes_no_run(tmp_path, name, content):
    "Another program's metrics and config are no evidence"
    folder = put(put(tmp_path/"thesis", "checkpoints/checkpoint-30/optimizer.pt", "lora_weights/adapter_model.safetensors"),
        name, content=content)
    before = tree(folder)
    with pytest.raises(FinetuneError): prepare_run("custom", folder, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    with pytest.raises(FinetuneError): check_folder(tiny_config(tmp_path, output_dir=folder, overwrite_output_dir=True))
    assert not is_run(folder) and run_files(folder) == [] and tree(folder) == before


@pytest.mark.parametrize("name", ["training_config.json", "bad_rows.jsonl"])
def test_a_first_run_writes_over_nobodys_file(tmp_path, name):
    folder = put(tmp_path/"work", name)
    with pytest.raises(RunError, match=name): check_folder(tiny_config(tmp_path, output_dir=folder, on_bad_row="skip"))
    assert (folder/name).read_text() == "mine"


def test_the_demo_leaves_a_folder_alone(tmp_path):
    put(tmp_path/"demo"/"example", "lora_weights/adapter_model.safetensors")
    before = tree(tmp_path/"demo")
    with pytest.raises(RunError, match="is no run of this toolkit"): demo_example(tmp_path/"demo")
    assert tree(tmp_path/"demo") == before


def test_protected_folders(tmp_path, monkeypatch):
    home, project = tmp_path/"home", put(tmp_path/"project", "pyproject.toml", "below/deep/x")
    monkeypatch.setenv("HOME", str(home))
    (home/"work").mkdir(parents=True)
    monkeypatch.chdir(project/"below"/"deep")
    for folder in ("/", home, tmp_path, project, project/"below", Path(sys.modules["sage_finetune"].__file__).parent):
        assert why_protected(folder), folder
    assert not why_protected(home/"work") and not why_protected(project/"below"/"deep")
    for folder in (home, project): put(folder, "status.json", content=json.dumps(dict(state="completed", pid=None, updated="", host="")))
    for folder in (home, project):
        with pytest.raises(RunError, match="nothing is replaced there"):
            prepare_run("custom", folder, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)


def test_nothing_is_replaced_through_a_link(tmp_path, run):
    real = copy(run, tmp_path/"real")
    (tmp_path/"link").symlink_to(real)
    before = tree(real)
    with pytest.raises(RunError, match="is a link to"):
        prepare_run("custom", tmp_path/"link", data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert tree(real) == before


# ---- a folder that is one ---------------------------------------------------------------------------------------------

def test_the_manifest_knows_all_of_a_run(run):
    assert ({name for name in tree(run) if name.startswith(("lora_weights/", "checkpoints/", "merged_model/"))}
        - set(own_files(run)) - {"checkpoints/checkpoint-3", "checkpoints/checkpoint-6"} == set())
    assert other_files(run) == [] and "metrics.jsonl" in own_files(run)


def test_foreign_files_stay_and_are_named(run, tmp_path):
    mine = put(copy(run, tmp_path/"run"), "checkpoints/notes.txt", "lora_weights/thesis.pdf",
        "merged_model/eval/results.csv", "logs/mine.txt", "notes.txt")
    names = ("checkpoints/notes.txt", "lora_weights/thesis.pdf", "merged_model/eval/results.csv", "logs/mine.txt")
    _, said = quiet(prepare_run, "custom", mine, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    left = {name for name in tree(mine) if (mine/name).is_file() and not name.startswith("prepared/")}
    assert left == {*names, "notes.txt", "finetune_meta.json", "run_manifest.json", "status.json", "training_config.json",
        "training_data_custom_alpaca.json"}
    assert all(name in said for name in names)


@pytest.mark.parametrize("name", ["lora_weights/adapter_model.safetensors", "checkpoints/checkpoint-6/adapter_config.json",
    "metrics.jsonl", "lora_weights/README.md"])
def test_what_was_changed_since_is_somebodys_own(run, tmp_path, name):
    mine = put(copy(run, tmp_path/"run"), name)
    before = tree(mine)
    with pytest.raises(RunError, match=f"{name} .* changed since"):
        check_folder(tiny_config(tmp_path, output_dir=mine, overwrite_output_dir=True))
    assert tree(mine) == before


def test_rows_that_were_edited_are_not_replaced(run, tmp_path):
    mine = put(copy(run, tmp_path/"run"), "training_data_custom_alpaca.json", content="[]")
    with pytest.raises(RunError, match="training_data_custom_alpaca.json .* changed since"):
        prepare_run("custom", mine, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert (mine/"training_data_custom_alpaca.json").read_text() == "[]"


def test_a_changed_model_card_survives_going_on(tmp_path):
    config = tiny_config(tmp_path, max_steps=2)
    LoRATrainer(config).train(show=False)
    (config.lora_dir/"README.md").write_text("my card")
    (config.lora_dir/"plot.svg").write_text("my plot")
    _, said = quiet(LoRATrainer(tiny_config(tmp_path, max_steps=3)).train, show=False, resume=True)
    assert ((config.lora_dir/"README.md.kept").read_text() == "my card"
        and (config.lora_dir/"plot.svg").read_text() == "my plot" and "README.md" in said)


def test_rotation_and_the_best_leave_foreign_files(run, tmp_path):
    mine = put(copy(run, tmp_path/"run"), "checkpoints/checkpoint-3/notes.txt")
    _, said = quiet(remove_own, mine, "checkpoints/checkpoint-3")
    assert [path.name for path in (mine/"checkpoints"/"checkpoint-3").iterdir()] == ["notes.txt"] and "notes.txt" in said
    put(mine, "checkpoints/best-9/adapter_model.safetensors")
    quiet(remove_own, mine, "checkpoints/best-9")
    assert (mine/"checkpoints"/"best-9"/"adapter_model.safetensors").read_text() == "mine"


def test_a_run_without_a_manifest(run, tmp_path):
    "Made before there were any: whole parts with our inner structure go, all else is left"
    mine = put(copy(run, tmp_path/"run"), "checkpoints/checkpoint-2/optimizer.pt", "lora_weights/thesis.txt")
    (mine/MANIFEST).unlink()
    own = set(run_files(mine))
    assert {"checkpoints/checkpoint-3/state.safetensors", "lora_weights/adapter_model.safetensors",
        "training_data_custom_alpaca.json", "metrics.jsonl"} <= own
    assert not own & {"checkpoints/checkpoint-2/optimizer.pt", "lora_weights/thesis.txt"}
    (mine/"metrics.jsonl").unlink()
    assert not any(name.startswith(("checkpoints", "lora_weights")) for name in run_files(mine))  # a run of ours that was trained has one


def test_a_plain_overwrite_still_works(run, tmp_path):
    mine = copy(run, tmp_path/"run")
    LoRATrainer(tiny_config(tmp_path, max_steps=1, overwrite_output_dir=True)).train(show=False)
    assert sorted(path.name for path in (mine/"checkpoints").iterdir()) == ["checkpoint-1"] and not (mine/"merged_model").exists()
    _, said = quiet(prepare_run, "custom", mine, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert not (mine/"checkpoints").exists() and not (mine/"lora_weights").exists() and said == ""


# ---- a manifest from a stranger ---------------------------------------------------------------------------------------

HOSTILE_NAMES = ["../victim.txt", "/etc/passwd", "lora_weights/../../victim.txt", "C:\\victim.txt",
    "lora_weights\\..\\victim.txt", "notes.txt", ".bashrc", "lora_weights/.ssh", "", "lora_weights//x.json",
    "checkpoints/checkpoint-1/../../notes.json", "lora_weights/x.json\0", "training_config.json/..", "./metrics.jsonl"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_in_a_manifest(run, tmp_path, name):
    victim = put(tmp_path, "victim.txt")/"victim.txt"
    mine = put(copy(run, tmp_path/"run"), "notes.txt", "notes.json")
    content = json.loads((mine/MANIFEST).read_text())
    content["files"][name] = content["files"]["metrics.jsonl"] + [dict(size=4, sha256=__import__("hashlib").sha256(b"mine").hexdigest())]
    (mine/MANIFEST).write_text(json.dumps(content))
    assert not is_own_name(name)
    quiet(prepare_run, "custom", mine, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    assert victim.read_text() == (mine/"notes.txt").read_text() == (mine/"notes.json").read_text() == "mine"


def test_links_below_a_part_lead_nowhere(run, tmp_path):
    "The name and the hash are right, and still it is not the run's file"
    mine, other = copy(run, tmp_path/"run"), copy(run, tmp_path/"other")
    shutil.rmtree(mine/"checkpoints"/"checkpoint-6")
    (mine/"checkpoints"/"checkpoint-6").symlink_to(other/"checkpoints"/"checkpoint-6")
    (mine/"lora_weights"/"adapter_model.safetensors").unlink()
    (mine/"lora_weights"/"adapter_model.safetensors").symlink_to(other/"lora_weights"/"adapter_model.safetensors")
    before = tree(other)
    assert not {"checkpoints/checkpoint-6/state.safetensors", "lora_weights/adapter_model.safetensors"} & set(own_files(mine))
    with pytest.raises(RunError, match="checkpoints/checkpoint-6 is a link"):
        prepare_run("custom", mine, data=write_rows(tmp_path/"rows.jsonl"), overwrite=True)
    quiet(remove_own, mine, "checkpoints/checkpoint-6")
    assert tree(other) == before


@pytest.mark.parametrize("content", ["[]", "{", '{"files": 7}', '{"files": {"metrics.jsonl": 7}}', '{"files": {"metrics.jsonl": [7]}}',
    "null", '{"files": {"metrics.jsonl": [{"size": "x", "sha256": 1}]}}', "\x00", "[" * 100_000])
def test_a_broken_manifest_is_none(run, tmp_path, content):
    mine = copy(run, tmp_path/"run")
    (mine/MANIFEST).write_text(content)
    assert not read_manifest(mine) or own_files(mine) == []
    assert isinstance(run_files(mine), list) and isinstance(other_files(mine), list)


# ---- killed in between ------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from sage_finetune.core.places import put_aside
from sage_finetune.runs.folder import run_files
with put_aside(Path(sys.argv[1]), run_files(sys.argv[1])): os._exit(9)
"""


def test_a_kill_while_overwriting_loses_nothing(run, tmp_path):
    mine = put(copy(run, tmp_path/"run"), "lora_weights/thesis.pdf")
    before = {name: value for name, value in tree(mine).items() if value}
    assert subprocess.run([sys.executable, "-c", KILLED, str(mine)], timeout=120).returncode == 9
    assert not (mine/"metrics.jsonl").exists()
    remove_stale_files(mine)
    assert {name: value for name, value in tree(mine).items() if value} == before


def test_what_was_being_removed_goes(run, tmp_path):
    mine = copy(run, tmp_path/"run")
    put(mine, ".replaced-abcdefgh.done/lora_weights/README.md", ".replaced-abcdefg1.done/lora_weights/thesis.pdf", ".replaced-notes/x.txt")
    bring_back(mine)
    assert (not (mine/".replaced-abcdefgh.done").exists() and (mine/".replaced-abcdefg1.done"/"lora_weights"/"thesis.pdf").exists()
        and (mine/".replaced-notes"/"x.txt").exists())


def test_a_stranger_puts_nothing_aside(tmp_path):
    "Files that are said to lie aside return into the folder, and not through a link out of it"
    folder, outside = put(tmp_path/"run", ".replaced-abcdefgh/lora_weights/README.md"), tmp_path/"outside"
    outside.mkdir()
    (folder/"lora_weights").symlink_to(outside)
    bring_back(folder)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "README.md", ".bashrc", "thesis.json", "bad_rows.jsonl", "train.log",
    "uploads/rows.jsonl", "prepared/x.json"])
@pytest.mark.parametrize("there", [True, False])
def test_only_files_that_are_put_aside_come_back(tmp_path, name, there):
    "A run puts no other file aside, so a stranger did; it stays where it lies, and so does what is there"
    folder = put(tmp_path/"run", f".replaced-abcdefgh/{name}", content="evil")
    if there: put(folder, name)
    before = tree(folder)
    remove_stale_files(folder)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["training_data_custom_alpaca.json", "lora_weights/README.md",
    "lora_weights/adapter_model.safetensors", "checkpoints/checkpoint-3/state.safetensors", "merged_model/config.json",
    "training_config.json", "metrics.jsonl", "status.json", "finetune_meta.json"])
def test_what_somebody_wrote_meanwhile_stays(run, tmp_path, name):
    "What lies aside stays too, and both are named"
    mine = put(copy(run, tmp_path/"run"), name)
    put(mine, f".replaced-abcdefgh/{name}", ".replaced-abcdefgh/lora_weights/LICENSE.txt", content="evil")
    _, said = quiet(remove_stale_files, mine)
    assert ((mine/name).read_text() == "mine" and (mine/".replaced-abcdefgh"/name).read_text() == "evil" and name in said
        and ".replaced-abcdefgh" in said)
    assert (mine/"lora_weights"/"LICENSE.txt").read_text() == "evil"  # the stranger's own, where nothing was


@pytest.mark.parametrize("name", ["training_data_custom_alpaca.json", "metrics.jsonl", "training_config.json",
    "status.json", "run_manifest.json", "lora_weights/README.md"])
def test_what_the_killed_program_had_written_gives_way(run, tmp_path, name):
    "The new file is known to be the toolkit's, so the old one takes its place again"
    mine = copy(run, tmp_path/"run")
    old = (mine/name).read_bytes()
    (mine/".replaced-abcdefgh"/name).parent.mkdir(parents=True)
    (mine/".replaced-abcdefgh"/name).write_bytes(old + b" ")
    _, said = quiet(remove_stale_files, mine)
    assert (mine/name).read_bytes() == old + b" " and said == "" and not (mine/".replaced-abcdefgh").exists()


LINKS = {"the part": ("checkpoints", ""), "below it": ("checkpoints/checkpoint-9", ""), "deep": ("lora_weights/deep", ""),
    "in a link": ("real/checkpoint-9", "real"), "the file": ("lora_weights/README.md", "")}


@pytest.mark.parametrize("kind", LINKS)
def test_nothing_comes_back_through_a_link(tmp_path, kind):
    "At any depth, behind a link that is the run's own as well"
    link, real = LINKS[kind]
    folder, victim = tmp_path/"run", put(tmp_path/"victim", "README.md", "state.safetensors", "checkpoint-9/state.safetensors")
    aside = folder/real/".replaced-abcdefgh"
    if real:
        put(folder, "real/.keep").joinpath("real/.keep").unlink()
        (folder/"checkpoints").symlink_to("real")
        claim = dict(files={}, run=str(folder.resolve()), part="checkpoints")  # a stranger who guesses where the folder will lie
        put(folder, "real/.linked_part.json", content=json.dumps(claim))
    (folder/link).parent.mkdir(parents=True, exist_ok=True)
    (folder/link).symlink_to(victim/"README.md" if kind == "the file" else victim)
    below = ("" if kind == "the file" else "/checkpoint-9/state.safetensors" if kind == "the part"
        else "/state.safetensors" if "checkpoint" in link else "/README.json")
    name = (link.removeprefix("real/") if real else link) + below
    put(aside, name, content="evil")
    before = tree(victim), tree(folder)
    quiet(remove_stale_files, folder)
    assert (tree(victim), tree(folder)) == before


def test_what_lay_aside_behind_a_link_comes_back(tmp_path):
    "Behind one that is the run's own; behind any other nothing is looked at"
    from sage_finetune.core.places import claim_links
    for name, own in dict(run=True, gift=False).items():
        folder, scratch = put(tmp_path/name, "metrics.jsonl"), tmp_path/f"{name} scratch"
        scratch.mkdir()
        (folder/"checkpoints").symlink_to(scratch)
        if own: claim_links(folder)
        put(scratch, ".replaced-abcdefgh/checkpoint-1/state.safetensors", ".replaced-abcdefg1.done/checkpoint-2/state.safetensors",
            ".checkpoint-9.abcdefgh.part/x", ".checkpoint-8.abcdefgh.old/x")
        before = tree(scratch)
        remove_stale_files(folder)
        if own:
            assert {path for path, value in tree(scratch).items() if value} == {".linked_part.json",
                "checkpoint-1/state.safetensors", "checkpoint-8/x"}
        else: assert tree(scratch) == before


@pytest.mark.parametrize("name", ["foo", "checkpoints", "lora_weights", "prepared", ".hidden", "checkpoints/deep"])
def test_tidying_goes_through_no_link(run, tmp_path, name):
    "What looks like half-written files of this toolkit lies in somebody's folder"
    mine = copy(run, tmp_path/"run")
    remains = (".checkpoint-9.abcdefgh.part/x", ".lora_weights.abcdefgh.part/x", ".status.json.abcdefgh.part",
        ".merged_model.abcdefgh.old/x", ".checkpoint-8.abcdefgh.old/x", ".replaced-abcdefgh.done/checkpoint-1/state.safetensors")
    victim = put(tmp_path/"victim", *remains)
    if (mine/name).is_dir(): shutil.rmtree(mine/name)
    (mine/name).symlink_to(victim)
    before = tree(victim)
    quiet(remove_stale_files, mine)
    assert tree(victim) == before


def test_tidying_leaves_an_editors_files(tmp_path):
    names = (".status.json.swp", ".lora_weights.original/adapter_model.safetensors", ".metrics.jsonl.backup12",
        ".checkpoint-3.old/x", ".training_config.json.bak")
    folder = put(tmp_path/"run", *names)
    remove_stale_files(folder)
    assert all((folder/name).read_text() == "mine" for name in names)


def test_a_folder_is_not_replaced_with_what_others_put_there(tmp_path):
    put(tmp_path/"model", "old.bin", "notes.txt", "deep/mine.txt")
    (tmp_path/"model"/"link").symlink_to(tmp_path)
    with atomic_directory(tmp_path/"model", ours=["old.bin"]) as temp: put(temp, "new.bin")
    assert (sorted(path.name for path in (tmp_path/"model").iterdir()) == ["deep", "link", "new.bin", "notes.txt"]
        and (tmp_path/"model"/"link").is_symlink())


def test_files_come_back_after_an_error(tmp_path):
    put(tmp_path, "metrics.jsonl", "lora_weights/README.md", "lora_weights/notes.pdf")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), put_aside(tmp_path, ["metrics.jsonl", "lora_weights/README.md"]):
        put(tmp_path, "metrics.jsonl", content="new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before


# ---- merging ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [dict(report="{}"), dict(report="{}", others=["thesis.txt"]),
    dict(others=["model.safetensors"]), dict(others=["notes/plan.md"]), dict(report="[]"),
    dict(report=json.dumps(dict(files={"thesis.txt": dict(size=4, sha256="0")})), others=["thesis.txt"])], ids=str)
def test_merging_replaces_only_a_merge(run, tmp_path, changes):
    out = tmp_path/"out"
    if "report" in changes: put(out, "merge_report.json", content=changes["report"])
    else: shutil.copytree(run/"merged_model", out)
    put(out, "thesis.txt" if changes.get("report") == "{}" else "keep.bin", *changes.get("others", []))
    before = tree(out)
    with pytest.raises(RunError, match="not replaced|holds a JSON"): merge(run, out)
    assert tree(out) == before


def test_merging_twice_into_one_place(run, tmp_path):
    out = tmp_path/"out"
    for _ in range(2): merge(run, out)
    assert tree(out).keys() == tree(run/"merged_model").keys()
    (tmp_path/"home").symlink_to(Path.home())
    for place in (Path.home(), tmp_path/"home", "/", Path.cwd().parent):
        with pytest.raises(RunError, match="so no model is put there"): merge(run, place)


def test_the_cache_is_cleaned_of_its_own_remains_only(tmp_path):
    from sage_finetune.data.cache import _remove_unfinished
    key = "0123456789abcdef"
    names = (f".prepared-{key}.abcdefgh.part/train.arrow", f".prepared-{key}.abcdefg1.part/notes.txt",
        ".prepared-thesis/train.arrow", f"prepared-{key}/train.arrow")
    cache = put(tmp_path/"cache", *names)
    for path in cache.iterdir(): os.utime(path, (0, 0))
    _remove_unfinished(cache)
    assert [name for name in names if (cache/name).exists()] == list(names[1:])


def test_the_first_example_replaces_nothing(root):
    assert "overwrite" not in (root/"README.md").read_text(encoding="utf-8").split("```python")[1].split("```")[0]


def test_making_the_embedded_model_replaces_nobodys_model(tmp_path, capsys):
    from sage_finetune.tiny import pretrain as tiny
    put(tmp_path/"model", "config.json", "README.md")
    with pytest.raises(SystemExit): tiny.main(["--out", str(tmp_path/"model"), "--steps", "1"])
    assert "holds config.json and no checkpoint" in capsys.readouterr().err and (tmp_path/"model"/"README.md").read_text() == "mine"
