"""Executes a schedule on one rank of the pipeline: forwards, backwards in one piece or two, messages, hooks.

Activations and gradients between stages have shapes that both ends know from the micro-batch, so that micro-batches may
differ and no message needs a header; one without elements is not sent. Receives are posted where the schedule says and
waited for before the action that needs them. Sends are started, and their tensors let go a few messages later: the
messages of two ranks are in one order on both (which NCCL needs), and the schedule ends even with sends that block, so
that waiting for an earlier one never deadlocks.

Every wait ends: with the message, or with the error of a closed connection or of the process group's timeout
(RankGrid.create), from which a Monitor makes one that names the rank at fault.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from k25sys.errors import ScheduleError, ShapeError, message
from k25sys.parallel.faults import Monitor
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.pipeline.ir import COMMUNICATION, COMPUTE, RECEIVES, SENDS, Action, Kind, Schedule
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.weight_grads import WeightGradStore

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)

_EVALUATED = frozenset({Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.VISION_FORWARD, Kind.DELIVER})
_MOST_SENDS = 4
"""Messages to one rank whose tensors are held at a time."""


class Stage(Protocol[M_contra]):
    """A piece of the model."""

    def __call__(self, microbatch: M_contra, x: Tensor | None, /) -> Tensor:
        """From the output of the stage before (None on the first) to its own; on the last stage the scalar loss."""
        ...

    def output_shape(self, microbatch: M_contra, /) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what leaves any stage but the last, known on both sides of the link."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step gives this rank."""

    losses: list[Tensor]
    """By micro-batch, detached; empty unless this rank has the last stage."""


@dataclass
class _Forward:
    """What the backward of a (stage, micro-batch) needs: the leaf it started from and the edge it ends in. The output
    itself is not held: it is freed when it has been sent."""

    x: Tensor | None
    edge: GradientEdge | None
    like: Tensor | None
    """The loss, on the last stage."""


