"""Reports of measured step times: rows against a reference and against the limit, a verdict, a page in Markdown.

A *configuration* is what hosts of one kind measured on one link: labels by method and, for each repeat, what each
method took. Ratios are paired: each is between two methods of the same repeat, and the median is taken of those.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools_report import indented, overruns, paired_ratio

from lightning_comm.core.judgement import CLAIM_REPEATS, Spread, doubt
from lightning_comm.reports.pieces import markdown_table

LIMIT = "limit"


@dataclass(frozen=True)
class Row:
    """One method in one configuration.

    Args:
        label: Its name for people.
        steps_s: Seconds of a step in each repeat.
        speedup: How many times as fast as the reference; None where that was not measured.
        of_limit: The limit's step time as a share of this one's, in each repeat.
        payload_bytes: A step's payload on a host, from the method's ledger; None where it has none.
        sent_bytes: What a host sent in a step, on its interface.
        overruns: Steps in which the emulated device could not keep its pace, on all hosts.
        real_share: The share of forward and backward that was real compute.

    """

    label: str
    steps_s: tuple[float, ...]
    speedup: float | None
    of_limit: tuple[float, ...]
    payload_bytes: float | None
    sent_bytes: float
    overruns: int
    real_share: float

    @property
    def median_s(self) -> float:
        """The median over repeats."""
        return statistics.median(self.steps_s)

    @property
    def share(self) -> float:
        """The median share of the limit."""
        return statistics.median(self.of_limit)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile, with the lowest and the highest value as the ends."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def rows_of(configuration: Mapping[str, Any], reference: str) -> dict[str, Row]:
    """Return a row for each method, in the order in which they are named."""
    repeats = configuration["repeats"]
    steps = {name: [each["tools"][name]["step_s"] for each in repeats] for name in configuration["labels"]}
    rows = {}
    for name, label in configuration["labels"].items():
        seen = [each["tools"][name] for each in repeats]
        payloads = [each["payload_bytes"] for each in seen if each["payload_bytes"] is not None]
        rows[name] = Row(
            label=label,
            steps_s=tuple(steps[name]),
            speedup=paired_ratio(steps[reference], steps[name]) if reference in steps else None,
            of_limit=tuple(limit / own for limit, own in zip(steps[LIMIT], steps[name], strict=True)),
            payload_bytes=statistics.fmean(payloads) if payloads else None,
            sent_bytes=statistics.fmean(each["sent_bytes"] for each in seen),
            overruns=sum(each["overruns"] for each in seen),
            real_share=statistics.fmean(each["real_share"] for each in seen),
        )
    return rows


def verdict(rows: Mapping[str, Row]) -> str:
    """Say whether a configuration counts."""
    limit_s = rows[LIMIT].steps_s
    if (why := doubt(limit_s, CLAIM_REPEATS)) is not None:
        return f"**inconclusive**: {why}. As measured all the same."
    return f"The limit spreads by {100 * Spread(limit_s).relative:.1f} %, so this counts."


def table(rows: Mapping[str, Row], reference_label: str) -> str:
    """Return the table of a configuration."""
    header = (
        "method", "step, ms", "quartiles", f"times as fast as {reference_label}", "of the limit", "lowest to highest",
        "payload, MB", "sent, MB",
    )  # fmt: skip
    return markdown_table(header, [_cells(row) for row in rows.values()])


def _cells(row: Row) -> tuple[str, ...]:
    low, high = quartiles(row.steps_s)
    return (
        row.label,
        f"{1e3 * row.median_s:.1f}",
        f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        f"{row.share:.3f}",
        f"{min(row.of_limit):.3f} to {max(row.of_limit):.3f}",
        "" if row.payload_bytes is None else f"{row.payload_bytes / 1e6:.3f}",
        f"{row.sent_bytes / 1e6:.3f}",
    )


def devices(rows: Mapping[str, Row]) -> str:
    """Say how well the emulated devices kept their pace."""
    real = max(row.real_share for row in rows.values())
    return f"Overruns of the device: {overruns(rows)}; real compute was {100 * real:.0f} % of it at most."


def sections(report: Mapping[str, Any], reference: str, reference_label: str) -> list[str]:
    """Return what there is to say of each configuration."""
    parts = []
    for each in report["configurations"]:
        parts.append(f"## {each['title']}")
        if each["repeats"]:
            rows = rows_of(each, reference)
            parts += [
                table(rows, reference_label),
                f"{len(each['repeats'])} repeats. {each['note']} {devices(rows)}".replace("  ", " "),
                "\n".join(f"- {said}" for said in [verdict(rows), *each.get("verdicts", [])]),
            ]
        if each["left_out"]:
            parts.append("\n".join(f"- {note}" for note in each["left_out"]))
        if each["error"]:
            parts.append(f"This configuration ended early:\n\n{indented(each['error'])}")
    return parts


def page(report: Mapping[str, Any], introduction: str, reference: str, reference_label: str) -> str:
    """Return the whole report in Markdown."""
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"    {report['command']}",
        report["environment"],
        *sections(report, reference, reference_label),
    ]
    return "\n\n".join(parts) + "\n"
