"""The arithmetic and the page of `cyclic_memory.py`."""

import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from tools_report import indented

from lightning_comm.reports.pieces import markdown_table

ARMS = {
    "one batch": "one batch of all",
    "accumulation": "gradient accumulation",
    "forward_first": "`CyclicEngine`, S = N, forwards first",
    "backward_first": "`CyclicEngine`, S = N, backwards first",
    "fine_forward_first": "`CyclicEngine`, S = {fine}, forwards first",
    "fine_backward_first": "`CyclicEngine`, S = {fine}, backwards first",
}


def best_cuts(seconds: Sequence[float], stages: int) -> list[int]:
    """Return where to cut layers, so that the slowest stage is as fast as can be: where each but the first begins.

    >>> best_cuts([1, 1, 2, 4], 2)
    [3]
    """
    edges = range(1, len(seconds))

    def slowest(cuts: Sequence[int]) -> float:
        bounds = [0, *cuts, len(seconds)]
        return max(sum(seconds[a:b]) for a, b in pairwise(bounds))

    return list(min(combinations(edges, stages - 1), key=slowest))


def shifted_peak(timeline: Sequence[tuple[float, int]], begin: float, end: float, copies: int) -> int:
    """Return the peak of the sum of copies of one worker's live bytes, each behind the last by a part of the step.

    >>> shifted_peak([(0.0, 10), (1.0, 20), (2.0, 10), (3.0, 0)], begin=0.0, end=4.0, copies=2)
    20
    """
    times = [at - begin for at, _ in timeline]
    step = end - begin

    def live(at: float) -> int:
        place = bisect_right(times, at % step) - 1
        return timeline[place][1] if place >= 0 else 0

    shifts = [step * k / copies for k in range(copies)]
    # the sum rises only where one of the copies does; a hair later, since that moment is not hit exactly
    moments = [at + shift + 1e-9 * step for at in times for shift in shifts]
    return max(sum(live(moment - shift) for shift in shifts) for moment in moments)


def saving(part: float, whole: float) -> float:
    """Return by which share a part is less than the whole."""
    return 1 - part / whole


def _rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    whole = model["peak_bytes"]["one batch"]
    base_s = statistics.median(model["step_s"]["accumulation"])
    rows = []
    for key, label in ARMS.items():
        peak, times = model["peak_bytes"][key], model["step_s"][key]
        rows.append(
            (
                label.format(fine=len(model["cuts"]["fine"]) - 1),
                f"{peak / 2**20:.1f}",
                f"{peak / whole:.3f}",
                f"{100 * saving(peak, whole):.1f} %",
                f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
                f"{statistics.median(times) / base_s:.2f}",
            )
        )
    return rows


def _allocator_rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    whole = model["allocator"]["one batch"]["peak_above"]
    rows = []
    for key, label in ARMS.items():
        found = model["allocator"][key]
        sizes = (f"{found[each] / 2**20:.1f}" for each in ("persistent", "peak_above", "reserved"))
        rows.append((label.format(fine=len(model["cuts"]["fine"]) - 1), *sizes, f"{found['peak_above'] / whole:.3f}"))
    return rows


def page(report: Mapping[str, Any], command: str) -> str:
    """Return the report as a page."""
    parts = [
        f"# {report['title']}, {report['date']}",
        "Activations are what autograd keeps for backward, by `ActivationMeter`: storages of saved tensors, without "
        "parameters and buffers. *peak*: the most that is kept at once in a run of several steps. One batch of all has "
        "as many images as the micro-batches of a step together. *shifted profiles*: the live bytes of one worker "
        "over one step, as many copies of it as workers, each behind the last by the same part of the step, added up; "
        "its peak against as many times one worker's peak. That is what separate workers in one memory would need, "
        "and no engine at all. S: into how many stages the model is cut, for N micro-batches of a step. *step*: "
        "median seconds without the meter, with the range; rows alternate.",
        indented(command),
        report["environment"],
    ]
    for model in report["configurations"]:
        parts += [
            f"## {model['title']}",
            markdown_table(
                ("method", "peak, MiB", "of one batch", "saving", "step, s", "times accumulation's step"), _rows(model)
            ),
            "\n".join(f"- {line}" for line in _said(model)),
        ]
        if "allocator" in model:
            parts += [
                f"What the allocator of {model['device']} says, in {model['precision']}: *persistent* is there between "
                "two runs (the model, its momenta, the batches); *above it*, at the peak, is activations, and also "
                "gradients, workspaces, and an engine's older versions of parameters, which the meter leaves out; "
                "*reserved* is what was taken from the device.",
                markdown_table(
                    ("method", "persistent, MiB", "above it, MiB", "reserved, MiB", "above it, of one batch"),
                    _allocator_rows(model),
                ),
            ]
    return "\n\n".join(parts) + "\n"


def _said(model: Mapping[str, Any]) -> list[str]:
    alone = model["profile"]["peak_bytes"]
    single = model["workers"] * alone
    savings = [100 * saving(each, single) for each in model["profile"]["shifted_bytes"]]
    stages = ", ".join(f"{share:.1f} %" for share in model["stage_shares"])
    kept = ", ".join(f"{size / 2**20:.1f}" for size in model["stage_bytes"])
    return [
        f"Saving from shifted profiles of one worker: **{statistics.median(savings):.1f} %** ({min(savings):.1f} to "
        f"{max(savings):.1f} over {len(savings)} steps; {single / 2**20:.1f} MiB without shifts). "
        "An engine whose stages are coarse keeps more, where a model keeps most of its activations in a few layers.",
        f"N = {model['workers']} micro-batches of {model['batch']} images of {model['size']} pixels a side; with S = N "
        f"stages take {stages} of the time, and keep {kept} MiB each.",
        f"{len(model['step_s']['accumulation'])} repeats of {model['steps']} steps; {model['threads']} threads; load "
        f"average before: {model['load']:.1f}.",
    ]
