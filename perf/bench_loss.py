"""The policy loss with its gradient: on logits against eager torch and torch.compile, and through the output head.

python perf/bench_loss.py [--seconds S] [--json FILE]

Logits are bf16 rows of K2.5's vocabulary. The head is that vocabulary by 512, in float32 (and in bf16 where torch has a
fast bf16), for a batch in which every token has loss and one in which a quarter has.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys import ops
from perf import harness
from perf.harness import Comparison, alternate

VOCAB, DIM, LOGIT_TOKENS, HEAD_TOKENS = 163840, 512, 64, 512
BOUNDS: dict[str, Any] = {"log_low": -0.5, "log_high": 0.5, "tau": 0.1}
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the loss takes beside logits or hidden states."""

    targets_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    loss_mask_T: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the ops."""
        return self.targets_T, self.old_logprobs_T, self.advantages_T, self.loss_mask_T


def make_tokens(logits_of: Callable[[slice], Tensor], num_tokens: int, loss_tokens: float) -> Tokens:
    """Old log-probabilities near the present ones; the logits are made for 64 tokens at a time."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=generator)
    logprobs = torch.empty(num_tokens)
    for begin in range(0, num_tokens, 64):
        at = slice(begin, begin + 64)
        logprobs[at] = logits_of(at).float().log_softmax(-1).gather(1, targets[at, None])[:, 0]
    return Tokens(
        targets_T=targets,
        old_logprobs_T=logprobs + 0.3 * torch.randn(num_tokens, generator=generator),
        advantages_T=torch.randn(num_tokens, generator=generator),
        loss_mask_T=torch.rand(num_tokens, generator=generator) < loss_tokens,
    )


