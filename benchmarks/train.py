"""How fast training goes and how much memory it takes, beside the programs people would use instead.

    python benchmarks/train.py               three rounds of every peer over 24 rows; about three quarters of an hour on two cores
    python benchmarks/train.py --short       12 rows, fewer of the others' variants, as many runs as fit into eight minutes
    python benchmarks/train.py --scaling     how cost grows with length, batch, rank, vocabulary and the number of rows; at most twenty minutes
    python benchmarks/train.py --scaling length rows --peers ours,trl-rows   some quantities, and a peer beside ours
    python benchmarks/train.py --tune        TRL's and LLaMA-Factory's settings beside each other on a model of four layers: which of them is the best?
    python benchmarks/train.py --peers ours,ours:packing=false,trl-rows      some peers; settings behind a colon, more of them behind a +
    python benchmarks/train.py --show --write-readme                         measure nothing: tables, pictures and README from what is kept
    python benchmarks/train.py --layers 1 --rows 8 --rounds 1                does it run at all? figures of a small model say little

The work: a model of Qwen2.5-0.5B's shape with random weights, a LoRA of rank 8 over all linear layers, rows of alpaca shape of at most 512
tokens, four rows behind an optimizer step, one pass over the rows. Every run is a fresh process; peers alternate;
figures are medians. Tokens are
the rows' own: padding and what a program adds do not count. Prints Markdown, draws benchmarks/results/train.png and writes
benchmarks/results/train-PROCESSOR.json with every single run; --scaling and --tune have a .json and a .png of their own.
"""
import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from peers import llamafactory
from reference import SHAPE, adapter_size, flops

HERE = Path(__file__).resolve().parent
PEERS = {  # name -> what the table calls it, its module, its arguments, its settings
    "ours": ("sage_finetune", "ours", [], []),
    "ours-compiled": ("sage_finetune, compiled", "ours", ["--passes", 2], ["torch_compile=true"]),
    "trl-default": ("TRL, defaults", "trl", ["--variant", "default"], []),
    "trl-rows": ("TRL, bf16, row by row", "trl", ["--variant", "rows"], []),
    "trl-padding-free": ("TRL, bf16, padding-free", "trl", ["--variant", "padding_free"], []),
    "trl-packed": ("TRL, bf16, packed", "trl", ["--variant", "packed"], []),
    "trl-padded": ("TRL, bf16, padded", "trl", ["--variant", "padded"], []),
    "trl-compiled": ("TRL, bf16, row by row, compiled", "trl", ["--variant", "rows", "--passes", 3], ["torch_compile=true"]),
    "plain": ("transformers + PEFT", "plain", [], []),
    "plain-rows": ("transformers + PEFT, row by row", "plain", [], ["per_device_train_batch_size=1", "gradient_accumulation_steps=4"]),
    "llamafactory": ("LLaMA-Factory, packed", "llamafactory", ["--variant", "packed"], []),
    "llamafactory-rows": ("LLaMA-Factory, row by row", "llamafactory", ["--variant", "rows"], []),
    "llamafactory-padded": ("LLaMA-Factory, padded", "llamafactory", ["--variant", "padded"], [])}
USUAL = ["ours", "trl-rows", "trl-padding-free", "llamafactory-rows", "ours-compiled", "trl-default", "plain",
    "trl-packed", "trl-padded", "llamafactory", "plain-rows"]
SHORT = USUAL[:7]
TUNED = [*(f"trl-{way}" for way in ("default", "rows", "padding-free", "packed", "padded")), "trl-rows:bf16=false",
         "trl-padding-free:bf16=false",
         'trl-rows:model_init_kwargs={"dtype":"bfloat16","attn_implementation":"eager"}', "trl-rows:dataloader_num_workers=1",
         "trl-rows:gradient_checkpointing=true", "trl-rows:activation_offloading=true", "trl-rows:use_liger_kernel=true", "trl-compiled",
         "plain", "plain-rows", "llamafactory", "llamafactory-rows", "llamafactory-padded"]
