"""Step times of Cyclic Data Parallelism on emulated hosts, against the bound, DDP at its best, and delayed all-reduce.

    python -m benchmarks.cyclic.steps [--hosts 4] [--ratios 0.5 1 2 0.1] [--repeats 5] [--quick] [--out FILE]

A ratio is the time that a step's transfer takes over the time of its compute. The link is 100mbit and the emulated
device as fast as that asks for; below 0.25 the link is ten times faster instead, which leaves room for peaks. DDP's
best `bucket_cap_mb` is searched first; then all methods run in the same processes, in an order that rotates from repeat
to repeat. The results, `docs/results/cyclic_steps_<date>.md` and a JSON file with every repeat beside it, are written
again after each repeat. With the defaults about half an hour; `--quick` is a trial of some 2 minutes that
writes to `build` instead.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cyclic.steps_report import ALONE, BEST, BUCKETS, DEFAULT, DELAYED, LABELS, V1, V2, V2_DEFAULT, V2_FINE
from benchmarks.cyclic.steps_report import sections as sections_of
from benchmarks.kit.hosts import PAYLOAD_SHARE, Comparison, entry, measure_all, need_hosts, ring_bytes
from benchmarks.kit.options import Parser, chosen, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.results import Results
from benchmarks.kit.step_times import LIMIT
from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule
from lightning_comm.core.rates import parse_rate

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 32, "embed_dim": 96, "depth": 12, "num_heads": 3}
IMAGE = 32
LINK, ROOMY = "100mbit", "1gbit"
ROOMY_BELOW = 0.25
BUCKETS_MB = (0.2, 0.4, 0.5, 1.0, 2.0)
ALWAYS = (LIMIT, ALONE, BUCKETS, BEST)  # without which there is no bound and no ratio
_SEGMENT_S = 6.0  # what a method is timed for in a repeat, where that is no less than 4 steps and no more than 10
# steps of a segment that are not timed, start and end among them
_AROUND = {V1: 8, V2: 8, V2_DEFAULT: 8, V2_FINE: 8, DELAYED: 6}
_TIMEOUT_S = 2400


def link_of(ratio: float) -> str:
    """Return the rate of the links at a ratio of transfer to compute."""
    return LINK if ratio >= ROOMY_BELOW else ROOMY


def step_s_of(ratio: float, least_bytes: float) -> float:
    """Return the emulated compute of a step so that its transfer takes ``ratio`` times as long."""
    return round(least_bytes / (parse_rate(link_of(ratio)) * PAYLOAD_SHARE) / ratio, 3)


def steps_of(step_s: float) -> int:
    """Return how many steps of a method are timed in a repeat."""
    return max(4, min(10, round(_SEGMENT_S / step_s)))


def expected_s(ratio: float, step_s: float, methods: list[str], repeats: int) -> float:
    """Return about how long a configuration takes."""
    bound = step_s * max(1.0, ratio)
    own = {name: bound + (0.5 * min(step_s, ratio * step_s) if name in (DEFAULT, BEST) else 0.0) for name in methods}
    once = sum(own[name] * (steps_of(own[name]) + _AROUND.get(name, 1)) for name in methods)
    return 20 + len(BUCKETS_MB) * 5 * (step_s * (1 + ratio)) + repeats * once


def delays_of(schedule: CyclicSchedule) -> float:
    """Return by how many updates the parameters of a step are too old, on average over workers and stages."""
    step = schedule.warmup_sync_steps + 10
    return statistics.fmean(
        step - schedule.version(worker, stage, step)
        for worker in range(schedule.workers)
        for stage in range(schedule.stages)
    )


def delays_by_name(names: list[str], hosts: int) -> dict[str, float]:
    """Return the mean delay under each method that has one."""
    delays = {}
    for name in names:
        if name in (DEFAULT, BEST, DELAYED):
            delays[name] = 1.0 if name == DELAYED else 0.0
        elif name in (V1, V2, V2_DEFAULT, V2_FINE):
            rule: Rule = "v1" if name == V1 else "v2"
            stages = 6 * hosts if name == V2_FINE else 3 * hosts
            delays[name] = delays_of(CyclicSchedule(hosts, stages, rule))
    return delays


def job_of(batch: int = 1, step_s: float = 1.0) -> Any:
    """Return what all methods train."""
    from benchmarks.kit.training import Job

    return Job(MODEL, IMAGE, batch, step_s, 1, MODEL_ARGS)


def on_host(options: dict[str, Any]) -> None:
    """Measure one configuration on this host, together with the others."""
    import torch.distributed as dist

    from benchmarks.cyclic.methods import measured, sampling, segments_of
    from benchmarks.kit.host import best_buckets, close, found, gathered, repeat_all, say, start, together

    start()
    names, step_s = options["methods"], options["step_s"]
    job = job_of(options["batch"], step_s)
    buckets = best_buckets(job, options["buckets_mb"], "Best:")
    labels, delays = {name: LABELS[name] for name in names}, delays_by_name(names, dist.get_world_size())
    told = {each: options[each] for each in ("ratio", "step_s", "least_bytes")}
    found(**buckets, **told, labels=labels, delays=delays)
    segments, inspections = segments_of(names, job, buckets["best_mb"])
    steps = {}
    for name in names:
        say("PROGRESS", f"warming up {LABELS[name]}")
        if name not in _AROUND:
            segments[name](1)
        steps[name] = steps_of(together(segments[name](2), 2)["step_s"])
    own = {name: 1.0 for name in names if name in (DEFAULT, BEST, DELAYED)}
    own |= {name: inspections[name].state_share for name in names if name in inspections}
    hosts = gathered(own)
    found(steps=steps, state_shares={name: [each[name] for each in hosts] for name in own})
    with sampling() as sampler:
        repeat_all(labels, options["repeats"], lambda name: measured(segments[name], steps[name], step_s, sampler))
    close()


_INTRODUCTION = """A {model} of 12 blocks, {parameters:,} parameters ({megabytes:.1f} MB), at {image} x {image}, {batch}
samples a host, SGD with momentum, one process a host; all methods in that same process one after the other, in an order
that rotates from repeat to repeat. **Devices are emulated**: forward and backward of a batch take the stated time,
layer by layer, and the real compute is part of it. Where compute waits for parameters in the middle of a pass, the pass
takes that much longer. Links are shaped, both ways.

