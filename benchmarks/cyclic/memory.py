"""Live activations on one device: one batch, gradient accumulation, and micro-batches that take turns.

    python -m benchmarks.cyclic.memory

Writes docs/results/cyclic_memory_<date>.md and .json. With `--device cuda` the allocator's figures stand beside those
of `ActivationMeter`: the peak of what is allocated, less what is there between two runs, and of what is reserved. That
has not been run yet.
"""

import argparse
import os
import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.cyclic.memory_arms import (
    METHODS,
    Batch,
    allocator_bytes,
    error,
    layers_of,
    optimizer_of,
    peak_bytes,
    settle,
)
from benchmarks.cyclic.memory_report import PAGE, best_cuts, shifted_peak
from benchmarks.kit.environment import environment
from benchmarks.kit.options import Parser
from benchmarks.kit.results import Results
from benchmarks.kit.steps import rotated
from lightning_comm.ondevice.activation_meter import ActivationMeter

MODELS = ("resnet50", "vit_base_patch16_224")
MOST_STAGES_A_WORKER = 4
PROFILED_STEPS = 5


def measured_layers(layers: list[nn.Module], batch: Batch) -> tuple[list[float], list[int]]:
    """Return for each layer the seconds of its forward and backward, and the bytes that it keeps between them."""
    best = [float("inf")] * len(layers)
    kept = [0] * len(layers)
    for _ in range(3):  # the fastest of three, since the first warms up
        x = batch[0]
        for index, layer in enumerate(layers):
            x = x.detach().requires_grad_(index > 0)
            settle(x.device)
            began = time.perf_counter()
            out = layer(x)
            out.backward(torch.ones_like(out))
            settle(x.device)
            best[index] = min(best[index], time.perf_counter() - began)
            x = out
    with ActivationMeter(*layers) as meter:
        x = batch[0]
        for index, layer in enumerate(layers):
            before = meter.live_bytes
            x = layer(x)
            kept[index] = meter.live_bytes - before
    return best, kept


def cut(seconds: list[float], stages: int) -> list[int]:
    """Return where stages of about equal time begin and end."""
    return [0, *best_cuts(seconds, stages), len(seconds)]


def profile(model: nn.Sequential, batch: Batch, workers: int) -> dict[str, Any]:
    """Return the live bytes of one worker over a step, and the peaks of shifted copies, by step."""
    shifted, told, peak = [], [], 0
    for turn in range(PROFILED_STEPS + 1):
        with ActivationMeter(model, timeline=True) as meter:
            began = time.monotonic()
            error(model(batch[0]), batch).backward()
            settle(batch[0].device)
            ended = time.monotonic()
        model.zero_grad()
        timeline = meter.timeline or []
        if turn:  # the first warms up
            shifted.append(shifted_peak(timeline, began, ended, workers))
        peak = meter.peak_bytes
        told = [(round(at - began, 4), size) for at, size in timeline]
    return {"peak_bytes": peak, "shifted_bytes": shifted, "step_s": ended - began, "timeline": told}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in all ways."""
    load = os.getloadavg()[0]
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        return images.to(device), torch.randint(1000, (args.batch,), generator=generator).to(device)

    steps = [[batch() for _ in range(args.workers)] for _ in range(args.steps)]
    layers = layers_of(name, args.size, args.device, args.precision)
    seconds, kept = measured_layers(layers, steps[0][0])
    per_worker = min(MOST_STAGES_A_WORKER, len(layers) // args.workers)
    cuts = {"coarse": cut(seconds, args.workers), "fine": cut(seconds, per_worker * args.workers)}
    models = {
        kind: nn.Sequential(*(nn.Sequential(*layers[a:b]) for a, b in pairwise(bounds)))
        for kind, bounds in cuts.items()
    }
    parts = [slice(a, b) for a, b in pairwise(cuts["coarse"])]
    found: dict[str, Any] = {
        "title": name, "workers": args.workers, "batch": args.batch, "size": args.size, "steps": args.steps,
        "threads": torch.get_num_threads(), "load": load, "cuts": cuts, "device": name_of(device),
        "precision": args.precision,
        "stage_shares": [100 * sum(seconds[part]) / sum(seconds) for part in parts],
        "stage_bytes": [sum(kept[part]) for part in parts],
    }  # fmt: skip
    print(f"{name}: stages of {[round(each) for each in found['stage_shares']]} % of the time", flush=True)

    def model_for(key: str) -> nn.Sequential:
        return models["fine" if key.startswith("fine") else "coarse"]

    found["profile"] = profile(models["coarse"], steps[0][0], args.workers)
    found["peak_bytes"] = {key: peak_bytes(train, model_for(key), steps) for key, train in METHODS.items()}
    print(f"  peaks, MiB: { {key: round(each / 2**20) for key, each in found['peak_bytes'].items()} }", flush=True)
    if device.type == "cuda":
        found["allocator"] = {key: allocator_bytes(train, model_for(key), steps) for key, train in METHODS.items()}
    found["step_s"] = {key: [] for key in METHODS}
    for repeat in range(args.repeats):
        for key in rotated(list(METHODS), repeat):
            settle(device)
            began = time.perf_counter()
            METHODS[key](model_for(key), optimizer_of(model_for(key)), steps, None)
            settle(device)
            found["step_s"][key].append((time.perf_counter() - began) / args.steps)
        print(
            f"  repeat {repeat + 1}: { {key: round(each[-1], 2) for key, each in found['step_s'].items()} }", flush=True
        )
    return found


def name_of(device: torch.device) -> str:
    """Return what a device is called."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.number("--batch", 8, "images of a micro-batch")
    parser.number("--size", 224, "pixels a side")
    parser.number("--workers", 4, "micro-batches of a step, and stages")
    parser.number("--steps", 3, "steps of a run; the first of them fill the stages")
    parser.number("--repeats", 3)
    parser.number("--threads", os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: by autocast")
    parser.results(PAGE)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write."""
    given = options()
    torch.set_num_threads(given.threads)
    results = Results(PAGE, given.out, environment=environment("cores"), configurations=[])
    for name in given.models:
        results.report["configurations"].append(measure(name, given))
        results.write()
    results.tell()


if __name__ == "__main__":
    main()
