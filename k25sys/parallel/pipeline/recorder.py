"""Times of the actions of a real run: wall clock for drawings, the thread's CPU time for virtual time."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from k25sys.parallel.faults import Monitor
from k25sys.parallel.pipeline.ir import Action


@dataclass(frozen=True)
class Recorded:
    """One action as it ran."""

    action: Action
    start: float
    """Wall clock, seconds since the recorder's `begin`. What an action waits for before it starts is not in it."""
    end: float
    cpu: float
    """Seconds that this thread computed: waiting does not count, nor does what shares the core."""


@dataclass
class Recorder:
    """Collects what one rank does in a step."""

    recorded: list[Recorded] = field(default_factory=list)
    arrivals: dict[Action, float] = field(default_factory=dict)
    """By receive: when its message had come, at the latest. Wall clock, as in Recorded."""
    _begin: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Forgets what was recorded, and sets the clock to 0: after a barrier, on all ranks."""
        self.recorded, self.arrivals = [], {}
        self._begin = time.perf_counter()

    @contextmanager
    def during(self, action: Action, monitor: Monitor | None = None) -> Iterator[None]:
        """Times what runs inside."""
        with nullcontext() if monitor is None else monitor.during(str(action)):
            start, cpu = time.perf_counter(), time.thread_time()
            yield
            cpu, now = time.thread_time() - cpu, time.perf_counter()
            self.recorded.append(Recorded(action, start - self._begin, now - self._begin, cpu))

    @contextmanager
    def arriving(self, receive: Action, guard: AbstractContextManager[Any]) -> Iterator[None]:
        """Around the wait for a message."""
        with guard:
            yield
            self.arrivals[receive] = time.perf_counter() - self._begin
