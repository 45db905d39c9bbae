"""A module's own `optimizer_step` under Cyclic Data Parallelism: it trains as under DDP, or is refused at once."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer

STEPS = 7


class Own(Regression):
    """Its subclasses say how it steps."""

    def __init__(self):
        super().__init__(deep(6), momentum)
        self.rank = 0

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        raise NotImplementedError


class ClosureFirst(Own):
    """A guard against gradients that are not finite; all losses of batch 2 are infinite."""

    bad = (2,)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.bad else loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        if all(bool(torch.isfinite(each.grad).all()) for each in self.parameters()):
            optimizer.step()
        else:
            optimizer.zero_grad()


class EverySecond(Own):
    """As in Lightning's documentation; the closure alone in the very first batch, and in the last."""

    odd = 1

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if batch_idx % 2 == self.odd:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class EverySecondFromTheFirst(EverySecond):
    odd = 0


class StepBeforeClosure(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step()
        optimizer_closure()


class ClosureTwice(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


class TwoSteps(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for _ in range(3):
            optimizer.step(closure=optimizer_closure)


class OwnClosure(Own):
    """Scales gradients in a closure around Lightning's, which it calls twice in every third batch."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        def evaluate():
            for _ in range(2 if batch_idx % 3 == 0 else 1):
                loss = optimizer_closure()
            for each in self.parameters():
                each.grad.mul_(0.5)
            return loss

        with optimizer.toggle_model():
            optimizer.step(closure=evaluate)


class Caught(Own):
    """The forward of batch 0, of batch 3 and of the last one fails on all ranks."""

    def training_step(self, batch, batch_idx):
        if batch_idx in (0, 3, STEPS - 1):
            self.net[0](batch[0])
            raise ValueError("out of luck")
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        try:
            optimizer.step(closure=optimizer_closure)
        except ValueError:
            optimizer_closure._result = type("Nothing", (), {"loss": None})()  # else Lightning refuses it


def _trained(rank, world_size):
    answers = {}
    for kind in (
        ClosureFirst,
        EverySecond,
        EverySecondFromTheFirst,
        StepBeforeClosure,
        ClosureTwice,
        TwoSteps,
        OwnClosure,
        Caught,
    ):
        for accumulate in (1, 2) if kind is ClosureFirst else (1,):
            pair = []
            staggered = cyclic(stagger="step") if kind in (ClosureFirst, Caught) else cyclic()
            for strategy in (DDPStrategy(), cyclic(warmup_sync_steps=10**6), staggered):
                module = kind()
                often = {"limit_val_batches": 1, "val_check_interval": 3}  # Lightning clears gradients before it
                runner = trainer(strategy, world_size, accumulate_grad_batches=accumulate, **often)
                runner.fit(module, loader(STEPS * accumulate, rank), loader(1, 90 + rank))
                pair.append((state(module), module.losses[-1]))
            answers[kind.__name__, accumulate] = pair
    return answers


def test_every_order_of_closure_and_step_trains_as_under_ddp():
    for name, (ddp, synchronous, delayed) in launch(_trained, 3, world_size=3)[0].items():
        for one, other, late in zip(ddp[0], synchronous[0], delayed[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=str(name))
            assert np.isfinite(late).all(), name
        assert any(not np.array_equal(*each) for each in zip(synchronous[0], delayed[0], strict=True)), name


class StepTwice(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        optimizer.step()


class RawStep(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.optimizer.step(closure=optimizer_closure)


class NoClosure(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step()


class SkipsAlone(ClosureFirst):
    """Only rank 1 finds gradients that are not finite."""

    @property
    def bad(self):
        return self.bad_batches if self.trainer.global_rank == 1 else ()

    bad_batches = (2,)


class SkipsLastAlone(SkipsAlone):
    bad_batches = (STEPS - 1,)


class NothingOnOneRank(ClosureFirst):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 and self.trainer.global_rank == 1 else super().training_step(batch, batch_idx)


class TornAlone(Own):
    """The backward of rank 1 fails half-way in batch 3, and `optimizer_step` goes on."""

    def backward(self, loss, *args, **kwargs):
        if self.trainer.global_rank == 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 3:
            self.net[0].weight.register_hook(self.fail)
        loss.backward()

    def fail(self, gradient):
        raise ValueError("out of luck")

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        try:
            optimizer.step(closure=optimizer_closure)
        except ValueError:
            optimizer_closure._result = type("Nothing", (), {"loss": None})()


class SavesWithinStep(Own):
    optimizer_step = Regression.optimizer_step

    def on_before_backward(self, loss):
        if self.trainer.global_step == 3:
            self.trainer.save_checkpoint("never.ckpt")


def _refused(rank, kind, options):
    started = time.monotonic()
    module = kind()
    try:
        trainer(cyclic(), 2, **options).fit(module, loader(STEPS, rank), loader(1, 90 + rank))
    except Exception as error:
        dist.destroy_process_group()  # whoever refuses has left it
        return type(error).__name__, str(error), time.monotonic() - started
    return "ended", "", 0.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (StepTwice, ["batch 1 of this `fit`", "no backward since", "optimizer.step(closure=optimizer_closure)"]),
        (RawStep, ["stepped by itself in batch 1", "optimizer.optimizer.step()", "self.optimizers()"]),
        (NoClosure, ["closure hasn't been executed"]),
        (SkipsAlone, ["optimizer step 2", "batch 4 on this rank", "3 on the other", "reduce_boolean_decision"]),
        (SkipsLastAlone, ["at optimizer step 7", "at optimizer step 6", "reduce_boolean_decision"]),
        (NothingOnOneRank, ["returning None"]),
        (SavesWithinStep, ["optimizer step 3", "between forward and backward", "on_train_batch_end"]),
        (TornAlone, ["optimizer step 3", "first, inside of the `try`"]),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused_on_all_ranks_by_its_reason(kind, words):
    options = {"limit_val_batches": 1} if kind is SkipsLastAlone else {}
    answers = [answer for answer, _ in outcomes(_refused, kind, options, world_size=2)]
    assert all(name != "ended" for name, *_ in answers)
    for word in words:
        assert any(word in message for _, message, _ in answers), (word, answers)
    assert all(seconds < 30 for *_, seconds in answers)
