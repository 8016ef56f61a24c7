"""Sources over files of their own: what they give, that media and tokens agree, and what they say of faulty files."""

import json
import multiprocessing
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from k25sys.data import (
    ImagePart,
    MediaLimits,
    UserTurn,
    VideoPart,
    preprocess_image,
    preprocess_video,
    render_chat,
    sample_file,
)
from k25sys.data.augmentation import Augmentation, AugmentationPlan
from k25sys.data.images import normalised_patches, read_image
from k25sys.data.sample import Source
from k25sys.data.sources import (
    Captioned,
    GivenText,
    ImageFile,
    ImageTextPairs,
    Interleaved,
    JsonLines,
    TextDocuments,
    TextFiles,
    VideoFile,
    VideoText,
    WebDataset,
)
from k25sys.errors import ArgumentTypeError, ArgumentValueError, FileFormatError
from tests.data.source_digest import BYTES, digest, learnt

LIMITS = MediaLimits(padded_patches=64)
CAPTIONS = ("A red square.", "Grün, ein Streifen.", "The dark half is on the left.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioned pictures (one grey, one turned by its EXIF tag), a video, and JSON Lines about them."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    (root / "sub").mkdir()
    files = ("a.png", "b.jpg", "sub/c.png")
    Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8)).save(root / files[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (60, 300, 3), np.uint8)).save(root / files[1], exif=exif)
    Image.fromarray(rng.integers(0, 256, (28, 29), np.uint8)).save(root / files[2])
    for file, caption in zip(files, CAPTIONS, strict=True):
        (root / file).with_suffix(".txt").write_text(caption + "\n", "utf-8")
    shutil.copy(sample_file("carphone_distorted.mp4"), root / "v.mp4")
    write_lines(root / "pairs.jsonl", *({"image": f, "text": c} for f, c in zip(files, CAPTIONS, strict=True)))
    write_lines(root / "videos.jsonl", {"video": "v.mp4", "text": "A man talks.", "more": 1})
    story = [{"text": "Look:", "loss": False}, {"image": "b.jpg"}, "then ", "this", {"video": "v.mp4"}, {"text": "."}]
    write_lines(root / "stories.jsonl", {"parts": story}, {"parts": "only text"}, {"parts": [{"image": "a.png"}]})
    write_lines(root / "texts.jsonl", {"text": "one"}, {"text": [{"text": "two?", "loss": False}, "zwei, 二"]})
    return root


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_shard(path: Path, folder: Path, numbers: range, *, as_json: bool = False) -> Path:
    """Documents of the folder's pictures, written by the webdataset package."""
    with TarWriter(str(path)) as shard:
        for number in numbers:
            file = ("a.png", "b.jpg", "sub/c.png")[number]
            caption = CAPTIONS[number].encode()
            text = {"json": json.dumps({"caption": caption.decode()}).encode()} if as_json else {"txt": caption}
            content = (folder / file).read_bytes()
            shard.write({"__key__": f"train/{number:04d}", file.rpartition(".")[2]: content, **text, "cls": b"7"})
    return path


def sources_of(folder: Path, shard: Path) -> dict[str, Source]:
    return {
        "files": TextFiles.from_folder("files", BYTES, folder),
        "lines": JsonLines("lines", BYTES, folder / "texts.jsonl"),
        "pairs": ImageTextPairs.from_json_lines("pairs", BYTES, folder / "pairs.jsonl", limits=LIMITS),
        "changed": ImageTextPairs.from_folder(
            "changed", BYTES, folder, limits=LIMITS, augmentation=Augmentation(), seed=3
        ),
        "videos": VideoText.from_json_lines("videos", BYTES, folder / "videos.jsonl", limits=LIMITS),
        "stories": Interleaved.from_json_lines("stories", BYTES, folder / "stories.jsonl", limits=LIMITS),
        "shards": WebDataset("shards", BYTES, [shard], limits=LIMITS, augmentation=Augmentation()),
    }


