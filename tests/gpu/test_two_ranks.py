"""Two ranks that share a device, joined by gloo: each strategy against the same ranks on the CPU in float64."""

import pytest
import torch
from support import device_fits as fits
from support import device_units as units

from lightning_comm import Cast, TopK
from lightning_comm.transport.compression.full import Full

pytestmark = pytest.mark.gpu

_expected: dict[str, list[dict]] = {}


@pytest.fixture(scope="module")
def two(ranks_of):
    """Each fit makes its own group, as Lightning does it."""
    return ranks_of(2)


@pytest.fixture(scope="module")
def joined(ranks_of):
    return ranks_of(2, backend="gloo")


@pytest.fixture(scope="module")
def joined_on_the_cpu(ranks_of):
    return ranks_of(2, "cpu", "gloo")


@pytest.fixture(scope="module")
def expected(ranks_of):
    """The weights of a case on the CPU in float64, made once."""

    def of(name):
        base = name.replace(", in float32", "").replace(" in float32", "")
        if base not in _expected:
            _expected[base] = ranks_of(2, "cpu").call(fits.fit, "cpu", base, 2)
        return _expected[base]

    return of


def check(found, expected, tolerance, figure):
    """Ranks end equal bit for bit, and near the others."""
    one, other = found
    assert fits.difference(one["weights"], other["weights"]) == 0.0, "ranks differ"
    worst = fits.difference(one["weights"], expected[0]["weights"])
    figure(worst, tolerance, "at most, as a share of the largest weight, against the CPU in float64; ranks equal")
    assert worst <= tolerance


@pytest.mark.parametrize("name", fits.CASES)
def test_a_fit_ends_equal_and_where_it_ends_on_the_cpu(two, expected, device, figure, name):
    case = fits.CASES[name]
    found = two.call(fits.fit, device, name, 2)
    assert [each["step"] for each in found] == [fits.STEPS] * 2
    check(found, expected(case.near or name), case.tolerance, figure)


@pytest.mark.parametrize("name", fits.SLOW)
def test_a_fit_does_not_depend_on_how_far_the_stream_is_behind(two, expected, device, figure, name):
    check(two.call(fits.fit, device, name, 2, slow=True), expected(name), fits.CASES[name].tolerance, figure)


@pytest.mark.parametrize("name", fits.RESUMED)
def test_a_run_that_is_stopped_in_mid_round_goes_on_exactly(two, device, figure, tmp_path, name):
    whole = two.call(fits.fit, device, name, 2)
    again = two.call(fits.resumed, device, name, 2, str(tmp_path))
    worst = max(fits.difference(a["weights"], b["weights"]) for a, b in zip(again, whole, strict=True))
    figure(worst, 0.0, "equal")
    assert worst == 0.0


@pytest.mark.parametrize("kind", ["equal", "weighted", "large"])
def test_means_of_every_type_and_layout_are_those_of_the_cpu(joined, joined_on_the_cpu, device, figure, kind):
    found = joined.call(units.averaged, device, 2, kind == "weighted", slow=True, large=kind == "large")
    exact = joined_on_the_cpu.call(units.averaged, "cpu", 2, kind == "weighted", slow=True, large=kind == "large")
    unequal = [
        (rank, name)
        for rank in range(2)
        for name, tensor in found[rank].items()
        if not torch.equal(tensor, exact[rank][name])
    ]
    figure(unequal, [], "tensors that are not the CPU's bit for bit")
    assert unequal == []


def test_every_rank_gets_what_rank_0_has(joined, device):
    one, other = joined.call(units.broadcast, device)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(other[0], torch.arange(50))


@pytest.mark.parametrize("compression", [Full(), Cast("bf16"), TopK(0.1)], ids=units.name_of)
def test_an_average_in_flight_moves_weights_as_on_the_cpu(joined, joined_on_the_cpu, device, figure, compression):
    found = joined.call(units.in_flight, device, compression)
    exact = joined_on_the_cpu.call(units.in_flight, "cpu", compression, poison=False)
    worst = 0.0
    for mine, wanted in zip(found, exact, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            worst = max(worst, fits.difference([t.numpy() for t in a.values()], [t.numpy() for t in b.values()]))
    figure(worst, 1e-12, "at most; NaN where a wait for a stream is missing")
    assert worst <= 1e-12
