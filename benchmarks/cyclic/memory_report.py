"""The arithmetic and the page of `memory`."""

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

from benchmarks.kit.pages import Page, Report
from benchmarks.kit.tables import Column, ends, listed, table

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


def _label(model: Mapping[str, Any]) -> Column:
    return Column("method", lambda key: ARMS[key].format(fine=len(model["cuts"]["fine"]) - 1))


def columns(model: Mapping[str, Any]) -> list[Column]:
    """Return columns for the names of methods: peaks by the meter, and step times without it."""
    peaks, times = model["peak_bytes"], model["step_s"]
    whole, base_s = peaks["one batch"], statistics.median(times["accumulation"])
    return [
        _label(model),
        Column("peak, MiB", lambda key: f"{peaks[key] / 2**20:.1f}"),
        Column("of one batch", lambda key: f"{peaks[key] / whole:.3f}"),
        Column("saving", lambda key: f"{100 * saving(peaks[key], whole):.1f} %"),
        Column("step, s", lambda key: f"{statistics.median(times[key]):.2f} ({ends(times[key], form='.2f')})"),
        Column("times accumulation's step", lambda key: f"{statistics.median(times[key]) / base_s:.2f}"),
    ]


def allocator_columns(model: Mapping[str, Any]) -> list[Column]:
    """Return columns for the names of methods: what a device's allocator says."""
    found = model["allocator"]
    whole = found["one batch"]["peak_above"]

    def size(title: str, name: str) -> Column:
        return Column(f"{title}, MiB", lambda key: f"{found[key][name] / 2**20:.1f}")

    return [
        _label(model),
        size("persistent", "persistent"),
        size("above it", "peak_above"),
        size("reserved", "reserved"),
        Column("above it, of one batch", lambda key: f"{found[key]['peak_above'] / whole:.3f}"),
    ]


def sections(report: Report) -> Iterable[str]:
    """Yield what there is to say of each model."""
    for model in report["configurations"]:
        yield f"## {model['title']}"
        yield table(columns(model), ARMS)
        yield listed(_said(model))
        if "allocator" in model:
            yield (
                f"What the allocator of {model['device']} says, in {model['precision']}: *persistent* is there between "
                "two runs (the model, its momenta, the batches); *above it*, at the peak, is activations, and also "
                "gradients, workspaces, and an engine's older versions of parameters, which the meter leaves out; "
                "*reserved* is what was taken from the device."
            )
            yield table(allocator_columns(model), ARMS)


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


_INTRODUCTION = (
    "Activations are what autograd keeps for backward, by `ActivationMeter`: storages of saved tensors, without "
    "parameters and buffers. *peak*: the most that is kept at once in a run of several steps. One batch of all has "
    "as many images as the micro-batches of a step together. *shifted profiles*: the live bytes of one worker "
    "over one step, as many copies of it as workers, each behind the last by the same part of the step, added up; "
    "its peak against as many times one worker's peak. That is what separate workers in one memory would need, "
    "and no engine at all. S: into how many stages the model is cut, for N micro-batches of a step. *step*: "
    "median seconds without the meter, with the range; rows alternate."
)

PAGE = Page("cyclic_memory", "Live activations on one device", lambda report: _INTRODUCTION, sections)
