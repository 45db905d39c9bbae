"""The page of `steps`: step times against the bound and the best DDP, staleness, memory, bytes and peaks.

The bound of a repeat is what that repeat needed at least: the longer of a step without communication and an isolated
all-reduce of the model, in one piece or in buckets, whichever is faster. All ratios are paired by repeat.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.kit import step_times
from benchmarks.kit.pages import Report
from benchmarks.kit.statistics import standing
from benchmarks.kit.step_times import DDP, LIMIT, Row, rows_of
from benchmarks.kit.tables import Column, known, listed, table
from lightning_comm.core.judgement import Ratio, Spread
from lightning_comm.core.quantities import times_as_fast

LIGHTNING, ALONE, BUCKETS, DEFAULT, BEST = "limit_lightning", "alone", "alone_buckets", DDP, "best"
DELAYED, V2, V1, V2_DEFAULT, V2_FINE = "delayed", "v2", "v1", "v2_default", "v2_fine"
LABELS = {
    LIMIT: "no communication",
    LIGHTNING: "no communication, Lightning",
    ALONE: "isolated all-reduce of the model",
    BUCKETS: "the same in DDP's best buckets",
    DEFAULT: "DDP, default buckets",
    BEST: "DDP, best buckets",
    DELAYED: "one-step-delayed all-reduce",
    V2: '`CyclicStrategy(rule="v2")`',
    V1: '`CyclicStrategy(rule="v1")`',
    V2_DEFAULT: "v2, stages as it cuts them itself",
    V2_FINE: "v2, two stages a block",
}
TARGETS: dict[float, dict[str, float]] = {
    0.5: {V2: 0.95, V2_FINE: 0.95},
    1: {V2: 0.85, V2_FINE: 0.85, V1: 0.95},
    2: {V2: 0.95, V2_FINE: 0.95, V1: 0.95},
}
BEST_TARGETS = {1: 1.2}  # times as fast as the best DDP, for v2
_ALONE = (LIMIT, LIGHTNING, ALONE, BUCKETS)  # rows that train nothing together


def peaks_of(samples: Sequence[tuple[float, int]], window_s: float, shortest_s: float = 0.0) -> dict[str, float]:
    """Return what the counter of an interface tells of the traffic's peaks, in bytes per second.

    Args:
        samples: Times in seconds, and what had been sent by then.
        window_s: How long the longer window is.
        shortest_s: Samples that lie closer together say nothing: the second came late by less than the first.

    Returns:
        ``p95`` and ``highest`` between one sample and the next, and ``window``, the highest over the longer window;
        nothing where there are too few samples.

    """
    rates = [
        (later_bytes - bytes_) / (later_s - at_s)
        for (at_s, bytes_), (later_s, later_bytes) in itertools.pairwise(samples)
        if later_s - at_s >= shortest_s
    ]
    over = []
    end = 0
    for at_s, bytes_ in samples:
        while end < len(samples) and samples[end][0] < at_s + window_s:
            end += 1
        if end == len(samples):
            break
        over.append((samples[end][1] - bytes_) / (samples[end][0] - at_s))
    if len(rates) < 2 or not over:
        return {}
    return {
        "p95": statistics.quantiles(rates, n=20, method="inclusive")[-1],
        "highest": max(rates),
        "window": max(over),
    }


def bounds_s(repeats: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the bound of each repeat."""
    bounds = []
    for repeat in repeats:
        steps_s = {name: each["step_s"] for name, each in repeat["tools"].items()}
        bounds.append(max(steps_s[LIMIT], min(steps_s[name] for name in (ALONE, BUCKETS) if name in steps_s)))
    return bounds


def peaks_seen(row: Row) -> dict[str, float]:
    """Return the medians over hosts and repeats of the figures of `peaks_of`."""
    peaks = [peak for each in row.seen for peak in each["peaks"]]
    return {key: statistics.median(peak[key] for peak in peaks) for key in (peaks[0] if peaks else ())}


