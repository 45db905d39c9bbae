"""The interface of a source of masks, and checks of masks and arguments."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.pruning.unprunable import broken_weight, unprunable

#: Masks by parameter name: tensors of ``bool``, True where a weight is kept.
Masks = dict[str, Tensor]


def warn_of(names: Sequence[str], message: str) -> None:
    """Warn of parameters; ``message`` has a placeholder for their ``{names}``."""
    if names:
        listed = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(message.format(names=listed), stacklevel=3)


@dataclass(frozen=True)
class PruningContext:
    """The state of a run at the moment at which masks are chosen.

    Args:
        kept: The present masks; empty before the first pruning. Weights that they prune must stay pruned.
        samples: Returns a given number of samples of the training data, as pairs of a batch on the model's device and
            the number of samples in it: the same ones each time. ``None`` where there is no run.
        warn: Takes names of parameters, and a warning about them with a placeholder for ``{names}``.

    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Callable[[int], Iterable[tuple[Any, int]]] | None = None
    warn: Callable[[Sequence[str], str], None] = field(default=warn_of)


NOW = PruningContext()


class Pruning(ABC):
    """A source of masks; a frozen value.

    Attributes:
        is_watched: Whether the model applies its masks itself in its forward, so that they may change in training, and
            gradients outside them are zero. Each rank then reads its own masks. With other sources the strategy sets
            gradients of pruned weights to zero and nothing else changes masks, so no step is checked.

    """

    is_watched: ClassVar[bool] = False

    @abstractmethod
    def masks(self, module: nn.Module, context: PruningContext = NOW) -> Masks:
        """Return a mask for each parameter that is pruned, by name. Called on rank 0 alone, so it must not communicate.

        Args:
            module: The model.
            context: The present masks, and access to samples of the training data.

        """

    def present(self, module: nn.Module) -> Masks:
        """Return the present masks of a model that applies masks itself, unchecked; compared after every step.

        It should not read tensors of CUDA on the host, since that waits for the device.
        """
        return self.masks(module, PruningContext(warn=lambda names, message: None))


def prunable(
    module: nn.Module, skip: Sequence[str], where: str, context: PruningContext = NOW
) -> dict[str, nn.Parameter]:
    """Return the parameters that may be pruned, by name: trained ones with two dimensions or more, no embeddings.

    Left out, and named in a warning, are those in which a zero does not make the weight zero or affects another one.
    """
    _check_skip(module, skip, where)
    embedded = {id(each.weight) for each in module.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))}
    left = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and parameter.dim() >= 2
        and parameter.numel() > 0
        and (parameter.is_floating_point() or parameter.is_complex())
        and id(parameter) not in embedded
        and not any(fnmatch(name, pattern) for pattern in skip)
    }
    reasons = unprunable(module)
    out = {name: reasons[id(parameter)] for name, parameter in left.items() if id(parameter) in reasons}
    if len(out) == len(left):
        why = "".join(f"; {name!r} cannot, since {reason}" for name, reason in list(out.items())[:3])
        raise ValueError(
            f"{where}: no parameter is left to prune. Those with two dimensions or more that are trained, are no "
            f"embeddings and are not in `skip` can be{why}. Send the gradients of such a model by a compression "
            "without a mask, such as 'bf16'."
        )
    for reason in sorted(set(out.values())):
        text = reason.replace("{", "{{").replace("}", "}}")
        names = [name for name in out if out[name] == reason]
        context.warn(names, f"{where}: not pruned: {{names}}, since {text}. `skip` leaves this message out.")
    return {name: parameter for name, parameter in left.items() if name not in out}


