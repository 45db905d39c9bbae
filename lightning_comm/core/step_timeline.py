"""The timeline of a step: when it computed, sent, waited; and the steps of several ranks on one clock.

Standard library only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_comm.core.key_figures import LIGHTNING, MEETING, OTHERS, StepFrame, exposed_part, intervals, of_technique
from lightning_comm.core.ledger import CommRecord


class Span(NamedTuple):
    """A stretch of a step: ``"hidden"``, ``"exposed"``, ``"wait"``, ``"lightning"`` or ``"other"``; the rest is own."""

    name: str
    start_s: float
    end_s: float


class TimelineStep(NamedTuple):
    """A step as it is drawn."""

    batch: int
    start_s: float
    end_s: float
    spans: list[Span]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "TimelineStep":
        """Return a step from plain lists."""
        return cls(row[0], row[1], row[2], [Span(*span) for span in row[3]])


def draw(frame: StepFrame, records: Sequence[CommRecord]) -> TimelineStep:
    """Return how a step is drawn, from the messages in it."""
    technique = [record for record in records if of_technique(record.purpose) and record.purpose != MEETING]
    groups = {
        "wait": [record for record in records if record.purpose == MEETING],
        "lightning": [record for record in records if record.purpose == LIGHTNING],
        "other": [record for record in records if record.purpose in OTHERS],
        "hidden": [replace(record, duration_s=record.hidden_s) for record in technique],
        "exposed": [exposed_part(record) for record in technique],
    }
    spans = [Span(name, *interval) for name, group in groups.items() for interval in intervals(group)]
    return TimelineStep(frame.batch, frame.start_s, frame.end_s, sorted(spans, key=lambda span: span.start_s))


def aligned(
    steps: Sequence[TimelineStep], waits: Mapping[int, float], to_common_clock: Callable[[float], float]
) -> list[TimelineStep]:
    """Return steps on a common clock, with inferred waiting drawn where it must have been: before the transfer.

    Args:
        steps: Those of one rank, on its own clock.
        waits: Inferred seconds of waiting by batch.
        to_common_clock: Turns a time on the rank's clock into one on the common clock.

    Example:
        >>> step = TimelineStep(7, 0.0, 1.0, [Span("exposed", 0.5, 0.75)])
        >>> aligned([step], {7: 0.125}, lambda local_s: local_s + 10)[0].spans
        [Span(name='wait', start_s=10.5, end_s=10.625), Span(name='exposed', start_s=10.625, end_s=10.75)]

    """
    shown = []
    for step in steps:
        spans = _with_wait(step.spans, waits.get(step.batch, 0.0))
        moved = [Span(span.name, to_common_clock(span.start_s), to_common_clock(span.end_s)) for span in spans]
        shown.append(TimelineStep(step.batch, to_common_clock(step.start_s), to_common_clock(step.end_s), moved))
    return shown


def _with_wait(spans: Sequence[Span], wait_s: float) -> list[Span]:
    exposed = [span for span in spans if span.name == "exposed"]
    if not exposed or wait_s <= 0:
        return list(spans)
    longest = max(exposed, key=lambda span: span.end_s - span.start_s)
    turn = min(longest.end_s, longest.start_s + wait_s)
    at = spans.index(longest)
    parts = [Span("wait", longest.start_s, turn), Span("exposed", turn, longest.end_s)]
    return [*spans[:at], *(part for part in parts if part.end_s > part.start_s), *spans[at + 1 :]]
