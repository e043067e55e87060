"The benchmark for GPUs: its formulas, what it keeps and shows, and a real run on the CPU"
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1]/"benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu
from gpu_peers.card import published
from gpu_peers.common import TARGETS, no_room
from gpu_peers.work import (
    SHAPES,
    ShortOfDisk,
    attention_flops,
    check_disk,
    drawn_lengths,
    make_rows,
    model_config,
    parameters,
    training_flops,
)
from reference import adapter_size, row_lengths

# ---- formulas ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, billions, exactly",
    [("0.5B", "0.494", 494_032_768), ("1.5B", "1.54", 1_543_714_304), ("7B", "7.62", 7_615_616_512)])
def test_parameters_are_the_published_ones(name, billions, exactly):
    from transformers import Qwen2ForCausalLM
    with torch.device("meta"): model = Qwen2ForCausalLM(model_config(SHAPES[name]))
    assert parameters(SHAPES[name]) == exactly == model.num_parameters()
    assert f"{exactly / 1e9:.{len(billions) - 2}f}" == billions


def test_operations_are_those_torch_counts():
    "On a small model with eager attention; it computes whole squares, of which causal attention needs half"
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2ForCausalLM
    shape, tokens, rank = SHAPES["tiny"], 96, 4
    model = get_peft_model(Qwen2ForCausalLM._from_config(model_config(shape), attn_implementation="eager", dtype=torch.float32),
        LoraConfig(r=rank, target_modules=TARGETS))
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, labels=ids).loss.backward()
    hidden, narrow = shape["hidden_size"], shape["hidden_size"] // 2
    nobody_asks = 2 * tokens * (hidden * (hidden + 2 * narrow) + 3 * rank * hidden)  # the gradient towards what the first layer reads
    expected = training_flops(tokens, tokens, [tokens], rank, shape) + attention_flops([tokens], shape) - nobody_asks
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


def test_operations_grow_with_what_is_trained_on_and_with_length():
    shape = SHAPES["0.5B"]
    assert (training_flops(100, 60, [100], 8, shape) - training_flops(100, 50, [100], 8, shape)
        == 10 * 4 * shape["vocab_size"] * shape["hidden_size"])
    short, long = (training_flops(8192, 0, [length], 8, shape) for length in (1024, 2048))
    assert long - short == 6 * shape["num_hidden_layers"] * shape["hidden_size"] * 8192 * 1024


