"""The gradients of a step, from backward to the ring, with the settings for their update."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.ondevice.cyclic.update import Clipping, Number
from lightning_comm.strategies.cyclic import step_errors, trained
from lightning_comm.strategies.cyclic.clipping import clipping_of
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.step_status import StepStatus
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.cyclic.stage_optimizer import StageOptimizer


class StepSettings:
    """The settings for the update of a step: learning rates and the like, and limits of the gradient.

    Args:
        fit: What all parts of the run share.
        user_optimizer: The user's, whose groups have the settings.
        optimizer: Updates the stages of this rank.

    """

    def __init__(self, fit: Fit, user_optimizer: Optimizer, optimizer: StageOptimizer) -> None:
        self._fit = fit
        self._user_optimizer = user_optimizer
        self._optimizer = optimizer
        self._limits: tuple[object, object] | None = None  # the Trainer's limits at the last check
        self._clipping = Clipping()  # the resulting limits
        self._rates_then: list[object] = []  # when the settings of the step were noted
        self._warned = False

    def note(self) -> Number:
        """Note them, as late as possible, since the module may change them before; return the sum of the rates."""
        trainer = self._fit.trainer
        limits = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        if limits != self._limits:  # at first, and where a callback has changed them
            changed = self._limits is not None
            self._clipping = clipping_of(self._fit.settings, trainer, self._fit.module, changed=changed)
            self._limits = limits
        self._optimizer.note_settings(self._fit.progress.steps_done, self._clipping)
        self._rates_then = self._rates()
        return self._rate()

    def warn_if_late(self) -> None:
        """Warn, once, that a learning rate was changed after the settings of the step were noted."""
        if not self._warned and self._rates() != self._rates_then:
            self._warned = True
            step_errors.warn_of_late_rate(self._fit.progress.steps_done)

    def _rate(self) -> Number:
        """Return the sum of the learning rates; on a device if one of them is there, so that the host need not wait."""
        rates = [group.get("lr", 0.0) for group in self._user_optimizer.param_groups]
        there = [rate.detach().to(torch.float64) for rate in rates if isinstance(rate, Tensor) and rate.is_cuda]
        here = sum(float(rate) for rate in rates if not (isinstance(rate, Tensor) and rate.is_cuda))
        return torch.stack(there).sum() + here if there else here

    def _rates(self) -> list[object]:
        """Return a value that changes when a learning rate does; of a tensor the count of writes: it needs no wait."""
        rates = [group.get("lr", 0.0) for group in self._user_optimizer.param_groups]
        return [(id(rate), rate._version) if isinstance(rate, Tensor) else rate for rate in rates]


class HandOver:
    """Passes the gradients of each stage to the ring, once in a step, as soon as they are complete.

    Args:
        fit: What all parts of the run share.
        stages: Of the model.
        parameters: Those of each stage.
        ring: Takes the gradients.
        settings: The settings for the update.
        status: The status that travels with them.
        other_parameters: Returns the error to raise where other parameters are trained now.

    """

    def __init__(
        self,
        fit: Fit,
        stages: Sequence[Stage],
        parameters: Sequence[Sequence[Parameter]],
        ring: CyclicRing,
        settings: StepSettings,
        status: StepStatus,
        other_parameters: Callable[[], RuntimeError],
    ) -> None:
        self.announced = False  # whether the ring knows that there will be this step
        self._fit, self._stages, self._parameters, self._ring = fit, stages, parameters, ring
        self._settings, self._status, self._other_parameters = settings, status, other_parameters
        self._ready = [0] * len(stages)  # how many gradients of each are there
        self._handed: set[int] = set()
        # in which backward has computed gradients that are not handed over yet
        self._streams: set[torch.cuda.Stream] = set()

    @property
    def begun(self) -> bool:
        """Whether gradients of this step have been handed over."""
        return bool(self._handed)

    def announce(self) -> None:
        """Let the ring ask for the messages of this step, once it will certainly be taken."""
        if not self.announced:
            self.announced = True
            with self._fit.agreement.first_error_shown():
                self._ring.begin_step(self._fit.progress.steps_done)

    def add(self, stage: int, parameter: Tensor) -> None:
        """Count a gradient that backward has finished; with the last one of a stage hand over all of them."""
        if stage in self._handed:
            raise step_errors.late_gradient(stage, self._stages[stage].modules)
        if parameter.is_cuda:
            self._streams.add(torch.cuda.current_stream(parameter.device))
        self._ready[stage] += 1
        if self._ready[stage] == len(self._parameters[stage]):
            self._hand_over(stage)

    def hand_over_rest(self) -> None:
        """Hand over the remaining gradients, and refuse parameters that took no part in the step."""
        for stage in reversed(range(len(self._stages))):
            if stage not in self._handed:
                self._hand_over(stage)

    def end_step(self) -> None:
        """Expect the gradients of the next step."""
        self.announced = False
        self._handed.clear()
        self._ready = [0] * len(self._stages)

    def _hand_over(self, stage: int) -> None:
        """Hand over the gradients of a stage. The host waits for nothing here: backward calls this."""
        self._follow_backward()
        gradients = self._gradients(stage)
        for parameter in self._parameters[stage]:
            parameter.grad = None
        if not self._handed:
            self._status.note_rate(self._settings.note())
        self._handed.add(stage)
        status = self._status.of_stage(stage)
        self.announce()
        with self._fit.agreement.first_error_shown():
            self._ring.hand_over(stage, gradients, status)

    def _follow_backward(self) -> None:
        """Let this thread's stream follow those in which backward computed gradients, where a model uses several."""
        if self._streams:
            here = torch.cuda.current_stream(self._fit.module.device)
            for stream in self._streams - {here}:
                here.wait_stream(stream)
            self._streams.clear()

    def _gradients(self, stage: int) -> list[Tensor]:
        """Return the gradients of a stage, and refuse what the ring cannot add up."""
        parameters, names = self._parameters[stage], self._stages[stage].parameters
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) < len(parameters):
            named = dict(zip(names, parameters, strict=True))
            step = self._fit.progress.steps_done
            raise trained.without_gradient(named, self._fit.module, step) or self._other_parameters()
        if any(gradient.layout != torch.strided for gradient in gradients):
            pairs = zip(names, gradients, strict=True)
            raise step_errors.sparse_gradient([name for name, each in pairs if each.layout != torch.strided])
        return gradients
