"""Generators of pipeline schedules: compute actions by rank, from the sizes alone.

GPipe (arXiv 1811.06965), 1F1B (PipeDream-Flush, arXiv 2006.09503), interleaved 1F1B (Megatron-LM, arXiv 2104.04473;
the extra warm-up is Kimi K2's, arXiv 2507.20534, section 2.4), ZB-H1 (Zero Bubble, arXiv 2401.10241, section 2).
In each of them the gradients of a stage's weights accumulate over the micro-batches 0, 1, 2, ...
"""

from difflib import get_close_matches
from itertools import accumulate

from k25sys.errors import ScheduleError, message
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1")
"""The names that make_schedule knows."""


def make_schedule(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    extra_warmup: int = 0,
    split_backward: bool = False,
) -> Schedule:
    """The schedule `name` for these sizes; stage s lies on rank s % num_ranks.

    Args:
        name: One of SCHEDULES.
        num_microbatches: Any number >= 1. Interleaved: the micro-batches go through the virtual stages of a rank in
            groups, of num_ranks where that divides num_microbatches, else in max(1, num_microbatches // num_ranks)
            groups whose sizes differ by one at most, larger ones first.
        virtual_stages: Stages of a rank; more than 1 only for interleaved_1f1b. Its schedule for 1 is that of 1F1B with
            twice the warm-up, and nearly twice the micro-batches in flight.
        extra_warmup: Forwards, beyond those that the pipeline needs to fill, that each rank does before its first
            backward: then the forward and the backward that follow each other are of different micro-batches on the
            last stage too, and one can compute while the other's expert all-to-all travels. Kimi K2's is 1. The price
            is as many more micro-batches (of one stage) in flight; it gains nothing where the two do not overlap.
            1f1b and interleaved_1f1b.
        split_backward: Each B becomes I, W: the gradient of the stage's input leaves before the weights' are computed.
            zb_h1 is always so.

    Raises:
        ScheduleError: an unknown name; a size that is not an int in its range; an option that this schedule has not.
    """
    if name not in SCHEDULES:
        near = get_close_matches(str(name), SCHEDULES, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ScheduleError(message("make_schedule", "name", repr(name), ", ".join(SCHEDULES), hint))
    interleaved = name == "interleaved_1f1b"
    _check("num_ranks", num_ranks, 1)
    _check("num_microbatches", num_microbatches, 1)
    _check("virtual_stages", virtual_stages, 1, None if interleaved else 1, name)
    _check("extra_warmup", extra_warmup, 0, None if name in ("1f1b", "interleaved_1f1b") else 0, name)

    actions: dict[int, tuple[Action, ...]] = {}
    for rank in range(num_ranks):
        if interleaved:
            made = _interleaved(rank, num_ranks, num_microbatches, virtual_stages, extra_warmup)
        elif name == "zb_h1":
            made = _zb_h1(rank, num_ranks, num_microbatches)
        else:
            warmup = num_microbatches if name == "gpipe" else num_ranks - 1 - rank + extra_warmup
            made = _one_forward_one_backward(*_one_stage(rank, num_microbatches), warmup)
        actions[rank] = tuple(_split(made) if split_backward else made)
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        rank_of_stage=tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages)),
        actions=actions,
    )


def _check(argument: str, value: int, least: int, most: int | None = None, name: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        accepted = f"an int >= {least}" if most is None else f"{most} for {name}"
        hint = "" if most is None or least > most else "interleaved_1f1b has this option"
        raise ScheduleError(message("make_schedule", argument, repr(value), accepted, hint))


def _one_stage(stage: int, num_microbatches: int) -> tuple[list[Action], list[Action]]:
    microbatches = range(num_microbatches)
    return [Action(stage, Kind.FORWARD, i) for i in microbatches], [
        Action(stage, Kind.BACKWARD, i) for i in microbatches
    ]


def _one_forward_one_backward(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then one forward and one backward by turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    made = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        made += (forward, backward)
    return made + backwards[len(forwards) - warmup :]


def _group_sizes(num_ranks: int, num_microbatches: int) -> list[int]:
    num_groups = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, num_groups)
    return [size + 1] * larger + [size] * (num_groups - larger)


def _interleaved(rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int, extra: int) -> list[Action]:
    sizes = _group_sizes(num_ranks, num_microbatches)
    groups = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    stages = [rank + chunk * num_ranks for chunk in range(virtual_stages)]
    forwards = [Action(stage, Kind.FORWARD, i) for group in groups for stage in stages for i in group]
    backwards = [Action(stage, Kind.BACKWARD, i) for group in groups for stage in reversed(stages) for i in group]
    warmup = (virtual_stages - 1) * sizes[0] + 2 * (num_ranks - 1 - rank) + extra
    return _one_forward_one_backward(forwards, backwards, warmup)


def _zb_h1(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """1F1B of F and I, with each W `rank` turns after its I: no rank holds more than num_ranks micro-batches, and the
    W that are put off fill the time in which the last gradients travel."""
    forwards, _ = _one_stage(rank, num_microbatches)
    inputs = [Action(rank, Kind.BACKWARD_INPUT, i) for i in range(num_microbatches)]
    weights = [Action(rank, Kind.BACKWARD_WEIGHT, i) for i in range(num_microbatches)]
    made: list[Action] = []
    for action in _one_forward_one_backward(forwards, inputs, num_ranks - 1 - rank):
        made.append(action)
        if action.kind is Kind.BACKWARD_INPUT and action.microbatch >= rank:
            made.append(weights[action.microbatch - rank])
    return made + weights[max(0, num_microbatches - rank) :]


def _split(actions: list[Action]) -> list[Action]:
    made: list[Action] = []
    for action in actions:
        if action.kind is Kind.BACKWARD:
            made += [
                Action(action.stage, kind, action.microbatch) for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
            ]
        else:
            made.append(action)
    return made
