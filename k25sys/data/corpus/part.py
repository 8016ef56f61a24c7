"""Which documents of the sample corpus are held out: by where they come from, so that no source tells of another's."""

from collections.abc import Sequence
from enum import Enum
from typing import TypeVar

from k25sys.data.sample import Source
from k25sys.data.subset import hold_out

T = TypeVar("T")
_EVERY = 20


class Part(Enum):
    """Of a corpus."""

    WHOLE = "whole"
    TRAINED = "trained"
    """All but what is held out."""
    HELD_OUT = "held-out"
    """Each twentieth file, photograph or document. The sources' names end in -held-out."""

    def of(self, items: Sequence[T]) -> list[T]:
        """The files or pictures of this part."""
        if self is Part.WHOLE:
            return list(items)
        return [item for place, item in enumerate(items) if (place % _EVERY == _EVERY - 1) == (self is Part.HELD_OUT)]

    def name(self, source: str) -> str:
        """Of a source of this part."""
        return f"{source}-held-out" if self is Part.HELD_OUT else source

    def of_source(self, source: Source) -> Source:
        """The documents of this part, of a source that shares nothing with others."""
        if self is Part.WHOLE:
            return source
        trained, held_out = hold_out(source, every=_EVERY)
        assert held_out is not None
        return held_out if self is Part.HELD_OUT else trained
