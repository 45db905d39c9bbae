"""Averages of weights under Cyclic Data Parallelism are of flushed versions: one version, the same on all ranks."""

import time
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from support.cyclic import cyclic, deep, fit, momentum, reference, state
from support.processes import launch, outcomes
from support.training import Regression, Samples, loader, trainer
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn

from lightning_comm.data.resumable import ResumableLoader

STEPS, EVERY, DECAY = 8, 3, 0.75
UPDATES = [1, 4, 7]  # `EMAWeightAveraging` updates after the first step, and then after every third one
VALIDATED = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}  # swaps weights each time


def ema(**kwargs):
    return EMAWeightAveraging(decay=DECAY, update_every_n_steps=EVERY, **kwargs)


class EveryEpoch(WeightAveraging):
    """The plain mean, of the weights at the end of each epoch."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


def averaged_offline(module, world_size, names, updates, flushes, avg_fn=None, steps=STEPS, **settings):
    """The average that torch makes of the versions of the sequential reference, and its last version."""
    average = AveragedModel(module, use_buffers=True, avg_fn=avg_fn)

    def take(step):
        if step in updates:
            average.update_parameters(module)

    reference(module, world_size, steps, names, flush_after=sorted({*updates, *flushes}), on_step=take, **settings)
    return [tensor.numpy() for name, tensor in average.state_dict().items() if name.startswith("module.")]


CASES = {
    "v2": ({}, {}, []),
    "v1, validated": ({"rule": "v1"}, VALIDATED, [2, 4, 6, 8]),
}


def _averages(rank, world_size, names):
    answers = []
    for settings, options, flushes in (CASES[name] for name in names):
        module = Regression(deep(8, norm=True), momentum)
        strategy, _ = fit(rank, world_size, module, STEPS, settings, callbacks=[ema()], **options)
        expected = averaged_offline(
            Regression(deep(8, norm=True), momentum), world_size, strategy.stage_names, UPDATES, flushes,
            get_ema_avg_fn(DECAY), **settings,
        )  # fmt: skip
        answers.append((state(module), expected))
    return answers


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, ["v2"]),
        (3, ["v1, validated"]),
        *(pytest.param(n, list(CASES), marks=pytest.mark.exhaustive) for n in (2, 3)),
    ],
)
def test_the_average_is_that_of_the_flushed_versions_bit_for_bit_and_alike_on_all_ranks(world_size, names):
    for answers in launch(_averages, world_size, names, world_size=world_size):
        for name, (ours, expected) in zip(names, answers, strict=True):
            for k, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
                np.testing.assert_array_equal(mine, theirs, err_msg=f"{name}, tensor {k}")


def swa(**kwargs):
    return StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2, **kwargs)


SYNCHRONOUS = {"warmup_sync_steps": 10**9}
KINDS = {
    "two at once, one of them from a step on and without buffers": (
        lambda: (EveryEpoch(), ema(update_starting_at_step=5, use_buffers=False)), {"epochs": 2},
    ),
    "swa": (swa, {"epochs": 3, **VALIDATED, "val_check_interval": 4}),
}  # fmt: skip


def _epochs(strategy, make, rank, world_size, norm=False, epochs=4, **options):
    """Some epochs of five steps; what the module holds in the end."""
    made = make()
    callbacks = list(made) if isinstance(made, tuple) else [made]
    module = Regression(deep(6, norm), momentum, lambda step: 0.9**step)
    runner = trainer(strategy, world_size, callbacks=callbacks, max_epochs=epochs, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, loader(5, rank), loader(1, 90 + rank))
    return state(module), [str(each.message) for each in caught if "CyclicStrategy" in str(each.message)]


def _beside_ddp(rank, world_size):
    answers = {}
    for name, (make, options) in KINDS.items():
        strategies = DDPStrategy(), cyclic(**SYNCHRONOUS)
        ddp, synchronous = (_epochs(each, make, rank, world_size, **options)[0] for each in strategies)
        answers[name] = ddp, synchronous, _epochs(cyclic(), make, rank, world_size, norm=name == "swa", **options)[0]
    return answers


def test_without_delay_each_average_is_that_of_ddp_and_with_it_alike_on_all_ranks():
    first, second = launch(_beside_ddp, 2, world_size=2)
    for name, (ddp, synchronous, delayed) in first.items():
        for one, other in zip(ddp, synchronous, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=name)
        for one, other in zip(delayed, second[name][2], strict=True):
            assert np.isfinite(one).all(), name
            np.testing.assert_array_equal(one, other, err_msg=name)


class Save(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == self.step:
            runner.save_checkpoint(self.path)


RESUMED = {"ema": (ema, 8, 2), "swa": (swa, 13, 3), "epochs": (EveryEpoch, 8, 2)}


def _resumed(rank, world_size, folder, names):
    for name in names:
        make, step, epochs = RESUMED[name]
        path, runs = f"{folder}/{name}.ckpt", []
        for ckpt_path, saves in ((None, [Save(step, path)]), (path, [])):
            module = Regression(deep(6, norm=True), momentum)
            data = ResumableLoader(Samples(5 * 4, rank), 4, seed=3, num_replicas=1, rank=0)
            runner = trainer(cyclic(), world_size, callbacks=[make(), *saves], max_epochs=epochs)
            # the scheduler of torch 2.6 for SWA saves a function, which is read only where the file is trusted
            trusted = None if "state_dict" in vars(SWALR) else False
            runner.fit(module, data, ckpt_path=ckpt_path, weights_only=trusted)
            runs.append(state(module))
        for mine, theirs in zip(*runs, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"{name}, resumed after {step}")


# each callback that keeps an average in files; how often it updates that is a part of the others' cases
@pytest.mark.parametrize(
    "names", [("ema", "swa"), pytest.param(("epochs",), marks=pytest.mark.exhaustive)], ids=["", "more"]
)
def test_a_resumed_run_goes_on_with_its_average_bit_for_bit(tmp_path, names):
    launch(_resumed, 2, str(tmp_path), names, world_size=2)
    saved = torch.load(tmp_path / f"{names[0]}.ckpt", weights_only=True)
    assert any(not torch.equal(each, saved["current_model_state"][k]) for k, each in saved["state_dict"].items())


def _warned(rank):
    rare = lambda: EMAWeightAveraging(update_every_n_steps=10)  # noqa: E731
    kinds = (EMAWeightAveraging, 1), (rare, 3), (EveryEpoch, 2)  # each with two updates or more
    return [_epochs(cyclic(), make, rank, 2, epochs=epochs)[1] for make, epochs in kinds]


def test_frequent_updates_are_warned_of_with_a_way_out():
    every, tenth, epoch = launch(_warned, world_size=2)[0]
    (text,) = every
    assert "EMAWeightAveraging updates its average every step" in text
    assert "update_every_n_steps=10" in text
    assert [text for text in epoch if "every 5 steps" in text and "`should_update`" in text]
    assert tenth == []
    assert not [text for text in epoch if "neither a parameter nor a buffer" in text], "it is brought together"


class OnOneRank(WeightAveraging):
    def __init__(self, step=None, epoch=None):
        super().__init__()
        self.at = step, epoch

    def should_update(self, step_idx=None, epoch_idx=None):
        return (step_idx, epoch_idx) == self.at and torch.distributed.get_rank() == 1


def _apart(rank, at, options):
    began_s = time.monotonic()
    try:
        _epochs(cyclic(), lambda: OnOneRank(**at), rank, 2, epochs=2, **options)
    finally:
        assert time.monotonic() - began_s < 15, "waited for the time-out"


@pytest.mark.parametrize(
    ("at", "step", "options"),
    [
        pytest.param({"step": 2}, 3, {}, marks=pytest.mark.exhaustive),
        pytest.param({"step": 4}, 5, {}, marks=pytest.mark.exhaustive),  # the last of an epoch
        ({"step": 9}, 10, {}),  # the last of the run
        pytest.param({"epoch": 0}, 5, {}, marks=pytest.mark.exhaustive),
        ({"epoch": 0}, 5, VALIDATED),
        pytest.param({"epoch": 1}, 10, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_an_update_on_one_rank_alone_is_an_error_that_names_the_callback(at, step, options):
    (_, first), (_, second) = outcomes(_apart, at, options, world_size=2, timeout_s=60)
    assert f"OnOneRank updates its average after step {step} on this rank, and other ranks do not" in second
    assert "for an update of the average of OnOneRank" in first
    assert "time-out" not in first + second
