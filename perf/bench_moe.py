"""The main job: forward and backward of the K2.5 MoE layer on real input, against the best public implementations.

python perf/bench_moe.py [--routing real|uniform|zipf] [--text FILE] [--preset cpu|k25] [--json FILE]
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys import ops
from perf import harness, moe_peers, routing
from perf.harness import Comparison, alternate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of the layer."""

    num_tokens: int
    dim: int
    num_experts: int
    width: int
    top_k: int


PRESETS = {
    "cpu": Preset(num_tokens=640, dim=1024, num_experts=64, width=512, top_k=8),
    "k25": Preset(num_tokens=8192, dim=7168, num_experts=384, width=2048, top_k=8),
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """A layer with the logits that routed it."""

    layer: moe_peers.Layer
    logits_TE: Tensor
    plan: ops.DispatchPlan


def make_input(preset: Preset, kind: str, text: str, dtype: torch.dtype, device: torch.device) -> Input:
    """Embeds the text, routes it, and makes weights."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, scale: float) -> Tensor:
        if device.type == "cuda":
            return torch.randn(shape, device=device, dtype=dtype) * scale
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x_TD = routing.embed(routing.token_ids(text, preset.num_tokens), preset.dim)
    logits_TE = routing.router_logits(x_TD, preset.num_experts, kind).to(device)
    bias_E = torch.zeros(preset.num_experts, device=device)
    weights_TK, experts_TK = ops.route_tokens(logits_TE, bias_E, top_k=preset.top_k, scale=2.827)
    layer = moe_peers.Layer(
        x_TD=x_TD.to(device, dtype),
        gate_up_EGD=normal(preset.num_experts, 2 * preset.width, preset.dim, scale=preset.dim**-0.5),
        down_EDI=normal(preset.num_experts, preset.dim, preset.width, scale=preset.width**-0.5),
        weights_TK=weights_TK,
        experts_TK=experts_TK,
        grad_TD=normal(preset.num_tokens, preset.dim, scale=1.0),
    )
    return Input(layer=layer, logits_TE=logits_TE, plan=ops.plan_dispatch(experts_TK, preset.num_experts))


def layer_flops(preset: Preset) -> int:
    """FLOPs of forward and backward: three GEMMs of 2 M D I each (gate, up, down), three times."""
    return 18 * preset.num_tokens * preset.top_k * preset.dim * preset.width


def layer_bytes(preset: Preset, loaded_experts: int, element: int) -> int:
    """Bytes that must move at least: weights of loaded experts read twice, gradients written, rows once each way."""
    per_expert = 3 * preset.dim * preset.width
    rows = preset.num_tokens * preset.top_k
    activations = 2 * rows * (2 * preset.dim + 3 * preset.width)
    return element * (2 * loaded_experts * per_expert + preset.num_experts * per_expert + activations)


def bench_experts(
    name: str, preset: Preset, data: Input, seconds: float, device: torch.device, *, least: int
) -> Comparison:
    """expert_mlp, forward and backward with all gradients, against every peer, in at least so many rounds."""
    layer = data.layer
    dtype = layer.x_TD.dtype
    ours = moe_peers.k25sys(layer)
    peers, reasons = moe_peers.available(layer)
    times = alternate({"k25sys": ours, **peers}, seconds=seconds, least=least)
    with ops.record_phases() as phases:
        expected = ours().float()
    # Memory of a step that starts without gradients, so that making them counts, for everyone.
    quick = [peer for peer in peers if len(times[peer].raw_times) > 1]
    builders = {"k25sys": moe_peers.k25sys, **{peer: moe_peers.PEERS[peer] for peer in quick}}
    del ours, peers
    peaks = {}
    for candidate, build in builders.items():
        results: list[Tensor] = []
        peaks[candidate] = harness.peak_bytes(
            partial(lambda run, out: out.append(run()), build(layer), results), device
        )
        error = float((results[0].float() - expected).norm() / expected.norm())
        if error > (2e-2 if dtype == torch.bfloat16 else 1e-4):
            raise SystemExit(f"{name}: {candidate} computes something else: relative difference {error:.1e}")
    num_threads = torch.get_num_threads()
    ceiling = None if device.type == "cuda" else ops.peak_flops(dtype, num_threads=num_threads)
    median = times["k25sys"].median
    fields: dict[str, Any] = {
        "allocator": harness.allocator(),
        "flops": layer_flops(preset),
        "bytes": layer_bytes(preset, int((data.plan.tokens_per_expert_E > 0).sum()), layer.x_TD.element_size()),
        "ceiling_flops_per_second": ceiling,
        "ceiling_share": None if ceiling is None else layer_flops(preset) / median / ceiling,
        "peak_bytes": peaks.pop("k25sys"),
        "peers_peak_bytes": peaks,
        "peers_unavailable": reasons,
        "phases_s": {**small_phases(preset, data), **phases},
        "tokens_per_expert_max_over_mean": float(data.plan.tokens_per_expert_E.max())
        / (preset.num_tokens * preset.top_k / preset.num_experts),
    }
    return Comparison(name=name, ours=times.pop("k25sys"), peers=times, fields=fields)


def small_phases(preset: Preset, data: Input) -> dict[str, float]:
    """Seconds of what surrounds the experts: router, plan, and dispatch as an op of its own (expert_mlp fuses it)."""
    bias_E = torch.zeros(preset.num_experts, device=data.logits_TE.device)
    runs: dict[str, Callable[[], Any]] = {
        "route": lambda: ops.route_tokens(data.logits_TE, bias_E, top_k=preset.top_k, scale=2.827),
        "plan": lambda: ops.plan_dispatch(data.layer.experts_TK, preset.num_experts),
        "dispatch": lambda: ops.dispatch(data.layer.x_TD, data.plan),
    }
    return {name: result.median for name, result in alternate(runs, seconds=0.3).items()}


def bench_rows(kind: str, name: str, data: Input, seconds: float) -> Comparison:
    """combine, dispatch, or the grouped product of gate and up, forward, against what torch has for it."""
    layer, plan = data.layer, data.plan
    tokens_M = plan.slot_of_row_M.long() // plan.top_k
    rows_MD = layer.x_TD[tokens_M]
    weights_M1 = layer.weights_TK.reshape(-1)[plan.slot_of_row_M.long()][:, None].to(rows_MD.dtype)
    if kind == "combine":
        peer, run = (
            "torch_index_add",
            lambda: torch.zeros_like(layer.x_TD).index_add_(0, tokens_M, rows_MD * weights_M1),
        )
        ours: Callable[[], Any] = lambda: ops.combine(rows_MD, layer.weights_TK, plan)  # noqa: E731
    elif kind == "dispatch":
        peer, run = "torch_index_select", lambda: layer.x_TD.index_select(0, tokens_M)
        ours = lambda: ops.dispatch(layer.x_TD, plan)  # noqa: E731
    else:
        weight_EGD, ends_E = layer.gate_up_EGD, plan.offsets[1:]
        peer = "torch_grouped_mm"
        run = lambda: torch.nn.functional.grouped_mm(rows_MD, weight_EGD.transpose(1, 2), offs=ends_E)  # noqa: E731
        ours = lambda: ops.grouped_gemm(rows_MD, weight_EGD, plan.offsets)  # noqa: E731
    times = alternate({"k25sys": ours, peer: run}, seconds=seconds, most=200)
    moved = rows_MD.nbytes + (1 if kind == "combine" else plan.top_k) * layer.x_TD.nbytes
    if kind == "grouped_gemm":
        moved = rows_MD.nbytes + layer.gate_up_EGD.nbytes + rows_MD.shape[0] * layer.gate_up_EGD.shape[1] * 2
    fields = {"allocator": harness.allocator(), "bytes": moved, "peak_bytes": None, "peers_peak_bytes": {}}
    return Comparison(name=name, ours=times.pop("k25sys"), peers=times, fields=fields)


def bench_call_overhead() -> dict[str, Any]:
    """Seconds of one call of each op on the smallest input, without and with autograd."""
    torch.set_num_threads(1)
    rows, logits, bias = torch.randn(1, 8), torch.randn(1, 4), torch.zeros(4)
    gate_up, down = torch.randn(4, 8, 8), torch.randn(4, 8, 4)
    weights, experts = ops.route_tokens(logits, bias, top_k=1, scale=1.0)
    plan = ops.plan_dispatch(experts, 4)
    leaf = rows.clone().requires_grad_()
    runs: dict[str, Callable[[], Any]] = {
        "swiglu": lambda: ops.swiglu(rows),
        "swiglu_autograd": lambda: ops.swiglu(leaf),
        "dispatch": lambda: ops.dispatch(rows, plan),
        "dispatch_autograd": lambda: ops.dispatch(leaf, plan),
        "combine": lambda: ops.combine(rows, weights, plan),
        "route_tokens": lambda: ops.route_tokens(logits, bias, top_k=1, scale=1.0),
        "plan_dispatch": lambda: ops.plan_dispatch(experts, 4),
        "expert_mlp": lambda: ops.expert_mlp(rows, gate_up, down, weights, experts),
    }
    seconds = {name: harness.per_call(run) for name, run in runs.items()}
    peers = {"torch_silu": harness.per_call(lambda: torch.nn.functional.silu(rows))}
    ours = seconds["swiglu"]
    return {
        "name": "call_overhead", "ours_s": ours, "peers_s": peers, "ratio": peers["torch_silu"] / ours,
        "peak_bytes": None, "peers_peak_bytes": {}, "ops_s": seconds,
    }  # fmt: skip


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    if "ops_s" in case:
        return f"{case['name']}\n  " + "  ".join(f"{name} {s * 1e6:.1f} us" for name, s in case["ops_s"].items())
    details = []
    if case.get("ceiling_share"):
        rate = case["ceiling_flops_per_second"] / 1e9
        details.append(f"{case['ceiling_share']:.0%} of the measured {rate:.0f} GFLOP/s")
    if case.get("phases_s"):
        details.append("phases, ms: " + "  ".join(f"{name} {s * 1e3:.2f}" for name, s in case["phases_s"].items()))
    if case.get("flops"):
        load = case["tokens_per_expert_max_over_mean"]
        details.append(
            f"{case['flops'] / 1e9:.1f} GFLOP, at least {case['bytes'] / 1e6:.0f} MB moved; "
            f"fullest expert {load:.1f}x the mean"
        )
    return harness.describe(case, details)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--routing", choices=routing.ROUTINGS, help="only this routing (default: real, and one uniform case)"
    )
    parser.add_argument("--text", metavar="FILE", help="text to route (default: text that ships with Python)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: cpu without CUDA kernels, else k25")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on a case, warm-up apart")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--experts-only", action="store_true", help="the expert_mlp cases, under this allocator alone")
    return parser.parse_args()


def plan_cases(arguments: argparse.Namespace, device: torch.device) -> list[tuple[str, str, int]]:
    """(dtype, routing, threads) of each expert_mlp case."""
    main_routing = arguments.routing or "real"
    if device.type == "cuda":
        return [("bf16", main_routing, 1)]
    threads = [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    cases = [("bf16", main_routing, count) for count in threads]
    if arguments.experts_only:
        return cases if harness.torch_computes_bf16() else [("fp32", main_routing, 1)]
    if arguments.routing is None:
        cases.append(("bf16", "uniform", 1))
    return [*cases, ("fp32", main_routing, 1)]


def main() -> None:
    """Runs the cases, prints each as it is done, and writes the JSON."""
    arguments = parse_arguments()
    has_cuda = any(b.device == "cuda" and b.available for b in ops.backends.listing("expert_mlp"))
    device = torch.device("cuda" if has_cuda else "cpu")
    preset_name = arguments.preset or ("k25" if has_cuda else "cpu")
    preset = PRESETS[preset_name]
    need = 8 * preset.num_experts * 3 * preset.dim * preset.width
    if device.type == "cpu" and need > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise SystemExit(
            f"--preset {preset_name} needs about {need / 1e9:.0f} GB of memory: run it on CUDA, or --preset cpu"
        )
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else routing.default_text()
    print(f"MoE layer, preset {preset_name}: {preset}\n{harness.machine()}", flush=True)
    cases = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        print(describe(case), flush=True)

    presets = dict.fromkeys(DTYPES, preset)
    if device.type == "cpu" and not harness.torch_computes_bf16():
        presets["bf16"] = replace(preset, num_tokens=preset.num_tokens // 8)
        print(f"torch has no fast bf16 on this CPU: bf16 cases have {presets['bf16'].num_tokens} tokens", flush=True)
    for dtype, kind, threads in plan_cases(arguments, device):
        torch.set_num_threads(threads)
        data = make_input(presets[dtype], kind, text, DTYPES[dtype], device)
        suffix = f"{dtype}/{kind}/threads={threads}"
        is_main = dtype == "bf16" and kind == (arguments.routing or "real")
        name, least = f"expert_mlp/{suffix}", 5 if is_main else 3
        report(bench_experts(name, presets[dtype], data, arguments.seconds, device, least=least).as_json())
        if is_main and not arguments.experts_only:
            for rows in ("combine", "dispatch", "grouped_gemm"):
                report(bench_rows(rows, f"{rows}/{suffix}", data, arguments.seconds / 4).as_json())
    if not arguments.experts_only:
        report(bench_call_overhead())
        if device.type == "cpu":
            options = [
                "--preset",
                preset_name,
                "--seconds",
                str(arguments.seconds),
                "--routing",
                arguments.routing or "real",
            ]
            if arguments.text:
                options += ["--text", arguments.text]
            for case in harness.rerun_with_other_allocator(__file__, [*options, "--experts-only"]):
                report(case)
    if arguments.json:
        names = {op: "native" for op in ops.backends.OPS}
        names["expert_mlp"] = ops.backends.choose("expert_mlp", None, device, torch.bfloat16)
        harness.write_json(arguments.json, "moe", names, cases)


if __name__ == "__main__":
    main()
