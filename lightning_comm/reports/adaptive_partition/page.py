"""The page of a partitioned run: one HTML file that needs no other, for readers who ask which rank is slow."""

from collections.abc import Sequence

from lightning_comm.core.quantities import duration, percent
from lightning_comm.formats.adaptive_partition import RUN_FIELDS, Change, PartitionJournal, shown
from lightning_comm.reports.adaptive_partition import figures
from lightning_comm.reports.adaptive_partition.findings import Findings, findings
from lightning_comm.reports.adaptive_partition.text import (
    HEADER,
    about,
    how_measured,
    medians,
    rank_row,
    sentences,
    slowest_first,
)
from lightning_comm.reports.pieces import html_cards, html_figure, html_paragraphs, html_table, html_text, page
from lightning_comm.reports.svg import cannot_draw

_MOST_CHANGES = 100  # rows of the journal's table; of more, the first and the last are shown
_MOST_SIZES = 16  # ranks whose shares stand one by one in it
_STYLE = "<style>h2{margin-top:2.2rem}.changes th:nth-child(n+3),.changes td:nth-child(n+3){text-align:left}</style>"
_NO_FIGURES = (
    "The figures are left out: {}. Once that is mended, `partition_page(PartitionJournal.load(path))` makes the page "
    "again, with them."
)


def partition_page(journal: PartitionJournal) -> str:
    """Return the page of a run.

    Args:
        journal: What the run has written.

    Note:
        *Communication.* None.

    Example:
        >>> run = {"samples": 640, "global_batch_size": 64, "ranks": 2, "seed": 0, "shuffle": True, "tail": "keep"}
        >>> run |= {"sampler": "", "steps_per_epoch": 10, "min_per_rank": [1, 1], "max_per_rank": [None, None]}
        >>> journal = PartitionJournal(run, "fixed", (Change(0, 0, (16, 48), "start"),))
        >>> "Shares of the batch: 16, 48." in partition_page(journal)
        True

    """
    found = findings(journal)
    body = [_STYLE, f"<h1>Who computes how much?</h1><p>{html_text(_about(journal))}</p>"]
    body.append(_cards(found) if found else "")
    body.append(html_paragraphs(sentences(journal)))
    body += _figures(journal)
    if found is not None:
        many = len(found.ranks) > _MOST_SIZES
        rows = [rank_row(rank, found.total) for rank in (slowest_first(found) if many else found.ranks)]
        caption = medians(found).capitalize() + (", the slowest rank first" if many else "")
        body.append(f"<h2>By rank</h2><p>{html_text(caption)}.</p>" + html_table(HEADER, rows))
    body.append("<h2>Journal of the shares</h2>" + _changes(journal))
    if found is not None:
        body.append("<h2>How this was measured</h2>" + html_paragraphs(how_measured()))
    body.append("<h2>The run</h2>" + _settings(journal))
    return page("Shares of the batch by rank", "".join(body))


def _about(journal: PartitionJournal) -> str:
    text = f"AdaptivePartition in mode {journal.mode}: {about(journal)}"
    if not journal.windows:
        return f"{text}."
    last = journal.windows[-1]
    took = "" if last.seconds is None else f", {duration(last.seconds)} of training"
    windows = "1 window" if len(journal.windows) == 1 else f"{len(journal.windows):,} windows"
    return f"{text}. {windows} up to batch {last.batch:,} of epoch {last.epoch:,}{took}."


def _cards(found: Findings) -> str:
    cards: list[tuple[str, str]] = []
    if found.step_s is not None:
        cards.append((duration(found.step_s), "a step" + (", under the last shares" if found.start_step_s else "")))
    if found.step_s is not None and found.even_step_s and len({rank.samples for rank in found.ranks}) > 1:
        cards.append((f"{found.even_step_s / found.step_s:.2f}", "times as fast as an even split would be now"))
    if found.possible is not None and len(found.ranks) > 1:
        cards.append((f"{1 / (1 - found.possible):.2f}", "times as fast the best shares would be"))
    waits = [rank.wait_s for rank in found.ranks if rank.wait_s is not None]
    if found.step_s and len(waits) > 1:
        share = sum(waits) / len(waits) / found.step_s
        cards.append((percent(share), "of a step ranks wait for the slowest, on average"))
    return html_cards(cards)


def _figures(journal: PartitionJournal) -> list[str]:
    if not journal.windows and len(journal.changes) == 1:
        return []
    if (why := cannot_draw()) is not None:
        return [f"<p>{html_text(_NO_FIGURES.format(why))}</p>"]
    many = journal.ranks > figures.MOST_LINES
    parts = []
    flat = many and len(journal.changes) == 1 and len(set(journal.changes[0].sizes)) == 1
    if journal.ranks > 1 and not flat:
        caption = "Blue: more than an even share. Red: less. White: an even share." if many else ""
        parts.append(html_figure("Share of the batch", caption, figures.shares(journal)))
    if not journal.windows:
        return parts
    caption = "Dotted: shares change." if len(journal.changes) > 1 else ""
    if many:
        caption = f"Above: each rank's busy time against the median rank's; red is longer, blue shorter. {caption}"
    if journal.ranks > 1:
        parts.append(html_figure("Busy and waiting", caption, figures.busy_and_waiting(journal)))
    caption = "Dashed: what the best shares would make of it, by the speeds known at that moment."
    caption = caption if journal.ranks > 1 else ""
    parts.append(html_figure("Time of a step", caption, figures.step_time(journal)))
    return parts


def _changes(journal: PartitionJournal) -> str:
    shown: Sequence[Change] = journal.changes
    note = ""
    if len(shown) > _MOST_CHANGES:
        shown = (*shown[:1], *shown[1 - _MOST_CHANGES :])
        count = len(journal.changes)
        note = f"<p>The first and the last {_MOST_CHANGES - 1} of {count:,}; the journal's file has all.</p>"
    rows = [[f"{change.epoch:,}", f"{change.batch:,}", _sizes(change.sizes), change.why] for change in shown]
    header = ["from epoch", "batch", "samples of each rank", "why"]
    return f'{note}<div class="changes">{html_table(header, rows)}</div>'


def _sizes(sizes: Sequence[int]) -> str:
    if len(sizes) <= _MOST_SIZES:
        return ", ".join(map(str, sizes))
    least, most = min(sizes), max(sizes)
    if least == most:
        return f"{least} each"
    return f"{least} (rank {sizes.index(least)}) to {most} (rank {sizes.index(most)})"


def _settings(journal: PartitionJournal) -> str:
    rows = [[name, shown(journal.run[field])] for field, name in RUN_FIELDS.items()]
    return html_table(["", ""], rows)
