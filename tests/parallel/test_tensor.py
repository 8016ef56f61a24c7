"""Tensor parallel layers on 2 and 4 ranks give what the whole layer gives in one process; bytes, order and memory."""

import pytest
import torch

from tests.parallel.processes import run_ranks
from tests.parallel.tensor_cases import (
    BOUNDS,
    WAYS,
    Generator,
    attention_case,
    check,
    grid_of,
    linear_case,
    swiglu_case,
)

GENERATED = {"linear": (linear_case, 30), "swiglu": (swiglu_case, 12), "attention": (attention_case, 12)}


def _worst_errors(ranks: int) -> dict[tuple[str, torch.dtype], float]:
    grid = grid_of(ranks)
    worst: dict[tuple[str, torch.dtype], float] = {}
    for dtype, bound in BOUNDS.items():
        for kind, (make, count) in GENERATED.items():
            for seed in range(count):
                case = make(Generator(seed, ranks), dtype)
                errors = check(case, grid, WAYS[seed % len(WAYS)])
                assert max(errors.values()) <= bound, (case.name, dtype, seed, errors)
                worst[kind, dtype] = max(worst.get((kind, dtype), 0.0), *errors.values())
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_equal_one_process(ranks: int) -> None:
    for worst in run_ranks(ranks, _worst_errors, ranks):
        print(worst)
