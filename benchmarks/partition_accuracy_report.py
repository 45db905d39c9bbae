"""The report of `adaptive_partition_accuracy.py`: how far balanced runs are from the even ones of the same seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from accuracy_report import half_width

from lightning_comm.reports.pieces import markdown_table

EVEN, BALANCED = "even", "balanced"
_HELD_OUT = 360  # images
_HEADER = (
    "model", "run", "accuracy", "against even, points", "95 % interval", "weights apart", "losses apart, first 50",
    "losses apart", "moves",
)  # fmt: skip


def differences(runs: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    """Return by how much an arm's accuracy was above that of the even run of the same seed."""
    return [run["arms"][arm]["accuracy"] - run["arms"][EVEN]["accuracy"] for run in runs]


def interval(values: Sequence[float]) -> str:
    """Return the 95 % interval of the mean of shares by Student's t, in points; empty where there is none."""
    half = half_width(values)
    if math.isinf(half):
        return ""
    mean = statistics.fmean(values)
    return f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"


def moves(run: Mapping[str, Any], arm: str) -> int:
    """Return how often shares moved."""
    return max(0, len(run["arms"][arm]["changes"]) - 1)


def row(label: str, arm: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the row of an arm of a model over all seeds."""
    accuracies = [run["arms"][arm]["accuracy"] for run in runs]
    spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    accuracy = f"{100 * statistics.fmean(accuracies):.2f}{spread} %"
    if arm == EVEN:
        return (label, arm, accuracy, *[""] * 6)
    apart = differences(runs, arm)
    worst = [
        f"{max(run['arms'][arm][name] for run in runs):.1e}"
        for name in ("weights_apart", "losses_apart_first", "losses_apart")
    ]
    moved = ", ".join(str(moves(run, arm)) for run in runs) if arm == BALANCED else ""
    return (label, arm, accuracy, f"{100 * statistics.fmean(apart):+.2f}", interval(apart), *worst, moved)


def page(report: Mapping[str, Any], introduction: str) -> str:
    """Return the whole report in Markdown."""
    rows, seeds, plans = [], [], []
    for name, label in report["labels"].items():
        runs = sorted((each for each in report["runs"] if each["variant"] == name), key=lambda each: each["seed"])
        if not runs:
            continue
        rows += [row(label, arm, runs) for arm in runs[0]["arms"]]
        seeds += [
            (label, arm, *(f"{100 * run['arms'][arm]['accuracy']:.2f} %" for run in runs)) for arm in runs[0]["arms"]
        ]
        last = [run["arms"][BALANCED]["changes"][-1][2] for run in runs]
        largest = max(run["largest_weight"] for run in runs)
        plans.append(
            f"- {label}: shares at the end {', '.join(f'{a} + {b}' for a, b in last)}; the largest weight is "
            f"{largest:.2g}; {runs[0]['arms'][EVEN]['steps']} steps."
        )
    most = max((len(each) for each in seeds), default=2)
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"    {report['command']}",
        report["environment"],
        markdown_table(_HEADER, rows),
        f"Apart: the worst of the seeds. One of the {_HELD_OUT} held-out images is {100 / _HELD_OUT:.2f} points.",
        "\n".join(plans),
        "## Every seed",
        markdown_table(
            ("model", "run", *(f"seed {seed}" for seed in range(most - 2))),
            [(*each, *[""] * (most - len(each))) for each in seeds],
        ),
    ]
    return "\n\n".join(parts) + "\n"
