"""What cannot work is refused before training, with where, argument, value, rule and way out; the rest is warned of."""

import logging
import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch, outcomes
from support.shared_ranks import SharedRanks
from support.training import Regression, loader, local_update, network, trainer
from torch import nn

from lightning_comm import BatchNormReestimation, FixedPeriod, LocalUpdateStrategy, QuadraticPeriod


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def says(text, words):
    missing = [word for word in words if word not in text]
    assert missing == [], f"{missing} not in: {text}"


def assert_refused(make, words, error=(MisconfigurationException, ValueError), batches=6):
    """Build and fit in one process; the error must come before the first training batch."""
    (text,) = launch(_refusal, make, error, batches, world_size=1)
    says(text, words)


def _refusal(rank, make, error=(MisconfigurationException, ValueError), batches=6):
    class Started(Callback):
        def on_train_batch_start(self, *args):
            pytest.fail("training started")

    module, strategy, kwargs = make()
    callbacks = [*kwargs.pop("callbacks", []), Started()]
    with pytest.raises(error) as caught:
        trainer(strategy, 1, callbacks=callbacks, **kwargs).fit(module, loader(batches, rank), loader(2, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"period": 8}, ["period", "got 8", "FixedPeriod"]),
        ({"period": "qsr"}, ["period", "'qsr'", "QuadraticPeriod"]),
        ({"gradient_steps": -1}, ["gradient_steps", "-1", ">= 0"]),
        ({"gradient_steps": 1.5}, ["gradient_steps", "1.5", "0.0 to 1.0"]),
        ({"gradient_steps": "half"}, ["gradient_steps", "'half'"]),
        ({"gradient_steps": float("nan")}, ["gradient_steps", "nan"]),
        ({"warmup_steps": "atuo"}, ["warmup_steps", "'atuo'", "auto"]),
        ({"optimizer_state": "mean"}, ["optimizer_state", "'mean'", "'local'", "'average'"]),
        ({"buffers": True}, ["buffers", "True", "'keep'"]),
        ({"evaluate_weights": "swap"}, ["evaluate_weights", "'swap'", "'local'"]),
        ({"averaging": 8}, ["averaging", "got 8", "Averaging"]),
        ({"counted_optimizer": -1}, ["counted_optimizer", "-1", ">= 0"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, words):
    with pytest.raises(ValueError, match=r"LocalUpdateStrategy|RoundClock") as caught:
        LocalUpdateStrategy(**{"period": FixedPeriod(8), **kwargs})
    says(str(caught.value), words)


class SyncNorm(Regression):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(5, 7), nn.SyncBatchNorm(7), nn.Linear(7, 1)).double())


class Sharded(Regression):
    def configure_model(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=init_device_mesh("cpu", (1,)))


class Expanded(Regression):
    def __init__(self):
        super().__init__()
        self.net[0].bias = nn.Parameter(torch.zeros(1, dtype=torch.float64).expand(7))


class Zero(Regression):
    def configure_optimizers(self):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


