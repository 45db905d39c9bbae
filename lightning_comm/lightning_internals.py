"""Every private part of Lightning and of torch that this package touches, in one place.

Lightning offers no public way to leave out the collectives that it issues on each batch. What we do instead is to
replace a few methods on the *instances* of one run, and to put them back when the run ends. ``INTERNALS`` lists each
name with the reason; a test looks each of them up, so a release that removes one fails by that name.
"""

import importlib
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, cast

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.core import optimizer as optimizer_parsing
from lightning.pytorch.loops.optimization.closure import AbstractClosure
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_prefixed_message, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_comm.core.whole_files import partial_path
from lightning_comm.data.resumable import ResumedEpoch, find_resumed_epoch_by


@dataclass(frozen=True)
class Internal:
    """A private name of Lightning or of torch.

    Args:
        owner: Module and class, or function, as one dotted path.
        name: The attribute: of the class, or one that its methods or the function set.
        why: What we need it for.

    """

    owner: str
    name: str
    why: str

    def find_owner(self) -> Any:
        """Import and return the class or function."""
        module, _, name = self.owner.rpartition(".")
        return getattr(importlib.import_module(module), name)


_LOOPS = "lightning.pytorch.loops"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop._TrainingEpochLoop"
_FIT_LOOP = f"{_LOOPS}.fit_loop._FitLoop"
_EVALUATION_LOOP = f"{_LOOPS}.evaluation_loop._EvaluationLoop"
_COMBINED_LOADER = "lightning.pytorch.utilities.combined_loader"
_SIGNALS = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"
_DDP = "lightning.pytorch.strategies.DDPStrategy"
_SETUP = "lightning.pytorch.trainer.setup._init_debugging_flags"
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_SWA = "lightning.pytorch.callbacks.StochasticWeightAveraging"
_ASYNC_IO = "lightning.pytorch.plugins.io.AsyncCheckpointIO"