@dataclass
class _Step(Generic[M]):
    microbatches: Sequence[M]
    train: bool
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Outputs of the stage before, and gradients of outputs, by the (stage, micro-batch) that needs them."""
    gradients: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    receiving: dict[Action, tuple[dist.Work | None, Tensor]] = field(default_factory=dict)
    sending: defaultdict[int, deque[tuple[Action, dist.Work, Tensor]]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    """By the rank that they go to, oldest first."""
    forwards: dict[tuple[int, int], _Forward] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)


class PipelineRuntime(Generic[M]):
    """Runs steps of a schedule.

    Args:
        schedule: with sends and receives (see lowering.lower); its ranks are places along "pipeline".
        stages: this rank's, by number.
        grid: messages travel over its "pipeline" group.
        weight_grads: the store that the stages' linear layers use, where the schedule splits the backward.
        monitor: names the rank at fault when a wait fails.
        recorder: gets the times of every action and message.

    Raises:
        ScheduleError: another number of ranks or other stages than the schedule's; one that has not been lowered; one
            whose messages between two ranks have another order on each.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage[M]],
        grid: RankGrid,
        *,
        weight_grads: WeightGradStore,
        monitor: Monitor | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.schedule, self.stages, self.grid = schedule, stages, grid
        self.weight_grads, self.monitor, self.recorder = weight_grads, monitor, recorder
        self.place = grid.index("pipeline")
        if schedule.num_ranks != grid.size("pipeline"):
            accepted = f"{grid.size('pipeline')}, the grid's"
            raise ScheduleError(message("PipelineRuntime", "schedule", f"{schedule.num_ranks} ranks", accepted))
        if tuple(sorted(stages)) != schedule.stages_of(self.place):
            accepted = f"{schedule.stages_of(self.place)}, those of rank {self.place} in {schedule.name}"
            raise ScheduleError(message("PipelineRuntime", "stages", tuple(sorted(stages)), accepted))
        _check_messages(schedule)

    def step(
        self,
        microbatches: Sequence[M],
        *,
        forward_only: bool = False,
        schedule: Schedule | None = None,
        hooks: Mapping[Kind, Callable[[int], None]] | None = None,
    ) -> StepResult:
        """One pass over the micro-batches. Gradients are added to those that parameters have.

        Args:
            microbatches: as many as the schedule has.
            forward_only: evaluates: forwards alone, without graphs.
            schedule: of this step alone: the constructor's with VF, VB, D and R added.
            hooks: what runs those, by kind; each gets the action's number.

        Raises:
            ScheduleError: another number of micro-batches, or an action without a hook.
            RankFailureError: with a monitor: another rank died, stopped or failed.
        """
        schedule = self.schedule if schedule is None else self._checked(schedule)
        if len(microbatches) != schedule.num_microbatches:
            accepted = f"{schedule.num_microbatches}, those of {schedule.name}"
            raise ScheduleError(message("PipelineRuntime.step", "microbatches", len(microbatches), accepted))
        actions = schedule.actions[self.place]
        if forward_only:
            actions = tuple(action for action in actions if action.kind in _EVALUATED)
        hooks = hooks or {}
        lacking = next((a for a in actions if a.kind not in COMPUTE | COMMUNICATION and a.kind not in hooks), None)
        if lacking is not None:
            accepted = f"a hook for {lacking.kind.name}"
            raise ScheduleError(message("PipelineRuntime.step", "hooks", f"none for {lacking}", accepted))
        step = _Step(microbatches, train=not forward_only)
        try:
            with torch.set_grad_enabled(step.train):
                for action in actions:
                    received = self._received(step, action)
                    with self._watched(action):
                        self._run(step, action, received, hooks)
                for queue in step.sending.values():
                    self._let_go(queue, 0)
        except BaseException:
            self.weight_grads.clear()
            raise
        assert not step.forwards, list(step.forwards)
        assert self.weight_grads.num_kept == 0
        return StepResult([step.losses[number] for number in sorted(step.losses)])

    def _checked(self, schedule: Schedule) -> Schedule:
        """A schedule for one step: it may add vision actions, and nothing else."""
        own = schedule.actions.get(self.place, ())
        backbone = tuple(action for action in own if action.kind in COMPUTE | COMMUNICATION)
        if backbone != self.schedule.actions[self.place]:
            accepted = f"that of {self.schedule.name}, with vision actions between"
            got = f"{schedule.name} with another order of rank {self.place}"
            raise ScheduleError(message("PipelineRuntime.step", "schedule", got, accepted))
        return schedule

    def _watched(self, action: Action) -> AbstractContextManager[Any]:
        if self.recorder is not None:
            return self.recorder.during(action, self.monitor)
        return nullcontext() if self.monitor is None else self.monitor.during(str(action))

    def _run(
        self,
        step: _Step[M],
        action: Action,
        received: Tensor | None,
        hooks: Mapping[Kind, Callable[[int], None]],
    ) -> None:
        stage, kind, number = action.stage, action.kind, action.microbatch
        if kind is Kind.FORWARD:
            self._forward(step, stage, number, received)
        elif kind is Kind.BACKWARD:
            self._backward(step, stage, number, received)
        elif kind is Kind.BACKWARD_INPUT:
            with self.weight_grads.deferring((stage, number)):
                self._backward(step, stage, number, received)
        elif kind is Kind.BACKWARD_WEIGHT:
            self.weight_grads.run((stage, number))
        elif kind in SENDS:
            self._send(step, action)
        elif kind in RECEIVES:
            self._post(step, action)
        else:
            hooks[kind](number)

    # --- compute ----------------------------------------------------------------------------------------------------

    def _forward(self, step: _Step[M], stage: int, number: int, received: Tensor | None) -> None:
        x = step.inputs.pop((stage, number)) if stage > 0 and received is None else received
        if x is not None and step.train:
            x = x.detach().requires_grad_()
        y = self.stages[stage](step.microbatches[number], x)
        is_last = stage == self.schedule.num_stages - 1
        if is_last:
            step.losses[number] = y.detach()
        else:
            self._check_output(step, stage, number, y)
            self._hand_on(step, stage, number, y.detach())
        if step.train:
            edge = get_gradient_edge(y) if y.requires_grad else None
            step.forwards[stage, number] = _Forward(x, edge, y.detach() if is_last else None)

    def _check_output(self, step: _Step[M], stage: int, number: int, y: Tensor) -> None:
        shape, dtype = self.stages[stage].output_shape(step.microbatches[number])
        if tuple(y.shape) != tuple(shape) or y.dtype != dtype:
            got = f"{y.dtype} {tuple(y.shape)}"
            raise ShapeError(message("PipelineRuntime", f"output of stage {stage}", got, f"{dtype} {shape}"))

    def _backward(self, step: _Step[M], stage: int, number: int, received: Tensor | None) -> None:
        saved = step.forwards.pop((stage, number))
        if saved.like is not None:
            gradient = torch.ones_like(saved.like)
        else:
            gradient = step.gradients.pop((stage, number)) if received is None else received
        if saved.edge is not None:
            torch.autograd.backward([saved.edge], [gradient])
        if stage > 0:
            x = saved.x
            assert x is not None
            grad_x = x.grad if x.grad is not None else torch.zeros_like(x)
            if self._is_here(stage - 1):
                step.gradients[stage - 1, number] = grad_x
            else:
                step.input_gradients[stage, number] = grad_x

    # --- between stages ---------------------------------------------------------------------------------------------

    def _is_here(self, stage: int) -> bool:
        return self.schedule.rank_of_stage[stage] == self.place

    def _hand_on(self, step: _Step[M], stage: int, number: int, y: Tensor) -> None:
        if self._is_here(stage + 1):
            step.inputs[stage + 1, number] = y
        else:
            step.outputs[stage, number] = y

    def _received(self, step: _Step[M], action: Action) -> Tensor | None:
        """Waits for what `action` needs of another rank; None where it needs nothing."""
        kind = _NEEDED.get(action.kind)
        receive = None if kind is None else Action(action.stage, kind, action.microbatch)
        if receive is None or receive not in step.receiving:
            return None
        work, x = step.receiving.pop(receive)
        if work is not None:
            with self._waiting(receive, f"{receive} for {action}"):
                work.wait()
        return x

    def _waiting(self, communication: Action, name: str) -> AbstractContextManager[Any]:
        """Around a wait: the monitor learns who is waited for, the recorder when a message has come."""
        if self.recorder is not None and communication.kind in RECEIVES:
            return self.recorder.arriving(communication, self._guarded(communication, name))
        return self._guarded(communication, name)

    def _guarded(self, communication: Action, name: str) -> AbstractContextManager[Any]:
        if self.monitor is None:
            return nullcontext()
        return self.monitor.during(name, peers=[self._rank_of(communication.partner.stage)])

    def _post(self, step: _Step[M], action: Action) -> None:
        """Starts a receive: of the input of its stage, or of the gradient of its output."""
        shape, dtype = self._shape_of_message(step, action.partner)
        x = torch.empty(shape, dtype=dtype, device=self.grid.device_type)
        work = None
        if x.numel():
            source = self._rank_of(action.partner.stage)
            work = dist.irecv(x, source, group=self._group, tag=self._tag(action.partner))
        step.receiving[action] = (work, x)

    def _send(self, step: _Step[M], action: Action) -> None:
        outbox = step.outputs if action.kind is Kind.SEND_FORWARD else step.input_gradients
        x = outbox.pop((action.stage, action.microbatch))
        assert x is not None
        if not x.numel():
            return
        x, target = x.contiguous(), self._rank_of(action.partner.stage)
        queue = step.sending[target]
        self._let_go(queue, _MOST_SENDS - 1)
        work = dist.isend(x, target, group=self._group, tag=self._tag(action))
        assert work is not None
        queue.append((action, work, x))

    def _let_go(self, queue: deque[tuple[Action, dist.Work, Tensor]], most: int) -> None:
        """Drops what has been sent; waits where more than `most` messages are under way."""
        while queue and (len(queue) > most or queue[0][1].is_completed()):
            action, work, _ = queue.popleft()
            with self._waiting(action, f"{action}, which its receiver has not taken"):
                work.wait()

    def _shape_of_message(self, step: _Step[M], send: Action) -> tuple[tuple[int, ...], torch.dtype]:
        """Any stage here knows what leaves another one."""
        assert send.kind in SENDS
        return next(iter(self.stages.values())).output_shape(step.microbatches[send.microbatch])

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.grid.group("pipeline")

    def _rank_of(self, stage: int) -> int:
        return self.grid.ranks("pipeline")[self.schedule.rank_of_stage[stage]]

    def _tag(self, send: Action) -> int:
        """Its own for each message of a step: gloo matches by it; NCCL, which ignores it, by order."""
        forward = send.kind is Kind.SEND_FORWARD
        return 2 * (send.stage * self.schedule.num_microbatches + send.microbatch) + forward + 1


_NEEDED = {
    Kind.FORWARD: Kind.RECV_FORWARD,
    Kind.BACKWARD: Kind.RECV_BACKWARD,
    Kind.BACKWARD_INPUT: Kind.RECV_BACKWARD,
}


def _check_messages(schedule: Schedule) -> None:
    """Raises unless all that crosses ranks is sent, and two ranks have their messages in the same order."""
    orders: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    """By (rank, other rank): the sends of their messages, in the order of the first."""
    for rank, actions in schedule.actions.items():
        present = set(actions)
        for action in actions:
            send = schedule.send_of(action)
            if send is not None and send not in present:
                raise ScheduleError(message("PipelineRuntime", "schedule", f"no {send}", "sends", "lower() it"))
            if action.kind in COMMUNICATION:
                other = schedule.rank_of_stage[action.partner.stage]
                orders[rank, other].append(action if action.kind in SENDS else action.partner)
    for (rank, other), order in orders.items():
        if order != orders.get((other, rank)):
            got = f"messages between ranks {rank} and {other} in another order on each"
            accepted = "the same order on both"
            raise ScheduleError(message("PipelineRuntime", "schedule", got, accepted, "lower() it"))
