"""Sparse masks under Lightning: pruned weights are zero to the end, whatever the optimizer, and after a resume."""

import inspect
import tempfile
import warnings
from contextlib import nullcontext
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Regression, Stop, loader, own_file, trainer, weights
from torch import nn
from tqdm.std import tqdm

from lightning_comm import (
    Cast,
    CompressedDDPStrategy,
    Int8,
    MagnitudePruning,
    MaskFunction,
    ModulePruning,
    SparseMask,
    Ternary,
)

REFUSED = {"LBFGS", "SparseAdam"}
# momentum, moments, steps by the sign alone, factors of rows and columns, and steps that mix a whole matrix
OF_EACH_KIND = {"SGD", "AdamW", "Rprop", "Adafactor", "Muon"}
OPTIMIZERS = sorted(
    name
    for name, each in vars(torch.optim).items()
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
)
TRAINED = sorted(set(OPTIMIZERS) - REFUSED)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12, bias=False), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 1, bias=False)
    )


class Stepwise(Regression):
    """Trains on data given by the step, whatever the loader yields: Lightning begins it again after a resume."""

    def __init__(self, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01)):
        super().__init__(network(), optimizer)

    def loss(self, batch):
        generator = torch.Generator().manual_seed(1000 * self.global_rank + self.global_step)
        x = torch.randn(4, 5, generator=generator)
        return nn.functional.mse_loss(self.net(x), x[:, :1] - x[:, 1:2] * x[:, 2:3])


def masked(then=None, sparsity=0.6, **kwargs):
    compression = SparseMask(MagnitudePruning(sparsity), then)
    return CompressedDDPStrategy(compression, timeout=timedelta(seconds=40), bucket_cap_mb=0.0003, **kwargs)


def data(steps, rank):
    return loader(steps, rank, dtype=torch.float32)


def zeros(module):
    return sum(int((each == 0).sum()) for each in module.parameters())


PRUNED = 216 - round(0.4 * 216)  # of 60, 144 and 12 weights


def _under(rank, name):
    kwargs = {"lr": 0.01} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
    model = Stepwise(lambda parameters: getattr(torch.optim, name)(parameters, **kwargs))
    trainer(masked(), 2).fit(model, data(4, rank))
    return zeros(model), weights(model), float(sum(each.detach().abs().sum() for each in model.parameters()))


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in OF_EACH_KIND else [pytest.mark.exhaustive]) for each in TRAINED]
)
def test_pruned_weights_stay_exactly_zero_under_every_optimizer_of_torch(runs, name):
    answers = runs["under", name]
    for count, _, size in answers:
        assert count == PRUNED
        assert size > 1
    assert all((a == b).all() for a, b in zip(answers[0][1], answers[1][1], strict=True))


def _refused(rank, name):
    model = Stepwise(lambda parameters: getattr(torch.optim, name)(parameters, lr=0.01))
    with pytest.raises(MisconfigurationException) as caught:
        trainer(masked(), 2).fit(model, data(2, rank))
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_optimizers_that_mix_what_is_pruned_are_refused_before_training(runs, name):
    assert name in OPTIMIZERS
    for said in runs["refused", name]:
        assert name in said
        assert "AdamW or SGD" in said


def _resumed(rank, then, path):
    whole, model = Stepwise(), Stepwise()
    trainer(masked(then), 2, callbacks=[Stop(5, path, goes_on=True)]).fit(whole, data(10, rank))
    trainer(masked(then), 2).fit(model, data(10, rank), ckpt_path=path)
    return weights(whole), weights(model), zeros(model)


KEPT = [None, Int8(), Ternary()]
RESUMED = [*KEPT, Cast("bf16")]  # which keeps no more than nothing does


@pytest.mark.parametrize(
    "then", [pytest.param(each, marks=[] if each in KEPT else [pytest.mark.exhaustive]) for each in RESUMED], ids=repr
)
def test_a_resumed_run_keeps_its_masks_and_ends_bit_for_bit_as_one_that_was_never_stopped(runs, then):
    for whole, resumed, count in runs["resumed", repr(then)]:
        assert count == PRUNED
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))


def _resumed_with_another_mask(rank, path):
    if rank == 1:  # which alone reads this file
        own = torch.load(own_file(path, 1), weights_only=True)
        own["sync"]["codec"]["masks"]["net.2.weight"][1][3] ^= 0b11  # two bits turned
        torch.save(own, own_file(path, 1))
    runner, model = trainer(masked(Int8()), 2), Stepwise()
    with pytest.raises(RuntimeError) as caught:
        runner.fit(model, data(10, rank), ckpt_path=path)
    return str(caught.value), runner.global_step


def test_masks_that_differ_after_a_resume_are_an_error_on_all_ranks_before_training(runs):
    for said, steps in runs["another mask"]:
        assert "rank 1 has others than rank 0" in said
        assert steps == 5


def _pruned_after_a_dense_run(rank, path):
    trainer("ddp", 2, callbacks=[Stop(5, path)]).fit(Stepwise(), data(10, rank))
    model = Stepwise()
    with pytest.warns(UserWarning, match="another strategy wrote it") if rank == 0 else nullcontext():
        trainer(masked(), 2).fit(model, data(10, rank), ckpt_path=path)
    return zeros(model)


