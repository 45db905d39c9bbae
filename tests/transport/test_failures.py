"""Ranks as objects over one store: who does not answer is named alike by all, and who answers is not."""

import threading
import time

import pytest
import torch.distributed as dist

from lightning_comm.transport import failures as peers_module
from lightning_comm.transport.failure_messages import LostConnectionError, PeerFailure, store_text, verdict
from lightning_comm.transport.failures import Peers, is_lost_connection

LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40374")
LATE = RuntimeError("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv")


@pytest.fixture
def ranks():
    made = []

    def make(*present, world_size=3, timeout_s=60.0):
        store = dist.HashStore()
        made.extend(
            Peers(store, rank, world_size, "test", timeout_s, steps_done=lambda r=rank: 10 + r) for rank in present
        )
        return made

    yield make
    for each in made:
        each.close()


def all_ask(ranks, error):
    """Let several ranks ask at once; return what they are told."""
    told = [None] * len(ranks)

    def ask(k):
        told[k] = ranks[k].who_failed(error)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_ranks_name_the_one_that_does_not_answer(ranks, monkeypatch):
    monkeypatch.setattr(peers_module, "_GRACE_S", 1.0)
    one, two = all_ask(ranks(0, 2), LOST)
    assert one == two
    assert one.startswith("Rank 1 does not answer.")


def test_a_rank_that_has_reported_is_named_whoever_lost_the_connection_first(ranks):
    zero, one, two = ranks(0, 1, 2)
    one.report("ValueError: boom")
    with pytest.raises(PeerFailure, match=r"^rank 1 failed: ValueError: boom$"), two.first_error_shown():
        raise LOST
    while zero.failure is None:  # until its thread has learnt of it
        time.sleep(0.01)
    with pytest.raises(PeerFailure, match=r"^rank 1 failed: ValueError: boom$"):
        zero.raise_known_failure()


def test_a_rank_that_answers_but_does_not_come_is_named_with_its_step(ranks):
    zero, _ = ranks(0, 1, world_size=2)
    with pytest.raises(PeerFailure, match="rank 1, at step 11, does not come, although the process answers"):  # noqa: SIM117
        with zero.first_error_shown("a barrier"):
            raise LATE


def test_an_error_that_is_no_lost_connection_goes_on_as_it_is(ranks):
    (zero,) = ranks(0, world_size=2)
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught, zero.first_error_shown():
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, PeerFailure)


def test_who_leaves_waits_for_the_others_and_knows_whether_they_have_left(ranks, monkeypatch):
    monkeypatch.setattr(peers_module, "_LEAVE_S", 0.3)
    zero, one = ranks(0, 1, world_size=2)
    assert not zero.part()
    assert one.part()
    assert zero.part()


def test_the_watchdog_ends_only_waits_that_are_overdue_for_a_rank_that_never_answered(ranks, monkeypatch):
    for name, seconds in {"_OVERDUE_S": 1.0, "_LOOK_S": 0.05, "_LONGEST_S": 0.1}.items():
        monkeypatch.setattr(peers_module, name, seconds)
    ended = threading.Event()
    monkeypatch.setattr(Peers, "_end", lambda self, wait, text: (ended.text.append(text), ended.set()))
    ended.text = []
    zero, one = ranks(0, 1, world_size=2, timeout_s=0.5)
    with zero.first_error_shown("a barrier"):
        assert not ended.wait(2.0)  # since rank 1 answers
        one.close()  # and even more if it has left in good order
        assert not ended.wait(0.5)
    (lonely,) = ranks(0, world_size=2, timeout_s=0.5)[2:]
    with lonely.first_error_shown("a barrier"):
        assert ended.wait(60.0)
    assert ended.text[0].startswith("Rank 1 does not answer.")


