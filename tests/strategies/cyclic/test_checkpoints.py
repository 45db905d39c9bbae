"""A run resumed at any step goes on as the run that saved there, bit for bit; and files are ordinary ones."""

import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.cyclic import adamw, cyclic, deep, momentum, reference, state
from support.processes import launch, outcomes
from support.training import Regression, Samples, loader, trainer
from torch import nn

from lightning_comm.data.resumable import ResumableLoader

PER_EPOCH, EPOCHS = 5, 2


class Noisy(Regression):
    """Draws from every generator in each step, so that a random state that is not restored shows."""

    def __init__(self, optimizer):
        torch.manual_seed(0)
        parts = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3)]
        parts += [nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Dropout(0.1), nn.Linear(7, 1)]
        super().__init__(nn.Sequential(*parts).double(), optimizer, lambda step: 0.85**step)

    def training_step(self, batch, batch_idx):
        noise = 0.01 * (random.random() + float(np.random.rand()))
        return super().training_step(batch, batch_idx) * (1 + noise)


class Save(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == self.step:
            runner.save_checkpoint(self.path)


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def fit(
    rank, world_size, make, settings, *, ckpt_path=None, seed=0, callbacks=(), strategy=None, trusted=None, **options
):
    seed_everything(100 * seed + rank)
    module = make()
    data = ResumableLoader(Samples(PER_EPOCH * 4, rank), 4, seed=3, num_replicas=1, rank=0)
    runner = trainer(
        strategy or cyclic(**settings), world_size, callbacks=list(callbacks), **{"max_epochs": EPOCHS, **options}
    )
    seed_everything(100 * seed + rank)
    runner.fit(module, data, loader(1, rank), ckpt_path=ckpt_path, weights_only=trusted)
    return module, runner


def _saves(folder, steps):
    return [Save(step, f"{folder}/{step}.ckpt") for step in steps]


def _resume_everywhere(rank, world_size, folder, make, settings, options, steps=(1, 3, 5, 8), trusted=None):
    whole, _ = fit(rank, world_size, make, settings, callbacks=_saves(folder, steps), **options)
    for step in steps:
        path, saves = f"{folder}/{step}.ckpt", _saves(f"{folder}/after {step}", [each for each in steps if each > step])
        resumed, _ = fit(
            rank, world_size, make, settings, ckpt_path=path, seed=9, trusted=trusted, callbacks=saves, **options
        )
        assert resumed.losses == whole.losses[len(whole.losses) - len(resumed.losses) :], step
        assert len(resumed.losses) == len(whole.losses) * (EPOCHS * PER_EPOCH - step) // (EPOCHS * PER_EPOCH)
        for mine, theirs in zip(state(resumed), state(whole), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"resumed after {step}")


CASES = {
    "adamw": (2, adamw, {}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
    "v1, clipped": (2, momentum, {"rule": "v1", "clip_by": "previous_norm"}, {"gradient_clip_val": 0.1}),
    "three, validated": (
        3, momentum, {"warmup_sync_steps": 2, "stages": 3}, {"limit_val_batches": 1, "val_check_interval": 2},
    ),
}  # fmt: skip
EVERYWHERE = (1, 3, 5, 8)
STEPS = {"adamw": (1, 5), "v1, clipped": (3,), "three, validated": (8,)}  # 5 is the end of an epoch


@pytest.mark.parametrize(
    ("case", "steps"),
    [*STEPS.items(), *(pytest.param(case, EVERYWHERE, marks=pytest.mark.exhaustive) for case in CASES)],
)
def test_a_resumed_run_repeats_bit_for_bit(tmp_path, case, steps):
    world_size, optimizer, settings, options = CASES[case]
    launch(
        _resume_everywhere, world_size, str(tmp_path), lambda: Noisy(optimizer), settings, options, steps,
        world_size=world_size,
    )  # fmt: skip


def _save(rank, world_size, path, step=4, **kwargs):
    module = Regression(deep(8), adamw)
    strategy = cyclic()
    runner = trainer(strategy, world_size, callbacks=[Save(step, path)])
    runner.fit(module, loader(6, rank))
    return strategy.stage_names


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file that two ranks have written at step 4 of 6, and the parameters of each of their stages."""
    path = str(tmp_path_factory.mktemp("saved") / "a.ckpt")
    return path, launch(_save, 2, path, world_size=2)[0]


def test_the_file_holds_one_version_and_the_whole_optimizer_state(saved):
    path, names = saved
    content = torch.load(path, weights_only=True)
    expected = Regression(deep(8), adamw)
    optimizer = reference(expected, 2, 4, names)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(content["state_dict"][name], tensor)
    ours, theirs = content["optimizer_states"][0], optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for number, values in theirs["state"].items():
        for key, value in values.items():
            assert torch.equal(ours["state"][number][key], value), (number, key)


def _go_on(rank, world_size, path, strategy):
    module = Regression(deep(8), adamw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = trainer(strategy or cyclic(), world_size)
        runner.fit(module, loader(6, rank), ckpt_path=path)
    held = [len(values) for values in runner.optimizers[0].state.values()]
    return runner.global_step, state(module), held, [str(each.message) for each in caught]


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("auto", 1)])
def test_other_strategies_go_on_from_the_file(saved, strategy, world_size):
    answers = launch(_go_on, world_size, saved[0], strategy, world_size=world_size)
    assert [answer[0] for answer in answers] == [6] * world_size
    assert answers[0][2] == [3] * 16  # both moments and the number of steps of each tensor


def _save_plainly(rank, world_size, path):
    trainer("ddp", world_size, callbacks=[Save(4, path)]).fit(Regression(deep(8), adamw), loader(6, rank))


@pytest.fixture
def saved_plainly(tmp_path):
    path = str(tmp_path / "a.ckpt")
    return path, launch(_save_plainly, 2, path, world_size=2)


@pytest.mark.parametrize(
    ("file", "world_size", "must_say"),
    [("saved_plainly", 2, "another strategy wrote it"), ("saved", 3, "written by 2 ranks, and there are 3 now")],
)
def test_files_of_others_are_taken_up_with_a_warning(request, file, world_size, must_say):
    path, _ = request.getfixturevalue(file)
    answers = launch(_go_on, world_size, path, None, world_size=world_size)
    for steps, weights, _, _ in answers:
        assert steps == 6
        for mine, first in zip(weights, answers[0][1], strict=True):
            np.testing.assert_array_equal(mine, first)
    assert [text for text in answers[0][3] if must_say in text and "ckpt_path" in text]


def _callbacks(rank, world_size, folder):
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    only = ModelCheckpoint(folder, filename="only-{step}", every_n_train_steps=4, save_top_k=-1, save_weights_only=True)
    module, runner = fit(rank, world_size, lambda: Noisy(adamw), {}, callbacks=[save, only], enable_checkpointing=True)
    runner.save_checkpoint(f"{folder}/after.ckpt")
    return state(module)


def test_model_checkpoint_and_a_save_after_the_fit(tmp_path):
    answers = launch(_callbacks, 2, str(tmp_path), world_size=2)
    names = {f"step={step}.ckpt" for step in (3, 6, 9)} | {f"only-step={step}.ckpt" for step in (4, 8)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"after.ckpt"}
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)
    for tensor, one, two in zip(after["state_dict"].values(), *answers, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), one)
        np.testing.assert_array_equal(one, two)
    assert len(after["optimizer_states"][0]["state"]) == len(list(Noisy(adamw).parameters()))
    assert "optimizer_states" not in torch.load(tmp_path / "only-step=4.ckpt", weights_only=True)


class Fail(Callback):
    def on_train_batch_end(self, runner, *args):
        if runner.global_step == 4 and runner.global_rank == 1:
            raise ValueError("boom")


def _failing(rank, world_size, folder):
    save = ModelCheckpoint(folder, save_on_exception=True)
    fit(rank, world_size, lambda: Noisy(adamw), {}, callbacks=[Fail(), save], enable_checkpointing=True)


def _after_an_error(rank, world_size, path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(rank, world_size, lambda: Noisy(adamw), {}, ckpt_path=path)
    return " ".join(str(each.message) for each in caught if "CyclicStrategy" in str(each.message))


def test_a_checkpoint_on_an_exception_of_one_rank_lets_nobody_hang(tmp_path):
    answers = outcomes(_failing, 2, str(tmp_path), world_size=2, timeout_s=30)
    assert "ValueError: boom" in answers[1][1]
    assert "rank 1 failed: ValueError: boom" in answers[0][1]
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["lightning_comm.cyclic"]["incomplete"]
    said, _ = launch(_after_an_error, 2, str(path), world_size=2)
    assert "was written after an error" in said
    assert "has no optimizer state" in said


def _two_fits(rank, strategy, path=None):
    """A second fit of the same Trainer, saved in its middle; and the run that resumes it."""
    module = Regression(deep(6), momentum)
    runner = trainer(strategy(), 2, callbacks=[Save(PER_EPOCH + 2, path)] if path else [])
    runner.fit(module, loader(PER_EPOCH, rank))
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader(PER_EPOCH, rank))
    if path is None:
        return state(module)
    resumed = Regression(deep(6), momentum)
    data = ResumableLoader(Samples(PER_EPOCH * 4, rank), 4, shuffle=False, num_replicas=1, rank=0)
    data.load_state_dict({**data.state_dict(), "epoch": 1, "batches_done": 2})
    trainer(strategy(), 2, max_epochs=2).fit(resumed, data, ckpt_path=path)
    return state(module), state(resumed), runner.global_step


def test_the_synchronous_start_counts_from_the_beginning_of_each_run_and_of_the_one_that_is_resumed(tmp_path):
    def in_step():
        return cyclic(warmup_sync_steps=PER_EPOCH)

    answers = launch(_two_fits, in_step, str(tmp_path / "cyclic.ckpt"), world_size=2)
    expected, _ = launch(_two_fits, lambda: "ddp", world_size=2)
    delayed, _ = launch(_two_fits, cyclic, world_size=2)
    for whole, resumed, steps in answers:
        assert steps == 2 * PER_EPOCH
        for mine, again, theirs, other in zip(whole, resumed, expected, delayed, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(mine, again)
            assert abs(mine - other).max() > 1e-6


class Remark:
    """An object of a user's in the state of a scheduler."""


class Remarking(torch.optim.lr_scheduler.LambdaLR):
    def state_dict(self):
        return {**super().state_dict(), "remark": Remark()}

    def load_state_dict(self, state_dict):
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "remark"})


class Remarked(Noisy):
    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = Remarking(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _remarked(rank, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _resume_everywhere(rank, 2, folder, lambda: Remarked(adamw), {}, {}, steps=(3,), trusted=False)
    return [str(each.message) for each in caught if "another rank" in str(each.message)]


def test_a_scheduler_that_keeps_an_object_resumes_from_that_of_rank_0_and_says_so(tmp_path):
    one, other = launch(_remarked, str(tmp_path), world_size=2)
    assert one == []
    assert [
        part for part in ("CyclicStrategy", "Remark", "add_safe_globals", "of rank 0") if part not in other[0]
    ] == []
