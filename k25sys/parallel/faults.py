"""Which rank died, and in what: heartbeats and current actions of all ranks in a store, read when a wait fails.

A wait that fails says "connection closed" or "timed out"; it does not say who. Every rank's Monitor therefore beats in
a store from a thread of its own and says what it does. Whoever's wait fails looks for ranks that no longer beat: a
killed process does not, nor does a stopped one; a slow one does. The first diagnosis is left in the store, so that
ranks that fail in its wake name the same rank.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from k25sys.errors import ArgumentValueError, RankFailureError, message

_FAILURE = "k25sys/failure"
_MISSED_BEATS = 4  # without which a rank counts as dead


class Monitor:
    """Heartbeats of this rank, and the diagnosis of others.

    Args:
        store: that all ranks reach; keys begin with "k25sys/".
        rank, world_size: of this process, and how many there are.
        interval: seconds between beats. A rank that misses four is dead or stopped; one that computes for long beats.

    Raises:
        ArgumentValueError: an interval that is not > 0.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, interval: float = 1.0) -> None:
        if not interval > 0:
            raise ArgumentValueError(message("Monitor", "interval", interval, "seconds > 0"))
        self._store = store
        self.rank, self.world_size, self.interval = rank, world_size, interval
        self._action = "before its first action"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="k25sys heartbeat", daemon=True)
        self._store.set(f"k25sys/beat/{rank}", self._state(0))
        self._thread.start()

    def close(self) -> None:
        """Stops beating: from then on this rank counts as ended."""
        self._stopping.set()
        self._thread.join()

    def _state(self, beat: int) -> str:
        return f"{beat} {self._action}"

    def _beat(self) -> None:
        beat = 0
        while not self._stopping.wait(self.interval):
            beat += 1
            try:
                self._store.set(f"k25sys/beat/{self.rank}", self._state(beat))
            except RuntimeError:
                return  # the store is gone: whoever waits finds out

    @contextmanager
    def during(self, action: str) -> Iterator[None]:
        """Names what this rank does. A RuntimeError inside becomes a RankFailureError, if a rank has failed.

        Raises:
            RankFailureError: names the rank, what it was in, and what was waited for.
        """
        before, self._action = self._action, action
        try:
            yield
        except RankFailureError:
            raise
        except RuntimeError as error:
            found = self._diagnose(action)
            if found is None:
                raise
            raise RankFailureError(f"{found}; rank {self.rank} was in {action} ({_first_line(error)})") from error
        finally:
            self._action = before

    def _diagnose(self, action: str) -> str | None:
        """What is known of the first failure; None where every rank is well."""
        try:
            if self._store.check([_FAILURE]):
                return self._store.get(_FAILURE).decode()
            before = self._states()
            deadline = time.monotonic() + _MISSED_BEATS * self.interval
            while (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, self.interval))
                if self._store.check([_FAILURE]):
                    return self._store.get(_FAILURE).decode()
            silent = [rank for rank, state in self._states().items() if state == before[rank] and rank != self.rank]
            if not silent:
                return None
            rank = silent[0]
            doing = before[rank].partition(" ")[2]
            found = f"rank {rank} has died or stopped in {doing}" + (f" (silent: {silent})" if len(silent) > 1 else "")
            self._store.set(_FAILURE, found)
            return found
        except RuntimeError:
            return "the store does not answer: the rank that holds it (rank 0, unless a launcher does) has died"

    def _states(self) -> dict[int, str]:
        """What each rank last said; of one that has said nothing yet, nothing."""
        states = {}
        for rank in range(self.world_size):
            key = f"k25sys/beat/{rank}"
            states[rank] = self._store.get(key).decode() if self._store.check([key]) else "0 starting"
        return states


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
