"""Media within text: the tokens that stand for one picture or one clip of a video. Source: spec section 2.3."""

from collections.abc import Sequence
from typing import Literal

from k25sys.data.geometry import MERGE
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import ArgumentValueError, message


def clip_tokens(kind: Literal["image", "video"], grid_thw: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """media_begin KIND media_content, media_pad x (h w / 4), media_end.

    Args:
        kind: the word that says what it is.
        grid_thw: t, h, w in patches, h and w even; the frames of a clip share their tokens.
        tokenizer: it writes the word.

    Raises:
        ValueError: another number of sizes, a size below 1, an odd h or w.
    """
    if len(grid_thw) != 3 or min(grid_thw) < 1 or grid_thw[1] % MERGE or grid_thw[2] % MERGE:
        accepted = "t, h, w of at least 1, h and w even"
        raise ArgumentValueError(message("clip_tokens", "grid_thw", list(grid_thw), accepted))
    special = tokenizer.special
    pads = [special.media_pad] * (grid_thw[1] // MERGE * (grid_thw[2] // MERGE))
    return [special.media_begin, *tokenizer.encode(kind), special.media_content, *pads, special.media_end]


def image_tokens(grid_thw: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """`clip_tokens` of a picture, whose grid is 1, h, w."""
    return clip_tokens("image", grid_thw, tokenizer)
