"""Functions that share their ranks answer as in ranks of their own, whatever became of those before them."""

import logging
import os
import random
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.processes import launch, start_ranks
from support.shared_ranks import SharedRanks

from lightning_comm.core import ledger


def _draws(rank, add):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.full((), float(rank + add))
    dist.all_reduce(total)
    return float(total), float(torch.rand(())), float(np.random.rand()), random.random(), os.getpid()


def _fails(rank):
    if rank == 1:
        raise ValueError("boom")
    dist.barrier()  # for a rank that never comes


def _dies(rank):
    if rank == 0:
        os._exit(3)


def _hangs(rank):
    time.sleep(60)


def test_a_case_that_fails_is_named_and_the_others_have_their_answers():
    runs = SharedRanks(
        {"one": (_draws, 0), "fails": (_fails,), "two": (_draws, 5), "three": (_draws, 5), "dies": (_dies,)},
        world_size=2,
    )
    (_, of_1) = runs.outcomes("dies")
    assert runs.outcomes("dies")[0] == (None, "ended with status 3 and without an answer")
    assert of_1 == (None, None)
    assert [answer[0] for answer in runs["one"]] == [1, 1]
    assert [answer[0] for answer in runs["two"]] == [11, 11]
    assert runs["two"] == runs["three"], "in the same processes, and from the same random states"
    assert runs["one"][0][1:3] == runs["two"][0][1:3]  # a fork seeds `random` anew
    assert runs["one"][0][4] != runs["two"][0][4], "those behind a failure have new processes"
    with pytest.raises(pytest.fail.Exception, match=r"case 'fails': rank 0 failed:"):
        runs["fails"]
    assert "ValueError: boom" in runs.outcomes("fails")[1][1]


def test_a_case_that_hangs_is_ended_and_said_to_have_no_answer():
    runs = SharedRanks({"hangs": (_hangs,)}, world_size=1, timeout_s=0.5)
    assert runs.outcomes("hangs") == [(None, "no answer within 0.5 s")]


def _pid(rank):
    return os.getpid()


def _leaves_a_function(rank):
    ledger.CommLedger.payload_bytes = lambda *_: 0
    return os.getpid()


def _leaves_a_thread(rank):
    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
    return os.getpid()


def _leaves_a_signal(rank):
    signal.signal(signal.SIGTERM, lambda *_: None)
    return os.getpid()


def _leaves_silence(rank):
    logging.disable(logging.CRITICAL)
    return os.getpid()


def _leaves_a_type(rank):
    torch.set_default_dtype(torch.float64)
    return os.getpid()


@pytest.mark.parametrize(
    "leaves", [_leaves_a_function, _leaves_a_thread, _leaves_a_signal, _leaves_silence, _leaves_a_type]
)
def test_ranks_stay_as_long_as_nothing_is_left_in_them(leaves):
    first, again = (launch(_pid, world_size=1) for _ in range(2))
    assert first == again == launch(leaves, world_size=1)
    assert launch(_pid, world_size=1) != first


def test_ranks_are_new_where_the_test_has_replaced_something_and_when_it_is_back(monkeypatch):
    first = launch(_pid, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(ledger.CommLedger, "payload_bytes", lambda *_: 7)
        (answer,) = launch(lambda rank: (ledger.CommLedger().payload_bytes(), os.getpid()), world_size=1)
        assert answer[0] == 7
        assert answer[1] != first[0]
    assert launch(lambda rank: ledger.CommLedger().payload_bytes(), world_size=1) == [0]


def test_what_cannot_be_sent_is_called_in_new_ranks():
    lock, first = threading.Lock(), launch(_pid, world_size=1)
    assert launch(lambda rank: (lock.locked(), os.getpid() != first[0]), world_size=1) == [(False, True)]


def test_a_function_begins_outside_of_groups_in_the_folder_and_the_environment_of_the_test(tmp_path, monkeypatch):
    def begins(rank):
        warnings.warn("once", stacklevel=1)
        return dist.is_initialized(), os.getcwd(), os.environ.get("SET_BY_TEST"), os.environ.get("SET_BY_RANK")

    def leaves(rank):
        os.environ["SET_BY_RANK"] = "1"
        os.chdir("/")
        return os.getpid()

    ranks = start_ranks(leaves, world_size=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SET_BY_TEST", "1")
    assert launch(begins, world_size=2) == [(False, str(tmp_path), "1", None)] * 2
    assert launch(_pid, world_size=2) == ranks


def test_a_warning_is_shown_to_each_function_that_gives_it():
    def warns(rank):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for _ in range(2):
                warnings.warn("once", stacklevel=1)
        return len(shown), os.getpid()

    assert launch(warns, world_size=1) == launch(warns, world_size=1)
