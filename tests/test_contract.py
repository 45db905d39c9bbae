"""What callbacks and the pilot ask of a strategy: each protocol has its strategies, and no other is taken for one."""

import pytest
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import Regression, loader, trainer
from typing_extensions import is_protocol

from lightning_comm import (
    AdaptivePartition,
    BatchNormReestimation,
    CommProfiler,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    contract,
)
from lightning_comm.contract import (
    AveragesTakenOut,
    GradientsAnnounced,
    GradientsCompressed,
    MessagesRecorded,
    RoundInForce,
    SamplesWeighed,
    SynchronisesInRounds,
    TakesRefusals,
)
from lightning_comm.strategies import registration

STRATEGIES = {
    LocalUpdateStrategy: lambda: LocalUpdateStrategy(FixedPeriod(2)),
    CompressedDDPStrategy: lambda: CompressedDDPStrategy("bf16"),
    CyclicStrategy: CyclicStrategy,
    DDPStrategy: DDPStrategy,
}
PROTOCOLS = {
    TakesRefusals: registration.REFUSED_TOGETHER,
    MessagesRecorded: registration.MESSAGES_RECORDED,
    SamplesWeighed: registration.SAMPLES_WEIGHED,
    AveragesTakenOut: registration.AVERAGES_TAKEN_OUT,
    SynchronisesInRounds: registration.SYNCHRONISES_IN_ROUNDS,
    GradientsAnnounced: registration.GRADIENTS_ANNOUNCED,
    GradientsCompressed: registration.GRADIENTS_COMPRESSED,
}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.__name__)
def test_a_strategy_is_taken_for_what_the_registration_says_and_for_nothing_else(strategy, protocol):
    assert isinstance(STRATEGIES[strategy](), protocol) == (strategy in PROTOCOLS[protocol])


def test_the_registration_has_a_list_for_every_protocol_of_the_contract():
    assert {each for each in vars(contract).values() if is_protocol(each) and each.__module__ == contract.__name__} == {
        *PROTOCOLS
    }


@pytest.mark.parametrize("callback", [AdaptivePartition, BatchNormReestimation, CommProfiler])
def test_a_callback_that_sends_records_its_messages(callback):
    made = callback(num_batches=1) if callback is BatchNormReestimation else callback()
    assert isinstance(made, MessagesRecorded)


def test_each_of_our_strategies_implements_a_protocol():
    assert set().union(*PROTOCOLS.values()) == {LocalUpdateStrategy, CompressedDDPStrategy, CyclicStrategy}


class Notes(Regression):
    """Looks at the rounds of the strategy in each batch."""

    def __init__(self, shorten_to=None):
        super().__init__()
        self.shorten_to, self.seen = shorten_to, []

    def on_train_batch_start(self, batch, batch_idx):
        if self.shorten_to is not None and batch_idx == 0:
            self.trainer.strategy.shorten_gradient_phase(self.shorten_to)

    def training_step(self, batch, batch_idx):
        strategy = self.trainer.strategy
        self.seen.append((strategy.averages_gradients, strategy.gradient_phase_steps, strategy.round_in_force))
        return super().training_step(batch, batch_idx)


CASES = {None: 3, 1: 1, 5: 3, 0: 0}  # to what it is shortened, and how long it is then
NO_STEPS = (-1, 0.5, True)


def looks(rank):
    fits = []
    for shorten_to in (*CASES, *NO_STEPS):
        module, strategy = Notes(shorten_to), LocalUpdateStrategy(FixedPeriod(2), gradient_steps=3)
        before = (strategy.averages_gradients, strategy.gradient_phase_steps, strategy.round_in_force)
        try:
            trainer(strategy, 1).fit(module, loader(6, 0))
        except ValueError as error:
            fits.append(str(error))
        else:
            fits.append((before, module.seen))
    return fits


@pytest.fixture(scope="module")
def fits():
    return launch(looks, world_size=1)[0]


@pytest.mark.parametrize(("case", "phase"), list(enumerate(CASES.values())))
def test_a_gradient_phase_has_its_length_or_a_shorter_one_and_rounds_come_after_it(case, phase, fits):
    before, seen = fits[case]
    assert before == (True, 0, RoundInForce(0, None))
    assert [gradients for gradients, _, _ in seen] == [step < phase for step in range(6)]
    assert {steps for _, steps, _ in seen} == {phase}
    lengths = [0] * phase + [2] * (6 - phase) if phase % 2 == 0 else [0] * phase + [2] * (5 - phase) + [1]
    assert [each for _, _, each in seen] == [RoundInForce(steps, 6) for steps in lengths]


@pytest.mark.parametrize(("case", "steps"), list(enumerate(NO_STEPS)))
def test_a_gradient_phase_is_shortened_to_a_number_of_steps_and_to_nothing_else(case, steps, fits):
    said = fits[len(CASES) + case]
    words = ("LocalUpdateStrategy", "`shorten_gradient_phase`", repr(steps), "whole number >= 0", "0 begins")
    assert [word for word in words if word not in said] == []


def test_a_gradient_phase_is_not_shortened_outside_of_training():
    with pytest.raises(RuntimeError, match="shorten_gradient_phase") as caught:
        LocalUpdateStrategy(FixedPeriod(2), gradient_steps=3).shorten_gradient_phase(1)
    assert "`on_train_batch_start` on" in str(caught.value)
