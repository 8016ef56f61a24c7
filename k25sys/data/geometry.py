"""Sizes, frames and times of media, from metadata alone: what a picture or a video will cost before a pixel is read.

Sizes are (height, width) in pixels unless a name says patches. Source: the released rules, spec section 2.3.
"""

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message

PATCH = 14  # pixels a side of a patch
MERGE = 2  # patches a side of the neighbourhood that becomes one token
CELL = PATCH * MERGE
MAX_FRAMES_PER_GROUP = 4  # rows of MoonViT-3D's temporal position table


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Bounds on what becomes of a picture or a video; the defaults are the released ones.

    Attributes:
        image_patches: patches of a picture. A bound on the scale, not on the result: padding may exceed it by some.
        frame_patches: the same for a frame of a video.
        padded_patches: patches of a picture or frame with its padding, at least 4; what is larger is shrunk further.
            None is no such bound, as released.
        side_patches: patches along one side.
        fps: frames a second that are taken from a video.
        frames_per_group: frames that share their tokens, 1 to 4.
        max_frames: frames that are taken from one video at most; None is no bound, as released. An hour of video is
            7200 frames, up to 70 GB of pixel values.
        source_pixels: pixels of a picture or frame in the file; a larger one is refused before it is decoded.
    """

    image_patches: int = 16384
    frame_patches: int = 4096
    padded_patches: int | None = None
    side_patches: int = 512
    fps: float = 2.0
    frames_per_group: int = MAX_FRAMES_PER_GROUP
    max_frames: int | None = None
    source_pixels: int = 178_956_970

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("max_frames", "padded_patches") and value is None:
                continue
            is_number = isinstance(value, (int, float) if field.name == "fps" else int) and not isinstance(value, bool)
            if not is_number:
                raise ArgumentTypeError(
                    message("MediaLimits", field.name, f"{type(value).__name__} {value!r}", "a number")
                )
            most = MAX_FRAMES_PER_GROUP if field.name == "frames_per_group" else math.inf
            if not 0 < value <= most or not math.isfinite(value):
                raise ArgumentValueError(message("MediaLimits", field.name, value, f"a number in (0, {most}]"))
        if self.padded_patches is not None and self.padded_patches < MERGE * MERGE:
            accepted = f"at least {MERGE * MERGE}, one token"
            raise ArgumentValueError(message("MediaLimits", "padded_patches", self.padded_patches, accepted))


RELEASED_LIMITS = MediaLimits()


@dataclass(frozen=True, kw_only=True)
class ResizePlan:
    """What happens to a picture: resized to `resized`, then padded right and below to `padded` (both height, width)."""

    resized: tuple[int, int]
    padded: tuple[int, int]

    @property
    def patches(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.padded[0] // PATCH, self.padded[1] // PATCH

    @property
    def num_tokens(self) -> int:
        """Tokens of the language model: one for each neighbourhood of 2x2 patches, however many frames."""
        return self.padded[0] // CELL * (self.padded[1] // CELL)


def plan_resize(
    height: int, width: int, *, max_patches: int, side_patches: int, padded_patches: int | None = None
) -> ResizePlan:
    """The released rule: never enlarged, the shape kept, at most `max_patches` patches and `side_patches` along a side.

    `padded_patches` is not part of that rule: it bounds the result with its padding (see MediaLimits).

    Raises:
        TypeError, ValueError: a size that is not a positive int.
    """
    _positive("plan_resize", "height", height)
    _positive("plan_resize", "width", width)
    longest = side_patches * PATCH
    num_patches = max(1, height // PATCH) * max(1, width // PATCH)
    scale = min(1.0, math.sqrt(max_patches / num_patches), longest / height, longest / width)
    plan = _scaled(height, width, scale, longest)
    if padded_patches is not None and plan.num_tokens * MERGE**2 > padded_patches:
        cells = padded_patches // MERGE**2
        most_rows = min(cells, _round_up(height) // CELL)
        # Exact, so that the side that decides fills its cells.
        fits = (
            min(Fraction(rows * CELL, height), Fraction(cells // rows * CELL, width))
            for rows in range(1, most_rows + 1)
        )
        plan = _scaled(height, width, max(fits), longest)
    return plan


def image_grid(height: int, width: int, limits: MediaLimits = RELEASED_LIMITS) -> tuple[int, int, int]:
    """(1, h, w) in patches of a picture of `height` x `width` pixels, as `preprocess_image` will give it."""
    return 1, *plan_image(height, width, limits).patches


def plan_image(height: int, width: int, limits: MediaLimits = RELEASED_LIMITS) -> ResizePlan:
    """What `preprocess_image` does to a picture of `height` x `width` pixels."""
    return _plan(height, width, limits.image_patches, limits)


def plan_frame(height: int, width: int, limits: MediaLimits = RELEASED_LIMITS) -> ResizePlan:
    """What `preprocess_video` does to a frame of `height` x `width` pixels."""
    return _plan(height, width, limits.frame_patches, limits)


def _plan(height: int, width: int, max_patches: int, limits: MediaLimits) -> ResizePlan:
    return plan_resize(
        height,
        width,
        max_patches=max_patches,
        side_patches=limits.side_patches,
        padded_patches=limits.padded_patches,
    )


def video_grids(
    num_frames: int, fps: float, height: int, width: int, limits: MediaLimits = RELEASED_LIMITS
) -> list[tuple[int, int, int]]:
    """(t, h, w) of each group of frames of a video, as `preprocess_video` will give them."""
    plan = plan_frame(height, width, limits)
    return [(t, *plan.patches) for t in group_sizes(len(sample_frames(num_frames, fps, limits)), limits)]


def video_timestamps(num_frames: int, fps: float, limits: MediaLimits = RELEASED_LIMITS) -> list[str]:
    """The time of the first frame of each group of a video, as `preprocess_video` will give them."""
    wanted = sample_frames(num_frames, fps, limits)
    return [timestamp(frame, fps) for frame in wanted[:: limits.frames_per_group]]


def sample_frames(num_frames: int, fps: float, limits: MediaLimits = RELEASED_LIMITS) -> list[int]:
    """Numbers of the frames that are taken: min(limits.fps, fps) a second, evenly spread, the first and last included.

    Args:
        num_frames: frames of the video, at least 1.
        fps: its frames a second, on average.
    """
    _positive("sample_frames", "num_frames", num_frames)
    if not math.isfinite(fps) or fps <= 0:
        raise ArgumentValueError(message("sample_frames", "fps", fps, "a positive number"))
    wanted = max(round(num_frames * min(limits.fps, fps) / fps), 1)
    if limits.max_frames is not None:
        wanted = min(wanted, limits.max_frames)
    return np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist()


def group_sizes(num_frames: int, limits: MediaLimits = RELEASED_LIMITS) -> list[int]:
    """Frames of each group: limits.frames_per_group, the last one what is left."""
    full, rest = divmod(num_frames, limits.frames_per_group)
    return [limits.frames_per_group] * full + [rest] * (rest > 0)


def timestamp(frame: int, fps: float) -> str:
    """The time of frame number `frame` as HH:MM:SS.mmm, cut (not rounded) to milliseconds, as released."""
    time = frame / fps
    seconds, milliseconds = int(time), int(time % 1 * 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"


def _scaled(height: int, width: int, scale: float | Fraction, longest: int) -> ResizePlan:
    resized = (min(max(1, int(height * scale)), longest), min(max(1, int(width * scale)), longest))
    return ResizePlan(resized=resized, padded=(_round_up(resized[0]), _round_up(resized[1])))


def _round_up(size: int) -> int:
    return -(-size // CELL) * CELL


def _positive(op: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(message(op, argument, f"{type(value).__name__} {value!r}", "an int"))
    if value < 1:
        raise ArgumentValueError(message(op, argument, value, "at least 1"))
