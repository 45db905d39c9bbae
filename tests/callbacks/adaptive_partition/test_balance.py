"""Shares that move by what is measured on real ranks: all of this is judged by seconds."""

import time
import warnings
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from support.partition import SLOW, Fit, Points, balance, ddp, fit, loader_of
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import local_update, network

from lightning_comm import AdaptivePartition, CommProfiler, CompressedDDPStrategy, FixedPeriod, Int8, PartitionedLoader
from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.transport import recording

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there

TOTAL = 32
UNEQUAL = [SLOW, 3 * SLOW]
# Workers share the processors with the ranks, which adds 8 ms to each of their steps on two cores.
BESIDE_WORKERS = [speed / 2 for speed in UNEQUAL]
FAST = 130.0  # 16 samples take 123 ms, so that what the machine adds is little
BUSY = {"steps": 6, "mode": "observe", "window_steps": 4, "warmup_steps": 1}
CASES = {
    "three times": partial(balance, speeds=UNEQUAL, steps=24),
    "int8": lambda rank: balance(
        rank, UNEQUAL[::-1], 24, strategy=CompressedDDPStrategy(Int8(), timeout=timedelta(seconds=60))
    ),
    "workers": partial(balance, speeds=BESIDE_WORKERS, steps=28, loader={"num_workers": 2, "prefetch_factor": 2}),
    "becomes slow": partial(balance, speeds=[SLOW, SLOW], steps=50, change=(16, UNEQUAL)),
    "bounds": partial(balance, speeds=UNEQUAL, steps=20, min_per_rank=[12, 1], max_per_rank=[32, 18]),
    "observed": partial(balance, speeds=UNEQUAL, steps=14, mode="observe"),
    "alike": partial(balance, speeds=[FAST, FAST], **BUSY),
    "slow 0": partial(balance, speeds=[FAST / 3, FAST], **BUSY),
    "slow 1": partial(balance, speeds=[FAST, FAST / 3], **BUSY),
}


@pytest.fixture(scope="module")
def balanced():
    """By its name for each rank the sizes of its batches, the journal and the weights."""
    return SharedRanks({name: (case,) for name, case in CASES.items()}, world_size=2)


def test_a_rank_of_three_times_the_speed_gets_three_times_the_samples(balanced):
    ranks = balanced["three times"]
    sizes = [seen for seen, _, _ in ranks]
    assert sizes[0][:8] == [16] * 8  # a window of six batches after two, on the same step on both ranks
    assert [one + other for one, other in zip(*sizes, strict=True)] == [TOTAL] * 24
    assert sizes[0][-1] in (7, 8, 9)
    changes = [journal["changes"] for _, journal, _ in ranks]
    assert changes[0] == changes[1]
    assert changes[0][1]["batch"] == 8
    assert "times as fast" in changes[0][1]["why"]


def test_under_a_compression_whose_hook_waits_the_slow_rank_is_told_from_the_fast_one(balanced):
    assert balanced["int8"][1][0][-1] in (7, 8, 9)


def test_workers_that_load_ahead_only_delay_the_change(balanced):
    ranks = balanced["workers"]
    assert ranks[0][1]["changes"][1]["batch"] == 12
    assert ranks[0][0][-1] in (7, 8, 9)


def test_a_rank_that_becomes_slow_in_mid_run_gets_less(balanced):
    ranks = balanced["becomes slow"]
    assert ranks[0][0][16] in (15, 16, 17)
    assert ranks[0][0][-1] in (7, 8, 9)
    places = [(each["epoch"], each["batch"]) for each in ranks[0][1]["changes"][1:]]
    assert all(BatchIndex(0, 16) < BatchIndex(*place) for place in places)


def test_bounds_hold_while_shares_move(balanced):
    assert balanced["bounds"][0][0][-1] == 14


def test_observing_moves_nothing_and_says_what_could_be_gained(balanced):
    ranks = balanced["observed"]
    assert {*ranks[0][0], *ranks[1][0]} == {16}
    windows = ranks[0][1]["windows"]
    assert len(windows) == 2
    assert len(ranks[0][1]["changes"]) == 1
    # 32 ms become 16 ms, with some milliseconds that both have
    assert 0.3 < windows[-1]["gain"] < 0.5
    assert windows[-1]["best_sizes"][0] in (7, 8, 9)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_changes_the_busy_time_of_the_other_by_less_than_a_tenth(balanced, slow):
    before, after = (balanced[name][0][1]["windows"][-1]["busy_s"] for name in ("alike", f"slow {slow}"))
    assert abs(after[1 - slow] / before[1 - slow] - 1) < 0.1
    assert 2.7 < after[slow] / before[slow] < 3.3


