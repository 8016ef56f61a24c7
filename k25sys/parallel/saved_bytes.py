"""How much memory waits for the backward: measured, and calculated from shapes, by the names of a memory plan."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from k25sys.parallel.activation_store import Packed, SavedActivations
from k25sys.parallel.recompute import NAMES, MemoryPlan


class SavedBytes:
    """Counts the memory of what autograd saves, each storage once and while it lives, without that of `parameters`."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._parameters = list(parameters)  # held, so that their addresses stay theirs
        self._not_counted = {parameter.untyped_storage()._cdata for parameter in self._parameters}
        self._saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def record(self, packed: Packed) -> None:
        """Counts what a store keeps on the device."""
        for tensor in packed.tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._not_counted:
                self._saved[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return sum(num_bytes for memory, num_bytes in self._saved.values() if not memory.expired())


def measure_saved_bytes(
    forward: Callable[[], Any], parameters: Iterable[Tensor], memory: SavedActivations | None = None
) -> tuple[Any, int]:
    """Runs `forward` and counts what waits for its backward.

    Args:
        forward: returns the output, which holds the graph. Called inside `memory.saving()`.
        parameters: not counted.
        memory: of the model's plan; None measures what autograd saves by itself.

    Returns:
        What `forward` returned, and bytes.
    """
    memory = memory or SavedActivations()
    counted = SavedBytes(parameters)
    before, memory.on_packed = memory.on_packed, counted.record
    try:
        with memory.saving():
            output = forward()
    finally:
        memory.on_packed = before
    return output, counted.total


@dataclass(frozen=True, kw_only=True)
class LayerShapes:
    """Sizes of one decoder layer as one rank sees it: its heads, its part of the widths, its tokens."""

    tokens: int
    dtype: torch.dtype
    hidden: int
    heads: int
    nope: int
    rope: int
    value: int
    kv_lora_rank: int
    q_lora_rank: int | None
    dense_width: int | None = None
    """Of a dense layer's SwiGLU; None in a layer with experts."""
    shared_width: int | None = None
    """Of the shared experts' SwiGLU; None in a dense layer."""
    expert_rows: int = 0
    """Of the routed experts here: tokens times experts a token, or, with experts on several ranks, what arrived."""
    experts_elsewhere: bool = False
    """Experts lie on several ranks: rows that arrived are saved beside the tokens."""
    expert_width: int = 0
    fused_norms: bool = False
    """torch has one RMSNorm kernel (CUDA), which saves its input and a number a row; on the CPU it is composed."""
    pads_values: bool = True
    """The attention kernel takes values as wide as queries."""


def cut_bytes(shapes: LayerShapes, plan: MemoryPlan) -> dict[str, int]:
    """By how many bytes each name of `plan` lowers what a layer saves, beside the others; the plan cuts their sum.

    norms: each RMSNorm's output and factor a row, and where it is composed also its normalised rows and the copy of its
    input in float32 that bfloat16 needs, less the input itself, which is saved in its place. swiglu: silu(gate) and the
    product. mla_up: queries and keys of all heads, and values as the kernel takes them, less the rotated key, which is
    needed again. moe_down: 0, see `recompute.RECOMPUTED`. expert_inputs, swiglu_inputs: the numbers, less their E4M3
    values and scales; of tokens that come out of a recomputed norm nothing is left to cut, but of rows that arrived
    from other ranks there is.
    """
    cuts = {
        "norms": _norms, "swiglu": _swiglu, "mla_up": _mla_up, "moe_down": lambda shapes: 0,
        "expert_inputs": lambda shapes: _expert_inputs(shapes, recomputed="norms" in plan.names),
        "swiglu_inputs": _swiglu_inputs,
    }  # fmt: skip
    return {name: cuts[name](shapes) for name in NAMES if name in plan.names}


def moe_down_bytes(shapes: LayerShapes) -> int:
    """What a layer composed of separate ops would save of the down projections' outputs; ops.expert_mlp does not."""
    return shapes.expert_rows * shapes.hidden * shapes.dtype.itemsize


def _norms(shapes: LayerShapes) -> int:
    latent_row = shapes.kv_lora_rank + shapes.rope  # the norm's input is a part of this
    rows = [(shapes.hidden, shapes.hidden)] * 2 + [(shapes.kv_lora_rank, latent_row)]
    if shapes.q_lora_rank is not None:
        rows.append((shapes.q_lora_rank, shapes.q_lora_rank))
    size = shapes.dtype.itemsize
    wide = torch.promote_types(shapes.dtype, torch.float32).itemsize
    cut = 0
    for width, input_width in rows:
        cut += width * size + wide
        if not shapes.fused_norms:
            cut += width * wide
            if size < wide:
                cut += width * wide - input_width * size
    return shapes.tokens * cut


def _swiglu_widths(shapes: LayerShapes) -> int:
    return (shapes.dense_width or 0) + (shapes.shared_width or 0)


def _swiglu(shapes: LayerShapes) -> int:
    return 2 * shapes.tokens * _swiglu_widths(shapes) * shapes.dtype.itemsize


def _mla_up(shapes: LayerShapes) -> int:
    query = shapes.nope + shapes.rope
    values = query if shapes.pads_values and shapes.value < query else shapes.nope + shapes.value
    per_head = (query if shapes.q_lora_rank is not None else 0) + query + values
    return shapes.tokens * (shapes.heads * per_head - shapes.rope) * shapes.dtype.itemsize


def _e4m3_cut(rows: int, width: int, dtype: torch.dtype) -> int:
    tiles = -(-width // 128)
    return rows * (width * (dtype.itemsize - 1) - 4 * tiles)


def _expert_inputs(shapes: LayerShapes, *, recomputed: bool) -> int:
    if shapes.shared_width is None:
        return 0
    rows = (0 if recomputed else shapes.tokens) + (shapes.expert_rows if shapes.experts_elsewhere else 0)
    return _e4m3_cut(rows, shapes.hidden, shapes.dtype)


def _swiglu_inputs(shapes: LayerShapes) -> int:
    widths = [width for width in (shapes.dense_width, shapes.shared_width) if width is not None]
    cut = sum(2 * _e4m3_cut(shapes.tokens, width, shapes.dtype) for width in widths)
    return cut + _e4m3_cut(shapes.expert_rows, 2 * shapes.expert_width, shapes.dtype)


def saved_bytes_table(calculated: Mapping[str, int], measured: Mapping[str, int] | None = None) -> str:
    """Lines of name, bytes cut as calculated, and as measured where that is given, with their sums."""
    columns = [calculated] if measured is None else [calculated, measured]
    heads = ["calculated", "measured"][: len(columns)]
    lines = [f"{'bytes cut':<16}" + "".join(f"{head:>16}" for head in heads)]
    for name in calculated:
        lines.append(f"{name:<16}" + "".join(f"{column[name]:>16,}" for column in columns))
    lines.append(f"{'sum':<16}" + "".join(f"{sum(column.values()):>16,}" for column in columns))
    return "\n".join(lines)
