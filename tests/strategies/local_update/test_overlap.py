"""Fits whose averages travel in the background: against one process by hand, and whatever comes in between."""

import time
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.processes import outcomes
from support.shared_ranks import SharedRanks
from support.training import Regression, descend, loader, local_update, network, trainer, weights

from lightning_comm import Averaging, FixedPeriod, LocalUpdateStrategy, QuadraticPeriod
from lightning_comm.core.local_update import PeriodRule
from lightning_comm.strategies.local_update import run as local_update_run

STEPS, PERIOD, OVERLAP = 14, 4, 2
BUCKET_MIB = 2e-4  # 209 bytes, of which the first layer alone has 280


class Trace(Callback):
    """This rank's weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, runner, pl_module, *_):
        self.weights.append(weights(pl_module))


class Paced(Regression):
    """Sleeps in each step: what the network has time for."""

    def __init__(self, pause_s=0.0, **kwargs):
        super().__init__(**kwargs)
        self.pause_s = pause_s

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause_s)
        return super().training_step(batch, batch_idx)


def fit(rank, averaging, period=PERIOD, world_size=2, module=None, **kw):
    rule = period if isinstance(period, PeriodRule) else FixedPeriod(period)
    trace, strategy = Trace(), local_update(rule, averaging=averaging)
    module = module or Regression()
    callbacks = [trace, *kw.pop("callbacks", [])]
    runner = trainer(strategy, world_size, callbacks=callbacks, **kw)
    runner.fit(module, loader(STEPS, rank), loader(2, rank))
    return trace.weights, weights(module), strategy


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- against one process ---------------------------------------------------------------------------------------------


def _trace(rank, compression, period, overlap):
    states, final, strategy = fit(rank, Averaging(BUCKET_MIB, compression, overlap), period)
    rounds = [(done.step, done.period_steps) for done in strategy.history]
    return states, final, rounds, strategy.ledger.payload_bytes("parameters")


def wires_of(differences, compression):
    """What each of two ranks sends of its difference, and their mean."""
    if compression is None:
        return differences, sum(0.5 * d for d in differences)
    wires = [(0.5 * d).bfloat16() for d in differences]
    return [2 * wire.double() for wire in wires], (wires[0] + wires[1]).double()


def add(corrections, parameters):
    for own, weights_of_rank in zip(corrections, parameters, strict=True):
        for correction, weight in zip(own, weights_of_rank, strict=True):
            weight += correction


def in_one_process(compression, period, overlap):
    """Weights of both ranks after every step. Rounds end every `period` steps; the last average is in full."""
    models = [network() for _ in range(2)]
    parameters = [[p.data for p in model.parameters()] for model in models]
    reference = [p.clone() for p in parameters[0]]
    due, landing = None, -1
    for done in range(1, STEPS + 1):
        for rank, model in enumerate(models):
            descend(model, rank, done - 1)
        if done == landing:
            add(due, parameters)
        if done == STEPS:
            for one, two in zip(*parameters, strict=True):
                one.copy_(two.copy_((one + two) / 2))
        elif done % period == 0:
            due, landing = [[], []], done + min(overlap, min(period, STEPS - done) - 1)
            for k, x in enumerate(reference):
                sent, mean = wires_of([each[k] - x for each in parameters], compression)
                x += mean
                for rank in range(2):
                    due[rank].append(mean - sent[rank])
        yield [[p.clone().numpy() for p in each] for each in parameters]


COMPRESSIONS, ROUNDS = (None, "bf16"), ((4, 2), (4, 3), (5, 1), (4, 40))
# each of the rounds, either compression with two
TRACED = [(None, 4, 2), ("bf16", 4, 3), (None, 5, 1), ("bf16", 4, 40)]
MORE_TRACED = [(compression, *rounds) for compression in COMPRESSIONS for rounds in ROUNDS]
MORE_TRACED = [case for case in MORE_TRACED if case not in TRACED]


@pytest.mark.parametrize(
    ("compression", "period", "overlap"),
    [*TRACED, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in MORE_TRACED)],
)
def test_two_ranks_do_what_one_process_does_for_both(compression, period, overlap):
    expected = list(in_one_process(compression, period, overlap))
    runs = RUNS if (compression, period, overlap) in TRACED else MORE_RUNS
    answers = runs["traced", compression, period, overlap]
    ends = [*range(period, STEPS, period), STEPS]
    for rank, (states, _, rounds, payload_bytes) in enumerate(answers):
        assert rounds == [(end, end - start) for start, end in zip([0, *ends], ends, strict=False)]
        numel = sum(parameter.numel() for parameter in network().parameters())
        assert payload_bytes == (len(ends) - 1) * (2 if compression else 8) * numel + 8 * numel
        for step, state in enumerate(states):
            for got, wanted in zip(state, expected[step][rank], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12, err_msg=f"rank {rank} after {step + 1}")
    assert any((a != b).any() for a, b in zip(answers[0][0][-2], answers[1][0][-2], strict=True))
    assert_same(answers[0][1], answers[1][1])


# ---- timing, evaluation, other rounds --------------------------------------------------------------------------------


def _paced(rank, pauses_s):
    states, *_ = fit(rank, Averaging(BUCKET_MIB, "int8", OVERLAP), module=Paced(pauses_s[rank]))
    return states


def test_how_fast_ranks_are_changes_nothing():
    first, second = RUNS["paced", 0], RUNS["paced", 1]
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)


def _validated(rank):
    class Inside(Callback):
        def on_validation_batch_start(self, runner, pl_module, *_):
            if not runner.sanity_checking:
                seen.append(weights(pl_module))

    seen = []
    after_each_step = {"limit_val_batches": 1, "val_check_interval": 1}
    states, *_ = fit(rank, Averaging(BUCKET_MIB, None, OVERLAP), callbacks=[Inside()], **after_each_step)
    return states, seen


def test_validation_in_flight_sees_the_average_and_leaves_no_trace():
    plain, validated = RUNS["traced", None, PERIOD, OVERLAP], RUNS["validated"]
    for rank in range(2):
        for a, b in zip(plain[rank][0], validated[rank][0], strict=True):
            assert_same(a, b)
    for step, (one, two) in enumerate(zip(*[seen for _, seen in validated], strict=True)):
        own = [states[step] for states, _ in validated]
        for got, same, a, b in zip(one, two, *own, strict=True):
            np.testing.assert_array_equal(got, same)
            np.testing.assert_allclose(got, (a + b) / 2, rtol=0, atol=1e-12)


class Unfreezing(Regression):
    """The first layer is trained from step 6 on, which lies in a flight."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 5:
            self.net[0].requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def norm():
    return Regression(network(norm=True))