REFUSED = [
    (lambda: (SyncNorm(), local_update(FixedPeriod(4)), {}), ["net.1", "SyncBatchNorm", "Use BatchNorm"]),
    (
        lambda: (Regression(), local_update(FixedPeriod(4)), {"sync_batchnorm": True}),
        ["sync_batchnorm=True", "Leave it out"],
    ),
    (lambda: (Sharded(), local_update(FixedPeriod(4)), {}), ["net.0.weight", "sharded", "FSDPStrategy"]),
    (lambda: (Expanded(), local_update(FixedPeriod(4)), {}), ["net.0.bias", "(7,)", "expanded", ".clone()"]),
    (lambda: (Zero(), local_update(FixedPeriod(4)), {}), ["ZeroRedundancyOptimizer", "communicates", "plain"]),
    (
        lambda: (Regression(), local_update(FixedPeriod(4)), {"callbacks": [StochasticWeightAveraging(0.1)]}),
        ["StochasticWeightAveraging", "EMAWeightAveraging"],
    ),
    (
        lambda: (Regression(), local_update(FixedPeriod(4), counted_optimizer=1), {}),
        ["counted_optimizer`=1", "1 optimizer(s)"],
    ),
    (
        lambda: (
            Regression(optimizer=torch.optim.LBFGS),
            local_update(FixedPeriod(4), optimizer_state="average"),
            {},
        ),
        ["optimizer_state='average'", "LBFGS", "'local'"],
    ),
    (
        lambda: (Regression(optimizer=torch.optim.RMSprop), local_update(QuadraticPeriod()), {}),
        ["alpha='auto'", "'RMSprop'", "'adam'", "number"],
    ),
    (
        lambda: (Regression(), local_update(FixedPeriod(4), gradient_steps=0.5), {"max_epochs": -1}),
        ["gradient_steps`=0.5", "share of the run", "max_steps"],
    ),
    (
        lambda: (Regression(), local_update(FixedPeriod(4)), {"callbacks": [BatchNormReestimation()]}),
        ["BatchNormReestimation", "no BatchNorm", "Leave"],
    ),
]


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda case: REFUSED[case][1][0])
def test_what_cannot_work_is_refused_before_training(case):
    (text,) = OF_ONE["refused", case]
    says(text, REFUSED[case][1])


class Plateau(Regression):
    def __init__(self, sync, on="val_loss"):
        super().__init__(network(), adamw)
        self.sync, self.on = sync, on

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=self.sync)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=self.sync)

    def configure_optimizers(self):
        optimizer = adamw(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.on}}


@pytest.mark.parametrize("on", ["val_loss", "train_loss"])
def test_a_plateau_may_watch_a_metric_whether_it_is_synchronised_or_not(on):
    def run(rank):
        rates = []
        for sync in (False, True):
            runner = trainer(local_update(FixedPeriod(4)), 2, max_epochs=3, limit_val_batches=1)
            runner.fit(Plateau(sync, on), loader(3, rank), loader(1, rank))
            rates.append(runner.optimizers[0].param_groups[0]["lr"])
            assert runner.global_step == 9
        return rates

    one, other = launch(run, world_size=2)
    assert one == other
    assert one[0] == one[1]


def test_unequal_numbers_of_batches_are_refused_on_all_ranks():
    def run(rank):
        trainer(local_update(FixedPeriod(4)), 2).fit(Regression(), loader(6 + rank, rank))

    for _, error in outcomes(run, world_size=2):
        says(error, ["different numbers of training batches", "[6, 7] by rank", "limit_train_batches=6", "drop_last"])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, length, rank):
        self.length, self.rank = length, rank

    def __iter__(self):
        from support.training import sample

        return (sample(self.rank, index) for index in range(self.length))


def test_iterable_data_that_ends_early_on_one_rank_ends_all_with_a_message():
    def run(rank):
        data = torch.utils.data.DataLoader(Stream(4 * (9 + 2 * rank), rank), batch_size=4)
        trainer(local_update(FixedPeriod(4)), 2, max_epochs=3).fit(Regression(), data)

    for _, error in outcomes(run, world_size=2, timeout_s=60):
        assert error is not None
        says(error, ["different numbers of training batches", "rank 0 stopped after 9", "limit_train_batches=9"])


def _different_shapes(gradient_steps):
    def run(rank):
        net = nn.Sequential(nn.Linear(5, 3 + rank), nn.Linear(3 + rank, 1)).double()
        trainer(local_update(FixedPeriod(4), gradient_steps=gradient_steps), 2).fit(Regression(net), loader(6, rank))

    return [error for _, error in outcomes(run, world_size=2, ends_within_s=0.2)]


