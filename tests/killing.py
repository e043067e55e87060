"""Train in processes of one's own and kill them;
run by tests/test_safety.py, because a process that forks must not have computed anything before"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sage_finetune.runs.folder import read_meta
from sage_finetune.trainer import LoRATrainer


def child(run):
    "Go on with the run, in a process of its own"
    pid = os.fork()
    if pid: return pid
    try:
        LoRATrainer(read_meta(run).to_config()).train(show=False, resume="auto")
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def half_way(run): return next((path for path in [*run.glob(".lora_weights.*"), *run.glob("checkpoints/.*")]), None)


def kill_in_a_save(pid, run, seen):
    "Wait until something is half written that was not there before, then kill; False when the process ended first"
    while not os.waitpid(pid, os.WNOHANG)[0]:
        found = half_way(run)
        if found and found.name not in seen:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return found.name
    return None


def main(run, times, seed):
    "Kill the run again and again, by turns at a random moment and in the middle of a save, then let it end; tells what happened"
    torch.set_num_threads(1)
    run, rng, killed = Path(run), random.Random(int(seed)), []
    for turn in range(int(times)):
        pid = child(run)
        if turn % 2: where = kill_in_a_save(pid, run, {half_way(run).name} if half_way(run) else set())
        else:
            time.sleep(rng.uniform(0.05, 2.5))
            where = "" if os.waitpid(pid, os.WNOHANG)[0] else "anywhere"
            if where:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        lines = (run/"metrics.jsonl").read_bytes().count(b"\n") if (run/"metrics.jsonl").exists() else 0
        killed.append((where, lines, (half_way(run) or Path()).name))
    code = os.waitstatus_to_exitcode(os.waitpid(child(run), 0)[1])
    print(json.dumps(dict(killed=killed, code=code)))


if __name__ == "__main__": main(*sys.argv[1:])
