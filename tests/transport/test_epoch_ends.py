"""Ranks that compare where they end an epoch, through a store: alike, apart, late, and when one never comes."""

import threading

import pytest
import torch.distributed as dist

from lightning_comm.transport.agreement import Agreement, PeerFailure
from lightning_comm.transport.epoch_ends import EpochEnds


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


def test_a_rank_that_never_comes_is_waited_for_until_the_time_out():
    with pytest.raises(RuntimeError, match="Timed out waiting for 1 other ranks"):
        end_epoch(ends(dist.HashStore(), 0, timeout_s=0.2), 2, 2)
