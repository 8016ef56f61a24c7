"""Marries the model to the grid: builds this rank's stages of Kimi-K2.5 with parallel parts, and says how they lie.

The models know no ranks and k25sys.parallel knows no K2.5; this file puts the one's parts in the other's place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from k25sys.errors import GridError, message
from k25sys.models import KimiK25
from k25sys.models.config import KimiK25Config
from k25sys.models.decoder import DecoderLayer
from k25sys.models.moe import MixtureOfExperts
from k25sys.parallel.activation_store import SavedActivations
from k25sys.parallel.context import ContextParallelCore
from k25sys.parallel.expert import ExpertParallel, OverlappedMixtureOfExperts, Transports
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout
from k25sys.parallel.recompute import MemoryPlan, apply_memory_plan
from k25sys.parallel.weight_grads import Linear, WeightGradStore
from k25sys.training.initialize import initialize
from k25sys.training.sharding_plan import plan, swap_modules
from k25sys.training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the parts work, beside where they lie.

    Raises:
        ValueError: where the parts are made, for an unknown name.
    """

    attention: str = "sdpa"
    transport: str = "torch"
    """Of the experts' exchange: see k25sys.parallel.transport."""
    payload: str = "exact"
    """Of tokens on their way to the experts: exact, bf16 or fp8."""
    memory: tuple[str, ...] = ()
    """What is recomputed and what is stored in E4M3: see k25sys.parallel.recompute.NAMES."""
    vision: str = "stage0"
    """Where the encoder lies: "stage0", "dep" (on every rank, outside the stages) or "none"."""
    projector: str = "encoder"
    """Where the projector lies with vision "dep": "encoder", so that rows of the decoder's width travel; or "stage0":
    the tower's merged neighbourhoods travel, wider or narrower than those, and the first stage projects them, and keeps
    what the projector's backward needs of the micro-batches in flight."""
    max_patches: int = 16384
    """In a pack of the encoder."""


@dataclass(frozen=True)
class ParallelModel:
    """What one rank holds."""

    stages: Mapping[int, Stage]
    """Its stages, by their number."""
    parameters: Mapping[str, nn.Parameter]
    """Trainable ones, by their released names."""
    layouts: Mapping[str, ParameterLayout]
    weight_grads: WeightGradStore
    encoder: nn.Module | None
    """Under DEP: the vision tower, and the projector unless it lies in stage 0, on every rank."""
    row_shape: tuple[int, ...]
    """Of one row that the encoder gives: what DecoupledEncoder takes."""
    router_biases: Mapping[str, Tensor] = field(default_factory=dict)
    """Moved by balance, not by gradients."""


def parallelize(
    config: KimiK25Config,
    grid: RankGrid,
    *,
    layers_of_stage: tuple[range, ...],
    stages: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    options: ParallelOptions | None = None,
) -> ParallelModel:
    """Builds the stages of this rank with random weights that do not depend on the grid.

    Args:
        config: the whole model.
        layers_of_stage: of every stage of the pipeline, in order: all layers.
        stages: the numbers of those on this rank.
        dtype: of the weights: float32, float64 or bfloat16.
        seed: of the weights.

    Raises:
        GridError: an axis that does not divide what it splits, or layers that are not those of the model.
        ArgumentValueError: a place of the encoder or of the projector that does not exist.
    """
    options = options or ParallelOptions()
    if [index for layers in layers_of_stage for index in layers] != list(range(config.text.num_hidden_layers)):
        accepted = f"ranges that make up 0 to {config.text.num_hidden_layers - 1}"
        raise GridError(message("parallelize", "layers_of_stage", layers_of_stage, accepted))
    layouts = plan(config, grid.sizes, vision=options.vision, projector=options.projector)
    store, device = WeightGradStore(), torch.device(grid.device_type)
    transports = Transports.make(options.transport, grid)
    made, held = {}, {}
    encoder = _decoupled_encoder(config, options) if options.vision == "dep" else None
    for number in stages:
        first, last = number == 0, number == len(layers_of_stage) - 1
        with torch.device("meta"):
            model = KimiK25(config, attention=options.attention).to(dtype)
        _keep_part(model, layers_of_stage[number], first, last, options)
        _swap_parts(model, grid, store, transports, options)
        memory = SavedActivations()
        apply_memory_plan(model, MemoryPlan(names=options.memory), memory)
        model.to_empty(device=device)
        made[number] = Stage(
            model, config, grid, first=first, last=last, dtype=dtype, max_patches=options.max_patches,
            memory=memory,
        )  # fmt: skip
        held.update(_named(model))
    if encoder is not None:
        encoder = encoder.to(dtype).to_empty(device=device)
        _swap_linears(encoder, store)
        held.update(_named(encoder))
    initialize(held, layouts, sizes=grid.sizes, rank=grid.rank, seed=seed, std=config.text.initializer_range)
    biases = {name: value for name, value in held.items() if name.endswith("e_score_correction_bias")}
    trained = {name: value for name, value in held.items() if name not in biases}
    return ParallelModel(
        made, trained, {name: layouts[name] for name in held}, store, encoder, _row_shape(config, options), biases
    )


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def _decoupled_encoder(config: KimiK25Config, options: ParallelOptions) -> nn.Module:
    with torch.device("meta"):
        model = KimiK25(config, attention=options.attention)
    return DecoupledTower(model.vision_tower, model.mm_projector if options.projector == "encoder" else None)


