"""The support that each strategy holds: set-up, failures, collectives, stops, and the files that a run resumes from.

Lightning needs its methods on the strategy itself, so each strategy derives from one of Lightning's. Its methods call
this object, with Lightning's own method as an argument. So one class serves strategies over different base classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_comm.contract import MessagesRecorded
from lightning_comm.core.ledger import CommLedger
from lightning_comm.lightning_internals import (
    begin_loaders_again,
    close_finished_epoch,
)
from lightning_comm.ondevice.random_state import set_random_state
from lightning_comm.strategies.checkpoints import removal
from lightning_comm.strategies.checkpoints.loading import load_together
from lightning_comm.strategies.common.checks import check_twin_callbacks
from lightning_comm.strategies.common.collectives import LightningCollectives
from lightning_comm.strategies.common.failures import RunFailures
from lightning_comm.strategies.common.hooks import FitHooks, HookCallback
from lightning_comm.strategies.common.interruptions import Interruptions, Stoppable
from lightning_comm.strategies.common.plateau import PlateauMonitors
from lightning_comm.strategies.common.set_up import RunSetUp
from lightning_comm.transport.group_ends import leave_group_at_exit
from lightning_comm.transport.plain_data import broadcast_json
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import Agreement


class Run(Protocol):
    """One ``fit``, as checkpoints see it."""

    @property
    def module(self) -> LightningModule:
        """The model that it trains, or has trained."""


class Loaded(NamedTuple):
    """A main file that was loaded.

    Args:
        path: Of the file, which may differ from the one requested.
        checkpoint: Its content.
        begins_fit: Whether a ``fit`` goes on from it, before its set-up; not for a tuner within ``fit``, which restores
            what it has changed.

    """

    path: _PATH
    checkpoint: dict[str, Any]
    begins_fit: bool


class RunSupport:
    """The parts of a strategy that do its work beside Lightning's own, from its construction on.

    Args:
        strategy: The strategy that holds this.
        where: Its name, for messages.

    Attributes:
        trainer: The Trainer, from ``connect`` on.
        failures: How ranks learn of failures.
        collectives: The wrapper around Lightning's collectives.
        interruptions: The stops of the ``fit`` under way; ``None`` outside of one.
        set_up: The wrapper around Lightning's set-up.
        hooks: What the ``fit`` does where Lightning calls no strategy.

    """

    def __init__(self, strategy: DDPStrategy | ModelParallelStrategy, where: str) -> None:
        self._strategy = strategy
        self._where = where
        self.trainer: Trainer | None = None
        self.failures = RunFailures(strategy, where)
        self.collectives = LightningCollectives(self.failures)
        self.interruptions: Interruptions | None = None
        self.hooks = FitHooks()
        self.set_up = RunSetUp(strategy, where, self.failures)

    # ---- the beginning -------------------------------------------------------------------------------------------

    def connect(self, trainer: Trainer) -> bool:
        """Put the hook callback at the head of the Trainer's callbacks; return whether a ``fit`` begins.

        Raises:
            MisconfigurationException: If a callback comes from the twin package.

        """
        self.trainer = self.collectives.trainer = trainer
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        check_twin_callbacks(callbacks, self._where)
        hook = HookCallback(self)
        callbacks[:] = [hook, *(callback for callback in callbacks if not isinstance(callback, HookCallback))]
        if not self.is_fit:
            return False
        self.hooks = FitHooks()
        self.collectives.forget_fit()
        return True

    @property
    def is_fit(self) -> bool:
        """Whether the Trainer runs a ``fit``, or ran one last."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    @property
    def interrupted(self) -> bool:
        """Whether a rank has failed, so that no collective would end."""
        return self.trainer is not None and bool(self.trainer.interrupted)

    def begin_run(self) -> None:
        """Watch the other ranks, in ``setup_environment``."""
        leave_group_at_exit()
        self.failures.begin(lambda: 0 if self.trainer is None else self.trainer.global_step)

    def begin_fit(self, trainer: Trainer, run: Stoppable) -> Interruptions:
        """Turn the stops of a ``fit`` into requests, before Lightning registers its signal handlers."""
        self.interruptions = Interruptions(trainer, run, self._any_rank, self._where)
        self.collectives.note_met = self.interruptions.note_met
        self.interruptions.install_signal_handlers()
        return self.interruptions

    def watch_plateaus(
        self, recorder: Recorder, agreement: Agreement, before: Callable[[], None] = lambda: None
    ) -> None:
        """Give schedulers that watch a value the same one on all ranks.

        Args:
            recorder: Sends and records.
            agreement: How ranks learn of failures.
            before: Called before each message.

        """
        assert self.trainer is not None
        assert self.interruptions is not None
        patches, device = self.interruptions.patches, self._strategy.root_device
        PlateauMonitors(self.trainer, patches, recorder, agreement, device, self._where, before)

    # ---- messages of its own -------------------------------------------------------------------------------------

    @property
    def _ledger(self) -> CommLedger:
        assert isinstance(self._strategy, MessagesRecorded)
        return self._strategy.ledger

    def own_recorder(self) -> Recorder:
        """Return a recorder for the few messages that belong to no step."""
        recorder = Recorder(self._ledger)
        recorder.step = 0 if self.trainer is None else self.trainer.global_step
        return recorder

    def meet_before_groups(self, by_lightning: Callable[[], None]) -> None:
        """Wait for all ranks before process groups are made, during which a failure of another would not be heard."""

        def meet() -> None:
            self.own_recorder().sent_by_others("barrier", "set_up", 0, by_lightning)

        self.collectives.together(meet, None, "the set-up")

    def from_rank_0(self, value: Any) -> Any:
        """Return rank 0's value on all ranks, in plain types, for a save: two broadcasts."""
        self.collectives.compare_places("a broadcast")

        def send() -> Any:
            return broadcast_json(value, self.own_recorder(), self._strategy.root_device, "checkpoint_files")

        return self.collectives.together(send, value, "a broadcast")

    def _any_rank(self, vote: bool) -> bool:
        """Whether this is true on any rank: one all-reduce of 8 bytes, right after another message of all ranks."""
        self.collectives.compare_places("a common decision, as before a checkpoint")
        votes = torch.tensor(int(vote), device=self._strategy.root_device)

        def any_vote() -> bool:
            self.own_recorder().all_reduce(votes, "stops").wait()
            return bool(votes)

        return self.collectives.together(any_vote, vote, "a common decision")

    # ---- the end -------------------------------------------------------------------------------------------------

    def report_failure(self, exception: BaseException) -> None:
        """Tell the others that this rank ends by an exception, without a collective."""
        self.hooks.note_failure()
        self.collectives.forget_fit()
        if isinstance(exception, SIGTERMException):
            if self.trainer is None or self.is_fit:
                self.failures.part()
                return
            # an evaluation ends on each rank separately, since ranks may have different numbers of batches
            exception = InterruptedError("it was ended by SIGTERM")
        self.failures.report(exception)

    def tear_down(self, leave_fit: Callable[[], None], by_lightning: Callable[[], None]) -> None:
        """Leave Lightning's objects as they were, and end the watch.

        Args:
            leave_fit: Leaves the strategy's own part of a ``fit``.
            by_lightning: Lightning's teardown.

        """
        if self.interruptions is not None:
            self.interruptions.undo()
            self.interruptions = None
        leave_fit()
        self.set_up.undo()
        try:
            by_lightning()
        except BaseException:
            self.failures.note_failed()
            raise
        finally:
            self.failures.end()

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def has_fitted(self, run: Run | None) -> bool:
        """Whether a run of this same model is under way, or has ended, and its ranks are still joined."""
        return run is not None and run.module is self._strategy.lightning_module and dist.is_initialized()

    def remove_checkpoint(self, filepath: _PATH, by_lightning: Callable[[], None]) -> None:
        """Remove a checkpoint with the files of its ranks, unless its replacement is incomplete."""
        if not self.interrupted:
            removal.remove(self._strategy, filepath, by_lightning)

    def load_checkpoint(
        self, filepath: _PATH, by_lightning: Callable[[_PATH], dict[str, Any]], *, in_set_up: bool
    ) -> Loaded:
        """Load the main file on all ranks, or refuse it on all of them.

        Args:
            filepath: Of the main file.
            by_lightning: Lightning's way to load it.
            in_set_up: For ``fit``: whether this is before the strategy's set-up.

        """
        module = self._strategy.lightning_module
        trainer = module.trainer if module is not None else None
        begins_fit = in_set_up and trainer is not None and trainer.state.fn == TrainerFn.FITTING

        def load(path: _PATH) -> dict[str, Any]:
            checkpoint = by_lightning(path)
            if begins_fit:
                close_finished_epoch(checkpoint.get("loops"))  # also where another strategy wrote it
            return checkpoint

        path, checkpoint = load_together(
            self._strategy,
            self._where,
            filepath,
            load,
            self.failures.refuse_together,
            in_set_up=in_set_up,
            ledger=self._ledger,
        )
        return Loaded(path, checkpoint, begins_fit)

    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        return {**vars(self), "trainer": None, "interruptions": None, "hooks": FitHooks()}


def restore_random_state(trainer: Trainer, state: dict[str, Any], *, epoch_is_over: bool) -> None:
    """Restore the generators of a rank: last of all at a start, since what comes before may draw from them.

    Args:
        trainer: The Trainer.
        state: Of the generators, as they were saved.
        epoch_is_over: Whether they were saved at the end of an epoch, so that its next pass is begun again.

    """
    set_random_state(state)
    if epoch_is_over:
        begin_loaders_again(trainer)