INTERNALS = (
    Internal("torch.optim.Adam", "_step_supports_amp_scaling", "whether a call of `step` is one, under a scaler"),
    Internal("torch.amp.GradScaler", "_get_scale_async", "whether the scale may have changed, without a read of it"),
    Internal(_FIT_LOOP, "epoch_progress", "saved half-counted at the end of an epoch, and mended before it is read"),
    Internal(_EPOCH_LOOP, "batch_progress", "the same for the batches of that epoch"),
    Internal(_EPOCH_LOOP, "_broadcast_sigterm_tensor", "a broadcast on every batch, which would couple the ranks"),
    Internal(_EPOCH_LOOP, "on_advance_end", "the last place before a rank leaves the loop on its own `should_stop`"),
    Internal(_EPOCH_LOOP, "_num_ready_batches_reached", "whether a batch is the last of its epoch, with every limit"),
    Internal(_EPOCH_LOOP, "max_steps", "a pilot ends a run early, whose schedule must stay that of the whole run"),
    Internal(_FIT_LOOP, "on_advance_start", "the same at the start of an epoch"),
    Internal(_FIT_LOOP, "on_advance_end", "the same at the end of an epoch"),
    Internal(_EVALUATION_LOOP, "on_run_start", "a module may merge weights when it is told that it evaluates"),
    Internal(_EVALUATION_LOOP, "increment_progress_to_evaluation_end", "draws random numbers in a resumed run"),
    Internal(
        "lightning.pytorch.core.optimizer", "_configure_optimizers", "its KeyError is a dictionary without an optimizer"
    ),
    Internal(_FIT_LOOP, "_data_source", "whether `fit` was handed its loaders, so that they are known at set-up"),
    Internal(
        "lightning.fabric.utilities.distributed._DatasetSamplerWrapper", "_sampler", "the user's, in Lightning's own"
    ),
    Internal(_FIT_LOOP, "_combined_loader", "to see whether a loader has a state of its own"),
    Internal(_FIT_LOOP, "_data_fetcher", "made before the random state is restored, so it is begun again"),
    Internal(_FIT_LOOP, "_load_combined_loader_states", "skipped where `configure_optimizers` loads the data first"),
    Internal(_FIT_LOOP, "_combined_loader_states_to_load", "what it would have handed over, and has not"),
    Internal(f"{_COMBINED_LOADER}._ModeIterator", "_idx", "how many batches of a pass have been handed out"),
    Internal(_EPOCH_LOOP, "restarted_on_train_batch_end", "a batch that is counted only as the resumed loop begins"),
    Internal(_EPOCH_LOOP, "_batches_that_stepped", "the axis on which Lightning logs everything"),
    Internal(_EPOCH_LOOP, "_should_accumulate", "metrics of a batch that only accumulates are not logged"),
    Internal(_TRAINER, "_logger_connector", "whether the metrics of this batch are logged"),
    Internal(_SIGNALS, "_sigterm_notifier_fn", "starts a broadcast inside a signal handler"),
    Internal(_SIGNALS, "_slurm_sigusr_handler_fn", "saves inside a signal handler, which is no place for a collective"),
    Internal(_SIGNALS, "received_sigterm", "set on all ranks at once, after the agreement"),
    Internal(_TRAINER, "_signal_connector", "to reach the handlers before they are registered"),
    Internal(_SETUP, "_val_check_time_interval", "how often validation runs, where that is a time"),
    Internal(_FIT_LOOP, "_last_val_time", "since when that time counts; each rank has its own"),
    Internal(_EPOCH_LOOP, "_get_monitor_value", "each rank's ReduceLROnPlateau would watch a value of its own"),
    Internal(_EPOCH_LOOP, "_should_check_val_fx", "each rank's own clock would start validation"),
    Internal(_EPOCH_LOOP, "_should_check_val_epoch", "whether this epoch validates at all"),
    Internal(_TRAINER, "_results", "per-step `sync_dist` logs, unsynchronised monitors and a logged `step`, by name"),
    Internal("lightning.pytorch.callbacks.Timer", "_check_time_remaining", "a broadcast on every batch"),
    Internal("lightning.pytorch.callbacks.Timer", "_duration", "the time limit, in seconds"),
    Internal("lightning.pytorch.callbacks.Timer", "_verbose", "whether it says that time is up"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_train_time_interval", "a broadcast on every batch"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_last_time_checked", "to make the agreed save happen"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_link_checkpoint", "takes the old link away first"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_every_n_train_steps", "how often it will save, foretold"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_every_n_epochs", "the same"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_should_save_on_train_epoch_end", "the same"),
    Internal("lightning.pytorch.callbacks.WeightAveraging", "_average_model", "averaged together with the weights"),
    Internal("torch.optim.swa_utils.AveragedModel", "update_parameters", "when it takes the weights"),
    Internal(_SWA, "update_parameters", "the same"),
    Internal(_SWA, "transfer_weights", "when the average takes the place of the weights"),
    Internal("lightning.pytorch.plugins.precision.Precision", "clip_gradients", "gradients may be elsewhere by then"),
    Internal(_DDP, "configure_ddp", "where the model is wrapped, or not"),
    Internal(_DDP, "_model_averaging_period", "parameters averaged over ranks alike, whatever their samples"),
    Internal(_DDP, "_timeout", "how long messages on further process groups wait"),
    Internal(_DDP, "_ddp_kwargs", "arguments of the DDP wrapper of the gradient phase"),
    Internal(
        "lightning.pytorch.strategies.Strategy", "_checkpoint_io", "files are written whole where nobody says how"
    ),
    Internal("lightning.pytorch.plugins.io.wrapper._WrappingCheckpointIO", "checkpoint_io", "what it writes with"),
    Internal(_ASYNC_IO, "_executor", "an old checkpoint goes only when the new one, which waits here, is written"),
    Internal(_ASYNC_IO, "_error", "and not at all if it could not be written"),
    Internal(
        "lightning.pytorch.strategies.ParallelStrategy",
        "_layer_sync",
        "`Trainer(sync_batchnorm=True)`, which is refused",
    ),
    Internal(
        "torch.nn.parallel.DistributedDataParallel",
        "_build_params_for_reducer",
        "the order in which DDP numbers parameters",
    ),
    Internal("torch.nn.parallel.DistributedDataParallel", "_comm_hooks", "whether DDP makes means by itself"),
    Internal(
        "torch._C._distributed_c10d.Reducer",
        "_get_local_used_map",
        "how many ranks have used each of them, and so whose gradients DDP throws away",
    ),
    Internal(
        "torch.autograd",
        "_unsafe_preserve_version_counter",
        "weights that are put aside for a checkpoint and back, between forward and backward, have not changed",
    ),
)


