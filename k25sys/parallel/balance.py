"""Balanced experts: the bias rule without an auxiliary loss, the optional loss along sequences, and load statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from k25sys import ops
from k25sys.errors import ArgumentValueError, ShapeError, message
from k25sys.ops import checks
from k25sys.parallel.grid import RankGrid

COUNTS = (torch.int32, torch.int64)


@torch.no_grad()
def update_expert_bias(
    bias_E: Tensor, tokens_per_expert_E: Tensor, *, rate: float, grid: RankGrid | None = None
) -> Tensor:
    """Auxiliary-loss-free balancing: b_e += rate * sign(mean load - load of e) (DeepSeek-V3, section 2.1.2).

    The signs come from integers, so that every rank moves its copy of the bias by the same bits.

    Args:
        bias_E: (E,), or (L, E) for several layers; float32, changed in place. See k25sys.ops.route_tokens.
        tokens_per_expert_E: of that shape, int32 or int64: the tokens of this rank in the whole step.
        rate: the size of a step, finite and >= 0; DeepSeek-V3's is 1e-3.
        grid: loads are summed over its "stage", whose ranks all see different tokens (sequence parallel). Collective.

    Returns:
        The summed load, int64, of the bias's shape.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or rate.
    """
    op = "update_expert_bias"
    axes = "LE" if isinstance(bias_E, Tensor) and bias_E.dim() == 2 else "E"
    checks.tensor(op, "bias_E", bias_E, (torch.float32,), (None,) * len(axes), axes)
    checks.tensor(op, "tokens_per_expert_E", tokens_per_expert_E, COUNTS, bias_E.shape, axes)
    checks.same_device(op, "bias_E", bias_E, {"tokens_per_expert_E": tokens_per_expert_E})
    if not 0 <= rate < float("inf"):
        raise ArgumentValueError(message(op, "rate", rate, "a finite number >= 0"))
    load_E = tokens_per_expert_E.to(torch.int64, copy=True)
    if grid is not None and (group := grid.group("stage")) is not None:
        dist.all_reduce(load_E, group=group)
    bias_E += rate * (load_E.sum(-1, keepdim=True) - load_E * load_E.shape[-1]).sign()
    return load_E


def load_statistics(tokens_per_expert_E: Tensor, *, num_ranks: int = 1) -> dict[str, float]:
    """How evenly tokens are spread, for a step's metrics.

    Args:
        tokens_per_expert_E: (E,), or (L, E): the worst layer counts. Summed over ranks.
        num_ranks: ranks along the expert axis, of E / num_ranks experts each.

    Returns:
        max_violation: max load / mean load - 1 (MaxVio of auxiliary-loss-free balancing, arXiv 2408.15664, eq. 4),
        rank_max_violation: the same of ranks, idle_experts: the share of experts without a token. All 0 without tokens.
    """
    checks.integer("load_statistics", "num_ranks", num_ranks, 1, tokens_per_expert_E.shape[-1])
    if tokens_per_expert_E.shape[-1] % num_ranks:
        got, accepted = f"{num_ranks} ranks", f"a divisor of {tokens_per_expert_E.shape[-1]} experts"
        raise ArgumentValueError(message("load_statistics", "num_ranks", got, accepted))
    load_LE = tokens_per_expert_E.reshape(-1, tokens_per_expert_E.shape[-1]).double()
    load_LR = load_LE.view(len(load_LE), num_ranks, -1).sum(2)
    return {
        "max_violation": _max_violation(load_LE),
        "rank_max_violation": _max_violation(load_LR),
        "idle_experts": float((load_LE == 0).double().mean(1).amax()) if load_LE.any() else 0.0,
    }


def _max_violation(load_LN: Tensor) -> float:
    mean_L = load_LN.mean(1)
    return float(torch.where(mean_L > 0, load_LN.amax(1) / mean_L - 1, 0.0).amax())


def _bias_of(router: nn.Module) -> Tensor:
    bias_E = router.e_score_correction_bias
    assert isinstance(bias_E, Tensor)
    return bias_E


class ExpertBalancer:
    """Counts the tokens that each router sends to each expert, and moves the routers' biases after a step.

    Only forwards in training mode count. With one all-reduce for all layers:

        balancer = ExpertBalancer({"layers.1": router, ...}, grid, rate=1e-3)
        ...                          # forwards and backwards of all micro-batches of a step
        metrics |= balancer.update() # after the optimiser's step

    Args:
        routers: modules whose output is (weights_TK, experts_TK), with a tensor e_score_correction_bias (E,); the same
            number of experts each. Names are for messages.
        grid: its "stage" ranks sum their loads. rate: may be changed between steps; DeepSeek-V3 ends with 0.
    """

    def __init__(self, routers: Mapping[str, nn.Module], grid: RankGrid, *, rate: float) -> None:
        self.grid, self.rate = grid, rate
        self._routers = list(routers.values())
        biases = [_bias_of(router) for router in self._routers]
        for name, bias_E in zip(routers, biases, strict=True):
            if bias_E.shape != biases[0].shape:
                got, accepted = tuple(bias_E.shape), f"{tuple(biases[0].shape)}, as the first router has"
                raise ShapeError(message("ExpertBalancer", f"{name}.e_score_correction_bias", got, accepted))
        self._load = [torch.zeros_like(bias_E, dtype=torch.int64) for bias_E in biases]
        for index, router in enumerate(self._routers):
            router.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Any:
        def count(router: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> None:
            if router.training:
                experts_TK = output[1]
                load_E = self._load[index] = self._load[index].to(experts_TK.device)
                _count(load_E, experts_TK)

        return count

    def update(self) -> dict[str, float]:
        """Moves all biases by what was counted since the last call, and forgets it. Collective over the stage.

        Returns:
            load_statistics of the worst layer, by rank of the expert axis.
        """
        if not self._routers:
            return {}
        biases = [_bias_of(router) for router in self._routers]
        bias_LE = torch.stack(biases)
        load_LE = update_expert_bias(bias_LE, torch.stack(self._load), rate=self.rate, grid=self.grid)
        for bias_E, moved_E, counted_E in zip(biases, bias_LE, self._load, strict=True):
            bias_E.copy_(moved_E)
            counted_E.zero_()
        return load_statistics(load_LE, num_ranks=self.grid.size("expert"))

    def forget(self) -> None:
        """Drops what was counted since the last update: of a step that is not to count."""
        for counted_E in self._load:
            counted_E.zero_()


def sequence_auxiliary_loss(
    logits_TE: Tensor,
    sequences_T: Tensor,
    num_sequences: int,
    *,
    top_k: int,
    alpha: float,
    normalizer: float,
    grid: RankGrid | None = None,
) -> Tensor:
    """The complementary sequence-wise balance loss (DeepSeek-V3, equations 17 to 20), of sequences packed together.

    For each sequence of T tokens: alpha * sum over e of f_e P_e, f_e = E / (K T) * tokens whose K largest scores s
    include e's (without the bias), P_e = 1 / T * sum of s_e / (sum of the token's s). f has no gradient.

    Args:
        logits_TE: (T, E) float32, float64 or bfloat16 (computed in float32) of this rank's tokens; s = sigmoid(logits).
        sequences_T: (T,) int64: the sequence of each token, in [0, num_sequences). Tokens of other numbers are an
            IndexError on the CPU.
        num_sequences: sequences of this data rank's micro-batch, the same on all its context and tensor ranks.
        top_k: K. alpha: the loss's weight, 1e-4 in DeepSeek-V3; 0 means no loss.
        normalizer: what the sum over sequences is divided by: the number of sequences in the global batch, as gradients
            of micro-batches and ranks are summed.
        grid: a sequence's counts are summed over "context" and "tensor", whose ranks hold its other tokens. Collective.

    Returns:
        This rank's part of the loss, a scalar: parts of ranks, and their gradients, add up to the whole.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number.
    """
    op = "sequence_auxiliary_loss"
    checks.tensor(op, "logits_TE", logits_TE, checks.FLOATS, (None, None), "TE")
    checks.tensor(op, "sequences_T", sequences_T, (torch.int64,), (len(logits_TE),), "T")
    checks.same_device(op, "logits_TE", logits_TE, {"sequences_T": sequences_T})
    checks.integer(op, "num_sequences", num_sequences, 0, checks.MAX_ROWS)
    if sequences_T.device.type == "cpu" and len(sequences_T):
        low, high = int(sequences_T.min()), int(sequences_T.max())
        if low < 0 or high >= num_sequences:
            raise IndexError(message(op, "sequences_T", f"{low} to {high}", f"0 to {num_sequences - 1}"))
    if not (normalizer > 0 and alpha >= 0):
        got = f"alpha {alpha}, normalizer {normalizer}"
        raise ArgumentValueError(message(op, "alpha, normalizer", got, "alpha >= 0 and normalizer > 0"))
    scores_TE = logits_TE.to(checks.routing_dtype(logits_TE.dtype)).sigmoid()
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    num_experts = logits_TE.shape[1]
    with torch.no_grad():
        no_bias_E = torch.zeros(num_experts, dtype=torch.float32, device=logits_TE.device)
        _, experts_TK = ops.route_tokens(logits_TE.detach(), no_bias_E, top_k=top_k, scale=1.0)
        cells_TK = sequences_T[:, None] * num_experts + experts_TK
        chosen_SE = torch.zeros((num_sequences, num_experts), dtype=torch.int64, device=logits_TE.device)
        _count(chosen_SE, cells_TK)
        for axis in ("context", "tensor"):
            if grid is not None and (group := grid.group(axis)) is not None:
                dist.all_reduce(chosen_SE, group=group)
        chosen_SE = chosen_SE.to(scores_TE.dtype)
        length_S1 = chosen_SE.sum(1, keepdim=True) / top_k
        # An empty sequence has no token here that would read its row.
        factor_SE = alpha * num_experts / top_k * chosen_SE / (length_S1 * length_S1 * normalizer)
    return (factor_SE[sequences_T] * shares_TE).sum()


def _count(counts: Tensor, cells: Tensor) -> None:
    """Adds 1 to counts.flatten() at each of `cells`. Unlike bincount, the host does not wait for a device."""
    cells = cells.flatten().long()
    counts.view(-1).scatter_add_(0, cells, torch.ones_like(cells))


class _AttachedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x itself; its backward adds that of `loss` (a scalar), with gradient 1.

    So that a loss within a layer reaches the backward of a pipeline stage that only knows its output.
    """
    return _AttachedLoss.apply(x, loss)


