"""WebDataset shards: tar files in which neighbours of one name, but for what follows its first dot, are a document.

The format is read with the standard library, by position: the shards are gone through once, for the places of their
members, so that documents can be read in any order and a run resumed anywhere.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from k25sys.data.augmentation import Augmentation
from k25sys.data.geometry import RELEASED_LIMITS, MediaLimits
from k25sys.data.sources.document import Clip, GivenText
from k25sys.data.sources.fingerprint import files_digest
from k25sys.data.sources.media import MediaFiles
from k25sys.data.sources.pairs import Captioned, MediaDocuments, captioned_picture
from k25sys.data.sources.records import parse_object, read_text
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import ArgumentValueError, FileFormatError, message

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}", re.ASCII)
_BLOCK = 512
_MOST_SHARDS = 1_000_000
_Place = tuple[int, int]  # of a member's content: where it begins, how long it is


class WebDataset(MediaDocuments):
    """Pictures with captions in tar shards; a document is a picture, then its caption.

    Args:
        name: unique within a mixture.
        tokenizer: writes the captions.
        shards: paths of uncompressed tar files; {000..127} in one stands for all numbers between, of that width.
        image_suffixes: what names a member as the picture.
        text_suffix: what names the caption: txt, or json for `json_field` of an object.
        json_field: see text_suffix.
        limits: bounds on the pictures' sizes.
        augmentation: how far pictures may be changed in each pass; None leaves them. A caption stays true, as far as
            `plan_for_text` says; its boxes and points are moved along.
        seed: other seeds give other changes.

    Raises:
        OSError: a shard cannot be read.
        ValueError: a shard is no tar file, compressed, damaged or cut short; a document without picture or caption, or
            with two of them; no documents. The message names the shard and the member.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        shards: Iterable[str | os.PathLike[str]],
        *,
        image_suffixes: Sequence[str] = ("jpg", "jpeg", "png", "webp", "gif", "bmp"),
        text_suffix: str = "txt",
        json_field: str = "caption",
        limits: MediaLimits = RELEASED_LIMITS,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(shards, (str, os.PathLike)):
            raise ArgumentValueError(message("WebDataset", "shards", repr(shards), "a list of paths"))
        if seed < 0:
            raise ArgumentValueError(message("WebDataset", "seed", seed, "at least 0"))
        paths = [path for pattern in shards for path in _expanded(os.fspath(pattern))]
        documents = _ShardDocuments(paths, tuple(image_suffixes), text_suffix, json_field)
        super().__init__(name, tokenizer, documents, MediaFiles(name, partial(_member, paths), limits))
        self._augmentation, self._seed = augmentation, seed

    def _parts(self, item: Captioned, index: int, epoch: int) -> list[str | GivenText | Clip]:
        return captioned_picture(self._media, item, self._augmentation, seed=self._seed, index=index, epoch=epoch)


def caption_suffix(shard: str | os.PathLike[str]) -> str:
    """What `text_suffix` is to be: json where the first document has no txt but a json; else txt.

    Raises:
        OSError, ValueError: as `WebDataset`, of the first of the shards that {a..b} stands for.
    """
    _, members = next(_groups(next(_expanded(os.fspath(shard)))), ("", {}))
    return "json" if "json" in members and "txt" not in members else "txt"


class _ShardDocuments(Sequence[Captioned]):
    """What the members' places say, 40 bytes a document; captions are read when asked for."""

    def __init__(self, paths: list[str], image_suffixes: tuple[str, ...], text_suffix: str, json_field: str) -> None:
        self._paths, self._json_field = paths, json_field if text_suffix == "json" else None
        rows = []
        for number, path in enumerate(paths):
            for key, members in _groups(path):
                image = _only(path, key, members, image_suffixes, "picture")
                rows.append((number, *image, *_only(path, key, members, (text_suffix,), "caption")))
        self._rows = np.array(rows, np.int64).reshape(-1, 5)
        self.fingerprint = files_digest(paths)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        shard, start, size, text_start, text_size = self._rows[index].tolist()
        caption = _member(self._paths, [shard, text_start, text_size])
        content = caption.read()
        if self._json_field is not None:
            text = read_text(parse_object(content, caption.name), caption.name, self._json_field)
        else:
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise FileFormatError(message("WebDataset", caption.name, str(error), "a caption in UTF-8")) from error
        if not text.strip():
            raise FileFormatError(message("WebDataset", caption.name, "nothing but blanks", "a caption"))
        return Captioned(media=[shard, start, size], text=text.strip())


class _Member(io.BytesIO):
    """The content of a member, by the name that an error gives it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def _member(paths: list[str], place: list[int]) -> _Member:
    shard, start, size = place
    with open(paths[shard], "rb") as file:
        file.seek(start)
        content = file.read(size)
    name = f"{paths[shard]}, bytes {start} to {start + size}"
    if len(content) < size:
        raise FileFormatError(message("WebDataset", name, f"{len(content)} bytes", f"{size}, as it had before"))
    return _Member(content, name)


def _expanded(pattern: str) -> Iterator[str]:
    """The path, or those that its first {a..b} stands for, and so on."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MOST_SHARDS:
        raise ArgumentValueError(message("WebDataset", "shards", repr(pattern), "{a..b} with a <= b"))
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _groups(path: str) -> Iterator[tuple[str, dict[str, _Place]]]:
    """Name and members by suffix of each document of a shard."""
    key, members = None, {}
    for name, place in _members(path):
        folder, base = os.path.split(name)
        stem, _, suffix = base.partition(".")
        here = os.path.join(folder, stem)
        if here != key and key is not None:
            yield key, members
            members = {}
        key = here
        if suffix.lower() in members:
            raise FileFormatError(message("WebDataset", f"{path}: {name}", "a second one", "a name once a document"))
        members[suffix.lower()] = place
    if key is not None:
        yield key, members


def _members(path: str) -> Iterator[tuple[str, _Place]]:
    """Name and place of each file of a tar file, which must be sound to its end."""
    accepted = "an uncompressed tar file, sound to its end"
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and not member.issparse() and not Path(member.name).name.startswith("__"):
                        yield member.name, (member.offset_data, member.size)
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            raise FileFormatError(message("WebDataset", path, f"{type(error).__name__}: {error}", accepted)) from error
        # tarfile takes a damaged header, or no header at all, for the end; the end is a block of zeros.
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise FileFormatError(message("WebDataset", path, f"a faulty header or the end at byte {end}", accepted))


def _only(path: str, key: str, members: dict[str, _Place], suffixes: tuple[str, ...], what: str) -> _Place:
    found = [suffix for suffix in members if suffix in suffixes]
    if len(found) != 1:
        got = f"{what}s {found} among {sorted(members)}"
        accepted = f"one {what}: {', '.join(suffixes)}"
        raise FileFormatError(message("WebDataset", f"{path}: {key}", got, accepted))
    return members[found[0]]
