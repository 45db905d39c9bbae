"""Ranks that start late are waited for, however short their collectives' time-out is; one that never comes is named."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.processes import launch, outcomes
from support.training import trainer

from lightning_comm import Cast, CompressedDDPStrategy, CyclicStrategy, FixedPeriod, LocalUpdateStrategy
from lightning_comm.transport.start import all_ranks_started

TIMEOUT = timedelta(seconds=1)
LATE_S = 1.3
STRATEGIES = [
    lambda: LocalUpdateStrategy(FixedPeriod(2), timeout=TIMEOUT),
    lambda: CompressedDDPStrategy(Cast("bf16"), timeout=TIMEOUT),
    lambda: CyclicStrategy(timeout=TIMEOUT),
]


def set_up_with_a_late_rank(rank):
    """Set up each strategy in turn; at last let rank 0 wait in a collective for one that does not come."""
    for make in STRATEGIES:
        if rank == 1:
            time.sleep(LATE_S)
        strategy = trainer(make(), 2).strategy
        began = time.monotonic()
        strategy.setup_environment()
        waited_s = time.monotonic() - began
        strategy.teardown()
        if make is not STRATEGIES[-1]:
            dist.destroy_process_group()
    try:
        if rank == 0:
            dist.all_reduce(torch.ones(1))
        else:
            time.sleep(1.5 * TIMEOUT.total_seconds())
        said = ""
    except RuntimeError as error:
        said = str(error)
    dist.destroy_process_group()  # whose connections are closed
    return waited_s, said


def test_a_time_out_of_a_second_bounds_collectives_and_not_the_start_of_a_process():
    answer, error = outcomes(set_up_with_a_late_rank, world_size=2)[0]
    assert error is None, error
    waited_s, said = answer
    assert waited_s > TIMEOUT.total_seconds()
    assert "Timed out waiting 1000ms" in said


def start(rank, world_size, absent, start_s):
    if rank in absent:
        time.sleep(start_s + 1)
        return ""
    port = int(os.environ["MASTER_PORT"])
    try:
        with all_ranks_started("fit", "127.0.0.1", port, rank, world_size, timeout_s=0.5, start_s=start_s):
            dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=TIMEOUT)
    except TimeoutError as error:
        return str(error)
    return "started"


def test_all_ranks_that_came_say_how_many_did_and_who_did_not():
    came_0, came_1, *_ = launch(start, 4, (2, 3), 0.5, world_size=4)
    assert came_0 == came_1
    must_say = [
        "fit: all 4 ranks must start",
        "2 have come to 127.0.0.1:",
        "ranks 2, 3",
        "num_nodes",
        "devices",
        "timeout",
    ]
    assert [word for word in must_say if word not in came_0] == []


def test_without_rank_0_the_others_say_where_they_looked_for_it():
    _, said = launch(start, 2, (0,), 0.5, world_size=2)
    must_say = ["fit: rank 1 cannot reach rank 0", "127.0.0.1:", "num_nodes", "firewall"]
    assert [word for word in must_say if word not in said] == []


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ConnectionError, match=rf"fit: rank 0 must host .*127.0.0.1:{port}.*MASTER_PORT"),
            all_ranks_started("fit", "127.0.0.1", port, 0, 2, timeout_s=1, start_s=1),
        ):
            pytest.fail("nothing can begin")


def test_a_second_start_in_the_same_processes_waits_again():
    def twice(rank):
        took_s = []
        for _ in range(2):
            if rank == 1:
                time.sleep(0.5)
            began = time.monotonic()
            assert start(rank, 2, (), 30.0) == "started"
            took_s.append(time.monotonic() - began)
            dist.barrier()
            dist.destroy_process_group()
        return took_s

    first, _ = launch(twice, world_size=2)
    assert min(first) > 0.3
