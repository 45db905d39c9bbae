"""The report of `cyclic.py`: step times against the bound and the best DDP, staleness, memory, bytes and peaks.

The bound of a repeat is what that repeat needed at least: the longer of a step without communication and an isolated
all-reduce of the model, in one piece or in buckets, whichever is faster. All ratios are paired by repeat.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps_report import LIMIT
from tools_report import indented, overruns, paired_ratio

from lightning_comm.core.judgement import CLAIM_REPEATS, Ratio, Spread, doubt
from lightning_comm.core.quantities import times_as_fast
from lightning_comm.reports.pieces import markdown_table

LIGHTNING, ALONE, BUCKETS, DEFAULT, BEST = "limit_lightning", "alone", "alone_buckets", "ddp", "best"
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
_TIMES = (
    "method", "step, ms", "lowest to highest", "of the bound", "lowest to highest",
    "times as fast as DDP, best buckets", "mean delay, updates", "optimizer state on a rank",
)  # fmt: skip
_LINK = (
    "method", "payload, MB", "of 2(N-1)/N", "sent, MB", "of 2(N-1)/N", "95th percentile, Mbit/s", "highest, Mbit/s",
    "highest over a quarter step, Mbit/s",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method in one configuration.

    Args:
        label: Its name for people.
        steps_s: Seconds of a step in each repeat.
        of_bound: The bound as a share of that, in each repeat.
        speedup: How many times as fast as the best DDP; ``None`` where that was not measured.
        payload_bytes: A step's payload on a host, from the ledger; ``None`` where there is none.
        sent_bytes: What a host sent in a step, on its interface.
        peaks: Bytes per second on a link: the medians over hosts and repeats of the figures of `peaks_of`.
        overruns: Steps in which the emulated device could not keep its pace, on all hosts.
        real_share: The share of forward and backward that was real compute.

    """

    label: str
    steps_s: tuple[float, ...]
    of_bound: tuple[float, ...]
    speedup: float | None
    payload_bytes: float | None
    sent_bytes: float
    peaks: Mapping[str, float]
    overruns: int
    real_share: float

    @property
    def median_s(self) -> float:
        """The median over repeats."""
        return statistics.median(self.steps_s)

    @property
    def share(self) -> float:
        """The median share of the bound."""
        return statistics.median(self.of_bound)


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


def rows_of(configuration: Mapping[str, Any]) -> dict[str, Row]:
    """Return a row for each method, in the order in which they are named."""
    repeats = configuration["repeats"]
    steps = {name: [each["tools"][name]["step_s"] for each in repeats] for name in configuration["labels"]}
    bounds = bounds_s(repeats)
    rows = {}
    for name, label in configuration["labels"].items():
        seen = [each["tools"][name] for each in repeats]
        payloads = [each["payload_bytes"] for each in seen if each["payload_bytes"] is not None]
        peaks = [peak for each in seen for peak in each["peaks"]]
        rows[name] = Row(
            label=label,
            steps_s=tuple(steps[name]),
            of_bound=tuple(bound / own for bound, own in zip(bounds, steps[name], strict=True)),
            speedup=paired_ratio(steps[BEST], steps[name]) if BEST in steps and name not in _ALONE else None,
            payload_bytes=statistics.fmean(payloads) if payloads else None,
            sent_bytes=statistics.fmean(each["sent_bytes"] for each in seen),
            peaks={key: statistics.median(peak[key] for peak in peaks) for key in (peaks[0] if peaks else ())},
            overruns=sum(each["overruns"] for each in seen),
            real_share=statistics.fmean(each["real_share"] for each in seen),
        )
    return rows


