"""What is logged stands on the axis of the user's own metrics, and no logger is called with a smaller step.

The oracle is what Lightning itself hands the same logger, in the order of the calls.
"""

from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger
from support.partition import Fit, ddp, loader_of
from support.processes import launch
from support.training import Regression, Stop, loader, local_update, trainer
from torch import nn

from lightning_comm import AdaptivePartition, Averaging, CommProfiler, FixedPeriod
from lightning_comm.callbacks.adaptive_partition import files

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")
OURS = {"local": "local_update/", "profiler": "comm/", "partition": "adaptive_partition/"}


class Calls(DummyLogger):
    """Notes the step of each call, and by its metrics whose it is."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        of = next((who for who, prefix in OURS.items() if any(key.startswith(prefix) for key in metrics)), "user")
        if of == "user" and not set(metrics) & {"loss", "loss_step", "loss_epoch", "val_loss"}:
            of = "monitor"
        self.calls.append((of, step))


class Talks(Regression):
    """Logs on every batch, at the end of epochs and in validation; optionally its own `step`."""

    own_step = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=self.own_step is None)
        if self.own_step is not None:
            self.log("step", float(self.own_step * (batch_idx + 1 + 100 * self.current_epoch)))
        return loss


class Adversaries(LightningModule):
    """Two optimizers by hand, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = (self.two(self.one(batch[0])) - batch[1]).square().mean()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.one, self.two)]


class TalkingFit(Fit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def _fit(strategy, rank, module, calls, *, resume=False, callbacks=(), validate=True, **kwargs):
    """Fit for 10 batches an epoch, with what logs beside: first in the callbacks, as those of users are."""
    around = [LearningRateMonitor(), CommProfiler(page=False), *callbacks]
    options = {"max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 1 if validate else 0, **kwargs}
    runner = trainer(strategy, 2, logger=calls, callbacks=around, val_check_interval=5 if validate else None, **options)
    runner.fit(module, loader(10, rank), loader(1, rank), ckpt_path="stopped.ckpt" if resume else None)
    return runner


def _scenarios(rank):
    found = {}

    def calls(name):
        return found.setdefault(name, Calls())

    scheduled = {"schedule": lambda step: 0.99**step}
    twice = calls("a batch a step, fitted twice")
    runner = _fit(local_update(FixedPeriod(3)), rank, Talks(**scheduled), twice, callbacks=[DeviceStatsMonitor()])
    runner.fit_loop.max_epochs = 3
    runner.fit(runner.lightning_module, loader(10, rank), loader(1, rank))
    _fit(local_update(FixedPeriod(3)), rank, Adversaries(), calls("two optimizers"), validate=False)
    _fit(ddp(), rank, Adversaries(), calls("two optimizers under ddp"), validate=False)
    few = {"accumulate_grad_batches": 4, "log_every_n_steps": 2}
    _fit(local_update(FixedPeriod(2)), rank, Talks(), calls("accumulated"), **few)
    _fit(local_update(FixedPeriod(4)), rank, Talks(), calls("every third"), log_every_n_steps=3)
    overlapped = local_update(FixedPeriod(4), averaging=Averaging(overlap_steps=2))
    _fit(overlapped, rank, Talks(), calls("overlapped"))
    _fit(local_update(FixedPeriod(4), gradient_steps=8), rank, Talks(), calls("gradients first"))
    for where in (6, 10):
        resumed = calls(f"resumed after {where}")
        # as it is left in mid-epoch, or at the very end of one
        _fit(local_update(FixedPeriod(4)), rank, Talks(), resumed, callbacks=[Stop(where, "stopped.ckpt")])
        resumed.begins_again = len(resumed.calls)
        _fit(local_update(FixedPeriod(4)), rank, Talks(), resumed, resume=True)
    own = Talks()
    own.own_step = 10
    # metrics of an epoch and of validation have no such value, and so would stand on Lightning's axis
    _fit(local_update(FixedPeriod(3)), rank, own, calls("an own step"), validate=False)
    partition = AdaptivePartition(window_steps=2, warmup_steps=1)
    options = {"max_epochs": 2, "log_every_n_steps": 3, "logger": calls("partitioned")}
    with patch.object(files, "partition_page", lambda journal: "not looked at"):
        trainer(ddp(), 2, callbacks=[partition, LearningRateMonitor()], **options).fit(TalkingFit(), loader_of(12 * 12))
    return {name: each.calls for name, each in found.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("axis"))
        return launch(_scenarios, world_size=2)


def steps_of(calls, who):
    return [step for of, step in calls if of == who]


ALL = [
    "a batch a step, fitted twice",
    "two optimizers",
    "two optimizers under ddp",
    "accumulated",
    "every third",
    "overlapped",
    "gradients first",
    "resumed after 6",
    "resumed after 10",
    "an own step",
    "partitioned",
]


@pytest.mark.parametrize("name", ALL)
def test_no_logger_is_called_with_a_smaller_step_than_before(answers, name):
    calls = [call for call in answers[0][name] if call[0] != "monitor" or name != "an own step"]
    assert [step for _, step in calls] == sorted(step for _, step in calls)
    assert not {of for of, _ in answers[1][name]} & set(OURS)  # rank 0 alone logs


@pytest.mark.parametrize("name", ALL)
def test_what_is_logged_is_at_steps_that_the_metrics_of_the_user_have(answers, name):
    calls = answers[0][name]
    users = set(steps_of(calls, "user"))
    for who in OURS:
        assert set(steps_of(calls, who)) <= users
    assert any(steps_of(calls, who) for who in OURS)


def test_a_synchronisation_is_logged_with_the_batch_that_it_ends(answers):
    first = steps_of(answers[0]["a batch a step, fitted twice"], "local")
    assert first[:7] == [2, 5, 8, 11, 14, 17, 19]  # the last of the run with its last batch
    assert steps_of(answers[0]["two optimizers"], "local") == [*range(2, 19, 3), 19]  # 20 steps of either optimizer
    assert steps_of(answers[0]["an own step"], "local")[:4] == [30, 60, 90, 1020]
    assert steps_of(answers[0]["gradients first"], "local") == [11, 15, 19]


def test_where_not_every_batch_is_logged_the_newest_synchronisation_waits_for_one_that_is(answers):
    assert steps_of(answers[0]["every third"], "local") == [5, 8, 11, 17]  # after steps 4, 8, 12 and 16
    assert steps_of(answers[0]["accumulated"], "local") == [1, 3, 5]  # three steps an epoch, two a round


@pytest.mark.parametrize("where", [6, 10])
def test_a_resumed_run_goes_on_along_the_axis(answers, where):
    calls = answers[0][f"resumed after {where}"]
    unbroken = answers[0]["a batch a step, fitted twice"]
    assert set(steps_of(calls, "user")) == set(range(20)) <= set(steps_of(unbroken, "user"))
    stopped = {6: [3, 5], 10: [3, 7, 9]}[where]  # at the end of a round, and where the run ended
    assert steps_of(calls, "local") == [*stopped, *(step for step in (7, 11, 15, 19) if step > where)]
