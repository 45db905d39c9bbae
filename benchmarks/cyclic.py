"""Step times of Cyclic Data Parallelism on emulated hosts, against the bound, DDP at its best, and delayed all-reduce.

    python benchmarks/cyclic.py [--hosts 4] [--ratios 0.5 1 2 0.1] [--repeats 5] [--quick] [--out FILE]

A ratio is the time that a step's transfer takes over the time of its compute. The link is 100mbit and the emulated
device as fast as that asks for; below 0.25 the link is ten times faster instead, which leaves room for peaks. DDP's
best `bucket_cap_mb` is searched first; then all methods run in the same processes, in an order that rotates from repeat
to repeat. The results, `docs/results/cyclic_steps_<date>.md` and a JSON file with every repeat beside it, are written
again after each repeat. With the defaults about half an hour; `--quick` is a trial of some 2 minutes that
writes to `build` instead.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from cyclic_report import ALONE, BEST, BUCKETS, DEFAULT, DELAYED, LABELS, V1, V2, V2_DEFAULT, V2_FINE, page
from emulated_run import as_report, close_host, measure, rate_of, results_file, write
from lab import PAYLOAD_SHARE
from steps_report import LIMIT

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule
from lightning_comm.core.quantities import duration
from lightning_comm.lab.cluster import unavailable

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 32, "embed_dim": 96, "depth": 12, "num_heads": 3}
IMAGE = 32
LINK, ROOMY = "100mbit", "1gbit"
ROOMY_BELOW = 0.25
BUCKETS_MB = (0.2, 0.4, 0.5, 1.0, 2.0)
FEW_BUCKETS = 10
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
    return round(least_bytes / (rate_of(link_of(ratio)) * PAYLOAD_SHARE) / ratio, 3)


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


def as_host(options: dict[str, Any]) -> None:
    """Measure one configuration on this host, together with the others."""
    import torch.distributed as dist
    from compression_methods import count_buckets
    from cyclic_steps import measured, sampling, segments_of
    from emulated_host import rotated, say, start, sweep_buckets, together
    from emulated_steps import Job

    start()
    names, step_s = options["methods"], options["step_s"]
    job = Job(MODEL, IMAGE, options["batch"], step_s, 1, MODEL_ARGS)
    swept_s = sweep_buckets(job, options["buckets_mb"])
    best = min(swept_s, key=lambda cap: swept_s[cap])
    counts = {cap: count_buckets(job, cap) for cap in swept_s}
    found = {"best_mb": best, "buckets": counts, "bucket_sweep_s": swept_s, "note": _note(best, counts, swept_s)}
    found |= {"labels": {name: LABELS[name] for name in names}, "delays": {}}
    found |= {name: options[name] for name in ("ratio", "step_s", "least_bytes")}
    for name in names:
        if name in (DEFAULT, BEST, DELAYED):
            found["delays"][name] = 1.0 if name == DELAYED else 0.0
        elif name in (V1, V2, V2_DEFAULT, V2_FINE):
            hosts = dist.get_world_size()
            rule: Rule = "v1" if name == V1 else "v2"
            stages = 6 * hosts if name == V2_FINE else 3 * hosts
            found["delays"][name] = delays_of(CyclicSchedule(hosts, stages, rule))
    say("RESULT", json.dumps(found))
    segments, inspections = segments_of(names, job, best)
    steps = {}
    for name in names:
        say("PROGRESS", f"warming up {LABELS[name]}")
        if name not in _AROUND:
            segments[name](1)
        steps[name] = steps_of(together(segments[name](2), 2)["step_s"])
    state_shares = {name: 1.0 for name in names if name in (DEFAULT, BEST, DELAYED)}
    state_shares |= {name: inspections[name].state_share for name in names if name in inspections}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, state_shares)
    shares = {name: [each[name] for each in gathered] for name in state_shares}
    say("RESULT", json.dumps({"steps": steps, "state_shares": shares}))
    with sampling() as sampler:
        for repeat in range(options["repeats"]):
            tools: dict[str, Any] = {}
            for name in rotated(names, repeat):
                say("AT", name)
                tools[name] = measured(segments[name], steps[name], step_s, sampler)
                took = f"{LABELS[name]}: {1e3 * tools[name]['step_s']:.0f} ms a step"
                say("PROGRESS", f"repeat {repeat + 1} of {options['repeats']}: {took}")
            say("RESULT", json.dumps({"repeat": repeat, "tools": tools}))
    close_host()


def _note(best: float, counts: dict[float, int], swept_s: dict[float, float]) -> str:
    sweep = ", ".join(f"{cap:g} MB: {1e3 * swept_s[cap]:.0f} ms ({counts[cap]})" for cap in swept_s)
    few = "" if counts[best] >= FEW_BUCKETS else f" That is less than {FEW_BUCKETS}."
    return f"DDP by `bucket_cap_mb` (and its buckets): {sweep}. Best: {best:g} MB, {counts[best]} buckets.{few}"


def main() -> None:
    """Run all configurations and write the results file."""
    options = _options()
    if (missing := unavailable()) is not None:
        sys.exit(f"cyclic.py needs emulated hosts: {missing}")
    parameters = _parameters()
    least_bytes = 2 * (options.hosts - 1) / options.hosts * 4 * parameters
    report = as_report("Cyclic Data Parallelism on emulated hosts")
    report["command"] = shlex.join(["python", "benchmarks/cyclic.py", *sys.argv[1:]])
    report["settings"] = {"batch": options.batch, "hosts": options.hosts, "parameters": parameters}
    out = Path(options.out) if options.out else results_file("cyclic_steps", report)
    if options.quick and not options.out:
        out = Path("build") / out.name  # a trial is no result
    introduction = _INTRODUCTION.format(
        model=MODEL, parameters=parameters, megabytes=4e-6 * parameters, image=IMAGE, batch=options.batch,
        roomy=ROOMY, link=LINK,
    )  # fmt: skip
    steps_s = {ratio: step_s_of(ratio, least_bytes) for ratio in options.ratios}
    all_s = [expected_s(ratio, step_s, options.methods, options.repeats) for ratio, step_s in steps_s.items()]
    print(f"{len(steps_s)} configurations, about {duration(sum(all_s))} in all", flush=True)
    for (ratio, step_s), expected in zip(steps_s.items(), all_s, strict=True):
        link = link_of(ratio)
        title = f"transfer {ratio:g} times the compute: {options.hosts} hosts, {link}, compute of {step_s:g} s"
        print(f"{title}: about {duration(expected)}", flush=True)
        settings = {name: getattr(options, name) for name in ("batch", "repeats", "methods", "buckets_mb")}
        settings |= {"step_s": step_s, "ratio": ratio, "least_bytes": least_bytes}
        measure(
            [sys.executable, __file__, "--as-host", json.dumps(settings)],
            (options.hosts, link, title),
            report,
            lambda: write(report, out, page(report, introduction)),
            timeout_s=_TIMEOUT_S,
        )
    print(f"\n{out}\n{out.with_suffix('.json')}")


def _parameters() -> int:
    from emulated_steps import Job

    return sum(each.numel() for each in Job(MODEL, IMAGE, 1, 1.0, 1, MODEL_ARGS).network().parameters())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ratios", nargs="+", type=float, metavar="RATIO", help="0.5, 1, 2 and 0.1 by default")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all by default; the bound and DDP always run")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one repeat at ratio 1 with one bucket size: a trial")
    parser.add_argument("--out", help="the Markdown file; docs/results/cyclic_steps_<date>.md by default")
    options = parser.parse_args()
    if unknown := set(options.methods or ()) - set(LABELS):
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}; there are {', '.join(LABELS)}")
    options.methods = [name for name in LABELS if name in {*(options.methods or LABELS), *ALWAYS}]
    options.ratios = options.ratios or ([1.0] if options.quick else [0.5, 1.0, 2.0, 0.1])
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.buckets_mb = BUCKETS_MB[1:2] if options.quick else BUCKETS_MB
    return options


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


if __name__ == "__main__":
    if "--as-host" in sys.argv:
        as_host(json.loads(sys.argv[-1]))
    else:
        main()
