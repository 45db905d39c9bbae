"""A module with all that is unusual about modules and parameters, and what training it should give, by hand."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

FEATURES, BATCH = 5, 4


class OddNetwork(nn.Module):
    """Parameters of all kinds, each with a part in the output.

    Args:
        view: Whether there is a parameter that is another one, transposed, in the same memory.
        unused: Whether there is a layer that is never called.

    """

    def __init__(self, view: bool = True, unused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 8)
        self.empty = nn.Linear(0, 8)  # a weight without entries
        self.one = nn.Parameter(torch.tensor([0.5]))
        self.scale = nn.Parameter(torch.tensor(1.5))  # no dimension
        self.turned = nn.Parameter(torch.randn(8, 6).mul_(0.3).t())  # column after column in memory
        self.conv = nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.wave = nn.Parameter(0.3 * torch.randn(3, 3, dtype=torch.complex64))
        self.wide = nn.Linear(8, 4).double()
        self.tied = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.tied[1].weight = self.tied[0].weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.pruned_away = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.pruned_away.weight)  # as adapters begin
        self.norm = nn.BatchNorm1d(8)
        if view:
            self.back = nn.Parameter(self.first.weight.detach().t())  # (5, 8), the memory of `first.weight`
        if unused:
            self.nobody = nn.Linear(3, 3)
        mask = torch.zeros(8, 8)
        mask[torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)] = torch.finfo(torch.float32).min
        self.register_buffer("mask", mask)
        self.register_buffer("never", torch.full((2,), -torch.inf))
        self.register_buffer("order", torch.arange(8).flip(0))
        self.register_buffer("switch", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) + self.empty(x[:, :0])) * self.one
        if hasattr(self, "back"):
            h = h + 0.1 * torch.tanh(x) @ self.back
        h = self.tied[1](torch.tanh(self.tied[0](h)))[:, self.order]
        attention = (h.unsqueeze(2) * h.unsqueeze(1) + self.mask).softmax(-1)
        h = self.norm(h + (attention @ h.unsqueeze(-1)).squeeze(-1)) + self.frozen(h) + self.pruned_away(h)
        h = h + self.conv(h.view(-1, 2, 2, 2)).reshape(-1, 8)
        waves = torch.fft.irfft(torch.fft.rfft(h @ self.turned.t()[:, :4], n=4) @ self.wave, n=4)
        return (self.scale * (self.wide(h.double()).float() + waves)).sum(1, keepdim=True) / 8


class Odd(LightningModule):
    """Trains the network, keeps a teacher by hand, and saves itself under names of its own."""

    def __init__(self, view: bool = True, unused: bool = True) -> None:
        super().__init__()
        self.net = OddNetwork(view, unused)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.teacher.eval()

    def loss(self, rank: int, step: int) -> Tensor:
        x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(1000 * rank + step))
        y = self.net(x)
        with torch.no_grad():
            target = self.teacher(x)
        return (y - x[:, :1] + x[:, 1:2] * x[:, 2:3]).square().mean() + 0.1 * (y - target).square().mean()

    def follow(self) -> None:
        """Let the teacher take a step to where the network is."""
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.copy_(torch.lerp(slow, fast, 0.2))  # not in place, since two may share their memory

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.global_rank, self.global_step)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.follow()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, 0.02, momentum=0.9)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {f"model/{name}": value for name, value in state.items()} | {"version": torch.tensor(3)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        named = {name.removeprefix("model/"): value for name, value in state_dict.items() if name != "version"}
        return super().load_state_dict(named, strict=strict, assign=assign)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def mean(parts: list[Tensor]) -> Tensor:
    """The mean, where equal numbers are themselves; of whole numbers the first."""
    equal = torch.stack([part == parts[0] for part in parts]).all(0)
    if not (parts[0].is_floating_point() or parts[0].is_complex()):
        return parts[0]
    return torch.where(equal, parts[0], sum(part / len(parts) for part in parts))


def by_hand(make: Any, ranks: int, steps: int, period: int | None) -> dict[str, Tensor]:
    """Train copies one after the other: gradients averaged in each step, or all else at the end of each round."""
    models = [make() for _ in range(ranks)]
    optimizers = [model.configure_optimizers() for model in models]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            _backward(model, optimizer, rank, step)
        if period is None:
            _average_gradients(models)
        for optimizer in optimizers:
            optimizer.step()
        if period is not None and ((step + 1) % period == 0 or step + 1 == steps):
            _average_tensors(models)
    return tensors(models[0])


def _backward(model: Odd, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    model.train()
    model.teacher.eval()
    loss = model.loss(rank, step)
    model.follow()
    optimizer.zero_grad()
    loss.backward()


def _average_gradients(models: list[Odd]) -> None:
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        if parameters[0].grad is not None:
            total = mean([parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = total.clone()


@torch.no_grad()
def _average_tensors(models: list[Odd]) -> None:
    before = [tensors(model) for model in models]
    for model in models:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(mean([each[name] for each in before]))
