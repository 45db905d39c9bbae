"""Live activations on one device: one batch, gradient accumulation, and micro-batches that take turns.

    python benchmarks/cyclic_memory.py

Writes docs/results/cyclic_memory_<date>.md and .json. With `--device cuda` the allocator's figures stand beside those
of `ActivationMeter`: the peak of what is allocated, less what is there between two runs, and of what is reserved. That
has not been run yet.
"""

import argparse
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cyclic_memory_arms import (
    METHODS,
    Batch,
    allocator_bytes,
    error,
    layers_of,
    optimizer_of,
    peak_bytes,
    settle,
)
from cyclic_memory_report import best_cuts, page, shifted_peak
from emulated_run import as_report, results_file, write
from torch import nn

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
        order = list(METHODS)[repeat % len(METHODS) :] + list(METHODS)[: repeat % len(METHODS)]
        for key in order:
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


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8, help="images of a micro-batch")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--workers", type=int, default=4, help="micro-batches of a step, and stages")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run; the first of them fill the stages")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: by autocast")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = as_report("Live activations on one device")
    report["environment"] = report["environment"].replace(" shared by all hosts; gloo, 1 thread a process", "")
    out = args.out or results_file("cyclic_memory", report)
    command = " ".join(["python benchmarks/cyclic_memory.py", *sys.argv[1:]])
    for name in args.models:
        report["configurations"].append(measure(name, args))
        write(report, out, page(report, command))
    print(out)


if __name__ == "__main__":
    main()
