"""Local updates with averages that block, are compressed and overlap with compute, on emulated hosts and devices.

    python -m benchmarks.local_update.overlap [--hosts 4] [--links 100mbit 1gbit] [--repeats 5] [--out FILE]

All methods train the same model in the same processes, in an order that rotates from repeat to repeat. A repeat times
whole rounds in the middle of a run, from the beginning of a round to the beginning of another. So what is under way at
its start counts, in place of what is under way at its end; the last synchronisation of a run, which is always in full
and blocking, does not. The results, `docs/results/local_update_overlap_<date>.md` and a JSON file with every repeat
beside it, are written again after each repeat. With the defaults about 20 minutes. accelerate is optional: `pip install
accelerate`.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from benchmarks.kit.hosts import Comparison, entry, measure_all, need_hosts, ring_bytes
from benchmarks.kit.options import Parser, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.results import Results
from benchmarks.kit.step_times import LIMIT, Row, rows_of, sections
from lightning_comm.core.rates import parse_rate
from lightning_comm.transport.averaging import Averaging

BLOCKING, BEST, ACCELERATE = "open", "bf16_overlap", "accelerate"
OVERLAP_STEPS = 7  # the most that a period of 8 has room for
_AVERAGING: dict[str, dict[str, Any]] = {
    LIMIT: {},
    BLOCKING: {},
    "bf16": {"compression": "bf16"},
    "overlap": {"overlap_steps": OVERLAP_STEPS},
    BEST: {"compression": "bf16", "overlap_steps": OVERLAP_STEPS},
}
_LABELS = {
    LIMIT: "no communication",
    BLOCKING: "ours, blocking",
    "bf16": "ours, bf16",
    "overlap": f"ours, overlap of {OVERLAP_STEPS} steps",
    BEST: f"ours, bf16 and overlap of {OVERLAP_STEPS} steps",
    ACCELERATE: "accelerate LocalSGD",
}
_NEVER = 10**6  # steps; longer than any run
WARMUP_ROUNDS = 2  # the first begins with nothing under way
TARGETS = {"100mbit": 0.95, "1gbit": 0.97}  # of the limit's speed, for what is compressed and overlapped
_MODEL, _IMAGE = "vit_tiny_patch16_224", 32


def usable() -> tuple[list[str], list[str]]:
    """Return the methods that can run here, and why others cannot."""
    names, left_out = [], []
    fields = {each.name for each in dataclasses.fields(Averaging)}
    for name, settings in _AVERAGING.items():
        missing = sorted(set(settings) - fields)
        if missing:
            left_out.append(f"{_LABELS[name]}: left out, since `Averaging` has no `{missing[0]}`")
        else:
            names.append(name)
    if importlib.util.find_spec("accelerate") is not None:
        names.append(ACCELERATE)
    else:
        left_out.append(f"{_LABELS[ACCELERATE]}: left out, since accelerate is not installed")
    return names, left_out


def job_of(batch: int = 1, step_s: float = 1.0, period: int = 1) -> Any:
    """Return what all methods train."""
    from benchmarks.kit.training import Job

    return Job(_MODEL, _IMAGE, batch, step_s, period, {"img_size": _IMAGE})


def on_host(options: dict[str, Any]) -> None:
    """Measure one configuration on this host, together with the others."""
    from benchmarks.kit.host import close, found, repeat_all, start, together
    from benchmarks.kit.trainer import lightning
    from benchmarks.kit.training import TIMEOUT, accelerate_local_sgd
    from lightning_comm import FixedPeriod, LocalUpdateStrategy

    start()
    period, steps = options["period"], options["rounds"] * options["period"]
    job = job_of(options["batch"], options["step_s"], period)
    names, left_out = usable()
    labels = {name: _LABELS[name] for name in names}
    found(labels=labels, left_out=left_out)
    segments = {}
    for name in names:
        if name == ACCELERATE:
            segments[name] = accelerate_local_sgd(job)
            segments[name](period)
            continue
        rule = FixedPeriod(_NEVER if name == LIMIT else period)
        segments[name] = lightning(
            job,
            lambda rule=rule, name=name: LocalUpdateStrategy(
                rule, averaging=Averaging(**_AVERAGING[name]), timeout=TIMEOUT
            ),
            warmup=WARMUP_ROUNDS * period,
            cooldown=period,
            together=False,  # a barrier would wait for what is under way
        )
    repeat_all(labels, options["repeats"], lambda name: together(segments[name](steps), steps))
    close()


def verdicts(rows: Mapping[str, Row], link: str) -> list[str]:
    """Say how what is compressed and overlapped stands against its target and against accelerate."""
    if BEST not in rows:
        return []
    limit_s, best, said = rows[LIMIT].steps_s, rows[BEST], []
    share = best.share(limit_s)
    if link in TARGETS:
        word = "reaches" if share >= TARGETS[link] else "**misses**"
        said.append(f"{best.label} {word} {TARGETS[link]:g} of the limit's speed, with {share:.3f}")
    if ACCELERATE in rows:
        peer = rows[ACCELERATE]
        said.append(f"it is {share / peer.share(limit_s):.2f} times as fast as {peer.label}")
    return said


def bounds(transfer_s: float, limit_s: float, period: int) -> str:
    """Say how fast the methods can be, given what the limit took for a step."""
    said = [
        f"{bound(transfer_s / parts, limit_s, period, hidden):.3f} {how}"
        for how, parts, hidden in (
            ("in full", 1, 0),
            ("as bf16", 2, 0),
            (f"in full with {OVERLAP_STEPS} steps of overlap", 1, OVERLAP_STEPS),
            ("as bf16 with them", 2, OVERLAP_STEPS),
        )
    ]
    return f"Compute and a transfer at the link's rate allow {', '.join(said)} of the limit's speed."


def bound(transfer_s: float, step_s: float, period: int, hidden_steps: int) -> float:
    """Return the share of the limit's speed that compute and transfer allow, with so many steps that hide transfer."""
    shown_s = max(0.0, transfer_s - hidden_steps * step_s)
    return period * step_s / (period * step_s + shown_s)


