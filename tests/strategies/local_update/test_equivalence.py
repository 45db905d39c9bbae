"""What local updates must equal: plain DDP at period 1, and K copies in one process at any period."""

from datetime import timedelta
from itertools import product

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import (
    Regression,
    collectives_so_far,
    loader,
    local_update,
    network,
    sample,
    trainer,
    weights,
)

from lightning_comm import Averaging, FixedPeriod, QuadraticPeriod

SGDS = {
    "plain": {"lr": 0.05},
    "momentum and weight decay": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def _fit(rank, world_size, strategy, settings, steps, dtype):
    module = Regression(network(dtype, seed=rank), lambda parameters: torch.optim.SGD(parameters, **settings))
    fit = trainer(strategy if strategy == "ddp" else local_update(strategy), world_size)
    fit.fit(module, loader(steps, rank, dtype=dtype))
    assert fit.world_size == world_size
    assert fit.global_step == steps
    return weights(module)


# Each kind of SGD on two ranks in both types, and on three in one of them. Always either type and number, without
# state and with Nesterov's, which has momentum and weight decay as well.
OF_SGD = [(2, torch.float32, "plain"), (3, torch.float64, "nesterov")]
MORE_OF_SGD = [(2, dtype, sgd) for dtype in (torch.float64, torch.float32) for sgd in SGDS]
MORE_OF_SGD += [
    (3, torch.float64, "momentum and weight decay"),
    (3, torch.float64, "plain"),
    (3, torch.float32, "nesterov"),
]
MORE_OF_SGD = [case for case in MORE_OF_SGD if case not in OF_SGD]


def exhaustive(cases):
    """Cases that are left out unless all are asked for."""
    return [pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]


@pytest.mark.parametrize(("world_size", "dtype", "sgd"), [*OF_SGD, *exhaustive(MORE_OF_SGD)], ids=str)
def test_period_one_with_sgd_equals_plain_ddp_after_20_steps(world_size, dtype, sgd):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    ddp, local = answers_of(world_size, "ddp", dtype, sgd), answers_of(world_size, "period one", dtype, sgd)
    start = [parameter.detach().numpy() for parameter in network(dtype, seed=0).parameters()]
    assert max(np.abs(a - b).max() for a, b in zip(ddp[0], start, strict=True)) > 0.05, "nothing was learned"
    for rank in range(world_size):
        for ours, theirs, first in zip(local[rank], ddp[rank], local[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
            np.testing.assert_array_equal(ours, first)


def reference(world_size, steps, period_ends, make_optimizer, dtype=torch.float64, lr_factor=None, momenta=False):
    """K copies in one process, averaged by hand at the given steps, with their momenta if so wanted."""
    nets = [network(dtype) for _ in range(world_size)]
    optimizers = [make_optimizer(net.parameters()) for net in nets]
    base_lrs = [group["lr"] for group in optimizers[0].param_groups]
    for step in range(steps):
        for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base * (lr_factor(step) if lr_factor else 1.0)
            batch = [sample(rank, 4 * step + k, dtype) for k in range(4)]
            x, y = torch.stack([b[0] for b in batch]), torch.stack([b[1] for b in batch])
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        if step + 1 in period_ends:
            with torch.no_grad():
                for same in zip(*(net.parameters() for net in nets), strict=True):
                    mean = torch.stack(list(same)).sum(0) / world_size
                    for parameter in same:
                        parameter.copy_(mean)
                    states = [o.state[p] for o, p in zip(optimizers, same, strict=True)] if momenta else [{}]
                    for key in (key for key in states[0] if key != "step"):
                        mean = torch.stack([state[key] for state in states]).sum(0) / world_size
                        for state in states:
                            state[key].copy_(mean)
    return nets


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.02)


def cosine(step):
    return 0.5 * (1 + np.cos(np.pi * step / 30)) + 1e-3


def _fit_periods(rank, world_size, period, bucket_mib):
    module = Regression(network(seed=rank), adamw, cosine)
    strategy = local_update(period, averaging=Averaging(bucket_mib=bucket_mib))
    trainer(strategy, world_size).fit(module, loader(30, rank))
    return weights(module), [done.step for done in strategy.history]


PERIODS = {
    "4": (FixedPeriod(4), [4, 8, 12, 16, 20, 24, 28, 30]),
    "beyond the run": (FixedPeriod(100), [30]),
    "qsr": (QuadraticPeriod(alpha=0.022, h_base=4), None),
}
BUCKETS = {"one-bucket": 8.0, "tiny-buckets": 104 / 2**20}  # the first layer alone has 280 bytes


# each period, each size of buckets, either number of ranks
OF_PERIODS = [(2, "4", "tiny-buckets"), (3, "qsr", "tiny-buckets"), (3, "beyond the run", "one-bucket")]
MORE_OF_PERIODS = [(world_size, *each) for world_size in (2, 3) for each in product(PERIODS, BUCKETS)]
MORE_OF_PERIODS = [case for case in MORE_OF_PERIODS if case not in OF_PERIODS]


@pytest.mark.parametrize(("world_size", "period", "buckets"), [*OF_PERIODS, *exhaustive(MORE_OF_PERIODS)])
def test_any_period_equals_copies_in_one_process(world_size, period, buckets):
    answers, (_, ends) = answers_of(world_size, "period", period, buckets), PERIODS[period]
    synchronised = answers[0][1]
    if ends is not None:
        assert synchronised == ends
    else:
        gaps = np.diff([0, *synchronised])
        assert gaps[0] == 4
        assert max(gaps[:-1]) > 4, "the period never grew"
    assert synchronised[-1] == 30
    expected = reference(world_size, 30, set(synchronised), adamw, lr_factor=cosine)
    for got, _ in answers:
        for ours, theirs in zip(got, weights(expected[0]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def _fit_momenta(rank, world_size):
    module = Regression(network(seed=rank), adamw)
    trainer(local_update(FixedPeriod(4), optimizer_state="average"), world_size).fit(module, loader(18, rank))
    return weights(module)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_averaged_momenta_equal_copies_in_one_process(world_size):
    expected = reference(world_size, 18, {4, 8, 12, 16, 18}, adamw, momenta=True)
    without = reference(world_size, 18, {4, 8, 12, 16, 18}, adamw)
    assert any((a != b).any() for a, b in zip(weights(expected[0]), weights(without[0]), strict=True))
    for got in answers_of(world_size, "momenta"):
        for ours, theirs in zip(got, weights(expected[0]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


class _Watch(Callback):
    """After every batch: how many collectives there have been, and the weights. Runs after the hook callback."""

    def __init__(self):
        self.counts, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(collectives_so_far())
        self.weights.append(weights(pl_module))


def _gradient_phase(rank, world_size, strategy_name):
    module = Regression(network(seed=rank, norm=True), adamw, cosine)
    watch = _Watch()
    strategy = "ddp" if strategy_name == "ddp" else local_update(FixedPeriod(5), gradient_steps=strategy_name)
    fit = trainer(strategy, world_size, callbacks=[watch])
    fit.fit(module, loader(12, rank))
    history = [] if strategy == "ddp" else [done.step for done in strategy.history]
    hooks = [parameter._backward_hooks or {} for parameter in module.parameters()]
    return watch.weights, history, hooks


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_gradient_steps_are_bit_for_bit_those_of_ddp(world_size):
    ddp = answers_of(world_size, "gradients", "ddp")
    for gradient_steps, expected in ((4, [9, 12]), (0.5, [11, 12]), (1.0, [])):
        ours = answers_of(world_size, "gradients", gradient_steps)
        until = gradient_steps if isinstance(gradient_steps, int) else round(12 * gradient_steps)
        for rank in range(world_size):
            assert ours[rank][1] == expected
            for step in range(until):
                for a, b in zip(ours[rank][0][step], ddp[rank][0][step], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"step {step + 1}")
        # ranks are apart right behind it, so gradients really are no longer averaged
        if until < 12:
            assert any((a != b).any() for a, b in zip(ours[0][0][until], ours[1][0][until], strict=True))
        for a, b in zip(ours[0][0][-1], ours[1][0][-1], strict=True):
            np.testing.assert_array_equal(a, b)


def _count_collectives(rank, world_size, folder):
    watch = _Watch()
    strategy = local_update(FixedPeriod(8))
    timed = ModelCheckpoint(folder, train_time_interval=timedelta(hours=1))
    fit = trainer(
        strategy,
        world_size,
        callbacks=[watch, timed, LearningRateMonitor()],
        enable_checkpointing=True,
        max_epochs=2,
        max_time="00:01:00:00",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
    )
    fit.fit(Regression(), loader(12, rank))
    return watch.counts, [done.step for done in strategy.history]


def test_there_is_no_collective_within_a_round(tmp_path):
    for counts, synchronised in launch(_count_collectives, 2, str(tmp_path), world_size=2):
        assert synchronised == [8, 16, 24]
        issued = np.diff(counts)  # after batch b+1 minus after batch b
        for batch, n in enumerate(issued, start=2):
            if batch in synchronised:
                assert n >= 2, f"no synchronisation at step {batch}"
            else:
                assert n == 0, f"{n} collectives within a round, at step {batch}"


def _slow_rank(rank, world_size):
    import time

    class Slow(Regression):
        def training_step(self, batch, batch_idx):
            if rank == 1:
                time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    class Clock(Callback):
        def __init__(self):
            self.times = []

        def on_train_batch_end(self, *args):
            self.times.append(time.monotonic())

    clock = Clock()
    trainer(local_update(FixedPeriod(32)), world_size, callbacks=[clock]).fit(Slow(), loader(32, rank))
    return np.diff(clock.times)[:30].sum()


def test_a_slow_rank_does_not_slow_the_others_within_a_round():
    fast, slow = launch(_slow_rank, 2, world_size=2)
    assert slow > 30 * 0.02
    assert fast < slow / 2


def _bytes(rank, world_size, buffers, optimizer_state):
    strategy = local_update(FixedPeriod(4), buffers=buffers, optimizer_state=optimizer_state)
    module = Regression(network(torch.float32, norm=True), adamw)
    fit = trainer(strategy, world_size, limit_val_batches=1, val_check_interval=6)
    fit.fit(module, loader(20, rank, dtype=torch.float32), loader(1, rank, dtype=torch.float32))
    ledger = strategy.ledger
    payload = {purpose: ledger.payload_bytes(purpose) for purpose in ledger.purposes}
    wire = {purpose: ledger.wire_bytes(purpose) for purpose in ledger.purposes}
    return payload, wire, [record.step for record in ledger.records if record.purpose == "parameters"]


OF_BYTES = [(2, "average", "local"), (3, "keep", "average")]
MORE_OF_BYTES = [case for case in product((2, 3), ("average", "keep"), ("local", "average")) if case not in OF_BYTES]


@pytest.mark.parametrize(("world_size", "buffers", "optimizer_state"), [*OF_BYTES, *exhaustive(MORE_OF_BYTES)])
def test_payload_bytes_equal_the_formula(world_size, buffers, optimizer_state):
    net = network(torch.float32, norm=True)
    parameters = sum(4 * parameter.numel() for parameter in net.parameters())
    statistics = sum(buffer.numel() * buffer.element_size() for buffer in net.buffers())
    synchronisations, evaluations = 5, 2  # validation at steps 6, 12 and 18; ranks are together at 12
    for payload, wire, steps in answers_of(world_size, "bytes", buffers, optimizer_state):
        assert payload["parameters"] == synchronisations * parameters
        averaged = parameters
        if buffers == "average":
            assert payload["buffers"] == synchronisations * statistics
            averaged += statistics
        else:
            assert "buffers" not in payload
        if optimizer_state == "average":
            assert payload["optimizer_state"] == synchronisations * 2 * parameters
        else:
            assert "optimizer_state" not in payload
        assert payload["evaluation"] == evaluations * averaged
        assert payload["start"] == parameters + statistics
        assert "checkpoint" not in payload
        assert set(steps) == {4, 8, 12, 16, 20}
        exact = 2 * (world_size - 1) / world_size * payload["parameters"]
        assert abs(wire["parameters"] - exact) <= synchronisations / 2  # each message is rounded to a byte


def test_the_reference_itself_depends_on_where_it_averages():
    one = reference(2, 10, {10}, adamw)
    two = reference(2, 10, {5, 10}, adamw)
    assert any((a != b).any() for a, b in zip(weights(one[0]), weights(two[0]), strict=True))


def _cases(world_size, sgds, periods, sizes, momenta, gradients):
    """The fits of some of the cases of the tests above, for one number of ranks."""
    sgds = [case for ranks, *case in sgds if ranks == world_size]
    return {
        **{("ddp", *case): (_fit, world_size, "ddp", SGDS[case[1]], 20, case[0]) for case in sgds},
        **{("period one", *case): (_fit, world_size, FixedPeriod(1), SGDS[case[1]], 20, case[0]) for case in sgds},
        **{
            ("period", period, buckets): (_fit_periods, world_size, PERIODS[period][0], BUCKETS[buckets])
            for ranks, period, buckets in periods
            if ranks == world_size
        },
        **({("momenta",): (_fit_momenta, world_size)} if world_size == momenta else {}),
        **{
            ("gradients", steps): (_gradient_phase, world_size, steps)
            for steps in ("ddp", 4, 0.5, 1.0)
            if world_size == gradients
        },
        **{("bytes", *case): (_bytes, world_size, *case) for ranks, *case in sizes if ranks == world_size},
    }


# what only exhaustive runs ask for has ranks of its own, since one answer makes all that share its ranks
KEPT, MORE = (OF_SGD, OF_PERIODS, OF_BYTES, 3, 2), (MORE_OF_SGD, MORE_OF_PERIODS, MORE_OF_BYTES, 2, 3)
CASES = [(world_size, _cases(world_size, *some)) for world_size in (2, 3) for some in (KEPT, MORE)]
RUNS = [(world_size, cases, SharedRanks(cases, world_size=world_size)) for world_size, cases in CASES]


def answers_of(world_size, *name):
    """The answers of a fit in order of rank."""
    (runs,) = (runs for ranks, cases, runs in RUNS if ranks == world_size and name in cases)
    return runs[name]
