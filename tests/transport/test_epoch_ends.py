"""Ranks that compare where they end an epoch, through a store: alike, apart, late, and when one never comes."""

import threading

import pytest
import torch.distributed as dist

from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.stop_protocol import Agreement, PeerFailure


def ends(store, rank, *, timeout_s=30.0):
    agreement = Agreement(store, rank, 2, "run")
    found = EpochEnds(store, rank, 2, "run", "Strategy", agreement, lambda: None, timeout_s)
    found.needed = True
    return found


def end_epoch(found, batches, steps):
    for number in range(1, batches + 1):
        found.begin_batch(0, number)
    found.end_epoch(0, steps)
    found.wait(lambda: False)


def checkpoint(found, batches, steps):
    found._agreement.raise_peer_failure()
    for number in range(1, batches + 1):
        found.begin_batch(0, number)
    found.meet("a checkpoint", steps, lambda: bool(found._agreement.raise_peer_failure()))


def beside(mine, theirs):
    """Run two calls at the same time; return the errors of both."""
    errors = {}

    def run(rank, call):
        try:
            call()
        except (ValueError, PeerFailure) as error:
            errors[rank] = error

    thread = threading.Thread(target=run, args=(1, theirs))
    thread.start()
    run(0, mine)
    thread.join()
    return errors


def test_ranks_that_end_an_epoch_alike_go_on():
    store, failed = dist.HashStore(), []

    def other():
        try:
            end_epoch(ends(store, 1), 5, 5)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    end_epoch(ends(store, 0), 5, 5)
    thread.join()
    assert not failed


def test_a_rank_that_has_begun_a_further_batch_is_named_on_both():
    store = dist.HashStore()
    longer = ends(store, 1)
    for number in range(1, 4):
        longer.begin_batch(0, number)
    with pytest.raises(ValueError, match=r"rank 0 stopped after 2, .*rank 1 has begun number 3") as caught:
        end_epoch(ends(store, 0), 2, 2)
    with pytest.raises(PeerFailure, match="rank 0 failed: ValueError: Strategy: ranks have different numbers"):
        longer._agreement.raise_peer_failure()
    assert "Trainer(limit_train_batches=2)" in str(caught.value)


def test_a_rank_without_data_is_named_and_no_limit_that_trains_nothing_is_advised():
    store = dist.HashStore()
    ends(store, 1).begin_batch(0, 1)
    with pytest.raises(ValueError, match=r"The data of rank 0 is empty; give every rank data") as caught:
        end_epoch(ends(store, 0), 0, 0)
    assert "limit_train_batches" not in str(caught.value)


class Between:
    """A store in which something happens after rank 0 has looked in vain for the other, and before its next look."""

    def __init__(self, store, happens):
        self._store, self._happens = store, happens

    def __getattr__(self, name):
        return getattr(self._store, name)

    def check(self, keys):
        if keys[0].endswith("/begun/1") and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        return self._store.check(keys)


@pytest.mark.parametrize(("place", "next_batch"), [(end_epoch, (1, 1)), (checkpoint, (0, 3))])
def test_a_rank_that_comes_and_goes_on_between_two_looks_is_not_accused(place, next_batch):
    store, gone_on = dist.HashStore(), []
    other = ends(store, 1)

    def come_and_go_on():
        place(other, 2, 2)  # rank 0 is there already
        other.begin_batch(*next_batch)
        gone_on.append(True)

    place(ends(Between(store, come_and_go_on), 0), 2, 2)
    assert gone_on


@pytest.mark.parametrize(("ends_at", "saves_at"), [(5, 5), (5, 6)])
def test_a_checkpoint_beside_the_end_of_an_epoch_is_an_error_on_both_at_once(ends_at, saves_at):
    store = dist.HashStore()
    shorter, longer = ends(store, 0), ends(store, 1)
    errors = beside(lambda: end_epoch(shorter, ends_at, ends_at), lambda: checkpoint(longer, saves_at, saves_at))
    assert set(errors) == {0} or set(errors) == {0, 1}  # rank 1 may be told when it comes to the place
    text = str(errors[0])
    assert f"rank 0 stopped after {ends_at}, at optimizer step {ends_at}" in text
    assert f"rank 1 stopped after {saves_at}" in text or f"rank 1 has begun number {saves_at}" in text
    assert "Trainer(limit_train_batches=5)" in text


def test_ranks_that_meet_for_different_things_are_told_what_for():
    store = dist.HashStore()
    one, other = ends(store, 0), ends(store, 1)
    other.begin_batch(0, 3)  # as many as the first, which otherwise may be seen in a further batch before it stops
    errors = beside(lambda: checkpoint(one, 3, 3), lambda: other.meet("the end of the run", 3, lambda: False))
    text = str(errors.get(1, errors.get(0)))
    assert "rank 0 stopped after 3, at optimizer step 3, for a checkpoint" in text
    assert "rank 1 stopped after 3, at optimizer step 3, for the end of the run" in text
    assert "must not depend on the rank" in text


def test_a_rank_that_begins_the_next_epoch_past_a_place_is_named():
    store = dist.HashStore()
    other = ends(store, 1)
    other.begin_batch(1, 1)
    with pytest.raises(ValueError, match=r"for a checkpoint; rank 1 has begun number 1 of epoch 1"):
        checkpoint(ends(store, 0), 8, 8)


def test_places_are_counted_anew_after_ranks_have_stopped_at_different_ones():
    store = dist.HashStore()
    ended, other = ends(store, 0), ends(store, 1)
    ended.end_epoch(0, 0)  # and the other is asked to stop before it ends the epoch
    for each in (ended, other):
        each.count_anew()
    errors = beside(lambda: checkpoint(ended, 0, 0), lambda: checkpoint(other, 0, 0))
    assert errors == {}


def test_a_rank_that_never_comes_is_waited_for_until_the_time_out():
    with pytest.raises(RuntimeError, match="Timed out waiting for 1 other ranks"):
        end_epoch(ends(dist.HashStore(), 0, timeout_s=0.2), 2, 2)
