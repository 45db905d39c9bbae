"""Stops and saves that one rank asks for.

Plain Lightning decides these by a broadcast on every batch, or leaves them to each rank. Here they become requests.
Ranks that train apart agree on them without a collective (:mod:`lightning_comm.transport.stop_protocol`), ranks in step
by a message at the end of every batch (:mod:`lightning_comm.strategies.compression.run`).
"""

import os
from collections.abc import Callable
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_comm import lightning_internals
from lightning_comm.ondevice.random_state import random_state, set_random_state
from lightning_comm.transport.stop_protocol import Decision, Kind


class Stoppable(Protocol):
    """A run whose ranks agree on requests."""

    on_decision: Callable[[Decision], None]

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        ...

    def request(self, kind: Kind, reason: str) -> None:
        """Ask for something that all ranks are to do."""

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches in an epoch."""


class InStep(Protocol):
    """A run whose ranks agree on requests in a message: at the end of every batch, and around every epoch."""

    def after_batch(self, end_of_batch: Callable[[], None]) -> None:
        """Meet at the end of a batch; the argument is Lightning's end of it."""

    def around_epoch_start(self, start: Callable[[], None]) -> None:
        """Meet at the start of an epoch; the argument is Lightning's start of it."""

    def around_epoch_end(self, end: Callable[[], None]) -> None:
        """Meet at the end of an epoch; the argument is Lightning's end of it."""


