"""Runs that are killed at random moments, while they save too, resume as if nothing had happened: 20 times a recipe.

Nightly. A generator says what each kill is aimed at: any moment, while the run starts too; within some step; or a save,
which is when the folder of an unfinished one is there. Where it lands differs from machine to machine, and must not
matter.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
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


MARK = "K25SYS_TEST_RUN"


class Run:
    """A run in processes of its own."""

    def __init__(self, recipe: str, folder: Path, ranks: int) -> None:
        command = [sys.executable, "-m", "k25sys"]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *torchrun, "-m", "k25sys"]
        options = ["run", recipe, "--steps", str(STEPS), "--output", str(folder), "--resume", *FAST[recipe], *EVERY]
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.errors = folder.parent / "errors.txt"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *options, *(ON_FOUR if ranks > 1 else [])],
                env={**os.environ, "OMP_NUM_THREADS": "1", name: value}, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        try:
            assert self.process.wait(timeout=500) == 0, self.errors.read_text()[-2000:]
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL for all processes of it: torchrun's workers are sessions of their own. Waits until they are gone."""
        while alive := self._alive():
            for number in alive:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.process.wait()
            time.sleep(0.001)

    def _alive(self) -> list[int]:
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (each / "environ").read_bytes():  # empty of one that is dead
                    found.append(int(each.name))
        return found


class Aim:
    """What a kill waits for."""

    def __init__(self, moments: random.Random, folder: Path, ranks: int) -> None:
        self.kind = moments.choice(["moment", "step", "save", "save"])
        self.folder, self.lines = folder, len(losses(folder)) + moments.randrange(1, 4)
        later = {"moment": 2.0 + ranks + 4.0, "step": 0.5, "save": 0.03}
        self.delay = moments.uniform(0, later[self.kind])

    def wait(self, process: "subprocess.Popen[bytes]") -> bool:
        """False: the run ended first."""
        seen = None
        while process.poll() is None:
            if seen is None and self._is_there():
                seen = time.monotonic()
            if seen is not None and time.monotonic() >= seen + self.delay:
                return True
            time.sleep(0.001)
        return False

    def _is_there(self) -> bool:
        if self.kind == "moment":
            return True
        return len(losses(self.folder)) >= self.lines and (self.kind == "step" or saves(self.folder))


def losses(folder: Path) -> list[float]:
    """By step; of a line that is not whole, nothing."""
    path = folder / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line)["loss"] for line in whole.splitlines()]


def saves(folder: Path) -> bool:
    """Whether an unfinished save lies there."""
    return any((folder / "checkpoints").glob(".*unpublished*"))


@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("recipe", list(FAST))
def test_a_run_that_is_killed_is_bitwise_the_whole_one(recipe: str, ranks: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Run(recipe, whole, ranks).finish()
    expected = losses(whole)
    assert len(expected) == STEPS
    moments, steps_at_kills, during_saves, rounds = random.Random(f"{recipe} {ranks}"), [], 0, 0
    while len(steps_at_kills) < KILLS:
        rounds += 1
        assert rounds < 10 * KILLS, f"{len(steps_at_kills)} kills in {rounds} rounds: the run ends before them"
        if len(losses(killed)) == STEPS:  # a run that has ended begins anew
            _check(recipe, killed, whole, expected, ranks)
            shutil.rmtree(killed)
        aim, run = Aim(moments, killed, ranks), Run(recipe, killed, ranks)
        try:
            if aim.wait(run.process):
                run.kill()
                steps_at_kills.append(len(losses(killed)))
                during_saves += saves(killed)
            else:
                run.finish()
        finally:
            run.kill()
        assert losses(killed) == expected[: len(losses(killed))]
    _check(recipe, killed, whole, expected, ranks)
    assert during_saves > 0
    assert len(set(steps_at_kills)) > 3
    print(
        f"\n{recipe} on {ranks}: {KILLS} kills in {rounds} rounds, {during_saves} of them during a save, after steps "
        f"{sorted(steps_at_kills)}: bitwise"
    )


def _check(recipe: str, killed: Path, whole: Path, expected: list[float], ranks: int) -> None:
    """Finished, its losses and weights are those of the run that nobody killed."""
    Run(recipe, killed, ranks).finish()
    assert losses(killed) == expected
    folder = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = (dict(load_model(each / folder).named_parameters()) for each in (killed, whole))
    assert all(ours[name].equal(value) for name, value in theirs.items())
