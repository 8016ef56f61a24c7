"""Expert parallelism: a MoE layer's routed experts spread over ranks, with the interface of the layer in one process.

Each rank dispatches its own tokens, none is dropped, and the routing weights are applied where the tokens come from, in
the order in which one process applies them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25sys import ops
from k25sys.ops import checks
from k25sys.parallel import expert_exchange, transport
from k25sys.parallel import payload as payloads
from k25sys.parallel.expert_exchange import Exchange
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout, local_part
from k25sys.parallel.transport import Transport
from k25sys.parallel.weight_grads import WeightGradStore, accumulate_gradient, gradient_landed


def expert_layouts(num_experts: int, dim: int, width: int) -> dict[str, ParameterLayout]:
    """How gate_up_proj (E, 2I, D) and down_proj (E, D, I) are spread: E over expert, I over expert_tensor."""
    splits = ((0, "expert"), (2, "expert_tensor"))
    return {
        "gate_up_proj": ParameterLayout(shape=(num_experts, 2, width, dim), splits=splits, matrix=True, expert=True),
        "down_proj": ParameterLayout(shape=(num_experts, dim, width), splits=splits, matrix=True, expert=True),
    }


@dataclass(frozen=True)
class Transports:
    """The transports of the two axes, for all layers of a model: DeepEP's buffers are large."""

    expert: Transport
    expert_tensor: Transport

    @classmethod
    def make(cls, name: str, grid: RankGrid) -> "Transports":
        """`name`: "torch" or "deepep"; see k25sys.parallel.transport.listing. Raises BackendError."""
        expert, width = (
            transport.make(name, grid.group(axis), grid.device_type) for axis in ("expert", "expert_tensor")
        )
        return cls(expert, width)


@dataclass(frozen=True)
class InFlight:
    """A call of ExpertParallel between `start` and `finish`."""

    weights_TK: Tensor
    experts_TK: Tensor
    tokens: Tensor
    """What stands for the rows in flight, for autograd; x_TD where the experts are all here."""
    exchange: Exchange | None


