"""One ``fit`` under Cyclic Data Parallelism: how it begins, where all ranks meet in it, and how it ends.

`CyclicStrategy` is the shell that Lightning calls; it and the hook callback call this and :class:`CyclicSteps`. Only
the thread that trains writes parameters, between a stage's backward and its next forward.
"""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.common.run_length import may_differ
from lightning_comm.strategies.cyclic import step_errors, trained
from lightning_comm.strategies.cyclic.averages import averages_by_own_rule
from lightning_comm.strategies.cyclic.cut import ModelCutter
from lightning_comm.strategies.cyclic.cut_model import CutModel, cut_model
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.own_steps import OwnSteps
from lightning_comm.strategies.cyclic.settings import WHERE, CyclicSettings
from lightning_comm.strategies.cyclic.step_status import StepStatus
from lightning_comm.strategies.cyclic.steps import CyclicSteps
from lightning_comm.strategies.cyclic.user_optimizer import UserOptimizer
from lightning_comm.transport.cyclic.buffers import average_buffers
from lightning_comm.transport.cyclic.groups import RingGroups
from lightning_comm.transport.cyclic.requests import Requests
from lightning_comm.transport.cyclic.stage_optimizer import StageOptimizer
from lightning_comm.transport.cyclic.untrained import UntrainedParameters
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement, Decision, Kind

RUN_END = "the end of the run"


