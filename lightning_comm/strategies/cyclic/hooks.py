"""The hooks of a ``fit`` under Cyclic Data Parallelism, which the hook callback calls, and the flushes there."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_comm.lightning_internals import (
    Patches,
    before_weight_averages,
    clip_what_is_there,
    number_of_logged_metrics,
)
from lightning_comm.strategies.common.checks import warn_of_per_step_sync
from lightning_comm.strategies.common.hooks import FitHooks
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.unregistered import UnregisteredState
from lightning_comm.strategies.cyclic.averages import WeightAverages
from lightning_comm.strategies.cyclic.run import RUN_END, CyclicRun
from lightning_comm.strategies.cyclic.settings import WHERE


class CyclicHooks:
    """The hooks of one ``fit``.

    Args:
        trainer: The Trainer.
        run: The run.
        interruptions: Its stops.

    """

    def __init__(self, trainer: Trainer, run: CyclicRun, interruptions: Interruptions) -> None:
        self._trainer = trainer
        self._run = run
        self._interruptions = interruptions
        self._patches = Patches()
        self._averages = WeightAverages()
        self._logs_checked = 0  # how many values had been logged at the last check
        self._unregistered: UnregisteredState | None = None
        self.hooks = FitHooks(
            self._end_batch, self._end_epoch, self._begin_evaluation, self._finish, self._note_failure
        )

    def begin_training(self) -> None:
        """Flush before validations and averages of weights, from now on; when training starts."""
        self._averages = WeightAverages()
        self._unregistered = UnregisteredState(WHERE, self._trainer, self._run.module)
        self._interruptions.before_validation(self._begin_evaluation)
        clip_what_is_there(self._trainer, self._patches)
        before_weight_averages(self._trainer, self._patches, self._before_average)

    def undo(self) -> None:
        """Leave Lightning's objects as they were."""
        self._patches.undo()

    def flush(self, purpose: str) -> None:
        """Let all ranks use the newest version of every stage, if the run goes on."""
        run = self._run
        if run.active:
            newest = run.flushed
            run.flush(purpose)
            if self._unregistered is not None and not newest:
                self._unregistered.look()

    def _end_batch(self) -> None:
        logged = number_of_logged_metrics(self._trainer)
        if logged > self._logs_checked:
            self._logs_checked = logged
            warn_of_per_step_sync(self._trainer, WHERE)
        self._run.end_batch()
        if self._run.active and self._trainer.is_last_batch:
            self._run.end_epoch()  # here, since it ends with a validation
        if self._unregistered is not None and self._unregistered.is_new:
            self._unregistered.look()

    def _end_epoch(self) -> None:
        if self._run.active:
            self._run.end_epoch()  # where the last batch was not known to be the last

    def _begin_evaluation(self) -> None:
        """Let all ranks use the newest parameters when validation starts."""
        if self._trainer.state.fn != TrainerFn.FITTING or self._trainer.sanity_checking:
            return
        self._interruptions.remember_random_state()
        self._interruptions.met |= not self._run.flushed
        self.flush("a validation")

    def _finish(self) -> None:
        self.flush(RUN_END)
        self._run.finish()

    def _note_failure(self) -> None:
        self._run.failed = True

    def _before_average(self, callback: Callback) -> None:
        """Use the newest parameters for an average of weights: one version, the same on all ranks."""
        run = self._run
        if run.active:
            self._averages.count(callback, run.steps_done)
            with self._averages.explained(callback, run.steps_done):
                self.flush(f"an update of the average of {type(callback).__name__}")
