"""The report of `adaptive_partition.py`: what balancing gained beside what theory says, as rows and a page."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools_report import indented

from lightning_comm.core.adaptive_partition.shares import (
    RankCost,
    proportional_sizes,
    speedup_of_balancing,
    step_speedup,
)
from lightning_comm.core.judgement import CLAIM_REPEATS, Spread, doubt
from lightning_comm.reports.pieces import markdown_table

WITHIN = 0.05  # of the optimum's step
MOST_WINDOWS = 3
MOST_MOVES = 1  # of equal ranks with jitter
MOST_COST = 0.02  # of their step, by which balancing may make it longer


@dataclass(frozen=True)
class Gain:
    """What balancing gained in one configuration, by repeat.

    Args:
        even_s: Step time of even shares, once it is steady.
        balanced_s: That of balancing in its last windows.
        optimum_s: That of the exact optimum in whole samples, fixed from the start.
        closed: The mean over the least of the ranks' speeds.
        expected: How much faster a step should get in whole samples, with what it has beside the ranks' compute.
        until: In which window after the first plan could be applied the step was within 5 % of the optimum; None
            for never.
        batches: How many batches after the start, or after the change of speed, that window began.
        moves: How often shares moved.

    """

    even_s: tuple[float, ...]
    balanced_s: tuple[float, ...]
    optimum_s: tuple[float, ...]
    closed: tuple[float, ...]
    expected: tuple[float, ...]
    until: tuple[int | None, ...]
    batches: tuple[int | None, ...]
    moves: tuple[int, ...]

    @property
    def measured(self) -> tuple[float, ...]:
        """How much faster the balanced step was than the even one of the same repeat."""
        return tuple(even / own for even, own in zip(self.even_s, self.balanced_s, strict=True))

    @property
    def possible(self) -> tuple[float, ...]:
        """How much faster the optimum was than the even step of the same repeat."""
        return tuple(even / best for even, best in zip(self.even_s, self.optimum_s, strict=True))

    @property
    def over_optimum(self) -> tuple[float, ...]:
        """How much longer than the optimum's of the same repeat the balanced step was, as a share."""
        return tuple(own / best - 1 for own, best in zip(self.balanced_s, self.optimum_s, strict=True))


def exposed_s(even_s: float, costs: Sequence[RankCost], total: int) -> float:
    """Return the seconds of an even step that are not compute of the slowest rank; at least 0."""
    even = proportional_sizes(total, [1] * len(costs), lo=1)
    return max(0.0, even_s - max(cost.seconds(n) for cost, n in zip(costs, even, strict=True)))


