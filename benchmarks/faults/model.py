"""What is trained while faults are injected: strategies by name, a small model, data of a few numbers."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.faults.plan import EPOCH_STEPS, ROUND, STEPS
from lightning_comm import (
    Averaging,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    PartitionedLoader,
    QuadraticPeriod,
)
from lightning_comm.data.resumable import ResumableLoader

At = Callable[[str], Any]  # tells a fault that its rank has come to a place
BATCH = 4
_WIDTH = 40
_OVERLAP = Averaging(compression="bf16", overlap_steps=2)

STRATEGIES: dict[str, Callable[[timedelta], Strategy]] = {
    "local_sgd": lambda timeout: LocalUpdateStrategy(FixedPeriod(ROUND), timeout=timeout),
    "local_long": lambda timeout: LocalUpdateStrategy(FixedPeriod(1000), timeout=timeout),
    "local_overlap": lambda timeout: LocalUpdateStrategy(FixedPeriod(ROUND), averaging=_OVERLAP, timeout=timeout),
    "local_int8": lambda timeout: LocalUpdateStrategy(
        FixedPeriod(ROUND), averaging=Averaging(compression="int8"), timeout=timeout
    ),
    "post_local": lambda timeout: LocalUpdateStrategy(FixedPeriod(ROUND), gradient_steps=STEPS // 2, timeout=timeout),
    "qsr": lambda timeout: LocalUpdateStrategy(QuadraticPeriod(alpha=0.004, h_base=2, h_max=12), timeout=timeout),
    "cyclic": lambda timeout: CyclicStrategy(timeout=timeout),
    "cyclic_v1": lambda timeout: CyclicStrategy("v1", timeout=timeout),
    "cyclic_staggered": lambda timeout: CyclicStrategy(stagger="step", timeout=timeout),
    "ddp_bf16": lambda timeout: CompressedDDPStrategy("bf16", timeout=timeout),
    "ddp_topk": lambda timeout: CompressedDDPStrategy("topk", timeout=timeout),
    "ddp_powersgd": lambda timeout: CompressedDDPStrategy("powersgd", timeout=timeout),
    "pactrain": lambda timeout: CompressedDDPStrategy(["sparse_mask", "bf16"], timeout=timeout),
    "ddp": lambda timeout: DDPStrategy(timeout=timeout),
}


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are drawn from their index."""

    def __init__(self, length: int, at: At) -> None:
        self._length, self._at = length, at

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self._at("getitem" if torch.utils.data.get_worker_info() is None else "worker")
        values = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return values, values[:1] - values[1:2] * values[2:3]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same without a length."""

    def __init__(self, length: int, rank: int, ranks: int, at: At) -> None:
        self._samples, self._indices, self._at = Numbers(length, at), range(rank, length, ranks), at

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self._indices:
            yield self._samples[index]
        self._at("exhausted")


class Model(LightningModule):
    """A few layers, with dropout where ranks keep random states of their own.

    Args:
        strategy: The name of the strategy.
        at: Told of every place that the rank comes to.
        pause: Called in every step.

    """

    def __init__(self, strategy: str, at: At, pause: Callable[[], None]) -> None:
        super().__init__()
        torch.manual_seed(1)
        local = strategy.startswith(("local", "post", "qsr"))
        layers: list[nn.Module] = [nn.Linear(16, _WIDTH), nn.Tanh()]
        for _ in range(4):
            layers += [nn.Linear(_WIDTH, _WIDTH), nn.Tanh()]
        layers += [nn.Dropout(0.1)] if local or strategy.startswith("cyclic") else []
        layers[2:2] = [nn.BatchNorm1d(_WIDTH)] if local else []
        self.net = nn.Sequential(*layers, nn.Linear(_WIDTH, 1))
        self._at, self._pause = at, pause

    def training_step(self, batch: Any, _: int) -> Tensor:
        self._pause()
        word = self._at("training_step")
        samples, targets = batch
        output = self.net(samples)
        output.register_hook(lambda _: self._at("backward") and None)
        loss = nn.functional.mse_loss(output, targets)
        return loss * float("nan") if word == "nan" else loss

    def validation_step(self, batch: Any, _: int) -> None:
        self._at("validation_step")
        samples, targets = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(samples), targets), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.004)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Stepping(Model):
    """The same with an ``optimizer_step`` of its own."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._at("optimizer_step")
        super().optimizer_step(*args, **kwargs)
        if (self.trainer.global_step + 1) % ROUND == 0:  # the step that has just been done is not counted yet
            self._at("round")


class Clipping(Model):
    """The same with a clipping of its own."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self._at("clip")
        super().configure_gradient_clipping(*args, **kwargs)


def model_of(strategy: str, place: str, at: At, pause: Callable[[], None]) -> Model:
    """Return a model that comes through a place; hooks that a strategy may treat otherwise are there only if needed."""
    kinds: dict[str, type[Model]] = {"optimizer_step": Stepping, "round": Stepping, "clip": Clipping}
    return kinds.get(place, Model)(strategy, at, pause)


def loader_of(kind: str, rank: int, ranks: int, at: At, *, workers: int = 0, fewer: int = 0) -> Any:
    """Return the loader of a rank.

    Args:
        kind: ``"resumable"``, ``"partitioned"`` or ``"stream"``, which has no length.
        rank: Whose.
        ranks: How many there are.
        at: Told of every sample.
        workers: Processes that load.
        fewer: How many batches an epoch has less on this rank.

    """
    length = (EPOCH_STEPS - fewer) * BATCH * ranks
    more: dict[str, Any] = {"num_workers": workers} if workers else {}
    if kind == "partitioned":
        return PartitionedLoader(Numbers(length, at), BATCH * ranks, seed=3, **more)
    if kind == "stream":
        return DataLoader(Stream(length, rank, ranks, at), BATCH)
    return ResumableLoader(Numbers(length, at), BATCH, seed=3, num_replicas=ranks, rank=rank, **more)


def validation_loader() -> Any:
    """Return what is validated on: the same on all ranks."""
    return DataLoader(Numbers(2 * BATCH, lambda _: None), BATCH)
