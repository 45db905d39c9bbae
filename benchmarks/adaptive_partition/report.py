"""The page on shares by speed: what balancing gained beside what theory says, and what it costs."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kit.pages import Report
from benchmarks.kit.statistics import paired, standing
from benchmarks.kit.step_times import ended_early
from benchmarks.kit.tables import Column, ends, listed, table
from lightning_comm.core.adaptive_partition.shares import (
    RankCost,
    proportional_sizes,
    speedup_of_balancing,
    step_speedup,
)

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
        return paired(self.even_s, self.balanced_s)

    @property
    def possible(self) -> tuple[float, ...]:
        """How much faster the optimum was than the even step of the same repeat."""
        return paired(self.even_s, self.optimum_s)

    @property
    def over_optimum(self) -> tuple[float, ...]:
        """How much longer than the optimum's of the same repeat the balanced step was, as a share."""
        return tuple(ratio - 1 for ratio in paired(self.balanced_s, self.optimum_s))


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
    in_time = sum(each is not None and each <= MOST_WINDOWS for each in gain.until)
    return [
        standing(gain.optimum_s, "the optimum"),
        f"Within {100 * WITHIN:.0f} % of the optimum in at most {MOST_WINDOWS} windows after the first plan could be "
        f"applied: {in_time} of {len(gain.until)} repeats. The first window that near began after "
        f"{_list(gain.batches)} batches.",
    ]


def _median(title: str, of: Callable[[Gain], Sequence[float]], form: str = ".2f", scale: float = 1.0) -> Column:
    return Column(title, lambda row: f"{scale * statistics.median(of(row[1])):{form}}")


GAIN_COLUMNS = [
    Column("ranks' speeds", lambda row: row[0]["title"]),
    _median("even, ms", lambda gain: gain.even_s, ".1f", 1e3),
    _median("balanced, ms", lambda gain: gain.balanced_s, ".1f", 1e3),
    _median("optimum, ms", lambda gain: gain.optimum_s, ".1f", 1e3),
    _median("mean / least speed", lambda gain: gain.closed),
    _median("expected", lambda gain: gain.expected),
    Column(
        "measured gain",
        lambda row: f"{statistics.median(row[1].measured):.2f} ({ends(row[1].measured, form='.2f')})",
    ),
    _median("of the optimum", lambda gain: gain.possible),
    Column("over the optimum", lambda row: shares(row[1].over_optimum, "+.1f")),
    Column("windows until within 5 %", lambda row: _list(row[1].until)),
    Column("moves", lambda row: _list(row[1].moves)),
]


def paired_cost(repeats: Sequence[Mapping[str, Any]], own: str, *others: str) -> list[float]:
    """Return by how much longer the mean step of one arm was than that of others in the same repeat, as a share."""
    return [
        repeat["tools"][own]["mean_s"] / statistics.fmean(repeat["tools"][name]["mean_s"] for name in others) - 1
        for repeat in repeats
    ]


def shares(values: Sequence[float], form: str = "+.2f") -> str:
    """Return the median of shares in per cent, and their range."""
    return f"{100 * statistics.median(values):{form}} % ({ends(values, 100, form)})"


