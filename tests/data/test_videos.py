"""Videos of several containers: sampling, groups, times, rotation, wrong headers, and files that are no videos."""

import io
import struct
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from k25sys.data import (
    RELEASED_LIMITS,
    MediaLimits,
    preprocess_video,
    read_video_info,
    sample_file,
    sample_frames,
    timestamp,
    video_grids,
)
from k25sys.errors import ArgumentTypeError, FileFormatError, OptionalPackageError
from tests.data.oracles import transformers_patches

CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "ts": "mpeg2video"}


def frame_of(number: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: grey that tells the frame's number, with a red top left quarter."""
    frame = np.full((height, width, 3), 40 + number * 4 % 200, np.uint8)
    frame[: height // 2, : width // 2] = (250, 10, 10)
    return frame


def write_video(
    path: Path,
    num_frames: int,
    *,
    rate: int = 8,
    height: int = 56,
    width: int = 84,
    is_noisy: bool = False,
    **options: Any,
) -> Path:
    """A video of `frame_of` frames, in the container and codec of the path's suffix."""
    rng = np.random.default_rng(0)
    with av.open(path, "w", options=options) as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            pixels = frame_of(number, height, width)
            if is_noisy:
                pixels = np.maximum(pixels, rng.integers(0, 256, pixels.shape, dtype=np.uint8))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded_frames(path: Path) -> list[np.ndarray]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_same(ours: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert ours[2] == expected[2]


def check(path: Path, num_frames: int, rate: float, limits: MediaLimits = RELEASED_LIMITS) -> None:
    """Raises unless the result holds transformers' patches of the frames that the spec's rule samples."""
    pixel_values, grid_thw, timestamps = preprocess_video(path, limits)
    frames = decoded_frames(path)
    assert len(frames) == num_frames
    wanted = sample_frames(num_frames, rate, limits)
    sampled = torch.from_numpy(np.stack([frames[i] for i in wanted])).permute(0, 3, 1, 2)
    groups = [transformers_patches("video_processing_kimi_k25", g, limits.frame_patches) for g in sampled.split(4)]
    assert grid_thw.tolist() == [grid for _, grid in groups]
    expected = torch.cat([patches for patches, _ in groups])
    assert pixel_values.shape == expected.shape
    assert (pixel_values.dtype, grid_thw.dtype) == (torch.float32, torch.int64)
    difference = (pixel_values - expected).abs()
    assert difference.max() <= 2.01 / 127.5
    assert difference.mean() <= 0.2 / 127.5
    assert timestamps == [timestamp(i, rate) for i in wanted[::4]]
    info = read_video_info(path, limits)
    assert (info.num_frames, info.fps) == (num_frames, pytest.approx(rate))
    grids = video_grids(info.num_frames, info.fps, info.height, info.width, limits)
    assert [list(grid) for grid in grids] == grid_thw.tolist()


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("num_frames", [1, 2, 16, 37])
def test_containers(tmp_path: Path, suffix: str, num_frames: int) -> None:
    # Noise, so that the shortest file is one in which FFmpeg recognises MPEG-TS.
    path = write_video(tmp_path / f"video.{suffix}", num_frames, is_noisy=True)
    with av.open(path) as container:
        rate = container.streams.video[0].average_rate
    # One frame has no rate: FFmpeg guesses one. Where FFmpeg knows none, the frames' times tell, or else the default.
    assert num_frames == 1 or rate == (None if (num_frames, suffix) == (2, "ts") else 8)
    check(path, num_frames, float(rate) if rate else (8.0 if num_frames > 1 else 2.0))


@pytest.mark.parametrize(
    "limits", [MediaLimits(frame_patches=6), MediaLimits(max_frames=5), MediaLimits(side_patches=3)]
)
def test_limits(tmp_path: Path, limits: MediaLimits) -> None:
    path = write_video(tmp_path / "video.mp4", 60)
    if limits.side_patches == 3:
        assert preprocess_video(path, limits)[1].tolist() == [[4, 2, 4]] * 3 + [[3, 2, 4]]
    else:
        check(path, 60, 8.0, limits)


def test_slow_videos_keep_every_frame(tmp_path: Path) -> None:
    check(write_video(tmp_path / "slow.mp4", 6, rate=1), 6, 1.0)
    assert preprocess_video(tmp_path / "slow.mp4")[2] == ["00:00:00.000", "00:00:04.000"]


def test_frames_are_in_order_and_the_first_of_a_group_gives_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 40)
    pixel_values, grid_thw, timestamps = preprocess_video(path)
    assert grid_thw.tolist() == [[4, 4, 6], [4, 4, 6], [2, 4, 6]]
    brightness = ((pixel_values.view(10, 24, 3, 14, 14)[:, -1].mean((1, 2, 3)) + 1) * 127.5 - 40) / 4
    assert torch.allclose(brightness, torch.tensor(sample_frames(40, 8.0)).float(), atol=1)
    assert timestamps == ["00:00:00.000", "00:00:02.125", "00:00:04.375"]


def test_a_binary_file_is_read_as_often_as_needed(tmp_path: Path) -> None:
    content = write_video(tmp_path / "video.mkv", 20).read_bytes()
    source = io.BytesIO(content)
    source.read(100)
    assert_same(preprocess_video(source), preprocess_video(tmp_path / "video.mkv"))


def with_display_matrix(content: bytes, degrees: int) -> bytes:
    """An MP4 file whose track is to be shown turned clockwise by `degrees`."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), 45: (0.7, 0.7, -0.7, 0.7)}[degrees]
    matrix = struct.pack(">9i", *(int(x * 65536) for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    place = content.index(b"tkhd") + 4 + 40
    return content[:place] + matrix + content[place + 36 :]


@pytest.mark.parametrize(("degrees", "corner"), [(90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_rotation(tmp_path: Path, degrees: int, corner: tuple[int, int]) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(with_display_matrix(write_video(path, 8).read_bytes(), degrees))
    size = (56, 84) if degrees == 180 else (84, 56)
    info = read_video_info(path)
    assert (info.height, info.width) == size
    pixel_values, grid_thw, _ = preprocess_video(path)
    assert grid_thw.tolist() == [[2, size[0] // 14, size[1] // 14]]
    first = pixel_values.view(2, *grid_thw[0, 1:].tolist(), 3, 14, 14)[0, :, :, :, 7, 7]
    is_red = (first[..., 0] > 0.7) & (first[..., 1] < -0.7)
    halves = [is_red[:2], is_red[-2:]]
    assert halves[corner[0]][:, -1 if corner[1] else 0].all()
    assert is_red.sum() <= size[0] // 14 * size[1] // 14 / 2


def test_slanted_frames_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "slanted.mp4"
    path.write_bytes(with_display_matrix(write_video(path, 4).read_bytes(), 45))
    with pytest.raises(FileFormatError, match=r"slanted\.mp4.*multiples of 90"):
        preprocess_video(path)


def test_a_wrong_count_in_the_header(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wrong.avi", 24)
    content = bytearray(path.read_bytes())
    for offset in (content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32):
        content[offset : offset + 4] = struct.pack("<I", 1000)
    path.write_bytes(content)
    check(path, 24, 8.0)


def test_packets_that_are_not_one_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k25sys.data import videos

    path = write_video(tmp_path / "video.mp4", 33)
    count = videos._count_frames
    for off_by in (-20, 5):
        monkeypatch.setattr(videos, "_count_frames", lambda *args, o=off_by: (count(*args)[0] + o, count(*args)[1]))
        ours = preprocess_video(path)
        monkeypatch.undo()
        assert_same(ours, preprocess_video(path))


def test_size_changes_midway(tmp_path: Path) -> None:
    """Two MPEG-TS files behind each other are one: the second half gets the first one's size."""
    first = write_video(tmp_path / "a.ts", 16)
    second = write_video(tmp_path / "b.ts", 16, height=112, width=112)
    path = tmp_path / "joined.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    _, grid_thw, _ = preprocess_video(path)
    assert {tuple(grid[1:]) for grid in grid_thw.tolist()} == {(4, 6)}
    assert grid_thw[:, 0].sum() >= 6


def damaged_files(folder: Path) -> dict[str, bytes]:
    """Files that are no videos, or less than they say, by name."""
    sound = {
        suffix: write_video(folder / f"sound.{suffix}", 40, rate=8).read_bytes() for suffix in ("mp4", "mkv", "webm")
    }
    fast = write_video(folder / "fast.mp4", 40, movflags="faststart").read_bytes()
    cut = {f"cut.{suffix}": content[: len(content) * 6 // 10] for suffix, content in sound.items()}
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nsound.mp4\n#EXT-X-ENDLIST\n"
    with av.open(folder / "sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    others = {"empty.mp4": b"", "text.mp4": b"not a video" * 200, "list.m3u8": playlist}
    others["sources.txt"] = b"ffconcat version 1.0\nfile " + str(folder / "sound.mp4").encode()
    others["cut_behind_its_index.mp4"] = fast[: len(fast) * 7 // 10]
    others["audio.wav"] = (folder / "sound.wav").read_bytes()
    return cut | others


def test_damaged_files_are_one_error_that_names_the_file(tmp_path: Path) -> None:
    for name, content in damaged_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=name):
            preprocess_video(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        preprocess_video(tmp_path / "nowhere.mp4")


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    with av.open(tmp_path / "song.mp4", "w") as container:
        audio, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux([*audio.encode(samples), *audio.encode(), *cover.encode(picture), *cover.encode()])
    with pytest.raises(FileFormatError, match=r"song\.mp4.*no video stream"):
        preprocess_video(tmp_path / "song.mp4")


def test_damaged_frames_are_no_input(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", 40, rate=2)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    for offset in range(start + 900, start + 1400, 7):
        content[offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"video\.mp4"):
        preprocess_video(path)


def test_frames_that_the_decoder_patched_up_are_no_input(tmp_path: Path) -> None:
    """A packet lost on the way: FFmpeg fills the hole from other frames, goes on, and marks the frame."""
    path = write_video(tmp_path / "lost.ts", 24, rate=24, is_noisy=True)
    content = path.read_bytes()
    path.write_bytes(content[: 188 * 40] + content[188 * 41 :])
    with pytest.raises(FileFormatError, match=r"lost\.ts.*a damaged frame, number \d+"):
        preprocess_video(path, MediaLimits(fps=24.0))
    with av.open(path) as container:
        assert sum(frame.is_corrupt for frame in container.decode(video=0)) > 0


def test_large_frames_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", 2)
    for function in (preprocess_video, read_video_info):
        with pytest.raises(FileFormatError, match=r"large\.mp4.*56 x 84.*at most 4000 pixels"):
            function(path, MediaLimits(source_pixels=4000))


@pytest.mark.parametrize("wrong", [None, 3, b"ftyp", ["a.mp4"]])
def test_wrong_sources(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="accepted a path or a binary file"):
        preprocess_video(wrong)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionalPackageError, match=r"PyAV.*pip install"):
        preprocess_video("video.mp4")


@pytest.mark.parametrize(
    ("name", "num_frames", "rate", "grid"),
    [("carphone_distorted.mp4", 120, 30000 / 1001, (12, 14)), ("bikes.mp4", 250, 25.0, (20, 46))],
)
def test_real_videos(name: str, num_frames: int, rate: float, grid: tuple[int, int]) -> None:
    path = sample_file(name)
    check(path, num_frames, rate)
    assert {tuple(g[1:]) for g in preprocess_video(path)[1].tolist()} == {grid}
