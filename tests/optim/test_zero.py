"""Sharded MuonClip is the plain rules on whole parameters, on any grid; a gradient that is not finite stops it."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k25sys.errors import ArgumentValueError, RankFailureError
from k25sys.optim import MuonClipConfig, ZeroOptimizer
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.buckets import Slot
from k25sys.parallel.layout import local_part
from k25sys.parallel.weight_grads import accumulate_gradient
from tests.optim.toy import WHOLE, PlainMuonClip, local_summand, make_parameters
from tests.parallel.processes import run_ranks

LAYOUTS = {name: layout for name, (_, layout) in WHOLE.items()}
RATE = 0.02
GRIDS = {
    1: [{}],
    2: [{"data": 2}, {"tensor": 2}, {"data": 2, "expert": 2}, {"pipeline": 2}, {"context": 2, "expert_tensor": 2}],
    4: [{"data": 4}, {"data": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, {"tensor": 4, "expert": 4},
        {"pipeline": 2, "data": 2, "expert": 2}, {"data": 3 + 1, "expert": 2}],
    8: [{"data": 2, "context": 2, "tensor": 2, "expert": 4}, {"pipeline": 2, "data": 2, "tensor": 2, "expert": 2},
        {"pipeline": 2, "data": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, {"data": 8, "expert": 8}],
}  # fmt: skip


def add_gradients(optimizer: ZeroOptimizer, parameters: dict, grid: RankGrid, step: int, dtype: torch.dtype) -> None:
    """In two halves, as two micro-batches would."""
    optimizer.expect_gradients(2)
    for _ in range(2):
        for name in reversed(parameters):
            accumulate_gradient(parameters[name], local_summand(name, grid, step, dtype) / 2)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _check(sizes_list: list[dict[str, int]], dtype: torch.dtype, nesterov: bool) -> float:
    torch.set_num_threads(1)
    worst = 0.0
    for axes in sizes_list:
        sizes = GridSizes(**axes)
        grid = RankGrid.create(sizes)
        config = MuonClipConfig(nesterov=nesterov, max_gradient_norm=5.0)
        parameters = make_parameters(grid, dtype)
        optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, config, bucket_bytes=600)
        plain = PlainMuonClip(sizes, dtype, config)
        for step in range(1, 4):
            add_gradients(optimizer, parameters, grid, step, dtype)
            assert optimizer.gradients.started, "no bucket was reduced before the step"
            report = optimizer.step(RATE)
            norm = plain.step(RATE)
            assert report.finite
            assert report.gradient_norm == pytest.approx(norm, rel=1e-6 if dtype == torch.float32 else 1e-13)
        for name, parameter in parameters.items():
            stage = 0 if name.startswith("encoder") else grid.index("pipeline")
            whole = plain.states[name, stage].parameter
            expected = local_part(whole, LAYOUTS[name], sizes, grid.rank)
            error = relative_error(parameter.detach(), expected)
            assert error <= (1e-6 if dtype == torch.float32 else 1e-13), (axes, name, error)
            worst = max(worst, error)
    return worst


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_steps_are_those_of_the_plain_rules(world_size: int, dtype: torch.dtype) -> None:
    worst = run_ranks(world_size, _check, GRIDS[world_size], dtype, dtype == torch.float64)
    print(f"{max(worst):.1e}")


def _check_bfloat16(axes: dict[str, int]) -> None:
    grid = RankGrid.create(GridSizes(**axes))
    parameters = make_parameters(grid, torch.bfloat16)
    config = MuonClipConfig(newton_schulz_dtype=torch.bfloat16)
    optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, config)
    plain = PlainMuonClip(GridSizes(**axes), torch.bfloat16, config)
    for step in range(1, 4):
        add_gradients(optimizer, parameters, grid, step, torch.bfloat16)
        optimizer.step(RATE)
        plain.step(RATE)
    masters = {(shard.name, shard.begin): shard for shard in optimizer.shards() if shard.key == "master"}
    assert all(shard.tensor.dtype == torch.float32 for shard in masters.values())
    for (name, begin), shard in masters.items():
        expected = local_part(plain.states[name, 0].parameter, LAYOUTS[name], grid.sizes, grid.rank).flatten()
        moved = expected[begin : shard.end]
        assert relative_error(shard.tensor, moved) < 0.02, name
        rounded = parameters[name].detach().flatten()[begin : shard.end]
        assert torch.equal(shard.tensor.bfloat16(), rounded), name


def test_bfloat16_parameters_are_their_masters_rounded() -> None:
    run_ranks(4, _check_bfloat16, {"data": 2, "tensor": 2, "expert": 2})


def _check_not_finite(value: float) -> list[tuple[bool, bool]]:
    found = []
    grid = RankGrid.create(GridSizes(pipeline=2, data=2, expert=2))
    for name in ("rows", "gate_up", "norm", "encoder"):
        parameters = make_parameters(grid, torch.float32)
        optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig())
        add_gradients(optimizer, parameters, grid, 1, torch.float32)
        optimizer.step(RATE)
        before = {key: value.clone() for key, value in parameters.items()}
        state = [shard.tensor.clone() for shard in optimizer.shards()]
        for key in parameters:
            accumulate_gradient(parameters[key], local_summand(key, grid, 2, torch.float32))
        if grid.rank == 3:
            parameters[name].main_grad.view(-1)[-1] = value  # pyright: ignore[reportAttributeAccessIssue]
        report = optimizer.step(RATE)
        same = all(torch.equal(before[key], parameters[key]) for key in parameters)
        kept = all(torch.equal(a, b.tensor) for a, b in zip(state, optimizer.shards(), strict=True))
        zeroed = all(not parameter.main_grad.any() for parameter in parameters.values())  # pyright: ignore[reportAttributeAccessIssue]
        found.append((report.finite, same and kept and zeroed and optimizer.num_steps == 1))
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_gradient_on_one_rank_stops_the_step_everywhere(value: float) -> None:
    assert run_ranks(4, _check_not_finite, value) == [[(False, True)] * 4] * 4


def _check_shards(axes: dict[str, int]) -> dict[str, dict[str, int]]:
    """Shards cover every element once along the copies; loading them gives the parameters back."""
    grid = RankGrid.create(GridSizes(**axes))
    parameters = make_parameters(grid, torch.float32)
    optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig())
    add_gradients(optimizer, parameters, grid, 1, torch.float32)
    optimizer.step(RATE)
    other = ZeroOptimizer(make_parameters(grid, torch.float32), LAYOUTS, grid, MuonClipConfig())
    counted: dict[str, dict[str, int]] = {}
    for source, target in zip(optimizer.shards(), other.shards(), strict=True):
        assert (source.name, source.key, source.begin) == (target.name, target.key, target.begin)
        assert len(source.tensor) == source.end - source.begin
        target.tensor.copy_(source.tensor)
        counted.setdefault(source.name, {})[source.key] = source.end - source.begin
    other.publish()
    for slot in (slot for bucket in other.gradients.buckets for slot in bucket.slots):
        assert torch.equal(slot.parameter, parameters[slot.name])
    return counted


def test_shards_are_the_whole_state() -> None:
    axes = {"data": 2, "tensor": 2, "expert": 2}
    sizes = GridSizes(**axes)
    ranks = run_ranks(4, _check_shards, axes)
    for name, layout in LAYOUTS.items():
        holders = sizes.ranks(0, layout.replicas)
        elements = torch.Size(layout.local_shape(sizes)).numel()
        for key in ("master", "momentum") if layout.matrix else ("master", "exp_avg", "exp_avg_sq"):
            assert sum(ranks[rank].get(name, {}).get(key, 0) for rank in holders) == elements


def _record(name: str, order: list[tuple[str, int]], flying: list[int]) -> None:
    """Wraps a collective of torch.distributed: the order in which its calls start, and how many were in flight."""
    original = getattr(dist, name)
    waiting: set[int] = set()

    class Watched:
        def __init__(self, work: dist.Work) -> None:
            self.work = work
            waiting.add(id(self))
            flying.append(len(waiting))

        def wait(self) -> None:
            self.work.wait()
            waiting.discard(id(self))

    def call(output: torch.Tensor, given: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool = False) -> object:
        order.append((group.group_desc, given.numel()))
        work = original(output, given, group=group, async_op=async_op)
        return Watched(work) if async_op else work

    setattr(dist, name, call)


def _check_order(axes: dict[str, int]) -> tuple[list[tuple[str, int]], int, int]:
    """Every rank's gradients land in another order, and one of them never does on rank 1."""
    torch.set_num_threads(1)
    grid = RankGrid.create(GridSizes(**axes))
    parameters = make_parameters(grid, torch.float32)
    optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig(), bucket_bytes=300)
    scattered: list[tuple[str, int]] = []
    flying: list[int] = []
    _record("reduce_scatter_tensor", scattered, [])
    _record("all_gather_into_tensor", [], flying)
    optimizer.expect_gradients(1)
    names = list(parameters)
    random.Random(grid.rank).shuffle(names)
    for name in names:
        if (name, grid.rank) != ("columns", 1):
            accumulate_gradient(parameters[name], local_summand(name, grid, 1, torch.float32))
    optimizer.step(RATE)
    return scattered, max(flying), len(optimizer.gradients.buckets)


