"""The hooks of a ``fit`` under local updates, which the hook callback calls."""

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_comm.lightning_internals import ends_training, number_of_logged_metrics
from lightning_comm.strategies.common.checks import warn_of_per_step_sync
from lightning_comm.strategies.common.hooks import FitHooks
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.unregistered import UnregisteredState
from lightning_comm.strategies.local_update import checks
from lightning_comm.strategies.local_update.checkpoint import WHERE
from lightning_comm.strategies.local_update.run import LocalUpdateRun


class LocalUpdateHooks:
    """The hooks of one ``fit``.

    Args:
        trainer: The Trainer.
        run: The run.
        interruptions: Its stops.

    """

    def __init__(self, trainer: Trainer, run: LocalUpdateRun, interruptions: Interruptions) -> None:
        self._trainer = trainer
        self._run = run
        self._interruptions = interruptions
        self._logs_checked = 0  # how many values had been logged at the last check
        self._unregistered: UnregisteredState | None = None
        self.hooks = FitHooks(self._end_batch, self._end_epoch, self._begin_evaluation, run.finish, self._note_failure)

    def begin_training(self) -> None:
        """Begin to watch tensors that module and callbacks keep beside parameters and buffers."""
        self._unregistered = UnregisteredState(WHERE, self._trainer, self._trainer.lightning_module)

    def _end_batch(self) -> None:
        logged = number_of_logged_metrics(self._trainer)
        if logged > self._logs_checked:
            self._logs_checked = logged
            warn_of_per_step_sync(self._trainer, WHERE)
        rounds = self._run.rounds.done
        self._run.end_batch()
        if self._run.active and ends_training(self._trainer):
            self._run.end_epoch(in_batch=True)  # here, since it ends with a validation
        if self._unregistered is not None and (self._run.rounds.done > rounds or self._unregistered.is_new):
            self._unregistered.look()

    def _end_epoch(self) -> None:
        if self._run.active:
            self._run.end_epoch()  # where the last batch was not known to be the last
        checks.warn_of_uncounted_steps(self._run.clock.steps_done)
        if self._trainer.num_training_batches == float("inf"):
            self._run.meet_at_epoch_end()

    def _begin_evaluation(self) -> None:
        """Put averaged weights in place when validation starts."""
        run, trainer = self._run, self._trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        averages = run.settings.evaluate_weights == "average"
        self._interruptions.remember_random_state()
        self._interruptions.met |= run.rounds.apart and averages
        run.compare_places("a validation")
        if averages:
            run.mid_round.enter_evaluation()

    def _note_failure(self) -> None:
        self._run.mid_round.weights.leave()
        self._run.failed = True
