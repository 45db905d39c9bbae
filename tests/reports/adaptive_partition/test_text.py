"""The report of a partitioned run says what its windows hold: who is slow, what was gained, and when to leave it."""

import math
import random
from fractions import Fraction

import pytest
from support.partition_journals import journal, run_of, window

from lightning_comm.formats.adaptive_partition import Change, PartitionJournal
from lightning_comm.reports.adaptive_partition.findings import findings
from lightning_comm.reports.adaptive_partition.text import summary


def told(made):
    return summary(made).splitlines()


def rows(made):
    """The cells of the terminal's table by rank."""
    lines = told(made)
    first = next(number for number, line in enumerate(lines) if line.startswith("----")) + 1
    table = [line.replace(" ms", "ms").replace(" %", "%").split() for line in lines[first : first + made.ranks]]
    return {int(cells[0]): cells[1:] for cells in table if cells[0].isdigit()}


def observed(windows, sizes=None, mode="observe"):
    sizes = sizes or windows[0].sizes
    return PartitionJournal(run_of(len(sizes), sum(sizes)), mode, (Change(0, 0, sizes, "start"),), tuple(windows))


def test_speed_score_share_and_times_of_each_rank_are_told():
    made = observed([window((32, 32), busy_s=(0.032, 0.096), fetch_s=(0.004, 0.002), step_s=0.1)])
    assert rows(made)[0] == ["1,000", "1.00", "32", "50.0%", "32.0ms", "64.0ms", "4.0ms"]
    assert rows(made)[1] == ["333", "0.33", "32", "50.0%", "96.0ms", "0.0ms", "2.0ms"]
    assert "Rank 1 is the slowest: 0.33 times as fast as the fastest, rank 0." in summary(made)


def test_the_gain_of_an_even_split_is_mean_speed_by_lowest_speed_in_exact_arithmetic():
    chance = random.Random(0)
    for ranks in (2, 3, 8):
        millis = [chance.randint(10, 90) for _ in range(ranks)]
        speeds = [Fraction(8000, each) for each in millis]
        found = findings(observed([window((8,) * ranks, busy_s=[each / 1000 for each in millis])]))
        assert found.even_ratio == pytest.approx(float(sum(speeds) / ranks / min(speeds)))
        assert found.even_step_s == pytest.approx(found.step_s)  # which is the split in force
        best_s = float(8 * ranks / sum(speeds))
        assert found.best_step_s == pytest.approx(best_s + 0.01)  # the rest of the step, which no split changes


def test_sums_of_shares_are_the_batch_and_busy_and_waiting_the_time_of_the_slowest():
    found = findings(journal([1.0, 2.0, 4.0], windows=1, jitter=0.1))
    assert sum(rank.samples for rank in found.ranks) == found.total == 64
    assert {round(rank.busy_s + rank.wait_s, 12) for rank in found.ranks} == {
        round(max(rank.busy_s for rank in found.ranks), 12)
    }


def test_observing_tells_what_balancing_would_gain_and_how_to_have_it():
    said = summary(journal([1.0, 3.0], windows=3, mode="observe"))
    assert "The best shares (48, 16 samples) would be 1.83 times as fast." in said  # 48 of 106 ms
    assert '`mode="balance"` does that.' in said
    assert "make compute 2.00 times as fast, and the whole step, 10.0 ms of which no split changes, 1.83 times" in said
    assert "under the shares at the start" not in said


def test_balancing_tells_what_it_has_gained_by_medians_of_the_first_and_the_last_windows():
    said = summary(journal([1.0, 3.0], windows=9, move_after=2))
    assert (
        "A step took 106.0 ms under the shares at the start (median of 2 windows) and 58.0 ms under the last ones "
        "(7 windows): 1.83 times as fast."
    ) in said
    assert "an even split would take 106.0 ms a step at the speeds of the last windows: these shares are" in said
    assert "are 1.83 times as fast; fixed costs of a batch make that less." in said
    assert "Better shares would be less than 1.03 times as fast: keep these shares." in said


