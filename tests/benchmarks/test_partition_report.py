"""The arithmetic of the report on shares by speed, against numbers worked out by hand."""

import pytest

from benchmarks.adaptive_partition import __main__ as adaptive_partition
from benchmarks.adaptive_partition import report
from lightning_comm.core.adaptive_partition.shares import RankCost

COSTS = [[0.0, 0.003], [0.0, 0.001]]  # 1 : 3
TOTAL = 64  # even: 96 ms; optimum 16 + 48: 48 ms


def balanced(reached=1, batches=5 + 6 * 20):
    """Steps of a run that is slow until some windows after its first plan."""
    slow = 25 + 20 * (reached - 1)
    return [0.100] * slow + [0.050] * (batches - slow)


def arm(steps_s, changes=1, windows=(24, 44, 64)):
    found = {"steps_s": steps_s, "overruns": 0, "paced_steps": 50, "excess": 0.002, "real_share": 0.04}
    found["changes"] = [{"batch": 25 * number, "sizes": [1]} for number in range(changes)]
    return {**found, "windows": [{"batch": batch} for batch in windows]}


def repeat(even_s=0.100, optimum_s=0.050, reached=1, changes=2):
    tools = {
        "even": arm([even_s] * 40),
        "balance": arm(balanced(reached), changes),
        "optimum": arm([optimum_s] * 40),
        "plain": arm([even_s * 1.01] * 40),
    }
    return {"tools": tools, "costs": COSTS, "load": 0.5}


def configuration(repeats, **more):
    found = {"part": "speeds", "title": "1 : 3", "total": TOTAL, "window_steps": 20, "change_at": 0, "note": "16, 48."}
    found |= {"steady": {"even": 25, "balance": 40, "optimum": 25}, "command": "python x.py", "error": ""}
    return {**found, "repeats": repeats, **more}


def test_gains_are_paired_by_repeat_and_stand_beside_theory():
    gain = report.gain_of(configuration([repeat(), repeat(even_s=0.110)]))
    assert gain.measured == pytest.approx((2.0, 2.2))
    assert gain.closed == pytest.approx((2.0, 2.0))
    # 4 ms of the even step are no compute: (96 + 4) / (48 + 4), and 14 ms in the second repeat
    assert gain.expected == pytest.approx((100 / 52, 110 / 62))
    assert gain.over_optimum == pytest.approx((0.0, 0.0))
    assert gain.moves == (1, 1)


def test_a_step_that_is_shorter_than_its_compute_has_nothing_beside_it():
    costs = [RankCost(*cost) for cost in COSTS]
    assert report.exposed_s(0.100, costs, TOTAL) == pytest.approx(0.004)
    assert report.exposed_s(0.090, costs, TOTAL) == 0


def test_speeds_are_those_at_an_even_share_where_some_time_is_fixed():
    fixed = {**repeat(), "costs": [[0.032, 0.001], [0.0, 0.001]]}
    # 64 ms and 32 ms for 32 samples: speeds 1 : 2
    assert report.gain_of(configuration([fixed])).closed == pytest.approx((1.5,))


@pytest.mark.parametrize("reached", [1, 2, 3, 5])
def test_windows_are_counted_from_the_first_batch_that_a_plan_could_hold_from(reached):
    assert report.gain_of(configuration([repeat(reached=reached)])).until == (reached,)


def test_a_window_is_reached_within_five_percent_and_only_whole_ones_count():
    assert report.window_reached([0.2] * 10 + [0.105] * 10, 0, 10, 0.1) == 2
    assert report.window_reached([0.2] * 10 + [0.1051] * 10, 0, 10, 0.1) is None
    assert report.window_reached([0.2] * 10 + [0.1] * 9, 0, 10, 0.1) is None


def test_after_a_change_of_speed_the_window_that_it_falls_into_does_not_count():
    changed = configuration([repeat(reached=3)], change_at=30)  # the window that ends at batch 44 has both speeds
    assert report.gain_of(changed).until == (1,)  # 65 to 84
    assert report.gain_of(changed).batches == (35,)
    assert report.gain_of(changed).moves == (0,)  # the one at batch 25 came before


