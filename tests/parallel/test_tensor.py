"""Tensor parallel layers on 2 and 4 ranks give what the whole layer gives in one process; bytes, order and memory."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from k25sys.errors import ArgumentTypeError, ArgumentValueError, GridError, ShapeError
from k25sys.models.moe import SwiGLU
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore, collectives
from k25sys.parallel.collectives import (
    all_reduce,
    gather_rows,
    own_rows,
    reduce_scatter_rows,
)
from k25sys.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceGatheredLinear,
    TensorParallelSwiGLU,
)
from tests.parallel.parts import gather_parts
from tests.parallel.processes import run_ranks
from tests.parallel.tensor_cases import (
    BOUNDS,
    WAYS,
    Case,
    Generator,
    attention_case,
    check,
    grid_of,
    layout,
    linear_case,
    part,
    relative_error,
    swiglu_case,
)

GENERATED = {"linear": (linear_case, 30), "swiglu": (swiglu_case, 12), "attention": (attention_case, 12)}


# --- against one process ----------------------------------------------------------------------------------------------


def _worst_errors(ranks: int) -> dict[str, float]:
    grid = grid_of(ranks)
    worst: dict[str, float] = {}
    for dtype, bound in BOUNDS.items():
        for kind, (make, count) in GENERATED.items():
            for seed in range(count):
                case = make(Generator(seed, ranks), dtype)
                errors = check(case, grid, WAYS[seed % len(WAYS)])
                assert max(errors.values()) <= bound, (case.name, dtype, seed, errors)
                key = f"{kind} {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), *errors.values())
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_equal_one_process(ranks: int) -> None:
    found = run_ranks(ranks, _worst_errors, ranks)
    print({key: f"{max(worst[key] for worst in found):.1e}" for key in found[0]})


@pytest.mark.parametrize("kind", GENERATED)
def test_one_rank_computes_what_the_whole_layer_computes_bit_by_bit(kind: str) -> None:
    grid = RankGrid.create(GridSizes())
    for seed in range(8):
        for dtype in BOUNDS:
            case = GENERATED[kind][0](Generator(seed, 1), dtype)
            errors = check(case, grid, WAYS[seed % 2])
            assert set(errors.values()) == {0.0}, (case.name, seed, errors)


def test_one_rank_keeps_the_parameters_of_the_layer() -> None:
    grid, layer = RankGrid.create(GridSizes()), nn.Linear(4, 6)
    assert ColumnParallelLinear(layer, grid, WeightGradStore(), gather_input=True).weight is layer.weight


def _against_torch(ranks: int) -> float:
    """torch's ColwiseParallel and RowwiseParallel over sequence-sharded tokens."""
    grid = grid_of(ranks)
    mesh = grid.device_mesh()["tensor"]
    worst = 0.0
    for seed in range(4):
        g = Generator(seed, ranks)
        dim, num_tokens = g.random.randint(2, 12), g.size(2)
        whole = g.fill(SwiGLU(dim, g.size(2)), torch.float64)
        x_TD = g.tensor(num_tokens, dim, dtype=torch.float64)
        ours = TensorParallelSwiGLU(copy.deepcopy(whole), grid, WeightGradStore())
        theirs = parallelize_module(
            copy.deepcopy(whole),
            mesh,
            {
                "": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
                "gate_proj": ColwiseParallel(use_local_output=True),
                "up_proj": ColwiseParallel(use_local_output=True),
                "down_proj": RowwiseParallel(output_layouts=Shard(0)),
            },
        )
        results = []
        for module in (ours, theirs):
            x = part(x_TD, "rows", grid).clone().requires_grad_()
            y = module(x)
            y.sin().sum().backward()
            assert x.grad is not None
            results.append([y.detach(), x.grad, *(_local(p.grad) for _, p in sorted(module.named_parameters()))])
        worst = max(worst, *(relative_error(a, b) for a, b in zip(*results, strict=True)))
    return worst


