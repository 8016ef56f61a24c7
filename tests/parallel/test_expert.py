"""Experts over ranks give what one process gives on all tokens together: outputs, all gradients, and nothing hangs."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys import ops
from k25sys.errors import ArgumentValueError, BackendError, DTypeError, GridError, ShapeError
from k25sys.models.moe import MixtureOfExperts
from k25sys.models.presets import preset
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel import payload as payloads
from k25sys.parallel.expert import ExpertParallel, OverlappedMixtureOfExperts, Transports, expert_layouts
from k25sys.parallel.transport import TorchTransport, Transfer
from tests.parallel.processes import run_ranks

NUM_EXPERTS, DIM, WIDTH, TOP_K = 8, 48, 16, 3


class Experts(nn.Module):
    """The whole layer, the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float32, dim: int = DIM, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(NUM_EXPERTS, 2 * WIDTH, dim, generator=generator, dtype=torch.float64) * dim**-0.5
        down = torch.randn(NUM_EXPERTS, dim, WIDTH, generator=generator, dtype=torch.float64) * WIDTH**-0.5
        self.gate_up_proj = nn.Parameter(gate_up.to(device, dtype))
        self.down_proj = nn.Parameter(down.to(device, dtype))


def _tokens_of(case: str, rank: int) -> int:
    return {"no_tokens": 0, "one_rank": 9 if rank == 1 else 0}.get(case, 5 + 3 * rank if rank != 2 else 0)


def _inputs(case: str, rank: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, routing weights, experts and the output's gradient of a rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens, top_k = _tokens_of(case, rank), 1 if case == "one_expert" else TOP_K
    x_TD = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weights_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    weights_TK = weights_TK.to(dtype if dtype == torch.float64 else torch.float32)
    experts_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k].int()
    if case == "one_expert":
        experts_TK[:] = 5
    elif case == "idle_experts":
        experts_TK = experts_TK % 2 * 5 + 1  # 1 and 6, some tokens twice
    grad_TD = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    return x_TD.requires_grad_(), weights_TK.requires_grad_(), experts_TK, grad_TD


