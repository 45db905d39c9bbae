"""The page of `tools`: what measured step times say, against plain DDP, the limit, and the bound."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.kit import step_times
from benchmarks.kit.hosts import ring_bytes
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.statistics import standing
from benchmarks.kit.step_times import DDP, LIMIT, Row, rows_of
from benchmarks.kit.tables import Column, indented, listed, table
from lightning_comm.core.judgement import CLAIM_REPEATS, Ratio, doubt
from lightning_comm.core.quantities import times_as_fast

OURS = "ours"
MIN_SHARE_OF_BOUND = 0.95


def bound_s(limit_s: float, bare_s: float, period: int) -> float:
    """Return the step time without any loss: compute, plus one bare all-reduce of the payload a period."""
    return limit_s + bare_s / period


def bounds_s(configuration: Mapping[str, Any], period: int) -> list[float]:
    """Return the bound of each repeat."""
    return [bound_s(each["tools"][LIMIT]["step_s"], each["bare_s"], period) for each in configuration["repeats"]]


def link_bytes_per_s(payload_bytes: float, bare_s: float, hosts: int) -> float:
    """Return what a host sent per second in the bare all-reduce, in a ring."""
    return ring_bytes(hosts, payload_bytes) / bare_s


def columns(rows: Mapping[str, Row], configuration: Mapping[str, Any], period: int) -> list[Column]:
    """Return the columns; the bound is only that of tools that communicate once a period.

    The others hide what they send behind compute, so the bound is not theirs.
    """
    bounds, once = bounds_s(configuration, period), configuration["once_a_period"]
    return [
        step_times.LABEL._replace(title="tool"),
        step_times.STEP,
        step_times.STEP_ENDS,
        step_times.faster_than(rows[DDP], "DDP"),
        step_times.shares_of(rows[LIMIT].steps_s, "of the limit")[0],
        Column("of the bound", lambda row: f"{row.share(bounds):.3f}" if row.name in once else ""),
        Column("MB sent", lambda row: f"{row.sent_bytes / 1e6:.2f}"),
    ]


def verdicts(rows: Mapping[str, Row], once_a_period: Sequence[str], bounds: Sequence[float]) -> list[str]:
    """Say whether a configuration counts, and whether ours holds against the best peer and the bound."""
    limit_s, ours = rows[LIMIT].steps_s, rows[OURS]
    said = [standing(limit_s)] if doubt(limit_s, CLAIM_REPEATS) is not None else []
    peers = [rows[name] for name in once_a_period if name in rows and not rows[name].label.startswith("ours")]
    if peers:
        best = min(peers, key=lambda row: row.median_s)
        against = Ratio.of(dict(enumerate(best.steps_s)), dict(enumerate(ours.steps_s)))
        assert against is not None
        word = "slower" if against.slower else "no slower"
        between = "too few repeats for an interval"
        if against.interval is not None:
            between = f"{against.interval[0]:.2f} to {against.interval[1]:.2f}"
        said.append(f"ours is {word} than the best peer, {best.label}: {times_as_fast(against.mean)} ({between})")
    share = ours.share(bounds)
    word = "reaches" if share >= MIN_SHARE_OF_BOUND else "**misses**"
    return [*said, f"ours {word} {MIN_SHARE_OF_BOUND:g} of the bound, with {share:.3f}"]


def sections(report: Report) -> Iterable[str]:
    """Yield what could not be run, and what there is to say of each configuration."""
    if report["could_not_run"]:
        yield "## Tools that could not be run"
    for each in report["could_not_run"]:
        yield f"- {each['label']}, {each['hosts']} hosts:\n\n{indented(each['error'])}"
    for each in report["configurations"]:
        yield f"## {each['hosts']} hosts, {each['link']}"
        if each["repeats"]:
            yield from _measured(each, report["settings"]["period"])
        yield step_times.ended_early(each)


def _measured(configuration: Mapping[str, Any], period: int) -> Iterable[str]:
    rows, bounds = rows_of(configuration), bounds_s(configuration, period)
    bare_s = statistics.median(each["bare_s"] for each in configuration["repeats"])
    payload, hosts = configuration["payload_bytes"], configuration["hosts"]
    sweep = ", ".join(f"{cap} MB: {1e3 * s:.0f} ms" for cap, s in configuration["bucket_sweep_s"].items())
    yield table(columns(rows, configuration, period), rows.values())
    yield (
        f"{len(configuration['repeats'])} repeats. A bare all-reduce of {payload / 1e6:.1f} MB took "
        f"{1e3 * bare_s:.0f} ms, {8e-6 * link_bytes_per_s(payload, bare_s, hosts):.0f} Mbit/s; so the bound at a "
        f"period of {period} is {1e3 * bound_s(rows[LIMIT].median_s, bare_s, period):.1f} ms. DDP by `bucket_cap_mb`: "
        f"{sweep}. {step_times.devices(rows, '; its real compute was {:.0f} % of the time at most.')}"
    )
    yield listed(verdicts(rows, configuration["once_a_period"], bounds))


_INTRODUCTION = """The same model ({model} at {image} x {image}, {parameters:,} parameters), batch ({batch} samples a
host), optimizer and period ({period} steps) under each tool, one process a host, all tools in that same process one
after the other, in an order that rotates from repeat to repeat. **Devices are emulated**: forward and backward of a
batch take {step_s} s, layer by layer, and the real compute is part of that. The links are shaped, both ways. What comes
on top of that time is real: the optimizer, and what a tool computes itself, such as a hook's compression.

*step*: seconds of the slowest host over the steps of a segment: whole periods for tools that synchronise once a period.
*of the limit*: the time of a step without communication, as a share. *of the bound*: the limit plus one bare
all-reduce of the model a period, as a share; for tools that synchronise once a period, since those that do in every
step hide a part of it behind compute. Ratios are paired by repeat. *MB sent*: per step and host, on its interface."""

PAGE = Page(
    "tools", "Tools compared on emulated hosts", lambda report: _INTRODUCTION.format(**report["settings"]), sections
)
