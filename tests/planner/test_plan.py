"""Plans against closed forms, against each other, and through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

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
    assert activations[1] < 0.4 * activations[0]
    assert kept.binds == "memory"
    # 16 GPUs of a stage hold one copy of the dense parameters each, and a sixteenth of the experts.
    total = sum(stage.dense_parameters + 16 * stage.expert_parameters for stage in again.stages)
    assert total == 1_026_408_232_448


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
    done = run(*flags)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_lists_the_fastest_that_fits_first() -> None:
    done = run("--gpus", "256", "--pp", "16", "--ep", "16", "--microbatches", "16", "--sweep", "vpp=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulated, fastest first; * does not fit")
    assert len(done.stdout.strip().splitlines()) == 4