MAX_LENGTH, BATCH, RANK = 512, 4, 8


def say(what): print(what, file=sys.stderr, flush=True)


# ---- one run, in a process of its own ---------------------------------------------------------------------------------

class Failed(Exception):
    "A child process did not get to its end"


def child(module, arguments, threads, logs, python=sys.executable, limit=3600., compiled=""):
    "What `python -m peers.MODULE` printed as its result; everything else it said goes to a file"
    environment = dict(os.environ, BENCH_STARTED=str(time.time()), OMP_NUM_THREADS=str(threads),
                       MKL_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1",
                       HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1",
                       PYTHONWARNINGS="ignore", CUDA_VISIBLE_DEVICES="")
    environment.pop("OMP_WAIT_POLICY", None)  # threads wait as they do for people who never heard of it
    if compiled: environment["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)  # empty: nobody profits from what an earlier run compiled
    logs.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", f"peers.{module}", *map(str, arguments)]
    with open(logs, "w", encoding="utf-8") as said:
        try:
            ended = subprocess.run(command, cwd=HERE, env=environment, stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired as error: raise Failed(f"it was still running after {limit:.0f} s") from error
    lines = logs.read_text(encoding="utf-8", errors="replace").splitlines()
    results = [line for line in lines if line.startswith("RESULT ")]
    if ended.returncode or not results: raise Failed(f"it ended with {ended.returncode}: {lines[-1] if lines else 'nothing said'}")
    return json.loads(results[-1][7:])


def described(name):
    "The table's name of a peer, its module and its arguments"
    base, _, settings = name.partition(":")
    if base not in PEERS: sys.exit(f"there is no peer {base!r}. There are: {', '.join(PEERS)}")
    label, module, arguments, own = PEERS[base]
    both = own + (settings.split("+") if settings else [])
    return f"{label}, {settings}" if settings else label, module, [*arguments, *(["--set", *both] if both else [])]


class Bench:
    "Where things lie, and what all runs have in common"
    def __init__(self, work, threads, layers):
        self.work, self.threads, self.shape, self.made = work.absolute(), threads, SHAPE | dict(num_hidden_layers=layers), {}

    def python(self, module):
        "The Python a peer runs in"
        return llamafactory.environment(self.work/"lf-venv", say) if module == "llamafactory" else sys.executable

    def reference(self, *arguments):
        "Model and rows, made in a child so that this process stays small"
        command = [sys.executable, HERE/"reference.py", self.work, "--layers", str(self.shape["num_hidden_layers"]), *map(str, arguments)]
        if arguments not in self.made:
            said = subprocess.run(command, capture_output=True, text=True)
            if said.returncode: sys.exit(f"the reference work could not be made:\n{said.stderr[-2000:]}")
            self.made[arguments] = json.loads(said.stdout.splitlines()[-1])
        return self.made[arguments]

    def run(self, name, reference, *arguments, limit=3600.):
        "One training"
        _, module, own = described(name)
        lines = math.ceil(BATCH * statistics.mean(reference["lengths"]) / MAX_LENGTH)
        folder, logs = self.work/"output", self.work/"logs"/f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.txt"
        told = ["--model", reference["model"], "--rows", reference["rows"], "--folder", folder/"run", "--threads",
            self.threads, "--lines", lines, *arguments, *own]
        shutil.rmtree(folder, ignore_errors=True)
        try: return child(module, told, self.threads, logs, self.python(module), limit, folder/"compiled")
        finally: shutil.rmtree(folder, ignore_errors=True)

    def roofline(self):
        "The speed of matrix products, now"
        found = child("roofline", [self.threads], self.threads, self.work/"logs"/"roofline.txt")
        say(f"matrix products reach {found['bf16']:.2f} TFLOP/s in bf16 and {found['fp32']:.2f} in fp32")
        return found


class Clock:
    "Time that may be used up; without minutes there is no end to it"
    def __init__(self, minutes=None): self.end = time.monotonic() + minutes * 60 if minutes else math.inf

    @property
    def left(self):
        "Seconds"
        return self.end - time.monotonic()


# ---- the comparison ---------------------------------------------------------------------------------------------------

def ready(bench, peers):
    "Make the environments that are needed, before any clock runs; why some peers cannot be measured"
    failures = {}
    for name in peers:
        try: bench.python(described(name)[1])
        except RuntimeError as error:
            failures[name] = str(error)
            say(error)
    return failures


def rounds(bench, peers, count, reference, clock, failures):
    "Runs of each peer, one of each in turn, and the matrix products' speed before each round; `failures` is added to"
    runs, roofs, took = {name: [] for name in peers}, [], {}
    for number in range(count):
        if number and clock.left < 60: break
        roofs.append(bench.roofline())
        for name in (name for name in peers if name not in failures):
            if clock.left < expected(name, took):
                if not runs[name]: failures[name] = "no time was left for it"
                continue
            began = time.monotonic()
            try: one = bench.run(name, reference, limit=min(3600., clock.left + 60))
            except Failed as error:
                failures[name] = str(error)
                say(f"{described(name)[0]}: {error} (what it said is in {bench.work/'logs'})")
                continue
            took[name] = time.monotonic() - began
            runs[name].append(one | dict(doubts=list(doubts(one, reference, bench.shape))))
            say(f"round {number + 1}, {described(name)[0]}: {'; '.join([in_words(one), *runs[name][-1]['doubts']])}")
    return {name: found for name, found in runs.items() if found}, roofs


def expected(name, took):
    "Seconds the next run of a peer will take, after those it and others took; what never ran may take longer than all others"
    return took.get(name, 1.5 * max(took.values(), default=0.))


def in_words(run):
    "A run in one line"
    return (f"{pace(run):.1f} tokens a second, {run['peak_mib']:,.0f} MiB, first step after {run['to_first_step']:.0f} s, "
            f"{run['cpu_seconds'] / run['seconds']:.1f} cores busy")


def doubts(run, reference, shape=SHAPE, rank=RANK):
    "What is wrong with a run that ended, sentence by sentence"
    tokens, whole, start, losses = sum(run["tokens"]), sum(reference["lengths"]), math.log(shape["vocab_size"]), run["losses"]
    passes = max(1, round(tokens / whole))
    if abs(tokens - passes * whole) > whole / 100: yield f"it read {tokens} tokens of the rows' {whole}"
    if run["trained"] != adapter_size(rank, shape):
        yield f"its adapter has {run['trained']:,} parameters, not {adapter_size(rank, shape):,}"
    if not all(map(math.isfinite, losses)) or abs(losses[0] - start) > 1:
        yield f"its first loss is {losses[0]:.2f}; random weights give about {start:.1f}"
    elif max(losses) > losses[0] + 0.5: yield f"its loss rose from {losses[0]:.2f} to {max(losses):.2f}"
    if run["settings"].get("torch_compile") and not run["compile_seconds"]: yield "it was asked to compile, and compiled nothing"
    if run["others"] > 0.1 and not run["compile_seconds"]: yield f"others had {run['others']:.0%} of the machine meanwhile"


# ---- figures of a run, and medians ------------------------------------------------------------------------------------

def steady(run):
    "The steps that show the speed: all but the first or, where something was compiled on the way, the last half"
    return range(run["steps"] // 2 if run["compile_seconds"] else min(1, run["steps"] - 1), run["steps"])


def steady_seconds(run): return sum(run["step_seconds"][step] for step in steady(run))


def pace(run):
    "Real tokens a second over the steady steps"
    return sum(run["tokens"][step] for step in steady(run)) / steady_seconds(run)


def share(run, peak, shape=SHAPE, rank=RANK):
    "Part of the matrix products' peak (in TFLOP/s) that the necessary work of the steady steps makes up"
    work = flops(*(sum(run[what][step] for step in steady(run)) for what in ("tokens", "target_tokens")), rank, shape)
    return work / steady_seconds(run) / (peak * 1e12)


def peak_of(roofs):
    "The matrix products' speed in the faster precision, the median over the rounds, in TFLOP/s"
    return max(statistics.median(one[kind] for one in roofs) for kind in ("bf16", "fp32"))


def summary(runs, peak, shape=SHAPE, rank=RANK):
    "Medians of a peer's runs"
    def middle(figure): return statistics.median(map(figure, runs))
    return dict(tokens_per_second=middle(pace), with_first_step=middle(lambda run: sum(run["tokens"]) / run["seconds"]),
                to_first_step=middle(lambda run: run["to_first_step"]), peak_mib=middle(lambda run: run["peak_mib"]),
                roofline_share=middle(lambda run: share(run, peak, shape, rank)),
                compile_seconds=middle(lambda run: run["compile_seconds"]),
                first_loss=middle(lambda run: run["losses"][0]), last_loss=middle(lambda run: run["losses"][-1]), runs=runs)


def best_trl(found, figure="tokens_per_second", best=max):
    "The fastest of TRL's variants, against which all are measured, or the best in something else"
    return best((name for name in found if name.startswith("trl")), key=lambda name: found[name][figure], default=None)


# ---- what is shown ----------------------------------------------------------------------------------------------------

def table(found):
    "The figures as Markdown; ratios are to the fastest of TRL's variants"
    best = best_trl(found)
    def ratio(one, figure): return f" ({one[figure] / found[best][figure]:.2f} ×)" if best else ""
    lines = ["| | tokens a second | with the first step | peak memory | start to first step | of the peak | loss |",
        "|---|--:|--:|--:|--:|--:|--:|"]
    for name, one in sorted(found.items(), key=lambda item: -item[1]["tokens_per_second"]):
        lines.append(f"| {described(name)[0]} | {one['tokens_per_second']:.0f}{ratio(one, 'tokens_per_second')} | "
                     f"{one['with_first_step']:.0f} "
                     f"| {one['peak_mib']:,.0f} MiB{ratio(one, 'peak_mib')} | {one['to_first_step']:.1f} s{ratio(one, 'to_first_step')} "
                     f"| {one['roofline_share']:.0%} | {one['first_loss']:.2f} → {one['last_loss']:.2f} |")
    return "\n".join(lines)


def remarks(result):
    "What the table cannot say, as sentences"
    found = result["peers"]
    fastest, smallest, soonest = best_trl(found), best_trl(found, "peak_mib", min), best_trl(found, "to_first_step", min)
    if fastest: yield (f"× is beside {described(fastest)[0]}, TRL's fastest. "
                       f"TRL's least memory is {found[smallest]['peak_mib']:,.0f} MiB ({described(smallest)[0]}), "
                       f"its soonest first step after {found[soonest]['to_first_step']:.1f} s ({described(soonest)[0]}).")
    for name, one in found.items():
        if one["compile_seconds"]:
            yield f"{described(name)[0]}: the last half of the steps counts; compiling took {one['compile_seconds']:.0f} s, from nothing."
    shifting = [f"{described(name)[0]} {min(paces):.0f} to {max(paces):.0f}" for name, one in found.items()
        if len(paces := [pace(run) for run in one["runs"]]) > 1]
    if shifting: yield f"Tokens a second of the single runs: {'; '.join(shifting)}."
    for name, one in found.items():
        for doubt in dict.fromkeys(doubt for run in one["runs"] for doubt in run["doubts"]):
            yield f"Doubtful: {described(name)[0]}: {doubt}."
    for name, why in result["failures"].items(): yield f"{described(name)[0]} is missing: {why.splitlines()[0]}"


def report(result):
    "The comparison as Markdown"
    roofs, machine = result["roofs"], result["machine"]
    middle = {kind: statistics.median(one[kind] for one in roofs) for kind in ("bf16", "fp32")}
    head = (f"{result['date'][:10]}, {machine['processor']} ({', '.join(machine['formats'])}), {result['threads']} threads, "
            f"{versions(result['peers'])}: "
            f"{result['rows']} rows, {result['tokens']:,} tokens, {result['shape']['num_hidden_layers']} layers. "
            f"Matrix products reach {middle['bf16']:.2f} TFLOP/s in bf16, {middle['fp32']:.2f} in fp32.")
    return "\n\n".join([head, table(result["peers"]), *remarks(result)])


def versions(peers):
    "Which versions ran; those of ours where peers have different ones"
    found = {}
    for one in peers.values(): found = one["runs"][0]["versions"] | found
    return ", ".join(f"{name} {number}" for name, number in found.items())


def colour(name): return "#1b7f4d" if name.startswith("ours") else "#c8743a" if name.startswith("trl") else "#9aa5b1"


def picture(result, path):
    "Bars for speed, memory and the wait for the first step"
    from matplotlib.figure import Figure
    found = result["peers"]
    names = sorted(found, key=lambda name: found[name]["tokens_per_second"])
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(found)), layout="constrained")
    panels = (("tokens_per_second", "tokens a second (more is better)", 1), ("peak_mib", "peak memory, GiB (less is better)", 1024),
              ("to_first_step", "start to first step, seconds (less is better)", 1))
    for axes, (key, title, unit) in zip(figure.subplots(1, 3, sharey=True), panels):
        values = [found[name][key] / unit for name in names]
        bars = axes.barh([described(name)[0] for name in names], values, color=[colour(name) for name in names])
        axes.bar_label(bars, [f"{value:.1f}" if value < 20 else f"{value:.0f}" for value in values], padding=3)
        axes.set_xlim(0, max(values) * 1.18)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# ---- how cost grows ---------------------------------------------------------------------------------------------------

QUANTITIES = dict(length=(256, 512, 1024, 2048, 4096), batch=(1, 2, 4, 8, 16), rank=(4, 8, 32, 128),
    vocabulary=(1536, 32_000, 151_936), rows=(100, 1000, 10_000))
HELD = dict(length="one row a step, all as long as that", batch="rows behind a step", rank="of the adapter",
    vocabulary="ids of the model", rows="rows prepared; four steps are made")


def scaled(what, value):
    "What the reference work and the training are told for one value of one quantity; the others are held"
    if what == "length":
        return ["--rows", 8, "--longest", value, "--exact"], ["--batch", 1, "--steps", min(8, max(3, 4096 // value)), "--max-length", value]
    if what == "batch": return ["--rows", 48], ["--batch", value, "--steps", max(3, 16 // value)]
    if what == "rank": return ["--rows", 32], ["--rank", value, "--steps", 4]
    return ["--rows", *((32, "--vocabulary", value) if what == "vocabulary" else (value,))], ["--steps", 4]


def scaling(bench, peers, quantities, clock, kept):
    "Runs over one quantity at a time: quantity -> peer -> lines; `kept` is called with them after every run. Why some are missing"
    found, failures, took = {}, {}, 0.
    for what, value, name in ((each, value, name) for each in quantities for value in QUANTITIES[each] for name in peers):
        if clock.left < 1.5 * took:
            failures[f"{what} {value}, {described(name)[0]}"] = "no time was left for it"
            continue
        work, training = scaled(what, value)
        reference, began = bench.reference(*work), time.monotonic()
        try: run = bench.run(name, reference, *training)
        except Failed as error:
            failures[f"{what} {value}, {described(name)[0]}"] = str(error)
            say(f"{what} {value}: {error}")
            continue
        took = time.monotonic() - began
        line = {what: value} | dict(tokens_per_second=pace(run), peak_mib=run["peak_mib"], to_first_step=run["to_first_step"], run=run)
        found.setdefault(what, {}).setdefault(name, []).append(line)
        say(f"{what} {value}, {described(name)[0]}: {in_words(run)}")
        kept(found, failures)
    return found, failures


def scaling_tables(result):
    "Each quantity as Markdown, the peers one below the other"
    parts = [(f"{result['date'][:10]}, {result['machine']['processor']}, {result['threads']} threads; "
        f"{result['shape']['num_hidden_layers']} layers")]
    for what, peers in result["quantities"].items():
        lines = [f"**{what}** ({HELD[what]})", "", f"| {what} | | tokens a second | peak memory | start to first step |",
            "|--:|---|--:|--:|--:|"]
        for name, figures in peers.items():
            lines += [f"| {one[what]:,} | {described(name)[0]} | {one['tokens_per_second']:.0f} | {one['peak_mib']:,.0f} "
                f"MiB | {one['to_first_step']:.1f} s |" for one in figures]
        parts.append("\n".join(lines))
    return "\n\n".join(parts + [f"{which} is missing: {why.splitlines()[0]}" for which, why in result["failures"].items()])


def scaling_picture(result, path):
    "Speed above, memory below, over every quantity"
    from matplotlib.figure import Figure
    quantities = result["quantities"]
    figure = Figure(figsize=(2.6 * len(quantities) + 1, 5), layout="constrained")
    grid = figure.subplots(2, len(quantities), sharex="col", squeeze=False)
    for column, (what, peers) in enumerate(quantities.items()):
        for axes, key, unit in ((grid[0][column], "tokens_per_second", 1), (grid[1][column], "peak_mib", 1024)):
            for name, lines in peers.items():
                axes.plot([one[what] for one in lines], [one[key] / unit for one in lines], marker="o",
                    color=colour(name), label=described(name)[0])
            top = max(one[key] / unit for lines in peers.values() for one in lines)
            axes.set_xscale("log")
            axes.set_xticks([one[what] for one in next(iter(peers.values()))],
                [f"{one[what]:,}" for one in next(iter(peers.values()))], rotation=45, fontsize=8)
            axes.minorticks_off()
            axes.set_ylim(0, 1.15 * top)
            axes.spines[["top", "right"]].set_visible(False)
        grid[1][column].set_xlabel(what)
    grid[0][0].set_ylabel("tokens a second")
    grid[1][0].set_ylabel("peak memory, GiB")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


# ---- what is kept -----------------------------------------------------------------------------------------------------

# name of the .json and .png -> as Markdown, drawn
KINDS = dict(train=(report, picture), scaling=(scaling_tables, scaling_picture), tune=(report, picture))


def machine():
    "What it ran on"
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    def of(field): return next((line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith(field)), "")
    formats = sorted({"amx_bf16", "avx512_bf16", "avx512f", "avx2"} & set(of("flags").split()))
    return dict(processor=of("model name") or platform.processor() or platform.machine(), formats=formats, cores=os.cpu_count(),
                python=platform.python_version(), system=platform.system())


def kept_name(kind, result):
    "The file of a result; the comparison has one for every kind of CPU, as what is fast differs between them"
    if kind != "train": return f"{kind}.json"
    fastest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in result["machine"]["formats"]), "")
    return "-".join(["train", *re.findall(r"[a-z0-9]+", re.sub(r"\(r\)|processor", "", result["machine"]["processor"].lower())),
        *filter(None, [fastest])]) + ".json"


def keep(folder, kind, result):
    "The last results of a kind"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/kept_name(kind, result)).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def kept_results(folder, kind):
    "What is kept of a kind, the newest first"
    paths = folder.glob("train-*.json") if kind == "train" else [path for path in [folder/f"{kind}.json"] if path.exists()]
    return sorted((json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda result: result["date"], reverse=True)


def show(folder, kind, readme=None):
    "Print and draw what is kept, and write it between its marks in a README; the picture is of the newest"
    results = kept_results(folder, kind)
    if not results: return say(f"nothing is kept of {kind}")
    told, drawn = KINDS[kind]
    if not results[0].get("peers") and not results[0].get("quantities"):
        return print("\n".join(f"{name}: {why}" for name, why in results[0]["failures"].items()))
    drawn(results[0], folder/f"{kind}.png")
    text = "\n\n".join(told(result) for result in results)
    print(text)
    if readme: readme.write_text(filled(readme.read_text(encoding="utf-8"), "results" if kind == "train" else kind, text), encoding="utf-8")


def filled(page, name, text):
    "A page with other text between its marks `<!-- name -->` and `<!-- /name -->`"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in page or end not in page.split(begin, 1)[1]: raise ValueError(f"the page has no {begin} … {end}")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


# ---- all together -----------------------------------------------------------------------------------------------------

def compare(asked, bench, kind):
    "The peers beside each other, kept"
    failures, reference = ready(bench, asked.peers), bench.reference("--rows", asked.rows)
    runs, roofs = rounds(bench, asked.peers, asked.rounds, reference, Clock(asked.minutes), failures)
    found = {name: summary(of_peer, peak_of(roofs), bench.shape) for name, of_peer in runs.items()}
    work = dict(rows=len(reference["lengths"]), tokens=sum(reference["lengths"]), max_length=MAX_LENGTH, batch=BATCH,
        rank=RANK, shape=bench.shape)
    keep(asked.results, kind, facts(asked) | work | dict(roofs=roofs, peers=found, failures=failures))


def grow(asked, bench):
    "One quantity after the other, kept"
    def kept(found, failures): keep(asked.results, "scaling", facts(asked) | dict(shape=bench.shape, quantities=found, failures=failures))
    kept(*scaling(bench, asked.peers, asked.scaling or QUANTITIES, Clock(asked.minutes), kept))


def facts(asked): return dict(date=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine(), threads=asked.threads)


def work_folder():
    "A folder for models, rows and LLaMA-Factory's environment that outlives a run"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home()/".cache")/"sage_finetune_benchmarks"


def options(arguments=None):
    "What the command line asks for, with what it leaves open filled in"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--rows", type=int, help="rows of the comparison: else 24, and 12 in --short and --tune")
    parser.add_argument("--rounds", type=int, help="runs of each peer, alternating: else 3, and 1 in --tune")
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end by then: else 8 in --short and 20 in --scaling")
    parser.add_argument("--short", action="store_true", help="12 rows, the quicker variants, eight minutes")
    parser.add_argument("--scaling", nargs="*", choices=QUANTITIES,
        help=f"how cost grows with: {', '.join(QUANTITIES)}; by itself with all of them")
    parser.add_argument("--tune", action="store_true", help="settings of the others beside each other, on a model of four layers")
    parser.add_argument("--show", action="store_true", help="measure nothing; tables and pictures of what is kept")
    parser.add_argument("--write-readme", action="store_true", help="put the tables between their marks in benchmarks/README.md")
    parser.add_argument("--layers", type=int, help="layers of the model: else 24, and 4 in --scaling and --tune")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--work", type=Path, default=work_folder(), help="where models and environments are kept (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE/"results")
    return settled(parser.parse_args(arguments))


def settled(asked):
    "Fill in what depends on the kind of measurement"
    small, grows = asked.tune or asked.short, asked.scaling is not None
    asked.layers = asked.layers or (4 if asked.tune or grows else SHAPE["num_hidden_layers"])
    asked.rows, asked.rounds = asked.rows or (12 if small else 24), asked.rounds or (1 if asked.tune else 3)
    asked.minutes = asked.minutes or (20 if grows else 8 if asked.short else None)
    usual = TUNED if asked.tune else ["ours"] if grows else SHORT if asked.short else USUAL
    asked.peers = [name for names in asked.peers for name in (names.split(",") if "{" not in names else [names])] if asked.peers else usual
    for name in asked.peers: described(name)
    return asked


def main(arguments=None):
    "Measure what is asked for, and show it"
    asked = options(arguments)
    bench, kind = Bench(asked.work, asked.threads, asked.layers), "tune" if asked.tune else "train" if asked.scaling is None else "scaling"
    if not asked.show: grow(asked, bench) if kind == "scaling" else compare(asked, bench, kind)
    for one in (KINDS if asked.show else [kind]): show(asked.results, one, HERE/"README.md" if asked.write_readme else None)


if __name__ == "__main__": main()