def _one_process(case: str, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """ops.expert_mlp on the tokens of all ranks."""
    whole = Experts(dtype)
    x, weights, experts, grad = (
        torch.cat(parts).detach()
        for parts in zip(*(_inputs(case, rank, dtype) for rank in range(world_size)), strict=True)
    )
    x.requires_grad_()
    weights.requires_grad_()
    y = ops.expert_mlp(x, whole.gate_up_proj, whole.down_proj, weights, experts)
    y.backward(grad)
    grads = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    grads |= {"gate_up_proj": whole.gate_up_proj.grad, "down_proj": whole.down_proj.grad}
    return {name: value for name, value in grads.items() if value is not None}


def _own(expected: dict[str, Tensor], case: str, grid: RankGrid) -> dict[str, Tensor]:
    """This rank's part of what one process computed."""
    before = sum(_tokens_of(case, rank) for rank in range(grid.rank))
    tokens = slice(before, before + _tokens_of(case, grid.rank))
    own = {name: expected[name][tokens] for name in ("y", "x", "weights")}
    for name, layout in expert_layouts(NUM_EXPERTS, DIM, WIDTH).items():
        box = tuple(slice(*ends) for ends in layout.box(grid.sizes, grid.rank))
        own[name] = expected[name].view(layout.shape)[box].flatten(1, -2)
    return own


def _difference(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _summed(parameter: nn.Parameter, grid: RankGrid) -> Tensor:
    assert parameter.grad is not None
    if (group := grid.group("expert_data")) is not None:
        dist.all_reduce(parameter.grad, group=group)
    return parameter.grad


CASES = ("mixed", "one_expert", "idle_experts", "one_rank", "no_tokens")


def _differences_from_one_process(sizes: GridSizes) -> dict[tuple[str, str], float]:
    grid, worst = RankGrid.create(sizes), defaultdict(float)
    for dtype in (torch.float32, torch.float64):
        for case in CASES:
            expected = _own(_one_process(case, sizes.world_size, dtype), case, grid)
            layer = ExpertParallel(Experts(dtype), grid, WeightGradStore())
            x, weights, experts, grad = _inputs(case, grid.rank, dtype)
            y = layer(x, weights, experts)
            y.backward(grad)
            got = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
            got |= {name: _summed(parameter, grid) for name, parameter in layer.named_parameters()}
            for name, value in got.items():
                assert value is not None
                key = (str(dtype), name)
                worst[key] = max(worst[key], _difference(value, expected[name]))
    return dict(worst)


GRIDS = {
    2: {"EP2": GridSizes(data=2, expert=2), "ETP2": GridSizes(tensor=2, expert_tensor=2), "DP2": GridSizes(data=2)},
    4: {
        "EP4": GridSizes(data=2, context=2, expert=4),
        "EP2xDP2": GridSizes(data=4, expert=2),
        "ETP2xDP2": GridSizes(data=2, tensor=2, expert_tensor=2),
        "EP2xETP2": GridSizes(data=2, tensor=2, expert=2, expert_tensor=2),
    },
    8: {"EP8": GridSizes(data=8, expert=8), "EP2xETP2xDP2": GridSizes(data=4, tensor=2, expert=2, expert_tensor=2)},
}


def _all_grids(world_size: int) -> dict[str, dict[tuple[str, str], float]]:
    return {name: _differences_from_one_process(sizes) for name, sizes in GRIDS[world_size].items()}


@pytest.mark.parametrize("world_size", GRIDS)
def test_equal_to_one_process(world_size: int) -> None:
    for differences in run_ranks(world_size, _all_grids, world_size):
        for grid, worst in differences.items():
            for (dtype, name), difference in worst.items():
                assert difference <= (1e-6 if dtype == "torch.float32" else 1e-13), (grid, dtype, name, difference)


def _run(layer: ExpertParallel, grid: RankGrid, dtype: torch.dtype, case: str = "mixed") -> dict[str, Tensor]:
    """Output and gradients of this rank, before anything is summed over expert_data."""
    layer.zero_grad()
    x, weights, experts, grad = _inputs(case, grid.rank, dtype)
    y = layer(x, weights, experts)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def _bf16_is_exact_for_bf16(grid: RankGrid) -> None:
    exact, narrow = (
        _run(ExpertParallel(Experts(torch.bfloat16), grid, WeightGradStore(), payload=payload), grid, torch.bfloat16)
        for payload in ("exact", "bf16")
    )
    for name, value in exact.items():
        assert torch.equal(value, narrow[name]), name
    expected = _own(_one_process("mixed", 4, torch.bfloat16), "mixed", grid)
    for name in ("y", "x", "weights"):
        assert _difference(exact[name], expected[name]) < 2e-2, name


def _payloads_round_as_they_say(grid: RankGrid) -> None:
    exact = _run(ExpertParallel(Experts(), grid, WeightGradStore()), grid, torch.float32)
    for payload, bound in (("bf16", 2.0**-7), ("fp8", 2.0**-3)):
        layer = ExpertParallel(Experts(), grid, WeightGradStore(), payload=payload)
        rounded = _run(layer, grid, torch.float32)
        for name, value in exact.items():
            difference = _difference(rounded[name], value)
            assert difference <= bound, (payload, name, difference)
            assert difference > 0 or not value.numel(), (payload, name)


class _UnitExperts(ExpertParallel):
    """Each expert gives its input; the expert_tensor ranks a part of it each."""

    def _experts(self, x_ND: Tensor, *_: object) -> Tensor:
        return x_ND / self.grid.size("expert_tensor")


def _unit_experts_are_the_identity(grid: RankGrid) -> None:
    for dtype, payload in ((torch.float32, "exact"), (torch.bfloat16, "bf16"), (torch.float64, "exact")):
        layer = _UnitExperts(Experts(dtype), grid, WeightGradStore(), payload=payload)
        x, weights, experts, grad = _inputs("mixed", grid.rank, dtype)
        halves = torch.full_like(weights[:, :2], 0.5)
        y = layer(x, halves, experts[:, :2])
        y.backward(grad)
        assert torch.equal(y, x)
        assert x.grad is not None
        # A gradient goes to both experts whole, and is halved where it comes from.
        assert torch.equal(x.grad, grad)


def _fp8_rows_are_what_quantizing_gives(grid: RankGrid) -> None:
    dim = 200  # a ragged tile, and no multiple of 16
    layer = _UnitExperts(Experts(dim=dim), grid, WeightGradStore(), payload="fp8")
    x, _, experts, _ = _inputs("mixed", grid.rank, torch.float32, dim)
    if len(x):
        x.data[0, 3], x.data[0, 150] = float("inf"), 0.0
    y = layer(x, torch.ones(len(x), 1), experts[:, :1])
    expected = ops.dequantize_fp8(*ops.quantize_fp8(x.detach(), (1, 128)), (1, 128), torch.bfloat16).float()
    assert torch.equal(y.nan_to_num(-1.0), expected.nan_to_num(-1.0))


def _bytes_are_counted(grid: RankGrid) -> None:
    experts_of = {rank: _inputs("mixed", rank, torch.float32)[2] for rank in range(4)}
    per_rank = NUM_EXPERTS // grid.size("expert")
    peers = grid.ranks("expert")
    sent = {
        (source, target): int((experts_of[source] // per_rank == place).sum())
        for source in peers
        for place, target in enumerate(peers)
    }
    out = sum(rows for (source, target), rows in sent.items() if source == grid.rank != target)
    home = sum(rows for (source, target), rows in sent.items() if target == grid.rank != source)
    for payload, out_bytes, home_bytes in (("exact", 192, 192), ("bf16", 96, 96), ("fp8", 48 + 16, 96)):
        layer = ExpertParallel(Experts(), grid, WeightGradStore(), payload=payload)
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as call:
            _run(layer, grid, torch.float32)
        # Tokens out, outputs home, and in the backward gradients out, gradients home.
        expected = out * out_bytes + home * home_bytes + out * home_bytes + home * home_bytes
        assert layer.transports.expert.bytes_sent == expected
        seen = 0
        for arguments in (call.args for call in call.call_args_list if len(call.args) == 4):
            rows_MB, send = arguments[1], arguments[3]
            if len(send) == grid.size("expert"):
                assert rows_MB.dtype == torch.uint8
                seen += (sum(send) - send[grid.index("expert")]) * rows_MB.shape[1]
        if grid.size("expert_tensor") == 1:
            assert seen == expected


class _HostReads:
    """Counts what makes the host wait for a device."""

    METHODS = ("tolist", "item", "cpu", "numpy", "__int__", "__bool__", "__index__", "__float__", "nonzero")

    def __init__(self) -> None:
        self.count = 0

    def patched(self, name: str) -> Callable[..., object]:
        original = getattr(Tensor, name)

        def method(tensor: Tensor, *args: object, **kwargs: object) -> object:
            self.count += 1
            return original(tensor, *args, **kwargs)

        return method


def _the_host_waits_once(grid: RankGrid) -> None:
    layer = ExpertParallel(Experts(), grid, WeightGradStore(), payload="fp8")
    x, weights, experts, grad = _inputs("mixed", grid.rank, torch.float32)
    reads = _HostReads()
    with ExitStack() as stack:
        for name in reads.METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, reads.patched(name)))
        y = layer(x, weights, experts)
        assert reads.count == 1
        y.backward(grad)
    assert reads.count == 1


class _Recorded(TorchTransport):
    """Writes down when exchanges start and when they are waited for."""

    def __init__(self, group: dist.ProcessGroup | None, events: list[str]) -> None:
        super().__init__(group)
        self.events = events

    def start(self, rows_MB: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        self.events.append("start")
        transfer = super().start(rows_MB, send, receive)
        recorded = mock.Mock(spec=["wait"])
        recorded.wait.side_effect = lambda: (self.events.append("wait"), transfer.wait())[1]
        return recorded


class _Gate(nn.Module):
    def __init__(self, weights_TK: Tensor, experts_TK: Tensor) -> None:
        super().__init__()
        self.chosen = weights_TK, experts_TK

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.chosen


class _Shared(nn.Module):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x_TD: Tensor) -> Tensor:
        self.events.append("shared")
        y_TD = x_TD * self.weight
        y_TD.register_hook(lambda _: self.events.append("shared"))
        return y_TD


class _RecordedStore(WeightGradStore):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def put(self, compute: Callable[[], None]) -> None:
        self.events.append("weights")
        super().put(compute)


def _computes_while_rows_travel(grid: RankGrid) -> None:
    events: list[str] = []
    transports = Transports(_Recorded(grid.group("expert"), events), TorchTransport(grid.group("expert_tensor")))
    experts = ExpertParallel(Experts(), grid, _RecordedStore(events), transport=transports)
    x, weights, chosen, grad = _inputs("mixed", grid.rank, torch.float32)
    y = OverlappedMixtureOfExperts(_Gate(weights, chosen), experts, _Shared(events))(x)
    assert events == ["start", "shared", "wait", "start", "wait"]
    events.clear()
    y.backward(grad)
    # The weights' gradients too are computed while the tokens' gradients are on their way home.
    assert events == ["start", "wait", "start", "weights", "shared", "wait"]


def _weight_gradients_wait_and_land(grid: RankGrid) -> None:
    store = WeightGradStore()
    layer = ExpertParallel(Experts(), grid, store)
    expected = _run(layer, grid, torch.float32)
    weights = dict(layer.named_parameters())
    with store.deferring("F0"):
        deferred = _run(layer, grid, torch.float32)
    assert not set(deferred) & set(weights)
    assert store.num_kept == 1
    store.run("F0")
    for name, weight in weights.items():
        assert weight.grad is not None
        assert torch.equal(weight.grad, expected[name]), name
    for name in ("y", "x", "weights"):
        assert torch.equal(deferred[name], expected[name]), name
    landed: list[str] = []
    for name, weight in weights.items():
        setattr(weight, "main_grad", torch.ones_like(weight))  # noqa: B010
        setattr(weight, "on_gradient", lambda name=name: landed.append(name))  # noqa: B010
    again = _run(layer, grid, torch.float32)
    assert not set(again) & set(weights)
    assert sorted(landed) == sorted(weights)
    for name, weight in weights.items():
        main_grad = getattr(weight, "main_grad")  # noqa: B009
        torch.testing.assert_close(main_grad - 1, expected[name], rtol=1e-5, atol=1e-6)


def _frozen_tokens_and_no_grad(grid: RankGrid) -> None:
    layer = ExpertParallel(Experts(), grid, WeightGradStore())
    expected = _run(layer, grid, torch.float32)
    layer.zero_grad()
    x, weights, experts, grad = _inputs("mixed", grid.rank, torch.float32)
    layer(x.detach(), weights.detach(), experts).backward(grad)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name
    with torch.no_grad():
        assert torch.equal(layer(x, weights, experts), expected["y"])
    layer.requires_grad_(False)
    y = layer(x, weights, experts)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, expected["x"])


def _whole_layer_of_the_model(grid: RankGrid) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(preset("tiny").text, n_routed_experts=8)
    whole = MixtureOfExperts(config).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.1)
    whole.gate.e_score_correction_bias.zero_()
    x_TD = torch.randn(22, config.hidden_size, dtype=torch.float64)
    parts = x_TD.split([7, 0, 5, 10])
    expected = whole(x_TD).split([7, 0, 5, 10])[grid.rank]
    experts = ExpertParallel(whole.experts, grid, WeightGradStore())
    layer = OverlappedMixtureOfExperts(whole.gate, experts, whole.shared_experts)
    assert set(dict(layer.named_parameters())) == set(dict(whole.named_parameters()))
    torch.testing.assert_close(layer(parts[grid.rank]), expected, rtol=1e-12, atol=1e-13)


