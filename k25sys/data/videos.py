"""Videos: from any file that FFmpeg reads to patches of the sampled frames and their times. Source: spec section 2.3.

Frames are seen upright (a rotation in the file is applied). Times are frame number / average rate, as released, even
where frames are not evenly spaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from k25sys.data.geometry import (
    PATCH,
    RELEASED_LIMITS,
    MediaLimits,
    group_sizes,
    plan_frame,
    sample_frames,
    video_timestamps,
)
from k25sys.data.images import Source, normalised_patches, opened_file, resize_and_pad, source_name
from k25sys.errors import FileFormatError, OptionalPackageError, message

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Files of these kinds record their length; cut short, they end early without a fault. How early is still sound?
_FORMATS_WITH_LENGTH = ("matroska", "mov")
_MISSING_SECONDS, _MISSING_SHARE, _MOST_MISSING = 0.1, 0.05, 1.0
_ACCEPTED = "a video file that FFmpeg reads"


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video's cost depends on: `video_grids(info.num_frames, info.fps, info.height, info.width)`."""

    num_frames: int
    fps: float
    height: int
    width: int


def preprocess_video(source: Source, limits: MediaLimits = RELEASED_LIMITS) -> tuple[Tensor, Tensor, list[str]]:
    """Samples two frames a second, resizes, pads and normalises each as a picture, and groups them by four.

    The file is decoded once, and only sampled frames are kept (a second time where its packets are not one a frame).

    Args:
        source: a path or a binary file that can seek.
        limits: bounds on frames and sizes; the released ones by default.

    Returns:
        pixel_values (P, 3, 14, 14) float32: the patches of all groups, group by group, frame by frame, row-major.
        grid_thw (N, 3) int64: t (4, the last one 1 to 4), h, w of each group; P is the sum of t * h * w.
        timestamps: N strings HH:MM:SS.mmm, the time of each group's first frame.

    Raises:
        FileNotFoundError and other OSError: the file cannot be opened.
        ValueError: no video, no frames, cut short, damaged in a sampled frame, or frames larger than
            limits.source_pixels. Where a format records no length (MPEG-TS), a cut end cannot be seen.
        ImportError: PyAV is not installed.
    """
    name = source_name(source)
    num_frames, fps = _count_frames(source, name, limits)
    frames, decoded = _decode(source, name, sample_frames(num_frames, fps, limits), limits)
    if decoded != num_frames and decoded > 0:
        num_frames = decoded
        frames, decoded = _decode(source, name, sample_frames(num_frames, fps, limits), limits)
    wanted = sample_frames(num_frames, fps, limits)
    if decoded != num_frames or len(frames) != len(wanted):
        raise FileFormatError(message("preprocess_video", name, f"{decoded} of {num_frames} frames", _ACCEPTED))
    height, width, _ = frames[0].shape
    h, w = height // PATCH, width // PATCH
    sizes = group_sizes(len(frames), limits)
    pixel_values = np.empty((len(frames), h * w, 3, PATCH, PATCH), np.float32)
    for patches, frame in zip(pixel_values, frames, strict=True):
        patches[:] = normalised_patches(frame).numpy()
    grids = torch.tensor([[t, h, w] for t in sizes])
    return torch.from_numpy(pixel_values).flatten(0, 1), grids, video_timestamps(num_frames, fps, limits)


def read_video_info(source: Source, limits: MediaLimits = RELEASED_LIMITS) -> VideoInfo:
    """Frames, rate and upright size of a video: reads its packets and decodes one frame.

    Raises as `preprocess_video` does, but does not see damage behind the first frame.
    """
    name = source_name(source)
    num_frames, fps = _count_frames(source, name, limits)
    with _opened(source, name, limits) as (container, stream):
        for frame in container.decode(stream):
            height, width = (
                (frame.width, frame.height) if _quarter_turns(frame, name) % 2 else (frame.height, frame.width)
            )
            return VideoInfo(num_frames=num_frames, fps=fps, height=height, width=width)
    raise FileFormatError(message("read_video_info", name, "0 frames", _ACCEPTED))


