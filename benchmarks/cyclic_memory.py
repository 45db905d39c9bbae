"""Live activations on one device: one batch, gradient accumulation, and micro-batches that take turns.

    python benchmarks/cyclic_memory.py

Writes docs/results/cyclic_memory_<date>.md and .json.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from cyclic_memory_report import ARMS, best_cuts, page, shifted_peak
from emulated_run import as_report, results_file, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_comm import ActivationMeter, CyclicEngine

MODELS = ("resnet50", "vit_base_patch16_224")
MOST_STAGES_A_WORKER = 4
PROFILED_STEPS = 5
Batch = tuple[Tensor, Tensor]


class Embedding(nn.Module):
    """What a vision transformer of timm does before its blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed


class FirstToken(nn.Module):
    """Takes the class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def layers_of(name: str, size: int) -> list[nn.Module]:
    """Return a model as layers that run one after the other."""
    torch.manual_seed(0)
    if name.startswith("resnet"):
        model: Any = timm.create_model(name)
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
        layers = [stem, *blocks, nn.Sequential(model.global_pool, model.fc)]
    else:
        model = timm.create_model(name, img_size=size)
        layers = [Embedding(model), *model.blocks, nn.Sequential(model.norm, FirstToken(), model.head)]
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(nn.Sequential(*layers).eval()(x), model.eval()(x))
    return [layer.train() for layer in layers]


def measured_layers(layers: list[nn.Module], batch: Batch) -> tuple[list[float], list[int]]:
    """Return for each layer the seconds of its forward and backward, and the bytes that it keeps between them."""
    best = [float("inf")] * len(layers)
    kept = [0] * len(layers)
    for _ in range(3):  # the fastest of three, since the first warms up
        x = batch[0]
        for index, layer in enumerate(layers):
            x = x.detach().requires_grad_(index > 0)
            began = time.perf_counter()
            out = layer(x)
            out.backward(torch.ones_like(out))
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


def error(output: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of a micro-batch."""
    return cross_entropy(output, batch[1])


def one_batch(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], _: Any) -> None:
    """Train on all micro-batches of a step at once."""
    for batches in steps:
        images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
        error(model(images), (images, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulation(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], _: Any) -> None:
    """Train on the micro-batches of a step one after the other."""
    for batches in steps:
        for batch in batches:
            (error(model(batch[0]), batch) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def engine(order: Any) -> Callable[..., None]:
    """Return what trains with micro-batches that take turns."""

    def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], sources: Any) -> None:
        turns = CyclicEngine(model, optimizer, workers=len(steps[0]), order=order)
        if sources is not None:
            sources.append(turns.tensors)
        turns.run([batch for batches in steps for batch in batches], error)

    return train


METHODS: dict[str, Callable[..., None]] = {
    "one batch": one_batch,
    "accumulation": accumulation,
    "forward_first": engine("forward_first"),
    "backward_first": engine("backward_first"),
    "fine_forward_first": engine("forward_first"),
    "fine_backward_first": engine("backward_first"),
}
assert list(METHODS) == list(ARMS)


def peak_bytes(train: Callable[..., None], model: nn.Sequential, steps: list[list[Batch]]) -> int:
    """Return the most activations that are kept at once."""
    sources: list[Any] = []
    meter = ActivationMeter(model, lambda: [tensor for source in sources for tensor in source()])
    with meter:
        train(model, optimizer_of(model), steps, sources)
    return meter.peak_bytes


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every method."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def profile(model: nn.Sequential, batch: Batch, workers: int) -> dict[str, Any]:
    """Return the live bytes of one worker over a step, and the peaks of shifted copies, by step."""
    shifted, told, peak = [], [], 0
    for turn in range(PROFILED_STEPS + 1):
        with ActivationMeter(model, timeline=True) as meter:
            began = time.monotonic()
            error(model(batch[0]), batch).backward()
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
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        return images, torch.randint(1000, (args.batch,), generator=generator)

    steps = [[batch() for _ in range(args.workers)] for _ in range(args.steps)]
    layers = layers_of(name, args.size)
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
        "threads": torch.get_num_threads(), "load": load, "cuts": cuts,
        "stage_shares": [100 * sum(seconds[part]) / sum(seconds) for part in parts],
        "stage_bytes": [sum(kept[part]) for part in parts],
    }  # fmt: skip
    print(f"{name}: stages of {[round(each) for each in found['stage_shares']]} % of the time", flush=True)

    def model_for(key: str) -> nn.Sequential:
        return models["fine" if key.startswith("fine") else "coarse"]

    found["profile"] = profile(models["coarse"], steps[0][0], args.workers)
    found["peak_bytes"] = {key: peak_bytes(train, model_for(key), steps) for key, train in METHODS.items()}
    print(f"  peaks, MiB: { {key: round(each / 2**20) for key, each in found['peak_bytes'].items()} }", flush=True)
    found["step_s"] = {key: [] for key in METHODS}
    for repeat in range(args.repeats):
        order = list(METHODS)[repeat % len(METHODS) :] + list(METHODS)[: repeat % len(METHODS)]
        for key in order:
            began = time.perf_counter()
            METHODS[key](model_for(key), optimizer_of(model_for(key)), steps, None)
            found["step_s"][key].append((time.perf_counter() - began) / args.steps)
        print(
            f"  repeat {repeat + 1}: { {key: round(each[-1], 2) for key, each in found['step_s'].items()} }", flush=True
        )
    return found


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
