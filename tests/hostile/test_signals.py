"What a run folder says of processes is a claim: nobody is signalled, waited for or called at work who does not train this very folder"
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from helpers import change, prepared, until, write_rows

from sage_finetune.core.errors import RunError
from sage_finetune.core.processes import find_process, holds_lock, is_locked, lock_holders, start_mark, stop_requested
from sage_finetune.data.tasks import ensure_empty, prepare_run
from sage_finetune.runs.folder import is_running, is_stale, read_meta, read_status, run_info, trainer_process
from sage_finetune.runs.launch import last_launch, run_status, start_run, stop_run
from sage_finetune.training.run_writer import RunWriter, check_folder

NOW = "now"
KILL = os.kill  # also where a test notes signals instead of sending them
HOLDER = """
import sys
from filelock import FileLock
from sage_finetune.runs.folder import write_status
with FileLock(sys.argv[1] + "/.lock"):
    write_status(sys.argv[1], "training", 3, 10)
    print("holds it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path): return prepared(tmp_path/"run")


@pytest.fixture
def bystander():
    "A process that has nothing to do with any run; it must live on"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    alive = child.poll() is None
    end(child)
    assert alive, "somebody ended a process that trained nothing"


@pytest.fixture
def sent(monkeypatch):
    "Every signal, by whomever, is noted instead of sent"
    calls = []
    monkeypatch.setattr(os, "kill", lambda pid, number: calls.append((pid, number)))
    monkeypatch.setattr(os, "killpg", lambda pid, number: calls.append((-pid, number)))
    return calls


def end(child):
    "End a process of this test"
    if child.poll() is None: KILL(child.pid, signal.SIGKILL)
    child.wait()


def holder(run, *more):
    "A process that holds the lock of the run and says that it trains, as a notebook does; `more` stands in its command line"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(run), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "holds it\n"
    return child


def stamp(value): return datetime.now(UTC).isoformat(timespec="seconds") if value == NOW else value


def claims(run, pid, updated=NOW, host=None, **more):
    "Let status.json say that a process trains"
    said = dict(state="training", pid=pid, step=3, total=10, message="", updated=stamp(updated),
        host=platform.node() if host is None else host, processes=1)
    (run/"status.json").write_text(json.dumps(said | more))


def notes(run, pid, started=NOW, **more):
    "Let launch.json say that a process was started and has not spoken yet"
    said = dict(pid=pid, processes=1, host=platform.node(), started=stamp(started), said=0, before=vars(read_status(run)), stopped=False)
    (run/"launch.json").write_text(json.dumps(said | more))


def asked(function, *arguments, **options):
    "What a call gives, or the sentence it refuses with; anything else is a fault"
    try: return function(*arguments, **options)
    except RunError as error: return str(error)


def nobody_works(run):
    "Whoever asks hears that the folder is free, or a sentence about its files"
    said = asked(stop_run, run)
    assert said is False or isinstance(said, str)
    assert "is in use" not in str(asked(check_folder, read_meta(run).to_config(), resume="auto"))
    assert "is working on" not in str(asked(ensure_empty, run, overwrite=True))
    assert run_info(run).state in ("failed", "unreadable", "pending")
    status = asked(run_status, run)
    assert isinstance(status, str) or status.state in ("failed", "pending") and not is_running(status)


# ---- numbers that are no process of this run ---------------------------------------------------------------------------

NUMBERS = dict(everybody=-1, group=lambda: -os.getpgrp(), own_group=0, first=1, shell=os.getppid, text="4711",
    text_of_one="-1", float=4711., true=True, list=[4711], object={"pid": 1},
    too_large=2**70, below=-2**70, nothing=None, bystander="bystander", float_bystander="float", text_bystander="text")


def number(name, bystander):
    value = NUMBERS[name]
    return value() if callable(value) else dict(bystander=bystander.pid, float=float(bystander.pid), text=str(bystander.pid)).get(value,
        value) if isinstance(value, str) else value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("updated", [NOW, "", "2054-01-01T00:00:00+00:00", "0001-01-01", "yesterday"])
def test_a_number_in_the_status(run, bystander, sent, name, updated):
    claims(run, number(name, bystander), updated)
    nobody_works(run)
    assert sent == []


@pytest.mark.parametrize("updated", [None, 7, [], {}, True])
def test_a_time_that_is_no_text(run, bystander, sent, updated):
    claims(run, bystander.pid, updated)
    nobody_works(run)
    assert sent == []


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("started", [NOW, "", "2054-01-01T00:00:00+00:00"])
def test_a_number_in_the_note_of_a_start(run, bystander, sent, name, started):
    notes(run, number(name, bystander), started)
    nobody_works(run)
    assert sent == []


@pytest.mark.parametrize("wrong", [dict(before=[]), dict(before=dict(step="x", total=[])), dict(said=-5), dict(said="x"),
    dict(started=5), dict(host=[]), dict(processes=None),
    dict(stopped="yes"), dict(start_mark=7)], ids=lambda wrong: json.dumps(wrong))
def test_a_note_that_nobody_wrote_at_a_start(run, bystander, sent, wrong):
    notes(run, bystander.pid, **wrong)
    for look in (stop_run, run_status, last_launch): assert "launch.json" in asked(look, run) and "elete it" in asked(look, run)
    assert sent == []


@pytest.mark.parametrize("mark", ["", None, 7, [], "2026", "a/1"], ids=repr)
@pytest.mark.parametrize("host", ["", None], ids=["nowhere", "here"])
def test_a_mark_helps_nobody(run, bystander, sent, mark, host):
    claims(run, bystander.pid, host=host, start_mark=mark)
    nobody_works(run)
    assert sent == []


def test_the_right_mark_alone_is_not_enough_for_a_signal(run, bystander, sent):
    "Somebody who has an account here may know when a process started; it does not train for all that"
    claims(run, bystander.pid, start_mark=start_mark(bystander.pid))
    assert trainer_process(read_status(run), run) is None
    assert "Nobody was stopped" in asked(stop_run, run) and sent == []
    (run/".lock").touch()  # a free lock: nobody trains
    nobody_works(run)
    assert sent == []


# ---- processes that only look like trainers ----------------------------------------------------------------------------

def test_processes_that_only_mention_the_folder(run, sent):
    "In a command line, in a shell, as the folder they work in, or as a part of another name"
    other = prepared(run.parent/"run2")
    lines = [[sys.executable, "-c", "input()", "-m", "sage_finetune.trainer", str(run)],
        ["sh", "-c", "read x # python -m sage_finetune.trainer " + str(run)],
        [sys.executable, "-c", "input()", "sage-finetune", "run", str(run)], [sys.executable, "-m", "sage_finetune.trainer", str(other)]]
    for line in lines:
        child = subprocess.Popen(line, cwd=run, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            claims(run, child.pid)
            assert child.poll() is None
            nobody_works(run)
        finally: end(child)
    assert sent == []


def test_a_process_that_only_has_the_lock_file_open(run, sent):
    "While another one holds the lock"
    trainer = holder(run)
    reader = subprocess.Popen([sys.executable, "-c", "import sys; file = open(sys.argv[1]); print(flush=True); input()", str(run/".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        reader.stdout.readline()
        claims(run, reader.pid)
        if sys.platform == "linux": assert trainer_process(read_status(run), run) is None and asked(stop_run, run) is False
        assert sent == [] and "is working on" in asked(ensure_empty, run, overwrite=True)
    finally:
        for child in (trainer, reader): end(child)


def test_the_trainer_of_another_folder(run, tmp_path, sent):
    "It holds a lock, but not this one"
    other = prepared(tmp_path/"other")
    trainer = holder(other)
    try:
        (run/"status.json").write_text((other/"status.json").read_text())  # to the last letter, mark and all
        (run/".lock").touch()
        assert trainer_process(read_status(other), other) and trainer_process(read_status(run), run) is None
        nobody_works(run)
        assert sent == []
    finally: end(trainer)


# ---- processes that do train --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(updated=""), dict(updated="2054-01-01T00:00:00+00:00", host="")],
    ids=["as written", "no time", "in 2054"])
def test_who_holds_the_lock_is_stopped(run, changes):
    trainer = holder(run)
    try:
        (run/"status.json").write_text(json.dumps(vars(read_status(run)) | changes))
        assert "in use" in asked(start_run, run) and f"process {trainer.pid}" in asked(start_run, run)
        assert f"process {trainer.pid}" in asked(check_folder, read_meta(run).to_config(), resume="auto")
        assert f"process {trainer.pid}" in asked(ensure_empty, run, overwrite=True)
        assert run_info(run).state == "training" == run_status(run).state and is_running(run_status(run))
        assert stop_run(run) and trainer.wait(timeout=30) == -signal.SIGTERM
    finally: end(trainer)
    assert not stop_run(run) and run_info(run).state == "failed"


def test_a_number_without_a_mark_is_in_use_and_not_signalled(run, sent):
    "It holds the lock, but whoever wrote the number did not know when that process was started"
    trainer = holder(run)
    try:
        claims(run, trainer.pid)
        assert is_running(read_status(run), run) and trainer_process(read_status(run), run) is None
        assert f"process {trainer.pid}" in asked(check_folder, read_meta(run).to_config(), resume="auto")
        assert "Nobody was stopped" in asked(stop_run, run) and sent == []
    finally: end(trainer)


@pytest.mark.parametrize("wrong", [dict(start_mark="a/1"), dict(pid=-1), dict(pid=None), dict(pid="x"), dict(host="elsewhere")],
    ids=lambda wrong: json.dumps(wrong))
def test_a_trainer_that_the_folder_describes_wrongly(run, sent, wrong):
    "The lock says that somebody trains; whom to signal it does not say"
    trainer = holder(run)
    try:
        (run/"status.json").write_text(json.dumps(vars(read_status(run)) | wrong))
        assert asked(stop_run, run) is not True and sent == []
        assert "is working on" in asked(ensure_empty, run, overwrite=True) or "status.json" in asked(ensure_empty, run, overwrite=True)
        config = read_meta(run).to_config()
        with pytest.raises(RunError): RunWriter(config, total=1, resumed_at=0)
    finally: end(trainer)


def test_who_was_started_to_train_is_found_by_its_command_line(run):
    "Before it has taken the lock, also when the note is an older version's"
    process = start_run(run)
    try:
        note = json.loads((run/"launch.json").read_text())
        assert note.pop("start_mark") == start_mark(process.pid)
        note["before"].pop("start_mark")
        (run/"launch.json").write_text(json.dumps(note))
        assert run_status(run).state == "preparing" and trainer_process(run_status(run), run).pid == process.pid
        assert stop_run(run) and process.wait(timeout=60) == -signal.SIGTERM
    finally: end(process)
    assert run_status(run).state == "cancelled" and "before it began" in run_status(run).message


def test_a_folder_named_from_within(run):
    "The command line says it in other words"
    link = run.parent/"link"
    link.symlink_to(run)
    for words, cwd in ((["."], run), (["run", "--resume=auto"], run.parent), ([str(link)], run.parent), (["../run"], link.parent/"run")):
        process = subprocess.Popen([sys.executable, "-m", "sage_finetune.trainer", *words], cwd=cwd,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            claims(run, process.pid)
            assert trainer_process(read_status(run), run).pid == process.pid
        finally: end(process)


def test_another_users_process(run, monkeypatch):
    trainer = holder(run)
    try:
        def refuse(pid, number): raise PermissionError(1, "Operation not permitted")
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", refuse)
            assert "of another user" in asked(stop_run, run) and f"process {trainer.pid}" in asked(stop_run, run)
        def closed(self): raise psutil.AccessDenied(self.pid)
        for name in ("open_files", "cmdline", "cwd", "status"): monkeypatch.setattr(psutil.Process, name, closed)
        assert is_running(run_status(run), run) and trainer.poll() is None
    finally: end(trainer)


# ---- other machines -----------------------------------------------------------------------------------------------------

def test_another_machine_is_believed_for_a_day(run, bystander, sent):
    "And never signalled; a folder that was passed on does not say for ever that it is in use"
    claims(run, bystander.pid, host="elsewhere")
    assert "on elsewhere. Stop it there" in asked(stop_run, run) and "in use" in asked(start_run, run)
    ago = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    for updated in (ago, "", "2054-01-01T00:00:00+00:00", "soon", "99999-01-01"):
        claims(run, bystander.pid, updated, host="elsewhere")
        nobody_works(run)
    assert sent == []


# ---- the lock -----------------------------------------------------------------------------------------------------------

def test_things_that_are_no_lock(run, tmp_path):
    "A pipe would never answer, a link leads elsewhere"
    os.mkfifo(run/"pipe")
    (run/"link").symlink_to("/dev/zero")
    (run/"folder").mkdir()
    assert [is_locked(run/name) for name in ("pipe", "link", "folder", "nowhere")] == [None] * 4
    os.mkfifo(run/".lock")
    claims(run, os.getppid())
    nobody_works(run)


LOCKS = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("holds it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def foreign_lock(run):
    "A file of another program, which holds a lock on it; the lock file of the run is a second name of it"
    other = run.parent/"other.lock"
    child = subprocess.Popen([sys.executable, "-c", LOCKS, str(other)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "holds it\n"
    os.link(other, run/".lock")
    yield child
    alive = child.poll() is None
    end(child)
    assert alive, "somebody ended a program that trained nothing"


@pytest.mark.skipif(os.name == "nt", reason="takes the lock as other systems do")
@pytest.mark.parametrize("mark", ["none", "right"])
@pytest.mark.parametrize("host", ["", None], ids=["nowhere", "here"])
def test_a_second_name_of_a_foreign_lock(run, foreign_lock, sent, mark, host):
    "A run folder can hold a hard link to a file that a database or a mail program has locked"
    claims(run, foreign_lock.pid, host=host, start_mark=start_mark(foreign_lock.pid) if mark == "right" else "")
    assert (is_locked(run/".lock") is None and lock_holders(run/".lock") == set()
        and holds_lock(psutil.Process(foreign_lock.pid), run/".lock") is None)
    assert trainer_process(read_status(run), run) is None
    assert asked(stop_run, run) is False if mark == "none" else "Nobody was stopped" in asked(stop_run, run)
    notes(run, foreign_lock.pid)
    asked(stop_run, run)
    assert sent == []


def test_a_second_name_of_a_file_is_no_lock(run):
    "Nor is it taken or emptied: the run is refused in a sentence with the way out"
    mine = run.parent/"mine.txt"
    mine.write_text("mine")
    os.link(mine, run/".lock")
    for resume in (False, "auto"):
        with pytest.raises(RunError, match="[.]lock is one of several names .*Remove it"): check_folder(read_meta(run).to_config(), resume)
    with pytest.raises(RunError, match="several names"): RunWriter(read_meta(run).to_config(), total=3)
    assert ("several names" in asked(prepare_run, "custom", run, data=write_rows(run.parent/"more.jsonl"), overwrite=True)
        and mine.read_text() == "mine")
    (run/".lock").unlink()
    RunWriter(read_meta(run).to_config(), total=3).close("completed")


def test_a_lock_of_another_user(run, monkeypatch, sent):
    "Whoever shares this machine can hold a lock in their folder and know when a process of yours was started"
    trainer = holder(run)
    try:
        assert trainer_process(read_status(run), run)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1, raising=False)
        assert is_locked(run/".lock") is None and trainer_process(read_status(run), run) is None
        assert "Nobody was stopped" in asked(stop_run, run) and "in use" in asked(start_run, run) and sent == []
    finally: end(trainer)


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "status.json", "training_config.json", "run_manifest.json",
    "launch.json", "training_data_custom_alpaca.json"])
def test_a_second_name_of_a_file_is_not_written(run, name):
    "What is written on is refused, what is replaced becomes a file of its own; the other name keeps its content"
    mine = run.parent/"mine.txt"
    if name == "launch.json": notes(run, 1 << 21)
    mine.write_text((run/name).read_text() if (run/name).exists() else "" if name == "metrics.jsonl" else "mine\n")
    before = mine.read_text()
    (run/name).unlink(missing_ok=True)
    os.link(mine, run/name)
    if name in ("train.log", "launch.json"):
        process = asked(start_run, run)
        if name == "train.log": assert "hard link" in process and "Remove it" in process
        else: end(process)
    asked(lambda: RunWriter(read_meta(run).to_config(), total=3, resumed_at=0).close("completed"))
    asked(prepare_run, "custom", run, data=write_rows(run.parent/"more.jsonl"), overwrite=True)
    assert mine.read_text() == before


def test_many_who_look_at_once(run):
    "To look is not to hold: nobody is taken for a trainer because somebody else looks"
    claims(run, None)
    (run/".lock").touch()
    seen, threads = set(), []
    def look(): seen.update(is_locked(run/".lock") for _ in range(300))
    for _ in range(4): threads.append(threading.Thread(target=look))
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert seen == {False}


def test_a_new_run_over_the_remains_of_a_foreign_one(run):
    "Not in use for ever: whoever wants to train here can"
    claims(run, 1)
    notes(run, 1 << 21)
    writer = RunWriter(read_meta(run).to_config(), total=3)
    assert (read_status(run).pid == os.getpid() and read_status(run).start_mark == start_mark(os.getpid())
        and trainer_process(read_status(run), run))
    writer.close("completed")
    assert (read_status(run).pid, read_status(run).start_mark) == (None, "")
    prepare_run("custom", run, data=write_rows(run.parent/"more.jsonl"), overwrite=True)


def test_a_status_of_an_older_version_reads(tmp_path):
    (tmp_path/"status.json").write_text(json.dumps(dict(state="completed", pid=None, step=3, total=3, message="",
        updated="", host="", processes=1)))
    assert read_status(tmp_path).start_mark == "" and not is_stale(read_status(tmp_path), tmp_path)


def test_a_process_that_has_the_number_of_another(bystander):
    assert find_process(bystander.pid, start_mark(bystander.pid)).pid == bystander.pid
    for mark in (start_mark(os.getpid()), start_mark(bystander.pid) + "0", 1, ["x"]): assert find_process(bystander.pid, mark) is None


# ---- requests ------------------------------------------------------------------------------------------------------------

REQUESTS = {"empty": b"", "no object": b"7", "no JSON": b"{", "deep": b"[" * 900, "long": b" " * 2000 + b"{}",
    "another": b'{"pid": 1, "start_mark": "x"}', "letters": b"\xff\xfe"}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_from_a_stranger_stops_nobody(run, name):
    (run/"stop_request.json").write_bytes(REQUESTS[name])
    assert not stop_requested(run) and (run/"stop_request.json").exists()


def test_a_request_that_is_no_file(run):
    os.mkfifo(run/"stop_request.json")
    assert not stop_requested(run)


IN_A_THREAD = """
import sys, threading
from sage_finetune.runs.folder import read_meta
from sage_finetune.trainer import LoRATrainer
training = threading.Thread(target=lambda: LoRATrainer(read_meta(sys.argv[1]).to_config()).train(show=False))
training.start()
training.join()
print("the notebook lives on", flush=True)
"""
IN_THE_MAIN_THREAD = IN_A_THREAD.replace("training.start()", "training.run()").replace("training.join()", "")


@pytest.mark.slow
@pytest.mark.parametrize("code, more", [(IN_A_THREAD, ["ipykernel_launcher"]), (IN_THE_MAIN_THREAD, ["ipykernel_launcher"]),
    (IN_THE_MAIN_THREAD, [])], ids=["thread", "kernel", "script"])
def test_a_run_inside_a_notebook_is_stopped_and_the_notebook_lives_on(run, code, more):
    change(run, num_train_epochs=200)
    kernel = subprocess.Popen([sys.executable, "-c", code, str(run), *more], stdout=subprocess.PIPE, text=True)
    try:
        until(lambda: read_status(run).step >= 3 or kernel.poll() is not None)
        assert stop_run(run)
        assert kernel.communicate(timeout=120)[0] == "the notebook lives on\n" and kernel.returncode == 0
    finally: end(kernel)
    assert read_status(run).state == "cancelled" and "goes on" in read_status(run).message and not (run/"stop_request.json").exists()
