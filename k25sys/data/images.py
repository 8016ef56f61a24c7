"""Pictures: from a PNG, JPEG, WebP, GIF or BMP file, or a PIL image, to patches. Source: spec section 2.3.

The choices of transformers' processor are kept: the picture is seen upright (EXIF orientation is applied), alpha is
dropped without blending, of an animation the first frame counts. One is not: grey of 16 bits is scaled to 8 bits; as it
is clipped there, it comes out white.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from k25sys.data.geometry import PATCH, RELEASED_LIMITS, MediaLimits, ResizePlan, plan_image
from k25sys.errors import ArgumentTypeError, FileFormatError, OptionalPackageError, message

if TYPE_CHECKING:
    from PIL import Image

Source = str | os.PathLike[str] | BinaryIO
# By name, since Pillow would also take formats that call other programs (EPS starts Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ORIENTATION_TAG = 0x0112


def preprocess_image(image: "Source | Image.Image", limits: MediaLimits = RELEASED_LIMITS) -> tuple[Tensor, Tensor]:
    """Reads a picture, resizes (bicubic, never larger), pads with zeros to a multiple of 28, normalises to [-1, 1].

    Args:
        image: a path, a binary file, or a PIL image of any mode that has 8 or 16 bits a channel.
        limits: bounds on its size; the released ones by default.

    Returns:
        pixel_values (P, 3, 14, 14) float32, patches row-major, channels first inside; padding is -1.
        grid_thw (1, 3) int64: 1, h, w in patches, both even; P = h * w.

    Raises:
        FileNotFoundError and other OSError: the file cannot be opened.
        ValueError: the file is no picture, or is cut short, damaged, empty or larger than limits.source_pixels.
        ImportError: Pillow is not installed.
    """
    padded_HW3, plan = _resized_and_padded(image, limits)
    return normalised_patches(padded_HW3), torch.tensor([[1, *plan.patches]])


def read_image(image: "Source | Image.Image", limits: MediaLimits = RELEASED_LIMITS) -> np.ndarray:
    """(H, W, 3) uint8: the picture as `preprocess_image` resizes it, before it is padded. Raises as that does."""
    padded_HW3, plan = _resized_and_padded(image, limits)
    return padded_HW3[: plan.resized[0], : plan.resized[1]]


def read_image_size(image: "Source | Image.Image", limits: MediaLimits = RELEASED_LIMITS) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from the file's header alone: nothing is decoded.

    Raises as `preprocess_image` does, but cannot see damage behind the header.
    """
    name = source_name(image)
    with _opened(image, name) as picture:
        _check_size("read_image_size", name, picture.size, limits)
        width, height = picture.size
        return (width, height) if _orientation(picture) >= 5 else (height, width)


def _resized_and_padded(image: "Source | Image.Image", limits: MediaLimits) -> tuple[np.ndarray, ResizePlan]:
    name = source_name(image)
    with _opened(image, name) as picture:
        _check_size("preprocess_image", name, picture.size, limits)
        rgb = _to_rgb(picture, name)
    plan = plan_image(rgb.height, rgb.width, limits)
    return resize_and_pad(rgb, plan), plan


def resize_and_pad(picture: "Image.Image", plan: ResizePlan) -> np.ndarray:
    """(H, W, 3) uint8 of plan.padded: the RGB `picture` resized to plan.resized, zeros right and below."""
    from PIL import Image

    height, width = plan.resized
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    padded = np.zeros((*plan.padded, 3), np.uint8)
    padded[:height, :width] = np.asarray(picture)
    return padded


def normalised_patches(frame_HW3: np.ndarray) -> Tensor:
    """(h * w, 3, 14, 14) float32 in [-1, 1], row-major, of a frame (14 h, 14 w, 3) uint8: (x / 255 - 0.5) / 0.5.

    By NumPy: torch would start threads of its own for it, beside those of a training step in another thread.
    """
    height, width, _ = frame_HW3.shape
    cells = frame_HW3.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(0, 2, 4, 1, 3)
    patches = cells.astype(np.float32, order="C").reshape(-1, 3, PATCH, PATCH)
    patches -= 127.5
    patches /= 127.5
    return torch.from_numpy(patches)


def source_name(source: Any) -> str:
    """What an error calls `source`."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    return repr(getattr(source, "filename", None) or getattr(source, "name", None) or f"<{type(source).__name__}>")


@contextmanager
def _opened(image: Any, name: str) -> "Iterator[Image.Image]":
    """The picture with its header read; closed afterwards unless it came in open."""
    try:
        from PIL import Image
    except ImportError as error:
        hint = "pip install 'k25sys[media]'"
        raise OptionalPackageError(message("preprocess_image", "package", "no Pillow", "Pillow >= 10", hint)) from error
    if isinstance(image, Image.Image):
        yield image
        return
    with opened_file("preprocess_image", "image", image, "a path, a binary file or a PIL image") as file:
        try:
            picture = Image.open(file, formats=_FORMATS)
        except Exception as error:  # Pillow's readers raise anything at a file that is not theirs
            raise FileFormatError(_unreadable(name, error)) from error
        yield picture


@contextmanager
def opened_file(op: str, argument: str, source: Any, accepted: str) -> Iterator[BinaryIO]:
    """The file at the path `source`, closed afterwards; or `source` itself, a binary file, from its beginning."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    elif hasattr(source, "read") and hasattr(source, "seek"):
        source.seek(0)
        yield source
    else:
        raise ArgumentTypeError(message(op, argument, type(source).__name__, accepted))


def _unreadable(name: str, error: Exception) -> str:
    hint = "it is of another kind, cut short or damaged"
    return message("preprocess_image", name, f"{type(error).__name__}: {error}", " or ".join(_FORMATS), hint)


def _check_size(op: str, name: str, size: tuple[int, int], limits: MediaLimits) -> None:
    width, height = size
    if not 0 < width * height <= limits.source_pixels:
        got = f"{height} x {width} pixels"
        raise FileFormatError(message(op, name, got, f"1 to {limits.source_pixels} pixels (limits.source_pixels)"))


def _orientation(picture: "Image.Image") -> int:
    """EXIF orientation, 1 to 8, from the header: where a PNG has the tag behind its pixels, it does not count."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    try:
        value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data raise anything; the picture itself may be sound
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(picture: "Image.Image", name: str) -> "Image.Image":
    """Decodes, turns upright and converts to RGB."""
    from PIL import Image

    turns = (
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
    )  # fmt: skip
    orientation = _orientation(picture)
    try:
        picture.load()
    except Exception as error:  # as above: whatever the decoder raises at damaged data
        raise FileFormatError(_unreadable(name, error)) from error
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture, name)
    elif picture.mode == "F":
        hint = "scale it to 0..255 and convert it to mode L"
        raise FileFormatError(message("preprocess_image", name, "mode F (floats)", "8 or 16 bits a channel", hint))
    if orientation > 1:
        picture = picture.transpose(turns[orientation - 2])
    if picture.mode == "La":  # multiplied with alpha: Pillow turns it into nothing but this
        picture = picture.convert("LA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: "Image.Image", name: str) -> "Image.Image":
    from PIL import Image

    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        got = f"mode {picture.mode} with values from {values.min()} to {values.max()}"
        raise FileFormatError(message("preprocess_image", name, got, "0 to 65535"))
    return Image.fromarray((values >> 8).astype(np.uint8))