def verdicts(configuration: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    """Say whether a configuration counts, and what was asked of it beside what was measured."""
    bounds, ratio = bounds_s(configuration["repeats"]), configuration["ratio"]
    spread = Spread(tuple(bounds))
    bound = f"The bound is {1e3 * spread.median:.1f} ms and spreads by {100 * spread.relative:.1f} %"
    stands = standing(bounds, "the bound")
    said = [f"{stands} {bound}." if stands.startswith("**") else f"{bound}, so this counts."]
    for name, asked in TARGETS.get(ratio, {}).items():
        if name in rows:
            share = rows[name].share(bounds)
            said.append(_asked(rows[name], f"{asked:g} of the bound", share, share >= asked))
    asked_ratio = BEST_TARGETS.get(ratio)
    for name in (V2, V2_FINE):
        speedup = rows[name].speedup(rows.get(BEST)) if name in rows else None
        if asked_ratio is not None and speedup is not None:
            asked = f"{asked_ratio:g} times as fast as the best DDP"
            said.append(_asked(rows[name], asked, speedup, speedup >= asked_ratio))
    if V2 in rows and DELAYED in rows:
        against = Ratio.of(dict(enumerate(rows[DELAYED].steps_s)), dict(enumerate(rows[V2].steps_s)))
        assert against is not None
        said.append(f"v2 is {times_as_fast(against.mean)} as the one-step-delayed all-reduce")
    return said


def _asked(row: Row, asked: str, measured: float, reached: bool) -> str:
    return f"asked of {row.label}: {asked}; measured {measured:.3f}: {'reached' if reached else '**missed**'}"


def times_columns(configuration: Mapping[str, Any], rows: Mapping[str, Row]) -> list[Column]:
    """Return the columns of step times, staleness and memory."""
    delays, states = configuration["delays"], configuration.get("state_shares", {})
    ratio = step_times.faster_than(rows.get(BEST), "DDP, best buckets")
    return [
        step_times.LABEL,
        step_times.STEP,
        step_times.STEP_ENDS,
        *step_times.shares_of(bounds_s(configuration["repeats"]), "of the bound"),
        Column(ratio.title, lambda row: "" if row.name in _ALONE else ratio.cell(row)),
        Column("mean delay, updates", lambda row: known(delays.get(row.name), ".3g")),
        Column("optimizer state on a rank", lambda row: _shares(states[row.name]) if row.name in states else ""),
    ]


def _shares(shares: Sequence[float]) -> str:
    low, high = 100 * min(shares), 100 * max(shares)
    return f"{high:.1f} %" if high - low < 0.05 else f"{low:.1f} to {high:.1f} %"


def link_columns(least_bytes: float) -> list[Column]:
    """Return the columns of bytes and peaks on a link, beside what a ring needs."""

    def peak(key: str, title: str) -> Column:
        return Column(f"{title}, Mbit/s", lambda row: known(peaks_seen(row).get(key), ".1f", 8e-6))

    return [
        step_times.LABEL,
        step_times.PAYLOAD,
        Column("of 2(N-1)/N", lambda row: known(row.payload_bytes, ".4f", 1 / least_bytes)),
        step_times.SENT,
        Column("of 2(N-1)/N", lambda row: f"{row.sent_bytes / least_bytes:.3f}"),
        peak("p95", "95th percentile"),
        peak("highest", "highest"),
        peak("window", "highest over a quarter step"),
    ]


def sections(report: Report) -> Iterable[str]:
    """Yield what there is to say of each configuration."""
    for each in report["configurations"]:
        yield f"## {each['title']}"
        if each["repeats"]:
            rows = rows_of(each)
            on_link = [row for row in rows.values() if row.name not in (LIMIT, LIGHTNING)]
            yield table(times_columns(each, rows), rows.values())
            yield table(link_columns(each["least_bytes"]), on_link)
            yield f"{len(each['repeats'])} repeats. {each['note']} {step_times.devices(rows)}"
            yield listed(verdicts(each, rows))
        yield step_times.ended_early(each)
