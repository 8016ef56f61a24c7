"""Plans against closed forms, against each other, and through the command line."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from k25sys.errors import ArgumentValueError
from k25sys.models.presets import preset
from k25sys.planner import command
from k25sys.planner.arguments import add_plan_arguments
from k25sys.planner.memory import E4M3_BYTES, RECOMPUTE, saved_bytes
from k25sys.planner.plan import make_plan
from k25sys.planner.request import PlanRequest


@pytest.mark.parametrize(
    ("schedule", "vpp", "bubble"),
    [
        ("gpipe", 1, 15 / 143),
        ("1f1b", 1, 15 / 143),
        ("interleaved_1f1b", 2, 15 / 271),
        ("interleaved_1f1b", 3, 15 / 399),
        ("zb_h1", 1, 15 / (3 * 128 + 15)),
    ],
)
def test_uniform_bubbles_are_the_closed_forms(schedule: str, vpp: int, bubble: float) -> None:
    plan = make_plan(PlanRequest(gpus=256, pp=16, vpp=vpp, ep=16, schedule=schedule, uniform=True))
    assert plan.bubble == pytest.approx(bubble, abs=5e-5)


def k25(**changes) -> PlanRequest:
    return PlanRequest(**{"gpus": 512, "pp": 16, "vpp": 2, "ep": 16, "microbatches": 32, **changes})


def test_decoupling_keeps_what_the_report_claims() -> None:
    plan = make_plan(k25(microbatches=128, vision="dep", vision_share=0.28, video_share=0.2))
    assert plan.token_share == pytest.approx(0.28, abs=0.02)
    assert plan.efficiency_vs_text >= 0.90
    assert plan.dep is not None
    assert plan.efficiency_vs_text <= plan.dep.ceiling
    assert plan.dep.max_over_mean <= 1.02 * plan.dep.lower_bound


def test_memory_adds_up_and_recomputation_saves() -> None:
    kept, again = make_plan(k25(recompute="none")), make_plan(k25())
    for stage in (*kept.stages, *again.stages):
        assert stage.memory.weights == 2 * (stage.dense_parameters + stage.expert_parameters)
    activations = [sum(stage.memory.activations for stage in plan.stages) for plan in (kept, again)]
    # What comes home from experts on other ranks, a quarter of all, is kept either way.
    assert activations[1] < 0.6 * activations[0]
    assert kept.binds == "memory"
    # 16 GPUs of a stage hold one copy of the dense parameters each, and a sixteenth of the experts.
    total = sum(stage.dense_parameters + 16 * stage.expert_parameters for stage in again.stages)
    assert total == 1_026_408_232_448


def test_what_an_exchange_brought_home_is_kept_whatever_is_recomputed() -> None:
    text = preset("k25").text
    rows = 8 * 7168
    for recompute in RECOMPUTE:
        alone, shared = (saved_bytes(text, 1, recompute, ep=ep) for ep in (1, 16))
        stored = E4M3_BYTES if recompute == "selective" else 2
        assert shared.pop("returned rows") == 2 * rows
        assert shared.pop("expert inputs") == stored * rows
        assert alone.pop("expert inputs", 0) == (stored * 7168 if recompute == "selective" else 0)
        assert alone == shared
        assert saved_bytes(text, 0, recompute, ep=1) == saved_bytes(text, 0, recompute, ep=16)
    assert any("come home" in line for line in make_plan(k25(microbatches=16)).assumptions)


def test_plans_hold_what_their_expert_parallelism_keeps() -> None:
    text, held = preset("tiny").text, {}
    for ep in (1, 2):
        plan = make_plan(PlanRequest(preset="tiny", gpus=2, ep=ep, sequence=64, schedule="1f1b"))
        layers = [saved_bytes(text, index, "selective", ep=ep) for index in range(text.num_hidden_layers)]
        held[ep] = plan.stages[0].memory.activations
        assert held[ep] == pytest.approx(64 * sum(sum(layer.values()) for layer in layers))
    assert held[2] > held[1]


@pytest.mark.parametrize(
    ("changes", "advised"),
    [
        ({"pp": 16, "vpp": 2}, "more --microbatches, or --vpp 3"),
        ({"pp": 16, "vpp": 3}, "more --microbatches"),
        ({"pp": 16, "vpp": 1, "schedule": "1f1b"}, "more --microbatches, or --schedule interleaved_1f1b with --vpp 2"),
        ({"pp": 32, "vpp": 1, "schedule": "1f1b"}, "more --microbatches"),
        ({"pp": 32, "vpp": 1, "schedule": "gpipe"}, "more --microbatches, or --schedule zb_h1"),
        ({"pp": 16, "vpp": 1, "schedule": "zb_h1"}, "more --microbatches"),
    ],
)
def test_advice_on_bubbles_differs_from_the_request_and_fits_the_layers(changes: dict, advised: str) -> None:
    plan = make_plan(k25(microbatches=16, **changes))
    assert [line.split(": ")[1] for line in plan.advice if line.startswith("bubble")] == [advised]


def test_a_draw_that_misses_the_share_says_so() -> None:
    tiny = PlanRequest(preset="tiny", gpus=8, pp=2, microbatches=8, vision="dep", vision_share=0.3, sequence=64)
    line = "drawn media are 0% of the tokens, 30% were asked for: longer sequences or more micro-batches"
    assert line in make_plan(tiny).advice
    met = make_plan(k25(microbatches=128, vision="dep", vision_share=0.28, video_share=0.2))
    assert not any(line.startswith("drawn media") for line in met.advice)


def test_assumptions_say_what_is_not_modelled() -> None:
    plain, dep = make_plan(k25(vision_share=0.2)), make_plan(k25(vision="dep", vision_share=0.2))
    unused = "--vision none: --vision-share has no effect"
    assert unused in plain.assumptions
    assert unused not in dep.assumptions
    assert unused in make_plan(k25(vision_share=0.2, uniform=True)).assumptions
    assert any("loaded and decoded twice, which is not charged" in line for line in dep.assumptions)
    assert any("behind shared experts and weight gradients alone" in line for line in plain.assumptions)
    exposed = make_plan(k25(schedule="1f1b", vpp=1))
    assert "all-to-alls in bf16, exposed" in exposed.assumptions


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "--calibration: got "),
        ("[1]", "a list, accepted a JSON object"),
        ('{"peak_flop": 1e15}', "--calibration: got a field 'peak_flop', accepted attention_efficiency, "),
        ('{"peak_flops": "1e15"}', "--calibration peak_flops: got '1e15', accepted a finite number > 0"),
        ('{"peak_flops": true}', "--calibration peak_flops: got True"),
        ('{"peak_flops": Infinity}', "--calibration peak_flops: got inf"),
        ('{"gemm_efficiency": 1.5}', "--calibration gemm_efficiency: got 1.5, accepted a share of (0, 1]"),
        ('{"gpus_per_node": 7.5}', "--calibration gpus_per_node: got 7.5, accepted an int >= 1"),
        ('{"name": "mine"}', "--calibration: got a field 'name'"),
    ],
)
def test_a_wrong_calibration_names_the_flag(text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(text)
    with pytest.raises(ArgumentValueError, match=re.escape(error)):
        command.run(parsed("--gpus", "8", "--calibration", str(file)))


def test_a_calibration_replaces_numbers(tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text('{"memory_bytes": 9e10}')
    flags = ("--preset", "tiny", "--gpus", "8", "--sequence", "64")
    assert "90 GB at" in command.run(parsed(*flags, "--calibration", str(tmp_path / "measured.json")))


def test_a_sweep_goes_on_past_impossible_runs(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    flags = ("--preset", "tiny", "--gpus", "8", "--microbatches", "8", "--sequence", "64", "--json", str(file))
    # --pp 64 alone is impossible: only swept values count.
    found = command.run(parsed(*flags, "--pp", "64", "--sweep", "pp=1,3,2", "--sweep", "schedule=1f1b,none"))
    lines = found.splitlines()[2:]
    assert len(lines) == 6
    assert [line.startswith("  refused: ") for line in lines] == [False] * 2 + [True] * 4
    assert "--gpus: got 8, accepted a multiple of pp x tp x cp = 3  pp=3" in lines[3]
    rows = json.loads(file.read_text())
    assert [set(row) >= {"request", "refused"} for row in rows] == [False] * 2 + [True] * 4
    assert rows[2]["request"]["schedule"] == "none"


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    return parser.parse_args(flags)


def test_more_vision_costs_more_and_dep_never_more_than_its_ceiling() -> None:
    shares = [0.0, 0.1, 0.3, 0.6]
    plans = [make_plan(k25(vision="dep", vision_share=share)) for share in shares]
    found = [plan.efficiency_vs_text for plan in plans]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "k25sys", "plan", *flags], capture_output=True, text=True, timeout=120)


def test_the_command_writes_what_it_was_asked_for(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("plan.json", "plan.svg", "plan.perfetto")}
    done = run(
        "--preset", "k25", "--gpus", "256", "--pp", "16", "--ep", "16", "--microbatches", "16", "--schedule", "1f1b",
        "--vision", "dep", "--vision-share", "0.1", "--json", files["plan.json"], "--svg", files["plan.svg"],
        "--perfetto", files["plan.perfetto"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulated: k25 on 256 h800")
    written = json.loads(Path(files["plan.json"]).read_text())
    assert written["label"] == "simulated"
    assert len(written["stages"]) == 16
    assert set(written["stages"][0]["memory"]) >= {"weights", "gradients", "optimizer", "activations", "total"}
    assert set(written["dep"]) == {"vision_forward_share", "ceiling", "max_over_mean", "lower_bound"}
    ElementTree.parse(files["plan.svg"])
    json.loads(Path(files["plan.perfetto"]).read_text())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gpus", "250", "--pp", "16"], "--gpus: got 250, accepted a multiple of pp x tp x cp = 16"),
        (["--gpus", "256", "--pp", "16", "--ep", "24"], "--ep: got 24, accepted a divisor of the 16 GPUs"),
        (["--gpus", "8", "--schedule", "1f2b"], "'1f2b', accepted gpipe, 1f1b, interleaved_1f1b, zb_h1"),
        (["--gpus", "8", "--hardware", "a100"], "--hardware: got 'a100', accepted h100, h800, h200"),
        (["--gpus", "128", "--pp", "64"], "--pp x --vpp: got 64 x 1 = 64 stages, accepted up to 61"),
        (["--gpus", "8", "--sweep", "gpus=1,2"], "--sweep: got 'gpus=1,2'"),
        (["--gpus", "8", "--sweep", "ep=1", "--sweep", "ep=2"], "--sweep: got ep a second time"),
        (["--gpus", "8", "--sweep", "ep=1", "--svg", "x.svg"], "--svg: got a file beside --sweep"),
        (["--gpus", "8", "--sweep", "ep=3,5"], "2 impossible runs, accepted a possible one among them; the first is"),
        (["--gpus", "8", "--seed", "-1"], "--seed: got -1, accepted an int >= 0"),
        (["--gpus", "8", "--uniform", "--vision", "dep"], "--vision: got 'dep', accepted none with --uniform"),
    ],
)
def test_impossible_runs_name_the_flag(flags: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        command.run(parsed(*flags))


def test_an_impossible_run_fails_the_command_without_a_traceback() -> None:
    done = run("--gpus", "250", "--pp", "16")
    assert done.returncode == 1
    assert "--gpus: got 250, accepted a multiple of pp x tp x cp = 16" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_lists_the_fastest_that_fits_first() -> None:
    done = run("--gpus", "256", "--pp", "16", "--ep", "16", "--microbatches", "16", "--sweep", "vpp=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulated, fastest first; * does not fit")
    assert len(done.stdout.strip().splitlines()) == 4
