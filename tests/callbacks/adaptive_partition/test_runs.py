"""Partitioned runs of real ranks against one process on the whole of each batch."""

from datetime import timedelta
from functools import cache

import pytest
import torch
from support.partition import BATCH, Fit, Manual, Move, TwiceFromOneLoss, close, fit, loader_of, one_process
from support.processes import launch
from support.shared_ranks import SharedRanks
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


def some(cases, often):
    """Parameters of all cases, of which those that are not run often are left to exhaustive runs."""
    return [pytest.param(*each, marks=() if each in often else pytest.mark.exhaustive) for each in cases]


@cache
def alone(samples, dtype=torch.float64, epochs=2):
    """Weights that one process has after training on the whole of each batch."""
    return one_process(Fit(net=network(dtype)), loader_of(samples, dtype), max_epochs=epochs)


@pytest.fixture(scope="module")
def of_two(request):
    """Answers of :func:`_fit` on two ranks."""
    exhaustive = request.config.getoption("exhaustive")
    whole = {
        (strategy, plan, dtype): (strategy, PLANS[plan], Fit, WITH_TAIL, dtype, {}, {})
        for strategy, plan, dtype in (WHOLE if exhaustive else WHOLE_OFTEN)
    }
    uneven, exact = PLANS["uneven"], torch.float64
    modes = {
        name: ("ddp", uneven, module, ONE_IN_TAIL, exact, {4: (2, 10)}, dict(kwargs))
        for name, (module, kwargs) in MODES.items()
        if exhaustive or name not in SELDOM
    }
    moved = {
        (name, workers): ("ddp", uneven, Fit, MOVED, exact, MOVES[name], {"loader": {"num_workers": workers}})
        for name, workers in (MOVED_HOW if exhaustive else MOVED_OFTEN)
    }
    return SharedRanks({name: (_fit, *args) for name, args in {**whole, **modes, **moved}.items()}, world_size=2)


def _fit(rank, strategy, plan, module, samples, dtype, moves, kwargs):
    partition = AdaptivePartition(**plan)
    model = module(net=network(dtype))
    loader = loader_of(samples, dtype, **kwargs.pop("loader", {}))
    movers = [Move(partition, moves)] if moves else []
    fit(_strategy(strategy), kwargs.pop("ranks", 2), model, loader, partition, movers, max_epochs=2, **kwargs)
    return weights(model), model.seen, model.losses


WITH_TAIL = 5 * BATCH + 7
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12}
WHOLE = [(strategy, plan, dtype) for strategy in ("ddp", "full") for plan in PLANS for dtype in DTYPES]
WHOLE_OFTEN = [
    ("ddp", "even", torch.float32),
    ("ddp", "extreme", torch.float64),
    ("full", "uneven", torch.float64),
    ("full", "extreme", torch.float32),
]


@pytest.mark.parametrize(("strategy", "plan", "dtype"), some(WHOLE, WHOLE_OFTEN), ids=str)
def test_the_weights_are_those_of_one_process_on_the_whole_batch(of_two, strategy, plan, dtype):
    expected = alone(WITH_TAIL, dtype)
    ranks, tolerance = of_two[strategy, plan, dtype], DTYPES[dtype]
    for got, _, _ in ranks:
        assert close(got, expected, tolerance)


MODES = {
    "accumulated": (Fit, {"accumulate_grad_batches": 3}),
    "clipped": (Fit, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}),
    "limited": (Fit, {"limit_train_batches": 4}),
    "without the tail": (Fit, {"loader": {"tail": "drop"}}),
    "with the tail in the last batch": (Fit, {"loader": {"tail": "merge"}}),
    "workers": (Fit, {"loader": {"num_workers": 2, "prefetch_factor": 3}}),
    "distributed sampler": (Fit, {"use_distributed_sampler": True}),
    "by hand": (Manual, {}),
    "twice from one loss": (TwiceFromOneLoss, {}),
}
SELDOM = ("accumulated", "workers")  # as "clipped" is, and the runs below whose shares move
ONE_IN_TAIL = 5 * BATCH + 1  # so a rank has a dummy of weight 0


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.exhaustive if mode in SELDOM else ()) for mode in MODES]
)
def test_modes_of_training_leave_the_gradient_exact(of_two, mode):
    (module, kwargs), samples, dtype = MODES[mode], ONE_IN_TAIL, torch.float64
    plain = {name: value for name, value in kwargs.items() if name not in ("loader", "use_distributed_sampler")}
    loader = loader_of(samples, dtype, tail=kwargs.get("loader", {}).get("tail", "keep"))
    expected = one_process(module(net=network(dtype)), loader, max_epochs=2, **plain)
    for got, _, _ in of_two[mode]:
        assert close(got, expected, 1e-12)


