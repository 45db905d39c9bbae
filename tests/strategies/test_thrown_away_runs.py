"""Error feedback loses nothing, whoever throws an averaged gradient away: moved and kept are what was due.

The loss is linear in the weights of two heads, so that gradients are known, and each step of SGD moves a head by its
averaged gradient: after a run, the weights and the mean of what the ranks have kept are the sum of what was due.
"""

from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from support.processes import launch
from support.training import Stop, loader, trainer
from torch import nn

from lightning_comm import CompressedDDPStrategy, Int8, MaskFunction, PowerSGD, SparseMask, TopK
from lightning_comm.lightning_internals import unused_by_all_ranks

SHAPE = (8, 6)
STEPS = 12
HEADS = ("a", "b")


def kept_entries(module):
    drawn = {name: torch.rand(SHAPE, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(HEADS)}
    return {name: each < 0.6 for name, each in drawn.items()}


MASKED = SparseMask(MaskFunction(kept_entries), then=TopK(0.2))


def gradient(rank, step, head):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 * rank + 10 * step + HEADS.index(head)))


class Heads(LightningModule):
    """Two heads; `due` is the sum of the gradients of this rank that were meant to be applied."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.automatic_optimization = mode not in ("manual", "two backwards", "cleared")
        for head in HEADS:
            self.register_parameter(head, nn.Parameter(torch.zeros(SHAPE)))
        self.due = {head: torch.zeros(SHAPE) for head in HEADS}

    def loss(self, step, heads, *, counts=None):
        for head in heads if counts is None else counts:
            self.due[head] += gradient(self.global_rank, step, head)
        return sum((getattr(self, head) * gradient(self.global_rank, step, head)).sum() for head in heads)

    def used(self, step):
        if self.mode == "one rank":
            return HEADS if step % 3 == 0 or (step % 3 == 1 and self.global_rank == 0) else "a"
        if self.mode == "static":
            return "a"
        if self.mode in ("scaler", "skipped"):
            return HEADS
        return HEADS[step // 2 % 2] if self.mode == "accumulated" else HEADS[step % 2]

    def training_step(self, batch, step):
        if not self.automatic_optimization:
            return self.by_hand(step)
        lost = (self.mode == "scaler" and step % 4 == 2) or (self.mode == "skipped" and step % 3 == 1)
        loss = self.loss(step, self.used(step), counts=() if lost else None)
        if self.mode == "scaler" and step % 4 == 2 and self.global_rank == 1:
            loss = loss + (self.a[0, 0] * torch.inf)  # the other head's gradient is finite
        return loss * (2 if self.mode == "accumulated" else 1)  # Lightning takes the mean over the window

    def by_hand(self, step):
        optimizers = dict(zip(HEADS, self.optimizers(), strict=True))
        if self.mode == "manual":  # the other head's gradient stays, and DDP copies it into its bucket
            head = HEADS[step % 2]
            optimizers[head].zero_grad()
            self.manual_backward(self.loss(step, head))
            optimizers[head].step()
        elif self.mode == "two backwards":
            self.manual_backward(self.loss(step, "a"))
            self.manual_backward(self.loss(step + STEPS, HEADS if step % 2 else "b"))
            for each in optimizers.values():
                each.step()
                each.zero_grad()
        else:  # as a generator's loss reaches into the discriminator, whose gradient is then cleared
            head = HEADS[step % 2]
            self.manual_backward(self.loss(step, HEADS, counts=head))
            optimizers[head].step()
            for each in optimizers.values():
                each.zero_grad(set_to_none=step % 4 < 2)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if self.mode == "skipped" and batch_idx % 3 == 1:
            closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD([getattr(self, head)], 1.0) for head in HEADS]
        return torch.optim.SGD(self.parameters(), 1.0) if self.automatic_optimization else optimizers


def _fit(rank, compression, mode):
    flags = {
        "static": {"static_graph": True},
        "views": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        "scaler": {},
        "skipped": {},
        "cleared": {},
    }.get(mode, {"find_unused_parameters": True})
    options = {"accumulate_grad_batches": 2} if mode == "accumulated" else {}
    if mode == "scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=5)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    strategy = CompressedDDPStrategy(compression, timeout=timedelta(seconds=40), **flags)
    model = Heads(mode)
    runner = trainer(strategy, 2, **options)
    runner.fit(model, loader(STEPS, rank, dtype=torch.float32))
    state = strategy._sync.state_dict()
    scale = state["loss_scale"]
    masks = kept_entries(model) if compression == MASKED else {head: torch.ones(SHAPE).bool() for head in HEADS}
    residuals = (state["codec"]["inner"] if compression == MASKED else state["codec"])["residuals"]
    answer = {}
    for head in HEADS:
        kept = torch.zeros(SHAPE)
        if head in residuals:
            kept.masked_scatter_(masks[head], residuals[head] / scale)
        moved = -getattr(model, head).detach()
        answer[head] = [each.numpy() for each in (moved, kept, model.due[head] * masks[head])]
    return answer


MODES = [
    "in turn",
    "views",
    "one rank",
    "accumulated",
    "static",
    "manual",
    "two backwards",
    "cleared",
    "scaler",
    "skipped",
]


CASES = [
    *((TopK(0.1), mode) for mode in MODES),
    *((compression, mode) for compression in (PowerSGD(1), Int8(), MASKED) for mode in ("in turn", "scaler")),
]


def _all(rank):
    return [_fit(rank, compression, mode) for compression, mode in CASES]


def test_what_was_moved_and_what_is_kept_is_what_was_due():
    one, other = launch(_all, world_size=2)
    for number, (compression, mode) in enumerate(CASES):
        _check(compression, mode, one[number], other[number])


def _check(compression, mode, one, other):
    # the second rounding of Int8 is not kept: half a step of at most 4 / 127 for each of its messages
    bound = 0.4 if compression == Int8() else 1e-4
    for head in HEADS:
        (moved, kept, due), (moved_there, kept_there, due_there) = one[head], other[head]
        assert (moved == moved_there).all(), (compression, mode, head)
        missing = moved + (kept + kept_there) / 2 - (due + due_there) / 2
        assert abs(missing).max() < bound, (compression, mode, head)
        if mode == "static" and head == "b":
            assert not abs(moved).any()
            assert not abs(kept).any()
        else:
            assert abs(kept).max() > 0.001, (compression, mode, head)
            assert abs(due).max() > 1, (compression, mode, head)


def _resumed(rank, mode, path):
    flags = {"find_unused_parameters": mode == "in turn"}
    weights = []
    for callbacks, ckpt_path in (([], None), ([Stop(5, path)], None), ([], path)):
        model = Heads(mode)
        strategy = CompressedDDPStrategy(TopK(0.1), timeout=timedelta(seconds=40), **flags)
        runner = trainer(strategy, 2, callbacks=callbacks)
        runner.fit(model, loader(STEPS, rank, dtype=torch.float32), ckpt_path=ckpt_path)
        assert runner.global_step == (5 if callbacks else STEPS)
        weights.append([getattr(model, head).detach().numpy() for head in HEADS])
    return weights[0], weights[2]


@pytest.mark.parametrize("mode", ["in turn", "cleared"])
def test_a_run_resumed_after_a_mean_was_thrown_away_is_the_one_that_was_never_stopped(tmp_path, mode):
    for whole, resumed in launch(_resumed, mode, str(tmp_path / "a.ckpt"), world_size=2):
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))


def _unused(rank):
    """What DDP says that no rank has used, after each backward of three ranks; the second one is not synchronised."""
    torch.manual_seed(0)
    names = ("all", "frozen", "one", "quiet", "none")
    layers = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in names})
    layers["frozen"].requires_grad_(False)
    layers.forward = lambda x, used: sum(layers[name](x).sum() for name in used)
    ddp = nn.parallel.DistributedDataParallel(layers, find_unused_parameters=True)
    unused = unused_by_all_ranks(ddp)
    found = []
    for step in range(4):
        used = ["all", "frozen", *(["quiet"] if step == 1 else []), *(["one"] if step == 3 and rank == 1 else [])]
        with ddp.no_sync() if step == 1 else nullcontext():
            ddp(torch.ones(2, 3), used).backward()
        if step != 1:
            ids = {id(each) for each in unused()}
            found.append([name for name in names if id(layers[name].weight) in ids])
    return found


def test_a_parameter_is_unused_only_if_no_rank_has_used_it_since_the_last_message(run_ranks):
    assert run_ranks(_unused, world_size=3) == [[["one", "quiet", "none"], ["one", "none"], ["quiet", "none"]]] * 3
