"""The text of a partitioned run's report, in sentences and rows, for the terminal and for the page."""

from collections.abc import Sequence

from lightning_comm.core.quantities import duration, percent, times_as_fast
from lightning_comm.formats.adaptive_partition import PartitionJournal
from lightning_comm.reports.adaptive_partition.findings import Findings, RankFindings, findings
from lightning_comm.reports.pieces import text_table

LITTLE = 0.03  # of a step: what saves less is not worth moving for
_ALIKE = 0.05  # of speed: ranks that differ by less are called equally fast
_DATA_BOUND = 0.2  # of a rank's busy time
_MOST_ROWS = 16  # ranks in the terminal's table; of more, the slowest are shown
_MOST_NAMED = 8  # ranks in a sentence
_ADVICE = {
    "observe": ' `mode="balance"` does that.',
    "balance": " Shares stay while that is less than `min_gain`, or not sure yet.",
}
HEADER = ("rank", "samples/s", "score", "batch", "share", "busy", "waiting", "fetch")


def summary(journal: PartitionJournal) -> str:
    """Return the report of a run for the terminal.

    Note:
        *Communication.* None.

    """
    found = findings(journal)
    head = f"AdaptivePartition ({journal.mode}): {about(journal)}"
    if found is None:
        return "\n".join([head, *sentences(journal)])
    rows, left_out = found.ranks, 0
    if len(rows) > _MOST_ROWS:
        rows, left_out = slowest_first(found)[:_MOST_ROWS], len(rows) - _MOST_ROWS
    head += f"; {medians(found)}"
    table = text_table(HEADER, [rank_row(rank, found.total) for rank in rows])
    more = [f"These are the {_MOST_ROWS} slowest ranks; {left_out} more are left out."] if left_out else []
    return "\n".join([head, table, *more, *sentences(journal)])


def about(journal: PartitionJournal) -> str:
    """Return what was shared and how often shares changed."""
    moves = len(journal.changes) - 1
    changed = "shares never changed" if moves == 0 else f"shares changed {_times(moves)}"
    ranks = "1 rank" if journal.ranks == 1 else f"{journal.ranks} ranks"
    return f"{journal.global_batch_size:,} samples a step on {ranks}; {changed}"


def medians(found: Findings) -> str:
    """Return which windows the figures rest on."""
    return f"medians of the last {_windows(found.windows)}, all under the same shares"


def rank_row(rank: RankFindings, total: int) -> list[str]:
    """Return the row of one rank: what :data:`HEADER` names."""
    return [
        str(rank.rank),
        "-" if rank.speed is None else f"{rank.speed:,.{0 if rank.speed >= 100 else 1}f}",
        "-" if rank.score is None else f"{rank.score:.2f}",
        f"{rank.samples:,}",
        percent(rank.samples / total),
        *(_time(seconds) for seconds in (rank.busy_s, rank.wait_s, rank.fetch_s)),
    ]


def slowest_first(found: Findings) -> tuple[RankFindings, ...]:
    """Return the ranks by speed; those whose speed is not known come last."""
    return tuple(sorted(found.ranks, key=lambda rank: 2.0 if rank.score is None else rank.score))


def sentences(journal: PartitionJournal) -> list[str]:
    """Return what the figures mean, one finding a sentence."""
    found = findings(journal)
    if journal.ranks == 1:
        return ["One rank takes the whole batch: there is nothing to share."]
    if found is None:
        split = f"Shares of the batch: {_numbers(journal.changes[-1].sizes)}."
        nothing = "Nothing was measured, so nothing is known of the ranks' speeds"
        if journal.mode == "fixed":
            return [split, f"{nothing}."]
        return [
            split,
            f"{nothing}: that takes `warmup_steps` and then `window_steps` full batches under the same shares.",
        ]
    return [*_speeds(found), *_gained(found), *_to_gain(found, journal), *_data(found), *_unmeasured(journal)]


