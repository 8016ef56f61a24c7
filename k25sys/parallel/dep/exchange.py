"""Rows between the ranks that encode media and the ranks that consume them, a micro-batch at a time.

Every row of a micro-batch's features has one consumer: the rank of stage 0 whose part of the tokens holds its position.
Both ends know from the plan alone which rows go where, so that a message is nothing but rows, and messages between two
ranks follow the order of micro-batches.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.errors import ShapeError, message
from k25sys.parallel.dep.balance import Clip

MicroBatchKey = tuple[int, int]
"""(data rank, number of the micro-batch)."""


@dataclass(frozen=True)
class Segment:
    """Rows of one clip that go from its owner to one consumer."""

    clip: Clip
    rows_R: Tensor
    """Which of the clip's feature rows, ascending."""
    places_R: Tensor
    """Where they lie among the rows of the consumer, which are in the order of its tokens."""


@dataclass
class Routes:
    """Who sends what to whom in each micro-batch: the same on every rank."""

    segments: dict[MicroBatchKey, dict[tuple[int, int], list[Segment]]]
    """By micro-batch, then by (owner, consumer), in the order of the clips."""
    rows_at: dict[tuple[MicroBatchKey, int], int]
    """The number of rows that a consumer gets of a micro-batch."""

    @classmethod
    def make(
        cls,
        owners: Mapping[Clip, int],
        num_rows: Callable[[Clip], int],
        consumers: Callable[[int, int], Tensor],
    ) -> "Routes":
        """Routes of a step.

        Args:
            owners: the rank that encodes each clip.
            num_rows: feature rows of a clip.
            consumers: of (data rank, micro-batch): (Q,) int64, the rank that needs each row of its clips, in order.

        Raises:
            ShapeError: consumers of another number of rows than the clips have.
        """
        clips_of: defaultdict[MicroBatchKey, list[Clip]] = defaultdict(list)
        for clip in sorted(owners):
            clips_of[clip.home].append(clip)
        routes = cls({}, {})
        for key, clips in clips_of.items():
            consumer_Q = consumers(*key)
            lengths = [num_rows(clip) for clip in clips]
            if consumer_Q.shape != (sum(lengths),):
                accepted = f"({sum(lengths)},): a rank for each feature row of micro-batch {key}"
                raise ShapeError(message("Routes.make", "consumers", tuple(consumer_Q.shape), accepted))
            routes._add(key, clips, consumer_Q.split(lengths), owners)
        return routes

    def _add(
        self, key: MicroBatchKey, clips: Sequence[Clip], consumers: Sequence[Tensor], owners: Mapping[Clip, int]
    ) -> None:
        routes: defaultdict[tuple[int, int], list[Segment]] = defaultdict(list)
        filled: defaultdict[int, int] = defaultdict(int)
        for clip, consumer_R in zip(clips, consumers, strict=True):
            for consumer in consumer_R.unique().tolist():
                rows_R = (consumer_R == consumer).nonzero()[:, 0]
                places_R = torch.arange(filled[consumer], filled[consumer] + len(rows_R))
                filled[consumer] += len(rows_R)
                routes[owners[clip], consumer].append(Segment(clip, rows_R, places_R))
        self.segments[key] = dict(routes)
        for consumer, count in filled.items():
            self.rows_at[key, consumer] = count

    def between(self, key: MicroBatchKey, *, owner: int | None = None, consumer: int | None = None) -> list[
        tuple[int, int, list[Segment]]
    ]:  # fmt: skip
        """(owner, consumer, segments) of a micro-batch with this owner or this consumer, by ascending ranks."""
        found = self.segments.get(key, {})
        return [
            (*ends, segments)
            for ends, segments in sorted(found.items())
            if owner in (None, ends[0]) and consumer in (None, ends[1])
        ]


@dataclass
class RowMessages:
    """The messages of one direction. A micro-batch's sends are waited for, and freed, when those of a later one begin:
    by then the other end has asked for them, on the one clock of a schedule. Receives wait when they are asked for.

    A rank's own rows are copied. Every message carries the whole rows, contiguous, in `dtype`.
    """

    group: dist.ProcessGroup | None
    dtype: torch.dtype
    device: torch.device
    row_shape: tuple[int, ...]
    _sends: list[tuple[int, dist.Work, Tensor]] = field(default_factory=list)
    """By number of the micro-batch."""
    _receives: dict[tuple[MicroBatchKey, int], tuple[dist.Work | None, Tensor]] = field(default_factory=dict)

    def send(self, key: MicroBatchKey, rank: int, target: int, rows: Tensor) -> None:
        """Starts sending `rows` to `target`; `rank` is this one."""
        self._end_sends(before=key[1])
        rows = rows.to(self.dtype).contiguous()
        if target == rank:
            self._receives[key, rank] = (None, rows)
            return
        work = dist.isend(rows, target, group=self.group)
        assert work is not None
        self._sends.append((key[1], work, rows))

    def post(self, key: MicroBatchKey, rank: int, source: int, num_rows: int) -> None:
        """Starts receiving from `source`, once; does nothing where it is this rank."""
        if source == rank or (key, source) in self._receives:
            return
        rows = torch.empty((num_rows, *self.row_shape), dtype=self.dtype, device=self.device)
        work = dist.irecv(rows, source, group=self.group)
        assert work is not None
        self._receives[key, source] = (work, rows)

    def receive(self, key: MicroBatchKey, source: int) -> Tensor:
        """What `source` sent; waits for it."""
        work, rows = self._receives.pop((key, source))
        if work is not None:
            work.wait()
        return rows

    def finish(self) -> None:
        """Waits until what was sent is out of this rank's hands."""
        self._end_sends()
        assert not self._receives, list(self._receives)

    def abandon(self) -> None:
        """Lets go of everything, of a step that failed."""
        self._sends.clear()
        self._receives.clear()

    def _end_sends(self, before: int | None = None) -> None:
        for number, work, _ in self._sends:
            if before is None or number < before:
                work.wait()
        self._sends = [] if before is None else [send for send in self._sends if send[0] >= before]

    @property
    def bytes_on_their_way_out(self) -> int:
        """Held by messages that have not been waited for since they were sent."""
        return sum(rows.nbytes for _, _, rows in self._sends)

    @property
    def bytes_awaited(self) -> int:
        """Held by messages that have not been consumed, arrived or not."""
        return sum(rows.nbytes for _, rows in self._receives.values())

    @property
    def bytes_waiting(self) -> int:
        """Of both."""
        return self.bytes_on_their_way_out + self.bytes_awaited
