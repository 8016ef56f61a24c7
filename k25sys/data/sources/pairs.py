"""Sources with media: pictures with captions, documents of text and media, videos with captions."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from k25sys.data.augmentation import Augmentation, plan_for_text
from k25sys.data.geometry import RELEASED_LIMITS, MediaLimits
from k25sys.data.sample import Sample, check_position, fingerprint_of
from k25sys.data.sources.document import Clip, GivenText, document
from k25sys.data.sources.fingerprint import spread, texts_digest
from k25sys.data.sources.media import MediaFiles
from k25sys.data.sources.records import (
    ConvertedRecords,
    DocumentPart,
    ImageFile,
    JsonRecords,
    VideoFile,
    located,
    place,
    read_parts,
    read_text,
    refuse_media,
)
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import ArgumentValueError, FileFormatError, message

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A picture or video and what is said about it.

    Attributes:
        media: how the source finds it: its path, from the source's folder.
        text: the caption.
        has_writing: it shows writing, which augmentation must not crop, mirror or make smaller.
        can_crop: a part of the picture still shows what the caption says.
    """

    media: Any
    text: str
    has_writing: bool = False
    can_crop: bool = True


class MediaDocuments(ABC):
    """What the sources of this file share.

    Args:
        name: unique within a mixture.
        tokenizer: writes the texts.
        documents: in memory, or read by position.
        media: where its pictures and videos are.

    Raises:
        ValueError: no documents.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, documents: Sequence[Any], media: MediaFiles) -> None:
        if len(documents) == 0:
            raise ArgumentValueError(message(type(self).__name__, "documents", "none", "one or more"))
        self._name, self._tokenizer, self._documents, self._media = name, tokenizer, documents, media
        self._fingerprint = fingerprint_of(documents)
        if isinstance(documents, ConvertedRecords):
            self._fingerprint = texts_digest([self._fingerprint, *map(str, _sizes(documents, media))])

    @property
    def name(self) -> str:
        """Unique within a mixture."""
        return self._name

    @property
    def has_media(self) -> bool:
        """True."""
        return True

    @property
    def fingerprint(self) -> str:
        """Of the file that the documents are read from, see `files_digest`, and of the sizes of the media of a thousand
        of them, evenly spread; "" of documents in memory.
        """
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._documents)

    def sample(self, index: int, epoch: int) -> Sample:
        """Document `index` in pass `epoch`. Of its media only headers are read, a video's packets once.

        Lines and headers are checked here, when they are read, and not before; none is skipped.

        Raises:
            TypeError, ValueError: an index outside [0, len), a negative epoch, a faulty line, a file of it that is
                missing or faulty.
            ImportError: Pillow or PyAV is not installed.
        """
        check_position(f"{type(self).__name__}.sample", index, len(self), epoch)
        item = self._documents[int(index)]
        with located(place(self._documents, self._name, int(index))):
            parts = self._parts(item, int(index), int(epoch))
        return document(parts, self._tokenizer)

    def pixels(self, key: str) -> Tensor:
        """(t h w, 3, 14, 14) float32 in [-1, 1] of a MediaItem of this source. Raises as `MediaFiles.pixels`."""
        return self._media.pixels(key)

    @abstractmethod
    def _parts(self, item: Any, index: int, epoch: int) -> list[str | GivenText | Clip]:
        """The document that `item` of the documents stands for."""


def captioned_picture(
    media: MediaFiles, item: Captioned, augmentation: Augmentation | None, *, seed: int, index: int, epoch: int
) -> list[str | GivenText | Clip]:
    """A picture and its caption, changed as `plan_for_text` allows; with None as they are."""
    if augmentation is None:
        return [media.image(item.media), item.text]
    changes, text = plan_for_text(
        augmentation, media.size(item.media), item.text, seed=seed, index=index, epoch=epoch, can_crop=item.can_crop,
        has_writing=item.has_writing,
    )  # fmt: skip
    return [media.image(item.media, changes), text]


class ImageTextPairs(MediaDocuments):
    """A picture, then its caption.

    Args:
        name: unique within a mixture.
        tokenizer: writes the captions.
        pairs: in memory, or read by position.
        folder: where the paths of pictures begin.
        limits: bounds on their sizes.
        augmentation: how far pictures may be changed in each pass; None leaves them. A caption stays true, as far as
            `plan_for_text` and the pair say; its boxes and points are moved along.
        seed: other seeds give other changes.

    Raises:
        ValueError: no pairs, a negative seed.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        pairs: Sequence[Captioned],
        *,
        folder: str | os.PathLike[str] = ".",
        limits: MediaLimits = RELEASED_LIMITS,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ArgumentValueError(message("ImageTextPairs", "seed", seed, "at least 0"))
        super().__init__(name, tokenizer, pairs, MediaFiles(name, partial(_in_folder, os.fspath(folder)), limits))
        self._augmentation, self._seed = augmentation, seed

    @classmethod
    def from_json_lines(
        cls,
        name: str,
        tokenizer: Tokenizer,
        file: str | os.PathLike[str],
        *,
        image_field: str = "image",
        text_field: str = "text",
        folder: str | os.PathLike[str] | None = None,
        limits: MediaLimits = RELEASED_LIMITS,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> "ImageTextPairs":
        """Lines {"image": PATH, "text": CAPTION}; paths begin at `folder`, the file's own unless given."""
        root, pairs = _folder_of(file, folder), _captioned(file, image_field, text_field)
        return cls(name, tokenizer, pairs, folder=root, limits=limits, augmentation=augmentation, seed=seed)

    @classmethod
    def from_folder(
        cls,
        name: str,
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str],
        *,
        limits: MediaLimits = RELEASED_LIMITS,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> "ImageTextPairs":
        """All pictures under `folder`, sorted by path, each with its caption in the file of the same name in .txt.

        Raises:
            ValueError: no pictures, a picture without caption, a caption that is blank or no UTF-8.
        """
        root = Path(folder)
        pictures = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not pictures:
            accepted = f"pictures that end in {', '.join(_IMAGE_SUFFIXES)}"
            raise ArgumentValueError(message("ImageTextPairs", "folder", f"none in {str(folder)!r}", accepted))
        pairs = [Captioned(media=picture.as_posix(), text=_caption(root / picture)) for picture in pictures]
        source = cls(name, tokenizer, pairs, folder=folder, limits=limits, augmentation=augmentation, seed=seed)
        sizes = [source._media.file_size(pair.media) for pair in pairs]
        source._fingerprint = texts_digest(
            f"{pair.media}\0{size}\0{pair.text}" for pair, size in zip(pairs, sizes, strict=True)
        )
        return source

    def _parts(self, item: Captioned, index: int, epoch: int) -> list[str | GivenText | Clip]:
        return captioned_picture(self._media, item, self._augmentation, seed=self._seed, index=index, epoch=epoch)


class VideoText(MediaDocuments):
    """A video, clip by clip with their times, then its caption. The arguments are those of ImageTextPairs."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        pairs: Sequence[Captioned],
        *,
        folder: str | os.PathLike[str] = ".",
        limits: MediaLimits = RELEASED_LIMITS,
    ) -> None:
        super().__init__(name, tokenizer, pairs, MediaFiles(name, partial(_in_folder, os.fspath(folder)), limits))

    @classmethod
    def from_json_lines(
        cls,
        name: str,
        tokenizer: Tokenizer,
        file: str | os.PathLike[str],
        *,
        video_field: str = "video",
        text_field: str = "text",
        folder: str | os.PathLike[str] | None = None,
        limits: MediaLimits = RELEASED_LIMITS,
    ) -> "VideoText":
        """Lines {"video": PATH, "text": CAPTION}; paths begin at `folder`, the file's own unless given."""
        pairs = _captioned(file, video_field, text_field)
        return cls(name, tokenizer, pairs, folder=_folder_of(file, folder), limits=limits)

    def _parts(self, item: Captioned, index: int, epoch: int) -> list[str | GivenText | Clip]:
        return [*self._media.video(item.media), item.text]


class Interleaved(MediaDocuments):
    """Documents of texts, pictures and videos in the order in which they are to be read.

    Args:
        name: unique within a mixture.
        tokenizer: writes the texts.
        documents: lists of texts (`GivenText` for one without loss), `ImageFile`s and `VideoFile`s.
        folder: where paths begin.
        limits: bounds on sizes and frames.

    Raises:
        ValueError: no documents.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        documents: Sequence[Sequence[DocumentPart]],
        *,
        folder: str | os.PathLike[str] = ".",
        limits: MediaLimits = RELEASED_LIMITS,
    ) -> None:
        super().__init__(name, tokenizer, documents, MediaFiles(name, partial(_in_folder, os.fspath(folder)), limits))

    @classmethod
    def from_json_lines(
        cls,
        name: str,
        tokenizer: Tokenizer,
        file: str | os.PathLike[str],
        *,
        field: str = "parts",
        folder: str | os.PathLike[str] | None = None,
        limits: MediaLimits = RELEASED_LIMITS,
    ) -> "Interleaved":
        """Lines {"parts": [TEXT, {"image": PATH}, {"video": PATH}, {"text": TEXT, "loss": false}, ...]}.

        Paths begin at `folder`, the file's own unless given.
        """
        documents = ConvertedRecords(JsonRecords(file), partial(_document_parts, field=field))
        return cls(name, tokenizer, documents, folder=_folder_of(file, folder), limits=limits)

    def _parts(self, item: Sequence[DocumentPart], index: int, epoch: int) -> list[str | GivenText | Clip]:
        parts: list[str | GivenText | Clip] = []
        for part in item:
            if isinstance(part, ImageFile):
                parts.append(self._media.image(part.path))
            elif isinstance(part, VideoFile):
                parts += self._media.video(part.path)
            else:
                parts.append(part)
        return parts


def _in_folder(folder: str, path: str) -> Path:
    return Path(folder, path)


def _folder_of(file: str | os.PathLike[str], folder: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    return Path(file).parent if folder is None else folder


def _captioned(file: str | os.PathLike[str], media_field: str, text_field: str) -> Sequence[Captioned]:
    return ConvertedRecords(JsonRecords(file), partial(_pair, media_field=media_field, text_field=text_field))


def _pair(record: dict[str, Any], where: str, *, media_field: str, text_field: str) -> Captioned:
    refuse_media(record, where, "document", but=media_field)
    media, text = read_text(record, where, media_field), read_text(record, where, text_field)
    return Captioned(media=media, text=text)


def _document_parts(record: dict[str, Any], where: str, *, field: str) -> list[DocumentPart]:
    refuse_media(record, where, "document", but=field)
    return read_parts(record, where, field)


def _sizes(documents: ConvertedRecords[Any], media: MediaFiles) -> Iterator[int | None]:
    """Bytes of the media of documents that are evenly spread. A faulty line has none: `sample` says what is wrong."""
    for index in spread(len(documents)):
        try:
            item = documents[index]
        except FileFormatError:
            continue
        references = (
            [item.media]
            if isinstance(item, Captioned)
            else [part.path for part in item if isinstance(part, (ImageFile, VideoFile))]
        )
        yield from map(media.file_size, references)


def _caption(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError as error:
        got = f"no {file.name} beside it"
        raise FileFormatError(message("ImageTextPairs", str(picture), got, "its caption in a .txt file")) from error
    except UnicodeDecodeError as error:
        raise FileFormatError(message("ImageTextPairs", str(file), f"{error}", "a caption in UTF-8")) from error
    if not text:
        raise FileFormatError(message("ImageTextPairs", str(file), "nothing but blanks", "a caption"))
    return text
