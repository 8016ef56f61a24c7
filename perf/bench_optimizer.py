"""The optimiser on the CPU: Newton-Schulz batched over experts, AdamW, and a whole step, against torch's own.

python perf/bench_optimizer.py [--preset cpu|tiny] [--seconds S] [--json FILE]

    newton_schulz   five iterations over the matrices of all experts of a layer: batched, against one after the other
    muon            a step of these matrices, momentum and decay included, against torch.optim.Muon, which takes them
                    one by one and always iterates in bfloat16; ours in float32, and in bfloat16 where torch has a fast
                    one
    adamw           a step of an embedding and many norms by each backend of ZeroOptimizer, against torch.optim.AdamW
                    plain, foreach and fused
    zero_step       ZeroOptimizer.step of one rank over all of them, clipping included, against torch.optim.Muon and
                    torch.optim.AdamW(fused=True) after torch's clip_grad_norm_
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.optim import MuonClipConfig, ZeroOptimizer
from k25sys.optim.fused_adamw import AdamWPieces, choose
from k25sys.optim.local_muon import WholeMatrices, step_whole
from k25sys.optim.newton_schulz import orthogonalize
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid
from perf import harness
from perf.harness import Comparison, alternate

CPU = torch.device("cpu")
RATE = 1e-3
CONFIG = MuonClipConfig(nesterov=True)  # as torch.optim.Muon
ADAMW = ("reference", "torch")
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a layer's experts, and of what AdamW updates."""

    num_experts: int
    dim: int
    width: int
    vocab: int
    num_norms: int


PRESETS = {
    "tiny": Preset(num_experts=4, dim=32, width=16, vocab=64, num_norms=3),
    "cpu": Preset(num_experts=32, dim=1024, width=256, vocab=16384, num_norms=120),
}


@dataclass(frozen=True)
class Candidate:
    """A way to do it, and where its result lies after a run."""

    run: Callable[[], Any]
    result: Callable[[], list[Tensor]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert_matrices(preset: Preset, seed: int) -> Tensor:
    """(E, I, D): one projection of all experts."""
    return normal(preset.num_experts, preset.width, preset.dim, seed=seed)


def vectors(preset: Preset, seed: int) -> list[Tensor]:
    """The embedding and the norms."""
    norms = [normal(preset.dim, seed=seed + 1 + number) for number in range(preset.num_norms)]
    return [normal(preset.vocab, preset.dim, seed=seed), *norms]


def newton_schulz_flops(preset: Preset) -> int:
    """Of five iterations: X X^T, its square, and the product with X."""
    n, m = sorted((preset.width, preset.dim))
    return 5 * preset.num_experts * (4 * n * n * m + 2 * n**3)


def compare(
    name: str, candidates: dict[str, Candidate], seconds: float, limit: float, *, flops: int = 0, num_bytes: int = 0
) -> Comparison:
    """Times and peaks, ours first, after one run of each gave the same.

    Args:
        limit: of the relative difference of results.
    """
    for candidate in candidates.values():
        candidate.run()
    for peer, candidate in candidates.items():
        for value, expected in zip(candidate.result(), candidates["k25sys"].result(), strict=True):
            error = float((value.float() - expected.float()).norm() / expected.float().norm())
            if error > limit:
                raise SystemExit(f"{name}: {peer} computes something else: relative difference {error:.1e}")
    runs = {peer: candidate.run for peer, candidate in candidates.items()}
    times = alternate(runs, seconds=seconds)
    peaks = {peer: harness.peak_bytes(run, CPU) for peer, run in runs.items()}
    fields = {
        "allocator": harness.allocator(), "flops": flops, "bytes": num_bytes, "peak_bytes": peaks.pop("k25sys"),
        "peers_peak_bytes": peaks,
    }  # fmt: skip
    return Comparison(name=name, ours=times.pop("k25sys"), peers=times, fields=fields)


def bench_newton_schulz(preset: Preset, seconds: float, dtype: torch.dtype) -> Comparison:
    """One projection of all experts."""
    stacked = expert_matrices(preset, 0).to(dtype)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "k25sys": lambda: list(orthogonalize(stacked).unbind()),
        "one_by_one": lambda: [orthogonalize(matrix) for matrix in stacked],
    }
    done: dict[str, list[Tensor]] = {}

    def run(name: str) -> None:
        done[name] = ways[name]()

    candidates = {name: Candidate(partial(run, name), partial(done.__getitem__, name)) for name in ways}
    limit, flops = 1e-5 if dtype == torch.float32 else 5e-2, newton_schulz_flops(preset)
    return compare(f"newton_schulz/{KINDS[dtype]}/threads=1", candidates, seconds, limit, flops=flops)


def with_gradients(values: list[Tensor], gradients: list[Tensor]) -> list[nn.Parameter]:
    """Copies of `values` as leaves."""
    leaves = [nn.Parameter(value.clone()) for value in values]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient.clone()
    return leaves