@pytest.fixture(scope="module")
def sources(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    shard = write_shard(tmp_path_factory.mktemp("shards") / "s-000.tar", folder, range(3))
    return sources_of(folder, shard)


def test_each_document_keeps_to_the_contract(sources: dict[str, Source]) -> None:
    for name, source in sources.items():
        assert source.name == name
        for index in range(len(source)):
            sample = source.sample(index, 0)
            sample.check(BYTES.special.media_pad)
            assert sample.ids_S.dtype == np.int64
            assert sample.loss_S.dtype == np.bool_
            assert sample.ids_S[-1] == BYTES.special.eos
            assert source.has_media or not sample.media
            special = sample.ids_S >= BYTES.special.bos
            assert sample.loss_S[special].sum() == 1, "loss on a token of media"
            for item in sample.media:
                assert item.source == name
                assert item.grid[1] * item.grid[2] <= 64
                pixels = source.pixels(item.key)
                assert pixels.shape == (item.num_patches, 3, 14, 14)
                assert pixels.dtype == torch.float32


def test_another_process_gives_the_same(sources: dict[str, Source]) -> None:
    expected = [digest(list(sources.values()), epoch) for epoch in (0, 1)]
    assert expected[0] != expected[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(digest, [(list(sources.values()), epoch) for epoch in (0, 1)]) == expected


def test_what_a_pickled_source_carries(folder: Path) -> None:
    source = VideoText.from_json_lines("videos", BYTES, folder / "videos.jsonl", limits=LIMITS)
    before = len(pickle.dumps(source))
    source.pixels(source.sample(0, 0).media[0].key)
    assert len(pickle.dumps(source)) == before


def test_text_files(folder: Path, tmp_path: Path) -> None:
    assert [learnt(TextFiles.from_folder("t", BYTES, folder).sample(i, 0)) for i in range(3)] == [
        f"{caption}\n[EOS]" for caption in CAPTIONS
    ]
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "a.c").write_text("int x;")
    (tmp_path / "empty.py").touch()
    code = TextFiles.from_folder("t", BYTES, tmp_path, suffixes=(".py", ".c"))
    assert [learnt(code.sample(i, 5)) for i in range(len(code))] == ["int x;[EOS]", "x = 1\r\n[EOS]"]


def test_texts(sources: dict[str, Source]) -> None:
    sample = sources["lines"].sample(1, 0)
    assert BYTES.decode(sample.ids_S.tolist()) == "two?zwei, 二[EOS]"
    assert learnt(sample) == "zwei, 二[EOS]"
    texts = TextDocuments("t", BYTES, ["<|im_end|>", [GivenText(text="a"), "b"]])
    assert BYTES.special.im_end not in texts.sample(0, 0).ids_S
    assert learnt(texts.sample(1, 0)) == "b[EOS]"


def test_pairs(sources: dict[str, Source], folder: Path) -> None:
    for index, file in enumerate(("a.png", "b.jpg", "sub/c.png")):
        sample = sources["pairs"].sample(index, 9)
        pixel_values, grid_thw = preprocess_image(folder / file, LIMITS)
        assert sample.media[0].grid == tuple(grid_thw[0].tolist())
        assert torch.equal(sources["pairs"].pixels(sample.media[0].key), pixel_values)
        assert learnt(sample) == f"{CAPTIONS[index]}[EOS]"
        chat = render_chat([UserTurn(content=[ImagePart(grid_thw=grid_thw), CAPTIONS[index]])], BYTES)
        start = chat.token_ids.index(BYTES.special.media_begin)
        assert sample.ids_S[:-1].tolist() == chat.token_ids[start:-1]


def test_augmented_pictures(sources: dict[str, Source], folder: Path) -> None:
    files = ("a.png", "b.jpg", "sub/c.png")
    plans = []
    for epoch in range(8):
        for index, file in enumerate(files):
            (item,) = sources["changed"].sample(index, epoch).media
            assert item.grid == sources["pairs"].sample(index, 0).media[0].grid
            plan = AugmentationPlan.from_key(json.loads(item.key)["augmentation"])
            expected = normalised_patches(plan.apply(read_image(folder / file, LIMITS)))
            assert torch.equal(sources["changed"].pixels(item.key), expected)
            plans.append((file, plan.is_flipped, item.key))
    assert len({key for *_, key in plans}) == len(plans)
    assert any(is_flipped for _, is_flipped, _ in plans)
    assert not any(is_flipped for file, is_flipped, _ in plans if file == files[2]), "its caption says left"


def test_writing_is_not_mirrored_nor_shrunk(folder: Path) -> None:
    pair = Captioned(media="a.png", text="A word.", has_writing=True)
    limits = MediaLimits()
    source = ImageTextPairs("p", BYTES, [pair], folder=folder, limits=limits, augmentation=Augmentation())
    for epoch in range(20):
        (item,) = source.sample(0, epoch).media
        plan = AugmentationPlan.from_key(json.loads(item.key)["augmentation"])
        assert not plan.is_flipped
        assert plan.resized[0] >= plan.crop[3] - plan.crop[1]


def test_videos(sources: dict[str, Source], folder: Path) -> None:
    source = sources["videos"]
    pixel_values, grid_thw, times = preprocess_video(folder / "v.mp4", LIMITS)
    sample = source.sample(0, 0)
    assert len(sample.media) == 2
    assert [item.grid for item in sample.media] == [tuple(row) for row in grid_thw.tolist()]
    assert torch.equal(torch.cat([source.pixels(item.key) for item in sample.media]), pixel_values)
    assert torch.equal(source.pixels(sample.media[0].key), pixel_values[: sample.media[0].num_patches])
    chat = render_chat(
        [UserTurn(content=[VideoPart(grid_thw=grid_thw, timestamps=times), "A man talks."])], BYTES
    ).token_ids
    assert sample.ids_S[:-1].tolist() == chat[chat.index(BYTES.special.im_middle) + 1 : -1]
    assert learnt(sample) == "A man talks.[EOS]"


def test_a_video_is_decoded_once_for_its_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "k25sys.data.sources.media.preprocess_video",
        lambda *arguments: calls.append(1) or preprocess_video(*arguments),
    )
    source = VideoText.from_json_lines("v", BYTES, folder / "videos.jsonl", limits=LIMITS)
    for item in source.sample(0, 0).media:
        source.pixels(item.key).zero_()  # what is handed out is the caller's own
    assert source.pixels(source.sample(0, 1).media[1].key).any()
    assert len(calls) == 1


