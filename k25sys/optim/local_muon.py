"""Muon for matrices that lie whole on one rank: a few at a time from gradient to master, with no copy of them all."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from k25sys.optim.muon_clip import MuonClipConfig, advance_momentum, decay_and_step, update_scale
from k25sys.optim.newton_schulz import orthogonalize, together


@dataclass(frozen=True, kw_only=True)
class WholeMatrices:
    """All matrices of a parameter, each tensor of (E, N, M)."""

    master: Tensor
    momentum: Tensor
    gradient: Tensor
    learning_rate: float
    config: MuonClipConfig


def step_whole(parameters: Sequence[WholeMatrices]) -> None:
    """Advances momenta, updates masters, in place; matrices of one shape, of any parameters, are iterated together."""
    by_shape: defaultdict[tuple[int, ...], list[WholeMatrices]] = defaultdict(list)
    for each in parameters:
        by_shape[tuple(each.master.shape[1:])].append(each)
    for shape, alike in by_shape.items():
        most = together(prod(shape), alike[0].master.device.type)
        for runs in _filled(alike, most):
            _step_together(runs, update_scale(*shape))


def _filled(parameters: Sequence[WholeMatrices], most: int) -> Iterator[list[WholeMatrices]]:
    """Runs of matrices of parameters, `most` matrices in all, the last time perhaps fewer."""
    runs: list[WholeMatrices] = []
    room = most
    for each in parameters:
        begin, count = 0, len(each.master)
        while begin < count:
            end = min(begin + room, count)
            master, momentum, gradient = (t[begin:end] for t in (each.master, each.momentum, each.gradient))
            runs.append(
                WholeMatrices(
                    master=master, momentum=momentum, gradient=gradient, learning_rate=each.learning_rate,
                    config=each.config,
                )
            )  # fmt: skip
            room -= end - begin
            begin = end
            if room == 0:
                yield runs
                runs, room = [], most
    if runs:
        yield runs


def _step_together(runs: Sequence[WholeMatrices], scale: float) -> None:
    directions = [advance_momentum(run.momentum, run.gradient, run.config) for run in runs]
    config = runs[0].config
    dtype = config.newton_schulz_dtype or runs[0].master.dtype
    stacked = directions[0] if len(directions) == 1 else torch.cat(directions)
    updates = orthogonalize(stacked, steps=config.newton_schulz_steps, dtype=dtype).to(runs[0].master.dtype)
    for run, update in zip(runs, updates.split([len(run.master) for run in runs]), strict=True):
        decay_and_step(run.master, update, run.learning_rate, run.config, scale=scale)
