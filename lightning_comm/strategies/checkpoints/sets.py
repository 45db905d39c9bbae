"""Sets of files: a main file that every rank reads, and each rank's own beside it, all with the id of their save.

The rank files of ``<checkpoint>`` are in ``<checkpoint>.ranks/<id>/rank<r>.pt``. A save writes those first, then the
main file with the same id, by a rename, and only then removes the rank files of the save before. So one whole set is
there at any time, whenever a process ends.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.lightning_internals import inner_io, wait_for_writes, writer_in_background
from lightning_comm.strategies.checkpoints.damage import damage
from lightning_comm.strategies.checkpoints.entry import Save, is_incomplete
from lightning_comm.strategies.checkpoints.problems import CheckpointError, first_problem, one_line
from lightning_comm.strategies.checkpoints.removal import (
    entries,
    folder,
    notes_of,
    remove_entries,
    remove_if_empty,
    when_written,
)
from lightning_comm.strategies.checkpoints.whole_files import has_torch_files, is_local, is_plain, local_path
from lightning_comm.transport.recording import Recorder

VERSION = 1  # of rank files
INCOMPLETE = ".incomplete"  # behind the name of a checkpoint that is written although a complete one is there


def rank_path(filepath: _PATH, save_id: str, rank: int) -> str:
    """Return the path of one rank's file; with an empty id, where it was before files had ids in their path."""
    return os.path.join(folder(filepath), *([save_id] if save_id else []), f"rank{rank}.pt")


def begin(strategy: ParallelStrategy, filepath: _PATH, from_rank_0: Callable[[Any], Any]) -> Save:
    """Return a new save, the same on all ranks: with the path of rank 0, since a path may contain this rank's step.

    Args:
        strategy: The strategy.
        filepath: Of the main file.
        from_rank_0: Gives all ranks what rank 0 has, in plain types.

    Note:
        *Communication.* What ``from_rank_0`` sends: a path, an id, and what rank 0 has removed since the last save.

    """
    notes, mine = notes_of(strategy), Save(str(filepath))
    removed = list(notes.removed)
    del notes.removed[: len(removed)]  # the thread that writes may add to it meanwhile
    path, save_id, removed = from_rank_0((mine.path, mine.id, removed))
    if strategy.local_rank == 0 and not strategy.is_global_zero:
        remove_entries(strategy, removed)
    return Save(path, save_id)


def write_own(strategy: ParallelStrategy, recorder: Recorder, where: str, save: Save, content: dict[str, Any]) -> None:
    """Write this rank's file, and check that all ranks have written theirs; every rank calls this.

    Args:
        strategy: The strategy.
        recorder: Sends and records.
        where: The strategy's name, for messages.
        save: The save.
        content: Of the file: plain values and tensors.

    Raises:
        CheckpointError: On all ranks, if one could not write its file. The files of this save are removed.

    """
    path, failure = rank_path(save.path, save.id, strategy.global_rank), None
    try:
        io, background = _foreground(strategy.checkpoint_io)
        io.save_checkpoint({"version": VERSION, "token": save.id, **content}, path)
        if background is not None and (error := wait_for_writes(background)) is not None:
            raise error
    except Exception as error:
        failure = error
    _raise_together(strategy, recorder, where, save, failure, discard=True)
    if strategy.is_global_zero:  # which removes them
        notes_of(strategy).saves.append(os.path.dirname(path))


def write_main(
    strategy: ParallelStrategy, recorder: Recorder, where: str, save: Save, write: Callable[[], None]
) -> None:
    """Write the main file, then remove the rank files of the save before under this name; every rank calls this.

    Args:
        strategy: The strategy.
        recorder: Sends and records.
        where: The strategy's name, for messages.
        save: The save.
        write: Lightning's way to write, which does so on rank 0.

    Raises:
        CheckpointError: On all ranks, if it could not be written. The files of the save before stay as they were.

    """
    failure = None
    try:
        write()
    except Exception as error:
        failure = error
    # in the background the main file may be written nevertheless: the error is that of the save before
    discard = writer_in_background(strategy.checkpoint_io) is None
    _raise_together(strategy, recorder, where, save, failure, discard=discard)
    notes_of(strategy).newest = save.path
    if strategy.local_rank == 0:
        others = [each for each in entries(strategy, save.path) if os.path.basename(each.rstrip("/")) != save.id]
        if writer_in_background(strategy.checkpoint_io) is None and not is_plain(strategy.checkpoint_io):
            others = _older(others)[:-1]  # an unknown writer may return before the main file is written
        when_written(strategy, others)


def _raise_together(
    strategy: ParallelStrategy, recorder: Recorder, where: str, save: Save, failure: Exception | None, *, discard: bool
) -> None:
    """Raise on all ranks if one has failed; if there will be no main file, remove this rank's own."""
    found = first_problem(strategy, recorder, None if failure is None else one_line(failure))
    if found is None:
        return
    if discard:
        _discard_own(strategy, save)
    rank, text = found
    raise CheckpointError(
        f"{where}: the checkpoint {save.path!r} could not be written: rank {rank}: {text}. What an earlier save has "
        "left there stays as it was. Make room there, or give the callback another folder, and resume from the last "
        "checkpoint."
    ) from failure


