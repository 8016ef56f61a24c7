"""Calls the executor's ops with tensors: allocates outputs full of garbage and registers every buffer with its size."""

from types import ModuleType

import torch
from torch import Tensor

from k25sys.ops import DispatchPlan, checks, native
from k25sys.ops.quantize_fp8 import scales_shape

ORDERS = (("in_order", 0), ("reverse", 0), ("random", 1), ("random", 2))


class DeviceOps:
    """The ops of one executor module. `shift` moves each tensor by so many elements from an aligned address."""

    def __init__(
        self, module: ModuleType, executor: str, order: str = "in_order", seed: int = 0, shift: int = 0
    ) -> None:
        self.module = module
        self.shift = shift
        self._options = (order, seed, executor)

    def _place(self, value: Tensor) -> Tensor:
        space = torch.empty(value.numel() + self.shift, dtype=value.dtype)
        placed = space[self.shift :].view(value.shape)
        return placed.copy_(value)

    def _garbage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        empty = torch.empty(shape, dtype=dtype)
        return self._place(empty.fill_(float("nan") if dtype.is_floating_point else -0x5A5A5A5A))

    def _call(self, op: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], arguments: list[object]) -> None:
        """Tensors among `arguments` become their addresses."""
        self.module.set_options(*self._options)
        self.module.clear_buffers()
        for writable, tensors in ((False, inputs), (True, outputs)):
            for name, value in tensors.items():
                self.module.register_buffer(name, value.data_ptr(), value.nbytes, writable)
        flat = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        getattr(self.module, op)(*flat, 0)

    def route_tokens(self, logits: Tensor, bias: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        inputs = {"logits": self._place(logits), "bias": self._place(bias)}
        outputs = {
            "weights": self._garbage((tokens, top_k), checks.routing_dtype(logits.dtype)),
            "experts": self._garbage((tokens, top_k), torch.int32),
        }
        sizes = [native.DTYPE_CODES[logits.dtype], tokens, experts, top_k, scale]
        self._call("route_tokens", inputs, outputs, [*inputs.values(), *outputs.values(), *sizes])
        return outputs["weights"], outputs["experts"]

    def route_tokens_backward(self, grad: Tensor, logits: Tensor, experts: Tensor, *, scale: float) -> Tensor:
        inputs = {name: self._place(v) for name, v in (("grad", grad), ("logits", logits), ("experts", experts))}
        outputs = {"grad_logits": self._garbage(tuple(logits.shape), logits.dtype)}
        sizes = [native.DTYPE_CODES[logits.dtype], *logits.shape, experts.shape[1], scale]
        self._call("route_tokens_backward", inputs, outputs, [*inputs.values(), *outputs.values(), *sizes])
        return outputs["grad_logits"]

    def plan_dispatch(self, experts: Tensor, num_experts: int) -> DispatchPlan:
        tokens, top_k = experts.shape
        rows = tokens * top_k
        inputs = {"experts": self._place(experts)}
        shapes: dict[str, tuple[int, ...]] = {
            "tokens_per_expert": (num_experts,),
            "offsets": (num_experts + 1,),
            "slot_of_row": (rows,),
        }
        shapes["row_of_slot"] = (tokens, top_k)
        shapes["workspace"] = (self.module.plan_dispatch_workspace(rows, num_experts),)
        outputs = {name: self._garbage(shape, torch.int32) for name, shape in shapes.items()}
        *results, workspace = outputs.values()
        sizes = [experts.dtype == torch.int64, tokens, num_experts, top_k]
        self._call("plan_dispatch", inputs, outputs, [*inputs.values(), *sizes, *results, workspace])
        return DispatchPlan(num_experts, top_k, *results)

    def dispatch(self, x: Tensor, plan: DispatchPlan) -> Tensor:
        inputs = {"x": self._place(x), "slot_of_row": self._place(plan.slot_of_row_M)}
        rows = self._garbage((len(plan.slot_of_row_M), x.shape[1]), x.dtype)
        sizes = [x.shape[0], rows.shape[0], x.shape[1], plan.top_k, native.DTYPE_CODES[x.dtype]]
        self._call("dispatch", inputs, {"rows": rows}, [*inputs.values(), rows, *sizes])
        return rows

    def combine(self, rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Tensor:
        inputs = {"rows": self._place(rows), "row_of_slot": self._place(plan.row_of_slot_TK)}
        if weights is not None:
            inputs["weights"] = self._place(weights)
        out = self._garbage((plan.num_tokens, rows.shape[1]), rows.dtype)
        sizes = [plan.num_tokens, *rows.shape, plan.top_k, native.DTYPE_CODES[rows.dtype]]
        arguments = [inputs["rows"], inputs.get("weights", 0), inputs["row_of_slot"], out, *sizes]
        self._call("combine", inputs, {"out": out}, arguments)
        return out

    def combine_backward(
        self, grad_out: Tensor, rows: Tensor, weights: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, Tensor]:
        named = {"grad_out": grad_out, "rows": rows, "weights": weights, "slot_of_row": plan.slot_of_row_M}
        inputs = {name: self._place(value) for name, value in named.items()}
        outputs = {
            "grad_rows": self._garbage(tuple(rows.shape), rows.dtype),
            "grad_weights": self._garbage(tuple(weights.shape), weights.dtype),
        }
        sizes = [plan.num_tokens, *rows.shape, plan.top_k, native.DTYPE_CODES[rows.dtype]]
        self._call("combine_backward", inputs, outputs, [*inputs.values(), *outputs.values(), *sizes])
        return outputs["grad_rows"], outputs["grad_weights"]

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        inputs = {"gate_up": self._place(gate_up)}
        act = self._garbage((rows, width), gate_up.dtype)
        sizes = [rows, width, native.DTYPE_CODES[gate_up.dtype]]
        self._call("swiglu", inputs, {"act": act}, [*inputs.values(), act, *sizes])
        return act

    def swiglu_backward(self, grad_act: Tensor, gate_up: Tensor) -> Tensor:
        rows, width = grad_act.shape
        inputs = {"grad_act": self._place(grad_act), "gate_up": self._place(gate_up)}
        grad = self._garbage(tuple(gate_up.shape), gate_up.dtype)
        sizes = [rows, width, native.DTYPE_CODES[gate_up.dtype]]
        self._call("swiglu_backward", inputs, {"grad_gate_up": grad}, [*inputs.values(), grad, *sizes])
        return grad

    def weighted_swiglu_backward(
        self, grad_act: Tensor, gate_up: Tensor, weights: Tensor, slot_of_row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = {"grad_act": grad_act, "gate_up": gate_up, "weights": weights, "slot_of_row": slot_of_row}
        inputs = {name: self._place(value) for name, value in named.items()}
        outputs = {
            "grad_gate_up": self._garbage(tuple(gate_up.shape), gate_up.dtype),
            "weighted_act": self._garbage(tuple(grad_act.shape), gate_up.dtype),
            "grad_weights": self._garbage(tuple(weights.shape), weights.dtype),
        }
        sizes = [*grad_act.shape, native.DTYPE_CODES[gate_up.dtype]]
        self._call("weighted_swiglu_backward", inputs, outputs, [*inputs.values(), *outputs.values(), *sizes])
        return outputs["grad_gate_up"], outputs["weighted_act"], outputs["grad_weights"]

    def transpose_fp8(self, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        batch, rows, cols = values.shape
        inputs = {"values": self._place(values.view(torch.uint8)), "scales": self._place(scales)}
        outputs = {
            "values_t": self._place(torch.full((batch, cols, rows), 0x5A, dtype=torch.uint8)),
            "scales_t": self._garbage((batch, scales.shape[2], scales.shape[1]), torch.float32),
        }
        self._call("transpose_fp8", inputs, outputs, [*inputs.values(), *outputs.values(), batch, rows, cols])
        return outputs["values_t"].view(torch.float8_e4m3fn), outputs["scales_t"]

    def _loss_inputs(
        self, logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
        rows, vocab = logits.shape
        named = {"logits": logits, "targets": targets}
        tokens = {"old": old, "advantages": advantages, "weights": weights}
        sizes = [rows, vocab, 0, native.DTYPE_CODES[logits.dtype]]
        return (
            {name: self._place(value) for name, value in named.items()},
            {name: self._place(value) for name, value in tokens.items()},
            sizes,
        )

    def loss_rows(self, *inputs: Tensor, objective: tuple[object, ...], in_place: bool) -> tuple[Tensor, ...]:
        """logits, targets, old, advantages, weights -> losses, log-probabilities, entropies, gradient of the logits."""
        placed, tokens, sizes = self._loss_inputs(*inputs)
        scalar = inputs[-1].dtype
        outputs = {name: self._garbage((sizes[0],), scalar) for name in ("logprobs", "entropies", "losses")}
        grad = placed["logits"] if in_place else self._garbage(tuple(inputs[0].shape), inputs[0].dtype)
        written = {**outputs, ("logits" if in_place else "grad"): grad}
        read = {name: value for name, value in {**placed, **tokens}.items() if name not in written}
        addresses = tuple(value.data_ptr() for value in tokens.values())
        self._call(
            "loss_rows", read, written, [(*addresses, *objective), *placed.values(), *outputs.values(), grad, *sizes]
        )
        return outputs["losses"], outputs["logprobs"], outputs["entropies"], grad

    def loss_rows_in_steps(self, *inputs: Tensor, objective: tuple[object, ...]) -> tuple[Tensor, ...]:
        """The same by logit_stats, token_losses and logit_grad, as a sharded vocabulary takes them."""
        placed, tokens, sizes = self._loss_inputs(*inputs)
        scalar = inputs[-1].dtype
        stats = self._garbage((sizes[0], 4), scalar)
        read = {**placed, "weights": tokens["weights"]}
        self._call("logit_stats", read, {"stats": stats}, [*read.values(), stats, *sizes])
        biggest, sums, weighted, at_target = stats.unbind(1)
        sums = torch.where(tokens["weights"] == 0, 1, sums)
        log_sums = biggest + sums.log()
        logprobs = self._place(at_target - log_sums)
        made = {name: self._garbage((sizes[0],), scalar) for name in ("losses", "slopes")}
        addresses = tuple(value.data_ptr() for value in tokens.values())
        arguments = [(*addresses, *objective), logprobs, *made.values(), sizes[0], native.DTYPE_CODES[scalar]]
        self._call("token_losses", {**tokens, "logprobs": logprobs}, made, arguments)
        grad = self._garbage(tuple(inputs[0].shape), inputs[0].dtype)
        read = {**placed, "log_sums": self._place(log_sums), "slopes": self._place(made["slopes"])}
        self._call("logit_grad", read, {"grad": grad}, [*read.values(), grad, *sizes])
        return made["losses"], logprobs, sums.log() - weighted / sums, grad

    def quantize_fp8(
        self, x: Tensor, *, square: bool, power_of_two: bool, transposed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (M, K) -> values, scales and, where asked for, those of the transpose."""
        rows, cols = x.shape
        block = (128, 128) if square else (1, 128)
        shapes = {"values": (rows, cols), "values_t": (cols, rows) if transposed else (0, 0)}
        outputs = {name: torch.full(shape, 0x5A, dtype=torch.uint8) for name, shape in shapes.items()}
        outputs["scales"] = self._garbage(scales_shape((rows, cols), block), torch.float32)
        outputs["scales_t"] = self._garbage(scales_shape(shapes["values_t"], (1, 128)), torch.float32)
        second = [outputs[name] if transposed else 0 for name in ("values_t", "scales_t")]
        inputs = {"x": self._place(x)}
        sizes = [1, rows, cols, square, power_of_two, native.DTYPE_CODES[x.dtype]]
        self._call(
            "quantize_fp8", inputs, outputs, [*inputs.values(), outputs["values"], outputs["scales"], *second, *sizes]
        )
        values, values_t = (outputs[name].view(torch.float8_e4m3fn) for name in ("values", "values_t"))
        return values, outputs["scales"], values_t, outputs["scales_t"]

    def dequantize_fp8(self, values: Tensor, scales: Tensor, *, square: bool, dtype: torch.dtype) -> Tensor:
        inputs = {"values": self._place(values.view(torch.uint8)), "scales": self._place(scales)}
        out = self._garbage(tuple(values.shape), dtype)
        sizes = [1, *values.shape, square, native.DTYPE_CODES[dtype]]
        self._call("dequantize_fp8", inputs, {"out": out}, [*inputs.values(), out, *sizes])
        return out

    def pool_temporal_patches(self, x: Tensor, clips: Tensor, num_out: int, merge: tuple[int, int]) -> Tensor:
        """`clips` is the table that `clip_table` makes."""
        inputs = {"x": self._place(x), "clips": clips}
        out = self._garbage((num_out, merge[0] * merge[1], x.shape[1]), x.dtype)
        sizes = [clips.shape[0], x.shape[0], num_out, x.shape[1], *merge, native.DTYPE_CODES[x.dtype]]
        self._call("pool_temporal_patches", inputs, {"out": out}, [*inputs.values(), out, *sizes])
        return out

    def pool_temporal_patches_backward(
        self, grad_out: Tensor, clips: Tensor, num_patches: int, merge: tuple[int, int]
    ) -> Tensor:
        inputs = {"grad_out": self._place(grad_out), "clips": clips}
        grad_x = self._garbage((num_patches, grad_out.shape[2]), grad_out.dtype)
        sizes = [clips.shape[0], num_patches, grad_out.shape[0], grad_out.shape[2], *merge]
        arguments = [*inputs.values(), grad_x, *sizes, native.DTYPE_CODES[grad_out.dtype]]
        self._call("pool_temporal_patches_backward", inputs, {"grad_x": grad_x}, arguments)
        return grad_x


def clip_table(grid: Tensor, num_patches: int, merge: tuple[int, int]) -> tuple[Tensor, int]:
    """The kernels' table of clips (N, 5) and the number of neighbourhoods, as the op makes them on the host."""
    table = torch.empty((len(grid), 5), dtype=torch.int64)
    grid = grid.long().contiguous()
    num_out = native._C.cpu.clip_table(grid.data_ptr(), True, len(grid), num_patches, *merge, table.data_ptr())
    return table, num_out
