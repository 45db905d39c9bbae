"""The interval of paired ratios holds what it says, and a limit that spreads has no shares."""

import math
import random
from statistics import mean

import pytest

from lightning_comm.core.judgement import CONFIDENCE, Ratio, Spread, doubt, student_t

TWO_SIDED_95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 8: 2.3060, 9: 2.2622, 30: 2.0423, 99: 1.9842}


@pytest.mark.parametrize(("freedom", "printed"), TWO_SIDED_95.items())
def test_students_quantiles_are_those_of_the_printed_tables(freedom, printed):
    assert student_t(freedom) == pytest.approx(printed, abs=5e-5)


def test_students_quantiles_hold_for_other_probabilities_and_tend_to_the_normal_ones():
    assert student_t(4, 0.99) == pytest.approx(4.6041, abs=5e-5)
    assert student_t(7, 0.50) == pytest.approx(0.7111, abs=5e-5)
    assert student_t(5001) == pytest.approx(1.9604, abs=2e-4)


def repeats(draw, count, truth, noise, shared):
    """Seconds of two things in some repeats, the second ``truth`` times as fast; all of a repeat is slower alike."""
    machine = [math.exp(shared * draw.gauss(0, 1)) for _ in range(count)]
    first, second = (
        {repeat: length * slow * math.exp(noise * draw.gauss(0, 1)) for repeat, slow in enumerate(machine)}
        for length in (truth, 1.0)
    )
    return Ratio.of(first, second)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says_however_much_whole_repeats_differ(count):
    draw, trials = random.Random(count), 4000
    held = 0
    for _ in range(trials):
        low, high = repeats(draw, count, truth=1.3, noise=0.03, shared=0.5).interval
        held += low <= 1.3 <= high
    error = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / trials)
    assert held / trials == pytest.approx(CONFIDENCE, abs=error)


def test_equals_are_called_faster_or_slower_no_more_often_than_the_interval_allows():
    draw, trials = random.Random(0), 3000
    seen = [repeats(draw, 5, truth=1.0, noise=0.05, shared=0.2) for _ in range(trials)]
    wrong = mean(not ratio.undecided for ratio in seen)
    assert wrong == pytest.approx(1 - CONFIDENCE, abs=3 * math.sqrt(0.05 * 0.95 / trials))
    assert not any(ratio.faster and ratio.slower for ratio in seen)


def test_a_large_saving_is_found_within_three_percent_of_noise_and_a_small_one_is_not():
    draw = random.Random(1)
    large = [repeats(draw, 5, truth=1 / 0.57, noise=0.03, shared=0.1) for _ in range(500)]
    assert all(ratio.faster for ratio in large)
    small = [repeats(draw, 5, truth=1.01, noise=0.03, shared=0.1) for _ in range(500)]
    assert mean(ratio.undecided for ratio in small) > 0.8


def test_outliers_and_skew_make_the_interval_wide_rather_than_wrong():
    draw, held, trials = random.Random(2), 0, 3000
    for _ in range(trials):
        disturbed = [1 + (draw.random() < 0.2) * draw.expovariate(2) for _ in range(10)]  # only ever slower
        times = [{repeat: disturbed[5 * half + repeat] for repeat in range(5)} for half in (0, 1)]
        low, high = Ratio.of(*times).interval
        held += low <= 1 <= high
    assert held / trials >= CONFIDENCE


def test_the_ratio_the_other_way_round_is_the_inverse_with_the_inverse_interval():
    one, other = Ratio((1.2, 1.5, 1.4, 1.1)), Ratio((1 / 1.2, 1 / 1.5, 1 / 1.4, 1 / 1.1))
    assert one.mean == pytest.approx(1 / other.mean)
    assert one.interval == pytest.approx([1 / end for end in reversed(other.interval)])
    assert (one.faster, one.slower, other.faster, other.slower) == (True, False, False, True)


@pytest.mark.parametrize("values", [(2.0,), (2.0, 2.0)])
def test_one_or_two_repeats_have_no_interval_and_decide_nothing(values):
    ratio = Ratio(values)
    assert ratio.interval is None
    assert ratio.undecided
    assert ratio.mean == pytest.approx(2.0)


def test_only_repeats_that_both_have_are_compared():
    assert Ratio.of({0: 4.0, 1: 9.0, 3: 3.0}, {1: 3.0, 3: 3.0, 7: 1.0}).values == (3.0, 1.0)
    assert Ratio.of({0: 1.0}, {1: 1.0}) is None


def test_a_limit_is_doubted_above_two_percent_from_lowest_to_highest_and_where_repeats_are_few():
    assert doubt([1.0, 1.0, 1.0, 1.0, 1.0199]) is None
    assert doubt([1.0, 1.0, 1.0, 1.0, 1.0201]) == "the limit itself spreads by 2.0 %"
    assert doubt([1.0] * 4, fewest=5) == "fewer than 5 repeats"
    assert doubt([1.0, 1.1, 1.2], what="the bound").startswith("the bound itself spreads by 18.2 %")


def test_one_repeat_has_no_spread():
    assert Spread((3.0,)).relative == 0
    assert Spread((3.0,)).range == (3.0, 3.0)
