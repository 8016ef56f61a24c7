"""Which rank died, stopped, failed or hangs, and in what: heartbeats and current actions of all ranks in a store.

A wait that fails says "connection closed" or "timed out"; it does not say who. Every rank's Monitor therefore beats in
a store from a thread of its own, says what the rank does, and looks at the next rank of the ring.

What counts as dead: a rank whose beat its watcher has seen unchanged `patience` times, an interval apart. A killed
process no longer beats, nor does a stopped one. A slow rank does, however long its action takes; and since looks are
counted and not seconds, a machine that is slow for all, or was suspended, makes nobody dead.

The first diagnosis is left in the store, so that ranks that fail in its wake name the same rank. Nobody is killed and
no wait is cut short: the process group's timeout (RankGrid.create) bounds the waits; the diagnosis makes an error that
names the rank of what they raise, and a log line, which is all there is where a backend aborts the process by itself.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch.distributed as dist

from k25sys.errors import ArgumentValueError, RankFailureError, listing, message

_FAILURE = "k25sys/failure"
_ENDED = "ended"
_SIGNS_OF_COMMUNICATION = ("gloo", "nccl", "connection", "timed out", "timeout")
_LOG = logging.getLogger(__name__)


class Monitor:
    """Heartbeats of this rank, a watch on the next one, and the diagnosis of waits that fail.

    A context manager: leaving it ends the beats. A rank that leaves with an exception counts as failed.

    Args:
        store: reached by all ranks and, best, held by none of them (a launcher's): with its holder it stops answering,
            which every rank then says. The connection must be the monitor's alone: calls of one TCPStore object wait
            for each other. A restarted job takes a PrefixStore of another prefix.
        rank, world_size: of this process, and how many there are.
        interval: seconds between beats.
        patience: beats that a rank may miss. interval x patience is how long a process may be kept from running (a
            machine under load, a call that holds Python's lock) before it counts as dead.

    Raises:
        ArgumentValueError: an interval that is not > 0, a patience below 2, or a rank outside the world.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, *, interval: float = 1.0, patience: int = 20
    ) -> None:
        if not interval > 0:
            raise ArgumentValueError(message("Monitor", "interval", interval, "seconds > 0"))
        if patience < 2:
            raise ArgumentValueError(message("Monitor", "patience", patience, "a number of beats >= 2"))
        if not 0 <= rank < world_size:
            raise ArgumentValueError(message("Monitor", "rank", rank, f"0 to {world_size - 1}"))
        self.rank, self.world_size, self.interval, self.patience = rank, world_size, interval, patience
        self._store = store
        self._action, self._since = "between actions", time.monotonic()
        self.beats_said = 0
        """How often the store has been told what this rank does."""
        self.rounds = 0
        """How often this rank has looked at another one."""
        self._watch = Watch(patience)
        self._failure: str | None = None
        self._to_declare: str | None = None
        self._failed, self._wake, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._say(self._state())
        self._thread = threading.Thread(target=self._run, name="k25sys heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, RankFailureError):
            self._have_declared(f"rank {self.rank} failed {self._action} ({_summary(error)})")
        self.close()

    def close(self) -> None:
        """Ends the beats, and says so: a rank that has ended is not dead."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(self.patience * self.interval)  # a store that does not answer keeps it

    @property
    def failure(self) -> str | None:
        """What is known of the first rank that failed; None while all are well."""
        return self._failure

    @contextmanager
    def during(self, action: str, *, peers: Sequence[int] = ()) -> Iterator[None]:
        """Names what this rank does, and looks for the rank at fault when it fails.

        Around what only computes, an exception passes as it is, and the other ranks learn of it. A RuntimeError of the
        communication (gloo's, NCCL's, a timeout) becomes a RankFailureError.

        Args:
            action: e.g. "1F0", or "all-reduce of the gradient norm".
            peers: the ranks that are waited for inside, all by default: named when the wait ended, but all ranks live.

        Raises:
            RankFailureError: names the rank at fault, what it was in, and what this rank was in. At once when a
                failure is known before.
        """
        if self._failed.is_set():
            raise RankFailureError(f"{self._failure}; rank {self.rank} was about to start {action}")
        before = self._action, self._since
        self._enter(f"in {action}", time.monotonic())
        try:
            yield
        except RankFailureError:
            raise
        except BaseException as error:
            if not _is_communication(error):
                self._have_declared(f"rank {self.rank} failed in {action} ({_summary(error)})")
                raise
            found = self._diagnose(action, peers)
            raise RankFailureError(f"{found}; rank {self.rank} was in {action} ({_summary(error)})") from error
        finally:
            self._enter(*before)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _enter(self, action: str, since: float) -> None:
        self._action, self._since = action, since
        self._wake.set()

    def _run(self) -> None:
        """Beats when an interval is over, and when the action has changed; looks at the others once an interval."""
        next_look = time.monotonic() + self.interval
        try:
            while not self._stopping.is_set():
                self._wake.wait(max(0.0, next_look - time.monotonic()))
                self._wake.clear()
                self._say(self._state())
                if self._to_declare is not None:
                    self._declare(self._to_declare)
                if time.monotonic() >= next_look:
                    self._look()
                    self.rounds += 1
                    next_look = time.monotonic() + self.interval
            if self._failure is None:
                self._say(_ENDED)
        except RuntimeError as error:
            self._learn(f"{_NO_STORE} ({_summary(error)})")

    def _state(self) -> str:
        return f"{self.beats_said + 1} {time.monotonic() - self._since:.0f} {self._action}"

    def _say(self, state: str) -> None:
        self._store.set(f"k25sys/beat/{self.rank}", state)
        self.beats_said += 1

    def _heard(self, rank: int) -> str | None:
        """What `rank` last said; None when it has not begun."""
        key = f"k25sys/beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _look(self) -> None:
        """For a failure that others found, else at the next rank that has not ended."""
        if self._failure is not None:
            return
        if self._store.check([_FAILURE]):
            self._learn(self._store.get(_FAILURE).decode())
            return
        for distance in range(1, self.world_size):
            rank = (self.rank + distance) % self.world_size
            state = self._heard(rank)
            if state == _ENDED:
                continue
            if state is not None and self._watch.is_silent(rank, state):
                self._declare(f"rank {rank} has died or stopped {state.split(' ', 2)[2]}")
            return

    def _declare(self, failure: str) -> None:
        """Leaves `failure` for all ranks, unless there is one already."""
        if self._failure is None:
            self._learn(self._store.compare_set(_FAILURE, "", failure).decode())

    def _have_declared(self, failure: str) -> None:
        """Lets the thread declare: the store may not answer, and this rank must not wait for it without end."""
        self._to_declare = failure
        self._wake.set()
        if not self._failed.wait(self.patience * self.interval):
            self._learn(failure)

    def _learn(self, failure: str) -> None:
        if self._failure is None:
            self._failure = failure
            self._failed.set()
            _LOG.error("%s; rank %d is %s", failure, self.rank, self._action)

    # --- a failed wait ----------------------------------------------------------------------------------------------

    def _diagnose(self, action: str, peers: Sequence[int]) -> str:
        """Why a wait in `action` failed: waits for the watches to find a silent rank, else says what each one does."""
        begin, rounds = time.monotonic(), self.rounds
        while not self._failed.wait(self.interval):
            done = self.rounds - rounds
            if done > 1.5 * self.patience + 2:
                break
            if time.monotonic() - begin > 2 * self.patience * self.interval * (done + 1):
                self._learn(_NO_STORE)
        if self._failure is None:
            others = [rank for rank in peers or range(self.world_size) if rank != self.rank]
            states = listing((_describe(rank, self._heard(rank)) for rank in others), separator="; ")
            self._have_declared(f"rank {self.rank} gave up in {action} while all ranks lived: {states}")
        assert self._failure is not None
        return self._failure


_NO_STORE = "the store does not answer: the rank that holds it (rank 0, unless a launcher does) has died or stopped"


class Watch:
    """Tells a rank that no longer beats from one that is slow."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._last: dict[int, tuple[str, int]] = {}

    def is_silent(self, rank: int, state: str) -> bool:
        """Counts a look at `rank`: whether it has said the same `patience` times in a row since it was first heard."""
        last, looks = self._last.get(rank, ("", 0))
        looks = looks + 1 if state == last else 0
        self._last[rank] = state, looks
        return looks >= self._patience


def _describe(rank: int, state: str | None) -> str:
    if state is None:
        return f"rank {rank} has no monitor yet"
    if state == _ENDED:
        return f"rank {rank} has ended"
    _, seconds, action = state.split(" ", 2)
    return f"rank {rank} has been {action} for {seconds} s"


def _is_communication(error: BaseException) -> bool:
    """Whether a wait for other ranks may have raised this; torch has a class of its own for some backends only."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_COMMUNICATION)


def _summary(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
