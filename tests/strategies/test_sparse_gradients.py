"""A fault of torch's DDP, by which it may train wrongly where one embedding is sparse, and who is told of it."""

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch, start_ranks
from support.training import FEATURES, Regression, loader, local_update, trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_comm import CommProfiler, CompressedDDPStrategy, FixedPeriod
from lightning_comm.cli.pilot.command import _listener
from lightning_comm.cli.pilot.trial_callbacks import Rehearsal

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")
WAIT = timedelta(seconds=40)


class Positions(nn.Module):
    """A layer, to whose output positions are added, as in many models of language."""

    def __init__(self, *, sparse=True, factor=None):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.factor = nn.Linear(FEATURES, 1).double(), factor
        self.positions = nn.Embedding(4, 1, sparse=sparse).double()

    def forward(self, x):
        words = self.words(x)  # before the positions, so behind them in the backward
        positions = self.positions(torch.arange(len(x)))
        return words + (positions if self.factor is None else self.factor * positions)


def _shares(rank, options):
    """For each parameter, what DDP hands over as a share of the mean of the ranks' own gradients."""
    alone, wrapped = Positions(**options), DistributedDataParallel(Positions(**options))
    x = torch.randn(4, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    shares = {}
    for model in (wrapped, alone):
        model(x).square().mean().backward()
    for (name, own), got in zip(alone.named_parameters(), wrapped.parameters(), strict=True):
        mean = own.grad.to_dense().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        shares[name] = float((got.grad.to_dense() * mean).sum() / mean.square().sum())
    return shares


@pytest.mark.parametrize("world_size", [2, 3])
def test_torch_still_divides_twice_what_shares_memory_with_a_sparse_gradient(world_size):
    # If this fails, torch has fixed it, and `ondevice/sparse_gradients.py` and its warnings can go.
    for shares in start_ranks(_shares, {}, world_size=world_size):
        expected = {"words.weight": 1 / world_size, "words.bias": 1 / world_size, "positions.weight": 1.0}
        assert shares == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"sparse": False}, {"factor": 1}], ids=str)
def test_both_ways_out_of_the_fault_give_the_mean(options):
    for shares in start_ranks(_shares, options, world_size=2):
        assert shares == pytest.approx(dict.fromkeys(shares, 1.0))


class Keep(Callback):
    """Keeps the gradients of the first step, and the mean over the ranks of those of the same model by itself."""

    def on_after_backward(self, runner, module):
        self.got = [each.grad.to_dense().clone() for each in module.net.parameters()]

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        own = Positions()
        nn.functional.mse_loss(own(batch[0]), batch[1]).backward()
        self.expected = [each.grad.to_dense().clone() for each in own.parameters()]
        for each in self.expected:
            dist.all_reduce(each)
            each /= 2


def _told(rank):
    cases = {
        "ddp": (DDPStrategy(timeout=WAIT), Positions(), CommProfiler(page=False)),
        "ddp, dense": (DDPStrategy(timeout=WAIT), Positions(sparse=False), CommProfiler(page=False)),
        "ddp, frozen": (DDPStrategy(timeout=WAIT), Positions(), CommProfiler(page=False)),
        "gradients first": (local_update(FixedPeriod(2), gradient_steps=2), Positions(), CommProfiler(page=False)),
        "gradients first, dense": (local_update(FixedPeriod(2), gradient_steps=2), Positions(sparse=False), Callback()),
        "local": (local_update(FixedPeriod(2)), Positions(), Callback()),
        "compressed": (CompressedDDPStrategy("bf16", timeout=WAIT), Positions(), CommProfiler(page=False)),
        "rehearsal": (DDPStrategy(timeout=WAIT), Positions(), Rehearsal()),
    }
    said = {}
    for name, (strategy, net, callback) in cases.items():
        if name == "ddp, frozen":
            net.positions.requires_grad_(False)
        keep = Keep()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            once = [callback, keep] if name == "compressed" else [callback]
            trainer(strategy, 2, callbacks=once, limit_train_batches=1 if name == "compressed" else 3).fit(
                Regression(net), loader(3, rank)
            )
        said[name] = [str(each.message) for each in caught if "sparse" in str(each.message)]
        if name == "compressed":
            said["gradients"] = [
                float((a * b).sum() / b.square().sum()) for a, b in zip(keep.got, keep.expected, strict=True)
            ]
        if name == "rehearsal":
            said["fault"] = callback.fault
    return said


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sparse"))
        return launch(_told, world_size=2)


def test_who_averages_gradients_by_ddp_alone_is_told_once_on_rank_0_with_two_ways_out(told):
    said = told[0]
    for name, where in (("ddp", "CommProfiler"), ("gradients first", "LocalUpdateStrategy, in its gradient phase")):
        (line,) = said[name]
        assert line.startswith(f"{where}: DDP averages gradients here, and those of 'net.positions' are sparse")
        assert [
            part for part in ("torch 2.", "Leave out `sparse=True`", "`1 * embedding(...)`") if part not in line
        ] == []
        assert told[1][name] == []


@pytest.mark.parametrize("name", ["ddp, dense", "ddp, frozen", "gradients first, dense", "local", "compressed"])
def test_nobody_else_is_told(told, name):
    assert told[0][name] == []


def test_gradients_sent_by_a_hook_of_ours_are_the_mean_beside_a_sparse_one_too(told):
    assert told[0]["gradients"] == pytest.approx([1.0, 1.0, 1.0], rel=0.01)


def test_the_pilot_says_so_of_its_baseline(told, capsys):
    class Results:
        def rehearsed(self, event):
            self.event = event

    hear = _listener(Results(), None, [], {})
    hear({"event": "rehearsed", "fault": told[0]["fault"]})
    assert capsys.readouterr().out.startswith("The baseline `ddp`: DDP averages gradients here, and those of 'net.pos")
    hear({"event": "rehearsed", "fault": None})
    assert capsys.readouterr().out == ""