def verdicts(configuration: Mapping[str, Any], rows: Mapping[str, Row]) -> list[str]:
    """Say whether a configuration counts, and what was asked of it beside what was measured."""
    bounds = Spread(tuple(bounds_s(configuration["repeats"])))
    bound = f"The bound is {1e3 * bounds.median:.1f} ms and spreads by {100 * bounds.relative:.1f} %"
    why = doubt(bounds.values, CLAIM_REPEATS, "the bound")
    said = [
        f"{bound}, so this counts." if why is None else f"**inconclusive**: {why}. As measured all the same. {bound}."
    ]
    ratio = configuration["ratio"]
    for name, asked in TARGETS.get(ratio, {}).items():
        if name in rows:
            word = "reached" if rows[name].share >= asked else "**missed**"
            called = rows[name].label
            said.append(f"asked of {called}: {asked:g} of the bound; measured {rows[name].share:.3f}: {word}")
    asked_ratio = BEST_TARGETS.get(ratio)
    for name in (V2, V2_FINE):
        speedup = rows[name].speedup if name in rows else None
        if asked_ratio is not None and speedup is not None:
            word, called = "reached" if speedup >= asked_ratio else "**missed**", rows[name].label
            said.append(
                f"asked of {called}: {asked_ratio:g} times as fast as the best DDP; measured {speedup:.3f}: {word}"
            )
    if V2 in rows and DELAYED in rows:
        against = Ratio.of(dict(enumerate(rows[DELAYED].steps_s)), dict(enumerate(rows[V2].steps_s)))
        assert against is not None
        said.append(f"v2 is {times_as_fast(against.mean)} as the one-step-delayed all-reduce")
    return said


def times_table(configuration: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """Return the table of step times, staleness and memory."""
    body = []
    for name, row in rows.items():
        delay, state = configuration["delays"].get(name), configuration.get("state_shares", {}).get(name)
        body.append((
            row.label,
            f"{1e3 * row.median_s:.1f}",
            f"{1e3 * min(row.steps_s):.1f} to {1e3 * max(row.steps_s):.1f}",
            f"{row.share:.3f}",
            f"{min(row.of_bound):.3f} to {max(row.of_bound):.3f}",
            "" if row.speedup is None else f"{row.speedup:.2f}",
            "" if delay is None else f"{delay:.3g}",
            "" if state is None else _shares(state),
        ))  # fmt: skip
    return markdown_table(_TIMES, body)


def _shares(shares: Sequence[float]) -> str:
    low, high = 100 * min(shares), 100 * max(shares)
    return f"{high:.1f} %" if high - low < 0.05 else f"{low:.1f} to {high:.1f} %"


def link_table(configuration: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """Return the table of bytes and peaks on a link."""
    least = configuration["least_bytes"]
    body = []
    for name, row in rows.items():
        if name in (LIMIT, LIGHTNING):
            continue
        payload = row.payload_bytes
        peaks = [f"{8e-6 * row.peaks[key]:.1f}" if row.peaks else "" for key in ("p95", "highest", "window")]
        body.append((
            row.label,
            "" if payload is None else f"{payload / 1e6:.3f}",
            "" if payload is None else f"{payload / least:.4f}",
            f"{row.sent_bytes / 1e6:.3f}",
            f"{row.sent_bytes / least:.3f}",
            *peaks,
        ))  # fmt: skip
    return markdown_table(_LINK, body)


def section(configuration: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of a configuration."""
    parts = [f"## {configuration['title']}"]
    if configuration["repeats"]:
        rows = rows_of(configuration)
        real = max(row.real_share for row in rows.values())
        parts += [
            times_table(configuration, rows),
            link_table(configuration, rows),
            f"{len(configuration['repeats'])} repeats. {configuration['note']} Overruns of the device: "
            f"{overruns(rows)}; real compute was {100 * real:.0f} % of it at most.",
            "\n".join(f"- {said}" for said in verdicts(configuration, rows)),
        ]
    if configuration["error"]:
        parts.append(f"This configuration ended early:\n\n{indented(configuration['error'])}")
    return parts


def page(report: Mapping[str, Any], introduction: str) -> str:
    """Return the whole report in Markdown."""
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"    {report['command']}",
        report["environment"],
    ]
    for configuration in report["configurations"]:
        parts += section(configuration)
    return "\n\n".join(parts) + "\n"
