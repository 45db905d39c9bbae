"""Parameters that cannot be pruned entry by entry, found by how modules use them.

A mask assumes that a zero entry of a parameter is a zero weight. That does not hold where the weight is computed from
the parameter (weight normalisation, orthogonal layers), and where entries share memory with others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from lightning_comm.ondevice.random_state import random_state, set_random_state


def unprunable(module: nn.Module, *, computed: bool = True) -> dict[int, str]:
    """Return the reasons why parameters of a model cannot be pruned entry by entry, by the identity of the parameter.

    Args:
        module: The model.
        computed: Whether to include parameters from which a weight is computed. A user's mask for one may be valid
            (:func:`broken_weight`); one by magnitudes is not.

    """
    reasons: dict[int, str] = {}
    for whole, parameter in _computed_from(module) if computed else ():
        reasons[id(parameter)] = f"{whole!r} is computed from it, so a zero in it is no zero in the weight"
    for parameter in module.parameters():
        if parameter.is_complex():
            reasons.setdefault(id(parameter), "it is complex, and complex gradients are sent in full")
        elif _repeats_itself(parameter):
            reasons.setdefault(id(parameter), "it is an expanded tensor, in which entries share one number")
    for parameter, other in _sharing_memory(module):
        reasons.setdefault(id(parameter), f"it shares its memory with {other!r}")
    return reasons


def _computed_from(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter that a weight is computed from, with the weight's name."""
    for path, each in module.named_modules():
        if isinstance(each, ParametrizationList):
            whole = path.replace("parametrizations.", "")
            yield from ((whole, parameter) for parameter in each.parameters())
            continue
        # the result of a hook before each forward is a plain tensor next to its parameters: `weight` to `weight_v`
        plain = [name for name, value in vars(each).items() if isinstance(value, Tensor)]
        for name, parameter in each.named_parameters(recurse=False) if each._forward_pre_hooks else ():
            for whole in plain:
                masked = name == f"{whole}_orig" and f"{whole}_mask" in dict(each.named_buffers(recurse=False))
                if name.startswith(f"{whole}_") and not masked:
                    yield f"{path}.{whole}" if path else whole, parameter


def _repeats_itself(parameter: Tensor) -> bool:
    if parameter.layout != torch.strided or parameter.numel() == 0:
        return False
    return _reach(parameter) < parameter.numel()


def _reach(tensor: Tensor) -> int:
    """Return the number of places in memory from the tensor's first entry to its last one."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _sharing_memory(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield each parameter that has entries in the memory of another one, with that one's name."""
    by_memory: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.layout == torch.strided and parameter.numel() and not parameter.is_meta:
            by_memory.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
    for group in by_memory.values():
        for name, parameter in group:
            others = (other_name for other_name, other in group if other_name != name and _overlap(parameter, other))
            first = next(others, None)
            if first is not None:
                yield parameter, first


def _overlap(one: Tensor, other: Tensor) -> bool:
    starts = [each.storage_offset() * each.element_size() for each in (one, other)]
    ends = [start + _reach(each) * each.element_size() for start, each in zip(starts, (one, other), strict=True)]
    if max(starts) >= min(ends):
        return False  # one after the other, as the weights of a recurrent layer on CUDA
    if one.element_size() != other.element_size():
        return True
    taken = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


@torch.no_grad()
def broken_weight(module: nn.Module, masks: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the names of a mask and of a computed weight that becomes NaN under it, or ``None``.

    Weight normalisation divides a row by its norm, so a row of zeros becomes NaN.
    """
    by_parameter = {id(parameter): name for name, parameter in module.named_parameters()}
    with _random_state_kept():
        for path, each in module.named_modules():
            if isinstance(each, ParametrizationList):
                masked = _masked(each, by_parameter, masks)
                if masked and _finite(_computed(each, {})) and not _finite(_computed(each, masked)):
                    return next(
                        by_parameter[id(p)] for name, p in each.named_parameters() if name in masked
                    ), path.replace("parametrizations.", "")
            for hook in each._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):
                    name = _emptied_by(each, hook, by_parameter, masks)
                    if name is not None:
                        return name, f"{path}.{hook.name}" if path else hook.name
    return None


def _masked(part: nn.Module, by_parameter: Mapping[int, str], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: parameter.masked_fill(~masks[by_parameter[id(parameter)]].to(parameter.device), 0)
        for name, parameter in part.named_parameters()
        if by_parameter[id(parameter)] in masks
    }


def _computed(part: ParametrizationList, masked: Mapping[str, Tensor]) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in part.named_buffers()}  # spectral norms iterate on them
    weight: Tensor = functional_call(part, {**buffers, **masked}, ())
    return weight


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight).all())


def _emptied_by(
    owner: nn.Module, hook: WeightNorm, by_parameter: Mapping[int, str], masks: Mapping[str, Tensor]
) -> str | None:
    """Return the mask that leaves only zeros in a row of an old-style weight-normalised layer."""
    for local, parameter in owner.named_parameters(recurse=False):
        name = by_parameter[id(parameter)]
        if local in (f"{hook.name}_v", f"{hook.name}_v_orig") and name in masks:
            left = parameter.masked_fill(~masks[name].to(parameter.device), 0)
            if not bool(torch.norm_except_dim(left, 2, hook.dim).all()):
                return name
    return None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
