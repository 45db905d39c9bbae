"""Optimizer steps under Lightning, timed on emulated hosts as `training` times those of a plain loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kit.ranks import BARE
from benchmarks.kit.training import Job, Meter, Segment, Timed, optimizer_of
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.core.ledger import CommLedger


class Classifier(pl.LightningModule):
    """The model of the job under Lightning."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


class Sleeper(pl.LightningModule):
    """Some 200 small tensors, with buffers, and a sleep; notes when each step begins."""

    def __init__(self, sleep_s: float) -> None:
        super().__init__()
        layers = [part for _ in range(50) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64))]
        self.net = nn.Sequential(*layers, nn.Linear(64, 1))
        self.sleep_s = sleep_s
        self.began: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.began.append(time.perf_counter())
        time.sleep(self.sleep_s)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stopwatch(pl.Callback):
    """Times some batches in the middle of a run.

    Args:
        warmup: The batches before them.
        steps: How many are timed. Where others follow, the time lasts until the first of those begins.
        ledger: Returns where payload is written down, if anywhere.
        together: Whether hosts start the time together.

    """

    def __init__(
        self, warmup: int, steps: int, ledger: Callable[[], CommLedger] | None, *, together: bool = True
    ) -> None:
        self.warmup, self.steps = warmup, steps
        self._ledger, self._together = ledger, together
        self._meter: Meter | None = None
        self._next_batch = 0
        self.result: Timed | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self._meter = Meter(self._ledger, together=self._together)
        elif batch_idx == self.warmup + self.steps:
            self._read()
        self._next_batch = batch_idx + 1

    def on_train_batch_end(self, *args: Any) -> None:
        if self._next_batch == self.warmup + self.steps:
            self._read()  # for good if no batch follows

    def _read(self) -> None:
        assert self._meter is not None
        self.result = self._meter.read()


def lightning(
    job: Job,
    strategy: Callable[[], Any],
    warmup: int,
    num_nodes: int | None = None,
    *,
    cooldown: int = 0,
    together: bool = True,
    callbacks: Sequence[pl.Callback] = (),
) -> Segment:
    """Train under Lightning: each segment is a ``fit`` of its own.

    Args:
        job: What to train.
        strategy: Makes the strategy.
        warmup: Steps before those that are timed.
        num_nodes: All hosts if left out.
        cooldown: Steps after those that are timed.
        together: Whether hosts start the time together.
        callbacks: What else the Trainer is to call.

    """

    def segment(steps: int) -> Timed:
        made = strategy()
        ledger = (lambda: made.ledger) if hasattr(made, "ledger") else None
        stopwatch = Stopwatch(warmup, steps, ledger, together=together)
        device = EmulatedDevice(job.step_s, job.batch)
        total = warmup + steps + cooldown
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, num_nodes=num_nodes or dist.get_world_size(), strategy=made,
            callbacks=[stopwatch, device, *callbacks], max_steps=total, use_distributed_sampler=False, **BARE,
        )  # fmt: skip
        trainer.fit(Classifier(job.network()), DataLoader(TensorDataset(*job.samples(total)), batch_size=job.batch))
        assert device.pacer is not None
        assert stopwatch.result is not None
        return replace(stopwatch.result, overruns=device.pacer.overruns, real_share=device.pacer.real_share)

    return segment
