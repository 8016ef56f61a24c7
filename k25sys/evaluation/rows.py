"""Questions in JSON lines: one object a line.

    {"id": "p1", "prompt": "What is 1 + 1?", "answer": "2"}
    {"id": "p2", "prompt": [{"image": "cats.png"}, "How many cats?"], "choices": ["one", "two"], "answer": "B"}

id: text or a whole number, unique in the file.
prompt: a text, or a list of texts, {"image": path} and {"video": path}; paths are relative to the file's folder.
answer: what the task's rule takes (`python -m k25sys eval --list` names the rule, k25sys/evaluation/rules.py says it).
choices: the options of a multiple-choice question, shown below the prompt with letters from A on; or
num_choices: how many options the prompt itself shows.
Other fields are kept for the rules that read them. Blank lines are skipped.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from k25sys.errors import ArgumentValueError, FileFormatError, message


class Media(NamedTuple):
    """A picture or a video in a prompt."""

    kind: Literal["image", "video"]
    path: Path


Prompt = tuple[str | Media, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question."""

    id: str
    prompt: Prompt
    answer: Any
    choices: tuple[str, ...] = ()
    num_choices: int = 0
    """Options of a multiple-choice question, 0 of another."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the line has."""
    line: int = 0


def read_rows(file: str | os.PathLike[str], *, limit: int | None = None) -> list[Row]:
    """All questions of a file, or the first `limit`.

    Raises:
        FileNotFoundError and other OSError: the file cannot be read.
        ValueError: a malformed line, with the file and the number of the line; a file without questions.
    """
    if limit is not None and limit < 1:
        raise ArgumentValueError(message("read_rows", "limit", limit, "an int >= 1"))
    path, rows, lines_by_id = Path(file), [], {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            row = _Line(path, number).row(line)
            if row.id in lines_by_id:
                raise row_error(path, number, f"id {row.id!r} of line {lines_by_id[row.id]} again", "unique ids")
            lines_by_id[row.id] = number
            rows.append(row)
    if not rows:
        raise FileFormatError(message("read_rows", repr(str(path)), "no line", "at least one question"))
    return rows


def row_error(file: str | os.PathLike[str], line: int, got: object, accepted: str) -> FileFormatError:
    """The error of a line that is not as it should be."""
    return FileFormatError(message("read_rows", f"{os.fspath(file)} line {line}", got, accepted))


class _Line:
    """Where errors are."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def error(self, got: object, accepted: str) -> FileFormatError:
        return row_error(self.path, self.number, got, accepted)

    def row(self, line: bytes) -> Row:
        fields = self._object(line)
        for name in ("id", "prompt", "answer"):
            if name not in fields:
                raise self.error(f"no {name}", "an object with id, prompt and answer")
        row_id, choices = fields.pop("id"), fields.pop("choices", [])
        if isinstance(row_id, bool) or not isinstance(row_id, (str, int)):
            raise self.error(f"id {row_id!r}", "a text or a whole number")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise self.error(f"choices {choices!r}", "a list of texts")
        number = fields.pop("num_choices", len(choices))
        if isinstance(number, bool) or not isinstance(number, int) or (choices and number != len(choices)):
            raise self.error(f"num_choices {number!r}", "the number of options")
        if number != 0 and not 2 <= number <= 26:
            raise self.error(f"{number} choices", "2 to 26")
        return Row(
            id=str(row_id), prompt=self._prompt(fields.pop("prompt")), answer=fields.pop("answer"),
            choices=tuple(choices), num_choices=number, fields=fields, line=self.number,
        )  # fmt: skip

    def _object(self, line: bytes) -> dict[str, Any]:
        def refuse(name: str) -> None:
            raise ValueError(f"{name} is no JSON")

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len({name for name, _ in pairs}) != len(pairs):
                raise ValueError("a name occurs twice")
            return dict(pairs)

        try:
            value = json.loads(line.decode(), parse_constant=refuse, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{error}", "one JSON object a line, UTF-8") from error
        if not isinstance(value, dict):
            raise self.error(f"a {type(value).__name__}", "one JSON object a line")
        return value

    def _prompt(self, prompt: Any) -> Prompt:
        accepted = 'a text, or a list of texts, {"image": path} and {"video": path}'
        parts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(parts, list) or not parts:
            raise self.error(f"prompt {prompt!r}", accepted)
        return tuple(self._part(part, accepted) for part in parts)

    def _part(self, part: Any, accepted: str) -> str | Media:
        if isinstance(part, str):
            return part
        if isinstance(part, dict) and len(part) == 1:
            (kind, name) = next(iter(part.items()))
            if kind in ("image", "video") and isinstance(name, str) and name and "\0" not in name:
                path = self.path.parent / name
                if not path.is_file():
                    raise self.error(f"{kind} {name!r}, which is no file", f"paths from {str(self.path.parent)!r}")
                return Media(kind, path)
        raise self.error(f"part {part!r}", accepted)
