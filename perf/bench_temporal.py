"""Temporal pooling of MoonViT-3D: pool_temporal_patches against transformers' Kimi-K2.5, on the CPU.

python perf/bench_temporal.py [--seconds S] [--json FILE]

Two grids of about 12,500 patches of 1152 channels in bf16, the width of K2.5's vision tower: clips of mixed sizes and
lengths as a batch of pictures and videos has them, and equal clips of four frames.
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

GRIDS = {
    "mixed": ((4, 16, 24), (4, 30, 20), (1, 28, 36), (3, 16, 16), (2, 40, 22), (4, 36, 36)),
    "uniform": ((4, 32, 32),) * 3,
}
DIM = 1152
MERGE = (2, 2)


@dataclass(frozen=True, kw_only=True)
class Input:
    """Patches, their clips and an upstream gradient."""

    x_PD: Tensor
    grid_thw_N3: Tensor
    grad_QCD: Tensor


Pool = Callable[[Tensor], Tensor]


def make_input(grid: str) -> Input:
    """Normal numbers on one of GRIDS."""
    generator = torch.Generator().manual_seed(3)
    grid_thw_N3 = torch.tensor(GRIDS[grid])
    num_patches = int(grid_thw_N3.prod(1).sum())
    num_out = int(grid_thw_N3[:, 1:].prod(1).sum()) // 4
    x_PD, grad_QCD = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((num_patches, DIM), (num_out, 4, DIM))
    )
    return Input(x_PD=x_PD, grid_thw_N3=grid_thw_N3, grad_QCD=grad_QCD)


def transformers_pools(grid_thw_N3: Tensor) -> dict[str, Pool]:
    """The two ways of transformers' vision tower: its loop over the clips, and the gather that its forward() uses.

    The gather's index is made beforehand, as transformers lets its callers do.
    """
    from transformers.models.kimi_k25 import modeling_kimi_k25 as modeling

    class Merger:
        merge_kernel_size = MERGE

    def gather(x_PD: Tensor) -> Tensor:
        return x_PD[index].mean(dim=1)

    merger: Any = Merger()
    pools = {"loop": lambda x_PD: modeling.Kimi_K25VisionModel.temporal_patch_merger(merger, x_PD, grid_thw_N3)}
    try:
        index = modeling.get_vision_temporal_merge_index(grid_thw_N3, *MERGE)
    except RuntimeError:  # its gather has one frame axis for all clips
        return pools
    return {**pools, "gather": gather}


def peer_pools(grid_thw_N3: Tensor) -> tuple[dict[str, Pool], dict[str, str]]:
    """transformers' ways that run here for these clips, and the reason for each that does not."""
    try:
        pools = transformers_pools(grid_thw_N3)
    except ImportError as error:
        raise SystemExit(f"bench_temporal needs the peer: pip install 'transformers>=5.18' ({error})") from error
    missing = {} if "gather" in pools else {"transformers' gather": "it refuses clips of different numbers of frames"}
    return pools, missing


def forward(pool: Pool, data: Input) -> Tensor:
    """The result alone."""
    with torch.no_grad():
        return pool(data.x_PD)


def forward_backward(pool: Pool, data: Input) -> Tensor:
    """The result, and a fresh gradient of the patches, which is returned."""
    leaf = data.x_PD.detach().requires_grad_()
    pool(leaf).backward(data.grad_QCD)
    assert leaf.grad is not None
    return leaf.grad


def bench(case: str, grid: str, seconds: float) -> Comparison:
    """One case against transformers' fastest way, with a plain copy of as many bytes for scale."""
    data = make_input(grid)
    ours: Pool = partial(ops.pool_temporal_patches, grid_thw_N3=data.grid_thw_N3, merge=MERGE)
    pools, missing = peer_pools(data.grid_thw_N3)
    step = forward if case.startswith("forward/") else forward_backward
    runs = {"k25sys": partial(step, ours, data), **{name: partial(step, pool, data) for name, pool in pools.items()}}
    expected = runs["k25sys"]().float()
    for name in pools:
        error = float((runs[name]().float() - expected).norm() / expected.norm())
        if error > 1e-2:
            raise SystemExit(f"{case}: transformers' {name} computes something else: relative difference {error:.1e}")
    moved = (data.x_PD.nbytes + data.grad_QCD.nbytes) * (1 if step is forward else 2)
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = alternate({**runs, "copy": lambda: target.copy_(source)}, seconds=seconds, most=60)
    peaks = {name: harness.peak_bytes(run, torch.device("cpu")) for name, run in runs.items()}
    best = min(pools, key=lambda name: times[name].median)
    fields: dict[str, Any] = {
        "allocator": harness.allocator(),
        "bytes": moved,
        "copy_s": times["copy"].median,
        "best_of_transformers": best,
        "transformers_s": {name: times[name].median for name in pools},
        "peak_bytes": peaks["k25sys"],
        "peers_peak_bytes": {"transformers": peaks[best]},
        "peers_unavailable": missing,
    }
    return Comparison(name=case, ours=times["k25sys"], peers={"transformers": times[best]}, fields=fields)


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    ways = "  ".join(f"{name} {s * 1e3:.2f}" for name, s in case["transformers_s"].items())
    rate = case["bytes"] / case["ours_s"] / 1e9
    return harness.describe(
        case,
        [
            f"transformers, ms: {ways}",
            f"at least {case['bytes'] / 1e6:.0f} MB moved, {rate:.1f} GB/s; torch copies that in "
            f"{case['copy_s'] * 1e3:.2f} ms",
        ],
    )


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
    print(f"temporal pooling, {DIM} channels, bf16, {GRIDS}\n{harness.machine()}", flush=True)
    cases = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        print(describe(case), flush=True)

    for threads in [1, 2] if (os.cpu_count() or 1) > 1 else [1]:
        torch.set_num_threads(threads)
        for direction in ("forward", "forward_backward"):
            report(bench(f"{direction}/threads={threads}", "mixed", arguments.seconds).as_json())
            if threads == 1:
                report(bench(f"{direction}/uniform/threads=1", "uniform", arguments.seconds).as_json())
    if not arguments.one_allocator:
        options = ["--seconds", str(arguments.seconds), "--one-allocator"]
        for case in harness.rerun_with_other_allocator(__file__, options):
            report(case)
    if arguments.json:
        harness.write_json(arguments.json, "temporal", {"pool_temporal_patches": "native"}, cases)


if __name__ == "__main__":
    main()
