"The program in a shell: settings, wrong words, JSON, pipes, narrow terminals, hostile names, the Tab key"
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sage_finetune.cli import main
from sage_finetune.commands.program import app
from sage_finetune.config import TrainingConfig
from sage_finetune.core.places import note_files
from sage_finetune.runs.folder import CONFIG, METRICS, read_status, write_meta, write_status

ROWS = [dict(instruction=f"Which colour has door {n}?", output=["Red.", "Blue."][n % 2]) for n in range(12)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A working folder with rows in it"
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def make_run(folder, losses=(4., 3., 2.), state="completed", **fields):
    "A run folder as it is left, without training"
    folder.mkdir(parents=True)
    TrainingConfig(model_name="tiny", data_path="example", output_dir=folder, **fields).save(folder/CONFIG)
    write_meta(folder, "custom", "tiny", "example", folder/CONFIG)
    rows = [dict(step=at, total=len(losses), epoch=1., loss=loss, learning_rate=1e-3, grad_norm=1., tokens=10, target_tokens=2,
        seconds=1. * at, tokens_per_second=10., eval_loss=loss + .1) for at, loss in enumerate(losses, 1)]
    (folder/METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    note_files(folder, [METRICS])
    write_status(folder, state, len(losses), len(losses))
    return folder


def call(capsys, *arguments):
    "A command in this process: its status, what it printed, what it complained"
    capsys.readouterr()
    status = main([str(one) for one in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def shell(*arguments, **options):
    "A command as a process of its own"
    program = [sys.executable, "-m", "sage_finetune.cli", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, **options)


# ---- what is wrong is said in the words that were typed -------------------------------------------------------------

WRONG = {
    "fly": "there is no command 'fly'",
    "quikstart code": "Did you mean 'quickstart'?",
    "run": "Missing argument",
    "run nowhere": "there is no run folder nowhere",
    "rows rows.json --by-hand --json": "Type one of them",
    "run rows.json": "rows.json",
    "run run": "already holds a run (metrics.jsonl). Choose another RUN, go on with it by --resume, or replace it by --overwrite",
    "run run --resume --overwrite": "Type one of them",
    "run run --num-processes 0": "--num-processes",
    "run run --resume --lr 1": "learning_rate cannot be set when a run goes on",
    "run run --set output_dir=x": "--set output_dir cannot be changed",
    "run run --report-to nobody": "--report-to",
    "quickstart": "Missing argument",
    "quickstart fly": "there is no task 'fly'",
    "quickstart custom -d nowhere.json": "there is no data file",
    "quickstart custom -d rows.json --rank 0": "--rank 0 cannot be used: it takes a whole number from 1 to 1,024",
    "quickstart custom -d rows.json --lr fast": "'--lr'",
    "quickstart custom -d rows.json --lr 5": "--lr 5.0 cannot be used",
    "quickstart custom -d rows.json --bits 3": "--bits 3 cannot be had",
    "quickstart custom -d rows.json --set": "requires an argument",
    "quickstart custom -d rows.json --set rank": "no NAME=VALUE",
    "quickstart custom -d rows.json --set lerning_rate=1": "Did you mean 'learning_rate'",
    "quickstart custom -d rows.json --set optim=best": "--set optim=best cannot be used",
    "quickstart custom -d rows.json --config none.yaml": "there is no config file",
    "quickstart custom -d rows.json --save-config a.toml --prepare-only": "a config is saved as .yaml or .json",
    "quickstart custom -d rows.json --epoch 2": "--epochs",
    "quickstart qa -d rows.json": "task qa takes question, answer",
    "quickstart code --code-root rows.json": "--code-root",
    "start": "--task is missing",
    "start -t qa": "--data is missing",
    "start -d rows.json -f nobody": "--framework nobody",
    "start -d rows.json --format alphabet": "--format alphabet",
    "data nowhere.json": "there is no data file nowhere.json",
    "data rows.json --column-map a": "is no pair",
    "estimate nowhere": "there is no run folder nowhere",
    "estimate --device tpu": "--device tpu",
    "show rows.json": "there is no run folder",
    "plot": "Missing argument",
    "plot run -o run.pdf": "is no .png file",
    "plot run --by colour": "--by colour",
    "compare run": "Name two run folders or more",
    "merge run": "holds no adapter yet",
    "chat run --merged": "holds no adapter yet",
    "chat nowhere": "there is no run folder nowhere",
    "clean": "Name run folders, or an age",
    "clean --before soon": "is no age",
    "clean nowhere": "there is no run folder nowhere",
    "run run --auto-resume --overwrite": "Type one of them",
    "run run.yaml --config run.yaml": "Name one of them",
    "quickstart custom -d rows.json --lr 1e-4 --set learning_rate=1e-3": "Type one of them",
    "quickstart custom -d rows.json --set trust_remote_code=true": "Type --trust-remote-code",
    "quickstart custom -d rows.json --save-config rows.json": "is no config",
    "chat run --compare --merged": "Type one of them",
    "rows rows.json --assistant me": "Add --chat",
    "rows rows.json --key-env KEY": "need --endpoint",
    "rows rows.json --by-hand": "nobody can be asked here",
    "rows rows.json --by-hand --overwrite": "does not go with --overwrite",
    "rows rows.json --by-hand --chat": "does not go with --chat",
    "estimate --device cuda --measure": "--measure times one batch here",
    "completion cmd": "there is no completion for 'cmd'",
    "migrate nowhere.yaml": "nowhere.yaml",
    "studio nowhere": "there is no folder nowhere",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_call_is_a_sentence(line, place, capsys):
    make_run(place/"run")
    Path("run.yaml").write_text("data_path: rows.json")
    status, _, err = call(capsys, *line.split())
    assert status == 2 and WRONG[line] in err.replace("\n", " "), err
    assert "Traceback" not in err and "=True" not in err and "`" not in re.sub(r"`sage-finetune [^`]*`", "", err), err


@pytest.mark.parametrize("line", ["run nowhere", "run run", "quickstart custom -d rows.json --rank 0", "chat run", "merge nowhere", "fly",
    "estimate nowhere", "clean --before soon", "start"])
def test_what_is_wrong_is_said_before_anything_heavy(line, place):
    "As a process of its own: no torch is imported for it"
    make_run(place/"run")
    program = ("import sys; from sage_finetune.cli import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program, *line.split()], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "2 []", done.stdout + done.stderr


def test_every_command_has_help(capsys):
    "Each parameter with a phrase, and the whole list in the order in which one needs them"
    import typer
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        status, out, _ = call(capsys, name, "--help")
        assert status == 0 and command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"
    status, out, _ = call(capsys, "--help")
    names = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()]
    assert names[:3] == ["start", "quickstart", "run"] and "..." not in out.partition("Commands:")[2]


# ---- settings -------------------------------------------------------------------------------------------------------

def test_settings_reach_the_run(place, capsys):
    "A file, --set and flags: the later counts more; what was saved says the same"
    Path("mine.toml").write_text("learning_rate = 1e-4\nseed = 7\nnum_train_epochs = 9\n[lora]\nlora_alpha = 4\n")
    status, _, err = call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", "run", "--prepare-only", "--config", "mine.toml",
        "--set", "num_train_epochs=5", "--set", "lora.use_rslora=yes", "--lr", "3e-4", "--rank", "2", "--save-config", "saved.yaml")
    assert status == 0, err
    made = json.loads(Path("run", CONFIG).read_text())
    assert (made["learning_rate"], made["seed"], made["num_train_epochs"]) == (3e-4, 7, 5)
    assert (made["lora"]["r"], made["lora"]["lora_alpha"], made["lora"]["use_rslora"]) == (2, 4, True)
    status, _, err = call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", "again", "--prepare-only", "--config", "saved.yaml")
    assert status == 0, err
    again = json.loads(Path("again", CONFIG).read_text())
    assert {name for name in made if made[name] != again[name]} == {"output_dir", "data_path"}


def test_a_file_is_no_permission(place, capsys):
    Path("theirs.yaml").write_text("trust_remote_code: true\nreport_to: wandb\n")
    status, _, err = call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", "run", "--prepare-only", "--config", "theirs.yaml")
    assert status == 0 and err.count("which only you can allow") == 2
    made = json.loads(Path("run", CONFIG).read_text())
    assert (made["trust_remote_code"], made["report_to"]) == (False, "none")


def test_trained_resumed_and_longer(place, capsys):
    "A config file becomes a run; finished it says so; longer training goes on; a wrong setting changes nothing"
    Path("run.yaml").write_text("model_name: tiny\ndata_path: rows.json\noutput_dir: run\nmax_steps: 2\nmax_length: 64\n")
    status, out, err = call(capsys, "run", "run.yaml", "--json")
    assert status == 0, err
    assert json.loads(out)["status"]["state"] == "completed" and json.loads(out)["can_do"] == ["chat", "merge"]
    status, out, _ = call(capsys, "run", "run", "--resume")
    assert status == 0 and "is finished: 2 of 2 steps" in out and out.rstrip().endswith("run --resume --set max_steps=4")
    before = Path("run", CONFIG).read_bytes()
    assert call(capsys, "run", "run", "--resume", "--rank", "3")[0] == 2 and Path("run", CONFIG).read_bytes() == before
    for flag, steps in (("--resume", 3), ("--auto-resume", 4)):
        status, out, err = call(capsys, "run", "run", flag, "--set", f"max_steps={steps}")
        assert status == 0 and read_status("run").step == steps, err


def test_a_run_that_fails_before_its_first_step_is_failed(place, capsys):
    "With its reason, from a shell and as a child; and it can be started again"
    assert call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", "run", "--prepare-only", "--set", "max_steps=1")[0] == 0
    rows = next(Path("run").glob("training_data_*"))
    kept = rows.read_bytes()
    rows.write_text("[{")
    status, _, err = call(capsys, "run", "run")
    assert status == 2 and read_status("run").state == "failed" and rows.name in read_status("run").message, err
    assert "failed" in call(capsys, "list", ".")[1]
    rows.write_bytes(kept)
    status, _, err = call(capsys, "run", "run")
    assert status == 0 and read_status("run").state == "completed", err


@pytest.fixture
def diverges(monkeypatch):
    "From the second step on the loss is no number; which settings do that depends on the processor"
    from sage_finetune.trainer import LoRATrainer
    usual = LoRATrainer.loss
    def loss(self, batch): return usual(self, batch) * (float("nan") if self.progress.step else 1.)
    monkeypatch.setattr(LoRATrainer, "loss", loss)


def test_a_run_that_fails_later_ends_with_1(place, capsys, diverges):
    "It had begun: no input to put right, but a run to look at"
    status, _, err = call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", "run", "--lr", "0.1", "--set", "eval_ratio=0")
    state = read_status("run")
    assert (status, state.state) == (1, "failed") and 0 < state.step < state.total, (status, state, err)
    assert "--set fp16=false" in err and "--lr" in err


# ---- answers for scripts --------------------------------------------------------------------------------------------

def test_json_is_all_that_is_printed(place, capsys):
    "One JSON value on the first stream, whatever happens; of an error too"
    one, two = make_run(place/"a"/"one"), make_run(place/"a"/"two", (4., 1.), seed=3)
    expected = {("list", "a"): lambda said: [run["name"] for run in said] == ["one", "two"],
        ("show", one): lambda said: said["curve"]["best"] == [2.1, 3] and said["settings"] == {} and said["sizes"]["all"] > 0,
        ("compare", one, two): lambda said: said["settings"] == {"seed": ["42", "3"]},
        ("clean", "--before", "0h", "--folder", "a"): lambda said: not said["deleted"] and len(said["runs"]) == 2,
        ("data", "rows.json"): lambda said: said["level"] == "warn" and said["findings"],
        ("estimate", one): lambda said: said["fits"] and said["total"] == sum(said["memory"].values()),
        ("doctor", "--no-online"): lambda said: isinstance(said["healthy"], bool) and said["checks"][0]["what"],
        ("examples",): lambda said: said[0]["command"].startswith("sage-finetune ")}
    for arguments, holds in expected.items():
        status, out, err = call(capsys, *arguments, "--json")
        assert status in (0, 2) and holds(json.loads(out)), (arguments, out, err)
    status, out, err = call(capsys, "show", "nowhere", "--json")
    said = json.loads(out)
    assert status == said["exit_status"] == 2 and said["error"]["kind"] == "RunError" and said["error"]["message"] in err


ERROR = dict(error=dict(kind=str, message=str, fields=list), exit_status=int)
RUN = dict(folder=str, task=str, model=str, format=str, rows=dict(trained=int, held_out=int), adapter=(str, None), can_do=list,
    settings=dict, status=dict(state=str, step=int, total=int, message=str),
    curve=dict(steps=int, loss=(list, None), eval_loss=(list, None), best=(list, None)))
MIGRATED = dict(RUN, file=str, taken_over=[dict(name=str, here=str)], explained=[dict(name=str, here=str, remark=str)], refused=list)
MADE_ROWS = dict(file=str, rows=int, eval_file=(str, None), held_out=int, flagged=list, report=[dict(what=str, count=int, remark=str)])


def fits(value, schema):
    "Whether a JSON value has what a schema names: types, alternatives, objects with fields, lists of such"
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(name in value and fits(value[name], one) for name, one in schema.items())
    if isinstance(schema, list): return isinstance(value, list) and all(fits(one, schema[0]) for one in value)
    if isinstance(schema, tuple): return any(fits(value, one) for one in schema)
    return value is None if schema is None else type(value) is schema


def answer(capsys, *arguments, schema, status=0):
    "The one JSON value that a command with --json prints"
    ended, out, err = call(capsys, *arguments, "--json")
    said = json.loads(out)
    assert ended == status and fits(said, schema), (arguments, out, err)
    return said


def test_a_run_that_is_made_is_told_in_json(place, capsys):
    "Prepared or trained, by either command; nobody is asked"
    typed = ("-d", "rows.json", "--set", "max_steps=2", "--set", "eval_ratio=0.4")
    said = answer(capsys, "quickstart", "instruction", *typed, "-o", "one", "--prepare-only", schema=RUN)
    assert (said["task"], said["model"], said["adapter"], said["status"]["state"], said["can_do"]) == (
        "instruction", "tiny", None, "pending", ["run"])
    assert sum(said["rows"].values()) == len(ROWS) and 0 < said["rows"]["held_out"] < len(ROWS) and Path(said["folder"]) == place/"one"
    said = answer(capsys, "start", "-t", "instruction", *typed, "-o", "two", "--prepare-only", schema=RUN)
    assert (said["status"]["state"], said["settings"]["max_steps"]) == ("pending", 2)
    told = dict(RUN, config_file=str, remarks=list)
    said = answer(capsys, "start", "-t", "instruction", *typed, "-o", "three", "-f", "unsloth", schema=told)
    assert Path(said["config_file"]).exists()
    assert answer(capsys, "start", "--task", "qa", schema=ERROR, status=2)["error"]["message"].startswith("--data is missing")


@pytest.mark.slow
def test_a_run_that_is_trained_is_told_in_json(place, capsys):
    typed = ("-d", "rows.json", "--set", "max_steps=2", "--set", "eval_ratio=0.4")
    scores = dict(scores=dict(before=dict(correct=int, total=int), after=dict(correct=int, total=int)))
    for command, schema in ((("quickstart", "instruction"), RUN | scores), (("start", "-t", "instruction"), RUN)):
        said = answer(capsys, *command, *typed, "-o", f"by_{command[0]}", schema=schema)
        assert (said["status"]["state"], said["status"]["step"], said["curve"]["steps"]) == ("completed", 2, 2)
        assert Path(said["adapter"], "adapter_config.json").is_file() and len(said["curve"]["loss"]) == 2


def test_a_run_that_fails_later_is_told_in_json(place, capsys, diverges):
    typed = ("-d", "rows.json", "-o", "bad", "--lr", "0.1", "--set", "eval_ratio=0")
    said = answer(capsys, "quickstart", "custom", *typed, schema=ERROR, status=1)
    assert "--lr" in said["error"]["message"]


def test_what_migrate_made_is_told_in_json(place, capsys):
    "Each key once: taken over, explained or refused"
    Path("data").mkdir()
    Path("data", "dataset_info.json").write_text('{"doors": {"file_name": "doors.json"}}')
    Path("data", "doors.json").write_text(json.dumps(ROWS))
    keys = dict(model_name_or_path="tiny", stage="sft", dataset="doors", template="qwen", lora_rank=4, plot_loss=True,
        trust_remote_code=True)
    Path("sft.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in keys.items()))
    said = answer(capsys, "migrate", "sft.yaml", "-o", "theirs", schema=MIGRATED)
    names = [key["name"] for group in ("taken_over", "explained", "refused") for key in said[group]]
    assert {*keys} - {"trust_remote_code"} <= {*names}
    assert dict(name="lora_rank", value="4", here="lora.r=4", remark="") in said["taken_over"]
    assert [key["name"] for key in said["refused"]] == ["trust_remote_code"] and said["rows"]["trained"] == len(ROWS)
    Path("dpo.yaml").write_text("model_name_or_path: tiny\nstage: dpo\ndataset: doors\n")
    assert "stage" in answer(capsys, "migrate", "dpo.yaml", "-o", "never", schema=ERROR, status=2)["error"]["message"]


def test_what_rows_made_is_told_in_json(place, capsys):
    Path("manual.md").write_text("# Till\n\n## Change\n\nThe till gives back the change in coins, the largest first.\n\n"
        "## Paper\n\nThe paper is changed on the first of each month.\n")
    said = answer(capsys, "rows", "manual.md", "-o", "made.jsonl", schema=MADE_ROWS)
    lines = [path and len(Path(path).read_text().splitlines()) or 0 for path in (said["file"], said["eval_file"])]
    assert lines == [said["rows"], said["held_out"]] and said["rows"] > 0
    Path("chat.txt").write_text("[12.03.24, 14:05:33] Anna: <Media omitted>\n[12.03.24, 14:06:01] Till: Nice picture.\n"
        "[12.03.24, 14:07:00] Anna: When does it open?\n[12.03.24, 14:08:00] Till: At nine.\n")
    said = answer(capsys, "rows", "chat.txt", "--chat", "--assistant", "Till", "-o", "chat.jsonl", schema=MADE_ROWS)
    assert said["rows"] == 1 and said["flagged"] and fits(said["flagged"], [dict(place=str, reason=str)]), said
    assert answer(capsys, "rows", "nowhere.md", "-o", "n.jsonl", schema=ERROR, status=2)["error"]["fields"] == []


@pytest.mark.parametrize("line, field", [("quickstart", "task"), ("quickstart custom --rank x", "rank"),
    ("start --lr fast", "learning_rate"), ("rows", "source"),
    ("rows a.md --wrong", "--wrong"), ("fly", None), ("show a b", None), ("estimate --max-length x", "max_length")])
def test_what_the_parser_refuses_is_told_in_json(line, field, place, capsys):
    said = answer(capsys, *line.split(), schema=ERROR, status=2)
    assert said["error"]["kind"] == "UsageError" and said["error"]["fields"] == [field] * bool(field) and said["exit_status"] == 2, said


def test_secrets_are_not_in_answers(place, capsys):
    token = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC2dF4h"
    run = make_run(place/"run")
    status = json.loads((run/"status.json").read_text())
    (run/"status.json").write_text(json.dumps(status | dict(state="failed", message=f"401 for {token}")))  # as another program wrote it
    for command in ("show", "list"):
        for flags in ((), ("--json",)):
            _, out, err = call(capsys, command, run if command == "show" else place, *flags)
            assert token not in out + err


# ---- pipes, narrow and hostile --------------------------------------------------------------------------------------

def test_hostile_names(place, capsys):
    "Nothing in a name is obeyed, by the terminal or by a shell"
    for name in ("a\nfailed  forged", "b\x1b[2Jc", "$(touch planted)", "--overwrite", "x; touch planted", "run `touch planted`"):
        folder = make_run(place/"runs"/name)
        for arguments in (("list", "runs"), ("show", folder), ("plot", folder), ("clean", folder), ("compare", folder, folder)):
            status, out, err = call(capsys, *arguments)
            assert status == 0 and "\x1b" not in out + err, (name, arguments, err)
            assert not any(line.startswith("failed  forged") for line in (out + err).splitlines())
    assert not (place/"planted").exists()


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_tables_fit_the_terminal(columns, place, capsys, monkeypatch):
    "No word is cut that fits a line, and no line is longer than the screen"
    make_run(place/"runs"/"a-run-with-a-very-long-name-that-would-push-everything-away")
    make_run(place/"runs"/"short")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sage_finetune.core.text.sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for arguments in (("list", "runs"), ("show", "runs/short"), ("compare", "runs/short", "runs/short")):
        status, out, _ = call(capsys, *arguments)
        assert status == 0 and max(map(len, out.splitlines())) <= columns, out
        assert re.search(r"\bcompleted\b", out), out


def in_terminal(arguments, answers, cwd, columns=60, interrupt=None, variables=()):
    """A command in a real terminal; each answer is typed when its prompt is there, Ctrl-C when the pattern `interrupt`
    is. What the screen got, and the status. Python's `input` misses a Ctrl-C in the moment before it waits: as a person would,
    it is pressed again when nothing happens."""
    pid, screen = pty.fork()
    if pid == 0:  # the child
        os.chdir(cwd)
        os.environ.update({"COLUMNS": str(columns), "TERM": "dumb", **dict(variables)})
        os.execv(sys.executable, [sys.executable, "-m", "sage_finetune.cli", *arguments])
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    said, waiting, until, pressed = "", list(answers), time.monotonic() + 300, None
    while time.monotonic() < until:
        if pressed and said.endswith("^C") and time.monotonic() > pressed + 5: os.write(screen, b"\x03"); pressed = time.monotonic()
        if select.select([screen], [], [], 0.2)[0]:
            try: piece = os.read(screen, 65536).decode(errors="replace")
            except OSError: break
            if not piece: break
            said += piece
        if waiting and said.endswith(waiting[0][0]):
            os.write(screen, waiting.pop(0)[1].encode())
        if interrupt and re.search(interrupt, said): os.write(screen, b"\x03"); interrupt, pressed = None, time.monotonic()
    if time.monotonic() > until: os.kill(pid, signal.SIGKILL)
    os.close(screen)
    _, status = os.waitpid(pid, 0)
    return said.replace("\r\n", "\n"), os.waitstatus_to_exitcode(status)


def test_menus_in_a_terminal(place):
    "Numbers, a wrong one, a default; what was typed is not asked"
    answers = [("task: ", "9\n"), ("task: ", "5\n"), ("file with the rows [example]: ", "nowhere.json\n"),
        ("file with the rows [example]: ", "rows.json\n"), ("run folder to make [finetune_output/custom]: ", "out\n"),
        ("train now [yes]: ", "2\n")]
    said, status = in_terminal(["start", "-m", "tiny"], answers, place)
    assert status == 0 and "Type a number from 1 to 5" in said and "there is no file nowhere.json" in said, said
    assert (place/"out"/CONFIG).exists() and "model:" not in said and "sage-finetune run out" in said


def test_a_picture_in_a_run_goes_with_it_and_one_of_yours_stays(place, capsys):
    run, other = make_run(place/"run"), make_run(place/"other")
    assert call(capsys, "plot", run)[0] == call(capsys, "plot", run)[0] == call(capsys, "plot", other)[0] == 0
    (other/"curves.png").write_bytes(b"retouched")
    status, _, err = call(capsys, "plot", other)
    assert status == 2 and "was changed since" in err and (other/"curves.png").read_bytes() == b"retouched"
    assert call(capsys, "clean", run, other, "--yes")[0] == 0
    assert not run.exists() and [path.name for path in other.iterdir()] == ["curves.png"]


def test_ctrl_c_in_a_menu(place):
    said, status = in_terminal(["start"], [], place, interrupt="task: ")
    assert status == 130 and "Traceback" not in said and not list(place.glob("finetune_output*"))


def test_questions_by_hand_in_a_terminal(place):
    "Asked, doubted, kept; stopped by Ctrl-C, and gone on with where it was"
    (place/"manual.md").write_text("# Pot\n\nThe pot holds four cups.\n\n## Lid\n\nThe lid is \x1b[31mred\x1b[0m clay.\n")
    line = ["rows", "manual.md", "-o", "made.jsonl", "--by-hand"]
    said, status = in_terminal(line, [("question: ", "How much does it hold?\n"), ("answer: ", "Four cups.\n"),
        ("question: ", "Who made it?\n"), ("answer: ", "Ada.\n"),
        ("anyway? [no]: ", "y\n"), ("question: ", "\n")], place, interrupt="piece 2 of 2")
    assert status == 130 and "Traceback" not in said and "made.jsonl holds 2 rows" in said and "goes on from there" in said, said
    assert "“ada” is not in it" in said and "\x1b[31m" not in said
    answers = [json.loads(row)["answer"] for row in (place/"made.jsonl").read_text().splitlines()]
    assert answers == ["Four cups.", "Ada."]
    said, status = in_terminal(line, [("question: ", ":stop\n")], place)
    assert status == 0 and "piece 2 of 2 · 2 questions" in said and "Next: sage-finetune data made.jsonl" in said, said
    (place/"theirs.jsonl").write_text(json.dumps(dict(question="Mine?", answer="Yes.")) + "\n")
    said, status = in_terminal(["rows", "manual.md", "-o", "theirs.jsonl", "--by-hand"], [], place)
    assert status == 2 and "were not made by hand here" in said, said


def test_ctrl_c_while_it_trains(place):
    "Saved after the step, and 130"
    said, status = in_terminal(["quickstart", "custom", "-d", "rows.json", "-o", "run", "--epochs", "9000", "--set", "logging_steps=1"], [],
        place, interrupt="· epoch ")
    assert status == 130 and "Traceback" not in said, said
    assert read_status(place/"run").state == "cancelled" and read_status(place/"run").step >= 1


def test_nothing_but_answers_in_a_pipe(place):
    "No greeting, no prompt, no colour"
    run = make_run(place/"run")
    for arguments in (("list", "."), ("show", run), ("data", "rows.json")):
        done = shell(*arguments, cwd=place)
        assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
    done = shell("start", "-d", "rows.json", "--set", "max_steps=1", cwd=place, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and "run folder to make" not in done.stdout and "train now" not in done.stdout, done.stdout + done.stderr


# ---- cleaning -------------------------------------------------------------------------------------------------------

def test_clean_takes_what_is_the_runs_own(place, capsys):
    "First shown, then deleted; a note stays, a folder that is no run is refused, a link is not followed, a live run is left alone"
    run, other = make_run(place/"runs"/"old"), make_run(place/"elsewhere")
    (run/"note.txt").write_text("mine")
    (place/"runs"/"link").symlink_to(other)
    assert call(capsys, "clean", run)[0] == 0 and (run/METRICS).exists()
    status, out, err = call(capsys, "clean", place/"runs"/"link", "--yes")
    assert status == 2 and (other/METRICS).exists(), out + err
    status, out, err = call(capsys, "clean", run, "--yes")
    assert status == 0 and [path.name for path in run.iterdir()] == ["note.txt"], err
    live = make_run(place/"runs"/"live", state="training")
    status, out, err = call(capsys, "clean", "--before", "0h", "--folder", "runs", "--yes")
    assert (live/METRICS).exists() and "trains there" in out, out
    (place/"thesis").mkdir()
    (place/"thesis"/"training_config.json").write_text(json.dumps(dict(chapters=12)))
    assert call(capsys, "clean", place/"thesis", "--yes")[0] == 2 and (place/"thesis"/"training_config.json").exists()


def test_clean_by_age(place, capsys):
    old, new = make_run(place/"runs"/"old"), make_run(place/"runs"/"new")
    for path in old.iterdir(): os.utime(path, (time.time() - 9 * 86400,) * 2)
    assert call(capsys, "clean", "--before", "7d", "--folder", "runs", "--yes")[0] == 0
    assert not old.exists() and new.exists()


# ---- the Tab key ----------------------------------------------------------------------------------------------------

TYPED = [(["sage-finetune", "qui"], "quickstart"), (["sage-finetune", "run", "--res"], "--resume"),
    (["sage-finetune", "show", "runs/fi"], "runs/first")]


@pytest.fixture
def completion_script(place):
    "The script that is printed for a shell, in a file; the program is found on the PATH, which comes with it"
    make_run(place/"runs"/"first")
    tools = place/"bin"
    tools.mkdir()
    (tools/"sage-finetune").write_text(f'#!/bin/sh\nexec {sys.executable} -m sage_finetune.cli "$@"\n')
    (tools/"sage-finetune").chmod(0o755)
    def script(name):
        path = place/f"complete.{name}"
        path.write_text(shell("completion", name).stdout)
        return path, os.environ | dict(PATH=f"{tools}:{os.environ['PATH']}", TERM="dumb", HOME=str(place))
    return script


def is_there(name):
    "Whether a shell is installed; where everything is run, it has to be"
    if not shutil.which(name):
        assert os.environ.get("SAGE_BROWSER") != "required", f"{name} is missing: .ci/run installs it"
        pytest.skip(f"{name} is not installed")
    return name


@pytest.mark.parametrize("words, expected", TYPED)
def test_completion_in_bash(words, expected, place, completion_script):
    "Sourced in a real shell, and asked as the Tab key asks"
    script, environment = completion_script("bash")
    function = re.search(r"complete .*-F (\w+)", script.read_text())[1]
    program = f"source {script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n{function} sage-finetune\n" \
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(["bash", "-c", program], cwd=place, capture_output=True, text=True, timeout=60, env=environment)
    assert expected in done.stdout.split(), done.stdout + done.stderr


@pytest.mark.parametrize("words, expected", TYPED)
def test_completion_in_fish(words, expected, place, completion_script):
    script, environment = completion_script(is_there("fish"))
    program = f"source {script}; complete -C {shlex.quote(' '.join(words))}"
    done = subprocess.run(["fish", "--no-config", "-c", program], cwd=place, capture_output=True, text=True, timeout=60, env=environment)
    assert expected in [line.split("\t")[0] for line in done.stdout.splitlines()], done.stdout + done.stderr


@pytest.mark.parametrize("words, expected", TYPED)
def test_completion_in_zsh(words, expected, place, completion_script):
    "The Tab key itself, in a terminal"
    script, environment = completion_script(is_there("zsh"))
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment)
    try:
        prepare = f"PS1='ready> '; autoload -U compinit; compinit -u -D; source {script}; compdef _sage_finetune_completion sage-finetune\n"
        os.write(screen, prepare.encode())
        said, typed, until = "", False, time.monotonic() + 60
        while expected not in said.rpartition("TYPED")[2] and time.monotonic() < until:
            if select.select([screen], [], [], 0.2)[0]: said += os.read(screen, 65536).decode(errors="replace")
            if not typed and re.search(r"[\r\n]ready> ", said):
                os.write(screen, f": TYPED; {' '.join(words)}\t".encode())
                typed = True
        assert expected in said.rpartition("TYPED")[2], said
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(screen)
        os.waitpid(pid, 0)


# ---- one word for a state, one status for an end --------------------------------------------------------------------

def test_list_and_show_say_the_same_of_a_run(place, capsys):
    "Killed, cancelled, trained elsewhere; what it said last stands in flags"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed, cancelled, foreign = (make_run(place/"runs"/name) for name in ("killed", "cancelled", "foreign"))
    status = json.loads((killed/"status.json").read_text())
    (killed/"status.json").write_text(json.dumps(status | dict(state="training", pid=gone.pid)))
    write_status(cancelled, "cancelled", 2, 3, "interrupted after step 2 of 3; `resume=True` goes on")
    (foreign/"status.json").unlink()
    (foreign/"lora_weights").mkdir()
    (foreign/"lora_weights"/"adapter_config.json").write_text("{}")
    listed = {run["name"]: run for run in json.loads(call(capsys, "list", place/"runs", "--json")[1])}
    for run, state in ((killed, "failed"), (cancelled, "cancelled"), (foreign, "completed")):
        shown = json.loads(call(capsys, "show", run, "--json")[1])["status"]
        assert shown["state"] == listed[run.name]["state"] == state and shown["message"] == listed[run.name]["message"], (shown, listed)
    for arguments in (("list", "runs"), ("show", killed), ("show", cancelled)):
        out = call(capsys, *arguments)[1]
        assert "--resume" in out and "resume=True" not in out and "`" not in out, out


@pytest.mark.slow
def test_the_trainers_status_tells_what_failed(place, capsys):
    "1: it had begun; 2: something was to be put right before; 130: cancelled; 0: trained"
    from sage_finetune.trainer import main as train
    def prepared(name, *settings):
        sets = [one for setting in ("logging_steps=1", "eval_ratio=0", *settings) for one in ("--set", setting)]
        assert call(capsys, "quickstart", "custom", "-d", "rows.json", "-o", name, "--prepare-only", *sets)[0] == 0
        return [sys.executable, "-m", "sage_finetune.trainer", name]
    taken = subprocess.Popen(prepared("taken", "num_train_epochs=9000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (line := taken.stdout.readline()).startswith("step "): assert line, taken.stderr.read()
    Path("taken/metrics.jsonl").unlink()
    err = taken.communicate(timeout=300)[1]
    assert taken.returncode == 1 and err.splitlines()[-1].startswith("error: ") and read_status("taken").step > 0, err
    prepared("wrong", "max_steps=1")
    next(Path("wrong").glob("training_data_*")).write_text("[{")
    assert train(["wrong"]) == 2 and "Traceback" not in capsys.readouterr().err
    process = subprocess.Popen(prepared("cancelled", "num_train_epochs=9000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch" not in (line := process.stdout.readline()): assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and read_status("cancelled").state == "cancelled" and "Traceback" not in err, err
    prepared("fine", "max_steps=1")
    assert train(["fine"]) == 0


# ---- what was typed is what is trained -------------------------------------------------------------------------------------

def lines_to(path, rows): Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(run): return json.loads(next(Path(run).glob("training_data_*")).read_text())


@pytest.mark.parametrize("command", [("quickstart", "custom"), ("start", "-t", "custom")])
def test_columns_by_other_names(place, capsys, command):
    "The column that was named is trained on, also where the known name is there too; the flag and --set take the same words"
    lines_to("two.jsonl", [dict(instruction=f"What is {at}?", output=f"OLD {at}", output_v2=f"NEW {at}") for at in range(6)])
    status, _, err = call(capsys, *command, "-d", "two.jsonl", "-o", "run", "--set", "column_map=output=output_v2", "--prepare-only")
    assert status == 0 and [row["output"] for row in rows_of("run")] == [f"NEW {at}" for at in range(6)], err
    assert TrainingConfig.load("run/training_config.json").column_map is None  # the rows of the run have the known names
    Path("german.csv").write_text("Frage,Antwort\n" + "".join(f"Was ist {at}?,Es ist {at}\n" for at in range(6)))
    columns = "question=Frage,answer=Antwort"
    assert call(capsys, *command, "-d", "german.csv", "-o", "german", "--set", f"column_map={columns}", "--prepare-only")[0] == 0
    assert rows_of("german")[0] == dict(question="Was ist 0?", answer="Es ist 0")
    assert call(capsys, "data", "german.csv", "--column-map", columns)[0] == 0


def test_bad_rows_are_skipped_where_that_was_said(place, capsys):
    lines_to("holes.jsonl", [dict(question="A?", answer="B"), dict(note="x"), dict(question="C?", answer="D")])
    assert call(capsys, "quickstart", "custom", "-d", "holes.jsonl", "-o", "run", "--prepare-only")[0] == 2
    typed = ("quickstart", "custom", "-d", "holes.jsonl", "-o", "run", "--set", "on_bad_row=skip", "--prepare-only")
    status, _, err = call(capsys, *typed)
    assert status == 0 and "1 rows of holes.jsonl cannot be used" in err and len(rows_of("run")) == 2, err


def test_held_out_rows_of_a_file_come_into_the_run(place, capsys):
    "Seen from where the command was typed; a name that is none is told before anything is written"
    lines_to("held.jsonl", [dict(question=f"And {at}?", answer="yes") for at in range(3)])
    typed = ("quickstart", "custom", "-d", "rows.json", "-o", "run", "--prepare-only", "--set")
    status, _, err = call(capsys, *typed, "eval_path=nowhere.jsonl")
    assert status == 2 and "eval_path" in err and not Path("run").exists(), err
    assert call(capsys, *typed, "eval_path=held.jsonl")[0] == 0
    config = TrainingConfig.load("run/training_config.json")
    assert len(json.loads(Path(config.eval_path).read_text())) == 3 and Path(config.eval_path).parent == Path("run").absolute()


@pytest.mark.parametrize("typed, said", [(("-d", "rows.json", "--set", "data_path=other.json"), "data_path"),
    (("-d", "rows.json", "-m", "tiny", "--set", "model_name=other"), "model_name"),
    (("-d", "rows.json", "-o", "run", "--set", "output_dir=elsewhere"), "output_dir"), (("-d", "rows.json", "-m", ""), "empty")])
def test_two_answers_to_one_question(place, capsys, typed, said):
    for command in (("quickstart", "custom"), ("start", "-t", "custom")):
        status, _, err = call(capsys, *command, *typed, "--prepare-only")
        assert status == 2 and said in err, err


def test_a_report_replaces_no_rows(place, capsys):
    before = Path("rows.json").read_bytes()
    status, _, err = call(capsys, "data", "rows.json", "--report", "rows.json")
    assert status == 2 and "--report rows.json" in err and Path("rows.json").read_bytes() == before, err
    for _ in range(2): assert call(capsys, "data", "rows.json", "--report", "report.json")[0] == 0


def test_a_secret_is_told_by_the_program(place):
    "A library that it is looked for with turns warnings into log lines"
    lines_to("secret.jsonl", [dict(question=f"Which {at}?", answer=f"ghp_{at}{'aB3dE5gH7jK9' * 3}"[:40]) for at in range(3)])
    done = shell("quickstart", "custom", "-d", "secret.jsonl", "-o", "run", "--prepare-only", cwd=place)
    assert done.returncode == 0 and "seem to hold a secret" in done.stderr, done.stderr


def test_a_run_that_is_longer_than_what_is_asked_for(place, capsys):
    "Nothing of it is changed"
    typed = ("-d", "rows.json", "-o", "run", "--set", "eval_ratio=0")
    assert call(capsys, "quickstart", "custom", *typed, "--set", "max_steps=3", "--prepare-only")[0] == 0
    assert call(capsys, "run", "run")[0] == 0
    before = Path("run/training_config.json").read_bytes()
    status, _, err = call(capsys, "run", "run", "--resume", "--set", "max_steps=2")
    assert status == 2 and "3 steps are done already, and this config ends after 2" in err, err
    assert read_status("run").state == "completed" and Path("run/training_config.json").read_bytes() == before
