"""Pinned memory and workers that live on: what loaders hand on to torch, and that batches stay what they are."""

import os
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_comm import PartitionedLoader, ResumableLoader


class Numbers(Dataset):
    """Samples that carry the process that loaded them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index, os.getpid()


class Batch:
    """A type of the user's own, which says itself how it is pinned."""

    def __init__(self, samples):
        self.index = torch.tensor([index for index, _ in samples])
        self.pids = {pid for _, pid in samples}
        self.pinned = 0

    def pin_memory(self):
        self.pinned += 1
        return self


def _loaders(**options):
    return {
        "partitioned": PartitionedLoader(Numbers(), 4, shuffle=False, collate_fn=Batch, **options),
        "resumable": ResumableLoader(Numbers(), 4, shuffle=False, collate_fn=Batch, **options),
        "from another": PartitionedLoader.from_dataloader(
            DataLoader(Numbers(), 4, collate_fn=Batch, **options), global_batch_size=4
        ),
    }


KINDS = ["partitioned", "resumable", "from another"]


def _passes(loader, passes=2):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # where there is no accelerator
        return [list(loader) for _ in range(passes)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_an_own_type_are_handed_out_as_they_are_and_pinned_once_where_there_is_a_gpu(
    kind, workers, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    for name in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    loader = _loaders(pin_memory=True, num_workers=workers)[kind]
    for batches in _passes(loader):
        assert [type(batch) for batch in batches] == [Batch, Batch]
        assert [batch.pinned for batch in batches] == [1, 1]
        assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_pinning_is_left_out_and_nothing_else_changes(kind):
    for batches in _passes(_loaders(pin_memory=True)[kind]):
        assert [batch.pinned for batch in batches] == [0, 0]
        assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lives_on", [True, False])
def test_workers_live_on_if_they_are_asked_to(kind, lives_on):
    first, second = _passes(_loaders(num_workers=2, persistent_workers=lives_on)[kind])
    pids = [set.union(*(batch.pids for batch in batches)) for batches in (first, second)]
    assert os.getpid() not in pids[0] | pids[1]
    assert (pids[0] == pids[1]) == lives_on
