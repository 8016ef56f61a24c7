"""Proof that a schedule can run: every action once, where it belongs, in an order that ends, within its memory."""

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from k25sys.errors import ScheduleError, listing, message
from k25sys.parallel.pipeline.execution import Execution, Sends
from k25sys.parallel.pipeline.ir import COMMUNICATION, COMPUTE, EXCHANGES, VISION, Action, Kind, Schedule, dependencies

_FREES = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)


def validate(
    schedule: Schedule, *, max_in_flight: int | Sequence[int] | None = None, sends: Sends = "rendezvous"
) -> None:
    """Returns when `schedule` trains every stage on every micro-batch once, and ends, whatever its actions take.

    Checked: every stage has a rank and every rank a stage; F and B, or F, I and W, of every stage and micro-batch once,
    on the stage's rank, nothing else; with sends and receives, every pair between two ranks and no other; VF of a pack
    on one rank, VB at most once and with a VF; D and R of stage 0, at most once on a rank; whatever an action needs of
    its own rank comes before it; weight gradients accumulate over micro-batches 0, 1, 2, ...; no deadlock.

    Args:
        max_in_flight: The most (stage, micro-batch) pairs whose activations a rank may hold at once, the same for all
            ranks or one number a rank.
        sends: "rendezvous": a send and its receive block both ranks until both are reached, the strictest that any
            backend is; an order that ends so ends with every other, and the messages of two ranks keep one order, as
            NCCL needs. "buffered": a send never waits, messages are found by what they are.

    Raises:
        ScheduleError: names the actions at fault, and at a deadlock what each rank waits for.
    """
    if sends not in ("rendezvous", "buffered"):
        raise ScheduleError(message("validate", "sends", repr(sends), "rendezvous, buffered"))
    if len(set(schedule.rank_of_stage)) != schedule.num_ranks:
        accepted = f"one stage or more on each of ranks 0 to {schedule.num_ranks - 1}"
        _refuse(schedule, f"stages on ranks {schedule.rank_of_stage}", accepted)
    _check_once(schedule)
    _check_order(schedule)
    _check_progress(schedule, "buffered")
    if sends == "rendezvous":
        _check_progress(schedule, "rendezvous")
    _check_memory(schedule, max_in_flight)


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """By rank, the most (stage, micro-batch) pairs whose activations it holds at once: from F to the end of B or W."""
    peaks = []
    for rank in range(schedule.num_ranks):
        held = peak = 0
        for action in schedule.actions[rank]:
            held += (action.kind is Kind.FORWARD) - (action.kind in _FREES)
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)


def _refuse(schedule: Schedule, got: str, accepted: str, hint: str = "") -> NoReturn:
    raise ScheduleError(message("validate", schedule.name, got, accepted, hint))


def _check_once(schedule: Schedule) -> None:
    found = Counter((rank, action) for rank, actions in schedule.actions.items() for action in actions)
    present = {action for _, action in found}
    expected: set[tuple[int, Action]] = set()
    is_lowered = schedule.is_lowered
    for stage, rank in enumerate(schedule.rank_of_stage):
        for i in range(schedule.num_microbatches):
            split = (
                Action(stage, Kind.BACKWARD_INPUT, i) in present or Action(stage, Kind.BACKWARD_WEIGHT, i) in present
            )
            backward = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if split else (Kind.BACKWARD,)
            actions = [Action(stage, kind, i) for kind in (Kind.FORWARD, *backward)]
            expected.update((rank, action) for action in actions)
            if is_lowered:
                sends = [send for action in actions if (send := schedule.send_of(action))]
                expected.update((rank, send) for send in sends)
                expected.update((schedule.rank_of_stage[send.partner.stage], send.partner) for send in sends)
    model = COMPUTE | COMMUNICATION
    faults = [f"{action} missing on rank {rank}" for rank, action in expected if (rank, action) not in found]
    faults += [
        f"{action} out of place on rank {rank}"
        for rank, action in found
        if action.kind in model and (rank, action) not in expected
    ]
    faults += [f"{action} {count} times on rank {rank}" for (rank, action), count in found.items() if count > 1]
    faults += _faults_of_vision(schedule, present)
    if faults:
        _refuse(schedule, listing(sorted(faults)), "every action once, on the rank of its stage")


def _faults_of_vision(schedule: Schedule, present: set[Action]) -> list[str]:
    of_stage_0 = VISION | EXCHANGES
    faults = [f"{action} of a stage other than 0" for action in present if action.kind in of_stage_0 and action.stage]
    ranks = Counter(action for actions in schedule.actions.values() for action in set(actions) if action.kind in VISION)
    faults += [f"{action} on {count} ranks" for action, count in ranks.items() if count > 1]
    for action in present:
        if action.kind is Kind.VISION_BACKWARD:
            forward = Action(action.stage, Kind.VISION_FORWARD, action.microbatch)
            faults += [f"{action} without {forward}"] if forward not in present else []
    for action, needs in schedule.requires.items():
        faults += [f"{other} missing, which is required" for other in (action, *needs) if other not in present]
    return faults


def _check_order(schedule: Schedule) -> None:
    needs = dependencies(schedule)
    for rank, actions in schedule.actions.items():
        position = {action: i for i, action in enumerate(actions)}
        last: dict[int, Action] = {}
        for i, action in enumerate(actions):
            for need in needs[action]:
                if position.get(need, -1) > i:
                    _refuse(schedule, f"{action} before {need} on rank {rank}", f"{need} first: {action} needs it")
            if action.kind in _FREES:
                before = last.setdefault(action.stage, action)
                if before.microbatch > action.microbatch:
                    accepted = "weight gradients of a stage in the order of the micro-batches"
                    _refuse(schedule, f"{before} before {action} on rank {rank}", accepted)
                last[action.stage] = action


def _check_progress(schedule: Schedule, sends: Sends) -> None:
    execution = Execution(schedule, sends)
    if execution.run():
        return
    waits = [f"rank {rank} in {head} waits for {execution.waits_for(rank)}" for rank, head in execution.heads().items()]
    _refuse(schedule, f"a deadlock: {listing(waits, separator='; ')}", f"an order that ends with {sends} sends")


def _check_memory(schedule: Schedule, max_in_flight: int | Sequence[int] | None) -> None:
    if max_in_flight is None:
        return
    bounds = [max_in_flight] * schedule.num_ranks if isinstance(max_in_flight, int) else list(max_in_flight)
    if len(bounds) != schedule.num_ranks:
        got = f"{len(bounds)} numbers"
        raise ScheduleError(
            message("validate", "max_in_flight", got, f"one, or one for each of {schedule.num_ranks} ranks")
        )
    for rank, (peak, bound) in enumerate(zip(peak_in_flight(schedule), bounds, strict=True)):
        if peak > bound:
            _refuse(schedule, f"{peak} micro-batches in flight on rank {rank}", f"{bound}")
