"""Other implementations of the experts of a MoE layer, as their users would write them.

Each returns a function that runs forward and backward once and leaves fresh gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k25sys import ops


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One MoE layer's inputs."""

    x_TD: Tensor
    gate_up_EGD: Tensor
    down_EDI: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    grad_TD: Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.experts_TK.shape[1]


Run = Callable[[], Tensor]


def _leaves(*values: Tensor) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in values]


def _step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Run:
    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(grad)
        return y.detach()

    return run


def k25sys(layer: Layer) -> Run:
    """This library, plan included."""
    leaves = x, gate_up, down, weights = _leaves(layer.x_TD, layer.gate_up_EGD, layer.down_EDI, layer.weights_TK)
    return _step(lambda: ops.expert_mlp(x, gate_up, down, weights, layer.experts_TK), leaves, layer.grad_TD)


def _sorted_slots(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    flat = layer.experts_TK.reshape(-1)
    order = flat.argsort(stable=True)
    return flat.bincount(minlength=layer.gate_up_EGD.shape[0]), order, order // layer.top_k


def _combine(x: Tensor, rows: Tensor, weights: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    weighted = rows * weights.reshape(-1)[order][:, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighted)


def torch_loop(layer: Layer) -> Run:
    """F.linear expert by expert, over separate parameters (a stacked one costs a full-size gradient an expert)."""
    x, weights = leaves = _leaves(layer.x_TD, layer.weights_TK)
    gate_ups = _leaves(*(weight.clone() for weight in layer.gate_up_EGD))
    downs = _leaves(*(weight.clone() for weight in layer.down_EDI))

    def forward() -> Tensor:
        counts, order, tokens = _sorted_slots(layer)
        outputs = []
        for rows, gate_up, down in zip(x.index_select(0, tokens).split(counts.tolist()), gate_ups, downs, strict=True):
            gate, up = F.linear(rows, gate_up).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return _combine(x, torch.cat(outputs), weights, order, tokens)

    return _step(forward, [*leaves, *gate_ups, *downs], layer.grad_TD)


def torch_grouped_mm(layer: Layer) -> Run:
    """torch.nn.functional.grouped_mm over stacked parameters."""
    leaves = x, gate_ups, downs, weights = _leaves(layer.x_TD, layer.gate_up_EGD, layer.down_EDI, layer.weights_TK)

    def forward() -> Tensor:
        counts, order, tokens = _sorted_slots(layer)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x.index_select(0, tokens), gate_ups.transpose(1, 2), offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, downs.transpose(1, 2), offs=ends)
        return _combine(x, rows, weights, order, tokens)

    return _step(forward, leaves, layer.grad_TD)


def transformers_grouped_mm(layer: Layer) -> Run:
    """transformers' DeepSeek-V3 experts with its grouped_mm implementation."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    num_experts, _, dim = layer.gate_up_EGD.shape
    width = layer.down_EDI.shape[2]
    sizes: dict[str, Any] = {
        "n_routed_experts": num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": layer.top_k,
    }
    config: Any = DeepseekV3Config(hidden_size=dim, moe_intermediate_size=width, **sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module: Any = DeepseekV3Experts(config)
    module.gate_up_proj = torch.nn.Parameter(layer.gate_up_EGD.detach())
    module.down_proj = torch.nn.Parameter(layer.down_EDI.detach())
    x, weights = _leaves(layer.x_TD, layer.weights_TK.to(layer.x_TD.dtype))
    ids = layer.experts_TK.long()
    return _step(lambda: module(x, ids, weights), [x, weights, *module.parameters()], layer.grad_TD)


def transformer_engine(layer: Layer) -> Run:
    """transformer-engine's GroupedLinear (CUDA)."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    num_experts, gate_up_width, dim = layer.gate_up_EGD.shape
    x, weights = _leaves(layer.x_TD, layer.weights_TK)
    options = {"bias": False, "params_dtype": x.dtype, "device": x.device}
    first = te.GroupedLinear(num_experts, dim, gate_up_width, **options)
    second = te.GroupedLinear(num_experts, gate_up_width // 2, dim, **options)
    with torch.no_grad():
        for e in range(num_experts):
            getattr(first, f"weight{e}").copy_(layer.gate_up_EGD[e])
            getattr(second, f"weight{e}").copy_(layer.down_EDI[e])

    def forward() -> Tensor:
        counts, order, tokens = _sorted_slots(layer)
        splits = counts.tolist()
        gate, up = first(x.index_select(0, tokens), splits).chunk(2, -1)
        return _combine(x, second(F.silu(gate) * up, splits), weights, order, tokens)

    return _step(forward, [x, weights, *first.parameters(), *second.parameters()], layer.grad_TD)


def _deep_gemm_linear() -> Any:
    """A grouped linear layer over DeepGEMM's bf16 kernels; rows of an expert start at multiples of its alignment."""
    import deep_gemm as dg  # pyright: ignore[reportMissingImports]

    class GroupedLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weight: Tensor, expert_of_row: Tensor, counts: list[int]) -> Tensor:
            ctx.save_for_backward(rows, weight, expert_of_row)
            ctx.counts = counts
            out = rows.new_empty(rows.shape[0], weight.shape[1])
            dg.m_grouped_bf16_gemm_nt_contiguous(rows, weight, out, expert_of_row)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            rows, weight, expert_of_row = ctx.saved_tensors
            grad = grads[0].contiguous()
            grad_rows = torch.empty_like(rows)
            dg.m_grouped_bf16_gemm_nn_contiguous(grad, weight, grad_rows, expert_of_row)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            counts = torch.tensor(ctx.counts, dtype=torch.int32, device=rows.device)
            dg.k_grouped_bf16_gemm_tn_contiguous(grad, rows, grad_weight, ctx.counts, counts, grad_weight)
            return grad_rows, grad_weight.to(weight.dtype), None, None

    return GroupedLinear


def deep_gemm(layer: Layer) -> Run:
    """DeepGEMM's contiguous grouped GEMMs in bf16 (CUDA): rows padded with zeros to its alignment."""
    import deep_gemm as dg  # pyright: ignore[reportMissingImports]

    linear = _deep_gemm_linear()
    alignment = int(dg.get_mk_alignment_for_contiguous_layout())
    leaves = x, gate_ups, downs, weights = _leaves(layer.x_TD, layer.gate_up_EGD, layer.down_EDI, layer.weights_TK)

    def forward() -> Tensor:
        counts, order, tokens = _sorted_slots(layer)
        padded = (counts + alignment - 1) // alignment * alignment
        starts = padded.cumsum(0) - padded - (counts.cumsum(0) - counts)
        at = torch.arange(len(order), device=x.device) + starts.repeat_interleave(counts)
        sizes = padded.tolist()
        expert_of_row = torch.arange(len(sizes), device=x.device).repeat_interleave(padded).int()
        rows = x.new_zeros(sum(sizes), x.shape[1]).index_copy(0, at, x.index_select(0, tokens))
        gate, up = linear.apply(rows, gate_ups, expert_of_row, sizes).chunk(2, -1)
        out = linear.apply(F.silu(gate) * up, downs, expert_of_row, sizes)
        return _combine(x, out.index_select(0, at), weights, order, tokens)

    return _step(forward, leaves, layer.grad_TD)


PEERS: dict[str, Callable[[Layer], Run]] = {
    "torch_loop": torch_loop,
    "torch_grouped_mm": torch_grouped_mm,
    "transformers_grouped_mm": transformers_grouped_mm,
    "transformer_engine": transformer_engine,
    "deep_gemm": deep_gemm,
}
CUDA_ONLY = ("transformer_engine", "deep_gemm")


def available(layer: Layer) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that can be built here for this layer, and the reason for each of the others."""
    runs, reasons = {}, {}
    for name, build in PEERS.items():
        on_cuda = layer.x_TD.device.type == "cuda"
        if name in CUDA_ONLY and not on_cuda:
            reasons[name] = "needs CUDA"
            continue
        try:
            run = build(layer)
            if on_cuda:
                run()  # one that compiles at its first call fails there
            runs[name] = run
        except Exception as error:  # whatever keeps a third-party library from running is its reason
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return runs, reasons
