"""The intermediate representation of pipeline schedules: what each rank does, in order.

A schedule is data. Generators make it, the validator proves it, the lowering adds its sends and receives, the simulator
times it, the tracer draws it and the runtime executes it.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn

from k25sys.errors import ScheduleError, message


class Kind(Enum):
    """What an action does; the value is its short name in texts and drawings."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is Python code, and runs for each Action's

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs and weights at once."""
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    """What the I of the same stage and micro-batch left over."""
    SEND_FORWARD = "SF"
    """Activations of (stage, micro-batch) to the rank of stage + 1."""
    RECV_FORWARD = "RF"
    """Activations for (stage, micro-batch) from the rank of stage - 1."""
    SEND_BACKWARD = "SB"
    """The gradient of the input of (stage, micro-batch) to the rank of stage - 1."""
    RECV_BACKWARD = "RB"
    """The gradient of the output of (stage, micro-batch) from the rank of stage + 1."""
    VISION_FORWARD = "VF"
    """A pack of the encoder; `microbatch` is its number, `stage` is 0; on any rank."""
    VISION_BACKWARD = "VB"
    """The recomputation and backward of a pack."""
    DELIVER = "D"
    """Starts the messages that carry a micro-batch's encoded media to stage 0; `stage` is 0; on every rank, waits for
    none."""
    RETURN = "R"
    """Makes room for the gradients of a micro-batch's media on the ranks that encoded them; as DELIVER."""


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
VISION = frozenset({Kind.VISION_FORWARD, Kind.VISION_BACKWARD})
EXCHANGES = frozenset({Kind.DELIVER, Kind.RETURN})
SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
RECEIVES = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
COMMUNICATION = SENDS | RECEIVES

_PARTNERS = {
    Kind.SEND_FORWARD: (1, Kind.RECV_FORWARD),
    Kind.RECV_FORWARD: (-1, Kind.SEND_FORWARD),
    Kind.SEND_BACKWARD: (-1, Kind.RECV_BACKWARD),
    Kind.RECV_BACKWARD: (1, Kind.SEND_BACKWARD),
}
_TORCH_NAMES = {
    Kind.SEND_FORWARD: "SEND_F",
    Kind.RECV_FORWARD: "RECV_F",
    Kind.SEND_BACKWARD: "SEND_B",
    Kind.RECV_BACKWARD: "RECV_B",
}
_TORCH_ONLY = ("REDUCE_GRAD", "UNSHARD", "RESHARD")