def test_peaks_are_found_by_name():
    found = {name: published(name)[0] for name in ("NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090")}
    assert list(found.values()) == [989.5, 835.5, 989.5, 756.5, 312., 121., 362.05, 165.2]
    assert [published(name) for name in ("Tesla T4", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti")] == [(None, None)] * 3


def run_of(**changes):
    "A run as it is kept: 10 tokens in the first step, then 1,000 a step, a second each"
    run = dict(shape="0.5B", method="lora", length=1024, rows="exact", peer="ours", round=1, card="NVIDIA H200",
               setup=dict(tokens=1000, steps=3, warm_up=1, rank=8), date="2026-01-01T00:00:00+00:00",
               outcome="ok", checkpointing=False, wall_seconds=20., steps=3, tokens=[10, 1000, 1000],
               target_tokens=[0, 900, 900], step_seconds=[9., 1., 1.], losses=[12.1, 12.], peak_mib=4096.,
               allocated_mib=2048., reserved_mib=3072., to_first_step=11., how=dict(checkpointing=False, attention="sdpa"),
               versions=dict(torch="2.13.0")) | changes
    if run["outcome"] == "ok": run |= gpu.figures(run, [1000], CALL)
    return run


CALL = dict(date="2026-01-01T00:00:00+00:00", python="3.11.7", card="NVIDIA H200", memory_mib=143_771., driver="580.1",
    cuda="13.0", published_tflops=989.5, published_source="a datasheet", measured_tflops=800.)


def test_warm_up_is_left_out():
    run = run_of()
    assert run["tokens_per_second"] == 1000
    assert run["mfu"] * 989.5e12 == pytest.approx(training_flops(1000, 900, [1000], 8, SHAPES["0.5B"]))
    assert run["of_measured_peak"] / run["mfu"] == pytest.approx(989.5 / 800)
    assert gpu.figures(run_of(), [1000], CALL | dict(published_tflops=None))["mfu"] is None


# ---- the rows ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["exact", "spread"])
def test_rows_are_as_long_as_drawn(tmp_path, kind):
    path = make_rows(tmp_path, kind, 256, 4000)
    lengths = json.loads(path.with_suffix(".json").read_text())
    assert row_lengths(path) == lengths
    assert 4000 <= sum(lengths) < 4000 + 256 and (set(lengths) == {256}) == (kind == "exact") and max(lengths) <= 256
    made = path.stat().st_mtime_ns
    assert make_rows(tmp_path, kind, 256, 4000) == path and path.stat().st_mtime_ns == made


def test_spread_lengths_lie_around_a_quarter():
    lengths = drawn_lengths(random.Random(0), "spread", 4096, 3_000_000)
    assert 900 < statistics.median(lengths) < 1150 and max(lengths) == 4096 and min(lengths) < 200


# ---- what can go wrong ------------------------------------------------------------------------------------------------

def peer(program):
    "A program run as a peer, by its own process"
    code = f"from gpu_peers.common import told\nimport torch\ndef program(job): {program}\ntold(program)"
    return subprocess.run([sys.executable, "-c", code, json.dumps(dict(folder="f", rows="r", device="cpu"))],
        cwd=BENCHMARKS, capture_output=True, text=True)


def test_running_out_of_memory_is_a_result():
    ended = peer("torch.empty(2**55)")
    assert gpu.outcome(ended.returncode, ended.stdout.splitlines())["outcome"] == "out of memory"
    ended = peer("1 / 0")
    result = gpu.outcome(ended.returncode, ended.stderr.splitlines())
    assert result["outcome"] == "failed" and "ZeroDivisionError" in result["said"]
    assert gpu.outcome(-9, [])["outcome"] == "out of memory"


def test_memory_errors_behind_others_are_found():
    try:
        try: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        except RuntimeError as error: raise ValueError("training stopped") from error
    except ValueError as error: assert no_room(error)
    assert not no_room(ValueError("training stopped"))


def test_a_full_disk_is_said_before_a_model_is_made(tmp_path):
    with pytest.raises(ShortOfDisk, match="take 1000000.0 GB .* --work names another folder"): check_disk(tmp_path/"not"/"yet", 1e15)
    check_disk(tmp_path, 1)


def test_without_a_gpu_one_sentence():
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    ended = subprocess.run([sys.executable, BENCHMARKS/"gpu.py"], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("There is no CUDA GPU here") and len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments, complaint", [
    (["--tokens", "1024", "--lengths", "4096"], "--tokens must be at least"),
    (["--steps", "5", "--warm-up", "5"], "--steps must be more than --warm-up"), (["--lengths", "64"], "128 or more"),
    (["--peers", "axolotl"], "there is no peer 'axolotl'"), (["--peers", "ours:packing"], "settings follow as")])
def test_arguments_that_cannot_be_meant(capsys, arguments, complaint):
    with pytest.raises(SystemExit): gpu.options(arguments)
    assert complaint in capsys.readouterr().err


# ---- what is kept and shown -------------------------------------------------------------------------------------------

def test_runs_are_made_once():
    case = gpu.Case("0.5B", "lora", 1024, "exact", "ours", 1)
    second = case._replace(round=2)
    assert gpu.finished(case, [run_of()]) and not gpu.finished(second, [run_of()])
    assert not gpu.finished(case, [run_of(outcome="failed", said="x")]) and not gpu.finished(case, [run_of(length=2048)])
    assert gpu.finished(second, [run_of(outcome="out of memory", said="x")])


def test_rounds_come_one_after_the_other_and_peers_take_turns():
    asked = gpu.options(["--shapes", "0.5B", "--methods", "lora", "--lengths", "1024", "--peers", "ours", "trl", "--rounds", "2"])
    assert [(case.round, case.rows, case.peer) for case in gpu.cases(asked)] == [(number, rows, name) for number in (1, 2)
        for rows in ("spread", "exact") for name in ("ours", "trl")]


def test_settings_behind_a_colon():
    assert gpu.described("ours-compiled:engine=plain+max_grad_norm=2") == ("sage_finetune, compiled, engine=plain+max_grad_norm=2",
        "ours", dict(set=dict(torch_compile=True, engine="plain", max_grad_norm=2)))


def kept_runs():
    "Three rounds of ours, TRL in two ways, Unsloth without room"
    ours = [run_of(round=number, step_seconds=[9., seconds, seconds]) for number, seconds in ((1, 1.), (2, 0.5), (3, 4.))]
    trl = [run_of(peer="trl", step_seconds=[9., 2., 2.]), run_of(peer="trl-padded", step_seconds=[9., 8., 8.])]
    return [*ours, *trl, run_of(peer="unsloth", outcome="out of memory", said="x", checkpointing=True)]


def test_table_shows_medians_ratios_and_missing_memory():
    ours, trl, padded, unsloth = gpu.table(kept_runs()).splitlines()[2:]
    assert "| sage_finetune | 1,000 (2.00 ×) |" in ours and "| 2.00 GiB (1.00 ×) | 3.00 GiB | 11.0 s | off | 3 |" in ours
    assert "| 500 (1.00 ×) |" in trl and "| 125 (0.25 ×) |" in padded
    assert "| Unsloth, packed | out of memory | | | | | | on | 1 |" in unsloth
    assert len({line.count("|") for line in gpu.table(kept_runs()).splitlines()}) == 1


def test_page_and_picture(tmp_path):
    page, content = tmp_path/"GPU.md", dict(calls=[CALL], runs=kept_runs())
    page.write_text(f"# Before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n")
    gpu.write_page(gpu.report(content, {"unsloth": "it is not installed"}), page)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "old" not in text
    assert ("2026-01-01; NVIDIA H200, 140 GiB, driver 580.1, CUDA 13.0; published bf16 peak 989.5 TFLOP/s (a datasheet)" in text
        and "torch 2.13.0" in text)
    assert "Unsloth, packed is missing: it is not installed." in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="to write between"): gpu.write_page("x", page)
    gpu.picture(kept_runs(), tmp_path/"gpu.png")
    assert (tmp_path/"gpu.png").read_bytes().startswith(b"\x89PNG")


