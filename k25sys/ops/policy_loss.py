"""K2.5's token-level policy loss with the clipped log-ratio (arXiv 2602.02276, section 4.4.2, eq. 1).

With l = log pi - log pi_old of a token, A its advantage and N the number of tokens with loss,

    loss = -J = -(1 / N) sum over tokens of [ clip(exp(l), exp(log_low), exp(log_high)) A - tau l^2 ].

The clip masks the gradient outside [log_low, log_high] whatever the sign of A. The penalty has no factor 1/2 and covers
masked tokens too, unless penalty_on="kept". The gradient is formed in the forward pass, where the logits are at hand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, ArgumentValueError, LayoutError, message
from k25sys.ops import checks, native

INDICES = (torch.int64, torch.int32)
ARGUMENTS = "int objective, float log_low, float log_high, float tau, bool penalty_on_all"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The constants of a loss, as the kernels take them (enum Objective in csrc/policy_loss/api.h)."""

    kind: int = 0
    log_low: float = -1.0
    log_high: float = 1.0
    tau: float = 0.0
    penalty_on_all: bool = True

    def arguments(self) -> tuple[int, float, float, float, bool]:
        """In the order of the ops' schemas."""
        return self.kind, self.log_low, self.log_high, self.tau, self.penalty_on_all


CROSS_ENTROPY = Objective(kind=1)


