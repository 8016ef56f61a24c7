"""Tokens for the MoE bench, and the experts that they choose."""

import random
import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

ROUTINGS = ("real", "uniform", "zipf")


def default_text() -> str:
    """English and Python text that ships with Python: the language reference's help topics and library sources."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("pydoc_data/topics.py", "argparse.py", "asyncio/base_events.py", "typing.py", "tarfile.py")
    parts = [(library / name).read_text(encoding="utf-8") for name in names if (library / name).is_file()]
    if not parts:
        raise SystemExit("no text: this Python has no sources of its library; give one with --text FILE")
    # Passages of all files in turn, as documents follow each other in training data.
    passages = [part[start : start + 1500] for part in parts for start in range(0, min(len(part), 90_000), 1500)]
    random.Random(0).shuffle(passages)
    return "\n".join(passages)


def token_ids(text: str, count: int) -> list[int]:
    """The first `count` words, numbers, marks and runs of blanks, each as a stable id."""
    words = re.findall(r"[A-Za-z_]+|\d|[^\w\s]|\s+", text)
    if not words:
        raise SystemExit("the text of --text has no words")
    return [zlib.crc32(words[i % len(words)].encode()) for i in range(count)]


def embed(ids: list[int], dim: int) -> Tensor:
    """(T, dim) float32: each token's own random vector plus half of its predecessor's, of unit variance.

    An untrained embedding keeps what matters here: equal words in equal contexts choose equal experts.
    """
    table = {}
    for token in set(ids):
        table[token] = torch.randn(dim, generator=torch.Generator().manual_seed(token))
    own = torch.stack([table[token] for token in ids])
    return (own + 0.5 * own.roll(1, 0)) / 1.25**0.5


def router_logits(x_TD: Tensor, num_experts: int, routing: str) -> Tensor:
    """(T, E) float32 logits: a random linear router for "real", independent ones for the two synthetic loads."""
    generator = torch.Generator().manual_seed(1)
    num_tokens, dim = x_TD.shape
    if routing == "real":
        return x_TD.float() @ torch.randn(num_experts, dim, generator=generator).T / dim**0.5
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    if routing == "zipf":
        logits -= torch.arange(1, num_experts + 1).log()
    return logits
