"""A probe of real processes: what it measures, that all ranks agree, and that it stops in time."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.processes import start_ranks

from lightning_comm.core.costs import LinkProfile, schedule
from lightning_comm.core.probe_plan import MAX_BYTES, ProbePlan, pairs
from lightning_comm.instruments import probe
from lightning_comm.instruments.nccl_log import ways_taken
from lightning_comm.instruments.probe import device_of_messages, host_names, link_ends, probe_link

SIZES = (4, 4096, 2**18, 2**20)
PLAN = ProbePlan(SIZES, repeats=3, seconds=30.0)


def _probe(rank: int, hosts: list[str], plan: ProbePlan) -> LinkProfile:
    return probe_link(
        plan, host=hosts[rank], node="abc".index(hosts[rank]), transport="test", environment={"command": "a test"}
    )


@pytest.fixture(scope="module")
def of_three():
    return start_ranks(_probe, ["a", "b", "c"], PLAN, world_size=3)


@pytest.fixture(scope="module")
def of_two():
    return start_ranks(_probe, ["a", "a"], replace(PLAN, sizes=(4, 1024, MAX_BYTES // 2, MAX_BYTES)), world_size=2)


def _devices(rank: int) -> list[str]:
    return [str(device_of_messages(torch.device(name))) for name in ("cuda:0", "cpu")]


def test_with_gloo_messages_are_in_the_hosts_memory_since_it_sends_none_of_a_gpus(monkeypatch):
    assert start_ranks(_devices, world_size=1) == [["cpu", "cpu"]]
    monkeypatch.setattr(probe.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert device_of_messages(torch.device("cuda:1")) == torch.device("cuda:1")
    assert device_of_messages(torch.device("cpu")) == torch.device("cpu")


def test_all_ranks_come_to_the_same_figures(of_three, of_two):
    for profiles in (of_three, of_two):
        first, *others = [replace(profile, environment={}) for profile in profiles]
        assert others == [first] * len(others)


def test_every_size_of_every_kind_is_measured_while_time_allows(of_three):
    assert [curve.kind for curve in of_three[0].curves] == ["all_reduce", "all_gather", "send"]
    for curve in of_three[0].curves:
        assert [point.payload_bytes for point in curve.points] == list(SIZES)
        assert curve.not_measured == ()
        for point in curve.points:
            assert point.repeats == 3
            assert 0 < point.lower_s <= point.median_s <= point.upper_s < 10


def test_64_mib_take_longer_than_4_bytes(of_two):
    for kind in ("all_reduce", "send"):
        points = of_two[0].curve(kind).points
        assert points[-1].payload_bytes == MAX_BYTES
        assert points[-1].median_s > points[0].median_s


def test_both_directions_of_every_pair_are_measured(of_three):
    links = of_three[0].links
    # where other work on this machine hides what a message costs, that link is left out: then it is measured again
    for _ in range(4):
        links = links or start_ranks(_probe, ["a", "b", "c"], PLAN, world_size=3)[0].links
    assert links
    assert {(link.source, link.target) for link in links} <= {("abc"[a], "abc"[b]) for a, b in pairs(3)}
    for link in links:
        assert link.latency_s > 0
        assert 0 < link.lower_bytes_per_s <= link.bytes_per_s <= link.upper_bytes_per_s


def test_ranks_of_one_host_stand_in_for_hosts(of_two):
    profile = of_two[0]
    assert profile.hosts == ("a", "a")
    assert link_ends(profile.hosts) == {"rank 0": 0, "rank 1": 1}
    # where other work on this machine hides what a message costs, that link is left out
    assert {end for link in profile.links for end in (link.source, link.target)} <= {"rank 0", "rank 1"}


def test_what_is_gathered_never_outgrows_the_memory_that_was_announced(of_two):
    gathers = of_two[0].curve("all_gather")
    assert gathers.points[-1].payload_bytes * 2 == MAX_BYTES
    assert gathers.not_measured == (MAX_BYTES,)
    assert of_two[0].curve("all_reduce").not_measured == ()


def test_the_profile_says_where_it_comes_from(of_three, tmp_path):
    profile = of_three[0]
    assert (profile.world_size, profile.backend, profile.transport) == (3, "gloo", "test")
    assert profile.environment["command"] == "a test"
    profile.save(tmp_path / "probe.json")
    assert LinkProfile.load(tmp_path / "probe.json") == profile


def _slow_probe(rank: int, plan: ProbePlan) -> tuple[LinkProfile, float, int]:
    """Probe where an all-reduce of 64 KiB and more takes as long as its bytes at 1 MB/s, on rank 1 alone."""
    real = dist.all_reduce
    most = 0

    def slow(tensor, *args, **kwargs):
        nonlocal most
        most = max(most, tensor.nbytes)
        done = real(tensor, *args, **kwargs)
        if rank == 1 and tensor.nbytes >= 2**16:
            time.sleep(tensor.nbytes / 1e6)
        return done

    probe.dist.all_reduce = slow
    profile = probe_link(plan, host=f"h{rank}")
    return profile, float(profile.environment["seconds"]), most


def test_sizes_that_would_break_the_budget_are_left_out_and_named_on_all_ranks(run_ranks):
    # 256 KiB take 0.26 s, so three samples fit into half of 4 s; 1 MiB take 1.05 s, and three of them do not.
    plan = ProbePlan((4, 2**16, 2**18, 2**20, 2**22), repeats=3, seconds=4.0)
    outcomes = run_ranks(_slow_probe, plan, world_size=2)
    assert outcomes[0][0].curves == outcomes[1][0].curves
    for profile, seconds, most in outcomes:
        reduces = profile.curve("all_reduce")
        assert [point.payload_bytes for point in reduces.points] == [4, 2**16, 2**18]
        assert reduces.not_measured == (2**20, 2**22)
        assert most <= 2**20  # a first call may be made to see, but none of the size after it
        assert seconds < 2 * plan.seconds
        # the other kinds have their own share, which the slow all-reduce has not used up
        assert len(profile.curve("all_gather").points) > 3
        assert len(profile.curve("send").points) > 2
        # the slowest rank's time counts, on both ranks
        assert reduces.points[-1].median_s >= 0.26


def _refused(rank: int) -> tuple[str, int]:
    with pytest.raises(ValueError, match="seconds") as caught:
        probe_link(ProbePlan((2**20,), repeats=4, seconds=1e-6), host="a")
    everyone = [""] * 2
    dist.all_gather_object(everyone, str(caught.value))  # the ranks are still in step
    return str(caught.value), len(set(everyone))


def test_a_budget_too_small_for_any_size_is_refused_by_all_ranks_alike(run_ranks):
    for message, kinds_of_message in run_ranks(_refused, world_size=2):
        assert kinds_of_message == 1
        assert [word for word in ["1048576 bytes, 5 times", "got 1e-06", "smaller sizes"] if word not in message] == []


def test_bus_bandwidth_is_the_rings_share_of_the_payload_by_time(of_three):
    point = of_three[0].curve("all_reduce").points[-1]
    assert of_three[0].bytes_per_s == pytest.approx(4 / 3 * point.payload_bytes / point.median_s)
    assert schedule("all_reduce", 3).wire_share == 4 / 3


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([("a", 0), ("a", 0), ("b", 1)], ["a", "a", "b"]),
        ([("box", 0), ("box", 0), ("box", 1)], ["box/0", "box/0", "box/1"]),
        ([("a", 0)], ["a"]),
    ],
)
def test_hosts_of_one_name_are_told_apart_by_their_number(places, names):
    assert host_names(places) == names


def test_the_ways_that_nccl_took_are_read_from_its_log():
    # Lines of public reports: NVIDIA/nccl issue 952 and 1817, NVIDIA/nccl-tests issue 252.
    log = """
        h:919:1150 [0] NCCL INFO Channel 01/0 : 8[0] -> 15[7] via P2P/IPC/read
        h:926:1151 [7] NCCL INFO Channel 03/0 : 15[7] -> 6[6] [send] via NET/Socket/3
        h:27225:27907 [3] NCCL INFO Channel 03/0 : 7[3] -> 3[3] [receive] via NET/IBext_v8/3/GDRDMA
        h:27224:27909 [2] NCCL INFO Channel 02/0 : 2[2] -> 0[0] via P2P/CUMEM
        h:3884994:3885022 [0] NCCL INFO Connected all rings
        h:1:2 [0] NCCL INFO NET/IB : No device found.
    """
    assert ways_taken(log) == ["NET/IBext_v8", "NET/Socket", "P2P"]
    assert ways_taken("") == []