def _local(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_swiglu_equals_torch_tensor_parallel(ranks: int) -> None:
    assert max(run_ranks(ranks, _against_torch, ranks)) <= 1e-13


# --- what is sent, when, and what is kept -----------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Records collectives with the bytes that a ring sends from this rank, and matrix products."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.events, self.bytes_sent = ranks, [], {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            output, source = args[0], args[1]
            shard = source if "allgather" in name else output
            kind = "gather" if "allgather" in name else "scatter"
            sent = shard.numel() * shard.element_size() * (self.ranks - 1)
            self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + sent
            self.events.append(f"start {kind}")
        elif name.startswith("c10d::"):
            raise AssertionError(f"{name} is not counted")
        elif name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


def _watched(case: Case, grid: RankGrid, *, defer: bool = False) -> dict[str, Any]:
    store = WeightGradStore()
    twin = case.make(copy.deepcopy(case.layer), grid, store)
    x = part(case.x_TD, "rows", grid).clone().requires_grad_()
    parameters = {id(p) for p in twin.parameters()}
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            saved.append(tuple(tensor.shape))
        return tensor

    forward, backward, weights = (_Watch(grid.size("tensor")) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), forward:
        y = case.run(twin, x)
    original, running = collectives.Pending.wait, [backward]

    def wait(pending: collectives.Pending) -> Tensor:
        running[-1].events.append("wait")
        return original(pending)

    collectives.Pending.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    try:
        if defer:
            with store.deferring("step"), backward:
                y.backward(torch.ones_like(y))
            running.append(weights)
            with weights:
                store.run("step")
        else:
            with backward:
                y.backward(torch.ones_like(y))
    finally:
        collectives.Pending.wait = original
    return {
        "forward": forward.bytes_sent, "backward": backward.bytes_sent, "weights": weights.bytes_sent,
        "events": backward.events, "late events": weights.events, "saved": saved,
    }  # fmt: skip


def _bytes(ranks: int) -> None:
    grid = grid_of(ranks)
    share = 8 * (ranks - 1) / ranks  # of each number of a (T, ...) tensor in float64
    for seed in range(6):
        case = attention_case(Generator(seed, ranks), torch.float64)
        config, tokens = case.layer.config, len(case.x_TD)
        latents = config.kv_lora_rank + config.qk_rope_head_dim
        dim, query = config.hidden_size, config.q_lora_rank
        narrow, wide = (latents + query, 0) if query is not None else (latents, dim)
        found = _watched(case, grid)
        assert found["forward"] == {"gather": share * tokens * (narrow + wide), "scatter": share * tokens * dim}
        # Outputs' gradients are gathered; so is the input of q_proj once more. Latents' gradients are scattered.
        scattered = share * tokens * (narrow + wide)
        assert found["backward"] == {"gather": share * tokens * (dim + wide), "scatter": scattered}
        case = swiglu_case(Generator(seed, ranks), torch.float64)
        rows = share * case.x_TD.numel()
        found = _watched(case, grid)
        assert found["forward"] == {"gather": rows, "scatter": rows}
        assert found["backward"] == {"gather": 2 * rows, "scatter": rows}
        late = _watched(case, grid, defer=True)
        assert late["backward"] == {"gather": rows, "scatter": rows}
        assert late["weights"] == {"gather": rows}


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_a_layer_are_what_is_calculated(ranks: int) -> None:
    run_ranks(ranks, _bytes, ranks)


def _order(ranks: int) -> tuple[list[str], list[str], list[str]]:
    """Of one column-parallel layer: the backward, and the two halves of a deferred one."""
    grid = grid_of(ranks)
    layer = Generator(0, ranks).fill(nn.Linear(5, 3 * ranks, bias=False), torch.float32)
    case = Case(
        name="column", layer=layer, layouts={"weight": layout(layer.get_parameter("weight"), 0)},
        x_TD=torch.ones(2 * ranks, 5),
        make=lambda whole, grid, store: ColumnParallelLinear(whole, grid, store, gather_input=True),
    )  # fmt: skip
    late = _watched(case, grid, defer=True)
    return _watched(case, grid)["events"], late["events"], late["late events"]


def test_communication_is_started_before_the_product_that_hides_it_and_waited_for_after_it() -> None:
    for at_once, first, second in run_ranks(2, _order, 2):
        # gather, input's gradient, its reduce-scatter, then the weight's gradient needs the gathered rows
        assert at_once == ["start gather", "product", "start scatter", "wait", "product", "wait"]
        assert first == ["product", "start scatter", "wait"]
        assert second == ["start gather", "wait", "product"]


def _kept(ranks: int) -> tuple[list[tuple[int, ...]], int, int, int]:
    g = Generator(3, ranks)
    case = swiglu_case(g, torch.float32)
    case.x_TD = g.tensor(4 * ranks, case.x_TD.shape[1], dtype=torch.float32)
    width = case.layer.get_parameter("gate_proj.weight").shape[0] // ranks
    return _watched(case, grid_of(ranks))["saved"], 4 * ranks, case.x_TD.shape[1], width


def test_gathered_inputs_are_not_saved() -> None:
    for saved, tokens, dim, width in run_ranks(4, _kept, 4):
        assert sorted(saved) == sorted([(tokens // 4, dim)] + [(tokens, width)] * (len(saved) - 1))


# --- collectives ------------------------------------------------------------------------------------------------------


def _collectives(ranks: int) -> None:
    grid = grid_of(ranks)
    group, index = grid.group("tensor"), grid.index("tensor")
    for dtype in BOUNDS:
        for rows in (0, 1, 3):
            g = Generator(rows, ranks)
            all_RTX = [g.tensor(ranks * rows, 3, dtype=dtype).round() for _ in range(ranks)]
            total, summand = torch.stack(all_RTX).sum(0), all_RTX[index]
            mine = own_rows("test", total, group)
            _same(gather_rows, own_rows("test", total, group), group, total, summand, mine)
            _same(lambda x, to: gather_rows(x, to, gradient="whole"), mine, group, total, total, mine)
            _same(reduce_scatter_rows, summand, group, mine, mine, total)
            _same(all_reduce, summand, group, total, total, total)


def _same(function: Any, x: Tensor, group: Any, want: Tensor, grad: Tensor, want_grad: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    got = function(leaf, group)
    got.backward(grad)
    assert torch.equal(got, want), function
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want_grad), function


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_and_their_gradients(ranks: int) -> None:
    run_ranks(ranks, _collectives, ranks)


def test_a_group_of_one_communicates_nothing() -> None:
    x = torch.ones(3, 2)
    for function in (gather_rows, reduce_scatter_rows, all_reduce):
        assert function(x, None) is x


# --- errors -----------------------------------------------------------------------------------------------------------


def _errors(ranks: int) -> None:
    grid, store = grid_of(ranks), WeightGradStore()
    group = grid.group("tensor")
    with pytest.raises(GridError, match=r"ColumnParallelLinear: out_features: got 6 over 4 tensor ranks, accepted a m"):
        ColumnParallelLinear(nn.Linear(4, 6), grid, store, gather_input=True)
    with pytest.raises(GridError, match=r"out_features: got 24 in units of 4 over 4 tensor ranks, accepted a multiple"):
        ColumnParallelLinear(nn.Linear(4, 24), grid, store, gather_input=False, unit=4)  # six heads
    with pytest.raises(GridError, match=r"RowParallelLinear: in_features: got 6 over 4 tensor ranks"):
        RowParallelLinear(nn.Linear(6, 4), grid, store, reduce_scatter_output=True)
    with pytest.raises(GridError, match=r"out_features: got 10 over 4 tensor ranks"):
        TensorParallelSwiGLU(SwiGLU(4, 10), grid, store)
    row = RowParallelLinear(nn.Linear(8, 4), grid, store, reduce_scatter_output=True)
    with pytest.raises(
        ShapeError, match=r"reduce_scatter_rows: T: got 7 rows over 4 ranks, accepted a multiple of 4; "
    ):
        row(torch.ones(7, 2))
    with pytest.raises(ShapeError, match=r"T: got 6 rows over 4 ranks"):
        reduce_scatter_rows(torch.ones(6, 2), group)
    with pytest.raises(ShapeError, match=r"ColumnParallelLinear: x: got shape \(2, 3, 4\)"):
        ColumnParallelLinear(nn.Linear(4, 8), grid, store, gather_input=True)(torch.ones(2, 3, 4))
    dist.barrier()


def test_sizes_that_do_not_divide_are_refused() -> None:
    run_ranks(4, _errors, 4)


def test_wrong_arguments_are_refused() -> None:
    grid, store = RankGrid.create(GridSizes()), WeightGradStore()
    with pytest.raises(ArgumentTypeError, match=r"SequenceGatheredLinear: layer: got Embedding, accepted a torch\.nn"):
        SequenceGatheredLinear(nn.Embedding(4, 4), grid, store)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentValueError, match="gather_rows: gradient: got 'mean', accepted 'partial' or 'whole'"):
        gather_rows(torch.ones(2), None, gradient="mean")


# --- layers on meta, frozen layers ------------------------------------------------------------------------------------


def _meta_and_frozen(ranks: int) -> None:
    grid, store = grid_of(ranks), WeightGradStore()
    with torch.device("meta"):
        swiglu = TensorParallelSwiGLU(SwiGLU(6, 4 * ranks), grid, store)
    assert {p.device.type for p in swiglu.parameters()} == {"meta"}
    assert [tuple(p.shape) for p in swiglu.parameters()] == [(4, 6), (4, 6), (6, 4)]
    whole = Generator(1, ranks).fill(SwiGLU(6, 4 * ranks), torch.float64)
    whole.gate_proj.weight.requires_grad_(False)
    twin = TensorParallelSwiGLU(copy.deepcopy(whole), grid, store)
    assert not twin.gate_proj.weight.requires_grad
    x_TD = Generator(2, ranks).tensor(2 * ranks, 6, dtype=torch.float64)  # its gradient is not wanted either
    whole(x_TD).sin().sum().backward()
    twin(part(x_TD, "rows", grid)).sin().sum().backward()
    assert twin.gate_proj.weight.grad is None
    up = twin.up_proj.weight.grad
    assert up is not None
    assert whole.up_proj.weight.grad is not None
    spread = layout(whole.up_proj.weight, 0)
    assert relative_error(gather_parts(up, whole.up_proj.weight.shape, spread, grid), whole.up_proj.weight.grad) < 1e-13
    with torch.no_grad():
        y = twin(part(x_TD, "rows", grid))
    assert relative_error(y, part(whole(x_TD), "rows", grid)) < 1e-13


def test_layers_on_meta_and_frozen_weights() -> None:
    run_ranks(2, _meta_and_frozen, 2)
