"""What users do that a partitioned run must survive, or refuse on all ranks alike."""

import multiprocessing.util
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.new_process import as_new, end_as_interpreter, run_as_main
from support.partition import BATCH, UNEVEN, Fit, Points, close, ddp, fit, loader_of, one_process
from support.processes import launch, outcomes
from support.training import Stop, weights
from torch import nn

from lightning_comm import AdaptivePartition, PartitionedLoader

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there


# ---- samples that only fill a batch ----------------------------------------------------------------------------------


class NanOnDummies(Fit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if AdaptivePartition.weight_of(self.trainer) == 0 else loss


def _dummy(rank):
    model = NanOnDummies()
    fit(ddp(), 2, model, loader_of(2 * BATCH + 1), AdaptivePartition(**UNEVEN), max_epochs=2)
    return weights(model)


def test_a_dummy_whose_gradient_is_nan_changes_no_weight():
    expected = one_process(Fit(), loader_of(2 * BATCH + 1), max_epochs=2)
    for got in launch(_dummy, world_size=2):
        assert close(got, expected)


# ---- what ranks must agree on ----------------------------------------------------------------------------------------


def _of_its_own(rank, options):
    try:
        fit(ddp(), 2, Fit(), loader_of(4 * BATCH), AdaptivePartition(**options[rank]))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("options", "must_say"),
    [
        ([UNEVEN, {"mode": "fixed", "batch_sizes": [3, 9]}], ["batch_sizes", "[3, 9]", "[9, 3]", "rank 1"]),
        ([{"max_per_rank": 8}, {"max_per_rank": 10}], ["max_per_rank", "10 and 8", "list of all bounds"]),
        ([{"window_steps": 5}, {"window_steps": 6}], ["window_steps", "6 and 5"]),
        ([{"mode": "observe"}, {"mode": "balance"}], ["mode", "'balance' and 'observe'"]),
    ],
    ids=str,
)
def test_settings_that_differ_between_ranks_are_refused_on_all(options, must_say):
    for message in launch(_of_its_own, options, world_size=2):
        assert [word for word in ["AdaptivePartition", *must_say] if word not in message] == [], message


class Late:
    """A sampler that breaks its promise on one rank, in its second epoch."""

    def __init__(self, fails):
        self.fails, self.epoch = fails, 0

    def __len__(self):
        return 3 * BATCH

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(30 if self.fails and self.epoch else 3 * BATCH))


def _sampler_fails(rank):
    loader = PartitionedLoader(Points(3 * BATCH), BATCH, sampler=Late(rank == 1))
    fit(ddp(), 2, Fit(), loader, AdaptivePartition(**UNEVEN), max_epochs=3)


def test_a_sampler_that_fails_on_one_rank_ends_all():
    (_, first), (_, second) = outcomes(_sampler_fails, world_size=2, timeout_s=15)
    assert "the sampler failed on rank 1" in first
    assert "Late yielded 30 in epoch 1" in second


class Fetches(Fit):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


def test_a_training_step_that_fetches_its_batches_itself_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`training_step` takes `dataloader_iter`.*take `batch`"):
        fit("auto", 1, Fetches(), loader_of(4 * BATCH), AdaptivePartition())


# ---- going on --------------------------------------------------------------------------------------------------------


class Both(Fit):
    def training_step(self, batch, batch_idx):
        loss = 0.0
        for name in ("one", "other"):
            if batch[name] is not None:
                x, y, _ = batch[name]
                loss = loss + nn.functional.mse_loss(self.net(x), y)
        return loss


def _both(mode):
    return CombinedLoader({"one": loader_of(2 * BATCH), "other": loader_of(5 * BATCH, seed=8)}, mode)


# within an epoch of either, where the shorter one ends, where both end, and behind that
OFTEN = [
    ("max_size", 2),
    ("max_size", 4),
    ("max_size", 8),
    ("max_size_cycle", 3),
    ("max_size_cycle", 5),
    ("min_size", 3),
]


@pytest.mark.parametrize(
    ("mode", "stop_at"),
    [
        pytest.param(mode, stop_at, marks=() if (mode, stop_at) in OFTEN else pytest.mark.exhaustive)
        for mode, steps in (("max_size", 10), ("max_size_cycle", 10), ("min_size", 4))
        for stop_at in range(1, steps)
    ],
)
def test_of_several_loaders_each_resumes_where_it_was_also_one_that_was_through(mode, stop_at, tmp_path):
    whole, stopped, resumed = Both(), Both(), Both()
    fit("auto", 1, whole, _both(mode), AdaptivePartition(), max_epochs=2)
    path = str(tmp_path / "stopped.ckpt")
    fit("auto", 1, stopped, _both(mode), AdaptivePartition(), [Stop(stop_at, path)], max_epochs=2)
    fit("auto", 1, resumed, _both(mode), AdaptivePartition(), ckpt_path=path, max_epochs=2)
    assert close(weights(resumed), weights(whole))