def gains_section(configurations: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield what there is to say of configurations in which ranks are unequal."""
    known = [(each, gain_of(each)) for each in configurations]
    if known:
        yield table(GAIN_COLUMNS, known)
    for each, gain in known:
        said = [*verdicts(gain), *_plain(each["repeats"]), *_devices(each["repeats"]), _load(each["repeats"])]
        yield f"{each['title']}:\n\n" + listed([*said, *([each["note"]] if each["note"] else [])])


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


def _devices(repeats: Sequence[Mapping[str, Any]]) -> list[str]:
    arms = [arm for repeat in repeats for arm in repeat["tools"].values()]
    if "overruns" not in arms[0]:
        return []
    late = sum(arm["overruns"] for arm in arms)
    return [
        f"Emulated devices: {late or 'no'} of {sum(arm['paced_steps'] for arm in arms)} steps of ranks overran (by "
        f"more than 1 % and 1 ms); a device's steps took {100 * max(arm['excess'] for arm in arms):.1f} % longer "
        f"than stated at most; real compute was {100 * max(arm['real_share'] for arm in arms):.0f} % of them at "
        "most."
    ]


def _load(repeats: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(repeats)} repeats; load average {_loads(repeats)}."


def _loads(repeats: Sequence[Mapping[str, Any]]) -> str:
    return ends([repeat["load"] for repeat in repeats])


def _mean_ms(repeats: Sequence[Mapping[str, Any]], arm: str) -> str:
    return f"{1e3 * statistics.median(repeat['tools'][arm]['mean_s'] for repeat in repeats):.1f}"


def _balanced(repeats: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    return [repeat["tools"]["balance"][name] for repeat in repeats]


JITTER_COLUMNS = [
    Column("ranks", lambda each: each["title"]),
    Column("even, ms", lambda each: _mean_ms(each["repeats"], "even")),
    Column("balanced, ms", lambda each: _mean_ms(each["repeats"], "balance")),
    Column("cost", lambda each: shares(paired_cost(each["repeats"], "balance", "even"))),
    Column("windows", lambda each: _list(_balanced(each["repeats"], "compared"))),
    Column("moves", lambda each: _list(_balanced(each["repeats"], "moves"))),
]


def jitter_section(configurations: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield what there is to say of equal ranks with jitter."""
    said = []
    for each in configurations:
        cost = statistics.median(paired_cost(each["repeats"], "balance", "even"))
        fine = max(_balanced(each["repeats"], "moves")) <= MOST_MOVES and cost < MOST_COST
        said.append(
            f"{each['title']}: at most {MOST_MOVES} move and less than {100 * MOST_COST:.0f} % cost: "
            f"{'yes' if fine else '**no**'}. {_load(each['repeats'])}"
        )
    return [table(JITTER_COLUMNS, configurations), listed(said)] if said else []


def _inside(repeats: Sequence[Mapping[str, Any]]) -> list[float]:
    step_s = statistics.median(repeat["tools"]["without"]["mean_s"] for repeat in repeats)
    return [repeat["tools"]["observe"]["inside_s"] / step_s for repeat in repeats]


OVERHEAD_COLUMNS = [
    Column("", lambda each: each["title"]),
    Column("step without, ms", lambda each: _mean_ms(each["repeats"], "without")),
    Column("with it", lambda each: shares(paired_cost(each["repeats"], "observe", "without", "again"))),
    Column("noise: again without", lambda each: shares(paired_cost(each["repeats"], "again", "without"))),
    Column("counted inside", lambda each: shares(_inside(each["repeats"]))),
    Column("repeats", lambda each: str(len(each["repeats"]))),
    Column("load average", lambda each: _loads(each["repeats"])),
]


def overhead_section(configurations: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield what the callback costs where it only observes."""
    return [table(OVERHEAD_COLUMNS, configurations)] if configurations else []


def _list(values: Sequence[int | None]) -> str:
    return ", ".join("never" if each is None else str(each) for each in values)


SECTIONS = {
    "speeds": ("Emulated devices of unequal speeds", gains_section),
    "jitter": ("Equal ranks with jitter", jitter_section),
    "overhead": ("What observing costs", overhead_section),
    "contention": ("Real contention in the lab", gains_section),
}


def sections(report: Report, introductions: Mapping[str, str]) -> Iterable[str]:
    """Yield what there is to say of each part that was measured, with the command that did."""
    for part, (title, section) in SECTIONS.items():
        own = [each for each in report["configurations"] if each["part"] == part]
        if own:
            yield f"## {title}"
            yield introductions[part]
            yield f"    {own[0]['command']}"
            yield from section([each for each in own if each["repeats"]])
        for each in own:
            yield ended_early(each, each["title"])
