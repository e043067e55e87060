"The benchmark of training: its formulas and medians, what it doubts, what it shows, and a real run of a small model"
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1]/"benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import panels
import train
from peers.common import Watch, peak_memory, value_of
from reference import SHAPE, adapter_size, flops, make_rows, row_lengths

from sage_finetune.modeling.packed_weights import cpu_can_pack

SMALL = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=512)


def run(tokens=(100, 100, 100), seconds=(2., 1., 1.), **changes):
    "A run that nobody would doubt, and what is to be different in it"
    losses = [11.9 - 0.1 * step for step in range(len(tokens))]
    usual = dict(steps=len(tokens), tokens=list(tokens), target_tokens=[count // 2 for count in tokens],
                 step_seconds=list(seconds), seconds=sum(seconds), losses=losses,
                 cpu_seconds=sum(seconds), peak_mib=2048., to_first_step=9., compile_seconds=0., others=0.,
                 trained=adapter_size(), settings={}, doubts=[],
                 versions=dict(torch="2.13.0"))
    return usual | changes


def result(**peers):
    "What is kept of a comparison of such runs"
    found = {name.replace("_", "-"): train.summary(runs, 1.) for name, runs in peers.items()}
    machine = dict(processor="a CPU", formats=["amx_bf16"])
    return dict(date="2026-11-21T00:00:00", machine=machine, threads=2, rows=8, tokens=300, shape=SHAPE,
        roofs=[dict(bf16=1., fp32=.2)], peers=found, failures={})


# ---- formulas ---------------------------------------------------------------------------------------------------------

def small_model(rank):
    "A model of the small shape with an adapter, in fp32"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL, tie_word_embeddings=True, max_position_embeddings=128, attn_implementation="eager")
    return get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


@pytest.mark.parametrize("rank", [4, 8])
def test_the_adapter_has_the_size_peft_gives_it(rank):
    target_tokens = sum(one.numel() for one in small_model(rank).parameters() if one.requires_grad)
    assert target_tokens == adapter_size(rank, SMALL)


def test_operations_are_those_torch_counts():
    "The linear layers alone: what attention adds is known and taken off; nothing flows below the first adapted layers' adapters"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    tokens, rank, model = 64, 8, small_model(8)
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, labels=ids).loss.backward()
    # scores and values, forward and twice backward
    attention = SMALL["num_hidden_layers"] * 3 * 2 * 2 * tokens * tokens * SMALL["hidden_size"]
    # the first layer's input needs no gradient
    saved = 2 * tokens * sum(one * other + rank * one for one, other in ((64, 64), (64, 32), (64, 32)))
    assert counter.get_total_flops() - attention == flops(tokens, tokens, rank, SMALL) - saved


def test_operations_grow_with_tokens_and_with_those_trained_on():
    assert flops(200, 100) == 2 * flops(100, 50)
    assert flops(100, 60) - flops(100, 50) == 10 * 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"]


# ---- figures and medians ----------------------------------------------------------------------------------------------

def test_speed_is_that_of_the_steps_behind_the_first():
    assert train.pace(run(tokens=(100, 100, 300), seconds=(9., 1., 3.))) == 100
    assert train.pace(run(tokens=(100,), seconds=(4.,))) == 25  # there is no other step


def test_where_something_was_compiled_the_last_half_counts():
    one = run(tokens=(100, 100, 100, 200), seconds=(30., 20., 1., 1.), compile_seconds=45.)
    assert train.pace(one) == 150
    assert train.pace(one | dict(compile_seconds=0.)) == pytest.approx(400 / 22)


def test_medians_are_taken_over_runs():
    found = train.summary([run(seconds=(2., step, step), peak_mib=memory) for step, memory in ((1., 1000), (2., 5000), (100., 2000))], 1.)
    assert (found["tokens_per_second"], found["peak_mib"], found["to_first_step"]) == (50, 2000, 9)
    assert found["with_first_step"] == 300 / 6
    assert len(found["runs"]) == 3


def test_share_of_the_peak():
    one = run()
    assert train.share(one, 2.) == pytest.approx(flops(200, 100) / 2 / 2e12)
    roofs = [dict(bf16=speed, fp32=.3) for speed in (1., 3., 2.)]
    assert train.peak_of(roofs) == 2
    assert train.peak_of([dict(bf16=.1, fp32=.3)]) == .3


