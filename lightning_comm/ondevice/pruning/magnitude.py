"""Pruning by magnitude."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from lightning_comm.ondevice.pruning.base import (
    NOW,
    Masks,
    Pruning,
    PruningContext,
    check_scope,
    check_sparsity,
    checked_skip,
    prunable,
)
from lightning_comm.ondevice.pruning.existing_masks import masks_in
from lightning_comm.ondevice.pruning.scores import SCOPES, choose


@dataclass(frozen=True)
class MagnitudePruning(Pruning):
    """Prune the weights with the smallest magnitudes.

    Args:
        sparsity: The share that is pruned of all weights that may be pruned: at least 0 and below 1.
        scope: ``"global"``: the smallest of all. ``"layer"``: the same share of each parameter. ``"erk"``: a share of
            each parameter that falls with its size (Erdős-Rényi kernels), so that small layers keep more.
        skip: Names of parameters that are never pruned; ``*`` stands for anything. Parameters with less than two
            dimensions (biases, norms) and embeddings never are.

    Raises:
        ValueError: If an argument is out of range, or if there is nothing left to prune.

    Note:
        *Communication.* None; the strategy broadcasts the masks.

        *Memory.* A copy of the weights that may be pruned while it chooses; a byte a weight for the masks.

        *Global scope.* Keeps at least one weight of each parameter, since a layer without weights has a constant
        output. A parameter that keeps no more than that, or hardly any, is named in a warning.

        *Not pruned*, and named in a warning, are parameters from which a weight is only computed (weight
        normalisation, spectral norm, any parametrization), that share memory with others, or whose entries are all
        equal: one that starts at zero, such as the second matrix of a LoRA adapter, has no magnitudes to choose by. At
        a later pruning of a :class:`PruningSchedule` it is judged like the others.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.1, -0.4, 0.3, -0.2]]))
        >>> MagnitudePruning(sparsity=0.5).masks(layer)["weight"].tolist()
        [[False, True, True, False]]

    """

    sparsity: float = 0.8
    scope: Literal["global", "layer", "erk"] = "global"
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_sparsity("MagnitudePruning", self.sparsity)
        check_scope("MagnitudePruning", self.scope, SCOPES)
        object.__setattr__(self, "skip", checked_skip("MagnitudePruning", self.skip))

    @override
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        weights = prunable(module, self.skip, "MagnitudePruning", context)
        magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
        for name, mask in masks_in(module)[0].items():  # entries that the model itself masks count as zero
            if name in magnitudes:
                magnitudes[name] = magnitudes[name].masked_fill(~mask, 0)
        return choose(magnitudes, self.sparsity, self.scope, context, "MagnitudePruning")
