"""The cut into stages against all cuts there are, and the place of the stagger's token against exact time."""

import itertools
import math
import random
from fractions import Fraction

import pytest

from lightning_comm.core.cyclic.cuts import balanced_cuts, default_stages
from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.cyclic.stagger import token_boundary


def greatest(costs, firsts):
    return max(sum(map(Fraction, costs[a:b])) for a, b in itertools.pairwise([*firsts, len(costs)]))


def squares(costs, firsts):
    return sum(sum(map(Fraction, costs[a:b])) ** 2 for a, b in itertools.pairwise([*firsts, len(costs)]))


def best_of_all(costs, parts):
    """The first of the best, over all lists of first indices in lexicographic order."""
    every = [(0, *rest) for rest in itertools.combinations(range(1, len(costs)), parts - 1)]
    return list(min(every, key=lambda firsts: (greatest(costs, firsts), squares(costs, firsts))))


def test_a_large_unit_leaves_the_other_groups_even():
    assert balanced_cuts([1] * 8 + [9], parts=5) == [0, 2, 4, 6, 8]


def test_the_cut_is_the_first_of_the_best_among_all_cuts():
    rng = random.Random(1)
    draws = [
        lambda: rng.randint(0, 4),  # many ties, and zeros
        lambda: rng.random(),
        lambda: rng.choice([0.1, 0.2, 0.3]),  # sums that binary fractions round
        lambda: 10.0 ** rng.randint(-300, 300),
    ]
    for number in range(400):
        count = rng.randint(1, 8)
        costs = [draws[number % len(draws)]() for _ in range(count)]
        parts = rng.randint(1, count)
        assert balanced_cuts(costs, parts) == best_of_all(costs, parts), (costs, parts)


def test_a_rounding_error_of_a_sum_does_not_move_the_cut():
    assert 0.1 + 0.2 != 0.3  # in floating point; as exact numbers the left is the smaller group, by 2^-55
    assert balanced_cuts([0.1, 0.2, 0.3], parts=2) == best_of_all([0.1, 0.2, 0.3], 2)


@pytest.mark.parametrize("costs", [[0, 0, 0, 0, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 7]])
def test_units_that_cost_nothing_leave_no_group_empty(costs):
    for parts in range(1, 6):
        firsts = balanced_cuts(costs, parts)
        assert len(firsts) == parts
        assert all(a < b for a, b in itertools.pairwise([*firsts, 5]))


def test_a_model_of_many_units_is_cut_as_well_as_the_mean_allows():
    rng = random.Random(2)
    costs = [rng.uniform(0.5, 1.5) for _ in range(1000)]
    assert greatest(costs, balanced_cuts(costs, 24)) <= sum(costs) / 24 + max(costs)


@pytest.mark.parametrize("workers", range(1, 9))
def test_stages_are_three_a_worker_or_as_many_as_the_model_has_and_always_a_valid_schedule(workers):
    for units in range(workers, 5 * workers):
        stages = default_stages(units, workers, lag=0)
        assert stages == max(k * workers for k in (1, 2, 3) if k * workers <= units)
        assert CyclicSchedule(workers, stages).stages == stages
        assert CyclicSchedule(workers, default_stages(units, workers, lag=1), lag=1).stages == workers


def time_after(passes, stages, forward_share):
    """The exact part of a batch's time after so many passes, one pass after the other."""
    forward, backward = forward_share / stages, (1 - forward_share) / stages
    return sum([*[forward] * stages, *[backward] * stages][:passes], Fraction(0))


@pytest.mark.parametrize("forward_share", [Fraction(1, 3), Fraction(1, 2), Fraction(2, 5), Fraction(1, 10)])
def test_the_token_goes_after_the_last_pass_that_ends_within_one_nth_of_the_batch(forward_share):
    on_the_edge = 0
    for workers, per_worker in itertools.product(range(1, 13), (1, 2, 3)):
        stages = workers * per_worker
        within = [k for k in range(1, 2 * stages + 1) if time_after(k, stages, forward_share) <= Fraction(1, workers)]
        on_the_edge += bool(within) and time_after(within[-1], stages, forward_share) == Fraction(1, workers)
        assert token_boundary(workers, stages, float(forward_share)) == max(within, default=1)
    assert on_the_edge  # or no rounding error was put to the test


def test_with_passes_of_equal_length_the_token_goes_when_the_schedule_begins_the_next_worker():
    for workers, per_worker in itertools.product(range(1, 9), (1, 2, 3)):
        schedule = CyclicSchedule(workers, workers * per_worker)
        assert token_boundary(workers, schedule.stages, forward_share=0.5) == schedule.delay_slots


@pytest.mark.parametrize(
    ("call", "must_say"),
    [
        (lambda: balanced_cuts([1.0, -2.0], 1), ["balanced_cuts", "costs", "-2.0", "index 1", "Leave out"]),
        (lambda: balanced_cuts([math.nan], 1), ["costs", "nan", "finite"]),
        (lambda: balanced_cuts([1.0, math.inf], 1), ["costs", "inf", "finite"]),
        (lambda: balanced_cuts([1.0, 2.0], 3), ["parts", "got 3", "2", "fewer groups"]),
        (lambda: balanced_cuts([1.0, 2.0], 0), ["parts", "got 0", "from 1"]),
        (lambda: balanced_cuts([], 1), ["parts", "got 1", "costs, 0"]),
        (lambda: default_stages(3, 4), ["units", "3 modules", "workers`=4", "3 devices", "finer model"]),
        (lambda: default_stages(1, 2), ["1 module ", "workers`=2", "1 device ", "finer model"]),
        (lambda: default_stages(3, 0), ["workers", "got 0", "number of ranks"]),
        (lambda: token_boundary(0, 3), ["workers", "got 0", "number of ranks"]),
        (lambda: token_boundary(3, 0), ["stages", "got 0", "as many as workers"]),
        (lambda: token_boundary(3, 3, 1.0), ["forward_share", "got 1.0", "below 1", "1/3"]),
        (lambda: token_boundary(3, 3, math.nan), ["forward_share", "nan"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(call, must_say):
    with pytest.raises(ValueError, match=r"must be|need at least") as caught:
        call()
    assert [word for word in must_say if word not in str(caught.value)] == []