class Patches:
    """Attributes replaced on instances, to be put back by :meth:`undo`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[object, str, bool, Any]] = []

    def set(self, owner: object, name: str, value: Any) -> Any:
        """Replace an attribute of an instance and return what was there."""
        before = getattr(owner, name)
        self._replaced.append((owner, name, name in vars(owner), before))
        setattr(owner, name, value)
        return before

    def undo(self) -> None:
        """Put everything back as it was, last first."""
        while self._replaced:
            owner, name, own, before = self._replaced.pop()
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders of a training epoch, each on its own."""
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def given_training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that ``fit`` was handed, each on its own; none where a module makes them, later."""
    source = trainer.fit_loop._data_source
    if source.instance is None or source.is_module():
        return []
    given = source.instance
    return list((given if isinstance(given, CombinedLoader) else CombinedLoader(given)).flattened)


def wrapped_sampler(sampler: object) -> object:
    """Return the user's sampler in one that Lightning has put around it, to give each rank its part; or as it is."""
    if not isinstance(sampler, DistributedSamplerWrapper):
        return sampler
    within: Any = sampler.dataset
    return cast(object, within._sampler)


def accumulates(trainer: Trainer) -> bool:
    """Return whether some batches of a run end without an optimizer step."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return trainer.accumulate_grad_batches > 1 or any(isinstance(x, GradientAccumulationScheduler) for x in callbacks)


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the present training batch is the last one of its epoch, whatever limits that."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def batches_begun(trainer: Trainer) -> int:
    """Return how many training batches have begun in all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def batches_of_epoch(trainer: Trainer) -> int:
    """Return how many training batches have begun in the present epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def leave_out_sigterm_broadcast(trainer: Trainer, patches: Patches) -> None:
    """Remove the broadcast that starts every batch."""
    patches.set(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def wrap_loop_ends(
    trainer: Trainer,
    patches: Patches,
    after_batch: Callable[[Callable[[], None]], None],
    around_epoch: Callable[[Callable[[], None]], None],
    around_epoch_end: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Hand the end of every batch (where validation runs) and both ends of every epoch to functions that call it.

    Args:
        trainer: The Trainer.
        patches: Where the originals are kept.
        after_batch: For the end of every batch.
        around_epoch: For both ends of every epoch.
        around_epoch_end: For its end, if that is another one.

    """

    def batch(data_fetcher: Any) -> None:
        after_batch(lambda: end_of_batch(data_fetcher))

    def epoch_start() -> None:
        around_epoch(start_of_epoch)

    def epoch_end() -> None:
        (around_epoch_end or around_epoch)(end_of_epoch)

    end_of_batch: Callable[[Any], None] = patches.set(trainer.fit_loop.epoch_loop, "on_advance_end", batch)
    start_of_epoch: Callable[[], None] = patches.set(trainer.fit_loop, "on_advance_start", epoch_start)
    end_of_epoch: Callable[[], None] = patches.set(trainer.fit_loop, "on_advance_end", epoch_end)


def wrap_saves(trainer: Trainer, patches: Patches, afterwards: Callable[[], None]) -> None:
    """Call a function after every ``save_checkpoint`` of the Trainer, also where a hook or the file made it fail."""

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        finally:
            afterwards()

    original: Callable[..., None] = patches.set(trainer, "save_checkpoint", save)


def wrap_skipped_validation(trainer: Trainer, patches: Patches, around: Callable[[Callable[[], None]], None]) -> None:
    """Hand the moment at which a resumed run skips a validation to a function that calls the original."""
    loop = trainer.fit_loop.epoch_loop.val_loop

    def skip() -> None:
        around(original)

    original: Callable[[], None] = patches.set(loop, "increment_progress_to_evaluation_end", skip)


def before_validation(trainer: Trainer, patches: Patches, call: Callable[[], None]) -> None:
    """Call a function before a validation within ``fit``, when the module has not yet been told that it evaluates."""

    def start() -> None:
        call()
        original()

    original: Callable[[], None] = patches.set(trainer.fit_loop.epoch_loop.val_loop, "on_run_start", start)


