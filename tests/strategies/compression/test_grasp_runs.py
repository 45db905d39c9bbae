"""GraSP under Lightning: samples from the training data on rank 0 alone, and nothing else is changed by it."""

from datetime import timedelta

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from strategies.compression.test_pruning_schedule_runs import SaveAlways
from strategies.compression.test_sparse_mask_runs import Stepwise, data, weights, zeros
from support.processes import launch
from support.training import trainer
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_comm import CompressedDDPStrategy, GraSPPruning, PruningSchedule, SparseMask
from lightning_comm.strategies.common.training_samples import training_samples


class Noisy(Dataset):
    """Samples with a random part, as augmentation has, and a note of which were asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.asked.append(index)
        return torch.full((5,), float(index)) + torch.rand(5), torch.tensor([float(index)])


def squares(module, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(module.net(inputs), targets)


class Random(Stepwise):
    """Takes random numbers and its batch in each step, so that anything that moves them shows."""

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x + torch.rand_like(x)), y / 40)


def strategy(schedule=None, loss=squares, samples=24):
    pruning = GraSPPruning(sparsity=0.6, samples=samples, loss=loss)
    compression = SparseMask(pruning, schedule=schedule or PruningSchedule())
    return CompressedDDPStrategy(compression, timeout=timedelta(seconds=40), bucket_cap_mb=0.0003)


def _fit(rank, schedule):
    torch.manual_seed(5)
    dataset, model = Noisy(), Random()
    ours = strategy(schedule)
    trainer(ours, 2).fit(model, DataLoader(dataset, batch_size=10, shuffle=True))
    return weights(model), zeros(model), len(dataset.asked), torch.rand(1).item()


PRUNED = 216 - round(0.4 * 216)


def test_rank_0_alone_looks_at_samples_and_random_numbers_and_the_loader_go_on_as_if_it_had_not():
    dense = launch(_fit, PruningSchedule(start_step=99), world_size=2)
    masked = launch(_fit, PruningSchedule(start_step=2), world_size=2)
    assert [count for _, count, *_ in masked] == [PRUNED] * 2
    assert all((a == b).all() for a, b in zip(masked[0][0], masked[1][0], strict=True))
    assert [asked for *_, asked, _ in masked] == [40 + 24, 40]
    assert [drawn for *_, drawn in masked] == [drawn for *_, drawn in dense]


def _resumed(rank, folder, places):
    schedule = PruningSchedule(0, 6, 2)
    whole = Stepwise()
    trainer(strategy(schedule), 2, callbacks=[SaveAlways(folder)]).fit(whole, data(8, rank))
    same = []
    for step in places:
        model = Stepwise()
        trainer(strategy(schedule), 2).fit(model, data(8, rank), ckpt_path=f"{folder}/at{step}.ckpt")
        same.append(all((a == b).all() for a, b in zip(weights(whole), weights(model), strict=True)))
    return same, zeros(whole)


@pytest.mark.parametrize(
    "places",
    [
        pytest.param((3, 4, 7), id="between two prunings, at one, and behind the last"),
        pytest.param(range(1, 8), id="any", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_pruned_bit_by_bit_goes_on_bit_for_bit_after_a_stop_at_any_step(tmp_path, places):
    assert launch(_resumed, str(tmp_path), places, world_size=2) == [([True] * len(places), PRUNED)] * 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(5), torch.ones(1))] * 40)


def _refused(rank, loader, loss):
    runner = trainer(strategy(loss=loss), 2, limit_train_batches=3)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test reads all of it)
        runner.fit(Random(), loader)
    return str(caught.value)


IN_LISTS = DataLoader(Noisy(), sampler=BatchSampler(SequentialSampler(range(40)), 4, drop_last=False), batch_size=None)


@pytest.mark.parametrize(
    ("loader", "loss", "parts"),
    [
        (DataLoader(Stream(), batch_size=4), squares, ("GraSPPruning", "Stream", "MaskFunction")),
        (DataLoader(Noisy(), batch_size=None), squares, ("GraSPPruning", "`batch_size=None`", "SequentialSampler")),
        (
            IN_LISTS,
            squares,
            ("GraSPPruning", "`batch_size=None`", "Noisy, which cannot take one: TypeError", "`batch_sampler`"),
        ),
        ({"a": DataLoader(Noisy(), batch_size=4)}, squares, ("GraSPPruning", "is dict", "one DataLoader")),
    ],
    ids=["stream", "no batches", "not in lists", "several"],
)
def test_data_without_single_samples_is_an_error_on_all_ranks(loader, loss, parts):
    for said in launch(_refused, loader, loss, world_size=2):
        assert [part for part in parts if part not in said] == []


class Lists(Noisy):
    """Takes a list of indices at once, and makes the batch."""

    def __getitem__(self, indices):
        return torch.stack([torch.full((5,), float(each)) for each in indices]), torch.tensor(
            [[float(i)] for i in indices]
        )


@pytest.mark.parametrize("wrapped", [False, True], ids=["the user's", "within Lightning's"])
def test_a_data_set_that_takes_lists_of_a_batch_sampler_is_asked_for_lists(wrapped):
    sampler = BatchSampler(SequentialSampler(range(40)), 6, drop_last=False)
    part = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0) if wrapped else sampler
    loader = DataLoader(Lists(), sampler=part, batch_size=None)
    runner = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, barebones=True)
    seen = []

    class Looks(Random):
        def on_train_start(self):
            seen.extend(training_samples(self.trainer, 15, "here"))

    runner.fit(Looks(), loader)
    assert [number for _, number in seen] == [6, 6, 3]
    taken = torch.cat([inputs for (inputs, _), _ in seen])
    assert taken.shape == (15, 5)
    assert len(set(taken[:, 0].tolist())) == 15
    assert torch.equal(taken[:, :1], torch.cat([targets for (_, targets), _ in seen]))


def test_samples_are_the_same_each_time_and_no_more_than_there_are():
    runner = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, barebones=True)
    seen = []

    class Looks(Random):
        def on_train_start(self):
            for count in (15, 15, 100):
                parts = list(training_samples(self.trainer, count, "here"))
                seen.append(([number for _, number in parts], torch.cat([x for (x, _), _ in parts])))
                torch.rand(7)

    runner.fit(Looks(), DataLoader(Noisy(), batch_size=10))
    assert [sizes for sizes, _ in seen] == [[10, 5], [10, 5], [10] * 4]
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1][0], seen[0][1][1])