*No communication*, DDP and the delayed all-reduce run in a plain loop. The strategies run under Lightning, and so does
one more row without communication, which shows what Lightning itself takes. *One-step-delayed all-reduce* has the
buckets of the best DDP, sends them beside compute, and applies the gradients of a step at the end of the next one: it
has the update rule of v1. What overlaps with the next step is timed in the middle of a run, with what was under way at
the start in place of what is under way at the end.

Stages are a block each, by name. One more row has as many stages that the strategy cuts by itself, and one has twice
as many, cut by itself.

*step*: seconds of the slowest host. *of the bound*: the bound is the longer of a step without communication and an
isolated all-reduce of the model, in one piece or in DDP's best buckets, whichever is faster, in each repeat. *mean
delay*: by how many updates the parameters that a step computes with are too old, over ranks and stages. *optimizer
state on a rank*: of the whole model's. *payload*: from the ledger, per host and step; DDP has none. *sent*: on the
interface. *of 2(N-1)/N*: of that many times the model, what a ring needs. Peaks: what an interface sent, read every 20
ms; the median over hosts and repeats of the 95th percentile and of the highest rate in a segment, and of the highest
over a quarter of a step's compute. A link that is busy sends at its full rate whoever uses it; the configuration on
{roomy}, where the same step needs a tenth of the link, shows how traffic would peak if it could."""


def _introduction(report: Report) -> str:
    parameters, batch = report["settings"]["parameters"], report["settings"]["batch"]
    constants = {"model": MODEL, "image": IMAGE, "roomy": ROOMY, "link": LINK}
    return _INTRODUCTION.format(parameters=parameters, megabytes=4e-6 * parameters, batch=batch, **constants)


PAGE = Page("cyclic_steps", "Cyclic Data Parallelism on emulated hosts", _introduction, sections_of)


def main() -> None:
    """Run all configurations and write the results file."""
    given = options()
    need_hosts()
    parameters = job_of().parameters
    least_bytes = ring_bytes(given.hosts, 4 * parameters)
    settings = {**settings_of(given, "batch", "hosts"), "parameters": parameters}
    results = Results(PAGE, given.out, configurations=[], settings=settings)
    if given.quick and not given.out:
        results.path = Path("build") / results.path.name  # a trial is no result
    comparisons = []
    for ratio in given.ratios:
        link, step_s = link_of(ratio), step_s_of(ratio, least_bytes)
        title = f"transfer {ratio:g} times the compute: {given.hosts} hosts, {link}, compute of {step_s:g} s"
        told = settings_of(given, "batch", "repeats", "methods", "buckets_mb")
        told |= {"step_s": step_s, "ratio": ratio, "least_bytes": least_bytes}
        time_s = expected_s(ratio, step_s, given.methods, given.repeats)
        comparisons.append(Comparison(title, given.hosts, link, told, time_s))
    measure_all("cyclic.steps", comparisons, results, timeout_s=_TIMEOUT_S)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.number("--hosts", 4, "emulated hosts")
    parser.add_argument("--ratios", nargs="+", type=float, metavar="RATIO", help="0.5, 1, 2 and 0.1 by default")
    parser.some("--methods", LABELS)
    parser.add_argument("--repeats", type=int)
    parser.number("--batch", 2, "samples of a step on each host")
    parser.add_argument("--quick", action="store_true", help="one repeat at ratio 1 with one bucket size: a trial")
    parser.results(PAGE)
    given = parser.parse_args(arguments)
    given.methods = chosen(given.methods, LABELS, ALWAYS)
    given.ratios = given.ratios or ([1.0] if given.quick else [0.5, 1.0, 2.0, 0.1])
    given.repeats = given.repeats or (1 if given.quick else 5)
    given.buckets_mb = BUCKETS_MB[1:2] if given.quick else BUCKETS_MB
    return given


if __name__ == "__main__":
    entry(main, on_host)
