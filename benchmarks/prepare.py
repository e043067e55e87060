"""How long data preparation takes, how much memory, beside TRL's preparation of the same rows.

    python benchmarks/prepare.py                 50,000 rows, medians of three alternating runs; about five minutes
    python benchmarks/prepare.py --million       the memory for 100,000 and for 1,000,000 rows as well; ten minutes more
    python benchmarks/prepare.py --rows 5000 --runs 1   a quick look

Every measurement is a fresh process on the same cores:
imports and the making of the rows are over when its clock starts. Ours begins at the
.jsonl file of alpaca rows and ends with packed examples of 1,024 tokens whose arrays lie on disk;
TRL begins at a `datasets.Dataset` that has its
own form already (prompt and completion, or messages and a template with generation marks),
which costs it nothing here, and ends with its packed
data set. The tokenizer is the packaged model's: byte-level BPE, cut like Qwen2's, with a vocabulary of 1,536.
Prints a Markdown table and writes
benchmarks/results/prepare.json.
"""
import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent/"results"/"prepare.json"
MAX_LENGTH = 1024
GENERATION_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- endif %}")
KINDS = {"ours": "sage_finetune", "ours_cached": "sage_finetune, second start from the cache",
         "trl_prompt": "TRL, prompt and completion", "trl_prompt_2": "TRL, prompt and completion, dataset_num_proc=2",
         "trl_messages": "TRL, messages, assistant_only_loss", "trl_messages_2": "TRL, messages, assistant_only_loss, dataset_num_proc=2"}


def write_rows(path, count, seed=0):
    """Alpaca rows: instructions of 8 to 40 words, answers of 5 to 200 words, log-normal around 45;
    the words are those of the packaged example"""
    words = sorted(set("".join(letter if letter.isalpha() else " "
        for letter in (ROOT/"sage_finetune"/"examples"/"example.jsonl").read_text(encoding="utf-8")).lower().split()))
    rng = random.Random(seed)
    def text(length): return " ".join(rng.choices(words, k=length)).capitalize() + "."
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            answer = max(5, min(200, round(rng.lognormvariate(3.8, 0.7))))
            file.write(json.dumps(dict(instruction=text(rng.randint(8, 40)), output=text(answer))) + "\n")
    return path


# ---- one measurement, in a process of its own -------------------------------------------------------------------------

def memory(which):
    "Memory of this process in MiB: VmRSS now, VmHWM at its highest"
    try: lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def measured(work):
    "Run `work`, which returns (tokens, packs); seconds and peak memory above what there was before"
    Path("/proc/self/clear_refs").write_text("5") if Path("/proc/self/clear_refs").exists() else None  # the highest so far starts anew
    before, busy, began, worked = memory("VmRSS"), machine_seconds(), time.perf_counter(), processor_seconds()
    tokens, packs = work()
    seconds, own = time.perf_counter() - began, processor_seconds() - worked
    return dict(seconds=seconds, processor_seconds=own, others=max(0, machine_seconds() - busy - own) / (seconds * os.cpu_count()),
        tokens=tokens, packs=packs, peak_mib=memory("VmHWM") - before, before_mib=before)


def processor_seconds():
    "Work of all cores for this process and the processes it started and that have ended"
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def machine_seconds():
    "Work of all cores for everybody, so far; 0 where that cannot be known"
    try: fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    except OSError: return 0
    return sum(int(fields[at]) for at in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def ours(rows, cache=None):
    from transformers import AutoTokenizer

    from sage_finetune.config import tiny_path
    from sage_finetune.data.dataset import prepare
    from sage_finetune.training.batches import pack
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    def work():
        train, before_packing["peak"] = prepare(rows, tokenizer, max_length=MAX_LENGTH, cache_dir=cache, show=False).train, memory("VmHWM")
        return train.report.tokens, len(pack(train["length"][:], MAX_LENGTH))
    before_packing = {}
    found = measured(work)
    return found | dict(peak_mib_before_packing=before_packing["peak"] - found["before_mib"])


def trl(rows, messages=False, processes=None):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sage_finetune.config import tiny_path
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    if messages: tokenizer.chat_template = GENERATION_TEMPLATE
    def form(line):
        row = json.loads(line)
        asked, told = dict(role="user", content=row["instruction"]), dict(role="assistant", content=row["output"])
        return dict(messages=[asked, told]) if messages else dict(prompt=[asked], completion=[told])
    with open(rows, encoding="utf-8") as file: data = datasets.Dataset.from_list([form(line) for line in file])
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(output_dir=folder, packing=True, packing_strategy="bfd", max_length=MAX_LENGTH,
                           assistant_only_loss=messages, completion_only_loss=None if messages else True,
                           use_cpu=True, bf16=False, report_to=[])
        trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(tiny_path()), config, train_dataset=data.select(range(8)),
            processing_class=tokenizer)
        trainer.args.dataset_num_proc = processes
        def work():
            packed = trainer._prepare_dataset(data, tokenizer, trainer.args, True, None, "train")
            return sum(map(sum, packed["seq_lengths"])), len(packed)
        return measured(work)


