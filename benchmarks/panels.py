"""What the panels of a notebook cost: a redraw, the speed of the training they watch, memory over eight hours, and how soon Stop is heard.

    python benchmarks/panels.py                       everything, about twenty minutes on two cores
    python benchmarks/panels.py --only redraw stop    some of it: redraw, watch, memory, stop
    python benchmarks/panels.py --show --write-readme measure nothing; the tables of what is kept, in the README too

Every measurement is a process of its own. `watch` trains beside a real notebook kernel that shows the panel,
and beside one that shows nothing, in
turn. Prints Markdown and writes benchmarks/results/panels.json with every single figure.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import train
from reference import make_model, make_rows

HERE = Path(__file__).resolve().parent
POINTS, HOURS, STEPS_A_SECOND = (100, 1000, 10_000, 576_000), 8, 20
PROMPTS = dict(answer=10, short=700, long=2800)  # tokens, about
BATCHES = (12, 1)  # rows behind a step: about 2 steps a second, and about 10
LINE = dict(step=1, total=1, loss=2.3, learning_rate=2e-4, tokens=500, target_tokens=200, tokens_per_second=1000., seconds=1., epoch=0.1)


# ---- one measurement, in a process of its own -------------------------------------------------------------------------

def line(step, total):
    "A row of metrics.jsonl; every hundredth step has an evaluation"
    return dict(LINE, step=step, total=total, seconds=step / STEPS_A_SECOND, loss=1 + 3 / step ** 0.2 + step % 7 / 20,
        **dict(eval_loss=1.1 + 3 / step ** 0.2) if step % 100 == 0 else {})


def redraw(count, times=15):
    "Milliseconds of a drawing: with the frame of the one before, and when the title is another"
    from sage_finetune.runs.plot import Curve, draw_run
    curve = Curve()
    for step in range(1, count + 1): curve.add(line(step, count))
    def cost(title):
        began = time.perf_counter()
        assert len(draw_run(curve, title).png) > 1000
        return 1000 * (time.perf_counter() - began)
    cost("warm")
    return dict(same=[cost("warm") for _ in range(times)], other=[cost(f"title {number}") for number in range(times)])


def memory(hours=HOURS, at_once=100):
    "MiB of this process above what it had after ten thousand steps, at every half hour of a run of twenty steps a second"
    import psutil

    from sage_finetune.runs.folder import write_status
    from sage_finetune.ui.train_panel import TrainPanel
    total, found = round(hours * 3600 * STEPS_A_SECOND), {}
    with tempfile.TemporaryDirectory() as folder:
        write_status(folder, "training", 0, total)
        panel = TrainPanel(folder)
        panel.poller.stop()  # this process looks itself, as often as it likes
        with open(Path(folder)/"metrics.jsonl", "a", encoding="utf-8") as file:
            for step in range(1, total + 1):
                file.write(json.dumps(line(step, total)) + "\n")
                if step % at_once: continue
                file.flush()
                panel.poller.poll()
                if step <= 10_000: before = psutil.Process().memory_info().rss
                if step % (1800 * STEPS_A_SECOND) == 0: found[step] = (psutil.Process().memory_info().rss - before) / 2**20
        assert panel.control.watch.curve.count == total
        return dict(grown=found)


def stop(work, times=12):
    """Milliseconds from Stop to the end of the answer:
    in its middle, and while a prompt is read, for a model of 0.5 billion parameters with an adapter"""
    import torch

    from sage_finetune.chat_format.rendering import render_prompt
    from sage_finetune.config import LoRAConfig, TrainingConfig
    from sage_finetune.inference.generation import generate
    from sage_finetune.modeling.adapter import attach_lora
    from sage_finetune.modeling.base import load_base
    base, tokenizer = load_base(TrainingConfig(model_name=str(make_model(work))))
    model = attach_lora(base, LoRAConfig()).eval()
    def timed(talk, wait):
        stop_request, ended = threading.Event(), []
        def answer():
            list(generate(model, tokenizer, talk, stop=stop_request, max_new_tokens=2000, temperature=2., seed=1))
            ended.append(time.perf_counter())
        thread = threading.Thread(target=answer)
        thread.start()
        time.sleep(wait)
        if not thread.is_alive(): return None
        began = time.perf_counter()
        stop_request.set()
        thread.join()
        return 1000 * (ended[0] - began)
    def read(talk):
        began = time.perf_counter()
        next(iter(generate(model, tokenizer, talk, max_new_tokens=1, temperature=2., seed=1)), None)
        return time.perf_counter() - began
    found = dict(dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads())
    for name, length in PROMPTS.items():
        talk = [dict(role="user", content="Tell me about the lamp. " * (length // 6))]
        read(talk)
        whole = read(talk)
        waits = ([whole + 0.5 + 0.13 * number for number in range(times)] if name == "answer"
            else [whole * (0.1 + 0.8 * number / times) for number in range(times)])
        found[name] = dict(tokens=len(render_prompt(talk, tokenizer)), reads=whole,
            milliseconds=[took for wait in waits if (took := timed(talk, wait)) is not None])
    return found


def watch(work, batch, shown, seconds=20):
    "Steps a second of a run, and the share of a core its notebook's kernel takes meanwhile"
    import psutil
    from jupyter_client.manager import start_new_kernel

    from sage_finetune.config import PresetConfigs
    from sage_finetune.runs.launch import stop_run
    from sage_finetune.ui.run_control import RunControl
    with tempfile.TemporaryDirectory() as folder:
        config = PresetConfigs.tiny(data_path=str(make_rows(work, 256, 128)), output_dir=f"{folder}/run",
            per_device_train_batch_size=batch, num_train_epochs=10_000, max_steps=100_000, logging_steps=10)
        manager, client = start_new_kernel()
        try:
            code = (f"from sage_finetune.config import TrainingConfig\nfrom sage_finetune.ui.train_panel import "
                f"TrainPanel\nconfig = TrainingConfig(**{config.to_dict()!r})\n")
            client.execute_interactive(code + ("panel = TrainPanel(config)\npanel.start()\npanel" if shown else "None"),
                timeout=120, output_hook=lambda message: None)
            run = RunControl(config)
            if not shown: run.start()
            kernel = psutil.Process(manager.provisioner.pid)
            def at(): run.poll(); return run.watch.row.get("step", 0)
            while at() < 10: time.sleep(0.1)
            time.sleep(3)
            began, first, worked = time.perf_counter(), at(), sum(kernel.cpu_times()[:2])
            time.sleep(seconds)
            took, made, spent = time.perf_counter() - began, at() - first, sum(kernel.cpu_times()[:2]) - worked
            stop_run(run.folder)
            while run.poll(): time.sleep(0.1)
            assert run.state == "stopped", run.state
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    return dict(steps_per_second=made / took, kernel=spent / took)


# ---- all together -----------------------------------------------------------------------------------------------------

def child(call, work):
    "What `call` gives in a fresh process"
    command = [sys.executable, __file__, "--child", call, "--work", str(work)]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=dict(os.environ, HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore"))
    lines = [text for text in said.stdout.splitlines() if text.startswith("RESULT ")]
    if said.returncode or not lines: sys.exit(f"{call} ended with {said.returncode}\n{said.stdout}\n{said.stderr}")
    return json.loads(lines[-1][7:])


def measured(only, work, rounds):
    "Everything that is asked for"
    found = {}
    if "redraw" in only: found["redraw"] = {count: child(f"redraw {count}", work) for count in POINTS}
    if "watch" in only:
        found["watch"] = {batch: dict(shown=[], alone=[]) for batch in BATCHES}
        for number in range(rounds):
            for batch in BATCHES:
                for name in ("alone", "shown"):
                    found["watch"][batch][name].append(child(f"watch {batch} {name}", work))
                    train.say(f"round {number + 1}, {batch} rows a step, {name}: {found['watch'][batch][name][-1]}")
    if "stop" in only: found["stop"] = child("stop", work)
    if "memory" in only: found["memory"] = child("memory", work)
    return found


def called(words, work):
    "The measurement that a child is asked for"
    name, *rest = words.split()
    return dict(redraw=lambda: redraw(int(rest[0])), memory=memory, stop=lambda: stop(work),
        watch=lambda: watch(work, int(rest[0]), rest[1] == "shown"))[name]()


def report(result):
    "The tables as Markdown"
    said = [(f"{result['date'][:10]}, {result['machine']['processor']}, {result['threads']} threads, "
        f"torch {result['torch']}, ipywidgets {result['ipywidgets']}")]
    if "redraw" in result:
        said.append("**A redraw**: median (highest) milliseconds of 15\n\n| steps | the same frame | title or limits "
            "change |\n|--:|--:|--:|\n" + "\n".join(
                f"| {int(count):,} | {spread(one['same'])} | {spread(one['other'])} |" for count, one in result["redraw"].items()))
    if "watch" in result:
        said.append("**Training beside the panel**: medians of rounds that take turns\n\n| rows a step | steps a second, nothing "
                    "shown | with the panel | | the kernel's share of a core, nothing shown | with the panel |\n|--:|--:|--:|--:|--:|--:|\n"
                    + "\n".join(watched(batch, one) for batch, one in result["watch"].items()))
    if "stop" in result:
        one = result["stop"]
        said.append(f"**Stop in the chat**: median (highest) milliseconds from Stop to the end of the answer; "
                    f"0.5 billion parameters in {one['dtype']} with an adapter, {one['threads']} threads\n\n"
                    "| | tokens of the prompt | first word after | Stop is heard after |\n|---|--:|--:|--:|\n" + "\n".join(
                        f"| {'in the middle of an answer' if name == 'answer' else 'while the prompt is read'} | {one[name]['tokens']:,} "
                        f"| {one[name]['reads']:.1f} s | {spread(one[name]['milliseconds'])} |" for name in PROMPTS))
    if "memory" in result:
        grown = result["memory"]["grown"]
        said.append(f"**Memory of the kernel**: a run of {STEPS_A_SECOND} steps a second for {HOURS} hours, "
            f"{max(map(int, grown)):,} steps: at most {max(grown.values()):.1f} MiB more than after the first 10,000.")
    return "\n\n".join(said)


def spread(figures): return f"{statistics.median(figures):.0f} ({max(figures):.0f})"


def watched(batch, runs):
    "A line of the table"
    def middle(name, figure): return statistics.median(one[figure] for one in runs[name])
    alone, shown = (middle(name, "steps_per_second") for name in ("alone", "shown"))
    return (f"| {batch} | {alone:.1f} | {shown:.1f} | {shown / alone - 1:+.1%} | {middle('alone', 'kernel'):.1%} | "
        f"{middle('shown', 'kernel'):.1%} |")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("redraw", "watch", "stop", "memory"), default=("redraw", "watch", "stop", "memory"))
    parser.add_argument("--rounds", type=int, default=4, help="runs with and without the panel, in turn")
    parser.add_argument("--show", action="store_true", help="measure nothing; the tables of what is kept")
    parser.add_argument("--write-readme", action="store_true", help="put the tables between their marks in benchmarks/README.md")
    parser.add_argument("--work", type=Path, default=train.work_folder(), help="where model and rows are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE/"results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child: return print("RESULT " + json.dumps(called(asked.child, asked.work)))
    kept, path = {}, asked.results/"panels.json"
    if path.exists(): kept = json.loads(path.read_text(encoding="utf-8"))
    if not asked.show:
        from importlib.metadata import version
        asked.threads = os.cpu_count()
        kept |= train.facts(asked) | {name: version(name) for name in ("torch", "ipywidgets")} | measured(asked.only,
            asked.work, asked.rounds)
        train.keep(asked.results, "panels", json.loads(json.dumps(kept)))
    if not kept: return train.say("nothing is kept of the panels")
    print(told := report(kept))
    readme = HERE/"README.md"
    if asked.write_readme: readme.write_text(train.filled(readme.read_text(encoding="utf-8"), "panels", told), encoding="utf-8")


if __name__ == "__main__": main()
