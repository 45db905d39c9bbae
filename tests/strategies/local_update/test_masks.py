"""Local updates of a pruned model: only live weights are averaged, and pruned ones stay zero."""

import time
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.processes import launch
from support.training import Regression, loader, local_update, network, sample, trainer, weights

from lightning_comm import Averaging, FixedPeriod, MagnitudePruning, PruningSchedule, SparseMask
from lightning_comm.transport.departed_average import DepartedAverage

STEPS, PERIOD, BATCH = 14, 4, 4
BUCKET_MIB = 2e-4  # 209 bytes, of which the first layer alone has 280
PRUNING = MagnitudePruning(sparsity=0.5)
MASK = SparseMask(PRUNING)


class Trace(Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, runner, pl_module, *_):
        self.weights.append(weights(pl_module))


def _fit(rank, compression, overlap, optimizer=None, kw=None):
    trace, module = Trace(), Regression(optimizer=optimizer)
    callbacks = [trace, *(kw or {}).pop("callbacks", [])]
    strategy = local_update(FixedPeriod(PERIOD), averaging=Averaging(BUCKET_MIB, compression, overlap))
    trainer(strategy, 2, callbacks=callbacks, **(kw or {})).fit(module, loader(STEPS, rank))
    return trace.weights, weights(module), strategy.ledger.payload_bytes("parameters")


def masked_step(model, masks, rank, step):
    samples = [sample(rank, BATCH * step + k) for k in range(BATCH)]
    x, y = (torch.stack(each) for each in zip(*samples, strict=True))
    model.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad * masks[name] if name in masks else parameter.grad
        parameter.data.add_(gradient, alpha=-0.05)


def in_one_process(overlap):
    """Both ranks' weights after every step: pruned at the start, averaged every `PERIOD` steps."""
    models = [network() for _ in range(2)]
    masks = PRUNING.masks(models[0])
    for model in models:
        for name, mask in masks.items():
            model.get_parameter(name).data.mul_(mask)
    due, landing = [], -1
    for done in range(1, STEPS + 1):
        for rank, model in enumerate(models):
            masked_step(model, masks, rank, done - 1)
        pairs = list(zip(*(model.parameters() for model in models), strict=True))
        if done % PERIOD == 0 or done == STEPS:
            due = [(one.data - two.data) / 2 for one, two in pairs]
            landing = done if done == STEPS else done + min(overlap, STEPS - done - 1)
        if done == landing:
            for (one, two), half in zip(pairs, due, strict=True):
                one.data -= half
                two.data += half
        yield [[p.detach().clone().numpy() for p in model.parameters()] for model in models]


@pytest.mark.parametrize("overlap", [0, 2])
def test_two_ranks_do_what_one_process_does_for_both_and_send_live_weights_alone(overlap):
    expected = list(in_one_process(overlap))
    numel = sum(p.numel() for p in network().parameters())
    live = numel - sum(int((~mask).sum()) for mask in PRUNING.masks(network()).values())
    assert live < 0.7 * numel
    for rank, (states, _, payload_bytes) in enumerate(launch(_fit, MASK, overlap, world_size=2)):
        assert payload_bytes == 8 * (3 * live + numel)  # the last one in full
        for step, state in enumerate(states):
            for got, wanted in zip(state, expected[step][rank], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12, err_msg=f"rank {rank} after {step + 1}")


def _with_late_threads(rank):
    travel, finals = DepartedAverage.travel, []
    for late in range(2):

        def later(self, *args, late=late):
            time.sleep(0.2 if rank == late else 0)
            travel(self, *args)

        gradual = SparseMask(PRUNING, schedule=PruningSchedule(start_step=4, end_step=12, every_steps=4))
        with mock.patch.object(DepartedAverage, "travel", later):
            finals.append(_fit(rank, gradual, 2)[1])
    return finals


def test_masks_change_when_what_is_in_flight_has_arrived_on_every_rank():
    answers = launch(_with_late_threads, world_size=2)
    for one, *others in zip(*(arrays for finals in answers for arrays in finals), strict=True):
        for other in others:
            np.testing.assert_array_equal(other, one)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def pruned(state):
    return sum(int((tensor == 0).sum()) for tensor in state)


