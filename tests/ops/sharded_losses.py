"""Processes that each hold a shard of the vocabulary, against one that holds it all; run by test_policy_loss.py.

python -m tests.ops.sharded_losses WORLD DTYPE STORE
"""

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from k25sys import ops
from tests.ops.generators import relative_error

NUM_TOKENS, VOCAB, DIM = 150, 61, 20
OPTIONS: dict[str, Any] = {"log_low": -0.5, "log_high": 0.4, "tau": 0.1}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def losses(hidden: Tensor, head: Tensor, tokens: tuple[Tensor, ...], **shard: Any) -> list[Tensor]:
    """Loss, gradients of hidden and head, of the linear entry and of the one from logits; then cross-entropy."""
    results = []
    for entry in ("linear", "logits", "cross_entropy"):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if entry == "linear":
            loss, metrics = ops.linear_clipped_log_ratio_loss(h, w, *tokens, **OPTIONS, **shard)
            results.append(metrics["entropy"])
        elif entry == "logits":
            loss, metrics = ops.vocab_parallel_clipped_log_ratio_loss(h @ w.T, *tokens, **OPTIONS, **shard)
            results.append(metrics["entropy"])
        else:
            loss = ops.linear_cross_entropy(h, w, tokens[0], tokens[-1], **shard)
        grad_hidden, grad_head = torch.autograd.grad(loss, (h, w))
        if entry == "logits" and shard:
            dist.all_reduce(grad_hidden)  # the caller's matrix product had a shard of the head
        results += [loss.detach(), grad_hidden, grad_head]
    return results


def run(rank: int, world: int, dtype: torch.dtype, store: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, DIM, generator=generator).to(dtype)
    head = torch.randn(VOCAB, DIM, generator=generator).to(dtype)
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)
    old = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    old += 0.3 * torch.randn(NUM_TOKENS, generator=generator)
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = (targets, old.to(scalar), torch.randn(NUM_TOKENS, generator=generator).to(scalar))
    tokens = (*tokens, torch.rand(NUM_TOKENS, generator=generator) < 0.9)
    whole = losses(hidden, head, tokens)
    begin, end = VOCAB * rank // world, VOCAB * (rank + 1) // world
    shard = {"process_group": dist.group.WORLD, "vocab_start": begin}
    mine = losses(hidden, head[begin:end], tokens, **shard)
    for i, (a, b) in enumerate(zip(mine, whole, strict=True)):
        b = b[begin:end] if b.dim() == 2 and len(b) == VOCAB else b
        error = relative_error(a, b)
        assert error <= LIMITS[dtype], f"rank {rank}, result {i}: {error}"
    print(f"rank {rank} agrees", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks."""
    world, dtype, store = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
    spawn(run, (world, dtype, store), nprocs=world)


if __name__ == "__main__":
    main()