def falling():
    return Regression(schedule=lambda step: 0.7**step)


def _ends(rank, make, period, kw):
    _, final, strategy = fit(rank, Averaging(BUCKET_MIB, "int8", OVERLAP), period, module=make(), **kw)
    return final, [done.step for done in strategy.history]


ENDS = {
    "every-step": (Regression, 1, {}, list(range(1, 15))),
    "epochs-norm": (norm, 4, {"max_epochs": 2}, [4, 8, 12, 16, 20, 24, 28]),
    "max-steps": (Regression, 4, {"max_epochs": -1, "max_steps": 6}, [4, 6]),
    "accumulation": (Regression, 3, {"accumulate_grad_batches": 2}, [3, 6, 7]),
    "unfreezing": (Unfreezing, 4, {}, [4, 8, 12, 14]),
    "qsr": (falling, QuadraticPeriod(alpha=0.05, h_base=2), {}, [2, 6, 14]),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_ends_with_equal_weights(name):
    (one, steps), (two, _) = RUNS["ends", name]
    *_, ends = ENDS[name]
    assert steps == ends
    assert_same(one, two)


def _moving_average(rank):
    ema = EMAWeightAveraging(decay=0.8)
    _, final, _ = fit(rank, Averaging(BUCKET_MIB, "int8", OVERLAP), callbacks=[ema])
    return final, weights(ema._average_model.module)


def test_moving_averages_of_weights_end_equal_too():
    answers = RUNS["moving average"]
    for final, shadow in answers:
        assert_same(final, answers[0][0])
        assert_same(final, shadow)  # copied over the weights at the end


def _twice(rank):
    """Two fits with one Trainer and strategy: the second has a group of its own."""
    strategy = local_update(FixedPeriod(PERIOD), averaging=Averaging(BUCKET_MIB, None, OVERLAP))
    runner, module = trainer(strategy, 2), Regression()
    runner.fit(module, loader(STEPS, rank))
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader(STEPS, rank))
    return weights(module), [done.step for done in strategy.history]


