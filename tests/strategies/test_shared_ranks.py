"""Cases that share their ranks have the answers that each has by itself, whatever becomes of the others."""

import os
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.shared_ranks import SharedRanks


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
