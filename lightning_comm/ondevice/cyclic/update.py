"""Stages of names and the update of one stage, which all forms of Cyclic Data Parallelism share."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.optimizer.state import has_modes
from lightning_comm.ondevice.optimizer.trial import why_not_by_parameter

ClipBy = Literal["stage", "previous_norm"]

Number = float | Tensor
"""A number; on a CUDA device a tensor without dimensions, so that the host need not wait for it."""


class Clipping(NamedTuple):
    """How gradients are bounded.

    Args:
        norm: The largest norm; ``None`` does not bound it.
        by: Whose norm: ``"stage"``, or that of the whole gradient one step before, ``"previous_norm"``.
        value: The largest absolute value of an entry; ``None`` does not bound it.

    """

    norm: float | None = None
    by: ClipBy = "stage"
    value: float | None = None


def equal_stages(network: nn.Module, count: int) -> list[list[str]]:
    """Cut the parameters' names, in their order, into so many groups of about as many entries each.

    Args:
        network: Whose parameters.
        count: How many groups; at most one for each parameter.

    Example:
        >>> equal_stages(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2)
        [['0.weight', '0.bias'], ['1.weight', '1.bias']]

    """
    sizes = [(name, parameter.numel()) for name, parameter in network.named_parameters()]
    if not 1 <= count <= len(sizes):
        raise ValueError(
            f"simulate_delay: `stages`={count!r} must be from 1 to the number of parameter tensors, {len(sizes)}, "
            "since each stage has one at least. Give fewer stages."
        )
    total = sum(size for _, size in sizes)
    groups: list[list[str]] = [[] for _ in range(count)]
    before, last = 0, 0
    for index, (name, size) in enumerate(sizes):
        wanted = int((before + size / 2) * count / total)
        # no stage may stay empty: neither one before this parameter's, nor one behind the last parameter's
        last = max(min(wanted, last + bool(groups[last]), count - 1), last, count - len(sizes) + index)
        groups[last].append(name)
        before += size
    return groups


def parameters_by_stage(network: nn.Module, stages: int | Sequence[Sequence[str]]) -> list[list[nn.Parameter]]:
    """Return the trained parameters of each stage.

    Raises:
        ValueError: If names are unknown, missing, or in two stages.

    """
    lists = isinstance(stages, Sequence) and not any(isinstance(each, str) for each in stages)
    if not isinstance(stages, int) and not lists:
        raise ValueError(
            f"simulate_delay: `stages` must be a number, or for each stage a list of parameters' names; got {stages!r}."
        )
    names = equal_stages(network, stages) if isinstance(stages, int) else [list(each) for each in stages]
    known = dict(network.named_parameters())
    given = [name for stage in names for name in stage]
    unknown = sorted(set(given) - set(known))
    twice = sorted({name for name in given if given.count(name) > 1})
    missing = [name for name, parameter in known.items() if parameter.requires_grad and name not in set(given)]
    if unknown or twice or missing:
        raise ValueError(
            f"simulate_delay: `stages` must name each trained parameter of the network once; unknown: {unknown}, in "
            f"two places: {twice}, missing: {missing}. A whole number cuts the parameters by itself."
        )
    return [[known[name] for name in stage if known[name].requires_grad] for stage in names]


def why_not_by_stage(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why an optimizer cannot update stages one by one, and what to do; ``None`` if it can."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    if has_modes(optimizer):
        return (
            f"{names[0]} has modes (`train` and `eval`), in which it exchanges the weights for others that it keeps; "
            "here they are kept with the stages, on other ranks. Use one without, such as AdamW with a schedule, or "
            "DDPStrategy."
        )
    if isinstance(optimizer, torch.optim.LBFGS) or any(name.upper().endswith("SAM") for name in names):
        return (
            f"{names[0]} needs the whole gradient more than once in a step, so it cannot update stages one by one. Use "
            "one that treats each parameter by itself, such as SGD or AdamW."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return (
            f"{names[0]} cannot take a step without a closure, and a stage is updated when its gradient is there. Use "
            "one that needs no closure, such as SGD or AdamW."
        )
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return (
            f"{names[0]} is wrapped around another optimizer, whose parameters would be left as they are. Use the "
            "optimizer inside it by itself."
        )
    return None


def clips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer bounds the norm of all gradients that it is given (timm's Lamb and others)."""
    return any(group.get("max_grad_norm") is not None for group in optimizer.param_groups)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the learning rates and other settings of each group, as they are now."""
    return [
        {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]


def check_optimizer(where: str, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers that cannot be stepped stage by stage, or that train something else."""
    if (problem := why_not_by_stage(optimizer)) is not None:
        raise ValueError(f"{where}: `optimizer` is stepped a stage at a time, and {problem}")
    coupling = not clips_by_itself(optimizer)
    if (problem := why_not_by_parameter(where, optimizer, coupling=coupling)) is not None:
        raise ValueError(f"{where}: `optimizer` is stepped a stage at a time, and {problem}")
    ours = {id(parameter) for parameter in parameters}
    foreign = sum(id(each) not in ours for group in optimizer.param_groups for each in group["params"])
    if foreign:
        raise ValueError(
            f"{where}: `optimizer` must hold parameters of the model, and no others; {foreign} of its tensors "
            "are not. Build it over the parameters of this model."
        )


