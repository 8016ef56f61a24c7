"""Tokenizers: bytes (the embedded default, needs no package) and the released byte-pair vocabulary. Source: spec 1.5.

Text never turns into a special token by what it says: "<|im_end|>" typed by a user is ten ordinary characters, unless
the caller asks for `allow_special`.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from k25sys.errors import ArgumentTypeError, ArgumentValueError, FileFormatError, OptionalPackageError, listing, message
from k25sys.special_tokens import (
    NUM_RESERVED,
    RELEASED_SPECIAL_IDS,
    SPECIAL_LITERALS,
    SPECIAL_OFFSETS,
    SpecialTable,
)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens(SpecialTable[int]):
    """Ids of the tokens that structure a conversation, in the order of their released ids."""

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end a reply."""
        return self.eos, self.im_end


_ANY_LITERAL = re.compile("|".join(re.escape(literal) for literal in SPECIAL_LITERALS.values()))
_NAME_OF = MappingProxyType({literal: name for name, literal in SPECIAL_LITERALS.items()})
RELEASED_SPECIAL_TOKENS = SpecialTokens(**RELEASED_SPECIAL_IDS)

# Kimi K2's split of text into pieces, within which byte pairs merge.
_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_OWN_VOCABULARY = "give the model's own vocabulary: --tokenizer FILE, or --set data.tokenizer=FILE"
# The released tokenizer encodes no more at a time: longer runs exhaust the stack of tiktoken's regular expressions.
_MOST_CHARACTERS = 400_000
_LONGEST_RUN = 25_000


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`; with `allow_special`, literals of special tokens (SPECIAL_LITERALS) become those tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens as their literals; bytes that are no UTF-8 become U+FFFD."""
        ...


def check_special_tokens(tokenizer: Tokenizer, wanted: Mapping[str, int], vocab_size: int) -> None:
    """That a tokenizer writes what a model reads.

    Args:
        wanted: the model's special tokens by their names in SpecialTokens; those that it has.
        vocab_size: of the model's table, which may be longer than the tokenizer's vocabulary.

    Raises:
        ArgumentValueError: with the tokens that differ.
    """
    differ = [
        f"{name} {token}, the tokenizer's {theirs}"
        for name, token in wanted.items()
        if token != (theirs := getattr(tokenizer.special, name))
    ]
    if tokenizer.vocab_size > vocab_size:
        differ.append(f"a table of {vocab_size}, the tokenizer's vocabulary is {tokenizer.vocab_size}")
    if differ:
        got = f"the model's {listing(differ, most=3, separator='; ')}"
        raise ArgumentValueError(message("tokenizer", "special tokens", got, "the same", _OWN_VOCABULARY))


class ByteTokenizer:
    """One id a byte of UTF-8, then the special tokens. Gives back any text, lone surrogates included, and any bytes."""

    def __init__(self) -> None:
        self._special = SpecialTokens(**{name: 256 + i for i, name in enumerate(SPECIAL_LITERALS)})
        self._literals = {256 + i: text.encode() for i, text in enumerate(SPECIAL_LITERALS.values())}

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens: 256 and on, in the order of their released ids."""
        return self._special

    @property
    def vocab_size(self) -> int:
        """279: 256 bytes and 23 special tokens."""
        return 256 + len(self._literals)

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Ids of text or bytes. See `Tokenizer.encode`; in bytes nothing is special."""
        if isinstance(text, bytes):
            return list(text)
        _check_text("ByteTokenizer.encode", text)
        if allow_special:
            return _encode_special(text, self._special, self.encode)
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        content = self.decode_bytes(ids)
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return content.decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for, special tokens as their literals."""
        ids = _checked_ids("ByteTokenizer.decode", ids, self.vocab_size)
        return b"".join(bytes([i]) if i < 256 else self._literals[i] for i in ids)


class TiktokenTokenizer:
    """The byte-pair vocabulary of a released `tiktoken.model`: one line a token, base64 of its bytes and its rank.

    The special tokens follow the last rank at their released distances, so that the released file, which has 163584
    ranks, gives the released ids. Lone surrogates become U+FFFD, as tiktoken has it.

    Args:
        file: path of the vocabulary.

    Raises:
        FileNotFoundError and other OSError: the file cannot be read.
        ValueError: it is not such a vocabulary; the message names the line.
        ImportError: tiktoken is not installed.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        try:
            import tiktoken
        except ImportError as error:
            hint = "pip install 'k25sys[tiktoken]'; ByteTokenizer needs no package"
            raise OptionalPackageError(
                message("TiktokenTokenizer", "package", "no tiktoken", "tiktoken >= 0.8", hint)
            ) from error
        ranks = _read_ranks(Path(file))
        names = {offset: name for name, offset in SPECIAL_OFFSETS.items()}
        first = len(ranks)
        self._special = SpecialTokens(**{name: first + offset for name, offset in SPECIAL_OFFSETS.items()})
        reserved = {
            SPECIAL_LITERALS[names[i]] if i in names else f"<|reserved_token_{first + i}|>": first + i
            for i in range(NUM_RESERVED)
        }
        self._encoding = tiktoken.Encoding(
            Path(file).name, pat_str=_PIECES, mergeable_ranks=ranks, special_tokens=reserved
        )

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens."""
        return self._special

    @property
    def vocab_size(self) -> int:
        """Ranks of the file and 256 special or reserved tokens; 163840 for the released file."""
        return self._encoding.n_vocab

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        _check_text("TiktokenTokenizer.encode", text)
        if allow_special:
            return _encode_special(text, self._special, self.encode)
        return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        ids = _checked_ids("TiktokenTokenizer.decode", ids, self.vocab_size)
        return self._encoding.decode(ids)


def _encode_special(text: str, special: SpecialTokens, encode: Any) -> list[int]:
    ids, end = [], 0
    for match in _ANY_LITERAL.finditer(text):
        ids += [*encode(text[end : match.start()]), getattr(special, _NAME_OF[match.group()])]
        end = match.end()
    return ids + encode(text[end:])


def _parts(text: str) -> Iterator[str]:
    """Cuts `text` as the released tokenizer does: slices too long, and too long runs of blanks or of anything else."""
    for start in range(0, len(text), _MOST_CHARACTERS):
        part = text[start : start + _MOST_CHARACTERS]
        runs = (run for run in re.finditer(r"\s+|\S+", part) if run.end() - run.start() > _LONGEST_RUN)
        cuts = [cut for run in runs for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)]
        for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[begin:end]


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    accepted = "the base64 of a token's bytes, a space, its rank"
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            got = f"line {number}: {line[:40]!r}"
            raise FileFormatError(message("TiktokenTokenizer", repr(str(file)), got, accepted)) from error
        if token in ranks or rank != len(ranks):
            got = f"line {number}: rank {rank}" + (" of a token that came before" if token in ranks else "")
            accepted = f"a new token, rank {len(ranks)}"
            raise FileFormatError(message("TiktokenTokenizer", repr(str(file)), got, accepted))
        ranks[token] = rank
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        got = f"no token for {len(missing)} bytes, the first {missing[0]:#04x}"
        raise FileFormatError(message("TiktokenTokenizer", repr(str(file)), got, "a token for each of the 256 bytes"))
    return ranks


def _check_text(op: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ArgumentTypeError(message(op, "text", type(text).__name__, "a str"))


def _checked_ids(op: str, ids: Iterable[int], vocab_size: int) -> Sequence[int]:
    """A list of `ids`. Raises ValueError for one outside the vocabulary."""
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ArgumentValueError(message(op, f"ids[{position}]", i, f"0 to {vocab_size - 1}"))
    return ids
