"""Shares of a global batch under local updates: gradients as they are, averages weighted by samples."""

from datetime import timedelta

import numpy as np
import pytest
import torch
from support.partition import BATCH, Fit, close, fit, loader_of
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Stop, network, weights
from torch import nn

from lightning_comm import AdaptivePartition, Averaging, FixedPeriod, LocalUpdateStrategy

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there
SIZES = (9, 3)


def local(period, **kwargs):
    return LocalUpdateStrategy(FixedPeriod(period), timeout=timedelta(seconds=40), **kwargs)


def _run(rank, options, strategy_args, samples):
    model, strategy = Fit(), local(**strategy_args)
    fit(strategy, 2, model, loader_of(samples), AdaptivePartition(**options), max_epochs=2)
    return weights(model), model.seen, [round_.step for round_ in strategy.history]


def by_hand(seen, period, samples, gradient_steps=0):
    """Train all ranks in one process: local steps of each, then the mean of the weights by samples of the round."""
    data = loader_of(samples).dataset
    nets = [network() for _ in seen]
    counted = [0] * len(seen)
    last = len(seen[0])
    for step in range(last):
        gradients = []
        for rank, (net, batches) in enumerate(zip(nets, seen, strict=True)):
            x, y = data.x[batches[step]], data.y[batches[step]]
            net.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            gradients.append([parameter.grad.clone() for parameter in net.parameters()])
            counted[rank] += len(x) if step >= gradient_steps else 0
        sizes = [len(batches[step]) for batches in seen]
        for rank, net in enumerate(nets):
            for k, parameter in enumerate(net.parameters()):
                mean = sum(n * each[k] for n, each in zip(sizes, gradients, strict=True)) / sum(sizes)
                parameter.data.sub_(0.05 * (mean if step < gradient_steps else gradients[rank][k]))
        done = step + 1
        if done > gradient_steps and ((done - gradient_steps) % period == 0 or done == last):
            for group in zip(*(net.parameters() for net in nets), strict=True):
                mean = sum(n * each.data for n, each in zip(counted, group, strict=True)) / sum(counted)
                for each in group:
                    each.data.copy_(mean)
            counted = [0] * len(seen)
    return weights(nets[0])


@pytest.mark.parametrize("gradient_steps", [0, 3])
def test_a_round_is_averaged_by_the_samples_that_each_rank_trained_on(gradient_steps):
    samples = 4 * BATCH + 7  # a tail of other sizes
    options = {"mode": "fixed", "batch_sizes": SIZES}
    args = {"period": 3, "gradient_steps": gradient_steps}
    ranks = launch(_run, options, args, samples, world_size=2)
    assert [len(each) for each in ranks[0][1]] == [9, 9, 9, 9, 6] * 2
    expected = by_hand([seen for _, seen, _ in ranks], 3, samples, gradient_steps)
    for got, _, steps in ranks:
        assert close(got, expected)
        assert steps == list(range(gradient_steps + 3, 10, 3)) + ([10] if (10 - gradient_steps) % 3 else [])
    unweighted = by_hand([[[0, 1, 2]] * 10, [[3, 4, 5]] * 10], 3, samples)
    assert not close(ranks[0][0], unweighted, 1e-3)


def test_a_sample_that_only_fills_a_batch_trains_nothing():
    samples = BATCH + 1  # the tail is a single sample, which rank 0 gets
    ranks = launch(_run, {"mode": "fixed", "batch_sizes": SIZES}, {"period": 10}, samples, world_size=2)
    whole = [ranks[0][1], [batch if len(batch) == 3 else [] for batch in ranks[1][1]]]
    assert [len(batch) for batch in ranks[1][1]] == [3, 1, 3, 1]
    data = loader_of(samples).dataset
    nets = [network(), network()]
    for net, batches in zip(nets, whole, strict=True):
        for batch in filter(None, batches):
            net.zero_grad()
            nn.functional.mse_loss(net(data.x[batch]), data.y[batch]).backward()
            for parameter in net.parameters():
                parameter.data.sub_(0.05 * parameter.grad)
    counted = [sum(map(len, batches)) for batches in whole]
    assert counted == [20, 6]
    expected = [
        (counted[0] * a.data + counted[1] * b.data).numpy() / sum(counted)
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    ]
    for got, _, _ in ranks:
        assert close(got, expected)


def _until(rank, path, stop_at, averaging):
    model, strategy = Fit(), local(4, averaging=averaging)
    stop = [Stop(stop_at, path)] if stop_at else []
    partition = AdaptivePartition(mode="fixed", batch_sizes=SIZES)
    ckpt_path = path if path and not stop_at else None
    fit(strategy, 2, model, loader_of(5 * BATCH + 3), partition, stop, ckpt_path=ckpt_path, max_epochs=2)
    return weights(model)


AVERAGINGS = {
    "in full": None,
    "bf16": Averaging(compression="bf16"),
    "overlap": Averaging(overlap_steps=2),
    "topk, overlap": Averaging(compression="topk", overlap_steps=3),
}
STOPS = (2, 5, 9)
OFTEN = [("in full", 9), ("bf16", 5), ("overlap", 5), ("topk, overlap", 2), ("topk, overlap", 9)]


@pytest.fixture(scope="module")
def until(tmp_path_factory, request):
    exhaustive, cases = request.config.getoption("exhaustive"), {}
    folder = tmp_path_factory.mktemp("stopped")
    for name, averaging in AVERAGINGS.items():
        cases[name, "whole"] = (_until, None, 0, averaging)
        for stop_at in STOPS if exhaustive else [at for each, at in OFTEN if each == name]:
            path = str(folder / f"{name} {stop_at}.ckpt")
            cases[name, "stopped", stop_at] = (_until, path, stop_at, averaging)
            cases[name, "resumed", stop_at] = (_until, path, 0, averaging)
    return SharedRanks(cases, world_size=2)


@pytest.mark.parametrize(
    ("averaging", "stop_at"),
    [
        pytest.param(name, stop_at, marks=() if (name, stop_at) in OFTEN else pytest.mark.exhaustive)
        for name in AVERAGINGS
        for stop_at in STOPS
    ],
)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(until, averaging, stop_at):
    whole, resumed = until[averaging, "whole"], until[averaging, "resumed", stop_at]
    for expected, got in zip(whole, resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
