"""What a GPU and its links can do. Peaks are the vendors' data sheets; efficiencies are assumptions, and said so."""

import sys
from dataclasses import dataclass, fields, replace

from k25sys.errors import ArgumentValueError, message


def _check(op: str, argument: str, field: str, value: object) -> None:
    whole, share = field == "gpus_per_node", field.endswith("efficiency")
    largest = 1 if share else sys.float_info.max
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest
    if not number or (whole and not isinstance(value, int)):
        accepted = "an int >= 1" if whole else "a share of (0, 1]" if share else "a finite number > 0"
        raise ArgumentValueError(message(op, argument, repr(value), accepted))


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU in its node. Rates per GPU and direction, in units of one (FLOP/s, bytes/s, bytes, seconds)."""

    name: str
    peak_flops: float
    """Dense bfloat16."""
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    """Between GPUs of a node."""
    network_bandwidth: float
    """Between nodes: one 400 Gb/s port a GPU."""
    gpus_per_node: int = 8
    gemm_efficiency: float = 0.70
    """Share of the peak that a large dense product reaches."""
    grouped_gemm_efficiency: float = 0.60
    """Of products grouped by expert."""
    attention_efficiency: float = 0.50
    """Of fused attention, forward and backward."""
    memory_efficiency: float = 0.80
    """Of the memory's bandwidth, for norms, activations and optimiser steps."""
    link_efficiency: float = 0.80
    """Of either link."""
    message_latency: float = 10e-6
    call_latency: float = 5e-6
    """Of starting one kernel."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "name":
                _check("Hardware", item.name, item.name, getattr(self, item.name))

    def assumptions(self) -> list[str]:
        """One line for each number that a plan rests on."""
        return [
            f"{self.name}: {self.peak_flops / 1e12:.0f} TFLOP/s dense bf16, {self.memory_bytes / 1e9:.0f} GB at "
            f"{self.memory_bandwidth / 1e12:.2f} TB/s, NVLink {self.nvlink_bandwidth / 1e9:.0f} GB/s and network "
            f"{self.network_bandwidth / 1e9:.0f} GB/s a GPU and direction, "
            f"{self.gpus_per_node} GPUs a node (data sheets)",
            f"assumed efficiencies: GEMM {self.gemm_efficiency:.0%}, grouped GEMM {self.grouped_gemm_efficiency:.0%}, "
            f"attention {self.attention_efficiency:.0%}, memory {self.memory_efficiency:.0%}, links "
            f"{self.link_efficiency:.0%}; {self.message_latency * 1e6:.0f} us a message, "
            f"{self.call_latency * 1e6:.0f} us a kernel",
        ]


_H100 = Hardware(
    name="h100",
    peak_flops=989e12,
    memory_bytes=80e9,
    memory_bandwidth=3.35e12,
    nvlink_bandwidth=450e9,
    network_bandwidth=50e9,
)
_PRESETS = {
    "h100": _H100,
    "h800": replace(_H100, name="h800", nvlink_bandwidth=200e9),  # NVLink of 400 GB/s both ways
    "h200": replace(_H100, name="h200", memory_bytes=141e9, memory_bandwidth=4.8e12),
}


def hardware(name: str, /, **changes: float) -> Hardware:
    """The preset h800, h100 or h200, with any of its numbers replaced by measured ones.

    Raises:
        ArgumentValueError: an unknown preset or field, or a number out of its range.
    """
    if name not in _PRESETS:
        raise ArgumentValueError(message("plan", "--hardware", repr(name), ", ".join(_PRESETS)))
    known = {item.name for item in fields(Hardware)} - {"name"}
    for field, value in changes.items():
        if field not in known:
            accepted = ", ".join(sorted(known))
            raise ArgumentValueError(message("plan", "--calibration", f"a field {field!r}", accepted))
        _check("plan", f"--calibration {field}", field, value)
    return replace(_PRESETS[name], **changes)