def test_a_watch_adds_up_micro_batches():
    watch = Watch()
    watch.begin()
    for tokens, target_tokens in ((10, 4), (20, 5)): watch.read(tokens, target_tokens, 32)
    watch.step()
    watch.read(7, 3, 8)
    watch.step()
    assert (watch.tokens, watch.target_tokens, watch.area) == ([30, 7], [9, 3], [64, 8])
    assert len(watch.marks) == 3 and watch.first > 0


def test_peak_memory_is_of_this_process():
    assert 10 < peak_memory() < 100_000


@pytest.mark.parametrize("text, value", [("true", True), ("3", 3), ("1e-4", 1e-4), ("sdpa", "sdpa"),
    ('{"dtype":"bfloat16"}', dict(dtype="bfloat16"))])
def test_settings_are_json_or_text(text, value): assert value_of(text) == value


# ---- what it doubts ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, doubt", [
    (dict(tokens=[100, 100, 90]), "it read 290 tokens of the rows' 300"), (dict(trained=7), "its adapter has 7 parameters"),
    (dict(losses=[9., 9., 9.]), "its first loss is 9.00"),
    (dict(losses=[11.9, 13., 12.]), "its loss rose from 11.90 to 13.00"), (dict(others=.3), "others had 30% of the machine"),
    (dict(settings=dict(torch_compile=True)), "compiled nothing")])
def test_a_run_is_doubted(changes, doubt):
    reference = dict(lengths=[150, 150])
    assert not list(train.doubts(run(), reference))
    assert [doubt in said for said in train.doubts(run(**changes), reference)] == [True]


def test_processes_that_compile_are_nobody_else():
    assert not list(train.doubts(run(others=.4, compile_seconds=20.), dict(lengths=[150, 150])))


def test_two_passes_read_the_rows_twice():
    assert not list(train.doubts(run(), dict(lengths=[75, 75])))


# ---- what it shows ----------------------------------------------------------------------------------------------------

def test_ratios_are_to_the_fastest_of_trl():
    told = train.report(result(ours=[run(seconds=(1., .25, .25), peak_mib=1024)],
        trl_default=[run(seconds=(4., 4., 4.), peak_mib=512)], trl_rows=[run()]))
    assert "| sage_finetune | 400 (4.00 ×) | 200 | 1,024 MiB (0.50 ×) | 9.0 s (1.00 ×) |" in told
    assert "| TRL, defaults | 25 (0.25 ×) |" in told
    assert "× is beside TRL, bf16, row by row, TRL's fastest. TRL's least memory is 512 MiB (TRL, defaults)" in told


def test_what_is_missing_or_doubtful_is_said():
    kept = result(ours_compiled=[run(compile_seconds=40.), run(compile_seconds=44., doubts=["others had 30% of the machine meanwhile"])])
    told = train.report(kept | dict(failures=dict(llamafactory="pip failed\nand more")))
    assert "compiling took 42 s" in told
    assert "Doubtful: sage_finetune, compiled: others had 30% of the machine meanwhile." in told
    assert "LLaMA-Factory, packed is missing: pip failed\n" in told + "\n" and "and more" not in told


def test_a_page_is_filled_between_its_marks():
    page = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    assert train.filled(page, "results", "new") == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="no <!-- scaling -->"): train.filled(page, "scaling", "new")


def test_the_readme_has_a_place_for_every_table():
    page = (BENCHMARKS/"README.md").read_text(encoding="utf-8")
    for name in ("results", "scaling", "tune"): assert "\nnew\n" in train.filled(page, name, "new")


def test_every_peer_of_the_table_is_explained():
    page = (BENCHMARKS/"README.md").read_text(encoding="utf-8")
    assert [label for label in (train.described(name)[0] for name in train.USUAL) if f"| {label} |" not in page] == []


# ---- what it is told --------------------------------------------------------------------------------------------------

