"""What a run under local updates tells of its rounds, for whoever watches or shortens them."""

import pytest
from lightning.pytorch import Callback
from support.processes import launch
from support.training import Regression, loader, local_update, network, trainer

from lightning_comm import Averaging, FixedPeriod
from lightning_comm.contract import RoundInForce

STEPS, PERIOD, GRADIENT_STEPS = 11, 3, 5


class Watch(Callback):
    """Notes the round in force within each batch, and shortens the gradient phase before the first or a later one."""

    def __init__(self, shorten_at, shorten_to):
        self.shorten_at, self.shorten_to = shorten_at, shorten_to
        self.planned, self.rounds = [], []

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        run = runner.strategy._run
        if batch_idx == self.shorten_at:
            self.planned.append(run.gradient_phase_steps)
            run.shorten_gradient_phase(self.shorten_to)
            self.planned.append(run.gradient_phase_steps)

    def on_before_optimizer_step(self, runner, module, optimizer):
        self.rounds.append(runner.strategy._run.round_in_force)


def _fit(rank, shorten_at, shorten_to):
    strategy, watch = local_update(FixedPeriod(PERIOD), gradient_steps=GRADIENT_STEPS), Watch(shorten_at, shorten_to)
    trainer(strategy, 2, callbacks=[watch], max_epochs=1).fit(Regression(network()), loader(STEPS, rank))
    return watch.planned, watch.rounds, [done.step for done in strategy.history], strategy.ledger.messages("gradients")


@pytest.mark.parametrize(("shorten_at", "shorten_to", "first"), [(0, 2, 2), (0, 9, 5), (0, 0, 0), (3, 3, 3)], ids=str)
def test_rounds_are_told_with_their_lengths_and_begin_where_the_gradient_phase_was_shortened_to(
    shorten_at, shorten_to, first
):
    for planned, rounds, ends, gradients in launch(_fit, shorten_at, shorten_to, world_size=2):
        assert planned == [GRADIENT_STEPS, first]
        assert ends == sorted({*range(first + PERIOD, STEPS, PERIOD), STEPS})
        assert gradients == first
        lengths = [0] * first
        for begin, end in zip([first, *ends], ends, strict=False):
            lengths += [end - begin] * (end - begin)
        assert rounds == [RoundInForce(length, STEPS) for length in lengths]


class Counts(Callback):
    """Notes after each batch how many rounds are over, and how many averages have landed."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, runner, module, outputs, batch, batch_idx):
        self.seen.append((runner.strategy.rounds_done, runner.strategy.averages_landed))


def _count(rank, overlap_steps):
    strategy, counts = local_update(FixedPeriod(4), averaging=Averaging(overlap_steps=overlap_steps)), Counts()
    trainer(strategy, 2, callbacks=[counts], max_epochs=1).fit(Regression(network()), loader(STEPS, rank))
    return counts.seen


@pytest.mark.parametrize("overlap_steps", [0, 2])
def test_an_average_lands_behind_the_round_that_it_ends_by_the_steps_of_the_overlap(overlap_steps):
    for seen in launch(_count, overlap_steps, world_size=2):
        assert [done for done, _ in seen] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
        behind = [landed for _, landed in seen]
        assert behind[:-1] == ([0] * overlap_steps + [done for done, _ in seen])[: STEPS - 1]
        assert behind[-1] == 3  # the run ends with it
