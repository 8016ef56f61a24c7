"""What the benches need to know from inside: the machine's compute ceiling, and the phases of a fused call."""

import contextlib
import contextvars
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from k25sys.ops import checks, native

FORWARD_PHASES = ("gate_up", "down", "combine")
BACKWARD_PHASES = ("activation_grad", "input_and_weight_grads", "combine_grad")

_RECORD: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("k25sys_phases", default=None)


@contextlib.contextmanager
def record_phases() -> Iterator[dict[str, float]]:
    """Adds up the seconds that native `expert_mlp` calls spend in each phase while the context is open.

    Yields:
        A dict that fills up: gate_up (with gather and SwiGLU), down (with the routing weights), combine;
        activation_grad (with SwiGLU's gradient), input_and_weight_grads, combine_grad.
    """
    phases: dict[str, float] = {}
    token = _RECORD.set(phases)
    try:
        yield phases
    finally:
        _RECORD.reset(token)


@contextlib.contextmanager
def phase_buffer(names: tuple[str, ...]) -> Iterator[Tensor | None]:
    """The float64 buffer that one native call writes its phases' seconds to, or None while nobody records."""
    record = _RECORD.get()
    if record is None:
        yield None
        return
    seconds = torch.zeros(len(names), dtype=torch.float64)
    yield seconds
    for name, value in zip(names, seconds.tolist(), strict=True):
        record[name] = record.get(name, 0.0) + value


def peak_flops(dtype: torch.dtype, *, num_threads: int = 1, seconds: float = 0.2) -> float:
    """FLOP/s of the GEMM's inner loop on registers alone, summed over threads that run at the same time on the CPU.

    Args:
        dtype: float32, bfloat16 or float64.
        num_threads: at least 1.
        seconds: CPU time of each thread, in nine stretches of which the median counts.

    Raises:
        TypeError, ValueError: an unknown dtype or a bad number.
    """
    checks.integer("peak_flops", "num_threads", num_threads, 1, 4096)
    checks.tensor("peak_flops", "dtype", torch.empty(0, dtype=dtype), checks.FLOATS, (None,), "N")
    code = native.DTYPE_CODES[dtype]
    measure = native.kernels("peak_flops", torch.device("cpu")).peak_gflops
    with ThreadPoolExecutor(num_threads) as pool:
        sums = [sum(pool.map(lambda _: measure(code, seconds / 9), range(num_threads))) for _ in range(9)]
    return statistics.median(sums) * 1e9
