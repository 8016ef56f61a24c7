"""The three phases of a training step with a decoupled encoder, over all ranks (K2.5 report, section 4.5.1).

(a) Each rank encodes the packs that it owns, without a graph, and keeps outputs alone. (b) The backbone runs its
unchanged schedule; each micro-batch's rows reach stage 0 shortly before it needs them, and their gradients go back.
(c) Each owner encodes its packs once more, with a graph, and runs the backward.

All of it is actions of the pipeline's schedule: VF and VB for packs, D and R for the exchange.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, ShapeError, message
from k25sys.parallel.dep.balance import Clip, EncoderCost, EncodingPlan, Pack, assign, make_packs
from k25sys.parallel.dep.exchange import Routes, RowMessages
from k25sys.parallel.dep.reduction import sum_in_order
from k25sys.parallel.dep.schedule import DeliveryPoints, add_vision, delivery_points
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.pipeline.ir import Kind, Schedule


@dataclass(frozen=True, kw_only=True)
class DecoupledOptions:
    """How the encoder's work is divided and delivered."""

    cost: EncoderCost
    max_patches: int
    """Patches in a pack: what phases (a) and (c) hold in activations."""
    prefetch: int = 1
    """Micro-batches whose rows are sent ahead of their use; >= 1."""
    ranks_per_node: int | None = None
    """Packs stay on the node where their data rank has stage 0, as far as the balance allows; None: anywhere."""
    trainable: bool = True
    """Without, there is no phase (c), and stage 0 keeps no gradients of rows."""
    deterministic: bool = False
    """Sums the packs' gradients in the order of the packs, so that they do not depend on the number of ranks."""

    def __post_init__(self) -> None:
        for name in ("max_patches", "prefetch"):
            if getattr(self, name) < 1:
                raise ArgumentValueError(message("DecoupledOptions", name, getattr(self, name), "an int >= 1"))


@dataclass
class _Step:
    plan: EncodingPlan
    routes: Routes
    load_pixels: Callable[[Clip], Tensor]
    train: bool
    rows: dict[Clip, Tensor] = field(default_factory=dict)
    gradients: dict[Clip, Tensor] = field(default_factory=dict)
    to_send: dict[Clip, int] = field(default_factory=dict)
    """Rows of each clip that have not been handed to the exchange."""


@dataclass(frozen=True)
class DecoupledMedia:
    """The media of one micro-batch as stage 0 takes them: rows now, their gradient back in the backward."""

    encoder: "DecoupledEncoder"
    microbatch: int

    def rows(self) -> Tensor:
        """See DecoupledEncoder.rows."""
        return self.encoder.rows(self.microbatch)

    def return_gradient(self, gradient: Tensor) -> None:
        """See DecoupledEncoder.return_gradient."""
        self.encoder.return_gradient(self.microbatch, gradient)


