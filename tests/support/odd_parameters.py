"""Modules whose parameters are odd: no entries, one entry, no dimension, complex, views of each other, and so on."""

import torch
from torch import Tensor, nn

FEATURES = 5


class OddParameters(nn.Module):
    """One of each kind; all that are trained take part in the output, but for the one that is unused."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(FEATURES, 6, dtype=dtype))
        self.transposed = nn.Parameter(self.weight.detach().t())  # the same memory, under another shape
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
        self.one = nn.Parameter(torch.randn(1, dtype=dtype))
        self.scalar = nn.Parameter(torch.randn((), dtype=dtype))
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.complex_valued = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.column_major = nn.Parameter(torch.randn(4, 6, dtype=dtype).t())
        self.with_gaps = nn.Parameter(torch.randn(6, 8, dtype=dtype)[:, ::2])
        storage = torch.randn(9, dtype=dtype)
        self.head = nn.Parameter(storage[:6])
        self.tail = nn.Parameter(storage[3:])  # overlaps with the head
        self.tied = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.tied_too = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.tied_too.weight = self.tied.weight
        self.unused = nn.Parameter(torch.randn(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.expanded = nn.Parameter(torch.randn(1, dtype=dtype).expand(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight + x @ self.transposed.t()
        hidden = self.tied(hidden.tanh()) + self.tied_too(hidden) * self.scalar
        hidden = hidden * self.wide.to(x.dtype) + (hidden * self.complex_valued).real
        hidden = hidden + (self.column_major.sum(1) + self.with_gaps.sum(1) + self.expanded + self.empty.sum())
        return (hidden * (self.head + self.tail)).mean(1, keepdim=True) * self.one


def entries(module: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, copied, in their shapes."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