class ExpertParallel(nn.Module):
    """The routed experts of a layer, this rank's part of them: in the place of k25sys.models.moe.Experts.

    Parameters keep their names: gate_up_proj (E / R, 2I / W, D) and down_proj (E / R, D, I / W) for R ranks along
    expert and W along expert_tensor. Their gradients are sums over the tokens of this rank's expert (and expert_tensor)
    peers; ZeRO sums them over expert_data.

    Args:
        experts: the whole layer, on every rank; its tensors may be on meta.
        grid, store: weight gradients are computed when `store` says so, at the earliest while the tokens' gradients
            are on their way.
        transport: a name, or Transports that layers share.
        payload: of tokens on their way to the experts: "exact" (the tokens' dtype), "bf16", or "fp8", E4M3 in tiles of
            1 x 128. Outputs and gradients travel as they are with "exact", else as bfloat16.
        activation_store: as in ops.expert_mlp.

    `store_input` sees the rows that arrived from other ranks and returns them; it may have them saved for the backward
    in another form. Where all experts are here nothing arrives: their tokens are those that the layer around them sees.

    Raises:
        GridError: axes that do not divide the experts or their width.
        BackendError: an unknown or unavailable transport. ValueError: an unknown payload.
    """

    def __init__(
        self,
        experts: nn.Module,
        grid: RankGrid,
        store: WeightGradStore,
        *,
        transport: str | Transports = "torch",
        payload: str = "exact",
        activation_store: str = "exact",
    ) -> None:
        super().__init__()
        payloads.check("ExpertParallel", payload)
        gate_up_proj, down_proj = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
        self.num_experts, self.dim, width = down_proj.shape
        layouts = expert_layouts(self.num_experts, self.dim, width)
        self.gate_up_proj = _own_part(gate_up_proj, "gate_up_proj", layouts["gate_up_proj"], grid)
        self.down_proj = _own_part(down_proj, "down_proj", layouts["down_proj"], grid)
        self.grid, self.store = grid, store
        self.payload = payload
        self.activation_store = activation_store
        self.store_input: Callable[[Tensor], Tensor] = _as_it_is
        self.transports = Transports.make(transport, grid) if isinstance(transport, str) else transport

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, wherever they are.

        Args:
            x_TD: (T, D) this rank's tokens; T differs between ranks and may be 0.
            weights_TK, experts_TK: as in ops.expert_mlp; experts by their global number.

        Returns:
            y_TD (T, D). Every rank of the stage calls this, and its backward, the same number of times.

        Raises:
            TypeError, ValueError, IndexError: as ops.expert_mlp.
        """
        return self.finish(self.start(x_TD, weights_TK, experts_TK))

    def start(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> InFlight:
        """The first half of `forward`: sends the tokens on their way. Compute what does not need them before `finish`:
        then the backward of that overlaps with the way of the tokens' gradients, too."""
        _check(x_TD, weights_TK, experts_TK, self.down_proj)
        if self.grid.size("expert") * self.grid.size("expert_tensor") == 1:
            return InFlight(weights_TK, experts_TK, x_TD, None)
        payloads.check("ExpertParallel", self.payload, x_TD.dtype)
        exchange = Exchange(
            self.transports.expert, self.transports.expert_tensor, self.grid.index("expert_tensor"),
            self.grid.size("expert_tensor"), ops.plan_dispatch(experts_TK, self.num_experts), len(self.down_proj),
            self.payload, self.dim, x_TD.dtype, self.store.put,
        )  # fmt: skip
        return InFlight(weights_TK, experts_TK, expert_exchange.start_out(x_TD, exchange), exchange)

    def finish(self, in_flight: InFlight) -> Tensor:
        """The second half of `forward`: y_TD (T, D)."""
        exchange, weights_TK = in_flight.exchange, in_flight.weights_TK
        if exchange is None:
            return self._experts(in_flight.tokens, weights_TK, in_flight.experts_TK, self.store.put)
        x_ND = self.store_input(expert_exchange.finish_out(in_flight.tokens, exchange))
        experts_N1 = exchange.routes.experts_N1
        ones_N1 = weights_TK.new_ones(experts_N1.shape)
        # Without a gradient of the tokens nothing travels home, and nobody would ask for what waits for that.
        put = exchange.weight_grads.append if x_ND.requires_grad else self.store.put
        y_ND = self._experts(x_ND, ones_N1, experts_N1, put)
        y_MD = expert_exchange.finish_home(expert_exchange.start_home(y_ND, exchange), exchange)
        return ops.combine(y_MD, weights_TK, exchange.plan)

    def _experts(
        self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, put: Callable[[Callable[[], None]], None]
    ) -> Tensor:
        """The local experts; their weights' gradients are handed to `put`, and land where `store` would put them."""
        weights = (self.gate_up_proj, self.down_proj)
        main_grads = [getattr(weight, "main_grad", None) for weight in weights]
        if any(main_grad is None for main_grad in main_grads):  # one is frozen: the other's gradient is added below
            main_grads = [None, None]

        def defer(compute: ops.WeightGrads) -> None:
            def land() -> None:
                for weight, gradient in zip(weights, compute(), strict=True):
                    if weight.requires_grad:
                        gradient_landed(weight) if gradient is None else accumulate_gradient(weight, gradient)

            put(land)

        return ops.expert_mlp(
            x_ND, *weights, weights_NK, experts_NK, gate_up_main_grad=main_grads[0], down_main_grad=main_grads[1],
            activation_store=self.activation_store, defer_weight_grads=defer,
        )  # fmt: skip


class OverlappedMixtureOfExperts(nn.Module):
    """k25sys.models.moe.MixtureOfExperts over ExpertParallel: the shared expert computes while tokens travel.

    `store_input` sees the tokens first, as there.

    Args:
        gate: x_TD -> (weights_TK, experts_TK). experts: the routed experts. shared_experts: x_TD -> (T, D).
    """

    def __init__(self, gate: nn.Module, experts: ExpertParallel, shared_experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts
        self.store_input: Callable[[Tensor], Tensor] = _as_it_is

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = self.store_input(x_TD)
        in_flight = self.experts.start(x_TD, *self.gate(x_TD))
        shared_TD = self.shared_experts(x_TD)
        return self.experts.finish(in_flight) + shared_TD


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _own_part(parameter: nn.Parameter, name: str, layout: ParameterLayout, grid: RankGrid) -> nn.Parameter:
    layout.check(name, grid.sizes)
    part = local_part(parameter.detach(), layout, grid.sizes, grid.rank)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _check(x: Tensor, weights: Tensor, experts: Tensor, down_proj: Tensor) -> None:
    """Before anything is sent: a rank that raises later leaves the others waiting."""
    op = "ExpertParallel"
    checks.tensor(op, "x_TD", x, (down_proj.dtype,), (None, down_proj.shape[1]), "TD", "D is that of the experts")
    checks.tensor(op, "weights_TK", weights, (checks.routing_dtype(x.dtype),), (len(x), None), "TK")
    checks.tensor(op, "experts_TK", experts, (torch.int32, torch.int64), weights.shape, "TK")
    checks.same_device(op, "x_TD", x, {"weights_TK": weights, "experts_TK": experts, "down_proj": down_proj})