def test_a_checkpoint_that_is_only_tested_is_no_start_of_a_later_fit(tmp_path):
    class Tested(Fit):
        def test_step(self, batch, batch_idx):
            pass

    partition, path = AdaptivePartition(window_steps=2, warmup_steps=0, mode="observe"), str(tmp_path / "one.ckpt")
    runner = fit("auto", 1, Tested(), loader_of(8 * BATCH), partition, max_epochs=1)
    runner.save_checkpoint(path)
    windows = len(partition.journal.windows)
    assert windows > 1
    runner.test(Tested(), loader_of(BATCH), ckpt_path=path, weights_only=False)
    fit("auto", 1, Tested(), loader_of(8 * BATCH), partition, max_epochs=1)
    assert len(partition.journal.windows) == windows


def test_shares_of_another_version_are_told_of_and_left_aside(tmp_path):
    class Older(AdaptivePartition):
        def state_dict(self):
            return {"version": 0, "somehow": 1}

    Older.__qualname__ = "AdaptivePartition"  # by which a checkpoint finds its callbacks
    path = str(tmp_path / "one.ckpt")
    fit("auto", 1, Fit(), loader_of(4 * BATCH), Older(), [Stop(2, path)])
    with pytest.warns(UserWarning, match="version 0.*measures anew"):
        fit("auto", 1, Fit(), loader_of(4 * BATCH), AdaptivePartition(), ckpt_path=path)


def _write_journal(rank):
    fit(ddp(), 2, Fit(), loader_of(4 * BATCH), AdaptivePartition(**UNEVEN, folder="one"))


def _replay(rank, options):
    try:
        options = {"mode": "observe", "replay": "one/run_0/journal.json", **options}
        fit(ddp(), 2, Fit(), loader_of(4 * BATCH), AdaptivePartition(**options))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_a_journal_beyond_the_bounds_of_this_run_is_refused():
    launch(_write_journal, world_size=2)
    for message in launch(_replay, {"max_per_rank": 6}, world_size=2):
        assert [word for word in ["replay", "[6, 6]", "[None, None]"] if word not in message] == [], message


@pytest.mark.parametrize("name", ["shares", "batch_sizes"])
def test_a_replay_and_shares_contradict_each_other(name):
    with pytest.raises(ValueError, match=rf"`replay` takes the shares .* `{name}` .*\[6, 6\].*Leave out one"):
        AdaptivePartition(replay="journal.json", **{name: [6, 6]})


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_torch_are_numbers():
    given = {"shares": np.array([1, 3]), "min_per_rank": np.int64(2), "max_per_rank": torch.tensor([8, 9])}
    settings = AdaptivePartition(**given).settings
    assert (settings.shares, settings.min_per_rank, settings.max_per_rank) == ((1, 3), 2, (8, 9))
    assert settings == AdaptivePartition(shares=[1, 3], min_per_rank=2, max_per_rank=[8, 9]).settings


@pytest.mark.parametrize(
    ("arguments", "must_say"),
    [
        ({"shares": 3}, ["shares", "list", "3"]),
        ({"shares": {0: 1, 1: 3}}, ["shares", "list", "{0: 1, 1: 3}"]),
        ({"batch_sizes": "16,48"}, ["batch_sizes", "list", "'16,48'"]),
        ({"max_per_rank": 8.0}, ["max_per_rank", "whole", "8.0"]),
        ({"folder": 3}, ["folder", "path", "3"]),
        ({"replay": 3}, ["replay", "path", "3"]),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_named(arguments, must_say):
    with pytest.raises(ValueError, match="AdaptivePartition") as caught:
        AdaptivePartition(**arguments)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_a_run_too_short_to_measure_has_a_report_all_the_same(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit("auto", 1, Fit(), loader_of(4 * BATCH), AdaptivePartition(mode="observe"))
    assert "AdaptivePartition (observe): 12 samples a step on 1 rank" in caplog.text


def _fork(python, command, files):
    """Do as `multiprocessing` does to start a Python, but fork one that has loaded torch already."""
    words = [os.fsdecode(word) for word in command]
    if not any("spawn_main" in word for word in words):
        return _spawn(python, command, files)  # what keeps account of shared memory, and loads nothing
    process = os.fork()
    if not process:
        with end_as_interpreter():
            as_new(dict(os.environ), files, sys.path)
            code = words.index("-c") + 1
            run_as_main("-c", words[code], words[code + 1 :])
    return process


_spawn = multiprocessing.util.spawnv_passfds


@pytest.mark.parametrize("start", [_fork, pytest.param(_spawn, marks=pytest.mark.exhaustive)], ids=["forked", "new"])
def test_a_loader_goes_to_a_spawned_process(start, monkeypatch):
    """All that such a process has of the loader is what was pickled, however it was started."""
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", start)
    loader = loader_of(3 * BATCH, num_workers=1, multiprocessing_context="spawn")
    [first, *_] = [batch[2].tolist() for batch in loader]
    again = pickle.loads(pickle.dumps(loader_of(3 * BATCH)))
    assert next(batch[2].tolist() for batch in again) == first
