"""Times of the actions of a real run: wall clock for drawings, the thread's CPU time for virtual time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from k25sys.parallel.faults import Monitor
from k25sys.parallel.pipeline.ir import Action


@dataclass(frozen=True)
class Recorded:
    """One action as it ran."""

    action: Action
    start: float
    """Wall clock, seconds since the recorder's `begin`."""
    end: float
    cpu: float
    """Seconds that this thread computed: waiting does not count, nor does what shares the core."""


@dataclass
class Recorder:
    """Collects what one rank does."""

    recorded: list[Recorded] = field(default_factory=list)
    _begin: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Forgets what was recorded, and sets the clock to 0: after a barrier, on all ranks."""
        self.recorded.clear()
        self._begin = time.perf_counter()

    @contextmanager
    def during(self, action: Action, monitor: Monitor | None = None) -> Iterator[None]:
        """Times what runs inside."""
        start, cpu = time.perf_counter(), time.thread_time()
        if monitor is None:
            yield
        else:
            with monitor.during(str(action)):
                yield
        now = time.perf_counter()
        self.recorded.append(Recorded(action, start - self._begin, now - self._begin, time.thread_time() - cpu))
