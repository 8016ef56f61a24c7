"""Sources over files tell whether these are those of before."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from k25sys.data.sample import Source, fingerprint_of
from k25sys.data.sources import (
    Captioned,
    ImageTextPairs,
    Interleaved,
    JsonLines,
    TextDocuments,
    TextFiles,
    VideoText,
    WebDataset,
)
from k25sys.data.sources.fingerprint import files_digest, spread, texts_digest
from k25sys.data.trajectories import ConversationSource
from tests.data.source_digest import BYTES
from tests.data.test_sources import write_lines, write_tar

MB = 2**20


def overwrite(path: Path, place: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def test_sizes_and_both_ends_count(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(3 * MB))
    small.write_bytes(bytes(MB + 5))
    before = files_digest([large, small])
    for path, place in ((large, 0), (large, MB - 1), (large, 2 * MB), (large, 3 * MB - 1), (small, MB), (small, 7)):
        overwrite(path, place, b"x")
        assert files_digest([large, small]) != before, (path, place)
        overwrite(path, place, b"\0")
        assert files_digest([large, small]) == before
    overwrite(large, MB, b"x")
    assert files_digest([large, small]) == before, "the middle is not read"
    os.truncate(large, 3 * MB + 1)
    assert files_digest([large, small]) != before
    os.truncate(large, 3 * MB)
    assert files_digest([small, large]) != before
    with pytest.raises(FileNotFoundError, match="gone"):
        files_digest([large, tmp_path / "gone"])


def test_of_many_files_all_sizes_and_a_thousand_contents_count(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(2000)]
    for file in files:
        file.write_bytes(b"a")
    before = files_digest(files)
    files[1].write_bytes(b"b")
    assert files_digest(files) == before
    files[1].write_bytes(b"bb")
    assert files_digest(files) != before
    files[1].write_bytes(b"b")
    files[2].write_bytes(b"b")
    assert files_digest(files) != before
    assert list(spread(7)) == list(range(7))
    assert len(set(spread(1001))) == 1000


def test_texts_do_not_run_together() -> None:
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"]) != texts_digest(["abc"])
    assert texts_digest(["\ud800"])


PAIR, STORY = {"image": "a.png", "text": "one"}, {"parts": ["b", {"image": "b.png"}, {"video": "v.mp4"}]}
RECORDS: dict[str, list[Any]] = {
    "text": [{"text": "one"}, {"text": "two"}],
    "messages": [{"messages": [{"role": "user", "content": "one"}]}],
    "pairs": [PAIR, {"no": "text"}, PAIR],
    "videos": [{"video": "v.mp4", "text": "one"}],
    "stories": [STORY, {"parts": "one"}],
}
OPENED: dict[str, Callable[[Path], Source]] = {
    "text": lambda f: JsonLines("s", BYTES, f / "d.jsonl"),
    "messages": lambda f: ConversationSource(f / "d.jsonl", BYTES),
    "pairs": lambda f: ImageTextPairs.from_json_lines("s", BYTES, f / "d.jsonl"),
    "videos": lambda f: VideoText.from_json_lines("s", BYTES, f / "d.jsonl"),
    "stories": lambda f: Interleaved.from_json_lines("s", BYTES, f / "d.jsonl"),
    "folder": lambda f: ImageTextPairs.from_folder("s", BYTES, f),
    "files": lambda f: TextFiles.from_folder("s", BYTES, f),
}
MEDIA = {"pairs": {"a.png"}, "videos": {"v.mp4"}, "stories": {"b.png", "v.mp4"}, "folder": {"a.png", "b.png"}}
"""What the documents of a kind refer to."""


def filled(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for name, side in (("a", 28), ("b", 56)):
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name}: one")
    (folder / "v.mp4").write_bytes(b"not opened")
    if kind in RECORDS:
        write_lines(folder / "d.jsonl", *RECORDS[kind])
    return folder


@pytest.mark.parametrize("kind", OPENED)
def test_what_changes_the_fingerprint_of_a_source(tmp_path: Path, kind: str) -> None:
    def made(name: str, change: Callable[[Path], Any] = lambda folder: None) -> str:
        folder = filled(tmp_path / name, kind)
        change(folder)
        source = OPENED[kind](folder)
        assert pickle.loads(pickle.dumps(source)).fingerprint == fingerprint_of(source)
        return fingerprint_of(source)

    text = "d.jsonl" if kind in RECORDS else "a.txt"
    first = made("first")
    assert len(first) == 32
    assert made("elsewhere") == first
    assert made("same size", lambda f: (f / text).write_text((f / text).read_text().replace("one", "eno"))) != first
    assert made("longer", lambda f: (f / text).write_text((f / text).read_text() + text)) != first
    for file in ("a.png", "b.png", "v.mp4"):
        is_media = file in MEDIA.get(kind, ())
        grown = made(f"grown {file}", lambda f, file=file: overwrite(f / file, (f / file).stat().st_size, b"x"))
        assert (grown != first) == is_media
        assert (made(f"no {file}", lambda f, file=file: (f / file).unlink()) != first) == is_media


def test_of_shards(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    write_tar(shard, {"1.png": b"x" * 1500, "1.txt": b"one"})
    first = fingerprint_of(WebDataset("w", BYTES, [shard]))
    assert fingerprint_of(WebDataset("w", BYTES, [shard])) == first
    shard.write_bytes(shard.read_bytes().replace(b"one", b"eno"))
    assert fingerprint_of(WebDataset("w", BYTES, [shard])) not in (first, "")


def test_in_memory_there_is_none(tmp_path: Path) -> None:
    filled(tmp_path / "f", "files")
    pairs = [Captioned(media="a.png", text="one")]
    assert fingerprint_of(TextDocuments("s", BYTES, ["one"])) == ""
    assert fingerprint_of(ImageTextPairs("s", BYTES, pairs, folder=tmp_path / "f")) == ""
