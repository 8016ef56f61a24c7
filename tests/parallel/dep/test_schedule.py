"""Vision actions in a pipeline's schedule: no rank waits for them longer than it must."""

import pytest

from k25sys.parallel.dep.balance import Clip, EncoderCost, assign, make_packs
from k25sys.parallel.dep.schedule import add_vision, delivery_points
from k25sys.parallel.pipeline import Kind, Schedule, lower, make_schedule, simulate, validate

COSTS = {
    Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0,
    Kind.VISION_FORWARD: 0.0, Kind.VISION_BACKWARD: 0.0,
}  # fmt: skip
COST = EncoderCost(per_patch=1.0, per_pair=0.0)
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1)]


def with_vision(backbone: Schedule, *, prefetch: int = 1) -> Schedule:
    """A pack a micro-batch, spread over all ranks."""
    clips = [Clip(0, m, 0, (1, 4, 4)) for m in range(backbone.num_microbatches)]
    plan = assign(make_packs(clips, max_patches=16), COST, backbone.num_ranks)
    ranks = list(range(backbone.num_ranks))
    points = delivery_points(backbone, prefetch)
    return add_vision(backbone, plan, points, ranks=ranks, data_rank=0, collects=True, computes_gradients=True)


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
@pytest.mark.parametrize(("name", "virtual_stages"), SCHEDULES)
def test_deliveries_cost_the_backbone_no_time(name: str, virtual_stages: int, num_ranks: int, prefetch: int) -> None:
    for count in (1, num_ranks, 2 * num_ranks + 3):
        backbone = lower(
            make_schedule(name, num_ranks=num_ranks, num_microbatches=count, virtual_stages=virtual_stages)
        )
        schedule = with_vision(backbone, prefetch=prefetch)
        validate(schedule)
        assert simulate(schedule, COSTS).makespan == simulate(backbone, COSTS).makespan


def test_stage_0_is_sent_no_more_than_it_prefetches() -> None:
    backbone = lower(make_schedule("1f1b", num_ranks=4, num_microbatches=12))
    ahead = 0
    for action in with_vision(backbone, prefetch=2).actions[0]:
        ahead += (action.kind is Kind.DELIVER) - (action.kind is Kind.FORWARD)
        assert ahead <= 3


def test_a_forward_of_stage_0_waits_for_the_packs_of_its_micro_batch_wherever_they_are() -> None:
    schedule = with_vision(lower(make_schedule("1f1b", num_ranks=4, num_microbatches=4)))
    slow = {action: 9.0 for action in schedule.actions[3] if action.kind is Kind.VISION_FORWARD}
    starts = {span.action: span.start for span in simulate(schedule, COSTS | slow)}
    assert min(start for action, start in starts.items() if action.kind is Kind.FORWARD) >= 9.0
