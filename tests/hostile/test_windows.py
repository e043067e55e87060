"What Windows does differently, with the system's name faked: a stop that saves, renames under a reader, processes of their own"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import metrics, prepared, status

from sage_finetune.core.errors import RunError
from sage_finetune.core.processes import (
    STOP_REQUEST,
    ask_to_stop,
    detached,
    holds_lock,
    request_stop,
    stop_requested,
    stop_signals,
    wait_for,
    was_killed,
)
from sage_finetune.core.storage import atomic_directory, replace_path, write_atomic
from sage_finetune.runs.folder import read_meta, read_status, trainer_process
from sage_finetune.runs.launch import start_run, stop_run
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.run_writer import RunWriter
from sage_finetune.training.stop_request import StopRequest

HOLDS = """
import sys
from filelock import FileLock
from sage_finetune.runs.folder import write_status
with FileLock(sys.argv[1] + "/.lock"):
    write_status(sys.argv[1], "training", 3, 10)
    print(flush=True)
    input()
"""


@pytest.fixture
def windows(monkeypatch): monkeypatch.setattr(sys, "platform", "win32")


@pytest.fixture
def run(tmp_path): return prepared(tmp_path/"run", num_train_epochs=20)


def busy(monkeypatch, name, times, seen):
    "Renames are refused so often, as Windows does while somebody reads"
    rename = getattr(os, name)
    def refuse(source, target, *more, **options):
        seen.append(source)
        if len(seen) <= times: raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return rename(source, target, *more, **options)
    monkeypatch.setattr(os, name, refuse)


# ---- renames --------------------------------------------------------------------------------------------------------

def test_a_file_that_somebody_reads_is_replaced_a_moment_later(tmp_path, windows, monkeypatch):
    seen = []
    busy(monkeypatch, "replace", 3, seen)
    (tmp_path/"status.json").write_text("old")
    assert write_atomic(tmp_path/"status.json", "new").read_text() == "new" and len(seen) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_folder_in_which_somebody_reads_is_replaced_a_moment_later(tmp_path, windows, monkeypatch):
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"old").touch()
    seen = []
    busy(monkeypatch, "rename", 3, seen)
    with atomic_directory(tmp_path/"model", ours=["old"]) as temp: (temp/"weights").write_text("all")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"] and len(seen) == 5


def test_a_reader_who_never_ends(tmp_path, windows, monkeypatch):
    "The old file stays, in a sentence, and nothing is left beside it"
    busy(monkeypatch, "replace", 10**6, [])
    (tmp_path/"status.json").write_text("old")
    began = time.monotonic()
    with pytest.raises(RunError, match="no permission"): write_atomic(tmp_path/"status.json", "new")
    assert 1 < time.monotonic() - began < 20 and {path.name: path.read_text() for path in tmp_path.iterdir()} == {"status.json": "old"}


def test_elsewhere_no_permission_is_said_at_once(tmp_path, monkeypatch):
    seen = []
    busy(monkeypatch, "replace", 10**6, seen)
    with pytest.raises(PermissionError): replace_path(tmp_path/"a", tmp_path/"b")
    assert len(seen) == 1


def test_files_are_synced_by_a_handle_that_may_write(tmp_path, windows, monkeypatch):
    "Windows syncs no other"
    sync = os.fsync
    def strict(handle):
        import fcntl
        if not os.path.isdir(f"/proc/self/fd/{handle}") and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        sync(handle)
    monkeypatch.setattr(os, "fsync", strict)
    with atomic_directory(tmp_path/"model", ours=["old"]) as temp: (temp/"weights").write_text("all")
    assert (tmp_path/"model"/"weights").read_text() == "all"


# ---- a stop that saves ----------------------------------------------------------------------------------------------