def test_a_run_that_became_slower_is_told_as_such():
    before, after = window((32, 32), busy_s=(0.03, 0.03)), window((40, 24), busy_s=(0.06, 0.03), batch=39)
    changes = (Change(0, 0, (32, 32), "start"), Change(0, 20, (40, 24), "balance"))
    said = summary(PartitionJournal(run_of(2), "balance", changes, (before, after)))
    assert "and 70.0 ms under the last ones (1 window): 0.57 times as fast." in said


@pytest.mark.parametrize(("slow", "nothing"), [(1.0, True), (1.02, True), (1.2, False)])
def test_where_there_is_next_to_nothing_to_gain_the_even_split_is_to_be_kept_and_only_there(slow, nothing):
    said = summary(journal([1.0, slow], windows=3, mode="observe", global_batch_size=2048))
    assert ("Better shares would be less than 1.03 times as fast: keep the even split." in said) == nothing
    assert ("All ranks are equally fast" in said) == nothing
    assert ("By the closed form" in said) != nothing


@pytest.mark.parametrize(("fetch", "bound"), [(0.19, False), (0.21, True)])
def test_a_rank_that_waits_for_data_for_more_than_a_fifth_of_its_busy_time_is_named(fetch, bound):
    one = window((32, 32), busy_s=(0.1, 0.1), fetch_s=(0.0, 0.1 * fetch))
    said = summary(observed([one]))
    assert ("Rank 1 (21.0 %) waits for data" in said) == bound
    assert "(0.0 %)" not in said


def test_without_windows_the_shares_are_told_and_that_nothing_is_known():
    made = PartitionJournal(run_of(2), "fixed", (Change(0, 0, (16, 48), "start"),))
    assert told(made) == [
        "AdaptivePartition (fixed): 64 samples a step on 2 ranks; shares never changed",
        "Shares of the batch: 16, 48.",
        "Nothing was measured, so nothing is known of the ranks' speeds.",
    ]


def test_one_rank_has_nothing_to_share():
    said = summary(journal([1.0]))
    assert said.endswith("One rank takes the whole batch: there is nothing to share.")
    assert "slowest" not in said


def test_of_64_ranks_the_slowest_16_are_shown_and_8_are_named():
    said = summary(journal([1.0] * 44 + [1.5] * 19 + [4.0], windows=2, mode="observe", global_batch_size=4096))
    table = [line for line in said.splitlines() if line.split()[0].isdigit()]
    assert len(table) == 16
    assert table[0].split()[:3] == ["63", "250", "0.25"]
    assert "These are the 16 slowest ranks; 48 more are left out." in said
    assert "Rank 63 is the slowest: 0.25 times as fast" in said
    assert "51 (0.67) and 11 more." in said
    assert max(map(len, said.splitlines())) < 300


def test_what_is_not_known_is_left_open_and_never_guessed():
    sick = window((32, 32), busy_s=(math.nan, 0.2), fetch_s=(math.nan, math.nan), step_s=math.nan)
    said = summary(observed([sick]))
    assert rows(observed([sick]))[0] == ["-", "-", "32", "50.0%", "-", "-", "-"]
    assert "The speeds of the ranks are not known: too little was measured." in said
    assert "nan" not in said


def test_a_rank_without_samples_has_no_speed():
    found = findings(observed([window((64, 0), busy_s=(0.064, 0.001))]))
    assert [rank.speed for rank in found.ranks] == [1000.0, None]
    assert found.even_ratio is None


def test_figures_are_of_the_windows_under_the_last_shares_alone():
    found = findings(journal([1.0, 3.0], windows=9, move_after=2))
    assert found.windows == 7
    assert [rank.samples for rank in found.ranks] == [48, 16]
    assert found.step_s == pytest.approx(0.058)
