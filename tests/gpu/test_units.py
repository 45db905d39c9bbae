"""Codecs, averages and state in one process on a device, against the same on the CPU."""

import pytest
import torch
from support import device_units as units

from lightning_comm import Cast, Int8, PowerSGD, Ternary, TopK
from lightning_comm.transport.compression.full import Full

pytestmark = pytest.mark.gpu


def apart(found, expected):
    """The largest difference of two rows, 0.0 where they are equal bit for bit, NaN and infinity too."""
    if torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and found.dtype == expected.dtype:
        return 0.0
    return float((found.double() - expected.double()).abs().max())


@pytest.mark.parametrize("compression", units.EXACT, ids=units.name_of)
def test_a_codec_that_draws_nothing_sends_what_it_sends_on_the_cpu(one_rank, on_the_cpu, device, figure, compression):
    (found,) = one_rank.call(units.means, device, compression, False)
    (expected,) = on_the_cpu.call(units.means, "cpu", compression, False)
    worst = max(apart(*pair) for steps in zip(found, expected, strict=True) for pair in zip(*steps, strict=True))
    figure(worst, 0.0, "equal")
    assert worst == 0.0


@pytest.mark.parametrize("compression", [Full(), TopK(0.1), Cast("bf16")], ids=units.name_of)
def test_a_codec_is_within_its_rounding_of_float64(one_rank, on_the_cpu, device, figure, compression):
    (found,) = one_rank.call(units.means, device, compression, False)
    (expected,) = on_the_cpu.call(units.means, "cpu", compression, False, dtype=torch.float64)
    unit = 2.0**-8 if isinstance(compression, Cast) else 2.0**-23
    worst = max(apart(mean, exact) for (mean, _), (exact, _) in zip(found, expected, strict=True))
    figure(worst, 8 * unit)
    assert worst <= 8 * unit


@pytest.mark.parametrize("compression", units.RANDOM, ids=units.name_of)
def test_what_is_rounded_at_random_lies_within_a_step_of_the_entry(one_rank, device, figure, compression):
    (found,) = one_rank.call(units.means, device, compression, False)
    worst = 0.0
    for step, (_, sent) in enumerate(found):
        gradient = units.entries(0, step)
        for row, given in zip(units.LAYOUT.split(sent), units.LAYOUT.split(gradient), strict=True):
            one = given.abs().max() / (1 if isinstance(compression, Ternary) else 127)
            worst = max(worst, float((row - given).abs().max() / one))
    figure(worst, 1.0)
    assert worst <= 1 + 1e-5


@pytest.mark.parametrize("compression", [c for c in units.ALL if c != Int8()], ids=units.name_of)
def test_the_mean_of_one_rank_is_what_it_sent(one_rank, device, figure, compression):
    (found,) = one_rank.call(units.means, device, compression, False)
    worst = max(apart(mean, sent) for mean, sent in found)
    bound = 2e-2 if "Int8" in repr(compression) else 1e-6  # which rounds the mean once more
    figure(worst, bound)
    assert worst <= bound


def test_the_matrices_of_powersgd_are_those_of_the_cpu(one_rank, on_the_cpu, device, figure):
    (found,) = one_rank.call(units.means, device, PowerSGD(2), True, steps=4)
    (expected,) = on_the_cpu.call(units.means, "cpu", PowerSGD(2), True, steps=4)
    worst = max(apart(mean, other) for (mean, _), (other, _) in zip(found, expected, strict=True))
    figure(worst, 1e-4, "at most; the first directions are drawn on the CPU")
    assert worst <= 1e-4


@pytest.mark.parametrize("compression", units.ALL, ids=units.name_of)
def test_two_codecs_that_start_alike_send_the_same_bits(one_rank, device, figure, compression):
    (first,) = one_rank.call(units.means, device, compression, True)
    (second,) = one_rank.call(units.means, device, compression, True)
    worst = max(apart(*pair) for steps in zip(first, second, strict=True) for pair in zip(*steps, strict=True))
    figure(worst, 0.0, "equal")
    assert worst == 0.0


@pytest.mark.parametrize("compression", [Int8(), TopK(0.1), PowerSGD(2)], ids=units.name_of)
def test_gradient_and_residual_are_what_is_sent_and_the_new_residual(one_rank, device, figure, compression):
    (worst,) = one_rank.call(units.feedback_identity, device, compression)
    figure(worst, 4e-6)
    assert worst <= 4e-6


@pytest.mark.parametrize("compression", units.ALL, ids=units.name_of)
def test_a_codec_goes_on_from_a_file_as_if_it_had_not_stopped(one_rank, device, figure, compression):
    ((worst, elsewhere),) = one_rank.call(units.resumed, device, compression)
    figure([worst, elsewhere], [0.0, 0], "difference, and tensors that stayed on another device")
    assert worst == 0.0
    assert elsewhere == 0


def test_random_numbers_belong_to_a_name_and_a_step(one_rank, device):
    ((first, again, next_step, other_name),) = one_rank.call(units.drawn, device)
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    assert not torch.equal(first, other_name)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_the_mean_of_one_rank_is_its_own_tensors_in_every_type_and_layout(one_rank, device, figure, weighted):
    (found,) = one_rank.call(units.averaged, device, 1, weighted, slow=True)
    worst = {name: apart(tensor, found[name]) for name, tensor in units.odd_tensors(0, "cpu").items() if tensor.numel()}
    figure(max(worst.values()), 0.0, "equal")
    assert set(worst.values()) == {0.0}, worst
    assert found["channels_last"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compression", [Full(), Cast("bf16"), TopK(0.1)], ids=units.name_of)
def test_an_average_in_flight_waits_for_every_stream(one_rank, on_the_cpu, device, figure, compression):
    (found,) = one_rank.call(units.in_flight, device, compression)
    (expected,) = on_the_cpu.call(units.in_flight, "cpu", compression, poison=False)
    pairs = [(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a]
    worst = max(apart(*pair) for pair in pairs)
    figure(worst, 1e-12, "at most; NaN where a wait for a stream is missing")
    assert worst <= 1e-12


def test_work_beside_training_raises_where_it_is_waited_for(one_rank, device):
    assert "shape" in one_rank.call(units.failing_thread, device)[0]


def test_the_devices_random_numbers_go_on_from_a_file(one_rank, device):
    assert one_rank.call(units.random_numbers_again, device) == [True]


def test_a_scaler_that_has_scaled_nothing_takes_the_smallest_scale(one_rank, device, figure):
    (found,) = one_rank.call(units.unused_scaler, device)
    figure(list(found), [1024.0, 1024.0, 0.5], "equal: scale, scaled loss, weight after a step")
    assert found == (1024.0, 1024.0, 0.5)