CHECKS = (
    _bf16_is_exact_for_bf16, _payloads_round_as_they_say, _unit_experts_are_the_identity,
    _fp8_rows_are_what_quantizing_gives, _bytes_are_counted, _the_host_waits_once, _computes_while_rows_travel,
    _weight_gradients_wait_and_land, _frozen_tokens_and_no_grad, _whole_layer_of_the_model,
)  # fmt: skip


def _checks(sizes: GridSizes) -> None:
    grid = RankGrid.create(sizes)
    for check in CHECKS:
        check(grid)


@pytest.mark.parametrize("sizes", [GRIDS[4]["EP4"], GRIDS[4]["EP2xETP2"]], ids=["EP4", "EP2xETP2"])
def test_over_four_ranks(sizes: GridSizes) -> None:
    """All of CHECKS in one start of the processes; a traceback names the one that failed."""
    run_ranks(4, _checks, sizes)


def test_a_layer_on_meta_is_cut_as_well() -> None:
    sizes = GridSizes(data=4, tensor=2, expert=4, expert_tensor=2)
    grid = RankGrid(sizes, 5, "cpu", {})
    layer = ExpertParallel(Experts(device="meta"), grid, WeightGradStore())
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"gate_up_proj": (2, WIDTH, DIM), "down_proj": (2, DIM, WIDTH // 2)}
    assert all(parameter.is_meta for parameter in layer.parameters())
    # Gate rows and up rows of the second half of the width, of the third pair of experts.
    whole, own = Experts(), ExpertParallel(Experts(), grid, WeightGradStore())
    half = WIDTH // 2
    assert torch.equal(own.gate_up_proj[:, :half], whole.gate_up_proj[4:6, half:WIDTH])
    assert torch.equal(own.gate_up_proj[:, half:], whole.gate_up_proj[4:6, WIDTH + half :])
    assert torch.equal(own.down_proj, whole.down_proj[4:6, :, half:])


@pytest.mark.parametrize(
    ("sizes", "options", "error", "text"),
    [
        (GridSizes(data=3, expert=3), {}, GridError, "gate_up_proj: got 3 ranks along expert, accepted a divisor of 8"),
        (
            GridSizes(tensor=3, expert_tensor=3),
            {},
            GridError,
            "got 3 ranks along expert_tensor, accepted a divisor of 16",
        ),
        (GridSizes(), {"payload": "int4"}, ArgumentValueError, "payload: got 'int4', accepted 'exact', 'bf16', 'fp8'"),
        (
            GridSizes(),
            {"transport": "mpi"},
            BackendError,
            "transport: got 'mpi', accepted 'torch', 'deepep' (unavailable",
        ),
        (GridSizes(), {"transport": "deepep"}, BackendError, "it moves rows of CUDA devices, and the grid is on cpu"),
    ],
)
def test_a_layer_that_cannot_be_made(sizes: GridSizes, options: dict, error: type, text: str) -> None:
    with pytest.raises(error) as caught:
        ExpertParallel(Experts(), RankGrid(sizes, 0, "cpu", {}), WeightGradStore(), **options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"x_TD": torch.zeros(2, DIM, dtype=torch.bfloat16)},
            DTypeError,
            "x_TD: got dtype torch.bfloat16, accepted float32",
        ),
        ({"x_TD": torch.zeros(2, 40)}, ShapeError, "x_TD: got shape (2, 40), accepted (T, D=48)"),
        ({"weights_TK": torch.zeros(3, 1)}, ShapeError, "weights_TK: got shape (3, 1), accepted (T=2, K)"),
        ({"experts_TK": torch.zeros(2, 2, dtype=torch.int32)}, ShapeError, "experts_TK: got shape (2, 2)"),
        ({"experts_TK": torch.zeros(2, 1)}, DTypeError, "experts_TK: got dtype torch.float32"),
        ({"experts_TK": torch.tensor([[0], [8]])}, IndexError, "8"),
    ],
)
@pytest.mark.parametrize("sizes", [GridSizes(), GridSizes(data=2, expert=2)], ids=["one rank", "EP2"])
def test_a_call_that_is_refused_before_anything_is_sent(
    sizes: GridSizes, changes: dict[str, Tensor], error: type, text: str
) -> None:
    layer = ExpertParallel(Experts(), RankGrid(sizes, 0, "cpu", {}), WeightGradStore())
    arguments = {"x_TD": torch.zeros(2, DIM), "weights_TK": torch.ones(2, 1), "experts_TK": torch.tensor([[0], [1]])}
    with pytest.raises(error) as caught:
        layer(**(arguments | changes))
    assert text in str(caught.value)


