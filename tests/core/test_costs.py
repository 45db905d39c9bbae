"""Formulas against hand arithmetic, fits against exact lines, the curve against its points, the file against itself."""

import json
import math
import resource
import signal
from dataclasses import replace

import pytest

from lightning_comm.core.costs import (
    KINDS,
    Curve,
    HostLink,
    LinkProfile,
    Timing,
    collective_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
    schedule,
    send_s,
    tree_broadcast_s,
)

SIZES = tuple(4**k for k in range(1, 14))  # 4 B to 64 MiB


def curve(kind: str, world_size: int, times: dict[int, float]) -> Curve:
    return Curve(kind, world_size, tuple(Timing(size, 5, t, 0.9 * t, 1.1 * t) for size, t in times.items()))


def exact(kind: str, world_size: int, latency_s: float, bytes_per_s: float) -> Curve:
    return curve(kind, world_size, {s: collective_s(kind, s, world_size, latency_s, bytes_per_s) for s in SIZES})


def profile(world_size: int = 4, latency_s: float = 1e-3, bytes_per_s: float = 12.5e6) -> LinkProfile:
    kinds = ("all_reduce", "all_gather", "send")
    return LinkProfile(
        world_size,
        "gloo",
        tuple(exact(kind, world_size, latency_s, bytes_per_s) for kind in kinds),
        transport="TCP on eth0",
        hosts=("a", "a", "b", "b"),
        links=(HostLink("a", "b", 2**20, 1e-4, 1e7, 0.9e7, 1.1e7),),
        environment={"torch": "2.15", "date": "2026-11-24"},
    )


def test_a_ring_on_four_ranks_takes_what_is_worked_out_by_hand():
    # 8 MB on 4 ranks at 2 MB/s and 10 ms: 6 messages of 2 MB each, of 1 s and 10 ms.
    assert ring_all_reduce_s(8e6, 4, 0.01, 2e6) == pytest.approx(6 * (0.01 + 1.0))
    assert ring_reduce_scatter_s(8e6, 4, 0.01, 2e6) == pytest.approx(3 * (0.01 + 1.0))
    # every rank hands over 2 MB and passes three such parts on
    assert ring_all_gather_s(2e6, 4, 0.01, 2e6) == pytest.approx(3 * (0.01 + 1.0))
    assert tree_broadcast_s(8e6, 4, 0.01, 2e6) == pytest.approx(2 * (0.01 + 4.0))
    assert send_s(8e6, 0.01, 2e6) == pytest.approx(0.01 + 4.0)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 64])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_of_the_parts(world_size):
    whole = ring_all_reduce_s(1e6, world_size, 1e-3, 1e6)
    halves = ring_reduce_scatter_s(1e6, world_size, 1e-3, 1e6) + ring_all_gather_s(
        1e6 / world_size, world_size, 1e-3, 1e6
    )
    assert whole == pytest.approx(halves)


def test_a_tree_reaches_twice_as_many_ranks_with_one_more_message():
    assert [schedule("broadcast", n).messages for n in range(1, 10)] == [0, 1, 2, 2, 3, 3, 3, 3, 4]


def test_one_rank_alone_waits_for_nobody():
    assert [collective_s(kind, 1e6, 1, 1.0, 1.0) for kind in KINDS if kind != "send"] == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(2e-4, 125e6), (0.03, 1.25e6), (5e-6, 2e11)])
def test_the_fit_finds_latency_and_bandwidth_of_exact_times(kind, latency_s, bytes_per_s):
    fit = exact(kind, 3, latency_s, bytes_per_s).fit
    assert fit.latency_s == pytest.approx(latency_s, rel=1e-6)
    assert fit.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-6)


def test_the_fit_is_nearer_in_proportion_than_all_lines_around_it():
    bent = curve("send", 2, {s: (1e-3 + s / 1e7) * (1.3 if s > 10_000 else 1.0) for s in SIZES})

    def misfit(latency_s: float, bytes_per_s: float) -> float:
        return sum(math.log(send_s(p.payload_bytes, latency_s, bytes_per_s) / p.median_s) ** 2 for p in bent.points)

    fit = bent.fit
    best = misfit(fit.latency_s, fit.bytes_per_s)
    others = [misfit(fit.latency_s * a, fit.bytes_per_s * b) for a in (0.99, 1, 1.01) for b in (0.99, 1.01)]
    assert best > 0.01
    assert best < min(others)


