"""Where the host runs ahead of a device, the profiler's times are the device's, and it waits for nothing in a step."""

import pytest
import torch
import torch.distributed as dist
from support.device_time import DeviceTime
from support.processes import start_ranks

from lightning_comm.callbacks.comm_profiler.session import Session
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.rank_profile import RankProfile
from lightning_comm.instruments import clocks
from lightning_comm.instruments import collectives as watching
from lightning_comm.ondevice import device_clock
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.transport import recording
from lightning_comm.transport.recording import Recorder

HEADER = {"rank": 0, "world_size": 2, "warmup_steps": 0}
STEPS = 6


class Loop:
    """A loop on a GPU: the host queues a step in 10 ms, and the device needs more than a second for it."""

    def __init__(self, patch):
        self.device = DeviceTime(patch, device_clock, recording, watching)
        self.device.host(5.0)
        self.steps_done = 0
        self.session = Session(
            RankProfile(HEADER),
            None,
            0,
            lambda: self.steps_done,
            lambda body: body(),
            DeviceClock(torch.device("cuda")),
        )
        self.session.begin_measuring()
        self.known, self.waits = [], 0

    def run(self, step):
        before = self.device.waits
        for _ in range(STEPS):
            self.session.begin_step(None)
            self.known.append(len(self.session.take_new()))
            step()
            self.device.host(0.01)
            self.session.end_batch()
            self.steps_done += 1
        self.waits, first = self.device.waits - before, self.session.profile.kept
        self.ahead_s = self.device.free_s - self.device.now_s
        self.before_the_end = len(first)
        self.session.finish()
        return self


def _figures(loop):
    names = ("duration_s", "comm_s", "exposed_s", "wait_s", "other_s", "timed")
    kept = loop.session.profile.kept
    rows = [tuple(getattr(step, name) for name in names) for step in kept]
    starts = [(step.start_s, step.start_s + step.duration_s) for step in kept]
    return {
        "rows": rows,
        "starts": starts,
        "waits": loop.waits,
        "known": loop.known,
        "ahead_s": loop.ahead_s,
        "observed": (len(recording._observers), len(recording._markers)),
    }


def _runs(rank):
    message = torch.ones(4)
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        loop, plain = Loop(patch), Recorder(CommLedger())

        def blocking():
            loop.device.queue(1.0)
            pending = plain.all_reduce(message, "parameters")
            loop.device.queue(0.5)  # the transfer, for which the stream waits
            pending.wait()
            loop.device.queue(0.25)

        answers["blocking"] = _figures(loop.run(blocking))
    with pytest.MonkeyPatch.context() as patch:
        loop, beside = Loop(patch), Recorder(CommLedger(), beside_compute=True)

        def overlapped():
            pending = beside.all_reduce(message, "parameters")
            loop.device.queue(1.0)  # compute beside the transfer, which takes longer
            arrived = pending.work.wait
            pending.work = type("Work", (), {"wait": lambda self: (arrived(), loop.device.queue(0.5))})()
            pending.wait()
            loop.device.queue(0.25)

        answers["overlapped"] = _figures(loop.run(overlapped))
    with pytest.MonkeyPatch.context() as patch:
        plain_call, under_way = dist.all_reduce, []

        def takes_time(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
            under_way[0].queue(0.5)
            under_way[0].host(1e-4)
            return plain_call(tensor, op, group, async_op)

        patch.setattr(dist, "all_reduce", takes_time)
        loop = Loop(patch)
        under_way.append(loop.device)

        def of_the_user():
            loop.device.queue(1.0)
            dist.all_reduce(message)

        answers["user"] = _figures(loop.run(of_the_user))
    with pytest.MonkeyPatch.context() as patch:
        loop, rings = Loop(patch), Recorder(CommLedger())

        def ring():
            since = loop.device.now_s
            loop.device.host(0.125)
            rings._write("send", "parameters", 16, since, 0.0)
            rings.waited("parameters", since)
            loop.device.queue(1.0)

        answers["ring"] = _figures(loop.run(ring))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clocks, "_can_send_from_the_host", lambda: False)
        group = clocks.group_on_the_host(None)
        ledger = CommLedger()
        point = clocks.compare_clocks(ledger, group)
        answers["own group"] = group is not None, point, clocks.gather_json(rank, None, ledger, group=group)
        dist.destroy_process_group(group)
    answers["default group"] = clocks.group_on_the_host(None)
    return answers


@pytest.fixture(scope="module")
def answers():
    return start_ranks(_runs, world_size=2)


@pytest.mark.parametrize("name", ["blocking", "overlapped", "user", "ring"])
def test_within_steps_the_host_waits_for_nothing_and_is_far_ahead_at_the_end(answers, name):
    for rank in answers:
        assert rank[name]["waits"] == 0
        assert rank[name]["ahead_s"] > 4
        assert rank[name]["known"] == [0] * STEPS, "no step is over for the device while the host queues"
        assert rank[name]["observed"] == (0, 0), "and nothing is left of it"


@pytest.mark.parametrize(("name", "step_s"), [("blocking", 1.75), ("overlapped", 1.75), ("user", 1.5), ("ring", 1.0)])
def test_steps_last_as_long_as_on_the_device_and_follow_each_other(answers, name, step_s):
    for rank in answers:
        rows, starts = rank[name]["rows"], rank[name]["starts"]
        assert len(rows) == STEPS
        assert [row[0] for row in rows[1:-1]] == pytest.approx([step_s] * (STEPS - 2))
        assert starts[0][0] == 5.0
        assert [end for _, end in starts[:-1]] == pytest.approx([start for start, _ in starts[1:]])


def test_a_message_that_the_stream_waits_for_has_the_streams_time(answers):
    for rank in answers:
        for row in rank["blocking"]["rows"]:
            assert row[1:4] == pytest.approx((0.5, 0.5, 0.0))
            assert row[5] is True


def test_a_call_of_the_users_has_the_streams_time(answers):
    for rank in answers:
        for row in rank["user"]["rows"]:
            assert row[4] == pytest.approx(0.5)
            assert row[1] == 0.0


def test_of_a_message_beside_compute_that_part_is_exposed_for_which_compute_waits(answers):
    for rank in answers:
        for row in rank["overlapped"]["rows"][1:]:
            assert row[1:3] == pytest.approx((1.5, 0.5))


def test_a_step_whose_messages_only_the_host_has_timed_is_not_timed(answers):
    for rank in answers:
        assert [row[5] for row in rank["ring"]["rows"]] == [False] * STEPS
        assert {row[1] for row in rank["ring"]["rows"]} == {0.0}


def test_clocks_are_compared_on_the_host_also_where_the_default_group_is_one_of_gpus(answers):
    for number, rank in enumerate(answers):
        own, point, gathered = rank["own group"]
        assert own
        assert abs(point.offset_s) <= point.error_s < 0.5
        assert gathered == [0, 1]
        assert rank["default group"] is None, f"rank {number} needs no other one"
