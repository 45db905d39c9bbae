"""Optimizer state that can be averaged over ranks."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_averageable(tensor: Tensor) -> bool:
    """Whether a mean of such tensors is meaningful."""
    return tensor.is_floating_point() or tensor.is_complex()


def has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer switches between weights for training and for evaluation (as schedule-free ones do)."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def optimizer_tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the state tensors that can be averaged, in an order given by the parameters.

    Raises:
        ValueError: If a state has more than floating-point tensors and counts, so that a mean has no meaning.

    """
    tensors = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                for key in sorted(state):
                    value = state[key]
                    if isinstance(value, Tensor) and value.dim() > 0:
                        if not is_averageable(value):
                            raise _no_mean(optimizer, key, value.dtype)
                        tensors.append(value)
                    elif isinstance(value, (list, dict)):
                        raise _no_mean(optimizer, key, type(value).__name__)
    return tensors


def saved_tensors(states: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Return the tensors of :func:`optimizer_tensors` from a result of ``Optimizer.state_dict``, in the same order."""
    tensors = []
    for state in states:
        for group in state["param_groups"]:
            for parameter in group["params"]:
                entries = state["state"].get(parameter, {})
                values = [entries[key] for key in sorted(entries)]
                tensors += [v for v in values if isinstance(v, Tensor) and v.dim() > 0 and is_averageable(v)]
    return tensors


def _no_mean(optimizer: Optimizer, key: str, kind: object) -> ValueError:
    name = type(optimizer).__name__
    return ValueError(
        f"LocalUpdateStrategy: `optimizer_state='average'` needs states that have a mean, and {name} keeps {key!r} as "
        f"{kind}. Use 'local', as the authors of QSR do."
    )
