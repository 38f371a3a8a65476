"""A schedule is a plain function of the step: within its bounds, monotone, flat outside, and right at its ends."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockprune import schedule

RAMPS = {"linear": schedule.linear, "cubic": schedule.cubic, "exponential": schedule.exponential, "cosine": schedule.cosine}
ramps = pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
shares = st.floats(0, 0.999)
STEPS = st.integers(-10, 10_000)
spans = st.tuples(st.integers(0, 3000), st.integers(0, 3000)).map(sorted)


@ramps
@given(initial=shares, final=shares, span=spans, step=STEPS)
def test_a_ramp_stays_between_its_ends_and_is_flat_outside(
    ramp: Callable[..., float], initial: float, final: float, span: list[int], step: int
) -> None:
    at = partial(ramp, initial=initial, final=final, begin=span[0], end=span[1])
    low, high = sorted((initial, final))
    assert 0 <= at(step) <= 1
    assert low - 1e-9 <= at(step) <= high + 1e-9
    assert at(span[1] + abs(step)) == at(span[1]) == pytest.approx(final, abs=1e-12)
    if span[0] < span[1]:
        assert at(span[0] - abs(step)) == at(span[0]) == pytest.approx(initial, abs=1e-12)


@ramps
@given(final=shares, span=spans, one=STEPS, two=STEPS)
def test_a_ramp_never_turns_back(ramp: Callable[..., float], final: float, span: list[int], one: int, two: int) -> None:
    at = partial(ramp, final=final, begin=span[0], end=span[1])
    assert at(min(one, two)) <= at(max(one, two)) + 1e-12


@given(initial=shares, final=shares, end=st.integers(1, 500), step=st.integers(0, 500))
def test_ramps_are_their_formulas(initial: float, final: float, end: int, step: int) -> None:
    t = min(step, end) / end
    options = {"initial": initial, "final": final, "end": end}
    assert schedule.linear(step, **options) == pytest.approx((1 - t) * initial + t * final)
    assert schedule.cubic(step, **options) == pytest.approx(final + (initial - final) * (1 - t) ** 3)
    assert schedule.cosine(step, **options) == pytest.approx(final + (initial - final) / 2 * (1 + math.cos(math.pi * t)))
    dense = (1 - initial) * ((1 - final) / (1 - initial)) ** t
    assert schedule.exponential(step, **options) == pytest.approx(1 - dense, abs=1e-9)


@given(final=st.floats(0.01, 0.99), end=st.integers(2, 100))
def test_exponential_takes_the_same_share_of_the_rest_at_every_step(final: float, end: int) -> None:
    left = [1 - schedule.exponential(s, final=final, end=end) for s in range(end + 1)]
    ratios = [after / before for before, after in itertools.pairwise(left)]
    assert ratios == pytest.approx([ratios[0]] * end)


@given(st.floats(0, 1), STEPS)
def test_constant_is_constant(value: float, step: int) -> None:
    assert schedule.constant(step, value=value) == value


@given(st.dictionaries(st.integers(0, 50), st.floats(0, 1)), st.floats(0, 1), st.integers(-5, 60))
def test_steps_holds_the_last_milestone_reached(milestones: dict[int, float], initial: float, step: int) -> None:
    before = dict(milestones)
    reached = [at for at in milestones if at <= step]
    assert schedule.steps(step, milestones=milestones, initial=initial) == (milestones[max(reached)] if reached else initial)
    assert milestones == before


def test_a_full_ramp_reaches_everything() -> None:
    assert [schedule.linear(s, final=1.0, end=4) for s in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.cubic(9, final=1.0, end=4) == 1.0
    assert schedule.linear(3, final=0.5, begin=3, end=3) == 0.5  # a ramp of no length is a jump
    assert schedule.linear(2, final=0.5, begin=3, end=3) == 0.0


@ramps
def test_a_ramp_that_ends_before_it_begins_is_an_error(ramp: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match="begin=5 is after end=4; give an end from 5 on"):
        ramp(0, final=0.5, begin=5, end=4)


@pytest.mark.parametrize("options", [{"final": 1.0}, {"final": 0.5, "initial": 1.0}])
def test_exponential_cannot_reach_one_and_says_what_can(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"below 1.*linear or cubic"):
        schedule.exponential(3, end=10, **options)
