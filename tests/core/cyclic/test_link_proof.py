"""No send window makes workers wait in a circle: proven for each schedule, and compared with runs in any order."""

import random
import re

import pytest
from support.grids import few_of

from lightning_comm.core.cyclic.link_proof import ScheduleError, check_links
from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.cyclic.send_window import SendWindow

GRID = [(n, s) for n in range(1, 6) for s in ([n // 2] * (n % 2 == 0) + [n, 3 * n])]
RULES = [{"rule": "v1"}, {"rule": "v2"}, {"rule": "v2", "warmup_sync_steps": 3}]


@pytest.mark.parametrize(("workers", "stages"), GRID)
def test_no_send_window_can_stop_a_schedule(workers, stages):
    for rule in RULES:
        schedule = CyclicSchedule(workers, stages, **rule)
        for asked_late, flush_after in [(False, (1, 2)), (True, (2,)), (True, ())]:
            events = check_links(schedule, 4, flush_after, asked_late=asked_late, previous_norm=True)
            # passes, sums added and asked for, versions held and asked for; updates; sent and taken; begun; flushes
            passes, lanes = workers * stages * 2, workers * stages * 4
            sent = 2 * 2 * (workers - 1) * stages
            assert events == 4 * (passes + lanes + stages + sent + workers) + workers * len(flush_after)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_no_send_window_can_stop_a_lag(workers):
    for lag in range(1, workers + 1):
        for asked_late in (False, True):
            check_links(CyclicSchedule(workers, workers, lag=lag), 5, (2, 3), asked_late=asked_late)


class FlushUnknown(CyclicSchedule):
    """A link that does not know of flushes."""

    def urgency(self, source, kind, stage, step, flushed_at=0):
        return super().urgency(source, kind, stage, step, 0)


class WarmUpUnknown(CyclicSchedule):
    """A link that takes workers to be behind each other also where all wait for the newest version."""

    def urgency(self, source, kind, stage, step, flushed_at=0):
        return flushed_at, self.needed_slot(source, kind, stage, step)


BROKEN = [
    (FlushUnknown(4, 12), (2,), False),
    (FlushUnknown(5, 5), (2,), False),
    (WarmUpUnknown(3, 9, warmup_sync_steps=4), (), True),
]


@pytest.mark.parametrize(("schedule", "flush_after", "asked_late"), BROKEN)
def test_an_order_in_which_a_window_of_two_can_stop_for_good_is_refused_and_does_stop(
    schedule, flush_after, asked_late
):
    with pytest.raises(ScheduleError, match="circle") as caught:
        check_links(schedule, 4, flush_after, asked_late=asked_late)
    assert re.search(r"worker \d: (gradient|parameters) sent, stage \d+ of step \d", str(caught.value))
    seeds = range(150)
    assert any(not Workers(schedule, 4, flush_after, asked_late, window=2, seed=seed).carry_out() for seed in seeds)


# ---- the oracle: workers whose lanes run in any order ----------------------------------------------------------------


class Workers:
    """Each lane is a generator that yields what it waits for; a throw of dice says which goes on."""

    def __init__(self, schedule, steps, flush_after, asked_late, window, seed):
        self.schedule, self.steps, self.flush_after, self.asked_late = schedule, steps, flush_after, asked_late
        self.dice = random.Random(seed)
        workers, stages = range(schedule.workers), range(schedule.stages)
        self.begun = [-1] * schedule.workers
        self.own, self.updated, self.held, self.sent = set(), set(), set(), set()
        self.taken = [[] for _ in workers]  # by sender, what has not been acknowledged
        self.windows = [SendWindow(window, small_bytes=0) for _ in workers]
        self.lanes = [lane for worker in workers for lane in (self.compute(worker), self.hear(worker))]
        for kind in (self.gradients, self.parameters):
            self.lanes += [kind(worker, stage) for worker in workers for stage in stages]

    def carry_out(self):
        """Return whether all is done when nothing can happen any more."""
        self.dice.shuffle(self.lanes)  # some are always faster than others: those that are looked at first
        waits = {lane: next(lane) for lane in self.lanes}
        while (lane := next(able := (lane for lane, condition in waits.items() if condition()), None)) is not None:
            if self.dice.random() < 0.1:
                lane = self.dice.choice([lane, *able])
            waits[lane] = next(lane, None)
            if waits[lane] is None:
                del waits[lane]
        return len(self.held) == self.schedule.workers * self.schedule.stages * self.steps

    def compute(self, worker):
        flushed_at, stages = 0, range(self.schedule.stages)
        for step in range(self.steps):
            if step in self.flush_after:
                yield lambda step=step: all((worker, stage, step - 1) in self.held for stage in stages)
                flushed_at = step
            if not self.asked_late:
                self.begun[worker] = step
            for stage in stages:
                version = self.schedule.version(worker, stage, step, flushed_at)
                yield lambda held=(worker, stage, version - 1), version=version: version == 0 or held in self.held
            for stage in reversed(stages):
                yield lambda: True
                if not self.asked_late:
                    self.own.add((worker, stage, step))
            if self.asked_late:
                self.begun[worker] = step
                self.own |= {(worker, stage, step) for stage in stages}

    def gradients(self, worker, stage):
        for step in range(self.steps):
            yield lambda step=step: self.begun[worker] >= step
            yield from self.receive("gradient", worker, stage, step)
            yield lambda step=step: (worker, stage, step) in self.own
            if self.schedule.sends(worker, stage, "gradient"):
                self.send("gradient", worker, stage, step)
            else:
                self.updated.add((stage, step))

    def parameters(self, worker, stage):
        for step in range(self.steps):
            yield lambda step=step: self.begun[worker] >= step
            yield from self.receive("parameters", worker, stage, step)
            if self.schedule.owner(stage) == worker:
                yield lambda step=step: (stage, step) in self.updated
            if self.schedule.sends(worker, stage, "parameters"):
                self.send("parameters", worker, stage, step)
            self.held.add((worker, stage, step))

    def receive(self, kind, worker, stage, step):
        if self.schedule.receives(worker, stage, kind):
            before, number = (worker - 1) % self.schedule.workers, self.schedule.number(kind, stage, step)
            yield lambda: (before, number) in self.sent
            self.taken[before].append(number)

    def send(self, kind, worker, stage, step):
        flushed_at = max((point for point in self.flush_after if point <= step), default=0)
        urgency = self.schedule.urgency(worker, kind, stage, step, flushed_at)
        self.windows[worker].add(self.schedule.number(kind, stage, step), urgency, message_bytes=1)
        self.let_go(worker)

    def hear(self, worker):
        while True:
            yield lambda: bool(self.taken[worker])
            self.windows[worker].arrived(self.taken[worker].pop(0))
            self.let_go(worker)

    def let_go(self, worker):
        self.sent |= {(worker, number) for number in self.windows[worker].release()}


ENDING = [
    (3, 3, {}, (1, 2), False),
    (4, 2, {}, (2,), True),
    (4, 12, {}, (2,), False),
    (5, 5, {}, (2,), False),
    (4, 4, {"lag": 1}, (2,), True),
    (3, 9, {"warmup_sync_steps": 4}, (), True),
    (3, 3, {"warmup_sync_steps": 2}, (1,), True),
]


@pytest.mark.parametrize(
    ("workers", "stages", "rule", "flush_after", "asked_late", "window"),
    # each order of stages and each window; the two largest are exhaustive
    few_of([(*case, window) for case in ENDING for window in (1, 2, 3)], 0, 1, 2, 4, 12, 16, 20),
)
def test_workers_in_any_order_end(workers, stages, rule, flush_after, asked_late, window):
    schedule = CyclicSchedule(workers, stages, **rule)
    check_links(schedule, 4, flush_after, asked_late=asked_late)
    for seed in range(20):
        assert Workers(schedule, 4, flush_after, asked_late, window, seed).carry_out(), seed


def drawn(seed):
    """A schedule whose links send in an order that is drawn, the further from the right one the greater the seed."""

    class AnyUrgency(CyclicSchedule):
        def urgency(self, source, kind, stage, step, flushed_at=0):
            late = random.Random(f"{seed} {source} {kind} {stage} {step}").random() * seed / 2
            return flushed_at, super().urgency(source, kind, stage, step)[1] + int(late)

    return AnyUrgency(3, 3)


def test_where_an_order_is_proven_no_window_stops_and_some_others_do():
    proven, stopped = 0, 0
    for seed in range(40):
        schedule = drawn(seed)
        ends = [Workers(schedule, 3, (2,), False, window=1, seed=each).carry_out() for each in range(10)]
        try:
            check_links(schedule, 3, (2,))
        except ScheduleError:
            stopped += not all(ends)
        else:
            proven += 1
            assert all(ends), seed
    assert proven > 2
    assert stopped > 2
