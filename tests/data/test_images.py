"""Pictures: every mode and orientation that Pillow reads, transformers' arrangement, and files that are no pictures."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from k25sys.data import MediaLimits, image_grid, preprocess_image, read_image_size, sample_file
from k25sys.errors import ArgumentTypeError, FileFormatError, OptionalPackageError
from tests.data.oracles import transformers_patches

LEVEL = 1 / 127.5  # one of 256 levels, after normalisation


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with structure at several scales, so that a shift or a swapped axis shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


def reassembled(pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of the patches of one picture."""
    _, h, w = grid_thw[0].tolist()
    pixels = pixel_values.view(h, w, 3, 14, 14).permute(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)
    return ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()


@settings(max_examples=60)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    patches=st.sampled_from((16384, 40, 7)),
    seed=st.integers(0, 99),
)
def test_equals_transformers(height: int, width: int, patches: int, seed: int) -> None:
    picture = noise(height, width, seed)
    limits = MediaLimits(image_patches=patches)
    pixel_values, grid_thw = preprocess_image(picture, limits)
    frames = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    expected, grid = transformers_patches("image_processing_kimi_k25", frames, patches)
    assert grid_thw.tolist() == [grid] == [list(image_grid(height, width, limits))]
    assert pixel_values.shape == expected.shape
    assert (grid_thw.dtype, pixel_values.dtype) == (torch.int64, torch.float32)
    difference = (pixel_values - expected).abs()
    # Bit for bit but for the order of two roundings; a resize in Pillow and in torch may differ by a level or two.
    is_resized = patches < 16384
    assert difference.max() <= (2.01 * LEVEL if is_resized else 1e-6)
    assert difference.mean() <= 0.2 * LEVEL


def test_padding_is_minus_one_and_lies_right_and_below() -> None:
    pixel_values, grid_thw = preprocess_image(Image.new("RGB", (30, 50), (255, 255, 255)))
    assert grid_thw.tolist() == [[1, 4, 4]]
    picture = reassembled(pixel_values, grid_thw)
    assert (picture[:50, :30] == 255).all()
    assert pixel_values.min() == -1.0
    assert pixel_values.max() == 1.0
    picture[:50, :30] = 0
    assert not picture.any()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBa"])
def test_modes_are_converted_as_pillow_does(mode: str) -> None:
    picture = noise(28, 56)
    picture = picture.convert("P").convert("PA") if mode == "PA" else picture.convert(mode)
    pixels = reassembled(*preprocess_image(picture))
    assert np.array_equal(pixels, np.asarray(picture.convert("RGB")))


