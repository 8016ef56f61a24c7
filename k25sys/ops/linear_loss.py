"""The output head with a loss on top: logits exist for a chunk of tokens at a time, and never for a token without loss.

The objective is a sum over tokens whose constants are known beforehand, so a chunk's gradient is formed while its
logits are there: three GEMMs (6 T V D FLOP), no recomputation, memory beyond the gradients that does not grow with T.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentValueError, DTypeError, message
from k25sys.ops import checks, native
from k25sys.ops.policy_loss import (
    ARGUMENTS,
    CROSS_ENTROPY,
    Objective,
    check_target_found,
    check_token_tensors,
    clipped_log_ratio,
    join_shards,
    policy_metrics,
    reference_vocab_parallel_clipped_log_ratio_loss,
    renamed_errors,
    scaled,
    token_inputs,
    token_losses_kernel,
    token_targets,
    token_weights,
)

_CPU_CHUNK = 192  # tokens: rows of a register tile divide it, and what multiplies the head stays in the cache
_CUDA_CHUNK = 1024


def reference_linear_clipped_log_ratio_loss(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *tokens: Tensor, **objective: Any
) -> Tensor:
    """The loss of `linear_clipped_log_ratio_loss` in plain torch, through all logits."""
    logits_TV = hidden_TD.to(checks.routing_dtype(hidden_TD.dtype)) @ head_VD.to(checks.routing_dtype(head_VD.dtype)).T
    return reference_vocab_parallel_clipped_log_ratio_loss(logits_TV, targets_T, *tokens, **objective)


def reference_linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, loss_mask_T: Tensor
) -> Tensor:
    """The loss of `linear_cross_entropy` in plain torch."""
    dtype = checks.routing_dtype(hidden_TD.dtype)
    logits_TV = hidden_TD[loss_mask_T].to(dtype) @ head_VD.to(dtype).T
    loss = torch.nn.functional.cross_entropy(logits_TV, targets_T[loss_mask_T].long(), reduction="sum")
    return loss / loss_mask_T.sum().clamp_min(1)


def linear_clipped_log_ratio_loss(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor,
    loss_mask_T: Tensor, *, log_low: float, log_high: float, tau: float, penalty_on: str = "all",
    normalizer: str | float = "group", group_ids_T: Tensor | None = None, process_group: Any = None,
    vocab_start: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The policy loss from hidden states and the head, whose vocabulary may be sharded over `process_group`.

    Args:
        hidden_TD: (T, D) float32, bfloat16 (float32 logits and sums) or float64; the same on every rank.
        head_VD: (V, D) of the same dtype: rows [vocab_start, vocab_start + V) of the vocabulary.
        targets_T: (T,) int32 or int64, in the whole vocabulary.
        process_group: ranks whose shards make up the vocabulary; each gets the whole gradient of hidden_TD.
        the rest: as in `clipped_log_ratio_loss`.

    Returns:
        As `vocab_parallel_clipped_log_ratio_loss`, differentiable once. The gradients are made here: what would scale
        the loss afterwards (the number of microbatches) costs no copy of them in `normalizer`.

    Raises:
        TypeError, ValueError, IndexError: as `vocab_parallel_clipped_log_ratio_loss`.
    """
    op = "linear_clipped_log_ratio_loss"
    objective = clipped_log_ratio(op, log_low, log_high, tau, penalty_on)
    _check_layer(op, hidden_TD, head_VD)
    targets_T = token_targets(op, "hidden_TD", hidden_TD, targets_T, vocab_start)
    dtype = checks.routing_dtype(hidden_TD.dtype)
    old_T, advantages_T = token_inputs(op, "hidden_TD", hidden_TD, dtype, old_logprobs_T, advantages_T)
    weights_T = token_weights(op, hidden_TD, loss_mask_T, normalizer, group_ids_T, dtype)
    inputs = (hidden_TD, head_VD, targets_T, old_T, advantages_T, weights_T)
    loss, logprobs_T, entropies_T = _loss(op, inputs, objective, vocab_start, process_group)
    return loss, policy_metrics(logprobs_T.detach(), old_T, loss_mask_T, objective, entropies_T.detach())


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, loss_mask_T: Tensor, *, normalizer: str | float = "batch",
    process_group: Any = None, vocab_start: int = 0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of hidden states and the head, as `linear_clipped_log_ratio_loss` computes its loss.

    Args:
        hidden_TD, head_VD, targets_T, process_group, vocab_start: as in `linear_clipped_log_ratio_loss`.
        loss_mask_T: (T,) bool. Tokens without loss never reach the head.
        normalizer: "batch" (mean over tokens with loss), or the number to divide their sum by.

    Returns:
        The loss, a scalar; 0 where no token has loss.

    Raises:
        TypeError, ValueError, IndexError: as `linear_clipped_log_ratio_loss`.
    """
    op = "linear_cross_entropy"
    _check_layer(op, hidden_TD, head_VD)
    targets_T = token_targets(op, "hidden_TD", hidden_TD, targets_T, vocab_start)
    weights_T = token_weights(op, hidden_TD, loss_mask_T, normalizer, None, checks.routing_dtype(hidden_TD.dtype))
    nothing = weights_T.new_empty(0)
    inputs = (hidden_TD, head_VD, targets_T, nothing, nothing, weights_T)
    return _loss(op, inputs, CROSS_ENTROPY, vocab_start, process_group)[0]


def _check_layer(op: str, hidden: Tensor, head: Tensor) -> None:
    checks.tensor(op, "hidden_TD", hidden, checks.FLOATS, (None, None), "TD")
    if isinstance(head, Tensor) and head.dtype in checks.FLOATS and head.dtype != hidden.dtype:
        raise DTypeError(message(op, "head_VD", f"dtype {head.dtype}", f"{hidden.dtype}, that of hidden_TD"))
    checks.tensor(op, "head_VD", head, (hidden.dtype,), (None, hidden.shape[1]), "VD", "D is that of hidden_TD")
    checks.integer(op, "V (rows of head_VD)", head.shape[0], 0, 2**24)
    checks.same_device(op, "hidden_TD", hidden, {"head_VD": head})


def _loss(
    op: str, inputs: tuple[Tensor, ...], objective: Objective, vocab_start: int, process_group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with renamed_errors("linear_loss", op), renamed_errors("token_losses", op):
        if process_group is not None:
            return _LinearLoss.apply(objective, vocab_start, process_group, *inputs)
        return _OP(*inputs, *objective.arguments(), vocab_start, [False, False])[:3]


# --- chunks of tokens -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Work:
    """One call: tensors over the tokens with loss, and the gradients that its chunks fill."""

    head: Tensor
    objective: Objective
    vocab_start: int
    process_group: Any
    chunk: int
    grad_hidden: Tensor | None
    grad_head: Tensor | None
    grad_head_low: Tensor | None = None  # lower halves of float32 sums, see csrc/linear_loss/api.h

    def token_loss(self, stats: Tensor, targets: Tensor, tokens: tuple[Tensor, ...], at: Tensor) -> tuple[Tensor, ...]:
        """(T, 4) sums of the shard -> losses, slopes, log-sum-exps, log-probabilities, entropies of the tokens `at`."""
        log_sums, logprobs, entropies = join_shards(stats, tokens[-1], self.process_group)
        check_target_found("linear_loss", logprobs, targets, tokens[-1], at)
        _check_finite(logprobs, tokens, at)
        losses, slopes = token_losses_kernel(logprobs, *tokens, *self.objective.arguments())
        return losses, slopes, log_sums.contiguous(), logprobs, entropies


def _check_finite(logprobs: Tensor, tokens: tuple[Tensor, ...], at: Tensor) -> None:
    """Raises, on the CPU, for a number that is not finite, by the token's number in the whole call."""
    if logprobs.device.type != "cpu":
        return
    source = "log-probability of targets_T, from hidden_TD and head_VD,"
    for name, values in ((source, logprobs), ("old_logprobs_T", tokens[0]), ("advantages_T", tokens[1])):
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            first = int(wrong[0])
            hint = "mask it out, or look for what overflowed"
            got = float(values[first])
            raise ArgumentValueError(message("linear_loss", f"{name}[{int(at[first])}]", got, "a finite number", hint))