def test_interleaved(sources: dict[str, Source]) -> None:
    sample = sources["stories"].sample(0, 0)
    assert [json.loads(item.key).get("image", "video") for item in sample.media] == ["b.jpg", "video", "video"]
    assert learnt(sample) == "then this.[EOS]"
    text = BYTES.decode(sample.ids_S.tolist()).replace("<|media_pad|>", "")
    assert text.startswith(
        "Look:<|media_begin|>image<|media_content|><|media_end|>then this00:00:00.000<|media_begin|>"
    )
    assert learnt(sources["stories"].sample(1, 0)) == "only text[EOS]"
    assert learnt(sources["stories"].sample(2, 0)) == "[EOS]"


def test_interleaved_in_memory(folder: Path, sources: dict[str, Source]) -> None:
    parts = [GivenText(text="Look:"), ImageFile(path="b.jpg"), "then ", "this", VideoFile(path="v.mp4"), "."]
    source = Interleaved("stories", BYTES, [parts], folder=folder, limits=LIMITS)
    ours, expected = source.sample(0, 0), sources["stories"].sample(0, 0)
    assert ours.media == expected.media
    assert np.array_equal(ours.ids_S, expected.ids_S)


@pytest.mark.parametrize("as_json", [False, True])
def test_shards_of_the_webdataset_package(folder: Path, tmp_path: Path, as_json: bool) -> None:
    write_shard(tmp_path / "s-08.tar", folder, range(2), as_json=as_json)
    write_shard(tmp_path / "s-09.tar", folder, range(2, 3), as_json=as_json)
    source = WebDataset(
        "w", BYTES, [str(tmp_path / "s-{08..09}.tar")], limits=LIMITS, text_suffix="json" if as_json else "txt"
    )
    assert len(source) == 3
    for index, file in enumerate(("a.png", "b.jpg", "sub/c.png")):
        sample = source.sample(index, 0)
        assert learnt(sample) == f"{CAPTIONS[index]}[EOS]"
        assert torch.equal(source.pixels(sample.media[0].key), preprocess_image(folder / file, LIMITS)[0])


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Each header is one block of 512 bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            (path.parent / "member").write_bytes(content)
            tar.add(path.parent / "member", name)


