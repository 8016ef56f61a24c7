"""A planned run: step time, memory of each stage, what binds, and what decoupling the encoder costs."""

from dataclasses import dataclass, field
from typing import Any

from k25sys.parallel.dep import EncodingPlan, assign
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule
from k25sys.parallel.pipeline.simulator import simulate
from k25sys.parallel.pipeline.timeline import Timeline
from k25sys.planner.costs import edge_parameters, layer_parameters, text_work, vision_parameters, vision_work
from k25sys.planner.encoder import RECOMPUTE_AND_BACKWARD, PlannedEncoder, with_vision
from k25sys.planner.memory import Memory, parameter_memory, peak_activations, saved_bytes
from k25sys.planner.request import PlanRequest
from k25sys.planner.seconds import (
    StageSeconds,
    encoder_cost,
    head_seconds,
    layer_seconds,
    message_seconds,
    optimizer_seconds,
    stage_layers,
)
from k25sys.planner.vision import DrawnMedia, assumptions, draw_media

_LOGITS_ROWS = 1024
_SHARE_OFF = 0.02  # of all tokens: what the drawn media may differ by without a word


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline rank, for one of its GPUs."""

    dense_parameters: float
    expert_parameters: float
    vision_parameters: float
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class DepPlan:
    """What the decoupled encoder's balance gives."""

    vision_forward_share: float
    """Mean seconds of one encoding of the step's media, over the step of text alone."""
    max_over_mean: float
    lower_bound: float
    """Of max_over_mean."""

    @property
    def ceiling(self) -> float:
        """Efficiency with perfect balance: an encoding, another one, and a backward of two."""
        return 1.0 / (1.0 + (1.0 + RECOMPUTE_AND_BACKWARD) * self.vision_forward_share)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result. Every number is calculated, none measured."""

    request: PlanRequest
    seconds: dict[str, float]
    """The step by parts; they add up to it."""
    bubble: float
    flops_per_token: float
    efficiency_vs_text: float
    token_share: float
    """Of media, as drawn."""
    dep: DepPlan | None
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]
    schedule: Schedule = field(repr=False)
    timeline: Timeline = field(repr=False)

    @property
    def step_seconds(self) -> float:
        """One step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Of text and media."""
        request = self.request
        return request.data * request.microbatches * request.sequence / self.step_seconds / request.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs, recomputation not counted, over the peak."""
        return self.flops_per_token * self.tokens_per_second_per_gpu / self.request.hardware.peak_flops

    @property
    def largest_memory(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def binds(self) -> str:
        """What limits the run: memory where it does not fit, else the largest part of the step."""
        if self.largest_memory > self.request.hardware.memory_bytes:
            return "memory"
        parts = {**self.seconds}
        pipeline = parts.pop("pipeline")
        parts["bubble"] = self.bubble * self.step_seconds
        parts["compute"] = pipeline - parts["bubble"]
        return max(parts, key=lambda name: parts[name])

    @property
    def advice(self) -> list[str]:
        """What to change, most urgent first."""
        request, found = self.request, []
        capacity = request.hardware.memory_bytes
        if self.largest_memory > capacity:
            over = (self.largest_memory - capacity) / 1e9
            ways = ["--recompute selective"] if request.recompute == "none" else []
            ways += ["more pipeline or expert ranks", "more GPUs to shard the optimiser over"]
            found.append(f"{over:.1f} GB too much on the fullest stage: {', or '.join(ways)}")
        if self.bubble > 0.1:
            found.append(f"bubble {self.bubble:.0%}: {', or '.join(self._less_bubble())}")
        if request.vision == "stage0" and self.efficiency_vs_text < 0.95:
            found.append("stage 0 waits for its encoder: --vision dep")
        if self.dep is not None and self.dep.max_over_mean > 1.1:
            found.append(
                f"one pack is {self.dep.max_over_mean:.2f} times the mean load: more clips a step, or smaller images"
            )
        if request.ep > 1 and request.schedule != "interleaved_1f1b" and not request.uniform:
            found.append("all-to-alls are exposed: Kimi K2's interleaved_1f1b runs them behind another micro-batch")
        if request.vision != "none" and abs(self.token_share - request.vision_share) > _SHARE_OFF:
            found.append(
                f"drawn media are {self.token_share:.0%} of the tokens, {request.vision_share:.0%} were asked for: "
                "longer sequences or more micro-batches"
            )
        return found

    def _less_bubble(self) -> list[str]:
        """Flags that shrink the bubble, none of them as it is."""
        request, ways = self.request, ["more --microbatches"]
        interleaved = request.schedule == "interleaved_1f1b"
        vpp = request.vpp + 1 if interleaved else 2
        # zb_h1 has its bubble over three parts of a micro-batch's work: two chunks of a rank are no better.
        if request.schedule != "zb_h1" and request.pp * vpp <= request.config.text.num_hidden_layers:
            ways.append(f"--vpp {vpp}" if interleaved else f"--schedule interleaved_1f1b with --vpp {vpp}")
        elif request.schedule == "gpipe":
            ways.append("--schedule zb_h1")
        return ways

    def to_json(self) -> dict[str, Any]:
        """As INTERFACES has it."""
        return {
            "label": "simulated",
            "assumptions": list(self.assumptions),
            "bubble": self.bubble,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": self.mfu,
            "flops_per_token": self.flops_per_token,
            "peak_flops": self.request.hardware.peak_flops,
            "efficiency_vs_text": self.efficiency_vs_text,
            "vision_token_share": self.token_share,
            "binds": self.binds,
            "advice": self.advice,
            "dep": None
            if self.dep is None
            else {
                "vision_forward_share": self.dep.vision_forward_share,
                "ceiling": self.dep.ceiling,
                "max_over_mean": self.dep.max_over_mean,
                "lower_bound": self.dep.lower_bound,
            },
            "stages": [_stage_json(stage) for stage in self.stages],
        }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    memory = {
        name: getattr(stage.memory, name)
        for name in ("weights", "gradients", "optimizer", "activations", "embeddings", "buffers", "total")
    }
    return {
        "dense_parameters": stage.dense_parameters,
        "expert_parameters": stage.expert_parameters,
        "vision_parameters": stage.vision_parameters,
        "memory": memory,
    }


def make_plan(request: PlanRequest) -> Plan:
    """Simulates a step of `request`.

    Raises:
        ScheduleError: an unknown schedule, or one that these sizes do not allow.
    """
    return _Planner(request).plan()


class _Planner:
    """The parts that a plan is put together from."""

    def __init__(self, request: PlanRequest) -> None:
        self.request, self.config, self.hardware = request, request.config, request.hardware
        # K2.5's warm-up lets all-to-alls run behind another micro-batch's compute; closed forms have none.
        extra = request.schedule == "interleaved_1f1b" and not request.uniform
        options: dict[str, Any] = {"extra_warmup": 1} if extra else {}
        self.schedule = make_schedule(
            request.schedule, num_ranks=request.pp, num_microbatches=request.microbatches, virtual_stages=request.vpp,
            **options,
        )  # fmt: skip
        self.layers = stage_layers(request)
        self.stages = [self._stage_seconds(stage) for stage in range(len(self.layers))]
        self.media = DrawnMedia((), 0.0)
        self.encoder: PlannedEncoder | None = None
        vision = self.config.vision
        if vision is not None and request.vision != "none":
            self.media = draw_media(
                vision, data_ranks=request.data, microbatches=request.microbatches, sequence=request.sequence,
                vision_share=request.vision_share, video_share=request.video_share, seed=request.seed,
            )  # fmt: skip
            self.encoder = PlannedEncoder(request, vision, self.media.clips, encoder_cost(request, vision))

    # --- time -------------------------------------------------------------------------------------------------------

    def _stage_seconds(self, stage: int) -> StageSeconds:
        total = head_seconds(self.request) if stage == len(self.layers) - 1 else StageSeconds()
        for index in self.layers[stage]:
            total = total + layer_seconds(self.request, index)
        return total

    def cost(self, action: Action) -> float:
        """Seconds of an action of text alone."""
        if self.request.uniform:
            unit = sum(stage.forward for stage in self.stages) / len(self.stages)
            return unit * (2.0 if action.kind is Kind.BACKWARD else 1.0)
        stage, overlapped = self.stages[action.stage], self.request.schedule == "interleaved_1f1b"
        inputs = stage.backward_input + stage.exposed(stage.backward_input, overlapped=overlapped)
        if action.kind is Kind.FORWARD:
            return stage.forward + stage.exposed(stage.forward, overlapped=overlapped)
        if action.kind is Kind.BACKWARD_INPUT:
            return inputs
        return stage.backward_weight + (inputs if action.kind is Kind.BACKWARD else 0.0)

    def _text_timeline(self) -> Timeline:
        link = 0.0 if self.request.uniform else message_seconds(self.request)
        return simulate(self.schedule, self.cost, link_seconds=link)

    def _stages_with_experts(self) -> list[int]:
        """Those whose all-to-alls tie data ranks together."""
        first = self.config.text.first_k_dense_replace
        if self.request.ep == 1:
            return []
        return [stage for stage, layers in enumerate(self.layers) if any(index >= first for index in layers)]

    def _data_parallel_seconds(self) -> float:
        """What of the gradients' reduce-scatter and the parameters' all-gather no backward or forward hides."""
        request, hardware = self.request, self.hardware
        exposed = 0.0
        for rank in range(request.pp):
            dense, expert = self._parameters(rank)
            copies, expert_copies = request.data * request.cp, request.sizes.expert_data
            moved = dense * (copies - 1) / copies + expert * (expert_copies - 1) / expert_copies
            stages = self.schedule.stages_of(rank)
            rate = hardware.network_bandwidth * hardware.link_efficiency
            backward = sum(self.stages[s].backward_input + self.stages[s].backward_weight for s in stages)
            forward = sum(self.stages[s].forward for s in stages)
            exposed = max(exposed, max(0.0, 4 * moved / rate - backward) + max(0.0, 2 * moved / rate - forward))
        return exposed

    # --- memory -----------------------------------------------------------------------------------------------------

    def _parameters(self, rank: int) -> tuple[float, float]:
        """Dense and expert parameters of one GPU of a pipeline rank, without vision."""
        text, request = self.config.text, self.request
        dense = expert = 0.0
        for stage in self.schedule.stages_of(rank):
            for index in self.layers[stage]:
                layer = layer_parameters(text, index)
                dense += layer.dense
                expert += layer.expert
        first, last = edge_parameters(text)
        dense += first * (0 in self.schedule.stages_of(rank))
        dense += last * (len(self.layers) - 1 in self.schedule.stages_of(rank))
        return dense / request.tp, expert / request.ep

    def _stage_plan(self, rank: int, encoding: EncodingPlan | None) -> StagePlan:
        request, text = self.request, self.config.text
        dense, expert = self._parameters(rank)
        with_vision = request.vision == "dep" or (request.vision == "stage0" and rank == 0)
        vision = float(vision_parameters(self.config)) if with_vision else 0.0
        edges = edge_parameters(text)
        adam = (edges[0] if rank == 0 else 0) + (edges[1] if rank == request.pp - 1 else 0)
        copies = request.data * request.cp
        parts = [
            parameter_memory(dense - adam / request.tp, copies, adam=False),
            parameter_memory(adam / request.tp, copies, adam=True),
            parameter_memory(expert, request.sizes.expert_data, adam=False),
            parameter_memory(vision, request.gpus if request.vision == "dep" else copies, adam=False),
        ]
        encoder, encoder_activations, embeddings = self.encoder, 0.0, 0.0
        if encoder is not None and request.vision == "stage0" and rank == 0:
            encoder_activations = encoder.stage0_activations(self.schedule)
        if encoder is not None and encoding is not None:
            embeddings = encoder.embedding_bytes(rank, encoding)
        memory = Memory(
            weights=sum(part.weights for part in parts),
            gradients=sum(part.gradients for part in parts),
            optimizer=sum(part.optimizer for part in parts),
            activations=peak_activations(self.schedule, rank, self._activations) + encoder_activations,
            embeddings=embeddings,
            buffers=self._buffers(rank, encoding),
        )
        return StagePlan(
            dense_parameters=dense, expert_parameters=expert, vision_parameters=vision, memory=memory
        )  # fmt: skip

    def _activations(self, stage: int) -> float:
        text, request = self.config.text, self.request
        per_token = sum(
            sum(saved_bytes(text, index, request.recompute, ep=request.ep).values()) for index in self.layers[stage]
        )
        return per_token * request.local_tokens

    def _buffers(self, rank: int, encoding: EncodingPlan | None) -> float:
        text, request = self.config.text, self.request
        exchanged = request.local_tokens * text.num_experts_per_tok * text.hidden_size * 2.0
        total = 4.0 * exchanged if request.ep > 1 else 2.0 * exchanged  # rows out and back, of two micro-batches
        if rank == request.pp - 1:
            total += 2 * _LOGITS_ROWS * text.vocab_size * 4.0 / request.tp
        if self.encoder is not None and encoding is not None:
            largest = max((pack.num_patches for pack in encoding.packs), default=0)
            total += largest * self.encoder.patch_bytes()
        return total

    # --- together ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The whole of it."""
        request, encoder = self.request, self.encoder
        text = timeline = self._text_timeline()
        if encoder is not None and request.vision == "stage0":
            timeline = encoder.stage0_timeline(self.schedule, self.cost, self._stages_with_experts())
        seconds = {"pipeline": timeline.makespan}
        if not request.uniform:
            seconds["data_parallel"] = self._data_parallel_seconds()
            seconds["optimizer"] = max(self._optimizer_seconds(rank) for rank in range(request.pp))
        text_seconds = sum(seconds.values()) - timeline.makespan + text.makespan
        schedule, bubble, encoding = self.schedule, timeline.bubble * timeline.makespan, None
        if encoder is not None and request.vision == "dep":
            encoding = assign(encoder.packs(), encoder.cost, request.gpus)
            seconds["vision"] = max(encoding.loads_R) * (1 + RECOMPUTE_AND_BACKWARD)
            rate = self.hardware.network_bandwidth * self.hardware.link_efficiency
            if encoding.packs:
                seconds["vision_gradients"] = 4.0 * vision_parameters(self.config) / rate
            if (late := encoder.row_seconds() - timeline.makespan) > 0:
                seconds["vision_rows"] = late
            schedule, timeline = with_vision(schedule), encoder.dep_timeline(schedule, self.cost, encoding)
        step = sum(seconds.values())
        return Plan(
            request=request,
            seconds=seconds,
            bubble=bubble / step,
            flops_per_token=self._flops_per_token(),
            efficiency_vs_text=text_seconds / step,
            token_share=self.media.token_share,
            dep=None if encoding is None else _dep_plan(encoding, text_seconds),
            stages=tuple(self._stage_plan(rank, encoding) for rank in range(request.pp)),
            assumptions=tuple(self._assumptions()),
            schedule=schedule,
            timeline=timeline,
        )

    def _optimizer_seconds(self, rank: int) -> float:
        request = self.request
        dense, expert = self._parameters(rank)
        shards = dense / (request.data * request.cp) + expert / request.sizes.expert_data
        layers = [index for stage in self.schedule.stages_of(rank) for index in self.layers[stage]]
        return optimizer_seconds(request, layers, dense + expert, shards)

    def _flops_per_token(self) -> float:
        request, vision = self.request, self.config.vision
        flops = 3.0 * text_work(self.config.text, request.sequence).flops
        if vision is not None and self.media.clips:
            dim, tokens = self.config.text.hidden_size, request.data * request.microbatches * request.sequence
            flops += 3.0 * sum(vision_work(vision, dim, clip.grid).flops for clip in self.media.clips) / tokens
        return flops

    def _assumptions(self) -> list[str]:
        request = self.request
        no_media = request.vision == "none" and request.vision_share > 0
        unused = ["--vision none: --vision-share has no effect"] if no_media else []
        if request.uniform:
            return ["equal stages, B = I + W = 2 F, free links: no model's costs", *unused]
        found = [
            *self.hardware.assumptions(),
            "tokens spread evenly over experts; sequences fill their length",
            *unused,
        ]
        overlap = "exposed"
        if request.schedule == "interleaved_1f1b":
            overlap = (
                "behind another micro-batch's compute, as Kimi K2's schedule does; k25sys's own runtime hides them "
                "behind shared experts and weight gradients alone"
            )
        found.append(f"all-to-alls in bf16, {overlap}")
        found.append("stage-to-stage messages travel while both ranks compute")
        found.append("gradients are reduced behind the last backward, parameters gathered behind the first forward")
        found.append("optimiser: Muon with balanced owners; activations are kept in bf16 and nothing is offloaded")
        if request.ep > 1:
            found.append("rows that come home from experts on other ranks are kept in bf16, whatever --recompute says")
        if request.vision != "none":
            found += assumptions()
        if request.vision == "stage0":
            found.append(
                "expert-parallel peers wait for the slowest stage 0 in every micro-batch; no recomputation of vision"
            )
        if request.vision == "dep":
            found.append(
                "rows of media travel to stage 0, and their gradients back, behind the pipeline's compute: what takes "
                "longer is added; pixels are loaded and decoded twice, which is not charged"
            )
        return found


def _dep_plan(encoding: EncodingPlan, text_seconds: float) -> DepPlan:
    mean = sum(encoding.loads_R) / len(encoding.loads_R)
    bound = encoding.lower_bound / mean if mean else 1.0
    return DepPlan(
        vision_forward_share=mean / text_seconds, max_over_mean=encoding.max_over_mean, lower_bound=bound
    )  # fmt: skip
