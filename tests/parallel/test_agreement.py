"""An error of one rank reaches all of them."""

import pytest
import torch.distributed as dist

from k25sys.errors import ArgumentValueError, RankFailureError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.agreement import agreed
from tests.parallel.processes import run_ranks


def _read(group: dist.ProcessGroup | None, fails: bool) -> None:
    with agreed(group):
        if fails:
            raise ArgumentValueError("no such file")


def _one_fails() -> None:
    grid = RankGrid.create(GridSizes(data=3))
    group, fails = grid.group("world"), grid.rank == 1
    _read(group, False)
    with pytest.raises(ArgumentValueError if fails else RankFailureError, match="no such file") as caught:
        _read(group, fails)
    assert str(caught.value).startswith("on rank 1: ") != fails
    dist.barrier()  # nobody is left behind


def test_what_one_rank_raises_is_raised_on_all() -> None:
    run_ranks(3, _one_fails)


def test_alone_an_error_is_itself() -> None:
    with pytest.raises(ArgumentValueError, match="no such file"), agreed(None):
        raise ArgumentValueError("no such file")
