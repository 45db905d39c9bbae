"""Local updates with all kinds of models and settings, beyond what every strategy passes: ranks end equal."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.precision import MixedPrecision
from support.shared_ranks import SharedRanks
from support.training import Regression, loader, local_update, network, sample, trainer, weights
from torch import nn

from lightning_comm import BatchNormReestimation, FixedPeriod, QuadraticPeriod


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def fit(rank, make_module, *, period=4, steps=18, dtype=torch.float64, strategy=None, **kwargs):
    torch.manual_seed(rank)
    module = make_module()
    settings = {key: kwargs.pop(key) for key in ("optimizer_state", "buffers", "counted_optimizer") if key in kwargs}
    strategy = strategy or local_update(FixedPeriod(period), **settings)
    runner = trainer(strategy, 2, **kwargs)
    runner.fit(module, loader(steps, rank, dtype=dtype), loader(2, rank, dtype=dtype))
    return module, runner, strategy


def _gate(rank, make_module, kwargs):
    module, runner, strategy = fit(rank, make_module, **kwargs)
    return weights(module), [done.step for done in strategy.history], runner.global_step


def also(case):
    """A case whose parts other cases here, or those of the list that every strategy passes, have too."""
    return pytest.param(case, marks=pytest.mark.exhaustive)


ALSO = {
    *("free", "64-true"),
    *(("clipped by", by) for by in ("norm", "value")),
    *((kind, "average") for kind in ("Frozen", "Norm")),
    ("Unfreezing", "local"),
}


@pytest.fixture(scope="module")
def runs(request):
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1))  # loads the compiler here once, and not in each rank
    asked_for = {name: case for name, case in CASES.items() if name not in ALSO}
    return SharedRanks(CASES if request.config.getoption("exhaustive") else asked_for, world_size=2)


def equal(answers):
    """Return what rank 0 ended with, once it is what rank 1 did."""
    for mine, theirs in zip(answers[0][0], answers[1][0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert answers[0][1:] == answers[1][1:]
    return answers[0]


class Tied(Regression):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double(), adamw
        )
        self.net[2].weight = self.net[0].weight


class Frozen(Regression):
    def __init__(self):
        super().__init__(network(), lambda p: torch.optim.AdamW([x for x in p if x.requires_grad], lr=0.01))
        self.net[0].requires_grad_(False)


class Unfreezing(Regression):
    """Trains one half of the layers, then the other, so that what is averaged changes with time."""

    def __init__(self):
        super().__init__(network(), adamw)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 6:
            self.net[0].requires_grad_(True)
            self.net[2].requires_grad_(False)


class Unused(Regression):
    """A branch that only one rank uses, and one that none uses."""

    def __init__(self):
        super().__init__(network(), adamw)
        self.branch = nn.Linear(5, 1).double()
        self.nobody = nn.Linear(5, 1).double()

    def loss(self, batch):
        loss = super().loss(batch)
        return loss + self.branch(batch[0]).square().mean() if self.global_rank == 1 else loss


class Manual(LightningModule):
    """Two optimizers under manual optimization; the second one steps every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = network(), network(seed=1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        x, y = batch
        for optimizer, net, now in ((first, self.one, True), (second, self.two, batch_idx % 2 == 0)):
            if now:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(x), y))
                optimizer.step()

    def configure_optimizers(self):
        return adamw(self.one.parameters()), torch.optim.SGD(self.two.parameters(), lr=0.05)


class Norm(Regression):
    def __init__(self):
        super().__init__(network(norm=True), adamw)

    def forward(self, x):
        return self.net(x)


def test_gradient_accumulation_counts_optimizer_steps_and_an_incomplete_last_window(runs):
    _, ends, steps = equal(runs["accumulated"])
    assert steps == 5  # 18 batches are 4 windows and a half
    assert ends == [2, 4, 5]