def _ranges(count: int, size: int) -> Iterator[tuple[slice, bool, bool]]:
    """Slices of `size`, each with whether it is the first and the last."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count)), begin == 0, begin + size >= count


def _run_chunk_on_cpu(
    work: _Work, logits: Tensor, hidden: Tensor, targets: Tensor, tokens: tuple[Tensor, ...],
    at: Tensor, grad_hidden: Tensor | None, first: bool, last: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels, threads = native.cpu_only("linear_loss", hidden.device), torch.get_num_threads()
    head = work.head
    sizes = (hidden.shape[0], head.shape[0], work.vocab_start, head.shape[1], native.DTYPE_CODES[head.dtype])
    stats = tokens[-1].new_empty((hidden.shape[0], 4))
    kernels.linear_logits(
        hidden.data_ptr(), head.data_ptr(), targets.data_ptr(), logits.data_ptr(), stats.data_ptr(), *sizes, threads
    )
    losses, slopes, log_sums, logprobs, entropies = work.token_loss(stats, targets, tokens, at)
    if grad_hidden is not None or work.grad_head is not None:
        kernels.linear_grads(
            hidden.data_ptr(), head.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), slopes.data_ptr(),
            logits.data_ptr(), native.address(grad_hidden), native.address(work.grad_head),
            native.address(work.grad_head_low), first, last, *sizes, sizes[-1], threads,
        )  # fmt: skip
    return losses, logprobs, entropies


def _run_chunk_on_cuda(
    work: _Work, _: Tensor, hidden: Tensor, targets: Tensor, tokens: tuple[Tensor, ...],
    at: Tensor, grad_hidden: Tensor | None, first: bool, last: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels, where = native.kernels("linear_loss", hidden.device), native.where(hidden.device)
    head = work.head
    logits = hidden @ head.T
    sizes = (*logits.shape, work.vocab_start, native.DTYPE_CODES[logits.dtype], where)
    stats, weights = tokens[-1].new_empty((hidden.shape[0], 4)), tokens[-1]
    kernels.logit_stats(logits.data_ptr(), targets.data_ptr(), weights.data_ptr(), stats.data_ptr(), *sizes)
    losses, slopes, log_sums, logprobs, entropies = work.token_loss(stats, targets, tokens, at)
    addresses = (logits.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), slopes.data_ptr(), logits.data_ptr())
    kernels.logit_grad(*addresses, *sizes)
    if grad_hidden is not None:
        torch.mm(logits, head, out=grad_hidden)
    if work.grad_head is not None:
        if first:
            work.grad_head.zero_()
        work.grad_head.add_(logits.T @ hidden)
    return losses, logprobs, entropies


def _run(
    inputs: tuple[Tensor, ...], objective: Objective, vocab_start: int, process_group: Any, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, log-probabilities and entropies (T), gradients of hidden and head where needed."""
    hidden, head, targets, old, advantages, weights = inputs
    on_cpu = hidden.device.type == "cpu"
    with_loss = weights.nonzero()[:, 0]
    per_token = (old, advantages, weights) if objective != CROSS_ENTROPY else (weights,)
    tokens = tuple(value[with_loss] for value in per_token)
    tokens = tokens if len(tokens) == 3 else (old, advantages, *tokens)
    targets, head = targets[with_loss], head.contiguous()
    count, chunk = len(with_loss), _CPU_CHUNK if on_cpu else _CUDA_CHUNK
    dtype = weights.dtype
    sums_apart = needs[1] and count > chunk and head.dtype == torch.bfloat16
    work = _Work(
        head=head, objective=objective, vocab_start=vocab_start, process_group=process_group, chunk=chunk,
        grad_hidden=torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None,
        grad_head=native.empty(head.shape, head, dtype if sums_apart and not on_cpu else None) if needs[1] else None,
        grad_head_low=native.empty(head.shape, head, torch.int16) if sums_apart and on_cpu else None,
    )  # fmt: skip
    if work.grad_head is not None and count == 0:
        work.grad_head.zero_()
    rows = min(chunk, count) if on_cpu else 0
    logits = native.empty((head.shape[0], rows), head, dtype)
    run: Callable[..., tuple[Tensor, ...]] = _run_chunk_on_cpu if on_cpu else _run_chunk_on_cuda
    results = weights.new_zeros((3, count))  # losses, log-probabilities, entropies
    for at, first, last in _ranges(count, chunk):
        here = with_loss[at]
        rows_TD = hidden[here]
        grad = torch.empty_like(rows_TD) if needs[0] else None
        mine = tuple(value[at] for value in tokens)
        results[:, at] = torch.stack(run(work, logits, rows_TD, targets[at], mine, here, grad, first, last))
        if grad is not None and work.grad_hidden is not None:
            work.grad_hidden[here] = grad
    if process_group is not None and work.grad_hidden is not None:
        import torch.distributed as dist

        dist.all_reduce(work.grad_hidden, group=process_group)
    logprobs, entropies = (torch.zeros_like(weights).index_copy_(0, with_loss, value) for value in results[1:])
    grad_head = None if work.grad_head is None else work.grad_head.to(head.dtype)
    return results[0].sum(), logprobs, entropies, work.grad_hidden, grad_head


