"""What a rank of stage 0 holds during the backbone's pass does not grow with the media of the step (DEP)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.dep import DecoupledEncoder
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.ir import Kind
from k25sys.parallel.pipeline.lowering import lower
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.training.microbatch import MicroBatch
from k25sys.training.parallelize import ParallelModel, ParallelOptions, parallelize
from tests.parallel.processes import run_ranks
from tests.training.batches import draft, small_config
from tests.training.test_steps import case, decouple, media_of

MICROBATCHES, TOKENS, DTYPE = 6, 64, torch.float64
IMAGE, VIDEO, GIANT = (1, 8, 12), (4, 8, 12), (1, 12, 16)
"""24, 24 and 48 rows; of 64 tokens, two of the former or one of the latter."""
MIXES: dict[str, list[list[tuple[int, int, int]]]] = {
    "no images": [[]] * MICROBATCHES,
    "few": [[], [], [(1, 4, 6)], [], [IMAGE], []],
    "one giant": [[], [], [GIANT], [], [], []],
    "many": [[IMAGE, IMAGE], [IMAGE, VIDEO]] * (MICROBATCHES // 2),
}
ROW_BYTES = 32 * DTYPE.itemsize
MOST_ROWS = 48
"""Of one micro-batch, in any mix."""


class PeakBytes(TorchDispatchMode):
    """Looked at after each operation while `looking`: the most that `decoupled` holds for stage 0; with `all_memory`
    also the largest sum of what operations made and is alive."""

    def __init__(self, decoupled: DecoupledEncoder, *, all_memory: bool) -> None:
        super().__init__()
        self.decoupled, self.all_memory = decoupled, all_memory
        self.looking, self.peak, self.consumer_peak = False, 0, 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self.looking:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.looking:
            self.consumer_peak = max(self.consumer_peak, self.decoupled.bytes_held_by_consumer)
            if self.all_memory:
                self._made = {address: made for address, made in self._made.items() if not made[0].expired()}
                self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result

    def not_looking(self, hook: Callable[[int], None]) -> Callable[[int], None]:
        """`hook`, of an encoder's own pass: phases (a) and (c) are bounded by the size of a pack."""

        def paused(number: int) -> None:
            before, self.looking = self.looking, False
            hook(number)
            self.looking = before

        return paused


def _batches(mix: str) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    return [MicroBatch(**draft(TOKENS, clips, DTYPE, generator), normalizer=100.0) for clips in MIXES[mix]]


@dataclass(frozen=True)
class Peak:
    """Bytes of a rank during the backbone's pass."""

    all: int
    """0 where it was not looked at: that takes its time."""
    consumer: int
    """Of them, media that it holds as a rank of stage 0."""
    share: int
    """Rows that it has encoded itself, as every rank does, or their gradients."""


def _peak(grid: RankGrid, schedule_name: str, mix: str) -> Peak:
    virtual = 2 if schedule_name.startswith("interleaved") else 1
    schedule = make_schedule(
        schedule_name, num_ranks=grid.size("pipeline"), num_microbatches=MICROBATCHES, virtual_stages=virtual
    )
    layers = max(4, schedule.num_stages)
    config, per, options = small_config(layers=layers), layers // schedule.num_stages, ParallelOptions(vision="dep")
    model: ParallelModel = parallelize(
        config, grid, layers_of_stage=tuple(range(i * per, (i + 1) * per) for i in range(schedule.num_stages)),
        stages=schedule.stages_of(grid.index("pipeline")), dtype=DTYPE, seed=1, options=options,
    )  # fmt: skip
    runtime = PipelineRuntime(lower(schedule), model.stages, grid, weight_grads=model.weight_grads)
    decoupled = decouple(case(), model, grid, DTYPE)
    batches = _batches(mix)
    media = media_of([batches], grid, decoupled)
    decoupled.begin(media.plan, media.consumers, media.load_pixels)
    share = sum(clip.grid[1] * clip.grid[2] // 4 for pack in media.plan.packs_of(grid.rank) for clip in pack.clips)
    fed = [replace(batch, pixel_values=None, media=decoupled.media(i)) for i, batch in enumerate(batches)]
    peak, hooks = PeakBytes(decoupled, all_memory=schedule_name == "1f1b"), decoupled.hooks()
    for kind in (Kind.VISION_FORWARD, Kind.VISION_BACKWARD):
        hooks[kind] = peak.not_looking(hooks[kind])
    with peak:
        peak.looking = True
        runtime.step(fed, schedule=decoupled.schedule(runtime.schedule), hooks=hooks)
    decoupled.finish()
    return Peak(peak.peak, peak.consumer_peak, share * ROW_BYTES)


def _check(sizes: GridSizes, schedule_name: str) -> dict[str, Peak]:
    torch.set_num_threads(1)
    grid = RankGrid.create(sizes)
    return {mix: _peak(grid, schedule_name, mix) for mix in MIXES}


@pytest.mark.parametrize(("ranks", "schedule_name"), [(2, "1f1b"), (2, "gpipe"), (4, "interleaved_1f1b"), (4, "zb_h1")])
def test_stage0_does_not_hold_the_media_of_a_step(ranks: int, schedule_name: str) -> None:
    """Two micro-batches' rows, the one in use and the next, and one's gradients, whatever the step has. Beside them a
    rank of stage 0 has its share of what all ranks encode, and the backbone's own activations are those of text."""
    found = run_ranks(ranks, _check, GridSizes(pipeline=ranks), schedule_name)[0]
    microbatch = MOST_ROWS * ROW_BYTES
    text = found["no images"]
    for mix, peak in found.items():
        print(mix, peak, f"{(peak.all - text.all) / microbatch:.2f} {peak.consumer / microbatch:.2f}")
        assert peak.consumer <= 3 * microbatch, mix
        assert peak.all <= text.all + peak.share + 3 * microbatch, mix
    assert (text.all > 0) == (schedule_name == "1f1b")
    assert text.consumer == text.share == 0
    assert 0 < found["one giant"].consumer <= microbatch
