"""The runtime beside torch.distributed.pipelining's own schedules: the same gradients bit for bit, fewer products."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel.pipeline import lower, make_schedule
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from tests.parallel.pipeline.toy import CountProducts, Layer, Rows, ToyStage, make_rows
from tests.parallel.processes import run_ranks

LAYERS, LENGTH = 8, 6
PAIRS = [
    ("GPipe", ("gpipe", 1)), ("1F1B", ("1f1b", 1)), ("Interleaved1F1B", ("interleaved_1f1b", 2)),
    ("InterleavedZeroBubble", ("zb_h1", 1)),
]  # fmt: skip
"""Torch's name, and ours and the virtual stages. Its zero-bubble has two stages a rank, and the gradients are the same
for every schedule."""


def _torchs(name: str, size: int, place: int, rows: list[Rows], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Gradients of the layers of this rank, and the products of its second step."""
    schedule_class: Any = get_schedule_class(name)
    single = issubclass(schedule_class, PipelineScheduleSingle)
    num_stages = size if single else 2 * size
    per = LAYERS // num_stages
    mine = [stage for stage in range(num_stages) if stage % size == place]
    layers = {i: Layer(i, dtype, None) for stage in mine for i in range(stage * per, (stage + 1) * per)}
    stages = [
        PipelineStage(
            nn.Sequential(*(layers[i] for i in range(stage * per, (stage + 1) * per))), stage, num_stages,
            torch.device("cpu"),
        )
        for stage in mine
    ]  # fmt: skip
    schedule = schedule_class(
        stages[0] if single else stages, len(rows), scale_grads=False,
        loss_fn=lambda y, target: ((y - target) ** 2).sum() / rows[0].normalizer,
    )  # fmt: skip
    x, target = torch.cat([each.x_TD for each in rows]), torch.cat([each.target_TD for each in rows])
    for _ in range(2):  # the first step runs a forward and a backward more, to learn shapes
        for layer in layers.values():
            layer.zero_grad()
        with CountProducts() as counter:
            args = (x,) if 0 in mine else ()
            schedule.step(*args, **({"target": target} if num_stages - 1 in mine else {}))
    names = [(f"{i}.{key}", p.grad) for i, layer in layers.items() for key, p in layer.named_parameters()]
    return {name: grad for name, grad in names if grad is not None}, counter.total


def _ours(
    name: str, virtual_stages: int, grid: RankGrid, rows: list[Rows], dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    schedule = make_schedule(
        name, num_ranks=grid.size("pipeline"), num_microbatches=len(rows), virtual_stages=virtual_stages
    )
    per, store = LAYERS // schedule.num_stages, WeightGradStore()
    stages = {
        i: ToyStage(range(i * per, (i + 1) * per), last=i == schedule.num_stages - 1, dtype=dtype, store=store)
        for i in schedule.stages_of(grid.index("pipeline"))
    }
    runtime = PipelineRuntime(lower(schedule), stages, grid, weight_grads=store)
    with CountProducts() as counter:
        runtime.step([Rows(each.x_TD, each.target_TD, each.normalizer) for each in rows])
    names = [(key.removeprefix("layers."), p.grad) for stage in stages.values() for key, p in stage.named_parameters()]
    return {name: grad for name, grad in names if grad is not None}, counter.total


def _compare(size: int) -> dict[str, tuple[int, int]]:
    grid = RankGrid.create(GridSizes(pipeline=size))
    place, products = grid.index("pipeline"), {}
    for dtype in (torch.float32, torch.float64):
        rows = make_rows(8, dtype, lengths=(LENGTH,))
        gradients: dict[str, Tensor] = {}
        for torchs_name, (name, virtual_stages) in PAIRS:
            torchs, torchs_products = _torchs(torchs_name, size, place, rows, dtype)
            ours, our_products = _ours(name, virtual_stages, grid, rows, dtype)
            gradients.update(torchs)
            assert all(torch.equal(gradient, gradients[key]) for key, gradient in ours.items() if key in gradients)
            if name != "zb_h1":
                assert ours.keys() == torchs.keys()
            totals = torch.tensor([torchs_products, our_products])
            dist.all_reduce(totals)
            products[torchs_name] = (int(totals[0]), int(totals[1]))
    return products


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_torchs_pipelining(size: int) -> None:
    products = run_ranks(size, _compare, size)[0]
    for name, (torchs, ours) in products.items():
        if name == "InterleavedZeroBubble":
            assert torchs > ours  # a custom autograd.Function runs in both halves there
        else:
            assert torchs == ours, name