def clipped_log_ratio(op: str, log_low: float, log_high: float, tau: float, penalty_on: str) -> Objective:
    """The policy objective. Raises ArgumentTypeError or ArgumentValueError for constants outside their ranges."""
    for name, value, accepted, good in (
        ("log_low", log_low, "a number < 0: the lower bound of the log-ratio", lambda v: v < 0),
        ("log_high", log_high, "a number > 0: the upper bound of the log-ratio", lambda v: v > 0),
        ("tau", tau, "a finite number >= 0", lambda v: 0 <= v < float("inf")),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(message(op, name, f"{type(value).__name__} {value!r}", "a float"))
        if not good(value):
            raise ArgumentValueError(message(op, name, value, accepted))
    if penalty_on not in ("all", "kept"):
        raise ArgumentValueError(message(op, "penalty_on", repr(penalty_on), "'all' or 'kept'"))
    return Objective(
        log_low=float(log_low), log_high=float(log_high), tau=float(tau), penalty_on_all=penalty_on == "all"
    )


def reference_clipped_log_ratio_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor, *, log_low: float,
    log_high: float, tau: float, penalty_on: str = "all", normalizer: str | float = "group",
    group_ids_T: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of `clipped_log_ratio_loss` in plain torch, differentiable by autograd."""
    kept_T = loss_mask_T.nonzero()[:, 0]
    log_ratio = (logprobs_T - old_logprobs_T)[kept_T]
    ratio = log_ratio.clamp(log_low, log_high).exp()
    inside = (log_ratio >= log_low) & (log_ratio <= log_high)
    penalized = torch.ones_like(inside) if penalty_on == "all" else inside
    terms = ratio * advantages_T[kept_T] - tau * penalized.to(log_ratio.dtype) * log_ratio**2
    if not isinstance(normalizer, str):
        return -terms.sum() / normalizer
    if normalizer == "batch" or group_ids_T is None:
        return -terms.sum() / max(len(kept_T), 1)
    ids = group_ids_T[kept_T]
    means = [terms[ids == group].mean() for group in ids.unique()]
    return -torch.stack(means).mean() if means else terms.sum()


def reference_vocab_parallel_clipped_log_ratio_loss(
    logits_TV: Tensor, targets_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor,
    **objective: Any,
) -> Tensor:  # fmt: skip
    """The loss of `vocab_parallel_clipped_log_ratio_loss`, of the whole vocabulary, in plain torch."""
    logits_TV = logits_TV.to(checks.routing_dtype(logits_TV.dtype))
    at_loss = torch.where(loss_mask_T, targets_T.long(), 0)
    logprobs_T = logits_TV.log_softmax(-1).gather(1, at_loss[:, None])[:, 0]
    return reference_clipped_log_ratio_loss(logprobs_T, old_logprobs_T, advantages_T, loss_mask_T, **objective)


def clipped_log_ratio_loss(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor, *, log_low: float,
    log_high: float, tau: float, penalty_on: str = "all", normalizer: str | float = "group",
    group_ids_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The policy loss from log-probabilities of the sampled tokens.

    Args:
        logprobs_T: (T,) float32, bfloat16 or float64: log pi of each token. Differentiable once.
        old_logprobs_T: (T,) log pi_old, as the rollout engine recorded it.
        advantages_T: (T,) reward minus the group's mean reward.
        loss_mask_T: (T,) bool. Nothing else is read of a token that has no loss.
        log_low, log_high: bounds on the log-ratio, log_low < 0 < log_high.
        tau: weight of the squared log-ratio, >= 0.
        penalty_on: "all" tokens with loss, or those "kept" by the bounds.
        normalizer: "group" (mean over groups of each group's mean over tokens), "batch" (mean over tokens), or the
            number of tokens to divide by, where this call sees a part of the batch.
        group_ids_T: (T,) int32 or int64, 0 <= id < T: the problem that a token answers. None is one group.

    Returns:
        The loss, a scalar (0 where no token has loss), and metrics as detached scalars: fraction_masked (by the
        bounds), log_ratio_abs_mean, log_ratio_abs_max, kl (the mean of exp(l) - 1 - l), num_loss_tokens.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or constant; on the CPU, numbers of a token with
            loss that are not finite.
        IndexError: on the CPU, a group id outside its range.
    """
    op = "clipped_log_ratio_loss"
    objective = clipped_log_ratio(op, log_low, log_high, tau, penalty_on)
    checks.tensor(op, "logprobs_T", logprobs_T, checks.FLOATS, (None,), "T")
    checks.same_device(op, "logprobs_T", logprobs_T, {})
    dtype = checks.routing_dtype(logprobs_T.dtype)
    old_T, advantages_T = token_inputs(op, "logprobs_T", logprobs_T, dtype, old_logprobs_T, advantages_T)
    weights_T = token_weights(op, logprobs_T, loss_mask_T, normalizer, group_ids_T, dtype)
    logprobs_T = logprobs_T.to(dtype)
    with renamed_errors("token_losses", op):
        losses_T, _ = _TOKEN_LOSSES(logprobs_T, old_T, advantages_T, weights_T, *objective.arguments())
    return losses_T.sum(), policy_metrics(logprobs_T.detach(), old_T, loss_mask_T, objective)


def vocab_parallel_clipped_log_ratio_loss(
    logits_shard_TV: Tensor, targets_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor, *,
    log_low: float, log_high: float, tau: float, penalty_on: str = "all", normalizer: str | float = "group",
    group_ids_T: Tensor | None = None, process_group: Any = None, vocab_start: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The policy loss from logits, whose vocabulary may be sharded over `process_group`.

    Args:
        logits_shard_TV: (T, V) float32, bfloat16 or float64: columns [vocab_start, vocab_start + V). Differentiable
            once; rows without loss are not read and get zero gradients.
        targets_T: (T,) int32 or int64, in the whole vocabulary.
        process_group: ranks whose shards make up the vocabulary; None where the shard is all of it. Every rank
            gives the same tokens and gets the same loss. Two all-reduces of two numbers a token.
        the rest: as in `clipped_log_ratio_loss`.

    Returns:
        As `clipped_log_ratio_loss`, with the metric entropy (mean over tokens with loss, of the whole vocabulary).

    Raises:
        TypeError, ValueError, IndexError: as `clipped_log_ratio_loss`; on the CPU also a target outside the vocabulary.
    """
    op = "vocab_parallel_clipped_log_ratio_loss"
    objective = clipped_log_ratio(op, log_low, log_high, tau, penalty_on)
    checks.tensor(op, "logits_shard_TV", logits_shard_TV, checks.FLOATS, (None, None), "TV")
    checks.same_device(op, "logits_shard_TV", logits_shard_TV, {})
    targets_T = token_targets(op, "logits_shard_TV", logits_shard_TV, targets_T, vocab_start)
    dtype = checks.routing_dtype(logits_shard_TV.dtype)
    old_T, advantages_T = token_inputs(op, "logits_shard_TV", logits_shard_TV, dtype, old_logprobs_T, advantages_T)
    weights_T = token_weights(op, logits_shard_TV, loss_mask_T, normalizer, group_ids_T, dtype)
    inputs = (logits_shard_TV, targets_T, old_T, advantages_T, weights_T)
    source = "log-probability of targets_T, from logits_shard_TV,"
    with renamed_errors("loss_rows", op, source), renamed_errors("token_losses", op, source):
        if process_group is None:
            losses_T, logprobs_T, entropies_T, _ = _LOSS_ROWS(*inputs, *objective.arguments(), vocab_start, False)
        else:
            results = _ShardedRows.apply(*inputs, objective, vocab_start, process_group)
            losses_T, logprobs_T, entropies_T = results
    metrics = policy_metrics(logprobs_T.detach(), old_T, loss_mask_T, objective, entropies_T.detach())
    return losses_T.sum(), metrics


# --- what the entry points share ------------------------------------------------------------------------------------


class renamed_errors:
    """Puts the names of the op that the user called, and of where its log-probabilities come from, in the place of the
    kernel's."""

    def __init__(self, kernel: str, op: str, source: str = "logprobs_T") -> None:
        self._kernel = kernel + ":"
        self._changes = ((self._kernel, op + ":"), (" logprobs_T[", f" {source}["))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, IndexError)) and str(error).startswith(self._kernel):
            text = str(error)
            for old, new in self._changes:
                text = text.replace(old, new, 1)
            raise type(error)(text) from None