def test_collectives_start_in_one_order_and_few_at_once() -> None:
    ranks = run_ranks(4, _check_order, {"data": 4, "expert": 2})
    orders = [order for order, _, _ in ranks]
    assert len(orders[0]) == ranks[0][2] > 4
    assert {axis for axis, _ in orders[0]} == {"data", "expert_data"}
    assert orders == [orders[0]] * 4
    assert [most for _, most, _ in ranks] == [2] * 4


def test_buckets_come_in_the_order_of_the_backward() -> None:
    grid = RankGrid(GridSizes(), 0, "cpu", {})
    parameters = make_parameters(grid, torch.float32)
    optimizer = ZeroOptimizer(
        parameters, LAYOUTS, grid, MuonClipConfig(), bucket_bytes=1, irregular=["replicated", "norm"]
    )
    regular = ["embedding", "down", "gate_up", "columns", "rows"]
    names = [bucket.slots[0].name for bucket in optimizer.gradients.buckets]
    assert names == [*regular, "encoder_bias", "encoder", "norm", "replicated"]
    optimizer.expect_gradients(1)
    for name in ("down", "embedding", "gate_up", "norm", "rows", "columns"):
        accumulate_gradient(parameters[name], local_summand(name, grid, 1, torch.float32))
    assert optimizer.gradients.started == ["embedding", "gate_up", "columns"]


