"""Private parts of Lightning by which signals and clocks end a run."""

import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Timer,
)
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_info

from lightning_comm.lightning_internals.patches import Internal, Patches

_LOOPS = "lightning.pytorch.loops"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop._TrainingEpochLoop"
_SIGNALS = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"

INTERNALS = (
    Internal(_EPOCH_LOOP, "_broadcast_sigterm_tensor", "a broadcast on every batch, which would couple the ranks"),
    Internal(_SIGNALS, "_sigterm_notifier_fn", "starts a broadcast inside a signal handler"),
    Internal(_SIGNALS, "_slurm_sigusr_handler_fn", "saves inside a signal handler, which is no place for a collective"),
    Internal(_SIGNALS, "received_sigterm", "set on all ranks at once, after the agreement"),
    Internal(_TRAINER, "_signal_connector", "to reach the handlers before they are registered"),
    Internal("lightning.pytorch.callbacks.Timer", "_check_time_remaining", "a broadcast on every batch"),
    Internal("lightning.pytorch.callbacks.Timer", "_duration", "the time limit, in seconds"),
    Internal("lightning.pytorch.callbacks.Timer", "_verbose", "whether it says that time is up"),
)


def leave_out_sigterm_broadcast(trainer: Trainer, patches: Patches) -> None:
    """Remove the broadcast that starts every batch."""
    patches.set(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def replace_signal_handlers(
    trainer: Trainer, patches: Patches, on_sigterm: Callable[[int], None], on_requeue: Callable[[int], None]
) -> Callable[[int, Any], None]:
    """Replace the handlers, before Lightning registers them; return the original of the requeue signal."""
    connector = trainer._signal_connector

    def sigterm(signum: int, _: Any) -> None:
        _say_sigterm(trainer, signum)
        on_sigterm(signum)

    patches.set(connector, "_sigterm_notifier_fn", sigterm)
    original: Callable[[int, Any], None] = patches.set(
        connector, "_slurm_sigusr_handler_fn", lambda signum, _: on_requeue(signum)
    )
    return original


def requeue_signal(strategy: Strategy) -> int:
    """Return the number of the signal by which SLURM announces the end of a job, as Lightning registers it."""
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    own = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
    return int(signal.SIGUSR1 if own is None else own)


def _say_sigterm(trainer: Trainer, signum: int) -> None:
    """Log the first message of Lightning's own handler, which users and their tools look for."""
    signal_connector.log.info(rank_prefixed_message(f"Received SIGTERM: {signum}", trainer.local_rank))


def only_note_sigterm(trainer: Trainer, patches: Patches) -> None:
    """Let SIGTERM end an evaluation on this rank after its batch, without a broadcast inside the signal handler."""
    connector = trainer._signal_connector

    def note(signum: int, _: Any) -> None:
        _say_sigterm(trainer, signum)
        launcher = trainer.strategy.launcher
        if not connector.received_sigterm and launcher is not None:
            launcher.kill(signum)
        connector.received_sigterm = True

    patches.set(connector, "_sigterm_notifier_fn", note)


def raise_sigterm_after_this_batch(trainer: Trainer) -> None:
    """Let Lightning end the run as it does after a SIGTERM."""
    trainer._signal_connector.received_sigterm = True


def replace_timer_check(timer: Timer, patches: Patches, on_time: Callable[[str], None]) -> None:
    """Let a :class:`Timer` (``max_time``) report that time is up instead of broadcasting on every batch."""

    def check(_: Trainer) -> None:
        limit_s = timer._duration
        if limit_s is not None and timer.time_elapsed() >= limit_s:
            on_time(_time_is_up(timer))

    patches.set(timer, "_check_time_remaining", check)


def _time_is_up(timer: Timer) -> str:
    return f"the time limit of {timer._duration or 0:g} s is reached"


def say_time_is_up(trainer: Trainer, reason: str) -> None:
    """Log Lightning's message about a :class:`Timer` that ends a run, if that is why all ranks stop."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, Timer) and callback._verbose and reason.endswith(_time_is_up(callback)):
            elapsed = timedelta(seconds=int(callback.time_elapsed(RunningStage.TRAINING)))
            rank_zero_info(f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop.")
