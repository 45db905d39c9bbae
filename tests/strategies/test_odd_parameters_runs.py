"""One table of odd parameters through every compression: as plain DDP where a method is exact, and a resume."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_comm import Cast, CompressedDDPStrategy, Int8, MaskFunction, PowerSGD, SparseMask, Ternary, TopK

STEPS = 6


class Odd(LightningModule):
    """Parameters with no entries, one, no dimension, of several types, in odd memory, tied, unused and frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(6, 8)
        self.nothing = nn.Linear(0, 8)
        self.alone = nn.Parameter(torch.empty(0, dtype=torch.float16))  # in a bucket of its own
        self.one = nn.Parameter(torch.tensor([0.9]))
        self.scalar = nn.Parameter(torch.tensor(1.1))
        self.wide = nn.Parameter(0.3 * torch.randn(8, 16, dtype=torch.float64))
        self.wave = nn.Parameter(0.1 * torch.randn(8, 5, dtype=torch.cfloat))
        self.turned = nn.Parameter((0.3 * torch.randn(12, 8)).t())
        self.conv = nn.Conv2d(1, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.tied = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.out = nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        # one sample a rank, so that gradients of matrices have a rank of at most 4
        x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1000 * self.global_rank + self.global_step))
        hidden = torch.tanh(self.lift(x) + self.nothing(x[:, :0])) * self.one * self.scalar
        hidden = (hidden.double() @ self.wide).float()
        hidden = hidden[:, :8] + hidden[:, 8:]
        hidden = hidden + torch.fft.irfft(torch.fft.rfft(hidden) * self.wave.sum(0), n=8)
        hidden = self.frozen(self.twin(self.tied(hidden).tanh())).tanh()
        hidden = self.conv((hidden @ self.turned).view(1, 1, 3, 4)).mean(1).view(1, 12)
        return nn.functional.mse_loss(self.out(hidden), x[:, :1]) + self.alone.sum().float()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def half(module):
    """Masks for a matrix of each kind that can have one."""
    drawn = torch.Generator().manual_seed(7)
    names = ("lift.weight", "wide", "turned", "conv.weight", "tied.weight")
    parameters = dict(module.named_parameters())
    return {name: torch.rand(parameters[name].shape, generator=drawn) < 0.5 for name in names}


class ByHand(Callback):
    """Masks weights and averaged gradients under plain DDP."""

    def on_train_start(self, runner, module):
        self.masks = half(module)
        for name, parameter in module.named_parameters():
            if name in self.masks:
                parameter.data.masked_fill_(~self.masks[name], 0)

    def on_before_optimizer_step(self, runner, module, optimizer):
        for name, parameter in module.named_parameters():
            if name in self.masks:
                parameter.grad.masked_fill_(~self.masks[name], 0)


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == STEPS // 2:
            runner.save_checkpoint(self.path)


MASK = SparseMask(MaskFunction(half))
# how far from plain DDP, or from plain DDP masked by hand, weights may end; they move by up to 0.2
METHODS = {
    "bf16": (Cast("bf16"), 0.01),
    "fp16": (Cast("fp16"), 0.001),
    "int8": (Int8(), 0.01),
    "powersgd": (PowerSGD(4), 1e-5),
    "topk": (TopK(0.2), 0.3),
    "topk of all": (TopK(1.0), 1e-6),
    "ternary": (Ternary(), 0.3),
    "sparse_mask": (MASK, 0.0),
    "sparse_mask, most kept": (SparseMask(MaskFunction(half), dense_above=0.0), 0.0),
    "mask, bf16, most kept": (SparseMask(MaskFunction(half), then="bf16", dense_above=0.0), 0.01),
    "mask, int8": (SparseMask(MaskFunction(half), then=Int8()), 0.01),
    "mask, topk of all": (SparseMask(MaskFunction(half), then=TopK(1.0)), 1e-6),
    "mask, ternary": (SparseMask(MaskFunction(half), then=Ternary()), 0.3),
}


def _flat(module):
    rows = [torch.view_as_real(each) if each.is_complex() else each for each in module.parameters()]
    return torch.cat([row.detach().double().reshape(-1) for row in rows]).numpy()


def _fit(strategy, callbacks=(), ckpt_path=None):
    model = Odd()
    trainer(strategy, 2, callbacks=list(callbacks)).fit(model, DataLoader(list(range(STEPS))), ckpt_path=ckpt_path)
    return _flat(model)


def _all(rank, folder, names):
    answers = {"": _fit(DDPStrategy(find_unused_parameters=True))}
    answers["masked"] = _fit(DDPStrategy(find_unused_parameters=True), [ByHand()])
    for number, name in enumerate(names):
        made = [
            CompressedDDPStrategy(
                METHODS[name][0], timeout=timedelta(seconds=40), find_unused_parameters=True, bucket_cap_mb=0.001
            )
            for _ in range(2)
        ]
        path = f"{folder}/{number}.ckpt"
        answers[name] = _fit(made[0], [Save(path)]), _fit(made[1], ckpt_path=path)
    return answers


# whose parts others have too, as does a mask with `Int8` in `test_odd_modules`
ALSO = {"fp16", "topk", "sparse_mask, most kept", "mask, int8", "mask, topk of all", "mask, ternary"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in METHODS if name not in ALSO], id="chosen"),
        pytest.param(list(METHODS), id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_every_compression_trains_odd_parameters_as_plain_ddp_does_as_far_as_it_is_exact_and_resumes(tmp_path, names):
    one, other = launch(_all, str(tmp_path), names, world_size=2, timeout_s=180)
    assert abs(one[""] - one["masked"]).max() > 0.1
    assert {type(METHODS[name][0]) for name in names} == {type(each) for each, _ in METHODS.values()}
    for name in names:
        compression, bound = METHODS[name]
        (whole, resumed), (there, _) = one[name], other[name]
        assert (whole == there).all(), f"{name}: ranks differ"
        assert (whole == resumed).all(), f"{name}: the resumed run differs"
        reference = one["masked" if isinstance(compression, SparseMask) else ""]
        assert abs(whole - reference).max() <= bound, name


def _one_step(rank):
    """The complex parameter after one step under plain DDP, and under methods that would send little of it."""
    waves = []
    for compression in (None, Cast("bf16"), Int8(), PowerSGD(1), TopK(0.05), Ternary()):
        own = {"find_unused_parameters": True, "timeout": timedelta(seconds=40)}
        strategy = DDPStrategy(**own) if compression is None else CompressedDDPStrategy(compression, **own)
        model = Odd()
        start = model.wave.detach().clone()
        trainer(strategy, 2, max_steps=1).fit(model, DataLoader(list(range(STEPS))))
        waves.append(torch.view_as_real(model.wave.detach() - start).numpy())
    return waves


def test_complex_gradients_are_averaged_in_full_and_exactly():
    for plain, *others in launch(_one_step, world_size=2):
        assert abs(plain).max() > 0.001
        for got in others:
            assert (got == plain).all()
