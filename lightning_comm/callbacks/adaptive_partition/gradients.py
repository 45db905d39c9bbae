"""The weight of a rank's gradient, applied by hooks in a backward."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class GradientScaling:
    """Scales the gradient of a loss, whose value stays as it is.

    Args:
        module: The model.

    Note:
        *Communication.* None.

    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._hooks: list[RemovableHandle] = []  # of the present backward
        self._hears_of_backward = self._warned = False

    def begin_batch(self) -> None:
        """Begin a batch, which has had no backward yet."""
        self._hears_of_backward = False

    def before_backward(self, loss: Tensor, factor: float) -> None:
        """Let the gradient of a loss be multiplied by a factor."""
        self._hears_of_backward = True
        if factor == 0.0:  # of a dummy, whose gradient may be NaN, which times 0.0 is NaN
            trained = [each for each in self._module.parameters() if each.requires_grad]
            self._hooks = [each.register_hook(torch.zeros_like) for each in trained]  # type: ignore[no-untyped-call]
        elif factor != 1.0 and loss.requires_grad:
            self._hooks = [loss.register_hook(lambda gradient: gradient * factor)]  # type: ignore[no-untyped-call]

    def after_backward(self) -> None:
        """Remove the hooks: the same loss may be part of another backward."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def end_batch(self, factor: float) -> None:
        """Warn, once, of a batch whose gradient should have been scaled, and in which no backward was noticed."""
        if self._hears_of_backward or self._warned or factor == 1.0:
            return
        self._warned = True
        rank_zero_warn(
            "AdaptivePartition: no backward through `self.manual_backward(loss)` was seen in a batch whose gradient "
            "has to be weighted by samples. `loss.backward()` is not seen, and its gradient is wrong where shares "
            "differ."
        )
