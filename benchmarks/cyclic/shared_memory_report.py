"""The page of `shared_memory`: peaks of the sum over ranks, beside what one rank's profile predicts."""

import bisect
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.kit.pages import Report
from benchmarks.kit.tables import Column, ends, table
from lightning_comm.core.judgement import Spread

DDP, NONE, STEP, STEP_V1 = "ddp", "none", "step", "step_v1"
LABELS = {
    DDP: "DDP",
    NONE: '`CyclicStrategy(stagger="none")`',
    STEP: '`CyclicStrategy(stagger="step")`',
    STEP_V1: '`CyclicStrategy(rule="v1", stagger="step")`',
}
_POINTS = 2000  # of a step at which a profile is read

Profile = Sequence[tuple[float, int]]


def level(profile: Profile, at_s: float) -> int:
    """Return what was kept at a time: what the last change before it left."""
    place = bisect.bisect_right(profile, at_s, key=lambda change: change[0])
    return profile[place - 1][1] if place else 0


def shifted_peak(profile: Profile, began_s: float, length_s: float, workers: int) -> float:
    """Return the peak of the sum of so many copies of a step, each shifted by 1/N of it after the one before.

    Args:
        profile: Times, and the bytes kept from then on.
        began_s: When the step began.
        length_s: How long it took.
        workers: N.

    """
    points = _POINTS // workers * workers
    levels = [level(profile, began_s + length_s * k / points) for k in range(points)]
    shift = points // workers
    return max(sum(levels[(k + shift * worker) % points] for worker in range(workers)) for k in range(shift))


def predictions(profiles: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    """Return, as medians over the steps of one rank alone, N times its peak, and the peak of shifted copies."""
    together, shifted = [], []
    for each in profiles:
        profile = [(float(at_s), int(size)) for at_s, size in each["profile"]]
        together.append(workers * max(size for _, size in profile))
        shifted.append(shifted_peak(profile, each["began_s"], each["length_s"], workers))
    return {"together": statistics.median(together), "shifted": statistics.median(shifted)}


def columns(configuration: Mapping[str, Any], predicted: Mapping[str, float]) -> list[Column]:
    """Return columns for the names of methods: medians over repeats of medians over steps, and the prediction."""
    ratio = predicted["shifted"] / predicted["together"]

    def seen(name: str) -> list[Mapping[str, Any]]:
        return [each["arms"][name] for each in configuration["repeats"] if name in each["arms"]]

    def peaks(name: str) -> list[float]:
        return [statistics.median(each["peaks_bytes"]) / 1e6 for each in seen(name)]

    def of_ddp(name: str) -> str:
        both = [each["arms"] for each in configuration["repeats"] if {name, DDP} <= set(each["arms"])]
        ratios = [
            statistics.median(arms[name]["peaks_bytes"]) / statistics.median(arms[DDP]["peaks_bytes"]) for arms in both
        ]
        return f"{statistics.median(ratios):.3f}" if ratios else ""

    return [
        Column("method", lambda name: LABELS[name]),
        Column("peak of the sum, MB", lambda name: f"{statistics.median(peaks(name)):.2f}"),
        Column("lowest to highest", lambda name: ends(peaks(name), form=".2f")),
        Column("of DDP's", of_ddp),
        Column("predicted", lambda name: {DDP: "1.000", NONE: ""}.get(name, f"{ratio:.3f}")),
        Column(
            "highest of all steps, MB", lambda name: f"{max(max(each['peaks_bytes']) for each in seen(name)) / 1e6:.2f}"
        ),
        Column("step, ms", lambda name: f"{1e3 * statistics.median(each['step_s'] for each in seen(name)):.0f}"),
    ]


def measured(configuration: Mapping[str, Any]) -> list[str]:
    """Return the methods that were measured."""
    return [name for name in LABELS if any(name in each["arms"] for each in configuration["repeats"])]


def sections(report: Report) -> Iterable[str]:
    """Yield what there is to say of each model."""
    workers = report["settings"]["workers"]
    for each in report["configurations"]:
        yield f"## {each['title']}"
        if not each["repeats"]:
            continue
        predicted = predictions(each["profiles"], workers)
        saved = 1 - predicted["shifted"] / predicted["together"]
        steps_s = Spread(tuple(profile["length_s"] for profile in each["profiles"]))
        yield table(columns(each, predicted), measured(each))
        yield (
            f"{len(each['repeats'])} repeats. One rank alone: a peak of {predicted['together'] / workers / 1e6:.2f} MB "
            f"in steps of {1e3 * steps_s.median:.0f} ms, which spread by {100 * steps_s.relative:.1f} %. "
            f"{workers} at once: {predicted['together'] / 1e6:.2f} MB; {workers}, each 1/{workers} of a step after the "
            f"one before: {predicted['shifted'] / 1e6:.2f} MB, {100 * saved:.1f} % less."
        )