def child(kind, rows, cache):
    "What a child process prints"
    if kind.startswith("trl"): found = trl(rows, "messages" in kind, 2 if kind.endswith("_2") else None)
    else: found = ours(rows, cache if kind == "ours_cached" else None)
    print("RESULT " + json.dumps(found))


def run(kind, rows, cache=None, attempts=6):
    """One measurement in a fresh process, made again when others had more than a tenth of the machine meanwhile;
    the least disturbed one counts"""
    found = []
    for _ in range(attempts):
        found.append(one_run(kind, rows, cache))
        if found[-1]["others"] < 0.1: break
        print(f"{KINDS[kind]}: {found[-1]['seconds']:.2f} s, but others had {found[-1]['others']:.0%} of the machine", file=sys.stderr)
        time.sleep(10)
    return min(found, key=lambda one: one["others"])


def one_run(kind, rows, cache=None):
    "One measurement in a fresh process"
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    asked = subprocess.run([sys.executable, __file__, "--child", kind, "--data", str(rows), *(["--cache", str(cache)] if cache else [])],
        env=environment, capture_output=True, text=True)
    lines = [line for line in asked.stdout.splitlines() if line.startswith("RESULT ")]
    if asked.returncode or not lines: sys.exit(f"{kind} ended with {asked.returncode}\n{asked.stdout}\n{asked.stderr}")
    return json.loads(lines[0][7:])


# ---- the whole comparison ---------------------------------------------------------------------------------------------

def summary(runs):
    "Medians of the runs of one kind"
    middle = {name: statistics.median(one[name] for one in runs)
        for name in ("seconds", "processor_seconds", "tokens", "packs", "peak_mib")}
    return middle | dict(tokens_per_second=middle["tokens"] / middle["seconds"], runs=runs)


def table(found):
    "The figures as Markdown"
    best = found["ours"]["tokens_per_second"]
    lines = ["| | seconds | tokens a second | ours is faster by | CPU seconds | peak memory above import |", "|---|--:|--:|--:|--:|--:|"]
    for kind, one in found.items():
        faster = "" if kind.startswith("ours") else f"{best / one['tokens_per_second']:.1f} ×"
        lines.append(f"| {KINDS[kind]} | {one['seconds']:.2f} | {one['tokens_per_second']:,.0f} | {faster} | "
            f"{one['processor_seconds']:.2f} | {one['peak_mib']:,.0f} MiB |")
    return "\n".join(lines)


def machine():
    "What it ran on"
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(date=str(datetime.now().astimezone().date()), processor=processor, cores=os.cpu_count(), python=platform.python_version(),
        versions={name: version(name) for name in ("transformers", "tokenizers", "datasets", "trl", "pyarrow")})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the comparison")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind, alternating")
    parser.add_argument("--million", action="store_true", help="also measure the memory for 100,000 and 1,000,000 rows")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS), help="some of the kinds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child: return child(asked.child, asked.data, asked.cache)
    with tempfile.TemporaryDirectory() as folder:
        rows, runs = write_rows(Path(folder)/"rows.jsonl", asked.rows), {kind: [] for kind in asked.only}
        if "ours_cached" in asked.only: run("ours_cached", rows, Path(folder)/"cache")  # fills the cache
        for number in range(asked.runs):
            for kind in asked.only:
                runs[kind].append(run(kind, rows, Path(folder)/"cache" if kind == "ours_cached" else None))
                print(f"run {number + 1}, {KINDS[kind]}: {runs[kind][-1]['seconds']:.2f} s", file=sys.stderr)
        found = {kind: summary(kind_runs) for kind, kind_runs in runs.items()}
        result = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | machine() | dict(max_length=MAX_LENGTH)
        if found: result |= dict(rows=asked.rows, kinds=found)
        if "ours" in found:
            print(f"\n{asked.rows:,} rows, {found['ours']['tokens']:,.0f} tokens; {result['cores']} cores\n\n{table(found)}")
        if asked.million:
            result["memory"] = {}
            for count in (100_000, 1_000_000):
                one = one_run("ours", write_rows(Path(folder)/"rows.jsonl", count))
                result["memory"][count] = one
                print(f"\n{count:,} rows: {one['peak_mib_before_packing']:,.0f} MiB above import, {one['peak_mib']:,.0f} "
                    f"MiB with the packing plan; {one['seconds']:.1f} s, {one['tokens'] / one['seconds']:,.0f} tokens a second")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
