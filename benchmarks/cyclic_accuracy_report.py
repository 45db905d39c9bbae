"""The report of `cyclic_accuracy.py`: accuracies by case and rule, and differences to plain data parallelism."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_comm.reports.pieces import markdown_table

DP = "dp"
_HELD_OUT = 360  # images
_HEADER = ("case", "rule", "accuracy", "lowest to highest", "against plain, points", "lowest to highest", "last loss",
           "highest loss")  # fmt: skip


def by_seed(report: Mapping[str, Any], case: str, rule: str) -> dict[int, Mapping[str, Any]]:
    """Return the runs of a case with a rule."""
    return {run["seed"]: run for run in report["runs"] if (run["case"], run["rule"]) == (case, rule)}


def differences(report: Mapping[str, Any], case: str, rule: str) -> list[float]:
    """Return by how much the accuracy was above that of plain data parallelism at the same seed."""
    own, plain = by_seed(report, case, rule), by_seed(report, case, DP)
    return [own[seed]["accuracy"] - plain[seed]["accuracy"] for seed in sorted(set(own) & set(plain))]


def row(report: Mapping[str, Any], case: str, rule: str) -> tuple[str, ...] | None:
    """Return the row of a case with a rule; ``None`` where nothing was run."""
    runs = list(by_seed(report, case, rule).values())
    if not runs:
        return None
    accuracies = [run["accuracy"] for run in runs]
    apart = [] if rule == DP else differences(report, case, rule)
    return (
        report["cases"][case],
        report["rules"][rule],
        f"{100 * statistics.fmean(accuracies):.2f} %",
        f"{100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}",
        f"{100 * statistics.fmean(apart):+.2f}" if apart else "",
        f"{100 * min(apart):+.2f} to {100 * max(apart):+.2f}" if apart else "",
        _loss([run["last_loss"] for run in runs], statistics.fmean),
        _loss([run["highest_loss"] for run in runs], max),
    )


def _loss(values: Sequence[float | None], of: Any) -> str:
    if any(value is None for value in values):
        return "not finite"
    return f"{of(values):.3g}"


def page(report: Mapping[str, Any], introduction: str) -> str:
    """Return the whole report in Markdown."""
    pairs = [(case, rule) for case in report["cases"] for rule in report["rules"]]
    rows = [found for pair in pairs if (found := row(report, *pair)) is not None]
    seeds = sorted({run["seed"] for run in report["runs"]})
    each_seed = []
    for case, rule in pairs:
        if runs := by_seed(report, case, rule):
            cells = [f"{100 * runs[seed]['accuracy']:.2f} %" if seed in runs else "" for seed in seeds]
            each_seed.append((report["cases"][case], report["rules"][rule], *cells))
    steps = ", ".join(str(count) for count in sorted({run["steps"] for run in report["runs"]}))
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"    {report['command']}",
        report["environment"],
        markdown_table(_HEADER, rows),
        f"{len(seeds)} seeds, {steps} steps. One of the {_HELD_OUT} held-out images is {100 / _HELD_OUT:.2f} points.",
        "## Every seed",
        markdown_table(("case", "rule", *(f"seed {seed}" for seed in seeds)), each_seed),
    ]
    return "\n\n".join(parts) + "\n"
