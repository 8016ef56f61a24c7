"""Sizes, sampled frames and times against the spec's vectors and transformers."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k25sys.data import MediaLimits, image_grid, plan_resize, sample_frames, timestamp, video_grids
from k25sys.errors import ArgumentTypeError, ArgumentValueError
from tests.data.oracles import function_of

SIZES = st.integers(1, 300) | st.integers(1, 20_000)


@pytest.mark.parametrize(
    ("size", "max_patches", "resized", "padded", "tokens"),
    [
        ((1080, 1920), 16384, (1080, 1920), (1092, 1932), 2691),
        ((1080, 1920), 4096, (672, 1196), (672, 1204), 1032),
        ((2160, 3840), 16384, (1345, 2392), (1372, 2408), 4214),
        ((448, 448), 16384, (448, 448), (448, 448), 256),
        ((896, 896), 16384, (896, 896), (896, 896), 1024),
        ((100, 5000), 16384, (100, 5000), (112, 5012), 716),
    ],
)
def test_vectors_of_the_spec(size, max_patches, resized, padded, tokens) -> None:
    plan = plan_resize(*size, max_patches=max_patches, side_patches=512)
    assert (plan.resized, plan.padded, plan.num_tokens) == (resized, padded, tokens)
    if max_patches == 16384:
        assert image_grid(*size) == (1, padded[0] // 14, padded[1] // 14)
    else:
        assert video_grids(5, 2.0, *size) == [
            (4, padded[0] // 14, padded[1] // 14),
            (1, padded[0] // 14, padded[1] // 14),
        ]


@pytest.mark.parametrize("module", ["image_processing_kimi_k25", "video_processing_kimi_k25"])
@settings(max_examples=2000)
@example(height=1, width=100_000, max_patches=16384)
@example(height=7168, width=7169, max_patches=4096)
@given(height=SIZES, width=SIZES, max_patches=st.sampled_from((16384, 4096)) | st.integers(1, 20_000))
def test_sizes_equal_transformers(module: str, height: int, width: int, max_patches: int) -> None:
    plan = plan_resize(height, width, max_patches=max_patches, side_patches=512)
    assert (plan.resized, plan.padded) == function_of(module, "navit_resize")(height, width, 14, 2, max_patches, 512)


@settings(max_examples=500)
@example(height=1, width=100_000, padded_patches=4)
@given(height=SIZES, width=SIZES, padded_patches=st.integers(4, 300))
def test_bound_on_the_padded_size(height: int, width: int, padded_patches: int) -> None:
    released = plan_resize(height, width, max_patches=16384, side_patches=512)
    plan = plan_resize(height, width, max_patches=16384, side_patches=512, padded_patches=padded_patches)
    if released.num_tokens * 4 <= padded_patches:
        assert plan == released
        return
    assert plan.num_tokens * 4 <= padded_patches
    # The largest scale that fits, of those at which a side fills its cells.
    scales = (Fraction(28 * cells, side) for side in (height, width) for cells in range(1, -(-side // 28) + 1))
    for scale in sorted(scales, reverse=True):
        if math.prod(math.ceil(side * scale / 28) for side in (height, width)) * 4 <= padded_patches:
            assert plan.resized == tuple(max(1, int(side * scale)) for side in (height, width))
            return
    raise AssertionError("no scale fits")


@settings(max_examples=500)
@given(num_frames=st.integers(1, 5000), fps=st.floats(0.05, 240), limit=st.none() | st.integers(1, 50))
def test_sampled_frames(num_frames: int, fps: float, limit: int | None) -> None:
    frames = sample_frames(num_frames, fps, MediaLimits(max_frames=limit))
    wanted = max(round(num_frames * min(2.0, fps) / fps), 1)
    expected = np.round(np.linspace(0, num_frames - 1, min(wanted, limit or wanted))).astype(int).tolist()
    assert frames == expected
    assert frames == sorted(set(frames))
    assert frames[0] == 0
    assert len(frames) == 1 or frames[-1] == num_frames - 1


def test_sampled_frames_known() -> None:
    assert sample_frames(120, 30000 / 1001) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert sample_frames(5, 1.0) == [0, 1, 2, 3, 4]
    assert sample_frames(1, 60.0) == [0]
    assert [grid[0] for grid in video_grids(250, 25.0, 272, 640)] == [4, 4, 4, 4, 4]
    assert [grid[0] for grid in video_grids(11, 2.0, 28, 28)] == [4, 4, 3]


@settings(max_examples=500)
@given(frame=st.integers(0, 10**6), fps=st.floats(12, 240))
def test_timestamps_as_in_the_released_prompts(frame: int, fps: float) -> None:
    seconds = frame / fps
    assert timestamp(frame, fps) == time.strftime("%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"


def test_timestamps_known() -> None:
    assert timestamp(0, 25.0) == "00:00:00.000"
    assert timestamp(90_061, 25.0) == "01:00:02.440"
    assert timestamp(100 * 3600, 1.0) == "100:00:00.000"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"frames_per_group": 5}, ArgumentValueError, "frames_per_group: got 5"),
        ({"fps": 0.0}, ArgumentValueError, "fps: got 0.0"),
        ({"fps": math.nan}, ArgumentValueError, "fps: got nan"),
        ({"image_patches": 1.5}, ArgumentTypeError, "image_patches: got float 1.5"),
        ({"max_frames": 0}, ArgumentValueError, "max_frames: got 0"),
        ({"side_patches": True}, ArgumentTypeError, "side_patches: got bool True"),
    ],
)
def test_wrong_limits(wrong, error, says: str) -> None:
    with pytest.raises(error, match=says):
        MediaLimits(**wrong)


def test_wrong_sizes() -> None:
    for height, width, error in ((0, 5, ArgumentValueError), (5, -1, ArgumentValueError), (5.0, 5, ArgumentTypeError)):
        with pytest.raises(error, match=r"plan_resize: (height|width): got"):
            image_grid(height, width)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentValueError, match="num_frames: got 0"):
        sample_frames(0, 25.0)
    for fps in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentValueError, match="sample_frames: fps"):
            sample_frames(10, fps)
