"""FP8 block-scaled matrix products on the CPU: against torch's bf16 product, and against dequantising first.

python perf/bench_fp8.py [--seconds S] [--json FILE]

A product of 512 x 1024 activations (tiles of 1 x 128) by 1024 x 1024 weights (128 x 128), bf16 out. FP8 is emulated
on a CPU: parity with bf16 is the goal. Where torch has no fast bf16, its float32 product is timed beside it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys import ops
from perf import harness
from perf.harness import Comparison, alternate

M, N, K = 512, 1024, 1024


def bench_gemm(threads: int, seconds: float) -> Comparison:
    """The product, ours and the peers', checked against each other."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a_MK, b_NK = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator) * K**-0.5
    a, a_scales = ops.quantize_fp8(a_MK, (1, 128))
    b, b_scales = ops.quantize_fp8(b_NK, (128, 128))
    a_bf16, b_bf16, a_fp32, b_fp32 = a_MK.bfloat16(), b_NK.bfloat16(), a_MK, b_NK

    def dequantize_matmul() -> Tensor:  # as without this library: torch's own conversion, scales broadcast over tiles
        left = (a.bfloat16().view(M, K // 128, 128) * a_scales.bfloat16()[:, :, None]).view(M, K)
        right = b.bfloat16().view(N // 128, 128, K // 128, 128) * b_scales.bfloat16()[:, None, :, None]
        return left @ right.view(N, K).T

    runs: dict[str, Callable[[], Tensor]] = {
        "k25sys": lambda: ops.fp8_gemm(a, a_scales, b, b_scales),
        "torch_bf16": lambda: a_bf16 @ b_bf16.T,
        "dequantize_matmul": dequantize_matmul,
    }
    if not harness.torch_computes_bf16():
        runs["torch_fp32"] = lambda: a_fp32 @ b_fp32.T
    exact = ops.reference_fp8_gemm(a, a_scales, b, b_scales, out_dtype=torch.float64)
    error = float((runs["k25sys"]().double() - exact).norm() / exact.norm())
    if error > 4e-3:
        raise SystemExit(f"fp8_gemm computes something else: relative difference {error:.1e}")
    times = alternate(runs, seconds=seconds, most=60)
    ours = times.pop("k25sys")
    fields: dict[str, Any] = {
        "allocator": harness.allocator(),
        "flops": 2 * M * N * K,
        "relative_error": error,
        "ratios": {name: peer.median / ours.median for name, peer in times.items()},
        "peak_bytes": harness.peak_bytes(runs["k25sys"], torch.device("cpu")),
        "peers_peak_bytes": {name: harness.peak_bytes(runs[name], torch.device("cpu")) for name in times},
    }
    return Comparison(name=f"gemm/threads={threads}", ours=ours, peers=times, fields=fields)


def bench_quantize(seconds: float) -> Comparison:
    """The quantiser, 1 x 128, against the same in plain torch."""
    torch.set_num_threads(1)
    x = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    times = alternate(
        {
            "k25sys": lambda: ops.quantize_fp8(x, (1, 128)),
            "torch": lambda: ops.reference_quantize_fp8(x, (1, 128)),
        },
        seconds=seconds,
    )
    fields: dict[str, Any] = {
        "allocator": harness.allocator(), "bytes": 3 * x.numel(), "peak_bytes": None, "peers_peak_bytes": {},
    }  # fmt: skip
    return Comparison(name="quantize/threads=1", ours=times.pop("k25sys"), peers=times, fields=fields)


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    if "flops" in case:
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in case["ratios"].items())
        rate = f"{case['flops'] / case['ours_s'] / 1e9:.0f} GFLOP/s, relative error {case['relative_error']:.1e}"
        return harness.describe(case, [rate, f"ratio to each peer: {ratios}"])
    return harness.describe(case, [f"{case['bytes'] / case['ours_s'] / 1e9:.1f} GB/s read and written"])


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
    print(f"FP8 product {M} x {K} by {N} x {K}\n{harness.machine()}", flush=True)
    cases = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        print(describe(case), flush=True)

    for threads in [1, 2] if (os.cpu_count() or 1) > 1 else [1]:
        report(bench_gemm(threads, arguments.seconds).as_json())
    report(bench_quantize(arguments.seconds).as_json())
    if not arguments.one_allocator:
        options = ["--one-allocator", "--seconds", str(arguments.seconds)]
        for case in harness.rerun_with_other_allocator(os.path.abspath(__file__), options):
            report(case)
    if arguments.json:
        backends = {op: "native" for op in ("fp8_gemm", "quantize_fp8")}
        harness.write_json(arguments.json, "fp8", backends, cases)


if __name__ == "__main__":
    main()
