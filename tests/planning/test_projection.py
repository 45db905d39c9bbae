"""The projection of a whole run against a count that knows neither the clock nor the rules."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from lightning_comm.core.local_update import FixedPeriod, PowerPeriod, QuadraticPeriod
from lightning_comm.planning.projection import RunPlan, StepCosts, project, round_ends


def cosine(total: int, warmup: int, peak: float) -> list[float]:
    rising = [peak * step / warmup for step in range(warmup)]
    falling = [peak * (1 + math.cos(math.pi * step / (total - warmup))) / 2 for step in range(total - warmup)]
    return rising + falling


def counted(alpha: float, floor: int, rates: list[float], first: int = 0) -> list[int]:
    """The ends of quadratic rounds, step by step and in rational numbers; a rate above all before means warm-up."""
    ends, left, highest = [], 0, None
    for step in range(first, len(rates)):
        if left == 0:
            rate = rates[step]
            warming_up = highest is None or rate > highest
            highest = rate if highest is None else max(highest, rate)
            grown = math.inf if rate == 0 else math.floor((Fraction(alpha) / Fraction(rate)) ** 2)
            left = floor if warming_up else max(floor, grown)
        left -= 1
        if left == 0 or step == len(rates) - 1:
            ends.append(step + 1)
    return ends


@pytest.mark.parametrize("gradient_steps", [0, 37])
@pytest.mark.parametrize(("total", "warmup"), [(1000, 100), (440, 20), (441, 0)])
def test_rounds_end_where_a_count_in_rational_numbers_says(total, warmup, gradient_steps):
    rates = cosine(total, warmup, peak=0.002)
    ends = round_ends(QuadraticPeriod(alpha=0.00438, h_base=4), rates, gradient_steps=gradient_steps)
    assert list(ends) == counted(0.00438, 4, rates, gradient_steps)
    periods = [b - a for a, b in itertools.pairwise(ends)]
    assert max(periods) > 4 * min(periods)  # the period grew, or nothing was shown


def test_a_constant_period_ends_every_so_many_steps_and_with_the_run():
    assert round_ends(FixedPeriod(8), [0.1] * 30) == (8, 16, 24, 30)
    assert round_ends(FixedPeriod(8), [0.1] * 30, gradient_steps=15) == (23, 30)
    assert round_ends(FixedPeriod(8), [0.1] * 30, gradient_steps=30) == ()


def test_a_rate_of_zero_lasts_to_the_end():
    assert round_ends(PowerPeriod(alpha=0.1, exponent=1.0, h_base=2), [0.1, 0.1, 0.0, 0.0, 0.0]) == (2, 5)


def test_time_and_bytes_are_the_sum_over_all_steps():
    draw = random.Random(0)
    plan = RunPlan(total_steps=50, gradient_steps=20, round_ends=(28, 36, 44, 50))
    costs = StepCosts(*(draw.random() for _ in range(6)))
    seconds = sent = 0.0
    for step in range(1, 51):
        seconds += costs.gradient_step_s if step <= 20 else costs.step_s
        sent += costs.gradient_step_bytes if step <= 20 else costs.step_bytes
        if step in plan.round_ends:
            seconds += costs.sync_s
            sent += costs.sync_bytes
    got = project(plan, costs)
    assert (got.seconds, got.wire_bytes) == pytest.approx((seconds, sent))
    assert got.synchronisations == 20 + 4


@pytest.mark.parametrize(
    ("arguments", "must_say"),
    [
        ((0, 0), ["total_steps", ">= 1", "got 0", "max_steps"]),
        ((10, 11), ["gradient_steps", "`total_steps`=10", "got 11", "ends with it"]),
    ],
)
def test_a_plan_that_does_not_add_up_is_refused(arguments, must_say):
    with pytest.raises(ValueError, match="RunPlan: ") as caught:
        RunPlan(*arguments)
    assert [word for word in must_say if word not in str(caught.value)] == []
