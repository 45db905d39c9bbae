"""ReduceLROnPlateau sees the same value on all ranks, under all of our strategies."""

import math
import warnings

import numpy as np
import pytest
import torch
from support.cyclic import cyclic, deep
from support.processes import launch
from support.training import Regression, loader, local_update, trainer, weights

from lightning_comm import CompressedDDPStrategy, FixedPeriod

STRATEGIES = {
    "cyclic": cyclic,
    "rounds": lambda: local_update(FixedPeriod(4)),
    "gradients": lambda: local_update(FixedPeriod(4), gradient_steps=100),
    "compressed": lambda: CompressedDDPStrategy("bf16"),
}
EPOCHS, STEPS = 3, 4
FREQUENCIES = {"epoch": 1, "step": 3}
VALUES = {  # by epoch and rank
    "apart": [(1.0, 4.0, 1.0), (2.0, 3.0, 1.5), (5.0, 1.0, 0.0)],
    "equal": [(0.1, 0.1, 0.1), (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)],
    "on rank 0 alone": [(1.0, None, None), (0.5, None, None), (2.0, None, None)],
    "not a number on one": [(1.0, math.nan, 1.0), (1.0, 1.0, 2.5), (math.inf, 1.0, 1.0)],
}


class Watches(Regression):
    """Logs what the table says, and keeps what each of its schedulers is given."""

    def __init__(self, rank, values, intervals):
        super().__init__(deep(6))
        self.rank, self.values, self.given = rank, values, {each: [] for each in intervals}

    def value(self):
        each = self.values[self.trainer.current_epoch][self.rank]
        return None if each is None else torch.tensor(each, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        if (value := self.value()) is not None:
            self.log("watched", value, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler, metric):
        self.given[scheduler.interval].append(float(metric))
        scheduler.step(metric)

    def scheduler(self, optimizer, interval):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        scheduler.interval = interval
        when = {"interval": interval, "frequency": FREQUENCIES[interval], "monitor": f"watched_{interval}"}
        return {"scheduler": scheduler, **when}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [self.scheduler(optimizer, each) for each in self.given]


def _fit(rank, strategy, values, intervals):
    """Return of each scheduler what it was given and what was said of it, and how the run ended."""
    module = Watches(rank, VALUES[values], intervals)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = trainer(STRATEGIES[strategy](), 3, max_epochs=EPOCHS)
        runner.fit(module, loader(STEPS, rank))
    texts = [str(each.message) for each in caught if "ReduceLROnPlateau" in str(each.message)]
    said = {each: [text for text in texts if f"`monitor`='watched_{each}'" in text] for each in intervals}
    assert sum(map(len, said.values())) == len(texts)
    return module.given, said, runner.optimizers[0].param_groups[0]["lr"], weights(module)


def _all(rank, world_size):
    answers = {("cyclic", values): _fit(rank, "cyclic", values, ["epoch"]) for values in VALUES if values != "apart"}
    return answers | {(name, "apart"): _fit(rank, name, "apart", ["epoch", "step"]) for name in STRATEGIES}


@pytest.fixture(scope="module")
def answers():
    return launch(_all, 3, world_size=3)


@pytest.fixture(scope="module")
def endings(answers):
    """How the runs of rank 0 ended, once those of the others have ended equally."""
    for key, (_, _, rate, final) in answers[0].items():
        assert rate < 0.1, key
        for other in answers[1:]:
            assert rate == other[key][2], key
            assert all(map(np.array_equal, final, other[key][3])), key
    return answers[0]


def test_all_ranks_lower_their_rates_by_the_mean_of_what_they_watch(answers, endings):
    for key, (given, said, *_) in endings.items():
        rows = VALUES[key[1]]
        known = [[value for value in row if value is not None] for row in rows]
        np.testing.assert_array_equal(
            given["epoch"], [values[0] if len(set(values)) == 1 else sum(values) / len(values) for values in known]
        )
        for others_given, others_said, *_ in (answers[rank][key] for rank in (1, 2)):
            np.testing.assert_array_equal(given["epoch"], others_given["epoch"])
            assert others_said["epoch"] == [], key
        assert len(said["epoch"]) == (key[1] != "equal"), key
        for text in said["epoch"]:
            assert "the mean over the ranks" in text
            assert "sync_dist=True" in text
    assert "(1, 4, 1)" in endings["rounds", "apart"][1]["epoch"][0]
    assert "(1, none, none)" in endings["cyclic", "on rank 0 alone"][1]["epoch"][0]
    assert endings["rounds", "apart"][1]["epoch"][0].startswith("LocalUpdateStrategy: ")
    assert endings["compressed", "apart"][1]["epoch"][0].startswith("CompressedDDPStrategy: ")


def test_a_scheduler_that_is_stepped_by_steps_is_given_the_mean_too(answers, endings):
    for name in STRATEGIES:
        for given, *_ in (of_rank[name, "apart"] for of_rank in answers):
            assert given["step"] == [2.0, 6.5 / 3, 2.0], name
        assert "At each of its steps ranks wait for each other" in endings[name, "apart"][1]["step"][0]
