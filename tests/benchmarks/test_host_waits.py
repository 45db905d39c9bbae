"""What a GPU would be waited for in whole fits of two ranks: each case's target, on a device that is not there."""

import pytest
import torch
from support.mock_cuda import Wait
from support.processes import launch

from benchmarks.gpu_check import host_waits


def _count(rank):
    torch.set_num_threads(1)
    host_waits.BLOCKS = [1, 1, 1, 1]  # 53 tensors of 161, in as many buckets
    return host_waits.count(rank, list(host_waits.KINDS))


@pytest.fixture(scope="module")
def found():
    return launch(_count, world_size=2, timeout_s=170)


@pytest.mark.parametrize("name", host_waits.KINDS)
def test_the_host_waits_no_more_often_than_it_may(found, name):
    for seen in found:
        assert len(seen[name].waits) <= host_waits.cases()[name].most, "\n".join(host_waits.places(seen[name].waits))


@pytest.mark.parametrize("name", host_waits.KINDS)
def test_no_backward_waits(found, name):
    for seen in found:
        assert not seen[name].in_backward, "\n".join(host_waits.places(seen[name].in_backward))


@pytest.mark.parametrize("name", host_waits.KINDS)
def test_no_stream_uses_what_another_one_may_not_be_done_with(found, name):
    for seen in found:
        assert not seen[name].hazards


def test_a_wait_in_the_middle_of_a_step_is_counted_with_its_place():
    wait = Wait("_local_scalar_dense", "lightning_comm/a.py:1", "lightning_comm/a.py:1", True, "MainThread")
    assert host_waits.places([wait, wait]) == ["   2 x lightning_comm/a.py:1: _local_scalar_dense, in backward"]
    rows = host_waits.rows_of({"step of cyclic": host_waits.Found([wait], [], [wait], [])})
    assert rows == [["step of cyclic", "1", "1", "0", "1", "0"]]