def test_one_process_can_be_observed():
    [(_, journal, _)] = launch(partial(balance, speeds=[SLOW], steps=9, strategy="auto"), world_size=1)
    assert journal["windows"][-1]["sizes"] == [TOTAL]
    assert journal["windows"][-1]["gain"] == 0


class Jitter(Fit):
    """Takes 20 ms a batch of 16, more or less by a tenth, whoever it is."""

    def training_step(self, batch, batch_idx):
        self.speed = 16 / 0.02 * float(1 + 0.1 * self.jitter.standard_normal())
        return super().training_step(batch, batch_idx)


def _jitter(rank):
    partition = AdaptivePartition(window_steps=10)
    model = Jitter(net=network(torch.float64))
    model.jitter = np.random.default_rng(rank)
    fit("ddp", 2, model, loader_of(TOTAL * 40, batch=TOTAL), partition, max_steps=110, max_epochs=9)
    return len(partition.journal.changes) - 1


def test_jitter_alone_moves_nothing():
    assert max(launch(_jitter, world_size=2)) <= 1


# ---- messages in the forward -----------------------------------------------------------------------------------------


class Logs(Fit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return loss


class Gathers(Fit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.all_gather(loss.detach())
        return loss


class Slowly(Points):
    """Data that take a rank some time to fetch."""

    pause_s = 0.0

    def __getitem__(self, index):
        time.sleep(self.pause_s)
        return super().__getitem__(index)


def _balanced(rank, kind, profiled):
    partition = AdaptivePartition(window_steps=6, warmup_steps=2)
    if kind == "norm":  # DDP broadcasts its buffers at the start of a forward, where others wait for rank 0's data
        data = Slowly(TOTAL * 24)
        data.pause_s = [1 / SLOW, 1 / SLOW / 3][rank]
        model, loader = Fit(net=network(norm=True)), PartitionedLoader(data, TOTAL)
    else:
        model = {"log": Logs, "gather": Gathers}[kind](speed=UNEQUAL[rank])
        loader = loader_of(TOTAL * 24, batch=TOTAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(ddp(), 2, model, loader, partition, [CommProfiler(page=False)] if profiled else [])
    return partition.sizes


WAITS = [(kind, profiled) for kind in ("log", "gather", "norm") for profiled in (False, True)]
WAITS_OFTEN = [("log", True), ("gather", False), ("norm", False)]


@pytest.fixture(scope="module")
def waiting(request):
    cases = WAITS if request.config.getoption("exhaustive") else WAITS_OFTEN
    return SharedRanks({case: (_balanced, *case) for case in cases}, world_size=2)


@pytest.mark.parametrize(
    ("kind", "profiled"),
    [pytest.param(*case, marks=() if case in WAITS_OFTEN else pytest.mark.exhaustive) for case in WAITS],
)
def test_ranks_that_wait_for_each_other_in_the_forward_are_told_apart_all_the_same(waiting, kind, profiled):
    sizes, other = waiting[kind, profiled]
    assert sizes == other
    assert sizes[0] in (6, 7, 8, 9, 10)


# ---- local updates ---------------------------------------------------------------------------------------------------


def _in_rounds(rank, period):
    sent = []
    end = recording.observe(lambda record: sent.append((record.purpose, strategy.rounds_done)))
    strategy = local_update(FixedPeriod(period))
    model = Fit(speed=UNEQUAL[rank])
    partition = AdaptivePartition(window_steps=6, warmup_steps=2)
    fit(strategy, 2, model, loader_of(TOTAL * 40, batch=TOTAL), partition)
    end()
    windows = [(each.epoch, each.batch) for each in partition.journal.windows]
    return [len(batch) for batch in model.seen], windows, [p for p, _ in sent].count("partition")


@pytest.mark.parametrize("period", [4, 10])
def test_shares_are_balanced_where_ranks_have_just_met(period):
    ranks = launch(_in_rounds, period, world_size=2)
    assert ranks[0][0][-1] in (7, 8, 9)
    for _, windows, messages in ranks:
        assert windows
        assert len(windows) == messages
        assert all((batch + 1) % period == 0 for _, batch in windows)
