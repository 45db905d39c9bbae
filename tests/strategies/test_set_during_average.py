"""Saves between forward and backward, and what is set while an average is in place for a validation in mid-round."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.processes import launch
from support.training import Regression, loader, local_update, network, own_file, trainer, weights

from lightning_comm import Averaging, BatchNormReestimation, FixedPeriod

EVERY_3 = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}


def assert_same(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


class Saving(Regression):
    """Saves at global step 2, in mid-round, from the hook that it is told."""

    def __init__(self, where, path):
        super().__init__()
        self.where, self.path = where, path

    def save(self, where):
        if where == self.where and self.trainer.global_step == 2:
            self.trainer.save_checkpoint(self.path)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.save("training_step")
        return loss

    def on_before_backward(self, loss):
        self.save("on_before_backward")


class Failing(Callback):
    """Catches a save that a hook of its own lets fail, and looks at the weights behind it."""

    def on_save_checkpoint(self, runner, module, checkpoint):
        raise OSError("disk full")

    def on_train_batch_end(self, runner, module, *args):
        if runner.global_step == 3:
            before = weights(module)
            with pytest.raises(OSError, match="disk full"):
                runner.save_checkpoint("never.ckpt")
            assert_same(before, weights(module))


def test_saves_in_mid_round_leave_the_run_as_it_is_wherever_they_are_and_also_when_they_fail(tmp_path):
    def run(rank):
        ends = []
        for where in (None, "training_step", "on_before_backward", "fails"):
            module = Saving(where, str(tmp_path / f"{where}.ckpt"))
            callbacks = [Failing()] if where == "fails" else []
            trainer(local_update(FixedPeriod(8)), 2, callbacks=callbacks).fit(module, loader(8, rank))
            ends.append(weights(module))
        return ends

    for undisturbed, *ends in launch(run, world_size=2):
        for end in ends:
            assert_same(undisturbed, end)
    saved = [torch.load(tmp_path / f"{where}.ckpt")["state_dict"] for where in ("training_step", "on_before_backward")]
    for one, other in zip(*(state.values() for state in saved), strict=True):
        assert torch.equal(one, other)


class Setting(Regression):
    """Sets buffers and one layer at the end of a validation, and leaves the rest."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("best", torch.tensor(0.0))
        self.register_buffer("validations", torch.tensor(0))
        self.register_buffer("untouched", torch.tensor(1.0))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.after = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.untouched += 1 + self.global_rank
        if batch_idx == 2:
            self.before = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def on_validation_epoch_end(self):
        self.threshold.fill_(0.1)
        self.best = torch.tensor(0.25)  # another tensor in its place
        self.validations += 1
        self.net[2].load_state_dict(network(seed=7)[2].state_dict())


SETTINGS = {
    "plain": {},
    "ema": {},
    "kept buffers": {"buffers": "keep"},
    "in the background": {"averaging": Averaging(compression="bf16", overlap_steps=1)},
    "local": {"evaluate_weights": "local"},
}


def _set(rank, name, folder):
    """Return a run's state before and after its validation, and what this rank's file says of the time within it."""
    module = Setting()
    save = ModelCheckpoint(folder, filename="saved", monitor="val_loss", save_top_k=-1)
    callbacks = [save, *([EMAWeightAveraging(decay=0.5)] if name == "ema" else [])]
    strategy = local_update(FixedPeriod(8), **SETTINGS[name])
    runner = trainer(strategy, 2, callbacks=callbacks, enable_checkpointing=True, **EVERY_3)
    runner.fit(module, loader(4, rank), loader(1, 0))
    saved = torch.load(own_file(f"{folder}/saved.ckpt", rank), weights_only=False)["weights"]
    return tuple({key: t.numpy() for key, t in state.items()} for state in (module.before, module.after, saved))


def test_what_is_set_in_a_validation_stays_and_the_rest_comes_back_and_rank_files_say_so(tmp_path):
    def run(rank):
        return {name: _set(rank, name, str(tmp_path / name)) for name in SETTINGS}

    restored = network(seed=7)[2].state_dict()
    for rank, runs in enumerate(launch(run, world_size=2)):
        for name, (before, after, saved) in runs.items():
            assert after["threshold"] == np.float32(0.1), name
            assert (after["best"], after["validations"], after["untouched"]) == (0.25, 1, 2 + rank), name
            for part in ("weight", "bias"):
                np.testing.assert_array_equal(after[f"net.2.{part}"], restored[part].numpy(), err_msg=name)
                np.testing.assert_array_equal(after[f"net.0.{part}"], before[f"net.0.{part}"], err_msg=name)
            for key, value in after.items():
                kind = "parameters" if key.startswith("net") else "buffer"
                np.testing.assert_array_equal(saved[f"{kind}:{key}"], value, err_msg=f"{name}: {key}")


class Doubling(Callback):
    """Moves weights for a validation and back when training goes on, as `eval` and `train` of some optimizers do."""

    moved = False

    def on_validation_epoch_start(self, runner, module):
        self.move(module, 2.0)

    def on_train_batch_start(self, runner, module, *args):
        if self.moved:
            self.move(module, 0.5)

    @torch.no_grad()
    def move(self, module, factor):
        self.moved = not self.moved
        for parameter in module.parameters():
            parameter.mul_(factor)


def test_weights_that_are_moved_for_a_validation_and_back_when_training_goes_on_are_right_again():
    def run(rank):
        ends = []
        for callbacks in ([], [Doubling()]):
            module = Regression()
            runner = trainer(local_update(FixedPeriod(4)), 2, callbacks=callbacks, **EVERY_3)
            runner.fit(module, loader(8, 0), loader(1, 0))  # the same data on all ranks: averages change nothing
            ends.append(weights(module))
        return ends

    for undisturbed, end in launch(run, world_size=2):
        assert_same(undisturbed, end)


class Norm(Regression):
    """Looks at its statistics before, during and after a validation."""

    def __init__(self):
        super().__init__(network(norm=True))

    def forward(self, x):
        return self.net(x)

    def statistics(self):
        return [buffer.clone().numpy() for buffer in self.buffers()]

    def on_train_batch_end(self, *args):
        self.before = self.statistics()

    def on_validation_end(self):
        self.seen = self.statistics()

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.compared = self.before, self.seen, self.statistics()


def test_statistics_that_are_renewed_for_a_validation_in_mid_round_go_with_its_average():
    def run(rank):
        module = Norm()
        module.train_dataloader, module.val_dataloader = lambda: loader(5, rank), lambda: loader(1, 0)
        trainer(local_update(FixedPeriod(8)), 2, callbacks=[BatchNormReestimation(4)], **EVERY_3).fit(module)
        return module.compared

    one, two = launch(run, world_size=2)
    for before, seen, after in (one, two):
        assert_same(before, after)
        assert (seen[0] != before[0]).any()
    assert (one[0][0] != two[0][0]).any()
    assert_same(one[1][:2], two[1][:2])
