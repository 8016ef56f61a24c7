"""The encoder in a planned step: inside stage 0, or decoupled over all ranks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

from k25sys.models.config import VisionConfig
from k25sys.parallel.dep import Clip, EncoderCost, EncodingPlan, Pack, make_packs
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule
from k25sys.parallel.pipeline.simulator import simulate, simulate_replicas
from k25sys.parallel.pipeline.timeline import Timeline
from k25sys.planner.memory import peak_activations
from k25sys.planner.request import PlanRequest
from k25sys.planner.seconds import message_seconds
from k25sys.planner.vision import media_tokens

RECOMPUTE_AND_BACKWARD = 3.0  # forwards' worth of phase (c)
_MAX_PATCHES = 16384  # in a pack of the decoupled encoder: the largest image fits
_PREFETCH = 1
_STAGE0_FACTORS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}

Cost = Callable[[Action], float]


@dataclass(frozen=True)
class PlannedEncoder:
    """The encoder of a request with vision, and the media of its step."""

    request: PlanRequest
    vision: VisionConfig
    clips: tuple[Clip, ...]
    cost: EncoderCost

    def packs(self) -> tuple[Pack, ...]:
        """The clips of the step, packed."""
        return make_packs(self.clips, max_patches=_MAX_PATCHES)

    def patch_bytes(self) -> float:
        """What the encoder keeps of a patch for its backward, in bf16."""
        vision = self.vision
        return 2.0 * vision.num_hidden_layers * (8 * vision.hidden_size + 2 * vision.intermediate_size)

    # --- inside stage 0 ---------------------------------------------------------------------------------------------

    def expert_peers(self) -> list[range]:
        """Data ranks that wait for each other's tokens: every group of ranks that share out experts within one of them.

        A group may begin within a data rank of several GPUs and then ties it to the next.
        """
        request = self.request
        of_replica = request.tp * request.cp
        step = lcm(request.ep, of_replica) // of_replica
        return [range(first, first + step) for first in range(0, request.data, step)]

    def stage0_timeline(self, schedule: Schedule, text_cost: Cost, with_experts: Sequence[int]) -> Timeline:
        """Of the slowest replica, each beside the expert-parallel peers whose stage 0 it waits for.

        A group is no slower than one replica that encodes, in each micro-batch, as much as the fullest of its peers:
        times only grow with costs. Groups are simulated from the largest such bound on, until none can be slower.
        """
        encode: defaultdict[tuple[int, int], float] = defaultdict(float)
        for pack in self.packs():
            encode[pack.clips[0].home] += self.cost.of(pack)
        link = message_seconds(self.request)

        def cost_of(peers: Sequence[int]) -> Cost:
            def cost(action: Action) -> float:
                if action.stage != 0:
                    return text_cost(action)
                extra = max(encode[data_rank, action.microbatch] for data_rank in peers)
                return text_cost(action) + extra * _STAGE0_FACTORS[action.kind]

            return cost

        bounds = [
            (simulate(schedule, cost_of(peers), link_seconds=link), peers) for peers in self.expert_peers()
        ]  # fmt: skip
        bounds.sort(key=lambda bound: -bound[0].makespan)
        slowest: Timeline | None = None
        for bound, peers in bounds:
            if slowest is not None and bound.makespan <= slowest.makespan:
                break
            timelines = [bound]
            if len(peers) > 1:
                timelines = simulate_replicas(
                    [schedule] * len(peers), [cost_of([each]) for each in peers], link_seconds=link,
                    lockstep=with_experts,
                )  # fmt: skip
            found = max(timelines, key=lambda timeline: timeline.makespan)
            slowest = found if slowest is None else max(slowest, found, key=lambda timeline: timeline.makespan)
        assert slowest is not None  # a request has a data rank
        return slowest

    def stage0_activations(self, schedule: Schedule) -> float:
        """Bytes of micro-batches in flight whose encoder runs in stage 0: as many of the fullest ones of a data rank,
        on the data rank where that is most."""
        patches: defaultdict[int, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for clip in self.clips:
            patches[clip.data_rank][clip.microbatch] += clip.num_patches
        in_flight = round(peak_activations(schedule, 0, lambda stage: float(stage == 0)))
        held = [sum(sorted(of_rank.values(), reverse=True)[:in_flight]) for of_rank in patches.values()]
        return max(held, default=0) * self.patch_bytes()

    # --- decoupled --------------------------------------------------------------------------------------------------

    def _row_bytes(self) -> float:
        return 2.0 * self.request.config.text.hidden_size

    def embedding_bytes(self, rank: int, encoding: EncodingPlan) -> float:
        """Rows of media and their gradients: on the owner with the most, and on stage 0 for the micro-batches that need
        them."""
        request, row = self.request, self._row_bytes()
        owned: defaultdict[int, int] = defaultdict(int)
        for pack, owners in zip(encoding.packs, encoding.owners, strict=True):
            for owner in owners:
                owned[owner] += sum(media_tokens(clip.grid, self.vision) for clip in pack.clips)
        held = max(owned.values(), default=0) * row * 2
        if rank == 0:
            rows: defaultdict[tuple[int, int], int] = defaultdict(int)
            for clip in self.clips:
                rows[clip.home] += media_tokens(clip.grid, self.vision)
            held += max(rows.values(), default=0) * row * (2 + _PREFETCH) / (request.tp * request.cp)
        return held

    def row_seconds(self) -> float:
        """Of the step's rows on their way into the stage-0 rank that gets the most; their gradients leave it at the
        same time, the other way."""
        request, hardware = self.request, self.request.hardware
        rows: defaultdict[int, int] = defaultdict(int)
        for clip in self.clips:
            rows[clip.data_rank] += media_tokens(clip.grid, self.vision)
        remote = (request.gpus - 1) / request.gpus  # of rows, those that another rank encodes
        moved = max(rows.values(), default=0) * self._row_bytes() / (request.tp * request.cp) * remote
        return moved / (hardware.network_bandwidth * hardware.link_efficiency)

    def dep_timeline(self, schedule: Schedule, text_cost: Cost, encoding: EncodingPlan) -> Timeline:
        """For drawings: of `with_vision(schedule)`, each pipeline rank with the packs of its first GPU."""
        per_stage = self.request.sizes.ranks_per_stage

        def cost(action: Action) -> float:
            if action.kind not in (Kind.VISION_FORWARD, Kind.VISION_BACKWARD):
                return text_cost(action)
            load = encoding.loads_R[action.microbatch * per_stage]
            return load if action.kind is Kind.VISION_FORWARD else load * RECOMPUTE_AND_BACKWARD

        return simulate(with_vision(schedule), cost, link_seconds=message_seconds(self.request))


def with_vision(schedule: Schedule) -> Schedule:
    """A VF and a VB around each rank's actions, for drawings: all of its packs as one."""
    actions = {
        rank: (Action(0, Kind.VISION_FORWARD, rank), *own, Action(0, Kind.VISION_BACKWARD, rank))
        for rank, own in schedule.actions.items()
    }
    return replace(schedule, name=f"{schedule.name}+dep", actions=actions)
