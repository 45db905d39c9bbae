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
EPOCHS = 3
VALUES = {  # by epoch and rank
    "apart": [(1.0, 4.0, 1.0), (2.0, 3.0, 1.5), (5.0, 1.0, 0.0)],
    "equal": [(0.1, 0.1, 0.1), (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)],
    "on rank 0 alone": [(1.0, None, None), (0.5, None, None), (2.0, None, None)],
    "not a number on one": [(1.0, math.nan, 1.0), (1.0, 1.0, 2.5), (math.inf, 1.0, 1.0)],
}


class Watches(Regression):
    """Logs what the table says, and keeps what its scheduler is given."""

    def __init__(self, rank, values, interval="epoch", frequency=1):
        super().__init__(deep(6))
        self.rank, self.values, self.given = rank, values, []
        self.interval = {"interval": interval, "frequency": frequency}

    def value(self):
        each = self.values[self.trainer.current_epoch][self.rank]
        return None if each is None else torch.tensor(each, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        if (value := self.value()) is not None:
            self.log("watched", value, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler, metric):
        self.given.append(metric)
        scheduler.step(metric)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        monitor = "watched_epoch" if self.interval["interval"] == "epoch" else "watched_step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor, **self.interval}}


def _fit(rank, strategy, values, interval="epoch", frequency=1, steps=2):
    module = Watches(rank, VALUES[values], interval, frequency)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = trainer(STRATEGIES[strategy](), 3, max_epochs=EPOCHS)
        runner.fit(module, loader(steps, rank))
    said = [str(each.message) for each in caught if "ReduceLROnPlateau" in str(each.message)]
    return [float(each) for each in module.given], runner.optimizers[0].param_groups[0]["lr"], said, weights(module)


def _all(rank, world_size):
    every = {("cyclic", values): _fit(rank, "cyclic", values) for values in VALUES}
    every |= {(name, "apart"): _fit(rank, name, "apart") for name in STRATEGIES if name != "cyclic"}
    return every, {name: _fit(rank, name, "apart", "step", 3, steps=4) for name in STRATEGIES}


@pytest.fixture(scope="module")
def answers():
    return launch(_all, 3, world_size=3)


def test_all_ranks_lower_their_rates_by_the_mean_of_what_they_watch(answers):
    ranks = [by_epoch for by_epoch, _ in answers]
    for key, (given, rate, said, final) in ranks[0].items():
        rows = VALUES[key[1]]
        known = [[value for value in row if value is not None] for row in rows]
        np.testing.assert_array_equal(
            given, [values[0] if len(set(values)) == 1 else sum(values) / len(values) for values in known]
        )
        for rank, (others_given, others_rate, others_said, others_final) in enumerate(ranks[k][key] for k in (1, 2)):
            np.testing.assert_array_equal(given, others_given)
            assert rate == others_rate < 0.1, key
            assert others_said == [], rank
            assert all(map(np.array_equal, final, others_final)), key
        assert len(said) == (key[1] != "equal"), key
        for text in said:
            assert "monitor`='watched_epoch'" in text
            assert "the mean over the ranks" in text
            assert "sync_dist=True" in text
    assert "(1, 4, 1)" in ranks[0]["rounds", "apart"][2][0]
    assert "(1, none, none)" in ranks[0]["cyclic", "on rank 0 alone"][2][0]
    assert ranks[0]["rounds", "apart"][2][0].startswith("LocalUpdateStrategy: ")
    assert ranks[0]["compressed", "apart"][2][0].startswith("CompressedDDPStrategy: ")


def test_a_scheduler_that_is_stepped_by_steps_is_given_the_mean_too(answers):
    ranks = [by_step for _, by_step in answers]
    for name, (given, rate, said, final) in ranks[0].items():
        assert given == [2.0, 6.5 / 3, 2.0], name
        for other in ranks[1:]:
            assert given == other[name][0], name
            assert rate == other[name][1], name
            assert all(map(np.array_equal, final, other[name][3])), name
        assert "At each of its steps ranks wait for each other" in said[0]
