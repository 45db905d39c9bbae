"""What a GPU would be waited for in whole fits of two ranks: each case's target, on a device that is not there."""

import pytest
import torch
from support.mock_cuda import Wait
from support.processes import launch

from benchmarks.gpu_check import host_waits


def _count(rank, names):
    torch.set_num_threads(1)
    host_waits.BLOCKS = [1, 1]  # 29 tensors of 161, in as many buckets: ten times what may be waited for
    return host_waits.count(rank, names)


# of averages and of hooks the one whose way is shared by the others
FEW = ("synchronisation, momenta averaged", "round, overlap and bf16", "step under pactrain", "step of cyclic")
FEW += ("step with AdaptivePartition",)
KINDS = [pytest.param(name, marks=() if name in FEW else pytest.mark.exhaustive) for name in host_waits.KINDS]


@pytest.fixture(scope="module")
def found(request):
    names = list(host_waits.KINDS if request.config.getoption("exhaustive") else FEW)
    return launch(_count, names, world_size=2, timeout_s=170)


@pytest.mark.parametrize("name", KINDS)
def test_the_host_waits_no_more_often_than_it_may(found, name):
    for seen in found:
        assert len(seen[name].waits) <= host_waits.cases()[name].most, "\n".join(host_waits.places(seen[name].waits))


@pytest.mark.parametrize("name", KINDS)
def test_no_backward_waits(found, name):
    for seen in found:
        assert not seen[name].in_backward, "\n".join(host_waits.places(seen[name].in_backward))


@pytest.mark.parametrize("name", KINDS)
def test_no_stream_uses_what_another_one_may_not_be_done_with(found, name):
    for seen in found:
        assert not seen[name].hazards


def test_a_wait_in_the_middle_of_a_step_is_counted_with_its_place():
    wait = Wait("_local_scalar_dense", "lightning_comm/a.py:1", "lightning_comm/a.py:1", True, "MainThread")
    assert host_waits.places([wait, wait]) == ["   2 x lightning_comm/a.py:1: _local_scalar_dense, in backward"]
    rows = host_waits.rows_of({"step of cyclic": host_waits.Found([wait], [], [wait], [])})
    assert rows == [["step of cyclic", "1", "1", "0", "1", "0"]]
