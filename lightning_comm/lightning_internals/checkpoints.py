"""Private parts of Lightning's checkpoints: when they are saved, by what, and which link points to the last."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.core.whole_files import partial_path
from lightning_comm.lightning_internals.patches import Internal, Patches

_ASYNC_IO = "lightning.pytorch.plugins.io.AsyncCheckpointIO"

INTERNALS = (
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_train_time_interval", "a broadcast on every batch"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_last_time_checked", "to make the agreed save happen"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_link_checkpoint", "takes the old link away first"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_every_n_train_steps", "how often it will save, foretold"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_every_n_epochs", "the same"),
    Internal("lightning.pytorch.callbacks.ModelCheckpoint", "_should_save_on_train_epoch_end", "the same"),
    Internal(
        "lightning.pytorch.strategies.Strategy", "_checkpoint_io", "files are written whole where nobody says how"
    ),
    Internal("lightning.pytorch.plugins.io.wrapper._WrappingCheckpointIO", "checkpoint_io", "what it writes with"),
    Internal(_ASYNC_IO, "_executor", "an old checkpoint goes only when the new one, which waits here, is written"),
    Internal(_ASYNC_IO, "_error", "and not at all if it could not be written"),
)


def wrap_saves(trainer: Trainer, patches: Patches, afterwards: Callable[[], None]) -> None:
    """Call a function after every ``save_checkpoint`` of the Trainer, also where a hook or the file made it fail."""

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        finally:
            afterwards()

    original: Callable[..., None] = patches.set(trainer, "save_checkpoint", save)


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
        # The callback's own test, copied, on this rank's clock and without the broadcast of the result.
        now, last = time.monotonic(), callback._last_time_checked
        if last is not None and now - last >= interval.total_seconds():
            on_time()

    original = patches.set(callback, "on_train_batch_end", on_train_batch_end)


def replace_links(trainer: Trainer, patches: Patches) -> None:
    """Let ``ModelCheckpoint(save_last="link")`` point to a whole checkpoint at any time.

    Lightning removes the link before it makes the new one. The new one may also point to a file that is still to be
    written in the background, or that was written after a rank had failed.
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
    """Return how the names of the newest checkpoint (``save_last``) begin, for all callbacks that save."""
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
    except OSError:  # Windows requires a permission for it
        shutil.copy(filepath, partial)
    os.replace(partial, linkpath)


class SavePlan(NamedTuple):
    """When a :class:`ModelCheckpoint` saves, and how many files it writes then at most.

    Args:
        every_n_steps: After so many of the Trainer's steps, or 0.
        every_n_epochs: At the end of so many epochs, or 0.
        at_epoch_end: Whether that is the end of training in the epoch; otherwise that of its validation.
        by_the_clock: Whether it saves after some time.
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
    """Call a function in the thread that writes, once all that waits is written; not if a write has failed.

    An error of the function becomes a warning, since the next save would take an error of that thread for one of
    writing.
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
    """Wait until all that waits is written; return the error if a write has failed."""
    if io._executor is not None:
        io._executor.submit(lambda: None).result()
    return io._error
