"""Documents to pretrain on, text and media in the order in which they come, as tokens with a loss mask."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from k25sys.data.media_text import clip_tokens
from k25sys.data.sample import MediaItem, Sample
from k25sys.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GivenText:
    """Text without loss: what is asked, where only the answer is to be learnt."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One picture, or one clip of a video with the time at which it begins."""

    kind: Literal["image", "video"]
    item: MediaItem
    time: str = ""


def document(parts: Iterable[str | GivenText | Clip], tokenizer: Tokenizer) -> Sample:
    """The parts, then eos. Loss on plain text and eos; none on given text, on times and on any token of media.

    Neighbouring texts of one kind are tokenised as one. Media are written as `render_chat` writes them.
    """
    ids: list[int] = []
    loss: list[bool] = []
    pending: list[str] = []
    has_loss = True
    media = []

    def append(tokens: list[int], counts: bool) -> None:
        ids.extend(tokens)
        loss.extend([counts] * len(tokens))

    def flush() -> None:
        append(tokenizer.encode("".join(pending)), has_loss)
        pending.clear()

    for part in parts:
        if isinstance(part, Clip):
            flush()
            append(tokenizer.encode(part.time), False)
            append(clip_tokens(part.kind, part.item.grid, tokenizer), False)
            media.append(part.item)
            continue
        if isinstance(part, str) != has_loss:
            flush()
            has_loss = isinstance(part, str)
        pending.append(part if isinstance(part, str) else part.text)
    flush()
    append([tokenizer.special.eos], True)
    return Sample(ids_S=np.array(ids, np.int64), loss_S=np.array(loss, np.bool_), media=tuple(media))