def test_a_run_that_ended_before_a_plan_could_hold_never_reached_the_optimum():
    assert report.gain_of(configuration([repeat()], change_at=100)).until == (None,)


def test_few_repeats_or_an_optimum_that_spreads_are_inconclusive():
    few = report.verdicts(report.gain_of(configuration([repeat()] * 4)))
    assert "fewer than 5 repeats" in few[0]
    loose = report.verdicts(report.gain_of(configuration([repeat()] * 4 + [repeat(optimum_s=0.052)])))
    assert "spreads by 4.0 %" in loose[0]
    assert "inconclusive" in loose[0]
    fine = report.verdicts(report.gain_of(configuration([repeat()] * 4 + [repeat(reached=4)])))
    assert "so this counts" in fine[0]
    assert "4 of 5 repeats" in fine[1]


def means(even, balance, moves=0, **more):
    tools = {"even": {"mean_s": even}, "balance": {"mean_s": balance, "moves": moves, "compared": 75}}
    return {"tools": {**tools, **more}, "load": 1.5}


def test_the_cost_is_that_of_pairs():
    assert report.paired_cost([means(0.1, 0.101), means(0.2, 0.206)], "balance", "even") == pytest.approx([0.01, 0.03])
    three = {"tools": {"without": {"mean_s": 1.0}, "again": {"mean_s": 3.0}, "observe": {"mean_s": 2.1}}}
    assert report.paired_cost([three], "observe", "without", "again") == pytest.approx([0.05])


@pytest.mark.parametrize(
    ("repeats", "answer"),
    [
        ([means(0.1, 0.101)] * 3, "yes"),
        ([means(0.1, 0.101), means(0.1, 0.101), means(0.1, 0.11)], "yes"),  # by the median
        ([means(0.1, 0.103)] * 3, "**no**"),
        ([means(0.1, 0.1), means(0.1, 0.1, moves=2), means(0.1, 0.1)], "**no**"),  # in any repeat
    ],
)
def test_equal_ranks_must_cost_little_and_move_at_most_once(repeats, answer):
    table, said = report.jitter_section([{"title": "4", "repeats": repeats}])
    assert f"2 % cost: {answer}" in said
    assert "75, 75, 75" in table


def test_a_page_has_the_parts_that_were_measured_and_says_what_ended_early():
    whole = {"title": "Shares by speed", "date": "2026-01-02", "environment": "torch 9"}
    configurations = [configuration([repeat()] * 5), configuration([], error="it broke", title="1 : 9")]
    page = adaptive_partition.PAGE.of({**whole, "configurations": configurations})
    assert page.startswith("# Shares by speed, 2026-01-02\n")
    assert "| 1 : 3 | 100.0 | 50.0 | 50.0 | 2.00 | 1.92 | 2.00 (2.00 to 2.00) | 2.00 | +0.0 % (+0.0 to +0.0) |" in page
    assert "step: -0.99 % (-0.99 to -0.99)" in page  # even by the loader against a plain one
    assert "no of 1000 steps" in page
    assert "1 : 9 ended early:\n\n      it broke" in page
    assert "## Equal ranks" not in page


def test_the_arms_are_those_of_the_known_speeds():
    arms, costs, total = adaptive_partition.speed_arms("1 : 1, one becomes 3 times slower")
    assert total == 64
    assert arms["optimum"].sizes == (16, 48)
    assert [cost.seconds(32) for cost in costs] == pytest.approx([0.12, 0.04])
    arms, _, _ = adaptive_partition.speed_arms("1 : 2 : 4")
    assert arms["even"].sizes == (32, 32, 32)
    assert sum(arms["optimum"].sizes) == 96


def test_parts_that_are_not_asked_for_stay_as_they_were(tmp_path):
    out = str(tmp_path / "x.md")
    first = adaptive_partition.Run(["jitter", "speeds"], out)
    for part in ("jitter", "speeds"):
        first.begin(part, part)
    first.results.write()
    again = adaptive_partition.Run(["speeds"], out)
    assert [each["part"] for each in again.results.report["configurations"]] == ["jitter"]
