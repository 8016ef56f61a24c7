"""Media of a source: their grids from metadata, keys as JSON, pixels by key."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from k25sys.data.augmentation import AugmentationPlan
from k25sys.data.geometry import (
    PATCH,
    RELEASED_LIMITS,
    MediaLimits,
    ResizePlan,
    plan_image,
    video_grids,
    video_timestamps,
)
from k25sys.data.images import Source as File
from k25sys.data.images import normalised_patches, preprocess_image, read_image, read_image_size, source_name
from k25sys.data.sample import MediaItem
from k25sys.data.sources.document import Clip
from k25sys.data.videos import preprocess_video, read_video_info
from k25sys.errors import ArgumentValueError, FileFormatError, message

if TYPE_CHECKING:
    from PIL import Image

V = TypeVar("V")
_METADATA_KEPT = 100_000
_KEY_FORM = '{"image": ..., "grid": [t, h, w]} or {"video": ..., "clip": i, "grid": [t, h, w]}'


class LatestUsed(Generic[V]):
    """What was made for the `most` keys that were used last. It stays behind when its owner is pickled."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[str, V] = OrderedDict()

    def get(self, key: str, make: Callable[[], V]) -> V:
        """What was made for `key`, or is made now."""
        value = self._kept.pop(key) if key in self._kept else make()
        self._kept[key] = value
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most, "_kept": OrderedDict()}


class MediaFiles:
    """Pictures and videos of one source.

    The metadata of files are held in memory, and the patches of the video that was decoded last: a video's clips are
    asked for one by one.

    Args:
        source: its name.
        open_file: from how a document refers to a file (anything that JSON takes) to the file, or to a picture.
        limits: bounds on sizes and frames.
    """

    def __init__(
        self, source: str, open_file: "Callable[[Any], File | Image.Image]", limits: MediaLimits = RELEASED_LIMITS
    ) -> None:
        self.source, self.limits, self._open = source, limits, open_file
        self._sizes: LatestUsed[tuple[int, int]] = LatestUsed(_METADATA_KEPT)
        self._clips: LatestUsed[tuple[list[tuple[int, int, int]], list[str]]] = LatestUsed(_METADATA_KEPT)
        self._decoded: LatestUsed[tuple[Tensor, Tensor]] = LatestUsed(1)

    def size(self, reference: Any) -> tuple[int, int]:
        """(height, width) of a picture as it is brought to, before padding. Raises as `read_image_size`."""
        return self._plan(reference).resized

    def image(self, reference: Any, changes: AugmentationPlan | None = None) -> Clip:
        """A picture, from its header, with `changes` to it as it is at its `size`. Raises as `read_image_size`."""
        grid = (1, *self._plan(reference).patches)
        key: dict[str, Any] = {"image": reference, "grid": grid}
        if changes is not None:
            key["augmentation"] = changes.key
        return Clip(kind="image", item=MediaItem(grid=grid, source=self.source, key=_written(key)))

    def _plan(self, reference: Any) -> ResizePlan:
        known = json.dumps(reference)
        height, width = self._sizes.get(known, lambda: read_image_size(self._open(reference), self.limits))
        return plan_image(height, width, self.limits)

    def video(self, reference: Any) -> list[Clip]:
        """The clips of a video, from its packets and its first frame. Raises as `read_video_info`."""
        grids, times = self._clips.get(json.dumps(reference), lambda: self._video_metadata(reference))
        clips = []
        for number, (grid, time) in enumerate(zip(grids, times, strict=True)):
            key = _written({"video": reference, "clip": number, "grid": grid})
            clips.append(Clip(kind="video", item=MediaItem(grid=grid, source=self.source, key=key), time=time))
        return clips

    def file_size(self, reference: Any) -> int | None:
        """Bytes of the file; None where there is none at the moment, or where it is no file of its own."""
        file = self._open(reference)
        try:
            return os.stat(file).st_size if isinstance(file, (str, os.PathLike)) else None
        except (OSError, ValueError):
            return None

    def pixels(self, key: str) -> Tensor:
        """(t h w, 3, 14, 14) float32 in [-1, 1].

        Raises:
            ValueError: the key is not of this kind, or the file does not give the grid that its metadata promised.
            OSError, ImportError, other ValueErrors: as `preprocess_image` and `preprocess_video`.
        """
        wanted = _read(key)
        reference = wanted["image"] if "image" in wanted else wanted["video"]
        try:
            file = self._open(reference)
        except (TypeError, LookupError) as error:
            accepted = f"one that {self.source} gave"
            raise ArgumentValueError(message("MediaFiles.pixels", "key", repr(key), accepted)) from error
        patches, grid = self._image(file, wanted) if "image" in wanted else self._clip(file, wanted)
        if grid != wanted["grid"]:
            hint = "the file was changed, or it is a video whose packets are not one a frame: encode it anew"
            got = f"a grid of {grid} for {key}"
            raise FileFormatError(message("MediaFiles.pixels", source_name(file), got, str(wanted["grid"]), hint))
        return patches

    def _image(self, file: "File | Image.Image", wanted: dict[str, Any]) -> tuple[Tensor, list[int]]:
        if "augmentation" not in wanted:
            patches, grid_thw = preprocess_image(file, self.limits)
            return patches, grid_thw[0].tolist()
        changes = AugmentationPlan.from_key(wanted["augmentation"])
        patches = normalised_patches(changes.apply(read_image(file, self.limits)))
        return patches, [1, changes.canvas[0] // PATCH, changes.canvas[1] // PATCH]

    def _clip(self, file: Any, wanted: dict[str, Any]) -> tuple[Tensor, list[int]]:
        known, number = json.dumps(wanted["video"]), wanted["clip"]
        patches, grids = self._decoded.get(known, lambda: preprocess_video(file, self.limits)[:2])
        if number >= len(grids):
            return patches[:0], []
        sizes = grids.prod(1).tolist()
        start = sum(sizes[:number])
        return patches[start : start + sizes[number]].clone(), grids[number].tolist()

    def _video_metadata(self, reference: Any) -> tuple[list[tuple[int, int, int]], list[str]]:
        file: Any = self._open(reference)
        info = read_video_info(file, self.limits)
        grids = video_grids(info.num_frames, info.fps, info.height, info.width, self.limits)
        return grids, video_timestamps(info.num_frames, info.fps, self.limits)


def _written(key: dict[str, Any]) -> str:
    return json.dumps(key, separators=(",", ":"), sort_keys=True)


def _read(key: str) -> dict[str, Any]:
    try:
        wanted = json.loads(key)
        fields = wanted.keys()
        is_sound = fields in ({"image", "grid"}, {"image", "grid", "augmentation"}, {"video", "clip", "grid"})
        numbers = [*wanted["grid"], wanted.get("clip", 0)]
        is_sound = is_sound and isinstance(wanted.get("augmentation", ""), str) and len(numbers) == 4
        is_sound = is_sound and all(type(n) is int and n >= 0 for n in numbers)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ArgumentValueError(message("MediaFiles.pixels", "key", repr(key), _KEY_FORM))
    return wanted
