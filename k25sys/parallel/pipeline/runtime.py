"""Executes a schedule on one rank of the pipeline: forwards, backwards in one piece or two, messages, hooks.

Activations and gradients between stages have shapes that both ends know from the micro-batch, so that micro-batches may
differ and no message needs a header. Sends are started and waited for at the end of the step; receives are posted
where the schedule says and waited for by the action that needs them.
"""

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
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.weight_grads import WeightGradStore

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)

_EVALUATED = frozenset(
    {Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.VISION_FORWARD, Kind.DELIVER}
)  # fmt: skip


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
    receiving: dict[Action, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sending: list[tuple[dist.Work, Tensor, Action]] = field(default_factory=list)
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
        recorder: gets the time of every action.

    Raises:
        ScheduleError: another number of ranks or other stages than the schedule's; messages between two ranks that are
            not received in the order in which they are sent.
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
        _check_message_order(schedule)

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
            schedule: of this step alone: the constructor's with vision actions added.
            hooks: what runs a vision action, by kind; each gets the action's number.

        Raises:
            ScheduleError: another number of micro-batches, or an action without a hook.
            RankFailureError: with a monitor: another rank died, stopped or failed.
        """
        schedule = schedule or self.schedule
        if len(microbatches) != schedule.num_microbatches:
            accepted = f"{schedule.num_microbatches}, those of {schedule.name}"
            raise ScheduleError(message("PipelineRuntime.step", "microbatches", len(microbatches), accepted))
        step = _Step(microbatches, train=not forward_only)
        try:
            with torch.set_grad_enabled(step.train):
                for action in schedule.actions[self.place]:
                    if step.train or action.kind in _EVALUATED:
                        with self._watched(action):
                            self._run(step, action, hooks or {})
                for work, _, action in step.sending:
                    with self._watched(action):
                        work.wait()
        except BaseException:
            self.weight_grads.clear()
            raise
        assert not step.forwards or forward_only, list(step.forwards)
        assert self.weight_grads.num_kept == 0
        return StepResult([step.losses[number] for number in sorted(step.losses)])

    def _watched(self, action: Action) -> AbstractContextManager[Any]:
        if self.recorder is not None:
            return self.recorder.during(action, self.monitor)
        return nullcontext() if self.monitor is None else self.monitor.during(str(action))

    def _run(self, step: _Step[M], action: Action, hooks: Mapping[Kind, Callable[[int], None]]) -> None:
        stage, kind, number = action.stage, action.kind, action.microbatch
        if kind is Kind.FORWARD:
            self._forward(step, stage, number)
        elif kind is Kind.BACKWARD:
            self._backward(step, stage, number)
        elif kind is Kind.BACKWARD_INPUT:
            with self.weight_grads.deferring((stage, number)):
                self._backward(step, stage, number)
        elif kind is Kind.BACKWARD_WEIGHT:
            self.weight_grads.run((stage, number))
        elif kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            self._send(step, action)
        elif kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            self._post(step, action)
        elif kind in hooks:
            hooks[kind](number)
        else:
            accepted = f"a hook for {kind.name}"
            raise ScheduleError(message("PipelineRuntime.step", "hooks", f"none for {action}", accepted))

    # --- compute ----------------------------------------------------------------------------------------------------

    def _forward(self, step: _Step[M], stage: int, number: int) -> None:
        x = None if stage == 0 else self._input(step, stage, number)
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

    def _backward(self, step: _Step[M], stage: int, number: int) -> None:
        saved = step.forwards.pop((stage, number))
        gradient = torch.ones_like(saved.like) if saved.like is not None else self._output_gradient(step, stage, number)
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

    def _input(self, step: _Step[M], stage: int, number: int) -> Tensor:
        if self._is_here(stage - 1):
            return step.inputs.pop((stage, number))
        return self._received(step, Action(stage, Kind.RECV_FORWARD, number))

    def _output_gradient(self, step: _Step[M], stage: int, number: int) -> Tensor | None:
        if self._is_here(stage + 1):
            return step.gradients.pop((stage, number))
        return self._received(step, Action(stage, Kind.RECV_BACKWARD, number))

    def _received(self, step: _Step[M], action: Action) -> Tensor:
        work, x = step.receiving.pop(action)
        work.wait()
        return x

    def _post(self, step: _Step[M], action: Action) -> None:
        """Starts a receive: of the input of its stage, or of the gradient of its output."""
        forward = action.kind is Kind.RECV_FORWARD
        source = action.stage - 1 if forward else action.stage + 1
        sender = action.stage if not forward else source
        shape, dtype = self._shape_of_link(step, sender, action.microbatch)
        x = torch.empty(shape, dtype=dtype, device=self.grid.device_type)
        link = min(source, action.stage)
        work = dist.irecv(x, self._rank_of(source), group=self._group, tag=self._tag(link, action.microbatch, forward))
        assert work is not None
        step.receiving[action] = (work, x)

    def _send(self, step: _Step[M], action: Action) -> None:
        forward, key = action.kind is Kind.SEND_FORWARD, (action.stage, action.microbatch)
        target = action.stage + 1 if forward else action.stage - 1
        x = step.outputs.pop(key) if forward else step.input_gradients.pop(key)
        assert x is not None
        x = x.contiguous()
        link = min(target, action.stage)
        work = dist.isend(x, self._rank_of(target), group=self._group, tag=self._tag(link, action.microbatch, forward))
        assert work is not None
        step.sending.append((work, x, action))

    def _shape_of_link(self, step: _Step[M], stage: int, number: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Of what leaves `stage`: any stage here knows it."""
        return next(iter(self.stages.values())).output_shape(step.microbatches[number])

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.grid.group("pipeline")

    def _rank_of(self, stage: int) -> int:
        return self.grid.ranks("pipeline")[self.schedule.rank_of_stage[stage]]

    def _tag(self, link: int, number: int, forward: bool) -> int:
        """Its own for each message of a step: gloo matches by it; NCCL, which ignores it, by order."""
        return 2 * (link * self.schedule.num_microbatches + number) + forward + 1


def _check_message_order(schedule: Schedule) -> None:
    """Raises unless every pair of ranks receives in the order of its sends."""
    sent: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}
    received: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}
    for rank, actions in schedule.actions.items():
        for action in actions:
            forward = action.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD)
            if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                other = action.stage + (1 if forward else -1)
                pair = (rank, schedule.rank_of_stage[other])
                sent.setdefault(pair, []).append((min(other, action.stage), action.microbatch, forward))
            elif action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
                other = action.stage + (-1 if forward else 1)
                pair = (schedule.rank_of_stage[other], rank)
                received.setdefault(pair, []).append((min(other, action.stage), action.microbatch, forward))
    for pair in sent.keys() | received.keys():
        if sent.get(pair) != received.get(pair):
            got = f"messages from rank {pair[0]} to {pair[1]} received in another order than they are sent"
            raise ScheduleError(
                message("PipelineRuntime", "schedule", got, "the same order at both ends", "lower() it")
            )