def token_inputs(
    op: str, first: str, value: Tensor, dtype: torch.dtype, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """Old log-probabilities and advantages, checked, detached and in `dtype`."""
    named = {"old_logprobs_T": old_logprobs, "advantages_T": advantages}
    for name, tensor in named.items():
        checks.tensor(op, name, tensor, checks.FLOATS, (value.shape[0],), "T", f"T is that of {first}")
    checks.same_device(op, first, value, dict(named))
    return old_logprobs.detach().to(dtype).contiguous(), advantages.detach().to(dtype).contiguous()


def token_targets(op: str, first: str, value: Tensor, targets: Tensor, vocab_start: int) -> Tensor:
    """Targets, checked, as int64."""
    checks.integer(op, "vocab_start", vocab_start, 0, 2**40)
    checks.tensor(op, "targets_T", targets, INDICES, (value.shape[0],), "T", f"T is that of {first}")
    checks.same_device(op, first, value, {"targets_T": targets})
    return targets.long().contiguous()


def token_weights(
    op: str, value: Tensor, loss_mask: Tensor, normalizer: str | float, group_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(T,) 1 / N of each token with loss, 0 of the others."""
    checks.tensor(op, "loss_mask_T", loss_mask, (torch.bool,), (value.shape[0],), "T")
    checks.same_device(op, "the first tensor", value, {"loss_mask_T": loss_mask})
    mask = loss_mask.to(dtype)
    if not isinstance(normalizer, str):
        if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
            raise ArgumentTypeError(message(op, "normalizer", type(normalizer).__name__, "a str or a number"))
        if not 0 < normalizer < float("inf"):
            raise ArgumentValueError(message(op, "normalizer", normalizer, "a number of tokens > 0"))
        return mask / normalizer
    if normalizer not in ("group", "batch"):
        raise ArgumentValueError(message(op, "normalizer", repr(normalizer), "'group', 'batch' or a number of tokens"))
    if group_ids is not None:
        checks.tensor(op, "group_ids_T", group_ids, INDICES, (value.shape[0],), "T")
        checks.same_device(op, "the first tensor", value, {"group_ids_T": group_ids})
    if normalizer == "batch" or group_ids is None:
        return mask / mask.sum().clamp_min(1)
    num_tokens = group_ids.shape[0]
    if group_ids.device.type == "cpu" and not torch.compiler.is_compiling() and num_tokens:
        least, most = (int(end) for end in group_ids.aminmax())
        if least < 0 or most >= num_tokens:
            got = least if least < 0 else most
            raise IndexError(message(op, "group_ids_T", got, f"0 <= id < {num_tokens} (T)", "number the groups from 0"))
    tokens_of_group = mask.new_zeros(num_tokens).index_add_(0, group_ids.long(), mask)
    num_groups = (tokens_of_group > 0).sum().clamp_min(1)
    return mask / (tokens_of_group[group_ids.long()].clamp_min(1) * num_groups)


def policy_metrics(
    logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, objective: Objective, entropies: Tensor | None = None
) -> dict[str, Tensor]:
    """Means over the tokens with loss, as scalars on the device of the tokens."""
    log_ratio = torch.where(loss_mask, logprobs - old_logprobs, 0.0)
    count = loss_mask.sum()
    size = log_ratio.abs()
    outside = (log_ratio < objective.log_low) | (log_ratio > objective.log_high)

    def mean(values: Tensor) -> Tensor:
        return values.sum() / count.clamp_min(1)

    metrics = {
        "fraction_masked": mean(outside.to(size.dtype)),
        "log_ratio_abs_mean": mean(size),
        "log_ratio_abs_max": size.max() if size.numel() else size.sum(),
        "kl": mean(torch.expm1(log_ratio) - log_ratio),
        "num_loss_tokens": count,
    }
    if entropies is not None:
        metrics["entropy"] = mean(torch.where(loss_mask, entropies, 0.0))
    return metrics


def join_shards(stats: Tensor, weights: Tensor, process_group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(T, 4) sums of each shard -> log-sum-exp, log-probability and entropy (T,) over the whole vocabulary."""
    biggest, sums, weighted, at_target = stats.unbind(1)
    if process_group is not None:
        import torch.distributed as dist

        largest = torch.stack([biggest, at_target])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
        shift = torch.where(biggest > -1e30, biggest - largest[0], 0.0)
        scale = torch.where(biggest > -1e30, shift.exp(), 0.0)
        totals = torch.stack([sums * scale, (weighted + sums * shift) * scale])
        dist.all_reduce(totals, group=process_group)
        (biggest, at_target), (sums, weighted) = largest, totals
    sums = torch.where(weights == 0, 1.0, sums)
    log_sums = biggest + sums.log()
    return log_sums, at_target - log_sums, sums.log() - weighted / sums


def check_target_found(
    op: str, at_target: Tensor, targets: Tensor, weights: Tensor, tokens: Tensor | None = None
) -> None:
    """Raises IndexError, on the CPU, for a token with loss whose target no shard has. `tokens` are their numbers."""
    if at_target.device.type != "cpu":
        return
    lost = ((at_target == -torch.inf) & (weights != 0)).nonzero()
    if len(lost):
        first = int(lost[0])
        token = first if tokens is None else int(tokens[first])
        accepted = "a token of the shards' vocabulary whose logit is above -inf"
        raise IndexError(message(op, f"targets_T[{token}]", int(targets[first]), accepted))


def scaled(values: Tensor, upstream: Tensor) -> Tensor:
    """values * upstream, a scalar or one number a row; as they are where it is 1, which the CPU can tell at no cost."""
    known = upstream.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and upstream.numel() and not any(upstream.stride()) and float(upstream.reshape(-1)[0]) == 1.0:
        return values
    return values * upstream.reshape([-1] + [1] * (values.dim() - 1)).to(values.dtype)


# --- the ops --------------------------------------------------------------------------------------------------------


def check_token_tensors(
    op: str, old: Tensor, advantages: Tensor, weights: Tensor, dtype: torch.dtype, num_tokens: int, kind: int
) -> None:
    """What the kernels rely on, for calls that do not come through the public functions."""
    count = num_tokens if kind != CROSS_ENTROPY.kind else 0
    for name, value, size in (("old_logprobs_T", old, count), ("advantages_T", advantages, count)):
        checks.tensor(op, name, value, (dtype,), (size,), "T")
    checks.tensor(op, "weights_T", weights, (dtype,), (num_tokens,), "T")
    for name, value in (("old_logprobs_T", old), ("advantages_T", advantages), ("weights_T", weights)):
        if not value.is_contiguous():
            raise LayoutError(message(op, name, f"strides {value.stride()}", "a contiguous tensor"))


def _token_losses_fake(
    logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, kind: int, *_: Any
) -> tuple[Tensor, Tensor]:
    checks.tensor("token_losses", "logprobs_T", logprobs, (torch.float32, torch.float64), (None,), "T")
    check_token_tensors("token_losses", old, advantages, weights, logprobs.dtype, logprobs.shape[0], kind)
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape)


def token_losses_kernel(
    logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *objective: Any
) -> tuple[Tensor, Tensor]:
    """(T,) losses and their slopes by the log-probability."""
    _token_losses_fake(logprobs, old, advantages, weights, *objective)
    logprobs = logprobs.contiguous()
    losses, slopes = torch.empty_like(logprobs), torch.empty_like(logprobs)
    native.kernels("token_losses", logprobs.device).token_losses(
        (native.address(old), native.address(advantages), weights.data_ptr(), *objective), logprobs.data_ptr(),
        losses.data_ptr(), slopes.data_ptr(), logprobs.shape[0], native.DTYPE_CODES[logprobs.dtype],
        native.where(logprobs.device),
    )  # fmt: skip
    return losses, slopes


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        losses, slopes = _TOKEN_LOSSES.below_autograd(*inputs)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(slopes)
        return losses, slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(ctx.saved_tensors[0], grad), *[None] * 8


def _token_losses_autograd(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if native.wants_grad(logprobs):
        return _TokenLosses.apply(logprobs, *rest)
    return _TOKEN_LOSSES.below_autograd(logprobs, *rest)


def _check_rows(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, kind: int) -> None:
    checks.tensor("loss_rows", "logits_TV", logits, checks.FLOATS, (None, None), "TV")
    checks.tensor("loss_rows", "targets_T", targets, (torch.int64,), (logits.shape[0],), "T")
    dtype = checks.routing_dtype(logits.dtype)
    check_token_tensors("loss_rows", old, advantages, weights, dtype, logits.shape[0], kind)


def _loss_rows_fake(
    logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_rows(logits, targets, old, advantages, weights, rest[0])
    grad = logits.new_empty(logits.shape if rest[-1] else (0,))
    return weights.new_empty(weights.shape), weights.new_empty(weights.shape), weights.new_empty(weights.shape), grad


def _loss_rows_kernel(
    logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *objective, vocab_start, save = rest
    _check_rows(logits, targets, old, advantages, weights, rest[0])
    logits, targets = logits.contiguous(), targets.contiguous()
    losses, logprobs, entropies = (torch.empty_like(weights) for _ in range(3))
    grad = native.empty(logits.shape if save else (0,), logits)
    native.kernels("loss_rows", logits.device).loss_rows(
        (old.data_ptr(), advantages.data_ptr(), weights.data_ptr(), *objective), logits.data_ptr(), targets.data_ptr(),
        logprobs.data_ptr(), entropies.data_ptr(), losses.data_ptr(), grad.data_ptr() if save else 0, *logits.shape,
        vocab_start, native.DTYPE_CODES[logits.dtype], native.where(logits.device),
    )  # fmt: skip
    return losses, logprobs, entropies, grad


class _LossRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        losses, logprobs, entropies, grad = _LOSS_ROWS.below_autograd(*inputs[:-1], True)
        ctx.save_for_backward(grad)
        nothing = grad.new_empty(0)
        ctx.mark_non_differentiable(logprobs, entropies, nothing)
        return losses, logprobs, entropies, nothing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(ctx.saved_tensors[0], grad), *[None] * 11


def _loss_rows_autograd(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if native.wants_grad(logits):
        return _LossRows.apply(logits, *rest)
    return _LOSS_ROWS.below_autograd(logits, *rest)


class _ShardedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor,
        objective: Objective, vocab_start: int, process_group: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logits = logits.contiguous()
        kernels, where = native.kernels("loss_rows", logits.device), native.where(logits.device)
        sizes = (*logits.shape, vocab_start, native.DTYPE_CODES[logits.dtype], where)
        stats = weights.new_empty((len(weights), 4))
        kernels.logit_stats(
            logits.data_ptr(), targets.data_ptr(), weights.data_ptr(), stats.data_ptr(), *sizes
        )  # fmt: skip
        log_sums, logprobs, entropies = join_shards(stats, weights, process_group)
        check_target_found("loss_rows", logprobs, targets, weights)
        losses, slopes = token_losses_kernel(logprobs, old, advantages, weights, *objective.arguments())
        grad = native.empty(logits.shape, logits)
        log_sums = log_sums.contiguous()
        kernels.logit_grad(
            logits.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), slopes.data_ptr(), grad.data_ptr(), *sizes
        )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(logprobs, entropies)
        return losses, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return scaled(ctx.saved_tensors[0], grad), *[None] * 7


_TOKEN_LOSSES = native.define(
    f"token_losses(Tensor logprobs_T, Tensor old_logprobs_T, Tensor advantages_T, Tensor weights_T, {ARGUMENTS})"
    " -> (Tensor, Tensor)",
    token_losses_kernel, _token_losses_fake, _token_losses_autograd,
)  # fmt: skip
_LOSS_ROWS = native.define(
    "loss_rows(Tensor logits_TV, Tensor targets_T, Tensor old_logprobs_T, Tensor advantages_T, Tensor weights_T, "
    f"{ARGUMENTS}, int vocab_start, bool save_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_rows_kernel, _loss_rows_fake, _loss_rows_autograd,
)  # fmt: skip
