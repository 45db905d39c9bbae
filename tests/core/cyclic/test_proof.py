"""Schedules for many numbers of workers and stages are carried out; broken ones are refused, with what breaks them."""

import re

import pytest
from support.grids import few_of

from lightning_comm.core.cyclic.proof import ScheduleError, check_schedule
from lightning_comm.core.cyclic.schedule import CyclicSchedule, Transfer

GRID = [(n, s) for n in range(1, 7) for s in ([n // 2] * (n % 2 == 0) + [n, 2 * n, 3 * n])]
FLUSHES = [(), (1,), (2, 3), (1, 2, 3, 4)]
SMALL = [k for k, (workers, stages) in enumerate(GRID) if workers * stages <= 32]
RULES = [{"rule": "v1"}, {"rule": "v2"}, {"rule": "v2", "warmup_sync_steps": 2}, {"rule": "v1", "warmup_sync_steps": 1}]


@pytest.mark.parametrize(("workers", "stages"), few_of(GRID, *SMALL))
def test_every_schedule_can_be_carried_out_without_losing_a_message(workers, stages):
    # Every rule meets every flush, by workers that take turns and by others. With more than three workers, each of
    # which does what a third one does, one rule and flush in four: together they are all rules and all flushes.
    every = [(rule, flush) for rule in range(4) for flush in range(4) if workers <= 3 or rule == flush]
    for rule, flush in every:
        schedule, flush_after = CyclicSchedule(workers, stages, **RULES[rule]), FLUSHES[flush]
        for stagger in (False, True):
            proof = check_schedule(schedule, steps=4, flush_after=flush_after, stagger=stagger)
            assert proof.transfers == 4 * 2 * (workers - 1) * stages
            # Two passes, and three events for each of gradient and parameters, by worker; an update by stage.
            assert proof.events == 4 * stages * (workers * (2 + 3 + 3) + 1) + len(flush_after)


@pytest.mark.parametrize("workers", range(1, 6))
def test_every_lag_can_be_carried_out(workers):
    for lag in range(workers + 1):
        check_schedule(CyclicSchedule(workers, workers, lag=lag), steps=5, flush_after=(2,), stagger=True)


@pytest.mark.parametrize("workers", range(2, 5))
def test_messages_can_wait_until_a_worker_has_its_own_gradient(workers):
    for rule in RULES:
        for flush_after in [(), (2,)]:
            check_schedule(CyclicSchedule(workers, 2 * workers, **rule), 4, flush_after=flush_after, asked_late=True)


@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(("workers", "stages"), few_of(GRID, *SMALL))
def test_workers_that_take_turns_are_late_once_at_the_start_and_never_again(workers, stages, rule):
    schedule = CyclicSchedule(workers, stages, rule)
    for steps in (1, 3, 6):
        proof = check_schedule(schedule, steps, stagger=True, forward_share=0.5)
        assert proof.critical_path_slots == 2 * stages * steps + (workers - 1) * schedule.delay_slots
    assert check_schedule(schedule, 6).critical_path_slots == 2 * stages * 6


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_each_flush_costs_workers_that_take_turns_one_more_start(workers):
    schedule = CyclicSchedule(workers, 2 * workers)
    plain = check_schedule(schedule, 6, stagger=True, forward_share=0.5).critical_path_slots
    flushed = check_schedule(schedule, 6, flush_after=(2, 4), stagger=True, forward_share=0.5).critical_path_slots
    assert flushed - plain == 2 * (workers - 1) * schedule.delay_slots


# ---- broken schedules are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", range(12))
def test_a_table_without_one_of_its_messages_is_refused(left_out):
    schedule = CyclicSchedule(3, 3)
    table = list(schedule.transfers(0))
    assert len(table) == 12

    def transfers(step):
        return [each for number, each in enumerate(schedule.transfers(step)) if (step, number) != (1, left_out)]

    lost = list(schedule.transfers(1))[left_out]
    with pytest.raises(ScheduleError, match="not in the table") as caught:
        check_schedule(schedule, transfers=transfers)
    assert str(lost) in str(caught.value)


def test_a_table_with_a_message_twice_or_between_workers_that_are_no_neighbours_is_refused():
    schedule = CyclicSchedule(4, 4)
    for extra in (next(schedule.transfers(0)), Transfer("gradient", 0, 2, 1, 0)):
        with pytest.raises(ScheduleError, match="no worker sends it") as caught:
            check_schedule(schedule, transfers=lambda step, extra=extra: [*schedule.transfers(step), extra])
        assert str(extra) in str(caught.value)


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("reversed_at", [0, 1])
def test_another_order_of_stages_at_one_end_of_a_channel_is_refused(workers, reversed_at):
    schedule = CyclicSchedule(workers, 3 * workers)

    def order(worker):
        return schedule.order()[::-1] if worker == reversed_at else schedule.order()

    with pytest.raises(ScheduleError, match="same order") as caught:
        check_schedule(schedule, order=order)
    assert re.search(r"waits for stage \d", str(caught.value))


def test_another_order_that_all_workers_share_is_carried_out():
    schedule = CyclicSchedule(3, 3)
    for stagger in (False, True):
        check_schedule(schedule, order=lambda worker: (0, 1, 2), stagger=stagger)
        check_schedule(schedule, order=lambda worker: (1, 2, 0), stagger=stagger)


def test_an_order_without_a_stage_is_refused():
    with pytest.raises(ScheduleError, match=r"worker 0 handles stages \(2, 1\)"):
        check_schedule(CyclicSchedule(3, 3), order=lambda worker: (2, 1))


class NextOneOwns(CyclicSchedule):
    """Each worker takes the next one for the owner, so that the sum of every stage goes on forever."""

    def sends(self, worker, stage, kind):
        return kind == "gradient" or super().sends(worker, stage, kind)

    def transfers(self, step):
        yield from super().transfers(step)
        for stage in range(self.stages):
            yield Transfer("gradient", self.owner(stage), self.after(self.owner(stage)), stage, step)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_a_ring_on_which_no_worker_begins_is_refused_and_its_circle_named(workers):
    with pytest.raises(ScheduleError, match="circle") as caught:
        check_schedule(NextOneOwns(workers, workers))
    circle = str(caught.value).split("circle: ")[1].rstrip(".").split(" <- ")
    assert circle[0] == circle[-1]
    assert {f"worker {worker}: gradient added" for worker in range(workers)} <= {each.split(",")[0] for each in circle}


class Deaf(CyclicSchedule):
    """The first worker does not listen for the parameters of stage 1."""

    def receives(self, worker, stage, kind):
        return (worker, stage, kind) != (0, 1, "parameters") and super().receives(worker, stage, kind)


class Expectant(CyclicSchedule):
    """The owner of stage 0 waits for its parameters."""

    def receives(self, worker, stage, kind):
        return super().receives(worker, stage, kind) or (worker == self.owner(0) and stage == 0)


def test_a_message_that_one_end_does_not_know_of_is_refused():
    with pytest.raises(ScheduleError, match=r"kind='parameters', source=2, target=0, stage=1.* never received"):
        check_schedule(Deaf(3, 3))
    with pytest.raises(ScheduleError, match=r"kind='parameters', source=1, target=2, stage=0.* never sent"):
        check_schedule(Expectant(3, 3))


class Short(CyclicSchedule):
    """Parameters of every stage, or its sum, miss the worker after the owner."""

    kind = "parameters"

    def sends(self, worker, stage, kind):
        first = worker == (self.owner(stage) if kind == "parameters" else self.after(self.owner(stage)))
        return super().sends(worker, stage, kind) and not (first and kind == self.kind)

    def transfers(self, step):
        return [each for each in super().transfers(step) if self.sends(each.source, each.stage, each.kind)]


class ShortSum(Short):
    kind = "gradient"


def test_a_sum_without_a_worker_and_parameters_that_do_not_reach_one_are_refused():
    with pytest.raises(ScheduleError, match=r"worker 0 reads version 1 of stage 0 in step 2, and neither makes nor"):
        check_schedule(Short(3, 3))
    with pytest.raises(ScheduleError, match=r"sum of stage 0 reaches its owner without the gradients of \{0\}"):
        check_schedule(ShortSum(3, 3))


class Ahead(CyclicSchedule):
    def version(self, worker, stage, step, flushed_at=0):
        return super().version(worker, stage, step, flushed_at) + (worker == 0)


class Behind(CyclicSchedule):
    def version(self, worker, stage, step, flushed_at=0):
        return max(0, step - 2)


class Forgetful(CyclicSchedule):
    """Stale workers do not use what they were sent at a flush."""

    def version(self, worker, stage, step, flushed_at=0):
        return super().version(worker, stage, step, 0)


@pytest.mark.parametrize(
    ("schedule", "flush_after", "says"),
    [
        (Ahead(3, 3), (), "worker 0 reads version 1 of stage 0 in step 0, and the newest there can be is 0"),
        (Behind(2, 2, rule="v1"), (), "reads version 0 of stage 0 in step 2, and the rule allows none older than 1"),
        (Forgetful(2, 2), (2,), "worker 0 reads version 1 of stage 0 in step 2, .* none older than 2"),
    ],
)
def test_a_version_that_is_not_there_or_too_old_is_refused(schedule, flush_after, says):
    with pytest.raises(ScheduleError, match=says):
        check_schedule(schedule, flush_after=flush_after)


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"steps": 0}, ["check_schedule", "steps", "got 0", ">= 1", "4 show"]),
        ({"steps": 3, "flush_after": (2, 4)}, ["check_schedule", "flush_after", "got 4", "steps`=3", "more `steps`"]),
        ({"flush_after": (0,)}, ["flush_after", "got 0", "steps done"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    with pytest.raises(ValueError, match="must be") as caught:
        check_schedule(CyclicSchedule(2, 2), **kwargs)
    assert [word for word in must_say if word not in str(caught.value)] == []
