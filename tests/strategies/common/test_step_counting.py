"""Steps are counted as they are taken: where the gradient phase of a run ends, however the run steps.

The oracle is the weights: while gradients are averaged, ranks that see other data are equal after every batch.
"""

import csv
import math
import pathlib
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import Regression, Stop, loader, trainer
from torch import nn

from lightning_comm import CompressedDDPStrategy, FixedPeriod, LocalUpdateStrategy

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


def resumed_in_a_schedule(rank, steps, folder, strategy=None):
    """Stopped in the second of three epochs, after its first window: schedules are set only as an epoch begins."""
    schedule = {"batches": 7, "max_epochs": 3}
    stop = Stop(8, str(folder / "c.ckpt"))
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 3}), stop]
    seen, _ = watched(rank, steps, strategy=strategy and strategy(), callbacks=callbacks, **schedule)
    look = Look()
    look.steps, look.seen = 8, seen
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 3})]
    again = {"look": look, "ckpt_path": folder / "c.ckpt", "strategy": strategy and strategy()}
    return watched(rank, steps, callbacks=callbacks, **again, **schedule)[0]


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
    resumed_in_a_schedule: (13, {9: 9, 0.7: 9}),
}


PAIRS = [(case, steps) for case, (_, ends) in CASES.items() for steps in ends]
# a number of steps needs to know less than a share, which all ways to run are shown with; these with both
NUMBERS = {automatic, resumed, resumed_in_a_schedule}
ALSO = {(case, steps) for case, steps in PAIRS if steps >= 1 and case not in NUMBERS}


def table(rank, folder, pairs):
    answers = {}
    for case, steps in pairs:
        where = folder / f"{case.__name__} {steps}"
        if rank == 0:
            where.mkdir()
        answers[case.__name__, steps] = case(rank, steps, where)
    look = Look(counted=1)
    two = watched(rank, 2, TwoOptimizers(), look, strategy=phase(2, counted_optimizer=1), max_epochs=2)
    answers["two optimizers", 2] = two[0]
    saved = str(folder / "ddp.ckpt")
    plain = {"strategy": DDPStrategy(timeout=WAIT), "callbacks": [Stop(3, saved)]}
    watched(rank, 0, TwoOptimizers(), max_epochs=2, **plain)
    look, goes_on = Look(counted=1), phase(2, counted_optimizer=1)
    with pytest.warns(UserWarning, match="steps of all optimizers, 3, and not") if rank == 0 else nullcontext():
        resumed = watched(rank, 2, TwoOptimizers(), look, strategy=goes_on, ckpt_path=saved, max_epochs=2)
    answers["two optimizers, resumed from ddp", 2] = resumed[0]
    with pytest.raises(ValueError, match="gradient_steps") as refused:
        watched(rank, 0.5, TwoOptimizers(), max_epochs=2)
    compressed = resumed_in_a_schedule(rank, 0, folder, lambda: CompressedDDPStrategy("bf16", timeout=WAIT))
    return answers, str(refused.value), compressed[-1][0]


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    pairs = PAIRS if request.config.getoption("exhaustive") else [each for each in PAIRS if each not in ALSO]
    return launch(table, tmp_path_factory.mktemp("runs"), pairs, world_size=2)


def end_of_phase(seen, case):
    """Return after how many steps ranks were equal for the last time before they differed, and the steps of the run."""
    one, two = (answers[case] for answers, *_ in seen)
    assert [steps for steps, _ in one] == [steps for steps, _ in two]
    equal = [math.isclose(a, b, rel_tol=1e-12) for (_, a), (_, b) in zip(one, two, strict=True)]
    assert False in equal
    return one[equal.index(False) - 1][0], one[-1][0]


@pytest.mark.parametrize(
    ("case", "steps", "end", "total"),
    [
        pytest.param(
            case.__name__,
            steps,
            CASES[case][1][steps],
            CASES[case][0],
            marks=[pytest.mark.exhaustive] if (case, steps) in ALSO else [],
        )
        for case, steps in PAIRS
    ],
)
def test_the_gradient_phase_ends_after_its_number_or_share_of_the_steps_that_the_run_takes(
    case, steps, end, total, seen
):
    assert end_of_phase(seen, (case, steps)) == (end, total)


def test_an_accumulation_schedule_goes_on_in_an_epoch_that_is_resumed_under_compressed_gradients_too(seen):
    assert [steps for *_, steps in seen] == [7 + 3 + 3] * 2


def test_with_several_optimizers_a_number_counts_the_steps_of_the_counted_one(seen):
    assert end_of_phase(seen, ("two optimizers", 2)) == (2, 6)
    assert end_of_phase(seen, ("two optimizers, resumed from ddp", 2)) == (2, 5)  # whose file does not count them


def test_with_several_optimizers_a_share_is_refused_before_training_with_a_way_out_that_works(seen):
    for _, message, _ in seen:
        assert "`gradient_steps`=0.5" in message
        assert "manual optimization" in message
        assert "gradient_steps=500" in message
        assert "max_steps" not in message


class Logged(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("batch", float(batch_idx))


def _axis(rank, folder):
    logger = CSVLogger(folder / str(rank))
    runner = trainer(LocalUpdateStrategy(FixedPeriod(4), timeout=WAIT), 2, logger=logger, log_every_n_steps=1)
    runner.fit(Logged(), loader(10, rank))
    compressed = CompressedDDPStrategy("bf16", timeout=WAIT)
    trainer(compressed, 2).fit(TwoOptimizers(), loader(4, rank))
    with (pathlib.Path(logger.log_dir) / "metrics.csv").open() if rank == 0 else nullcontext() as file:
        return list(csv.DictReader(file or [])), {
            record.step for record in compressed.ledger.records if record.purpose == "gradients"
        }


def test_with_several_optimizers_rounds_are_logged_at_the_batch_that_ends_them_and_messages_at_their_step(tmp_path):
    (rows, sent_at), (_, sent_by_rank_1_at) = launch(_axis, tmp_path, world_size=2)
    batches = {int(row["step"]): float(row["batch"]) for row in rows if row["batch"]}
    assert batches == {step: float(step) for step in range(10)}  # each at the steps before it, rounds at those done
    assert [int(row["step"]) for row in rows if row["local_update/drift"]] == [3, 7, 9]
    # one step in the first batch and two in the second: each backward belongs to the steps that are done by then
    assert sent_at == sent_by_rank_1_at == {0, 1, 3, 4}
