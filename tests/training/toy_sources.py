"""Small sources of text and of pictures, as fast as a test needs them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from k25sys.data import ByteTokenizer, MixedSource, Mixture, Sample
from k25sys.data.drawn import DrawnPictures

WORDS = "a token goes from rank to rank and its gradient comes back the same way in every step".split()  # noqa: SIM905


class Sentences:
    """Random words as bytes: predictable enough for a loss to fall."""

    name, has_media = "sentences", False

    def __init__(self, length: int = 400) -> None:
        self._length, self._eos = length, ByteTokenizer().special.eos

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int, epoch: int) -> Sample:
        generator = np.random.default_rng((index, epoch))
        text = " ".join(generator.choice(WORDS, size=int(generator.integers(5, 40))))
        ids_S = np.array([*text.encode(), self._eos], dtype=np.int64)
        return Sample(ids_S=ids_S, loss_S=np.ones(len(ids_S), dtype=bool))

    def pixels(self, key: str) -> Any:
        raise AssertionError(f"text has no pixels: {key}")


def toy_mixture(*, vision_budget: float = 0.4, kinds: Sequence[str] = ("shapes",)) -> Mixture:
    """Sentences and drawn pictures."""
    pictures = [DrawnPictures(kind, ByteTokenizer(), seed=1, length=100, cells=(2, 3)) for kind in kinds]
    return Mixture(
        [MixedSource(Sentences(), 1.0), *(MixedSource(source, 1.0) for source in pictures)],
        vision_budget=vision_budget,
    )
