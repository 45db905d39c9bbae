"""Small models and data for fits in tests."""

import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import registry
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_comm import LocalUpdateStrategy
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update import PeriodRule

FEATURES = 5

# Every Trainer reads the entry points of all installed packages, which takes as long as two steps of these fits. What
# is installed does not change while tests run.
registry.entry_points = functools.cache(registry.entry_points)
registry.entry_points(group="lightning.pytorch.callbacks_factory")  # here, so that forked ranks have it


class Samples(Dataset):
    """Rank r at index i always yields the same sample, another one for every pair."""

    def __init__(self, length: int, rank: int, dtype: torch.dtype = torch.float64) -> None:
        self.length, self.rank, self.dtype = length, rank, dtype

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return sample(self.rank, index, self.dtype)


def sample(rank: int, index: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + index)
    x = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:1] - x[1:2] * x[2:3]).to(dtype)


def loader(steps: int, rank: int, batch_size: int = 4, dtype: torch.dtype = torch.float64, **kwargs: Any) -> DataLoader:
    return DataLoader(Samples(steps * batch_size, rank, dtype), batch_size=batch_size, **kwargs)


def network(dtype: torch.dtype = torch.float64, seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 1)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(7))
    return nn.Sequential(*layers).to(dtype)


class Regression(LightningModule):
    """Least squares with a network; `optimizer` makes the optimizer, `schedule` the learning-rate factor of a step."""

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.05))
        self.schedule = schedule
        self.losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def descend(model: nn.Module, rank: int, step: int, batch_size: int = 4) -> None:
    """The step that `Regression` takes on rank r's batch of `loader`, by hand: the model alone is its network."""
    samples = [sample(rank, batch_size * step + k) for k in range(batch_size)]
    x, y = (torch.stack(each) for each in zip(*samples, strict=True))
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.05)


class Stop(Callback):
    """Saves a checkpoint after a step, and ends the run there, unless it goes on."""

    def __init__(self, step: int, path: str, *, goes_on: bool = False) -> None:
        self.step, self.path, self.goes_on = step, path, goes_on

    def on_train_batch_end(self, runner: Trainer, *args: Any) -> None:
        if runner.global_step == self.step:
            runner.save_checkpoint(self.path)
            runner.should_stop = not self.goes_on


def own_file(path: Any, rank: int) -> Path:
    """The file of a rank that belongs to a checkpoint, of which there is one."""
    (file,) = Path(f"{path}.ranks").glob(f"*/rank{rank}.pt")
    return file


def sums_of(ledger: CommLedger) -> dict[str, tuple[int, int]]:
    """The bytes that a run has sent under each purpose, but for what a resumed one sends once more.

    That is to set up and to load. Not the messages: DDP cuts its first gradients into other buckets than later ones.
    """
    purposes = [each for each in ledger.purposes if each not in ("set_up", "checkpoint_files")]
    return {each: (ledger.payload_bytes(each), ledger.wire_bytes(each)) for each in purposes}


def local_update(period: PeriodRule, **kwargs: Any) -> LocalUpdateStrategy:
    return LocalUpdateStrategy(period, timeout=timedelta(seconds=40), **kwargs)


def trainer(strategy: Any, devices: int, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "max_epochs": 1,
    }
    return Trainer(strategy=strategy, devices=devices, **{**defaults, **kwargs})


def weights(module: nn.Module) -> list[Any]:
    """All parameters as one list of numpy arrays, which queues can carry."""
    return [parameter.detach().clone().numpy() for parameter in module.parameters()]


def collectives_so_far() -> int:
    """How many collectives this rank has issued on the default group, whoever asked for them."""
    return dist.group.WORLD._get_sequence_number_for_group()
