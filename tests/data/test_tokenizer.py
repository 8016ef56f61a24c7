"""Tokenizers: nothing is lost, nothing becomes special by accident, the released ids and the released split."""

import base64
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from k25sys.data import (
    RELEASED_SPECIAL_TOKENS,
    SPECIAL_LITERALS,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    check_special_tokens,
)
from k25sys.data.tokenizer import _parts
from k25sys.errors import ArgumentTypeError, ArgumentValueError, FileFormatError, OptionalPackageError

TEXTS = st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL_LITERALS.values(), "a", " ", "的", "\n"])).map(
    "".join
)
MERGES = (
    b"th",
    b"the",
    b" the",
    b"in",
    b"ing",
    "的".encode()[:2],
    "的".encode(),
    b"<|",
    b"im_",
    b"12",
    b"123",
    b"1234",
)


def write_ranks(path: Path, tokens: tuple[bytes, ...] = MERGES, *, fill_to: int = 0) -> Path:
    """A vocabulary of the 256 bytes and `tokens`, filled up with four-byte tokens that no text has."""
    ranks = [*(bytes([i]) for i in range(256)), *tokens]
    ranks += [b"\xff\xfe" + i.to_bytes(3, "big") for i in range(fill_to - len(ranks))]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks)))
    return path


