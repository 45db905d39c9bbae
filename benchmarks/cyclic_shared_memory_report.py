"""The report of `cyclic_shared_memory.py`: peaks of the sum over ranks, beside what one rank's profile predicts."""

import bisect
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_comm.core.judgement import Spread
from lightning_comm.reports.pieces import markdown_table

DDP, NONE, STEP, STEP_V1 = "ddp", "none", "step", "step_v1"
LABELS = {
    DDP: "DDP",
    NONE: '`CyclicStrategy(stagger="none")`',
    STEP: '`CyclicStrategy(stagger="step")`',
    STEP_V1: '`CyclicStrategy(rule="v1", stagger="step")`',
}
_POINTS = 2000  # of a step at which a profile is read
_HEADER = (
    "method", "peak of the sum, MB", "lowest to highest", "of DDP's", "predicted", "highest of all steps, MB",
    "step, ms",
)  # fmt: skip

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


def rows_of(configuration: Mapping[str, Any], workers: int) -> list[tuple[str, ...]]:
    """Return a row for each method that was measured: the median over repeats of the median over steps."""
    predicted = predictions(configuration["profiles"], workers)
    ratio = predicted["shifted"] / predicted["together"]
    rows = []
    for name, label in LABELS.items():
        seen = [each["arms"][name] for each in configuration["repeats"] if name in each["arms"]]
        if not seen:
            continue
        peaks = [statistics.median(each["peaks_bytes"]) for each in seen]
        of_ddp = [
            statistics.median(each["arms"][name]["peaks_bytes"]) / statistics.median(each["arms"][DDP]["peaks_bytes"])
            for each in configuration["repeats"]
            if name in each["arms"] and DDP in each["arms"]
        ]
        rows.append((
            label,
            f"{statistics.median(peaks) / 1e6:.2f}",
            f"{min(peaks) / 1e6:.2f} to {max(peaks) / 1e6:.2f}",
            f"{statistics.median(of_ddp):.3f}" if of_ddp else "",
            {DDP: "1.000", NONE: ""}.get(name, f"{ratio:.3f}"),
            f"{max(max(each['peaks_bytes']) for each in seen) / 1e6:.2f}",
            f"{1e3 * statistics.median(each['step_s'] for each in seen):.0f}",
        ))  # fmt: skip
    return rows


def page(report: Mapping[str, Any], introduction: str) -> str:
    """Return the whole report in Markdown."""
    workers = report["settings"]["workers"]
    parts = [
        f"# {report['title']}, {report['date']}",
        introduction,
        f"    {report['command']}",
        report["environment"],
    ]
    for each in report["configurations"]:
        parts.append(f"## {each['title']}")
        if not each["repeats"]:
            continue
        predicted = predictions(each["profiles"], workers)
        saved = 1 - predicted["shifted"] / predicted["together"]
        steps_s = Spread(tuple(profile["length_s"] for profile in each["profiles"]))
        parts += [
            markdown_table(_HEADER, rows_of(each, workers)),
            f"{len(each['repeats'])} repeats. One rank alone: a peak of {predicted['together'] / workers / 1e6:.2f} MB "
            f"in steps of {1e3 * steps_s.median:.0f} ms, which spread by {100 * steps_s.relative:.1f} %. "
            f"{workers} at once: {predicted['together'] / 1e6:.2f} MB; {workers}, each 1/{workers} of a step after the "
            f"one before: {predicted['shifted'] / 1e6:.2f} MB, {100 * saved:.1f} % less.",
        ]
    return "\n\n".join(parts) + "\n"
