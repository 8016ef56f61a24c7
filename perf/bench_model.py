"""A training step of the whole model, forward and backward, against transformers' Kimi-K2.5 with the same weights.

python perf/bench_model.py [--seconds S] [--json FILE]

The presets `tiny` and `small` on two rows of 128 tokens, 16 of each an image, with the next token's cross entropy. The
optimiser is left out: it would be the same on both sides.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.checkpoint import save_hf
from k25sys.models import KimiK25
from k25sys.models.presets import preset
from perf import harness
from perf.harness import Comparison, alternate

PRESETS = ("tiny", "small")
ROWS, LENGTH = 2, 128
GRID = (1, 8, 8)  # of each row's image
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step reads."""

    ids_BS: Tensor
    pixel_values: Tensor
    grid_thw: Tensor


def make_batch(media_pad: int) -> Batch:
    """Random bytes, with an image behind the first of each row."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, 256, (ROWS, LENGTH), generator=generator)
    ids_BS[:, 1 : 1 + GRID[1] * GRID[2] // 4] = media_pad
    grid_thw = torch.tensor([GRID] * ROWS)
    pixels = torch.rand(int(grid_thw.prod(1).sum()), 3, 14, 14, generator=generator) * 2 - 1
    return Batch(ids_BS=ids_BS, pixel_values=pixels, grid_thw=grid_thw)


def in_transformers(model: KimiK25, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of `model`; SDPA and grouped products of experts are its own choice."""
    try:
        from transformers import Kimi_K25ForConditionalGeneration
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(f"bench_model needs the peer: pip install 'transformers>=5.18' ({error})") from error
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder, "saved"), layout="transformers")
        return Kimi_K25ForConditionalGeneration.from_pretrained(Path(folder, "saved"), dtype=dtype).train()


def step(model: nn.Module, logits_of: Callable[[], Tensor], batch: Batch) -> Tensor:
    """Fresh gradients of the mean cross entropy. Returns the loss."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(logits_of()[:, :-1].flatten(0, 1).float(), batch.ids_BS[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def bench(name: str, dtype: str, threads: int, seconds: float) -> Comparison:
    """One preset, both models checked against each other."""
    torch.set_num_threads(threads)
    config = preset(name)
    assert config.tokens.media_pad is not None
    batch = make_batch(config.tokens.media_pad)
    ours = KimiK25(config, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    theirs = in_transformers(ours, DTYPES[dtype])
    logits = {
        "k25sys": lambda: ours(batch.ids_BS, batch.pixel_values, batch.grid_thw),
        "transformers": lambda: (
            theirs(
                input_ids=batch.ids_BS, pixel_values=batch.pixel_values.to(DTYPES[dtype]), image_grid_thw=batch.grid_thw
            ).logits
        ),
    }
    runs = {"k25sys": partial(step, ours, logits["k25sys"], batch)}
    runs["transformers"] = partial(step, theirs, logits["transformers"], batch)
    error = float((runs["k25sys"]() / runs["transformers"]() - 1).abs())
    if error > (1e-5 if dtype == "fp32" else 1e-2):
        raise SystemExit(f"{name}: transformers computes something else: the losses differ by {error:.1e}")
    times = alternate(runs, seconds=seconds)
    peaks = {who: harness.peak_bytes(run, torch.device("cpu")) for who, run in runs.items()}
    fields: dict[str, Any] = {
        "allocator": harness.allocator(),
        "tokens": ROWS * LENGTH,
        "tokens_per_second": ROWS * LENGTH / times["k25sys"].median,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "peak_bytes": peaks["k25sys"],
        "peers_peak_bytes": {"transformers": peaks["transformers"]},
    }
    case = f"step/{name}/{dtype}/threads={threads}"
    return Comparison(name=case, ours=times["k25sys"], peers={"transformers": times["transformers"]}, fields=fields)


def describe(case: dict[str, Any]) -> str:
    """A case as lines for a reader."""
    size = f"{case['parameters'] / 1e6:.1f} million parameters"
    return harness.describe(case, [f"{case['tokens_per_second']:.0f} tokens a second, {case['tokens']} a step, {size}"])


def main() -> None:
    """Runs the cases, prints each as it is done, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on a case, warm-up apart")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    print(
        f"forward and backward of {', '.join(PRESETS)}, {ROWS} rows of {LENGTH} tokens\n{harness.machine()}", flush=True
    )
    cases = []
    for name in PRESETS:
        for dtype in DTYPES if harness.torch_computes_bf16() else ("fp32",):
            for threads in [1, 2] if (os.cpu_count() or 1) > 1 else [1]:
                cases.append(bench(name, dtype, threads, arguments.seconds).as_json())
                print(describe(cases[-1]), flush=True)
    if arguments.json:
        harness.write_json(arguments.json, "model", {"expert_mlp": "native", "attention": "sdpa"}, cases)


if __name__ == "__main__":
    main()
