"""Manual optimization under Cyclic Data Parallelism: it trains as under DDP, wherever the module steps."""

import time
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch, outcomes
from support.training import FEATURES, Regression, Samples, Stop, loader, trainer
from torch import nn

from lightning_comm.data.resumable import ResumableLoader

STEPS = 7


class Manual(Regression):
    """One step a batch, as in Lightning's documentation, with a scheduler stepped by hand."""

    def __init__(self):
        super().__init__(deep(6), momentum, lambda step: 0.9**step)
        self.automatic_optimization = False
        self.started = False

    def on_train_start(self):
        self.started = True

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
    """The rate changes before the step, in its closure, and by epoch; every third batch does not step."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        def evaluate():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            scheduler.step()
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
    """Three steps a batch, none in batch 2; looks at the model in between, and after the last.

    Has a parameter of the module's own, used before any part is called.
    """

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        self.toggle_optimizer(optimizer)
        x, y = batch
        for _ in range(0 if batch_idx == 2 else 3):
            optimizer.zero_grad()
            loss = self.loss((x + self.shift * x, y))
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


class InHooks(Manual):
    """Steps when the batch is over, and then trains on it once more."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        return loss.detach()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Automatic(Manual):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    training_step = Regression.training_step


class OwnRates(Automatic):
    """Sets its learning rate in the forward, and before the backward."""

    def training_step(self, batch, batch_idx):
        self.optimizers().param_groups[0]["lr"] = 0.02 * (1 + batch_idx % 3)
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss):
        self.optimizers().param_groups[0]["lr"] += 0.01 * (self.global_step % 2)


class LateRates(Automatic):
    def on_before_optimizer_step(self, optimizer):
        optimizer.param_groups[0]["lr"] *= 0.5


KINDS = (OwnRates, InHooks, Closures, Accumulates, SeveralSteps, ForwardFirst)
MORE_KINDS = (Root, Manual)  # of which the one is a part of `SeveralSteps`, and the other of what is below