def expected_s(names: list[str], link: str, options: argparse.Namespace, payload_bytes: int) -> float:
    """Return about how long a configuration takes."""
    transfer_s = ring_bytes(options.hosts, payload_bytes) / parse_rate(link)
    total = 15.0
    for name in names:
        rounds = options.rounds + (0 if name == ACCELERATE else WARMUP_ROUNDS + 1)
        own_s = transfer_s / (2 if "bf16" in name else 1)
        settings = _AVERAGING.get(name, {})
        shown_s = 0 if name == LIMIT else max(0, own_s - settings.get("overlap_steps", 0) * options.step_s)
        ends_s = 0 if name == ACCELERATE else 2 * transfer_s  # equal weights at the start, an average at the end
        total += options.repeats * (rounds * (options.period * options.step_s + shown_s) + ends_s)
    return total


_INTRODUCTION = """{model} at {image} x {image}, {parameters:,} parameters, {megabytes:.1f} MB in fp32; {batch} samples
a host, SGD with momentum, one process a host, a synchronisation every {period} steps; all methods in that same process
one after the other, in an order that rotates from repeat to repeat. **Devices are emulated**: forward and backward take
{step_s} s, layer by layer, and leave the processor idle but for the real compute, which is part of that time. Links are
shaped, both ways. Ours run under Lightning, each repeat as a `fit` of its own, of which {rounds} whole rounds in the
middle are timed; accelerate runs in a plain loop, which is some 1 % faster than Lightning's, and {rounds} rounds of it
are timed as well.

*step*: seconds of the slowest host over a repeat. *of the limit*: the speed in steps per second as a share of that of
local updates whose round is longer than the run; the median of the repeats, each against the limit of the same repeat,
and their range, which holds the true median in 15 of 16 cases at 5 repeats. *payload*: what a host hands over in a
step, on average over the period, from the ledger. *sent*: per step and host, on its interface."""


def _introduction(report: Report) -> str:
    settings = report["settings"]
    return _INTRODUCTION.format(**settings, model=_MODEL, image=_IMAGE, megabytes=4e-6 * settings["parameters"])


def reference_of(report: Report) -> str:
    """Return the method that others are compared with: accelerate, where it was there."""
    measured = {name for each in report["configurations"] for name in each["labels"]}
    return ACCELERATE if ACCELERATE in measured else BLOCKING


PAGE = Page(
    "overlap",
    "Local updates with a blocking average, compressed and overlapped",
    _introduction,
    lambda report: sections(report, reference_of(report), _LABELS[reference_of(report)]),
)


def main() -> None:
    """Run all links and write the results file."""
    given = options()
    need_hosts()
    parameters = job_of().parameters
    names, left_out = usable()
    print("\n".join(left_out))
    told = settings_of(given, "batch", "step_s", "period", "rounds", "repeats")
    settings = {**told, "hosts": given.hosts, "parameters": parameters}
    results = Results(PAGE, given.out, configurations=[], settings=settings)

    def on_news() -> None:
        sent_bytes = ring_bytes(given.hosts, 4 * parameters)
        for each in results.report["configurations"]:
            if each["repeats"]:
                rows = rows_of(each)
                each["verdicts"] = verdicts(rows, each["link"])
                each["note"] = bounds(sent_bytes / parse_rate(each["link"]), rows[LIMIT].median_s, given.period)
        results.write()

    times_s = {link: expected_s(names, link, given, 4 * parameters) for link in given.links}
    comparisons = [
        Comparison(f"{given.hosts} hosts, {link}", given.hosts, link, told, time_s) for link, time_s in times_s.items()
    ]
    measure_all("local_update.overlap", comparisons, results, on_news)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.links(4, ["100mbit", "1gbit"])
    parser.number("--repeats", 5)
    parser.number("--rounds", 3, "rounds that a repeat times")
    parser.number("--period", 8, "steps of a round")
    parser.number("--batch", 4, "samples of a step on each host")
    parser.number("--step-s", 0.25, "seconds of forward and backward")
    parser.results(PAGE)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    entry(main, on_host)
