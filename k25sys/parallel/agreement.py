"""An error of one rank that is one on all of them: alone, it would be waited for in the next collective."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from k25sys.errors import RankFailureError


@contextmanager
def agreed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Ends when all ranks of the group have done what is within, which must not communicate over it. Collective.

    Raises:
        What was raised within; on the other ranks RankFailureError, which names the first rank and what it said.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    said: list[str | None] = [None if fault is None else f"{type(fault).__name__}: {fault}"]
    if group is not None:
        said *= group.size()
        dist.all_gather_object(said, said[0], group=group)
    if fault is not None:
        raise fault
    for rank, text in enumerate(said):
        if text is not None:
            raise RankFailureError(f"on rank {rank}: {text}")
