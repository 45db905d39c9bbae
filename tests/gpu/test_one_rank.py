"""One rank under Lightning, by NCCL on a GPU: every registered name, precisions, checkpoints, and what is refused."""

import math

import pytest
from support import device_fits as fits
from support.on_device import backend_of

pytestmark = pytest.mark.gpu

LOSSLESS = ("qsr", "local_sgd", "post_local_sgd", "cyclic")
LOSSY = ("ddp_bf16", "ddp_fp16", "ddp_int8", "ddp_powersgd", "ddp_topk", "ddp_sparse_mask", "pactrain", "cyclic_v1")
PRECISIONS = ("bf16-mixed", "16-mixed")


@pytest.fixture(scope="module")
def alone(ranks_of):
    return ranks_of(1)


@pytest.fixture(scope="module")
def plain(alone, device):
    """Plain DDP on the device."""
    (found,) = alone.call(fits.alone, device, "ddp")
    return found


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_every_name_trains_one_rank(alone, device, plain, figure, name):
    (found,) = alone.call(fits.alone, device, name)
    assert found["step"] == fits.STEPS
    assert found["backend"] == backend_of(device)
    worst = fits.difference(found["weights"], plain["weights"])
    if name in LOSSY:
        figure(worst, "finite", "difference to plain DDP; what a compression or a delay changes is not judged here")
        assert math.isfinite(worst)
    else:
        figure(worst, 0.0, "equal to plain DDP")
        assert worst == 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["local_sgd", "ddp_bf16", "ddp_powersgd", "pactrain"])
def test_a_mixed_precision_trains_and_goes_on_exactly(alone, device, figure, tmp_path, name, precision):
    (whole,) = alone.call(fits.alone, device, name, precision=precision)
    (again,) = alone.call(fits.alone, device, name, str(tmp_path), precision=precision)
    worst = fits.difference(again["weights"], whole["weights"])
    figure(worst, 0.0, "equal, with a stop in mid-round")
    assert worst == 0.0
    assert again["step"] == fits.STEPS
    assert all(map(math.isfinite, whole["losses"]))


@pytest.mark.usefixtures("needs_nccl")
def test_averages_in_the_hosts_memory_are_refused_with_a_way_out(alone, device, figure):
    (said,) = alone.call(fits.average_on_the_cpu, device)
    figure(said[:200], "cpu:gloo,cuda:nccl", "an error that names this way out")
    assert "cpu:gloo,cuda:nccl" in said