SHARD_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tar": (lambda p: p.write_bytes(b"x" * 2000), "s.tar: got ReadError"),
    "nothing": (lambda p: p.write_bytes(b""), "s.tar: got ReadError"),
    "cut in a picture": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "s.tar: got ReadError"),
    "cut behind a member": (lambda p: p.write_bytes(p.read_bytes()[:2048]), "the end at byte 2048"),
    "header": (lambda p: p.write_bytes(p.read_bytes().replace(b"1.txt", b"7.txt")), "header .* byte 2048"),
    "compressed": (lambda p: tarfile.open(p, "w:gz").close(), "s.tar: got ReadError"),
    "no caption": (lambda p: write_tar(p, {"d/1.png": b"1"}), r"s.tar: d/1: got captions \[\]"),
    "no picture": (lambda p: write_tar(p, {"1.txt": b"1"}), r"s.tar: 1: got pictures \[\]"),
    "two pictures": (lambda p: write_tar(p, {"1.png": b"1", "1.jpg": b"1", "1.txt": b"1"}), "got pictures"),
    "one twice": (lambda p: write_tar(p, {"1.txt": b"1", "1.TXT": b"1"}), "1.TXT: got a second one"),
    "no documents": (lambda p: write_tar(p, {}), "documents: got none"),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_faulty_shards(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "s.tar"
    write_tar(path, {"1.png": b"x" * 1500, "1.txt": b"a", "2.png": b"x", "2.txt": b"b"})
    assert len(WebDataset("w", BYTES, [path])) == 2
    damage, expected = SHARD_FAULTS[fault]
    damage(path)
    with pytest.raises(ValueError, match=expected):
        WebDataset("w", BYTES, [path])


def test_faulty_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {"1.png": b"no picture", "1.txt": b"fine", "2.png": b"1", "2.txt": b"\xff"})
    source = WebDataset("w", BYTES, [tmp_path / "s.tar"])
    for index, expected in enumerate(
        (r"w\[0\]: got .*s.tar, bytes 512 to 522", r"s.tar, bytes \d+ to \d+: got .*0xff")
    ):
        with pytest.raises(FileFormatError, match=expected):
            source.sample(index, 0)
    with pytest.raises(ArgumentValueError, match="a list of paths"):
        WebDataset("w", BYTES, str(tmp_path / "s.tar"))
    with pytest.raises(ArgumentValueError, match="a <= b"):
        WebDataset("w", BYTES, ["s-{5..2}.tar"])


FAULTY_LINES = {
    "no JSON": ("{", "d.jsonl:4: got JSONDecodeError"),
    "cut": ('{"text": "a', "d.jsonl:4: got JSONDecodeError"),
    "deep": ("[" * 200_000, "d.jsonl:4: got RecursionError"),
    "no object": ("[1]", r"d.jsonl:4: got \[1\]"),
    "no field": ('{"txt": "a"}', r"d.jsonl:4: got the fields \['txt'\], accepted a field 'text'"),
    "null": ('{"text": null}', "d.jsonl:4: got 'text': null"),
    "blank": ('{"text": " \\n"}', "d.jsonl:4: got 'text'"),
    "no parts": ('{"text": []}', "d.jsonl:4: got 'text'"),
    "blank parts": ('{"text": ["", " "]}', "d.jsonl:4: got 'text'"),
    "part": ('{"text": ["a", 7]}', r"d.jsonl:4, text\[1\]: got 7"),
    "loss": ('{"text": [{"text": "a", "loss": 0}]}', r"d.jsonl:4, text\[0\]"),
    "misspelt": ('{"text": [{"text": "a", "los": false}]}', r"d.jsonl:4, text\[0\]"),
    "media": ('{"text": [{"image": "a.png"}]}', "d.jsonl:4: .*Interleaved"),
    "image": (
        '{"text": "a", "image": "a.png"}',
        "d.jsonl:4: got the field 'image', accepted 'text' and none that names",
    ),
    "videos": ('{"text": "a", "image": null, "videos": ["v"]}', "d.jsonl:4: got the field 'videos'"),
}


@pytest.mark.parametrize("fault", FAULTY_LINES)
def test_faulty_lines(tmp_path: Path, fault: str) -> None:
    line, expected = FAULTY_LINES[fault]
    (tmp_path / "d.jsonl").write_text(f'{{"text": "fine"}}\n\n  \n{line}\n{{"text": "fine too"}}')
    source = JsonLines("d", BYTES, tmp_path / "d.jsonl")
    assert len(source) == 3
    assert [learnt(source.sample(i, 0)) for i in (0, 2)] == ["fine[EOS]", "fine too[EOS]"]
    with pytest.raises(FileFormatError, match=expected):
        source.sample(1, 0)


