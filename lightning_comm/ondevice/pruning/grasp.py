"""Pruning by gradient flow (GraSP)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_comm.core.arguments import is_number, is_whole
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
from lightning_comm.ondevice.pruning.scores import choose
from lightning_comm.ondevice.pruning.second_derivatives import derivatives, kernels_with_second_derivatives
from lightning_comm.ondevice.random_state import random_state, seed_torch, set_random_state

_SCOPES = ("global", "layer")
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class GraSPPruning(Pruning):
    r"""Prune the weights whose removal reduces the gradient flow least (GraSP), the criterion reported for PacTrain.

    With the gradient :math:`g` of the loss on a sample of the training data and its Hessian :math:`H`, those weights
    :math:`\theta_i` are kept whose :math:`\theta_i (H g)_i` is largest: without them :math:`g^\top g` would fall most.

    Args:
        sparsity: The share that is pruned of all weights that may be pruned: at least 0 and below 1.
        samples: The number of samples of the training data; the same ones at each pruning.
        temperature: The divisor of outputs before the default loss; a high one keeps the scores of a confident network
            from vanishing.
        loss: Takes the model and a batch and returns a number: a function, or in YAML its import path; it must not
            communicate. ``None``: the cross entropy of ``module(inputs) / temperature`` for ``(inputs, targets)``.
        scope: ``"global"``: the lowest scores of all. ``"layer"``: the same share of each parameter.
        skip: As in :class:`MagnitudePruning`.

    Raises:
        ValueError: If an argument is out of range, if nothing is left to prune, if samples or loss cannot be used,
            or if an operation of the loss, which the message names, has no second derivative.

    Note:
        *Communication.* None; rank 0 computes the scores alone while the others wait for its masks.

        *Memory.* Two copies of the weights, and the graph of one batch for a second derivative.

        What is not pruned, what happens to the model meanwhile and where this differs from the authors' code:
        ``docs/techniques/sparse_mask.md``.

    Example:
        >>> GraSPPruning(sparsity=0.9, samples=512).temperature
        200.0

    References:
        C. Wang, G. Zhang, R. Grosse. `Picking Winning Tickets Before Training by Preserving Gradient Flow
        <https://arxiv.org/abs/2002.07376>`_. ICLR 2020.

    """

    sparsity: float = 0.8
    samples: int = 256
    temperature: float = 200.0
    loss: Loss | None = field(default=None, repr=False)  # its repr would be an address
    scope: Literal["global", "layer"] = "global"
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_sparsity("GraSPPruning", self.sparsity)
        if not is_whole(self.samples) or self.samples < 1:
            raise ValueError(
                f"GraSPPruning: `samples` counts samples of the training data, so it must be a whole number >= 1; got "
                f"{self.samples!r}."
            )
        if not is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"GraSPPruning: `temperature` divides the outputs, so it must be a number > 0; got "
                f"{self.temperature!r}. 1.0 leaves them as they are."
            )
        if self.loss is not None and not callable(self.loss):
            raise ValueError(
                f"GraSPPruning: `loss` must be a function of the model and a batch; got {self.loss!r}. Leave it out "
                "for the cross entropy of `module(inputs)`."
            )
        check_scope("GraSPPruning", self.scope, _SCOPES)
        object.__setattr__(self, "skip", checked_skip("GraSPPruning", self.skip))

    @override
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        weights = prunable(module, self.skip, "GraSPPruning", context)
        if context.samples is None:
            raise ValueError(
                "GraSPPruning: it needs samples of the training data, and there are none here. Let a Trainer's "
                "strategy ask for the masks, or use MagnitudePruning."
            )
        batches = list(context.samples(self.samples))
        with _left_as_it_was(module):
            scores = gradient_flow_scores(module, weights, batches, self._loss)
        return choose(scores, self.sparsity, self.scope, context, "GraSPPruning", weights)

    def _loss(self, module: nn.Module, batch: Any) -> Tensor:
        if self.loss is not None:
            value = self.loss(module, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(f"GraSPPruning: `loss` must return one number as a tensor; got {value!r}.")
            return value.reshape(())
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            length = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
            raise ValueError(
                "GraSPPruning: `loss` must be given, since the default one is for batches (inputs, targets); got "
                f"{type(batch).__name__}{length}. It takes the model and a batch and returns a number."
            )
        inputs, targets = batch
        return nn.functional.cross_entropy(_outputs(module, inputs) / self.temperature, targets)


def _outputs(module: nn.Module, inputs: Any) -> Tensor:
    name = type(module).__name__
    try:
        outputs = module(inputs)
    except NotImplementedError as error:
        raise ValueError(
            f"GraSPPruning: `loss` must be given, since the default one calls `module(inputs)`, and {name} cannot do "
            f"that: {str(error).rstrip('.')}. Give `GraSPPruning(loss=...)` a function that takes the model and a "
            "batch and returns a number, or the module a `forward`."
        ) from error
    if not isinstance(outputs, Tensor):
        raise ValueError(
            "GraSPPruning: `loss` must be given, since the default one takes the cross entropy of a tensor that "
            f"`module(inputs)` returns; got {type(outputs).__name__} from {name}. It takes the model and a batch and "
            "returns a number."
        )
    return outputs


def gradient_flow_scores(
    module: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[tuple[Any, int]], loss: Loss
) -> dict[str, Tensor]:
    """Return each weight times the entry of Hessian times gradient, of the mean loss over the samples.

    Args:
        module: The model.
        weights: The parameters by which the loss is differentiated.
        batches: Batches, each with its number of samples.
        loss: Returns the mean loss of a batch.

    """
    rows, total = list(weights.values()), sum(count for _, count in batches)
    gradient = [torch.zeros_like(row) for row in rows]
    for batch, count in batches:
        for sum_, part in zip(gradient, derivatives(loss(_seeded(module), batch), rows), strict=True):
            sum_.add_(part, alpha=count / total)
    products = [torch.zeros_like(row) for row in rows]
    for batch, count in batches:
        parts = derivatives(loss(_seeded(module), batch), rows, graph=True)
        flow = torch.stack([(part * fixed).sum() for part, fixed in zip(parts, gradient, strict=True)]).sum()
        if flow.requires_grad:  # not where the loss is linear in the weights
            for sum_, part in zip(products, derivatives(flow, rows), strict=True):
                sum_.add_(part, alpha=count / total)
    scores = {name: row.detach() * product for (name, row), product in zip(weights.items(), products, strict=True)}
    bad = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
    if bad:
        raise ValueError(
            f"GraSPPruning: scores must be finite, and those of {bad[0]!r} are not. Look at the loss of these samples, "
            "or use MagnitudePruning."
        )
    return scores


def _seeded(module: nn.Module) -> nn.Module:
    """Seed dropout, so that gradient and Hessian are those of the same function."""
    seed_torch(0)
    return module


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    state = random_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    asking = [each for each in module.modules() if isinstance(each, nn.SyncBatchNorm) and each.training]
    for each in asking:
        each.training = False
    try:
        with torch.enable_grad(), kernels_with_second_derivatives(module):
            yield
    finally:
        for each in asking:
            each.training = True
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        set_random_state(state)
