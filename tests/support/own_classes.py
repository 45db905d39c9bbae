"""A model and its data as users have them in a module of their own, which loads nothing but Lightning."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class OwnModel(LightningModule):
    """Two layers that tell points by their place."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 10))

    def forward(self, points: Tensor) -> Tensor:
        return self.network(points)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", self._accuracy(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_accuracy", self._accuracy(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def _accuracy(self, batch: Any) -> Tensor:
        return (self.predict_step(batch, 0) == batch[1]).float().mean()


class OwnData(LightningDataModule):
    """Points drawn anew, the same each time, with the largest of ten of their coordinates as their class."""

    def train_dataloader(self) -> Any:
        return self._points(640)

    def val_dataloader(self) -> Any:
        return self._points(32)

    test_dataloader = predict_dataloader = val_dataloader

    def _points(self, count: int) -> Any:
        points = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
        return DataLoader(TensorDataset(points, points[:, :10].argmax(1)), batch_size=16)