def clip_what_is_there(trainer: Trainer, patches: Patches) -> None:
    """Leave Lightning's own clipping out where an optimizer has no gradients, at which torch fails by value."""
    precision = trainer.precision_plugin

    def clip(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if any(parameter.grad is not None for parameter in precision.main_params(optimizer)):
            original(optimizer, *args, **kwargs)

    original: Callable[..., None] = patches.set(precision, "clip_gradients", clip)


def end_after_this_step(trainer: Trainer) -> None:
    """Let training end as if ``max_steps`` were reached, which until now kept the value that schedules rest on."""
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def begin_loaders_again(trainer: Trainer) -> None:
    """Begin the pass through the training data again, where no loader has a state that this would use up.

    A loader of torch draws from the random state when a pass begins. Lightning begins the first pass before the state
    can be restored.
    """
    loader, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if loader is not None and fetcher is not None and not any(hasattr(each, "state_dict") for each in loader.flattened):
        iter(fetcher)


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
    """Say what Lightning's own handler says first, where users and their tools look for it."""
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
    """Say what Lightning says where a :class:`Timer` ends a run, if that is the reason for which all ranks stop."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, Timer) and callback._verbose and reason.endswith(_time_is_up(callback)):
            elapsed = timedelta(seconds=int(callback.time_elapsed(RunningStage.TRAINING)))
            rank_zero_info(f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop.")


def replace_timed_checkpoint(
    callback: ModelCheckpoint, patches: Patches, on_time: Callable[[], None], agreed: Callable[[], bool]
) -> None:
    """Let a :class:`ModelCheckpoint` that saves by the clock ask for it instead of broadcasting on every batch."""
    interval = callback._train_time_interval
    if interval is None:
        return

    def on_train_batch_end(*args: Any, **kwargs: Any) -> None:
        if agreed():
            callback._last_time_checked = float("-inf")
            original(*args, **kwargs)
            return
        # A copy of the callback's own test, on this rank's clock and without the broadcast of its answer.
        now, last = time.monotonic(), callback._last_time_checked
        if last is not None and now - last >= interval.total_seconds():
            on_time()

    original = patches.set(callback, "on_train_batch_end", on_train_batch_end)


def replace_timed_validation(trainer: Trainer, patches: Patches, agreed: Callable[[], bool]) -> None:
    """Let validation by the clock (``val_check_interval`` as a time) run where all ranks have agreed to."""
    timed = cast(Any, trainer)
    if timed._val_check_time_interval is None:
        return

    def should_check(data_fetcher: Any) -> bool:
        # the test itself is Lightning's, which has more reasons to validate; it is told that the time is up, or not
        last, timed._last_val_time = timed._last_val_time, float("-inf") if agreed() else float("inf")
        try:
            return original(data_fetcher)
        finally:
            timed._last_val_time = last

    original: Callable[[Any], bool] = patches.set(trainer.fit_loop.epoch_loop, "_should_check_val_fx", should_check)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the time after which validation runs is up on this rank's clock."""
    timed = cast(Any, trainer)
    interval_s: float | None = timed._val_check_time_interval
    if interval_s is None or not trainer.fit_loop.epoch_loop._should_check_val_epoch():
        return False
    return bool(time.monotonic() - timed._last_val_time >= interval_s)


def replace_monitor_value(
    trainer: Trainer, patches: Patches, agreed: Callable[[str, Callable[[str], Any]], Any]
) -> None:
    """Hand the value that a scheduler watches to a function, with its name and what reads this rank's own."""

    def monitor_value(name: str) -> Any:
        return agreed(name, original)

    original: Callable[[str], Any] = patches.set(trainer.fit_loop.epoch_loop, "_get_monitor_value", monitor_value)


def replace_links(trainer: Trainer, patches: Patches) -> None:
    """Let ``ModelCheckpoint(save_last="link")`` point to a whole checkpoint at any time.

    Lightning takes the link away before it makes the new one, also to a file that is still to be written in the
    background, or that was written after a rank had failed.
    """
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, ModelCheckpoint):
            _replace_link(trainer, callback, patches)


