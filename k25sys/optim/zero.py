"""ZeRO-1 with MuonClip: float32 masters and moments sharded over the copies of each parameter, matrices whole for Muon.

A step: gradients reach the shards bucket by bucket while the backward still runs; partial sums are added over "tensor";
ranks tell each other the norms of their gradients and whether their arguments are right, and nothing is touched if a
norm is not finite or an argument is wrong; Muon or AdamW update the masters; QK-Clip scales rows of them; the
parameters are gathered from the masters.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DeviceError,
    RankFailureError,
    ShapeError,
    listing,
    message,
)
from k25sys.optim.fused_adamw import AdamWPieces, choose
from k25sys.optim.groups import GroupRule, ParameterGroup, check_groups_used, match_groups, rules
from k25sys.optim.local_muon import WholeMatrices, step_whole
from k25sys.optim.matrix_exchange import MatrixExchange
from k25sys.optim.muon_clip import MuonClipConfig, advance_momentum, decay_and_step, update_scale
from k25sys.optim.qk_clip import scale_rows
from k25sys.parallel.buckets import Bucket, GradientBuckets, Piece
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout

_BUCKET_BYTES = 1 << 28
_NORM_EPSILON = 1e-6
_GATHERS_IN_FLIGHT = 2  # one that is copied out of while the next one arrives: more would only take memory


@dataclass(frozen=True)
class StepReport:
    """What a step did; the same on every rank."""

    gradient_norm: float
    """Of the whole model, before clipping."""
    finite: bool
    """False: a gradient somewhere is inf or NaN, and nothing was updated anywhere."""


@dataclass(frozen=True)
class StateShard:
    """A piece of the optimiser's state, as a view: loading copies into `tensor`."""

    name: str
    key: str
    """master, momentum, exp_avg or exp_avg_sq."""
    layout: ParameterLayout
    begin: int
    """The first element of the parameter's local part, flat in the order of layout.local_shape; `end` is one past."""
    end: int
    tensor: Tensor


