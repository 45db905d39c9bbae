"""What a group is hung up on with, and how it is left after a failure."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.faults import Fault, Job, fates, vanish
from support.processes import start_ranks

from lightning_comm.transport import group_ends
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.group_ends import hang_up, leave_group_at_exit
from lightning_comm.transport.recording import another_group

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Nccl:
    """What torch has behind a group, as far as hanging up goes; its abort never ends if it is stuck."""

    _device_types = (CUDA,)

    def __init__(self, stuck=False, fault=None):
        self.aborts, self.fault, self.lets = 0, fault, threading.Event()
        if not stuck:
            self.lets.set()

    def _get_backend(self, device):
        assert device == CUDA
        return self

    def abort(self):
        self.aborts += 1
        self.lets.wait()
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def nccl_groups(monkeypatch):
    monkeypatch.setattr(group_ends, "backend_of", lambda device, group=None: "nccl")
    monkeypatch.setattr(group_ends, "_left_behind", {})
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [])


def test_hanging_up_ends_what_nccl_has_under_way(nccl_groups):
    for group in (Nccl(), Nccl(fault=RuntimeError("aborted before"))):
        hang_up(group)
        assert group.aborts == 1
        assert not any(thread.is_alive() for thread in group_ends._left_behind)


def test_an_abort_that_does_not_end_is_left_behind(nccl_groups, monkeypatch):
    monkeypatch.setattr(group_ends, "_ABORT_S", 0.1)
    group, began = Nccl(stuck=True), time.monotonic()
    hang_up(group)
    assert time.monotonic() - began < 5
    (thread,) = group_ends._left_behind
    assert thread.is_alive()
    group.lets.set()
    thread.join(10)


@pytest.mark.parametrize("failed", [True, False])
def test_groups_are_aborted_before_they_are_left_after_a_failure_alone(nccl_groups, monkeypatch, failed):
    done, groups = [], [Nccl(), Nccl()]
    monkeypatch.setattr(group_ends, "_noting", [True] if failed else [])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append([each.aborts for each in groups]))
    monkeypatch.setattr(group_ends.distributed_c10d, "_world", SimpleNamespace(pg_map=dict.fromkeys(groups)))
    group_ends._leave_group()
    assert done == [[int(failed)] * 2]


def _backends(rank):
    hang_up(None)  # of one rank: there is nobody to hang up on, and no NCCL
    return [backend_of(device, group) for group in (None, another_group(None)) for device in (CPU, CUDA)]


def test_a_groups_backend_is_that_of_the_device():
    assert start_ranks(_backends, world_size=1) == [["gloo"] * 4]


def _for_processors_alone(rank):
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo")
    return backend_of(CPU), backend_of(CUDA)


def test_a_device_may_have_none():
    assert start_ranks(_for_processors_alone, world_size=1) == [("gloo", None)]


def _leave_with_a_message_that_nobody_holds(rank, fault):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    leave_group_at_exit()
    dist.barrier()
    if rank == 1:
        time.sleep(1)
        fault.strike(rank)
    dist.all_gather_into_tensor(torch.zeros(2), torch.ones(1), async_op=True)


def test_a_message_that_nobody_holds_any_more_keeps_no_rank_from_its_end():
    fault = Fault(vanish, 1)
    ((one, _),) = fates([(Job(_leave_with_a_message_that_nobody_holds, (fault,), 2), fault)], within_s=20.0)
    assert (one.text, one.status) == ("ended", 0)
    assert one.seconds < 20, "torch 2.6 would wait for good, with Python's lock held"
