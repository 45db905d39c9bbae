"""The schedule against exact rational arithmetic and a plain list of its steps."""

import itertools
from fractions import Fraction

import pytest

from lightning_comm.core.compression.pruning_schedule import PruningSchedule, break_even_share

GRADUAL = [
    PruningSchedule(start, start + length, every)
    for start, length, every in itertools.product((0, 1, 7), (1, 2, 10, 33), (1, 3, 10, 100))
]


def exact_steps(schedule):
    """The prunings, one after the other, as the docstring says them."""
    steps, step = [], schedule.start_step + schedule.every_steps
    while step < schedule.end_step:
        steps.append(step)
        step += schedule.every_steps
    return [*steps, schedule.end_step]


def exact_share(schedule, step, final):
    """The cubic rule in rational numbers."""
    done = Fraction(step - schedule.start_step, schedule.end_step - schedule.start_step)
    return final * (1 - (1 - done) ** 3)


@pytest.mark.parametrize("schedule", GRADUAL, ids=repr)
def test_shares_follow_the_cubic_rule_exactly_and_hold_in_between(schedule):
    final = Fraction(4, 5)
    steps = exact_steps(schedule)
    assert [step for step in range(200) if schedule.due(step)] == steps
    share = Fraction(0)
    for step in range(60):
        if step in steps:
            share = exact_share(schedule, step, final)
        assert schedule.sparsity_at(step, 0.8) == pytest.approx(float(share), abs=1e-15)
    assert schedule.sparsity_at(1000, 0.8) == 0.8


def test_shares_never_fall():
    for schedule in GRADUAL:
        shares = [schedule.sparsity_at(step, 0.9) for step in range(60)]
        assert shares == sorted(shares)
        assert len(set(shares)) == len(exact_steps(schedule)) + 1


@pytest.mark.parametrize("start", [0, 5])
def test_without_an_end_all_are_pruned_at_once_at_the_start(start):
    schedule = PruningSchedule(start, every_steps=3)
    assert [step for step in range(50) if schedule.due(step)] == [start]
    assert [schedule.sparsity_at(step, 0.7) for step in range(50)] == [0.0] * start + [0.7] * (50 - start)


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"start_step": -1}, ("`start_step`", ">= 0", "got -1", "when training starts")),
        ({"start_step": 0.5}, ("`start_step`", "whole number", "got 0.5")),
        ({"start_step": 5, "end_step": 5}, ("`end_step`", "`start_step`=5", "got 5", "all at once")),
        ({"end_step": 0.9}, ("`end_step`", "whole number", "got 0.9")),
        ({"every_steps": 0}, ("`every_steps`", ">= 1", "got 0")),
        ({"every_steps": True}, ("`every_steps`", "got True")),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the line below reads all of it)
        PruningSchedule(**kwargs)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("fixed", [0, 3, 50])
@pytest.mark.parametrize("slope", [0, 20, 400])
@pytest.mark.parametrize("send", [0, 3, 40, 1000])
def test_the_break_even_share_parts_where_packing_pays_from_where_it_does_not(fixed, slope, send):
    """Exact times, in thousandths of a second: every share of a grid is on its side."""

    def packing_s(share):
        return Fraction(fixed, 1000) + Fraction(slope, 1000) * share

    two = tuple((float(share), float(packing_s(share))) for share in (Fraction(1, 10), Fraction(9, 10)))
    found = break_even_share(two, send / 1000)
    assert 0 <= found <= 1
    for share in (Fraction(each, 1000) for each in range(1001)):
        saved = Fraction(send, 1000) * (1 - share)
        if share < found - 1e-9:
            assert packing_s(share) < saved
        if share > found + 1e-9:
            assert packing_s(share) >= saved


def test_measurements_that_fall_with_the_share_are_taken_for_equal():
    assert break_even_share(((0.1, 0.03), (0.9, 0.02)), 0.3) == pytest.approx(0.9)
