"""The tables of a pilot: the measurements, and the prediction for the whole run."""

from collections.abc import Mapping
from typing import Any

from lightning_comm.core.judgement import CONFIDENCE, Ratio, Spread
from lightning_comm.core.quantities import data_size, megabytes, percent
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT, Summary, Trial, summarise
from lightning_comm.planning.projection import RunPlan

Table = tuple[list[str], list[list[str]]]

LIMIT_NAME = "without communication"
_UNITS = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 0.001, "ms"))  # from which time on each is used


def read(results: Mapping[str, Any]) -> dict[str, Summary]:
    """Return the summaries of a results file, DDP first and the limit last; strategies that failed are left out."""
    trials = [Trial.read(record) for record in results["trials"] if record["strategy"] not in results["failures"]]
    plans = {
        name: RunPlan(plan["total_steps"], plan["gradient_steps"], tuple(plan["round_ends"]))
        for name, plan in results["plans"].items()
    }
    found = summarise(trials, plans)
    names = [name for name in (*results["settings"]["strategies"], LIMIT) if name in found]
    return {name: found[name] for name in names}


def measured_table(summaries: Mapping[str, Summary]) -> Table:
    """Return what was measured, one row a strategy: medians, with the range of the repeats where it decides."""
    ratios = {name: one.speedup for name, one in summaries.items() if name != BASELINE}
    known = any(ratio is not None and ratio.interval is not None for ratio in ratios.values())
    confidence = f" ({100 * CONFIDENCE:.0f} % interval)" if known else ""
    header = ["", "step (ms)", "sync (ms)", "step with syncs (ms)", f"times as fast as {BASELINE}{confidence}"]
    header += ["of the limit", "samples/s", "sent/step", "exposed"]
    rows = [
        [
            shown_name(one.strategy),
            _milliseconds(one.step_s.median),
            "-" if one.sync_s is None else _milliseconds(one.sync_s.median),
            _range_ms(one.run_step_s),
            "1.00" if one.strategy == BASELINE else ratio_text(one.speedup),
            "-" if one.of_limit is None else f"{one.of_limit.mean:.2f}",
            "-" if one.samples_per_s is None else f"{one.samples_per_s.median:,.0f}",
            "-" if one.step_bytes is None else megabytes(one.step_bytes.median, 2),
            "-" if one.exposed is None else percent(one.exposed.median),
        ]
        for one in summaries.values()
    ]
    return _without_empty_columns(header, rows)


def _without_empty_columns(header: list[str], rows: list[list[str]]) -> Table:
    kept = [place for place in range(len(header)) if place == 0 or any(row[place] != "-" for row in rows)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def run_table(summaries: Mapping[str, Summary], cost_per_hour: float | None) -> Table | None:
    """Return what the whole run will take, one row a strategy; ``None`` where that is known of none."""
    header = ["whole run", "time", f"saved against {BASELINE}", "synchronisations", "sent per rank"]
    header.append("loss after the pilot")
    if cost_per_hour is not None:
        header.insert(3, "cost saved")
    base = summaries.get(BASELINE)
    rows = []
    for one in summaries.values():
        if one.run_s is None or one.plan is None:
            continue
        saved = None if base is None or one is base else saved_s(one, base)
        row = [
            shown_name(one.strategy),
            time_text(one.run_s.median, one.run_s.range),
            "-" if saved is None else time_text(*saved),
            f"{one.plan.synchronisations:,}",
            "-" if one.run_bytes is None else data_size(one.run_bytes.median),
            "-" if one.loss is None else f"{one.loss.median:.3f}",
        ]
        if cost_per_hour is not None:
            row.insert(3, "-" if saved is None else f"{cost_per_hour * saved[0] / 3600:,.2f}")
        rows.append(row)
    return (header, rows) if rows else None


def saved_s(one: Summary, base: Summary) -> tuple[float, tuple[float, float] | None] | None:
    """Return the seconds of the whole run that a strategy saves against DDP, and their interval; ``None`` if unknown.

    They are those of the ratio: what is left of DDP's run where it goes so many times as fast.
    """
    if one.run_s is None or base.run_s is None or one.speedup is None:
        return None
    run_s = base.run_s.median
    saved = run_s * (1 - 1 / one.speedup.mean)
    if one.speedup.interval is None:
        return saved, None
    low, high = (run_s * (1 - 1 / end) for end in one.speedup.interval)
    return saved, (low, high)


def shown_name(strategy: str) -> str:
    """Return what a strategy is called in tables."""
    return LIMIT_NAME if strategy == LIMIT else strategy


def ratio_text(ratio: Ratio | None) -> str:
    """Return how many times as fast, and its interval."""
    if ratio is None:
        return "-"
    if ratio.interval is None:
        return f"{ratio.mean:.2f}"
    low, high = ratio.interval
    return f"{ratio.mean:.2f} ({low:.2f}-{high:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{1 if seconds < 1 else 0}f}"


def _range_ms(spread: Spread) -> str:
    median, low, high = map(_milliseconds, (spread.median, *spread.range))
    return median if low == high else f"{median} ({low}-{high})"


def time_text(seconds: float, ends: tuple[float, float] | None) -> str:
    """Return a time and its interval, in one unit."""
    low, high = (seconds, seconds) if ends is None else ends
    largest = max(abs(value) for value in (seconds, low, high))
    unit_s, unit = next((size, name) for least, size, name in _UNITS if largest >= least)
    shown, low_text, high_text = (f"{value / unit_s:.1f}" for value in (seconds, low, high))
    if low_text == high_text:
        return f"{shown} {unit}"
    return f"{shown} ({low_text}{' to ' if low < 0 else '-'}{high_text}) {unit}"
