"""The rules of the cyclic schedule against slot times, brute force and the published figure."""

from collections import Counter, defaultdict
from fractions import Fraction
from functools import cache

import pytest
from support.grids import few_of

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Transfer

GRID = [(n, s) for n in range(1, 9) for s in ([n // 2] * (n % 2 == 0) + [n, 2 * n, 3 * n])]
OFTEN = few_of(GRID, *(k for k, (workers, stages) in enumerate(GRID) if workers * stages <= 64))


@cache
def number_of_pass(stages):
    """The passes of a step in their order: forward through all stages, and back."""
    passes = [(each, True) for each in range(stages)] + [(each, False) for each in range(stages)][::-1]
    return {each: number for number, each in enumerate(passes)}


def slot_of(schedule, worker, stage, step, forward):
    """When a worker has its turn: counted by hand, pass after pass."""
    begin = Fraction(2 * schedule.stages, schedule.workers) * worker + 2 * schedule.stages * step
    return begin + number_of_pass(schedule.stages)[stage, forward]


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_a_turn_is_where_counting_the_passes_puts_it(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    seen = {}
    for worker in range(workers):
        for slot in range(10 * stages):
            if (turn := schedule.turn(worker, slot)) is not None:
                seen[worker, turn.stage, turn.step, turn.forward] = slot
    assert all(slot == slot_of(schedule, *key) for key, slot in seen.items())
    expected = {(i, j, t, f) for i in range(workers) for j in range(stages) for t in range(4) for f in (True, False)}
    assert expected <= set(seen)


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_a_worker_is_fresh_where_its_next_forward_comes_after_the_last_backward(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    for stage in range(stages):
        updated_after = max(slot_of(schedule, worker, stage, 5, False) for worker in range(workers))
        fresh = [slot_of(schedule, worker, stage, 6, True) > updated_after for worker in range(workers)]
        assert [schedule.is_fresh(worker, stage) for worker in range(workers)] == fresh
        assert schedule.owner(stage) == fresh.index(True)  # the first to need the new version makes it
        assert fresh == sorted(fresh)


@pytest.mark.parametrize("workers", range(1, 9))
def test_with_as_many_stages_as_workers_the_rule_is_the_published_one(workers):
    schedule = CyclicSchedule(workers, workers)
    pairs = [(i, j) for i in range(1, workers + 1) for j in range(1, workers + 1)]
    fresh = [schedule.is_fresh(i - 1, j - 1) for i, j in pairs]
    assert fresh == [i + j >= workers + 1 for i, j in pairs]
    assert fresh.count(False) == workers * (workers - 1) // 2
    for lag in range(workers + 1):
        lagging = CyclicSchedule(workers, workers, lag=lag)
        assert [lagging.is_fresh(i - 1, j - 1) for i, j in pairs] == [i + j >= workers + 1 + lag for i, j in pairs]


@pytest.mark.parametrize("workers", range(1, 7))
def test_rule_v1_is_a_lag_of_as_many_as_there_are_workers(workers):
    v1, lag = CyclicSchedule(workers, workers, rule="v1"), CyclicSchedule(workers, workers, lag=workers)
    keys = [(i, j, t, flush) for i in range(workers) for j in range(workers) for t in range(5) for flush in (0, 3)]
    versions = [v1.version(*key) for key in keys if key[3] <= key[2]]
    assert versions == [lag.version(*key) for key in keys if key[3] <= key[2]]
    assert versions == [max(key[2] - 1, key[3]) for key in keys if key[3] <= key[2]]


@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_no_version_is_more_than_one_update_old_and_none_after_a_flush_or_in_the_warm_up(workers, stages, rule):
    schedule = CyclicSchedule(workers, stages, rule, warmup_sync_steps=2)
    for step in range(7):
        for flushed_at in range(step + 1):
            ages = {step - schedule.version(i, j, step, flushed_at) for i in range(workers) for j in range(stages)}
            if step < 2 or flushed_at == step:
                assert ages == {0}
            else:
                assert ages <= {0, 1}
                assert (1 in ages) == (rule == "v1" or workers > 1)


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_a_stage_is_used_by_one_worker_at_a_time_if_there_are_as_many_as_workers(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    for slot in range(2 * stages, 6 * stages):
        turns = [schedule.turn(worker, slot) for worker in range(workers)]
        most = max(Counter(turn.stage for turn in turns).values())
        assert most == (1 if stages >= workers else 2)


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_live_stages_are_those_between_their_forward_and_their_backward(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    live = Counter()
    for worker in range(workers):
        for stage in range(stages):
            for step in range(5):
                first, last = (int(slot_of(schedule, worker, stage, step, forward)) for forward in (True, False))
                live.update(range(first, last + 1))
    slots = range(10 * stages - 2 * stages)
    assert [schedule.live_stages(slot) for slot in slots] == [live[slot] for slot in slots]
    steady = {schedule.live_stages(slot) for slot in range(2 * stages, 6 * stages)}
    if stages == workers:
        assert steady == {workers * (workers + 1) // 2}
    assert max(steady) <= workers * stages


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_workers_send_2_n_minus_1_nths_of_the_model_and_the_table_says_the_same(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    sizes = [101 + 7 * stage**2 for stage in range(stages)]
    sent = [schedule.sent_bytes(worker, sizes) for worker in range(workers)]
    assert Fraction(sum(sent), workers) == Fraction(2 * (workers - 1), workers) * sum(sizes)
    by_source = Counter()
    for transfer in schedule.transfers(3):
        by_source[transfer.source] += sizes[transfer.stage]
    assert sent == [by_source[worker] for worker in range(workers)]
    if stages >= workers:  # with equal stages each worker sends as much as the others
        assert {schedule.sent_bytes(i, [10] * stages) for i in range(workers)} == {
            20 * (workers - 1) * stages // workers
        }


@pytest.mark.parametrize(("workers", "stages"), OFTEN)
def test_a_sum_passes_every_worker_once_and_ends_where_the_new_version_begins(workers, stages):
    schedule = CyclicSchedule(workers, stages)
    for stage in range(stages):
        owner, path = schedule.owner(stage), schedule.path(stage)
        assert (sorted(path), path[-1]) == (list(range(workers)), owner)
        ways = {"gradient": list(path), "parameters": [owner, *path[:-1]]}
        for kind, way in ways.items():
            expected = [Transfer(kind, a, (a + 1) % workers, stage, 2) for a in way[:-1]]
            assert [m for m in schedule.transfers(2) if (m.kind, m.stage) == (kind, stage)] == expected
            assert {i for i in range(workers) if schedule.sends(i, stage, kind)} == set(way[:-1])
            assert {i for i in range(workers) if schedule.receives(i, stage, kind)} == set(way[1:])
    assert sorted(stage for worker in range(workers) for stage in schedule.owned(worker)) == list(range(stages))
    assert schedule.order() == tuple(range(stages))[::-1]


def row(schedule, worker, slots):
    """A row of the figure: F or B, the stage from 1, and x where the version is the one before."""
    cells = []
    for slot in range(slots):
        turn = schedule.turn(worker, slot)
        if turn is None:
            cells.append("..")
            continue
        stale = schedule.version(worker, turn.stage, turn.step) < turn.step
        cells.append(f"{'F' if turn.forward else 'B'}{turn.stage + 1}" + "x" * stale)
    return " ".join(cells)


def test_three_workers_have_their_turns_as_in_the_published_figure():
    schedule = CyclicSchedule(3, 3, rule="v1")
    first, later = "F1 F2 F3 B3 B2 B1", "F1x F2x F3x B3x B2x B1x"
    assert row(schedule, 0, 18) == f"{first} {later} {later}"
    assert row(schedule, 1, 20) == f".. .. {first} {later} {later}"
    assert row(schedule, 2, 22) == f".. .. .. .. {first} {later} {later}"
    ends = [max(int(slot_of(schedule, worker, 0, step, False)) for worker in range(3)) for step in range(3)]
    assert ends == [9, 15, 21]  # the first step spans slots 0 to 9, each later one 6 more


def test_four_workers_have_the_versions_of_the_derived_table():
    schedule = CyclicSchedule(4, 4)
    assert row(schedule, 0, 16).split()[8:] == ["F1x", "F2x", "F3x", "F4", "B4", "B3x", "B2x", "B1x"]
    assert row(schedule, 1, 18).split()[10:] == ["F1x", "F2x", "F3", "F4", "B4", "B3", "B2x", "B1x"]
    assert row(schedule, 2, 20).split()[12:] == ["F1x", "F2", "F3", "F4", "B4", "B3", "B2", "B1x"]
    assert row(schedule, 3, 22).split()[14:] == ["F1", "F2", "F3", "F4", "B4", "B3", "B2", "B1"]


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"workers": 0, "stages": 1}, ["workers", "got 0", ">= 1", "number of ranks"]),
        ({"workers": 2.0, "stages": 2}, ["`workers`", "2.0", "whole number"]),
        ({"workers": True, "stages": 2}, ["`workers`", "True"]),
        ({"workers": 2, "stages": 2, "lag": 1.5}, ["`lag`", "1.5"]),
        ({"workers": 4, "stages": 6}, ["stages", "4", "got 6", "Use 4, 8 or 12"]),
        ({"workers": 3, "stages": 1}, ["stages", "3", "got 1", "Use 3, 6 or 9"]),
        ({"workers": 3, "stages": 0}, ["stages", "got 0", "Use 3, 6 or 9"]),
        ({"workers": 2, "stages": 2, "rule": "v3"}, ["rule", "'v3'", "'v1' or 'v2'"]),
        ({"workers": 2, "stages": 2, "lag": 3}, ["lag", "got 3", "0 to", "2", "'v1'"]),
        ({"workers": 2, "stages": 2, "lag": -1}, ["lag", "got -1"]),
        ({"workers": 2, "stages": 4, "lag": 1}, ["lag`=1", "stages`=4", "Give `stages=2`"]),
        ({"workers": 2, "stages": 2, "warmup_sync_steps": -1}, ["warmup_sync_steps", "got -1", "optimizer steps"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    with pytest.raises(ValueError, match=r"CyclicSchedule: .*(must be|needs)") as caught:
        CyclicSchedule(**kwargs)
    assert [word for word in must_say if word not in str(caught.value)] == []


@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(("workers", "stages"), [pair for pair in GRID if pair[0] > 1])
def test_a_message_is_needed_when_the_first_worker_that_it_reaches_computes_with_its_version(workers, stages, rule):
    schedule = CyclicSchedule(workers, stages, rule)
    for transfer in schedule.transfers(step=3):
        reached, at = [], transfer.target
        if transfer.kind == "gradient":
            reached = list(range(workers))
        while transfer.kind == "parameters":
            reached.append(at)
            if not schedule.sends(at, transfer.stage, "parameters"):
                break
            at = schedule.after(at)
        forwards = [
            slot_of(schedule, worker, transfer.stage, step, True)
            for worker in reached
            for step in (4, 5)
            if schedule.version(worker, transfer.stage, step) == 4
        ]
        assert schedule.needed_slot(transfer.source, transfer.kind, transfer.stage, 3) == min(forwards)


@pytest.mark.parametrize("warmup_sync_steps", [0, 2, 3, 100])
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(("workers", "stages"), [pair for pair in GRID if pair[0] > 1])
def test_what_a_worker_waits_for_is_more_urgent_than_what_it_cannot_take_yet(workers, stages, rule, warmup_sync_steps):
    """Messages of step t are taken from the start of step t on. Whoever is before that waits for others: they pass."""
    schedule = CyclicSchedule(workers, stages, rule, warmup_sync_steps=warmup_sync_steps)
    urgency, by_stage = {}, defaultdict(list)
    for step in range(-1, 5):
        for each in schedule.transfers(step):
            urgency[each] = schedule.needed_slot(each.source, each.kind, each.stage, step)
            by_stage[each.stage, step].append(each)
    cannot_be_taken = min(urgency[each] for each in schedule.transfers(4))
    for stage in range(stages):
        order = schedule.way_back(stage)
        for worker in range(workers):
            for step in range(1, 4):
                needed = schedule.version(worker, stage, step) - 1  # the step of which it is made
                assert by_stage[stage, needed]
                for message in by_stage[stage, needed]:
                    if message.kind == "gradient" or order.index(message.source) < order.index(worker):
                        assert urgency[message] < cannot_be_taken, (message, worker, step)
