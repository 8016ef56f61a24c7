"""Runs that are killed at random moments, while they save too, resume as if nothing had happened: 20 times a recipe.

Nightly. The kills land where a generator says, counted in seconds of the process; which step that is differs from
machine to machine, and must not matter.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k25sys.training.weights import load_model

STEPS, KILLS = 12, 20
FAST = {
    "pretrain": ["--set", "batch.sequences=4", "--set", "batch.sequence_length=320"],
    "vit": ["--set", "batch.sequences=4", "--set", "batch.sequence_length=320"],
    "vit-projector": ["--set", "batch.sequences=4", "--set", "batch.sequence_length=320"],
    "sft": ["--set", "batch.sequence_length=256"],
    "long_context": ["--set", "batch.sequence_length=640"],
}
EVERY = ["--set", "checkpoint.every=1", "--set", "report.progress=false"]  # so that many kills meet a save
ON_FOUR = ["--set", "grid.pipeline=2", "--set", "grid.expert=2", "--set", "vision.mode=dep"]


def start(recipe: str, folder: Path, ranks: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "k25sys"]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, "-m", "k25sys"]
    run = ["run", recipe, "--steps", str(STEPS), "--output", str(folder), "--resume", *FAST[recipe], *EVERY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *run, *(ON_FOUR if ranks > 1 else [])], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[bytes]") -> str:
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors.decode()[-2000:]
    return errors.decode()


def losses(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("recipe", list(FAST))
def test_a_run_that_is_killed_is_bitwise_the_whole_one(recipe: str, ranks: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(recipe, whole, ranks))
    expected = losses(whole)
    assert len(expected) == STEPS
    moments, kills, during_saves = random.Random(f"{recipe} {ranks}"), 0, 0
    rounds = 0
    while kills < KILLS:
        rounds += 1
        assert rounds < 10 * KILLS, f"{kills} kills in {rounds} rounds: the run ends before them"
        if len(losses(killed)) == STEPS:  # a run that has ended begins anew
            _check(killed, whole, expected)
            for path in sorted(killed.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        process = start(recipe, killed, ranks)
        try:
            process.communicate(timeout=moments.uniform(2.0, 2.0 + 1.5 * ranks + 6.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            during_saves += any((killed / "checkpoints").glob(".*unpublished*"))
        assert losses(killed) == expected[: len(losses(killed))]
    finish(start(recipe, killed, ranks))
    _check(killed, whole, expected)
    print(f"\n{recipe} on {ranks}: {kills} kills in {rounds} rounds, {during_saves} of them during a save: bitwise")


def _check(killed: Path, whole: Path, expected: list[float]) -> None:
    assert losses(killed) == expected
    folder = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = (dict(load_model(each / folder).named_parameters()) for each in (killed, whole))
    assert all(ours[name].equal(value) for name, value in theirs.items())