def test_before_the_first_wait_a_rank_is_watched_as_if_it_waited(ranks, monkeypatch):
    for name, seconds in {"_OVERDUE_S": 0.5, "_LOOK_S": 0.05, "_LONGEST_S": 0.1}.items():
        monkeypatch.setattr(peers_module, name, seconds)
    ended = threading.Event()
    monkeypatch.setattr(Peers, "_end", lambda self, wait, text: (ended.text.append((wait.where, text)), ended.set()))
    ended.text = []
    (lonely,) = ranks(0, world_size=2, timeout_s=0.3)
    lonely.begin("the data")
    with lonely.first_error_shown("a broadcast"):
        pass
    assert ended.wait(60.0)
    where, text = ended.text[0]
    assert where == "the data"
    assert text.startswith("Rank 1 does not answer.")
    lonely.end_start()
    assert lonely._wait is None


def test_a_run_whose_store_does_not_answer_is_not_begun():
    class Stopped:
        def clone(self):
            time.sleep(2.0)
            raise dist.DistNetworkError

    peers = Peers(Stopped(), 1, 2, "test", 0.2)
    with pytest.raises(PeerFailure, match="rank 0, which hosts it, is stopped or hangs"):
        peers.begin("the data")
    peers.close(failed=False)


def test_rank_0_stays_after_a_good_run_until_the_others_look_no_more(ranks, monkeypatch):
    for name, seconds in {"_LOOK_S": 0.1, "_STAY_S": 60.0}.items():
        monkeypatch.setattr(peers_module, name, seconds)
    present = ranks(0, 1, 2)
    zero, one, two = present
    present[:] = [one]  # the others are closed here
    looks = []
    look = one._look
    monkeypatch.setattr(one, "_look", lambda: (looks.append(time.monotonic()), look()))
    two.close()
    zero.close(failed=False)
    closed_s = time.monotonic()
    assert one._host_left
    one._closed.wait(2 * peers_module._LOOK_S)
    assert looks
    assert max(looks) < closed_s


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (LOST, True),
        (LATE, True),
        (dist.DistNetworkError("x"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (LostConnectionError("The connection to rank 2 is lost, or nothing came"), True),
        (RuntimeError("The connection to rank 2 is lost, or nothing came"), False),
        (RuntimeError("DataLoader timed out waiting for worker 3"), False),
        (RuntimeError("database connection closed"), False),
        (PeerFailure(f"Rank 0 has lost its connection to another rank. ({LOST})"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_of_connections_are_told_from_others(error, lost):
    assert is_lost_connection(error) == lost


def test_where_nobody_is_to_blame_nobody_is_named():
    waiting = {0: {"waits": "a barrier", "step": 3}, 1: {"waits": "a broadcast", "step": 3}}
    text = verdict(0, [], waiting, str(LOST))
    assert "although all ranks run (rank 0 in a barrier, rank 1 in a broadcast)" in text
    assert "killed" not in text


def test_a_rank_that_nobody_answers_says_that_it_may_be_cut_off_itself():
    assert "Or rank 0, which says this, is cut off itself" in verdict(0, [1, 2], {0: {"waits": "", "step": 3}}, "")
    assert "cut off itself" not in verdict(0, [2], {0: {"waits": "", "step": 3}, 1: {"waits": "", "step": 3}}, "")


def test_a_rank_that_has_left_is_named_with_its_step():
    text = verdict(0, [], {0: {"waits": "a barrier", "step": 30}, 1: {"left": True, "step": 20}}, str(LATE))
    assert text.startswith("Rank 1 has left the run already, at step 20,")


def test_the_host_of_the_store_is_named_for_what_it_is():
    assert "rank 0, which hosts it, has ended" in store_text(2, ended=True, on_rank_0=True)
    assert "is stopped or hangs, or the network between it and rank 2 is cut" in store_text(
        2, ended=False, on_rank_0=True
    )
    agent = store_text(2, ended=True, on_rank_0=False)
    assert "The agent that launched the first node hosts it" in agent
    assert "rank 0" not in agent
