"""The way of rows from the tokens' ranks to the experts' ranks and back, with autograd through both ways.

Rows cross the expert axis by a ragged all-to-all, and the expert_tensor axis, where each rank has a part of the
experts' width, by a ragged all-gather on the way out and a reduce-scatter on the way home. Gradients take the same ways
in the other direction. A way is two autograd functions, one that starts the exchange and one that waits: what the
caller computes between them overlaps with it, and so does its backward, because autograd runs functions in the reverse
order of their forwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys import ops
from k25sys.ops import DispatchPlan
from k25sys.parallel import payload as payloads
from k25sys.parallel.transport import Transfer, Transport


@dataclass(frozen=True)
class Routes:
    """Who sends how many rows to whom in one call of a layer. R ranks along expert, W along expert_tensor."""

    send: tuple[int, ...]
    """(R,): rows to each rank; the sum is T * K."""
    receive: tuple[int, ...]
    """(R,): rows from each rank."""
    peers: tuple[int, ...]
    """(W,): rows that each expert_tensor peer has received; this rank's are sum(receive)."""
    experts_N1: Tensor
    """(N, 1) int32, N = sum(peers): the local expert of each row at the experts."""


@dataclass
class Exchange:
    """One call's rows on their way. Out is from the tokens' ranks to the experts', home is back."""

    transport: Transport
    """Along expert."""
    width_transport: Transport
    """Along expert_tensor."""
    place: int
    """This rank's place along expert_tensor, of `width`."""
    width: int
    plan: DispatchPlan
    """Of this rank's tokens: rows grouped by expert, hence by the rank that has it."""
    num_local: int
    """Experts of a rank."""
    payload: str
    """Of tokens on their way out. Outputs and gradients travel as `payloads.on_the_way_home` says."""
    dim: int
    dtype: torch.dtype
    put_weight_grads: Callable[[Callable[[], None]], None]
    """Takes computations of weight gradients."""
    weight_grads: list[Callable[[], None]] = field(default_factory=list)
    """Those of the local experts, until the tokens' gradients are on their way home: then they overlap with it."""
    _counts: Transfer = field(init=False)
    _routes: Routes | None = None
    _in_flight: Transfer | None = None

    def __post_init__(self) -> None:
        self._counts = self.transport.start_counts(self.plan.tokens_per_expert_E.view(-1, self.num_local))

    @property
    def routes(self) -> Routes:
        """Known once the counts have arrived. The host waits here once, for all that it needs to know."""
        if self._routes is None:
            received_RE = self._counts.wait()
            num_ranks = len(received_RE)
            copies_WN = received_RE.reshape(1, -1).repeat(self.width, 1)
            received_WN = self.width_transport.start_counts(copies_WN).wait()
            sent_R = self.plan.tokens_per_expert_E.view(num_ranks, -1).sum(1)
            received_WR = received_WN.view(self.width, num_ranks, -1).sum(2)
            numbers = torch.cat([sent_R, received_WR.flatten()]).tolist()
            by_peer = [numbers[begin : begin + num_ranks] for begin in range(num_ranks, len(numbers), num_ranks)]
            peers = tuple(map(sum, by_peer))
            local_E = torch.arange(self.num_local, dtype=torch.int32, device=received_RE.device)
            experts_N = local_E.repeat(self.width * num_ranks).repeat_interleave(
                received_WN.flatten(), output_size=sum(peers)
            )
            self._routes = Routes(tuple(numbers[:num_ranks]), tuple(by_peer[self.place]), peers, experts_N[:, None])
        return self._routes

    def _start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        assert self._in_flight is None, "a second exchange before the first was waited for"
        self._in_flight = self.transport.start(rows.view(torch.uint8), send, receive)

    def _wait(self) -> Tensor:
        assert self._in_flight is not None, "no exchange in flight"
        rows, self._in_flight = self._in_flight.wait(), None
        return rows

    def start_out(self, rows_MC: Tensor) -> None:
        """Starts the way of packed rows, in the order of the plan."""
        self._start(rows_MC, self.routes.send, self.routes.receive)

    def finish_out(self, payload: str) -> Tensor:
        """(N, D) at the experts: the rows that this rank received, and those of its expert_tensor peers."""
        rows_NB, peers = self._wait(), self.routes.peers
        if len(peers) > 1:
            copies = rows_NB.repeat(len(peers), 1)
            rows_NB = self.width_transport.start(copies, [len(rows_NB)] * len(peers), peers).wait()
        return payloads.unpack(rows_NB, payload, self.dim, self.dtype)

    def start_home(self, rows_ND: Tensor) -> None:
        """Starts the way of outputs or gradients, summed over expert_tensor first: each rank has a part of each."""
        peers = self.routes.peers
        if len(peers) > 1:
            rows = rows_ND.contiguous().view(torch.uint8)
            own = [peers[self.place]] * len(peers)
            parts = self.width_transport.start(rows, peers, own).wait().view(self.dtype)
            rows_ND = _sum_in_order(parts.view(len(peers), own[0], self.dim))
        packed = payloads.pack(rows_ND, payloads.on_the_way_home(self.payload))
        self._start(packed, self.routes.receive, self.routes.send)

    def finish_home(self) -> Tensor:
        """(M, D) at the source, in the order of the plan."""
        return payloads.unpack(self._wait(), payloads.on_the_way_home(self.payload), self.dim, self.dtype)

    def run_weight_grads(self) -> None:
        """Hands over what the experts' backward left."""
        waiting, self.weight_grads = self.weight_grads, []
        for compute in waiting:
            self.put_weight_grads(compute)


def _sum_in_order(parts_WND: Tensor) -> Tensor:
    """The sum over W, one after the other, in float32 at least; rounded once."""
    total_ND = parts_WND[0].to(torch.promote_types(parts_WND.dtype, torch.float32))
    for part_ND in parts_WND[1:]:
        total_ND = total_ND + part_ND
    return total_ND.to(parts_WND.dtype)


class _StartOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start_out(ops.dispatch(payloads.pack(x, exchange.payload), exchange.plan))
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        plan = ctx.exchange.plan
        grad_rows = ctx.exchange.finish_home()
        return torch.ops.k25.combine.default(grad_rows, None, plan.slot_of_row_M, plan.row_of_slot_TK), None


class _FinishOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish_out(exchange.payload)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_home(grad)
        ctx.exchange.run_weight_grads()
        return grad.new_empty(0), None


class _StartHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start_home(y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish_out(payloads.on_the_way_home(ctx.exchange.payload)), None


class _FinishHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish_home()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.start_out(payloads.pack(grad, payloads.on_the_way_home(exchange.payload)))
        return grad.new_empty(0), None


def start_out(x_TD: Tensor, exchange: Exchange) -> Tensor:
    """Starts the tokens' way to their experts. What it returns stands for the rows in flight, for autograd."""
    return _StartOut.apply(x_TD, exchange)


def finish_out(in_flight: Tensor, exchange: Exchange) -> Tensor:
    """Waits for `start_out`: the rows (N, D) at the experts."""
    return _FinishOut.apply(in_flight, exchange)


def start_home(y_ND: Tensor, exchange: Exchange) -> Tensor:
    """Starts the way of the experts' outputs back to the tokens."""
    return _StartHome.apply(y_ND, exchange)


def finish_home(in_flight: Tensor, exchange: Exchange) -> Tensor:
    """Waits for `start_home`: the rows (M, D) at the source, in the order of the plan."""
    return _FinishHome.apply(in_flight, exchange)
