"""Schedules: their phases meet, rates move by little from step to step, and K2's numbers are those of its report."""

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import ArgumentTypeError, ArgumentValueError
from k25sys.optim import WSD, Cosine
from k25sys.optim.schedules import DECAYS

RATES = st.floats(0.0, 1.0, allow_subnormal=False)
LENGTHS = st.integers(0, 40)


@st.composite
def wsd(draw: st.DrawFn) -> WSD:
    lowest, final, peak = sorted(draw(st.tuples(RATES, RATES, RATES)))
    anneal = draw(LENGTHS)
    return WSD(
        peak=peak, final=final, warmup_steps=draw(LENGTHS), stable_steps=draw(LENGTHS), decay_steps=draw(LENGTHS),
        decay=draw(st.sampled_from(DECAYS)), anneal_steps=anneal, anneal_final=lowest if anneal else None,
    )  # fmt: skip


def steepest(change: float, steps: int) -> float:
    """The most that a phase moves in a step: a cosine's slope is pi/2 times the mean in the middle; none: at once."""
    return change * min(1.0, pi / 2 / steps) if steps else change


@given(wsd())
def test_wsd_is_continuous_and_keeps_to_its_phases(schedule: WSD) -> None:
    rates = [0.0, *(schedule.learning_rate(step) for step in range(1, schedule.num_steps + 4))]
    ends = [schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps, schedule.anneal_steps]
    starts = [sum(ends[:n]) for n in range(5)]
    last = schedule.final if schedule.anneal_final is None else schedule.anneal_final
    after_phase = [schedule.peak, schedule.peak, schedule.final, last]
    for n, (length, rate) in enumerate(zip(ends, after_phase, strict=True)):
        if length:
            assert rates[starts[n + 1]] == pytest.approx(rate, rel=1e-12, abs=1e-15)
    assert rates[starts[4] + 1 :] == [pytest.approx(last, rel=1e-12, abs=1e-15)] * 3
    moves = [schedule.peak, 0.0, schedule.peak - schedule.final, schedule.final - last]
    for step in range(1, len(rates)):
        # A phase without steps is a jump at its place; both phases that meet at a step may count.
        near = [n for n in range(4) if starts[n] <= step - 1 < starts[n + 1] or (not ends[n] and starts[n] == step - 1)]
        bound = sum(steepest(moves[n], ends[n]) for n in near)
        assert abs(rates[step] - rates[step - 1]) <= bound + 1e-12
        if step > schedule.warmup_steps + 1:
            assert rates[step] <= rates[step - 1] + 1e-15


@given(st.tuples(RATES, RATES).map(sorted), st.integers(0, 50), st.integers(1, 50))
def test_cosine_is_wsd_without_a_stable_phase(rates: list[float], warmup: int, rest: int) -> None:
    schedule = Cosine(peak=rates[1], final=rates[0], warmup_steps=warmup, num_steps=warmup + rest)
    same = WSD(peak=rates[1], final=rates[0], warmup_steps=warmup, stable_steps=0, decay_steps=rest)
    for step in range(1, warmup + rest + 3):
        assert schedule.learning_rate(step) == pytest.approx(same.learning_rate(step), rel=1e-12, abs=1e-15)


def test_k2() -> None:
    schedule = WSD.k2()
    batch = 67e6
    at = {
        tokens: schedule.learning_rate(round(tokens / batch)) for tokens in (1e12, 9.99e12, 12.75e12, 15.5e12, 15.96e12)
    }
    assert schedule.learning_rate(1) == pytest.approx(2e-4 / 500)
    assert schedule.learning_rate(499) < schedule.learning_rate(500) == 2e-4 == at[1e12] == at[9.99e12]
    assert at[12.75e12] == pytest.approx((2e-4 + 2e-5) / 2, rel=1e-4)
    assert at[15.5e12] == pytest.approx(2e-5, rel=1e-4)
    assert at[15.96e12] == pytest.approx(7e-6, rel=1e-4)
    assert schedule.learning_rate(10**9) == 7e-6
    assert schedule.num_steps == round(15.96e12 / batch + 0.5)
    third = schedule.learning_rate(round((10e12 + 5.5e12 / 3) / batch))
    assert third == pytest.approx(2e-5 + 1.8e-4 * (0.5 + 0.5 * cos(pi / 3)), rel=1e-4)


def test_lengths_in_tokens_round_ends_not_lengths() -> None:
    schedule = WSD.from_tokens(
        peak=1.0, final=0.5, warmup_steps=2, stable_tokens=101, decay_tokens=101, tokens_per_step=10,
        anneal_tokens=101, anneal_final=0.1,
    )  # fmt: skip
    assert (schedule.stable_steps, schedule.decay_steps, schedule.anneal_steps) == (9, 10, 10)
    assert Cosine.from_tokens(peak=1.0, final=0.0, warmup_steps=1, num_tokens=95, tokens_per_step=10).num_steps == 10


def make(**changes: object) -> WSD:
    fields = {"peak": 1.0, "final": 0.1, "warmup_steps": 1, "stable_steps": 1, "decay_steps": 1, **changes}
    return WSD(**fields)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peak": float("nan")}, "WSD: peak: got nan"),
        ({"final": 2.0}, "WSD: final: got 2.0, accepted a finite number >= 0, no more than 1"),
        ({"decay": "step"}, "WSD: decay: got 'step', accepted 'cosine' or 'linear'"),
        ({"decay_steps": -1}, "WSD: decay_steps: got -1"),
        ({"anneal_steps": 3}, "WSD: anneal_final: got None with anneal_steps=3"),
        ({"anneal_steps": 3, "anneal_final": 0.2}, "WSD: anneal_final: got 0.2"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ArgumentValueError) as error:
        make(**changes)
    assert text in str(error.value)


def test_wrong_steps_and_lengths_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"stable_steps: got 1000000000000.0.*from_tokens takes tokens"):
        make(stable_steps=1e12)
    with pytest.raises(ArgumentValueError, match="learning_rate: step: got 0, accepted an int >= 1"):
        make().learning_rate(0)
    with pytest.raises(ArgumentTypeError, match="step: got float"):
        make().learning_rate(1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentValueError, match="warmup_steps: got 11, accepted no more than num_steps, 10"):
        Cosine(peak=1.0, final=0.0, warmup_steps=11, num_steps=10)
    with pytest.raises(ArgumentValueError, match=r"warmup_steps: got 500, 3.35e\+10 tokens"):
        WSD.from_tokens(
            peak=1.0, final=0.0, warmup_steps=500, stable_tokens=1e9, decay_tokens=1e9, tokens_per_step=67_000_000
        )
    with pytest.raises(ArgumentValueError, match="tokens_per_step: got 0"):
        WSD.k2(tokens_per_step=0)