def eager_loss(logits_TV: Tensor, tokens: Tokens) -> Tensor:
    """The loss as a trainer writes it, in float32 over the whole logits."""
    logprobs_T = logits_TV.float().log_softmax(-1).gather(1, tokens.targets_T[:, None])[:, 0]
    log_ratio = logprobs_T - tokens.old_logprobs_T
    ratio = log_ratio.clamp(BOUNDS["log_low"], BOUNDS["log_high"]).exp()
    terms = (ratio * tokens.advantages_T - BOUNDS["tau"] * log_ratio**2) * tokens.loss_mask_T
    return -terms.sum() / tokens.loss_mask_T.sum()


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """One step: the loss and fresh gradients of the inputs, which are returned."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    loss(*leaves).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def check_agreement(name: str, runs: dict[str, Callable[[], list[Tensor]]], limit: float) -> None:
    """Ends the program where a candidate computes something else."""
    expected, *_ = (run() for run in runs.values())
    for peer, run in list(runs.items())[1:]:
        for a, b in zip(run(), expected, strict=True):
            error = float((a.float() - b.float()).norm() / b.float().norm())
            if error > limit:
                raise SystemExit(f"{name}: {peer} computes something else: relative difference {error:.1e}")


def compare(
    name: str, runs: dict[str, Callable[[], list[Tensor]]], seconds: float, flops: int, limit: float
) -> Comparison:
    """Times and peaks of the candidates, ours first."""
    check_agreement(name, runs, limit)
    times = alternate(runs, seconds=seconds)
    peaks = {candidate: harness.peak_bytes(run, CPU) for candidate, run in runs.items()}
    fields = {
        "allocator": harness.allocator(),
        "flops": flops,
        "peak_bytes": peaks.pop("k25sys"),
        "peers_peak_bytes": peaks,
    }
    return Comparison(name=name, ours=times.pop("k25sys"), peers=times, fields=fields)


def bench_logits(seconds: float) -> Comparison:
    """bf16 logits that are there already."""
    logits_TV = torch.randn(LOGIT_TOKENS, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = make_tokens(lambda at: logits_TV[at], LOGIT_TOKENS, 1.0)
    ours = lambda x: ops.vocab_parallel_clipped_log_ratio_loss(x, *tokens.all(), **BOUNDS)[0]  # noqa: E731
    compiled = torch.compile(eager_loss)
    losses: dict[str, Callable[..., Tensor]] = {
        "k25sys": ours,
        "torch_eager": partial(eager_loss, tokens=tokens),
        "torch_compile": partial(compiled, tokens=tokens),
    }
    runs = {name: partial(gradients, loss, logits_TV) for name, loss in losses.items()}
    return compare("logits/threads=1", runs, seconds, 0, 1e-2)


def make_head(dtype: torch.dtype, num_tokens: int) -> tuple[Tensor, Tensor]:
    """hidden_TD and head_VD."""
    generator = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(num_tokens, DIM, generator=generator).to(dtype)
    return hidden_TD, (torch.randn(VOCAB, DIM, generator=generator) * DIM**-0.5).to(dtype)


def head_runs(dtype: torch.dtype, num_tokens: int, loss_tokens: float) -> dict[str, Callable[[], list[Tensor]]]:
    """A step through the head, ours and eager."""
    hidden_TD, head_VD = make_head(dtype, num_tokens)
    tokens = make_tokens(lambda at: hidden_TD[at].float() @ head_VD.float().T, num_tokens, loss_tokens)
    losses: dict[str, Callable[..., Tensor]] = {
        "k25sys": lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, *tokens.all(), **BOUNDS)[0],
        "torch_eager": lambda h, w: eager_loss(h @ w.T, tokens),
    }
    return {name: partial(gradients, loss, hidden_TD, head_VD) for name, loss in losses.items()}


def bench_head(dtype: torch.dtype, loss_tokens: float, seconds: float) -> Comparison:
    """From hidden states. `flops` counts three GEMMs over the tokens with loss."""
    suffix = "" if dtype == torch.float32 else "/bf16"
    runs = head_runs(dtype, HEAD_TOKENS, loss_tokens)
    flops = int(6 * HEAD_TOKENS * loss_tokens * VOCAB * DIM)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    return compare(f"linear{suffix}/loss_tokens={loss_tokens}/threads=1", runs, seconds, flops, limit)


def bench_memory_growth() -> dict[str, Any]:
    """Peak memory beyond the gradients, for some tokens and for twice as many."""
    extra = []
    for num_tokens in (HEAD_TOKENS // 2, HEAD_TOKENS):
        run = head_runs(torch.float32, num_tokens, 1.0)["k25sys"]
        run()
        peak = harness.peak_bytes(run, CPU)
        extra.append(None if peak is None else peak - 4 * DIM * (VOCAB + num_tokens))
    growth = None if None in extra else extra[1] / max(extra[0], 1)
    return {
        "name": "linear_memory_growth", "ours_s": None, "peers_s": {}, "ratio": None, "peak_bytes": extra[1],
        "peers_peak_bytes": {}, "peak_bytes_of_half_the_tokens": extra[0], "memory_of_twice_the_tokens": growth,
    }  # fmt: skip


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    if "memory_of_twice_the_tokens" in case:
        if case["memory_of_twice_the_tokens"] is None:
            return "linear_memory_growth\n  this machine does not tell peak memory"
        growth, megabytes = case["memory_of_twice_the_tokens"], case["peak_bytes"] / 1e6
        return (
            f"linear_memory_growth\n  twice the tokens: {growth:.2f}x the memory beyond gradients, {megabytes:.0f} MB"
        )
    rate = f"{case['flops'] / case['ours_s'] / 1e9:.0f} GFLOP/s of the GEMMs"
    return harness.describe(case, [rate] if case["flops"] else [])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on a case, warm-up apart")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--one-allocator", action="store_true", help="only under the allocator of this process")
    return parser.parse_args()


def main() -> None:
    """Runs the cases, prints each as it is done, and writes the JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    print(f"policy loss, vocabulary {VOCAB}\n{harness.machine()}", flush=True)
    cases = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        print(describe(case), flush=True)

    report(bench_logits(arguments.seconds).as_json())
    for loss_tokens in (1.0, 0.25):
        report(bench_head(torch.float32, loss_tokens, arguments.seconds).as_json())
    if harness.torch_computes_bf16():
        report(bench_head(torch.bfloat16, 1.0, arguments.seconds).as_json())
    if not arguments.one_allocator:
        report(bench_memory_growth())
        options = ["--one-allocator", "--seconds", str(arguments.seconds)]
        for case in harness.rerun_with_other_allocator(os.path.abspath(__file__), options):
            report(case)
    if arguments.json:
        backends = {op: "native" for op in ("loss_rows", "linear_loss")}
        harness.write_json(arguments.json, "loss", backends, cases)


if __name__ == "__main__":
    main()
