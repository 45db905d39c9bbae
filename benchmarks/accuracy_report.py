"""The report of `compression_accuracy.py`: differences over paired seeds, bytes, a page in Markdown and a figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from lightning_comm.reports.pieces import markdown_table

DENSE = "dense"
_HELD_OUT = 360  # images
_COLOURS = {"dense": "#555555", "gradients": "#1f6fb4", "masks": "#2b8a3e", "local updates": "#d9822b"}


@dataclass(frozen=True)
class Row:
    """One variant over all seeds.

    Args:
        label: Its name for people.
        family: What it belongs to.
        accuracies: On the held-out images, for each seed.
        differences: To the dense run of the same seed.
        sent_bytes: What a rank sent in a run, on average over the seeds.
        of_dense: The same as a share of what the dense run sent.

    """

    label: str
    family: str
    accuracies: tuple[float, ...]
    differences: tuple[float, ...]
    sent_bytes: float
    of_dense: float

    @property
    def mean_difference(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean difference."""
        return half_width(self.differences)


def half_width(differences: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean by Student's t; infinity for a single value."""
    count = len(differences)
    if count < 2:
        return math.inf
    return float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def rows_of(report: Mapping[str, Any]) -> dict[str, Row]:
    """Return a row for each variant, over the seeds that it and the dense run were both measured at."""
    found: dict[str, dict[int, Any]] = {}
    for run in report["runs"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run
    dense = found.get(DENSE, {})
    rows = {}
    for name, (label, family) in report["variants"].items():
        seeds = sorted(set(found.get(name, {})) & set(dense))
        if not seeds:
            continue
        own = [found[name][seed] for seed in seeds]
        base = [dense[seed] for seed in seeds]
        sent = statistics.fmean(run["sent_bytes"] for run in own)
        rows[name] = Row(
            label=label,
            family=family,
            accuracies=tuple(run["accuracy"] for run in own),
            differences=tuple(a["accuracy"] - b["accuracy"] for a, b in zip(own, base, strict=True)),
            sent_bytes=sent,
            of_dense=sent / statistics.fmean(run["sent_bytes"] for run in base),
        )
    return rows


def page(report: Mapping[str, Any], introduction: str, figure: str) -> str:
    """Return the whole report in Markdown."""
    rows = rows_of(report)
    header = ("variant", "accuracy", "against dense, points", "95 % interval", "sent per rank", "share of dense")
    starts = [f"{100 * each:.2f} %" for each in report["start_accuracies"]]
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"![Difference to dense against bytes sent]({figure})",
        markdown_table(header, [_cells(row) for row in rows.values()]),
        f"{len(report['start_accuracies'])} paired seeds. The dense runs that all start from had reached "
        f"{', '.join(starts)}. One of the {_HELD_OUT} held-out images is {100 / _HELD_OUT:.2f} points.",
        *([_list(report["left_out"])] if report["left_out"] else []),
        "## Every seed",
        _seeds(rows),
        f"    {report['command']}",
        report["environment"],
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    mean, half = 100 * row.mean_difference, 100 * row.half_width
    is_dense = row.family == DENSE
    spread = f" ± {100 * statistics.stdev(row.accuracies):.2f}" if len(row.accuracies) > 1 else ""
    return (
        row.label,
        f"{100 * statistics.fmean(row.accuracies):.2f}{spread} %",
        "" if is_dense else f"{mean:+.2f}",
        "" if is_dense or math.isinf(half) else f"{mean - half:+.2f} to {mean + half:+.2f}",
        f"{row.sent_bytes / 1e6:.2f} MB",
        f"{100 * row.of_dense:.1f} %",
    )


def _seeds(rows: Mapping[str, Row]) -> str:
    count = max((len(row.accuracies) for row in rows.values()), default=0)
    header = ("variant", *(f"seed {seed}" for seed in range(count)))
    body = [
        (row.label, *(f"{100 * each:.2f} %" for each in row.accuracies), *[""] * (count - len(row.accuracies)))
        for row in rows.values()
    ]
    return markdown_table(header, body)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def draw(rows: Mapping[str, Row], path: Path) -> None:
    """Draw each variant's difference to dense, with its interval, over the bytes that it sent, and save it as PNG."""
    from matplotlib.figure import Figure  # itself, since pyplot looks for a display
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=_COLOURS["dense"], linewidth=1)
    shown = set()
    for place, row in enumerate(rows.values()):
        half = 0.0 if math.isinf(row.half_width) else 100 * row.half_width
        axes.errorbar(
            100 * row.of_dense,
            100 * row.mean_difference,
            yerr=half,
            fmt="o",
            capsize=3,
            color=_COLOURS[row.family],
            label=None if row.family in shown else row.family,
        )
        shown.add(row.family)
        at = (100 * row.of_dense, 100 * row.mean_difference)
        axes.annotate(row.label, at, xytext=(5, 4 if place % 2 else -10), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes sent per rank, % of dense")
    axes.set_ylabel("accuracy against dense, points")
    axes.set_title("Mean over paired seeds, with 95 % intervals", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
