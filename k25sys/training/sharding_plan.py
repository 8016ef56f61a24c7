"""How each parameter of Kimi-K2.5 is spread over a RankGrid, and which module is replaced by which: as data.

Gradients of a parameter are sums over its layout's `replicas` axis, and over "tensor" too where a tensor rank sees a
part of what the parameter acts on (`sum_over_tensor`):
    q_a_proj, kv_a_proj_with_mqa, router, norms between layers    its own tokens (sequence parallelism)
    q_a_layernorm, kv_a_layernorm                                 all tokens, but the gradient of its own heads only
    vision tower and projector, in stage 0                        the media rows among its own tokens (dep.splice)
Nothing is left out or counted twice: a sum over the tensor ranks of parts is the whole, for all three.

The vision encoder runs in whole on every rank of the first pipeline stage, and its gradients are of that kind. There is
another exact way: gather the gradient of the features, so that every tensor rank has all of it, and sum nothing over
"tensor". It would let copies drift apart by the rounding of backward kernels that are not deterministic on CUDA (the
resize of the learned positions), and sends the gradient of every row in each micro-batch instead of one sum a step.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from k25sys.errors import ArgumentValueError, GridError, message
from k25sys.models import KimiK25, KimiK25Config
from k25sys.models.config import TextConfig
from k25sys.models.moe import SwiGLU
from k25sys.parallel.grid import GridSizes, RankGrid
from k25sys.parallel.layout import ParameterLayout
from k25sys.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceGatheredLinear,
    TensorParallelSwiGLU,
)
from k25sys.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead
from k25sys.parallel.weight_grads import WeightGradStore

_TEXT = r"language_model\.model\."
_LAYER = _TEXT + r"layers\.\d+\."
_ATTENTION = _LAYER + r"self_attn\."
_BLOCK = r"vision_tower\.encoder\.blocks\.\d+\."
_ROWS, _COLUMNS = ((0, "tensor"),), ((1, "tensor"),)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """The layout of the parameters whose whole name matches; fields as in ParameterLayout."""

    pattern: str
    splits: tuple[tuple[int, str], ...] = ()
    stacked: tuple[int, int] | None = None
    """(dim, matrices): dimension `dim` holds as many matrices one after the other, each a dimension of the view."""
    matrix: bool = False
    expert: bool = False
    sum_over_tensor: bool = False

    def layout(self, shape: tuple[int, ...]) -> ParameterLayout:
        if self.stacked is not None:
            dim, matrices = self.stacked
            shape = (*shape[:dim], matrices, shape[dim] // matrices, *shape[dim + 1 :])
        return ParameterLayout(
            shape=shape, splits=self.splits, matrix=self.matrix, expert=self.expert,
            sum_over_tensor=self.sum_over_tensor,
        )  # fmt: skip


LAYOUTS: tuple[_Rule, ...] = (
    _Rule(pattern=_TEXT + r"embed_tokens\.weight", splits=_ROWS),
    _Rule(pattern=r"language_model\.lm_head\.weight", splits=_ROWS),
    _Rule(pattern=_TEXT + r"norm\.weight", sum_over_tensor=True),
    _Rule(pattern=_LAYER + r"(input|post_attention)_layernorm\.weight", sum_over_tensor=True),
    # attention: heads over tensor; the latents of all heads on every rank
    _Rule(pattern=_ATTENTION + r"(q_proj|q_b_proj|kv_b_proj)\.weight", splits=_ROWS, matrix=True),
    _Rule(pattern=_ATTENTION + r"o_proj\.weight", splits=_COLUMNS, matrix=True),
    _Rule(pattern=_ATTENTION + r"(q_a_proj|kv_a_proj_with_mqa)\.weight", matrix=True, sum_over_tensor=True),
    _Rule(pattern=_ATTENTION + r"(q_a|kv_a)_layernorm\.weight", sum_over_tensor=True),
    # dense layers and shared experts: width over tensor
    _Rule(pattern=_LAYER + r"mlp\.(shared_experts\.)?(gate|up)_proj\.weight", splits=_ROWS, matrix=True),
    _Rule(pattern=_LAYER + r"mlp\.(shared_experts\.)?down_proj\.weight", splits=_COLUMNS, matrix=True),
    # routed experts: experts over expert, the width of each over expert_tensor
    _Rule(pattern=_LAYER + r"mlp\.gate\.weight", matrix=True, sum_over_tensor=True),
    _Rule(pattern=_LAYER + r"mlp\.gate\.e_score_correction_bias"),  # without a gradient: balancing moves every copy
    _Rule(
        pattern=_LAYER + r"mlp\.experts\.gate_up_proj",
        stacked=(1, 2), splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True,
    ),
    _Rule(
        pattern=_LAYER + r"mlp\.experts\.down_proj",
        splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True,
    ),
    # vision: the matrices of the linear layers; pixels, positions, norms and biases are none
    _Rule(pattern=_BLOCK + r"wqkv\.weight", stacked=(0, 3), matrix=True, sum_over_tensor=True),
    _Rule(pattern=_BLOCK + r"(wo|mlp\.fc0|mlp\.fc1)\.weight", matrix=True, sum_over_tensor=True),
    _Rule(pattern=r"mm_projector\.proj\.[02]\.weight", matrix=True, sum_over_tensor=True),
    _Rule(pattern=r"vision_tower\.patch_embed\.(proj|pos_emb)\.weight", sum_over_tensor=True),
    _Rule(pattern=r"(vision_tower|mm_projector)\..*(norm\d?\.weight|\.bias)", sum_over_tensor=True),
)  # fmt: skip
"""Every parameter of KimiK25 matches exactly one of these."""


def plan(
    config: KimiK25Config, sizes: GridSizes, *, vision: str = "stage0", projector: str = "encoder"
) -> dict[str, ParameterLayout]:
    """The layout of every parameter of KimiK25(config), all pipeline stages together, in the model's order.

    Args:
        vision: "stage0" as above; "dep": the encoder lies on every rank of the grid, each of which sees the gradients
            of its own packs; "none": it is left out.
        projector: with vision "dep", "encoder": it lies with the encoder; "stage0": in the first stage, as above.

    Raises:
        GridError: heads, vocabulary, widths or experts that an axis of `sizes` does not divide.
        ArgumentValueError: another `vision` or `projector`, or a projector apart from an encoder in a stage.
    """
    if vision not in ("stage0", "dep", "none"):
        raise ArgumentValueError(message("plan", "vision", repr(vision), "'stage0', 'dep' or 'none'"))
    if projector not in ("encoder", "stage0"):
        raise ArgumentValueError(message("plan", "projector", repr(projector), "'encoder' or 'stage0'"))
    if projector == "stage0" and vision != "dep":
        got, accepted = f"'stage0' with vision {vision!r}", "'encoder', or vision 'dep'"
        raise ArgumentValueError(message("plan", "projector", got, accepted))
    heads, ranks = config.text.num_attention_heads, sizes.tensor
    if heads % ranks:
        raise GridError(
            message("plan", "num_attention_heads", f"{heads} over {ranks} tensor ranks", f"a multiple of {ranks}")
        )
    with torch.device("meta"):
        model = KimiK25(config)
    layouts = {name: parameter_layout(name, tuple(p.shape)) for name, p in model.named_parameters()}
    encoder = [name for name in layouts if not name.startswith("language_model.")]
    for name in encoder:
        if projector == "stage0" and name.startswith("mm_projector."):
            continue
        if vision == "dep":
            layouts[name] = replace(layouts[name], sum_over_tensor=False, everywhere=True)
        elif vision == "none":
            del layouts[name]
    for name, layout in layouts.items():
        layout.check(name, sizes)
    return layouts


def parameter_layout(name: str, shape: tuple[int, ...]) -> ParameterLayout:
    """The layout of the parameter called `name`, of that shape as a whole."""
    rules = [rule for rule in LAYOUTS if re.fullmatch(rule.pattern, name)]
    assert len(rules) == 1, f"{name} matches {[rule.pattern for rule in rules]}"
    layout = rules[0].layout(shape)
    assert prod(layout.shape) == prod(shape), (name, shape)
    return layout


@dataclass(frozen=True, kw_only=True)
class _Swap:
    """Modules of one type whose whole name matches, and what replaces them."""

    pattern: str
    replaces: type[nn.Module]
    make: Callable[[Any, TextConfig, RankGrid, WeightGradStore], nn.Module]


SWAPS: tuple[_Swap, ...] = (
    _Swap(
        pattern=_TEXT + r"embed_tokens", replaces=nn.Embedding,
        make=lambda layer, _, grid, __: VocabParallelEmbedding(layer, grid, scatter_output=True),
    ),
    _Swap(
        pattern=r"language_model\.lm_head", replaces=nn.Linear,
        make=lambda layer, _, grid, store: VocabParallelHead(layer, grid, store),
    ),
    _Swap(
        pattern=_ATTENTION + r"(q_a_proj|kv_a_proj_with_mqa)", replaces=nn.Linear,
        make=lambda layer, _, grid, store: SequenceGatheredLinear(layer, grid, store),
    ),
    _Swap(
        pattern=_ATTENTION + r"q_proj", replaces=nn.Linear,
        make=lambda layer, text, grid, store: ColumnParallelLinear(
            layer, grid, store, gather_input=True, unit=text.qk_head_dim
        ),
    ),
    _Swap(
        pattern=_ATTENTION + r"q_b_proj", replaces=nn.Linear,
        make=lambda layer, text, grid, store: ColumnParallelLinear(
            layer, grid, store, gather_input=False, unit=text.qk_head_dim
        ),
    ),
    _Swap(
        pattern=_ATTENTION + r"kv_b_proj", replaces=nn.Linear,
        make=lambda layer, text, grid, store: ColumnParallelLinear(
            layer, grid, store, gather_input=False, unit=text.qk_nope_head_dim + text.v_head_dim
        ),
    ),
    _Swap(
        pattern=_ATTENTION + r"o_proj", replaces=nn.Linear,
        make=lambda layer, text, grid, store: RowParallelLinear(
            layer, grid, store, reduce_scatter_output=True, unit=text.v_head_dim
        ),
    ),
    _Swap(
        pattern=_LAYER + r"mlp(\.shared_experts)?", replaces=SwiGLU,
        make=lambda swiglu, _, grid, store: TensorParallelSwiGLU(swiglu, grid, store),
    ),
)  # fmt: skip
"""Norms, router and vision encoder stay as they are; routed experts are swapped with the dispatcher's options."""


def swap_modules(model: nn.Module, text: TextConfig, grid: RankGrid, store: WeightGradStore) -> None:
    """Replaces modules of `model` by their parallel counterparts, in place.

    Args:
        model: KimiK25, or a part of it whose parameters have the same names; on any device, meta included.
        text: its sizes.
        grid: "tensor" is the axis that is read; with one rank the same modules compute what the plain ones do.
        store: of the weight gradients.

    Raises:
        GridError: sizes that the tensor ranks do not divide.
    """
    for name, module in list(model.named_modules()):
        for swap in SWAPS:
            if isinstance(module, swap.replaces) and re.fullmatch(swap.pattern, name):
                model.set_submodule(name, swap.make(module, text, grid, store))
