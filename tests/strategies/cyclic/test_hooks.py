"""Hooks of parameters and modules, and learning-rate finders, do under Cyclic Data Parallelism what DDP lets them."""

import numpy as np
import pytest
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer


def halve(gradient):
    return gradient * 0.5


def halve_grad(parameter):
    parameter.grad.mul_(0.5)


def shrink(module, into, out):
    return tuple(each if each is None else each * 0.9 for each in into)


class Hooked(Regression):
    """Changes its gradients by hooks of torch, which it sets at one of Lightning's moments."""

    def __init__(self, kind, at):
        super().__init__(deep(6), momentum)
        self.kind, self.at = kind, at
        if at == "init":
            self.put()

    def put(self):
        for parameter in self.parameters() if self.kind in ("register_hook", "after") else []:
            if self.kind == "after":
                parameter.register_post_accumulate_grad_hook(halve_grad)
            else:
                parameter.register_hook(halve)
        for part in self.net if self.kind == "register_full_backward_hook" else []:
            part.register_full_backward_hook(shrink)

    def on_train_start(self):
        if self.at == "start":
            self.put()

    def on_train_batch_start(self, batch, batch_idx):
        if self.at == "later" and batch_idx == 2:
            self.put()


KINDS = [
    ("none", "init"), ("register_hook", "init"), ("register_full_backward_hook", "later"), ("after", "init"),
    ("after", "start"),
]  # fmt: skip
MORE_KINDS = [("none", "init"), ("register_hook", "later"), ("register_full_backward_hook", "init")]


def _hooked(rank, world_size, kinds):
    answers = {}
    for each in kinds:
        pair = []
        for strategy in (DDPStrategy(), cyclic(warmup_sync_steps=10**9)):
            module = Hooked(*each)
            trainer(strategy, world_size).fit(module, loader(5, rank))
            pair.append(state(module))
        answers[each] = pair
    return answers


@pytest.mark.parametrize("kinds", [KINDS, pytest.param(MORE_KINDS, marks=pytest.mark.exhaustive)], ids=["", "more"])
def test_hooks_of_parameters_and_modules_act_on_each_ranks_own_gradients_as_under_ddp(kinds):
    answers = launch(_hooked, 2, kinds, world_size=2)[0]
    plain = answers["none", "init"][0]
    for name, (ddp, ours) in answers.items():
        for one, other in zip(ddp, ours, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12, err_msg=str(name))
        assert name[0] == "none" or any(abs(a - b).max() > 1e-6 for a, b in zip(ddp, plain, strict=True)), name


class Rated(Regression):
    def __init__(self, lr=1e-4):
        super().__init__(deep(6), lambda parameters: momentum([{"params": list(parameters), "lr": self.lr}]))
        self.lr = lr


class InAnEpoch(LearningRateFinder):
    """Starts at the second epoch, as in an example of Lightning's documentation."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, runner, module):
        if runner.current_epoch == 1:
            self.lr_find(runner, module)


def _find(rank, world_size, folder, strategy, tuner):
    module, options = Rated(), {"num_training": 14, "max_lr": 0.1, "early_stop_threshold": None}
    callbacks = []
    if not tuner:
        options["num_training_steps"] = options.pop("num_training")
        callbacks = [LearningRateFinder(**options)]
    runner = trainer(strategy, world_size, callbacks=callbacks, max_steps=6, default_root_dir=folder)
    data = loader(14, rank)
    if tuner:
        Tuner(runner).lr_find(module, data, **options)
    runner.fit(module, data)
    return module.lr, state(module), runner.global_step


def _found(rank, world_size, folder):
    found = [_find(rank, world_size, folder, cyclic(), tuner) for tuner in (True, False)]
    plain = Rated(found[0][0])
    trainer(cyclic(), world_size, max_steps=6).fit(plain, loader(14, rank))
    return found, state(plain)


def test_a_learning_rate_finder_finds_a_rate_and_the_run_begins_where_it_began(tmp_path):
    for found, plain in launch(_found, 2, str(tmp_path), world_size=2):
        for rate, weights, steps in found:
            assert 1e-4 < rate == found[0][0] < 0.1
            assert steps == 6
            for one, other in zip(weights, plain, strict=True):
                np.testing.assert_array_equal(one, other)


def _in_an_epoch(rank, folder):
    callbacks = [InAnEpoch(num_training_steps=4)]
    trainer(cyclic(), 2, callbacks=callbacks, max_epochs=2, default_root_dir=folder).fit(Rated(), loader(5, rank))


def test_a_learning_rate_finder_in_the_middle_of_a_run_is_refused_on_all_ranks(tmp_path):
    for _, error in outcomes(_in_an_epoch, str(tmp_path), world_size=2, timeout_s=30):
        assert "learning-rate finder was started in the middle of a run, at step 5" in error
        assert "`on_fit_start`" in error
