"""Fits with a partitioned global batch, and what one process makes of the same samples."""

import time
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import Dataset

from lightning_comm import AdaptivePartition, PartitionedLoader
from lightning_comm.callbacks.adaptive_partition import files
from support.training import FEATURES, Regression, network, trainer, weights

BATCH = 12
SLOW = 500.0  # samples per second; 16 samples take 32 ms
UNEVEN = {"mode": "fixed", "batch_sizes": [9, 3]}


class Points(Dataset):
    """A regression whose samples carry their index, so that it can be seen which were trained on."""

    def __init__(self, length: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(length, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        self.y = self.x[:, :1] - self.x[:, 1:2] * self.x[:, 2:3]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index], index


class Fit(Regression):
    """Least squares on `Points`; notes the samples of each batch, and can be made slow."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = None, speed: float | None = None) -> None:
        super().__init__(net or network(), optimizer)
        self.seen: list[list[int]] = []
        self.speed = speed  # samples per second of the emulated device; None: as fast as can be

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, index = batch
        self.seen.append(index.tolist())
        if self.speed is not None:
            time.sleep(len(x) / self.speed)
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss


class Manual(Fit):
    """The same by hand, with two optimizers, one for each layer, and a backward for each."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            x, y, index = batch
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.net(x), y))
            optimizer.step()
        self.seen.append(index.tolist())

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net[0], self.net[2])]


class TwiceFromOneLoss(Manual):
    """A second optimizer whose loss has the first one's in it, and a backward through both."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        x, y, index = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(2 * loss + nn.functional.l1_loss(self.net(x), y), retain_graph=True)
        self.manual_backward(loss)
        first.step()
        second.step()
        self.seen.append(index.tolist())


def loader_of(samples: int, dtype: torch.dtype = torch.float64, batch: int = BATCH, **kwargs: Any) -> PartitionedLoader:
    return PartitionedLoader(Points(samples, dtype), batch, **{"seed": 3, **kwargs})


def fit(
    strategy: Any,
    devices: int,
    module: LightningModule,
    loader: Any,
    partition: AdaptivePartition | None,
    callbacks: list[Callback] | None = None,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> Trainer:
    around = [*([] if partition is None else [partition]), *(callbacks or [])]
    runner = trainer(strategy, devices, callbacks=around, **kwargs)
    with mock.patch.object(files, "partition_page", return_value="not looked at"):  # longer than a fit
        runner.fit(module, loader, ckpt_path=ckpt_path)
    assert runner.world_size == devices
    return runner


class ChangeSpeed(Callback):
    """Gives ranks other speeds from a batch on."""

    def __init__(self, at: int, speeds: list[float]) -> None:
        self.at, self.speeds = at, speeds

    def on_train_batch_start(self, runner: Trainer, module: Any, *args: Any) -> None:
        if runner.global_step == self.at:
            module.speed = self.speeds[runner.global_rank]


def balance(
    rank: int,
    speeds: list[float],
    steps: int,
    *,
    strategy: Any = "ddp",
    change: tuple[int, list[float]] | None = None,
    loader: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[int], dict[str, Any], list[Any]]:
    """Train in batches of 32 at these speeds; return the sizes of this rank's, the journal and the weights."""
    partition = AdaptivePartition(**{"window_steps": 6, "warmup_steps": 2, **options})
    model = Fit(speed=speeds[rank])
    data = loader_of(32 * 40, batch=32, **loader or {})
    changes: list[Callback] = [] if change is None else [ChangeSpeed(*change)]
    fit(strategy, len(speeds), model, data, partition, changes, max_steps=steps, max_epochs=9)
    return [len(each) for each in model.seen], partition.journal.to_dict(), weights(model)


class Move(Callback):
    """Moves shares by hand at given batches, as a decision would: from where no loader has passed yet."""

    def __init__(self, partition: AdaptivePartition, moves: dict[int, tuple[int, ...]]) -> None:
        self.partition, self.moves = partition, moves
        self.batches = 0

    def on_train_batch_end(self, runner: Trainer, *args: Any) -> None:
        self.batches += 1
        if self.batches in self.moves:
            session = self.partition._session
            lead = runner.train_dataloader.dispatched  # workers are the same on all ranks here
            session.plan.change_at(lead, self.moves[self.batches])


def ddp(**kwargs: Any) -> DDPStrategy:
    return DDPStrategy(timeout=timedelta(seconds=30), **kwargs)


def close(got: list[Any], expected: list[Any], tolerance: float = 1e-12) -> bool:
    """Whether weights are those of another run up to rounding."""
    pairs = zip(got, expected, strict=True)
    return all(np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()) for a, b in pairs)


def one_process(module: LightningModule, loader: Any, **kwargs: Any) -> list[Any]:
    """Return the weights after a fit on the whole of each batch."""
    fit("auto", 1, module, loader, None, **kwargs)
    return weights(module)