@pytest.fixture(scope="module", params=["bytes", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tiktoken", reason="optional: pip install -e '.[tiktoken]'")
    return TiktokenTokenizer(write_ranks(tmp_path_factory.mktemp("ranks") / "small.model"))


def test_released_ids() -> None:
    assert asdict(RELEASED_SPECIAL_TOKENS) == {
        "bos": 163584, "eos": 163585, "im_end": 163586, "im_user": 163587, "im_assistant": 163588,
        "start_header": 163590, "end_header": 163591, "eot": 163593, "im_system": 163594,
        "tool_calls_section_begin": 163595, "tool_calls_section_end": 163596, "tool_call_begin": 163597,
        "tool_call_argument_begin": 163598, "tool_call_end": 163599, "im_middle": 163601, "media_begin": 163602,
        "media_content": 163603, "media_end": 163604, "media_pad": 163605, "think": 163606, "end_think": 163607,
        "unk": 163838, "pad": 163839,
    }  # fmt: skip
    assert RELEASED_SPECIAL_TOKENS.stop_ids == (163585, 163586)


def test_a_vocabulary_of_the_released_size_has_the_released_ids(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="optional: pip install -e '.[tiktoken]'")
    tokenizer = TiktokenTokenizer(write_ranks(tmp_path / "tiktoken.model", fill_to=163584))
    assert tokenizer.special == RELEASED_SPECIAL_TOKENS
    assert tokenizer.vocab_size == 163840
    assert tokenizer.decode([163605, 163589]) == "<|media_pad|><|reserved_token_163589|>"


def test_ids_of_the_byte_tokenizer() -> None:
    special = asdict(ByteTokenizer().special)
    assert list(special.values()) == list(range(256, 279))
    assert list(special) == [field.name for field in fields(RELEASED_SPECIAL_TOKENS)]
    assert ByteTokenizer().vocab_size == 279


@given(text=TEXTS)
def test_text_comes_back_and_is_never_special(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(asdict(tokenizer.special).values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=TEXTS)
def test_special_on_request(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    left = text
    for literal in SPECIAL_LITERALS.values():
        left = left.replace(literal, "\0")
    assert len(set(ids) & set(asdict(tokenizer.special).values())) == len(
        {literal for literal in SPECIAL_LITERALS.values() if literal in text}
    )
    assert sum(i >= min(asdict(tokenizer.special).values()) for i in ids) == left.count("\0") - text.count("\0")


@given(content=st.binary())
def test_bytes_come_back(content: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(content)) == content


@given(text=st.text(st.characters(categories=("Cs", "L", "P"))))
@example(text="\ud83d")
def test_lone_surrogates_come_back(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_bytes_that_are_no_text_are_marked(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0xE7, 0x61]) == "\ufffda"


def test_the_released_split(tmp_path: Path) -> None:
    """Merges stop where K2 splits: digits by three, a word from its blank, Chinese from letters."""
    pytest.importorskip("tiktoken", reason="optional: pip install -e '.[tiktoken]'")
    merges = (b"34", b"a\xe7", b"aB", b"  ", *MERGES, b"'s", b"the's")
    tokenizer = TiktokenTokenizer(write_ranks(tmp_path / "tiktoken.model", merges))

    def pieces(text: str) -> list[bytes]:
        return [tokenizer.decode([i]).encode() if i < 128 or i >= 256 else bytes([i]) for i in tokenizer.encode(text)]

    assert pieces("1234") == [b"123", b"4"]
    assert pieces("the the") == [b"the", b" the"]
    assert pieces("12  the") == [b"12", b" ", b" the"]
    assert pieces("a的") == [b"a", "的".encode()]
    assert pieces("aB") == [b"a", b"B"]
    assert pieces("the's") == [b"the's"]


@given(
    runs=st.lists(st.tuples(st.sampled_from("a \n"), st.sampled_from((1, 24_999, 25_000, 25_001, 60_000))), max_size=6)
)
@example(runs=[("a", 390_000), (" ", 20_000), ("a", 55_000)])
def test_long_texts_are_cut_as_released(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in runs)
    parts = list(_parts(text))
    assert "".join(parts) == text
    expected, start, run = [], 0, 0
    for i, character in enumerate(text):  # the released loop, character by character
        if i % 400_000 == 0:
            expected, start, run = [*expected, *([text[start:i]] if i else [])], i, 0
        elif character.isspace() != text[i - 1].isspace():
            run = 0
        run += 1
        if run > 25_000:
            expected, start, run = [*expected, text[start:i]], i, 1
    assert parts == [*expected, *([text[start:]] if text else [])]


def test_wrong_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(ArgumentTypeError, match="text: got int"):
        tokenizer.encode(3)  # pyright: ignore[reportArgumentType]
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ArgumentValueError, match=rf"ids\[1\]: got {wrong}, accepted 0 to"):
            tokenizer.decode([0, wrong])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"YQ== 0\nnot base64 1\n", r"line 2: b'not base64 1'"),
        (b"YQ== 0\nYg==\n", r"line 2"),
        (b"YQ== 0\nYQ== 1\n", r"line 2: rank 1 of a token that came before"),
        (b"YQ== 0\nYg== 2\n", r"line 2: rank 2, accepted a new token, rank 1"),
        (b"YQ== 0\nYg== 1\n", r"no token for 254 bytes, the first 0x00"),
        (b"", r"no token for 256 bytes"),
    ],
)
def test_wrong_vocabularies(tmp_path: Path, content: bytes, says: str) -> None:
    pytest.importorskip("tiktoken", reason="optional: pip install -e '.[tiktoken]'")
    (tmp_path / "wrong.model").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"wrong\.model.*" + says):
        TiktokenTokenizer(tmp_path / "wrong.model")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
        TiktokenTokenizer(tmp_path / "nowhere.model")


def test_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(OptionalPackageError, match=r"tiktoken.*pip install.*ByteTokenizer"):
        TiktokenTokenizer("tiktoken.model")


def test_a_tokenizer_must_write_what_the_model_reads() -> None:
    tokenizer = ByteTokenizer()
    named = {"pad": tokenizer.special.pad, "eos": tokenizer.special.eos}
    check_special_tokens(tokenizer, named, tokenizer.vocab_size)
    check_special_tokens(tokenizer, {}, 10**6)
    with pytest.raises(ArgumentValueError, match=r"got the model's eos 3, the tokenizer's 257, accepted the same"):
        check_special_tokens(tokenizer, {**named, "eos": 3}, tokenizer.vocab_size)
    with pytest.raises(ArgumentValueError, match="a table of 278, the tokenizer's vocabulary is 279"):
        check_special_tokens(tokenizer, named, tokenizer.vocab_size - 1)