def test_kept_runs_replace_themselves(tmp_path):
    kept = gpu.Kept(tmp_path)
    for run in (run_of(), run_of(round=2), run_of(wall_seconds=5.)): kept.add(run, CALL)
    again = gpu.Kept(tmp_path).content
    assert [(run["round"], run["wall_seconds"]) for run in again["runs"]] == [(2, 20.), (1, 5.)] and again["calls"] == [CALL]


def test_the_page_has_its_marks():
    text = (BENCHMARKS/"GPU.md").read_text(encoding="utf-8")
    assert text.count(gpu.BEGIN) == text.count(gpu.END) == 1


# ---- a real run -------------------------------------------------------------------------------------------------------

def bench(folder, *arguments, **options):
    "The benchmark on the CPU with a tiny model"
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, BENCHMARKS/"gpu.py", "--device", "cpu", "--tiny", "--threads", "1", "--lengths", "256",
        "--work", folder, "--page", folder/"GPU.md", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)


@pytest.mark.full
def test_real_runs_on_the_cpu(tmp_path):
    (tmp_path/"GPU.md").write_text(f"{gpu.BEGIN}\n{gpu.END}\n")
    some = ("--peers", "ours", "trl", "unsloth", "--methods", "lora")
    nothing = bench(tmp_path, *some, "--budget", "1")
    assert nothing.returncode == 1 and "there was no time for a single run" in nothing.stderr and not (tmp_path/"gpu.json").exists()
    first = bench(tmp_path, *some, "--rows", "exact", "--write")
    assert first.returncode == 0, first.stderr
    made = {run["peer"]: run for run in json.loads((tmp_path/"gpu.json").read_text())["runs"]}
    assert set(made) == {"ours", "trl"}
    for run in made.values():
        assert run["outcome"] == "ok" and not list(gpu.doubts(run)), run
        assert (run["tokens"] == [1024] * 4 and all(0 < target_tokens < 1024 for target_tokens in run["target_tokens"])
            and run["tokens_per_second"] > 0 and run["of_measured_peak"] > 0)
    assert {run["trained"] for run in made.values()} == {adapter_size(8, SHAPES["tiny"])}
    assert ("Unsloth, packed is missing: it runs on a GPU alone." in first.stdout
        and first.stdout.strip() in (tmp_path/"GPU.md").read_text() and (tmp_path/"gpu.png").exists())
    second = bench(tmp_path, *some, "--rows", "exact", "spread")
    runs = json.loads((tmp_path/"gpu.json").read_text())["runs"]
    assert (second.returncode == 0 and [run["wall_seconds"] for run in runs[:2]] == [run["wall_seconds"] for run in made.values()]
        and [run["rows"] for run in runs] == ["exact"] * 2 + ["spread"] * 2)


@pytest.mark.full
def test_four_bits_and_a_peer_that_is_too_slow(tmp_path):
    some = ("--peers", "trl", "--methods", "qlora", "--rows", "exact")
    ended = bench(tmp_path, *some)
    assert ended.returncode == 0 and "| tiny | qlora | exact | 256 | TRL, packed |" in ended.stdout and "failed" not in ended.stdout
    slow = bench(tmp_path, *some, "--limit", "2", "--again")
    assert slow.returncode == 0 and "| TRL, packed | too slow |" in slow.stdout


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_peer_that_runs_out_of_memory_is_tried_with_checkpointing_and_kept(tmp_path):
    import resource
    limited = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2_000_000_000,) * 2))
    # its mask takes 4 GiB
    some = ("--peers", "trl", "--methods", "lora", "--rows", "exact", "--lengths", "1024", "--tokens", "65536", "--steps", "2")
    ended = bench(tmp_path, *some, **limited)
    assert ended.returncode == 0 and "again with gradient checkpointing" in ended.stderr, ended.stderr
    assert "| tiny | lora | exact | 1,024 | TRL, packed | out of memory | | | | | | on | 1 |" in ended.stdout
    assert "again with" not in bench(tmp_path, *some, "--rounds", "2", **limited).stderr
