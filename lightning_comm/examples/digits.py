"""A data module of real handwritten digits that need no download."""

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.data.resumable import ResumableLoader

_SIDE = 8  # pixels
_HELD_OUT = 360  # of 1,797; divides by 2, 3, 4, 5, 6, 8, 9, 10 and 12 ranks
_SPLIT_SEED = 0  # of the split alone: it must not change between runs that are compared


class DigitsData(LightningDataModule):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, in ten classes.

    1,437 are for training and 360 are held out, with the same share of each digit in both parts. The split is always
    the same. Validation, test and prediction all use the held-out part, so the test accuracy of a model that was chosen
    by its validation accuracy is too high.

    Args:
        batch_size: Images per batch on each rank; at least 1. In training, images that do not fill a batch on every
            rank are left out, other ones in each epoch, so that all steps have equally many images.
        image_size: Side of the images in pixels; at least 8. Larger ones are interpolated once, bilinearly.
        num_workers: Processes that load images, as in ``DataLoader``. The images are in memory, so 0 is fastest.
        seed: Decides the order of the training images; at least 0.
        global_batch_size: Images per training step of all ranks together, for :class:`AdaptivePartition`, which decides
            how many each rank takes; without it they take equal shares. At least 1 for each rank. ``batch_size`` then
            holds for the held-out images alone. ``None``: ``batch_size`` images on each rank.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None. In training each rank draws its share with a
        :class:`~lightning_comm.data.ResumableLoader`, or, with ``global_batch_size``, takes its slice of the
        batches of a :class:`~lightning_comm.data.PartitionedLoader`; the two use different orders and
        leave out different images. Lightning distributes the held-out images over the ranks: each is counted once where
        the number of ranks divides 360, otherwise the last few ranks see one image a second time.

    Example:
        >>> data = DigitsData(batch_size=32)
        >>> data.setup()
        >>> images, labels = next(iter(data.val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))

    """

    def __init__(
        self,
        batch_size: int = 32,
        image_size: int = _SIDE,
        num_workers: int = 0,
        seed: int = 0,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(
                f"DigitsData: `batch_size` counts the images of a batch on one rank, so it must be >= 1; got "
                f"{batch_size!r}. The global batch is as many times larger as there are ranks."
            )
        if image_size < _SIDE:
            raise ValueError(
                f"DigitsData: `image_size` must be >= {_SIDE}, the size of the originals; got {image_size!r}. Leave it "
                "out to have the originals."
            )
        if num_workers < 0:
            raise ValueError(
                f"DigitsData: `num_workers` counts processes, so it must be >= 0; got {num_workers!r}. 0 loads in the "
                "training process."
            )
        if seed < 0:
            raise ValueError(f"DigitsData: `seed` must be >= 0; got {seed!r}. 0 is as good as any other.")
        if global_batch_size is not None and global_batch_size < 1:
            raise ValueError(
                f"DigitsData: `global_batch_size` counts the images of a training step on all ranks together, so it "
                f"must be >= 1 for each rank; got {global_batch_size!r}. Leave it out for `batch_size` images on each."
            )
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.image_size = image_size
        self.num_workers = num_workers
        self.seed = seed
        self.global_batch_size = global_batch_size
        self._parts: tuple[TensorDataset, TensorDataset] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, scale and split the images; only the first call does anything."""
        if self._parts is not None:
            return
        digits = load_digits()
        # Scaled by numpy: torch would start threads, and a process with threads cannot be forked into ranks.
        images = torch.from_numpy((digits.images[:, None] / 16).astype("float32"))
        if self.image_size != _SIDE:
            images = interpolate(images, size=(self.image_size, self.image_size), mode="bilinear")
        labels = torch.from_numpy(digits.target).long()
        rows = train_test_split(range(len(labels)), test_size=_HELD_OUT, stratify=labels, random_state=_SPLIT_SEED)
        train, held_out = (TensorDataset(images[part], labels[part]) for part in rows)
        self._parts = train, held_out

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | PartitionedLoader:
        """Return this rank's share of the training images, in an order of its own for each epoch."""
        if self.global_batch_size is not None:
            return PartitionedLoader(
                self._part(0),
                self.global_batch_size,
                seed=self.seed,
                tail="drop",
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
            )
        return ResumableLoader(
            self._part(0),
            self.batch_size,
            seed=self.seed,
            drop_last=True,
            num_replicas=self.trainer.world_size if self.trainer else None,
            rank=self.trainer.global_rank if self.trainer else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images."""
        return self._held_out()

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images, the same as for validation."""
        return self._held_out()

    @override
    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images, the same as for validation."""
        return self._held_out()

    def _held_out(self) -> DataLoader[tuple[Tensor, ...]]:
        # By keyword: Lightning rebuilds the loader for prediction and fails on a positional `batch_size`.
        return DataLoader(
            self._part(1),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _part(self, index: int) -> TensorDataset:
        self.setup()
        assert self._parts is not None
        return self._parts[index]
