"""Part 8 of the check: what `CommProfiler`, and a watching `AdaptivePartition`, add to a step of a ViT."""

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.on_device import Ranks, backend_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.gpu_check.report import Check
from benchmarks.kit.ranks import BARE
from lightning_comm import AdaptivePartition, CommProfiler, PartitionedLoader

WARM_UP = 6
BOUND = 0.01  # of a step: what the profiler may cost
NOISE = 0.005  # of a step: with more between two runs without it, that cannot be seen
STEP_MS = (70.0, 140.0)  # where the bound is meant for
ARMS = ("off", "on", "off again")
LOADED = ("same loader, no partition", "partition observes")  # a batch is put together on the host and copied


class Watched(pl.LightningModule):
    """A classifier that notes when each of its steps begins, by the device's clock where it has one."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.net: Any = timm.create_model(name, img_size=size)
        self.began: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.began.append(event)
        else:
            self.began.append(time.perf_counter())
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def steps_s(self) -> list[float]:
        """Return the seconds of each step after the warm-up."""
        marks = self.began[WARM_UP:]
        pairs = pairwise(marks)
        if isinstance(marks[0], float):
            return [end - begin for begin, end in pairs]
        marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


@cache
def built(name: str, size: int) -> Watched:
    """Return the model, made once in a process, to be copied."""
    torch.manual_seed(0)
    return Watched(name, size)


class Images(torch.utils.data.Dataset):
    """As many samples as are wanted, of which there is one: what loading costs is not of interest."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.one = length, (torch.randn(3, size, size), torch.tensor(3))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.one


class Repeated:
    """The same batch again and again, already on the device, so that nothing waits for the host."""

    def __init__(self, batch: tuple[Tensor, Tensor], length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.length)


def seconds_of_a_step(rank: int, device: str, arm: str, name: str, size: int, batch: int, steps: int) -> list[float]:
    """Train for some steps; return the seconds of each after the warm-up."""
    model = copy.deepcopy(built(name, size))
    one = (torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, dtype=torch.long, device=device))
    data: Any = Repeated(one, steps + WARM_UP + 1)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = [CommProfiler(folder, page=False)] if arm == "on" else []
        if arm in LOADED:
            data = PartitionedLoader(Images(batch * (steps + WARM_UP + 1), size), batch)
            callbacks = [AdaptivePartition("observe")] if arm == "partition observes" else []
        runner = pl.Trainer(
            accelerator=device, devices=1 if device == "cpu" else [0], strategy=DDPStrategy(), callbacks=callbacks,
            precision="bf16-mixed", max_steps=steps + WARM_UP + 1, default_root_dir=folder,
            use_distributed_sampler=False, **BARE,
        )  # fmt: skip
        runner.fit(model, data)
    return model.steps_s()


def run(check: Check) -> None:
    """Train without, with, and again without the profiler, three times, in another order each time."""
    ranks = Ranks(1, check.device, backend_of(check.device), exact=False)
    settings = ("test_vit", 32, 4, 6) if check.tiny else ("vit_base_patch16_224", 224, 256, 20)
    found: dict[str, list[float]] = {arm: [] for arm in (*ARMS, *LOADED)}

    def measure(arm: str) -> None:
        (seconds,) = ranks.call(seconds_of_a_step, check.device, arm, *settings, timeout_s=120)
        found[arm].append(statistics.median(seconds))
        check.note(f"a step, {arm}", {"ms": [1e3 * each for each in found[arm]]}, "some 100 ms", "medians of the runs")

    try:
        for repeat in range(1 if check.tiny else 3):
            for arm in (*ARMS[repeat:], *ARMS[:repeat]):
                measure(arm)
        _judge_profiler(check, found)
        for arm in LOADED:
            measure(arm)
    finally:
        ranks.close()
    without, observed = (found[arm][0] for arm in LOADED)
    rule = "as a share of a step with the same loader; one run each"
    check.note("what a watching AdaptivePartition adds to a step", observed / without - 1, BOUND, rule)


def cost_of(found: dict[str, list[float]]) -> tuple[float, float]:
    """Return what the profiler adds, and how far two runs without it lie apart, as shares of a step, in pairs.

    >>> cost, noise = cost_of({"off": [1.0, 1.0], "on": [1.03, 1.03], "off again": [1.0, 1.04]})
    >>> round(cost, 3), round(noise, 3)
    (0.02, 0.02)
    """
    pairs = list(zip(found["off"], found["off again"], strict=True))
    cost = statistics.median(on / ((a + b) / 2) - 1 for on, (a, b) in zip(found["on"], pairs, strict=True))
    return cost, statistics.median(abs(b / a - 1) for a, b in pairs)


def verdict_of(cost: float, noise: float) -> str:
    """Return what is to be said of a cost: with much noise nothing.

    >>> [verdict_of(0.009, 0.001), verdict_of(0.011, 0.001), verdict_of(0.011, 0.006), verdict_of(0.001, 0.1)]
    ['ok', 'fails', 'not measured', 'not measured']
    """
    return "not measured" if noise > NOISE else "ok" if cost <= BOUND else "fails"


def _judge_profiler(check: Check, found: dict[str, list[float]]) -> None:
    """Note what the profiler costs.

    DDP sends nothing with one rank, so that what the record of a message costs is not in it.
    """
    step_ms = 1e3 * statistics.median([*found["off"], *found["off again"]])
    between = "ok" if STEP_MS[0] <= step_ms <= STEP_MS[1] else "fails"
    check.note(
        "a step without the profiler, ms", step_ms, STEP_MS, "between", verdict="info" if check.tiny else between
    )
    cost, noise = cost_of(found)
    check.note(
        "two runs without the profiler lie apart", noise, NOISE, "as a share of a step, at most, to measure more"
    )
    rule = "<=; as a share of a step, in pairs; one rank sends nothing, so no message's record is in it"
    verdict = "info" if check.tiny else verdict_of(cost, noise)
    check.note("what CommProfiler adds to a step", cost, BOUND, rule, verdict=verdict)
