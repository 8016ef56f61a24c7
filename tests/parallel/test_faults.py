"""Ranks that are killed, stopped, fail or hang in mid-step: every survivor ends with an error that names the rank."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from k25sys.errors import ArgumentValueError, RankFailureError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.faults import Monitor, Watch
from k25sys.parallel.pipeline import make_schedule
from tests.parallel.pipeline.test_runtime import build
from tests.parallel.pipeline.toy import Rows, ToyStage, make_rows
from tests.parallel.processes import DIED, RUNNING, run_failing_ranks, run_ranks

RANKS, TIMEOUT = 4, 5.0
INTERVAL, PATIENCE = 0.05, 20


@dataclass(frozen=True)
class Fault:
    """What `rank` does in the middle of `action`."""

    rank: int
    action: str
    how: str
    """"kill", "stop", "raise", or "hang"."""
    schedule: str = "1f1b"


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store that none of the ranks holds."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # which lives until here


def _monitor(port: int, rank: int, world_size: int = RANKS, *, holds_store: bool = False) -> Monitor:
    store = dist.TCPStore("127.0.0.1", port, is_master=holds_store, wait_for_workers=False)
    return Monitor(store, rank, world_size, interval=INTERVAL, patience=PATIENCE)


def _fail(how: str, monitor: Monitor) -> None:
    """As the process is told to, once its monitor has said what it is in."""
    beats = monitor.beats_said
    while monitor.beats_said < beats + 2:
        time.sleep(INTERVAL / 10)
    if how == "raise":
        raise ValueError("a bad sample\nin the data")
    if how == "hang":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


class FaultyStage(ToyStage):
    """Fails in the middle of one micro-batch's forward, or backward."""

    fault: Fault
    monitor: Monitor

    def forward(self, microbatch: Rows, x: torch.Tensor | None) -> torch.Tensor:
        """As ToyStage's."""
        y = super().forward(microbatch, x)
        stage, kind, number = self.fault.action[0], self.fault.action[1], int(self.fault.action[2:])
        assert int(stage) == self.fault.rank
        self.seen = getattr(self, "seen", -1) + 1
        if self.seen == number:
            if kind == "F":
                _fail(self.fault.how, self.monitor)
            y.register_hook(lambda _: _fail(self.fault.how, self.monitor))
        return y


def _step(fault: Fault, port: int) -> str:
    grid = RankGrid.create(GridSizes(pipeline=RANKS), timeout=timedelta(seconds=TIMEOUT))
    with _monitor(port, grid.rank) as monitor:
        schedule = make_schedule(fault.schedule, num_ranks=RANKS, num_microbatches=6)
        runtime, stages = build(schedule, grid, torch.float32, monitor=monitor)
        if grid.rank == fault.rank:
            stage = stages[grid.rank]
            stage.__class__ = FaultyStage
            stage.fault, stage.monitor = fault, monitor  # pyright: ignore[reportAttributeAccessIssue]
        dist.barrier()
        return _error_of(lambda: runtime.step(make_rows(6, torch.float32, lengths=(5, 12, 3))))


def _error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except RankFailureError as error:
        return str(error)
    return "no error"


def _check_survivors(fault: Fault, results: dict[int, str], problems: dict[int, str], doing: str) -> None:
    assert set(problems) == {fault.rank}
    for rank, error in results.items():
        assert doing in error, (rank, error)
        assert f"rank {rank} was in" in error or f"rank {rank} was about to start" in error, error


@pytest.mark.parametrize(
    "fault",
    [
        Fault(1, "1F2", "kill"),
        Fault(0, "0F3", "stop"),
        Fault(3, "3I1", "kill", "zb_h1"),
        Fault(2, "2B1", "stop"),
    ],
    ids=lambda fault: f"{fault.how}-{fault.action}",
)
def test_survivors_name_a_rank_that_dies_or_stops_in_a_step(fault: Fault, port: int) -> None:
    stopped = [fault.rank] if fault.how == "stop" else []
    results, problems = run_failing_ranks(RANKS, _step, fault, port, timeout=40, stopped=stopped)
    _check_survivors(fault, results, problems, f"rank {fault.rank} has died or stopped in {fault.action}")
    assert problems[fault.rank] == (RUNNING if stopped else DIED)


def test_survivors_name_a_rank_that_raises(port: int) -> None:
    fault = Fault(2, "2F1", "raise")
    results, problems = run_failing_ranks(RANKS, _step, fault, port, timeout=40)
    _check_survivors(fault, results, problems, "rank 2 failed in 2F1 (ValueError: a bad sample)")
    assert "ValueError: a bad sample\nin the data" in problems[2]


