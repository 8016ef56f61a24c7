"""What the recipes read: the sample corpus that needs no network, or a user's files."""

from collections.abc import Sequence

from k25sys.data import Source, Tokenizer
from k25sys.training.config import RunConfig


def corpus_of(run: RunConfig, tokenizer: Tokenizer) -> Sequence[tuple[Source, float]]:
    """Sources with their weights within text and within vision."""
    raise NotImplementedError
