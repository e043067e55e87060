"""How fast training goes on a GPU and how much of its memory it takes, beside TRL and Unsloth.

    python benchmarks/gpu.py --write                                   everything, and the table into benchmarks/GPU.md
    python benchmarks/gpu.py --budget 540                              what fits into nine minutes; the next call goes on where this one stopped
    python benchmarks/gpu.py --shapes 0.5B --lengths 2048 --rounds 1   a part of it
    python benchmarks/gpu.py --show --write                            measure nothing: table, picture and page from what is kept
    python benchmarks/gpu.py --peers ours ours:engine=plain trl        fields of ours' TrainingConfig behind a colon, more behind a +
    python benchmarks/gpu.py --device cpu --tiny                       does it run at all? figures of the CPU stay out of benchmarks/results

The work: models of the shapes of Qwen2.5-0.5B, 1.5B and 7B with random weights, LoRA over bf16 or over 4 bits (NF4,
quantised twice) in all linear
layers, rows that are all as long as a line or spread log-normally around a quarter of one,
about as many tokens behind every optimizer step. Every
run is a fresh process; peers alternate; figures are medians of the rounds, of the steps after the warm-up,
each with the GPU waited for. Gradient
checkpointing is off, and on where a peer runs out of memory without it; where it does with it, that is the result. Runs are kept in
benchmarks/results/gpu.json as soon as they end, and made again with --again alone.
"""
import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from gpu_peers.work import SHAPES, training_flops
from peers.common import value_of

HERE = Path(__file__).resolve().parent
PEERS = {  # name -> what the table calls it, its module, its part of the job
    "ours": ("sage_finetune", "ours", {}),
    "ours-compiled": ("sage_finetune, compiled", "ours", dict(set=dict(torch_compile=True))),
    "trl": ("TRL, packed", "trl", dict(variant="packed")),
    "trl-lines": ("TRL, packed, line by line", "trl", dict(variant="lines")),
    "trl-padded": ("TRL, padded", "trl", dict(variant="padded")),
    "unsloth": ("Unsloth, packed", "unsloth", dict(variant="packed"))}
UNSLOTH = ("python -m venv unsloth-env && unsloth-env/bin/pip install unsloth, then --unsloth-python unsloth-env/bin/python "
           "(it asks for older versions than the others use)")
USUAL = ["ours", "ours-compiled", "trl", "trl-padded", "unsloth"]
FINAL = ("out of memory", "too slow")  # no other round would end otherwise
BEGIN, END = "<!-- gpu.py: begin -->", "<!-- gpu.py: end -->"


def described(name):
    "The table's name of a peer, its module and its part of the job"
    base, _, settings = name.partition(":")
    label, module, part = PEERS[base]
    if not settings: return label, module, part
    fields = {field: value_of(text) for field, text in (one.split("=", 1) for one in settings.split("+"))}
    return f"{label}, {settings}", module, part | dict(set=part.get("set", {}) | fields)


def title(name):
    "What the table calls a peer; a method as it is"
    return described(name)[0] if name.partition(":")[0] in PEERS else name


class Case(NamedTuple):
    "One run that is asked for"
    shape: str
    method: str
    length: int
    rows: str
    peer: str
    round: int

    @property
    def work(self):
        "What all peers do alike: shape, method, length and kind of rows"
        return self[:4]

    def __str__(self): return f"{self.shape} {self.method}, length {self.length}, {self.rows} rows, round {self.round}, {title(self.peer)}"


def cases(asked):
    "All runs, a round of everything before the next; peers take turns"
    return [Case(shape, method, length, rows, peer, number) for number in range(1, asked.rounds + 1) for rows in asked.rows
            for shape in asked.shapes for length in asked.lengths for method in asked.methods for peer in asked.peers]


def case_of(run):
    "The case a kept run belongs to"
    return Case(*(run[name] for name in Case._fields))


def say(what):
    "A word to who watches; the report alone goes to the output"
    print(what, file=sys.stderr, flush=True)


# ---- what is kept -----------------------------------------------------------------------------------------------------

class Kept:
    "Calls and runs in a JSON file, written anew after every run"
    def __init__(self, folder):
        self.path = folder/"gpu.json"
        self.content = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else dict(calls=[], runs=[])

    def save(self):
        "Whole or not at all"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)

    def add(self, run, call):
        "A run takes the place of the same run of before; its call is kept with it"
        if call not in self.content["calls"]: self.content["calls"].append(call)
        same = lambda old: case_of(old) == case_of(run) and (old["card"], old["setup"]) == (run["card"], run["setup"])
        self.content["runs"] = [old for old in self.content["runs"] if not same(old)] + [run]
        self.save()

    def runs(self, card, setup):
        "Those of one GPU and one setup"
        return [run for run in self.content["runs"] if run["card"] == card and run["setup"] == setup]