def _discard_own(strategy: ParallelStrategy, save: Save) -> None:
    own, io = rank_path(save.path, save.id, strategy.global_rank), _foreground(strategy.checkpoint_io)[0]
    with suppress(Exception):  # it may not be there, and the error to show is that of the save
        if has_torch_files(io):
            get_filesystem(own).rm(own)
        else:
            io.remove_checkpoint(own)
    with suppress(ValueError):
        notes_of(strategy).saves.remove(os.path.dirname(own))
    if is_local(own):
        remove_if_empty(os.path.dirname(local_path(own)), os.path.dirname(os.path.dirname(local_path(own))))


def read_own(strategy: ParallelStrategy, filepath: _PATH, save_id: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return this rank's file of a save, or why it cannot be used. Raises on no rank alone.

    It is loaded with ``weights_only=True`` wherever it lies, so that it cannot run code. A ``CheckpointIO`` that is not
    Lightning's or ours is asked for it, since it alone knows where the file is.
    """
    rank, problem, by_name = strategy.global_rank, None, has_torch_files(strategy.checkpoint_io)
    real = os.path.realpath(local_path(filepath)) if is_local(filepath) else str(filepath)
    for candidate in dict.fromkeys((str(filepath), real)):  # `save_last="link"` leaves a link
        for path in (rank_path(candidate, save_id, rank), rank_path(candidate, "", rank)):
            if not by_name or get_filesystem(path).exists(path):
                state, reason = _read(strategy, path, save_id)
                if state is not None:
                    return state, None
                problem = problem or reason
    return None, problem or f"{rank_path(filepath, save_id, rank)} is missing"


def _read(strategy: ParallelStrategy, path: str, save_id: str) -> tuple[dict[str, Any] | None, str | None]:
    io = _foreground(strategy.checkpoint_io)[0]
    reason = damage(path) if has_torch_files(io) else None
    if reason is not None:
        return None, f"{path} cannot be read: {reason}"
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            state = io.load_checkpoint(path, weights_only=True)
    except Exception as error:  # a file that is damaged on one rank: the others wait for its result
        text = f"{path} cannot be read ({one_line(error)})"
        if "weights_only" in str(error) or "Weights only" in str(error):
            text += (
                "; it holds more than plain values and tensors, put there by a loader or a scheduler of yours, whose "
                "types `torch.serialization.add_safe_globals` lets pass"
            )
        return None, text
    if state.get("version") != VERSION:
        return None, f"{path} has format {state.get('version')!r}, and this version reads {VERSION}"
    if state.get("token") != save_id:
        return None, f"{path} belongs to another save"
    return state, None


def _numpy_types() -> list[Any]:
    """Return what numpy's numbers and arrays need to be loaded; they are plain, and states of loaders hold them."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    types = {type(np.dtype(each)) for each in "?bhilqBHILQefdFD"}
    old = [(scalar, "numpy.core.multiarray.scalar"), (array, "numpy.core.multiarray._reconstruct")]  # numpy 1
    return [scalar, array, np.ndarray, np.dtype, *types, *old]


def incomplete_path(strategy: ParallelStrategy, where: str, filepath: _PATH) -> str:
    """Return the path for a checkpoint that rank 0 writes alone, after a failure; warn where it differs.

    It never replaces a complete one: it goes beside it, under a name that ``ckpt_path="last"`` does not look for.
    """
    path, background = str(filepath), writer_in_background(strategy.checkpoint_io)
    if background is not None and strategy.is_global_zero:
        wait_for_writes(background)
    if not has_torch_files(strategy.checkpoint_io):  # it alone knows whether there is a complete one
        path += INCOMPLETE
        rank_zero_warn(
            f"{where}: after the failure of a rank the others cannot add their part, so what rank 0 has is written to "
            f"{path!r}, incomplete: under {type(strategy.checkpoint_io).__name__} nobody can tell whether "
            f"{str(filepath)!r} is an earlier, complete checkpoint."
        )
    elif strategy.is_global_zero:
        here = local_path(path) if is_local(path) else path
        if get_filesystem(path).exists(path) and not (is_local(path) and is_incomplete(here)):
            path += INCOMPLETE
            rank_zero_warn(
                f"{where}: {str(filepath)!r} is an earlier, complete checkpoint and stays. After the failure of a rank "
                f"the others cannot add their part, so what rank 0 has is written to {path!r}, incomplete."
            )
    return path


def _foreground(io: CheckpointIO) -> tuple[CheckpointIO, Any]:
    """Return the ``CheckpointIO`` that writes before it returns, and the background writer, which may still write."""
    while io is writer_in_background(io) and (inner := inner_io(io)) is not None:
        io = inner
    return io, writer_in_background(io)


def _older(paths: list[str]) -> list[str]:
    """Return paths in the order in which they were written, as far as the file system knows."""

    def written(path: str) -> float:
        with suppress(Exception):  # file systems have names of their own for it, or none
            return float(get_filesystem(path).info(path)["mtime"])
        return 0.0

    return sorted(paths, key=written)
