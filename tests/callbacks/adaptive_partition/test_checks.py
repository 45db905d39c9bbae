"""What cannot work is refused before training starts, alike on all ranks, with where, value, rule and way out."""

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.partition import BATCH, Fit, Points, ddp, fit, loader_of
from support.processes import launch, outcomes
from support.shared_ranks import SharedRanks
from support.training import network
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_comm import AdaptivePartition, CompressedDDPStrategy, NoSync, PartitionedLoader
from lightning_comm.callbacks.adaptive_partition.checks import set_up_problems

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there


@pytest.mark.parametrize(
    ("arguments", "must_say"),
    [
        ({"mode": "auto"}, ["mode", "'auto'", "'balance'", "'observe'", "'fixed'"]),
        ({"loss_reduction": "none"}, ["loss_reduction", "'none'", "'mean'", "'sum'"]),
        ({"shares": [1, -3]}, ["shares", "-3", ">= 0", "[1, 3]"]),
        ({"shares": [0, 0]}, ["shares", "[0, 0]", "not all 0"]),
        ({"shares": [1, float("nan")]}, ["shares", "nan", "finite"]),
        ({"shares": []}, ["shares", "[]", "not all 0"]),
        ({"shares": [1, 3], "batch_sizes": [3, 9]}, ["shares", "batch_sizes", "[3, 9]", "Leave out one"]),
        ({"batch_sizes": [0, 12]}, ["batch_sizes", "[0, 12]", ">= 1", "devices"]),
        ({"batch_sizes": [1.5, 12]}, ["batch_sizes", "1.5", "whole"]),
        ({"mode": "fixed"}, ["fixed", "shares", "batch_sizes", "balance"]),
        ({"min_per_rank": 0}, ["min_per_rank", "0", ">= 1"]),
        ({"max_per_rank": [4, 0]}, ["max_per_rank", "0", ">= 1"]),
        ({"max_per_rank": []}, ["max_per_rank", ">= 1"]),
        ({"window_steps": 0}, ["window_steps", "0", ">= 1"]),
        ({"warmup_steps": -1}, ["warmup_steps", "-1", ">= 0"]),
        ({"min_gain": 1.0}, ["min_gain", "1.0", "< 1"]),
        ({"min_gain": float("nan")}, ["min_gain", "nan"]),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(arguments, must_say):
    with pytest.raises(ValueError, match="AdaptivePartition") as caught:
        AdaptivePartition(**arguments)
    assert [word for word in must_say if word not in str(caught.value)] == []


def _refused(rank, options, make_loader, strategy, ranks):
    try:
        fit(strategy(), ranks, Fit(net=network()), make_loader(rank), AdaptivePartition(**options), max_epochs=1)
    except (ValueError, MisconfigurationException) as error:
        return type(error).__name__, str(error)
    return "none", "nothing was refused"


def _whole(rank):
    return loader_of(4 * BATCH)


def _with_a_distributed_sampler(rank):
    return DataLoader(Points(40), batch_size=6, sampler=DistributedSampler(Points(40), 2, rank))


def _in_own_batches(rank):
    return DataLoader(Points(40), batch_sampler=BatchSampler(range(40), 6, False))


def _plain(rank):
    return DataLoader(Points(40), batch_size=6)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Points(12)[k] for k in range(12))

    def __len__(self):
        return 12


def _stream(rank):
    return DataLoader(Stream(), batch_size=6)


def _of_another_length(rank):
    return loader_of(4 * BATCH + rank)


def _of_another_seed(rank):
    return loader_of(4 * BATCH, seed=rank)


def _smaller_than_ranks(rank):
    return loader_of(8, batch=1)


def _merged(rank):
    return loader_of(4 * BATCH + 5, tail="merge")


def _two_sizes(rank):
    return CombinedLoader([loader_of(4 * BATCH), loader_of(40, batch=8)])


def _two_with_a_tail(rank):
    return {"a": loader_of(4 * BATCH), "b": loader_of(4 * BATCH + 1)}


class ByRank:
    """A sampler that is not global."""

    def __init__(self, rank: int, length: int) -> None:
        self.offset, self.length = rank, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter([(index + self.offset) % self.length for index in range(self.length)])


def _by_rank(rank):
    return PartitionedLoader(Points(40), BATCH, sampler=ByRank(rank, 40))


MISFITS = [
    ({"shares": [1, 2, 3]}, _whole, ["shares", "[1, 2, 3]", "2 ranks", "devices x num_nodes"]),
    ({"max_per_rank": [8]}, _whole, ["max_per_rank", "[8]", "2 ranks"]),
    ({"batch_sizes": [4, 9]}, _whole, ["batch_sizes", "[4, 9]", "13", "12", "global_batch_size=13", "shares"]),
    ({"batch_sizes": [2, 10], "max_per_rank": 9}, _whole, ["batch_sizes", "[2, 10]", "[9, 9]"]),
    ({"min_per_rank": 7}, _whole, ["min_per_rank", "7", "12", "14", "global_batch_size"]),
    ({"max_per_rank": [4, 4]}, _whole, ["max_per_rank", "(4, 4)", "12", "8"]),
    ({"min_per_rank": 5, "max_per_rank": 4}, _whole, ["min_per_rank", "max_per_rank", "5", "4"]),
    ({}, _smaller_than_ranks, ["2 ranks", "1 sample", "global_batch_size"]),
    ({"max_per_rank": 7}, _merged, ["max_per_rank", "merge", "17", "14", "keep"]),
    ({}, _plain, ["PartitionedLoader", "DataLoader", "from_dataloader"]),
    ({}, _in_own_batches, ["made by BatchSampler", "PartitionedLoader(dataset, global_batch_size=…)", "`sampler`"]),
    ({}, _with_a_distributed_sampler, ["PartitionedLoader", "DistributedSampler", "from_dataloader", "left out"]),
    ({}, _stream, ["IterableDataset", "Stream", "order", "__getitem__"]),
    ({}, _of_another_length, ["rank 1", "rank 0", "samples is 49 and 48", "same dataset"]),
    ({}, _of_another_seed, ["rank 1", "rank 0", "seed is 1 and 0"]),
    ({}, _two_sizes, ["global_batch_size", "[12, 8]", "one plan", "ConcatDataset"]),
    ({}, _two_with_a_tail, ["one plan", "49", "tail='drop'"]),
    ({}, _by_rank, ["sampler", "[1]", "another order", "global"]),
    ({"mode": "observe", "replay": "nowhere.json"}, _whole, ["replay", "nowhere.json", "leave `replay` out"]),
]


@pytest.fixture(scope="module")
def misfits():
    cases = {k: (_refused, options, make, ddp, 2) for k, (options, make, _) in enumerate(MISFITS)}
    return SharedRanks(cases, world_size=2)


@pytest.mark.parametrize("number", range(len(MISFITS)), ids=lambda k: f"{MISFITS[k][1].__name__} {MISFITS[k][0]}")
def test_what_does_not_fit_is_refused_on_all_ranks(misfits, number):
    *_, must_say = MISFITS[number]
    for kind, message in misfits[number]:
        assert kind != "none"
        assert "AdaptivePartition" in message
        assert [word for word in must_say if word not in message] == [], message


def _no_sync():
    return CompressedDDPStrategy(NoSync(), timeout=timedelta(seconds=30))


def _post_local():
    return DDPStrategy(model_averaging_period=4, timeout=timedelta(seconds=30))


@pytest.mark.parametrize(
    ("strategy", "must_say"),
    [
        (_no_sync, ["NoSync", "averages nothing", "Leave", "leave"]),
        (_post_local, ["model_averaging_period", "4", "LocalUpdateStrategy"]),
        (FSDPStrategy, ["FSDPStrategy", "'ddp'", "'qsr'"]),
    ],
)
def test_strategies_that_cannot_honour_it_are_refused(strategy, must_say):
    if strategy is FSDPStrategy:  # which does not run on a CPU, so its check is called as it would be
        given = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
        message = " ".join(set_up_problems(given, Fit(net=network()), AdaptivePartition().settings))
    else:
        [(kind, message), _] = launch(_refused, {}, _whole, strategy, 2, world_size=2)
        assert kind == "RefusedSetUp"
    assert [word for word in must_say if word.lower() not in message.lower()] == [], message


def test_two_of_them_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdaptivePartition`"):
        Trainer(callbacks=[AdaptivePartition(), AdaptivePartition()], logger=False)


def _journal(rank, folder):
    fit("ddp", 2, Fit(), loader_of(4 * BATCH), AdaptivePartition(mode="fixed", batch_sizes=[3, 9], folder=folder))


def _empty(content):
    content.clear()


def _renamed(content):
    content["changes"][0]["sizes"] = [3, 8]


def _nothing(content):
    pass


CHANGED = {
    "seed": (_nothing, lambda rank: loader_of(4 * BATCH, seed=4), ["seed", "3 in the journal", "4 in this run"]),
    "samples": (_nothing, lambda rank: loader_of(5 * BATCH), ["samples", "48", "60"]),
    "cut off": (_empty, _whole, ["journal.json", "JSON"]),
    "sizes": (_renamed, _whole, ["journal.json", "sum to 11"]),
}


@pytest.fixture(scope="module")
def replays(tmp_path_factory):
    """A journal, and runs that are told to replay it after a change."""
    folder = tmp_path_factory.mktemp("journals")
    launch(_journal, str(folder / "one"), world_size=2)
    journal = folder / "one" / "run_0" / "journal.json"
    cases = {}
    for name, (change, make_loader, _) in CHANGED.items():
        path = folder / name / "journal.json"
        path.parent.mkdir()
        content = json.loads(journal.read_text())
        change(content)
        path.write_text(json.dumps(content) if content else "{")
        cases[name] = (_refused, {"replay": str(path)}, make_loader, ddp, 2)
    return journal, SharedRanks(cases, world_size=2)


@pytest.mark.parametrize("name", CHANGED)
def test_a_journal_of_another_run_or_a_damaged_one_is_refused(replays, name):
    for kind, message in replays[1][name]:
        assert kind == "ValueError"
        assert [word for word in ["replay", *CHANGED[name][2]] if word not in message] == [], message


def test_a_journal_of_other_ranks_is_refused(replays):
    options = {"replay": str(replays[0])}
    for kind, message in launch(_refused, options, _whole, ddp, 3, world_size=3):
        assert kind == "ValueError"
        assert "ranks: 2 in the journal, 3 in this run" in message


def _fails_on_one(rank):
    loader = _plain(rank) if rank == 1 else _whole(rank)
    fit(ddp(), 2, Fit(), loader, AdaptivePartition())


def test_a_loader_of_the_wrong_kind_on_one_rank_is_named_on_both():
    for _, error in outcomes(_fails_on_one, world_size=2):
        assert error is not None
        assert "(on rank 1)" in error
