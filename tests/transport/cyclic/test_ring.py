"""Sums travel round the ring in the order of the path, owners update, and new versions reach every rank."""

import functools
import itertools
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.grids import few_of
from support.processes import start_ranks

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.cyclic.send_window import SendWindow
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.cyclic import send_queue
from lightning_comm.transport.cyclic.messages import STATUS_NUMBERS, StageLayout
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.recording import Recorder, another_group

STEPS = 4


def gradient(rank, stage, step):
    generator = torch.Generator().manual_seed(1000 * rank + 10 * stage + step)
    return torch.randn(stage + 2, generator=generator, dtype=torch.float64)


def version(schedule, stage, step):
    """The mean, of shares that are added in the order of the path; the owner adds the step to it."""
    first, *others = schedule.path(stage)
    mean = gradient(first, stage, step) / schedule.workers
    for rank in others:
        mean = mean + gradient(rank, stage, step) / schedule.workers
    return mean + step


def _ring(rank, world_size, stages, in_any_order, late, fault=False):
    schedule, ledger, updated = CyclicSchedule(world_size, stages), CommLedger(), []

    def update(step, stage, message):
        if fault and rank == 0:
            raise ValueError("boom")
        updated.append((step, stage))
        message.parts[0].add_(step)

    lanes = [Recorder(ledger, another_group(timedelta(seconds=20)), hold=True) for _ in range(2)]
    layouts = [StageLayout([gradient(0, stage, 0)]) for stage in range(stages)]
    ring = CyclicRing(schedule, layouts, update, *lanes, torch.device("cpu"), in_any_order=in_any_order)
    for step in range(STEPS):
        ring.begin_step(step)
        for stage in schedule.order():
            if rank == late:
                time.sleep(0.01)
            status = torch.zeros(STATUS_NUMBERS, dtype=torch.float64)
            status[:2] = torch.tensor([1.0, rank])
            ring.hand_over(stage, [gradient(rank, stage, step)], status)
        for stage in range(stages):
            message = ring.take(stage, step + 1, lambda: None)
            assert torch.equal(message.parts[0], version(schedule, stage, step)), (rank, stage, step)
            ring.release(stage, step + 1)
        ring.flushed(step + 1)
        rows = ring.status(step + 1, range(stages), lambda: None)
        assert all(row[:2] == [world_size, sum(range(world_size))] for row in rows)
    ring.close()
    for lane in lanes:
        lane.write_held()
    stage_bytes = [layout.payload_bytes for layout in layouts]
    sent = ledger.payload_bytes("gradients") + ledger.payload_bytes("parameters")
    assert sent == STEPS * schedule.sent_bytes(rank, stage_bytes)
    assert sorted(updated) == [(step, stage) for step in range(STEPS) for stage in sorted(schedule.owned(rank))]


RINGS = [(1, 2, -1), (2, 2, 0), (3, 6, 1), (4, 4, -1), (4, 2, 3)]


@pytest.mark.parametrize(
    ("world_size", "stages", "late", "in_any_order"),
    few_of([(*ring, in_any_order) for ring in RINGS for in_any_order in (True, False)], 0, 3, 4, 5, 9),
)
def test_every_version_is_the_owners_update_of_the_mean(world_size, stages, late, in_any_order):
    start_ranks(_ring, world_size, stages, in_any_order, late, world_size=world_size, timeout_s=40)


def _one_at_a_time(rank, world_size, stages, at_once, late):
    with mock.patch.object(send_queue, "SendWindow", functools.partial(SendWindow, at_once, small_bytes=0)):
        _ring(rank, world_size, stages, True, late)


WINDOWED = [(3, 3, 0), (3, 9, 1), (4, 8, 2), (4, 2, -1), (5, 15, 4)]


@pytest.mark.parametrize(
    ("world_size", "stages", "late", "at_once"),
    few_of([(*ring, at_once) for ring in WINDOWED for at_once in (1, 2)], 2, 7),
)
def test_messages_that_wait_for_the_link_arrive_all_the_same(world_size, stages, late, at_once):
    start_ranks(_one_at_a_time, world_size, stages, at_once, late, world_size=world_size, timeout_s=60)


