"""The line at the start leaves the run as it is, never fails it, and says what it does not know."""

import warnings
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, product
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from support.lines import listening
from support.processes import launch
from support.training import Regression, loader, local_update, trainer
from torch.optim import lr_scheduler

from lightning_comm import Averaging, FixedPeriod, Int8, QuadraticPeriod
from lightning_comm.core.local_update import PeriodRule, RoundClock, ends_of_equal_rounds, ends_to_come
from lightning_comm.strategies.common import run_length
from lightning_comm.strategies.local_update import calendar
from lightning_comm.strategies.local_update import period_setup as auto_period

STEPS = 6
TABLE = (1.0, 0.5, 0.25)
ASKED = []


class Watched(Regression):
    """Notes the learning rate of each step, and how often the user's schedule was asked."""

    def __init__(self):
        super().__init__()
        self.asked, self.rates = [], []

    def on_train_batch_start(self, *_):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def scheduler(self, optimizer):
        raise NotImplementedError

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class ByIterator(Watched):
    def scheduler(self, optimizer):
        factors = (1.0 / k for k in count(1))

        def factor(step):
            self.asked.append(step)
            return next(factors)

        return lr_scheduler.LambdaLR(optimizer, factor)


class OwnScheduler(lr_scheduler.LRScheduler):
    def __init__(self, optimizer, module):
        self.module = module
        super().__init__(optimizer)

    def get_lr(self):
        self.module.asked.append(self.last_epoch)
        return [base / (self.last_epoch + 1) for base in self.base_lrs]


class ByOwnScheduler(Watched):
    def scheduler(self, optimizer):
        return OwnScheduler(optimizer, self)


class ByOwnSchedulerWithin(Watched):
    def scheduler(self, optimizer):
        return lr_scheduler.ChainedScheduler([OwnScheduler(optimizer, self)])


def stateful(rank, world_size):
    said, found = listening(), []
    for kind in (ByIterator, ByOwnScheduler, ByOwnSchedulerWithin):
        module = kind()
        strategy = local_update(QuadraticPeriod(alpha=0.1, h_base=2))
        trainer(strategy, world_size).fit(module, loader(STEPS, rank))
        found.append((module.rates, len(module.asked)))
    return said, found


def test_schedulers_with_state_or_effects_are_not_asked_before_the_run_asks_them():
    (said, found), _ = launch(stateful, 2, world_size=2)
    for rates, asked in found:
        assert rates == pytest.approx([1 / k for k in range(1, STEPS + 1)])
        assert asked == STEPS + 1
    lines = [line for line in said if "optimizer steps on" in line]
    assert ["at most 3 synchronisations" in line and "rounds may be longer, since" in line for line in lines] == 3 * [
        True
    ]
    assert "LambdaLR's factor reads" in lines[0]
    assert "only OwnScheduler itself knows" in lines[1]


def by_alpha_auto(rank, world_size):
    module = ByIterator()
    try:
        trainer(local_update(QuadraticPeriod(h_base=2)), world_size).fit(module, loader(STEPS, rank))
    except ValueError as error:
        return str(error), module.asked
    return None


def test_a_coefficient_that_would_use_up_the_schedule_is_refused_and_the_schedule_left_as_it_was():
    for said, asked in launch(by_alpha_auto, 2, world_size=2):
        assert "`alpha='auto'` asks a LambdaLR" in said
        assert "factor uses up `factors`, a generator" in said
        assert "Give `alpha` as a number" in said
        assert asked == [0]


class Stops(Callback):
    def on_train_batch_end(self, runner, *_):
        runner.should_stop = runner.global_step >= 1


class ShortTable(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda epoch: TABLE[epoch])]


@dataclass(frozen=True)
class OwnRule(PeriodRule):
    h_base = 5  # of its own meaning

    def period_steps(self, *, lr, step):
        ASKED.append(step)
        return 2


def stopped(rank, world_size):
    said = listening()
    strategy = local_update(QuadraticPeriod(h_base=2))  # whose coefficient follows from the peak of the schedule
    runner = trainer(strategy, world_size, max_epochs=1000, callbacks=[Stops()])
    runner.fit(ShortTable(), loader(STEPS, rank))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(local_update(OwnRule()), world_size).fit(Regression(), loader(STEPS, rank))
    return said, runner.global_step, list(ASKED), [str(each.message) for each in warned]


def test_what_lies_beyond_an_early_stop_does_not_fail_the_run_and_a_rule_of_the_users_own_is_not_asked_ahead():
    (said, steps, asked, warned), _ = launch(stopped, 2, world_size=2)
    by_table, by_rule = (line for line in said if "optimizer steps on" in line)
    assert 1 <= steps < 3 * STEPS
    assert "at most 3,000 synchronisations" in by_table
    assert "the schedulers raise IndexError: tuple index out of range" in by_table
    assert asked == [0, 2, 4]
    assert f"at most {STEPS} synchronisations" in by_rule
    assert "only OwnRule itself knows" in by_rule
    assert not [each for each in warned if "stays constant" in each or "h_max" in each or "shortest period" in each]


