"""Modules without an optimizer, without a parameter that is trained, or with lazy ones: as under `ddp`, or refused.

Where a module is refused, that is before training, in one error with a way out.
"""

from datetime import timedelta

import pytest
import torch
from support.processes import launch
from support.training import FEATURES, Regression, loader, local_update, trainer, weights
from torch import nn

from lightning_comm import Averaging, CompressedDDPStrategy, CyclicStrategy, FixedPeriod, QuadraticPeriod, SparseMask
from lightning_comm.errors import RefusedSetUp

torch.set_num_threads(1)
WAIT = timedelta(seconds=40)
STRATEGIES = {
    "local_sgd": lambda: local_update(FixedPeriod(2)),
    "qsr": lambda: local_update(QuadraticPeriod(alpha="auto", h_base=2)),
    "post_local_sgd": lambda: local_update(FixedPeriod(2), gradient_steps=2),
    "masked": lambda: local_update(FixedPeriod(2), averaging=Averaging(compression=SparseMask())),
    "ddp_int8": lambda: CompressedDDPStrategy("int8", timeout=WAIT),
    "pactrain": lambda: CompressedDDPStrategy([SparseMask(), "bf16"], timeout=WAIT),
    "cyclic": lambda: CyclicStrategy(timeout=WAIT),
}
IN_STEP = {"ddp_int8", "pactrain"}


def _layers():
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1)).double()


class Plain(Regression):
    def __init__(self):
        super().__init__(_layers())


class NoOptimizer(Plain):
    def configure_optimizers(self):
        return None


class NoOptimizerByHand(NoOptimizer):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))


class EmptyList(Plain):
    def configure_optimizers(self):
        return []


class ScheduleAlone(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return {"lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class AllFrozen(Plain):
    """Frozen where Lightning has wrapped the model already."""

    def configure_optimizers(self):
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return torch.optim.SGD(self.parameters(), 0.1)


class NoParameters(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Identity()

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": []}], 0.1)


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.Linear(7, 1)).double()


class LazyStatistics(Plain):
    """Its parameters have shapes: the statistics, which are buffers, have none."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(FEATURES, 7), nn.Linear(7, 1)).double()


class LazyWithoutOptimizer(Lazy):
    def configure_optimizers(self):
        return None


class OneEmptyGroup(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD([{"params": []}, {"params": list(self.parameters())}], 0.05)


class EmptyGroup(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD([{"params": []}], 0.05)


class LazyOnceRun(Lazy):
    def configure_model(self):
        self.net(torch.zeros(2, FEATURES, dtype=torch.float64))


def _refused(kind, strategy, rank, devices):
    try:
        trainer(STRATEGIES[strategy](), devices).fit(kind(), loader(4, rank))
    except RefusedSetUp as error:
        return str(error)
    return None


REFUSED = {
    NoOptimizer: ("`configure_optimizers` returned no optimizer", "Return an optimizer; or return None and use DDP"),
    NoOptimizerByHand: ("`configure_optimizers` returned no optimizer", "return None and use DDPStrategy"),
    EmptyList: ("`configure_optimizers` returned no optimizer", "Return an optimizer"),
    ScheduleAlone: ("a dictionary without an optimizer", '{"optimizer": optimizer, "lr_scheduler": scheduler}'),
    AllFrozen: ("requires a gradient, so there is nothing to train", "Check `requires_grad`"),
    NoParameters: ("requires a gradient, so there is nothing to train", "Check `requires_grad`"),
    Lazy: ("2 parameter(s) and buffer(s) of LazyLinear have no shape", "'net.0.weight', 'net.0.bias'", "Run one batch"),
    LazyStatistics: ("of LazyBatchNorm1d have no shape", "'net.0.running_mean'", "`configure_model`"),
}
AS_UNDER_DDP = {(NoOptimizer, name) for name in IN_STEP} | {(NoOptimizerByHand, name) for name in IN_STEP}


def _alone(rank):
    return {(kind, name): _refused(kind, name, rank, 1) for kind in REFUSED for name in STRATEGIES}


def _together(rank):
    trained = {}
    for kind in (OneEmptyGroup, EmptyGroup, LazyOnceRun):
        for name in ("local_sgd", "ddp_int8", *(["cyclic"] if kind != EmptyGroup else [])):
            module = kind()
            runner = trainer(STRATEGIES[name](), 2)
            runner.fit(module, loader(4, rank))
            trained[kind.__name__, name] = (runner.global_step, weights(module))
    return trained, _refused(LazyWithoutOptimizer, "cyclic", rank, 2)


@pytest.fixture(scope="module")
def alone():
    # what is refused does not depend on the number of ranks, and one need not tell others of it
    (answer,) = launch(_alone, world_size=1)
    return answer


@pytest.fixture(scope="module")
def together():
    return launch(_together, world_size=2)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_module_with_nothing_to_train_or_lazy_parts_is_refused_before_training_or_runs_as_under_ddp(
    alone, kind, name
):
    said = alone[kind, name]
    if (kind, name) in AS_UNDER_DDP:
        assert said is None
    else:
        assert said.partition(":")[0] == type(STRATEGIES[name]()).__name__
        assert [word for word in REFUSED[kind] if word not in said] == [], said


def test_a_lazy_module_without_an_optimizer_is_told_both_at_once_on_all_ranks(together):
    said = [each[1] for each in together]
    assert said[0] == said[1]
    assert "2 things in this set-up" in said[0]
    assert "have no shape" in said[0]
    assert "returned no optimizer" in said[0]


def test_an_empty_group_and_a_lazy_module_that_was_run_once_train_as_others(together):
    for case, (steps, own) in together[0][0].items():
        assert steps == 4, case
        assert all((a == b).all() for a, b in zip(own, together[1][0][case][1], strict=True)), case
