"""Part 7 of the check: the peak memory of `CyclicEngine` beside one batch, accumulation and the prediction."""

import gc
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from support.on_device import the_device
from torch import nn

from benchmarks.cyclic.memory import cut, measured_layers
from benchmarks.cyclic.memory_arms import (
    METHODS,
    Batch,
    allocator_bytes,
    in_bfloat16,
    layers_of,
    peak_bytes,
)
from benchmarks.gpu_check.report import RULES, Check

MODELS = {False: ("vit_base_patch16_224", "resnet50"), True: ("vit_tiny_patch16_224", "resnet10t")}
# A micro-batch in float32 takes several times as long as one in bfloat16; the smallest share is seen with many workers.
WORKERS = {"fp32": (4,), "bf16": (4, 2, 8)}
STEPS = 1  # in which all phases of the staggered schedule come about: the last worker begins before the first is done
WITHIN = "within 25 %"  # of equal stages; gradients, a block's own backward and workspaces come on top


class Arm(NamedTuple):
    """What a way to train needs at its peak.

    Args:
        share: As a share of one batch's peak, by the number of workers `N`, with equal stages.
        reason: Why.

    """

    share: Any
    reason: str


ARMS = {
    "one batch": Arm(lambda n: 1.0, "N micro-batches at once"),
    "accumulation": Arm(lambda n: 1 / n, "one of N micro-batches"),
    "backward_first": Arm(lambda n: 0.5, "N/2 stages are freed before N/2 are made: N^2/2 of N^2, N even"),
    "forward_first": Arm(lambda n: (n + 1) / (2 * n), "N/2 stages are made before N/2 are freed: N(N+1)/2 of N^2"),
    "fine_backward_first": Arm(lambda n: 0.5, "as with N stages, which are less equal"),
}


class Case(NamedTuple):
    """A model in a precision, with a number of workers.

    Args:
        label: What it is called.
        judged: Whether its stages are alike enough to be held against the prediction.
        models: In `coarse` stages, one a worker, and in `fine` ones, up to four; both of the same parameters.
        steps: Of micro-batches.

    """

    label: str
    judged: bool
    models: dict[str, nn.Sequential]
    steps: list[list[Batch]]


def _staged(layers: list[nn.Module], seconds: list[float], workers: int) -> dict[str, nn.Sequential]:
    stages = {"coarse": workers, "fine": min(4, len(layers) // workers) * workers}
    return {
        kind: nn.Sequential(*(nn.Sequential(*layers[a:b]) for a, b in pairwise(cut(seconds, count))))
        for kind, count in stages.items()
    }


def _peaks(check: Check, train: Any, model: nn.Sequential, steps: list[list[Batch]]) -> dict[str, Any]:
    began = time.perf_counter()
    found: dict[str, Any] = {"meter": peak_bytes(train, model, steps)}
    if check.device == "cpu":
        return found | {"step_s": (time.perf_counter() - began) / len(steps)}
    return found | allocator_bytes(train, model, steps)


def _give_back(check: Check, model: nn.Sequential) -> None:
    """Free what an arm leaves: gradients, and what the frames of a failure held until now."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if check.device != "cpu":
        torch.cuda.empty_cache()


def _measure(check: Check, case: Case) -> None:
    """Note the peaks of all arms as they come, and the rules between them."""
    peaks: dict[str, int] = {}
    for arm, (share, reason) in ARMS.items():
        model, failure = case.models["fine" if arm.startswith("fine") else "coarse"], ""
        try:
            found = _peaks(check, METHODS[arm], model, case.steps)
        except torch.OutOfMemoryError as error:
            failure = f"out of memory: {error}"[:120]
        _give_back(check, model)  # after the block: within it the error holds all tensors
        if failure:
            check.note(f"{case.label}, {arm}", failure, "it fits", "", verdict="info")
            continue
        peaks[arm] = found.get("peak_above", found["meter"])
        check.note(f"{case.label}, {arm}", found, "bytes at the peak, seconds of a step", "")
        if arm != "one batch" and peaks.get("one batch"):
            measured, expected = peaks[arm] / peaks["one batch"], share(len(case.steps[0]))
            verdict = ("ok" if RULES[WITHIN](measured, expected) else "fails") if case.judged else "info"
            name = f"{case.label}, {arm}, of one batch"
            check.note(name, measured, expected, f"{WITHIN}; {reason}", verdict=verdict)
    if {"one batch", "accumulation", "fine_backward_first"} <= set(peaks):
        ordered = [peaks["accumulation"], peaks["fine_backward_first"], peaks["one batch"]]
        check.note(f"{case.label}: accumulation needs least, one batch most", ordered, sorted(ordered), "==")


def run(check: Check) -> None:
    """Measure both models in both precisions; what is judged, and the number of micro-batches most usual, first."""
    with the_device():
        _run(check)


def _run(check: Check) -> None:
    if check.device != "cpu":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    size, count = (32, 2) if check.tiny else (224, 64)
    draw = torch.Generator().manual_seed(0)
    workers = dict.fromkeys(WORKERS, (2,)) if check.tiny else WORKERS

    def batch() -> Batch:
        images = torch.randn(count, 3, size, size, generator=draw)
        return images.to(check.device), torch.randint(1000, (count,), generator=draw).to(check.device)

    batches = [batch() for _ in range(max(map(max, workers.values())))]
    for index, name in enumerate(MODELS[check.tiny]):
        plain = layers_of(name, size, check.device)
        precisions = list(workers)[index:][:1] if check.tiny else list(workers)  # a tiny run sees each once
        for precision in precisions:
            layers = in_bfloat16(plain) if precision == "bf16" else plain
            seconds, _ = measured_layers(layers, batches[0])
            nn.Sequential(*layers).zero_grad(set_to_none=True)
            for number in workers[precision]:
                models, steps = _staged(layers, seconds, number), [batches[:number]] * STEPS
                judged = name.startswith("vit") and not check.tiny
                _measure(check, Case(f"{name}, {precision}, N = {number}", judged, models, steps))
    if check.device == "cpu":
        check.needs_cuda("peaks of the allocator, allocated and reserved", "as the meter's, and workspaces")