class DecoupledEncoder:
    """An encoder that every rank of the grid holds, and whose work every rank shares.

    A step is: `plan`, `begin`, the runtime with `schedule(...)` and `hooks()`; stage 0 asks `rows(m)` in the forward of
    micro-batch m and gives `return_gradient(m, grad)` in its backward.

    Args:
        encoder: (pixels (P, ...), grid_thw (N, 3)) -> (Q, *row_shape), the rows of all clips in order. Its forward is
            repeated in phase (c): it must compute the same again (no dropout).
        grid: all of its ranks take part. Process groups of its own are made: collective.
        row_shape: of one feature row.
        rows_of: the number of feature rows of a clip.
        dtype: in which rows and their gradients travel.
        options: see DecoupledOptions.
    """

    def __init__(
        self,
        encoder: nn.Module,
        grid: RankGrid,
        *,
        row_shape: tuple[int, ...],
        rows_of: Callable[[Clip], int],
        dtype: torch.dtype,
        options: DecoupledOptions,
    ) -> None:
        self.encoder, self.grid, self.options = encoder, grid, options
        self.row_shape, self.rows_of, self.dtype = row_shape, rows_of, dtype
        # One for rows and one for gradients: a pair's messages of one kind are in one order on both ends, of both not.
        self._group, backward_group = (_make_group(grid, kind) for kind in ("rows", "gradients"))
        device = next(encoder.parameters()).device
        self._device = device
        self._rows = RowMessages(self._group, dtype, device, row_shape)
        self._gradients = RowMessages(backward_group, dtype, device, row_shape)
        self._step: _Step | None = None
        self._points: tuple[Schedule, DeliveryPoints] | None = None
        """Of the last backbone."""

    # --- the step ---------------------------------------------------------------------------------------------------

    def plan(self, clips: Iterable[Clip]) -> EncodingPlan:
        """Who encodes what of a step, from metadata that every rank has; it may be made long before the step.

        Args:
            clips: of the whole step, every data rank's.
        """
        packs, per_node = make_packs(clips, max_patches=self.options.max_patches), self.options.ranks_per_node
        return assign(
            packs, self.options.cost, self.grid.size("world"), ranks_per_node=per_node,
            node_of_pack=None if per_node is None else [self._home(pack) // per_node for pack in packs],
        )  # fmt: skip

    def begin(
        self,
        plan: EncodingPlan,
        consumers: Callable[[int, int], Tensor],
        load_pixels: Callable[[Clip], Tensor],
        *,
        train: bool = True,
    ) -> None:
        """Begins a step.

        Args:
            plan: what `plan` made, the same on every rank.
            consumers: of (data rank, micro-batch): (Q,) int64, the global rank of stage 0 that needs each feature row.
            load_pixels: decodes a clip that this rank owns: (t * h * w, ...). Asked again in phase (c).
            train: False for an evaluation: phase (a) alone.
        """
        self._assert_idle()
        owners = {clip: ranks[0] for pack, ranks in zip(plan.packs, plan.owners, strict=True) for clip in pack.clips}
        routes = Routes.make(owners, self.rows_of, consumers)
        trainable = self.options.trainable and any(parameter.requires_grad for parameter in self.encoder.parameters())
        self._step = _Step(plan, routes, load_pixels, train and trainable)

    def _home(self, pack: Pack) -> int:
        """The first rank of stage 0 that has the pack's data rank."""
        sizes, data_rank = self.grid.sizes, pack.clips[0].home[0]
        return next(rank for rank in range(sizes.ranks_per_stage) if sizes.coordinate(rank, "data") == data_rank)

    def abort(self) -> None:
        """Drops a step that failed, and its messages."""
        self._step = None
        self._rows.abandon()
        self._gradients.abandon()

    def schedule(self, backbone: Schedule) -> Schedule:
        """The backbone's schedule with the vision actions of this rank's replica: see `add_vision`."""
        step = self._current()
        if self._points is None or self._points[0] is not backbone:
            self._points = backbone, delivery_points(backbone, self.options.prefetch)
        of_stage = {self.grid.sizes.coordinate(rank, "pipeline"): rank for rank in self.grid.ranks("pipeline")}
        return add_vision(
            backbone,
            step.plan,
            self._points[1],
            ranks=[of_stage[place] for place in range(backbone.num_ranks)],
            data_rank=self.grid.index("data"),
            collects=step.train,
            computes_gradients=step.train and not self.options.deterministic,
        )

    def hooks(self) -> dict[Kind, Callable[[int], None]]:
        """What the runtime calls for each kind of vision action, with the action's number."""
        return {
            Kind.VISION_FORWARD: self.encode,
            Kind.DELIVER: self.deliver,
            Kind.RETURN: self.collect,
            Kind.VISION_BACKWARD: self.backward,
        }

    def media(self, microbatch: int) -> DecoupledMedia:
        """What stage 0 needs of this micro-batch, of its own data rank."""
        return DecoupledMedia(self, microbatch)

    # --- phase (a) --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, number: int) -> None:
        """Encodes a pack that this rank owns and keeps the rows."""
        step = self._current()
        clips = step.plan.packs[number].clips
        for clip, rows in zip(clips, self._encode(clips), strict=True):
            step.rows[clip] = rows.to(self.dtype)
            step.to_send[clip] = len(rows)

    def _encode(self, clips: Sequence[Clip]) -> tuple[Tensor, ...]:
        step = self._current()
        pixels = torch.cat([step.load_pixels(clip) for clip in clips]).to(self._device)
        lengths = [self.rows_of(clip) for clip in clips]
        rows = self.encoder(pixels, torch.tensor([clip.grid for clip in clips]))
        if tuple(rows.shape) != (sum(lengths), *self.row_shape):
            accepted = f"{(sum(lengths), *self.row_shape)} for grids {[clip.grid for clip in clips]}"
            raise ShapeError(message("DecoupledEncoder", "encoder's output", tuple(rows.shape), accepted))
        return rows.split(lengths)

    # --- phase (b) --------------------------------------------------------------------------------------------------

    def deliver(self, microbatch: int) -> None:
        """Starts the messages that carry the rows of this micro-batch, of every data rank, to their consumers."""
        step, rank = self._current(), self.grid.rank
        for data_rank in range(self.grid.size("data")):
            key = (data_rank, microbatch)
            for _, consumer, segments in step.routes.between(key, owner=rank):
                rows = torch.cat([step.rows[segment.clip][segment.rows_R] for segment in segments])
                self._rows.send(key, rank, consumer, rows)
                for segment in segments:
                    step.to_send[segment.clip] -= len(segment.rows_R)
                    if step.to_send[segment.clip] == 0:
                        del step.rows[segment.clip]
            for owner, _, segments in step.routes.between(key, consumer=rank):
                self._rows.post(key, rank, owner, sum(len(segment.rows_R) for segment in segments))

    def rows(self, microbatch: int) -> Tensor:
        """(R, *row_shape): the rows at this rank's tokens of the micro-batch, in order. Waits for them."""
        step, key = self._current(), (self.grid.index("data"), microbatch)
        count = step.routes.rows_at.get((key, self.grid.rank), 0)
        rows = torch.empty((count, *self.row_shape), dtype=self.dtype, device=self._device)
        for owner, _, segments in step.routes.between(key, consumer=self.grid.rank):
            received = self._rows.receive(key, owner)
            rows[torch.cat([segment.places_R for segment in segments])] = received
        return rows

    def return_gradient(self, microbatch: int, gradient: Tensor) -> None:
        """Starts sending the gradient of `rows(microbatch)` back to the owners."""
        step, key = self._current(), (self.grid.index("data"), microbatch)
        if not step.train:
            return
        for owner, _, segments in step.routes.between(key, consumer=self.grid.rank):
            places = torch.cat([segment.places_R for segment in segments])
            self._gradients.send(key, self.grid.rank, owner, gradient[places])

    def collect(self, microbatch: int) -> None:
        """Makes room for the gradients of this micro-batch's rows that this rank encoded."""
        step, rank = self._current(), self.grid.rank
        for data_rank in range(self.grid.size("data")):
            key = (data_rank, microbatch)
            for _, consumer, segments in step.routes.between(key, owner=rank):
                self._gradients.post(key, rank, consumer, sum(len(segment.rows_R) for segment in segments))

    # --- phase (c) --------------------------------------------------------------------------------------------------

    def backward(self, number: int) -> None:
        """Encodes a pack once more and adds its gradients to those of the encoder's parameters."""
        step = self._current()
        clips = step.plan.packs[number].clips
        self._collect_gradients(clips)
        with torch.enable_grad():
            rows = torch.cat(self._encode(clips)).to(self.dtype)
            torch.autograd.backward(rows, torch.cat([step.gradients.pop(clip) for clip in clips]))

    def _collect_gradients(self, clips: Sequence[Clip]) -> None:
        """Receives what is still missing for these clips. A message holds all of its micro-batch's clips here."""
        step = self._current()
        for clip in clips:
            if clip in step.gradients:
                continue
            key = clip.home
            for _, consumer, segments in step.routes.between(key, owner=self.grid.rank):
                received = self._gradients.receive(key, consumer)
                parts = received.split([len(segment.rows_R) for segment in segments])
                for segment, part in zip(segments, parts, strict=True):
                    if segment.clip not in step.gradients:
                        shape = (self.rows_of(segment.clip), *self.row_shape)
                        step.gradients[segment.clip] = received.new_empty(shape)
                    step.gradients[segment.clip][segment.rows_R] = part

    def finish(self) -> None:
        """Ends the step: every message is out of this rank's hands. Collective; runs a deterministic phase (c)."""
        step = self._current()
        if step.train and self.options.deterministic:
            trained = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
            owners = [ranks[0] for ranks in step.plan.owners]
            sum_in_order(trained, owners, self.grid.rank, self._group, self.backward)
        self._rows.finish()
        self._gradients.finish()
        self._step = None

    @property
    def bytes_held(self) -> int:
        """Rows and gradients that this rank holds, sent or received and not yet consumed included."""
        step = self._step
        held = [] if step is None else [*step.rows.values(), *step.gradients.values()]
        return sum(rows.nbytes for rows in held) + self._rows.bytes_waiting + self._gradients.bytes_waiting

    @property
    def bytes_held_by_consumer(self) -> int:
        """Of those, what a rank of stage 0 holds as such, beside its part as one of the encoder's ranks: rows that have
        come for it or are to come, and gradients on their way back. No more than a few micro-batches' in any step."""
        return self._rows.bytes_awaited + self._gradients.bytes_on_their_way_out

    def _current(self) -> _Step:
        assert self._step is not None, "begin() starts a step"
        return self._step

    def _assert_idle(self) -> None:
        assert self._step is None, "finish() ends the step before"


def _make_group(grid: RankGrid, kind: str) -> dist.ProcessGroup | None:
    if grid.size("world") == 1:
        return None
    group = dist.new_group(list(grid.ranks("world")), group_desc=f"decoupled encoder's {kind}")
    assert isinstance(group, dist.ProcessGroup)
    return group