def test_grey_that_was_multiplied_with_alpha() -> None:
    picture = noise(28, 56).convert("LA").convert("La")
    pixels = reassembled(*preprocess_image(picture))
    assert np.array_equal(pixels, np.asarray(picture.convert("LA").convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    noise(30, 44).save(path)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    for source in (path, str(path), io.BytesIO(path.read_bytes()), Image.open(path)):
        pixels = reassembled(*preprocess_image(source))
        assert np.array_equal(pixels[:30, :44], expected)
        assert read_image_size(source) == (30, 44)


def test_transparent_pixels_keep_their_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (28, 28), (10, 200, 30, 0)).save(tmp_path / "clear.png")
    assert (reassembled(*preprocess_image(tmp_path / "clear.png")) == [10, 200, 30]).all()


@pytest.mark.parametrize("format", ["PNG", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, format: str) -> None:
    levels = (np.arange(28 * 28).reshape(28, 28) * 83).astype(np.uint16)
    picture = Image.fromarray(levels)
    if format == "PPM":
        picture = picture.convert("I")  # what Pillow reads 16-bit PPM files as
    else:
        picture.save(tmp_path / "grey.png")
        picture = Image.open(tmp_path / "grey.png")
    assert np.array_equal(reassembled(*preprocess_image(picture))[..., 1], levels >> 8)


def test_unscaled_numbers_are_refused() -> None:
    with pytest.raises(FileFormatError, match="mode F"):
        preprocess_image(Image.new("F", (4, 4)))
    with pytest.raises(FileFormatError, match="values from -1 to -1"):
        preprocess_image(Image.new("I", (4, 4), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(30, 60).save(tmp_path / f"turned.{suffix}", exif=exif)
    with Image.open(tmp_path / f"turned.{suffix}") as opened:
        upright = ImageOps.exif_transpose(opened)
    assert read_image_size(tmp_path / f"turned.{suffix}") == (upright.height, upright.width)
    pixel_values, grid_thw = preprocess_image(tmp_path / f"turned.{suffix}")
    assert grid_thw.tolist() == [list(image_grid(upright.height, upright.width))]
    pixels = reassembled(pixel_values, grid_thw)[: upright.height, : upright.width]
    assert np.array_equal(pixels, np.asarray(upright.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_nonsense_in_exif_is_no_reason_to_fail(tmp_path: Path) -> None:
    noise(28, 28).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    exif = Image.Exif()
    exif[0x0112] = 77
    noise(28, 28).save(tmp_path / "b.jpg", exif=exif)
    for name in "ab":
        assert preprocess_image(tmp_path / f"{name}.jpg")[1].tolist() == [[1, 2, 2]]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header gives that size, with next to no pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def damaged_files(folder: Path) -> dict[str, bytes]:
    """Files that are no pictures, by name."""
    for suffix in ("png", "jpg", "webp", "gif", "bmp"):
        noise(60, 80).save(folder / f"sound.{suffix}")
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    cut = {f"cut_{name}": content[: len(content) // 2] for name, content in sound.items() if "webp" not in name}
    others = {"empty.png": b"", "text.jpg": b"not a picture" * 20}
    for format in ("EPS", "TGA", "ICO"):  # Pillow reads them, the first by Ghostscript; they are not asked for
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, format)
        others[f"{format}.png"] = buffer.getvalue()
    sizes = {"huge.png": png_of_size(60_000, 60_000), "zero.png": png_of_size(0, 10), "short.png": png_of_size(50, 50)}
    return cut | others | sizes | {"cut_sound.webp": sound["sound.webp"][:300]}


def test_damaged_files_are_one_error_that_names_the_file(tmp_path: Path) -> None:
    for name, content in damaged_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=name):
            preprocess_image(path)
    with pytest.raises(FileFormatError, match=r"<Image>.*5 x 0 pixels"):
        preprocess_image(Image.new("RGB", (0, 5)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        preprocess_image(tmp_path / "nowhere.png")
    with pytest.raises(IsADirectoryError):
        preprocess_image(tmp_path)


def test_large_sources_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_of_size(3000, 2000))
    for function in (preprocess_image, read_image_size):
        with pytest.raises(FileFormatError, match=r"large\.png.*2000 x 3000.*1 to 5000000"):
            function(tmp_path / "large.png", MediaLimits(source_pixels=5_000_000))
    assert read_image_size(tmp_path / "large.png") == (2000, 3000)


@pytest.mark.parametrize("wrong", [None, 3, b"\x89PNG", ["a.png"], np.zeros((3, 3))])
def test_wrong_sources(wrong) -> None:
    with pytest.raises(ArgumentTypeError, match="accepted a path, a binary file or a PIL image"):
        preprocess_image(wrong)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OptionalPackageError, match=r"Pillow.*pip install"):
        preprocess_image("picture.png")


def test_a_photograph() -> None:
    path = sample_file("china.jpg")
    pixel_values, grid_thw = preprocess_image(path)
    assert grid_thw.tolist() == [[1, 32, 46]] == [list(image_grid(*read_image_size(path)))]
    assert pixel_values.shape == (32 * 46, 3, 14, 14)
    with Image.open(path) as opened:
        assert np.array_equal(reassembled(pixel_values, grid_thw)[:427, :640], np.asarray(opened))
