"""Callbacks of a pilot's trials: one for the rehearsal, and one that times a few steps and ends the run."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_comm.cli.pilot.arguments import Refused
from lightning_comm.cli.pilot.schedule import run_length, use_up_schedule
from lightning_comm.contract import SynchronisesInRounds
from lightning_comm.lightning_internals import end_after_this_step
from lightning_comm.ondevice.sparse_gradients import fault_of_ddp
from lightning_comm.planning.pilot.costs import first_whole_round
from lightning_comm.strategies.common.planned_rates import ScheduleUnknown

_LAST_LOSSES = 5  # steps whose mean is the loss after the pilot


class Rehearsal(Callback):
    """Takes two untimed steps, and collects what the trials need: batch, model, learning rates of the run."""

    def __init__(self) -> None:
        self.batch_size: int | None = None
        self.parameters = 0
        self.total_steps: int | None = None
        self.rates: list[float] | None = None
        self.problem: str | None = None  # why the rates are not known
        self.fault: str | None = None  # why the baseline may train wrongly

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.rates is not None or self.problem is not None:
            return
        self.batch_size = samples_of(batch)
        self.parameters = sum(each.numel() for each in pl_module.parameters())
        self.fault = fault_of_ddp(pl_module, trainer.world_size)
        try:
            self.total_steps = run_length(trainer, pl_module)
            self.rates = use_up_schedule(trainer, pl_module, self.total_steps)
        except ScheduleUnknown as unknown:
            self.problem = str(unknown)
            trainer.lr_scheduler_configs.clear()  # so that none asks for a metric of this run

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= 2:
            end_after_this_step(trainer)


class Watch(Callback):
    """Takes the time of every optimizer step of a trial, and ends it after ``steps`` of them.

    The Trainer keeps the user's ``max_steps`` until then, so the schedule and the share of the run that a strategy
    reckons with are those of the real run. Only a gradient phase is shortened, to half of the trial, so that both
    phases are seen; ``planned_gradient_steps`` has its real length.

    Args:
        steps: Optimizer steps.
        warmup_steps: How many of them are not counted.
        is_limit: Whether the strategy is the job without communication, in which no round ends.

    Raises:
        Refused: In training, if a round is too long to be measured.

    Note:
        *Communication.* None. On CUDA it waits for the device at every step.

    """

    def __init__(self, steps: int, warmup_steps: int, *, is_limit: bool) -> None:
        self._steps, self._warmup_steps, self._is_limit = steps, warmup_steps, is_limit
        self._last_s: float | None = None
        self._global_step = 0
        self._rounds = 0
        self._samples: float | None = 0.0
        self.step_s: list[float] = []
        self.samples: list[float | None] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.sync_steps: list[int] = []
        self.gradient_steps = steps  # in the trial; a strategy without rounds sends gradients at every step
        self.planned_gradient_steps: int | None = None  # in the run; None for all
        self.strategy: SynchronisesInRounds | None = None  # in trials of such a one

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            config.strict = False  # a plateau would end the trial because the validation is left out

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._last_s is None:
            self._shorten_gradient_phase(trainer)
            self._last_s = time.monotonic()
        samples = samples_of(batch)
        self._samples = None if samples is None or self._samples is None else self._samples + samples

    def _shorten_gradient_phase(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, SynchronisesInRounds):
            return
        self.strategy = strategy
        self.planned_gradient_steps, total = strategy.gradient_phase_steps, strategy.round_in_force.total_steps
        endless = total is not None and self.planned_gradient_steps >= total
        self.gradient_steps = self._steps if endless else min(self.planned_gradient_steps, self._steps // 2)
        strategy.shorten_gradient_phase(self.gradient_steps)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:
            self.rates.append(max(float(group["lr"]) for group in optimizer.param_groups))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:
            return  # gradients are still accumulated
        self._global_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.monotonic()
        assert self._last_s is not None
        self.step_s.append(now - self._last_s)
        self._last_s = now
        self.samples.append(self._samples)
        self._samples = None if self._samples is None else 0.0
        self._note_round()
        if len(self.step_s) > self._steps - _LAST_LOSSES:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self.losses += [float(loss)] if isinstance(loss, torch.Tensor) else []
        if len(self.step_s) >= self._steps:
            end_after_this_step(trainer)

    def _note_round(self) -> None:
        strategy, done = self.strategy, len(self.step_s)
        if strategy is None or self._is_limit or done <= self.gradient_steps:
            return
        period, total = strategy.round_in_force
        if not self.sync_steps and period > 0:
            self._check_round(period, total)
        if strategy.averages_landed > self._rounds:  # the step that waits for one that was in flight
            self._rounds = strategy.averages_landed
            self.sync_steps.append(done)

    def _check_round(self, period: int, total: int | None) -> None:
        needed = first_whole_round(period, self.gradient_steps, self._warmup_steps)
        if total is not None and needed - period < total <= self._steps:
            needed = min(needed, total)  # the last round of a run ends with it
        if needed <= self._steps:
            return
        if total is None or total > self._steps:
            way_out = f"Give --steps {needed if self.gradient_steps == 0 else 2 * needed} or more."
        else:
            way_out = "Your run has no more: give it more (--trainer.max_epochs or --trainer.max_steps)"
            way_out += ", or --warmup-steps 0." if self.gradient_steps + period <= self._steps else "."
        raise Refused(
            f"`--steps` must hold a whole round after {self._warmup_steps} steps of warm-up, and the first round lasts "
            f"{period}; got {self._steps}. {way_out}"
        )


def samples_of(batch: Any) -> int | None:
    """Return how many samples are in a batch, or ``None`` where that cannot be seen."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None