@pytest.mark.exhaustive  # as in the list that every strategy passes
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_runs_on_each_ranks_own_gradients(runs, algorithm):
    clipped, *_ = equal(runs["clipped by", algorithm])
    free, *_ = equal(runs["free"])
    assert any((a != b).any() for a, b in zip(clipped, free, strict=True))
    bound = 18 * 0.05 * 0.01  # by the sum of all steps of a rank, and so by the mean of the ranks'
    moved = [a - b.detach().numpy() for a, b in zip(clipped, network().parameters(), strict=True)]
    distance = max(abs(each).max() for each in moved)
    if algorithm == "norm":
        distance = sum((each**2).sum() for each in moved) ** 0.5
    assert distance <= bound * (1 + 1e-9)


def _true_precision(rank, precision, dtype):
    module, *_ = fit(
        rank,
        lambda: Regression(network(torch.float32), lambda parameters: torch.optim.SGD(parameters, lr=0.05)),
        steps=10,
        precision=precision,
        dtype=dtype,
    )
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    return [[parameter.detach().double().numpy() for parameter in module.parameters()]]


@pytest.mark.parametrize("precision", ["bf16-true", also("64-true")])
def test_other_precisions_end_equal(runs, precision):
    equal(runs[precision])


@pytest.mark.exhaustive  # as below, where momenta are averaged with it
def test_what_is_averaged_may_change_with_time(runs):
    equal(runs["Unfreezing", "local"])


@pytest.mark.parametrize("kind", ["Tied", also("Frozen"), "Unfreezing", also("Norm")])
def test_special_parameters_end_equal_with_averaged_momenta(runs, kind):
    equal(runs[kind, "average"])


def test_momenta_that_only_one_rank_has_are_refused_on_all_ranks(runs):
    for _, error in runs.outcomes("momenta of one rank"):
        assert "ranks would average different tensors" in error
        assert "optimizer state" in error


def _sent(rank):
    *_, strategy = fit(rank, Frozen)
    return strategy.ledger.payload_bytes("parameters"), len(strategy.history)


def test_frozen_parameters_are_not_sent(runs):
    trained = sum(8 * p.numel() for p in network()[2].parameters())
    for payload, synchronisations in runs["sent"]:
        assert payload == synchronisations * trained


def test_the_counted_optimizer_decides_and_all_parameters_are_averaged(runs):
    for counted, ends in ((0, [4, 8, 12, 16, 18]), (1, [4, 8, 9])):
        _, got, steps = equal(runs["counted", counted])
        assert got == ends
        assert steps == 18 + 9


class LooksTwice(Norm):
    """One forward more on rank 1, which its statistics and their counter remember, and the training does not."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 3:
            self.net(batch[0])
        return super().training_step(batch, batch_idx)


def _buffers(rank, buffers):
    module, *_ = fit(rank, LooksTwice, period=100, buffers=buffers)
    return [buffer.numpy() for buffer in module.buffers()]


def test_buffers_are_averaged_and_counters_taken_from_rank_0(runs):
    averaged, kept = runs["buffers", "average"], runs["buffers", "keep"]
    for mine, theirs, of_0, of_1 in zip(*averaged, *kept, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert (of_0 != of_1).any()
        if mine.ndim:  # once, at the end of the run, until which nothing has changed what ranks train
            np.testing.assert_allclose(mine, (of_0 + of_1) / 2, rtol=0, atol=1e-14)
        else:
            assert mine == of_0 == 18


def _scaler(rank):
    class Exploding(Regression):
        """Rank 1's gradients overflow at step 5, so only its scaler skips that step."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if rank == 1 and batch_idx == 5 else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            seen.append(scaler.get_scale())

    module, runner, strategy = fit(
        rank, lambda: Exploding(network(torch.float32)), dtype=torch.float32, plugins=[plugin], callbacks=[Watch()]
    )
    return weights(module), [done.step for done in strategy.history], seen, runner.global_step


def test_a_scaler_that_skips_on_one_rank_keeps_counts_and_agrees_on_its_scale(runs):
    one, two = runs["scaler"]
    assert one[1] == two[1] == [4, 8, 12, 16, 18]
    assert one[3] == two[3] == 18
    assert (one[2][5], two[2][5]) == (2.0**10, 2.0**9)  # apart within the round
    assert one[2][7] == two[2][7] == 2.0**9
    for mine, theirs in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.isfinite(mine).all()