@pytest.mark.parametrize("gradient_steps", [0, 4])
def test_ranks_with_models_of_different_shapes_are_refused(gradient_steps):
    errors = _different_shapes(gradient_steps)
    assert all(errors)
    if gradient_steps == 0:
        for error in errors:
            says(error, ["the model on ranks [1] differs from that of rank 0", "shapes", "alike"])


def test_ranks_with_different_models_are_refused():
    def run(rank):
        module = Regression()
        module.net[0].weight.requires_grad_(rank == 0)
        trainer(local_update(FixedPeriod(4)), 2).fit(module, loader(6, rank))

    for _, error in outcomes(run, world_size=2):
        says(error, ["different tensors", "requires_grad", "alike on all ranks"])


def fit_and_catch(rank, make, world_size, steps=6):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, strategy, kwargs = make(rank)
        runner = trainer(strategy, world_size, **kwargs)
        runner.fit(module, loader(steps, rank))
    return [
        str(warning.message) for warning in caught if "LocalUpdateStrategy" in str(warning.message)
    ], runner.global_step


def rates(rank):
    return Regression(network(), lambda p: torch.optim.SGD(p, 0.1 + 0.01 * rank))


class PerStep(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("noisy", loss, sync_dist=True)
        self.log("quiet", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


WARNED = [
    (lambda r: (Regression(), local_update(FixedPeriod(4)), {}), 1, ["one process only", "devices=2"]),
    (
        lambda r: (Regression(), local_update(QuadraticPeriod(alpha=0.1, h_base=2)), {}),
        2,
        ["no learning-rate scheduler", "QuadraticPeriod", "FixedPeriod"],
    ),
    (
        lambda r: (Regression(), local_update(FixedPeriod(50)), {}),
        2,
        ["50 steps", "run of 6", "smaller"],
    ),
    (
        lambda r: (Regression(), local_update(FixedPeriod(50)), {"fast_dev_run": True}),
        2,
        ["50 steps", "run of 1", "smaller"],
    ),
    (
        lambda r: (
            Regression(schedule=lambda step: 1.0),
            local_update(QuadraticPeriod(alpha=0.1, h_base=2)),
            {"max_epochs": -1, "max_time": timedelta(seconds=0.3)},
        ),
        2,
        ["length of the run is not known", "h_max", "max_steps"],
    ),
    (lambda r: (rates(r), local_update(FixedPeriod(4)), {}), 2, ["differ between ranks", "[0.1, 0.11]"]),
    (
        lambda r: (PerStep(), local_update(FixedPeriod(4)), {}),
        2,
        ["'noisy' is logged", "every step", "on_epoch=True"],
    ),
]


@pytest.mark.parametrize("case", range(len(WARNED)), ids=lambda case: WARNED[case][2][0])
def test_what_is_probably_not_meant_is_warned_of_and_still_runs(case):
    _, world_size, words = WARNED[case]
    answers = (OF_ONE if world_size == 1 else OF_TWO)["warned", case]
    said, steps = answers[0]
    assert steps >= 1
    assert len(said) == 1, said
    says(said[0], words)
    assert "quiet" not in said[0]
    assert all(not texts for texts, _ in answers[1:])  # said once, by rank 0


def test_no_warning_where_there_is_nothing_to_warn_of():
    def make(rank):
        return Regression(network(), adamw, lambda step: 0.9**step), local_update(QuadraticPeriod(h_base=2)), {}

    assert launch(fit_and_catch, make, 2, world_size=2) == [([], 6), ([], 6)]


AUTO = {
    ("AdamW", 4): 2.19 * 0.3,
    ("NAdam", 4): 2.19 * 0.3,
    ("SGD", 2): 0.25 * 0.3,
    ("SGD", 4): 0.31 * 0.3,
}


@contextmanager
def what_is_logged():
    """Yield a list of what Lightning logs within the block."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield said
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def _auto_alpha(rank, optimizer, h_base):
    # a warm-up: the optimizer's rate starts at a third of its peak
    make = getattr(torch.optim, optimizer)
    module = Regression(network(), lambda p: make(p, lr=0.3), lambda step: min(1.0, (step + 1) / 3))
    strategy = local_update(QuadraticPeriod(h_base=h_base))
    with what_is_logged() as said:
        trainer(strategy, 1).fit(module, loader(4, rank))
    return strategy._run.settings.period.alpha, [text for text in said if "alpha" in text]


@pytest.mark.parametrize(("optimizer", "h_base"), AUTO)
def test_auto_alpha_follows_the_family_and_the_peak_and_is_logged(optimizer, h_base):
    expected, ((alpha, said),) = AUTO[optimizer, h_base], OF_ONE["auto", optimizer, h_base]
    assert alpha == pytest.approx(expected)
    assert len(said) == 1
    says(said[0], ["alpha='auto'", f"{expected:.4g}", "authors", "tuning", optimizer])


def test_a_twin_callback_is_refused_and_both_imports_are_named():
    import pytorch_lightning

    class Twin(pytorch_lightning.Callback):
        pass

    assert_refused(
        lambda: (Regression(), local_update(FixedPeriod(4)), {"callbacks": [Twin()]}),
        ["Twin", "`pytorch_lightning`", "`lightning.pytorch`", "from lightning.pytorch.callbacks import"],
    )


def test_a_twin_module_is_refused_and_both_imports_are_named():
    from pytorch_lightning.demos.boring_classes import BoringModel

    with pytest.raises(TypeError) as caught:
        Trainer(strategy=local_update(FixedPeriod(4)), accelerator="cpu", devices=1, logger=False).fit(BoringModel())
    says(str(caught.value), ["`pytorch_lightning`", "`lightning.pytorch`", "single import style"])


def test_a_rate_that_is_not_a_number_ends_all_ranks_with_the_reason():
    def run(rank):
        module = Regression(schedule=lambda step: float("nan") if step > 5 else 1.0)
        trainer(local_update(QuadraticPeriod(alpha=0.1, h_base=2)), 2).fit(module, loader(10, rank))

    (_, first), (_, second) = outcomes(run, world_size=2)
    says(first, ["learning rate must be finite", "nan", "scheduler"])
    says(second, ["rank 0"])


def test_a_round_without_end_is_refused_where_the_end_is_not_known():
    def run(rank):
        module = Regression(network(), adamw, lambda step: 1.0 if step < 8 else 0.0)
        runner = trainer(local_update(QuadraticPeriod(h_base=2)), 2, max_epochs=-1, max_time=timedelta(seconds=20))
        runner.fit(module, loader(20, rank))

    (_, first), (_, second) = outcomes(run, world_size=2)
    says(first, ["without end", "h_max", "max_steps"])
    says(second, ["rank 0"])


def test_the_folder_of_a_sharded_checkpoint_is_refused(tmp_path):
    (tmp_path / "sharded.ckpt").mkdir()

    def run(rank):
        path = tmp_path / "sharded.ckpt"
        trainer(local_update(FixedPeriod(4)), 2).fit(Regression(), loader(6, rank), ckpt_path=path)

    for _, error in outcomes(run, world_size=2):
        says(error, ["sharded.ckpt", "is a folder", "FSDP", "consolidate_checkpoint"])


OF_ONE = SharedRanks(
    {
        **{("auto", *case): (_auto_alpha, *case) for case in AUTO},
        **{("warned", case): (fit_and_catch, make, 1) for case, (make, ranks, _) in enumerate(WARNED) if ranks == 1},
        **{("refused", case): (_refusal, make) for case, (make, _) in enumerate(REFUSED)},
    },
    world_size=1,
)
OF_TWO = SharedRanks(
    {("warned", case): (fit_and_catch, make, 2) for case, (make, ranks, _) in enumerate(WARNED) if ranks == 2},
    world_size=2,
)