def test_momenta_of_a_dense_start_do_not_revive_pruned_weights(runs):
    assert runs["after a dense run"] == [PRUNED, PRUNED]


def _averaged(rank):
    model = Stepwise()
    average = EMAWeightAveraging(decay=0.9)
    seen = []

    class Look(Callback):
        def on_train_end(self, runner, module):
            seen.append(zeros(average._average_model))

    trainer(masked(), 2, callbacks=[Look(), average]).fit(model, data(6, rank))
    return seen


def test_averages_of_the_weights_over_time_are_pruned_too(runs):
    assert runs["averaged"] == [[PRUNED], [PRUNED]]


def _by_torch(rank):
    model = Stepwise()
    nn.utils.prune.l1_unstructured(model.net[2], "weight", amount=0.5)
    strategy = CompressedDDPStrategy(SparseMask(ModulePruning()), timeout=timedelta(seconds=40))
    trainer(strategy, 2).fit(model, data(4, rank))
    return int((model.net[2].weight_orig == 0).sum()), strategy.ledger.payload_bytes("gradients")


def test_masks_left_by_torch_are_taken_up(runs):
    assert runs["by torch"] == [(72, 4 * 4 * (60 + 72 + 12))] * 2


TRIED = [None, Int8(), Ternary()]


@patch.object(tqdm, "monitor_interval", 0)  # no thread that watches bars
def _after_a_trial(rank, finds, then):
    model = Stepwise()
    callbacks = [LearningRateFinder(num_training_steps=4, update_attr=False)] if finds else []
    trainer(masked(then), 2, callbacks=callbacks, default_root_dir=tempfile.mkdtemp()).fit(model, data(8, rank))
    return weights(model), zeros(model)


@pytest.mark.parametrize(
    "then",
    [None, Int8(), pytest.param(Ternary(), marks=pytest.mark.exhaustive)],
    ids=repr,  # both keep what they leave
)
def test_the_trial_run_of_a_learning_rate_finder_leaves_no_trace(runs, then):
    alone, after = runs["alone", repr(then)], runs["after a trial", repr(then)]
    for (expected, _), (got, count) in zip(alone, after, strict=True):
        assert count == PRUNED
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))


def _twice(rank):
    runner = trainer(masked(Int8()), 2)
    first, second = Stepwise(), Stepwise()
    torch.manual_seed(1)
    for layer in (0, 2, 4):
        second.net[layer].reset_parameters()
    runner.fit(first, data(4, rank))
    runner.fit_loop.max_epochs = 2
    runner.fit(second, data(4, rank))
    return [[each == 0 for each in weights(model)] for model in (first, second)]


def test_the_next_fit_of_a_trainer_has_masks_of_its_own(runs):
    for first, second in runs["twice"]:
        assert [sum(int(each.sum()) for each in masks) for masks in (first, second)] == [PRUNED, PRUNED]
        assert any((a != b).any() for a, b in zip(first, second, strict=True))


def _bad_function(rank):
    strategy = CompressedDDPStrategy(
        SparseMask(MaskFunction(lambda module: {"net.9.weight": torch.ones(1).bool()})), timeout=timedelta(seconds=40)
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test reads all of it)
        trainer(strategy, 2).fit(Stepwise(), data(2, rank))
    return str(caught.value)


def test_masks_that_do_not_fit_are_an_error_on_all_ranks_before_training():
    for said in launch(_bad_function, world_size=2):
        assert "'net.9.weight'" in said
        assert "is no parameter" in said


def _wordless(module):
    raise RuntimeError


def _fails_without_a_word(rank):
    strategy = CompressedDDPStrategy(SparseMask(MaskFunction(_wordless)), timeout=timedelta(seconds=40))
    with pytest.raises(ValueError, match="RuntimeError"):
        trainer(strategy, 2).fit(Stepwise(), data(2, rank))
    return True


def test_masks_that_fail_without_a_message_are_an_error_too_and_not_a_dense_run():
    assert launch(_fails_without_a_word, world_size=2) == [True, True]


@pytest.mark.parametrize(
    ("name", "compression"), [("ddp_sparse_mask", SparseMask()), ("pactrain", SparseMask(then=Cast("bf16")))]
)
def test_names_stand_for_masks(name, compression):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(strategy, CompressedDDPStrategy)
    assert strategy.compression == compression


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    def path(name):
        return str(tmp_path_factory.mktemp(name) / "a.ckpt")

    everything = request.config.getoption("exhaustive")
    saved = {then: path("resumed") for then in (RESUMED if everything else KEPT)}
    trained = [each for each in TRAINED if everything or each in OF_EACH_KIND]
    return SharedRanks(
        {
            **{("under", name): (_under, name) for name in trained},
            **{("refused", name): (_refused, name) for name in sorted(REFUSED)},
            **{("resumed", repr(then)): (_resumed, then, at) for then, at in saved.items()},
            "another mask": (_resumed_with_another_mask, saved[Int8()]),
            "after a dense run": (_pruned_after_a_dense_run, path("dense")),
            "averaged": (_averaged,),
            "by torch": (_by_torch,),
            **{
                (name, repr(then)): (_after_a_trial, name != "alone", then)
                for name in ("alone", "after a trial")
                for then in (TRIED if everything else TRIED[:2])
            },
            "twice": (_twice,),
        },
        world_size=2,
    )
