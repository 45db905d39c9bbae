"""Ranks as threads over one store: they agree on a step that none has passed, and nobody waits forever."""

import itertools
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_comm.transport import stop_protocol as agreement_module
from lightning_comm.transport.stop_protocol import Agreement, PeerFailure, RankPosition, meeting_step


class Rank(threading.Thread):
    """Steps until a decision is reached, then to the step that it names."""

    def __init__(self, store, rank, world_size, step_time_s, *, before_step=None, requests=None, limit=4000, **options):
        super().__init__(daemon=True)
        self.agreement = Agreement(store, rank, world_size, "test", **options)
        self.rank, self.step_time_s, self.limit = rank, step_time_s, limit
        self.before_step = before_step or (lambda rank, step: None)
        self.requests = requests or {}
        self.step, self.decision, self.error, self.seconds = 0, None, None, None

    def run(self):
        started = time.monotonic()
        try:
            while self.step < self.limit:
                self.before_step(self.rank, self.step)
                time.sleep(self.step_time_s)
                self.step += 1
                if self.step in self.requests:
                    self.agreement.request(*self.requests[self.step])
                decision = self.agreement.poll(RankPosition(self.step, 0, self.step_time_s))
                if decision and (decision.at_step is None or decision.at_step <= self.step):
                    self.decision = decision
                    break
        except Exception as error:
            self.error = error
        self.seconds = time.monotonic() - started


def finish(ranks, timeout_s=30):
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout_s)
        assert not rank.is_alive(), f"rank {rank.rank} still runs, at step {rank.step}"
        assert rank.error is None, rank.error
    return ranks


@pytest.mark.parametrize(
    "step_times",
    [
        pytest.param((0.001, 0.001), marks=pytest.mark.exhaustive),
        (0.001, 0.004, 0.002),
        (0.05, 0.02),
        pytest.param((0.3, 0.5), marks=pytest.mark.exhaustive),
    ],
)
def test_ranks_that_run_apart_meet_at_one_step_that_none_has_passed(step_times):
    store = dist.HashStore()
    n = len(step_times)
    ranks = finish(
        [
            Rank(store, r, n, t, requests={3: ("stop", "enough")} if r == n - 1 else None)
            for r, t in enumerate(step_times)
        ]
    )
    assert {rank.decision for rank in ranks} == {ranks[0].decision}
    assert ranks[0].decision.reason == f"rank {n - 1}: enough"
    assert {rank.step for rank in ranks} == {ranks[0].decision.at_step}
    assert max(rank.seconds for rank in ranks) < 5


def test_a_rank_that_would_need_too_long_stops_where_it_stands():
    store = dist.HashStore()
    fast = Rank(store, 0, 2, 0.001, requests={900: ("stop", "enough")}, catch_up_limit_s=1.0)
    slow = Rank(store, 1, 2, 0.05, catch_up_limit_s=1.0)
    finish([fast, slow])
    assert fast.decision == slow.decision
    assert fast.decision.at_step is None
    assert slow.step < fast.step / 10


def test_ranks_that_a_collective_of_the_users_keeps_in_step_agree_too():
    barrier = threading.Barrier(2)
    store = dist.HashStore()

    def lockstep(rank, step):
        barrier.wait(20)

    ranks = [Rank(store, r, 2, 0.003, before_step=lockstep, requests={40 * r: ("stop", "x")}) for r in range(2)]
    finish(ranks)
    assert ranks[0].step == ranks[1].step == ranks[0].decision.at_step
    assert max(rank.seconds for rank in ranks) < 6


def test_a_rank_waiting_in_a_collective_for_a_slower_one_does_not_block_the_agreement_for_ever():
    """The fast rank sits in a barrier at step 30 when the slow one, at step 20, is asked to stop."""
    barrier = threading.Barrier(2)
    store = dist.HashStore()

    def meet_at_30(rank, step):
        if step == 30:
            barrier.wait(25)

    fast = Rank(store, 0, 2, 0.001, before_step=meet_at_30, patience_s=0.3)
    slow = Rank(store, 1, 2, 0.02, before_step=meet_at_30, requests={20: ("stop", "x")}, patience_s=0.3)
    finish([fast, slow])
    assert fast.step == slow.step == fast.decision.at_step
    assert fast.step >= 30


