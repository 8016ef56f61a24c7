"""JSON Lines: found by position, read when they are asked for; an error names the file and the line."""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from k25sys.data.sources.document import GivenText
from k25sys.data.sources.fingerprint import files_digest
from k25sys.errors import FileFormatError, message

T = TypeVar("T")
_SHOWN = 60  # characters of a faulty value in an error
_MEDIA_FIELDS = ("image", "images", "video", "videos")


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A picture in a document, by its path."""

    path: str


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video in a document, by its path."""

    path: str


DocumentPart = str | GivenText | ImageFile | VideoFile


class JsonRecords:
    """The objects of a JSON Lines file. Blank lines are passed over; the positions of the others are held in memory.

    Whether a line is an object is seen when it is asked for, not before.

    Attributes:
        path: the file.
        fingerprint: of its content, see `files_digest`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no lines.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = Path(file)
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)
        self._size = start
        if not self._starts:
            raise FileFormatError(message("JsonRecords", repr(str(self.path)), "no lines", "one JSON object a line"))
        self.fingerprint = files_digest([self.path])

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """file:line of record `index`."""
        return f"{self.path}:{self._numbers[index]}"

    def record(self, index: int) -> dict[str, Any]:
        """The object of record `index`.

        Raises:
            ValueError: the line is no UTF-8, no JSON or no object, or the file has changed.
        """
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                got, accepted = "a file of another size than before", "one that does not change"
                raise FileFormatError(message("JsonRecords", repr(str(self.path)), got, accepted))
            file.seek(self._starts[index])
            line = file.readline()
        return parse_object(line, self.where(index))


class ConvertedRecords(Sequence[T], Generic[T]):
    """The records of a file as what `convert` makes of (record, where), read anew each time."""

    def __init__(self, records: JsonRecords, convert: Callable[[dict[str, Any], str], T]) -> None:
        self.records, self._convert = records, convert

    @property
    def fingerprint(self) -> str:
        """The file's."""
        return self.records.fingerprint

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return self._convert(self.records.record(index), self.records.where(index))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts `where` in front of what goes wrong with a document's files."""
    try:
        yield
    except (OSError, FileFormatError) as error:
        got = f"{type(error).__name__}: {error}"
        raise FileFormatError(message("document", where, got, "files that can be read")) from error


def place(documents: Sequence[Any], name: str, index: int) -> str:
    """What an error calls document `index`: file:line where it comes from a file."""
    if isinstance(documents, ConvertedRecords):
        return documents.records.where(index)
    return f"{name}[{index}]"


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 that `content` is.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise FileFormatError(message("document", where, got, "a JSON object in UTF-8")) from error
    if not isinstance(value, dict):
        raise FileFormatError(message("document", where, _shown(value), "a JSON object"))
    return value


def first_record(file: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The object of the first line of a JSON Lines file that is not blank, and its file:line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no lines, or this one is no object.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                where = f"{os.fspath(file)}:{number}"
                return parse_object(line, where), where
    raise FileFormatError(message("JsonRecords", repr(os.fspath(file)), "no lines", "one JSON object a line"))


def media_fields(record: Mapping[str, Any]) -> list[str]:
    """Those of its fields that name pictures or videos. What is null or empty names none."""
    return [field for field in _MEDIA_FIELDS if record.get(field) not in (None, "", [])]


def refuse_media(record: Mapping[str, Any], where: str, reader: str, *, but: str) -> None:
    """Raises ValueError where the record names media in another field than `but`: `reader` would pass them over."""
    found = [field for field in media_fields(record) if field != but]
    if found:
        hint = "a file has records of one kind: {image, text}, {video, text}, {parts} or {text}"
        accepted = f"{but!r} and none that names pictures or videos besides"
        raise FileFormatError(message(reader, where, f"the field {', '.join(map(repr, found))}", accepted, hint))


def read_text(record: dict[str, Any], where: str, field: str) -> str:
    """The text in `field`.

    Raises:
        ValueError: it is missing, not a text, or blank.
    """
    value = _field(record, where, field)
    if not isinstance(value, str) or not value.strip():
        raise FileFormatError(message("document", where, f"{field!r}: {_shown(value)}", "a text that is not blank"))
    return value


def read_parts(record: dict[str, Any], where: str, field: str) -> list[DocumentPart]:
    """The parts in `field`: a text, or a list of texts, {"text": T, "loss": false}, {"image": PATH}, {"video": PATH}.

    Raises:
        ValueError: it is missing, blank, or holds something else.
    """
    value = _field(record, where, field)
    if isinstance(value, str):
        return [read_text(record, where, field)]
    parts = [_part(part, f"{where}, {field}[{i}]") for i, part in enumerate(value)] if isinstance(value, list) else []
    texts = (part.text if isinstance(part, GivenText) else part for part in parts)
    if not any(text.strip() if isinstance(text, str) else True for text in texts):
        got = f"{field!r}: {_shown(value)}"
        raise FileFormatError(message("document", where, got, "a text that is not blank, or a list of parts"))
    return parts


def _part(value: Any, where: str) -> DocumentPart:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value.keys() <= {"text", "loss"}:
        loss = value.get("loss", True)
        if isinstance(loss, bool):
            return value["text"] if loss else GivenText(text=value["text"])
    if isinstance(value, dict) and len(value) == 1:
        ((kind, path),) = value.items()
        if kind in ("image", "video") and isinstance(path, str) and path:
            return ImageFile(path=path) if kind == "image" else VideoFile(path=path)
    accepted = 'a text, {"text": TEXT, "loss": false}, {"image": PATH} or {"video": PATH}'
    raise FileFormatError(message("document", where, _shown(value), accepted))


def _field(record: dict[str, Any], where: str, field: str) -> Any:
    if field not in record:
        raise FileFormatError(message("document", where, f"the fields {sorted(record)}", f"a field {field!r}"))
    return record[field]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
