"""Pixels of media items, decoded in one thread, ahead of their use where it is known, and kept for a while."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from k25sys.data import MediaItem, Source
from k25sys.data.geometry import PATCH

_MOST_BYTES = 1 << 28
_BYTES_PER_PATCH = 3 * PATCH * PATCH * torch.float32.itemsize


class PixelCache:
    """Pixels that were asked for lately, up to a number of bytes: a decoupled encoder needs each clip twice in a step,
    and small corpora show the same pictures again and again.

    Args:
        sources: by name.
        thread: where they decode. Sources need not be thread-safe: everything else that reads them is to go there too.
        most_bytes: that are kept.
    """

    def __init__(self, sources: Mapping[str, Source], thread: Executor, most_bytes: int = _MOST_BYTES) -> None:
        self._sources, self._thread, self._most, self._bytes = dict(sources), thread, most_bytes, 0
        self._held: OrderedDict[MediaItem, Future[Tensor]] = OrderedDict()

    def get(self, item: MediaItem) -> Tensor:
        """(t h w, 3, patch, patch) float32; not to be written into. Raises what the source raises, each time."""
        future = self._request(item)
        try:
            return future.result()
        except BaseException:
            self._drop(item)
            raise

    def decode_ahead(self, items: Iterable[MediaItem]) -> None:
        """Begins with those that will be asked for next, as many as half of the room takes; the rest is in use."""
        room = self._most // 2
        for item in items:
            room -= _num_bytes(item)
            if room < 0:
                return
            self._request(item)

    def _request(self, item: MediaItem) -> "Future[Tensor]":
        future = self._held.get(item)
        if future is None:
            future = self._held[item] = self._thread.submit(self._sources[item.source].pixels, item.key)
            self._bytes += _num_bytes(item)
        self._held.move_to_end(item)
        while self._bytes > self._most and len(self._held) > 1:
            self._drop(next(iter(self._held)))
        return future

    def _drop(self, item: MediaItem) -> None:
        if self._held.pop(item, None) is not None:
            self._bytes -= _num_bytes(item)


def _num_bytes(item: MediaItem) -> int:
    return item.num_patches * _BYTES_PER_PATCH