@contextmanager
def _opened(source: Any, name: str, limits: MediaLimits) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """A container and its first video stream; FFmpeg's faults in the with block become errors that name the file."""
    try:
        import av
        from av.error import FFmpegError
        from av.stream import Disposition
    except ImportError as error:
        hint = "pip install 'k25sys[media]'"
        raise OptionalPackageError(message("preprocess_video", "package", "no PyAV", "av >= 14", hint)) from error
    # FFmpeg gets the open file, not its name, and no protocol: a playlist must not open other files or addresses.
    with opened_file("preprocess_video", "source", source, "a path or a binary file") as file:
        try:
            with av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    hint = "it is of another kind, or cut before its index"
                    raise FileFormatError(message("preprocess_video", name, "no video stream", _ACCEPTED, hint))
                stream = streams[0]
                _check_size(name, stream.codec_context.height, stream.codec_context.width, limits)
                stream.thread_type = "AUTO"
                yield container, stream
        except (FFmpegError, OSError) as error:  # a damaged file may make FFmpeg seek to before its beginning
            got, hint = f"{type(error).__name__}: {error}", "it is of another kind, cut short or damaged"
            raise FileFormatError(message("preprocess_video", name, got, _ACCEPTED, hint)) from error


def _check_size(name: str, height: int, width: int, limits: MediaLimits) -> None:
    if height * width > limits.source_pixels:
        accepted = f"at most {limits.source_pixels} pixels (limits.source_pixels)"
        raise FileFormatError(message("preprocess_video", name, f"frames of {height} x {width}", accepted))


def _count_frames(source: Any, name: str, limits: MediaLimits) -> tuple[int, float]:
    """Packets with a frame to show, and the average rate. Headers may lack the count or lie: nothing relies on it."""
    times, last = [], 0.0
    with _opened(source, name, limits) as (container, stream):
        num_frames = 0
        for packet in container.demux():
            if not packet.size or packet.pts is None or packet.time_base is None:
                num_frames += packet.stream is stream and packet.size > 0
                continue
            last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream and not packet.is_discard:
                num_frames += 1
                times.append(float(packet.pts * packet.time_base))
        length = (container.duration or 0) / 1e6
        allowed = min(_MISSING_SECONDS + _MISSING_SHARE * length, _MOST_MISSING)
        if any(kind in container.format.name for kind in _FORMATS_WITH_LENGTH) and last < length - allowed:
            got = f"an end at {last:.3f} s where its header says {length:.3f} s"
            raise FileFormatError(message("preprocess_video", name, got, _ACCEPTED, "it is cut short"))
        rate = stream.average_rate
    if num_frames == 0:
        raise FileFormatError(message("preprocess_video", name, "0 frames", _ACCEPTED))
    if rate:
        return num_frames, float(rate)
    span = max(times) - min(times) if times else 0.0
    return num_frames, (len(times) - 1) / span if span > 0 else limits.fps


def _decode(source: Any, name: str, wanted: list[int], limits: MediaLimits) -> tuple[list[np.ndarray], int]:
    """The frames with the numbers `wanted` (ascending), upright, resized and padded, and how many there are in all.

    All get the size that the first one's asks for, whatever size later ones have.
    """
    from PIL import Image

    frames, number, plan = [], -1, None
    with _opened(source, name, limits) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if len(frames) == len(wanted) or number != wanted[len(frames)]:
                continue
            _check_size(name, frame.height, frame.width, limits)
            if frame.is_corrupt:
                got = f"a damaged frame, number {number}"
                raise FileFormatError(message("preprocess_video", name, got, "sound frames"))
            upright = np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame, name))
            if plan is None:
                height, width, _ = upright.shape
                plan = plan_frame(height, width, limits)
            frames.append(resize_and_pad(Image.fromarray(np.ascontiguousarray(upright)), plan))
    return frames, number + 1


def _quarter_turns(frame: "av.VideoFrame", name: str) -> int:
    """Anticlockwise quarter turns that set a frame upright."""
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        got = f"frames to be turned by {frame.rotation} degrees"
        raise FileFormatError(message("preprocess_video", name, got, "multiples of 90 degrees"))
    return turns % 4