def finished(case, runs):
    "Whether a run need not be made: it went well, or one of its rounds ended in a way all would"
    same = [run for run in runs if case_of(run)[:5] == case[:5]]
    return any(run["outcome"] in FINAL or run["outcome"] == "ok" and run["round"] == case.round for run in same)


# ---- one run, in a process of its own ---------------------------------------------------------------------------------

def surroundings(folder, threads, cuda):
    "The environment of a child: this project to import, no network, one GPU or none"
    found = dict(os.environ, BENCH_STARTED=str(time.time()), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                 TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if cuda else ""
    found.setdefault("UNSLOTH_COMPILE_LOCATION", str(folder/"unsloth_compiled"))  # else it writes where the process runs
    if threads: found |= dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if threads: found.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin
    return found


def child(module, job, logs, limit, python=sys.executable, threads=None, cuda=True):
    "What `python -m gpu_peers.MODULE` printed as its result, or how it ended without one; everything it said goes to a file"
    command = [str(python), "-m", f"gpu_peers.{module}", json.dumps(job)]
    logs.parent.mkdir(parents=True, exist_ok=True)
    with open(logs, "w", encoding="utf-8") as said:
        io = dict(stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        try: ended = subprocess.run(command, cwd=HERE, env=surroundings(logs.parent, threads, cuda), timeout=limit, **io)
        except subprocess.TimeoutExpired: return dict(outcome="too slow", said=f"it was ended after {limit:.0f} s")
    return outcome(ended.returncode, logs.read_text(encoding="utf-8", errors="replace").splitlines())


def outcome(status, lines):
    "What a process that ended with `status` came to, by what it said"
    results = [line for line in lines if line.startswith("RESULT ")]
    if results and not status: return json.loads(results[-1].removeprefix("RESULT "))
    if status == -9: return dict(outcome="out of memory", said="the system ended it: the memory of the machine ran out")
    return dict(outcome="failed", said=f"it ended with {status}: " + "\n".join(line for line in lines[-6:] if line.strip()))


class Bench:
    "Where things lie, what all runs have in common, and the time that is left"
    def __init__(self, asked, kept):
        self.asked, self.kept, self.works, self.left_out = asked, kept, {}, {}
        self.until = time.monotonic() + asked.budget if asked.budget else math.inf
        self.setup = dict(tokens=asked.tokens, steps=asked.steps, warm_up=asked.warm_up, rank=asked.rank)
        self.call = None

    def child(self, module, job, name, limit, python=sys.executable):
        "A child with a log of its own"
        cuda = self.asked.device == "cuda"
        return child(module, job, self.asked.work/"logs"/f"{name}.txt", limit, python, None if cuda else self.asked.threads, cuda)

    @property
    def seconds_left(self):
        "Of this call's budget"
        return self.until - time.monotonic()

    def look(self):
        "Ask the GPU what it is and how fast it multiplies; a sentence where there is none"
        facts = self.child("card", dict(device=self.asked.device), "card", 300)
        if facts.get("outcome"): return f"the GPU could not be asked: {facts['said']}"
        if not facts["card"]:
            return (f"There is no CUDA GPU here (torch {facts['torch']} sees none), so nothing was measured; "
                    "--device cpu --tiny tries the script out.")
        self.call = dict(date=datetime.now(UTC).isoformat(timespec="seconds"), python=platform.python_version(), **facts)

    def work(self, shape):
        "The model and the rows of a shape, made once; None where they cannot be"
        if shape not in self.works:
            tokens = round(self.asked.tokens * (self.asked.steps + 2) * 1.05)  # a few more: lines are not quite full
            job = dict(work=str(self.asked.work), shape=shape, device=self.asked.device, tokens=tokens)
            job |= dict(rows=self.asked.rows, lengths=self.asked.lengths)
            made = self.child("work", job, f"work-{shape}", min(self.asked.limit, self.seconds_left))
            self.works[shape] = made if made["outcome"] == "made" else None
            if made["outcome"] != "made": self.left_out[shape] = made["said"]
        return self.works[shape]

    def expected(self, case):
        "Seconds a run may take, by the runs of its shape so far"
        runs = self.kept.runs(self.call["card"], self.setup)
        alike = [run["wall_seconds"] for run in runs if (run["shape"], run["peer"]) == (case.shape, case.peer)]
        return 1.3 * max(alike) if alike else dict(tiny=30).get(case.shape, 90)


def job_of(bench, case, checkpointing, folder):
    "What a peer is told; and the lengths of the rows it gets"
    work, own = bench.work(case.shape), dict(variant=None, set={}) | described(case.peer)[2]
    rows = work["rows"][f"{case.rows}-{case.length}"]
    lengths = json.loads(Path(rows).with_suffix(".json").read_text())
    batch, lines = max(1, round(bench.asked.tokens * len(lengths) / sum(lengths))), max(1, bench.asked.tokens // case.length)
    return dict(model=work["model"], rows=rows, folder=folder, device=bench.asked.device, method=case.method,
                length=case.length, batch=batch,
                lines=lines, steps=bench.asked.steps, rank=bench.asked.rank, checkpointing=checkpointing) | own, lengths


def attempt(bench, case, checkpointing):
    "One process of a peer, and its figures"
    limit, began = min(bench.asked.limit, bench.seconds_left), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_bench_") as folder:
        job, lengths = job_of(bench, case, checkpointing, folder)
        python = bench.asked.unsloth_python if case.peer == "unsloth" else sys.executable
        result = bench.child(described(case.peer)[1], job, "-".join(map(str, case)), limit, python)
    if result["outcome"] == "too slow" and limit < bench.asked.limit: return None  # the call ran out of time, not the peer
    about = dict(card=bench.call["card"], setup=bench.setup, date=bench.call["date"], checkpointing=checkpointing)
    run = case._asdict() | about | dict(wall_seconds=time.monotonic() - began) | result
    if run["outcome"] == "ok": run |= figures(run, lengths, bench.call)
    return run


def measured(bench, case):
    "A run with gradient checkpointing off, or on where that runs out of memory (or did in another round); None when the time was up"
    same = [run for run in bench.kept.runs(bench.call["card"], bench.setup) if case_of(run)[:5] == case[:5]]
    known = not bench.asked.again and any(run["checkpointing"] for run in same)
    run = attempt(bench, case, known)
    if run and run["outcome"] == "out of memory" and not known:
        say(f"{case}: out of memory ({run['said']}); again with gradient checkpointing")
        if bench.seconds_left < bench.expected(case): return None
        run = attempt(bench, case, True)
    return run


def figures(run, lengths, call):
    "Speed after the warm-up, and what share of the GPU's peaks it is"
    skipped = min(run["setup"]["warm_up"], run["steps"] - 1)
    seconds, tokens, target_tokens = (sum(run[name][skipped:]) for name in ("step_seconds", "tokens", "target_tokens"))
    reached = training_flops(tokens, target_tokens, lengths, run["setup"]["rank"], SHAPES[run["shape"]]) / seconds / 1e12
    peak = call["published_tflops"]
    shares = dict(mfu=reached / peak if peak else None, of_measured_peak=reached / call["measured_tflops"])
    return dict(tokens_per_second=tokens / seconds, tflops=reached) | shares


def doubts(run):
    "What is wrong with a run that ended well"
    shape, per_step = SHAPES[run["shape"]], sum(run["tokens"]) / run["steps"]
    start = math.log(shape["vocab_size"]) + shape["hidden_size"] * 0.02**2 / 2  # random logits: their variance raises it
    if abs(per_step / run["setup"]["tokens"] - 1) > 0.15: yield f"it read {per_step:,.0f} tokens a step of {run['setup']['tokens']:,}"
    if not run["losses"] or not all(math.isfinite(loss) for loss in run["losses"]): yield "its losses are not numbers"
    elif abs(run["losses"][0] - start) > 1: yield f"its first loss is {run['losses'][0]:.2f}; random weights give about {start:.1f}"


# ---- all runs ---------------------------------------------------------------------------------------------------------

def missing(asked):
    "Peers and methods that cannot run here -> why"
    found, trl = {}, [peer for peer in asked.peers if peer.startswith("trl")]
    if trl and not installed(sys.executable, "trl"): found |= dict.fromkeys(trl, "it is not installed: pip install trl")
    if "unsloth" in asked.peers and asked.device != "cuda": found["unsloth"] = "it runs on a GPU alone"
    elif "unsloth" in asked.peers and not installed(asked.unsloth_python, "unsloth"): found["unsloth"] = f"it is not installed: {UNSLOTH}"
    if "qlora" in asked.methods and not installed(sys.executable, "bitsandbytes"):
        found["qlora"] = "bitsandbytes is not installed: pip install bitsandbytes"
    return found


def installed(python, package):
    "Whether a Python finds a package; it is not imported"
    code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec('{package}') is None)"
    return subprocess.run([str(python), "-c", code], stdin=subprocess.DEVNULL).returncode == 0


def measure(bench, away):
    "Make all runs there is time for; the number of those left for another call"
    wanted, left = [case for case in cases(bench.asked) if not {case.peer, case.method} & set(away)], 0
    for case in wanted:
        made = not bench.asked.again and finished(case, bench.kept.runs(bench.call["card"], bench.setup))
        if made or case.shape in bench.left_out: continue
        if bench.seconds_left < bench.expected(case) or bench.work(case.shape) is None:
            left += case.shape not in bench.left_out
            continue
        run = measured(bench, case)
        if run is None:
            left += 1
            continue
        bench.kept.add(run, bench.call)
        say(f"{case}: {said(run)}")
    return left


def said(run):
    "A run in a line"
    if run["outcome"] != "ok": return f"{run['outcome']}: {run['said']}"
    doubted = "".join(f"; {doubt}" for doubt in doubts(run))
    return (f"{run['tokens_per_second']:,.0f} tokens a second, {memory(run):.2f} GiB, first step after {run['to_first_step']:.0f} s, "
            f"{run['wall_seconds']:.0f} s in all{doubted}")


def memory(run):
    "The peak in GiB: of tensors on the GPU, or of the process without one"
    return run.get("allocated_mib", run["peak_mib"]) / 1024


# ---- table, picture, page ---------------------------------------------------------------------------------------------

def groups(content):
    "Runs of one GPU and one setup belong together: (GPU, setup) as text -> its runs, those measured last first"
    found = {}
    for run in content["runs"]: found.setdefault((run["card"], json.dumps(run["setup"])), []).append(run)
    return sorted(found.items(), key=lambda group: max(run["date"] for run in group[1]), reverse=True)


def summaries(runs):
    "(shape, method, length, rows) -> peer -> medians of its good runs, or how they ended"
    shapes, peers = list(SHAPES), list(PEERS)
    place = lambda run: (peers.index(run["peer"].partition(":")[0]), run["peer"])
    found, order = {}, lambda run: (shapes.index(run["shape"]), run["method"], run["rows"], run["length"], *place(run))
    for run in sorted(runs, key=order): found.setdefault(case_of(run).work, {}).setdefault(run["peer"], []).append(run)
    return {work: {peer: summary(of_peer) for peer, of_peer in peers.items()} for work, peers in found.items()}


def summary(runs):
    "Medians of a peer's good runs; how it ended where there are none"
    good = [run for run in runs if run["outcome"] == "ok"]
    if not good: return dict(outcome=runs[-1]["outcome"], runs=len(runs), checkpointing=runs[-1]["checkpointing"])
    middle = lambda figure: statistics.median(figure(run) for run in good)
    names = ("tokens_per_second", "to_first_step", "of_measured_peak", "mfu")
    found = {name: middle(itemgetter(name)) if good[0][name] is not None else None for name in names}
    reserved = middle(lambda run: run["reserved_mib"] / 1024) if "reserved_mib" in good[0] else None
    found |= dict(memory_gib=middle(memory), reserved_gib=reserved)
    return found | dict(outcome="ok", runs=len(good), checkpointing=good[-1]["how"]["checkpointing"])


def best_trl(peers):
    "The fastest of TRL's ways, against which all are measured"
    good = [name for name, one in peers.items() if name.startswith("trl") and one["outcome"] == "ok"]
    return max(good, key=lambda name: peers[name]["tokens_per_second"], default=None)


def table(runs):
    "The figures as Markdown; ratios are to TRL's fastest way"
    lines = [("| model | method | rows | length | | tokens a second | MFU | of the measured peak | peak memory | "
             "reserved | start to first step | checkpointing | runs |"),
             "|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|---|--:|"]
    for (shape, method, length, rows), peers in summaries(runs).items():
        best = best_trl(peers)
        lines += [f"| {shape} | {method} | {rows} | {length:,} | {title(peer)} | {cells(one, peers.get(best))} |"
            for peer, one in peers.items()]
    return "\n".join(lines)


def cells(one, best):
    "A peer's figures of one work"
    if one["outcome"] != "ok": return f"{one['outcome']} | | | | | | {'on' if one['checkpointing'] else 'off'} | {one['runs']}"
    ratio = lambda figure: f" ({one[figure] / best[figure]:.2f} ×)" if best else ""
    share = lambda value: "" if value is None else f"{value:.1%}"
    reserved = "" if one["reserved_gib"] is None else f"{one['reserved_gib']:.2f} GiB"
    return (f"{one['tokens_per_second']:,.0f}{ratio('tokens_per_second')} | {share(one['mfu'])} | {share(one['of_measured_peak'])} "
            f"| {one['memory_gib']:.2f} GiB{ratio('memory_gib')} | {reserved} | {one['to_first_step']:.1f} s "
            f"| {'on' if one['checkpointing'] else 'off'} | {one['runs']}")


def heading(runs, calls):
    "When and on what the runs of a group were made"
    dates, setup = sorted({run["date"] for run in runs}), runs[0]["setup"]
    call = next(call for call in reversed(calls) if call["date"] == dates[-1])
    peaks = [one["measured_tflops"] for one in calls if one["date"] in dates]
    found = [pair for run in runs if run["outcome"] == "ok" for pair in run["versions"].items() if pair[1] != "source"]
    versions = [" ".join(pair) for pair in dict.fromkeys([("Python", call["python"]), *found])]
    days = " to ".join(dict.fromkeys([dates[0][:10], dates[-1][:10]]))
    card = call["card"] + (f", {call['memory_mib'] / 1024:.0f} GiB, driver {call['driver']}, CUDA {call['cuda']}"
        if call["memory_mib"] else "")
    published = (f"published bf16 peak {call['published_tflops']:,g} TFLOP/s ({call['published_source']}), "
        if call["published_tflops"] else "")
    return (f"{days}; {card}; {published}matrix products reached {statistics.median(peaks):,.4g} TFLOP/s in the same call.\n"
            f"{setup['tokens']:,} tokens a step, {setup['steps']} steps of which {setup['warm_up']} warm up, rank {setup['rank']}. "
            f"{', '.join(versions)}.")


def notes(runs):
    "How each peer computed, as far as it says so, and why runs failed"
    plain = lambda value: {"True": "on", "False": "off"}.get(str(value), str(value))
    words = lambda run: ", ".join(f"{name} {plain(value)}" for name, value in run["how"].items() if name != "checkpointing")
    how = dict.fromkeys(f"- {title(run['peer'])}, {run['method']}: {words(run)}." for run in runs if run["outcome"] == "ok" and words(run))
    failed = dict.fromkeys(f"- {title(run['peer'])}, {run['shape']} {run['method']}, length {run['length']}: {run['said'].splitlines()[-1]}"
                           for run in runs if run["outcome"] == "failed")
    return "\n".join([*how, *failed])


def report(content, away=(), left_out=()):
    "All tables, and what is missing"
    parts = ["\n\n".join(filter(None, [heading(runs, content["calls"]), table(runs), notes(runs)])) for _, runs in groups(content)]
    parts += [f"{title(name)} is missing: {why}." for name, why in dict(away).items()]
    parts += [f"The {name} shape is left out: {why}." for name, why in dict(left_out).items()]
    return "\n\n".join(parts)


def picture(runs, path):
    "Bars for speed and memory; a column for each model and method"
    from matplotlib.figure import Figure
    found = summaries(runs)
    columns = list(dict.fromkeys(work[:2] for work in found))
    figure = Figure(figsize=(1.5 + 4.2 * len(columns), 7), layout="constrained")
    panels = figure.subplots(2, len(columns), squeeze=False)
    for at, column in enumerate(columns):
        works = {work[2:]: peers for work, peers in found.items() if work[:2] == column}
        for row, (key, what) in enumerate((("tokens_per_second", "tokens a second"), ("memory_gib", "peak memory, GiB"))):
            bars(panels[row][at], works, key)
            panels[row][at].set_title(f"{' '.join(column)}: {what}", fontsize=10)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def bars(axes, works, key):
    "A group of bars for each length and kind of rows, a bar a peer; a word where there is no figure"
    peers = list(dict.fromkeys(peer for of_work in works.values() for peer in of_work))
    width = 0.8 / len(peers)
    for at, peer in enumerate(peers):
        greens, greys = ("#1b7f4d", "#54b487", "#9fd6bd"), ("#9aa5b1", "#7b8794", "#c3cbd3")
        colour = "#d0893a" if peer == "unsloth" else (greens if peer.startswith("ours") else greys)[at % 3]
        places = [number + (at - (len(peers) - 1) / 2) * width for number in range(len(works))]
        heights = [of_work.get(peer, {}).get(key) for of_work in works.values()]
        axes.bar(places, [height or 0 for height in heights], width, color=colour, label=title(peer))
        for place, height, of_work in zip(places, heights, works.values()):
            if height is not None or peer not in of_work: continue
            axes.text(place, 0, of_work[peer]["outcome"], rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(works)), [f"{rows}\n{length:,}" for length, rows in works], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def write_page(text, page):
    "Put the tables between the marks of a page. Raises ValueError when it has none"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end: raise ValueError(f"{page} has no lines {BEGIN} and {END} to write between")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


# ---- all together -----------------------------------------------------------------------------------------------------

def options(arguments=None):
    "What the command line asks for"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_of = dict(nargs="+", metavar="NAME")
    parser.add_argument("--shapes", **one_of, default=["0.5B", "1.5B", "7B"], choices=list(SHAPES), help="models (default: 0.5B 1.5B 7B)")
    parser.add_argument("--methods", **one_of, default=["lora", "qlora"], choices=["lora", "qlora"],
        help="ways to keep the base (default: both)")
    parser.add_argument("--rows", **one_of, default=["spread", "exact"], choices=["spread", "exact"], help="kinds of rows (default: both)")
    parser.add_argument("--peers", **one_of, default=USUAL, help=f"of: {', '.join(PEERS)} (default: {' '.join(USUAL)})")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens of a line, and of the longest row")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, short rows and few steps")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens behind an optimizer step, about (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a run (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps that are not counted (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter (default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds for this call; what does not fit is left for the next")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one run (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="make runs anew that are kept already")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is kept")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--unsloth-python", default=sys.executable, help="Python of an environment with Unsloth in it")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the CPU, with --device cpu")
    parser.add_argument("--work", type=Path, default=work_folder(), help="where models, rows and logs are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of gpu.json and gpu.png: else benchmarks/results, or --work with --device cpu")
    parser.add_argument("--page", type=Path, default=HERE/"GPU.md", help="the page for --write (default: %(default)s)")
    return settled(parser, parser.parse_args(arguments))


def settled(parser, asked):
    "The arguments with what follows from each other filled in"
    asked.work = asked.work.absolute()
    asked.results = (asked.results or (asked.work if asked.device == "cpu" else HERE/"results")).absolute()
    if asked.tiny:
        tiny = dict(shapes=["tiny"], lengths=[256, 512], tokens=1024, steps=4, warm_up=1, rounds=1)
        for name, value in tiny.items():
            if getattr(asked, name) == parser.get_default(name): setattr(asked, name, value)
    for name in asked.peers:
        if not re.fullmatch(rf"({'|'.join(PEERS)})|ours(-compiled)?:[a-z_]+=[^+=]+(\+[a-z_]+=[^+=]+)*", name):
            parser.error(f"there is no peer {name!r}. There are: {', '.join(PEERS)}; settings follow as ours:FIELD=VALUE+FIELD=VALUE")
    if asked.steps < 2 or asked.warm_up >= asked.steps: parser.error("--steps must be more than --warm-up, and at least 2")
    if asked.tokens < max(asked.lengths): parser.error(f"--tokens must be at least the longest of --lengths, {max(asked.lengths)}")
    if min(asked.lengths) < 128: parser.error("--lengths must be 128 or more")
    return asked


def work_folder():
    "A folder for models that outlives a run"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home()/".cache")/"sage_finetune_benchmarks"


def main():
    "Measure what is missing, show what is kept; the exit status"
    asked = options()
    kept, away, left = Kept(asked.results), {}, 0
    bench = Bench(asked, kept)
    if not asked.show:
        trouble = bench.look()
        if trouble:
            say(trouble)
            return 2
        away = missing(asked)
        left = measure(bench, away)
    if not kept.content["runs"]:
        why = ["there was no time for a single run"] * bool(left) + [f"{title(name)}: {why}"
            for name, why in (away | bench.left_out).items()]
        say("Nothing is measured yet." if asked.show else f"Nothing could be measured: {'; '.join(why)}.")
        return 1
    picture(groups(kept.content)[0][1], asked.results/"gpu.png")
    text = report(kept.content, away, bench.left_out)
    print(text)
    if asked.write: write_page(text, asked.page)
    if left: say(f"{left} runs are left; the same call again goes on with them.")
    return 0


if __name__ == "__main__": sys.exit(main())
