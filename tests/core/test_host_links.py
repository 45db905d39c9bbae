"""Which hosts are called slow or asymmetric: made-up links of known rates."""

import pytest

from lightning_comm.core.costs import HostLink
from lightning_comm.core.host_links import FACTOR, find_faults, slowest
from lightning_comm.core.probe_plan import pairs

MBIT = 1e6 / 8


def links(up: list[float], down: list[float], spread: float = 0.02) -> list[HostLink]:
    """Links of hosts on a switch, whose rate is that of the narrower end, between the pairs that a probe measures."""
    return [
        HostLink(f"h{a}", f"h{b}", 2**20, 1e-4, rate, rate * (1 - spread), rate * (1 + spread))
        for a, b in pairs(len(up))
        for rate in [min(up[a], down[b]) * MBIT]
    ]


def found(up: list[float], down: list[float], **kw: float) -> dict[str, tuple[bool, tuple[str, ...]]]:
    return {fault.host: (fault.asymmetric, fault.slow) for fault in find_faults(links(up, down, **kw))}


BOTH = ("sends", "receives")


@pytest.mark.parametrize("hosts", [2, 3, 4, 6, 20])
def test_equal_links_are_not_complained_of(hosts):
    assert found([100] * hosts, [100] * hosts) == {}


@pytest.mark.parametrize("hosts", [3, 4, 5, 6, 20])
@pytest.mark.parametrize("slow", [0, 2])
def test_one_slow_host_is_named_and_not_its_neighbours(hosts, slow):
    rates = [100.0 if host == slow else 1000.0 for host in range(hosts)]
    assert found(rates, rates) == {f"h{slow}": (False, BOTH)}


def test_a_host_between_two_slow_ones_is_not_taken_for_slow():
    rates = [1000, 100, 1000, 100, 1000, 1000, 1000.0]
    assert set(found(rates, rates)) == {"h1", "h3"}


@pytest.mark.parametrize("hosts", [3, 4, 7])
def test_a_host_that_sends_more_slowly_than_it_receives_is_asymmetric(hosts):
    up = [1000.0] * hosts
    assert found([*up[1:], 50.0], up) == {f"h{hosts - 1}": (True, ("sends",))}
    assert found(up, [50.0, *up[1:]]) == {"h0": (True, ("receives",))}


def test_all_hosts_behind_asymmetric_lines_are_named_for_that_alone():
    # every way is as narrow as the sender's 20 Mbit/s, so no host can be seen to receive faster
    assert found([20.0] * 4, [100.0] * 4) == {}
    one_in_a_data_centre = found([20.0, 20.0, 20.0, 1000.0], [100.0] * 3 + [1000.0])
    assert one_in_a_data_centre["h0"] == (True, ())


def test_two_hosts_can_only_say_that_directions_differ():
    (fault,) = find_faults(links([100, 1000.0], [1000, 1000.0]))
    assert (fault.host, fault.asymmetric, fault.slow) == ("h0", True, ())
    must_say = ["h0 sends at 100 Mbit/s", "receives at 1 Gbit/s", "cannot tell", "h1's way in"]
    assert [word for word in must_say if word not in fault.message] == []
    assert find_faults(links([100.0, 100.0], [100.0, 100.0])) == []


def test_a_difference_counts_only_beyond_the_factor_and_beyond_the_spread():
    def rates(of_one: float) -> list[float]:
        return [of_one, 1000.0, 1000.0, 1000.0]

    assert found(rates(1000 / FACTOR * 1.01), rates(1000 / FACTOR * 1.01)) == {}
    assert set(found(rates(1000 / FACTOR * 0.99), rates(1000 / FACTOR * 0.99))) == {"h0"}
    # quartiles of 500 and 1000 that reach from 250 to 750 and from 500 to 1500 overlap
    assert found(rates(500.0), rates(500.0), spread=0.5) == {}


def test_the_message_names_the_host_and_its_figures():
    rates = [100.0, 1000.0, 1000.0]
    (fault,) = find_faults(links(rates, rates))
    must_say = ["h0", "slower", "sends at 100 Mbit/s", "receives at 100 Mbit/s", "usually send at 1 Gbit/s"]
    assert [word for word in must_say if word not in fault.message] == []


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_links_that_could_not_be_measured_are_no_reason_to_complain_or_to_fail(hosts):
    every = links([100.0] * hosts, [100.0] * hosts)
    for missing in range(len(every)):
        assert find_faults(every[:missing] + every[missing + 1 :]) == []
    assert find_faults(every[:1]) == []
    assert find_faults([]) == []


def test_the_slowest_link_is_the_one_that_a_message_takes_longest_on():
    far = HostLink("a", "b", 2**20, 0.5, 1e8, 1e8, 1e8)
    narrow = HostLink("b", "c", 2**20, 1e-4, 1e7, 1e7, 1e7)
    assert slowest([narrow, far]) is far


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_a_factor_that_calls_every_link_slow_is_refused(factor):
    with pytest.raises(ValueError, match=f"`factor` .* > 1; got {factor}. Use 1.5"):
        find_faults([], factor=factor)