def test_one_message_that_passed_unhindered_does_not_sway_the_fit():
    # measured in the lab: 20 Mbit/s, where 4 KiB fit into the bucket of the shaper
    times = {4: 3.52e-3, 64: 1.32e-3, 1024: 2.57e-3, 4096: 1.53e-3, 2**14: 11.9e-3, 2**16: 41.1e-3, 2**18: 166e-3}
    assert 17 < curve("all_reduce", 4, times).fit.bytes_per_s * 8e-6 < 25


def test_neither_latency_nor_bandwidth_is_ever_negative():
    faster_than_proportional = curve("send", 2, {1000: 1e-3, 2000: 3e-3})
    assert faster_than_proportional.fit.latency_s == 0
    assert faster_than_proportional.fit.bytes_per_s > 0
    falling = curve("send", 2, {4: 2e-3, 16: 1e-3})
    assert falling.fit.latency_s > 0
    assert falling.fit.bytes_per_s == math.inf
    assert falling.time_s(2**30) == pytest.approx(1e-3)
    one = curve("send", 2, {1000: 1e-3})
    assert (one.fit.latency_s, one.fit.bytes_per_s) == (0, pytest.approx(1e6))


def test_the_curve_goes_through_its_points_and_rises_between_them():
    measured = curve("all_reduce", 4, {4: 1e-3, 1024: 1.1e-3, 2**16: 2e-3, 2**20: 0.126, 2**24: 2.1})
    assert [measured.time_s(p.payload_bytes) for p in measured.points] == [p.median_s for p in measured.points]
    times = [measured.time_s(s) for s in range(4, 2**24, 9973)]
    assert times == sorted(times)
    assert times[0] < times[-1]
    # halfway on both logarithmic scales is the geometric mean
    assert measured.time_s(2**18) == pytest.approx(math.sqrt(2e-3 * 0.126))


def test_beyond_the_curve_the_fit_goes_on_without_a_step():
    measured = curve("all_reduce", 4, {s: 1.2 * (1e-3 + s / 1e7) for s in (4096, 2**16)} | {2**20: 0.2})
    for end in (4096, 2**20):
        assert measured.time_s(end * 1.000001) == pytest.approx(measured.time_s(end * 0.999999), rel=1e-4)
    assert (measured.extrapolates(4095), measured.extrapolates(4096), measured.extrapolates(2**20 + 1)) == (1, 0, 1)
    line = exact("all_reduce", 4, 1e-3, 1e7)
    assert line.time_s(2**30) == pytest.approx(ring_all_reduce_s(2**30, 4, 1e-3, 1e7))


def test_errors_are_those_of_predicting_each_inner_size_from_the_others():
    times = {1: 1.0, 10: 10.0, 100: 200.0, 1000: 1000.0}
    error = curve("send", 2, times).error
    # 10 from 1 and 100: sqrt(200); 100 from 10 and 1000: 100
    assert error.curve == pytest.approx((math.sqrt(200) / 10 - 1 + 0.5) / 2)
    line = exact("send", 2, 1e-3, 1e7).error
    assert line.fit == pytest.approx(0, abs=1e-9)
    assert line.curve > 0.01  # a line is bent on logarithmic scales, so the curve is not perfect where the fit is
    assert curve("send", 2, {1: 1.0, 10: 2.0}).error is None


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3, 16, 1000])
def test_exact_times_of_four_ranks_carry_over_to_any_number(kind, ranks):
    four = profile(4, 1e-3, 12.5e6)
    for size in (4, 1_000_000, 2**28):
        assert four.time_s(kind, size, world_size=ranks) == pytest.approx(
            collective_s(kind, size, ranks, 1e-3, 12.5e6), rel=0.05
        )
    assert four.time_s(kind, 2**20, world_size=ranks) == pytest.approx(collective_s(kind, 2**20, ranks, 1e-3, 12.5e6))
    assert four.time_s(kind, 2**20, world_size=1) == 0