def _check_skip(module: nn.Module, skip: Sequence[str], where: str) -> None:
    names = [name for name, _ in module.named_parameters()]
    for pattern in skip:
        if not any(fnmatch(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=1)
            raise ValueError(
                f"{where}: `skip` must name parameters of the model, and {pattern!r} is none."
                + (f" Did you mean {near[0]!r}?" if near else f" Its parameters are {', '.join(names[:5])}, …")
            )


def check_sparsity(where: str, sparsity: object) -> None:
    """Raise unless ``sparsity`` is a share of weights that can be pruned."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if number and 1 < sparsity < 100:  # type: ignore[operator]
        raise ValueError(
            f"{where}: `sparsity` is a share from 0 to 1; got {sparsity!r}. For {sparsity} % write {sparsity / 100:g}."  # type: ignore[operator]
        )
    if not number or not 0 <= sparsity < 1:  # type: ignore[operator]
        raise ValueError(
            f"{where}: `sparsity` is the share of weights that are pruned, so it must be >= 0 and < 1; got "
            f"{sparsity!r}. 0.8 keeps one weight in five."
        )


def check_scope(where: str, scope: object, scopes: Sequence[str]) -> None:
    """Raise unless ``scope`` is one of ``scopes``."""
    if scope not in scopes:
        raise ValueError(f"{where}: `scope` must be one of {', '.join(map(repr, scopes))}; got {scope!r}.")


def checked_skip(where: str, skip: object) -> tuple[str, ...]:
    """Return the patterns of parameter names that are never pruned."""
    if isinstance(skip, str) or not isinstance(skip, Sequence) or not all(isinstance(each, str) for each in skip):
        way_out = f"Write [{skip!r}]." if isinstance(skip, str) else "Leave it out, or write [], to skip none."
        raise ValueError(f"{where}: `skip` must be a list of parameter names; got {skip!r}. {way_out}")
    return tuple(skip)


def checked_masks(masks: object, module: nn.Module, where: str) -> Masks:
    """Return the masks of a user if each fits its parameter; without those of parameters that have no entries.

    Raises:
        ValueError: If one does not; the message names it.

    """
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"{where}: masks must be a dictionary of tensors by parameter name, not empty; got {masks!r}.")
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(_unknown(str(name), module, parameters, where))
        _check_fit(name, mask, parameters[name], where)
    _check_gradients(masks, parameters, module, where)
    masks = {str(name): mask.detach() for name, mask in masks.items() if mask.numel()}
    _check_something_is_left(masks, where)
    _check_not_inverted(masks, parameters, where)
    broken = broken_weight(module, masks)
    if broken is not None:
        raise ValueError(
            f"{where}: under the mask of {broken[0]!r} the weight {broken[1]!r}, which is computed from it, is not "
            "finite: a whole row is zero, and its norm divides. Keep an entry that is not zero in each row, or drop "
            "the mask."
        )
    return masks


def _unknown(name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], where: str) -> str:
    first = _first_name(module, name)
    if first is not None:
        return (
            f"{where}: there is a mask for {name!r}, which is a second name of the tied weight {first!r}. Give the "
            f"mask under its first name, {first!r}."
        )
    near = get_close_matches(name, parameters, n=1)
    way_out = f"Did you mean {near[0]!r}?" if near else "Names are those of `named_parameters()`."
    return f"{where}: there is a mask for {name!r}, which is no parameter of the model. {way_out}"


def _check_fit(name: str, mask: object, parameter: nn.Parameter, where: str) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{where}: the mask of {name!r} must be a tensor of torch.bool, True where a weight is kept; got "
            f"{kind}. `mask != 0` makes one of numbers."
        )
    if mask.shape != parameter.shape:
        raise ValueError(
            f"{where}: the mask of {name!r} must have the parameter's shape {tuple(parameter.shape)}; got "
            f"{tuple(mask.shape)}. It may belong to another architecture."
        )
    if not parameter.requires_grad:
        raise ValueError(f"{where}: {name!r} is frozen, so it has no gradient to leave out. Drop its mask.")


def _check_gradients(
    masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], module: nn.Module, where: str
) -> None:
    """Raise if a mask is on a parameter with sparse gradients, or with entries that other tensors share."""
    sparse = {
        f"{name}.weight"
        for name, each in module.named_modules()
        if isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.sparse
    }
    reasons = unprunable(module, computed=False)
    for name in masks:
        if name in sparse:
            raise ValueError(
                f"{where}: {name!r} has sparse gradients, which DDP sends by themselves. Drop its mask, or build the "
                "embedding with sparse=False."
            )
        if id(parameters[name]) in reasons:
            raise ValueError(f"{where}: {name!r} cannot have a mask: {reasons[id(parameters[name])]}. Drop its mask.")


def _first_name(module: nn.Module, name: str) -> str | None:
    """Return the name in ``named_parameters()`` of a weight that is tied and has ``name`` too."""
    tied = dict(module.named_parameters(remove_duplicate=False)).get(name)
    return next((first for first, parameter in module.named_parameters() if parameter is tied), None)


def _check_not_inverted(masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], where: str) -> None:
    for name, mask in masks.items():
        zero = parameters[name].detach() == 0
        if bool(zero.any()) and not bool(zero.all()) and torch.equal(mask.to(zero.device), zero):
            raise ValueError(
                f"{where}: the mask of {name!r} keeps exactly the {int(zero.sum())} weights that are zero and prunes "
                f"the {int((~zero).sum())} others, so it must be inverted. True is for weights that "
                "are kept; `~mask` inverts a mask."
            )


def _check_something_is_left(masks: Mapping[str, Tensor], where: str) -> None:
    for name, mask in masks.items():
        if not bool(mask.any()):
            raise ValueError(
                f"{where}: the mask of {name!r} keeps nothing, so that parameter would stay zero. True is for "
                "weights that are kept; `~mask` inverts a mask."
            )
