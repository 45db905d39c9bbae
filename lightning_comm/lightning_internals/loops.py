"""Private parts of Lightning's loops: where batches, epochs and validations begin and end."""

import time
from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
)

from lightning_comm.lightning_internals.patches import Internal, Patches

_LOOPS = "lightning.pytorch.loops"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop._TrainingEpochLoop"
_FIT_LOOP = f"{_LOOPS}.fit_loop._FitLoop"
_EVALUATION_LOOP = f"{_LOOPS}.evaluation_loop._EvaluationLoop"
_SETUP = "lightning.pytorch.trainer.setup._init_debugging_flags"

INTERNALS = (
    Internal(_FIT_LOOP, "epoch_progress", "saved half-counted at the end of an epoch, and mended before it is read"),
    Internal(_EPOCH_LOOP, "batch_progress", "the same for the batches of that epoch"),
    Internal(_EPOCH_LOOP, "on_advance_end", "the last place before a rank leaves the loop on its own `should_stop`"),
    Internal(_EPOCH_LOOP, "_num_ready_batches_reached", "whether a batch is the last of its epoch, with every limit"),
    Internal(_EPOCH_LOOP, "_is_training_done", "whether an epoch ends with a batch, also by `max_steps`"),
    Internal(_EPOCH_LOOP, "max_steps", "a pilot ends a run early, whose schedule must stay that of the whole run"),
    Internal(_FIT_LOOP, "on_advance_start", "the same at the start of an epoch"),
    Internal(_FIT_LOOP, "on_advance_end", "the same at the end of an epoch"),
    Internal(_EVALUATION_LOOP, "on_run_start", "a module may merge weights when it is told that it evaluates"),
    Internal(_EVALUATION_LOOP, "increment_progress_to_evaluation_end", "draws random numbers in a resumed run"),
    Internal(_EPOCH_LOOP, "restarted_on_train_batch_end", "a batch that is counted only as the resumed loop begins"),
    Internal(_SETUP, "_val_check_time_interval", "how often validation runs, where that is a time"),
    Internal(_FIT_LOOP, "_last_val_time", "since when that time counts; each rank has its own"),
    Internal(_EPOCH_LOOP, "_get_monitor_value", "each rank's ReduceLROnPlateau would watch a value of its own"),
    Internal(_EPOCH_LOOP, "_should_check_val_fx", "each rank's own clock would start validation"),
    Internal(_EPOCH_LOOP, "_should_check_val_epoch", "whether this epoch validates at all"),
)


def accumulates(trainer: Trainer) -> bool:
    """Return whether some batches of a run end without an optimizer step."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return trainer.accumulate_grad_batches > 1 or any(isinstance(x, GradientAccumulationScheduler) for x in callbacks)


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the present training batch is the last one of its epoch, whatever limits that."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def ends_training(trainer: Trainer) -> bool:
    """Return whether no batch follows the present one in its epoch: its last one, or the last step of the run."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def batches_begun(trainer: Trainer) -> int:
    """Return how many training batches have begun in all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def batches_of_epoch(trainer: Trainer) -> int:
    """Return how many training batches have begun in the present epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def wrap_loop_ends(
    trainer: Trainer,
    patches: Patches,
    after_batch: Callable[[Callable[[], None]], None],
    around_epoch: Callable[[Callable[[], None]], None],
    around_epoch_end: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Wrap the end of every batch (where validation runs), and start and end of every epoch, in functions.

    Args:
        trainer: The Trainer.
        patches: Where the originals are kept.
        after_batch: Wraps the end of every batch; it calls the original.
        around_epoch: Likewise for start and end of every epoch.
        around_epoch_end: Likewise for its end, if that is a different one.

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


def wrap_skipped_validation(trainer: Trainer, patches: Patches, around: Callable[[Callable[[], None]], None]) -> None:
    """Wrap the place at which a resumed run skips a validation in a function, which calls the original."""
    loop = trainer.fit_loop.epoch_loop.val_loop

    def skip() -> None:
        around(original)

    original: Callable[[], None] = patches.set(loop, "increment_progress_to_evaluation_end", skip)


def before_validation(trainer: Trainer, patches: Patches, call: Callable[[], None]) -> None:
    """Call a function before a validation within ``fit``, while the module is still in training mode."""

    def start() -> None:
        call()
        original()

    original: Callable[[], None] = patches.set(trainer.fit_loop.epoch_loop.val_loop, "on_run_start", start)


def end_after_this_step(trainer: Trainer) -> None:
    """End training as if ``max_steps`` were reached; until now it kept its value, on which schedules depend."""
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def replace_timed_validation(trainer: Trainer, patches: Patches, agreed: Callable[[], bool]) -> None:
    """Let validation by the clock (``val_check_interval`` as a time) run where all ranks have agreed to."""
    timed = cast(Any, trainer)
    if timed._val_check_time_interval is None:
        return

    def should_check(data_fetcher: Any) -> bool:
        # the test stays Lightning's, which has more reasons to validate; only its clock is replaced
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
    """Replace the value that a scheduler watches by a function of its name and of this rank's own value."""

    def monitor_value(name: str) -> Any:
        return agreed(name, original)

    original: Callable[[str], Any] = patches.set(trainer.fit_loop.epoch_loop, "_get_monitor_value", monitor_value)


def place_in_run(trainer: Trainer) -> tuple[int, int]:
    """Return how many epochs are over when training starts, and how many batches of the one after them.

    The second is 0 unless a run is resumed in the middle of an epoch.
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
