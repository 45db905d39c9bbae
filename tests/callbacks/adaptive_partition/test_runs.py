"""Partitioned runs of real ranks against one process on the whole of each batch."""

from datetime import timedelta

import pytest
import torch
from support.partition import BATCH, Fit, Manual, Move, TwiceFromOneLoss, close, fit, loader_of, one_process
from support.processes import launch
from support.training import Stop, network, weights

from lightning_comm import AdaptivePartition, CompressedDDPStrategy
from lightning_comm.transport.compression.full import Full

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there


PLANS = {
    "even": {"mode": "fixed", "shares": [1, 1]},
    "uneven": {"mode": "fixed", "batch_sizes": [9, 3]},
    "extreme": {"mode": "fixed", "batch_sizes": [1, 11]},
}


def _strategy(name):
    if name == "full":
        return CompressedDDPStrategy(Full(), timeout=timedelta(seconds=40), bucket_cap_mb=0.0003)
    return name


def _fit(rank, strategy, plan, module, samples, dtype, moves, kwargs):
    partition = AdaptivePartition(**plan)
    model = module(net=network(dtype))
    loader = loader_of(samples, dtype, **kwargs.pop("loader", {}))
    movers = [Move(partition, moves)] if moves else []
    fit(_strategy(strategy), kwargs.pop("ranks", 2), model, loader, partition, movers, max_epochs=2, **kwargs)
    return weights(model), model.seen, model.losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("strategy", ["ddp", "full"])
def test_the_weights_are_those_of_one_process_on_the_whole_batch(strategy, plan, dtype, tolerance):
    samples = 5 * BATCH + 7  # with a tail
    expected = one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=2)
    ranks = launch(_fit, strategy, PLANS[plan], Fit, samples, dtype, {}, {}, world_size=2)
    for got, _, _ in ranks:
        assert close(got, expected, tolerance)


@pytest.mark.parametrize(
    ("module", "kwargs"),
    [
        (Fit, {"accumulate_grad_batches": 3}),
        (Fit, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}),
        (Fit, {"limit_train_batches": 4}),
        (Fit, {"loader": {"tail": "drop"}}),
        (Fit, {"loader": {"tail": "merge"}}),
        (Fit, {"loader": {"num_workers": 2, "prefetch_factor": 3}}),
        (Fit, {"use_distributed_sampler": True}),
        (Manual, {}),
        (TwiceFromOneLoss, {}),
    ],
    ids=str,
)
def test_modes_of_training_leave_the_gradient_exact(module, kwargs):
    samples, dtype = 5 * BATCH + 1, torch.float64  # the tail has one sample, so a rank has a dummy of weight 0
    alone = {name: value for name, value in kwargs.items() if name not in ("loader", "use_distributed_sampler")}
    loader = loader_of(samples, dtype, tail=kwargs.get("loader", {}).get("tail", "keep"))
    expected = one_process(module(net=network(dtype)), loader, max_epochs=2, **alone)
    ranks = launch(_fit, "ddp", PLANS["uneven"], module, samples, dtype, {4: (2, 10)}, dict(kwargs), world_size=2)
    for got, _, _ in ranks:
        assert close(got, expected, 1e-12)


@pytest.mark.parametrize("moves", [{}, {2: (3, 9)}, {1: (11, 1), 8: (6, 6), 15: (1, 11)}], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_weights_do_not_depend_on_the_plan_or_on_changes_of_it(moves, workers):
    samples, dtype = 20 * BATCH + 5, torch.float64
    expected = one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=2)
    kwargs = {"loader": {"num_workers": workers}}
    ranks = launch(_fit, "ddp", PLANS["uneven"], Fit, samples, dtype, moves, kwargs, world_size=2)
    for got, _, _ in ranks:
        assert close(got, expected, 1e-12)
    for step, (one, other) in enumerate(zip(ranks[0][1], ranks[1][1], strict=True)):
        assert len({*one, *other}) in (BATCH, 5), step
    for epoch in (0, 1):
        steps = slice(epoch * 21, epoch * 21 + 21)
        # a set in each step, since a rank that gets nothing of the tail is given a sample of another one, of weight 0
        both = [{*one, *other} for one, other in zip(ranks[0][1][steps], ranks[1][1][steps], strict=True)]
        assert sorted(index for step in both for index in step) == list(range(samples))
    sizes = {(len(one), len(other)) for one, other in zip(ranks[0][1], ranks[1][1], strict=True)}
    assert set(moves.values()) | {(9, 3)} <= sizes


