"""The page of `accuracy`: differences over paired seeds, bytes, and a figure."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.kit.accuracy import INTERVAL, MEAN, POINTS, Arm, against, arm_of, every_seed, labels_of
from benchmarks.kit.statistics import half_width
from benchmarks.kit.tables import Column, listed, table

DENSE = "dense"
_COLOURS = {"dense": "#555555", "gradients": "#1f6fb4", "masks": "#2b8a3e", "local updates": "#d9822b"}


def arms_of(report: Mapping[str, Any]) -> dict[str, Arm]:
    """Return an arm for each variant, over the seeds that it and the dense run were both measured at."""
    found: dict[str, dict[int, Any]] = {}
    for run in report["runs"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run
    arms = {}
    for name, (label, _) in report["variants"].items():
        base = None if name == DENSE else found.get(DENSE, {})
        if (arm := arm_of([label], found.get(name, {}), base)) is not None:
            arms[name] = arm
    return arms


def sent_bytes(arm: Arm) -> float:
    """Return what a rank sent in a run, on average over the seeds."""
    return statistics.fmean(run["sent_bytes"] for run in arm.runs.values())


def of_dense(arm: Arm, arms: Mapping[str, Arm]) -> float:
    """Return what an arm sent as a share of what the dense runs of the same seeds sent."""
    return sent_bytes(arm) / statistics.fmean(arms[DENSE].runs[seed]["sent_bytes"] for seed in arm.runs)


def sections(report: Mapping[str, Any]) -> Iterable[str]:
    """Yield the figure, the tables and what is to be said of them."""
    arms = arms_of(report)
    starts = [f"{100 * each:.2f} %" for each in report["start_accuracies"]]
    columns = [
        *labels_of("variant"),
        MEAN,
        against("dense"),
        INTERVAL,
        Column("sent per rank", lambda arm: f"{sent_bytes(arm) / 1e6:.2f} MB"),
        Column("share of dense", lambda arm: f"{100 * of_dense(arm, arms):.1f} %"),
    ]
    yield f"![Difference to dense against bytes sent]({report['figure']})"
    yield table(columns, arms.values())
    yield (f"{len(starts)} paired seeds. The dense runs that all start from had reached {', '.join(starts)}. {POINTS}")
    yield listed(report["left_out"])
    yield from every_seed(arms.values(), "variant")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw each variant's difference to dense, with its interval, over the bytes that it sent, and save it as PNG."""
    from matplotlib.figure import Figure  # itself, since pyplot looks for a display
    from matplotlib.ticker import FuncFormatter, NullFormatter

    arms = arms_of(report)
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=_COLOURS["dense"], linewidth=1)
    shown = set()
    for place, (name, arm) in enumerate(arms.items()):
        family = report["variants"][name][1]
        at = (100 * of_dense(arm, arms), 100 * (arm.mean_difference or 0.0))
        half = 100 * half_width(arm.differences) if len(arm.differences) > 1 else 0.0
        label = None if family in shown else family
        axes.errorbar(*at, yerr=half, fmt="o", capsize=3, color=_COLOURS[family], label=label)
        shown.add(family)
        offset = (5, 4 if place % 2 else -10)
        axes.annotate(arm.labels[0], at, xytext=offset, textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes sent per rank, % of dense")
    axes.set_ylabel("accuracy against dense, points")
    axes.set_title("Mean over paired seeds, with 95 % intervals", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
