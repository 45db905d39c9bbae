"""Manual optimization under Cyclic Data Parallelism: it trains as under DDP, wherever the module steps."""

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch
from support.training import FEATURES, Regression, loader, trainer
from torch import nn

STEPS = 7


class Manual(Regression):
    """One step a batch, as in Lightning's documentation, with a scheduler stepped by hand."""

    def __init__(self):
        super().__init__(deep(6), momentum, lambda step: 0.9**step)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.losses.append(float(self.train_on(batch, batch_idx, self.optimizers(), self.lr_schedulers())))

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        scheduler.step()
        return loss.detach()


class Closures(Manual):
    """The rate changes before the step, and by epoch; every third batch does not step."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        def evaluate():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if batch_idx % 3 == 2:
            return evaluate()
        if batch_idx % 2:
            scheduler.step()
        with optimizer.toggle_model():
            return optimizer.step(closure=evaluate).detach()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


class Accumulates(Manual):
    """Two batches a step, cleared behind it; the last batch of an epoch does not step."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


class SeveralSteps(Manual):
    """Three steps a batch, none in batch 2; looks at the model in between, and after the last."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        self.toggle_optimizer(optimizer)
        for _ in range(0 if batch_idx == 2 else 3):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            with torch.no_grad():
                self.loss(batch)
        self.untoggle_optimizer(optimizer)
        scheduler.step()
        return torch.zeros(()) if batch_idx == 2 else loss.detach()


class ForwardFirst(Manual):
    """Clears between forward and backward; one backward of two forwards, or two of one."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        loss = self.loss(batch)
        if batch_idx % 2:
            loss = loss + 0.5 * self.loss([2 * each for each in batch])
        optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        if batch_idx % 2 == 0:
            self.manual_backward(loss * 0.1)
        optimizer.step()
        return loss.detach()


class Root(Manual):
    """Parameters of the module's own, used before any part is called; two steps a batch."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        x, y = batch
        for _ in range(2):
            optimizer.zero_grad()
            loss = self.loss((x + self.shift * x, y))
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()


KINDS = (Manual, Closures, Accumulates, SeveralSteps, ForwardFirst, Root)


def _trained(rank, world_size):
    answers = {}
    for kind in KINDS:
        answers[kind.__name__] = []
        for strategy in (DDPStrategy(), cyclic(warmup_sync_steps=10**6), cyclic(stagger="step")):
            module = kind()
            if isinstance(strategy, DDPStrategy) is False and kind in (Root, ForwardFirst):
                module.manual_backward = lambda loss, **options: loss.backward(**options)  # ddp needs Lightning's
            runner = trainer(strategy, world_size, max_epochs=2, limit_val_batches=1, val_check_interval=3)
            runner.fit(module, loader(STEPS, rank), loader(1, 90 + rank))
            answers[kind.__name__].append((state(module), runner.global_step))
    return answers


def test_every_way_to_step_by_hand_trains_as_under_ddp():
    for name, (ddp, synchronous, delayed) in launch(_trained, 3, world_size=3)[0].items():
        assert ddp[1] == synchronous[1] == delayed[1], name
        for one, other, late in zip(ddp[0], synchronous[0], delayed[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=name)
            assert np.isfinite(late).all(), name
        assert any(not np.array_equal(*each) for each in zip(synchronous[0], delayed[0], strict=True)), name