@dataclass(frozen=True, order=False)
class Action:
    """One thing that one rank does, e.g. 2F0: the forward of micro-batch 0 through stage 2."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The inverse of str. Raises ScheduleError."""
        for kind in sorted(Kind, key=lambda kind: -len(kind.value)):
            stage, found, microbatch = text.partition(kind.value)
            if found and stage.isdecimal() and microbatch.isdecimal():
                return cls(int(stage), kind, int(microbatch))
        kinds = ", ".join(kind.value for kind in Kind)
        raise ScheduleError(message("Action", "text", repr(text), f"<stage><kind><micro-batch>, kind one of {kinds}"))

    @property
    def partner(self) -> "Action":
        """The receive of a send, the send of a receive."""
        distance, kind = _PARTNERS[self.kind]
        return Action(self.stage + distance, kind, self.microbatch)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The actions of every pipeline rank, in order. Whether they make sense is validator.validate's question.

    Raises:
        ScheduleError: ranks, stages or micro-batches that there are not.
    """

    name: str
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    """Which rank holds each stage: the stages are the pieces of the model, in the order of the data."""
    actions: Mapping[int, tuple[Action, ...]]
    """By rank; a rank does not start an action before the one before it has ended. Sends do not wait."""
    requires: Mapping[Action, tuple[Action, ...]] = field(default_factory=dict)
    """Order beyond that of the stages: what must have ended, on whichever ranks, before the action starts. E.g. the D
    of a micro-batch, of all ranks, before its forward through stage 0."""

    def __post_init__(self) -> None:
        ranks = range(len(self.actions))
        if sorted(self.actions) != list(ranks) or not ranks:
            self._refuse(f"actions of ranks {sorted(self.actions)}", "those of ranks 0, 1, 2, ...")
        if not set(self.rank_of_stage) <= set(ranks) or not self.rank_of_stage:
            self._refuse(f"stages on ranks {self.rank_of_stage}", f"one stage or more, on ranks 0 to {len(ranks) - 1}")
        stages = {action.stage for actions in self.actions.values() for action in actions}
        if not stages <= set(range(self.num_stages)):
            self._refuse(f"actions of stages {sorted(stages)}", f"stages 0 to {self.num_stages - 1}")
        if self.num_microbatches < 1:
            self._refuse(f"{self.num_microbatches} micro-batches", "1 or more")

    def _refuse(self, got: str, accepted: str) -> NoReturn:
        raise ScheduleError(message("Schedule", self.name, got, accepted))

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        """Pieces of the model: ranks times virtual stages."""
        return len(self.rank_of_stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of `rank`, ascending."""
        return tuple(stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank)

    @property
    def is_lowered(self) -> bool:
        """Whether sends and receives are actions of it."""
        return any(action.kind in COMMUNICATION for actions in self.actions.values() for action in actions)

    def send_of(self, action: Action) -> Action | None:
        """The send of what a forward or an (input's) backward makes; None where nobody else needs it, or its own rank
        does."""
        if action.kind is Kind.FORWARD:
            send, target = Kind.SEND_FORWARD, action.stage + 1
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            send, target = Kind.SEND_BACKWARD, action.stage - 1
        else:
            return None
        if not 0 <= target < self.num_stages or self.rank_of_stage[target] == self.rank_of_stage[action.stage]:
            return None
        return Action(action.stage, send, action.microbatch)

    def to_csv(self) -> str:
        """One row a rank, in the text of torch.distributed.pipelining (2F0, 2SEND_F0); vision actions as here."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for rank in range(self.num_ranks):
            writer.writerow(
                f"{action.stage}{_TORCH_NAMES.get(action.kind, action.kind.value)}{action.microbatch}"
                for action in self.actions[rank]
            )
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, name: str) -> "Schedule":
        """The inverse of to_csv; reads what torch.distributed.pipelining writes, too.

        Empty cells (torch's idle slots) and REDUCE_GRAD, UNSHARD and RESHARD (of data parallelism) are left out.
        Stages belong to the ranks that have their actions. Raises ScheduleError for anything else that is no Action.
        """
        actions = {rank: tuple(_parse_row(row)) for rank, row in enumerate(csv.reader(io.StringIO(text)))}
        owners = {action.stage: rank for rank, row in actions.items() for action in row if action.kind in COMPUTE}
        if sorted(owners) != list(range(len(owners))) or not owners:
            got = f"actions of stages {sorted(owners)}"
            raise ScheduleError(message("Schedule.from_csv", "text", got, "actions of every stage from 0"))
        microbatches = {action.microbatch for row in actions.values() for action in row if action.kind in COMPUTE}
        return cls(
            name=name,
            num_microbatches=max(microbatches) + 1,
            rank_of_stage=tuple(owners[stage] for stage in range(len(owners))),
            actions=actions,
        )


def _parse_row(row: list[str]) -> list[Action]:
    actions = []
    for cell in row:
        text = cell.strip()
        if not text or any(kind in text for kind in _TORCH_ONLY):
            continue
        for kind, name in _TORCH_NAMES.items():
            text = text.replace(name, kind.value)
        actions.append(Action.parse(text))
    return actions


def dependencies(schedule: Schedule) -> dict[Action, tuple[Action, ...]]:
    """What must have ended, on any rank, before each action of `schedule` starts, its rank's own order aside.

    Where the schedule has the receive of what an action needs, it depends on that, and the receive on its send.
    """
    present = {action for actions in schedule.actions.values() for action in actions}
    return {action: (*_needs(schedule, action, present), *schedule.requires.get(action, ())) for action in present}


def _needs(schedule: Schedule, action: Action, present: set[Action]) -> list[Action]:
    stage, kind = action.stage, action.kind

    def first(*candidates: tuple[int, Kind]) -> list[Action]:
        """The first candidate that the schedule has; the last, which it then lacks, where it has none."""
        actions = [Action(stage, kind, action.microbatch) for stage, kind in candidates]
        return [next((candidate for candidate in actions if candidate in present), actions[-1])]

    if kind is Kind.FORWARD:
        return first((stage, Kind.RECV_FORWARD), (stage - 1, Kind.FORWARD)) if stage > 0 else []
    if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        above = (stage, Kind.RECV_BACKWARD), (stage + 1, Kind.BACKWARD_INPUT), (stage + 1, Kind.BACKWARD)
        return first((stage, Kind.FORWARD)) + (first(*above) if stage + 1 < schedule.num_stages else [])
    if kind is Kind.BACKWARD_WEIGHT:
        return first((stage, Kind.BACKWARD_INPUT))
    if kind is Kind.SEND_FORWARD:
        return first((stage, Kind.FORWARD))
    if kind is Kind.SEND_BACKWARD:
        return first((stage, Kind.BACKWARD_INPUT), (stage, Kind.BACKWARD))
    if kind in RECEIVES:
        return [action.partner]
    if kind is Kind.VISION_BACKWARD:
        return first((stage, Kind.VISION_FORWARD))
    return []
