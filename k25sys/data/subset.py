"""A part of a source's documents: what is trained on, and what is held out to validate with."""

from dataclasses import replace

from torch import Tensor

from k25sys.data.sample import Sample, Source, check_position, fingerprint_of
from k25sys.errors import ArgumentValueError, message


class Subset:
    """The documents first, first + stride, ... of a source, or all but those.

    Args:
        source: where the documents and their pixels come from.
        name: unique within a mixture; the source's own for what is trained on.
        stride: >= 2.
        rest: all documents but those whose place is stride - 1 modulo stride, rather than just those.
    """

    def __init__(self, source: Source, name: str, *, stride: int, rest: bool) -> None:
        if stride < 2:
            raise ArgumentValueError(message("Subset", "stride", stride, "an int >= 2"))
        self._source, self._name, self._stride, self._rest = source, name, stride, rest
        held = len(source) // stride
        self._length = len(source) - held if rest else held

    @property
    def name(self) -> str:
        """Unique within a mixture."""
        return self._name

    @property
    def has_media(self) -> bool:
        """The source's."""
        return self._source.has_media

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return fingerprint_of(self._source)

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int, epoch: int) -> Sample:
        """Document `index` of the part."""
        check_position("Subset", index, self._length, epoch)
        place = index + index // (self._stride - 1) if self._rest else index * self._stride + self._stride - 1
        sample = self._source.sample(place, epoch)
        return replace(sample, media=tuple(replace(item, source=self._name) for item in sample.media))

    def pixels(self, key: str) -> Tensor:
        """The source's."""
        return self._source.pixels(key)


def hold_out(source: Source, *, every: int = 20) -> tuple[Source, Source | None]:
    """What to train on, and each `every`-th document to validate with; a source with fewer is not split."""
    if len(source) < every:
        return source, None
    trained = Subset(source, source.name, stride=every, rest=True)
    return trained, Subset(source, f"{source.name}-held-out", stride=every, rest=False)