def _speeds(found: Findings) -> list[str]:
    scored = [rank for rank in found.ranks if rank.score is not None]
    if len(scored) < 2:
        return ["The speeds of the ranks are not known: too little was measured."]
    slow = [rank for rank in scored if rank.score is not None and rank.score < 1 - _ALIKE]
    if not slow:
        return [f"All ranks are equally fast, within {percent(1 - min(_score(rank) for rank in scored))}."]
    slowest, fastest = min(scored, key=_score), max(scored, key=_score)
    text = f"Rank {slowest.rank} is the slowest: {times_as_fast(_score(slowest))} as the fastest, rank {fastest.rank}."
    middle = sorted(map(_score, scored))[len(scored) // 2]
    behind = [rank for rank in slow if _score(rank) < (1 - _ALIKE) * middle and rank is not slowest]
    if behind:
        named = ", ".join(f"{rank.rank} ({_score(rank):.2f})" for rank in sorted(behind, key=_score)[:_MOST_NAMED])
        more = f" and {len(behind) - _MOST_NAMED} more" if len(behind) > _MOST_NAMED else ""
        text += f" Also slower than most, with their scores: {named}{more}."
    return [text]


def _gained(found: Findings) -> list[str]:
    """Return what shares other than those at the start have brought."""
    if found.step_s is None:
        return []
    notes = []
    if found.start_step_s:
        notes.append(
            f"A step took {duration(found.start_step_s)} under the shares at the start (median of "
            f"{_windows(found.start_windows)}) and {duration(found.step_s)} under the last ones "
            f"({_windows(found.windows)}): {times_as_fast(found.start_step_s / found.step_s)}."
        )
    if _is_even(found) or found.even_step_s is None:
        return notes
    notes.append(
        f"If a batch's time is in proportion to its samples, an even split would take {duration(found.even_step_s)} a "
        f"step at the speeds of the last windows: these shares are {times_as_fast(found.even_step_s / found.step_s)}; "
        "fixed costs of a batch make that less."
    )
    return notes


def _to_gain(found: Findings, journal: PartitionJournal) -> list[str]:
    """Return what better shares would still bring."""
    if found.possible is None:
        return []
    keep = "keep the even split" if _is_even(found) else "keep these shares"
    notes = []
    if found.possible < LITTLE:
        notes.append(f"Better shares would be less than {times_as_fast(1 / (1 - LITTLE))}: {keep}.")
    else:
        best = next((window.best_sizes for window in reversed(journal.windows) if window.best_sizes), None)
        shares = f" ({_numbers(best)} samples)" if best is not None and len(best) <= _MOST_NAMED else ""
        moved = journal.windows[-1].sizes != journal.changes[-1].sizes
        advice = "" if moved else _ADVICE.get(journal.mode, "")
        notes.append(f"The best shares{shares} would be {times_as_fast(1 / (1 - found.possible))}.{advice}")
        notes += _closed_form(found)
    return notes


def _unmeasured(journal: PartitionJournal) -> list[str]:
    """Return that the last shares came too late to be measured, so that all of the above is of those before them."""
    last = journal.changes[-1].sizes
    if journal.windows[-1].sizes == last:
        return []
    return [f"Shares then became {_numbers(last)} samples, too late in the run to be measured."]


def _closed_form(found: Findings) -> list[str]:
    if not _is_even(found) or found.even_ratio is None or not found.best_step_s or not found.even_step_s:
        return []
    return [
        "By the closed form, mean speed / lowest speed, shares by speed make compute "
        f"{times_as_fast(found.even_ratio)}, and the whole step, {_time(found.exposed_s)} of which no split changes, "
        f"{times_as_fast(found.even_step_s / found.best_step_s)}. Fixed costs of a batch are not in that."
    ]


def _data(found: Findings) -> list[str]:
    bound = [(rank.data_share, rank.rank) for rank in found.ranks if rank.data_share is not None]
    shares = sorted(((share, rank) for share, rank in bound if share > _DATA_BOUND), key=lambda each: -each[0])
    if not shares:
        return []
    named = ", ".join(f"{rank} ({percent(share)})" for share, rank in shares[:_MOST_NAMED])
    more = f" and {len(shares) - _MOST_NAMED} more" if len(shares) > _MOST_NAMED else ""
    word, verb = ("Rank", "waits") if len(shares) == 1 else ("Ranks", "wait")
    return [
        f"{word} {named}{more} {verb} for data for so much of the busy time: more loader workers (`num_workers`) or "
        "faster storage help there, and fewer samples help too."
    ]


def how_measured() -> list[str]:
    """Return what the figures are and are not."""
    return [
        "Busy: from asking for a batch to the last gradient of it on this rank, loading included. It has no waiting "
        "for other ranks in it. Each window is the median of its steps.",
        "Waiting: what the rank that is busy longest takes beyond this one, by the medians of a window. Fetch: the "
        "part of busy in which the rank waited for its data.",
        "Speed: samples of the rank's share by its busy time, so the fixed cost of a batch is in it, and a rank looks "
        "slower with few samples. Score: speed by that of the fastest rank; 1.00 is best, 0.50 takes twice as long.",
        "Predicted best step: the measured step less what the best shares would save, by each rank's fitted fixed and "
        "per-sample cost, within the bounds.",
    ]


def _is_even(found: Findings) -> bool:
    sizes = [rank.samples for rank in found.ranks]
    return max(sizes) - min(sizes) <= 1


def _score(rank: RankFindings) -> float:
    return rank.score or 0.0


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _numbers(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:_MOST_NAMED]))
    return shown + (f", … ({len(sizes)} ranks)" if len(sizes) > _MOST_NAMED else "")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _windows(count: int) -> str:
    return "1 window" if count == 1 else f"{count:,} windows"