def test_faulty_text(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(FileFormatError, match=r"d.jsonl:1: got UnicodeDecodeError"):
        JsonLines("d", BYTES, tmp_path / "d.jsonl").sample(0, 0)
    (tmp_path / "d.jsonl").write_bytes(b"\n\n")
    with pytest.raises(FileFormatError, match=r"d.jsonl': got no lines"):
        JsonLines("d", BYTES, tmp_path / "d.jsonl")
    (tmp_path / "d.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(FileFormatError, match=r"d.txt:3: got the byte 0xff"):
        TextFiles("d", BYTES, [tmp_path / "d.txt"]).sample(0, 0)
    (tmp_path / "d.txt").write_bytes(b" \n")
    with pytest.raises(FileFormatError, match=r"d.txt: got nothing but blanks"):
        TextFiles("d", BYTES, [tmp_path / "d.txt"]).sample(0, 0)


def test_faulty_media_name_file_and_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    file = write_lines(tmp_path / "d.jsonl", {"image": "gone.png", "text": "a"}, {"image": "bad.png", "text": "a"})
    source = ImageTextPairs.from_json_lines("d", BYTES, file)
    for index, expected in enumerate(("d.jsonl:1: got FileNotFoundError.*gone.png", "d.jsonl:2: got .*bad.png")):
        with pytest.raises(FileFormatError, match=expected):
            source.sample(index, 0)
    file = write_lines(tmp_path / "d.jsonl", {"parts": ["a", {"video": "bad.png"}]})
    with pytest.raises(FileFormatError, match=r"d.jsonl:1: got .*bad.png"):
        Interleaved.from_json_lines("d", BYTES, file).sample(0, 0)
    with pytest.raises(FileFormatError, match=r"bad.png: got no bad.txt beside it"):
        ImageTextPairs.from_folder("d", BYTES, tmp_path)
    with pytest.raises(ArgumentValueError, match="folder: got none"):
        ImageTextPairs.from_folder("d", BYTES, write_lines(tmp_path / "sub"))


def test_media_in_two_fields_are_not_passed_over(tmp_path: Path) -> None:
    pair = {"image": "a.png", "video": None, "images": [], "text": "a"}
    file = write_lines(tmp_path / "d.jsonl", {**pair, "video": "v.mp4"}, {**pair, "image": "gone.png"})
    source = ImageTextPairs.from_json_lines("d", BYTES, file)
    for index, expected in enumerate(("d.jsonl:1: got the field 'video', accepted 'image' and", "d.jsonl:2: .*gone")):
        with pytest.raises(FileFormatError, match=expected):
            source.sample(index, 0)
    file = write_lines(tmp_path / "d.jsonl", {"parts": ["a"], "image": "a.png"})
    with pytest.raises(FileFormatError, match=r"d.jsonl:1: got the field 'image', accepted 'parts' and"):
        Interleaved.from_json_lines("d", BYTES, file).sample(0, 0)


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    source = ImageTextPairs("d", BYTES, [Captioned(media="a.png", text="a")], folder=tmp_path)
    (item,) = source.sample(0, 0).media
    Image.new("RGB", (84, 56)).save(tmp_path / "a.png")
    with pytest.raises(FileFormatError, match=r"a.png': got a grid of \[1, 4, 6\].*the file was changed"):
        source.pixels(item.key)


def test_bad_arguments(sources: dict[str, Source]) -> None:
    for source in sources.values():
        for index, epoch, error in ((-1, 0, ArgumentValueError), (len(source), 0, ArgumentValueError),
                                    (0, -1, ArgumentValueError), (0.0, 0, ArgumentTypeError)):  # fmt: skip
            with pytest.raises(error, match=r"sample: (index|epoch): got"):
                source.sample(index, epoch)  # pyright: ignore[reportArgumentType]
        for key in ("", "a.png", "{}", "[]", '{"image":"a.png"}', '{"image":"a.png","grid":[1,2]}',
                    '{"image":"a.png","grid":[1,2,"2"]}', '{"image":5,"grid":[1,2,2]}',
                    '{"video":"v.mp4","grid":[1,2,2],"clip":-1}'):  # fmt: skip
            with pytest.raises(ValueError, match=r"pixels: key: got"):
                source.pixels(key)
    for make in (lambda: TextFiles("t", BYTES, []), lambda: ImageTextPairs("t", BYTES, [])):
        with pytest.raises(ArgumentValueError, match="documents: got none"):
            make()
    with pytest.raises(ArgumentValueError, match="seed"):
        ImageTextPairs("t", BYTES, [Captioned(media="a", text="a")], seed=-1)
    with pytest.raises(FileFormatError, match=r"v.mp4': got a grid of \[\]"):
        sources["videos"].pixels('{"video":"v.mp4","clip":9,"grid":[1,2,2]}')
