"""The intermediate representation of pipeline schedules: what each rank does, in order.

A schedule is data. Generators make it, the validator proves it, the lowering adds its sends and receives, the simulator
times it, the tracer draws it and the runtime executes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from k25sys.errors import ScheduleError, message


class Kind(Enum):
    """What an action does; the value is its short name in texts and drawings."""

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
    """A pack of the encoder; `microbatch` is its number, `stage` is 0."""
    VISION_BACKWARD = "VB"
    DELIVER = "D"
    """Starts the messages that carry a micro-batch's encoded media to stage 0; `stage` is 0."""
    RETURN = "R"
    """Makes room for the gradients of a micro-batch's media on the ranks that encoded them; `stage` is 0."""


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
COMMUNICATION = frozenset({Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD})
VISION = frozenset({Kind.VISION_FORWARD, Kind.VISION_BACKWARD, Kind.DELIVER, Kind.RETURN})


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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The actions of every pipeline rank, in order."""

    name: str
    num_microbatches: int
    rank_of_stage: tuple[int, ...]
    """Which rank holds each stage: the stages are the pieces of the model, in the order of the data."""
    actions: Mapping[int, tuple[Action, ...]]
    """By rank; a rank does not start an action before the one before it has ended. Sends do not wait."""

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
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return any(action.kind is Kind.BACKWARD_WEIGHT for actions in self.actions.values() for action in actions)
