"""One large image over context ranks: rows of neighbourhoods, the encoder against one process, errors."""

import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, GridError, ShapeError
from k25sys.models.attention_core import AttentionCore
from k25sys.models.config import VisionConfig
from k25sys.models.documents import Documents, Packing
from k25sys.models.moonvit import ClipRows, MoonViT3D, PatchMergerProjector
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.context import ContextParallelCore
from k25sys.parallel.image_context import ShardedClips, gather_neighbourhoods, shard_clips, split_patches
from tests.parallel.processes import run_ranks
from tests.parallel.tally import Tally

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
one_clip = st.tuples(st.integers(1, 3), st.integers(1, 5).map(lambda n: 2 * n), st.integers(1, 4).map(lambda n: 2 * n))


@st.composite
def sharded(draw: st.DrawFn) -> ShardedClips:
    """Any clips, cut for any rank of up to 5."""
    size = draw(st.integers(1, 5))
    clips = tuple(draw(st.lists(one_clip, max_size=4)))
    return ShardedClips(clips, CPU, size, draw(st.integers(0, size - 1)))


def _rows(parts: tuple[range, ...]) -> list[int]:
    return [row for part in parts for row in part]


@given(clips=sharded())
def test_ranks_have_whole_neighbourhoods_of_all_frames_and_see_whole_clips(clips: ShardedClips) -> None:
    num_patches = sum(t * h * w for t, h, w in clips.clips)
    assert sorted(row for owned in clips.owned for row in _rows(owned)) == list(range(num_patches))
    origin = [(i, f, y, x) for i, (t, h, w) in enumerate(clips.clips)
              for f in range(t) for y in range(h) for x in range(w)]  # fmt: skip
    mine, gathered = _rows(clips.owned[clips.index]), _rows(clips.exchange.needed[clips.index])
    assert mine == sorted(mine)
    assert clips.num_rows == len(mine)
    held = {origin[row] for row in mine}
    for i, f, y, x in held:
        t, _, _ = clips.clips[i]
        cell = {(i, frame, y // 2 * 2 + dy, x // 2 * 2 + dx) for frame in range(t) for dy in (0, 1) for dx in (0, 1)}
        assert cell <= held
        assert y in clips.rows[i]
        assert f < t
    covered = []
    for rows, keys in clips.pieces:
        covered += list(rows)
        clip = origin[mine[rows.start]][0]
        assert {origin[mine[row]][0] for row in rows} == {clip}
        assert [origin[gathered[key]] for key in keys] == [place for place in origin if place[0] == clip]
    assert covered == list(range(len(mine)))
    assert len(gathered) == sum(len(keys) for _, keys in clips.pieces)


@given(clips=sharded())
def test_rows_of_neighbourhoods_are_even(clips: ShardedClips) -> None:
    by_rank = [sum(len(part) // 2 for part in parts) for parts in clips.rows_by_rank]
    assert max(by_rank) - min(by_rank) <= 1


@settings(max_examples=40)
@given(clips=sharded(), seed=st.integers(0, 999), implementation=st.sampled_from(("sdpa", "flex")))
def test_patches_attend_to_their_clip(clips: ShardedClips, seed: int, implementation: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(clips.num_all_rows, 2, 8, generator=generator) for _ in range(3))
    core = AttentionCore(implementation, scale=0.3, causal=False)
    packing: Packing = clips
    gathered = _rows(clips.exchange.needed[clips.index])
    got = core(split_patches(q, clips), k[gathered], v[gathered], packing)
    whole = AttentionCore("sdpa", scale=0.3, causal=False)(
        q, k, v, Documents(tuple(t * h * w for t, h, w in clips.clips), CPU)
    )
    torch.testing.assert_close(got, split_patches(whole, clips), rtol=1e-5, atol=1e-6)


class _Vision(nn.Module):
    """The encoder and the projector, whose rows of all ranks are joined where a grid is given."""

    def __init__(self) -> None:
        super().__init__()
        config = VisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, patch_size=2,
            position_height=5, position_width=6,
        )  # fmt: skip
        self.tower = MoonViT3D(config)
        self.projector = PatchMergerProjector(config, 8)

    def forward(self, pixels: Tensor, grid_thw: Tensor, part: ShardedClips | None, grid: RankGrid) -> Tensor:
        rows: ClipRows | None = part
        y_QD = self.projector(self.tower(pixels, grid_thw, part=rows))
        return y_QD if part is None else gather_neighbourhoods(y_QD, part, grid)


def _gradients(module: nn.Module, out: Tensor, targets: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (out * targets).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def _clips(generator: random.Random, size: int) -> list[tuple[int, int, int]]:
    """One of: a large image, a video of a large frame, fewer rows than ranks, several clips."""
    kind = generator.randrange(4)
    if kind < 2:
        return [(1 + kind * generator.randint(1, 3), 2 * generator.randint(size, 8), 2 * generator.randint(1, 4))]
    if kind == 2:
        return [(generator.randint(1, 2), 2 * generator.randint(1, size - 1), 2 * generator.randint(2, 5))]
    return [(generator.randint(1, 4), *(2 * generator.randint(1, 4) for _ in "hw")) for _ in range(3)]  # type: ignore


@dataclass
class _Found(Tally):
    """What a rank has found over many images."""

    num_empty: int = 0


def _against_one_process(dtype: torch.dtype, most: float, seeds: range) -> _Found:
    """Projected neighbourhoods of all ranks and gradients, against one process's, the loss cut over the ranks."""
    size = dist.get_world_size()
    grid = RankGrid.create(GridSizes(context=size))
    group, tally = grid.group("context"), _Found()
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        module = _Vision().to(dtype)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.normal_(0.0, scale, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        clips = _clips(random.Random(seed), size)
        pixels = torch.randn(sum(t * h * w for t, h, w in clips), 3, 2, 2, generator=generator, dtype=dtype)
        grid_thw, exactly = torch.tensor(clips), deepcopy(module).double()
        exact_out = exactly(pixels.double(), grid_thw, None, grid)
        want_out = module(pixels, grid_thw, None, grid)
        targets = torch.rand(want_out.shape, generator=generator, dtype=dtype)
        exact, want = _gradients(exactly, exact_out, targets.double()), _gradients(module, want_out, targets)
        blocks: Any = module.tower.encoder.blocks
        for block in blocks:
            block.core = ContextParallelCore(block.core, grid)
        part = shard_clips(grid_thw, CPU, grid)
        out = module(split_patches(pixels, part), grid_thw, part, grid)
        # Each rank's loss is that of some of the rows, as the tokens of a context rank are.
        here = torch.arange(len(targets)) % size == grid.rank
        got = _gradients(module, out, targets * here[:, None])
        for name, gradient in got.items():
            total = gradient.double()
            dist.all_reduce(total, group=group)
            got[name] = total.to(dtype)
        tally.add({**got, "out": out}, {**want, "out": want_out}, {**exact, "out": exact_out}, most)
        tally.num_empty += part.num_rows == 0
        # A packing whose clips are whole here is encoded without the other ranks.
        assert torch.equal(module(pixels, grid_thw, None, grid), want_out)
    return tally


_CASES = [(torch.float64, 1e-13, range(14)), (torch.float32, 1e-6, range(14))]


def _all_cases() -> list[_Found]:
    return [_against_one_process(*case) for case in _CASES]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_encoder_equals_one_process(size: int) -> None:
    for (dtype, most, _), tallies in zip(_CASES, zip(*run_ranks(size, _all_cases), strict=True), strict=True):
        print(f"{size} ranks in {dtype}: {tallies[0]}")
        assert all(tally.error <= most and tally.num_rounded <= 0.01 * tally.num_tensors for tally in tallies)
        assert sum(tally.num_empty for tally in tallies) >= 2


def test_parts_that_do_not_fit_are_refused() -> None:
    tower = _Vision().tower
    grid_thw = torch.tensor([(1, 8, 4)])
    part = ShardedClips(((1, 8, 4),), CPU, 2, 0)
    with pytest.raises(ShapeError, match=r"got 32 patches, accepted 16 patches, .* in part.rows"):
        tower(torch.zeros(32, 3, 2, 2), grid_thw, part=part)
    with pytest.raises(ArgumentValueError, match=r"part.rows: got \(range\(0, 4\),\), accepted a range .* each of 2"):
        tower(torch.zeros(16, 3, 2, 2), torch.tensor([(1, 8, 4), (1, 2, 2)]), part=part)
    with pytest.raises(ArgumentValueError, match="accepted a range of rows within each of 1 clips, from one multiple"):
        tower(torch.zeros(16, 3, 2, 2), torch.tensor([(1, 2, 4)]), part=part)
    with pytest.raises(ShapeError, match=r"RowExchange: rows: got 5 rows, accepted 4"):
        gather_neighbourhoods(torch.zeros(5, 1), part, RankGrid.create(GridSizes()))
    with pytest.raises(GridError, match="got a group of 1, accepted 2 ranks"):
        gather_neighbourhoods(torch.zeros(4, 1), part, RankGrid.create(GridSizes()))
    with pytest.raises(ShapeError, match="accepted 32 rows, the patches of all clips"):
        split_patches(torch.zeros(16, 3, 2, 2), part)


@pytest.mark.parametrize(
    ("clip", "size", "index", "text"),
    [
        ((1, 3, 2), 2, 0, r"clips\[0\]: got \(1, 3, 2\), accepted t >= 1, h a multiple of 2"),
        ((0, 2, 2), 2, 0, r"clips\[0\]: got \(0, 2, 2\)"),
        ((1, 2, 2), 2, 2, "index: got 2 of 2"),
    ],
)
def test_clips_that_cannot_be_cut_are_refused(clip: tuple[int, int, int], size: int, index: int, text: str) -> None:
    with pytest.raises(ArgumentValueError, match=text):
        ShardedClips((clip,), CPU, size, index)
