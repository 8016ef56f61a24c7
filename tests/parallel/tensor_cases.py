"""Generated layers for the tests of tensor parallelism: one process beside the ranks, compared part by part."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.models.attention import LatentAttention
from k25sys.models.config import TextConfig
from k25sys.models.documents import Documents
from k25sys.models.moe import SwiGLU
from k25sys.models.rope import text_tables
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid, WeightGradStore
from k25sys.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceGatheredLinear,
    TensorParallelSwiGLU,
)
from tests.parallel.parts import gather_parts

AnyModule = TypeVar("AnyModule", bound=nn.Module)
WAYS = ("at once", "deferred", "main_grad")
"""How weight gradients are computed and where they land."""
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 3e-2}


@dataclass(kw_only=True)
class Case:
    """A layer as a whole, how its parallel twin is made of a copy, and tokens; the same on every rank."""

    name: str
    layer: Any
    make: Callable[[Any, RankGrid, WeightGradStore], nn.Module]
    layouts: dict[str, ParameterLayout]
    x_TD: Tensor
    run: Callable[[Any, Tensor], Tensor] = lambda layer, x: layer(x)
    """Called with the whole layer and all tokens, and with the twin and what it takes."""
    takes: str = "rows"
    gives: str = "rows"
    """A rank takes, and gives, its "rows", its "columns", or "all"."""
    summands: bool = False
    """What follows is one rank's part, so that its gradient is a summand."""
    max_logits: dict[str, Tensor] = field(default_factory=dict)
    """Of attention: each head's, by the type of o_proj."""


def part(tensor: Tensor, which: str, grid: RankGrid) -> Tensor:
    """A rank's "rows", its "columns", or "all"."""
    if which == "all":
        return tensor
    dim = 0 if which == "rows" else 1
    size = tensor.shape[dim] // grid.size("tensor")
    return tensor.narrow(dim, grid.index("tensor") * size, size)


def layout(parameter: Tensor, split: int | None = None, *, shared: bool = False) -> ParameterLayout:
    """Split along `split` over the tensor ranks; `shared`: whole, its gradient a sum over them."""
    splits = () if split is None else ((split, "tensor"),)
    return ParameterLayout(shape=tuple(parameter.shape), splits=splits, sum_over_tensor=shared)


