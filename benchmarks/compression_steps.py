"""Step times of DDP under each compression, end to end, on emulated hosts with emulated devices.

    python benchmarks/compression_steps.py [--hosts 4] [--links 100mbit 500mbit 1gbit] [--repeats 5] [--out FILE]

For each model and link, DDP's best `bucket_cap_mb` is searched first; then every method, DDP among them, trains with
buckets of that size, all in the same processes, in an order that rotates from repeat to repeat. The results,
`docs/results/compression_steps_<date>.md` and a JSON file with every repeat beside it, are written again after each
repeat. With the defaults about half an hour; what it will take is printed first.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulated_run import as_report, close_host, measure, rate_of, results_file, write
from steps_report import LIMIT, page

from lightning_comm.core.quantities import duration
from lightning_comm.lab.cluster import unavailable

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32}),
    "resnet": ("resnet26", {"channels": [40, 80, 160, 320]}),  # at five eighths of its width
}
IMAGE = 32
BUCKETS_MB = (0.5, 1.0, 2.0, 5.0, 25.0)
FEW_BUCKETS = 10
_SEGMENT_S = 2.0  # what a method is timed for in a repeat, where that is no less than 2 steps and no more than 10
_TIMEOUT_S = 1800
_LIGHTER = {"ddp": 1.0, "torch_bf16": 0.5, "bf16": 0.5, "fp16": 0.5, "int8": 0.25, "mask": 0.2}  # of DDP's bytes


@dataclass(frozen=True)
class Plan:
    """What one configuration is expected to take.

    Args:
        dense_s: A step of plain DDP.
        step_s: A step's compute.
        repeats: How often everything is measured.

    """

    dense_s: float
    step_s: float
    repeats: int

    def total_s(self, methods: list[str]) -> float:
        """Return the seconds of a sweep, of warming up and of all repeats."""
        sweep = len(BUCKETS_MB) * 4 * self.dense_s
        own = [max(self.step_s, _LIGHTER.get(name, 0.1) * self.dense_s) for name in methods]
        set_up = 15 + 2 * len(methods)
        return set_up + sweep + sum(3 * each + self.repeats * each * steps_of(each) for each in own)


def steps_of(step_s: float) -> int:
    """Return how many steps of a method are timed in a repeat."""
    return max(2, min(10, round(_SEGMENT_S / step_s)))


def dense_step_s(link: str, hosts: int, payload_bytes: float, step_s: float) -> float:
    """Return about what a step of DDP takes: compute, or what the link needs, and a part of the other."""
    sent_s = 2 * (hosts - 1) / hosts * payload_bytes / rate_of(link)
    return max(step_s, sent_s) + 0.3 * min(step_s, sent_s)


def as_host(options: dict[str, Any]) -> None:
    """Measure one configuration on this host, together with the others."""
    from compression_methods import METHODS, count_buckets
    from emulated_host import repeat_all, say, start, sweep_buckets, together
    from emulated_steps import Job

    start()
    name, model_args = MODELS[options["model"]]
    job = Job(name, IMAGE, options["batch"], options["step_s"], 1, model_args)
    swept_s = sweep_buckets(job, BUCKETS_MB)
    best = min(swept_s, key=lambda cap: swept_s[cap])
    counts = {cap: count_buckets(job, cap) for cap in BUCKETS_MB}
    labels = {name: METHODS[name][0] for name in options["methods"]}
    found = {"best_mb": best, "buckets": counts, "bucket_sweep_s": swept_s, "note": _note(best, counts, swept_s)}
    say("RESULT", json.dumps({**found, "labels": labels}))
    segments, steps = {}, {}
    for name in options["methods"]:
        say("PROGRESS", f"warming up {labels[name]}")
        segments[name] = METHODS[name][1](job, best)
        if name != "pactrain_lightning":  # warms up in each segment
            segments[name](2)
        steps[name] = steps_of(together(segments[name](1), 1)["step_s"])
    say("RESULT", json.dumps({"steps": steps}))
    repeat_all(segments, steps, options["repeats"])
    close_host()


def _note(best: float, counts: dict[float, int], swept_s: dict[float, float]) -> str:
    sweep = ", ".join(f"{cap:g} MB: {1e3 * swept_s[cap]:.0f} ms ({counts[cap]})" for cap in swept_s)
    few = "" if counts[best] >= FEW_BUCKETS else f" That is less than {FEW_BUCKETS}."
    return f"DDP by `bucket_cap_mb` (and its buckets): {sweep}. All at {best:g} MB, {counts[best]} buckets.{few}"


def main() -> None:
    """Run all configurations and write the results file."""
    options = _options()
    if (missing := unavailable()) is not None:
        sys.exit(f"compression_steps.py needs emulated hosts: {missing}")
    parameters = {model: _parameters_of(model) for model in options.models}
    report = as_report("Compressions compared on emulated hosts")
    report["command"] = shlex.join(["python", "benchmarks/compression_steps.py", *sys.argv[1:]])
    report["settings"] = {"batch": options.batch, "step_s": options.step_s, "hosts": options.hosts, "image": IMAGE}
    report["settings"]["parameters"] = parameters
    out = Path(options.out) if options.out else results_file("compression_steps", report)
    configurations = [(model, link) for model in options.models for link in options.links]
    expected_s = [
        Plan(
            dense_step_s(link, options.hosts, 4 * parameters[model], options.step_s), options.step_s, options.repeats
        ).total_s(options.methods)
        for model, link in configurations
    ]
    print(f"{len(configurations)} configurations, about {duration(sum(expected_s))} in all", flush=True)
    introduction = _INTRODUCTION.format(
        models=" and ".join(f"{MODELS[model][0]} ({parameters[model]:,} parameters)" for model in options.models),
        **{name: report["settings"][name] for name in ("batch", "step_s", "image")},
    )
    for (model, link), expected in zip(configurations, expected_s, strict=True):
        title = f"{MODELS[model][0]}, {options.hosts} hosts, {link}"
        print(f"{title}: about {duration(expected)}", flush=True)
        settings = {name: getattr(options, name) for name in ("batch", "step_s", "repeats", "methods")}
        measure(
            [sys.executable, __file__, "--as-host", json.dumps({**settings, "model": model})],
            (options.hosts, link, title),
            report,
            lambda: write(report, out, page(report, introduction, "ddp", "DDP, best bucket")),
            timeout_s=_TIMEOUT_S,
        )
    print(f"\n{out}\n{out.with_suffix('.json')}")


def _parameters_of(model: str) -> int:
    from emulated_steps import Job

    name, model_args = MODELS[model]
    return sum(parameter.numel() for parameter in Job(name, IMAGE, 1, 1.0, 1, model_args).network().parameters())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--links", nargs="+", default=["100mbit", "500mbit", "1gbit"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all by default; the limit and DDP always run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--step-s", type=float, default=0.2)
    parser.add_argument("--out", help="the Markdown file; docs/results/compression_steps_<date>.md by default")
    options = parser.parse_args()
    from compression_methods import BEST, METHODS

    if unknown := set(options.methods or ()) - set(METHODS):
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    options.methods = [name for name in METHODS if name in {*(options.methods or METHODS), LIMIT, BEST}]
    return options


_INTRODUCTION = """{models} at {image} x {image}, {batch} samples a host, SGD with momentum, one process a host; all
methods in that same process one after the other, in an order that rotates from repeat to repeat. All have DDP's buckets
at the size that is best for plain DDP on that link, but for those whose name says otherwise: torch's PowerSGD aborts on
gloo with more than one bucket, and what sends little may want larger ones.
**Devices are emulated**: forward and backward of a batch take {step_s} s, layer by layer, and leave the processor idle
but for the real compute, which is part of that time. Links are shaped, both ways. What a method computes is real, on
processors that all hosts share, so it takes longer here than on hosts with as many each, and never less.

*step*: seconds of the slowest host over the steps of a segment. *of the limit*: the step time of DDP that sends no
gradients, as a share; with its range over repeats. Ratios are paired by repeat. *payload*: what a host hands over in a
step, from the method's ledger; torch's own methods have none. *sent*: per step and host, on its interface."""


if __name__ == "__main__":
    if "--as-host" in sys.argv:
        as_host(json.loads(sys.argv[-1]))
    else:
        main()