COMPRESSIONS = {"mask": MASK, "bf16": [MASK, "bf16"], "int8": [MASK, "int8"]}
# either optimizer, and each codec behind the mask; of the mask alone, each weight is compared above
PRUNED = [("bf16", momentum), ("int8", adamw)]
MORE_PRUNED = [("mask", adamw), ("mask", momentum), ("bf16", adamw), ("int8", momentum)]


@pytest.mark.parametrize(
    ("compression", "optimizer"),
    [*PRUNED, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in MORE_PRUNED)],
)
def test_pruned_weights_are_zero_after_every_step_and_ranks_end_equal(compression, optimizer):
    count = sum(int((~mask).sum()) for mask in PRUNING.masks(network()).values())
    answers = launch(_fit, COMPRESSIONS[compression], 2, optimizer, {"gradient_clip_val": 0.5}, world_size=2)
    for states, final, _ in answers:
        assert {pruned(state) for state in states} == {count}
        for mine, first in zip(final, answers[0][1], strict=True):
            np.testing.assert_array_equal(mine, first)


def _moving_average(rank):
    ema = EMAWeightAveraging(decay=0.8)
    _, final, _ = _fit(rank, MASK, 0, adamw, {"callbacks": [ema]})
    return pruned(final), pruned(weights(ema._average_model.module))


def test_moving_averages_of_weights_are_pruned_too():
    count = sum(int((~mask).sum()) for mask in PRUNING.masks(network()).values())
    assert launch(_moving_average, world_size=2) == [(count, count)] * 2


def _gradual(rank):
    later = SparseMask(PRUNING, schedule=PruningSchedule(2, 11, 3))
    states, *_ = _fit(rank, later, 1, adamw)
    return [pruned(state) for state in states]


def test_a_schedule_prunes_where_rounds_begin():
    one, two = launch(_gradual, world_size=2)
    assert one == two
    assert one[0] == 0
    assert sorted(one) == one
    changes = [step + 1 for step in range(1, STEPS) if one[step] != one[step - 1]]
    assert changes == [8, 12]  # due before steps 5, 8 and 11: when ranks have met


class Watching(Regression):
    """Counts zeros in each forward, and in the moving average after each step."""

    def __init__(self):
        super().__init__(optimizer=momentum)
        self.zeros = []

    def training_step(self, batch, batch_idx):
        self.zeros.append(pruned(weights(self)))
        return super().training_step(batch, batch_idx)


class ZerosOfAverage(Callback):
    def __init__(self, ema):
        self.ema, self.zeros = ema, []

    def on_train_batch_start(self, *_):
        self.zeros.append(pruned(weights(self.ema._average_model.module)))


def _zeros(rank, period, overlap, steps):
    ema = EMAWeightAveraging(decay=0.8)
    watch, module = ZerosOfAverage(ema), Watching()
    later = SparseMask(PRUNING, schedule=PruningSchedule(3, 11, 3))
    strategy = local_update(FixedPeriod(period), averaging=Averaging(BUCKET_MIB, later, overlap))
    trainer(strategy, 2, callbacks=[ema, watch], max_steps=steps).fit(module, loader(STEPS, rank))
    return module.zeros, watch.zeros, pruned(weights(module))


@pytest.mark.parametrize(
    ("period", "overlap", "steps"),
    [
        *((1, 1, 14), (4, 3, 14)),
        pytest.param(4, 2, 13, marks=pytest.mark.exhaustive),
        pytest.param(1, 2, 14, marks=pytest.mark.exhaustive),
        pytest.param(4, 0, 13, marks=pytest.mark.exhaustive),
    ],
)
def test_an_average_of_before_a_pruning_brings_no_weight_back(period, overlap, steps):
    count = sum(int((~mask).sum()) for mask in PRUNING.masks(network()).values())
    for zeros, averaged, final in launch(_zeros, period, overlap, steps, world_size=2):
        assert sorted(zeros) == zeros  # ever more, in the forward too
        assert sorted(averaged) == averaged
        assert zeros[-1] == final == count
