"""The schedule read before training is the one that training follows, step by step."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support.training import Regression, loader, trainer
from torch.optim import lr_scheduler

from lightning_comm.cli.pilot.schedule import run_length, use_up_schedule
from lightning_comm.strategies.common.planned_rates import ScheduleUnknown

STEPS_IN_EPOCH = 10


class Rates(Callback):
    """Notes the rate of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(max(group["lr"] for group in optimizer.param_groups))


class ReadFirst(Callback):
    """Reads the whole schedule at the first batch, then stops."""

    def __init__(self):
        self.read = self.unknown = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        before = torch.get_rng_state()
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        try:
            self.read = use_up_schedule(trainer, pl_module, run_length(trainer, pl_module))
        except ScheduleUnknown as unknown:
            self.unknown = str(unknown)
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, weights, pl_module.parameters()))
        assert not any(optimizer.state for optimizer in trainer.optimizers)
        trainer.should_stop = True


class Scheduled(Regression):
    """Two groups of parameters, and whatever schedulers `make` returns for their optimizer."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        first, *rest = self.parameters()
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.03}, {"params": rest, "lr": 0.05}], momentum=0.9)
        return [optimizer], self.make(optimizer, self.trainer.estimated_stepping_batches)


class StepsItself(Scheduled):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def step(scheduler, **kwargs):
    return [{"scheduler": scheduler, "interval": "step", **kwargs}]


SCHEDULES = {
    "none": lambda optimizer, total: [],
    "one-cycle": lambda optimizer, total: step(lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=total)),
    "cosine": lambda optimizer, total: step(lr_scheduler.CosineAnnealingLR(optimizer, total)),
    "by-epoch": lambda optimizer, total: [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)],
    "every-second-epoch": lambda optimizer, total: [
        {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.3), "interval": "epoch", "frequency": 2}
    ],
    "every-third-batch": lambda optimizer, total: step(lr_scheduler.ExponentialLR(optimizer, 0.9), frequency=3),
    "warm-up-then-cosine": lambda optimizer, total: step(
        lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                lr_scheduler.CosineAnnealingLR(optimizer, total - 5),
            ],
            milestones=[5],
        )
    ),
}


def fit(model, callback, **kwargs):
    run = trainer("auto", 1, callbacks=[callback], **{"max_epochs": 4, **kwargs})
    run.fit(model, loader(STEPS_IN_EPOCH, rank=0))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}, {"max_epochs": -1, "max_steps": 23}])
def test_it_equals_the_rates_of_a_real_run(name, kwargs):
    read, rates = ReadFirst(), Rates()
    fit(Scheduled(SCHEDULES[name]), read, **kwargs)
    fit(Scheduled(SCHEDULES[name]), rates, **kwargs)
    assert read.read == pytest.approx(rates.seen)
    assert len(rates.seen) in (40, 16, 23)
    assert name == "none" or len(set(rates.seen)) > 1


def test_it_follows_an_accumulation_that_changes_between_epochs():
    read, rates = ReadFirst(), Rates()
    for each in (read, rates):
        run = trainer("auto", 1, callbacks=[each, GradientAccumulationScheduler({0: 1, 1: 4, 3: 2})], max_epochs=4)
        run.fit(Scheduled(SCHEDULES["every-third-batch"]), loader(STEPS_IN_EPOCH, rank=0))
    assert read.read == pytest.approx(rates.seen)
    assert len(rates.seen) == 10 + 3 + 3 + 5
    assert len(set(rates.seen)) > 1


def manual(model):
    model.automatic_optimization = False
    return model


@pytest.mark.parametrize(
    ("model", "kwargs", "must_say"),
    [
        (
            Scheduled(lambda o, _: [{"scheduler": lr_scheduler.ReduceLROnPlateau(o), "monitor": "val_loss"}]),
            {},
            ["ReduceLROnPlateau", "metric"],
        ),
        (StepsItself(SCHEDULES["cosine"]), {}, ["lr_scheduler_step"]),
        (manual(Scheduled(SCHEDULES["none"])), {}, ["optimizes by hand"]),
        (Scheduled(SCHEDULES["none"]), {"max_epochs": -1}, ["not known", "max_steps"]),
    ],
    ids=["plateau", "steps-itself", "manual", "endless"],
)
def test_a_schedule_that_cannot_be_known_is_refused_with_the_reason(model, kwargs, must_say):
    read = ReadFirst()
    fit(model, read, **kwargs)
    assert read.read is None
    assert [word for word in must_say if word not in read.unknown] == []
