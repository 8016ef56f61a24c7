"""A planned run: step time, memory of each stage, what binds, and what decoupling the encoder costs."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from k25sys.parallel.dep import EncodingPlan, assign, make_packs
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule
from k25sys.parallel.pipeline.simulator import simulate, simulate_replicas
from k25sys.parallel.pipeline.timeline import Timeline
from k25sys.planner.costs import edge_parameters, layer_parameters, text_work, vision_parameters, vision_work
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

_MAX_PATCHES = 16384  # in a pack of the decoupled encoder: the largest image fits
_PREFETCH = 1
_RECOMPUTE_AND_BACKWARD = 3.0  # forwards' worth of phase (c)
_LOGITS_ROWS = 1024


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
        return 1.0 / (1.0 + (1.0 + _RECOMPUTE_AND_BACKWARD) * self.vision_forward_share)


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
            found.append(f"bubble {self.bubble:.0%}: more --microbatches, or --schedule interleaved_1f1b with --vpp 2")
        if request.vision == "stage0" and self.efficiency_vs_text < 0.95:
            found.append("stage 0 waits for its encoder: --vision dep")
        if self.dep is not None and self.dep.max_over_mean > 1.1:
            found.append(
                f"one pack is {self.dep.max_over_mean:.2f} times the mean load: more clips a step, or smaller images"
            )
        if request.ep > 1 and request.schedule != "interleaved_1f1b" and not request.uniform:
            found.append("all-to-alls are exposed: interleaved_1f1b runs them behind another micro-batch's compute")
        return found

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
        vision = self.config.vision
        if vision is not None and request.vision != "none":
            self.media = draw_media(
                vision, data_ranks=request.data, microbatches=request.microbatches, sequence=request.sequence,
                vision_share=request.vision_share, video_share=request.video_share, seed=request.seed,
            )  # fmt: skip
            self.encoder = encoder_cost(request, vision)

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

    def _stage0_timeline(self) -> Timeline:
        """With the encoder inside stage 0, beside the expert-parallel peers whose stage 0 it waits for."""
        request = self.request
        per_group = max(1, request.ep // (request.tp * request.cp))
        replicas = min(request.data, per_group)
        encode: defaultdict[tuple[int, int], float] = defaultdict(float)
        for pack in make_packs(self.media.clips, max_patches=_MAX_PATCHES):
            encode[pack.clips[0].home] += self.encoder.of(pack)
        factors = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}

        def cost_of(data_rank: int):
            def cost(action: Action) -> float:
                extra = encode[data_rank, action.microbatch] * factors[action.kind] if action.stage == 0 else 0.0
                return self.cost(action) + extra

            return cost

        first_experts = self.config.text.first_k_dense_replace
        with_experts = [
            stage
            for stage, layers in enumerate(self.layers)
            if request.ep > 1 and any(i >= first_experts for i in layers)
        ]
        timelines = simulate_replicas(
            [self.schedule] * replicas,
            [cost_of(data_rank) for data_rank in range(replicas)],
            link_seconds=message_seconds(request),
            lockstep=with_experts,
        )
        return max(timelines, key=lambda timeline: timeline.makespan)

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
        memory = Memory(
            weights=sum(part.weights for part in parts),
            gradients=sum(part.gradients for part in parts),
            optimizer=sum(part.optimizer for part in parts),
            activations=peak_activations(self.schedule, rank, self._activations) + self._vision_activations(rank),
            embeddings=self._embeddings(rank),
            buffers=self._buffers(rank, encoding),
        )
        return StagePlan(
            dense_parameters=dense, expert_parameters=expert, vision_parameters=vision, memory=memory
        )  # fmt: skip

    def _activations(self, stage: int) -> float:
        text, request = self.config.text, self.request
        per_token = sum(sum(saved_bytes(text, index, request.recompute).values()) for index in self.layers[stage])
        return per_token * request.local_tokens

    def _patch_bytes(self) -> float:
        """What the encoder keeps of a patch for its backward, in bf16."""
        vision = self.config.vision
        assert vision is not None
        return 2.0 * vision.num_hidden_layers * (8 * vision.hidden_size + 2 * vision.intermediate_size)

    def _vision_activations(self, rank: int) -> float:
        """Of micro-batches in flight whose encoder runs in stage 0: as many of the fullest ones."""
        if self.request.vision != "stage0" or rank != 0:
            return 0.0
        patches: defaultdict[int, int] = defaultdict(int)
        for clip in self.media.clips:
            patches[clip.microbatch] += clip.num_patches * (clip.data_rank == 0)
        in_flight = round(peak_activations(self.schedule, 0, lambda stage: float(stage == 0)))
        return sum(sorted(patches.values(), reverse=True)[:in_flight]) * self._patch_bytes()

    def _embeddings(self, rank: int) -> float:
        """Rows of media and their gradients: on their owners, and on stage 0 for the micro-batches that need them."""
        request = self.request
        if request.vision != "dep":
            return 0.0
        row = 2.0 * self.config.text.hidden_size
        rows: defaultdict[tuple[int, int], float] = defaultdict(float)
        for clip in self.media.clips:
            rows[clip.home] += clip.grid[1] * clip.grid[2] / 4
        held = sum(rows.values()) / request.gpus * row * 2
        if rank == 0:
            held += max(rows.values(), default=0.0) * row * (2 + _PREFETCH) / (request.tp * request.cp)
        return held

    def _buffers(self, rank: int, encoding: EncodingPlan | None) -> float:
        text, request = self.config.text, self.request
        exchanged = request.local_tokens * text.num_experts_per_tok * text.hidden_size * 2.0
        total = 4.0 * exchanged if request.ep > 1 else 2.0 * exchanged  # rows out and back, of two micro-batches
        if rank == request.pp - 1:
            total += 2 * _LOGITS_ROWS * text.vocab_size * 4.0 / request.tp
        if encoding is not None:
            largest = max((pack.num_patches for pack in encoding.packs), default=0)
            total += largest * self._patch_bytes()
        return total

    # --- together ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The whole of it."""
        request = self.request
        text = self._text_timeline()
        timeline = self._stage0_timeline() if request.vision == "stage0" else text
        seconds = {"pipeline": timeline.makespan}
        if not request.uniform:
            seconds["data_parallel"] = self._data_parallel_seconds()
            seconds["optimizer"] = max(self._optimizer_seconds(rank) for rank in range(request.pp))
        text_seconds = sum(seconds.values()) - timeline.makespan + text.makespan
        encoding = None
        if request.vision == "dep":
            packs = make_packs(self.media.clips, max_patches=_MAX_PATCHES)
            encoding = assign(packs, self.encoder, request.gpus)
            seconds["vision"] = max(encoding.loads_R) * (1 + _RECOMPUTE_AND_BACKWARD)
            rate = self.hardware.network_bandwidth * self.hardware.link_efficiency
            if encoding.packs:
                seconds["vision_gradients"] = 4.0 * vision_parameters(self.config) / rate
        step = sum(seconds.values())
        return Plan(
            request=request,
            seconds=seconds,
            bubble=timeline.bubble * timeline.makespan / step,
            flops_per_token=self._flops_per_token(),
            efficiency_vs_text=text_seconds / step,
            token_share=self.media.token_share,
            dep=None if encoding is None else _dep_plan(encoding, text_seconds),
            stages=tuple(self._stage_plan(rank, encoding) for rank in range(request.pp)),
            assumptions=tuple(self._assumptions()),
            schedule=self.schedule if encoding is None else self._with_vision(),
            timeline=timeline if encoding is None else self._dep_timeline(encoding),
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

    def _with_vision(self) -> Schedule:
        """A VF and a VB around each rank's actions, for drawings: all of its packs as one."""
        actions = {
            rank: (Action(0, Kind.VISION_FORWARD, rank), *own, Action(0, Kind.VISION_BACKWARD, rank))
            for rank, own in self.schedule.actions.items()
        }
        return replace(self.schedule, name=f"{self.schedule.name}+dep", actions=actions)

    def _dep_timeline(self, encoding: EncodingPlan) -> Timeline:
        per_stage = self.request.sizes.ranks_per_stage

        def cost(action: Action) -> float:
            load = encoding.loads_R[action.microbatch * per_stage] if action.kind.value in ("VF", "VB") else 0.0
            if action.kind is Kind.VISION_FORWARD:
                return load
            return load * _RECOMPUTE_AND_BACKWARD if action.kind is Kind.VISION_BACKWARD else self.cost(action)

        return simulate(self._with_vision(), cost, link_seconds=message_seconds(self.request))

    def _assumptions(self) -> list[str]:
        request = self.request
        if request.uniform:
            return ["equal stages, B = I + W = 2 F, free links: no model's costs"]
        found = [*self.hardware.assumptions(), "tokens spread evenly over experts; sequences fill their length"]
        overlap = "behind another micro-batch's compute" if request.schedule == "interleaved_1f1b" else "exposed"
        found.append(f"all-to-alls in bf16, {overlap}; stage-to-stage messages travel while both ranks compute")
        found.append("gradients are reduced behind the last backward, parameters gathered behind the first forward")
        found.append("optimiser: Muon with balanced owners; activations are kept in bf16 and nothing is offloaded")
        if request.vision != "none":
            found += assumptions()
        if request.vision == "stage0":
            found.append(
                "expert-parallel peers wait for the slowest stage 0 in every micro-batch; no recomputation of vision"
            )
        return found


def _dep_plan(encoding: EncodingPlan, text_seconds: float) -> DepPlan:
    mean = sum(encoding.loads_R) / len(encoding.loads_R)
    bound = encoding.lower_bound / mean if mean else 1.0
    return DepPlan(
        vision_forward_share=mean / text_seconds, max_over_mean=encoding.max_over_mean, lower_bound=bound
    )  # fmt: skip
