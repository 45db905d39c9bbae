"""What changes and is neither parameter nor buffer is named once; what a run may keep is not."""

import copy
import types
import warnings
from collections import deque

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from support.cyclic import cyclic, deep, momentum
from support.processes import launch
from support.training import Regression, loader, local_update, trainer
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.aggregation import RunningMean

from lightning_comm import FixedPeriod
from lightning_comm.strategies.common.unregistered import UnregisteredState

pytestmark = pytest.mark.filterwarnings("ignore:.*one process only")


class Shadow:
    """A moving average that is no module."""

    def __init__(self, module, as_list):
        copies = {name: each.detach().clone() for name, each in module.named_parameters()}
        self.kept = list(copies.values()) if as_list else copies

    def move(self):
        for each in self.kept if isinstance(self.kept, list) else self.kept.values():
            each.mul_(0.9)


class Patient(EarlyStopping):
    """One of Lightning's with a subclass of the user's: its best score is a tensor."""


class MakesACopy(Callback):
    """Makes its copy in the first step."""

    def __init__(self):
        self.teacher = None

    def on_train_batch_end(self, runner, module, *args):
        with torch.no_grad():
            self.teacher = self.teacher or copy.deepcopy(module.net)
            for mine, theirs in zip(self.teacher.parameters(), module.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)


class Model(Regression):
    def __init__(self):
        super().__init__(deep(4), momentum)


def in_a_list(model):
    model.holder = [copy.deepcopy(model.net)]
    return lambda: model.holder[0][0].weight.data.add_(1)


def hidden(model):
    vars(model)["teacher"] = copy.deepcopy(model.net)
    return lambda: model.teacher[0].weight.data.add_(1)


def in_a_part(model):
    model.part = Part()
    return lambda: setattr(model.part, "queue", model.part.queue.roll(1))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.queue = torch.arange(8.0)


def a_centre(model):
    model.centre = torch.zeros(9)
    return lambda: setattr(model, "centre", 0.9 * model.centre + 0.1)


def a_list_of_weights(model):
    model.shadow = Shadow(model, as_list=True)
    return lambda: model.shadow.move()


def in_an_object(model):
    model.average = types.SimpleNamespace(shadow=Shadow(model, as_list=False))
    return lambda: model.average.shadow.move()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (in_a_list, "`holder` of Model"),
        (hidden, "`teacher` of Model"),
        (in_a_part, "`part.queue` of Part"),
        (a_centre, "`centre` of Model"),
        (a_list_of_weights, "`shadow` of Model"),
        (in_an_object, "`average` of Model"),
    ],
)
@pytest.mark.parametrize("of_a_callback", [False, True])
def test_state_that_changes_is_named_once_wherever_it_is(make, name, of_a_callback):
    model, callbacks = Model(), []
    torch.manual_seed(1)
    if of_a_callback and "part" not in name:
        holder = MakesACopy()
        vars(holder).update(net=model.net, named_parameters=model.named_parameters)
        change, callbacks = make(holder), [holder]
        name = name.replace("of Model", "of the callback MakesACopy")
    else:
        change = make(model)
    state = UnregisteredState("Here", types.SimpleNamespace(callbacks=callbacks), model)
    state.look()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with torch.no_grad():
                change()
            state.look()
    (text,) = [str(each.message) for each in caught]
    assert text.startswith(f"Here: {name} changes")
    assert "register_buffer" in text


class Quiet(Regression):
    """Keeps what a run may keep: nothing that changes and lasts."""

    def __init__(self):
        super().__init__(deep(4), momentum)
        self.metric, self.metrics = MeanMetric(), [RunningMean(3)]
        self.outputs, self.recent, self.by_name = [], deque(maxlen=2), {}
        self.last = None
        self.views = [each.data for each in self.net.parameters()]
        self.same = torch.ones(4)
        self.kept_still = [copy.deepcopy(self.net)]
        self.others = [torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)]
        self.seen = nn.utils.weight_norm(nn.Linear(5, 1).double())
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) + self.seen(batch[0]).pow(2).mean()
        self.metric.update(loss.detach())
        self.metrics[0].update(loss.detach())
        self.outputs.append(loss.detach())
        self.recent.append(self.net(batch[0]).detach())
        self.by_name["loss"] = self.last = loss.detach()
        self.count += 1
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        with torch.no_grad():
            self.outputs.append(self.net(batch[0]))
            self.seen(batch[0])


class Centre(Regression):
    def __init__(self):
        super().__init__(deep(4), momentum)
        self.centre = torch.zeros(4)

    def training_step(self, batch, batch_idx):
        self.centre = 0.9 * self.centre + 0.1 * batch[0].mean().float()
        return super().training_step(batch, batch_idx)


def _warned(rank, kind):
    strategies = {
        "cyclic": lambda: cyclic(),
        "local": lambda: local_update(FixedPeriod(2)),
        "post": lambda: local_update(FixedPeriod(2), gradient_steps=2),
    }
    texts = {}
    for make in (Quiet, Centre):
        callbacks = [MakesACopy()] if make is Centre else [Patient("val_loss", patience=9)]
        if make is Centre and kind != "cyclic":
            callbacks.append(EMAWeightAveraging(decay=0.9))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner = trainer(strategies[kind](), 1, callbacks=callbacks, limit_val_batches=2, val_check_interval=4)
            runner.fit(make(), loader(8, rank), loader(2, 9))
        texts[make] = [str(each.message) for each in caught if "brought together" in str(each.message)]
    return texts


@pytest.mark.parametrize("kind", ["cyclic", "local", "post"])
def test_a_run_names_its_copies_once_and_nothing_else(kind):
    (texts,) = launch(_warned, kind, world_size=1)
    assert texts[Quiet] == []
    named = sorted(text.split(" changes")[0].split(": ")[1] for text in texts[Centre])
    assert named == ["`centre` of Centre", "`teacher` of the callback MakesACopy"]
