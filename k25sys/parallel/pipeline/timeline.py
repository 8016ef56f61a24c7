"""When each rank did what: of a schedule that was simulated, replayed or run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from k25sys.parallel.pipeline.ir import COMPUTE, RECEIVES, SENDS, VISION, Action, Kind


@dataclass(frozen=True)
class Span:
    """One action of one rank, in seconds from the start of the step."""

    rank: int
    action: Action
    start: float
    end: float
    busy: float
    """Seconds of work in it; the rest of it the rank waits, e.g. for expert-parallel peers."""


@dataclass(frozen=True)
class Transfer:
    """One message between two ranks, in seconds from the start of the step."""

    send: Action
    """The send, also where the schedule has not been lowered."""
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step of a pipeline."""

    name: str
    spans: tuple[tuple[Span, ...], ...]
    """By rank, in the order of their starts."""
    transfers: tuple[Transfer, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        for spans in self.spans:
            yield from spans

    @property
    def start(self) -> float:
        """When the first rank starts."""
        return min((span.start for span in self), default=0.0)

    @property
    def end(self) -> float:
        """When the last rank ends."""
        return max((span.end for span in self), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first action to the end of the last one, on whichever ranks."""
        return self.end - self.start

    def busy(self, rank: int) -> float:
        """Seconds in which `rank` computes; messages, D and R are no computation."""
        return sum(span.busy for span in self.spans[rank] if span.action.kind in COMPUTE | VISION)

    @property
    def messages(self) -> tuple[Transfer, ...]:
        """`transfers`; of a run that has written down none, from the start of each send to the end of its receive."""
        if self.transfers:
            return self.transfers
        received = {span.action: span for span in self if span.action.kind in RECEIVES}
        sent = [span for span in self if span.action.kind in SENDS and span.action.partner in received]
        pairs = [(send, received[send.action.partner]) for send in sent]
        return tuple(Transfer(s.action, s.rank, r.rank, s.start, max(s.start, r.end)) for s, r in pairs)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """By rank, the share of the makespan in which it does not compute: the pipeline's filling and draining count on
        every rank, because no rank starts the next step before this one has ended everywhere."""
        makespan = self.makespan
        return tuple(1 - self.busy(rank) / makespan if makespan else 0.0 for rank in range(self.num_ranks))

    @property
    def bubble(self) -> float:
        """The mean of `bubbles`: 1 - work / (ranks x makespan)."""
        return sum(self.bubbles) / self.num_ranks

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """By rank, the most (stage, micro-batch) pairs whose activations it holds at once."""
        return tuple(int(max((held for _, held in self.memory(rank)), default=0)) for rank in range(self.num_ranks))

    def memory(self, rank: int, held: Callable[[Action], float] | None = None) -> list[tuple[float, float]]:
        """What `rank` holds: (seconds, amount from then on), ascending.

        Args:
            held: By how much an action changes it: what is positive counts from its start, what is negative from its
                end. By default the (stage, micro-batch) pairs in flight: 1 for F, -1 for B and W.
        """
        held = held or count_in_flight
        changes = [(span.start if held(span.action) > 0 else span.end, held(span.action)) for span in self.spans[rank]]
        amounts: list[tuple[float, float]] = []
        total = 0.0
        for seconds, change in sorted(changes):  # what is freed at a time precedes what is allocated at it
            if change:
                total += change
                amounts.append((seconds, total))
        return amounts


def count_in_flight(action: Action) -> float:
    """1 for a forward, -1 for what ends its stay in memory, 0 for the rest."""
    return float(action.kind is Kind.FORWARD) - float(action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT))
