"""A user's files as sources: what is in a file decides which source reads it."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from k25sys.data.augmentation import Augmentation
from k25sys.data.geometry import RELEASED_LIMITS, MediaLimits
from k25sys.data.sample import Source
from k25sys.data.sources.pairs import ImageTextPairs, Interleaved, VideoText
from k25sys.data.sources.records import (
    ConvertedRecords,
    DocumentPart,
    ImageFile,
    JsonRecords,
    first_record,
    media_fields,
    read_text,
    refuse_media,
)
from k25sys.data.sources.text import JsonLines, TextFiles
from k25sys.data.sources.webdataset import WebDataset, caption_suffix
from k25sys.data.tokenizer import Tokenizer
from k25sys.data.trajectories import ConversationSource
from k25sys.errors import ArgumentValueError, FileFormatError, message

_RECORDS = (
    'one kind of records: {"text": TEXT or [TEXT, ...]}, {"image": PATH, "text": CAPTION}, '
    '{"images": [PATH, ...], "text": CAPTION}, {"video": PATH, "text": CAPTION}, {"parts": [TEXT, {"image": PATH}, '
    '...]} or {"messages": [...]}'
)
_FILES = "a text in UTF-8, .jsonl, an uncompressed .tar of pictures and captions, or a folder of them"
_HEAD = 4096  # bytes


def open_files(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    limits: MediaLimits = RELEASED_LIMITS,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    taken: Iterable[str] = (),
) -> list[Source]:
    """A source for each JSON Lines file, tar file and folder, in the order given, and one for all others together.

    The first record of a .jsonl says what the file has: {"text": ...} is read by JsonLines, {"image": ..., "text":
    ...} by ImageTextPairs, {"images": [...], "text": ...} by Interleaved, all pictures before the text, {"video": ...,
    "text": ...} by VideoText, {"parts": [...]} by Interleaved, {"messages": [...]} by ConversationSource. A field that
    is null or empty counts as none. A .tar is read by WebDataset (captions in txt, or in json where the first document
    has no txt; {000..127} stands for many shards), a folder as one of pictures, each with its caption in a .txt beside
    it. Anything else is a text, a document each.

    Args:
        files: paths.
        tokenizer: writes the texts.
        limits: bounds on pictures and videos.
        augmentation: of pictures with captions; None leaves them.
        seed: of the augmentation.
        taken: names of other sources that will be mixed with these. A source is called as its file is without its
            ending, the one of texts "files"; a number is added where that is taken.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: one is given twice, is of no kind above, or its first document is faulty (not of plain texts), of
            which a picture's path is the commonest case; names the file and the line. What is wrong with others is said
            when they are read.
    """
    paths = [os.fspath(file) for file in files]
    _check_once(paths)
    others = [path for path in paths if not os.path.isdir(path) and _suffix(path) not in (".jsonl", ".tar")]
    for path in others:
        _check_text(path)
    names, opened = _Names(taken), _Opening(tokenizer, limits, augmentation, seed)
    texts = [TextFiles(names.new("files"), tokenizer, others)] if others else []
    known = set(others)
    found = [opened.source(names.new(_stem(path)), path) for path in paths if path not in known]
    for source in found:
        source.sample(0, 0)
    return [*found, *texts]


class _Names:
    """Names that are used, each with that of the documents which `hold_out` puts aside: one run may read both."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._used = {each for name in taken for each in (name, _held_out(name))}

    def new(self, name: str) -> str:
        """`name`, with the first number behind it that makes it unused."""
        numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
        found = next(each for each in numbered if not {each, _held_out(each)} & self._used)
        self._used |= {found, _held_out(found)}
        return found


@dataclass(frozen=True)
class _Opening:
    """What all sources of files have in common."""

    tokenizer: Tokenizer
    limits: MediaLimits
    augmentation: Augmentation | None
    seed: int

    def source(self, name: str, path: str) -> Source:
        """Of a folder, a tar file or JSON Lines."""
        augmented: dict[str, Any] = {"limits": self.limits, "augmentation": self.augmentation, "seed": self.seed}
        if os.path.isdir(path):
            return ImageTextPairs.from_folder(name, self.tokenizer, path, **augmented)
        if _suffix(path) == ".tar":
            return WebDataset(name, self.tokenizer, [path], text_suffix=caption_suffix(path), **augmented)
        kind = _kind_of(path)
        if kind == "text":
            return JsonLines(name, self.tokenizer, path)
        if kind == "messages":
            return ConversationSource(path, self.tokenizer, name=name)
        if kind == "parts":
            return Interleaved.from_json_lines(name, self.tokenizer, path, limits=self.limits)
        if kind == "video":
            return VideoText.from_json_lines(name, self.tokenizer, path, limits=self.limits)
        if kind == "image":
            return ImageTextPairs.from_json_lines(name, self.tokenizer, path, **augmented)
        documents = ConvertedRecords(JsonRecords(path), _pictures_and_text)
        return Interleaved(name, self.tokenizer, documents, folder=Path(path).parent, limits=self.limits)


def _kind_of(path: str) -> str:
    """The field of the first record that says what a JSON Lines file has."""
    record, where = first_record(path)
    listed = [field for field in ("messages", "parts") if record.get(field) is not None]
    kinds = [*listed, *media_fields(record)] or ["text"]
    needed = kinds if listed else [*kinds, "text"]
    if len(kinds) > 1 or kinds[0] == "videos" or any(record.get(field) is None for field in needed):
        raise FileFormatError(message("open_files", where, f"the fields {sorted(record)}", _RECORDS))
    return kinds[0]


def _pictures_and_text(record: dict[str, Any], where: str) -> list[DocumentPart]:
    """The parts of {"images": [PATH, ...], "text": CAPTION}."""
    refuse_media(record, where, "document", but="images")
    images, text = record.get("images"), read_text(record, where, "text")
    if not isinstance(images, list) or not images or not all(isinstance(path, str) and path for path in images):
        raise FileFormatError(message("document", where, f"'images': {images!r:.60}", "a list of paths"))
    return [*(ImageFile(path=path) for path in images), text]


def _check_once(paths: list[str]) -> None:
    known: dict[str, str] = {}
    for path in paths:
        if not path:
            raise ArgumentValueError(message("open_files", "files", "an empty path", _FILES))
        place = os.path.realpath(path)
        if place in known:
            got = f"{path!r} and {known[place]!r}, which are one"
            raise ArgumentValueError(message("open_files", "files", got, "each file once"))
        known[place] = path


def _check_text(path: str) -> None:
    """Refuses what cannot be a text before a run begins: it would end it when it is drawn."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if b"\0" in head:
        hint = "pictures and videos are named by records of a .jsonl; unpack what is compressed"
        raise FileFormatError(message("open_files", path, "a binary file", _FILES, hint))
    if len(head) < _HEAD and not head.strip():
        raise FileFormatError(message("open_files", path, "nothing but blanks", "a text"))


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _stem(path: str) -> str:
    found = Path(os.path.abspath(path))
    return (found.name if found.is_dir() else found.stem) or "files"


def _held_out(name: str) -> str:
    return f"{name}-held-out"
