"""Cyclic training on a device: engine, ring of two processes by gloo, and fits, against sequential references."""

import pytest
import torch
from support import device_cyclic as cyclic
from support import device_fits as fits

pytestmark = pytest.mark.gpu

SETTINGS = [{}, {"rule": "v1"}, {"lag": 1}, {"warmup_sync_steps": 3}]


@pytest.fixture(scope="module")
def joined(ranks_of):
    return ranks_of(2, backend="gloo")


@pytest.fixture(scope="module")
def two(ranks_of):
    return ranks_of(2)


def furthest(found, expected):
    """The largest relative difference of two runs' losses."""
    pairs = zip(torch.tensor(found["losses"]).flatten(), torch.tensor(expected["losses"]).flatten(), strict=True)
    return max(abs(float(a - b)) / max(1e-30, abs(float(b))) for a, b in pairs)


@pytest.mark.parametrize("order", ["backward_first", "forward_first"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("workers", [2, 4])
def test_the_engine_is_the_sequential_reference(one_rank, device, figure, workers, settings, order):
    stages = workers if "lag" in settings else 2 * workers
    (found,) = one_rank.call(cyclic.engine, device, workers, stages, order=order, **settings)
    (expected,) = one_rank.call(cyclic.sequential, device, workers, stages, **settings)
    worst = fits.difference(found["weights"], expected["weights"])
    figure(worst, 1e-12, "at most, as a share of the largest weight, in float64")
    assert worst <= 1e-12


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_engine_has_the_losses_of_the_cpu(one_rank, on_the_cpu, device, figure, settings):
    (found,) = one_rank.call(cyclic.engine, device, 4, 4, torch.float32, **settings)
    (expected,) = on_the_cpu.call(cyclic.engine, "cpu", 4, 4, torch.float64, **settings)
    worst = furthest(found, expected)
    figure(worst, 1e-5, "at most; float32 without tf32, against the CPU in float64")
    assert worst <= 1e-5


@pytest.mark.parametrize("stages", [2, 6])
def test_the_ring_gives_every_version_bit_for_bit(joined, device, figure, stages):
    found = joined.call(cyclic.ring, device, 2, stages)
    figure(found, [0, 0], "versions that are not the owner's update of the mean, by rank")
    assert found == [0, 0]


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
@pytest.mark.parametrize("settings", [{}, {"rule": "v1"}, {"stages": 4}], ids=str)
def test_a_fit_is_the_sequential_reference(two, on_the_cpu, device, figure, settings, slow):
    one, other = two.call(cyclic.fit, device, 2, slow, **settings)
    assert fits.difference(one["weights"], other["weights"]) == 0.0, "ranks differ"
    rule = {key: value for key, value in settings.items() if key != "stages"}
    (expected,) = on_the_cpu.call(cyclic.sequential_fit, 2, one["stages"], **rule)
    worst = fits.difference(one["weights"], expected)
    figure(worst, 1e-9, "at most, as a share of the largest weight, against the CPU; ranks equal")
    assert worst <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_stays_on_the_device_clips_half_precision_as_one_of_the_host(one_rank, device, dtype):
    found, expected = one_rank.call(cyclic.clipped_half, device, dtype)[0]
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)
