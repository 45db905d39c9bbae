"""Partitioned runs with other ways of giving data, of stopping, and of going on."""

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from support.partition import BATCH, SLOW, UNEVEN, Fit, Points, close, ddp, fit, loader_of, one_process
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Stop, network, weights
from torch import nn
from torch.utils.data import WeightedRandomSampler

from lightning_comm import AdaptivePartition, CommProfiler, PartitionedLoader
from lightning_comm.transport import recording

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there


@pytest.fixture(scope="module")
def of_two():
    """Answers of runs on two ranks that share their processes."""
    cases = {
        **{("both", mode): (_fit_both, mode) for mode in ("min_size", "max_size", "max_size_cycle")},
        "overfit": (_overfit, 2, UNEVEN),
        "reload": (_reload,),
        "norm": (_norm, {"mode": "fixed", "shares": [0, 1]}),
        "norm, bound": (_norm, {"mode": "fixed", "shares": [0, 1], "min_per_rank": 3}),
        **{("norm", tail): (_norm_with_tail, tail) for tail in ("keep", "drop")},
        "norm and moves": (_norm_and_moves,),
        **{("messages", name): (_messages, options) for name, (options, _) in MESSAGES.items()},
        "own backward": (_own_backward,),
        "logged": (_logged_names,),
        "mean": (_logs,),
    }
    return SharedRanks(cases, world_size=2)


class Both(Fit):
    """Trains on two data sets at once."""

    def training_step(self, batch, batch_idx):
        loss = 0.0
        for name in ("one", "other"):
            if batch[name] is not None:
                x, y, index = batch[name]
                self.seen.append(index.tolist())
                loss = loss + nn.functional.mse_loss(self.net(x), y)
        return loss


def _both(mode):
    loaders = {"one": loader_of(4 * BATCH), "other": loader_of(7 * BATCH + 3, seed=8, tail="drop")}
    return CombinedLoader(loaders, mode)


class MoveAll(Callback):
    def __init__(self, partition):
        self.partition = partition

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == 2:
            place = max(loader.dispatched for loader in runner.train_dataloader.values())
            self.partition._session.plan.change_at(place, (2, 10))


def _fit_both(rank, mode):
    partition, model = AdaptivePartition(**UNEVEN), Both()
    fit(ddp(), 2, model, _both(mode), partition, [MoveAll(partition)], max_epochs=2)
    return weights(model), model.seen


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_of_a_combined_loader_follow_one_plan(of_two, mode):
    expected = one_process(Both(), _both(mode), max_epochs=2)
    for got, seen in of_two["both", mode]:
        assert close(got, expected)
        assert {len(batch) for batch in seen} in ({9, 2}, {3, 10})


def _weighted():
    importance = np.random.default_rng(0).random(50).tolist()
    return PartitionedLoader(Points(50), BATCH, sampler=WeightedRandomSampler(importance, 50), seed=1)


def _until(rank, ranks, options, path, stop_at):
    torch.manual_seed(100 + rank)  # a sampler that draws from the global state would give each rank its own order
    partition, model = AdaptivePartition(**options), Fit()
    stop = [Stop(stop_at, path)] if stop_at else []
    fit(ddp(), ranks, model, _weighted(), partition, stop, ckpt_path=None if stop_at else path, max_epochs=3)
    return weights(model)


@pytest.mark.parametrize("stop_at", [pytest.param(2, marks=pytest.mark.exhaustive), 5, 8])
def test_a_global_sampler_of_the_users_is_shared_and_resumed(stop_at, tmp_path):
    path = str(tmp_path / "stopped.ckpt")
    launch(_until, 2, UNEVEN, path, stop_at, world_size=2)
    for got in launch(_until, 3, {"mode": "observe"}, path, 0, world_size=3):
        assert close(got, _alone())


@cache
def _alone():
    return one_process(Fit(), _weighted(), max_epochs=3)


def _overfit(rank, ranks, options):
    model = Fit()
    fit(ddp(), ranks, model, loader_of(5 * BATCH), AdaptivePartition(**options), overfit_batches=2, max_epochs=3)
    return model.seen


def test_overfitting_repeats_the_first_batches_in_the_order_of_the_dataset(of_two):
    one, other = of_two["overfit"]
    steps = [[*a, *b] for a, b in zip(one, other, strict=True)]
    assert steps == [list(range(BATCH)), list(range(BATCH, 2 * BATCH))] * 3


