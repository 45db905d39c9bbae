"""Fits with a partitioned global batch under Lightning, timed batch by batch: what a rank does in these benchmarks."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.kit.ranks import BARE
from lightning_comm import AdaptivePartition, PartitionedLoader
from lightning_comm.callbacks import EmulatedDevice

WINDOW = 20  # steps; the callback's default
FEATURES = 16
_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Arm:
    """One way to share the global batch.

    Args:
        mode: That of the callback; ``""`` leaves the callback out; ``"sampler"`` has a plain ``DataLoader`` with a
            ``DistributedSampler`` as well.
        sizes: Samples by rank at the start; even ones if left out.
        steps: How many batches are trained on.

    """

    mode: str
    steps: int
    sizes: tuple[int, ...] | None = None


class Regressor(pl.LightningModule):
    """A small network; what makes it take its time is a device that is emulated, or the network itself."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        layers = [nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
        self.network = nn.Sequential(*layers) if network is None else network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Jittery(Regressor):
    """Sleeps in every step for a time in proportion to its samples, more or less by some part of it.

    Args:
        per_sample_s: Seconds of a sample.
        jitter: The standard deviation of a step's time, as a share of it.
        seed: Of the jitter; differs between ranks.

    """

    def __init__(self, per_sample_s: float, jitter: float, seed: int) -> None:
        super().__init__()
        self._per_sample_s, self._jitter = per_sample_s, jitter
        self._draws = np.random.default_rng(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = max(0.0, 1 + self._jitter * float(self._draws.standard_normal()))
        time.sleep(len(batch[0]) * self._per_sample_s * factor)
        return super().training_step(batch, batch_idx)


class Stopwatch(pl.Callback):
    """Notes when each batch begins, and when the last one has ended."""

    def __init__(self) -> None:
        self.began_s: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began_s.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.began_s.append(time.perf_counter())

    @property
    def steps_s(self) -> list[float]:
        """Seconds from the beginning of each batch to that of the next."""
        return [round(after - before, 6) for before, after in zip(self.began_s[:-1], self.began_s[1:], strict=True)]


class ChangeSpeed(pl.Callback):
    """Gives an emulated device another speed from a batch on."""

    def __init__(self, device: EmulatedDevice, at: int, speed: float) -> None:
        self._device, self._at, self._speed = device, at, speed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._at:
            assert self._device.pacer is not None
            self._device.pacer.speed = self._speed


class CountedPartition(AdaptivePartition):
    """Adds up the processor time of the callback's own code within training, but for its hooks on tensors."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside_s = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._count(super().on_train_batch_start, arguments)

    def on_before_backward(self, *arguments: Any) -> None:
        self._count(super().on_before_backward, arguments)

    def on_after_backward(self, *arguments: Any) -> None:
        self._count(super().on_after_backward, arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._count(super().on_train_batch_end, arguments)

    def _count(self, hook: Any, arguments: Sequence[Any]) -> None:
        began = time.thread_time()
        hook(*arguments)
        self.inside_s += time.thread_time() - began


def timed_fit(
    arm: Arm,
    total: int,
    ranks: int,
    module: pl.LightningModule,
    device: EmulatedDevice | None = None,
    others: Sequence[pl.Callback] = (),
    *,
    samples: Tensor | None = None,
    num_nodes: int = 1,
) -> dict[str, Any]:
    """Train with DDP in one epoch and return what this rank saw.

    Args:
        arm: How the batch is shared.
        total: Samples of the global batch.
        ranks: How many share it.
        module: The model.
        device: The emulated device of this rank, if it has one.
        others: More callbacks, which come before the device.
        samples: What is trained on, again and again; random vectors if left out.
        num_nodes: Hosts, where each rank has one of its own.

    """
    length = total * (arm.steps + 1)
    pool = torch.randn(total, FEATURES) if samples is None else samples
    data = TensorDataset(pool.repeat(-(-length // len(pool)), *[1] * (pool.dim() - 1))[:length])
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        partition = _partition(arm, folder)
        around = [stopwatch, *others, *([device] if device else []), *([partition] if partition else [])]
        trainer = pl.Trainer(
            accelerator="cpu", devices=ranks // num_nodes, num_nodes=num_nodes,
            strategy=DDPStrategy(timeout=_TIMEOUT), callbacks=around, max_steps=arm.steps, max_epochs=1,
            limit_val_batches=0, use_distributed_sampler=False, **BARE,
        )  # fmt: skip
        trainer.fit(module, _loader(arm, data, total, ranks, trainer))
    found: dict[str, Any] = {"steps_s": stopwatch.steps_s}
    if device is not None:
        assert device.pacer is not None
        pacer = device.pacer
        found |= {"overruns": pacer.overruns, "paced_steps": pacer.steps}
        found |= {"real_share": pacer.real_share, "excess": pacer.excess}
    if partition is not None and partition.journal is not None:
        journal = partition.journal.to_dict()
        found |= {"changes": journal["changes"], "windows": journal["windows"], "inside_s": partition.inside_s}
    return found


def _partition(arm: Arm, folder: str) -> CountedPartition | None:
    if arm.mode in ("", "sampler"):
        return None
    arguments: dict[str, Any] = {"mode": arm.mode, "window_steps": WINDOW, "folder": folder}
    return CountedPartition(batch_sizes=arm.sizes, **arguments)


def _loader(arm: Arm, data: TensorDataset, total: int, ranks: int, trainer: pl.Trainer) -> Any:
    if arm.mode != "sampler":
        return PartitionedLoader(data, total)
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=ranks, rank=trainer.global_rank)
    return DataLoader(data, batch_size=total // ranks, sampler=sampler)
