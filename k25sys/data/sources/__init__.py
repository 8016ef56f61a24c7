"""Sources of documents: text and code, JSON Lines, pictures and videos with captions, documents of text and media."""

from k25sys.data.sources.document import GivenText
from k25sys.data.sources.pairs import Captioned, ImageTextPairs, Interleaved, VideoText
from k25sys.data.sources.records import ImageFile, VideoFile
from k25sys.data.sources.text import JsonLines, TextDocuments, TextFiles
from k25sys.data.sources.webdataset import WebDataset

__all__ = [
    "Captioned",
    "GivenText",
    "ImageFile",
    "ImageTextPairs",
    "Interleaved",
    "JsonLines",
    "TextDocuments",
    "TextFiles",
    "VideoFile",
    "VideoText",
    "WebDataset",
]