class Generator:
    """Sizes and tensors from one seed, the same on every rank."""

    def __init__(self, seed: int, ranks: int) -> None:
        self.random, self.ranks = random.Random(seed), ranks
        self.torch = torch.Generator().manual_seed(seed)

    def size(self, least: int = 1, most: int = 5) -> int:
        """A multiple of the ranks."""
        return self.ranks * self.random.randint(least, most)

    def tensor(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (torch.randn(shape, generator=self.torch, dtype=torch.float64) * scale).to(dtype)

    def fill(self, layer: AnyModule, dtype: torch.dtype) -> AnyModule:
        """Draws every parameter so that outputs are of order one."""
        layer.to(dtype)
        for parameter in layer.parameters():
            size = parameter.shape[-1] if parameter.dim() > 1 else 4
            drawn = self.tensor(*parameter.shape, dtype=dtype, scale=size**-0.5)
            parameter.data.copy_(drawn + (1.0 if parameter.dim() == 1 else 0.0))
        return layer


def linear_case(g: Generator, dtype: torch.dtype) -> Case:
    """One of the three linear layers, with every option."""
    kind = g.random.choice(("column", "column of all", "row", "row to all", "sequence"))
    unit, bias = g.random.choice((1, 3)), g.random.random() < 0.5
    row, split, other = kind.startswith("row"), g.size() * unit, g.random.randint(4, 9)
    layer = g.fill(nn.Linear(split if row else other, other if row else split, bias=bias), dtype)
    x_TD = g.tensor(g.size(0), split if row else other, dtype=dtype)
    parameters = dict(layer.named_parameters())
    if kind.startswith("column"):
        gather = kind == "column"
        return Case(
            name=kind, layer=layer, layouts={name: layout(p, 0) for name, p in parameters.items()}, x_TD=x_TD,
            make=lambda whole, grid, store: ColumnParallelLinear(whole, grid, store, gather_input=gather, unit=unit),
            takes="rows" if gather else "all", gives="columns",
        )  # fmt: skip
    if row:
        scatter = kind == "row"
        layouts = {"weight": layout(parameters["weight"], 1)}
        if bias:
            layouts["bias"] = layout(parameters["bias"], shared=scatter)
        return Case(
            name=kind, layer=layer, layouts=layouts, x_TD=x_TD,
            make=lambda whole, grid, store: RowParallelLinear(
                whole, grid, store, reduce_scatter_output=scatter, unit=unit
            ),
            takes="columns", gives="rows" if scatter else "all",
        )  # fmt: skip
    layouts = {name: layout(p, shared=True) for name, p in parameters.items()}
    return Case(
        name=kind, layer=layer, layouts=layouts, x_TD=x_TD, make=SequenceGatheredLinear, gives="all", summands=True
    )  # fmt: skip


def swiglu_case(g: Generator, dtype: torch.dtype) -> Case:
    """A dense layer's SwiGLU."""
    dim = g.random.randint(1, 12)
    layer = g.fill(SwiGLU(dim, g.size()), dtype)
    layouts = {name: layout(p, 1 if "down" in name else 0) for name, p in layer.named_parameters()}
    x_TD = g.tensor(g.size(0), dim, dtype=dtype)
    return Case(name="swiglu", layer=layer, make=TensorParallelSwiGLU, layouts=layouts, x_TD=x_TD)


def text_config(g: Generator) -> TextConfig:
    """MLA of random sizes, with and without a query latent; heads are a multiple of the ranks."""
    r = g.random
    return TextConfig(
        vocab_size=8, hidden_size=r.choice((8, 12, 20)), intermediate_size=8, moe_intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=g.size(1, 2), q_lora_rank=r.choice((None, 6, 12)),
        kv_lora_rank=r.choice((6, 10)), qk_nope_head_dim=r.choice((4, 6)), qk_rope_head_dim=r.choice((2, 4)),
        v_head_dim=r.choice((3, 4, 8)), n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=1.0, rope_theta=10000.0, yarn=None, max_position_embeddings=512,
    )  # fmt: skip


def attention_layouts(attention: nn.Module) -> dict[str, ParameterLayout]:
    """Written out by hand, apart from the library's table."""
    found = {}
    for name, p in attention.named_parameters():
        part = name.split(".")[0]
        split = {"q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}.get(part)
        found[name] = layout(p, split, shared=split is None)
    return found


def attention_case(g: Generator, dtype: torch.dtype) -> Case:
    """A whole LatentAttention over packed documents; its largest logits are compared as well."""
    config = text_config(g)
    layer = g.fill(LatentAttention(config, implementation="sdpa"), dtype)
    num_tokens, lengths = g.size(12, 24), []
    while sum(lengths) < num_tokens:
        # A query gradient of a few tokens is a difference of nearly equal numbers: it would measure float32 itself.
        lengths.append(g.random.choice((1, num_tokens - sum(lengths))))
    documents = Documents(tuple(lengths), torch.device("cpu"))
    tables = text_tables(config, documents.positions_T)
    largest: dict[str, Tensor] = {}

    def run(attention: Any, x: Tensor) -> Tensor:
        heads = attention.o_proj.weight.shape[1] // config.v_head_dim
        largest[type(attention.o_proj).__name__] = found_H = torch.full((heads,), float("-inf"))
        return attention(x, tables, documents, max_logits_H=found_H)

    def make(whole: Any, grid: RankGrid, store: WeightGradStore) -> nn.Module:
        nope, query = config.qk_nope_head_dim, config.qk_head_dim
        if config.q_lora_rank is None:
            whole.q_proj = ColumnParallelLinear(whole.q_proj, grid, store, gather_input=True, unit=query)
        else:
            whole.q_a_proj = SequenceGatheredLinear(whole.q_a_proj, grid, store)
            whole.q_b_proj = ColumnParallelLinear(whole.q_b_proj, grid, store, gather_input=False, unit=query)
        whole.kv_a_proj_with_mqa = SequenceGatheredLinear(whole.kv_a_proj_with_mqa, grid, store)
        expanded = nope + config.v_head_dim
        whole.kv_b_proj = ColumnParallelLinear(whole.kv_b_proj, grid, store, gather_input=False, unit=expanded)
        unit = config.v_head_dim
        whole.o_proj = RowParallelLinear(whole.o_proj, grid, store, reduce_scatter_output=True, unit=unit)
        return whole

    x_TD = g.tensor(num_tokens, config.hidden_size, dtype=dtype)
    return Case(
        name="attention", layer=layer, make=make, layouts=attention_layouts(layer), x_TD=x_TD, run=run,
        max_logits=largest,
    )  # fmt: skip


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, wherever they landed."""
    found = {}
    for name, parameter in layer.named_parameters():
        main_grad = getattr(parameter, "main_grad", None)
        parts = [grad for grad in (main_grad, parameter.grad) if grad is not None]
        assert parts, name
        found[name] = sum(parts[1:], parts[0])
    return found


def summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the group, in float64."""
    total = tensor.detach().double()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def check(case: Case, grid: RankGrid, way: str) -> dict[str, float]:
    """Relative errors of the output, of the input's gradient and of every parameter's, of the twin on these ranks."""
    group, store = grid.group("tensor"), WeightGradStore()
    twin = case.make(copy.deepcopy(case.layer), grid, store)
    for parameter in twin.parameters():
        if way == "main_grad":
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
    whole_x = case.x_TD.clone().requires_grad_()
    want = case.run(case.layer, whole_x)
    direction = torch.cos(torch.arange(want.numel(), dtype=torch.float64)).view(want.shape).to(want.dtype)
    want.backward(direction)
    assert whole_x.grad is not None

    x = part(case.x_TD, case.takes, grid).clone().requires_grad_()
    got = case.run(twin, x)
    upstream = part(direction, case.gives, grid) / (grid.size("tensor") if case.summands else 1)
    if way == "deferred":
        with store.deferring("step"):
            got.backward(upstream)
        assert store.num_kept
        assert all(p.grad is None for name, p in twin.named_parameters() if name.endswith("proj.weight"))
        store.run("step")
    else:
        got.backward(upstream)
    assert store.num_kept == 0
    assert x.grad is not None
    errors = {"output": relative_error(got, part(want, case.gives, grid))}
    if case.takes == "all":
        errors["x"] = relative_error(summed(x.grad, group), whole_x.grad)
    else:
        errors["x"] = relative_error(x.grad, part(whole_x.grad, case.takes, grid))
    for name, grad in gradients(twin).items():
        spread = case.layouts[name]
        whole = case.layer.get_parameter(name).grad
        assert whole is not None
        total = summed(grad, group) if spread.sum_over_tensor else grad
        errors[name] = relative_error(gather_parts(total, whole.shape, spread, grid), whole)
    if case.max_logits:
        heads = part(case.max_logits["Linear"], "rows", grid)
        error = relative_error(case.max_logits["RowParallelLinear"], heads)  # in float32 for float64 as well
        assert error <= max(1e-6, BOUNDS[x.dtype]), error
    return errors


def grid_of(ranks: int) -> RankGrid:
    """All ranks along "tensor"."""
    return RankGrid.create(GridSizes(tensor=ranks))
