"""Small models and data of seeded runs, the same bit for bit on every commit: nothing here is the package's."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, IterableDataset

FEATURES = 5
SIZES = (
    (4, 2, 6, 4, 1, 3, 5, 2, 4, 4, 4, 4),
    (2, 1, 1, 3, 4, 4, 2, 2, 6, 2, 1, 3),
    (3, 3, 3, 3, 2, 2, 4, 5, 1, 2, 2, 1),
)


class Samples(Dataset):
    """Samples of a rank: another one for each rank and index."""

    def __init__(self, length: int, rank: int, dtype: torch.dtype) -> None:
        self.length, self.rank, self.dtype = length, rank, dtype

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.rank + index)
        x = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        return x.to(self.dtype), (x[:1] - x[1:2] * x[2:3]).to(self.dtype)


class Stream(IterableDataset):
    """The same of unknown length."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples[k] for k in range(len(self.samples)))


def unequal(samples: Samples) -> DataLoader:
    """Return batches of other sizes on each rank."""
    sizes = SIZES[samples.rank]
    ends = itertools.accumulate(sizes)
    batches = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return DataLoader(samples, batch_sampler=batches)


def wide() -> nn.Module:
    """Return a network with a matrix that is worth compressing."""
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1))


def normed() -> nn.Module:
    """Return the same with BatchNorm."""
    layers = [nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 16), nn.BatchNorm1d(16)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(16, 1))


def deep(modules: int) -> nn.Module:
    """Return a network of so many linear layers, each a possible stage."""
    inner = [each for _ in range(modules - 2) for each in (nn.Tanh(), nn.Linear(7, 7))]
    return nn.Sequential(nn.Linear(FEATURES, 7), *inner, nn.Tanh(), nn.Linear(7, 1))


def dropped() -> nn.Module:
    """Return a network that draws random numbers."""
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 1))


def tied() -> nn.Module:
    """Return a network of which two layers have one weight."""
    layers = [nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(FEATURES, 1))
    layers[2].weight = layers[0].weight
    return net


def frozen() -> nn.Module:
    """Return a network whose first layer is not trained."""
    net = wide()
    net[0].requires_grad_(False)
    return net


def convolved() -> nn.Module:
    """Return a network with weights of four dimensions, and of several layouts."""
    first, second = nn.Conv2d(1, 6, 2, padding=1), nn.Conv2d(6, 4, 2)
    second.weight.data = second.weight.data.contiguous(memory_format=torch.channels_last)
    layers = [nn.Unflatten(1, (1, 1, FEATURES)), first, nn.Tanh(), second, nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(1))


def pruned() -> nn.Module:
    """Return a network that torch has pruned."""
    net = wide()
    prune.l1_unstructured(net[0], "weight", amount=0.4)
    prune.l1_unstructured(net[2], "weight", amount=0.6)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "wide": wide,
    "norm": normed,
    "drop": dropped,
    "tied": tied,
    "frozen": frozen,
    "conv": convolved,
    "pruned": pruned,
    **{f"deep{k}": functools.partial(deep, k) for k in (2, 3, 4, 6, 7, 9)},
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.02, weight_decay=0.1),
}


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a network with weights that are the same each time."""
    torch.manual_seed(0)
    net = NETS[name]()
    net(torch.zeros(2, FEATURES))  # lazy layers get their weights
    return net.to(dtype)


class Regression(LightningModule):
    """Least squares; the learning rate falls by a tenth of it each step where ``falls``."""

    def __init__(self, net: nn.Module, optimizer: str, *, falls: bool) -> None:
        super().__init__()
        self.net, self.optimizer, self.falls = net, optimizer, falls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's answer."""
        return self.net(x)

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[self.optimizer](trained)
        if not self.falls:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Regression):
    """Two optimizers, each with a layer; the second one steps every other batch."""

    def __init__(self, net: nn.Module, optimizer: str, *, falls: bool) -> None:
        super().__init__(net, optimizer, falls=falls)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for k, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            if k == 0 or batch_idx % 2:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [OPTIMIZERS[self.optimizer](self.net[k].parameters()) for k in (0, 2)]


class ManualOne(Regression):
    """One optimizer, stepped by hand."""

    def __init__(self, net: nn.Module, optimizer: str, *, falls: bool) -> None:
        super().__init__(net, optimizer, falls=falls)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


MODULES = {"automatic": Regression, "manual": Manual, "manual one": ManualOne}


class Data(LightningDataModule):
    """Loaders that are asked for, and not handed over."""

    def __init__(self, training: DataLoader, validation: DataLoader) -> None:
        super().__init__()
        self.training, self.validation = training, validation

    def train_dataloader(self) -> DataLoader:
        return self.training

    def val_dataloader(self) -> DataLoader:
        return self.validation


class Stop(Callback):
    """Saves a checkpoint after some batches, and ends the run there."""

    def __init__(self, batch: int, path: str) -> None:
        self.batch, self.path, self.batches = batch, path, 0

    def on_train_batch_end(self, runner: Trainer, *args: Any) -> None:
        self.batches += 1
        if self.batches == self.batch:
            runner.save_checkpoint(self.path)
            runner.should_stop = True


class SaveAtEnd(Callback):
    """Saves a checkpoint when the last batch is done."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, runner: Trainer, *args: Any) -> None:
        runner.save_checkpoint(self.path)


def alternating(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return masks that drop every other weight of the matrices."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            kept = torch.arange(parameter.numel()) % 2 == 0
            found[name] = kept.view(parameter.shape)
    return found


def squares(module: Any, batch: Any) -> torch.Tensor:
    """Return the loss of a batch, for pruning by gradients."""
    return module.loss(batch)