def mean_gradients(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Return the mean of the workers' gradients of a stage: each divided by their number, then added in this order.

    Args:
        parts: For each worker, the gradient of each parameter. ``None`` is 0, and the mean of ``None`` alone is
            ``None``, so that the optimizer leaves that parameter out.

    """
    means: list[Tensor | None] = []
    for column in zip(*parts, strict=True):
        some = next((gradient for gradient in column if gradient is not None), None)
        if some is None:
            means.append(None)
            continue
        mean: Tensor | None = None
        for gradient in column:
            share = torch.zeros_like(some) if gradient is None else gradient / len(parts)
            mean = share if mean is None else mean.add_(share)
        means.append(mean)
    return means


class StageClip:
    """Clips the mean gradient of a stage, and keeps the norm of the whole gradient for the next step.

    Args:
        clipping: How. By ``"previous_norm"`` the norm is the one before clipping, and in the first step each stage's
            own.
        stages: How many there are.

    """

    def __init__(self, clipping: Clipping, stages: int) -> None:
        for name, what, limit in (("clip_norm", "norm", clipping.norm), ("clip_value", "entry", clipping.value)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise ValueError(
                    f"simulate_delay: `{name}` is the largest {what} of a gradient, so it must be finite and > 0; got "
                    f"{limit!r}. None does not clip."
                )
        if clipping.by not in ("stage", "previous_norm"):
            raise ValueError(f"simulate_delay: `clip_by` must be 'stage' or 'previous_norm'; got {clipping.by!r}.")
        if clipping.norm is not None and clipping.value is not None:
            raise ValueError(
                f"simulate_delay: `clip_norm`={clipping.norm!r} and `clip_value`={clipping.value!r} are two ways to "
                "clip. Give one of them."
            )
        self._clipping = clipping
        self._squares: list[Number] = [0.0] * stages
        self._previous: Number | None = None

    def clip_(self, stage: int, gradients: Sequence[Tensor | None]) -> None:
        """Clip one stage's mean gradient, in place."""
        if self._clipping.norm is not None:
            self._squares[stage] = squared_norm(gradients)
        clip_(self._clipping, self._squares[stage], self._previous, gradients)

    def end_step(self) -> None:
        """Say that every stage has had its turn."""
        self._previous = whole_norm(self._squares)


def clip_(clipping: Clipping, square: Number, previous_norm: Number | None, gradients: Sequence[Tensor | None]) -> None:
    """Clip the mean gradient of a stage, in place. On a CUDA device the host does not wait.

    Args:
        clipping: How.
        square: The square of its norm.
        previous_norm: Of the whole gradient one step before; ``None`` where it is not known.
        gradients: Of each parameter.

    """
    there = [gradient for gradient in gradients if gradient is not None]
    if clipping.value is not None:
        for gradient in there:
            gradient.clamp_(-clipping.value, clipping.value)
    if clipping.norm is not None:
        norm = whole_norm([square]) if clipping.by == "stage" or previous_norm is None else previous_norm
        factor = _factor(clipping.norm, norm)
        if isinstance(factor, Tensor) or factor != 1.0:  # on a device multiplying by one costs less than to look
            for gradient in there:
                _multiply(gradient, factor)


def _multiply(gradient: Tensor, factor: Number) -> None:
    if isinstance(factor, Tensor) and gradient.dtype in (torch.float16, torch.bfloat16):
        # CUDA rounds a factor that is a tensor to the gradient's type, where a small one may become 0
        gradient.copy_(gradient.float().mul_(factor))
    else:
        gradient.mul_(factor)


def _factor(limit: float, norm: Number) -> Number:
    """Return by what to multiply a gradient of this norm, so that the norm is at most the limit; 1 if it is NaN."""
    if isinstance(norm, Tensor):
        return torch.where(norm > limit, torch.full_like(norm, limit) / norm, 1.0)
    return limit / norm if norm > limit else 1.0


def squared_norm(gradients: Sequence[Tensor | None]) -> Number:
    """Return the squared norm of gradients, added in float64 in their order. On a CUDA device the host does not wait.

    Example:
        >>> squared_norm([torch.tensor([3.0, 4.0]), None, torch.tensor(1.0)])
        26.0

    """
    there = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    norms = _norms(there)
    if any(gradient.is_cuda for gradient in there):
        return torch.stack(norms).square().cumsum(0)[-1]
    total = 0.0
    for norm in norms:
        total += float(norm) ** 2
    return total


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """Return the norm of each gradient in float64, in one launch where they are of one type."""
    if any(gradient.is_complex() for gradient in gradients):
        widest = [torch.complex128 if gradient.is_complex() else torch.float64 for gradient in gradients]
        return [torch.linalg.vector_norm(each, dtype=kind) for each, kind in zip(gradients, widest, strict=True)]
    return list(torch._foreach_norm(gradients, 2, dtype=torch.float64)) if gradients else []


def whole_norm(squares: Sequence[Number]) -> Number:
    """Return the norm of a gradient from the squared norms of its parts."""
    device = next((each.device for each in squares if isinstance(each, Tensor)), None)
    if device is None:
        total = 0.0
        for square in squares:  # not `sum`, which adds more exactly from Python 3.12 on, and others than a device
            total += float(square)
        return math.sqrt(total)
    row = [
        each if isinstance(each, Tensor) else torch.full((), each, dtype=torch.float64, device=device)
        for each in squares
    ]
    return torch.stack(row).cumsum(0)[-1].sqrt()


def step_stage(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    settings: Sequence[dict[str, Any]],
) -> None:
    """Let the optimizer update these parameters and leave all others as they are; no other may have a gradient.

    Args:
        optimizer: Over these parameters and others.
        parameters: Those of a stage.
        gradients: Theirs.
        settings: Of the groups at the start of the step (:func:`settings_of`): some optimizers count steps in them.

    """
    for group, noted in zip(optimizer.param_groups, settings, strict=True):
        for key, value in noted.items():
            if isinstance(value, Tensor):
                group[key].copy_(value)  # schedulers keep the tensor
            else:
                group[key] = value
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