def test_three_ranks_of_unequal_shares_train_as_one_process():
    samples, dtype = 6 * BATCH + 2, torch.float64  # fewer in the tail than ranks
    expected = one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=2)
    plan = {"mode": "fixed", "shares": [1, 2, 4]}
    ranks = launch(_fit, "ddp", plan, Fit, samples, dtype, {3: (5, 5, 2)}, {"ranks": 3}, world_size=3)
    for got, _, _ in ranks:
        assert close(got, expected, 1e-12)


def test_in_bf16_the_gradient_is_weighted_too():
    samples, dtype = 5 * BATCH, torch.float32
    expected = one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=2, precision="bf16-mixed")
    kwargs = {"precision": "bf16-mixed"}
    even, uneven = (
        launch(_fit, "ddp", PLANS[plan], Fit, samples, dtype, {}, dict(kwargs), world_size=2)[0][0]
        for plan in ("even", "extreme")
    )
    assert close(uneven, expected, 0.02)  # rounding of bf16, by batches of other sizes; 0.3 if not weighted
    assert close(even, expected, 0.02)


def test_logged_losses_keep_their_values():
    samples, dtype = 3 * BATCH, torch.float64
    ranks = launch(_fit, "ddp", PLANS["extreme"], Fit, samples, dtype, {}, {"max_steps": 1}, world_size=2)
    data = loader_of(samples, dtype).dataset
    net = network(dtype)
    for _, seen, losses in ranks:
        x, y = data.x[seen[0]], data.y[seen[0]]
        assert losses[0] == pytest.approx(float(torch.nn.functional.mse_loss(net(x), y).detach()), rel=1e-12)


def test_a_loss_that_is_a_sum_is_not_scaled():
    class Summed(Fit):
        def training_step(self, batch, batch_idx):
            x, y, index = batch
            self.seen.append(index.tolist())
            return torch.nn.functional.mse_loss(self.net(x), y, reduction="sum") * 2 / BATCH  # two ranks' mean of it

    samples, dtype = 4 * BATCH, torch.float64
    expected = one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=2)
    plan = {**PLANS["extreme"], "loss_reduction": "sum"}
    for got, _, _ in launch(_fit, "ddp", plan, Summed, samples, dtype, {}, {}, world_size=2):
        assert close(got, expected, 1e-12)


# ---- stopping and going on -------------------------------------------------------------------------------------------


def _until(rank, ranks, plan, path, stop_at, workers, asks_for_length):
    class Asks(Fit):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches > 0  # after which Lightning drops the loader's state
            return super().configure_optimizers()

    partition, model = AdaptivePartition(**plan), (Asks if asks_for_length else Fit)()
    stop = [Stop(stop_at, path)] if stop_at else []
    loader = loader_of(5 * BATCH + 3, num_workers=workers)
    fit("ddp", ranks, model, loader, partition, stop, ckpt_path=None if stop_at else path, max_epochs=3)
    return weights(model), model.seen


@pytest.mark.parametrize(
    ("stop_at", "workers", "asks_for_length"),
    [*((stop_at, workers, False) for stop_at in (1, 4, 6, 8, 12) for workers in (0, 2)), (4, 0, True), (8, 2, True)],
)
def test_a_run_resumed_under_another_plan_or_on_other_ranks_ends_as_one_that_was_not_stopped(
    stop_at, workers, asks_for_length, tmp_path
):
    path = str(tmp_path / "stopped.ckpt")
    expected = one_process(Fit(), loader_of(5 * BATCH + 3), max_epochs=3)
    launch(_until, 2, PLANS["uneven"], path, stop_at, workers, asks_for_length, world_size=2)
    plans = {2: PLANS["extreme"], 3: {"mode": "fixed", "shares": [3, 2, 1]}, 1: {"mode": "observe"}}
    for ranks, plan in plans.items():
        for got, seen in launch(_until, ranks, plan, path, 0, workers, asks_for_length, world_size=ranks):
            assert close(got, expected, 1e-12)
            assert len(seen) == 18 - stop_at
