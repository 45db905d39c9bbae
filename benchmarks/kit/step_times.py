"""Measured step times of a configuration: a row a method, and the columns and sentences that pages make of them.

A *configuration* is what hosts of one kind measured on one link: labels by method and, for each repeat, what each
method took. Ratios are paired: each is between two methods of the same repeat, and the median is taken of those.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kit.statistics import paired, paired_ratio, quartiles, standing
from benchmarks.kit.tables import Column, ends, indented, known, listed, table

LIMIT, DDP = "limit", "ddp"


@dataclass(frozen=True)
class Row:
    """One method in one configuration.

    Args:
        name: That by which it is found.
        label: Its name for people.
        steps_s: Seconds of a step in each repeat.
        payload_bytes: A step's payload on a host, from the method's ledger; None where it has none.
        sent_bytes: What a host sent in a step, on its interface.
        overruns: Steps in which the emulated device could not keep its pace, on all hosts.
        real_share: The share of forward and backward that was real compute.
        seen: All that was noted in each repeat.

    """

    name: str
    label: str
    steps_s: tuple[float, ...]
    payload_bytes: float | None
    sent_bytes: float
    overruns: int
    real_share: float
    seen: tuple[Mapping[str, Any], ...]

    @property
    def median_s(self) -> float:
        """The median over repeats."""
        return statistics.median(self.steps_s)

    def of(self, limit_s: Sequence[float]) -> tuple[float, ...]:
        """Return a limit as a share of the step time, in each repeat."""
        return paired(limit_s, self.steps_s)

    def share(self, limit_s: Sequence[float]) -> float:
        """Return the median share of a limit."""
        return statistics.median(self.of(limit_s))

    def speedup(self, reference: "Row | None") -> float | None:
        """Return how many times as fast as another method it is; None where that was not measured."""
        return None if reference is None else paired_ratio(reference.steps_s, self.steps_s)


def rows_of(configuration: Mapping[str, Any]) -> dict[str, Row]:
    """Return a row for each method, in the order in which they are named."""
    rows = {}
    for name, label in configuration["labels"].items():
        seen = tuple(each["tools"][name] for each in configuration["repeats"])
        payloads = [each["payload_bytes"] for each in seen if each.get("payload_bytes") is not None]
        rows[name] = Row(
            name=name,
            label=label,
            steps_s=tuple(each["step_s"] for each in seen),
            payload_bytes=statistics.fmean(payloads) if payloads else None,
            sent_bytes=statistics.fmean(each["sent_bytes"] for each in seen),
            overruns=sum(each["overruns"] for each in seen),
            real_share=statistics.fmean(each["real_share"] for each in seen),
            seen=seen,
        )
    return rows


LABEL = Column("method", lambda row: row.label)
STEP = Column("step, ms", lambda row: f"{1e3 * row.median_s:.1f}")
STEP_ENDS = Column("lowest to highest", lambda row: ends(row.steps_s, 1e3))
PAYLOAD = Column("payload, MB", lambda row: known(row.payload_bytes, ".3f", 1e-6))
SENT = Column("sent, MB", lambda row: f"{row.sent_bytes / 1e6:.3f}")


def faster_than(reference: Row | None, label: str) -> Column:
    """Return the column of ratios to another method."""
    return Column(f"times as fast as {label}", lambda row: known(row.speedup(reference), ".2f"))


def shares_of(limit_s: Sequence[float], title: str) -> list[Column]:
    """Return the columns of shares of a limit."""
    return [
        Column(title, lambda row: f"{row.share(limit_s):.3f}"),
        Column("lowest to highest", lambda row: ends(row.of(limit_s), form=".3f")),
    ]


def columns(rows: Mapping[str, Row], reference: str, label: str) -> list[Column]:
    """Return the columns of a comparison with a reference and with the limit."""
    between = Column("quartiles", lambda row: ends(quartiles(row.steps_s), 1e3))
    shares = shares_of(rows[LIMIT].steps_s, "of the limit")
    return [LABEL, STEP, between, faster_than(rows.get(reference), label), *shares, PAYLOAD, SENT]


def devices(rows: Mapping[str, Row], said: str = "; real compute was {:.0f} % of it at most.") -> str:
    """Say how well the emulated devices kept their pace."""
    late = [f"{row.overruns} in {row.label}" for row in rows.values() if row.overruns]
    real = max(row.real_share for row in rows.values())
    return f"Overruns of the device: {', '.join(late) or 'none'}{said.format(100 * real)}"


def ended_early(configuration: Mapping[str, Any], what: str = "This configuration") -> str:
    """Say how a configuration ended early; empty where it did not."""
    error = configuration.get("error")
    return f"{what} ended early:\n\n{indented(error)}" if error else ""


def sections(report: Mapping[str, Any], reference: str, label: str) -> Iterable[str]:
    """Yield what there is to say of each configuration."""
    for each in report["configurations"]:
        yield f"## {each['title']}"
        if each["repeats"]:
            rows = rows_of(each)
            yield table(columns(rows, reference, label), rows.values())
            yield f"{len(each['repeats'])} repeats. {each['note']} {devices(rows)}".replace("  ", " ")
            yield listed([standing(rows[LIMIT].steps_s), *each.get("verdicts", [])])
        yield listed(each["left_out"])
        yield ended_early(each)