class CyclicRun:
    """The life of one ``fit``.

    Args:
        trainer: The Trainer.
        module: The model.
        optimizer: Its optimizer.
        settings: What the user chose.
        ledger: Where messages are recorded.
        agreement: Reports failures of other ranks.
        requests: The requests of ranks.
        broadcast: Sends an object of rank 0's to all ranks.
        timeout: How long messages wait for other ranks.
        ends: Compares where ranks end their epochs.

    Attributes:
        steps: The optimizer steps, for the hooks around forward, backward and the optimizer.
        failed: Whether a rank has failed, so that ranks cannot meet any more.
        random_state: The state of the generators at the end of training, once something else has begun.
        run_began_at: The step at which the run began, with this ``fit`` or with the one that it resumes.
        schedule: Which version each rank uses when, once the model is cut.
        stages: Of the model; none before it is cut.
        optimizer: Updates the stages of this rank, once the model is cut.

    """

    def __init__(  # noqa: PLR0913  (each is made by the strategy)
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        settings: CyclicSettings,
        ledger: CommLedger,
        agreement: Agreement,
        requests: Requests,
        broadcast: Callable[[Any], Any],
        timeout: timedelta,
        ends: EpochEnds,
    ) -> None:
        self.trainer, self.module, self.agreement = trainer, module, agreement
        self.recorder = Recorder(ledger)
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.failed = False
        self.random_state: dict[str, Any] | None = None
        self.run_began_at = 0
        self.schedule: CyclicSchedule | None = None
        self.stages: list[Stage] = []
        self.optimizer: StageOptimizer | None = None
        self._ends = ends
        self._requests = requests
        self._fit = Fit(trainer, module, settings, agreement, self.recorder)
        self._progress = self._fit.progress
        staggered = settings.stagger == "step" and self.recorder.world_size > 1
        self._groups = RingGroups(ledger, module.device, agreement, timeout, staggered=staggered)
        self._status = StepStatus(self._fit, requests, ends)
        cutter = ModelCutter(self._fit, broadcast)
        self._user_optimizer = UserOptimizer(self._fit, optimizer)
        cut = partial(self._use_stages, say=True)
        self.steps = CyclicSteps(self._fit, self._user_optimizer, self._status, cutter, cut)
        self._model: CutModel | None = None
        self._untrained: UntrainedParameters | None = None
        self._own_steps: OwnSteps | None = None

    # ---- what can be seen ----------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether it is under way, and not a trial run."""
        return self._progress.active

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self._progress.steps_done

    @property
    def flushed(self) -> bool:
        """Whether this rank holds the newest version of every stage."""
        return self._progress.flushed_at == self._progress.steps_done

    def previous_norm(self) -> float | None:
        """Return the gradient norm of the last step, after a flush; ``None`` where it is not known."""
        norm = self._status.norm_before(self.steps_done)
        return None if norm is None else float(norm)

    # ---- start ---------------------------------------------------------------------------------------------------

    def start(
        self, steps_done: int, stages: Sequence[Stage], previous_norm: float | None, run_began_at: int = 0
    ) -> None:
        """Begin at a step, with the stages of the run that is resumed; without any, the first forward is traced.

        Args:
            steps_done: Optimizer steps done, counted by this Trainer over several fits.
            stages: The stages of the run that is resumed.
            previous_norm: The norm of its last gradient.
            run_began_at: The step at which the run began, with this fit or with the one that it resumes.

        """
        progress = self._progress
        progress.active = True
        progress.steps_done = progress.flushed_at = progress.began_at = self.recorder.step = steps_done
        progress.run_began_at = self.run_began_at = run_began_at
        self._status.saved_norm = previous_norm
        optimizer = self._user_optimizer
        self._untrained = UntrainedParameters(self.module, optimizer.trained())
        self._own_steps = OwnSteps(self.module, optimizer.parameters())
        optimizer.watch(self.steps.before_optimizer)
        if stages and trained.are_of(stages, self.module, optimizer.trained()):
            self._use_stages(stages)
        elif stages:
            step_errors.warn_of_another_cut()

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches in an epoch; infinity where it is not known."""
        urgent = may_differ(self.trainer) or averages_by_own_rule(self.trainer)
        row = RankStatus(batches=batches if math.isfinite(batches) else -1, urgent=urgent)
        with self.agreement.first_error_shown():
            rows = rank_status.exchange(row, self.recorder, self.module.device, Pending.wait)
            rank_status.check_same_batches(rows, WHERE)
        self._ends.needed = any(row.urgent for row in rows)

    def _use_stages(self, stages: Sequence[Stage], *, say: bool = False) -> None:
        model = self._model = cut_model(self._fit, self._groups, self._user_optimizer, self._status, stages)
        self.schedule, self.stages, self.optimizer = model.schedule, model.stages, model.optimizer
        if self._untrained is not None:
            self._untrained.leave_out(each for parameters in model.parameters for each in parameters)
        self.steps.use(model)
        if say:
            in_step = self.run_began_at + self._fit.settings.warmup_sync_steps - self.steps_done
            rank_zero_info(f"{WHERE}: {model.summary(in_step)}")

    # ---- batches and epochs --------------------------------------------------------------------------------------

    def begin_batch(self, number: int) -> None:
        """Count a batch of the fit; called before every one, with its number in the epoch."""
        self._status.batch += 1
        if self._own_steps is not None:
            self._own_steps.look()
        self._ends.begin_batch(self.trainer.current_epoch, number)

    def end_batch(self) -> None:
        """Do what ranks agreed on, if a step is over; called after every batch, before other callbacks."""
        if not self.steps.end_batch():
            return
        if self._model is not None:
            self._model.versions.check_unchanged()
        self._groups.write_held()
        self._status.read()
        for decision in self._status.take_decided():
            if decision.kind in ("terminate", "requeue"):
                self._fit.meet()  # else rank 0 may close the store, in which others still read the reason
            self.on_decision(decision)

    def end_epoch(self) -> None:
        """Wait until all ranks have ended the epoch alike, where that was not certain."""
        self._ends.end_epoch(self.trainer.current_epoch, self.steps_done)
        self._ends.wait(self._fit.poll_failures)

    def compare_places(self, purpose: str) -> None:
        """Compare where ranks are, before messages that would not show it; only where they may differ."""
        if self.active:
            self._ends.meet(purpose, self.steps_done, self._fit.poll_failures)

    def request(self, kind: Kind, reason: str) -> None:
        """Request something that all ranks are to do at the same step."""
        self._requests.ask(kind, reason)

    def keep_random_state(self) -> None:
        """Keep the state of the generators at the end of training, for a checkpoint saved after an evaluation."""
        self.random_state = self.random_state or random_state()

    # ---- meeting -------------------------------------------------------------------------------------------------

    def flush(self, purpose: str) -> None:
        """Use the newest version of every stage, and average what no stage has; on all ranks after the same step.

        Args:
            purpose: The reason, for messages.

        """
        self.steps.refuse_torn()
        self.compare_places(purpose)
        if self._model is None or self.flushed:
            return
        if self.steps.awaits_backward:
            raise step_errors.saved_within_step(self.steps_done)
        self._model.versions.use_newest()
        with self.agreement.first_error_shown():
            status = self._status.newest()
        self._status.check(status)
        self._bring_together()
        self._progress.flushed_at = self.steps_done
        self._model.ring.flushed(self.steps_done)

    def _bring_together(self) -> None:
        """Average what no stage has."""
        with self.agreement.first_error_shown():
            average_buffers(self.module, self.recorder)
            if self._untrained is not None:
                self._untrained.bring_together(self.recorder)
        self.steps.buffers_moved = False

    # ---- end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """End the run: all ranks hold the newest parameters, and nothing is under way."""
        if self._model is not None:
            self.flush(RUN_END)
            if self._model.hand_over.announced:  # a step that no rank takes, such as one whose error the module caught
                self._status.check_left_out()
            if self.steps.buffers_moved:
                self._bring_together()  # forwards without a step after the last one
            with self.agreement.first_error_shown():
                self._model.turns.close()
            self._model.ring.close()
            self._groups.write_held()
        self._end_hooks()

    def leave(self) -> None:
        """Leave the process groups of a run that has ended as it should."""
        self._groups.leave()

    def abandon(self) -> None:
        """Remove the hooks and end the lanes, where the run has not ended as it should."""
        self._end_hooks()
        if self.recorder.world_size > 1:
            # A thread that wakes up while Python shuts down ends the whole process, so none is left waiting.
            self._groups.hang_up()
        if self._model is not None:
            self._model.ring.abandon()
            self._model.turns.abandon()

    def _end_hooks(self) -> None:
        self.steps.close()
        self._user_optimizer.close()
        if self._own_steps is not None:
            self._own_steps.close()
        self._progress.active = False
