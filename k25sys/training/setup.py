"""A run's configuration and grid to the parts that train: model, runtime, optimiser, encoder, data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from k25sys.data import Loader, Mixture, PackedSequence, TokenStream
from k25sys.errors import ConfigError, GridError, message
from k25sys.models import KimiK25Config
from k25sys.models.moe import MixtureOfExperts
from k25sys.optim import MuonClipConfig, ParameterGroup, ZeroOptimizer
from k25sys.optim.schedules import WSD
from k25sys.parallel import RankGrid
from k25sys.parallel.balance import ExpertBalancer
from k25sys.parallel.dep import DecoupledEncoder, DecoupledOptions, EncoderCost
from k25sys.parallel.expert import OverlappedMixtureOfExperts
from k25sys.parallel.faults import Monitor
from k25sys.parallel.pipeline import lower, make_schedule
from k25sys.parallel.pipeline.placement import place_layers
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.planner.costs import head_work, layer_work
from k25sys.training.batches import BatchMaker
from k25sys.training.config import RunConfig
from k25sys.training.microbatch import MicroBatch
from k25sys.training.parallelize import ParallelModel, ParallelOptions, parallelize
from k25sys.training.pixels import PixelCache
from k25sys.training.reading import SourceThread, StepReader
from k25sys.training.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one rank trains with."""

    model_config: KimiK25Config
    model: ParallelModel
    optimizer: ZeroOptimizer
    step: TrainStep
    rates: WSD
    """Learning rates by step."""
    reader: StepReader
    batches: BatchMaker
    """Of the reader, and for `validation`."""
    validation: Mapping[str, tuple[tuple[PackedSequence, ...], ...]]
    """By kind, this data rank's sequences of each batch."""


def build(
    config: RunConfig,
    model_config: KimiK25Config,
    mixture: Mixture,
    grid: RankGrid,
    *,
    validation: Mapping[str, Mixture] | None = None,
    monitor: Monitor | None = None,
    recorder: Recorder | None = None,
) -> Parts:
    """All of it, with the weights that the seed gives. Collective over the grid.

    Args:
        validation: by kind, what is held out; its first batches are read once, where config.validation.every asks.

    Raises:
        ConfigError, GridError, ScheduleError: sizes that do not fit each other; says which.
    """
    dtype, decoupled = DTYPES[config.precision], config.vision.mode == "dep" and model_config.vision is not None
    own = _sequences_of(config, grid)
    microbatches = config.pipeline.microbatches or len(own)
    schedule = make_schedule(
        config.pipeline.schedule, num_ranks=grid.size("pipeline"), num_microbatches=microbatches,
        virtual_stages=config.pipeline.virtual_stages, extra_warmup=config.pipeline.extra_warmup,
    )  # fmt: skip
    mode = "none" if model_config.vision is None else config.vision.mode
    model = parallelize(
        model_config, grid, layers_of_stage=_layers_of_stage(model_config, schedule.num_stages, config),
        stages=schedule.stages_of(grid.index("pipeline")), dtype=dtype, seed=config.seed,
        options=ParallelOptions(
            attention=config.parallelism.attention, transport=config.parallelism.transport,
            payload=config.parallelism.payload, memory=config.parallelism.memory, vision=mode,
            max_patches=config.vision.max_patches, projector=config.vision.projector,
        ),
    )  # fmt: skip
    optimizer = _optimizer(config, model, grid)
    runtime: PipelineRuntime[MicroBatch] = PipelineRuntime(
        lower(schedule), model.stages, grid, weight_grads=model.weight_grads, monitor=monitor, recorder=recorder
    )
    encoder = _encoder(config, model_config, model, grid) if decoupled else None
    step = TrainStep(
        model, runtime, optimizer, grid, balancer=_balancer(config, model, grid), decoupled=encoder
    )  # fmt: skip
    tokens = model_config.tokens
    held_out = validation if validation is not None and config.validation.every is not None else {}
    sources = {mixed.name: mixed.source for each in (mixture, *held_out.values()) for mixed in each.sources}
    thread = SourceThread()
    batches = BatchMaker(
        PixelCache(sources, thread), grid, microbatches=microbatches, media_pad=tokens.media_pad,
        plan=None if encoder is None else encoder.plan, dtype=dtype,
    )  # fmt: skip
    optimizer_options = config.optimizer
    rates = WSD(
        peak=optimizer_options.learning_rate, final=optimizer_options.final_learning_rate,
        warmup_steps=optimizer_options.warmup_steps, stable_steps=optimizer_options.stable_steps,
        decay_steps=optimizer_options.decay_steps,
    )  # fmt: skip
    return Parts(
        model_config=model_config, model=model, optimizer=optimizer, step=step, rates=rates, batches=batches,
        reader=StepReader(_loader(config, model_config, mixture, own), batches, thread),
        validation={name: _first_batches(config, model_config, each, own) for name, each in held_out.items()},
    )  # fmt: skip


