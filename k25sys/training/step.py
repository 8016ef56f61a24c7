"""One training step: the pipeline's pass over the micro-batches, MuonClip with QK-Clip, and the balance of experts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.models.config import TextConfig
from k25sys.optim.qk_clip import clip_factors, key_value_row_factors, query_row_factors
from k25sys.optim.zero import ZeroOptimizer
from k25sys.parallel.balance import ExpertBalancer
from k25sys.parallel.dep import Clip, DecoupledEncoder, EncodingPlan
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.training.microbatch import MicroBatch
from k25sys.training.parallelize import ParallelModel


@dataclass(frozen=True, kw_only=True)
class StepMedia:
    """The media of a whole step as metadata, for a decoupled encoder: the same on every rank, but for the pixels."""

    plan: EncodingPlan
    """See DecoupledEncoder.plan."""
    consumers: Callable[[int, int], Tensor]
    """See DecoupledEncoder.begin, and stage.media_consumers."""
    load_pixels: Callable[[Clip], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step did; the same on every rank where nothing else is said."""

    loss: float
    """The mean over all loss tokens of the step."""
    gradient_norm: float
    finite: bool
    """False: nothing was updated."""
    heads_clipped: int
    """By QK-Clip, of this rank's layers and heads."""
    expert_load: Mapping[str, float]
    """Of this rank's routers: see parallel.balance.load_statistics; empty without a balancer, or after no update."""
    patches_encoded: int
    """By this rank, in the first forward."""
    encoding: EncodingPlan | None
    """Of a decoupled encoder: how its work was divided."""


class TrainStep:
    """Steps of one model.

    Args:
        model, runtime: of this rank.
        optimizer: over `model.parameters`.
        grid: of all ranks.
        balancer: of the routers' biases, if they are balanced.
        decoupled: the encoder, if it is (vision "dep").
    """

    def __init__(
        self,
        model: ParallelModel,
        runtime: PipelineRuntime[MicroBatch],
        optimizer: ZeroOptimizer,
        grid: RankGrid,
        *,
        balancer: ExpertBalancer | None = None,
        decoupled: DecoupledEncoder | None = None,
    ) -> None:
        self.model, self.runtime, self.optimizer, self.grid = model, runtime, optimizer, grid
        self.balancer, self.decoupled = balancer, decoupled

    def run(
        self, microbatches: Sequence[MicroBatch], *, learning_rate: float, media: StepMedia | None = None
    ) -> StepOutcome:
        """Trains on this data rank's micro-batches. Collective over the grid.

        An error leaves parameters and optimiser as they were, and nothing of the step behind: with one process the next
        step may follow. With more the others may still wait for this rank.

        Args:
            media: with a decoupled encoder, the step's.
        """
        try:
            self.optimizer.expect_gradients(len(microbatches))
            losses, patches, encoding = self._pass(microbatches, media, train=True)
        except BaseException:
            self._abandon()
            raise
        factors, clipped = self._clip_factors()
        report = self.optimizer.step(learning_rate, factors)
        load: dict[str, float] = {}
        if self.balancer is not None and report.finite:
            load = self.balancer.update()
        elif self.balancer is not None:
            self.balancer.forget()
        return StepOutcome(
            loss=self._loss(losses), gradient_norm=report.gradient_norm, finite=report.finite,
            heads_clipped=clipped, expert_load=load, patches_encoded=patches, encoding=encoding,
        )  # fmt: skip

    def _abandon(self) -> None:
        """Drops what a step that failed has gathered."""
        self.optimizer.gradients.clear()
        for stage in self.model.stages.values():
            stage.max_logits_LH.fill_(float("-inf"))
        if self.balancer is not None:
            self.balancer.forget()
        if self.decoupled is not None:
            self.decoupled.abort()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicroBatch], *, media: StepMedia | None = None) -> float:
        """The loss of this data rank's micro-batches and the others'. Changes nothing. Collective over the grid.

        Args:
            microbatches, media: as in `run`.
        """
        stages = self.model.stages.values()
        logits = [stage.max_logits_LH.clone() for stage in stages]
        modules = [*stages, *([] if self.model.encoder is None else [self.model.encoder])]
        for module in modules:
            module.eval()
        try:
            losses, _, _ = self._pass(microbatches, media, train=False)
        finally:
            for module in modules:
                module.train()
            for stage, before_LH in zip(stages, logits, strict=True):
                stage.max_logits_LH.copy_(before_LH)
        return self._loss(losses)

    def _pass(
        self, microbatches: Sequence[MicroBatch], media: StepMedia | None, *, train: bool
    ) -> tuple[list[Tensor], int, EncodingPlan | None]:
        """The pipeline's pass: losses of the last stage, patches that this rank encoded at first, and their plan."""
        if self.decoupled is None:
            result = self.runtime.step(microbatches, forward_only=not train)
            return result.losses, self._patches_of_stage0(microbatches), None
        assert media is not None, "a decoupled encoder needs the step's media"
        self.decoupled.begin(media.plan, media.consumers, media.load_pixels, train=train)
        fed = [
            replace(batch, pixel_values=None, media=self.decoupled.media(number))
            for number, batch in enumerate(microbatches)
        ]
        schedule = self.decoupled.schedule(self.runtime.schedule)
        result = self.runtime.step(fed, forward_only=not train, schedule=schedule, hooks=self.decoupled.hooks())
        self.decoupled.finish()
        return result.losses, sum(pack.num_patches for pack in media.plan.packs_of(self.grid.rank)), media.plan

    def _patches_of_stage0(self, microbatches: Sequence[MicroBatch]) -> int:
        if 0 not in self.model.stages:
            return 0
        return sum(int(batch.grid_thw.prod(1).sum()) for batch in microbatches if batch.grid_thw is not None)

    def _loss(self, losses: Iterable[Tensor]) -> float:
        """The sum over micro-batches, context and data ranks, told to all stages."""
        total = torch.tensor(sum(float(loss) for loss in losses), dtype=torch.float64, device=self.grid.device_type)
        for axis in ("data_context", "pipeline"):
            group = self.grid.group(axis)
            if group is not None:
                dist.all_reduce(total, group=group)
        return float(total)

    def _clip_factors(self) -> tuple[dict[str, Tensor], int]:
        """QK-Clip's row factors of this rank's heads; the largest logits start anew."""
        most, factors, clipped = self.optimizer.config.max_logit, {}, 0
        for stage in self.model.stages.values():
            largest_LH = stage.max_logits_LH.clone()
            stage.max_logits_LH.fill_(float("-inf"))
            if most is None:
                continue
            group = self.grid.group("data_context")
            if group is not None:
                dist.all_reduce(largest_LH, dist.ReduceOp.MAX, group=group)
            gamma_LH = clip_factors(largest_LH, most)
            clipped += int((gamma_LH < 1).sum())
            for number, gamma_H in zip(stage.layer_numbers, gamma_LH, strict=True):
                factors |= attention_row_factors(number, gamma_H, stage.config.text)
        return factors, clipped


def attention_row_factors(layer: int, gamma_H: Tensor, text: TextConfig) -> Mapping[str, Tensor]:
    """QK-Clip's factors of the rows of a layer's query and key projections, by parameter."""
    prefix = f"language_model.model.layers.{layer}.self_attn"
    nope, rope, value = text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim
    queries = "q_proj" if text.q_lora_rank is None else "q_b_proj"
    return {
        f"{prefix}.{queries}.weight": query_row_factors(gamma_H, nope=nope, rope=rope),
        f"{prefix}.kv_b_proj.weight": key_value_row_factors(gamma_H, nope=nope, value=value),
    }
