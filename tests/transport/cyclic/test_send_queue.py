"""What is needed first is sent first, and no message overtakes those that are given to the socket already."""

import threading
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from support.processes import start_ranks

from lightning_comm.core.cyclic.schedule import TRANSFER_KINDS, CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.cyclic.send_queue import UrgentFirst
from lightning_comm.transport.recording import Recorder, another_group

LARGE = 2**20


class ByHand:
    """A recorder whose acknowledgements arrive when the test says so."""

    def __init__(self, rank=0):
        self.rank, self.expected = rank, []

    def receive(self, number, source, *, tag):
        assert source == self.rank + 1, "acknowledgements are of the next rank"
        arrived = threading.Event()
        self.expected.append((number, arrived))
        return arrived

    def wait_for(self, arrived, source):
        assert source == self.rank + 1
        arrived.wait()  # in a daemon thread


class Sent:
    def wait(self):
        pass


def _link(schedule, rank=0):
    recorder, sent = ByHand(rank), []
    link = UrgentFirst(schedule, recorder, tag=0)
    link.begin_step()
    threading.Thread(target=link.handle_acknowledgements, args=(0,), daemon=True).start()

    def send(kind, stage, step, message_bytes=LARGE):
        def start():
            sent.append((kind, stage, step))
            return Sent()

        return link.send(kind, stage, step, message_bytes, start)

    def acknowledge(kind, stage, step, departure):
        """Let the acknowledgement of a message come, and be handled."""
        into, arrived = recorder.expected.pop(0)
        into.fill_(CyclicSchedule(4, 12).number(kind, stage, step))
        arrived.set()
        assert departure._arrived.wait(10)

    return send, acknowledge, sent, link


def test_two_large_messages_go_at_once_and_then_the_most_urgent():
    send, acknowledge, sent, _ = _link(CyclicSchedule(workers=4, stages=12, rule="v1"))
    first = send("gradient", 1, 0)
    for stage in (2, 9, 7, 5, 8):
        send("gradient", stage, 0)
    assert sent == [("gradient", 1, 0), ("gradient", 2, 0)]
    assert not first.is_over()
    acknowledge("gradient", 1, 0, first)
    assert first.is_over()
    assert sent[2:] == [("gradient", 5, 0)]  # under v1 lower stages are needed earlier


def test_small_messages_do_not_wait():
    send, _, sent, _ = _link(CyclicSchedule(workers=4, stages=12))
    for stage in reversed(range(6)):
        send("gradient", stage, 0, message_bytes=1000)
    assert len(sent) == 6


def test_what_is_more_urgent_than_all_on_the_way_passes():
    """Otherwise two messages to a rank that does not take them yet could hold up the one for which it waits itself."""
    send, _, sent, _ = _link(CyclicSchedule(workers=4, stages=12))
    for stage in (3, 4, 5):
        send("gradient", stage, 1)
    assert len(sent) == 2
    send("parameters", 11, 0)
    assert sent[2:] == [("parameters", 11, 0)]
    send("gradient", 6, 1)
    assert len(sent) == 3


def test_what_is_sent_behind_a_flush_waits_for_all_from_before_it():
    """A rank that waits for the newest version at a flush asks for nothing of the next step."""
    schedule = CyclicSchedule(workers=4, stages=12)
    assert schedule.urgency(1, "gradient", 11, 1) < schedule.urgency(1, "parameters", 0, 0)  # without the flush
    send, acknowledge, sent, link = _link(schedule, rank=1)
    first = send("parameters", 9, 0)
    send("parameters", 10, 0)
    send("parameters", 0, 0)
    link.flushed_at = 1
    send("gradient", 11, 1)
    assert len(sent) == 2
    acknowledge("parameters", 9, 0, first)
    assert sent[2:] == [("parameters", 0, 0)]


def _between_ranks(rank, world_size):
    assert dist.get_world_size() == world_size
    schedule, ledger = CyclicSchedule(world_size, world_size, rule="v1"), CommLedger()
    recorder = Recorder(ledger, another_group(timedelta(seconds=20)), hold=True)
    link = UrgentFirst(schedule, recorder, tag=99)
    for step in range(3):
        link.begin_step()
        acknowledgements = threading.Thread(target=link.handle_acknowledgements, args=(step,))
        acknowledgements.start()
        departures, receiving = [], []
        for stage in range(world_size):
            for kind in TRANSFER_KINDS:
                tag = 2 * stage + (kind == "gradient")
                if schedule.receives(rank, stage, kind):
                    memory = torch.empty(LARGE, dtype=torch.uint8)
                    work = recorder.receive(memory, (rank - 1) % world_size, tag=tag)
                    receiving.append((kind, stage, memory, work))
                if schedule.sends(rank, stage, kind):
                    memory = torch.full((LARGE,), 10 * step + tag, dtype=torch.uint8)
                    start = partial(recorder.send, memory, schedule.after(rank), "gradients", LARGE, tag=tag, step=step)
                    departures.append(link.send(kind, stage, step, LARGE, start))
        for kind, stage, memory, work in receiving:
            work.wait()
            assert bool((memory == 10 * step + 2 * stage + (kind == "gradient")).all())
            link.acknowledge(kind, stage, step)
        for departure in departures:
            departure.wait()
        acknowledgements.join()
    link.close()
    recorder.write_held()
    received = 3 * sum(schedule.receives(rank, stage, kind) for stage in range(world_size) for kind in TRANSFER_KINDS)
    assert ledger.payload_bytes("control") == 8 * received


def test_between_ranks_all_arrive_and_each_is_acknowledged():
    start_ranks(_between_ranks, 4, world_size=4, timeout_s=60)
