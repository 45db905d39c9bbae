"""Accuracies on real handwritten digits, over seeds that arms share, so that differences are paired."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kit.statistics import half_width
from benchmarks.kit.tables import Column, known, table

HELD_OUT = 360  # images
POINTS = f"One of the {HELD_OUT} held-out images is {100 / HELD_OUT:.2f} points."


@dataclass(frozen=True)
class Arm:
    """One arm over the seeds that it and the arm it is compared with were both run at.

    Args:
        labels: Its names for people, a column each.
        runs: What was noted at each seed.
        differences: Of its accuracy to that of the other arm, by seed; empty where there is none.

    """

    labels: tuple[str, ...]
    runs: Mapping[int, Mapping[str, Any]]
    differences: tuple[float, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """On the held-out images, for each seed."""
        return tuple(run["accuracy"] for run in self.runs.values())

    @property
    def mean_difference(self) -> float | None:
        """The mean over seeds, if it is compared with anything."""
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def mean(self) -> str:
        """The mean accuracy, and its standard deviation."""
        spread = f" ± {100 * statistics.stdev(self.accuracies):.2f}" if len(self.runs) > 1 else ""
        return f"{100 * statistics.fmean(self.accuracies):.2f}{spread} %"

    @property
    def interval(self) -> str:
        """The 95 % interval of the mean difference by Student's t, in points; empty where there is none."""
        half = half_width(self.differences) if self.differences else math.inf
        if math.isinf(half):
            return ""
        mean = statistics.fmean(self.differences)
        return f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"


def arm_of(labels: Sequence[str], own: Mapping[int, Any], base: Mapping[int, Any] | None) -> Arm | None:
    """Return an arm beside another one, or alone; None if it was run at no seed that counts.

    Args:
        labels: Its names for people.
        own: Its runs by seed.
        base: Those of the arm that it is compared with.

    """
    runs = {seed: own[seed] for seed in sorted(own) if base is None or seed in base}
    apart = () if base is None else tuple(run["accuracy"] - base[seed]["accuracy"] for seed, run in runs.items())
    return Arm(tuple(labels), runs, apart) if runs else None


def labels_of(*titles: str) -> list[Column]:
    """Return the columns of names."""
    return [Column(title, lambda arm, at=at: arm.labels[at]) for at, title in enumerate(titles)]


def against(what: str) -> Column:
    """Return the column of mean differences."""
    return Column(f"against {what}, points", lambda arm: known(arm.mean_difference, "+.2f", 100))


MEAN = Column("accuracy", lambda arm: arm.mean)
INTERVAL = Column("95 % interval", lambda arm: arm.interval)


def every_seed(arms: Iterable[Arm], *titles: str) -> list[str]:
    """Return the section with every accuracy."""
    arms = list(arms)
    seeds = sorted({seed for arm in arms for seed in arm.runs})

    def column(seed: int) -> Column:
        return Column(
            f"seed {seed}", lambda arm: f"{100 * arm.runs[seed]['accuracy']:.2f} %" if seed in arm.runs else ""
        )

    return ["## Every seed", table([*labels_of(*titles), *map(column, seeds)], arms)]


def accuracy_of(network: Any, images: Iterable[Any]) -> float:
    """Return the share of images that a network is right about.

    Args:
        network: In the precision in which it is asked.
        images: Batches of images and labels.

    """
    import torch

    network.eval()
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        right = [network(each.to(dtype)).argmax(dim=1) == labels for each, labels in images]
    return float(torch.cat(right).double().mean())
