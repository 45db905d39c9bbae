"""Part 8 of `gpu_check.py`: what `CommProfiler`, and a watching `AdaptivePartition`, add to a step of a ViT."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from gpu_check_report import Check
from lightning.pytorch.strategies import DDPStrategy
from support.on_device import Ranks, backend_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_comm import AdaptivePartition, CommProfiler, PartitionedLoader

WARM_UP = 10
BOUND = 0.01  # of a step: what the profiler may cost
ARMS = ("off", "on", "off again", "partition observes")


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
    torch.manual_seed(0)
    model = Watched(name, size)
    one = (torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, dtype=torch.long, device=device))
    data: Any = Repeated(one, steps + WARM_UP + 1)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = [CommProfiler(folder, page=False)] if arm == "on" else []
        if arm == "partition observes":
            data = PartitionedLoader(Images(batch * (steps + WARM_UP + 1), size), batch)
            callbacks = [AdaptivePartition("observe")]
        runner = pl.Trainer(
            accelerator=device, devices=1 if device == "cpu" else [0], strategy=DDPStrategy(), callbacks=callbacks,
            precision="bf16-mixed", max_steps=steps + WARM_UP + 1, logger=False, enable_checkpointing=False,
            default_root_dir=folder,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        runner.fit(model, data)
    return model.steps_s()


def run(check: Check) -> None:
    """Train without, with, and again without the profiler, three times, in another order each time."""
    ranks = Ranks(1, check.device, backend_of(check.device), exact=False)
    settings = ("test_vit", 32, 4, 6) if check.tiny else ("vit_base_patch16_224", 224, 256, 30)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    try:
        for repeat in range(1 if check.tiny else 3):
            turns = [*ARMS[:3][repeat % 3 :], *ARMS[:3][: repeat % 3], *(ARMS[3:] if repeat == 0 else ())]
            for arm in turns:
                (seconds,) = ranks.call(seconds_of_a_step, check.device, arm, *settings, timeout_s=120)
                found[arm].append(statistics.median(seconds))
    finally:
        ranks.close()
    for arm, seconds in found.items():
        check.note(f"a step, {arm}", {"ms": [1e3 * each for each in seconds]}, "some 100 ms", "median of the steps")
    off = [(a + b) / 2 for a, b in zip(found["off"], found["off again"], strict=True)]
    cost = statistics.median(on / without - 1 for on, without in zip(found["on"], off, strict=True))
    noise = statistics.median(abs(b / a - 1) for a, b in zip(found["off"], found["off again"], strict=True))
    rule = "at most, as a share of a step, in pairs"
    verdict = None if check.tiny else "ok" if cost <= BOUND + noise else "fails"
    figures = {"cost": cost, "noise, off again beside off": noise}
    check.note("what CommProfiler adds to a step", figures, BOUND, rule, verdict=verdict)
