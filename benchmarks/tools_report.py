"""The report of `tools.py`: what measured step times say, as rows, verdicts and a page in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_comm.core.judgement import CLAIM_REPEATS, Ratio, doubt
from lightning_comm.core.quantities import times_as_fast
from lightning_comm.reports.pieces import markdown_table

LIMIT, PLAIN, OURS = "limit", "ddp", "ours"
MIN_SHARE_OF_BOUND = 0.95
_HEADER = ("tool", "step, ms", "lowest to highest", "times as fast as DDP", "of the limit", "of the bound", "MB sent")


@dataclass(frozen=True)
class Row:
    """One tool in one configuration.

    Args:
        label: Its name for people.
        steps_s: Seconds of a step in each repeat.
        speedup: How many times as fast as plain DDP: the median over repeats, each against DDP of that repeat.
        of_limit: The limit's step time as a share of this one's, in the same way.
        of_bound: The step time that compute, payload and measured link allow, as a share of this one's. None for tools
            that communicate in every step: they hide what they send behind compute, so the bound is not theirs.
        sent_bytes: What a host sent per step, on its interface.
        overruns: Steps in which the emulated device could not keep its pace, on all hosts.
        real_share: The share of forward and backward that was real compute.

    """

    label: str
    steps_s: tuple[float, ...]
    speedup: float
    of_limit: float
    of_bound: float | None
    sent_bytes: float
    overruns: int
    real_share: float

    @property
    def median_s(self) -> float:
        """The median over repeats."""
        return statistics.median(self.steps_s)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of each repeat."""
    return statistics.median(above / below for above, below in zip(numerators, denominators, strict=True))


def bound_s(limit_s: float, bare_s: float, period: int) -> float:
    """Return the step time without any loss: compute, plus one bare all-reduce of the payload a period."""
    return limit_s + bare_s / period


def link_bytes_per_s(payload_bytes: float, bare_s: float, hosts: int) -> float:
    """Return what a host sent per second in the bare all-reduce, in a ring."""
    return 2 * (hosts - 1) / hosts * payload_bytes / bare_s


def rows_of(configuration: Mapping[str, Any], period: int) -> dict[str, Row]:
    """Return a row for each tool of a configuration, in its order."""
    repeats = configuration["repeats"]
    steps = {name: [each["tools"][name]["step_s"] for each in repeats] for name in configuration["labels"]}
    bounds = [bound_s(each["tools"][LIMIT]["step_s"], each["bare_s"], period) for each in repeats]
    rows = {}
    for name, label in configuration["labels"].items():
        seen = [each["tools"][name] for each in repeats]
        once_a_period = name in configuration["once_a_period"]
        rows[name] = Row(
            label=label,
            steps_s=tuple(steps[name]),
            speedup=paired_ratio(steps[PLAIN], steps[name]),
            of_limit=paired_ratio(steps[LIMIT], steps[name]),
            of_bound=paired_ratio(bounds, steps[name]) if once_a_period else None,
            sent_bytes=statistics.fmean(each["sent_bytes"] for each in seen),
            overruns=sum(each["overruns"] for each in seen),
            real_share=statistics.fmean(each["real_share"] for each in seen),
        )
    return rows


def verdicts(rows: Mapping[str, Row], once_a_period: Sequence[str]) -> list[str]:
    """Say whether a configuration counts, and whether ours holds against the best peer and the bound."""
    said = []
    if (why := doubt(rows[LIMIT].steps_s, CLAIM_REPEATS)) is not None:
        said = [f"**inconclusive**: {why}. As measured all the same:"]
    ours = rows[OURS]
    peers = [rows[name] for name in once_a_period if name in rows and not rows[name].label.startswith("ours")]
    if peers:
        best = min(peers, key=lambda row: row.median_s)
        against = Ratio.of(dict(enumerate(best.steps_s)), dict(enumerate(ours.steps_s)))
        assert against is not None
        word = "slower" if against.slower else "no slower"
        ends = "too few repeats for an interval"
        if against.interval is not None:
            ends = f"{against.interval[0]:.2f} to {against.interval[1]:.2f}"
        said.append(f"ours is {word} than the best peer, {best.label}: {times_as_fast(against.mean)} ({ends})")
    assert ours.of_bound is not None
    word = "reaches" if ours.of_bound >= MIN_SHARE_OF_BOUND else "**misses**"
    said.append(f"ours {word} {MIN_SHARE_OF_BOUND:g} of the bound, with {ours.of_bound:.3f}")
    return said


