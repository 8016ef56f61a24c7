"""The files of `data.files`: which source reads them, how it is called, and that a resume notices other files."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from k25sys.data import MixedSource, Mixture, Source, TokenStream, hold_out, sample_file
from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus import sample_corpus
from k25sys.data.drawn import DRAWN_KINDS
from k25sys.data.sample import fingerprint_of
from k25sys.data.sources import ImageTextPairs, Interleaved, JsonLines, TextFiles, VideoText, WebDataset
from k25sys.data.trajectories import ConversationSource
from k25sys.errors import ArgumentValueError, ConfigError, DataError, FileFormatError
from k25sys.recipes import find_recipe
from k25sys.recipes.corpus import CORPUS_TEXTS, sources_of_files
from k25sys.training.config import DataOptions
from tests.data.source_digest import BYTES, learnt

PATCHES = 16
CHAT = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
KINDS: dict[str, tuple[dict[str, Any], type, str, int]] = {
    "text": ({"text": "one", "image": None, "videos": []}, JsonLines, "one[EOS]", 0),
    "parted text": ({"text": ["o", {"text": "n", "loss": False}, "e"]}, JsonLines, "oe[EOS]", 0),
    "picture": ({"image": "a.png", "text": "one", "id": 7}, ImageTextPairs, "one[EOS]", 1),
    "pictures": ({"images": ["a.png", "b.png"], "text": "one"}, Interleaved, "one[EOS]", 2),
    "video": ({"video": "v.mp4", "text": "one"}, VideoText, "one[EOS]", 2),
    "parts": ({"parts": ["o", {"image": "a.png"}, "ne"]}, Interleaved, "one[EOS]", 1),
    "chat": (CHAT, ConversationSource, "", 0),
}


def write_lines(path: Path, *records: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name in ("a", "b"):
        Image.new("RGB", (150, 100), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    shutil.copy(sample_file("carphone_distorted.mp4"), folder / "v.mp4")
    return folder


def opened(*files: str | Path) -> list[Source]:
    given = [str(file) for file in files]
    return sources_of_files(given, BYTES, max_patches=PATCHES, augmentation=Augmentation(), seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_record_says_what_reads_a_file(media: Path, kind: str) -> None:
    record, wanted, text, num_media = KINDS[kind]
    (source,) = opened(write_lines(media / "d.jsonl", "", record, record))
    assert type(source) is wanted
    assert (source.name, len(source), source.has_media) == ("d", 2, num_media > 0)
    sample = source.sample(1, 0)
    assert len(sample.media) == num_media
    for item in sample.media:
        assert item.grid[1] * item.grid[2] <= PATCHES
        assert len(source.pixels(item.key)) == item.num_patches
    assert kind == "chat" or learnt(sample) == text
    assert any("augmentation" in item.key for item in sample.media) == (kind == "picture")


TEXT_AND_PICTURE = {"text": "one", "images": ["a.png"], "image": "a.png"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no kind": (
        {"caption": "one", "image": "a.png"},
        r"d.jsonl:2: got the fields \['caption', 'image'\], accepted one",
    ),
    "unknown": ({"conversations": []}, r"d.jsonl:2: got the fields \['conversations'\].*\"messages\": \[\.\.\.\]"),
    "two kinds": (TEXT_AND_PICTURE, r"d.jsonl:2: got the fields \['image', 'images', 'text'\]"),
    "chat with pictures": ({**CHAT, "images": ["a.png"]}, r"d.jsonl:2: got the fields \['images', 'messages'\]"),
    "null": ({"text": None}, r"d.jsonl:2: got the fields \['text'\]"),
    "videos": ({"videos": ["v.mp4"], "text": "one"}, r"d.jsonl:2: got the fields \['text', 'videos'\]"),
    "no paths": ({"images": [3], "text": "one"}, r"d.jsonl:2: got 'images': \[3\], accepted a list of paths"),
    "path": ({"images": "a.png", "text": "one"}, r"d.jsonl:2: got 'images': 'a.png', accepted a list of paths"),
    "no picture": ({"image": "gone.png", "text": "one"}, "d.jsonl:2: got FileNotFoundError.*gone.png"),
    "no JSON": ("{", "d.jsonl:2: got JSONDecodeError"),
    "no object": ("[1]", r"d.jsonl:2: got \[1\], accepted a JSON object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_first_record_of_no_kind_is_refused(media: Path, case: str) -> None:
    record, says = REFUSED[case]
    with pytest.raises(FileFormatError, match=says):
        opened(write_lines(media / "d.jsonl", "", record))


@pytest.mark.parametrize("kind", ["text", "picture", "pictures", "parts", "video"])
def test_a_later_record_with_other_media_is_an_error(media: Path, kind: str) -> None:
    record, *_ = KINDS[kind]
    other = {"video": "v.mp4", "text": "one"} if record.get("image") else {"image": "a.png"}
    (source,) = opened(write_lines(media / "d.jsonl", record, {**record, **other}))
    source.sample(0, 0)
    with pytest.raises(
        FileFormatError, match=rf"d.jsonl:2: got the field '{next(iter(other))}', accepted .* none that"
    ):
        source.sample(1, 0)


def test_folders_tar_files_and_texts(media: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures.of").mkdir()
    for file in ("a.png", "a.txt"):
        shutil.copy(media / file, tmp_path / "pictures.of")
    texts = [write_lines(tmp_path / name, "some text") for name in ("a.py", "b")]
    shards = [shard(tmp_path / "s.tar", media, "txt"), shard(tmp_path / "t.TAR", media, "json")]
    folder, *tars, files = opened(texts[0], f"{tmp_path / 'pictures.of'}/", *shards, texts[1])
    assert [type(source) for source in (folder, *tars, files)] == [ImageTextPairs, WebDataset, WebDataset, TextFiles]
    assert [source.name for source in (folder, *tars, files)] == ["pictures.of", "s", "t", "files"]
    assert [learnt(source.sample(0, 0)) for source in (folder, *tars)] == ["picture a[EOS]"] * 3
    assert [learnt(files.sample(index, 0)) for index in (0, 1)] == ["some text\n[EOS]"] * 2
    for source in (folder, *tars):
        (item,) = source.sample(0, 0).media
        assert item.grid[1] * item.grid[2] <= PATCHES
        assert "augmentation" in item.key


def shard(path: Path, media: Path, suffix: str) -> str:
    caption = (media / "a.txt").read_text()
    content = json.dumps({"caption": caption}) if suffix == "json" else caption
    with tarfile.open(path, "w") as tar:
        for name, data in (("1.png", (media / "a.png").read_bytes()), (f"1.{suffix}", content.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def test_files_that_nothing_reads(media: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (media / "a.png", "a.png: got a binary file, accepted a text in UTF-8, .jsonl, .*named by records"),
        (media / "v.mp4", "v.mp4: got a binary file"),
        (tmp_path / "empty", "folder: got none in .*empty', accepted pictures"),
        (write_lines(tmp_path / "blank.txt", "  "), "blank.txt: got nothing but blanks"),
        (write_lines(tmp_path / "blank.jsonl", " ", ""), "blank.jsonl': got no lines"),
        (write_lines(tmp_path / "no.tar", "text"), "no.tar: got ReadError"),
    ]
    for file, says in cases:
        with pytest.raises(FileFormatError if "empty" not in says else ArgumentValueError, match=says):
            opened(file)
    for name in ("gone.jsonl", "gone.tar", "gone.txt"):
        with pytest.raises(FileNotFoundError, match=name):
            opened(tmp_path / name)
    text = write_lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(ArgumentValueError, match=r"files: got '.*a.jsonl' and '.*a.jsonl', which are one"):
        opened(text, tmp_path / "empty" / ".." / "a.jsonl")
    with pytest.raises(ArgumentValueError, match="an empty path"):
        opened("")


def test_names_are_new(media: Path, tmp_path: Path) -> None:
    names = ("a/x", "b/x", "c/x-2", "photographs", "digits-held-out", "files", "x-held-out", "python-code")
    files = [write_lines(tmp_path / f"{name}.jsonl", {"text": name}) for name in names]
    found = opened(*files, write_lines(tmp_path / "some.txt", "text"))
    assert [source.name for source in found] == [
        "x", "x-2", "x-2-2", "photographs-2", "digits-held-out-2", "files-2", "x-held-out-2", "python-code-2", "files"
    ]  # fmt: skip
    assert [learnt(source.sample(0, 0)) for source in found[:-1]] == [f"{name}[EOS]" for name in names]
    Mixture([MixedSource(source, 1.0) for source in found])
    assert [source.name for source in opened(files[6], files[0])] == ["x-held-out", "x-2"]


def test_no_source_of_the_corpus_shares_a_name_with_a_file(tmp_path: Path) -> None:
    corpus = [source.name for source in sample_corpus(BYTES)] + [f"drawn-{kind}" for kind in DRAWN_KINDS]
    files = [write_lines(tmp_path / f"{name}.jsonl", {"text": "one"}) for name in corpus]
    assert [source.name for source in opened(*files)] == [f"{name}-2" for name in corpus]


def streams(sources: Sequence[Source]) -> TokenStream:
    mixture = Mixture([MixedSource(source, 1.0) for source in sources])
    special = BYTES.special
    return TokenStream(
        mixture, number=0, num_streams=1, sequence_length=64, num_sequences=10, seed=0, pad=special.pad,
        media_pad=special.media_pad,
    )  # fmt: skip


def test_a_resume_with_other_files_is_refused(media: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": "two"})
    pairs = write_lines(media / "pairs.jsonl", {"image": "a.png", "text": "one"}, {"image": "b.png", "text": "two"})
    stream = streams(opened(text, pairs))
    stream.next()
    state = json.loads(json.dumps(stream.state()))
    again = streams(opened(text, pairs))
    again.restore(state)
    assert again.next().input_ids_T.tolist() == stream.next().input_ids_T.tolist()
    write_lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": "owt"})
    with pytest.raises(DataError, match=r"source 't': got .*its files changed"):
        streams(opened(text, pairs)).restore(state)
    write_lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": "two"})
    streams(opened(text, pairs)).restore(state)
    before = (media / "b.png").read_bytes()
    (media / "b.png").write_bytes(before + b"x")
    with pytest.raises(DataError, match=r"source 'pairs': got .*its files changed"):
        streams(opened(text, pairs)).restore(state)
    (media / "b.png").write_bytes(before)


def run(output: Path, file: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    options = [f"data.files={file}", "batch.sequences=1", "batch.sequence_length=448", "report.progress=false"]
    command = [sys.executable, "-m", "k25sys", "run", "pretrain", "--steps", "2", "--output", str(output), *arguments]
    sets = [part for option in options for part in ("--set", option)]
    return subprocess.run([*command, *sets], capture_output=True, text=True, timeout=300, check=False)


def test_a_run_is_not_resumed_on_a_changed_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "photographs.jsonl", {"text": "to be or not to be"}, {"text": "that is"})
    first = run(tmp_path / "run", file)
    assert first.returncode == 0, first.stderr
    write_lines(tmp_path / "photographs.jsonl", {"text": "to be or not to be"}, {"text": "that si"})
    second = run(tmp_path / "run", file, "--resume")
    assert second.returncode == 1
    assert "fingerprint of source 'photographs-2': got" in second.stderr
    assert "its files changed" in second.stderr
    assert len(second.stderr.splitlines()) == 1


def names(files: Sequence[str], recipe: str) -> set[str]:
    run = replace(find_recipe(recipe).config("tiny"), data=DataOptions(files=tuple(files)))
    return {source.name for source in find_recipe(recipe).mixture(run, BYTES, Path("unused")).sources}


def test_files_take_the_place_of_what_is_like_them(media: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "words.jsonl", *[{"text": f"{number} and more"} for number in range(30)])
    pairs = write_lines(media / "seen.jsonl", {"image": "a.png", "text": "one"})
    assert {"words", "photographs", "drawn-shapes"} <= names([text], "pretrain")
    assert not names([text], "pretrain") & set(CORPUS_TEXTS)
    assert names([pairs], "pretrain") == {"seen", *CORPUS_TEXTS}
    assert names([pairs, text], "pretrain") == {"seen", "words"}
    assert names([pairs], "vit") == {"seen"}
    with pytest.raises(ConfigError, match="got text alone in words, accepted files with pictures or videos"):
        names([text], "vit")


def test_what_was_held_out_keeps_its_fingerprint(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "words.jsonl", *[{"text": f"{number} and more"} for number in range(30)])
    (source,) = opened(text)
    trained, held_out = hold_out(source)
    assert fingerprint_of(trained) == fingerprint_of(held_out) == fingerprint_of(source) != ""


def test_media_beside_a_conversation_are_refused(tmp_path: Path) -> None:
    (source,) = opened(write_lines(tmp_path / "chat.jsonl", CHAT, {**CHAT, "images": ["a.png"]}))
    source.sample(0, 0)
    with pytest.raises(FileFormatError, match="the field 'images'"):
        source.sample(1, 0)