def _asked_for(rank):
    """Return for how many messages of each kind a rank has asked before and after it handed a gradient over."""
    asked, schedule = [], CyclicSchedule(2, 4)

    class Listening(Recorder):
        def receive(self, memory, source, *, tag):
            asked.append("gradients" if tag < schedule.stages else "parameters")
            return super().receive(memory, source, tag=tag)

    lanes = [Listening(CommLedger(), another_group(timedelta(seconds=20)), hold=True) for _ in range(2)]
    layouts = [StageLayout([gradient(0, stage, 0)]) for stage in range(4)]
    ring = CyclicRing(schedule, layouts, lambda *_: None, *lanes, torch.device("cpu"), in_any_order=False)
    counts = []
    ring.begin_step(0)
    for stage in schedule.order():
        time.sleep(0.2)  # what is asked for too early is asked for meanwhile
        counts.append(len(asked))
        ring.hand_over(stage, [gradient(rank, stage, 0)], torch.zeros(STATUS_NUMBERS, dtype=torch.float64))
        dist.barrier()
    for stage in range(4):
        ring.take(stage, 1, lambda: None)
        ring.release(stage, 1)
    ring.close()
    return counts, asked


def test_where_order_is_kept_nothing_is_asked_for_that_this_ranks_gradient_is_still_missing_in():
    for counts, asked in start_ranks(_asked_for, world_size=2):
        assert counts == [0, 1, 2, 3]  # one message a stage: the sum at its owner, the version at the other rank
        assert sorted(asked) == ["gradients"] * 2 + ["parameters"] * 2


def _alone(rank):
    with pytest.raises(ValueError, match="boom"):
        _ring(rank, 1, 1, True, -1, fault=True)


def test_what_goes_wrong_in_a_lane_is_raised_where_compute_waits():
    start_ranks(_alone, world_size=1)


def _slow_link_at_a_flush(rank, world_size):
    """Rank 1's link to the next is slow, until that rank's next step has begun: two messages are not acknowledged."""
    schedule, held, released = CyclicSchedule(world_size, 12), [], []
    slow = {schedule.number("parameters", stage, 0) for stage in (9, 10)}
    arrived = SendWindow.arrived

    def arrived_late(window, number):
        if rank == 1 and number in slow and not released:
            held.append(number)
        else:
            arrived(window, number)

    with mock.patch.object(SendWindow, "arrived", arrived_late):
        _two_steps(rank, schedule, held, released, arrived)


def _two_steps(rank, schedule, held, released, arrived):
    """Let the messages go that a slow link has held once the second step is under way; wait for everything."""
    ledger = CommLedger()
    lanes = [Recorder(ledger, another_group(timedelta(seconds=20)), hold=True) for _ in range(2)]
    large = torch.ones(2**15)
    ring = CyclicRing(schedule, [StageLayout([large])] * 12, lambda *_: None, *lanes, torch.device("cpu"))
    for step in range(2):
        ring.begin_step(step)
        for stage in schedule.order():
            ring.hand_over(stage, [large], torch.zeros(STATUS_NUMBERS, dtype=torch.float64))
        if step == 1 and rank == 1:
            released.append(True)
            assert len(held) == 2, "without a link that is full this shows nothing"
            queue = ring._neighbours.queue
            while not queue._departures.keys() >= {schedule.number("gradient", stage, 1) for stage in (9, 10, 11)}:
                time.sleep(0.01)
            with queue._lock:
                for number in held:
                    arrived(queue._window, number)
                queue._start_released()
        waited = itertools.count()

        def listen(waited=waited):
            assert next(waited) < 15, f"rank {rank} waits for good"

        for stage in range(12):
            ring.take(stage, step + 1, listen)
            ring.release(stage, step + 1)
        ring.flushed(step + 1)
    ring.close()


def test_a_flush_ends_where_the_link_to_the_next_rank_is_slow():
    """Gradients of the next step are more urgent than old versions, for which a rank still in the flush waits."""
    start_ranks(_slow_link_at_a_flush, 4, world_size=4, timeout_s=60)
