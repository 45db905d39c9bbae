"""Fits under Cyclic Data Parallelism beside their sequential reference, `simulate_delay`."""

import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_comm import CyclicStrategy
from lightning_comm.ondevice.cyclic import simulate_delay
from support.training import FEATURES, Regression, loader, sample, trainer


def deep(modules: int, norm: bool = False) -> nn.Sequential:
    """So many modules with parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 7)]
    for k in range(modules - 2):
        layers += [nn.Tanh(), nn.BatchNorm1d(7) if norm and k % 2 else nn.Linear(7, 7)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(7, 1)).double()


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1)


def cyclic(*args: Any, **kwargs: Any) -> CyclicStrategy:
    return CyclicStrategy(*args, timeout=timedelta(seconds=40), **kwargs)


class Unsteady(nn.Module):
    """Takes a random time, forward and backward."""

    longest_s = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.draw = random.Random(time.monotonic())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.draw.random() * self.longest_s)
        if x.requires_grad:
            x.register_hook(lambda gradient: time.sleep(self.draw.random() * self.longest_s))
        return x


def state(module: nn.Module) -> list[Any]:
    """All parameters and buffers as numpy arrays, which queues can carry."""
    return [tensor.detach().clone().numpy() for tensor in module.state_dict().values()]


def fit(
    rank: int,
    world_size: int,
    module: LightningModule,
    steps: int,
    settings: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[CyclicStrategy, Any]:
    """Train with batches of 4 of this rank's samples; `settings` are the strategy's, options the Trainer's."""
    strategy = cyclic(**settings or {})
    runner = trainer(strategy, world_size, **options)
    batches = steps * options.get("accumulate_grad_batches", 1)
    runner.fit(module, loader(batches, rank, dtype=dtype), loader(1, 90 + rank, dtype=dtype))
    return strategy, runner


def batch(rank: int, index: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """What `loader` gives a rank."""
    x, y = zip(*(sample(rank, 4 * index + k, dtype) for k in range(4)), strict=True)
    return torch.stack(x), torch.stack(y)


def reference(
    module: Regression,
    world_size: int,
    steps: int,
    names: list[list[str]],
    *,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Train the module on one device as the ranks would; return its optimizer."""
    configured = module.configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"] if isinstance(configured, dict) else None
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    micro_batches = [
        [batch(rank, step * accumulate + k, dtype) for k in range(accumulate)]
        for step in range(steps)
        for rank in range(world_size)
    ]

    def error(model: Any, parts: Any) -> torch.Tensor:
        one = loss or (lambda model, part: model.loss(part))
        return sum(one(model, part) / accumulate for part in parts)

    module.train()
    simulate_delay(
        module, micro_batches, error, optimizer, workers=world_size, stages=names, scheduler=scheduler, **settings
    )
    return optimizer
