"""The encoder of a plan: what the slowest and the fullest rank have, wherever the draw puts them."""

from dataclasses import replace

import pytest

from k25sys.models.presets import preset
from k25sys.parallel.dep import Clip, EncoderCost, EncodingPlan, Pack, assign
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.ir import Action, Kind
from k25sys.parallel.pipeline.simulator import simulate_replicas
from k25sys.planner.encoder import PlannedEncoder
from k25sys.planner.hardware import hardware
from k25sys.planner.plan import make_plan
from k25sys.planner.request import PlanRequest
from k25sys.planner.seconds import message_seconds

GRID = (1, 32, 32)
TINY = PlanRequest(preset="tiny", gpus=8, pp=2, ep=2, microbatches=8, schedule="1f1b", sequence=512, vision="stage0")
VISION = preset("tiny").vision
assert VISION is not None


def encoder(*clips: Clip, request: PlanRequest = TINY) -> PlannedEncoder:
    assert VISION is not None
    return PlannedEncoder(request, VISION, clips, EncoderCost(per_patch=1e-3, per_pair=0.0, per_pack=0.0))


def text_cost(action: Action) -> float:
    return 2.0 if action.kind is Kind.BACKWARD else 1.0


def schedule():
    return make_schedule("1f1b", num_ranks=2, num_microbatches=8)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("data_rank", range(4))
def test_the_slowest_group_ends_the_step(data_rank: int, ep: int) -> None:
    request = replace(TINY, ep=ep)
    timelines = []
    for home in (0, data_rank):
        clips = [Clip(home, microbatch, 0, GRID) for microbatch in (1, 4)]
        found = encoder(*clips, request=request).stage0_timeline(schedule(), text_cost, [0, 1] if ep > 1 else [])
        timelines.append(found.makespan)
    assert timelines[0] == timelines[1] > 27 + 3  # of text alone, and some of the encoder


def test_pruned_groups_are_no_slower() -> None:
    clips = [Clip(rank, m, 0, (1, 2 + 4 * ((7 * m + 5 * rank) % 11), 16)) for m in range(8) for rank in range(4)]
    # With stage 0 free of experts its bound is above what a group needs.
    found = encoder(*clips).stage0_timeline(schedule(), text_cost, [1])

    def cost_of(data_rank: int):
        patches = {clip.microbatch: clip.num_patches for clip in clips if clip.data_rank == data_rank}
        factor = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0}
        return lambda a: text_cost(a) + (patches[a.microbatch] * 1e-3 * factor[a.kind] if a.stage == 0 else 0.0)

    groups = [
        simulate_replicas(
            [schedule()] * 2, [cost_of(first), cost_of(first + 1)], link_seconds=message_seconds(TINY), lockstep=[1]
        )
        for first in (0, 2)
    ]  # fmt: skip
    assert found.makespan == pytest.approx(max(each.makespan for group in groups for each in group))


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"ep": 1}, [[0], [1], [2], [3]]),
        ({"ep": 2}, [[0, 1], [2, 3]]),
        ({"ep": 2, "tp": 2}, [[0], [1]]),
        ({"ep": 4, "tp": 2}, [[0, 1]]),
        ({"gpus": 24, "ep": 4, "cp": 3, "sequence": 768}, [[0, 1, 2, 3]]),  # four GPUs across three
    ],
)  # fmt: skip
def test_peers_share_a_group_of_experts(sizes: dict[str, int], groups: list[list[int]]) -> None:
    request = replace(TINY, **sizes)
    assert [list(group) for group in encoder(request=request).expert_peers()] == groups


def test_the_fullest_data_rank_sets_the_memory() -> None:
    light, heavy = Clip(0, 0, 0, (1, 16, 16)), Clip(3, 2, 0, GRID)
    found = encoder(light, heavy)
    assert found.stage0_activations(schedule()) == 32 * 32 * found.patch_bytes()


def packs_of(*clips: Clip) -> tuple[Pack, ...]:
    return tuple(Pack(number=number, clips=(clip,)) for number, clip in enumerate(clips))


def test_embeddings_are_those_of_the_owner_with_the_most_rows() -> None:
    clips = [Clip(0, 0, 0, GRID), Clip(1, 0, 0, GRID), Clip(2, 0, 0, (1, 16, 16))]
    plan = EncodingPlan(
        packs=packs_of(*clips), owners=((5,), (5,), (1,)), loads_R=(0.0,) * 8, lower_bound=0.0
    )  # fmt: skip
    found = encoder(*clips)
    row = 2 * preset("tiny").text.hidden_size
    assert found.embedding_bytes(1, plan) == 2 * 256 * row * 2
    assert found.embedding_bytes(0, plan) == 2 * 256 * row * 2 + 256 * row * 3


def test_rows_follow_the_encoders_merging() -> None:
    clips = [Clip(0, 0, 0, GRID)]
    two = encoder(*clips)
    four = replace(two, vision=replace(two.vision, merge_kernel_size=(4, 4)))
    plan = assign(two.packs(), two.cost, 8)
    assert two.embedding_bytes(0, plan) == 4 * four.embedding_bytes(0, plan)
    assert two.row_seconds() == 4 * four.row_seconds()


def test_late_rows_are_charged() -> None:
    slow = hardware("h800", network_bandwidth=1e5)
    request = PlanRequest(
        preset="tiny", gpus=4, microbatches=16, sequence=512, vision="dep", vision_share=0.3, hardware=slow
    )  # fmt: skip
    plan = make_plan(request)
    assert "vision_rows" not in make_plan(replace(request, hardware=hardware("h800"))).seconds
    tokens = plan.token_share * 16 * 512  # of one data rank in the mean
    mean = tokens * 2 * preset("tiny").text.hidden_size * 0.75 / (1e5 * slow.link_efficiency)
    assert plan.seconds["vision_rows"] >= mean - plan.seconds["pipeline"] > 0
    assert plan.seconds["vision_rows"] < 2 * mean
