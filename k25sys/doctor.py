"""`python -m k25sys doctor`: is this machine fit, was everything built, does every op agree with its reference?"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k25sys import build_info

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check: a line of the report."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def run_doctor() -> int:
    """Prints one line a check, each failure with its fix. Returns 0 when all passed, else 1."""
    failures = 0
    for check in _checks():
        print(
            f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}"
            + (f"; fix: {check.fix}" if not check.ok else "")
        )
        failures += not check.ok
    print("all checks passed" if not failures else f"{failures} checks failed")
    return 1 if failures else 0


def _checks() -> Iterator[Check]:
    version = platform.python_version()
    yield Check(name="python", ok=sys.version_info >= (3, 10), detail=version, fix="install Python 3.10 or newer")
    try:
        import numpy
        import torch

        yield Check(name="torch", ok=True, detail=f"{torch.__version__}, numpy {numpy.__version__}")
    except ImportError as error:
        yield Check(name="torch", ok=False, detail=str(error), fix="pip install torch numpy")
        return
    try:
        info = build_info()
    except ValueError as error:  # K25_CPU_ISA names what this machine cannot run
        yield Check(name="extension", ok=False, detail=str(error), fix="unset K25_CPU_ISA or set it to auto")
        return
    cpu, cuda = info["cpu"], info["cuda"]
    if not cpu["built"]:
        yield Check(name="extension", ok=False, detail=cpu["reason"], fix="pip install -e . in the repository")
        return
    yield Check(name="extension", ok=True, detail=f"k25sys._C {info['version']}, {cpu['compiler']}")
    yield Check(name="cpu kernels", ok=True, detail=f"{cpu['isa']} of {', '.join(cpu['available_isas'])}")
    yield Check(
        name="threads",
        ok=cpu["threads"] == "openmp",
        detail=f"{cpu['threads']}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        fix="import torch before k25sys._C, so that both share one OpenMP runtime",
    )
    built = f"built, {cuda['num_devices']} devices" if cuda["built"] else f"not built ({cuda['reason']})"
    yield Check(name="cuda kernels", ok=True, detail=built)
    for name, self_test in _self_tests().items():
        try:
            error, limit = self_test()
        except Exception as fault:  # a broken installation may fail in any way: it is reported, never a traceback
            yield Check(name=name, ok=False, detail=f"{type(fault).__name__}: {fault}", fix="pip install -e . again")
            continue
        detail = f"largest error against the reference {error:.1e} (limit {limit:.0e})"
        yield Check(
            name=name, ok=error <= limit, detail=detail, fix="pip install -e . again; K25_CPU_ISA=portable avoids it"
        )


def _compare(
    limit: float, ours: "Callable[..., Tensor]", reference: "Callable[..., Tensor]", *inputs: "Tensor"
) -> tuple[float, float]:
    """Largest difference of values and gradients, relative to the largest value."""
    import torch

    results = []
    for function in (ours, reference):
        value = function(*inputs)
        upstream = torch.arange(value.numel()).sin().view_as(value)
        results.append([value.detach(), *torch.autograd.grad(value, inputs, upstream)])
    pairs = zip(*results, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-20)) for a, b in pairs), limit


def _fp8(x_MK: "Tensor", y_NK: "Tensor") -> tuple[float, float]:
    """The quantiser's codes, and the error of a product of them."""
    import torch

    from k25sys import ops

    a, b = ops.quantize_fp8(x_MK, (1, 128)), ops.quantize_fp8(y_NK, (128, 128))
    exact = ops.reference_fp8_gemm(*a, *b, out_dtype=torch.float64)
    ours = ops.fp8_gemm(*a, *b, out_dtype=torch.float32).double()
    same = torch.equal(a[0].float(), ops.reference_quantize_fp8(x_MK, (1, 128))[0].float())
    return float((ours - exact).abs().max() / exact.abs().max()) if same else float("inf"), 1e-5


def _self_tests() -> dict[str, Callable[[], tuple[float, float]]]:
    import torch
    from torch import Tensor

    from k25sys import ops

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    def plans() -> tuple[float, float]:
        pairs = zip(plan, ops.reference_plan_dispatch(experts_TK, 5), strict=True)
        equal = [torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs]
        return float(not all(equal)), 0.0

    x_TD, rows_MD = normal(23, 40), normal(69, 40)
    logits_TE, bias_E = normal(23, 5), normal(5).detach()
    route = {"top_k": 3, "scale": 2.5}
    weights_TK, experts_TK = ops.reference_route_tokens(logits_TE.detach(), bias_E, **route)
    weights_TK.requires_grad_()
    plan = ops.plan_dispatch(experts_TK, 5)
    grid_thw_N3 = torch.tensor([[1, 2, 4], [3, 6, 2]])
    targets_T, mask_T = torch.arange(23) % 31, torch.arange(23) % 4 != 0
    head_VD, old_T = normal(31, 40), torch.full((23,), -3.5)
    tokens = (targets_T, old_T, weights_TK[:, 0].detach(), mask_T)
    bounds: dict[str, Any] = {"log_low": -0.5, "log_high": 0.5, "tau": 0.1}

    return {
        "fp8": lambda: _fp8(x_TD.detach(), head_VD.detach()),
        "grouped_gemm": lambda: _compare(
            1e-5,
            lambda a, b: ops.grouped_gemm(a, b, plan.offsets),
            lambda a, b: ops.reference_grouped_gemm(a, b, plan.offsets),
            rows_MD, normal(5, 24, 40),
        ),
        "linear_clipped_log_ratio_loss": lambda: _compare(
            1e-5,
            lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, *tokens, **bounds)[0],
            lambda h, w: ops.reference_linear_clipped_log_ratio_loss(h, w, *tokens, **bounds),
            x_TD, head_VD,
        ),
        "vocab_parallel_clipped_log_ratio_loss": lambda: _compare(
            1e-5,
            lambda h: ops.vocab_parallel_clipped_log_ratio_loss(h, *tokens, **bounds)[0],
            lambda h: ops.reference_vocab_parallel_clipped_log_ratio_loss(h, *tokens, **bounds),
            normal(23, 31),
        ),
        "route_tokens": lambda: _compare(
            1e-5,
            lambda z: ops.route_tokens(z, bias_E, **route)[0],
            lambda z: ops.reference_route_tokens(z, bias_E, **route)[0],
            logits_TE,
        ),
        "plan_dispatch": plans,
        "dispatch": lambda: _compare(
            1e-6, lambda x: ops.dispatch(x, plan), lambda x: ops.reference_dispatch(x, plan), x_TD
        ),
        "combine": lambda: _compare(
            1e-5,
            lambda y, w: ops.combine(y, w, plan),
            lambda y, w: ops.reference_combine(y, w, plan),
            rows_MD, weights_TK,
        ),
        "swiglu": lambda: _compare(1e-5, ops.swiglu, ops.reference_swiglu, rows_MD),
        "expert_mlp": lambda: _compare(
            1e-5,
            lambda x, g, d, w: ops.expert_mlp(x, g, d, w, experts_TK),
            lambda x, g, d, w: ops.reference_expert_mlp(x, g, d, w, experts_TK),
            x_TD, normal(5, 48, 40), normal(5, 40, 24), weights_TK,
        ),
        "pool_temporal_patches": lambda: _compare(
            1e-6,
            lambda x: ops.pool_temporal_patches(x, grid_thw_N3),
            lambda x: ops.reference_pool_temporal_patches(x, grid_thw_N3),
            normal(44, 40),
        ),
    }  # fmt: skip