def test_float64_travels_exactly_or_not_at_all() -> None:
    grid = RankGrid(GridSizes(data=2, expert=2), 0, "cpu", {})
    layer = ExpertParallel(Experts(torch.float64), grid, WeightGradStore(), payload="bf16")
    x, weights, experts, _ = _inputs("mixed", 0, torch.float64)
    with pytest.raises(DTypeError, match="float64 with payload 'bf16', accepted float32 or bfloat16, or 'exact'"):
        layer(x, weights, experts)


@pytest.mark.parametrize("dim", [1, 16, 127, 128, 7168])
def test_rows_have_the_bytes_that_are_calculated(dim: int) -> None:
    x_MD = torch.randn(3, dim)
    for payload in payloads.PAYLOADS:
        rows_MB = payloads.pack(x_MD, payload).view(torch.uint8)
        assert rows_MB.shape == (3, payloads.row_bytes(payload, dim, x_MD.dtype))
        back_MD = payloads.unpack(rows_MB, payload, dim, x_MD.dtype)
        assert _difference(back_MD, x_MD) <= {"exact": 0.0, "bf16": 2.0**-8, "fp8": 2.0**-4}[payload]
    assert payloads.row_bytes("fp8", 7168, torch.bfloat16) == 7168 + 4 * 56
