"""The optimizer steps of one ``fit`` under Cyclic Data Parallelism, as Lightning's hooks bring them.

:meth:`CyclicSteps.begin_forward` opens a step. At the first call of a stage's modules the version by the schedule is
put in place. When the gradients of a stage are ready, they are handed to the ring. :meth:`CyclicSteps.count_step`
closes the step. In the first step of a run the forward is traced instead, and the model is cut before its backward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_comm.ondevice.cyclic.stages import START, Stage, not_compiled
from lightning_comm.strategies.cyclic import step_errors
from lightning_comm.strategies.cyclic.cut import ModelCutter
from lightning_comm.strategies.cyclic.cut_model import CutModel
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.step_status import StepStatus
from lightning_comm.strategies.cyclic.user_optimizer import UserOptimizer
from lightning_comm.transport.cyclic.stagger import NoTurns, Turns


class CyclicSteps:
    """The step under way: what has been computed of it, and what is refused in the middle of it.

    Under automatic optimization Lightning's hooks open and close a step. Under manual optimization a batch may have
    several steps or none, forwards and backwards may come in any order, and the module may catch an error: therefore
    all of these attributes.

    Args:
        fit: What all parts of the run share.
        optimizer: The user's.
        status: What ranks note of each step.
        cutter: Watches the first forward.
        use_stages: Called with the stages of the cut; it calls :meth:`use`.

    Attributes:
        awaits_backward: Whether what a forward has computed waits for its backward.
        buffers_moved: Whether a forward may have changed buffers since ranks last met.
        turns: When this rank, and the one behind it, may begin a batch.

    """

    def __init__(
        self,
        fit: Fit,
        optimizer: UserOptimizer,
        status: StepStatus,
        cutter: ModelCutter,
        use_stages: Callable[[Sequence[Stage]], None],
    ) -> None:
        self.awaits_backward = self.buffers_moved = False
        self._fit, self._progress = fit, fit.progress
        self._optimizer = optimizer
        self._status = status
        self._cutter = cutter
        self._use_stages = use_stages
        self._model: CutModel | None = None
        self.turns: Turns = NoTurns()
        self._manual = not fit.module.automatic_optimization
        self._handles: list[RemovableHandle] = []
        self._entered: set[int] = set()  # stages whose version for this step is in place
        self._training = False  # whether the module's `training_step` runs
        self._open = False  # whether there was a forward since the last step
        self._due = False  # whether the optimizer's step is being taken
        self._at_once = False  # whether this backward hands gradients over as they come
        self._torn = False  # whether a step ended in an error when some of its gradients had been sent
        self._counted = False  # whether there was a step since the last batch ended

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def use(self, model: CutModel) -> None:
        """Follow the modules and parameters of these stages from now on."""
        self._model, self.turns = model, model.turns
        modules = dict(self._fit.module.named_modules())
        for number, stage in enumerate(model.stages):
            for name in stage.modules:
                if name != START:
                    enter = not_compiled(partial(self._on_forward, number))
                    # in front of hooks that read parameters, such as those of weight normalisation
                    self._handles.append(modules[name].register_forward_pre_hook(enter, prepend=True))
            for parameter in model.parameters[number]:
                ready = partial(self._on_gradient, number)
                handle = parameter.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def close(self) -> None:
        """Remove the hooks."""
        self._cutter.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_forward(self, stage: int, *_: Any) -> None:
        if self._manual and not self._open and (self._training or _trains_in_a_hook(self._fit.trainer)):
            # a further step in this batch
            self._open = self.buffers_moved = True
            self.awaits_backward = self._training and torch.is_grad_enabled()
        if self._open:
            self._enter(stage)

    def _on_gradient(self, stage: int, parameter: Tensor) -> None:
        self.awaits_backward = False
        if not self._at_once:
            self._open |= self._manual
        elif self._model is not None:
            self._model.hand_over.add(stage, parameter)

    def before_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        """Refuse a step of the optimizer that bypasses the strategy."""
        # stages have copies of it, which call this as well
        if self._progress.active and optimizer is self._optimizer.optimizer and not self._due:
            raise step_errors.stepped_past(optimizer, self._progress.steps_done, self._status.batch)

    # ---- forward -------------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Open the step, if this is its first batch; called before every training step of the module's."""
        if not self._progress.active:
            return
        self.refuse_torn()
        self._training = self._open = self.awaits_backward = self.buffers_moved = True
        if self._model is None:
            self._cutter.watch(self._optimizer.trained())
            return
        self.turns.end_batch()
        with self._fit.agreement.first_error_shown():
            self.turns.begin_batch(self._progress.steps_done)
        if self._at_once:
            self._model.hand_over.announce()
        self._enter_start()

    def end_forward(self) -> None:
        """Note that the module's training step is over, and under manual optimization all steps of the batch."""
        self._training = False

    def _enter_start(self) -> None:
        if self._model is not None and START in self._model.stages[0].modules:
            self._enter(0)

    def _enter(self, stage: int) -> None:
        """Put in place the version with which this step computes; at the first call in each step."""
        if self._model is None or stage in self._entered:
            return
        self._entered.add(stage)
        self.turns.reach(stage)
        self._model.versions.use_in_step(stage)

    # ---- backward ------------------------------------------------------------------------------------------------

    def begin_backward(self, loss: Tensor) -> None:
        """Note whether the loss is finite; in the first step, cut the model into stages."""
        if not self._progress.active:
            return
        if not loss.requires_grad:
            self._optimizer.refuse_others()  # all are frozen, since the forward of this batch began
        self._status.note_loss(loss, first=self._optimizer.is_cleared())
        self._cut()
        if self._model is not None:
            self.turns.reach(len(self._model.stages))

    def end_backward(self) -> None:
        """Hand over the gradients that no hook has, and refuse parameters that took no part in the step."""
        self.turns.end_batch()
        self.awaits_backward = False
        if self._progress.active and self._at_once and self._model is not None:
            self._model.hand_over.hand_over_rest()

    def _cut(self) -> None:
        """Cut the model into stages, by the forward that was traced."""
        stages = self._cutter.stages()
        if stages is not None:
            self._use_stages(stages)
            self._entered = set(range(len(stages)))

    # ---- the optimizer's step ------------------------------------------------------------------------------------

    def step_is_due(self, optimizer: Optimizer, *, at_once: bool) -> None:
        """Note that this batch ends in an optimizer step.

        Args:
            optimizer: The one that Lightning steps.
            at_once: Whether gradients are handed over as backward brings them. Otherwise they are when the closure is
                done, as where the module's own `optimizer_step` has called it before, or changes gradients in it.

        """
        if not self._progress.active:
            return
        self.refuse_torn()
        self._optimizer.refuse_another(optimizer)
        self._due, self._at_once = True, at_once
        self._optimizer.refuse_changed()

    def complete(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, wrapped to hand over, after it, the gradients that no hook has."""

        def evaluate() -> Any:
            output = closure()
            if self._progress.active and self._due:
                self._hand_over_rest()
            return output

        return evaluate

    def step_failed(self) -> None:
        """Note that the step ended in an error, which the module's own `optimizer_step` may catch."""
        self._due = self._at_once = self.awaits_backward = False
        self._torn = self._model is not None and self._model.hand_over.begun

    def count_step(self) -> None:
        """Close the step; called after the optimizer's step, as Lightning sees it."""
        self.turns.end_batch()
        if not self._progress.active or not self._due:
            return
        if self._counted:
            self._status.read()  # of an earlier step in this batch
        if self._model is not None:
            self._model.settings.warn_if_late()
            self._model.hand_over.end_step()
        self._progress.steps_done += 1
        self._fit.recorder.step = self._progress.steps_done
        self._optimizer.end_step()
        self._open = self._due = self._at_once = False
        self._counted = True
        self._entered.clear()
        self._status.end_step()
        if self._manual:
            self._enter_start()  # parameters may be used in a further step of this batch before any module is called

    def end_batch(self) -> bool:
        """Close the batch, however it ended; return whether there was a step since the last one."""
        self.turns.end_batch()
        self.awaits_backward = False  # without a backward: its error was caught, or `training_step` returned None
        counted, self._counted = self._counted, False
        return counted

    def refuse_torn(self) -> None:
        """Refuse to go on after a step of which only a part has been sent."""
        if self._torn:
            raise step_errors.torn_step(self._progress.steps_done)

    def _hand_over_rest(self) -> None:
        begun = self._model is not None and self._model.hand_over.begun
        if self._open and not begun and self._optimizer.is_cleared():
            self._due = False  # by a hook, or by Lightning before a validation: such a step changes nothing anywhere
        elif self._open:
            self._cut()  # where no backward of Lightning's has: `loss.backward()` under manual optimization
            if self._model is not None:
                self._model.hand_over.hand_over_rest()
        elif self._progress.steps_done > self._progress.began_at:
            raise step_errors.without_backward(self._progress.steps_done, self._status.batch)
        else:
            self._due = False  # a step before the first backward of all changes nothing and does not count


def _trains_in_a_hook(trainer: Trainer) -> bool:
    return bool(trainer.training) and torch.is_grad_enabled()
