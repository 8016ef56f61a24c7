"""ZeRO-1 with MuonClip: float32 masters and moments sharded over the copies of each parameter, matrices whole for Muon.

A step: gradients reach the shards bucket by bucket while the backward still runs; partial sums are added over "tensor";
the norm of the whole model's gradient is formed, and nothing is touched if it is not finite; Muon or AdamW update the
masters; QK-Clip scales rows of them; the parameters are gathered from the masters.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, message
from k25sys.optim.matrix_exchange import MatrixExchange
from k25sys.optim.muon_clip import MuonClipConfig, adamw_update, advance_momentum, decay_and_step
from k25sys.optim.qk_clip import scale_rows
from k25sys.parallel.buckets import Bucket, GradientBuckets, Piece
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout

_BUCKET_BYTES = 1 << 28
_NORM_EPSILON = 1e-6


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
        grid: every rank of the grid makes one, with the same config.
        config: see MuonClipConfig.
        bucket_bytes: of gradients that travel together.
        irregular: see GradientBuckets.

    Raises:
        ArgumentValueError: a parameter without a layout.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ParameterLayout],
        grid: RankGrid,
        config: MuonClipConfig,
        *,
        bucket_bytes: int = _BUCKET_BYTES,
        irregular: Collection[str] = (),
    ) -> None:
        missing = [name for name in parameters if name not in layouts]
        if missing:
            raise ArgumentValueError(
                message("ZeroOptimizer", "layouts", f"none for {missing[0]}", "one for each parameter")
            )
        self.grid, self.config, self.num_steps = grid, config, 0
        self.gradients = GradientBuckets(parameters, layouts, grid, bucket_bytes=bucket_bytes, irregular=irregular)
        self._states = [_BucketState(bucket) for bucket in self.gradients.buckets]
        stage = [bucket for bucket in self.gradients.buckets if bucket.axis != "world"]
        world = [bucket for bucket in self.gradients.buckets if bucket.axis == "world"]
        self._exchanges = (MatrixExchange(stage, grid, "stage", config), MatrixExchange(world, grid, "world", config))

    def expect_gradients(self, num_microbatches: int) -> None:
        """Call before the first backward of a step: a bucket is then reduced as soon as so many gradients have landed
        on each of its parameters, while the backward of others runs. Without, all are reduced in `step`."""
        self.gradients.expect(num_microbatches)

    @torch.no_grad()
    def step(self, learning_rate: float, row_factors: Mapping[str, Tensor] | None = None) -> StepReport:
        """Updates all parameters from their main_grads, and zeroes those. Collective over the grid.

        Args:
            learning_rate: eta, of Muon and AdamW alike.
            row_factors: QK-Clip's, by parameter: (N,) for this rank's N rows, applied after the update.
        """
        shards = [bucket.wait() for bucket in self.gradients.buckets]
        for bucket, shard in zip(self.gradients.buckets, shards, strict=True):
            self._sum_over_tensor(bucket, shard)
        norm = self._norm(shards)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.num_steps += 1
            most = self.config.max_gradient_norm
            scale = 1.0 if most is None else float((most / (norm + _NORM_EPSILON)).clamp_max(1.0))
            self._update(shards, scale, learning_rate)
            self._clip(row_factors or {})
            self.publish()
        self.gradients.clear()
        return StepReport(float(norm), finite)

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

    def _norm(self, shards: list[Tensor]) -> Tensor:
        """Of the whole model's gradient: a float64 scalar, the same on every rank."""
        device = shards[0].device if shards else torch.device(self.grid.device_type)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for bucket, shard in zip(self.gradients.buckets, shards, strict=True):
            for piece in bucket.pieces():
                total += shard[piece.shard].double().square().sum() / self._copies(piece.slot.layout)
        group = self.grid.group("world")
        if group is not None:
            dist.all_reduce(total, group=group)
        return total.sqrt()

    def _update(self, shards: list[Tensor], scale: float, learning_rate: float) -> None:
        momenta: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        for state, shard in zip(self._states, shards, strict=True):
            for piece in state.bucket.pieces():
                gradient = shard[piece.shard] * scale
                first, name = state.first[piece.shard], piece.slot.name
                if piece.slot.layout.matrix:
                    momenta[state.bucket.axis == "world"][name] = advance_momentum(first, gradient, self.config)
                else:
                    update = adamw_update(first, state.second[name], gradient, self.num_steps, self.config)
                    decay_and_step(state.master[piece.shard], update, learning_rate, self.config)
        updates: dict[str, Tensor] = {}
        for everywhere, exchange in zip((False, True), self._exchanges, strict=True):
            updates |= exchange.orthogonalized(momenta[everywhere])
        for state in self._states:
            for piece in state.bucket.pieces():
                if piece.slot.layout.matrix:
                    update = updates[piece.slot.name].to(state.master.dtype)
                    decay_and_step(state.master[piece.shard], update, learning_rate, self.config)

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
        started = []
        for state in self._states:
            bucket, dtype = state.bucket, state.bucket.slots[0].parameter.dtype
            shard = state.master.to(dtype)
            flat, work = shard, None
            if bucket.group is not None:
                flat = torch.empty(bucket.gradients.numel(), dtype=dtype, device=shard.device)
                work = dist.all_gather_into_tensor(flat, shard, group=bucket.group, async_op=True)
            started.append((bucket, flat, work))
        for bucket, flat, work in started:
            if work is not None:
                work.wait()
            for slot in bucket.slots:
                slot.parameter.copy_(flat[slot.begin : slot.end].view(slot.parameter.shape))

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
