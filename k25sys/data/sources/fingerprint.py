"""Digests that tell whether files are those of before, made fast enough to be made at each start."""

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

_EDGE = 2**20  # bytes
_MOST = 1000


def files_digest(files: Sequence[str | os.PathLike[str]]) -> str:
    """Of the sizes of files, and of the first and the last 2^20 bytes of each; names and places do not count.

    Of more than a thousand files the content of a thousand is read, evenly spread. A change inside a file of more than
    2^21 bytes that keeps its size is not noticed.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    state = blake2b(digest_size=16)
    read = set(spread(len(files)))
    for number, path in enumerate(files):
        size = os.stat(path).st_size
        state.update(b"%d\0" % size)
        if number in read:
            for content in _ends(path, size):
                state.update(content)
    return state.hexdigest()


def texts_digest(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    state = blake2b(digest_size=16)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        state.update(b"%d\0" % len(content) + content)
    return state.hexdigest()


def spread(count: int) -> Sequence[int]:
    """All places below `count`, or a thousand of them at equal distances."""
    return range(count) if count <= _MOST else [place * count // _MOST for place in range(_MOST)]


def _ends(path: str | os.PathLike[str], size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield file.read(_EDGE)
        if size > _EDGE:
            file.seek(max(_EDGE, size - _EDGE))
            yield file.read(_EDGE)