def _trained(rank, world_size, kinds):
    answers = {}
    for kind in kinds:
        answers[kind.__name__] = []
        for strategy in (DDPStrategy(), cyclic(warmup_sync_steps=10**6), cyclic(stagger="step")):
            module = kind()
            if not isinstance(strategy, DDPStrategy) and kind in (Root, ForwardFirst):
                module.manual_backward = lambda loss, **options: loss.backward(**options)  # ddp needs Lightning's
            epochs = {"max_epochs": 2 if kind is Closures else 1}
            validated = {"limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 0}
            runner = trainer(strategy, world_size, **validated, **epochs)
            runner.fit(module, loader(STEPS, rank), loader(1, 90 + rank))
            answers[kind.__name__].append((state(module), runner.global_step))
    return answers


@pytest.mark.parametrize("kinds", [KINDS, pytest.param(MORE_KINDS, marks=pytest.mark.exhaustive)], ids=["", "more"])
def test_every_way_to_step_by_hand_trains_as_under_ddp(kinds):
    for name, (ddp, synchronous, delayed) in launch(_trained, 2, kinds, world_size=2)[0].items():
        assert ddp[1] == synchronous[1] == delayed[1], name
        for one, other, late in zip(ddp[0], synchronous[0], delayed[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=name)
            assert np.isfinite(late).all(), name
        assert any(not np.array_equal(*each) for each in zip(synchronous[0], delayed[0], strict=True)), name


class SavesWithin(Manual):
    """Two steps a batch; saves between them in batch 3, and after batch 3."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        for k in range(2):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            if k == 0 and batch_idx == 3:
                self.trainer.save_checkpoint(f"{self.folder}/within.ckpt")
        scheduler.step()
        return loss.detach()


def _resumed(rank, world_size, folder):
    same = []
    for kind in (Manual, Automatic):
        module = kind()
        trainer(cyclic(), world_size).fit(module, loader(STEPS, rank))
        same.append(state(module))
    ends = []
    for stops, path in ((False, None), (True, None), (False, f"{folder}/batch.ckpt")):
        module = SavesWithin(folder)
        save = Stop(8, f"{folder}/batch.ckpt", goes_on=not stops)
        data = ResumableLoader(Samples(4 * STEPS, rank), 4, shuffle=False, num_replicas=1, rank=0)
        runner = trainer(cyclic(), world_size, max_epochs=2, callbacks=[] if path else [save])
        runner.fit(module, data, ckpt_path=path)
        ends.append((state(module), runner.global_step))
    within = torch.load(f"{folder}/within.ckpt", weights_only=True)
    return same, ends, within["global_step"], [each.numpy() for each in within["state_dict"].values()]


def test_manual_optimization_is_automatic_optimization_bit_for_bit_and_resumes_in_the_middle(tmp_path):
    for (manual, automatic), ends, step, within in launch(_resumed, 2, str(tmp_path), world_size=2):
        assert all(map(np.array_equal, manual, automatic))
        (whole, steps), (half, half_steps), (resumed, resumed_steps) = ends
        assert (steps, half_steps, resumed_steps) == (4 * STEPS, 8, 4 * STEPS)
        assert all(map(np.array_equal, whole, resumed))
        assert not all(map(np.array_equal, whole, half))
        assert step == 2 * STEPS + 7
        assert all(np.isfinite(each).all() for each in within)


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:4].parameters(), 0.1), torch.optim.LBFGS(self.net[4:].parameters())]


class Newton(Manual):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class StepsTwice(Manual):
    def train_on(self, batch, batch_idx, optimizer, scheduler):
        super().train_on(batch, batch_idx, optimizer, scheduler)
        optimizer.step()


class StepsPast(Manual):
    def train_on(self, batch, batch_idx, optimizer, scheduler):
        return super().train_on(batch, batch_idx, self.optimizers(use_pl_optimizer=False), scheduler)


class SkipsAlone(Manual):
    def train_on(self, batch, batch_idx, optimizer, scheduler):
        if batch_idx == 3 and self.trainer.global_rank:
            return torch.zeros(())
        return super().train_on(batch, batch_idx, optimizer, scheduler)


class OneMore(Manual):
    """Rank 1 takes two steps in the last batch."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        for _ in range(2 if batch_idx == STEPS - 1 and self.trainer.global_rank else 1):
            loss = super().train_on(batch, batch_idx, optimizer, scheduler)
        return loss


class SavesTooEarly(Manual):
    """In the second step of a batch, between forward and backward."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        loss = super().train_on(batch, batch_idx, optimizer, scheduler)
        if batch_idx == 2:
            again = self.loss(batch)
            self.trainer.save_checkpoint("never.ckpt")
            self.manual_backward(again)
        return loss


def _refused(rank, kind):
    started = time.monotonic()
    module = kind()
    try:
        trainer(cyclic(), 2).fit(module, loader(STEPS, rank))
    except Exception as error:
        dist.destroy_process_group()  # whoever refuses has left it
        return f"{type(error).__name__}: {error}", module.started, time.monotonic() - started
    return "ended", True, 0.0


@pytest.mark.parametrize(
    ("kind", "started", "words"),
    [
        (TwoOptimizers, False, ["one optimizer; got 2", "GAN", "LocalUpdateStrategy", "LBFGS", "1. ", "2. "]),
        (Newton, False, ["LBFGS", "whole gradient more than once", "SGD or AdamW"]),
        (StepsTwice, True, ["batch 1 of this `fit`", "no backward since", "self.manual_backward(loss)"]),
        (StepsPast, True, ["stepped by itself in batch 1", "use_pl_optimizer=False", "self.optimizers()"]),
        (
            SkipsAlone,
            True,
            ["optimizer step 3", "batch 5 on this rank", "manual optimization", "reduce_boolean_decision"],
        ),
        (OneMore, True, ["at optimizer step 7", "at optimizer step 8", "reduce_boolean_decision"]),
        (SavesTooEarly, True, ["optimizer step 3", "between forward and backward", "on_train_batch_end"]),
    ],
)
def test_what_cannot_be_stepped_by_hand_is_refused_on_all_ranks_by_its_reason(kind, started, words):
    answers = [answer for answer, _ in outcomes(_refused, kind, world_size=2)]
    for word in words:
        assert any(word in message for message, *_ in answers), (word, answers)
    for message, has_started, seconds in answers:
        assert message != "ended"
        assert has_started == started
        assert seconds < 30


class Clips(Manual):
    """Clips what it finds, and steps a plateau with a metric of its own; clears nothing."""

    def train_on(self, batch, batch_idx, optimizer, scheduler):
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()
        scheduler.step(batch_idx * (self.trainer.global_rank + 1.0))
        return loss.detach()

    def configure_optimizers(self):
        optimizer = momentum(self.parameters())
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau
        return [optimizer], [schedule(optimizer, patience=self.trainer.global_rank)]


def _warned(rank, world_size, kind):
    module = kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(cyclic(), world_size).fit(module, loader(STEPS, rank))
    return [str(each.message) for each in caught if str(each.message).startswith("CyclicStrategy")], state(module)


def test_what_differs_by_rank_in_manual_optimization_is_warned_of_once():
    (texts, one), (others, other) = launch(_warned, 2, Clips, world_size=2)
    (gradients,) = [text for text in texts if "gradients" in text]
    for word in ["Clips.training_step", "this rank's own", "not the mean", "clip_norm"]:
        assert word in gradients
    (rates,) = [text for text in texts if "learning rates" in text]
    for word in [
        "differ between ranks at optimizer step",
        "0.005 on this one, 0.05 in the others' mean",
        "strategy.reduce(metric)",
    ]:
        assert word in rates
    assert len(texts) == 2
    assert others == []
    assert all(map(np.array_equal, one, other))


def test_a_rate_that_is_set_when_gradients_have_been_sent_is_warned_of_once():
    (texts, _), _ = launch(_warned, 2, LateRates, world_size=2)
    (text,) = [text for text in texts if "learning rate was changed" in text]
    for word in ["backward of optimizer step 0 or behind it", "counts from the next step", "with a scheduler"]:
        assert word in text