def _row_shape(config: KimiK25Config, options: ParallelOptions) -> tuple[int, ...]:
    vision = config.vision
    if options.projector == "encoder" or vision is None:
        return (config.text.hidden_size,)
    return (prod(vision.merge_kernel_size), vision.hidden_size)


class DecoupledTower(nn.Module):
    """Vision tower and projector under their released names, as one encoder: pixels of clips to rows of embeddings.

    Without a projector the rows are the tower's.
    """

    def __init__(self, vision_tower: nn.Module, mm_projector: nn.Module | None) -> None:
        super().__init__()
        self.vision_tower, self.mm_projector = vision_tower, mm_projector

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """(P, 3, patch, patch), (N, 3) -> (Q, D), or (Q, patches of a neighbourhood, channels of the tower)."""
        rows = self.vision_tower(pixel_values, grid_thw)
        return rows if self.mm_projector is None else self.mm_projector(rows)


def _keep_part(model: KimiK25, layers: range, first: bool, last: bool, options: ParallelOptions) -> None:
    """Drops what other stages hold."""
    language_model, decoder = model.language_model, model.language_model.model
    for name in list(decoder.layers):
        if int(name) not in layers:
            del decoder.layers[name]
    if not first:
        del decoder.embed_tokens
    if not last:
        del decoder.norm, language_model.lm_head
    if model.config.vision is None:
        return
    if not (first and options.vision == "stage0"):
        del model.vision_tower
    if not (first and (options.vision == "stage0" or options.projector == "stage0")):
        del model.mm_projector


def _swap_parts(
    model: KimiK25, grid: RankGrid, store: WeightGradStore, transports: Transports, options: ParallelOptions
) -> None:
    swap_modules(model, model.config.text, grid, store)
    for layer in model.language_model.model.layers.values():
        assert isinstance(layer, DecoderLayer)
        if grid.size("context") > 1:
            layer.self_attn.core = ContextParallelCore(layer.self_attn.core, grid)  # pyright: ignore[reportAttributeAccessIssue]
        mlp = layer.mlp
        if isinstance(mlp, MixtureOfExperts):
            experts = ExpertParallel(mlp.experts, grid, store, transport=transports, payload=options.payload)
            if grid.size("expert") * grid.size("expert_tensor") == 1:
                mlp.experts = experts  # pyright: ignore[reportAttributeAccessIssue]
            else:
                layer.mlp = OverlappedMixtureOfExperts(mlp.gate, experts, mlp.shared_experts)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("vision_tower", "mm_projector"):
        if hasattr(model, name):
            _swap_linears(model.get_submodule(name), store)


def _swap_linears(module: nn.Module, store: WeightGradStore) -> None:
    """nn.Linear below `module` over deferred weight gradients."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear(child, store))
