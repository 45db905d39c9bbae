"""The page of a partitioned run holds the numbers of its journal, for 1 rank and for 64, and needs no other file."""

import base64
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from support.partition_journals import journal, run_of, window

from lightning_comm.formats.adaptive_partition import Change, PartitionJournal
from lightning_comm.reports.adaptive_partition import figures as partition_figures
from lightning_comm.reports.adaptive_partition.page import partition_page

TITLES = ["Share of the batch", "Busy and waiting", "Time of a step"]


def figures(page):
    return re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page)


def cells(page, title):
    table = page.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]


def test_the_page_holds_the_numbers_it_was_given():
    page = partition_page(journal([1.0, 3.0], windows=9, move_after=2, fetch=0.25))
    assert cells(page, "By rank")[0] == ["0", "1,000", "1.00", "48", "75.0 %", "48.0 ms", "0.0 ms", "12.0 ms"]
    assert cells(page, "By rank")[1] == ["1", "333", "0.33", "16", "25.0 %", "48.0 ms", "0.0 ms", "12.0 ms"]
    assert cells(page, "Journal of the shares") == [
        ["0", "0", "32, 32", "start"],
        ["0", "42", "48, 16", "balance: 1.83 times as fast"],
    ]
    assert ["samples of the data set", "50,000"] in cells(page, "The run")
    assert "9 windows up to batch 79 of epoch 1" in page
    assert [title for title, _ in figures(page)] == TITLES


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 8, 9, pytest.param(64, marks=pytest.mark.exhaustive)]
)
def test_every_figure_can_be_drawn_and_few_ranks_have_a_line_each(ranks):
    page = partition_page(journal([1.0] * (ranks - 1) + [2.0], windows=12, move_after=3, global_batch_size=64 * ranks))
    drawn = [base64.b64decode(source) for _, source in figures(page)]
    assert len(drawn) == 3
    assert [ElementTree.fromstring(svg).tag for svg in drawn] == ["{http://www.w3.org/2000/svg}svg"] * 3
    named = {f"rank {rank}" for rank in range(ranks) if f"<!-- rank {rank} -->".encode() in drawn[1]}
    assert len(named) == (ranks if ranks <= partition_figures.MOST_LINES else 0)
    assert len(page) < 1_000_000


def test_a_table_of_64_ranks_begins_with_the_slowest_and_its_journal_stays_short(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures of so many ranks take long, and are not looked at
    page = partition_page(journal([1.0] * 63 + [2.0], windows=4, move_after=2, global_batch_size=4096))
    by_rank = page.split("<h2>By rank</h2>")[1].split("</table>")[0]
    assert by_rank.count("<tr>") == 65
    assert re.findall(r"<td>(.*?)</td>", by_rank)[:3] == ["63", "500", "0.50"]
    sizes = [row[2] for row in cells(page, "Journal of the shares")]
    assert sizes[0] == "64 each"
    assert re.fullmatch(r"\d+ \(rank 63\) to \d+ \(rank 0\)", sizes[1])


def test_of_very_many_windows_and_changes_the_page_stays_small():
    sizes = [(32 + number % 2, 32 - number % 2) for number in range(500)]
    changes = tuple(Change(number, 0, each, f"move {number}") for number, each in enumerate(sizes))
    windows = tuple(
        window(each, busy_s=(0.03, 0.03), epoch=number // 4, batch=number % 4) for number, each in enumerate(sizes * 4)
    )
    page = partition_page(PartitionJournal(run_of(2), "balance", changes, windows))
    assert len(page) < 600_000
    assert len(cells(page, "Journal of the shares")) == 100
    assert "The first and the last 99 of 500" in page
    assert "<td>move 0</td>" in page
    assert "<td>move 499</td>" in page
    assert "<td>move 400</td>" not in page


def test_without_windows_there_is_nothing_to_draw_but_shares_that_change():
    start = Change(0, 0, (16, 48), "start")
    page = partition_page(PartitionJournal(run_of(2), "fixed", (start,)))
    assert figures(page) == []
    assert "Shares of the batch: 16, 48." in page
    assert "By rank" not in page
    replayed = PartitionJournal(run_of(2), "fixed", (start, Change(1, 5, (20, 44), "replay")))
    assert [title for title, _ in figures(partition_page(replayed))] == TITLES[:1]


@pytest.mark.parametrize("name", ["busy_and_waiting", "step_time"])
def test_a_figure_of_times_says_of_a_journal_without_windows_what_to_do(name):
    nothing = PartitionJournal(run_of(2), "observe", (Change(0, 0, (32, 32), "start"),))
    with pytest.raises(ValueError, match=f"{name}: journal.windows is empty.*fewer `window_steps`"):
        getattr(partition_figures, name)(nothing)


def test_one_rank_has_a_figure_of_its_steps_alone():
    page = partition_page(journal([1.0], windows=3))
    assert [title for title, _ in figures(page)] == TITLES[2:]
    assert "there is nothing to share" in page


@pytest.mark.parametrize("ranks", [2, 12])
def test_windows_of_which_nothing_is_known_leave_gaps(ranks):
    sizes = (8,) * ranks
    sick = [window(sizes, busy_s=(None,) * ranks, fetch_s=(None,) * ranks, step_s=None, batch=19)]
    well = [window(sizes, busy_s=(0.1,) * ranks, batch=39)] if ranks == 12 else []
    changes = (Change(0, 0, sizes, "start"), Change(0, 30, sizes, "balance"))
    page = partition_page(PartitionJournal(run_of(ranks, 8 * ranks), "balance", changes, (*sick, *well)))
    assert len(figures(page)) == 3
    assert "nan" not in re.sub(r'base64,[^"]+', "", page)


def test_text_is_escaped_and_the_page_needs_no_other_file():
    evil = "<script>alert('1')</script> & `code`"
    made = PartitionJournal(run_of(2) | {"sampler": evil}, "fixed", (Change(0, 0, (32, 32), evil),))
    page = partition_page(made)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2
    assert re.findall(r'(?:src|href)="(?!data:)', partition_page(journal([1.0, 2.0]))) == []


def test_without_matplotlib_the_page_has_tables_and_says_how_to_get_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    page = partition_page(journal([1.0, 3.0]))
    assert figures(page) == []
    assert "<code>pip install matplotlib</code>" in page
    assert "<code>partition_page(PartitionJournal.load(path))</code>" in page
    assert len(cells(page, "Journal of the shares")) == 1