class EverySecondStep(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        if batch_idx % 2:
            optimizer.step()


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


class TrainedNow(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.05)


class OwnInt8(Int8):
    pass


class OwnCheckpoint(ModelCheckpoint):
    pass


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


LINES = {
    "own steps": (EverySecondStep, {}, {}, ["at most 6 optimizer steps", "at most 3 sync", "as many steps under DDP"]),
    "max_time": (Regression, {}, {"max_time": "00:00:01:00"}, ["; unless `max_time` ends the run before."]),
    "unfreezing": (TrainedNow, {}, {"callbacks": Unfreezes}, ["; with the parameters that are trained now."]),
    "optimizer state": (
        lambda: Regression(optimizer=momentum),
        {"optimizer_state": "average"},
        {},
        ["; without the optimizer state, which is averaged too."],
    ),
    "own compression": (
        Regression,
        {"averaging": Averaging(compression=OwnInt8())},
        {},
        ["3 synchronisations, ", "; at most 1.2 kB", "; as if OwnInt8 sent all in full."],
    ),
    "by the clock": (
        Regression,
        {},
        {
            "callbacks": lambda: ModelCheckpoint("unused", train_time_interval=timedelta(hours=1)),
            "limit_val_batches": 1,
            "val_check_interval": timedelta(hours=1),
            "enable_checkpointing": True,
        },
        ["; besides averages for validations and checkpoints by the clock."],
    ),
    "own checkpoints": (
        Regression,
        {},
        {"callbacks": lambda: OwnCheckpoint("unused", every_n_epochs=9), "enable_checkpointing": True},
        ["; besides averages for checkpoints of OwnCheckpoint."],
    ),
    "rates by hand": (
        lambda: Regression(schedule=lambda step: 0.9**step),
        {"period": QuadraticPeriod(alpha=0.01, h_base=3)},
        {},
        ["optimizer steps on 2 ranks: 2 synchronisations", "; as long as only the schedulers change the learning rate"],
    ),
    "too long": (
        Regression,
        {},
        {
            "max_epochs": 10**9,
            "limit_val_batches": 1,
            "callbacks": Stops,
            "val_check_interval": 4,
            "num_sanity_val_steps": 0,
        },
        ["the run of 6,000,000,000 steps is too long to look ahead. A synchronisation, every 2 steps, sends 0.4 kB"],
    ),
}


@patch.object(calendar, "_MOST_EVENTS", 1000)  # all that is looked at of a run that is too long
def reserved(rank, world_size):
    said, sent = listening(), []
    for make, ours, given, _ in LINES.values():
        given = {key: value() if key == "callbacks" else value for key, value in given.items()}
        strategy = local_update(**{"period": FixedPeriod(2), **ours})
        trainer(strategy, world_size, **given).fit(make(), loader(STEPS, rank), loader(1, rank))
        sent.append(sum(map(strategy.ledger.wire_bytes, ("parameters", "evaluation", "checkpoint"))))
    return said, sent


def test_the_line_names_what_it_rests_on_and_what_it_does_not_count():
    (said, sent), _ = launch(reserved, 2, world_size=2)
    lines = [line for line in said if "averages for validations" in line or "an average for a validation" in line]
    assert len(lines) == len(LINES)
    for (name, (*_, words)), line in zip(LINES.items(), lines, strict=True):
        assert [word for word in words if word not in line] == [], (name, line)
    assert 0 < sent[0] <= 1200  # what "at most" promises
    assert 0 < sent[4] <= 1200


def test_the_rules_of_ours_have_a_shortest_period_and_those_that_derive_from_them_none():
    class Derived(QuadraticPeriod):
        pass

    assert [auto_period.shortest_period(each) for each in (FixedPeriod(3), QuadraticPeriod(h_base=5), Derived())] == [
        3,
        5,
        None,
    ]


def batch_by_batch(epoch, begin, batches, accumulate, steps):
    """The batches of so many steps, told one by one: epoch, number, steps taken, whether it steps, ends its epoch."""
    told, taken = [], 0
    if begin >= batches:
        epoch, begin = epoch + 1, 0
    while taken < steps:
        begin += 1
        last = begin == batches
        stepped = last or begin % accumulate == 0
        taken += stepped
        told.append((epoch, begin, taken, stepped, last))
        if last:
            epoch, begin = epoch + 1, 0
    return told


def test_stretches_of_epochs_are_the_batches_one_by_one(monkeypatch):
    for begin, batches, accumulate, steps in product((0, 2, 5, 7), (7, float("inf")), (1, 2, 3, 9), (0, 1, 4, 11)):
        monkeypatch.setattr(run_length, "place_in_run", lambda _, begin=begin: (3, begin))
        runner = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=accumulate, callbacks=[])
        stretches = list(run_length.stretches_to_come(runner, steps))
        told = [each.batch(number) for each in stretches for number in range(each.begin + 1, each.end + 1)]
        expected = batch_by_batch(3, begin, batches, accumulate, steps)
        assert told == expected
        stepping = [(each.epoch, number) for each in stretches for number in each.stepping()]
        assert stepping == [(epoch, number) for epoch, number, _, stepped, _ in expected if stepped]


def test_equal_rounds_by_arithmetic_end_where_the_clock_ends_them():
    for period, done, in_round, steps in product((1, 3, 4, 50), (0, 5), (0, 2), (0, 1, 9, 12)):
        clock = RoundClock(FixedPeriod(period))
        clock.steps_done, clock.round_ends_at = done, done + in_round
        told = ends_of_equal_rounds(clock, period, steps)
        expected = ends_to_come(clock, [0.1] * steps)
        assert tuple(told) == expected
        assert len(told) == len(expected)
        assert [step for step in range(40) if step in told] == list(expected)