def _replace_link(trainer: Trainer, callback: ModelCheckpoint, patches: Patches) -> None:
    def link(_: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.interrupted:
            return
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            background = writer_in_background(trainer.strategy.checkpoint_io)
            if background is None:
                point_to(filepath, linkpath)
            else:
                after_writes(background, lambda: point_to(filepath, linkpath))
        trainer.strategy.barrier()

    patches.set(callback, "_link_checkpoint", link)


def last_names(strategy: Strategy) -> tuple[str, ...]:
    """Return how names of the newest checkpoint begin (``save_last``), with all callbacks that save."""
    module = strategy.lightning_module
    callbacks = getattr(module.trainer, "callbacks", []) if module is not None else []
    names = (each.CHECKPOINT_NAME_LAST for each in callbacks if isinstance(each, ModelCheckpoint))
    return tuple({ModelCheckpoint.CHECKPOINT_NAME_LAST, *(name.split("{")[0] for name in names)})


def point_to(filepath: str, linkpath: str) -> None:
    """Make a link in one step, or a copy where links cannot be made."""
    if os.path.isdir(linkpath) and not os.path.islink(linkpath):
        shutil.rmtree(linkpath)  # of a strategy that writes folders
    partial = partial_path(linkpath)
    with suppress(FileNotFoundError):
        os.remove(partial)
    try:
        os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), partial)
    except OSError:  # Windows wants a right for it
        shutil.copy(filepath, partial)
    os.replace(partial, linkpath)


def load_skipped_loader_states(trainer: Trainer) -> None:
    """Hand the saved state to stateful loaders that were built before Lightning had read it.

    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` builds the loaders too early, and Lightning then
    never restores them. Where it did restore them, nothing is pending and this does nothing.
    """
    fit_loop = trainer.fit_loop
    pending = bool(fit_loop._combined_loader_states_to_load)
    fit_loop._load_combined_loader_states()
    if pending and fit_loop._data_fetcher is not None:
        iter(fit_loop._data_fetcher)  # many loaders take up their state as a pass begins, and one has begun already


def resumed_epoch() -> ResumedEpoch | None:
    """Return where a Trainer resumes an epoch, if it is now asking for the first batch of training after that.

    For loaders, which are not told of their Trainer: it is found among the callers.
    """
    asked = begun = False
    for frame, _ in traceback.walk_stack(None):
        caller = frame.f_locals.get("self")
        kind = type(caller).__name__  # by name, since `pytorch_lightning` has classes of its own
        if any(base.__name__ == "_ModeIterator" for base in type(caller).__mro__):
            asked, begun = True, getattr(caller, "_idx", 0) > 0
        if kind == "_EvaluationLoop":
            return None
        if kind == "_FitLoop" and caller is not None:
            done = caller.epoch_loop.batch_progress.current.ready
            resumes = caller.restarting and done > 0 and asked and not begun  # not asked: by a hook, for itself
            return ResumedEpoch(done, bool(caller._combined_loader_states_to_load)) if resumes else None
    return None


find_resumed_epoch_by(resumed_epoch)


