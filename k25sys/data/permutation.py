"""Pseudo-random permutations that are computed element by element: an epoch's order without an array of its size."""

import hashlib
import math

_ROUNDS = 8
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of 0 ... size - 1, the same for the same key.

    A Feistel network over pairs (left, right) of a rectangle that barely holds `size`; an image outside is mapped
    again until it lies inside, which keeps it a permutation.
    """

    def __init__(self, size: int, key: str) -> None:
        """
        Args:
            size: at least 1.
            key: any text.
        """
        self._size = size
        self._width = math.isqrt(size - 1) + 1
        self._height = -(-size // self._width)
        keys = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(keys[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, place: int) -> int:
        """The element at `place`."""
        assert 0 <= place < self._size
        while True:
            left, right = divmod(place, self._width)
            for number, key in enumerate(self._keys):
                if number % 2:
                    left = (left + _mixed(right, key)) % self._height
                else:
                    right = (right + _mixed(left, key)) % self._width
            place = left * self._width + right
            if place < self._size:
                return place


def _mixed(value: int, key: int) -> int:
    """64 bits that look random: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), with a key."""
    value = (value * 0x9E3779B97F4A7C15 + key) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
