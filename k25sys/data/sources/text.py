"""Sources of text: files, one document each, and JSON Lines."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from k25sys.data.sample import Sample, check_position, fingerprint_of
from k25sys.data.sources.document import GivenText, document
from k25sys.data.sources.fingerprint import files_digest
from k25sys.data.sources.records import ConvertedRecords, JsonRecords, read_parts, refuse_media
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import ArgumentValueError, FileFormatError, listing, message


class TextDocuments:
    """Texts in memory, or in anything that gives them by position. Parts that are `GivenText` have no loss.

    Args:
        name: unique within a mixture.
        tokenizer: writes the texts.
        documents: a text each, or a list of texts and given texts.

    Raises:
        ValueError: no documents.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, documents: Sequence[str] | Sequence[Sequence[str | GivenText]]
    ) -> None:
        if len(documents) == 0:
            raise ArgumentValueError(message(type(self).__name__, "documents", "none", "one or more"))
        self._name, self._tokenizer, self._documents = name, tokenizer, documents

    @property
    def name(self) -> str:
        """Unique within a mixture."""
        return self._name

    @property
    def has_media(self) -> bool:
        """False."""
        return False

    @property
    def fingerprint(self) -> str:
        """Of the files that the texts are read from, see `files_digest`; "" of texts in memory."""
        return fingerprint_of(self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def sample(self, index: int, epoch: int) -> Sample:
        """Document `index`, the same in each pass.

        Raises:
            TypeError, ValueError: an index outside [0, len), a negative epoch, a faulty line or file.
            OSError: a file cannot be read.
        """
        check_position(f"{type(self).__name__}.sample", index, len(self), epoch)
        parts = self._documents[int(index)]
        return document([parts] if isinstance(parts, str) else parts, self._tokenizer)

    def pixels(self, key: str) -> Tensor:
        """Raises ValueError: there are no pixels."""
        raise ArgumentValueError(message(f"{type(self).__name__}.pixels", "key", repr(key), "none: it has only text"))


class TextFiles(TextDocuments):
    """Files of plain text or code in UTF-8, each a document as a whole; a byte order mark is dropped.

    Args:
        name: unique within a mixture.
        tokenizer: writes the texts.
        files: their paths, in the order of the documents.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: no files. What is wrong with a text is said by `sample`.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, files: Iterable[str | os.PathLike[str]]) -> None:
        super().__init__(name, tokenizer, _FileTexts([os.fspath(file) for file in files]))

    @classmethod
    def from_folder(
        cls, name: str, tokenizer: Tokenizer, folder: str | os.PathLike[str], *, suffixes: Sequence[str] = (".txt",)
    ) -> "TextFiles":
        """All files under `folder` that end in one of `suffixes` and are not empty, sorted by path.

        Raises:
            ValueError: there are none.
        """
        found = sorted(file for file in Path(folder).rglob("*") if file.suffix in suffixes and file.is_file())
        files = [file for file in found if file.stat().st_size]
        if not files:
            got = f"no file in {str(folder)!r}"
            raise ArgumentValueError(message("TextFiles", "folder", got, f"files that end in {listing(suffixes)}"))
        return cls(name, tokenizer, files)


class JsonLines(TextDocuments):
    """A JSON Lines file of texts: {"text": TEXT}, or a list of parts, TEXT or {"text": TEXT, "loss": false}.

    Args:
        name: unique within a mixture.
        tokenizer: writes the texts.
        file: path. Only the places of its lines are held in memory.
        field: of the text or the list. Other fields are passed over, but for those that name pictures or videos: a
            line with one of them is faulty, since it would be learnt without what it shows.

    Raises:
        OSError, ValueError: the file cannot be read, or has no lines. What is wrong with a line is said by `sample`:
            lines are checked when they are read, and none is skipped.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, file: str | os.PathLike[str], *, field: str = "text") -> None:
        super().__init__(name, tokenizer, ConvertedRecords(JsonRecords(file), partial(_text_parts, field=field)))


class _FileTexts(Sequence[str]):
    """The texts of files, read when asked for."""

    def __init__(self, files: list[str]) -> None:
        self._files = files
        self.fingerprint = files_digest(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        file = self._files[index]
        content = Path(file).read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            got = f"the byte {content[error.start]:#04x}, {error.reason}"
            raise FileFormatError(message("TextFiles", f"{file}:{line}", got, "UTF-8")) from error
        if not text.strip():
            raise FileFormatError(message("TextFiles", file, "nothing but blanks", "a text"))
        return text


def _text_parts(record: dict[str, Any], where: str, *, field: str) -> list[str | GivenText]:
    refuse_media(record, where, "JsonLines", but=field)
    parts = read_parts(record, where, field)
    texts = [part for part in parts if isinstance(part, (str, GivenText))]
    if len(texts) < len(parts):
        hint = 'Interleaved reads text with media, {"parts": [...]}'
        raise FileFormatError(message("JsonLines", where, "a part with a picture or a video", "only texts", hint))
    return texts