class _BucketState:
    """Master and moments of a bucket's shard."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        flat = torch.zeros_like(bucket.gradients)
        for slot in bucket.slots:
            flat[slot.begin : slot.end] = slot.parameter.detach().reshape(-1)
        self.master = bucket.shard_of(flat).clone()
        self.first = torch.zeros_like(self.master)
        adam = [piece for piece in bucket.pieces() if not piece.slot.layout.matrix]
        self.second = {piece.slot.name: torch.zeros_like(self.master[piece.shard]) for piece in adam}


class ZeroOptimizer:
    """MuonClip over sharded state.

    Args:
        parameters: this rank's trainable ones, by released name, in the order of the forward.
        layouts: of each.
        grid: every rank of the grid makes one, with the same config: collective.
        config: see MuonClipConfig.
        groups: what is different about some parameters. The first group that matches a name decides; one that decides
            about no parameter of the whole model is an error. Frozen ones lose their requires_grad.
        adamw: the backend of AdamW: see fused_adamw.listing.
        bucket_bytes: of gradients that travel together.
        irregular: see GradientBuckets.

    Raises:
        ArgumentValueError: a parameter without a layout, or without requires_grad and not frozen; a group that matches
            nothing.
        BackendError: an AdamW that does not run here.
        RankFailureError: another rank has such a fault.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ParameterLayout],
        grid: RankGrid,
        config: MuonClipConfig,
        *,
        groups: Sequence[ParameterGroup] = (),
        adamw: str = "reference",
        bucket_bytes: int = _BUCKET_BYTES,
        irregular: Collection[str] = (),
    ) -> None:
        self.grid, self.config, self.num_steps = grid, config, 0
        matched, fault = match_groups(parameters, groups), None
        try:
            _check_parameters(parameters, layouts, {name for name, number in matched.items() if groups[number].frozen})
            for dtype in {torch.promote_types(p.dtype, torch.float32) for p in parameters.values()} or {torch.float32}:
                self._adamw = choose(adamw, torch.device(grid.device_type), dtype)
        except ValueError as error:
            fault = error
        counts = [sum(number == each for each in matched.values()) for number in range(len(groups))]
        told = _told_by_all(grid, torch.tensor([fault is not None, *counts], device=grid.device_type))
        _raise_on_all_ranks("ZeroOptimizer", fault, told[:, 0])
        check_groups_used(groups, told[:, 1:].sum(0).tolist())  # of all ranks: it may match on other stages only
        self._rules = rules(matched, parameters, groups, config)
        self.frozen = {name: parameters[name] for name, number in matched.items() if groups[number].frozen}
        """Parameters that are not updated, and have no shards."""
        _freeze(self.frozen.values())
        trained = {name: parameter for name, parameter in parameters.items() if name not in self.frozen}
        self.gradients = GradientBuckets(trained, layouts, grid, bucket_bytes=bucket_bytes, irregular=irregular)
        self._states = [_BucketState(bucket) for bucket in self.gradients.buckets]
        self._exchanges: dict[str, MatrixExchange] = {}
        """By the axis over which matrices are spread; none where they lie whole on this rank."""
        for axis in ("stage", "world"):
            buckets = [bucket for bucket in self.gradients.buckets if _spread_over(bucket) == axis]
            if grid.group(axis) is not None:
                self._exchanges[axis] = MatrixExchange(buckets, grid, axis, config)

    def expect_gradients(self, num_microbatches: int) -> None:
        """Call before the first backward of a step: a bucket is then reduced as soon as so many gradients have landed
        on each of its parameters, while the backward of others runs. Without, all are reduced in `step`."""
        self.gradients.expect(num_microbatches)

    @torch.no_grad()
    def step(self, learning_rate: float, row_factors: Mapping[str, Tensor] | None = None) -> StepReport:
        """Updates all parameters from their main_grads, and zeroes those. Collective over the grid.

        Args:
            learning_rate: eta, of Muon and AdamW alike, before the scales of groups. The same on every rank.
            row_factors: QK-Clip's, by parameter: (N,) for this rank's N rows, applied after the update. Those of frozen
                parameters are passed over.

        Raises:
            ArgumentValueError, ShapeError: an argument of this rank is wrong. RankFailureError: one of another rank is,
                or the ranks' learning rates differ. All ranks raise, nothing is updated, gradients are zeroed.
        """
        factors, fault = row_factors or {}, None
        shards = self.gradients.reduced()
        for bucket, shard in zip(self.gradients.buckets, shards, strict=True):
            self._sum_over_tensor(bucket, shard)
        try:
            self._check_arguments(learning_rate, factors)
        except (TypeError, ValueError) as error:
            fault = error
        try:
            norm = self._agreed_norm(shards, learning_rate, fault)
            finite = isfinite(norm)
            if finite:
                self.num_steps += 1
                most = self.config.max_gradient_norm
                scale = 1.0 if most is None else min(1.0, most / (norm + _NORM_EPSILON))
                self._update(shards, scale, learning_rate)
                self._clip(factors)
                self.publish()
        finally:
            self.gradients.clear()
        return StepReport(norm, finite)

    def _check_arguments(self, learning_rate: float, row_factors: Mapping[str, Tensor]) -> None:
        op = "ZeroOptimizer.step"
        if not isinstance(learning_rate, int | float):
            raise ArgumentTypeError(message(op, "learning_rate", type(learning_rate).__name__, "a number"))
        if not (isfinite(learning_rate) and learning_rate >= 0):
            raise ArgumentValueError(message(op, "learning_rate", learning_rate, "a finite number >= 0"))
        slots = {slot.name: slot for bucket in self.gradients.buckets for slot in bucket.slots}
        checked = []
        for name, factors in row_factors.items():
            argument, slot = f"row_factors[{name!r}]", slots.get(name)
            if not isinstance(factors, Tensor):
                raise ArgumentTypeError(message(op, argument, type(factors).__name__, "a tensor"))
            if slot is None:
                if name not in self.frozen:
                    raise ArgumentValueError(message(op, argument, "factors", "none: this rank has no such parameter"))
                continue
            rows, device = slot.parameter.shape[:-1].numel(), slot.parameter.device
            if factors.shape != (rows,):
                raise ShapeError(message(op, argument, tuple(factors.shape), f"({rows},), this rank's rows of it"))
            if factors.device != device:
                raise DeviceError(message(op, argument, factors.device, f"the parameter's device, {device}"))
            checked.append(factors.float())
        if checked and not torch.cat(checked).isfinite().all():  # all at once: it waits for the device
            raise ArgumentValueError(message(op, "row_factors", "inf or NaN among them", "finite factors"))

    def _sum_over_tensor(self, bucket: Bucket, shard: Tensor) -> None:
        group = self.grid.group("tensor")
        parts = [shard[piece.shard] for piece in bucket.pieces() if piece.slot.layout.sum_over_tensor]
        if group is None or not parts:
            return
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=group)
        for part, summed in zip(parts, flat.split([len(part) for part in parts]), strict=True):
            part.copy_(summed)

    def _copies(self, layout: ParameterLayout) -> int:
        """Ranks that hold one element's sum, each of which counts it."""
        sizes = self.grid.sizes
        ranks = sizes.world_size if layout.everywhere else sizes.ranks_per_stage
        return ranks // (sizes.size(layout.replicas) * prod(sizes.size(axis) for _, axis in layout.splits))

    def _agreed_norm(self, shards: list[Tensor], learning_rate: float, fault: Exception | None) -> float:
        """The norm of the whole model's gradient, the same on every rank. Raises on all ranks if a rank has a fault."""
        device = shards[0].device if shards else torch.device(self.grid.device_type)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for bucket, shard in zip(self.gradients.buckets, shards, strict=True):
            for piece in bucket.pieces():
                total += _squares(shard[piece.shard]) / self._copies(piece.slot.layout)
        mine = torch.stack([total, *total.new_tensor([0.0, learning_rate] if fault is None else [1.0, 0.0])])
        squares, faults, rates = _told_by_all(self.grid, mine).unbind(1)
        _raise_on_all_ranks("ZeroOptimizer.step", fault, faults)
        if len(set(rates.tolist())) > 1:
            got = f"{learning_rate} here, {listing(sorted({str(rate) for rate in rates.tolist()}))} on all ranks"
            raise RankFailureError(message("ZeroOptimizer.step", "learning_rate", got, "the same on every rank"))
        return float(squares.sum().sqrt())

    def _update(self, shards: list[Tensor], scale: float, learning_rate: float) -> None:
        momenta: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        whole: list[WholeMatrices] = []
        adam: defaultdict[GroupRule, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)
        for state, shard in zip(self._states, shards, strict=True):
            if scale != 1.0:
                shard.mul_(scale)
            axis = _spread_over(state.bucket)
            for piece in state.bucket.pieces():
                rule, name = self._rules[piece.slot.name], piece.slot.name
                master, gradient, first = (each[piece.shard] for each in (state.master, shard, state.first))
                if not piece.slot.layout.matrix:
                    adam[rule].append((master, gradient, first, state.second[name]))
                elif axis in self._exchanges:
                    momenta[axis][name] = advance_momentum(first, gradient, self.config)
                else:
                    shape = (-1, *piece.slot.layout.shape[-2:])
                    whole.append(
                        WholeMatrices(
                            master=master.view(shape), momentum=first.view(shape), gradient=gradient.view(shape),
                            learning_rate=learning_rate * rule.learning_rate_scale, config=rule.config,
                        )
                    )  # fmt: skip
        for rule, pieces in adam.items():
            rate = learning_rate * rule.learning_rate_scale
            self._adamw(AdamWPieces(*zip(*pieces, strict=True)), self.num_steps, rate, rule.config)
        step_whole(whole)
        updates: dict[str, Tensor] = {}
        for axis, exchange in self._exchanges.items():
            updates |= exchange.orthogonalized(momenta[axis])
        for state, piece in self._pieces():
            if piece.slot.name in updates:
                rule, update = self._rules[piece.slot.name], updates[piece.slot.name].to(state.master.dtype)
                rate, size = learning_rate * rule.learning_rate_scale, update_scale(*piece.slot.layout.shape[-2:])
                decay_and_step(state.master[piece.shard], update, rate, rule.config, scale=size)

    def _clip(self, row_factors: Mapping[str, Tensor]) -> None:
        for state, piece in self._pieces():
            factors = row_factors.get(piece.slot.name)
            if factors is not None:
                columns = piece.slot.parameter.shape[-1]
                scale_rows(state.master[piece.shard], factors, piece.begin, columns)

    def _pieces(self) -> Iterator[tuple[_BucketState, Piece]]:
        for state in self._states:
            for piece in state.bucket.pieces():
                yield state, piece

    @torch.no_grad()
    def publish(self) -> None:
        """Gathers the parameters from the masters, rounded to their dtype: after a step, or after loading shards."""
        flying: deque[tuple[Bucket, Tensor, dist.Work | None]] = deque()
        for state in self._states:
            bucket, dtype = state.bucket, state.bucket.slots[0].parameter.dtype
            shard = state.master.to(dtype)
            flat, work = shard, None
            if bucket.group is not None:
                flat = torch.empty(bucket.gradients.numel(), dtype=dtype, device=shard.device)
                work = dist.all_gather_into_tensor(flat, shard, group=bucket.group, async_op=True)
            flying.append((bucket, flat, work))
            if len(flying) == _GATHERS_IN_FLIGHT:
                _arrive(*flying.popleft())
        while flying:
            _arrive(*flying.popleft())

    def shards(self) -> Iterator[StateShard]:
        """This rank's state, piece by piece; with `num_steps` it is all there is."""
        for state, piece in self._pieces():
            layout, name = piece.slot.layout, piece.slot.name
            tensors = {"master": state.master[piece.shard]}
            if layout.matrix:
                tensors["momentum"] = state.first[piece.shard]
            else:
                tensors |= {"exp_avg": state.first[piece.shard], "exp_avg_sq": state.second[name]}
            for key, tensor in tensors.items():
                yield StateShard(name, key, layout, piece.begin, piece.end, tensor)


