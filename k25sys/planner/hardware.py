"""What a GPU and its links can do. Peaks are the vendors' data sheets; efficiencies are assumptions, and said so."""

from dataclasses import dataclass, fields, replace

from k25sys.errors import ArgumentValueError, message


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
            value = getattr(self, item.name)
            share = item.name.endswith("efficiency")
            if item.name != "name" and not (value > 0 and (not share or value <= 1)):
                accepted = "a share of (0, 1]" if share else "a number > 0"
                raise ArgumentValueError(message("Hardware", item.name, value, accepted))

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


def hardware(name: str, **changes: float) -> Hardware:
    """The preset h800, h100 or h200, with any of its numbers replaced by measured ones.

    Raises:
        ArgumentValueError: an unknown preset or field, or a number out of its range.
    """
    if name not in _PRESETS:
        raise ArgumentValueError(message("plan", "--hardware", repr(name), ", ".join(_PRESETS)))
    known = {item.name for item in fields(Hardware)} - {"name"}
    for field in changes:
        if field not in known:
            raise ArgumentValueError(message("plan", "calibration", repr(field), ", ".join(sorted(known))))
    return replace(_PRESETS[name], **changes)
