"""What the report of a link says, from made-up measurements of known figures."""

from dataclasses import replace

import pytest

from lightning_comm.core.costs import Curve, HostLink, LinkProfile, Timing, ring_all_reduce_s
from lightning_comm.core.probe_plan import pairs
from lightning_comm.reports.link import describe_link, seconds, size_name

MBIT = 1e6 / 8


def all_reduces(sizes=(4, 2**16, 2**20), spread: float = 0.05) -> Curve:
    times = {size: ring_all_reduce_s(size, 4, 0.0003, 94 * MBIT) for size in sizes}
    points = tuple(Timing(size, 5, t, t * (1 - spread), t * (1 + spread)) for size, t in times.items())
    return Curve("all_reduce", 4, points, not_measured=(2**22, 2**24))


def profile(rates=(94, 94, 94, 94), **kw) -> LinkProfile:
    links = tuple(
        HostLink(f"h{a}", f"h{b}", 2**20, 0.0003, rate, 0.99 * rate, 1.01 * rate)
        for a, b in pairs(4)
        for rate in [min(rates[a], rates[b]) * MBIT]
    )
    return LinkProfile(4, "gloo", (all_reduces(**kw),), "TCP on eth0", ("h0", "h1", "h2", "h3"), links)


def test_latency_bandwidth_and_what_they_mean_stand_in_one_sentence():
    # 22 MB on 4 ranks: 6 messages of 0.3 ms, and 33 MB at 94 Mbit/s; of 1 MiB, 92.75 Mbit/s are not latency
    text = describe_link(profile())
    expected = (
        "Latency 300 µs a message, 94 Mbit/s (the largest all-reduce reached 92.75 Mbit/s): the all-reduce of a model "
        "of 22.0 MB on 4 ranks takes about 2.81 s"
    )
    assert expected in text
    assert "beyond the measured sizes" in text
    assert "beyond" not in describe_link(profile(sizes=(4, 2**16, 2**26)))


def test_every_size_has_a_row_and_those_left_out_are_named():
    lines = describe_link(profile()).splitlines()
    rows = {line.split("  ")[0]: line for line in lines if line.startswith(("4 B", "64 KiB", "1 MiB"))}
    assert list(rows) == ["4 B", "64 KiB", "1 MiB"]
    # 6 messages of 0.3 ms and 1.5 MiB at 94 Mbit/s, which is 135.7 ms in all, with quartiles 5 % off
    assert [word for word in ["136 ms", "129 ms", "142 ms", "92.75 Mbit/s"] if word not in rows["1 MiB"]] == []
    assert "not measured, for want of time or room: 4 MiB, 16 MiB" in lines
    assert any(
        line.startswith("Single message") and line.endswith("not measured, for want of time or room.") for line in lines
    )


def test_hosts_with_their_ranks_and_the_way_of_the_messages_come_first():
    two_each = replace(profile(), hosts=("a", "a", "b", "b"))
    assert describe_link(two_each).startswith("4 ranks on 2 hosts: a (2 ranks), b (2 ranks)\ngloo, TCP on eth0\n")


def test_a_slow_host_is_warned_of_with_what_it_means_for_a_ring():
    text = describe_link(profile(rates=(1000, 1000, 100, 1000)))
    must_say = ["Warning: h2's link is slower", "100 Mbit/s", "1 Gbit/s", "A ring passes through every host", "1.5"]
    assert [word for word in must_say if word not in text] == []
    assert "Warning" not in describe_link(profile())


def test_unsteady_times_and_missing_links_are_said():
    text = describe_link(profile(spread=0.3))
    assert [word for word in ["unsteady", "all_reduce of 1 MiB", "quiet"] if word not in text] == []
    assert "the links between single hosts. Raise --seconds" in describe_link(replace(profile(), links=()))


def test_sizes_that_show_no_bandwidth_are_not_given_one():
    flat = Curve("all_reduce", 4, tuple(Timing(size, 5, 1e-3, 1e-3, 1e-3) for size in (4, 16, 64)))
    assert "a bandwidth that such sizes do not show" in describe_link(replace(profile(), curves=(flat,)))


@pytest.mark.parametrize(
    ("value", "text"), [(9.994e-6, "9.99 µs"), (1e-3, "1.00 ms"), (0.0999, "99.9 ms"), (1.0, "1.00 s"), (630, "630 s")]
)
def test_times_have_three_digits(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(("size", "text"), [(1023, "1,023 B"), (1024, "1 KiB"), (1536, "1,536 B"), (2**30, "1 GiB")])
def test_sizes_have_binary_units_only_where_they_are_whole(size, text):
    assert size_name(size) == text
