"""The plan of the encoder's work: every clip once, packs from the data alone, loads near the lower bound."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import ArgumentValueError
from k25sys.parallel.dep.balance import Clip, EncoderCost, Pack, assign, make_packs
from perf.bench_dep import drawn_step

MOONVIT = EncoderCost.from_sizes(dim=1152, mlp_dim=4304, num_layers=27)


@st.composite
def clips(draw: st.DrawFn, most: int = 40) -> list[Clip]:
    side = st.integers(1, 16).map(lambda half: 2 * half)
    places = draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9)), max_size=most, unique=True)
    )
    return [Clip(*place, (draw(st.integers(1, 4)), draw(side), draw(side))) for place in places]


@given(clips(), st.integers(1, 3000))
def test_packs_hold_every_clip_once_and_keep_to_the_cap(made: list[Clip], cap: int) -> None:
    packs = make_packs(made, max_patches=cap)
    assert [clip for pack in packs for clip in pack.clips] == sorted(made)
    assert [pack.number for pack in packs] == list(range(len(packs)))
    assert all(pack.num_patches <= cap or len(pack.clips) == 1 for pack in packs)
    assert all(len({clip.home for clip in pack.clips}) == 1 for pack in packs)
    for first, second in itertools.pairwise(packs):
        fits = first.num_patches + second.clips[0].num_patches <= cap
        assert first.clips[0].home != second.clips[0].home or not fits
    shuffled = random.Random(0).sample(made, len(made))
    assert make_packs(shuffled, max_patches=cap) == packs


@given(clips(), st.integers(1, 9))
def test_plan_adds_up_and_no_assignment_is_below_its_bound(made: list[Clip], num_ranks: int) -> None:
    packs = make_packs(made, max_patches=256)
    plan = assign(packs, MOONVIT, num_ranks)
    assert sorted(pack.number for rank in range(num_ranks) for pack in plan.packs_of(rank)) == list(range(len(packs)))
    for rank in range(num_ranks):
        assert plan.loads_R[rank] == pytest.approx(sum(map(MOONVIT.of, plan.packs_of(rank))), rel=1e-12)
    assert max(plan.loads_R) >= plan.lower_bound * (1 - 1e-12)
    assert plan == assign(packs, MOONVIT, num_ranks)


@given(clips(most=7), st.integers(2, 3))
def test_bound_is_below_the_best_of_all_assignments(made: list[Clip], num_ranks: int) -> None:
    packs = make_packs(made, max_patches=1)
    costs = [MOONVIT.of(pack) for pack in packs]
    best = min(
        max(sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == one) for one in range(num_ranks))
        for ranks in itertools.product(range(num_ranks), repeat=len(costs))
    )
    plan = assign(packs, MOONVIT, num_ranks)
    assert plan.lower_bound <= best * (1 + 1e-12)
    assert max(plan.loads_R) <= best * 4 / 3  # Graham's bound for largest first


def test_loads_of_drawn_batches_are_within_2_percent_of_the_bound() -> None:
    within = 0
    for seed in range(200):
        made, num_ranks = drawn_step(seed)
        within += assign(make_packs(made, max_patches=4096), MOONVIT, num_ranks).over_lower_bound <= 1.02
    assert within >= 190, within


def test_one_giant_image_is_the_bound() -> None:
    made = [Clip(0, 0, 0, (1, 128, 128)), *(Clip(0, 1, i, (1, 4, 4)) for i in range(20))]
    plan = assign(make_packs(made, max_patches=1024), MOONVIT, 8)
    assert plan.over_lower_bound == 1.0
    assert plan.max_over_mean == pytest.approx(8.0, rel=0.05)
    assert "max/mean 7.9" in str(plan)


def test_without_images_there_is_nothing_to_do() -> None:
    plan = assign(make_packs([], max_patches=1024), MOONVIT, 4)
    assert plan.packs_of(3) == ()
    assert (plan.max_over_mean, plan.over_lower_bound) == (1.0, 1.0)


def test_flops_tell_what_patches_and_their_squares_do_not() -> None:
    crossing = MOONVIT.per_patch / MOONVIT.per_pair
    assert crossing == pytest.approx(6608, rel=0.01)


@given(clips(), st.integers(0, 2**32))
def test_packs_stay_on_their_node_while_it_is_not_overloaded(made: list[Clip], seed: int) -> None:
    packs = make_packs(made, max_patches=512)
    homes = [random.Random(seed + number).randrange(3) for number in range(len(packs))]
    plan = assign(packs, MOONVIT, 6, ranks_per_node=2, node_of_pack=homes, imbalance=1e9)
    assert all(owner // 2 == home for (owner,), home in zip(plan.owners, homes, strict=True))
    crowded = assign(packs, MOONVIT, 6, ranks_per_node=2, node_of_pack=[0] * len(packs), imbalance=1.0)
    largest = max(map(MOONVIT.of, packs), default=0.0)
    nodes = [sum(crowded.loads_R[2 * node : 2 * node + 2]) for node in range(3)]
    assert max(nodes) <= sum(nodes) / 3 + largest


def test_measured_times_give_the_cost_back() -> None:
    true = EncoderCost(per_patch=2e-6, per_pair=3e-10, per_pack=1e-4)
    sides = [(4,), (8, 8), (16, 4, 4), (32,), (64, 2), (96,), (10, 12, 14, 16)]
    packs = [
        Pack(number=i, clips=tuple(Clip(0, i, j, (1, side, side)) for j, side in enumerate(each)))
        for i, each in enumerate(sides)
    ]
    fitted = EncoderCost.fit(packs, [true.of(pack) for pack in packs])
    assert fitted.per_patch == pytest.approx(true.per_patch, rel=1e-6)
    assert fitted.per_pair == pytest.approx(true.per_pair, rel=1e-6)
    assert fitted.per_pack == pytest.approx(true.per_pack, rel=1e-6)
    noisy = EncoderCost.fit(packs, [max(true.of(pack) - 2e-4, 1e-5) for pack in packs])
    assert min(noisy.per_patch, noisy.per_pair, noisy.per_pack) >= 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make_packs([], max_patches=0), "make_packs: max_patches: got 0, accepted an int >= 1"),
        (
            lambda: make_packs([Clip(0, 0, 0, (1, 2, 2)), Clip(0, 0, 0, (1, 4, 4))], max_patches=9),
            "one clip in a place",
        ),
        (lambda: assign([], MOONVIT, 0), "assign: num_ranks: got 0"),
        (lambda: assign([], MOONVIT, 4, ranks_per_node=2), "got 2 with node_of_pack not given, accepted both, or"),
        (
            lambda: assign([], MOONVIT, 6, ranks_per_node=4, node_of_pack=[]),
            "ranks_per_node: got 4, accepted a divisor of",
        ),
        (
            lambda: assign([], MOONVIT, 4, ranks_per_node=2, node_of_pack=[0]),
            "node_of_pack: got [0], accepted a node of",
        ),
        (lambda: assign([], MOONVIT, 4, ranks_per_node=2, node_of_pack=[], imbalance=0.5), "imbalance: got 0.5"),
        (lambda: EncoderCost.fit([], []), "EncoderCost.fit: seconds: got 0 packs, 0 times"),
        (
            lambda: EncoderCost.fit(make_packs([Clip(0, 0, i, (1, 2, 2)) for i in range(3)], max_patches=4), [1.0] * 3),
            "packs that are too alike",
        ),
    ],
)
def test_bad_numbers_are_refused(call, text: str) -> None:
    with pytest.raises(ArgumentValueError) as error:
        call()
    assert text in str(error.value)
