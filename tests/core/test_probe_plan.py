"""The plan of a probe: which sizes, how many calls, and when it has to stop."""

import pytest

from lightning_comm.core.probe_plan import ProbePlan, growth, pairs, sizes_between


def test_sizes_go_up_in_factors_of_four_and_end_with_the_greatest():
    assert sizes_between(4, 64 * 2**20) == tuple(4**k for k in range(1, 14))
    assert sizes_between(1024, 5000) == (1024, 4096, 5000)
    assert sizes_between(8, 8) == (8,)


def test_parts_of_the_budget_end_one_after_the_other():
    plan = ProbePlan((4,), seconds=10.0)
    last_call_s = {
        part: max(s / 100 for s in range(1100) if plan.affords(part, elapsed_s=s / 100, calls=0, call_s=1.0))
        for part in ("all_reduce", "all_gather", "links", "send")
    }
    assert list(last_call_s.values()) == sorted(set(last_call_s.values()))
    assert last_call_s["send"] == 10.0


def test_what_one_part_leaves_over_is_the_next_ones():
    plan = ProbePlan((4,), seconds=10.0)
    assert not plan.affords("all_reduce", elapsed_s=0.0, calls=6, call_s=1.0)
    assert plan.affords("all_gather", elapsed_s=0.0, calls=6, call_s=1.0)


def test_a_short_message_is_repeated_within_a_sample_and_a_long_one_is_not():
    calls = [ProbePlan.calls_in_a_sample(seconds) for seconds in (0.0, 1e-6, 1e-3, 4e-3, 1.0)]
    assert calls == [20, 20, 5, 2, 1]


@pytest.mark.parametrize("members", [2, 3, 4, 5, 6, 9, 100])
def test_everyone_exchanges_messages_with_the_two_on_each_side_in_both_directions(members):
    ways = pairs(members)
    assert all((b, a) in ways for a, b in ways)
    assert all(a != b for a, b in ways)
    assert len(ways) == len(set(ways)) == members * min(4, members - 1)
    if members <= 5:
        assert ways == [(a, b) for a in range(members) for b in range(members) if a != b]


def test_a_link_grows_until_its_share_of_time_is_used_and_equal_links_grow_together():
    assert growth([0.006, 0.007, 0.02, 0.06], share_s=0.1) == [16, 4, 4, 0]
    # noise around the limit of 25 ms: one could go on, so those like it do as well
    assert growth([0.024, 0.026, 0.049], share_s=0.1) == [4, 4, 4]
    assert growth([0.026, 0.049], share_s=0.1) == [0, 0]
    # a link that is many times slower is done
    assert growth([0.024, 0.24], share_s=0.1) == [4, 0]


@pytest.mark.parametrize(
    ("call", "must_say"),
    [
        (lambda: ProbePlan((4, 3)), ["sizes", "(4, 3)", "rising", "4,1KiB"]),
        (lambda: ProbePlan(()), ["sizes", "at least one", "()"]),
        (lambda: ProbePlan((6,)), ["sizes", "got 6", "multiples of 4", "next one is 8"]),
        (lambda: ProbePlan((0, 4)), ["sizes", "got 0", "next one is 4"]),
        (lambda: ProbePlan((4,), repeats=0), ["repeats", "got 0", ">= 1", "5"]),
        (lambda: ProbePlan((4,), seconds=0.0), ["seconds", "got 0.0", "> 0", "Try 12"]),
        (lambda: ProbePlan((4,), seconds=float("inf")), ["seconds", "got inf"]),
        (lambda: sizes_between(2, 8), ["min_bytes", "got 2", "next one is 4"]),
        (lambda: sizes_between(4, 9), ["max_bytes", "got 9", "next one is 12"]),
        (lambda: sizes_between(64, 16), ["min_bytes", "max_bytes", "64 and 16", "Swap"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_the_rule_and_a_way_out(call, must_say):
    with pytest.raises(ValueError, match=r"^probe: ") as caught:
        call()
    assert [word for word in must_say if word not in str(caught.value)] == []
