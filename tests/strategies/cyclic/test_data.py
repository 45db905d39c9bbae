"""Data of unknown length under Cyclic Data Parallelism: streams, endless ones, several loaders, loaders made anew."""

from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch
from support.training import Regression, Stop, loader, sample, trainer
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    """So many batches of 4, as `loader` has them; without a number it never ends."""

    def __init__(self, rank, batches=10**9):
        self.rank, self.batches = rank, batches

    def __iter__(self):
        return (sample(self.rank, index) for index in range(4 * self.batches))


class Goes:
    """An endless loader that can be resumed, as those of streaming libraries can."""

    def __init__(self, rank):
        self.rank, self.next = rank, 0

    def __iter__(self):
        while True:
            self.next += 1
            samples = [sample(self.rank, 4 * (self.next - 1) + k) for k in range(4)]
            yield tuple(map(torch.stack, zip(*samples, strict=True)))

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state_dict):
        self.next = state_dict["next"]


class Two(Regression):
    def training_step(self, batch, batch_idx):
        return sum(self.loss(each) for each in batch.values() if each is not None)


class Iterator(Regression):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class Reloads(Regression):
    """A stream of another length in each epoch, or a list of it."""

    def __init__(self, make, rank):
        super().__init__(deep(6), momentum)
        self.make, self.rank = make, rank

    def train_dataloader(self):
        return self.make(3 + self.trainer.current_epoch, self.rank)


class Validated(Callback):
    def __init__(self):
        self.at = []

    def on_validation_start(self, runner, module):
        self.at.append(runner.global_step)


def stream(batches, rank):
    return DataLoader(Stream(rank, batches), 4)


def _fit(rank, data, module=None, **options):
    module = module or Regression(deep(6), momentum)
    validated = Validated()
    callbacks = [validated, *options.pop("callbacks", [])]
    path = options.pop("ckpt_path", None)
    runner = trainer(cyclic(), 2, callbacks=callbacks, num_sanity_val_steps=0, **options)
    if data is None:
        runner.fit(module, val_dataloaders=loader(1, 90 + rank), ckpt_path=path)
    else:
        runner.fit(module, data, loader(1, 90 + rank), ckpt_path=path)
    return state(module), runner.global_step, validated.at


def _pairs(rank, names):
    """What must be equal, by name."""
    endless = DataLoader(Stream(rank), 4)
    often = {"limit_val_batches": 1, "val_check_interval": 3}
    forever = {"max_epochs": -1}
    by_step = {**often, "check_val_every_n_epoch": None}
    reload = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 1}
    pairs = {
        "a stream": lambda: (_fit(rank, stream(5, rank), max_epochs=2), _fit(rank, loader(5, rank), max_epochs=2)),
        "accumulated": lambda: (
            _fit(rank, stream(5, rank), max_epochs=2, accumulate_grad_batches=2, limit_val_batches=1),
            _fit(rank, loader(5, rank), max_epochs=2, accumulate_grad_batches=2, limit_val_batches=1),
        ),
        "max_steps": lambda: (_fit(rank, endless, max_steps=7, **forever), _fit(rank, loader(7, rank))),
        "limit_train_batches": lambda: (
            _fit(rank, endless, limit_train_batches=4, max_epochs=2, limit_val_batches=1),
            _fit(rank, loader(4, rank), max_epochs=2, limit_val_batches=1),
        ),
        "every 3 batches": lambda: (
            _fit(rank, endless, max_steps=8, **forever, **by_step),
            _fit(rank, loader(8, rank), **often),
        ),
        "every 3 batches over epochs": lambda: (
            _fit(rank, stream(4, rank), max_steps=8, **forever, **by_step),
            _fit(rank, loader(4, rank), max_epochs=2, **by_step),
        ),
        "several loaders": lambda: (
            _fit(rank, CombinedLoader({"a": stream(5, rank), "b": loader(3, rank)}, "max_size_cycle"), Two(deep(6))),
            _fit(rank, CombinedLoader({"a": loader(5, rank), "b": loader(3, rank)}, "max_size_cycle"), Two(deep(6))),
        ),
        "the shortest of several": lambda: (
            _fit(rank, CombinedLoader({"a": endless, "b": loader(3, rank)}, "min_size"), Two(deep(6))),
            _fit(rank, CombinedLoader({"a": loader(3, rank), "b": loader(3, rank)}, "min_size"), Two(deep(6))),
        ),
        "the longest of several": lambda: (
            _fit(rank, CombinedLoader({"a": stream(5, rank), "b": loader(3, rank)}, "max_size"), Two(deep(6))),
            _fit(rank, CombinedLoader({"a": loader(5, rank), "b": loader(3, rank)}, "max_size"), Two(deep(6))),
        ),
        "an iterator": lambda: (
            _fit(rank, stream(5, rank), Iterator(deep(6))),
            _fit(rank, loader(5, rank), Regression(deep(6))),
        ),
        "loaders made anew": lambda: (
            _fit(rank, None, Reloads(stream, rank), **reload),
            _fit(rank, None, Reloads(loader, rank), **reload),
        ),
    }
    return {name: pair() for name, pair in pairs.items() if name in names}


OFTEN = (
    "accumulated", "limit_train_batches", "every 3 batches over epochs", "the shortest of several", "an iterator",
    "loaders made anew",
)  # fmt: skip
SELDOM = ("a stream", "max_steps", "every 3 batches", "several loaders", "the longest of several")


@pytest.mark.parametrize("names", [OFTEN, pytest.param(SELDOM, marks=pytest.mark.exhaustive)], ids=["", "more"])
def test_streams_train_bit_for_bit_as_the_same_data_in_a_list(names):
    for pairs in launch(_pairs, names, world_size=2):
        assert tuple(pairs) == names
        for name, (one, other) in pairs.items():
            assert one[1:] == other[1:], name
            assert one[1] > 0, name
            for mine, others in zip(one[0], other[0], strict=True):
                assert np.array_equal(mine, others), name
        for name in names:
            assert not name.startswith("every 3 batches") or pairs[name][0][2] == [3, 6]


def _resumed(rank, world_size, path):
    # with a limit, since Lightning reads a stream without one ahead, and a loader's state would be a batch further
    options = {"max_epochs": -1, "max_steps": 11, "limit_train_batches": 10**6}
    whole = _fit(rank, Goes(rank), callbacks=[Stop(4, f"{path}/middle.ckpt", goes_on=True)], **options)
    timed = _fit(rank, Goes(rank), max_time=timedelta(seconds=0.3), max_epochs=-1)
    return whole, _fit(rank, Goes(rank), ckpt_path=f"{path}/middle.ckpt", **options), timed


def test_endless_data_is_resumed_in_the_middle_bit_for_bit_and_ends_in_time(tmp_path):
    ranks = launch(_resumed, 2, str(tmp_path), world_size=2)
    for whole, again, timed in ranks:
        assert whole[1] == again[1] == 11
        for one, other in zip(whole[0], again[0], strict=True):
            assert np.array_equal(one, other)
        assert timed[1] == ranks[0][2][1] > 0
        for one, other in zip(timed[0], ranks[0][2][0], strict=True):
            assert np.array_equal(one, other)
