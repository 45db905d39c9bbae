"""The user's optimizer, which updates nothing itself: copies of it update the stages, on their owners."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_comm.ondevice.cyclic.optimizer_guard import OptimizerGuard
from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.strategies.cyclic import step_errors, trained
from lightning_comm.strategies.cyclic.fit import Fit


class UserOptimizer:
    """The user's optimizer, and errors for changes to it in the middle of a run that its copies would not see.

    Args:
        fit: What all parts of the run share.
        optimizer: The user's.

    Attributes:
        optimizer: The same.

    """

    def __init__(self, fit: Fit, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._fit = fit
        self._stages: Sequence[Stage] = ()
        self._guard: OptimizerGuard | None = None
        self._handle: RemovableHandle | None = None

    def parameters(self) -> list[Parameter]:
        """Return all of its parameters."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def trained(self) -> list[Parameter]:
        """Return those that are trained now."""
        return [each for each in self.parameters() if each.requires_grad]

    def is_cleared(self) -> bool:
        """Whether no trained parameter has a gradient."""
        return all(each.grad is None for each in self.trained())

    def watch(self, before_step: Callable[..., Any]) -> None:
        """Call a function before each step, also before those of its copies."""
        if hasattr(self.optimizer, "register_step_pre_hook"):
            self._handle = self.optimizer.register_step_pre_hook(before_step)

    def begin_stages(self, stages: Sequence[Stage]) -> None:
        """Refuse changes from now on, since its state has been handed to the stages."""
        self._stages = stages
        self._guard = OptimizerGuard(self.optimizer)

    def end_step(self) -> None:
        """Note its state after its own step."""
        if self._guard is not None:
            self._guard.note()

    def refuse_another(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that has taken its place."""
        if optimizer is not self.optimizer:
            raise step_errors.another_optimizer(optimizer, self._fit.progress.steps_done)

    def refuse_others(self) -> None:
        """Refuse other parameters than those of the stages."""
        if self._guard is not None and self._guard.trains_others():
            raise self.other_parameters()

    def refuse_changed(self) -> None:
        """Refuse changes to it since its own last step."""
        self.refuse_others()
        if self._guard is not None and (found := self._guard.changed()):
            raise step_errors.changed_optimizer(self.optimizer, self._fit.progress.steps_done, found)

    def other_parameters(self) -> RuntimeError:
        """Return the error of parameters that began, or ceased, to be trained since the model was cut."""
        return trained.others(self._stages, self._fit.module, self.trained(), self._fit.progress.steps_done)

    def close(self) -> None:
        """Stop watching its steps."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