def _faults(name: str) -> tuple[float, dict[str, Any]]:
    """Arguments of a step that are wrong."""
    return {
        "shape": (RATE, {"rows": torch.ones(7)}),
        "name": (RATE, {"missing": torch.ones(7)}),
        "type": (RATE, {"rows": [1.0]}),
        "nan": (RATE, {"rows": torch.full((12,), float("nan")), "columns": torch.ones(7)}),
        "device": (RATE, {"rows": torch.ones(12, device="meta")}),
        "rate": (float("inf"), {}),
        "rate_type": ("fast", {}),
        "other_rate": (2 * RATE, {}),
    }[name]  # pyright: ignore[reportReturnType]


FAULTS = ("shape", "name", "type", "nan", "device", "rate", "rate_type", "other_rate")


def _check_faults() -> dict[str, str]:
    """Rank 2 makes every mistake once; then a right step is still the plain one."""
    grid = RankGrid.create(GridSizes(data=2, tensor=2))
    parameters = make_parameters(grid, torch.float64)
    config = MuonClipConfig()
    optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, config)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found = {}
    for fault in FAULTS:
        add_gradients(optimizer, parameters, grid, 3, torch.float64)
        rate, factors = _faults(fault) if grid.rank == 2 else (RATE, {"rows": torch.ones(12), "columns": torch.ones(7)})
        with pytest.raises((ValueError, TypeError, RankFailureError)) as error:
            optimizer.step(rate, factors)
        found[fault] = f"{type(error.value).__name__}: {error.value}"
        assert all(torch.equal(before[name], parameters[name]) for name in parameters)
    if grid.rank == 1:
        del parameters["norm"]
        parameters["norm"] = torch.nn.Parameter(before["norm"].clone(), requires_grad=False)
    with pytest.raises((ArgumentValueError, RankFailureError)) as error:
        ZeroOptimizer(parameters, LAYOUTS, grid, config)
    found["constructor"] = str(error.value)
    add_gradients(optimizer, {slot.name: slot.parameter for slot in _slots(optimizer)}, grid, 1, torch.float64)
    assert optimizer.step(RATE).finite
    plain = PlainMuonClip(grid.sizes, torch.float64, config)
    plain.step(RATE)
    for slot in _slots(optimizer):
        expected = local_part(plain.states[slot.name, 0].parameter, slot.layout, grid.sizes, grid.rank)
        assert relative_error(slot.parameter.detach(), expected) <= 1e-13
    return found


def _slots(optimizer: ZeroOptimizer) -> list[Slot]:
    return [slot for bucket in optimizer.gradients.buckets for slot in bucket.slots]


def test_all_ranks_raise_where_one_has_a_faulty_argument() -> None:
    ranks = run_ranks(4, _check_faults)
    texts = {
        "shape": "ShapeError: ZeroOptimizer.step: row_factors['rows']: got (7,), accepted (12,), this rank's rows",
        "name": "ArgumentValueError: ZeroOptimizer.step: row_factors['missing']: got factors, accepted none",
        "type": "ArgumentTypeError: ZeroOptimizer.step: row_factors['rows']: got list, accepted a tensor",
        "nan": "ArgumentValueError: ZeroOptimizer.step: row_factors: got inf or NaN among them",
        "device": "DeviceError: ZeroOptimizer.step: row_factors['rows']: got meta",
        "rate": "ArgumentValueError: ZeroOptimizer.step: learning_rate: got inf",
        "rate_type": "ArgumentTypeError: ZeroOptimizer.step: learning_rate: got str, accepted a number",
        "other_rate": "RankFailureError: ZeroOptimizer.step: learning_rate: got 0.04 here, 0.02, 0.04 on all ranks",
    }
    for fault, text in texts.items():
        assert ranks[2][fault].startswith(text), ranks[2][fault]
        for rank in (0, 1, 3):
            expected = "RankFailureError: ZeroOptimizer.step: faulty arguments on rank 2, whose error names them"
            if fault == "other_rate":
                expected = "RankFailureError: ZeroOptimizer.step: learning_rate: got 0.02 here, 0.02, 0.04 on all ranks"
            assert ranks[rank][fault].startswith(expected), ranks[rank][fault]
    assert ranks[1]["constructor"].startswith("ZeroOptimizer: parameters: got norm without requires_grad")
    assert ranks[0]["constructor"] == "ZeroOptimizer: faulty arguments on rank 1, whose error names them"
