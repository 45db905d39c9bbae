"""Fits on a CUDA device that is not there: what the host must know it reads once a step, and training is the same."""

import os
from collections import Counter

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from support.mock_cuda import mock_cuda
from support.processes import launch
from support.training import trainer
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_comm import Cast, CompressedDDPStrategy, Int8, ModulePruning, PowerSGD, SparseMask

STEPS = 6
MEETING = "lightning_comm/strategies/compression/run.py"


class Net(LightningModule):
    """Three layers, whose first may mask itself; under manual optimization it steps after every second backward."""

    def __init__(self, *, masked=False, manual=False, spoilt=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 20), nn.Linear(20, 3))
        if masked:
            prune.l1_unstructured(self.net[0], "weight", 0.7)
        self.automatic_optimization = not manual
        self.spoilt = spoilt

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        if batch_idx == self.spoilt:
            loss = loss * torch.inf
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Watch(Callback):
    """Notes for each batch what the package has waited for, and lets a mask shrink on the way."""

    def __init__(self, device, changes_at=None):
        self.device, self.changes_at, self.seen, self.batches = device, changes_at, 0, []

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        if batch_idx == self.changes_at:
            module.net[0].weight_mask.select(0, 0).zero_()

    def on_train_batch_end(self, *args):
        waits = self.device.waits if self.device is not None else []
        self.batches.append(Counter(wait.where.split(":")[0] for wait in waits[self.seen :] if wait.own))
        self.seen = len(waits)


def fit(rank, module, compression, *, device, **options):
    """Return the weights, what each batch waited for, and the strategy."""
    drawn = torch.randn(4 * STEPS, 12, generator=torch.Generator().manual_seed(rank))
    watch = Watch(device, options.pop("changes_at", None))
    strategy = CompressedDDPStrategy(compression, bucket_cap_mb=0.001, process_group_backend="gloo")
    place = {"accelerator": "cpu", "devices": 1} if device is None else {"accelerator": "cuda", "devices": [0]}
    runner = trainer(strategy, num_nodes=2, callbacks=[watch], **place, **options)
    runner.fit(module, DataLoader(TensorDataset(drawn), batch_size=4))
    return [each.detach().cpu().numpy() for each in module.parameters()], watch.batches, strategy


def each_rank_a_node(rank):
    os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test"}


def leave():
    dist.all_reduce(torch.zeros(1))  # the store is that of rank 0
    dist.destroy_process_group()


def _masked_by_itself(rank, on_device):
    each_rank_a_node(rank)
    compression = SparseMask(ModulePruning(), then=Cast("bf16"))
    options = {"changes_at": 2 if rank == 0 else None}  # the other one is given it with the buffers
    if not on_device:
        weights, batches, strategy = fit(rank, Net(masked=True), compression, device=None, **options)
        return weights, [], strategy.dense_steps
    with mock_cuda() as device:
        weights, batches, strategy = fit(rank, Net(masked=True), compression, device=device, **options)
        leave()
        return weights, batches, strategy.dense_steps


def test_changed_masks_are_found_on_the_device_and_heard_of_at_the_meeting():
    here, there = (launch(_masked_by_itself, on_device, world_size=2) for on_device in (False, True))
    for (weights, _, dense_steps), (same, batches, dense_there) in zip(here, there, strict=True):
        assert all((one == other).all() for one, other in zip(weights, same, strict=True))
        assert dense_there == dense_steps == 1
        quiet = batches[-2:]
        assert [sum(waits.values()) for waits in quiet] == [1, 1]
        assert all(set(waits) == {MEETING} for waits in quiet)


def _scaled(rank):
    each_rank_a_node(rank)
    with mock_cuda() as device:
        _, batches, strategy = fit(rank, Net(spoilt=3), PowerSGD(1), device=device, precision="16-mixed")
        leave()
        residuals = strategy._sync.codec.state_dict()["residuals"].values()
        finite = all(bool(row.isfinite().all()) for row in residuals)
        return batches, strategy._steps.loss_scale(), finite


def test_a_loss_scale_is_read_at_the_meeting_and_by_itself_only_where_a_step_was_skipped():
    for batches, scale, finite in launch(_scaled, world_size=2):
        assert scale == 2.0**15, "one step has been skipped"
        assert finite
        waits = [sum(each.values()) for each in batches]
        assert waits[1:3] + waits[4:] == [1] * 4
        assert waits[3] == 2


def _summed_by_hand(rank):
    each_rank_a_node(rank)
    with mock_cuda() as device:
        _, batches, _ = fit(rank, Net(manual=True), Int8(), device=device)
        leave()
        return [sum(each.values()) for each in batches]


def test_a_second_backward_before_a_step_looks_once_for_what_was_cleared():
    for waits in launch(_summed_by_hand, world_size=2):
        assert waits[1:] == [2, 1, 2, 1, 2]  # the first one with what begins the fit