def test_a_second_fit_goes_on():
    (one, ends), (two, _) = RUNS["twice"]
    assert ends[-1] == 2 * STEPS
    assert_same(one, two)


# ---- stops and failures ----------------------------------------------------------------------------------------------


class At(Callback):
    def __init__(self, step, action, who=1):
        self.step, self.action, self.who = step, action, who

    def on_train_batch_end(self, runner, *_):
        if runner.global_rank == self.who and runner.global_step == self.step:
            self.action(runner)


def stop(runner):
    runner.should_stop = True


def fail(runner):
    raise ValueError("the disk is full")


def _stop(rank, step):
    states, final, _ = fit(
        rank, Averaging(BUCKET_MIB, "bf16", 3), module=Paced(0.02), callbacks=[At(step, stop)], max_epochs=9
    )
    return len(states), final


# where an average departs, and while it is in flight
@pytest.mark.parametrize("step", [4, 6])
def test_a_stop_in_flight_leaves_equal_weights(step):
    (steps, one), (same, two) = RUNS["stopped", step]
    assert steps == same < 9 * STEPS
    assert_same(one, two)


def _fail(rank, step):
    fit(rank, Averaging(BUCKET_MIB, "bf16", 3), module=Paced(0.02), callbacks=[At(step, fail)], max_epochs=9)


# in front of a departure, where others wait to meet, and in flight, where they wait for the average
@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.exhaustive) for step in (4, 5)), 6])
def test_an_exception_on_one_rank_ends_all_and_is_shown(step):
    started = time.monotonic()
    (_, peer), (_, own) = outcomes(_fail, step, world_size=2, ends_within_s=0.2)
    assert time.monotonic() - started < 40
    assert "the disk is full" in own
    assert "rank 1" in peer


# ---- settings --------------------------------------------------------------------------------------------------------


def _clamped(rank):
    said = []
    with mock.patch.object(local_update_run, "rank_zero_info", said.append):
        *_, strategy = fit(rank, Averaging(overlap_steps=6), period=3)
    return [done.step for done in strategy.history], said


def test_a_clamped_overlap_is_said_once():
    for ends, said in RUNS["clamped"]:
        assert ends == [3, 6, 9, 12, 14]
        assert len(said) == 1
        for words in ("`overlap_steps`=6", "the 3 steps of the round", "begins at step 3", "lands after 2:"):
            assert words in said[0]


def test_averaged_optimizer_state_is_refused_beside_it():
    with pytest.raises(ValueError, match="overlap_steps") as caught:
        LocalUpdateStrategy(FixedPeriod(8), averaging=Averaging(overlap_steps=2), optimizer_state="average")
    assert all(word in str(caught.value) for word in ("optimizer_state='average'", "overlap_steps=2", "Leave out"))


RUNS = SharedRanks(
    {
        **{("traced", *each): (_trace, *each) for each in TRACED},
        ("paced", 0): (_paced, [0.0, 0.02]),
        ("paced", 1): (_paced, [0.01, 0.0]),
        "validated": (_validated,),
        **{("ends", name): (_ends, *case[:3]) for name, case in ENDS.items()},
        "moving average": (_moving_average,),
        "twice": (_twice,),
        **{("stopped", step): (_stop, step) for step in (4, 6)},
        "clamped": (_clamped,),
    },
    world_size=2,
)
MORE_RUNS = SharedRanks({("traced", *each): (_trace, *each) for each in MORE_TRACED}, world_size=2)
