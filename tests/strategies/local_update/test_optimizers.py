"""Optimizers under local updates: what talks in its step is refused, what stays local is said, the rest works."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from support.processes import launch, outcomes
from support.training import Regression, loader, local_update, network, sample, trainer
from torch import nn

from lightning_comm import FixedPeriod

pytestmark = pytest.mark.filterwarnings("ignore:.*one process only")


class Talks(torch.optim.SGD):
    """Shares its work with all ranks, as the distributed forms of some optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.05)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter)
        return loss


def _talks(rank, strategy):
    trainer(strategy, 2).fit(Regression(optimizer=Talks), loader(4, rank))


@pytest.mark.parametrize("gradient_steps", [0, 3])
def test_an_optimizer_that_talks_in_its_step_is_refused_in_the_first_one_on_each_rank(gradient_steps):
    strategy = local_update(FixedPeriod(2), gradient_steps=gradient_steps)
    for _, error in outcomes(_talks, strategy, world_size=2, timeout_s=40):
        assert error is not None
        for word in ("LocalUpdateStrategy", "Talks communicates in its `step`", "allreduce", "DDPStrategy"):
            assert word in error


class Norm(Callback):
    """Talks in hooks that run within the closure, which anybody may."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, runner, module, optimizer):
        norm = sum(float(each.grad.pow(2).sum()) for each in module.parameters())
        total = torch.tensor(norm)
        dist.all_reduce(total)
        self.norms.append(float(total))


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, 0.1, max_iter=3)


def _lbfgs(rank):
    module, norms = Regression(optimizer=lbfgs), Norm()
    trainer(local_update(FixedPeriod(1)), 2, callbacks=[norms]).fit(module, loader(1, rank))
    return [each.detach().numpy() for each in module.parameters()], norms.norms


def test_an_optimizer_that_evaluates_its_closure_several_times_works_and_the_closure_may_talk():
    ends = []
    for rank in range(2):
        net = network()
        x, y = (torch.stack(each) for each in zip(*(sample(rank, k) for k in range(4)), strict=True))
        optimizer = lbfgs(net.parameters())

        def closure(net=net, x=x, y=y, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(copy.deepcopy(list(net.parameters())))
    for weights, norms in launch(_lbfgs, world_size=2):
        assert len(norms) == 3
        for ours, first, second in zip(weights, *ends, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), ((first + second) / 2).detach())


class Estimates(torch.optim.SGD):
    """Keeps an estimate of its step size and a count in its groups."""

    def __init__(self, parameters):
        super().__init__([{"params": list(parameters), "d": 0.01, "k": 0}], 0.05, momentum=0.9)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["d"] *= 1.01
            group["k"] += 1
        super().step()
        return loss


class Counts(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__([{"params": list(parameters), "k": 0}], 0.05, momentum=0.9)

    def step(self, closure=None):
        loss = super().step(closure)
        self.param_groups[0]["k"] += 1
        return loss


class Switched(torch.optim.SGD):
    """Has two modes, as schedule-free optimizers have, under a name of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.05)

    def train(self):
        pass

    def eval(self):
        pass


def _warned(rank):
    texts = {}
    for make in (Estimates, Counts, Switched):
        for optimizer_state in ("local", "average"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # a learning rate that the user sets in the training step is not the optimizer's doing
                strategy = local_update(FixedPeriod(2), optimizer_state=optimizer_state)
                module = Regression(optimizer=make, schedule=lambda step: 0.9**step)
                trainer(strategy, 1).fit(module, loader(5, rank))
            ours = [str(each.message) for each in caught if "LocalUpdateStrategy" in str(each.message)]
            texts[make.__name__, optimizer_state] = [text for text in ours if "one process" not in text]
    return texts


def test_what_stays_local_is_said_once_and_by_name():
    (texts,) = launch(_warned, world_size=1)
    (numbers,), (modes,) = texts.pop(("Estimates", "average")), texts.pop(("Switched", "local"))
    assert "Estimates changes param_groups[0]['d'] in its `step`" in numbers
    assert "'average'" in numbers
    assert "Switched keeps a second copy of the weights" in modes
    assert "optimizer_state='average'" in modes
    assert all(each == [] for each in texts.values()), texts