def test_a_profile_says_when_it_goes_beyond_what_was_measured():
    four = profile(4)
    assert not four.extrapolates("all_reduce", 2**20)
    assert not four.extrapolates("all_reduce", 2**20, world_size=4)
    assert four.extrapolates("all_reduce", 2**20, world_size=5)
    assert four.extrapolates("all_reduce", 2**27)
    assert four.extrapolates("broadcast", 2**20)
    assert four.time_s("broadcast", 2**20) == pytest.approx(tree_broadcast_s(2**20, 4, 1e-3, 12.5e6))


def test_the_bandwidth_of_a_profile_is_that_of_its_largest_all_reduce():
    # 64 KiB pass a shaper's bucket at once, and say nothing about the link
    times = {2**16: 1e-3, 2**20: 0.126}
    assert LinkProfile(4, "gloo", (curve("all_reduce", 4, times),)).bytes_per_s == pytest.approx(1.5 * 2**20 / 0.126)


def test_a_disk_that_is_full_leaves_the_profile_that_is_there(tmp_path):
    path, before = tmp_path / "probe.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    profile().save(path)
    kept = path.read_text()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*probe\.json") as caught:
            profile().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
    assert path.read_text() == kept
    assert [each.name for each in tmp_path.iterdir()] == ["probe.json"]


def test_a_saved_profile_is_read_as_it_was(tmp_path):
    saved = replace(profile(4), curves=(*profile(4).curves[:2], curve("send", 4, {4: 2e-3, 16: 1e-3})))
    saved.save(tmp_path / "probe.json")
    assert LinkProfile.load(tmp_path / "probe.json") == saved
    # whoever reads the file without this package finds the fit in it, and no token that JSON does not know
    data = json.loads((tmp_path / "probe.json").read_text(), parse_constant=pytest.fail)
    assert data["curves"][0]["fit"]["bytes_per_s"] == pytest.approx(12.5e6)
    assert data["curves"][0]["leave_one_out_error"]["fit"] == pytest.approx(0, abs=1e-9)
    assert data["curves"][2]["fit"]["bytes_per_s"] is None


@pytest.mark.parametrize(
    ("text", "must_say"),
    [
        ("{", ["no JSON"]),
        ("[1]", ["some other JSON"]),
        ('{"curves": []}', ["some other JSON"]),
        ('{"format": "lightning_comm link profile", "schema": 99}', ["schema 99", "reads 1"]),
        ('{"format": "lightning_comm link profile", "schema": 1, "world_size": 2}', ["damaged", "backend"]),
    ],
)
def test_a_file_that_is_no_profile_is_named_with_what_is_wrong_and_a_way_out(text, must_say, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="LinkProfile: `path`") as caught:
        LinkProfile.load(path)
    must_say = [*must_say, str(path), "lightning-comm probe --out"]
    assert [word for word in must_say if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("call", "must_say"),
    [
        (lambda: profile().time_s("gather", 4), ["kind", "'gather'", "all_gather"]),
        (lambda: profile().time_s("all_reduce", -1), ["payload_bytes", "-1", ">= 0"]),
        (lambda: profile().time_s("all_reduce", 4, world_size=0), ["world_size", "got 0", ">= 1"]),
        (lambda: Curve("send", 2, ()), ["points", "at least one", "[]"]),
        (lambda: curve("send", 2, {8: 1.0, 4: 1.0}), ["points", "[8, 4]", "rising"]),
        (lambda: curve("send", 2, {8: 0.0}), ["median", "0.0"]),
        (lambda: LinkProfile(2, "gloo", (exact("send", 2, 1.0, 1.0),)), ["curves", "['send']", "all_reduce"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_rule(call, must_say):
    with pytest.raises(ValueError, match=r"^(costs|Curve|LinkProfile): ") as caught:
        call()
    assert [word for word in must_say if word not in str(caught.value)] == []