def place_in_run(trainer: Trainer) -> tuple[int, int]:
    """Return how many epochs are over when training starts, and how many batches of the one after them.

    The second is 0 but where a run is resumed in the middle of an epoch.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress: Any = fit_loop.epoch_progress.current
    epochs, batches = int(progress.processed), epoch_loop.batch_progress.current
    if not fit_loop.restarting:
        return epochs, 0
    done = batches.completed
    if epoch_loop.restarted_on_train_batch_end:  # saved in a hook, and counted when the loop begins
        done += 1
        if done >= trainer.num_training_batches:
            return epochs, 0
    return epochs, done


def logged_step(trainer: Trainer) -> int | None:
    """Return the step at which Lightning is about to log the metrics of this batch; ``None`` if it does not log them.

    For ``on_train_batch_end`` alone: before it, the metrics are not complete, and after it the step may have been
    logged. It counts batches that step, whatever the number of optimizers, from 0; a module that logs a metric of the
    name ``"step"`` puts what is logged with it there instead.
    """
    loop, module = trainer.fit_loop.epoch_loop, trainer.lightning_module
    if module.automatic_optimization and loop._should_accumulate():
        return None
    if not (trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False)):
        return None
    results = trainer._results
    own = None if results is None else results.metrics(on_step=True)["log"].get("step")
    return int(loop._batches_that_stepped if own is None else own)


def close_finished_epoch(loops: dict[str, Any] | None) -> None:
    """Write into saved loop states that an epoch is over, where Lightning saved while it was ending.

    Lightning saves in the hooks at the end of an epoch, before it has counted the epoch as completed, and reads the
    half-counted state in ways that go wrong: with ``max_steps`` it runs an empty epoch, and after a resume from the
    last batch of an epoch a second resume repeats batches.

    Args:
        loops: The entry ``"loops"`` of a checkpoint; changed in place. ``None`` of one that holds weights alone.

    """
    if loops is None:
        return
    fit = loops["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    processed = epochs["total"]["processed"] == epochs["total"]["started"]
    last_batch = batches["is_last_batch"] and batches["total"]["completed"] == batches["total"]["processed"] - 1
    if not (processed or last_batch):
        return
    if not processed:  # saved before the batch was counted on the axis of the loggers
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    stages = ("ready", "started", "processed", "completed")
    for part in ("total", "current"):
        epochs[part].update(dict.fromkeys(stages, epochs[part]["started"]))
        batches[part].update(dict.fromkeys(stages, batches[part]["processed"]))
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def model_averaging_period(strategy: Strategy) -> int | None:
    """Return the period of a :class:`DDPStrategy` that averages parameters, or ``None``."""
    period: int | None = getattr(strategy, "_model_averaging_period", None)
    return period


def timeout_of(strategy: Strategy) -> timedelta:
    """Return how long messages of a strategy wait for other ranks."""
    timeout = getattr(strategy, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else timedelta(minutes=30)


def weight_average_of(callback: Callback) -> Module | None:
    """Return the averaged model of a :class:`WeightAveraging` callback, if it is one and has one."""
    model = callback._average_model if isinstance(callback, WeightAveraging) else None
    return model if isinstance(model, Module) else None


class SavePlan(NamedTuple):
    """When a :class:`ModelCheckpoint` saves, and how many files it writes then at most.

    Args:
        every_n_steps: After so many of the Trainer's steps, or 0.
        every_n_epochs: At the end of so many epochs, or 0.
        at_epoch_end: Whether that is the end of training in the epoch; otherwise that of its validation.
        by_the_clock: Whether it saves when some time is over.
        files: How many.

    """

    every_n_steps: int
    every_n_epochs: int
    at_epoch_end: bool
    by_the_clock: bool
    files: int


def save_plan(callback: ModelCheckpoint, trainer: Trainer) -> SavePlan:
    """Return when the callback saves; where training starts."""
    return SavePlan(
        callback._every_n_train_steps,
        callback._every_n_epochs,
        callback._should_save_on_train_epoch_end(trainer),
        callback._train_time_interval is not None,
        int(callback.save_top_k != 0) + int(callback.save_last is True),
    )


def before_weight_averages(trainer: Trainer, patches: Patches, call: Callable[[Callback], None]) -> None:
    """Call a function before a callback takes the weights into an average of its own, or puts that in their place."""
    for callback in getattr(trainer, "callbacks", []):
        model = weight_average_of(callback)
        if model is not None:
            _call_before(callback, model, "update_parameters", patches, call)
        elif isinstance(callback, StochasticWeightAveraging):
            for name in ("update_parameters", "transfer_weights"):
                _call_before(callback, callback, name, patches, call)


def _call_before(
    callback: Callback, owner: object, name: str, patches: Patches, call: Callable[[Callback], None]
) -> None:
    def wrapped(*args: Any, **kwargs: Any) -> None:
        call(callback)
        original(*args, **kwargs)

    original: Callable[..., None] = patches.set(owner, name, wrapped)


@dataclass(frozen=True)
class LoggedMetric:
    """One value that the user logs: its name, and whether and when it is reduced over the ranks.

    A value of torchmetrics (``is_metric``) reduces itself, by what it has counted.
    """

    name: str
    synchronised: bool
    on_step: bool
    is_metric: bool


def number_of_logged_metrics(trainer: Trainer) -> int:
    """Return how many values have been logged in the current stage."""
    return len(trainer._results or ())


def logged_metrics(trainer: Trainer) -> Iterator[LoggedMetric]:
    """Yield what has been logged in the current stage."""
    results = trainer._results
    for result in () if results is None else results.values():
        meta = result.meta
        is_metric = not result.is_tensor
        yield LoggedMetric(meta.name, bool(meta.sync.should) or is_metric, bool(meta.on_step), is_metric)


def is_without_optimizer(error: KeyError) -> bool:
    """Whether an error is Lightning's word for a dictionary of ``configure_optimizers`` that has no optimizer."""
    places = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return error.args == ("optimizer",) and places[-1] is optimizer_parsing._configure_optimizers.__code__


