"""MoonViT-3D, K2.5's vision encoder, and the projector into the language model (K2.5 report, section 2).

Shape suffixes: P patches of all clips (clip by clip, frame by frame, row-major), N clips, D channels, H heads,
Q neighbourhoods of C patches each.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25sys import ops
from k25sys.errors import ArgumentTypeError, ArgumentValueError, ShapeError, message
from k25sys.models.attention_core import AttentionCore
from k25sys.models.config import VisionConfig
from k25sys.models.documents import Documents, Packing
from k25sys.models.rope import RotaryTables, rotate_pairs, vision_tables

_TIME_THETA = 10000.0


class ClipRows(Packing, Protocol):
    """Some of the rows of patches of each clip, where others hold the rest: whole neighbourhoods, of all frames."""

    @property
    def rows(self) -> Sequence[range]:
        """Of each clip's frames, the rows of patches that are here."""
        ...


class PositionEmbedding(nn.Module):
    """A learned grid, resized to each clip's frame, plus fixed sine-cosine rows of time for clips of several frames."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.position_height, config.position_width, config.hidden_size))

    def forward(self, clips: Sequence[Sequence[int]], rows: Sequence[range] | None = None) -> Tensor:
        """(P, D), in float32 or wider; of `rows` of each clip's frames where they are given."""
        dim = self.weight.shape[-1]
        grid = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).permute(2, 0, 1)[None]
        frames = {size: self._resize(grid, size) for size in {(h, w) for _, h, w in clips}}
        embedded = [self.weight.new_empty(0, dim, dtype=grid.dtype)]
        for (t, h, w), part in zip(clips, rows or [range(h) for _, h, _ in clips], strict=True):
            frame = frames[h, w][part.start * w : part.stop * w]
            # An image (t = 1) gets no row of time at all; frame 0 of a video does.
            moving = frame if t == 1 else frame + self._time_rows(t, frame)[:, None]
            embedded.append(moving.reshape(t * len(part) * w, dim))
        return torch.cat(embedded)

    @staticmethod
    def _resize(grid: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(grid, size=size, mode="bicubic", align_corners=False)[0].flatten(1).T

    @staticmethod
    def _time_rows(num_frames: int, like: Tensor) -> Tensor:
        """(t, D): sin(f w_j), then cos(f w_j), w_j = 10000^(-2j / D)."""
        dim = like.shape[-1]
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim
        angles = torch.arange(num_frames, device=like.device).float()[:, None] / _TIME_THETA**steps
        return torch.cat([angles.sin(), angles.cos()], 1)


class PatchEmbedding(nn.Module):
    """Pixels of a patch to channels, plus positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch)
        self.pos_emb = PositionEmbedding(config)

    def forward(
        self, pixel_values: Tensor, clips: Sequence[Sequence[int]], rows: Sequence[range] | None = None
    ) -> Tensor:
        """(P, 3, patch, patch) -> (P, D) in the dtype of the weights."""
        weight = self.proj.weight
        # A patch is as large as the kernel, so that the convolution is one product.
        x_PD = F.linear(pixel_values.to(weight.dtype).flatten(1), weight.flatten(1), self.proj.bias)
        return x_PD + self.pos_emb(clips, rows).to(x_PD.dtype)


class VisionMLP(nn.Module):
    """fc1(gelu_tanh(fc0(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PD: Tensor) -> Tensor:
        """(P, D) -> (P, D)."""
        return self.fc1(F.gelu(self.fc0(x_PD), approximate="tanh"))


class VisionBlock(nn.Module):
    """x + attention over the whole clip, all frames at once, then x + mlp; q and k rows in the released pair order."""

    def __init__(self, config: VisionConfig, *, attention: str) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.norm0 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.mlp = VisionMLP(config)
        self.core = AttentionCore(attention, scale=config.head_dim**-0.5, causal=False)

    def forward(self, x_PD: Tensor, tables: RotaryTables, clips: Packing) -> Tensor:
        """(P, D) -> (P, D)."""
        q, k, v = self.wqkv(self.norm0(x_PD)).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        k, v = self.core.gather((rotate_pairs(k, tables), v), clips)
        attended = self.core(rotate_pairs(q, tables), k, v, clips)
        x_PD = x_PD + self.wo(attended.flatten(1))
        return x_PD + self.mlp(self.norm1(x_PD))


class VisionEncoder(nn.Module):
    """The blocks and the last norm, under the released names."""

    def __init__(self, config: VisionConfig, *, attention: str) -> None:
        super().__init__()
        blocks = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList(VisionBlock(config, attention=attention) for _ in blocks)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x_PD: Tensor, tables: RotaryTables, clips: Packing) -> Tensor:
        """(P, D) -> (P, D)."""
        for block in self.blocks:
            x_PD = block(x_PD, tables, clips)
        return self.final_layernorm(x_PD)


class MoonViT3D(nn.Module):
    """Images and clips of up to four frames, of any mixture of sizes, to pooled neighbourhoods of patches."""

    def __init__(self, config: VisionConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.encoder = VisionEncoder(config, attention=attention)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, *, part: ClipRows | None = None) -> Tensor:
        """Encodes all clips at once; patches attend within their clip only.

        Args:
            pixel_values: (P, 3, patch, patch), converted to the dtype of the weights.
            grid_thw: (N, 3) int32 or int64, (t, h, w) in patches of each clip; best kept on the CPU.
            part: which rows of the clips `pixel_values` has, where others hold the rest and the cores of attention
                gather keys and values; None: all.

        Returns:
            (Q, C, D): each clip's mean over its frames, (h / 2) * (w / 2) neighbourhoods of 2 x 2 patches; of `part`,
            its own.

        Raises:
            TypeError, ValueError: a grid that does not describe the patches, or a clip of too many frames.
        """
        grid_thw, clips = self._check(pixel_values, grid_thw, part)
        rows = None if part is None else part.rows
        if part is None:
            packing: Packing = Documents(tuple(t * h * w for t, h, w in clips), pixel_values.device)
        else:
            packing = part
            grid_thw = grid_thw.clone()
            grid_thw[:, 1] = torch.tensor([len(there) for there in part.rows])
        tables = vision_tables(self.config, clips, pixel_values.device, rows)
        x_PD = self.encoder(self.patch_embed(pixel_values, clips, rows), tables, packing)
        return ops.pool_temporal_patches(x_PD, grid_thw[grid_thw[:, 1] > 0], self.config.merge_kernel_size)

    def _check(self, pixel_values: Tensor, grid_thw: Tensor, part: ClipRows | None) -> tuple[Tensor, list[list[int]]]:
        op, patch = "MoonViT3D", self.config.patch_size
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ArgumentTypeError(message(op, "pixel_values", got, "a floating-point tensor"))
        if pixel_values.shape[1:] != (3, patch, patch):
            raise ShapeError(message(op, "pixel_values", tuple(pixel_values.shape), f"(P, 3, {patch}, {patch})"))
        if not isinstance(grid_thw, Tensor) or grid_thw.dtype not in (torch.int32, torch.int64):
            got = getattr(grid_thw, "dtype", type(grid_thw).__name__)
            raise ArgumentTypeError(message(op, "grid_thw", got, "an int32 or int64 tensor"))
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
            raise ShapeError(message(op, "grid_thw", tuple(grid_thw.shape), "(N, 3): t, h and w of each clip"))
        grid_thw = grid_thw.cpu()
        clips, (merge_h, merge_w) = grid_thw.tolist(), self.config.merge_kernel_size
        for i, (t, h, w) in enumerate(clips):
            if not (1 <= t <= self.config.max_frames and h > 0 and w > 0 and h % merge_h == w % merge_w == 0):
                accepted = f"t of 1 to {self.config.max_frames}, h a multiple of {merge_h}, w of {merge_w}"
                raise ArgumentValueError(message(op, f"grid_thw[{i}]", (t, h, w), accepted))
        rows = [range(h) for _, h, _ in clips] if part is None else part.rows
        whole = len(rows) == len(clips) and all(
            0 <= there.start <= there.stop <= h and there.start % merge_h == there.stop % merge_h == 0
            for there, (_, h, _) in zip(rows, clips, strict=True)
        )
        if not whole:
            accepted = f"a range of rows within each of {len(clips)} clips, from one multiple of {merge_h} to another"
            raise ArgumentValueError(message(op, "part.rows", rows, accepted))
        num_patches = sum(t * len(there) * w for (t, _, w), there in zip(clips, rows, strict=True))
        if num_patches != pixel_values.shape[0]:
            accepted = f"{num_patches} patches, the sum of t * h * w over grid_thw" + (" in part.rows" if part else "")
            raise ShapeError(message(op, "pixel_values", f"{pixel_values.shape[0]} patches", accepted))
        return grid_thw, clips


class PatchMergerProjector(nn.Module):
    """linear(gelu(linear(the concatenated, normalised patches of a neighbourhood)))."""

    def __init__(self, config: VisionConfig, text_dim: int) -> None:
        super().__init__()
        merged = config.merged_size
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.projector_norm_eps)
        self.proj = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, text_dim))

    def forward(self, x_QCD: Tensor) -> Tensor:
        """(Q, C, D) -> (Q, text channels)."""
        return self.proj(self.pre_norm(x_QCD).flatten(1))
