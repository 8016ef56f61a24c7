"""A small MoonViT with projector, and generated steps: which clips each micro-batch holds, and who needs which row."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25sys.models.config import VisionConfig
from k25sys.models.moonvit import MoonViT3D, PatchMergerProjector
from k25sys.parallel.dep import Clip

WIDTH = 12


class Encoder(nn.Module):
    """Pixels of clips to rows of WIDTH channels, as stage 0 takes them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        config = VisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, position_height=8,
            position_width=8,
        )  # fmt: skip
        self.vision_tower = MoonViT3D(config)
        self.mm_projector = PatchMergerProjector(config, WIDTH)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        self.to(dtype)

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> Tensor:
        """(P, 3, 14, 14) -> (Q, WIDTH)."""
        return self.mm_projector(self.vision_tower(pixels, grid_thw))


def rows_of(clip: Clip) -> int:
    """A row for each 2 x 2 patches of a frame; frames are averaged."""
    return clip.grid[1] * clip.grid[2] // 4


def pixels_of(clip: Clip, dtype: torch.dtype) -> Tensor:
    """What a decoder would give: the same on every rank."""
    seed = hash((clip.data_rank, clip.microbatch, clip.index, clip.grid)) % 2**31
    return torch.randn(clip.num_patches, 3, 14, 14, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass(frozen=True)
class DrawnStep:
    """Clips of a step, and, for each micro-batch with any, the consumer of each row."""

    clips: tuple[Clip, ...]
    consumers: dict[tuple[int, int], tuple[int, ...]]


def draw_step(seed: int, *, data_ranks: int, microbatches: int, consumers_of: dict[int, list[int]]) -> DrawnStep:
    """From none to a dozen clips: text alone, one giant image, fewer images than ranks, videos, each at some seeds."""
    draw = random.Random(seed)
    shape = draw.choice(["none", "one", "giant", "mixed", "mixed", "mixed"])
    clips = []
    for data_rank in range(data_ranks):
        for microbatch in range(microbatches):
            number = {"none": 0, "one": int(data_rank == microbatch == 0)}.get(shape, draw.choice([0, 0, 1, 2, 3]))
            for index in range(number):
                giant = shape == "giant" and not clips
                side = 16 if giant else 2 * draw.randint(1, 3)
                clips.append(
                    Clip(data_rank, microbatch, index, (draw.choice([1, 1, 1, 2, 4]), side, 2 * draw.randint(1, 3)))
                )
    consumers: dict[tuple[int, int], tuple[int, ...]] = {}
    for clip in clips:
        key = clip.home
        ranks = consumers_of[clip.data_rank]
        consumers[key] = (*consumers.get(key, ()), *(draw.choice(ranks) for _ in range(rows_of(clip))))
    return DrawnStep(tuple(clips), consumers)