def test_settings_behind_a_colon_join_those_of_the_peer():
    assert train.described("ours-compiled:packing=false+seed=3")[1:] == ("ours",
        ["--passes", 2, "--set", "torch_compile=true", "packing=false", "seed=3"])
    with pytest.raises(SystemExit, match="there is no peer 'trl-quick'"): train.described("trl-quick")


def test_kinds_of_measurement_have_their_own_sizes():
    usual, short, grows, tune = (train.options(asked)
        for asked in ([], ["--short"], ["--scaling"], ["--tune", "--peers", "trl-rows,plain"]))
    assert (usual.rows, usual.rounds, usual.minutes, usual.layers) == (24, 3, None, 24)
    assert (short.rows, short.minutes, short.layers) == (12, 8, 24) and set(short.peers) < set(usual.peers) == set(train.USUAL)
    assert (grows.layers, grows.minutes, grows.peers) == (4, 20, ["ours"])
    assert (tune.layers, tune.peers) == (4, ["trl-rows", "plain"])


def test_lengths_batches_and_rows_scale_one_at_a_time():
    for what, values in train.QUANTITIES.items():
        for value in values:
            work, training = train.scaled(what, value)
            assert value in work + training, f"{what} {value} is asked of nobody"
            batch = training[training.index("--batch") + 1] if "--batch" in training else train.BATCH
            rows, steps = work[work.index("--rows") + 1], training[training.index("--steps") + 1]
            assert steps >= 3 and rows >= batch * min(steps, 3)  # enough rows for a step behind the first


