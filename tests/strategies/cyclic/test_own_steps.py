"""Parameters that the module steps itself under Cyclic Data Parallelism, callbacks that only freeze, a late limit."""

import warnings

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, EMAWeightAveraging
from support.cyclic import cyclic, deep, momentum, state
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer


class OwnOptimizer(Regression):
    """Steps its last layers by an optimizer that the strategy is not given."""

    def configure_optimizers(self):
        self.second = torch.optim.SGD(self.net[8:].parameters(), 0.05)
        return momentum(self.net[:8].parameters())

    def on_train_batch_end(self, *args):
        self.second.step()
        self.second.zero_grad()


class ByHand(OwnOptimizer):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        self.on_train_batch_end()


class NotStepped(OwnOptimizer):
    """Has a teacher that moves without a gradient, and layers that get a gradient and never move."""

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = deep(3)

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(0.9)


def _warned(rank, world_size):
    answers = []
    swaps = {
        "callbacks": [EMAWeightAveraging(update_every_n_steps=10)],
        "limit_val_batches": 1,
        "val_check_interval": 2,
    }
    for kind, options in ((OwnOptimizer, {}), (ByHand, {}), (NotStepped, swaps)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = kind(deep(6), momentum)
            trainer(cyclic(), world_size, **options).fit(module, loader(5, rank), loader(1, 90 + rank))
        answers.append([text for each in caught if "no group of the optimizer" in (text := str(each.message))])
    return answers


def test_parameters_that_the_module_steps_itself_are_warned_of_once_by_name_and_others_are_not():
    own, by_hand, not_stepped = launch(_warned, 2, world_size=2)[0]
    for texts in (own, by_hand):
        (text,) = texts
        assert "4 parameter(s) get a gradient and are changed" in text
        assert "net.8.weight, net.8.bias, net.10.weight, net.10.bias" in text
        assert "by its own gradient" in text
        assert "as a parameter group" in text
    assert not_stepped == []


class Freezes(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[:4])

    def finetune_function(self, module, epoch, optimizer):
        pass


class Backbone(Regression):
    def __init__(self, *args):
        super().__init__(*args)
        self.backbone = self.net[:4]

    def configure_optimizers(self):
        return momentum([each for each in self.parameters() if each.requires_grad])


def _frozen(rank, world_size):
    answers = []
    for callback in (Freezes(), BackboneFinetuning(2, verbose=False), BackboneFinetuning(0, verbose=False)):
        module = Backbone(deep(6))
        before = state(module.backbone)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(cyclic(), world_size, callbacks=[callback], max_epochs=2).fit(module, loader(4, rank))
        moved = any(not np.array_equal(*pair) for pair in zip(before, state(module.backbone), strict=True))
        texts = [str(each.message) for each in caught]
        answers.append((moved, [text for text in texts if "may unfreeze" in text], state(module)))
    return answers


def test_callbacks_that_thaw_nothing_after_the_cut_train_on():
    first, second = launch(_frozen, 2, world_size=2)
    assert [moved for moved, _, _ in first] == [False, False, True]
    assert ["Freezes may unfreeze" in text for _, texts, _ in first for text in texts] == [True]
    for (_, _, mine), (_, _, theirs) in zip(first, second, strict=True):
        for pair in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(*pair)


class Limits(Callback):
    def on_train_batch_end(self, runner, *args):
        runner.gradient_clip_val = 0.5 if runner.global_step >= 3 else None


def _limited(rank, world_size):
    trainer(cyclic(), world_size, callbacks=[Limits()]).fit(Regression(deep(6)), loader(6, rank))


def test_a_limit_that_is_set_in_mid_run_without_clip_by_is_an_error_that_says_so():
    for _, error in outcomes(_limited, 2, world_size=2):
        assert "the Trainer's limit of the gradient was changed in mid-run: `Trainer(gradient_clip_val=0.5)`" in error
        assert "clip_by='stage'" in error
