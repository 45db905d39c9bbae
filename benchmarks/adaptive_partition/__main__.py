"""What shares by speed gain: against even shares, against the exact optimum, and what they cost where ranks are equal.

    python -m benchmarks.adaptive_partition [--parts speeds jitter overhead contention] [--repeats N] [--out FILE]

Four parts. *speeds*: emulated devices of unequal speeds, and one that becomes slower in mid-run. *jitter*: equal ranks
whose steps jitter. *overhead*: what the callback costs where it only observes. *contention*: two emulated hosts with
real compute, one of them slowed. All arms of a comparison run one after the other in the same processes, in an order
that rotates from repeat to repeat. The results, `docs/results/adaptive_partition_<date>.md` and a JSON file with every
repeat beside it, are written again after each repeat; parts that are not asked for stay in them as they were. Each part
takes less than 12 minutes with the defaults.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule

from benchmarks.adaptive_partition.fits import WINDOW, Arm, ChangeSpeed, Jittery, Regressor, timed_fit
from benchmarks.adaptive_partition.introductions import INTRODUCTIONS
from benchmarks.adaptive_partition.report import SECTIONS, sections
from benchmarks.kit.hosts import Comparison, measure
from benchmarks.kit.options import Parser
from benchmarks.kit.pages import Page
from benchmarks.kit.ranks import quiet, run_ranks
from benchmarks.kit.results import Results
from benchmarks.kit.steps import rotated
from benchmarks.kit.trainer import Sleeper
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.core.adaptive_partition.shares import RankCost, solve_partition
from lightning_comm.lab.cluster import unavailable

WARMUP = 5  # of the callback, before its first window
EVEN_STEP_S = 0.12  # of the slowest rank with an even share
SAMPLES = 32  # of a rank with an even share
SPEEDS: dict[str, tuple[tuple[float, ...], tuple[float, ...] | None]] = {
    "1 : 3": ((1, 3), None),
    "1 : 2 : 4": ((1, 2, 4), None),
    "1 : 1 : 1 : 0.5": ((1, 1, 1, 0.5), None),
    "1 : 1, one becomes 3 times slower": ((3, 3), (1, 3)),
}
CHANGE_AT = 96  # in the middle of a window
JITTER = {4: 0.015, 8: 0.03}  # seconds of a step, by ranks
JITTER_SHARE, JITTER_WINDOWS = 0.1, 75
OVERHEAD_STEPS, OVERHEAD_SLEEP_S = 80, 0.04
REPEATS = {"speeds": 5, "jitter": 3, "overhead": 9, "contention": 5}
CONTENTION = {"stop": "stopped for half of the time, 2 ms in 4", "hog": "with a busy process on its core"}


def speed_arms(title: str) -> tuple[dict[str, Arm], list[RankCost], int]:
    """Return the arms of a set of speeds, what a batch costs on each rank in the end, and the global batch."""
    before, after = SPEEDS[title]
    speeds = after or before
    total = SAMPLES * len(speeds)
    costs = [RankCost(0.0, EVEN_STEP_S / SAMPLES * min(speeds) / speed) for speed in speeds]
    settled = CHANGE_AT if after else 0
    arms = {
        "even": Arm("fixed", 45 + settled // 4, (SAMPLES,) * len(speeds)),
        "balance": Arm("balance", settled + WARMUP + 7 * WINDOW),
        "optimum": Arm("fixed", 70, solve_partition(costs, total, lo=1)),
    }
    if title == "1 : 3":
        arms["plain"] = Arm("sampler", 45)
    return arms, costs, total


def speed_repeat(rank: int, title: str, order: list[str]) -> dict[str, Any]:
    """Run all arms of a set of speeds on this rank."""
    quiet()
    before, after = SPEEDS[title]
    arms, _, total = speed_arms(title)
    unit = min(after or before)
    found = {}
    for name in order:
        speeds = after if after and name == "optimum" else before
        device = EmulatedDevice(EVEN_STEP_S, SAMPLES, speed=speeds[rank] / unit)
        changes = []
        if after and name != "optimum":
            at = CHANGE_AT if name == "balance" else 15
            changes = [ChangeSpeed(device, at, after[rank] / unit)]
        found[name] = timed_fit(arms[name], total, len(before), Regressor(), device, changes)
    return found


def jitter_repeat(rank: int, ranks: int, repeat: int, order: list[str]) -> dict[str, Any]:
    """Run equal ranks with the same jitter, with even shares and with balancing."""
    quiet()
    steps = WARMUP + JITTER_WINDOWS * WINDOW + 2
    found = {}
    for name in order:
        arm = Arm("balance", steps) if name == "balance" else Arm("fixed", steps, (SAMPLES,) * ranks)
        module = Jittery(JITTER[ranks] / SAMPLES, JITTER_SHARE, seed=100 * repeat + rank)
        found[name] = _means(timed_fit(arm, SAMPLES * ranks, ranks, module))
    return found


def overhead_repeat(rank: int, order: list[str]) -> dict[str, Any]:
    """Run the same fit without the callback, with it observing, and again without it."""
    quiet()
    found = {}
    for name in order:
        arm = Arm("observe" if name == "observe" else "", OVERHEAD_STEPS)
        torch.manual_seed(0)
        module: LightningModule = Sleeper(OVERHEAD_SLEEP_S)
        found[name] = _means(timed_fit(arm, 16, 2, module, samples=torch.randn(16, 64)))
    return found


def _means(found: dict[str, Any]) -> dict[str, Any]:
    """Return the few figures of a fit that a comparison of means needs."""
    steps_s = found["steps_s"][WARMUP + 5 : -1]
    means = {"mean_s": statistics.fmean(steps_s), "median_s": statistics.median(steps_s)}
    if "changes" in found:
        means |= {"changes": found["changes"], "moves": len(found["changes"]) - 1, "compared": len(found["windows"])}
        means["inside_s"] = found["inside_s"] / len(found["steps_s"])
    return means


def merged(ranks: list[dict[str, Any]], costs: list[RankCost]) -> dict[str, Any]:
    """Return a repeat as the report wants it: what rank 0 saw, and how well the devices of all kept their pace."""
    tools = {}
    for name, own in ranks[0].items():
        tools[name] = dict(own)
        if "overruns" in own:
            of_all = [each[name] for each in ranks]
            tools[name] |= {each: sum(one[each] for one in of_all) for each in ("overruns", "paced_steps")}
            tools[name] |= {each: max(one[each] for one in of_all) for each in ("real_share", "excess")}
    return {"tools": tools, "costs": [list(cost) for cost in costs], "load": os.getloadavg()[0]}


def introductions() -> dict[str, str]:
    """Return what the page says of each part, with the figures of its set-up."""
    figures = {
        "even_ms": 1e3 * EVEN_STEP_S,
        "samples": SAMPLES,
        "jitter": " and ".join(f"{1e3 * step_s:g} ms ({ranks} ranks)" for ranks, step_s in JITTER.items()),
        "jitter_percent": 100 * JITTER_SHARE,
        "windows": JITTER_WINDOWS,
        "cores": os.cpu_count(),
        "sleep_ms": 1e3 * OVERHEAD_SLEEP_S,
        "overhead_steps": OVERHEAD_STEPS,
    }
    return {part: text.format(**figures) for part, text in INTRODUCTIONS.items()}


PAGE = Page(
    "adaptive_partition",
    "Shares by speed against even shares",
    lambda report: INTRODUCTIONS[""],
    lambda report: sections(report, introductions()),
)


class Run:
    """The report that grows part by part.

    Args:
        parts: Which are measured; the others are kept.
        out: The Markdown file; ``None`` for the usual place.

    """

    def __init__(self, parts: list[str], out: str | None) -> None:
        self.results = Results(PAGE, out)
        self._command = self.results.report.pop("command")  # each part has its own
        before = self.results.earlier().get("configurations", [])
        self._configurations = [each for each in before if each["part"] not in parts]
        self.results.report["configurations"] = self._configurations

    def begin(self, part: str, title: str, **settings: Any) -> dict[str, Any]:
        """Add a configuration without repeats."""
        found: dict[str, Any] = {"part": part, "title": title, "command": self._command, "repeats": []}
        found |= {"note": "", "error": "", **settings}
        self._configurations.append(found)
        return found

    def repeat(
        self, found: dict[str, Any], arms: list[str], repeats: int, once: Callable[[int, list[str]], dict[str, Any]]
    ) -> None:
        """Measure a configuration again and again, and write after each repeat."""
        for repeat in range(repeats):
            began = time.monotonic()
            found["repeats"].append({"repeat": repeat, **once(repeat, rotated(arms, repeat))})
            self.results.write()
            took_s = time.monotonic() - began
            print(f"{found['part']}: {found['title']}: repeat {repeat + 1} of {repeats}, {took_s:.0f} s", flush=True)


def run_speeds(run: Run, repeats: int) -> None:
    """Measure all sets of emulated speeds."""
    for title, (speeds, after) in SPEEDS.items():
        arms, costs, total = speed_arms(title)
        steady = {"even": 25, "balance": 2 * WINDOW, "optimum": 50}
        settings = {"total": total, "window_steps": WINDOW, "change_at": CHANGE_AT if after else 0, "steady": steady}
        shares = ", ".join(map(str, arms["optimum"].sizes or ()))
        note = f"The optimum gives {shares} samples of {total}."
        found = run.begin("speeds", title, note=note, **settings)

        def once(
            _: int, order: list[str], title: str = title, ranks: int = len(speeds), costs: list[RankCost] = costs
        ) -> dict[str, Any]:
            return merged(run_ranks(speed_repeat, ranks, title, order), costs)

        run.repeat(found, list(arms), repeats, once)


def run_jitter(run: Run, repeats: int) -> None:
    """Measure equal ranks with jitter."""
    for ranks in JITTER:
        found = run.begin("jitter", str(ranks))

        def once(repeat: int, order: list[str], ranks: int = ranks) -> dict[str, Any]:
            return merged(run_ranks(jitter_repeat, ranks, ranks, repeat, order), [])

        run.repeat(found, ["even", "balance"], repeats, once)


def run_overhead(run: Run, repeats: int) -> None:
    """Measure what observing costs."""
    found = run.begin("overhead", "2 ranks, 200 tensors")
    run.repeat(
        found,
        ["without", "observe", "again"],
        repeats,
        lambda _, order: merged(run_ranks(overhead_repeat, 2, order), []),
    )


def run_contention(run: Run, repeats: int) -> None:
    """Measure on emulated hosts with real compute, one of which is slowed."""
    if (missing := unavailable()) is not None:
        print(f"contention: left out, since it needs emulated hosts: {missing}")
        return
    for kind, how in CONTENTION.items():
        comparison = Comparison(f"2 hosts, one {how}", 2, "1gbit", {"kind": kind, "repeats": repeats})
        found = run.begin("contention", comparison.title, hosts=2, link=comparison.link)
        measure("adaptive_partition.contention", comparison, found, run.results.write, timeout_s=900)


PARTS: dict[str, Callable[[Run, int], None]] = {
    "speeds": run_speeds,
    "jitter": run_jitter,
    "overhead": run_overhead,
    "contention": run_contention,
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.some("--parts", SECTIONS)
    parser.add_argument("--repeats", type=int, help=f"by default {REPEATS}")
    parser.results(PAGE)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure what is asked for and write the results files."""
    given = options()
    run = Run(given.parts, given.out)
    for part in given.parts:
        PARTS[part](run, given.repeats or REPEATS[part])
    run.results.tell()


if __name__ == "__main__":
    main()
