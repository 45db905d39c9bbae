"""Journals of made-up runs, for what reads them."""

import random

from lightning_comm.core.adaptive_partition.shares import proportional_sizes
from lightning_comm.formats.adaptive_partition import Change, PartitionJournal, Window

RUN = {
    "samples": 50_000,
    "global_batch_size": 64,
    "ranks": 2,
    "seed": 0,
    "shuffle": 1,
    "tail": "keep",
    "sampler": "none",
    "steps_per_epoch": 100,
}


def run_of(ranks, global_batch_size=64):
    bounds = {"min_per_rank": [1] * ranks, "max_per_rank": [None] * ranks}
    return RUN | {"ranks": ranks, "global_batch_size": global_batch_size, **bounds}


def window(sizes, busy_s, **other):
    known = [seconds for seconds in busy_s if seconds is not None]
    others = {"fetch_s": (0.0,) * len(sizes), "step_s": max(known, default=0.0) + 0.01, **other}
    return Window(**{"epoch": 0, "batch": 19, "seconds": 1.0, "sizes": tuple(sizes), "busy_s": tuple(busy_s), **others})


def journal(slowness, windows=3, move_after=None, mode="balance", **other):
    """A run whose ranks take ``slowness`` ms a sample; after ``move_after`` windows the shares fit that."""
    made = {"global_batch_size": 64, "rest_s": 0.01, "fetch": 0.0, "jitter": 0.0, "steps": 100, **other}
    chance, total = random.Random(0), made["global_batch_size"]
    sizes = proportional_sizes(total, [1] * len(slowness))
    best = proportional_sizes(total, [1 / slow for slow in slowness])
    changes, found, seconds = [Change(0, 0, sizes, "start")], [], 0.0
    for number in range(windows):
        place = divmod(20 * (number + 1) - 1, made["steps"])
        if number == move_after:
            sizes = best
            begin = divmod(20 * number + 2, made["steps"])
            changes.append(Change(*begin, sizes, f"balance: {1 / (1 - found[-1].gain):.2f} times as fast"))
        busy = [n * slow / 1000 * chance.gauss(1, made["jitter"]) for n, slow in zip(sizes, slowness, strict=True)]
        step_s = max(busy) + made["rest_s"]
        seconds += 20 * step_s
        best_s = max(n * slow / 1000 for n, slow in zip(best, slowness, strict=True)) + made["rest_s"]
        fetch = [made["fetch"] * each for each in busy]
        gain = max(0.0, 1 - best_s / step_s)
        found.append(Window(*place, seconds, sizes, tuple(busy), tuple(fetch), step_s, gain, best))
    run = run_of(len(slowness), total) | {"steps_per_epoch": made["steps"]}
    return PartitionJournal(run, mode, tuple(changes), tuple(found))
