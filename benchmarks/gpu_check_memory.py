"""Part 7 of `gpu_check.py`: the peak memory of `CyclicEngine` beside one batch, accumulation and the prediction."""

from itertools import pairwise
from typing import Any

import torch
from cyclic_memory import cut, measured_layers
from cyclic_memory_arms import METHODS, Batch, allocator_bytes, layers_of, optimizer_of, peak_bytes
from gpu_check_report import Check
from gpu_check_sanity import seconds_of
from support.on_device import the_device
from torch import nn

MODELS = {False: ("resnet50", "vit_base_patch16_224"), True: ("resnet10t", "vit_tiny_patch16_224")}
PRECISIONS = ("fp32", "bf16")
STEPS = 2
ARMS = ("one batch", "accumulation", "backward_first", "fine_backward_first")
# of one batch's peak, with N equal stages: N^2 / 2 of N^2 activations of a stage with backwards first and N even, and N
PREDICTED = {"accumulation": lambda n: 1 / n, "backward_first": lambda n: 0.5, "fine_backward_first": lambda n: 0.5}


def _models(name: str, check: Check, precision: str, workers: int, images: Batch) -> dict[str, nn.Sequential]:
    layers = layers_of(name, images[0].shape[-1], check.device, precision)
    seconds, _ = measured_layers(layers, images)
    stages = {"coarse": workers, "fine": min(4, len(layers) // workers) * workers}
    return {
        kind: nn.Sequential(*(nn.Sequential(*layers[a:b]) for a, b in pairwise(cut(seconds, count))))
        for kind, count in stages.items()
    }


def _measure(check: Check, label: str, models: dict[str, nn.Sequential], steps: list[list[Batch]]) -> None:
    """Note the peaks of all arms, and the rules between them."""
    peaks: dict[str, int] = {}
    workers = len(steps[0])
    for arm in ARMS:
        model, train = models["fine" if arm.startswith("fine") else "coarse"], METHODS[arm]
        try:
            found = _peaks(check, train, model, steps)
        except torch.OutOfMemoryError as failure:
            check.note(f"{label}, {arm}", f"out of memory: {failure}"[:120], "it fits", "", verdict="info")
            torch.cuda.empty_cache()
            continue
        peaks[arm] = found.get("peak_above", found["meter"])
        whole = peaks.get("one batch")
        if whole and arm in PREDICTED:
            found["of one batch"] = round(peaks[arm] / whole, 3)
            found["times the prediction"] = round(peaks[arm] / whole / PREDICTED[arm](workers), 3)
        shares = PREDICTED[arm](workers) if arm in PREDICTED else 1.0
        check.note(f"{label}, {arm}", found, round(shares, 3), "of one batch, with equal stages; bytes at the peak")
    if {"one batch", "accumulation", "fine_backward_first"} <= set(peaks):
        ordered = [peaks["accumulation"], peaks["fine_backward_first"], peaks["one batch"]]
        rule = "accumulation needs least, one batch most"
        check.note(
            f"{label}: order", ordered, sorted(ordered), rule, verdict="ok" if ordered == sorted(ordered) else "fails"
        )


def _peaks(check: Check, train: Any, model: nn.Sequential, steps: list[list[Batch]]) -> dict[str, Any]:
    found: dict[str, Any] = {"meter": peak_bytes(train, model, steps)}
    if check.device != "cpu":
        found |= allocator_bytes(train, model, steps)
    seconds = seconds_of(lambda: train(model, optimizer_of(model), steps, None), check.device, 1)
    return found | {"step, ms": round(1e3 * seconds / len(steps), 2)}


def run(check: Check) -> None:
    """Measure both models in both precisions; the number of micro-batches that is most usual first."""
    with the_device():
        _run(check)


def _run(check: Check) -> None:
    if check.device != "cpu":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    size, count = (32, 2) if check.tiny else (224, 64)
    draw = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        images = torch.randn(count, 3, size, size, generator=draw)
        return images.to(check.device), torch.randint(1000, (count,), generator=draw).to(check.device)

    for workers in (2,) if check.tiny else (4, 2, 8):
        steps = [[batch() for _ in range(workers)] for _ in range(STEPS)]
        for precision in PRECISIONS:
            # a tiny run sees each of them once
            names = MODELS[check.tiny][PRECISIONS.index(precision) :][:1] if check.tiny else MODELS[check.tiny]
            for name in names:
                models = _models(name, check, precision, workers, steps[0][0])
                _measure(check, f"{name}, {precision}, N = {workers}", models, steps)
    if check.device == "cpu":
        check.needs_cuda("peaks of the allocator, allocated and reserved", "as the meter's, and workspaces")