def test_a_trainer_is_asked_by_a_request_and_not_ended(run, windows):
    "To terminate a process there means that nothing is saved"
    trainer = subprocess.Popen([sys.executable, "-c", HOLDS, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        trainer.stdout.readline()
        assert holds_lock(psutil.Process(trainer.pid), run/".lock") in (True, None)
        assert stop_run(run) and (run/STOP_REQUEST).exists()
        with pytest.raises(subprocess.TimeoutExpired): trainer.wait(timeout=0.5)
        assert not stop_requested(run)  # it is for that process, not for this one
    finally:
        trainer.kill()
        trainer.wait()


@pytest.mark.parametrize("on", ["win32", "linux"])
def test_a_run_that_hears_a_request_saves(run, monkeypatch, on):
    "From its own process, as a callback does; the request is gone afterwards"
    def ask(step):
        if step.step != 3: return
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", on)
            assert trainer_process(read_status(run), run).pid == os.getpid() and stop_run(run)
    result = LoRATrainer(read_meta(run).to_config()).train(show=False, on_step=ask)
    assert result.stopped and result.steps == 3 == len(metrics(run)) and (run/"checkpoints"/"checkpoint-3").is_dir()
    assert status(run)["state"] == "cancelled" and "goes on" in status(run)["message"] and not (run/STOP_REQUEST).exists()


def test_a_request_that_came_too_late_is_not_for_the_next_run(run, windows):
    writer = RunWriter(read_meta(run).to_config(), total=3)
    request_stop(run, os.getpid())
    writer.close("completed")
    assert not (run/STOP_REQUEST).exists()


def test_a_start_that_has_nothing_to_save_yet_is_ended(run):
    "With everything it started: there, children outlive their parent"
    code = ("import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        "print(child.pid, flush=True); child.wait()")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        ask_to_stop(psutil.Process(parent.pid), run, begun=False)
    assert parent.wait(timeout=30) is not None and not (run/STOP_REQUEST).exists()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


# ---- processes ------------------------------------------------------------------------------------------------------

def test_processes_of_their_own(windows):
    "A session is ignored there; without a window, closing one does not end it"
    assert detached() == dict(creationflags=0x0800_0200) and detached(console=True) == dict(creationflags=0x200)


def test_a_start_asks_for_what_the_system_knows(run, monkeypatch):
    "`start_new_session` never reaches Windows"
    asked = {}
    class Started:
        pid = os.getpid()
        def __init__(self, command, **options): asked.update(options)
    monkeypatch.setattr(subprocess, "Popen", Started)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        start_run(run)
    assert asked["creationflags"] & 0x200 and "start_new_session" not in asked


def test_a_wait_that_hears_ctrl_c(windows):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"])
    limits = []
    wait = child.wait
    child.wait = lambda timeout=None: limits.append(timeout) or wait(timeout)
    assert wait_for(child) == 3 and limits[0] is not None


def test_no_sigkill(monkeypatch):
    monkeypatch.delattr(signal, "SIGKILL")
    assert was_killed(-9) and not was_killed(1) and not was_killed(None)


def test_the_signal_that_only_windows_has(monkeypatch):
    "SIGBREAK asks for an end like SIGTERM, also of a run"
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    stop = StopRequest()
    with stop.signal_handlers():
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(1000):
            if stop: break
            time.sleep(0.005)
    assert stop.why.startswith("told to end")


def test_no_module_asks_for_what_windows_lacks():
    "Such names stand in the one module for them, or behind the question whether the system forks"
    lacking = ("os.killpg", "os.getuid", "os.geteuid", "SIGHUP", "os.statvfs", "os.setsid", "os.getpgid", "import fcntl",
        "import pwd", "start_new_session", "sched_getaffinity", "os.kill(", "signal.SIGKILL")
    package = Path(sys.modules["sage_finetune"].__file__).parent
    found = {(path.name, name) for path in package.rglob("*.py") for name in lacking if name in path.read_text(encoding="utf-8")
        and path.name not in ("processes.py", "_modidx.py")}
    assert found <= {("memory_worker.py", "os.kill("), ("memory_worker.py", "signal.SIGKILL")}  # of copies, which only Linux has