def torch_muon(leaves: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's, with the scale of updates of ours."""
    return torch.optim.Muon(leaves, lr=RATE, weight_decay=CONFIG.weight_decay, adjust_lr_fn="match_rms_adamw")


def torch_adamw(leaves: list[nn.Parameter], *, foreach: bool = False, fused: bool = False) -> torch.optim.Optimizer:
    """torch's, with our constants."""
    return torch.optim.AdamW(
        leaves, lr=RATE, betas=CONFIG.adam_betas, eps=CONFIG.adam_epsilon, weight_decay=CONFIG.weight_decay,
        foreach=foreach, fused=fused,
    )  # fmt: skip


def bench_muon(preset: Preset, seconds: float, dtype: torch.dtype) -> Comparison:
    """A step of one projection of all experts; masters in float32, Newton-Schulz in `dtype`."""
    weight, gradient = expert_matrices(preset, 0), expert_matrices(preset, 1)
    leaves = with_gradients(list(weight), list(gradient))
    master, momentum = weight.clone(), torch.zeros_like(weight)

    whole = WholeMatrices(
        master=master, momentum=momentum, gradient=gradient, learning_rate=RATE,
        config=replace(CONFIG, newton_schulz_dtype=dtype),
    )  # fmt: skip
    candidates = {
        "k25sys": Candidate(lambda: step_whole([whole]), lambda: list(master)),
        "torch_muon": Candidate(torch_muon(leaves).step, lambda: [leaf.detach() for leaf in leaves]),
    }
    return compare(f"muon/{KINDS[dtype]}/threads=1", candidates, seconds, 1e-3, flops=newton_schulz_flops(preset))


def bench_adamw(preset: Preset, seconds: float, backend: str) -> Comparison:
    """A step of the embedding and the norms, flat as they lie in shards."""
    values, gradients = vectors(preset, 0), vectors(preset, 1000)
    masters = [value.flatten().clone() for value in values]
    moments = [[torch.zeros_like(master) for master in masters] for _ in range(2)]
    pieces = AdamWPieces(masters, [gradient.flatten() for gradient in gradients], *moments)
    rule, steps = choose(backend, CPU, torch.float32), iter(range(1, 1 << 30))
    candidates = {
        "k25sys": Candidate(
            lambda: rule(pieces, next(steps), RATE, CONFIG),
            lambda: [master.view_as(value) for master, value in zip(masters, values, strict=True)],
        )
    }
    for peer in ("plain", "foreach", "fused"):
        leaves = with_gradients(values, gradients)
        optimizer = torch_adamw(leaves, foreach=peer == "foreach", fused=peer == "fused")
        candidates[f"torch_{peer}"] = Candidate(
            optimizer.step, lambda leaves=leaves: [leaf.detach() for leaf in leaves]
        )
    # Reads weights, gradients and moments, writes all but the gradients.
    num_bytes = 7 * 4 * sum(value.numel() for value in values)
    return compare(f"adamw/{backend}/threads=1", candidates, seconds, 1e-6, num_bytes=num_bytes)


def bench_zero_step(preset: Preset, seconds: float, dtype: torch.dtype) -> Comparison:
    """All of it as one rank's step; fresh gradients are written before, on both sides."""
    stacked, stacked_gradient = expert_matrices(preset, 0), expert_matrices(preset, 1)
    values, gradients = [stacked, *vectors(preset, 0)], [stacked_gradient, *vectors(preset, 1000)]
    parameters = {str(number): nn.Parameter(value.clone()) for number, value in enumerate(values)}
    layouts = {name: ParameterLayout(shape=tuple(p.shape), matrix=p.dim() == 3) for name, p in parameters.items()}
    config = replace(CONFIG, newton_schulz_dtype=dtype)
    ours = ZeroOptimizer(parameters, layouts, RankGrid(GridSizes(), 0, "cpu", {}), config, adamw="torch")
    matrices = with_gradients(list(stacked), list(stacked_gradient))
    rest = with_gradients(values[1:], gradients[1:])
    muon, adamw = torch_muon(matrices), torch_adamw(rest, fused=True)

    def step() -> None:
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.main_grad.copy_(gradient)  # pyright: ignore[reportAttributeAccessIssue]
        ours.step(RATE)

    def torch_step() -> None:
        for leaf, gradient in zip([*matrices, *rest], [*stacked_gradient, *gradients[1:]], strict=True):
            assert leaf.grad is not None
            leaf.grad.copy_(gradient)
        nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        muon.step()
        adamw.step()

    candidates = {
        "k25sys": Candidate(
            step, lambda: [*parameters["0"].detach(), *(p.detach() for p in list(parameters.values())[1:])]
        ),
        "torch": Candidate(torch_step, lambda: [leaf.detach() for leaf in (*matrices, *rest)]),
    }
    return compare(f"zero_step/{KINDS[dtype]}/threads=1", candidates, seconds, 1e-3, flops=newton_schulz_flops(preset))


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    details = []
    if case["flops"]:
        details.append(f"{case['flops'] / case['ours_s'] / 1e9:.0f} GFLOP/s of Newton-Schulz")
    if case["bytes"]:
        details.append(f"{case['bytes'] / case['ours_s'] / 1e9:.1f} GB/s")
    return harness.describe(case, details)


def run_cases(preset: Preset, seconds: float, report: Callable[[dict[str, Any]], None]) -> None:
    """All cases, each told when it is done."""
    dtypes = [torch.float32, torch.bfloat16] if harness.torch_computes_bf16() else [torch.float32]
    for bench in (bench_newton_schulz, bench_muon, bench_zero_step):
        for dtype in dtypes:
            report(bench(preset, seconds, dtype).as_json())
    for backend in ADAMW:
        report(bench_adamw(preset, seconds, backend).as_json())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to spend on a case, warm-up apart")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--one-allocator", action="store_true", help="only under the allocator of this process")
    return parser.parse_args()


def main() -> None:
    """Runs the cases, prints each as it is done, and writes the JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    preset = PRESETS[arguments.preset]
    print(f"optimiser, {preset}\n{harness.machine()}", flush=True)
    cases = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        print(describe(case), flush=True)

    run_cases(preset, arguments.seconds, report)
    if not arguments.one_allocator:
        options = ["--one-allocator", "--seconds", str(arguments.seconds), "--preset", arguments.preset]
        for case in harness.rerun_with_other_allocator(os.path.abspath(__file__), options):
            report(case)
    if arguments.json:
        harness.write_json(arguments.json, "optimizer", {"adamw": ", ".join(ADAMW)}, cases)


if __name__ == "__main__":
    main()
