"""Sizes of pipelines that the tests go through."""

from collections.abc import Iterator

from k25sys.parallel.pipeline import Kind, Schedule, make_schedule
from k25sys.parallel.pipeline.generators import SCHEDULES

RANKS = (1, 2, 4, 5)
MICROBATCHES = (1, 2, 5, 8, 11)

COSTS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}


def all_schedules(ranks: tuple[int, ...] = RANKS, microbatches: tuple[int, ...] = MICROBATCHES) -> Iterator[Schedule]:
    """Every schedule in every size, with every option."""
    for name in SCHEDULES:
        for p in ranks:
            for m in microbatches:
                for v in (1, 2, 3) if name == "interleaved_1f1b" else (1,):
                    for extra in (0, 2) if name.endswith("1f1b") else (0,):
                        for split in (False, True) if name != "zb_h1" else (False,):
                            yield make_schedule(
                                name,
                                num_ranks=p,
                                num_microbatches=m,
                                virtual_stages=v,
                                extra_warmup=extra,
                                split_backward=split,
                            )