def _spread_over(bucket: Bucket) -> str:
    """The axis whose ranks hold the bucket's matrices together."""
    return "world" if bucket.axis == "world" else "stage"


def _squares(flat: Tensor) -> Tensor:
    """The sum of squares in float64, without a whole copy in it."""
    together = 1 << (18 if flat.device.type == "cpu" else 24)
    wide = (part.double() for part in flat.split(together))
    return torch.stack([part.dot(part) for part in wide]).sum()


def _told_by_all(grid: RankGrid, mine: Tensor) -> Tensor:
    """(R, N) on the host: `mine` (N,) of every rank of the grid."""
    group = grid.group("world")
    if group is None:
        return mine.cpu()[None]
    everyone = mine.new_empty(grid.size("world") * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.view(-1, len(mine)).cpu()


def _raise_on_all_ranks(op: str, fault: Exception | None, faults_R: Tensor) -> None:
    """Raises this rank's fault, or names the ranks that have one: alone, they would be waited for."""
    if fault is not None:
        raise fault
    ranks = [str(rank) for rank, faulty in enumerate(faults_R.tolist()) if faulty]
    if ranks:
        raise RankFailureError(f"{op}: faulty arguments on rank {listing(ranks)}, whose error names them")


def _check_parameters(
    parameters: Mapping[str, nn.Parameter], layouts: Collection[str], frozen: Collection[str]
) -> None:
    for name, parameter in parameters.items():
        if name not in layouts:
            raise ArgumentValueError(message("ZeroOptimizer", "layouts", f"none for {name}", "one for each parameter"))
        if not parameter.requires_grad and name not in frozen:
            got, accepted = f"{name} without requires_grad", "ones that have it, or that a group freezes"
            raise ArgumentValueError(message("ZeroOptimizer", "parameters", got, accepted))


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    """No gradients, and nothing left of an optimiser that had these parameters before."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        for attribute in ("main_grad", "on_gradient"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)


def _arrive(bucket: Bucket, flat: Tensor, work: dist.Work | None) -> None:
    """Copies a bucket's parameters out of what was gathered."""
    if work is not None:
        work.wait()
    for slot in bucket.slots:
        slot.parameter.copy_(flat[slot.begin : slot.end].view(slot.parameter.shape))
