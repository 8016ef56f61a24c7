"""Rotary positions: YaRN of the language model, two-dimensional rotations of the vision encoder.

Shape suffixes: T tokens, P patches, F = channels / 2 rotated pairs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from k25sys.models.config import TextConfig, VisionConfig, YarnConfig

RotaryTables = tuple[Tensor, Tensor]
"""cos and sin of each row's angles, float32."""


def inverse_frequencies(config: TextConfig) -> Tensor:
    """(F,) float32 on the CPU: the angle of each pair at position 1.

    YaRN (arXiv 2309.00071, section 3.2): pairs that turn more than beta_fast times within the original context keep
    their frequency, those that turn less than beta_slow times get it divided by `factor`, a ramp lies between.
    Without YaRN: theta^(-2i / R).
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta
    periods_F = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    plain_F = 1.0 / periods_F
    yarn = config.yarn
    if yarn is None:
        return plain_F
    low, high = (_pair_that_turns(turns, dim, base, yarn) for turns in (yarn.beta_fast, yarn.beta_slow))
    first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    width = last - first if last != first else 0.001
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (yarn.factor * periods_F) * (1 - kept_F) + plain_F * kept_F


def _pair_that_turns(turns: float, dim: int, base: float, yarn: YarnConfig) -> float:
    """The pair, as a real number, whose angle makes `turns` full turns over the original context."""
    return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def table_multiplier(config: TextConfig) -> float:
    """By what YaRN multiplies cos and sin: 1 where mscale equals mscale_all_dim, as in K2.5."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    return _yarn_magnitude(yarn.factor, yarn.mscale) / _yarn_magnitude(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: TextConfig) -> float:
    """What scores are multiplied with before the softmax: 1 / sqrt(query channels), times YaRN's magnitude squared."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is None:
        return scale
    return scale * _yarn_magnitude(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def text_tables(config: TextConfig, positions_T: Tensor) -> RotaryTables:
    """cos and sin (T, F) for the language model, on the device of `positions_T` (integers)."""
    angles_TF = positions_T.float()[:, None] * inverse_frequencies(config).to(positions_T.device)
    multiplier = table_multiplier(config)
    return angles_TF.cos() * multiplier, angles_TF.sin() * multiplier


def vision_tables(
    config: VisionConfig,
    clips: Sequence[Sequence[int]],
    device: torch.device,
    rows: Sequence[range] | None = None,
) -> RotaryTables:
    """cos and sin (P, F) for the patches of `clips` (t, h, w): pairs alternate between column and row, frames repeat.

    theta_i = 10000^(-4i / head_dim); the pairs of a head are x theta_0, y theta_0, x theta_1, y theta_1, ...
    `rows`: of each clip's frames, those that are here; None: all.
    """
    steps = torch.arange(0, config.head_dim // 2, 2, dtype=torch.float32, device="cpu") / (config.head_dim // 2)
    frequencies = (1.0 / config.rope_theta**steps).to(device)
    angles = [torch.empty(0, config.head_dim // 2, device=device)]
    for (t, _, w), part in zip(clips, rows or [range(h) for _, h, _ in clips], strict=True):
        y = torch.arange(part.start, part.stop, device=device).float()
        along_y = (y[:, None] * frequencies).expand(w, -1, -1).transpose(0, 1)
        along_x = (torch.arange(w, device=device).float()[:, None] * frequencies).expand(len(part), -1, -1)
        angles.append(torch.stack([along_x, along_y], -1).flatten(2).flatten(0, 1).repeat(t, 1))
    angles_PF = torch.cat(angles)
    return angles_PF.cos(), angles_PF.sin()


def rotate_pairs(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turns the channel pairs (2i, 2i + 1) of x (T, heads, 2F) by the angles of `tables`; in float32, rounded once."""
    cos_T1F, sin_T1F = (table[:, None] for table in tables)
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos_T1F - odd * sin_T1F, odd * cos_T1F + even * sin_T1F], -1)
    return turned.flatten(-2).to(x.dtype)
