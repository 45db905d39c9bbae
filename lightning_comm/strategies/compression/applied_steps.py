"""Steps of optimizers with averaged gradients: taken, skipped by a gradient scaler, or never taken.

The new residual of a compression is kept only if an optimizer has stepped with the mean; if the mean is discarded, the
residual from before is restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_comm.lightning_internals import sees_to_infinities
from lightning_comm.strategies.common.loss_scale import loss_scale
from lightning_comm.strategies.compression.loss_scale_cache import KnownScale
from lightning_comm.transport.ddp_hook import GradientSync

_BEFORE_STEP = ("backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")


class AppliedSteps:
    """The steps of optimizers, reported to the communication hook: with which of its means they have stepped.

    Args:
        scale: The loss scale of the run.

    """

    def __init__(self, scale: KnownScale) -> None:
        self.scale = scale
        self._sync: GradientSync | None = None
        self._stepping: Optimizer | None = None  # the one that `judged` handles
        self._has_stepped = False  # whether its own `step` has been called meanwhile
        self._watch: RemovableHandle | None = None

    def loss_scale(self) -> float:
        """Return the present factor of the gradients."""
        return self.scale() or 1.0

    def begin(self, sync: GradientSync, *, watch: bool) -> None:
        """Begin to report to a hook.

        Args:
            sync: The hook.
            watch: Whether means may be discarded, so that steps of all optimizers are watched.

        """
        self.end()
        self._sync = sync
        if watch:
            self._watch = register_optimizer_step_post_hook(self._stepped)

    def end(self) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    @contextmanager
    def judged(self, optimizer: Optimizer) -> Iterator[None]:
        """Report to the hook, after an optimizer step of Lightning's, whether it was taken or skipped."""
        sync = self._sync
        keeps = sync is not None and sync.codec.is_local  # for others nothing depends on the scale
        scale = self.loss_scale() if keeps else 1.0
        self._stepping, self._has_stepped = optimizer, False
        try:
            yield
        finally:
            self._stepping = None
        if sync is not None and keeps and sync.codec.unapplied:
            report = sync.thrown_away if self._has_skipped(optimizer, scale) else sync.stepped
            report(_parameters_of(optimizer))

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Report a step of any optimizer, except the one that :meth:`judged` handles."""
        if optimizer is self._stepping:
            self._has_stepped = True
        elif self._sync is not None:
            self._sync.stepped(_parameters_of(optimizer))

    def _has_skipped(self, optimizer: Optimizer, scale: float) -> bool:
        """Whether a gradient scaler has skipped a step: then, and only then, it lowers its scale.

        The scale is read only if it may have: on CUDA that is a wait for the device.
        """
        return (not self._has_stepped or sees_to_infinities(optimizer)) and self.loss_scale() < scale


def may_throw_away(module: LightningModule, precision_plugin: Precision, ddp_kwargs: dict[str, Any]) -> bool:
    """Whether an averaged gradient may be discarded: by DDP, by a gradient scaler, or by the user's own code."""
    callbacks: list[object] = getattr(module.trainer, "callbacks")  # noqa: B009  (mypy does not see it)
    return (
        bool(ddp_kwargs["find_unused_parameters"] or ddp_kwargs["static_graph"])
        or loss_scale(precision_plugin) is not None
        or not module.automatic_optimization
        or is_overridden("optimizer_step", module)
        or any(map(_has_own_hook, [module, *callbacks]))
    )


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _has_own_hook(owner: object) -> bool:
    """Whether code of the user's own runs between a backward and the optimizer's step, where it may clear gradients."""
    hooks = (getattr(owner, name, None) for name in _BEFORE_STEP)
    modules = (getattr(hook, "__module__", None) or "" for hook in hooks if hook is not None)
    return any(module.partition(".")[0] not in ("lightning", "lightning_comm") for module in modules)
