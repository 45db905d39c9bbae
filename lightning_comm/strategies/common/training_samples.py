"""Samples of a Trainer's training data, for code that needs some before a step."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, IterableDataset

from lightning_comm.lightning_internals import wrapped_sampler
from lightning_comm.ondevice.random_state import random_state, seed_torch, set_random_state

_BATCH = 32  # where the loader's batches have no fixed size


def training_samples(trainer: Trainer, count: int, where: str) -> Iterator[tuple[Any, int]]:
    """Yield batches of samples from a fixed permutation of the training data, each with its number of samples.

    They come directly from the dataset, so the loader stays where it is, and the random state does not change. Batches
    are made by the loader's ``collate_fn`` and are on the model's device.

    Args:
        trainer: Has the loader.
        count: How many samples; all, if there are fewer.
        where: The caller, for the message.

    Raises:
        ValueError: If single samples of the data cannot be read.

    Note:
        *Communication.* None. One rank may ask alone.

    """
    loader: Any = trainer.train_dataloader
    dataset, in_lists = _indexed(loader, where)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()[:count]
    size = getattr(wrapped_sampler(loader.sampler) if in_lists else loader, "batch_size", None) or _BATCH
    state = random_state()
    try:
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            _seed(first)  # the same augmentations each time
            samples = _taken_at_once(dataset, chosen, where) if in_lists else [dataset[each] for each in chosen]
            batch = trainer.precision_plugin.convert_input(loader.collate_fn(samples))
            yield trainer.strategy.batch_to_device(batch), len(chosen)
    finally:
        set_random_state(state)


def _indexed(loader: Any, where: str) -> tuple[Any, bool]:
    """Return a dataset that returns samples by their index, and whether it takes a list of indices at once.

    Raises:
        ValueError: If there is none.

    """
    dataset: Any = getattr(loader, "dataset", None)
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not indexed or not hasattr(loader, "collate_fn"):
        what = type(dataset).__name__ if dataset is not None else type(loader).__name__
        raise ValueError(
            f"{where}: it takes samples by their index from the dataset of one DataLoader; the training data is "
            f"{what}. Use a dataset with `__len__` and `__getitem__`, or MagnitudePruning, or compute masks yourself "
            "and give MaskFunction."
        )
    if getattr(loader, "batch_size", None) is not None or getattr(loader, "batch_sampler", None) is not None:
        return dataset, False
    sampler = wrapped_sampler(getattr(loader, "sampler", None))
    if isinstance(sampler, BatchSampler):
        return dataset, True
    raise ValueError(
        f"{where}: it takes samples by their index from the dataset of one DataLoader; with `batch_size=None` this one "
        f"hands what {type(sampler).__name__} yields to {type(dataset).__name__}, so how many samples that is, and "
        "how to ask for others, is not known. Give the DataLoader a `batch_size` or a `batch_sampler`, or a torch "
        "`BatchSampler` as `sampler`; or use MagnitudePruning, or compute masks yourself and give MaskFunction."
    )


def _taken_at_once(dataset: Any, chosen: list[int], where: str) -> Any:
    try:
        return dataset[chosen]
    except Exception as error:  # the user's own code, which may raise anything
        raise ValueError(
            f"{where}: with `batch_size=None` the DataLoader hands the lists of its BatchSampler to "
            f"{type(dataset).__name__}, which cannot take one: {type(error).__name__}: {error}. Give the BatchSampler "
            "as `batch_sampler`, and samples are asked for one by one."
        ) from error


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed)