def test_rows_have_the_lengths_they_are_said_to_have(tmp_path):
    path = make_rows(tmp_path, 12, 256)
    lengths = row_lengths(path)
    assert len(lengths) == 12 and max(lengths) <= 256 and max(lengths) > 2 * min(lengths)
    assert min(row_lengths(make_rows(tmp_path, 4, 256, exact=True))) > 256 * .8
    assert json.loads(path.with_suffix(".json").read_text()) == [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_expected_to_take_what_it_took_before():
    assert train.expected("ours", dict(ours=20., plain=60.)) == 20
    assert train.expected("trl-rows", dict(ours=20., plain=60.)) == 90
    assert train.expected("ours", {}) == 0
    assert 59 < train.Clock(1).left <= 60 and train.Clock().left == math.inf


# ---- a real run -------------------------------------------------------------------------------------------------------

def bench(folder, *arguments):
    "The benchmark as a child process; what it printed"
    command = [sys.executable, BENCHMARKS/"train.py", "--work", folder/"work", "--results", folder/"results", "--threads", "1", *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def kept_in(folder):
    kept, = map(json.loads, map(Path.read_text, (folder/"results").glob("train-*.json")))
    return kept


SMALL_WORK = ("--layers", 1, "--rows", 8, "--peers", "ours,plain")


@pytest.fixture(scope="module")
def two_peers(tmp_path_factory):
    "A comparison on a model of one layer: its folder, and what was printed"
    if not cpu_can_pack(): pytest.skip("without instructions for bf16 a product takes up to seventy times as long")
    folder = tmp_path_factory.mktemp("peers")
    return folder, bench(folder, *SMALL_WORK, "--rounds", 1)


@pytest.mark.slow
def test_two_peers_beside_each_other(two_peers):
    tmp_path, said = two_peers
    kept = kept_in(tmp_path)
    assert set(kept["peers"]) == {"ours", "plain"} and not kept["failures"]
    assert "| sage_finetune |" in said and "| transformers + PEFT |" in said
    assert (tmp_path/"results"/"train.png").read_bytes().startswith(b"\x89PNG")
    for one in kept["peers"].values():
        found, = one["runs"]
        assert sum(found["tokens"]) == pytest.approx(kept["tokens"], rel=.01) and found["steps"] == 2
        assert 0 < sum(found["target_tokens"]) < sum(found["tokens"])
        assert found["trained"] == adapter_size(8, kept["shape"])
        assert 11 < one["first_loss"] < 13
        assert 300 < one["peak_mib"] < 20_000 and 1 < one["to_first_step"] < 300
        assert one["to_first_step"] > found["step_seconds"][0]
        assert 0 < one["roofline_share"] < 1
    shown = bench(tmp_path, "--show")
    assert said.strip() in shown


@pytest.mark.slow
def test_nothing_begins_when_time_is_up(two_peers, tmp_path, capsys):
    "With the model, the rows and the roof of the comparison above"
    class Measured(train.Bench):
        def roofline(self): return kept_in(two_peers[0])["roofs"][0]
    places = ["--work", str(two_peers[0]/"work"), "--results", str(tmp_path/"results")]
    asked = train.options([*map(str, SMALL_WORK), "--minutes", "1e-9", "--threads", "1", *places])
    train.compare(asked, Measured(asked.work, asked.threads, asked.layers), "train")
    train.show(asked.results, "train")
    assert capsys.readouterr().out.splitlines() == ["ours: no time was left for it", "plain: no time was left for it"]
    assert kept_in(tmp_path)["peers"] == {}


def test_every_kind_of_processor_keeps_a_table_of_its_own(tmp_path, capsys):
    "The README shows them all, the newest first; the same CPU again replaces its own"
    result = json.loads(next((BENCHMARKS/"results").glob("train-intel*.json")).read_text())
    for processor, fastest, day in (("Intel(R) Xeon(R) Processor", "amx_bf16", 1), ("AMD EPYC", "avx512_bf16", 3),
            ("AMD EPYC", "avx512_bf16", 2), ("Neoverse", "", 4)):
        train.keep(tmp_path, "train", result | dict(date=f"2026-11-0{day}T00:00:00+00:00",
            machine=result["machine"] | dict(processor=processor, formats=["avx2", fastest] if fastest else [])))
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["train-amd-epyc-avx512_bf16.json",
        "train-intel-xeon-amx_bf16.json", "train-neoverse.json"]
    page = tmp_path/"README.md"
    page.write_text("<!-- results -->\n<!-- /results -->\n")
    train.show(tmp_path, "train", page)
    assert re.findall(r"2026-11-0(\d), (\w+)", page.read_text()) == [("4", "Neoverse"), ("2", "AMD"), ("1", "Intel")]


@pytest.mark.full
def test_how_cost_grows(tmp_path):
    said = bench(tmp_path, "--scaling", "rank", "--layers", 1)
    lines = json.loads((tmp_path/"results"/"scaling.json").read_text())["quantities"]["rank"]["ours"]
    assert [line["rank"] for line in lines] == list(train.QUANTITIES["rank"])
    sizes = [line["run"]["trained"] for line in lines]
    assert sizes == [sizes[0] * rank // 4 for rank in train.QUANTITIES["rank"]]
    assert "| 128 | sage_finetune |" in said
    assert (tmp_path/"results"/"scaling.png").read_bytes().startswith(b"\x89PNG")


# ---- panels -----------------------------------------------------------------------------------------------------------

def test_what_a_redraw_costs_and_the_tables_that_tell():
    "A real drawing in a process of its own; medians, the highest, and the slowdown of what takes turns"
    found = panels.child("redraw 200", BENCHMARKS)
    assert len(found["same"]) == len(found["other"]) == 15 and all(took > 0 for took in found["same"] + found["other"])
    runs = dict(alone=[dict(steps_per_second=speed, kernel=0.) for speed in (2., 4., 9.)],
        shown=[dict(steps_per_second=3., kernel=share) for share in (0.01, 0.02, 0.05)])
    heard = dict(tokens=17, reads=0.25, milliseconds=[1., 2., 30.])
    told = panels.report(dict(date="2026-11-21T00:00:00", machine=dict(processor="a CPU"), threads=2, torch="2.13.0",
                              ipywidgets="8.1.9", redraw={"200": found}, watch={"12": runs},
                              stop=dict(dtype="bfloat16", threads=2, answer=heard, short=heard, long=heard),
                              memory=dict(grown={"36000": 1.5, "72000": 0.5})))
    assert ("| 12 | 4.0 | 3.0 | -25.0% | 0.0% | 2.0% |" in told and "| 17 | 0.2 s | 2 (30) |" in told
        and "72,000 steps: at most 1.5 MiB" in told and f"({max(found['other']):.0f}) |" in told)


def test_memory_is_looked_at_every_half_hour():
    "Half an hour of a run, in this process"
    assert list(panels.memory(hours=0.5, at_once=4000)["grown"]) == [36_000]