class Reloads(Fit):
    def train_dataloader(self):
        return loader_of(3 * BATCH)


def _reload(rank):
    model = Reloads()
    partition = AdaptivePartition(**UNEVEN)
    fit(ddp(), 2, model, None, partition, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    return weights(model), model.seen


def test_loaders_that_are_made_anew_follow_the_plan_and_go_on_with_the_epochs(of_two):
    expected = one_process(Fit(), loader_of(3 * BATCH), max_epochs=3)
    for (got, seen), size in zip(of_two["reload"], (9, 3), strict=True):
        assert close(got, expected)
        assert {len(batch) for batch in seen} == {size}


# ---- going on with what is known -------------------------------------------------------------------------------------


class StopInFlight(Callback):
    """Saves and stops as soon as a change is announced that does not hold yet."""

    def __init__(self, partition, path):
        self.partition, self.path = partition, path

    def on_train_batch_end(self, runner, *args):
        if len(self.partition.journal.changes) == 2 and not runner.should_stop:
            runner.save_checkpoint(self.path)
            runner.should_stop = True


def _balanced(rank, path, resume, options, max_steps=-1):
    partition = AdaptivePartition(**{"window_steps": 6, "warmup_steps": 2, **options})
    model = Fit(speed=[SLOW, 3 * SLOW][rank])
    loader = loader_of(32 * 24, batch=32, num_workers=1, prefetch_factor=4)
    stop = [] if resume else [StopInFlight(partition, path)]
    ends = {"min_epochs": 0, "max_steps": max_steps}
    fit(ddp(), 2, model, loader, partition, stop, ckpt_path=path if resume else None, **ends)
    journal = partition.journal.to_dict()
    windows = [{**window, "seconds": 0.0} for window in journal["windows"]]  # which each rank counts by itself
    return [len(batch) for batch in model.seen], journal["changes"], windows


@pytest.fixture(scope="module")
def in_flight(tmp_path_factory):
    """A run that stops while a change is announced, and those that go on from there."""
    path = str(tmp_path_factory.mktemp("in_flight") / "stopped.ckpt")
    cases = {
        "stopped": (_balanced, path, False, {}),
        "resumed": (_balanced, path, True, {"mode": "observe"}),
        "bounded": (_balanced, path, True, {"mode": "observe", "min_per_rank": [14, 14]}, 16),
    }
    return SharedRanks(cases, world_size=2)


def test_a_change_that_was_announced_before_the_stop_holds_from_the_same_batch_after_it(in_flight):
    before, after = in_flight["stopped"], in_flight["resumed"]
    for (seen, changes, windows), (seen_after, changes_after, windows_after) in zip(before, after, strict=True):
        assert len(seen) == 8
        assert changes_after == changes
        assert windows_after[: len(windows)] == windows
        assert len(windows_after) > len(windows)
        sizes = [change["sizes"] for change in changes]
        own = 0 if seen_after[-1] == sizes[1][0] else 1
        moved = changes[1]["batch"] - len(seen)
        assert moved == 4  # the worker was that far ahead
        assert seen_after[: moved + 1] == [sizes[0][own]] * moved + [sizes[1][own]]


def test_bounds_that_are_tightened_at_a_resume_hold_at_once(in_flight):
    for seen, changes, _ in in_flight["bounded"]:
        assert {*seen[4:]} <= {14, 18, 16}
        assert all(min(change["sizes"]) >= 14 for change in changes if change["batch"] >= 8)


def _norm(rank, options):
    model = Fit(net=network(norm=True))
    partition = AdaptivePartition(**options)
    fit(ddp(), 2, model, loader_of(4 * BATCH), partition)
    return partition.sizes


def test_with_batch_norm_no_rank_gets_a_single_sample(of_two):
    assert of_two["norm"] == [(2, 10)] * 2
    assert of_two["norm, bound"] == [(3, 9)] * 2


def _norm_with_tail(rank, tail):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition = AdaptivePartition(mode="fixed", shares=[1, 1])
        fit(ddp(), 2, Fit(net=network(norm=True)), loader_of(3 * BATCH + 3, tail=tail), partition, max_steps=2)
    return [str(each.message) for each in caught if "BatchNorm cannot train" in str(each.message)]


def test_a_last_batch_that_batch_norm_would_refuse_is_told_of_at_the_start(of_two):
    (message,), _ = of_two["norm", "keep"]
    assert "3 samples for 2 ranks" in message
    assert "tail='drop'" in message
    assert of_two["norm", "drop"] == [[], []]


def _norm_and_moves(rank):
    partition, model = AdaptivePartition(mode="fixed", batch_sizes=[10, 2]), Fit(net=network(norm=True))
    fit(ddp(), 2, model, loader_of(3 * BATCH + 5), partition)
    return [len(batch) for batch in model.seen]


def test_the_least_share_holds_in_a_last_batch_that_has_as_many(of_two):
    assert of_two["norm and moves"] == [[10, 10, 10, 3], [2, 2, 2, 2]]


def _messages(rank, options):
    seen = []
    end = recording.observe(lambda record: seen.append((record.kind, record.purpose, record.payload_bytes)))
    partition = AdaptivePartition(**{"window_steps": 5, "warmup_steps": 0, "min_gain": 0.9, **options})
    fit(ddp(), 2, Fit(), loader_of(13 * BATCH), partition, [CommProfiler(page=False)])
    end()
    kept = {purpose: partition.ledger.messages(purpose) for purpose in partition.ledger.purposes}
    return [each for each in seen if each[1] not in ("set_up", "instruments")], kept


MESSAGES = {"balance": ({}, 2), "observe": ({"mode": "observe"}, 2), "fixed": (UNEVEN, 0)}


@pytest.mark.parametrize("mode", MESSAGES)
def test_a_window_costs_one_message_of_48_bytes_a_rank(of_two, mode):
    expected = MESSAGES[mode][1]
    for seen, kept in of_two["messages", mode]:
        assert seen == [("all_gather", "partition", 48)] * expected
        assert kept == {"set_up": 4 + bool(expected), **({"partition": expected} if expected else {})}


def _twice(rank):
    partition = AdaptivePartition(**UNEVEN)
    lengths = []
    for batches in (3, 5):
        fit(ddp(), 2, Fit(), loader_of(batches * BATCH), partition)
        lengths.append(partition.journal.run["steps_per_epoch"])
    return lengths, str(partition.run_folder)


def test_a_callback_serves_a_second_fit_from_its_start():
    (lengths, folder), _ = launch(_twice, world_size=2)
    assert lengths == [3, 5]
    assert folder.endswith("run_1")


class OwnBackward(Fit):
    """Calls `backward` on the loss itself, which no hook of Lightning's sees."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        nn.functional.mse_loss(self.net(x), y).backward()
        optimizer.step()


def _own_backward(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ddp(), 2, OwnBackward(), loader_of(3 * BATCH), AdaptivePartition(**UNEVEN))
    return [str(each.message) for each in caught if "manual_backward" in str(each.message)]


def test_a_backward_that_cannot_be_weighted_is_told_of_once(of_two):
    on_rank_0, elsewhere = of_two["own backward"]
    assert len(on_rank_0) == 1
    assert elsewhere == []


class LogsMean(Fit):
    """Logs the mean loss of each step over ranks, as the card says."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = loss.detach() * AdaptivePartition.weight_of(self.trainer)
        self.log("mean_loss", value, sync_dist=True, on_step=True, batch_size=len(batch[0]))
        return loss


def _logs(rank):
    partition = AdaptivePartition(**UNEVEN)
    model, values = LogsMean(), []

    class Reads(Callback):
        def on_train_batch_end(self, runner, *args):
            values.append(float(runner.callback_metrics["mean_loss"]))

    fit(ddp(), 2, model, loader_of(3 * BATCH + 5), partition, [Reads()])
    return values


def _logged_names(rank):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _logs(rank)
    return [str(each.message) for each in caught if "plain mean" in str(each.message)]


def test_a_plain_mean_over_ranks_is_told_of_by_name(of_two):
    (message,), elsewhere = of_two["logged"]
    assert "'mean_loss'" in message
    assert "weight" in message
    assert elsewhere == []


def test_a_value_times_the_weight_is_logged_as_the_mean_over_the_samples_of_the_step(of_two):
    alone = Fit()
    fit("auto", 1, alone, loader_of(3 * BATCH + 5), None)
    for values in of_two["mean"]:
        assert values == pytest.approx(alone.losses, rel=1e-6)
