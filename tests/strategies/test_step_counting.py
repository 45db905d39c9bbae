"""Steps are counted as they are taken: where the gradient phase of a run ends, however the run steps.

The oracle is the weights: while gradients are averaged, ranks that see other data are equal after every batch.
"""

import math
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import Regression, Stop, loader, trainer
from torch import nn

from lightning_comm import FixedPeriod, LocalUpdateStrategy

LONG = FixedPeriod(1000)  # nothing is averaged before the end of a run
WAIT = timedelta(seconds=60)


class Look(Callback):
    """Notes after every batch how many steps the counted optimizer has taken, and what the weights are."""

    def __init__(self, counted=0):
        self.counted, self.steps, self.seen = counted, 0, []

    def on_train_start(self, runner, module):
        optimizer = runner.optimizers[self.counted]
        optimizer.register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 1))

    def on_train_batch_end(self, runner, module, *_):
        self.seen.append((self.steps, float(sum(p.detach().double().sum() for p in module.parameters()))))


class TwoOptimizers(LightningModule):
    """Manual optimization: the first optimizer steps at every batch, the second at every other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(nn.functional.mse_loss(self.two(torch.tanh(self.one(x))), y))
        for number, optimizer in enumerate(self.optimizers()):
            if number == 0 or batch_idx % 2:
                optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.one, self.two)]


def phase(steps, **kwargs):
    return LocalUpdateStrategy(LONG, gradient_steps=steps, timeout=WAIT, **kwargs)


def watched(rank, steps, module=None, look=None, batches=6, ckpt_path=None, strategy=None, **trainer_args):
    """Return what one fit looks like, and the Trainer with which another can be made."""
    look, module = look or Look(), module or Regression()
    callbacks = [look, *trainer_args.pop("callbacks", [])]
    runner = trainer(strategy or phase(steps), 2, callbacks=callbacks, **trainer_args)
    runner.fit(module, loader(batches, rank), ckpt_path=ckpt_path)
    return look.seen, runner


def automatic(rank, steps, folder):
    return watched(rank, steps, max_epochs=2)[0]


def accumulation(rank, steps, folder):
    return watched(rank, steps, batches=7, accumulate_grad_batches=3, max_epochs=2)[0]


def accumulation_schedule(rank, steps, folder):
    return watched(rank, steps, callbacks=[GradientAccumulationScheduler({0: 1, 2: 4})], max_epochs=4)[0]


def max_steps(rank, steps, folder):
    return watched(rank, steps, max_epochs=-1, max_steps=8)[0]


def second_fit(rank, steps, folder):
    _, runner = watched(rank, steps, max_epochs=1)
    runner.fit_loop.max_epochs = 3
    look = runner.callbacks[-1] = Look()
    runner.fit(Regression(), loader(6, rank))
    return look.seen


def second_fit_of_max_steps(rank, steps, folder):
    _, runner = watched(rank, steps, max_epochs=-1, max_steps=4)
    runner.fit_loop.epoch_loop.max_steps = 12
    look = runner.callbacks[-1] = Look()
    runner.fit(Regression(), loader(6, rank))
    return look.seen


def second_trainer(rank, steps, folder):
    module = Regression()
    watched(rank, steps, module, max_epochs=1)
    return watched(rank, steps, module, max_epochs=2)[0]


def resumed(rank, steps, folder):
    seen, _ = watched(rank, steps, max_epochs=2, callbacks=[Stop(2, str(folder / "a.ckpt"))])
    look = Look()
    look.steps, look.seen = 2, seen
    return watched(rank, steps, look=look, ckpt_path=folder / "a.ckpt", max_epochs=2)[0]


def resumed_from_ddp(rank, steps, folder):
    stop = Stop(2, str(folder / "b.ckpt"))
    seen, _ = watched(rank, steps, strategy=DDPStrategy(timeout=WAIT), max_epochs=2, callbacks=[stop])
    look = Look()
    look.steps, look.seen = 2, seen
    return watched(rank, steps, look=look, ckpt_path=folder / "b.ckpt", max_epochs=2)[0]


def resumed_in_a_schedule(rank, steps, folder):
    """Stopped in the first window of the third epoch but one: Lightning sets the schedule only as an epoch begins."""
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    stop = Stop(8, str(folder / "c.ckpt"))
    seen, _ = watched(rank, steps, batches=9, max_epochs=3, callbacks=[schedule, stop])
    return seen


# how many steps each run takes, and after how many of them the phase of a given number or share ends
CASES = {
    automatic: (12, {5: 5, 0.5: 6}),
    accumulation: (6, {4: 4, 0.5: 3}),
    accumulation_schedule: (16, {5: 5, 0.5: 8}),
    max_steps: (8, {5: 5, 0.5: 4}),
    second_fit: (12, {5: 5, 0.5: 6}),
    second_fit_of_max_steps: (8, {5: 5, 0.5: 4}),
    second_trainer: (12, {5: 5, 0.5: 6}),
    resumed: (12, {5: 5, 0.5: 6}),
    resumed_from_ddp: (12, {5: 5, 0.5: 6}),
}


def table(rank, folder):
    answers = {}
    for case, (_, ends) in CASES.items():
        for steps in ends:
            where = folder / f"{case.__name__} {steps}"
            if rank == 0:
                where.mkdir()
            answers[case.__name__, steps] = case(rank, steps, where)
    look = Look(counted=1)
    two = watched(rank, 2, TwoOptimizers(), look, strategy=phase(2, counted_optimizer=1), max_epochs=2)
    answers["two optimizers", 2] = two[0]
    with pytest.raises(ValueError, match="gradient_steps") as refused:
        watched(rank, 0.5, TwoOptimizers(), max_epochs=2)
    return answers, str(refused.value)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return launch(table, tmp_path_factory.mktemp("runs"), world_size=2)


def end_of_phase(seen, case):
    """Return after how many steps ranks were equal for the last time before they differed, and the steps of the run."""
    one, two = (answers[case] for answers, _ in seen)
    assert [steps for steps, _ in one] == [steps for steps, _ in two]
    equal = [math.isclose(a, b, rel_tol=1e-12) for (_, a), (_, b) in zip(one, two, strict=True)]
    assert False in equal
    return one[equal.index(False) - 1][0], one[-1][0]


@pytest.mark.parametrize(
    ("case", "steps", "end", "total"),
    [(case.__name__, steps, end, total) for case, (total, ends) in CASES.items() for steps, end in ends.items()],
)
def test_the_gradient_phase_ends_after_its_number_or_share_of_the_steps_that_the_run_takes(
    case, steps, end, total, seen
):
    assert end_of_phase(seen, (case, steps)) == (end, total)


def test_with_several_optimizers_a_number_counts_the_steps_of_the_counted_one(seen):
    assert end_of_phase(seen, ("two optimizers", 2)) == (2, 6)


def test_with_several_optimizers_a_share_is_refused_before_training_with_a_way_out_that_works(seen):
    for _, message in seen:
        assert "`gradient_steps`=0.5" in message
        assert "manual optimization" in message
        assert "gradient_steps=500" in message
        assert "max_steps" not in message