def _collective(how: str, port: int) -> str:
    grid = RankGrid.create(GridSizes(data=RANKS), timeout=timedelta(seconds=TIMEOUT))
    with _monitor(port, grid.rank) as monitor:

        def steps() -> None:
            for number in range(3):
                with monitor.during(f"all-reduce {number}"):
                    if number == 1 and grid.rank == 0:
                        _fail(how, monitor)
                    dist.all_reduce(torch.ones(1000), group=grid.group("data"))

        return _error_of(steps)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_collective_names_rank_0(how: str, port: int) -> None:
    stopped = [0] if how == "stop" else []
    results, problems = run_failing_ranks(RANKS, _collective, how, port, timeout=40, stopped=stopped)
    fault = Fault(0, "all-reduce 1", how)
    _check_survivors(fault, results, problems, "rank 0 has died or stopped in all-reduce 1")
    assert all("was in all-reduce 1" in error for error in results.values())


def _slow(port: int) -> str:
    grid = RankGrid.create(GridSizes(data=2), timeout=timedelta(seconds=1.0))
    with _monitor(port, grid.rank, 2) as monitor:

        def step() -> None:
            with monitor.during("pass 1" if grid.rank else "pass 2"):
                if grid.rank == 1:
                    ended.wait(60)
                else:
                    dist.all_reduce(torch.ones(4), group=grid.group("data"))

        ended = threading.Event()
        if grid.rank == 1:
            threading.Timer(1.0 + 3 * INTERVAL * PATIENCE, ended.set).start()
        return _error_of(step)


def test_a_hanging_rank_beats_and_is_named_when_the_wait_has_ended(port: int) -> None:
    waited, hung = run_ranks(2, _slow, port)
    assert "rank 0 gave up in pass 2 while all ranks lived: rank 1 has been in pass 1 for " in waited
    assert "Timed out waiting 1000ms" in waited
    assert hung == "no error"  # nobody is killed for being slow


def _without_store(how: str, port: int) -> str:
    grid = RankGrid.create(GridSizes(data=RANKS), timeout=timedelta(seconds=1))
    if grid.rank:
        dist.barrier()
    with _monitor(port, grid.rank, holds_store=grid.rank == 0) as monitor:
        if grid.rank == 0:
            dist.barrier()
        dist.barrier()

        def step() -> None:
            with monitor.during("all-reduce"):
                if grid.rank == 0:
                    _fail(how, monitor)
                dist.all_reduce(torch.ones(4), group=grid.group("data"))

        return _error_of(step)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_rank_that_holds_the_store(how: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stopped = [0] if how == "stop" else []
    results, problems = run_failing_ranks(RANKS, _without_store, how, port, timeout=40, stopped=stopped)
    assert set(problems) == {0}
    for error in results.values():
        assert "the store does not answer: the rank that holds it (rank 0, unless a launcher does) has died" in error
        assert "was in all-reduce (RuntimeError: " in error


# --- one process ------------------------------------------------------------------------------------------------------


def test_watch_counts_looks_and_not_seconds() -> None:
    watch = Watch(3)
    assert [watch.is_silent(1, "1 0 in 0F0") for _ in range(4)] == [False, False, False, True]
    assert not watch.is_silent(1, "2 0 in 0F0")
    assert not watch.is_silent(2, "2 0 in 0F0")
    assert [watch.is_silent(1, "2 0 in 0F0") for _ in range(3)] == [False, False, True]


def test_a_rank_that_ends_or_has_not_begun_is_not_dead() -> None:
    store = dist.HashStore()
    with Monitor(store, 0, 3, interval=0.01, patience=2) as one:
        with Monitor(store, 1, 3, interval=0.01, patience=2):
            pass
        assert store.get("k25sys/beat/1") == b"ended"
        begin = one.rounds
        while one.rounds < begin + 10:
            time.sleep(0.01)
        assert one.failure is None


def test_what_this_rank_does_wrong_passes_and_is_told() -> None:
    store = dist.HashStore()
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised,
        Monitor(store, 0, 2, interval=0.01) as monitor,
        monitor.during("0F0"),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert raised.type is RuntimeError
    assert store.get("k25sys/failure").startswith(b"rank 0 failed in 0F0 (RuntimeError: mat1 and mat2 shapes")
    with Monitor(store, 1, 2, interval=0.01) as other:
        while other.failure is None:
            time.sleep(0.01)
        text = r"rank 0 failed in 0F0 .*; rank 1 was about to start 1F0"
        with pytest.raises(RankFailureError, match=text), other.during("1F0"):
            pass
    again = dist.PrefixStore("again", store)
    with pytest.raises(OSError, match="disk"), Monitor(again, 0, 1, interval=0.01):
        raise OSError("disk")
    assert store.get("again/k25sys/failure") == b"rank 0 failed between actions (OSError: disk)"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"interval": 0.0}, "interval: got 0.0, accepted seconds > 0"),
        ({"patience": 1}, "patience: got 1, accepted a number of beats >= 2"),
        ({"rank": 2}, "rank: got 2, accepted 0 to 1"),
    ],
)
def test_wrong_options(options: dict[str, float], text: str) -> None:
    with pytest.raises(ArgumentValueError, match=text):
        Monitor(dist.HashStore(), **{"rank": 0, "world_size": 2, **options})  # pyright: ignore[reportArgumentType]
