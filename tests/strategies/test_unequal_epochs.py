"""Epochs whose length nobody knows before: unequal ones are refused on all ranks at once, equal ones train on."""

import time
from unittest.mock import patch

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.cyclic import cyclic, deep
from support.processes import launch, outcomes
from support.training import Regression, loader, local_update, sample, trainer
from torch.utils.data import DataLoader, IterableDataset

import lightning_comm.transport.failures as peers
from lightning_comm import Averaging, FixedPeriod


class Stream(IterableDataset):
    """Ends after so many batches of 4, whatever it announces."""

    def __init__(self, batches, rank):
        self.batches, self.rank = batches, rank

    def __iter__(self):
        for index in range(4 * self.batches):
            yield sample(self.rank, index)


class Announced(Stream):
    """Says that it has 12 batches."""

    def __len__(self):
        return 48


STRATEGIES = {
    "rounds": lambda: local_update(FixedPeriod(4)),
    "one long round": lambda: local_update(FixedPeriod(1000)),
    "overlap": lambda: local_update(FixedPeriod(4), averaging=Averaging(overlap_steps=2)),
    "gradients": lambda: local_update(FixedPeriod(4), gradient_steps=1000),
    "cyclic": cyclic,
}


# where the shorter epoch ends; nothing is written, since ranks come apart before
SAVES_AT_5 = {"callbacks": [ModelCheckpoint("never", every_n_train_steps=5)], "enable_checkpointing": True}


@patch.object(peers, "_LEAVE_S", 0.3)  # who refuses does not wait long for others in a collective
def _fit(rank, strategy, lengths, kind=Stream, **options):
    started = time.monotonic()
    runner = trainer(STRATEGIES[strategy](), len(lengths), **{"max_epochs": 2, **options})
    try:
        runner.fit(Regression(deep(4)), DataLoader(kind(lengths[rank], rank), 4), DataLoader(Stream(2, rank), 4))
    except Exception as error:
        dist.destroy_process_group()  # whoever refuses has left it
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return runner.global_step, time.monotonic() - started


def also(*case):
    """A case whose settings others have too, not all of them together."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("strategy", "lengths", "options"),
    [
        also("rounds", (6, 8), {}),
        ("rounds", (9, 7, 8), {"limit_val_batches": 1}),
        ("one long round", (8, 6), {"max_epochs": 1}),
        ("overlap", (7, 8), {"val_check_interval": 3, "limit_val_batches": 1}),
        also("gradients", (6, 8), {}),
        also("gradients", (8, 6), {"max_steps": 20, "max_epochs": -1}),
        ("gradients", (8, 6), {"accumulate_grad_batches": 2}),
        ("gradients", (6, 8), {"kind": Announced}),
        also("rounds", (8, 6), {"kind": Announced}),
        also("cyclic", (6, 8), {}),
        ("cyclic", (8, 7, 8), {"limit_val_batches": 1, "limit_train_batches": 12}),
        ("cyclic", (0, 6), {}),
        also("cyclic", (7, 6), {"kind": Announced, "max_epochs": 1}),
        also("cyclic", (5, 8), {"accumulate_grad_batches": 2}),
        ("cyclic", (7, 5), {"callbacks": [EMAWeightAveraging(update_every_n_steps=2)]}),
        ("cyclic", (7, 5), SAVES_AT_5),
        also("cyclic", (5, 7, 7), SAVES_AT_5),
        also("rounds", (7, 5), SAVES_AT_5),
        ("rounds", (7, 5), {"val_check_interval": 5, "limit_val_batches": 1}),
    ],
)
def test_an_epoch_that_ends_earlier_on_one_rank_is_refused_on_all_at_once(strategy, lengths, options):
    answers = outcomes(lambda rank: _fit(rank, strategy, lengths, **options), world_size=len(lengths))
    shortest = min(lengths)
    for (message, seconds), _ in answers:
        assert "different numbers of training batches or steps in epoch 0" in message
        assert f"rank {lengths.index(shortest)} stopped after {shortest}" in message
        assert f"limit_train_batches={shortest}" in message or "The data of rank 0 is empty" in message
        assert seconds < 30


class SkipsAlone(Regression):
    """Rank 1 leaves out the step of batch 2, where the gradient phase ends on rank 0."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        if batch_idx != 2 or self.trainer.global_rank == 0:
            optimizer.step()


def _skipping(rank, folder):
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
    runner = trainer(
        local_update(FixedPeriod(4), gradient_steps=3), 2, callbacks=[save], enable_checkpointing=True, max_epochs=2
    )
    try:
        runner.fit(SkipsAlone(deep(4)), loader(7, rank))
    except Exception as error:
        dist.destroy_process_group()
        return str(error)


def test_a_step_left_out_on_one_rank_alone_is_refused_by_the_steps_of_both(tmp_path):
    for message in launch(_skipping, str(tmp_path), world_size=2):
        assert "rank 0 stopped after 3, at optimizer step 3; rank 1 stopped after 3, at optimizer step 2" in message
        assert "reduce_boolean_decision" in message


class Once:
    """Can be gone through once, so that all epochs after the first are empty."""

    def __init__(self, rank):
        self.batches = iter(list(loader(5, rank)))

    def __iter__(self):
        return self.batches


def _once(rank, world_size):
    steps = {}
    for strategy in ("rounds", "gradients", "cyclic"):
        runner = trainer(STRATEGIES[strategy](), world_size, max_epochs=3, limit_val_batches=1)
        runner.fit(Regression(deep(4)), Once(rank), DataLoader(Stream(2, rank), 4))
        steps[strategy] = runner.global_step, runner.current_epoch
    return steps


def test_epochs_without_data_on_any_rank_are_passed_over():
    for steps in launch(_once, 2, world_size=2):
        assert set(steps.values()) == {(5, 3)}, steps


EQUAL = [(strategy, kind) for strategy in STRATEGIES for kind in (Stream, Announced)]
EQUAL_ALSO = {("one long round", Announced), ("overlap", Announced)}  # as `rounds`


def _equal(rank, world_size, cases):
    return [_fit(rank, strategy, (5,) * world_size, kind, limit_val_batches=1)[0] for strategy, kind in cases]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([case for case in EQUAL if case not in EQUAL_ALSO], id="most"),
        pytest.param(EQUAL, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_epochs_of_equal_length_that_was_not_known_train_on(cases):
    for steps in launch(_equal, 2, cases, world_size=2):
        assert steps == [10] * len(cases)
