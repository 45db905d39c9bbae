"""Private parts of callbacks that average weights over time."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.nn import Module

from lightning_comm.lightning_internals.patches import Internal, Patches

_SWA = "lightning.pytorch.callbacks.StochasticWeightAveraging"

INTERNALS = (
    Internal("lightning.pytorch.callbacks.WeightAveraging", "_average_model", "averaged together with the weights"),
    Internal("torch.optim.swa_utils.AveragedModel", "update_parameters", "when it takes the weights"),
    Internal(_SWA, "update_parameters", "the same"),
    Internal(_SWA, "transfer_weights", "when the average takes the place of the weights"),
)


def weight_average_of(callback: Callback) -> Module | None:
    """Return the averaged model of a :class:`WeightAveraging` callback, if it is one and has one."""
    model = callback._average_model if isinstance(callback, WeightAveraging) else None
    return model if isinstance(model, Module) else None


def before_weight_averages(trainer: Trainer, patches: Patches, call: Callable[[Callback], None]) -> None:
    """Call a function before a callback adds the weights to its average, or puts the average in their place."""
    for callback in getattr(trainer, "callbacks", []):
        model = weight_average_of(callback)
        if model is not None:
            _call_before(callback, model, "update_parameters", patches, call)
        elif isinstance(callback, StochasticWeightAveraging):
            for name in ("update_parameters", "transfer_weights"):
                _call_before(callback, callback, name, patches, call)


def _call_before(
    callback: Callback, owner: object, name: str, patches: Patches, call: Callable[[Callback], None]
) -> None:
    def wrapped(*args: Any, **kwargs: Any) -> None:
        call(callback)
        original(*args, **kwargs)

    original: Callable[..., None] = patches.set(owner, name, wrapped)