MOVES = {"no": {}, "one": {2: (3, 9)}, "three": {1: (11, 1), 8: (6, 6), 15: (1, 11)}}
STEPS = 11  # of an epoch
MOVED = (STEPS - 1) * BATCH + 5
MOVED_HOW = [(moved, workers) for moved in MOVES for workers in (0, 2)]
MOVED_OFTEN = [("no", 0), ("one", 0), ("three", 2)]


@pytest.mark.parametrize(("moved", "workers"), some(MOVED_HOW, MOVED_OFTEN))
def test_weights_do_not_depend_on_the_plan_or_on_changes_of_it(of_two, moved, workers):
    samples, moves = MOVED, MOVES[moved]
    expected = alone(samples)
    ranks = of_two[moved, workers]
    for got, _, _ in ranks:
        assert close(got, expected, 1e-12)
    for step, (one, other) in enumerate(zip(ranks[0][1], ranks[1][1], strict=True)):
        assert len({*one, *other}) in (BATCH, 5), step
    for epoch in (0, 1):
        steps = slice(epoch * STEPS, (epoch + 1) * STEPS)
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


OTHER_PLANS = {2: PLANS["extreme"], 3: {"mode": "fixed", "shares": [3, 2, 1]}, 1: {"mode": "observe"}}
STOPS = [(stop_at, workers, False) for stop_at in (1, 4, 6, 8, 12) for workers in (0, 2)]
STOPS += [(4, 0, True), (8, 2, True)]
RESUMED = [(*stop, ranks) for stop in STOPS for ranks in OTHER_PLANS]
# in an epoch and between two of them, on fewer, as many and more ranks
RESUMED_OFTEN = [(1, 0, False, 3), (4, 0, True, 1), (6, 0, False, 2), (8, 2, True, 2)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, request):
    """Runs that stop on two ranks, and by the number of ranks those that go on from there."""
    cases = RESUMED if request.config.getoption("exhaustive") else RESUMED_OFTEN
    folder = tmp_path_factory.mktemp("stopped")
    paths = {stop: str(folder / f"{stop}.ckpt") for *stop, _ in cases for stop in [tuple(stop)]}
    first = {stop: (_until, 2, PLANS["uneven"], path, *stop) for stop, path in paths.items()}
    again = {ranks: {} for ranks in OTHER_PLANS}
    for at, *how, ranks in cases:
        again[ranks][(at, *how)] = (_until, ranks, OTHER_PLANS[ranks], paths[(at, *how)], 0, *how)
    return SharedRanks(first, world_size=2), {
        ranks: SharedRanks(cases, world_size=ranks) for ranks, cases in again.items()
    }


@pytest.mark.parametrize(("stop_at", "workers", "asks_for_length", "ranks"), some(RESUMED, RESUMED_OFTEN))
def test_a_run_resumed_under_another_plan_or_on_other_ranks_ends_as_one_that_was_not_stopped(
    stopped, stop_at, workers, asks_for_length, ranks
):
    first, again = stopped
    stop = stop_at, workers, asks_for_length
    assert all(len(seen) == stop_at for _, seen in first[stop])
    for got, seen in again[ranks][stop]:
        assert close(got, alone(5 * BATCH + 3, epochs=3), 1e-12)
        assert len(seen) == 18 - stop_at
