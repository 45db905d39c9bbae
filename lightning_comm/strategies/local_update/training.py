"""A Lightning Trainer with its model and optimizers, as the rounds of a run see them."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.errors import refuse
from lightning_comm.lightning_internals import weight_average_of
from lightning_comm.ondevice.optimizer.state import optimizer_tensors
from lightning_comm.strategies.common.loss_scale import loss_scale_on, take_smallest_scale
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.strategies.local_update.step_counter import StepCounter
from lightning_comm.transport.backends import unsent_problems
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import RankPosition


class LightningTraining:
    """A Trainer, as rounds see it (:class:`~.meeting.Training`).

    Args:
        trainer: The Trainer.
        module: The model.
        optimizers: Returns the optimizers of the strategy.
        settings: What the user chose.
        clock: Counts steps.
        steps: Takes their time.

    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizers: Callable[[], list[Optimizer]],
        settings: Settings,
        clock: RoundClock,
        steps: StepCounter,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._optimizers = optimizers
        self._settings = settings
        self._clock = clock
        self._steps = steps

    @property
    def goes_on(self) -> bool:
        """Whether the epoch has further batches."""
        return not self._trainer.is_last_batch

    @property
    def position(self) -> RankPosition:
        """Where this rank is."""
        return RankPosition(self._clock.steps_done, self._trainer.current_epoch, self._steps.seconds)

    def learning_rate(self) -> float:
        """Return the largest learning rate over the groups of the counted optimizer."""
        return max(float(group["lr"]) for group in self.counted_optimizer.param_groups)

    @property
    def counted_optimizer(self) -> Optimizer:
        """The optimizer whose steps count."""
        return self._optimizers()[self._settings.counted_optimizer]

    def is_counted(self, optimizer: Optimizer) -> bool:
        """Whether the steps of an optimizer count; also where Lightning has wrapped it."""
        counted = self.counted_optimizer
        return optimizer is counted or optimizer is getattr(counted, "_optimizer", None)

    def averaged_state(self) -> list[Tensor]:
        """Return the state of optimizers that is averaged with the model; none where it is local."""
        if self._settings.optimizer_state != "average":
            return []
        tensors = optimizer_tensors(self._optimizers())
        way_out = "keep optimizer states 'local', or where the parameters are"
        refuse("LocalUpdateStrategy", unsent_problems((("optimizer state", each) for each in tensors), way_out))
        return tensors

    def weight_averages(self) -> dict[str, torch.nn.Module]:
        """Return the copies of the model that callbacks keep as averages of its weights over time."""
        models = [weight_average_of(callback) for callback in getattr(self._trainer, "callbacks", [])]
        return {str(k): model for k, model in enumerate(model for model in models if model is not None)}

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Return the loss scale as a number on a device, for which the host does not wait; ``None`` without one."""
        return loss_scale_on(self._trainer.precision_plugin, device)

    def take_loss_scale(self, scales: list[float], own: float) -> None:
        """Take the smallest loss scale of the ranks."""
        take_smallest_scale(self._trainer.precision_plugin, scales, own)

    def warn(self, message: str) -> None:
        """Tell the user, on rank 0."""
        rank_zero_warn(message)

    def note_gradients(self, recorder: Recorder, steps: int) -> None:
        """Record what DDP sends in the gradient phase: the gradients and, before each forward, the buffers."""
        gradients = sum(p.numel() * p.element_size() for p in self._module.parameters() if p.requires_grad)
        buffers = sum(b.numel() * b.element_size() for b in self._module.buffers())
        for _ in range(steps):
            recorder.note("all_reduce", "gradients", gradients)
            if buffers:
                recorder.note("broadcast", "buffers", buffers)
