"""Step times of DDP under each compression, end to end, on emulated hosts with emulated devices.

    python -m benchmarks.compression.steps [--hosts 4] [--links 100mbit 500mbit 1gbit] [--repeats 5] [--out FILE]

For each model and link, DDP's best `bucket_cap_mb` is searched first; then every method, DDP among them, trains with
buckets of that size, all in the same processes, in an order that rotates from repeat to repeat. The results,
`docs/results/compression_steps_<date>.md` and a JSON file with every repeat beside it, are written again after each
repeat. With the defaults about half an hour; what it will take is printed first.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks.kit.hosts import Comparison, entry, measure_all, need_hosts, ring_bytes
from benchmarks.kit.options import Parser, chosen, refuse_unknown, settings_of
from benchmarks.kit.pages import Page, Report
from benchmarks.kit.results import Results
from benchmarks.kit.step_times import DDP, LIMIT, sections
from lightning_comm.core.rates import parse_rate

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32}),
    "resnet": ("resnet26", {"channels": [40, 80, 160, 320]}),  # at five eighths of its width
}
IMAGE = 32
BUCKETS_MB = (0.5, 1.0, 2.0, 5.0, 25.0)
_SEGMENT_S = 2.0  # what a method is timed for in a repeat, where that is no less than 2 steps and no more than 10
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
    sent_s = ring_bytes(hosts, payload_bytes) / parse_rate(link)
    return max(step_s, sent_s) + 0.3 * min(step_s, sent_s)


def job_of(model: str, batch: int = 1, step_s: float = 1.0) -> Any:
    """Return what all methods train."""
    from benchmarks.kit.training import Job

    name, model_args = MODELS[model]
    return Job(name, IMAGE, batch, step_s, 1, model_args)


def on_host(options: dict[str, Any]) -> None:
    """Measure one configuration on this host, together with the others."""
    from benchmarks.compression.methods import METHODS
    from benchmarks.kit.host import best_buckets, close, found, repeat_all, say, start, together

    start()
    job = job_of(options["model"], options["batch"], options["step_s"])
    buckets = best_buckets(job, BUCKETS_MB, "All at")
    labels = {name: METHODS[name][0] for name in options["methods"]}
    found(**buckets, labels=labels)
    segments, steps = {}, {}
    for name in options["methods"]:
        say("PROGRESS", f"warming up {labels[name]}")
        segments[name] = METHODS[name][1](job, buckets["best_mb"])
        if name != "pactrain_lightning":  # warms up in each segment
            segments[name](2)
        steps[name] = steps_of(together(segments[name](1), 1)["step_s"])
    found(steps=steps)
    repeat_all(labels, options["repeats"], lambda name: together(segments[name](steps[name]), steps[name]))
    close()


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


def _introduction(report: Report) -> str:
    settings = report["settings"]
    models = " and ".join(f"{MODELS[name][0]} ({count:,} parameters)" for name, count in settings["parameters"].items())
    return _INTRODUCTION.format(models=models, **{name: settings[name] for name in ("batch", "step_s", "image")})


PAGE = Page(
    "compression_steps",
    "Compressions compared on emulated hosts",
    _introduction,
    lambda report: sections(report, DDP, "DDP, best bucket"),
)


def main() -> None:
    """Run all configurations and write the results file."""
    given = options()
    need_hosts()
    parameters = {model: job_of(model).parameters for model in given.models}
    settings = {**settings_of(given, "batch", "step_s", "hosts"), "image": IMAGE, "parameters": parameters}
    results = Results(PAGE, given.out, configurations=[], settings=settings)
    comparisons = []
    for model in given.models:
        for link in given.links:
            dense_s = dense_step_s(link, given.hosts, 4 * parameters[model], given.step_s)
            told = {**settings_of(given, "batch", "step_s", "repeats", "methods"), "model": model}
            expected_s = Plan(dense_s, given.step_s, given.repeats).total_s(given.methods)
            title = f"{MODELS[model][0]}, {given.hosts} hosts, {link}"
            comparisons.append(Comparison(title, given.hosts, link, told, expected_s))
    measure_all("compression.steps", comparisons, results)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.links(4, ["100mbit", "500mbit", "1gbit"])
    parser.some("--models", MODELS)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all by default; the limit and DDP always run")
    parser.number("--repeats", 5)
    parser.number("--batch", 2, "samples of a step on each host")
    parser.number("--step-s", 0.2, "seconds of forward and backward")
    parser.results(PAGE)
    given = parser.parse_args(arguments)
    from benchmarks.compression.methods import METHODS  # which loads torch

    refuse_unknown(parser, "--methods", given.methods, METHODS)
    given.methods = chosen(given.methods, METHODS, always=[LIMIT, DDP])
    return given


if __name__ == "__main__":
    entry(main, on_host)