def add_sequence_loss(
    router: nn.Module, sequences: Callable[[], tuple[Tensor, int, float]], *, alpha: float, grid: RankGrid
) -> RemovableHandle:
    """From now on the backward of a router's weights_TK includes that of its `sequence_auxiliary_loss`.

    The logits are computed a second time, in forwards of training that record gradients.

    Args:
        router: with a `weight` (E, D), whose output is (weights_TK, experts_TK).
        sequences: called in each forward: sequences_T, num_sequences and normalizer of the micro-batch.
        alpha, grid: as in `sequence_auxiliary_loss`.

    Returns:
        A handle; its `remove()` ends this.
    """

    def attach(router: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> Any:
        if not (router.training and torch.is_grad_enabled()):
            return None
        sequences_T, num_sequences, normalizer = sequences()
        weights_TK, experts_TK = output
        dtype = weights_TK.dtype
        with torch.autocast(weights_TK.device.type, enabled=False):
            logits_TE = F.linear(inputs[0].to(dtype), router.get_parameter("weight").to(dtype))
        top_k = experts_TK.shape[1]
        loss = sequence_auxiliary_loss(
            logits_TE, sequences_T, num_sequences, top_k=top_k, alpha=alpha, normalizer=normalizer, grid=grid
        )
        return attach_loss(weights_TK, loss), experts_TK

    return router.register_forward_hook(attach)