def page(report: Mapping[str, Any]) -> str:
    """Return the whole report in Markdown."""
    settings, period = report["settings"], report["settings"]["period"]
    parts = [
        f"# Tools compared on emulated hosts, {report['date']}",
        _INTRODUCTION.format(**settings),
        f"    {report['command']}",
        report["environment"],
    ]
    if report["could_not_run"]:
        parts.append("## Tools that could not be run")
        parts += [
            f"- {each['label']}, {each['hosts']} hosts:\n\n{indented(each['error'])}"
            for each in report["could_not_run"]
        ]
    for configuration in report["configurations"]:
        parts.append(f"## {configuration['hosts']} hosts, {configuration['link']}")
        parts += _section(configuration, period)
    return "\n\n".join(parts) + "\n"


def _section(configuration: Mapping[str, Any], period: int) -> list[str]:
    parts = []
    if configuration.get("repeats"):
        rows = rows_of(configuration, period)
        bare_s = statistics.median(each["bare_s"] for each in configuration["repeats"])
        payload, hosts = configuration["payload_bytes"], configuration["hosts"]
        sweep = ", ".join(f"{cap} MB: {1e3 * s:.0f} ms" for cap, s in configuration["bucket_sweep_s"].items())
        limit_s = rows[LIMIT].median_s
        parts = [
            markdown_table(_HEADER, [_cells(row) for row in rows.values()]),
            f"{len(configuration['repeats'])} repeats. A bare all-reduce of {payload / 1e6:.1f} MB took "
            f"{1e3 * bare_s:.0f} ms, {8e-6 * link_bytes_per_s(payload, bare_s, hosts):.0f} Mbit/s; so the bound at a "
            f"period of {period} is {1e3 * bound_s(limit_s, bare_s, period):.1f} ms. DDP by `bucket_cap_mb`: {sweep}. "
            f"Overruns of the device: {overruns(rows)}; its real compute was "
            f"{100 * max(row.real_share for row in rows.values()):.0f} % of the time at most.",
            "\n".join(f"- {each}" for each in verdicts(rows, configuration["once_a_period"])),
        ]
    if configuration.get("error"):
        parts.append(f"This configuration ended early:\n\n{indented(configuration['error'])}")
    return parts


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        f"{1e3 * row.median_s:.1f}",
        f"{1e3 * min(row.steps_s):.1f} to {1e3 * max(row.steps_s):.1f}",
        f"{row.speedup:.2f}",
        f"{row.of_limit:.3f}",
        "" if row.of_bound is None else f"{row.of_bound:.3f}",
        f"{row.sent_bytes / 1e6:.2f}",
    )


def overruns(rows: Mapping[str, Any]) -> str:
    """Say how often the emulated devices of the methods overran."""
    late = [f"{row.overruns} in {row.label}" for row in rows.values() if row.overruns]
    return ", ".join(late) or "none"


def indented(text: str) -> str:
    """Return the text as a block of code within an item of a list."""
    return "\n".join(f"      {line}" for line in text.strip().splitlines())


_INTRODUCTION = """The same model ({model} at {image} x {image}, {parameters:,} parameters), batch ({batch} samples a
host), optimizer and period ({period} steps) under each tool, one process a host, all tools in that same process one
after the other, in an order that rotates from repeat to repeat. **Devices are emulated**: forward and backward of a
batch take {step_s} s, layer by layer, and the real compute is part of that. The links are shaped, both ways. What comes
on top of that time is real: the optimizer, and what a tool computes itself, such as a hook's compression.

*step*: seconds of the slowest host over the steps of a segment: whole periods for tools that synchronise once a period.
*of the limit*: the time of a step without communication, as a share. *of the bound*: the limit plus one bare
all-reduce of the model a period, as a share; for tools that synchronise once a period, since those that do in every
step hide a part of it behind compute. Ratios are paired by repeat. *MB sent*: per step and host, on its interface."""