def test_a_rank_blocked_in_a_synchronisation_counts_as_being_at_its_end():
    store = dist.HashStore()
    fast = Agreement(store, 0, 2, "test", catch_up_limit_s=1.0)
    slow = Rank(store, 1, 2, 0.05, requests={5: ("stop", "x")}, catch_up_limit_s=1.0)
    slow.start()
    deadline = time.monotonic() + 10
    while fast.poll_while_blocked(RankPosition(1000, 0, 0.001)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    slow.join(10)
    assert slow.decision == fast.decision
    assert fast.decision.at_step is None  # 1000 steps of 50 ms would be too long


def test_a_position_taken_back_is_not_decided_on():
    store = dist.HashStore()
    one, two = (Agreement(store, r, 2, "test", patience_s=0.05) for r in range(2))
    one.request("stop", "x")
    assert one.poll(RankPosition(5, 0, 1.0)) is None  # two is silent, so one takes its position back
    assert two.poll(RankPosition(4, 0, 1.0)) is None
    results = []
    thread = threading.Thread(target=lambda: results.append(one.poll(RankPosition(9, 0, 1.0), force=True)))
    thread.start()
    while not results:
        two.poll(RankPosition(7, 0, 1.0), force=True)
    thread.join()
    decision = two.poll(RankPosition(7, 0, 1.0), force=True)
    assert decision == results[0]
    assert decision.at_step == 9


def test_the_next_request_is_agreed_on_after_the_first_is_settled():
    store = dist.HashStore()
    ranks = [Agreement(store, r, 2, "test") for r in range(2)]
    ranks[0].request("checkpoint", "time")
    ranks[1].request("stop", "enough")
    kinds = []
    for _ in range(2):
        decisions = [None, None]

        def ask(r, decisions=decisions):
            while decisions[r] is None:
                decisions[r] = ranks[r].poll(RankPosition(3, 0, 1.0), force=True)

        threads = [threading.Thread(target=ask, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert decisions[0] == decisions[1]
        kinds.append(decisions[0].kind)
        for rank in ranks:
            rank.settled()
    assert sorted(kinds) == ["checkpoint", "stop"]
    assert not any(rank.urgent for rank in ranks)


def test_a_failure_reaches_the_others_with_its_message():
    store = dist.HashStore()
    one, two = (Agreement(store, r, 2, "test", poll_interval_s=0.0) for r in range(2))
    one.report_failure("ValueError: no such file")
    two.report_failure("RuntimeError: comes later")
    with pytest.raises(PeerFailure, match="rank 0 failed: ValueError: no such file"):
        two.poll(RankPosition(1, 0, 1.0))


def test_a_store_that_is_gone_is_reported_as_the_end_of_rank_0():
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    guest = dist.TCPStore("127.0.0.1", host.port, is_master=False, timeout=timedelta(seconds=5))
    agreement = Agreement(guest, 1, 2, "test", poll_interval_s=0.0)
    assert agreement.poll(RankPosition(1, 0, 1.0)) is None
    del host
    with pytest.raises(PeerFailure, match="rank 0, which hosts it, has ended"):
        agreement.poll(RankPosition(2, 0, 1.0), force=True)


class Link:
    """A store whose answers take a while on a clock that only it and the test move."""

    def __init__(self, answer_s):
        self.answer_s, self.now_s, self.looks = answer_s, 0.0, []

    def monotonic(self):
        return self.now_s

    def check(self, keys):
        self.looks.append(self.now_s)
        self.now_s += self.answer_s
        return False


@pytest.mark.parametrize(("answer_s", "apart_s"), [(0.0, 0.2), (0.002, 0.2), (0.03, 3.0), (0.5, 4.0)])
def test_looks_take_a_hundredth_of_the_time_where_answers_are_slow(monkeypatch, answer_s, apart_s):
    link = Link(answer_s)
    monkeypatch.setattr(agreement_module, "time", link)
    agreement = Agreement(link, 0, 2, "test", poll_interval_s=0.2)
    while len(link.looks) < 4:
        agreement.poll(RankPosition(1, 0, 0.1))
        link.now_s += 0.001
    for one, two in itertools.pairwise(link.looks):
        assert two - one == pytest.approx(apart_s, abs=0.0021)


@pytest.mark.parametrize(
    ("steps", "step_time_s", "expected"),
    [((10, 7), 0.1, 10), ((100, 7), 0.1, None), ((9, 7), 60.0, 9), ((10, 7), 60.0, None)],
)
def test_the_meeting_step_is_the_furthest_unless_catching_up_takes_too_long(steps, step_time_s, expected):
    positions = [RankPosition(step, 0, step_time_s) for step in steps]
    assert meeting_step(positions, 5.0, may_stand=True) == expected
    assert meeting_step(positions, 5.0, may_stand=False) == max(steps)


def test_ranks_in_different_epochs_always_catch_up():
    assert meeting_step([RankPosition(100, 1, 1.0), RankPosition(7, 0, 1.0)], 5.0, may_stand=True) == 100
