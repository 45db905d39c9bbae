"""Private parts of Lightning around optimizers, and of its strategies."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.core import optimizer as optimizer_parsing
from lightning.pytorch.loops.optimization.closure import AbstractClosure
from lightning.pytorch.strategies import Strategy

from lightning_comm.lightning_internals.patches import Internal, Patches

_DDP = "lightning.pytorch.strategies.DDPStrategy"

INTERNALS = (
    Internal(
        "lightning.pytorch.core.optimizer", "_configure_optimizers", "its KeyError is a dictionary without an optimizer"
    ),
    Internal("lightning.pytorch.plugins.precision.Precision", "clip_gradients", "gradients may be elsewhere by then"),
    Internal(_DDP, "configure_ddp", "where the model is wrapped, or not"),
    Internal(_DDP, "_model_averaging_period", "parameters averaged over ranks alike, whatever their samples"),
    Internal(_DDP, "_timeout", "how long messages on further process groups wait"),
    Internal(_DDP, "_ddp_kwargs", "arguments of the DDP wrapper of the gradient phase"),
    Internal(
        "lightning.pytorch.strategies.ParallelStrategy",
        "_layer_sync",
        "`Trainer(sync_batchnorm=True)`, which is refused",
    ),
)


def clip_what_is_there(trainer: Trainer, patches: Patches) -> None:
    """Leave out Lightning's clipping where an optimizer has no gradients: torch's clipping by value fails there."""
    precision = trainer.precision_plugin

    def clip(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if any(parameter.grad is not None for parameter in precision.main_params(optimizer)):
            original(optimizer, *args, **kwargs)

    original: Callable[..., None] = patches.set(precision, "clip_gradients", clip)


def is_without_optimizer(error: KeyError) -> bool:
    """Whether an error is Lightning's own for a dictionary of ``configure_optimizers`` that has no optimizer."""
    places = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return error.args == ("optimizer",) and places[-1] is optimizer_parsing._configure_optimizers.__code__


def is_own_closure(closure: object) -> bool:
    """Whether a closure is the one that Lightning makes, and not one that a module has put around it."""
    return isinstance(closure, AbstractClosure)


def model_averaging_period(strategy: Strategy) -> int | None:
    """Return the period of a :class:`DDPStrategy` that averages parameters, or ``None``."""
    period: int | None = getattr(strategy, "_model_averaging_period", None)
    return period


def timeout_of(strategy: Strategy) -> timedelta:
    """Return the time-out of a strategy's messages."""
    timeout = getattr(strategy, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else timedelta(minutes=30)