def _sequences_of(config: RunConfig, grid: RankGrid) -> range:
    """The numbers of the sequences of the global batch that this data rank has."""
    count, data = config.batch.sequences, grid.size("data")
    if count % data:
        raise GridError(message("run", "grid.data", data, f"a divisor of batch.sequences, {count}"))
    per = count // data
    microbatches = config.pipeline.microbatches
    if microbatches is not None and (microbatches < 1 or per % microbatches):
        raise GridError(message("run", "pipeline.microbatches", microbatches, f"a divisor of {per} sequences a rank"))
    return range(grid.index("data") * per, (grid.index("data") + 1) * per)


def _layers_of_stage(model_config: KimiK25Config, num_stages: int, config: RunConfig) -> tuple[range, ...]:
    """By forward FLOPs a token; the encoder's, which the data decide, are not among them."""
    text, length = model_config.text, config.batch.sequence_length
    costs = [layer_work(text, layer, length).flops for layer in range(text.num_hidden_layers)]
    return place_layers(costs, num_stages, last_extra=head_work(text).flops)


def _optimizer(config: RunConfig, model: ParallelModel, grid: RankGrid) -> ZeroOptimizer:
    options = config.optimizer
    # A micro-batch has any number of packs, and each of them gives the encoder a gradient.
    names = [name for name in model.parameters if not name.startswith("language_model.")]
    return ZeroOptimizer(
        model.parameters, model.layouts, grid,
        MuonClipConfig(
            weight_decay=options.weight_decay, max_logit=options.max_logit,
            max_gradient_norm=options.max_gradient_norm,
            newton_schulz_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        ),
        groups=[ParameterGroup(pattern=pattern, frozen=True) for pattern in options.frozen],
        adamw=options.adamw,
        irregular=names,
    )  # fmt: skip


def _balancer(config: RunConfig, model: ParallelModel, grid: RankGrid) -> ExpertBalancer:
    routers = {}
    for stage in model.stages.values():
        for number, layer in zip(stage.layer_numbers, stage.layers, strict=True):
            if isinstance(layer.mlp, (MixtureOfExperts, OverlappedMixtureOfExperts)):
                routers[f"layers.{number}.mlp.gate"] = layer.mlp.gate
    return ExpertBalancer(routers, grid, rate=config.optimizer.balance_rate)


def _encoder(
    config: RunConfig, model_config: KimiK25Config, model: ParallelModel, grid: RankGrid
) -> DecoupledEncoder:  # fmt: skip
    vision = model_config.vision
    assert vision is not None
    assert model.encoder is not None
    merge = vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
    cost = EncoderCost.from_sizes(
        dim=vision.hidden_size, mlp_dim=vision.intermediate_size, num_layers=vision.num_hidden_layers
    )
    options = DecoupledOptions(
        cost=cost, max_patches=config.vision.max_patches, deterministic=config.vision.deterministic,
        prefetch=config.vision.prefetch, ranks_per_node=config.vision.ranks_per_node,
        trainable=any(parameter.requires_grad for parameter in model.encoder.parameters()),
    )  # fmt: skip
    return DecoupledEncoder(
        model.encoder, grid, row_shape=model.row_shape,
        rows_of=lambda clip: clip.grid[1] * clip.grid[2] // merge, dtype=DTYPES[config.precision], options=options,
    )  # fmt: skip


def _first_batches(
    config: RunConfig, model_config: KimiK25Config, mixture: Mixture, own: range
) -> tuple[tuple[PackedSequence, ...], ...]:
    # The same documents for every seed, so that runs of several seeds can be compared.
    loader = _loader(replace(config, seed=0, data=replace(config.data, workers=0)), model_config, mixture, own)
    return tuple(tuple(loader.next_step()) for _ in range(config.validation.batches))


def _loader(config: RunConfig, model_config: KimiK25Config, mixture: Mixture, own: range) -> Loader:
    ids = model_config.tokens.named()
    pad = ids.get("pad")
    media_pad = model_config.tokens.media_pad
    if pad is None or media_pad is None:
        raise ConfigError(message("run", "preset", f"{config.preset} without pad or media_pad", "a model with both"))
    streams = [
        TokenStream(
            mixture, number=number, num_streams=config.batch.sequences, sequence_length=config.batch.sequence_length,
            num_sequences=config.steps * config.batch.sequences, seed=config.seed, pad=pad, media_pad=media_pad,
        )
        for number in own
    ]  # fmt: skip
    return Loader(streams, workers=config.data.workers)