class Interruptions:
    """Turns the stops of one ``fit`` into requests, and agreed requests into what Lightning does for a stop.

    Args:
        trainer: The Trainer.
        run: Where steps are counted.
        any_rank: Whether this is true on any rank; a collective, used only right after another one.
        where: The strategy, for messages.

    """

    def __init__(self, trainer: Trainer, run: Stoppable, any_rank: Callable[[bool], bool], where: str) -> None:
        self._trainer = trainer
        self._run = run
        self._where = where
        self._any_rank = any_rank
        self.patches = lightning_internals.Patches()  # what is replaced in Lightning until the run ends
        self._save_now = self._validate_now = False
        self._validation_asked = False
        self._stop_is_agreed = False
        self._terminating = False
        self._validated: dict[str, object] | None = None
        self.met = False  # whether a collective of Lightning's or of the user's ran since the last batch began
        run.on_decision = self.carry_out

    def install_signal_handlers(self) -> None:
        """Replace what Lightning is about to register as signal handlers."""
        self._requeue = lightning_internals.replace_signal_handlers(
            self._trainer, self.patches, self._on_sigterm, self._on_requeue
        )

    def install(self, after_save: Callable[[], None] | None = None, in_step: InStep | None = None) -> None:
        """Take the per-batch collectives out of the loops and callbacks of this run.

        Args:
            after_save: Called after every ``Trainer.save_checkpoint``, also where a hook made it fail.
            in_step: The run, if its ranks are in step; ``None`` where they train apart.

        """
        trainer, patches = self._trainer, self.patches
        if after_save is not None:
            lightning_internals.wrap_saves(trainer, patches, after_save)
        lightning_internals.leave_out_sigterm_broadcast(trainer, patches)
        lightning_internals.replace_links(trainer, patches)
        if in_step is not None:
            self._meet_in_step(in_step)
        else:
            lightning_internals.wrap_loop_ends(trainer, patches, self._after_batch, self._around_epoch)
            lightning_internals.wrap_skipped_validation(trainer, patches, _without_drawing)
            self.met = True  # all ranks start together, so they agree now on a stop asked for in `on_train_start`
            self._settle_stop()
        lightning_internals.replace_timed_validation(trainer, patches, agreed=lambda: self._validate_now)
        for callback in getattr(trainer, "callbacks", []):
            if isinstance(callback, Timer):
                lightning_internals.replace_timer_check(callback, patches, lambda why: self._run.request("stop", why))
            elif isinstance(callback, ModelCheckpoint):
                lightning_internals.replace_timed_checkpoint(
                    callback,
                    patches,
                    on_time=lambda: self._run.request("checkpoint", "the time for a checkpoint has come"),
                    agreed=lambda: self._save_now,
                )

    def _meet_in_step(self, in_step: InStep) -> None:
        def after_batch(end_of_batch: Callable[[], None]) -> None:
            self.begin_batch()  # an agreed checkpoint has been saved by now, in the hooks at the end of this batch
            self._ask_for_validation()
            in_step.after_batch(end_of_batch)

        lightning_internals.wrap_loop_ends(
            self._trainer, self.patches, after_batch, in_step.around_epoch_start, in_step.around_epoch_end
        )

    def before_validation(self, call: Callable[[], None]) -> None:
        """Call a function before each validation, until this is undone."""
        lightning_internals.before_validation(self._trainer, self.patches, call)

    def undo(self) -> None:
        """Leave Lightning's objects as they were."""
        self.patches.undo()

    def note_met(self) -> None:
        """Note that all ranks meet in a collective of Lightning's or of the user's."""
        self.met = True

    def begin_batch(self) -> None:
        """Forget that ranks met, and what was agreed for a batch; called before every one."""
        self.met = self._save_now = self._validate_now = False

    def remember_random_state(self) -> None:
        """Note the generators when validation starts, which draws from them."""
        self._validated = random_state()

    def carry_out(self, decision: Decision) -> None:
        """Do what all ranks agreed on; every rank is here, after the same step unless ``at_step`` is ``None``."""
        step = self._run.steps_done
        if decision.kind == "checkpoint":
            self._save_now = True
            return
        if decision.kind == "validate":
            self._validate_now, self._validation_asked = True, False
            return
        where = f"at step {step}" if decision.at_step is not None else "where each rank stands"
        if decision.kind == "stop":
            lightning_internals.say_time_is_up(self._trainer, decision.reason)
        rank_zero_info(f"{self._where}: {decision.reason}; all ranks agreed to {decision.kind} {where}.")
        if decision.kind == "stop":
            self._stop_is_agreed = True
            self._trainer.should_stop = True
        elif decision.kind == "terminate":
            self._save_before_termination(step)
            lightning_internals.raise_sigterm_after_this_batch(self._trainer)
        else:
            self._requeue(lightning_internals.requeue_signal(self._trainer.strategy), None)

    def _ask_for_validation(self) -> None:
        """Ask all ranks to validate, once, when the time has come on the clock of rank 0."""
        if (
            self._trainer.is_global_zero
            and not self._validation_asked
            and lightning_internals.validation_is_due(self._trainer)
        ):
            self._validation_asked = True
            self._run.request("validate", "the time for a validation has come")

    def _after_batch(self, end_of_batch: Callable[[], None]) -> None:
        self._settle_stop()
        before = torch.get_rng_state() if self._trainer.enable_validation else None
        end_of_batch()
        validated, self._validated = self._validated, None
        if validated is not None and before is not None:
            # Validation draws random numbers, if only to start its loader. Training goes on as without it.
            set_random_state(validated | {"torch": before})
        self._ask_for_validation()
        self._settle_stop()

    def _around_epoch(self, start_or_end: Callable[[], None]) -> None:
        start_or_end()
        if getattr(self._trainer, "reload_dataloaders_every_n_epochs", 0):
            self._run.check_start(float(self._trainer.num_training_batches))
        self._settle_stop()

    def _settle_stop(self) -> None:
        """Keep a rank from leaving the loop alone because of its own ``should_stop``."""
        if self._stop_is_agreed and self._trainer.should_stop:
            return
        self._stop_is_agreed = False
        if self.met:
            # All ranks have just been in a collective, validation or a checkpoint, so they can agree here.
            self._trainer.should_stop = self._stop_is_agreed = self._any_rank(self._trainer.should_stop)
            self.met = False
        elif self._trainer.should_stop:
            self._trainer.should_stop = False
            self._run.request("stop", "`Trainer.should_stop` was set")

    def _on_sigterm(self, signum: int) -> None:
        """Handle SIGTERM: pass it on to the processes that this one launched, once, and ask for the end."""
        if self._terminating:
            return
        self._terminating = True
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        self._run.request("terminate", f"received signal {int(signum)}")

    def _on_requeue(self, signum: int) -> None:
        self._run.request("requeue", f"SLURM announced the end of the job by signal {int(signum)}")

    def _save_before_termination(self, step: int) -> None:
        callback = self._trainer.checkpoint_callback
        folder = getattr(callback, "dirpath", None)
        if not folder or getattr(self._trainer, "fast_dev_run", False):
            rank_zero_warn(f"{self._where}: no ModelCheckpoint is configured, so nothing is saved before the end.")
            return
        path = os.path.join(folder, f"last-terminated-step={step}.ckpt")
        self._trainer.save_checkpoint(path)
        rank_zero_info(f"{self._where}: saved {path}; resume with `ckpt_path={path!r}` or `ckpt_path='last'`.")


def _without_drawing(call: Callable[[], None]) -> None:
    before = torch.get_rng_state()
    call()
    torch.set_rng_state(before)
