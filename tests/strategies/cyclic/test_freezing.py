"""Parameters that are frozen, thawed, added or replaced in the middle of a run: an error of ours at the next step."""

import copy
import time
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:CyclicStrategy. one process only")


class At(Callback):
    """Calls a function of the module once, at a moment of Lightning's after so many steps."""

    def __init__(self, moment, change, step, rank=None):
        def call(runner, module, *args):
            if runner.global_step == step and not self.done and rank in (None, runner.global_rank):
                self.done = True
                change(module)

        self.done = False
        setattr(self, moment, call)


class Within(Regression):
    """Changes itself in front of the forward of a step."""

    change, step = None, 0

    def training_step(self, batch, batch_idx):
        if self.change is not None and self.trainer.global_step == self.step:
            self.change(self)
        return super().training_step(batch, batch_idx)


def bias(module):
    module.net[4].bias.requires_grad_(False)


def layer(module):
    module.net[4].requires_grad_(False)


def whole(module):
    module.freeze()


def thaw(module):
    module.net[4].requires_grad_(True)


def add_group(module):
    thaw(module)
    module.trainer.optimizers[0].add_param_group({"params": list(module.net[4].parameters())})


def add_new(module):
    module.extra = nn.Parameter(torch.zeros(3).double())
    module.trainer.optimizers[0].add_param_group({"params": [module.extra]})


def replace(module):
    module.net[4].weight = nn.Parameter(module.net[4].weight.detach().clone())


def replace_head(module):
    module.net[10] = nn.Linear(7, 1).double()


def take_groups_away(module):
    module.trainer.optimizers[0].param_groups.clear()


def another_optimizer(module):
    module.trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 0.5)]


def make(change):
    """The layer that is to be thawed is frozen, in the optimizer or beside it."""
    if change not in (thaw, add_group):
        return Within(deep(6), momentum)
    module = Within(deep(6), lambda parameters: momentum([p for p in parameters if p.requires_grad or change is thaw]))
    module.net[4].requires_grad_(False)
    return module


LAYER, WHOLE = ["Not any more: net.4.weight, net.4.bias", "another `fit`"], ["trains 0 parameters", "12 when"]
CASES = [
    *(("on_train_batch_start", change, 2, words) for change, words in [
        (bias, ["trains 11 parameters at step 2, and 12 when", "Not any more: net.4.bias.", "another `fit`"]),
        (layer, LAYER), (whole, WHOLE), (take_groups_away, WHOLE),
        (thaw, ["trains 12 parameters at step 2, and 10 when", "New: net.4.weight, net.4.bias"]),
        (add_group, ["New: net.4.weight, net.4.bias"]), (add_new, ["New: extra"]),
        (replace, ["net.4.weight", "not those of the module any more", "another `fit`"]),
        (replace_head, ["net.10.weight, net.10.bias", "A layer, or a weight"]),
        (another_optimizer, ["the optimizer SGD", "step 2", "not the one with which", "param_groups"]),
    ]),
    *((moment, change, 2, words) for moment in ("on_before_zero_grad", "training_step", "on_before_backward",
      "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_start",
      "on_validation_end") for change, words in [(layer, LAYER), (whole, WHOLE)]),
    *((moment, change, 0, words) for moment in ("on_before_zero_grad", "training_step", "on_before_backward")
      for change, words in [(layer, LAYER), (whole, WHOLE), (thaw, ["New: net.4.weight"])]),
    ("on_train_batch_start", whole, 0, ["requires a gradient in the first batch", "Freeze a part"]),
    ("training_step", replace, 0, ["number 4 of the optimizer", "not those of the module any more"]),
]  # fmt: skip


def _errors(rank):
    found = []
    for moment, change, step, _ in CASES:
        module, callbacks = make(change), []
        if moment == "training_step":
            module.change, module.step = change, step
        else:
            callbacks = [At(moment, change, step)]
        runner = trainer(
            cyclic(), 1, callbacks=callbacks, max_epochs=3, num_sanity_val_steps=0,
            limit_val_batches=int("validation" in moment),
        )  # fmt: skip
        try:
            runner.fit(module, loader(2, rank), loader(1, 90))
            found.append(("nothing", runner.global_step))
        except (RuntimeError, ValueError) as error:
            found.append((f"{type(error).__name__}: {error}", runner.global_step))
    return found


def test_each_change_ends_the_run_at_its_step_with_an_error_that_names_the_parameters():
    (found,) = launch(_errors, world_size=1)
    for (moment, change, step, words), (text, stopped_at) in zip(CASES, found, strict=True):
        missing = [word for word in ["CyclicStrategy", *words] if word not in text]
        assert missing == [], f"{moment}, {change.__name__}, step {step}: {missing} not in {text}"
        assert stopped_at <= step + 1


def _on_one_rank(rank, moment, step):
    began_s = time.monotonic()
    callback = At(moment, layer, step, rank=1)
    try:
        trainer(cyclic(), 2, callbacks=[callback], max_epochs=3).fit(make(layer), loader(2, rank))
    finally:
        assert time.monotonic() - began_s < 20, "waited for the time-out"


@pytest.mark.parametrize(("moment", "step"), [("on_train_batch_start", 0), ("on_before_backward", 2)])
def test_frozen_on_one_rank_alone_is_heard_of_on_all_before_a_time_out(moment, step):
    (_, first), (_, second) = outcomes(_on_one_rank, moment, step, world_size=2, timeout_s=60)
    assert "Not any more: net.4.weight, net.4.bias" in second
    assert "rank 1 failed" in first
    assert "time-out" not in first + second


def _thawed_later(rank, path):
    frozen = make(thaw)
    runner = trainer(cyclic(), 2)
    runner.fit(frozen, loader(4, rank))
    runner.save_checkpoint(path)
    module = make(thaw)
    thaw(module)
    before = copy.deepcopy(state(frozen))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(cyclic(), 2, max_epochs=2).fit(module, loader(4, rank), ckpt_path=path)
    moved = [not np.array_equal(*pair) for pair in zip(before, state(module), strict=True)]
    return moved, state(module), [str(each.message) for each in caught if "CyclicStrategy" in str(each.message)]


def test_another_fit_from_the_checkpoint_trains_what_was_thawed_between(tmp_path):
    (moved, one, texts), (_, other, _) = launch(_thawed_later, str(tmp_path / "a.ckpt"), world_size=2)
    assert all(moved)
    assert [text for text in texts if "trained other parameters" in text and "cut into stages anew" in text]
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