class Brief(Regression):
    """Keeps no list of losses, by whose length each step would be compiled anew."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def _compiled(rank):
    torch.manual_seed(rank)
    module = Brief(network(torch.float32), lambda p: torch.optim.SGD(p, lr=0.05))
    compiled = torch.compile(module, backend="eager")
    strategy = local_update(FixedPeriod(4), gradient_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(strategy, 2).fit(compiled, loader(12, rank, dtype=torch.float32))
    return weights(module), [done.step for done in strategy.history]


def test_a_compiled_model_ends_equal(runs):
    one, two = runs["compiled"]
    assert one[1] == [7, 11, 12]
    for mine, theirs in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _reestimate(rank, with_callback):
    class Both(Norm):
        def train_dataloader(self):
            return loader(6, rank)

        def val_dataloader(self):
            return loader(2, rank)

    seen = {}

    class Watch(Callback):
        def on_validation_epoch_start(self, runner, module):
            if not runner.sanity_checking:
                seen[runner.global_step] = (
                    weights(module),
                    [b.clone().numpy() for b in module.buffers()],
                    [norm.momentum for norm in module.modules() if isinstance(norm, nn.BatchNorm1d)],
                )

    torch.manual_seed(0)
    module = Both()
    callbacks = [BatchNormReestimation(4), Watch()] if with_callback else [Watch()]
    runner = trainer(local_update(FixedPeriod(4)), 2, callbacks=callbacks, limit_val_batches=2, max_epochs=2)
    runner.fit(module)
    return seen, weights(module)


def test_batchnorm_is_reestimated_with_the_averaged_weights_and_weights_go_their_way(runs):
    answers = runs["reestimated", True]
    plain = runs["reestimated", False]
    for rank in range(2):
        for mine, without in zip(answers[rank][1], plain[rank][1], strict=True):
            np.testing.assert_array_equal(mine, without)
    for step in (6, 12):
        net = network(norm=True)
        for parameter, value in zip(net.parameters(), answers[0][0][step][0], strict=True):
            parameter.data = torch.from_numpy(value)
        means, variances = [], []
        for rank in range(2):
            for index in range(rank, 4, 2):  # 4 batches in all, dealt out in turn
                x = torch.stack([sample(rank, 4 * index + k)[0] for k in range(4)])
                hidden = net[0](x).detach()
                means.append(hidden.mean(0))
                variances.append(hidden.var(0))
        for rank in range(2):
            _, (mean, variance, _), momenta = answers[rank][0][step]
            np.testing.assert_allclose(mean, torch.stack(means).mean(0).numpy(), atol=1e-12)
            np.testing.assert_allclose(variance, torch.stack(variances).mean(0).numpy(), atol=1e-12)
            assert momenta == [0.1]


def _two_runs(rank):
    module, first, strategy = fit(rank, lambda: Regression(), max_time="00:01:00:00", limit_val_batches=2)
    sums = strategy.ledger.payload_bytes("parameters")
    loss = first.validate(module, loader(2, rank), verbose=False)[0]["val_loss"]
    first.fit_loop.max_epochs = 2
    first.fit(module, loader(18, rank), loader(2, rank))
    again = [done.step for done in strategy.history]
    timer = next(callback for callback in first.callbacks if isinstance(callback, Timer))
    runner = trainer("ddp", 2, callbacks=[timer])  # the same callback in a Trainer without the strategy
    runner.fit(Regression(), loader(3, rank))
    return sums, strategy.ledger.payload_bytes("parameters"), again, runner.global_step, loss, len(first.callbacks)


def test_a_strategy_serves_several_runs_and_leaves_nothing_behind(runs):
    answers = runs["two runs"]
    for sums, later, again, plain_steps, loss, callbacks in answers:
        assert again == [22, 26, 30, 34, 36]
        assert later == sums  # the ledger is that of the second run
        assert plain_steps == 3
        assert callbacks == answers[0][5] == 2  # the hook callback is not added twice
        assert np.isfinite(loss)


def _evaluate(rank, evaluate_weights):
    seen = []

    class Watch(Callback):
        def on_validation_batch_start(self, runner, module, *args):
            if not runner.sanity_checking:
                seen.append((runner.global_step, weights(module)))

    module = Regression(network(), adamw)
    runner = trainer(
        local_update(FixedPeriod(8), evaluate_weights=evaluate_weights),
        2,
        callbacks=[Watch()],
        limit_val_batches=1,
        val_check_interval=3,
    )
    runner.fit(module, loader(12, rank), loader(1, rank))
    return seen


def test_validation_sees_the_average_of_all_ranks_or_each_its_own(runs):
    average = runs["evaluated", "average"]
    local = runs["evaluated", "local"]
    assert [step for step, _ in average[0]] == [3, 6, 9, 12]
    for k in range(4):
        for mean, other, a, b in zip(average[0][k][1], average[1][k][1], local[0][k][1], local[1][k][1], strict=True):
            np.testing.assert_array_equal(mean, other)
            np.testing.assert_allclose(mean, (a + b) / 2, rtol=0, atol=1e-15)
    assert any((a != b).any() for a, b in zip(local[0][0][1], local[1][0][1], strict=True))


def _logged(rank):
    lines = []

    class Collect(Callback):
        def setup(self, runner, module, stage):
            from lightning.pytorch.loggers.logger import DummyLogger

            class Logger(DummyLogger):
                def log_metrics(self, metrics, step=None):
                    if any(key.startswith("local_update/") for key in metrics):
                        lines.append((step, dict(metrics)))

            runner.loggers = [Logger()]

    module = Regression(network(), adamw, lambda step: 0.9**step)
    strategy = local_update(QuadraticPeriod(h_base=2))
    trainer(strategy, 2, callbacks=[Collect()], log_every_n_steps=1).fit(module, loader(20, rank))
    return lines, [(done.step, done.period_steps, done.lr, done.drift) for done in strategy.history]


def test_every_synchronisation_is_logged_on_rank_0(runs):
    (lines, history), (silent, _) = runs["logged"]
    assert silent == []
    assert [step for step, _ in lines] == [step - 1 for step, *_ in history]  # with the last batch of each round
    assert [line["local_update/period_steps"] for _, line in lines] == [period for _, period, *_ in history]
    starts = [0, *itertools.accumulate(period for _, period, *_ in history)][:-1]
    for start, (_, line) in zip(starts, lines, strict=True):
        assert line["local_update/lr"] == pytest.approx(0.01 * 0.9**start)
        assert line["local_update/drift"] > 0
    payloads = [line["local_update/payload_bytes"] for _, line in lines]
    assert payloads == sorted(payloads)
    assert {"local_update/synchronisations", "local_update/wait_s", "local_update/transfer_s"} <= set(lines[0][1])


def adam_net():
    return Regression(network(), adamw)


CLIPPED = {"gradient_clip_val": 0.01}
CASES = {
    "accumulated": (_gate, adam_net, {"accumulate_grad_batches": 4, "steps": 18, "period": 2}),
    "free": (_gate, Regression, {}),
    **{("clipped by", by): (_gate, Regression, {**CLIPPED, "gradient_clip_algorithm": by}) for by in ("norm", "value")},
    "bf16-true": (_true_precision, "bf16-true", torch.bfloat16),
    "64-true": (_true_precision, "64-true", torch.float64),
    ("Unfreezing", "local"): (_gate, Unfreezing, {"steps": 10}),
    **{
        (kind.__name__, "average"): (_gate, kind, {"optimizer_state": "average", "steps": 10})
        for kind in (Tied, Frozen, Unfreezing, Norm)
    },
    "sent": (_sent,),
    **{("counted", counted): (_gate, Manual, {"counted_optimizer": counted}) for counted in (0, 1)},
    **{("buffers", kind): (_buffers, kind) for kind in ("average", "keep")},
    "scaler": (_scaler,),
    "compiled": (_compiled,),
    **{("reestimated", whether): (_reestimate, whether) for whether in (True, False)},
    "two runs": (_two_runs,),
    **{("evaluated", kind): (_evaluate, kind) for kind in ("average", "local")},
    "logged": (_logged,),
    "momenta of one rank": (_gate, Unused, {"optimizer_state": "average"}),
}
