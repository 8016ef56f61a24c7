"""Training steps of a small Kimi-K2.5 on gloo processes, recorded action by action, for benches in virtual time."""

import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.models.config import KimiK25Config, VisionConfig
from k25sys.models.presets import preset
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.activation_store import Packed
from k25sys.parallel.dep import Clip, DecoupledEncoder, DecoupledOptions, EncoderCost, Pack
from k25sys.parallel.pipeline import Action, Schedule, lower, make_schedule
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.parallel.pipeline.virtual_time import gather, measured
from k25sys.parallel.saved_bytes import SavedBytes
from k25sys.training.microbatch import MicroBatch
from k25sys.training.parallelize import ParallelModel, ParallelOptions, parallelize
from k25sys.training.stage import media_consumers
from perf.routing import default_text

NUM_LAYERS = 8
MAX_PATCHES = 512
_WARM = 2
_Ran = tuple[Schedule, tuple[Pack, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline of ranks, and what flows through it."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    tokens: int
    """Of a micro-batch, media included."""
    virtual_stages: int = 1
    vision: str = "none"
    grids: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    """(t, h, w) of the clips of each micro-batch."""

    def make(self) -> Schedule:
        """The schedule, lowered."""
        return lower(
            make_schedule(
                self.schedule,
                num_ranks=self.num_ranks,
                num_microbatches=self.num_microbatches,
                virtual_stages=self.virtual_stages,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What was measured of a case."""

    case: Case
    schedule: Schedule
    """As it ran: with vision actions under DEP."""
    seconds: list[dict[Action, float]]
    """CPU seconds of each action, of all ranks, step by step."""
    packs: tuple[Pack, ...]
    """Of the decoupled encoder, by their number."""
    row_bytes: int
    """Of an embedding that travels."""
    peak_saved_bytes: list[int]
    """By rank: the most that waited for a backward at once, counted in a step of its own."""


def config_of(case: Case) -> KimiK25Config:
    """The tiny preset with more layers, wider, and an encoder of which a row costs about a sixth of a token."""
    config = preset("tiny")
    text = replace(
        config.text, num_hidden_layers=NUM_LAYERS, hidden_size=256, moe_intermediate_size=128, intermediate_size=512,
        first_k_dense_replace=0,
    )  # fmt: skip
    vision = VisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    return replace(config, text=text, vision=None if case.vision == "none" else vision)


def microbatches(case: Case, config: KimiK25Config) -> list[MicroBatch]:
    """Real text as bytes, with the media of each micro-batch in front; pixels are noise, which costs the same."""
    media_pad = config.tokens.media_pad
    assert media_pad is not None
    ids = torch.tensor(list(default_text().encode()[: case.tokens * case.num_microbatches + 1]))
    generator, made = torch.Generator().manual_seed(0), []
    for number in range(case.num_microbatches):
        grids = case.grids[number] if case.grids else ()
        rows = sum(h * w // 4 for _, h, w in grids)
        text_T = ids[number * case.tokens : (number + 1) * case.tokens - rows]
        input_ids_T = torch.cat([torch.full((rows,), media_pad), text_T])
        patches = sum(t * h * w for t, h, w in grids)
        made.append(
            MicroBatch(
                input_ids_T=input_ids_T,
                targets_T=torch.cat([input_ids_T[1:], ids[(number + 1) * case.tokens :][:1]]),
                loss_mask_T=input_ids_T != media_pad,
                cu_seqlens=(0, len(input_ids_T)),
                normalizer=float(case.tokens * case.num_microbatches),
                pixel_values=torch.randn(patches, 3, 14, 14, generator=generator) if grids else None,
                grid_thw=torch.tensor(grids) if grids else None,
            )
        )
    return made


def record(case: Case, num_steps: int) -> Steps:
    """Runs the case in processes of its own: two steps to warm up, and `num_steps` that count."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run_rank, (case, num_steps, folder), nprocs=case.num_ranks, start_method="spawn")
        return pickle.loads(Path(folder, "steps.pickle").read_bytes())  # written by our own process, just now


def _run_rank(rank: int, case: Case, num_steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.num_ranks, timeout=timedelta(minutes=5)
    )
    grid, config, schedule, recorder = (
        RankGrid.create(GridSizes(pipeline=case.num_ranks)),
        config_of(case),
        case.make(),
        Recorder(),
    )
    per = NUM_LAYERS // schedule.num_stages
    model = parallelize(
        config, grid, layers_of_stage=tuple(range(i * per, (i + 1) * per) for i in range(schedule.num_stages)),
        stages=schedule.stages_of(rank), dtype=torch.float32, seed=1,
        options=ParallelOptions(vision=case.vision, max_patches=MAX_PATCHES),
    )  # fmt: skip
    runtime = PipelineRuntime(schedule, model.stages, grid, weight_grads=model.weight_grads, recorder=recorder)
    batches = microbatches(case, config)

    def run() -> _Ran:
        runtime.step(batches)
        return schedule, ()

    step = _decoupled(runtime, batches, model, grid, config) if case.vision == "dep" else run
    seconds, ran = [], (schedule, ())
    for _ in range(_WARM + num_steps):
        dist.barrier()
        recorder.begin()
        ran = step()
        seconds.append(measured(gather(recorder, grid)))
    peaks = [0] * case.num_ranks
    dist.all_gather_object(peaks, _peak_saved_bytes(step, model))
    if rank == 0:
        steps = Steps(
            case=case, schedule=ran[0], seconds=seconds[_WARM:], packs=ran[1], peak_saved_bytes=peaks,
            row_bytes=4 * config.text.hidden_size,
        )  # fmt: skip
        Path(folder, "steps.pickle").write_bytes(pickle.dumps(steps))
    dist.barrier()
    dist.destroy_process_group()


def _peak_saved_bytes(step: Callable[[], _Ran], model: ParallelModel) -> int:
    """Of one step."""
    saved, peak = SavedBytes(model.parameters.values()), 0

    def record(packed: Packed) -> None:
        nonlocal peak
        saved.record(packed)
        peak = max(peak, saved.total)

    def pack(tensor: Tensor) -> Tensor:
        record(Packed((tensor,)))
        return tensor

    for stage in model.stages.values():
        stage.memory.on_packed = record
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # of an encoder outside the stages
        step()
    return peak


def _decoupled(
    runtime: PipelineRuntime[MicroBatch], batches: list[MicroBatch], model: ParallelModel, grid: RankGrid,
    config: KimiK25Config,
) -> Callable[[], _Ran]:  # fmt: skip
    """Steps with the decoupled encoder, all three phases."""
    vision, media_pad = config.vision, config.tokens.media_pad
    assert model.encoder is not None
    assert vision is not None
    assert media_pad is not None
    options = DecoupledOptions(
        cost=EncoderCost.from_sizes(
            dim=vision.hidden_size, mlp_dim=vision.intermediate_size, num_layers=vision.num_hidden_layers
        ),
        max_patches=MAX_PATCHES,
    )
    encoder = DecoupledEncoder(
        model.encoder, grid, row_shape=(config.text.hidden_size,),
        rows_of=lambda clip: clip.grid[1] * clip.grid[2] // 4, dtype=torch.float32, options=options,
    )  # fmt: skip
    pixels, first = _pixels_of(batches), grid.ranks("pipeline")[0]

    def consumers(_: int, number: int) -> Tensor:
        return media_consumers(batches[number], media_pad, grid, first)

    def run() -> _Ran:
        plan = encoder.plan(pixels)
        encoder.begin(plan, consumers, pixels.__getitem__)
        fed = [replace(batch, pixel_values=None, media=encoder.media(m)) for m, batch in enumerate(batches)]
        schedule = encoder.schedule(runtime.schedule)
        runtime.step(fed, schedule=schedule, hooks=encoder.hooks())
        encoder.finish()
        return schedule, plan.packs

    return run


def _pixels_of(batches: list[MicroBatch]) -> Mapping[Clip, Tensor]:
    pixels: dict[Clip, Tensor] = {}
    for number, batch in enumerate(batches):
        if batch.pixel_values is not None and batch.grid_thw is not None:
            grids: list[Any] = [tuple(thw) for thw in batch.grid_thw.tolist()]
            parts = batch.pixel_values.split([t * h * w for t, h, w in grids])
            pixels |= {
                Clip(0, number, index, grid): part for index, (grid, part) in enumerate(zip(grids, parts, strict=True))
            }
    return pixels