def window_reached(steps_s: Sequence[float], first: int, length: int, target_s: float) -> int | None:
    """Return the first window, counted from 1 and from the step ``first``, whose median step is within 5 % of a target.

    Only whole windows count; None if there is none.
    """
    for number in range((len(steps_s) - first) // length):
        begin = first + number * length
        if statistics.median(steps_s[begin : begin + length]) <= (1 + WITHIN) * target_s:
            return number + 1
    return None


def first_plan(windows: Sequence[Mapping[str, Any]], since: int) -> int | None:
    """Return the batch from which a plan could be applied that rests on a window compared at ``since`` or later."""
    return next((window["batch"] + 1 for window in windows if window["batch"] >= since), None)


def gain_of(configuration: Mapping[str, Any]) -> Gain:
    """Return what was gained in a configuration."""
    total, length, change = (configuration[name] for name in ("total", "window_steps", "change_at"))
    rows = []
    for repeat in configuration["repeats"]:
        arms = repeat["tools"]
        costs = [RankCost(*cost) for cost in repeat["costs"]]
        even_s, balanced_s, optimum_s = (
            statistics.median(arms[name]["steps_s"][-configuration["steady"][name] :])
            for name in ("even", "balance", "optimum")
        )
        speeds = [total / len(costs) / cost.seconds(total / len(costs)) for cost in costs]
        # a window in which the speeds changed says little: the first that counts lies behind the change as a whole
        first = first_plan(arms["balance"]["windows"], change + length - 1)
        until = None if first is None else window_reached(arms["balance"]["steps_s"], first, length, optimum_s)
        batches = None if first is None or until is None else first + (until - 1) * length - change
        expected = step_speedup(costs, total, lo=1, exposed_s=exposed_s(even_s, costs, total))
        moves = sum(each["batch"] > change for each in arms["balance"]["changes"])
        rows.append((even_s, balanced_s, optimum_s, speedup_of_balancing(speeds), expected, until, batches, moves))
    return Gain(*zip(*rows, strict=True))


def verdicts(gain: Gain) -> list[str]:
    """Say whether a configuration counts, and whether it reached what was asked of it."""
    said = []
    if (why := doubt(gain.optimum_s, CLAIM_REPEATS, "the optimum")) is not None:
        said.append(f"**inconclusive**: {why}. As measured all the same.")
    else:
        said.append(f"The optimum spreads by {100 * Spread(gain.optimum_s).relative:.1f} %, so this counts.")
    in_time = sum(each is not None and each <= MOST_WINDOWS for each in gain.until)
    said.append(
        f"Within {100 * WITHIN:.0f} % of the optimum in at most {MOST_WINDOWS} windows after the first plan could be "
        f"applied: {in_time} of {len(gain.until)} repeats. The first window that near began after "
        f"{_list(gain.batches)} batches."
    )
    return said


def gain_cells(label: str, gain: Gain) -> tuple[str, ...]:
    """Return a row of the table of gains."""
    over = gain.over_optimum
    return (
        label,
        *(f"{1e3 * statistics.median(each):.1f}" for each in (gain.even_s, gain.balanced_s, gain.optimum_s)),
        f"{statistics.median(gain.closed):.2f}",
        f"{statistics.median(gain.expected):.2f}",
        f"{statistics.median(gain.measured):.2f} ({min(gain.measured):.2f} to {max(gain.measured):.2f})",
        f"{statistics.median(gain.possible):.2f}",
        f"{100 * statistics.median(over):+.1f} % ({100 * min(over):+.1f} to {100 * max(over):+.1f})",
        _list(gain.until),
        _list(gain.moves),
    )


GAIN_HEADER = (
    "ranks' speeds", "even, ms", "balanced, ms", "optimum, ms", "mean / least speed", "expected", "measured gain",
    "of the optimum", "over the optimum", "windows until within 5 %", "moves",
)  # fmt: skip


def paired_cost(repeats: Sequence[Mapping[str, Any]], own: str, *others: str) -> list[float]:
    """Return by how much longer the mean step of one arm was than that of others in the same repeat, as a share."""
    return [
        repeat["tools"][own]["mean_s"] / statistics.fmean(repeat["tools"][name]["mean_s"] for name in others) - 1
        for repeat in repeats
    ]


def shares(values: Sequence[float]) -> str:
    """Return the median of shares in per cent, and their range."""
    middle = 100 * statistics.median(values)
    return f"{middle:+.2f} % ({100 * min(values):+.2f} to {100 * max(values):+.2f})"


def gains_section(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what there is to say of configurations in which ranks are unequal."""
    known = [(each, gain_of(each)) for each in configurations if each["repeats"]]
    parts = [markdown_table(GAIN_HEADER, [gain_cells(each["title"], gain) for each, gain in known])] if known else []
    for each, gain in known:
        said = [*verdicts(gain), *_plain(each["repeats"]), *_conditions(each["repeats"]), each["note"]]
        parts.append(f"{each['title']}:\n\n" + "\n".join(f"- {line}" for line in said if line))
    return parts


def _plain(repeats: Sequence[Mapping[str, Any]]) -> list[str]:
    if "plain" not in repeats[0]["tools"]:
        return []
    found = [
        statistics.median(repeat["tools"]["even"]["steps_s"][10:])
        / statistics.median(repeat["tools"]["plain"]["steps_s"][10:])
        - 1
        for repeat in repeats
    ]
    return [
        f"Even shares by `PartitionedLoader` against `DataLoader` with `DistributedSampler`, step: {shares(found)}."
    ]


def _conditions(repeats: Sequence[Mapping[str, Any]]) -> list[str]:
    arms = [arm for repeat in repeats for arm in repeat["tools"].values()]
    said = []
    if "overruns" in arms[0]:
        late = sum(arm["overruns"] for arm in arms)
        said.append(
            f"Emulated devices: {late or 'no'} of {sum(arm['paced_steps'] for arm in arms)} steps of ranks overran (by "
            f"more than 1 % and 1 ms); a device's steps took {100 * max(arm['excess'] for arm in arms):.1f} % longer "
            f"than stated at most; real compute was {100 * max(arm['real_share'] for arm in arms):.0f} % of them at "
            "most."
        )
    loads = [repeat["load"] for repeat in repeats]
    said.append(f"{len(repeats)} repeats; load average {min(loads):.1f} to {max(loads):.1f}.")
    return said


def jitter_section(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what there is to say of equal ranks with jitter."""
    rows, said = [], []
    for each in (configuration for configuration in configurations if configuration["repeats"]):
        costs = paired_cost(each["repeats"], "balance", "even")
        moves = [repeat["tools"]["balance"]["moves"] for repeat in each["repeats"]]
        windows = [repeat["tools"]["balance"]["compared"] for repeat in each["repeats"]]
        steps_s = [
            statistics.median(repeat["tools"][name]["mean_s"] for repeat in each["repeats"])
            for name in ("even", "balance")
        ]
        rows.append(
            (each["title"], *(f"{1e3 * step:.1f}" for step in steps_s), shares(costs), _list(windows), _list(moves))
        )
        fine = max(moves) <= MOST_MOVES and statistics.median(costs) < MOST_COST
        said.append(
            f"{each['title']}: at most {MOST_MOVES} move and less than {100 * MOST_COST:.0f} % cost: "
            f"{'yes' if fine else '**no**'}. {_conditions(each['repeats'])[-1]}"
        )
    header = ("ranks", "even, ms", "balanced, ms", "cost", "windows", "moves")
    return [markdown_table(header, rows), "\n".join(f"- {line}" for line in said)] if rows else []


def overhead_section(configurations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the callback costs where it only observes."""
    rows = []
    for each in (configuration for configuration in configurations if configuration["repeats"]):
        repeats = each["repeats"]
        step_s = statistics.median(repeat["tools"]["without"]["mean_s"] for repeat in repeats)
        inside = [repeat["tools"]["observe"]["inside_s"] / step_s for repeat in repeats]
        costs = paired_cost(repeats, "observe", "without", "again")
        noise = paired_cost(repeats, "again", "without")
        loads = [repeat["load"] for repeat in repeats]
        rows.append(
            (each["title"], f"{1e3 * step_s:.1f}", shares(costs), shares(noise), shares(inside), str(len(repeats)),
             f"{min(loads):.1f} to {max(loads):.1f}")
        )  # fmt: skip
    header = ("", "step without, ms", "with it", "noise: again without", "counted inside", "repeats", "load average")
    return [markdown_table(header, rows)] if rows else []


def _list(values: Sequence[int | None]) -> str:
    return ", ".join("never" if each is None else str(each) for each in values)


SECTIONS = {
    "speeds": ("Emulated devices of unequal speeds", gains_section),
    "jitter": ("Equal ranks with jitter", jitter_section),
    "overhead": ("What observing costs", overhead_section),
    "contention": ("Real contention in the lab", gains_section),
}


def page(report: Mapping[str, Any], introductions: Mapping[str, str]) -> str:
    """Return the whole report in Markdown."""
    parts = [f"# {report['title']}, {report['date']}", introductions[""], report["environment"]]
    for part, (title, section) in SECTIONS.items():
        own = [each for each in report["configurations"] if each["part"] == part]
        if not own:
            continue
        parts += [f"## {title}", introductions[part], f"    {own[0]['command']}", *section(own)]
        for each in own:
            if each["error"]:
                parts.append(f"{each['title']} ended early:\n\n{indented(each['error'])}")
    return "\n\n".join(parts) + "\n"
