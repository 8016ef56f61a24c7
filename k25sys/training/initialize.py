"""Random weights that do not depend on the grid: each matrix is drawn from its own name, whole, and then cut."""

import hashlib
from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from k25sys.parallel.grid import GridSizes
from k25sys.parallel.layout import ParameterLayout


@torch.no_grad()
def initialize(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, ParameterLayout],
    *,
    sizes: GridSizes,
    rank: int,
    seed: int,
    std: float,
) -> None:
    """Fills this rank's parts: weights ~ N(0, std), gains of norms 1, biases 0, as KimiK25.reset_parameters does.

    Every matrix of a stack (each expert's gate, up and down) has a random stream of its own, keyed by seed, name and
    place, and is drawn in float32 on the CPU. So any two grids hold the same model, and a rank draws no expert that it
    does not hold.

    Args:
        parameters: this rank's parameters by their released names.
        layouts: how each is spread; see ParameterLayout.
        std: initializer_range of the model.
    """
    for name, parameter in parameters.items():
        *_, module, kind = name.split(".")
        if kind == "bias" or kind == "e_score_correction_bias":
            parameter.zero_()
        elif "norm" in module:
            parameter.fill_(1.0)
        else:
            layout = layouts[name]
            _draw(name, parameter.view(layout.local_shape(sizes)), layout.shape, layout.box(sizes, rank), seed, std)


def _draw(
    name: str, part: Tensor, shape: tuple[int, ...], box: tuple[tuple[int, int], ...], seed: int, std: float
) -> None:
    whole, inside = shape[-2:], tuple(slice(*bounds) for bounds in box[-2:])
    leading = box[:-2]
    for place in product(*(range(*bounds) for bounds in leading)):
        key = f"{seed} {name} {place}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
        drawn = torch.empty(whole).normal_(0.0, std, generator=generator)
        local = tuple(index - first for index, (first, _) in zip(place, leading, strict=True))
        part[local].copy_(drawn[inside])