def is_own_closure(closure: object) -> bool:
    """Whether a closure is the one that Lightning makes, and not one that a module has put around it."""
    return isinstance(closure, AbstractClosure)


def averages_without_a_hook(model: object) -> bool:
    """Whether DDP makes the means of gradients by itself, and not a hook that somebody has registered."""
    return isinstance(model, DistributedDataParallel) and not model._comm_hooks


def unused_by_all_ranks(model: DistributedDataParallel) -> Callable[[], list[Parameter]]:
    """Return a function that tells which parameters no rank has used in the last backward that was synchronised.

    Call this when the model has just been wrapped: DDP numbers the parameters that are trained then.

    Note:
        *Communication.* None: DDP's reducer has counted over all ranks. On CUDA the function waits for the device.

    """
    parameters: list[Parameter] = model._build_params_for_reducer()[0]  # type: ignore[no-untyped-call]

    def unused() -> list[Parameter]:
        used: Tensor | None = cast(Any, model.reducer)._get_local_used_map()
        if used is None:  # DDP was not told that there may be any
            return []
        return [each for each, ranks in zip(parameters, used.tolist(), strict=True) if ranks == 0]

    return unused


def scale_on_device(scaler: Any) -> Tensor | None:
    """Return the tensor in which a gradient scaler keeps its scale, unread; ``None`` before it has made it."""
    return scaler._get_scale_async() if isinstance(scaler, GradScaler) else None


def sees_to_infinities(optimizer: Optimizer) -> bool:
    """Whether an optimizer is called by a gradient scaler in any case, and skips a step by itself, on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_wrapping_io(io: CheckpointIO) -> bool:
    """Whether a ``CheckpointIO`` writes with another one, as :class:`AsyncCheckpointIO` does."""
    return isinstance(io, _WrappingCheckpointIO)


def give_inner_io(io: CheckpointIO, inner: CheckpointIO) -> None:
    """Let a wrapping ``CheckpointIO`` write with another one, where it was made without."""
    if isinstance(io, _WrappingCheckpointIO):
        io.checkpoint_io = inner


def inner_io(io: CheckpointIO) -> CheckpointIO | None:
    """Return what a wrapping ``CheckpointIO`` writes with."""
    return io.checkpoint_io if isinstance(io, _WrappingCheckpointIO) else None


def writer_in_background(io: CheckpointIO | None) -> AsyncCheckpointIO | None:
    """Return the :class:`AsyncCheckpointIO` among a ``CheckpointIO`` and those that it writes with."""
    while io is not None and not isinstance(io, AsyncCheckpointIO):
        io = inner_io(io)
    return io


def after_writes(io: AsyncCheckpointIO, call: Callable[[], None]) -> None:
    """Call a function once all that waits is written, in the thread that writes; not if something could not be.

    An error of the function is a warning: as an error of that thread, the next save would take it for one of writing.
    """

    def when_written() -> None:
        if io._error is not None:
            return
        try:
            call()
        except Exception as error:
            rank_zero_warn(f"After a checkpoint was written in the background: {type(error).__name__}: {error}.")

    if io._executor is None:
        if io._error is None:
            call()
    else:
        io._executor.submit(when_written)


def wait_for_writes(io: AsyncCheckpointIO) -> BaseException | None:
    """Wait until all that waits is written; return the error of what could not be."""
    if io._executor is not None:
        io._executor.submit(lambda: None).result()
    return io._error