# --- the op ---------------------------------------------------------------------------------------------------------


def _check(
    hidden: Tensor, head: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, kind: int
) -> None:
    _check_layer("linear_loss", hidden, head)
    checks.tensor("linear_loss", "targets_T", targets, (torch.int64,), (hidden.shape[0],), "T")
    dtype = checks.routing_dtype(hidden.dtype)
    check_token_tensors("linear_loss", old, advantages, weights, dtype, hidden.shape[0], kind)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, head, weights, needs = args[0], args[1], args[5], args[-1]
    _check(*args[:7])
    grads = [t.new_empty(t.shape if need else (0,)) for t, need in zip((hidden, head), needs, strict=True)]
    return weights.new_empty(()), weights.new_empty(weights.shape), weights.new_empty(weights.shape), grads[0], grads[1]


def _kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(*args[:7])
    inputs, (kind, log_low, log_high, tau, penalty_on_all), (vocab_start, needs) = args[:6], args[6:11], args[11:]
    objective = Objective(kind=kind, log_low=log_low, log_high=log_high, tau=tau, penalty_on_all=penalty_on_all)
    loss, logprobs, entropies, *grads = _run(inputs, objective, vocab_start, None, needs)
    hidden, head = (native.or_empty(grad, like) for grad, like in zip(grads, inputs, strict=False))
    return loss, logprobs, entropies, hidden, head


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, objective: Objective, vocab_start: int, process_group: Any, *inputs: Tensor) -> Any:
        needs = [ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        if process_group is None:
            results = _OP.below_autograd(*inputs, *objective.arguments(), vocab_start, needs)
        else:
            results = _run(inputs, objective, vocab_start, process_group, (needs[0], needs[1]))
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(results[3:], needs, strict=True)))
        ctx.mark_non_differentiable(*results[1:3])
        return results[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else scaled(grad, upstream) for grad in ctx.saved_tensors]
        return None, None, None, *grads, None, None, None, None


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    inputs, objective_args, (vocab_start, needs) = args[:6], args[6:11], args[11:]
    if not native.wants_grad(inputs[0], inputs[1]):
        return _OP.below_autograd(*inputs, *objective_args, vocab_start, needs)
    kind, log_low, log_high, tau, penalty_on_all = objective_args
    objective = Objective(kind=kind, log_low=log_low, log_high=log_high, tau=tau, penalty_on_all=penalty_on_all)
    results = _LinearLoss.apply(objective, vocab_start, None, *inputs)
    return *results, inputs[0].new_empty(0), inputs[1].new_empty(0)


_OP = native.define(
    "linear_loss(Tensor hidden_TD, Tensor head_VD, Tensor targets_T, Tensor old_logprobs_T, Tensor advantages_T, "
    f"Tensor weights_T, {ARGUMENTS}, int vocab_start, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel, _fake, _autograd,
)  # fmt: skip
