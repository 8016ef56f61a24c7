"""Media drawn for a planned step: which clips each micro-batch holds, and what their encoding costs.

Image sizes are lognormal in patches, with the median of a 560 x 560 picture; videos are clips of four frames. Both are
assumptions, printed with every plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25sys.models.config import VisionConfig
from k25sys.parallel.dep import Clip

IMAGE_MEDIAN_PATCHES = 1600
IMAGE_SIGMA = 0.9
IMAGE_PATCHES = (256, 14745)
VIDEO_SIDES = (16, 24, 32)
VIDEO_FRAMES = 4
_IMAGE_FILL = (0.2, 0.8)  # share of a sequence with images that is media
_VIDEO_FILL = 0.85
_TOKENS_LEFT = 64


@dataclass(frozen=True)
class DrawnMedia:
    """The clips of a step, and the share of its tokens that they make up."""

    clips: tuple[Clip, ...]
    token_share: float


def assumptions() -> list[str]:
    """What the draw rests on, one line each."""
    low, high = IMAGE_PATCHES
    return [
        f"images: lognormal of median {IMAGE_MEDIAN_PATCHES} patches, sigma {IMAGE_SIGMA}, {low} to {high}, "
        f"{_IMAGE_FILL[0]:.0%} to {_IMAGE_FILL[1]:.0%} of their sequences",
        f"videos: clips of {VIDEO_FRAMES} square frames of {', '.join(f'{14 * side}' for side in VIDEO_SIDES)} pixels, "
        f"{_VIDEO_FILL:.0%} of their sequences",
    ]


def draw_media(
    vision: VisionConfig, *, data_ranks: int, microbatches: int, sequence: int, vision_share: float,
    video_share: float, seed: int,
) -> DrawnMedia:  # fmt: skip
    """Sequences with media by chance, so that `vision_share` of all tokens are media in the mean."""
    generator = np.random.default_rng(seed)
    fill = (1 - video_share) * sum(_IMAGE_FILL) / 2 + video_share * _VIDEO_FILL
    chance, stretch = min(1.0, vision_share / fill), max(1.0, vision_share / fill)
    clips: list[Clip] = []
    tokens = 0
    for data_rank in range(data_ranks):
        for microbatch in range(microbatches):
            if generator.random() >= chance:
                continue
            if generator.random() < video_share:
                grids = _videos(generator, int(min(0.98, _VIDEO_FILL * stretch) * sequence), vision)
            else:
                share = min(0.98, float(generator.uniform(*_IMAGE_FILL)) * stretch)
                grids = _images(generator, min(int(share * sequence), sequence - _TOKENS_LEFT), vision)
            tokens += sum(media_tokens(grid, vision) for grid in grids)
            clips += [Clip(data_rank, microbatch, index, grid) for index, grid in enumerate(grids)]
    return DrawnMedia(tuple(clips), tokens / (data_ranks * microbatches * sequence))


def media_tokens(grid: tuple[int, int, int], vision: VisionConfig) -> int:
    """Media tokens of a clip: its frames are averaged, its patches merged."""
    merge_h, merge_w = vision.merge_kernel_size
    return grid[1] * grid[2] // (merge_h * merge_w)


def _videos(generator: np.random.Generator, room: int, vision: VisionConfig) -> Sequence[tuple[int, int, int]]:
    side = int(generator.choice(VIDEO_SIDES))
    grid = (min(VIDEO_FRAMES, vision.max_frames), side, side)
    return [grid] * (room // media_tokens(grid, vision))


def _images(generator: np.random.Generator, room: int, vision: VisionConfig) -> Sequence[tuple[int, int, int]]:
    grids: list[tuple[int, int, int]] = []
    while True:
        patches = float(np.exp(generator.normal(np.log(IMAGE_MEDIAN_PATCHES), IMAGE_SIGMA)))
        side = max(2, round(min(max(patches, IMAGE_PATCHES[0]), IMAGE_PATCHES[1]) ** 0.5 / 2) * 2)
        grid = (1, side, side)
        room -= media_tokens(grid, vision)
        if room < 0:
            # The last one is cut to what is left: pictures are resized to fit, sequences are not left empty.
            left = int((room + media_tokens(grid, vision)) ** 0.5) * 2
            return [*grids, (1, left, left)] if left >= 16 else grids
        grids.append(grid)
