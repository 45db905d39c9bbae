"""Shares that move by what is measured on real ranks, the journal, and its replay."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.partition import Fit, fit, loader_of
from support.processes import launch
from support.training import network, weights

from lightning_comm import AdaptivePartition, CompressedDDPStrategy, Int8
from lightning_comm.core.adaptive_partition.plan import Place

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there

TOTAL = 32
SLOW = 500.0  # samples per second; 16 samples take 32 ms


class ChangeSpeed(Callback):
    """Gives ranks other speeds from a batch on."""

    def __init__(self, at: int, speeds: list[float]) -> None:
        self.at, self.speeds = at, speeds

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        if runner.global_step == self.at:
            module.speed = self.speeds[runner.global_rank]


def _balance(rank, speeds, change, strategy, options, steps, loader):
    partition = AdaptivePartition(**{"window_steps": 6, "warmup_steps": 2, **options})
    model = Fit(net=network(torch.float64), speed=speeds[rank])
    changes = [] if change is None else [ChangeSpeed(*change)]
    data = loader_of(TOTAL * 40, batch=TOTAL, **loader)
    strategy = CompressedDDPStrategy(Int8(), timeout=timedelta(seconds=60)) if strategy == "int8" else strategy
    fit(strategy, len(speeds), model, data, partition, changes, max_steps=steps, max_epochs=9)
    journal = partition.journal.to_dict()
    return [len(batch) for batch in model.seen], journal, weights(model)


def test_a_rank_of_three_times_the_speed_gets_three_times_the_samples():
    ranks = launch(_balance, [SLOW, 3 * SLOW], None, "ddp", {}, 30, {}, world_size=2)
    sizes = [seen for seen, _, _ in ranks]
    assert sizes[0][:8] == [16] * 8  # a window of six batches after two, on the same step on both ranks
    assert [one + other for one, other in zip(*sizes, strict=True)] == [TOTAL] * 30
    assert sizes[0][-1] in (7, 8, 9)
    changes = [journal["changes"] for _, journal, _ in ranks]
    assert changes[0] == changes[1]
    assert changes[0][1]["batch"] == 8
    assert "times as fast" in changes[0][1]["why"]


def test_under_a_compression_whose_hook_waits_the_slow_rank_is_told_from_the_fast_one():
    ranks = launch(_balance, [3 * SLOW, SLOW], None, "int8", {}, 30, {}, world_size=2)
    assert ranks[1][0][-1] in (7, 8, 9)


def test_workers_that_load_ahead_only_delay_the_change():
    loader = {"num_workers": 2, "prefetch_factor": 2}
    ranks = launch(_balance, [SLOW, 3 * SLOW], None, "ddp", {}, 40, loader, world_size=2)
    assert ranks[0][1]["changes"][1]["batch"] == 12
    assert ranks[0][0][-1] in (7, 8, 9)


def test_a_rank_that_becomes_slow_in_mid_run_gets_less():
    change = (30, [SLOW, 3 * SLOW])
    ranks = launch(_balance, [SLOW, SLOW], change, "ddp", {}, 80, {}, world_size=2)
    assert ranks[0][0][30] in (15, 16, 17)
    assert ranks[0][0][-1] in (7, 8, 9)
    places = [(each["epoch"], each["batch"]) for each in ranks[0][1]["changes"][1:]]
    assert all(Place(0, 30) < Place(*place) for place in places)


def test_bounds_hold_while_shares_move():
    options = {"min_per_rank": [12, 1], "max_per_rank": [32, 18]}
    ranks = launch(_balance, [SLOW, 3 * SLOW], None, "ddp", options, 40, {}, world_size=2)
    assert ranks[0][0][-1] == 14


def test_observing_moves_nothing_and_says_what_could_be_gained():
    ranks = launch(_balance, [SLOW, 3 * SLOW], None, "ddp", {"mode": "observe"}, 30, {}, world_size=2)
    assert {*ranks[0][0], *ranks[1][0]} == {16}
    windows = ranks[0][1]["windows"]
    assert len(windows) == 4
    assert len(ranks[0][1]["changes"]) == 1
    # 32 ms become 16 ms, with some milliseconds that both have
    assert 0.3 < windows[-1]["gain"] < 0.5
    assert windows[-1]["best_sizes"][0] in (7, 8, 9)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_changes_the_busy_time_of_the_other_by_less_than_a_tenth(slow):
    fast = 100.0  # 16 samples take 160 ms, so that what the machine adds is little
    speeds = [fast, fast]
    alike = launch(_balance, speeds, None, "ddp", {"mode": "observe"}, 10, {}, world_size=2)
    speeds[slow] = fast / 3
    unlike = launch(_balance, speeds, None, "ddp", {"mode": "observe"}, 10, {}, world_size=2)
    before, after = (ranks[0][1]["windows"][-1]["busy_s"] for ranks in (alike, unlike))
    assert abs(after[1 - slow] / before[1 - slow] - 1) < 0.1
    assert 2.7 < after[slow] / before[slow] < 3.3


def test_a_replayed_journal_repeats_the_run_bit_for_bit_whatever_the_speeds(tmp_path):
    folder = tmp_path / "first"
    options = {"folder": str(folder)}
    first = launch(_balance, [SLOW, 3 * SLOW], (20, [3 * SLOW, SLOW]), "ddp", options, 60, {}, world_size=2)
    [path] = folder.glob("run_*/journal.json")
    assert len(json.loads(Path(path).read_text())["changes"]) > 2
    again = launch(_balance, [SLOW, SLOW], None, "ddp", {"replay": str(path)}, 60, {"num_workers": 2}, world_size=2)
    for (seen, _, one), (seen_again, journal, other) in zip(first, again, strict=True):
        assert seen == seen_again
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert {change["why"] for change in journal["changes"]} == {"replay"}
        assert journal["windows"]  # it is measured all the same


def test_one_process_can_be_observed():
    [(_, journal, _)] = launch(_balance, [SLOW], None, "auto", {}, 20, {}, world_size=1)
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
    fit("ddp", 2, model, loader_of(TOTAL * 40, batch=TOTAL), partition, max_steps=150, max_epochs=9)
    return len(partition.journal.changes) - 1


def test_jitter_alone_moves_nothing():
    assert max(launch(_jitter, world_size=2)) <= 1
