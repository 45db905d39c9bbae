"""The removal of checkpoints and of rank files: once their replacement is written, and without breaking links.

A removal that fails does not end the run: a file that stays only costs space, and a warning names it and the reason.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy

from lightning_comm.core.whole_files import PARTIAL
from lightning_comm.lightning_internals import after_writes, last_names, point_to, writer_in_background
from lightning_comm.strategies.checkpoints.problems import one_line
from lightning_comm.strategies.checkpoints.whole_files import has_torch_files, is_local, local_path

_RANK_FILE = re.compile(r"rank\d+\.pt")


@dataclass
class SaveRecord:
    """What a strategy has written and removed in this process.

    Args:
        newest: The last main file.
        saves: On rank 0, the folders of rank files, oldest first: a ``CheckpointIO`` may keep them where they cannot be
            listed.
        removed: Removals of rank 0 since the last save that had to wait for a background writer; hosts with disks of
            their own repeat them.

    """

    newest: str = ""
    saves: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def notes_of(strategy: ParallelStrategy) -> SaveRecord:
    """Return the notes of a strategy, made at its first save."""
    notes: SaveRecord = vars(strategy).setdefault("_notes_of_saves", SaveRecord())
    return notes


def folder(filepath: _PATH) -> str:
    """Return the folder of the rank files that belong to a checkpoint."""
    return f"{filepath}.ranks"


def remove(strategy: ParallelStrategy, filepath: _PATH, remove_main: Callable[[], None]) -> None:
    """Remove a checkpoint, once its replacement is written: the main file, then the rank files.

    Called on all ranks. Each host removes the rank files; on a shared disk the first one does. Before that, a link to
    the checkpoint (``save_last="link"``) is pointed to the newest one: Lightning moves it only after the removal.

    Args:
        strategy: The strategy.
        filepath: Of the main file.
        remove_main: Lightning's way to remove, which does so on rank 0.

    """
    if strategy.local_rank != 0:
        return
    newest = notes_of(strategy).newest

    def main() -> None:
        if strategy.is_global_zero:
            _move_links(strategy, str(filepath), newest)
        remove_main()

    when_written(strategy, entries(strategy, filepath), lambda: _tried(strategy, filepath, main))


def when_written(strategy: ParallelStrategy, paths: list[str], before: Callable[[], bool] = lambda: True) -> None:
    """Remove rank files; after the background writer, if there is one: then other hosts learn of it at the next save.

    Args:
        strategy: The strategy.
        paths: What :func:`entries` has found.
        before: Removes what must be removed first, and returns whether it could.

    """
    background = writer_in_background(strategy.checkpoint_io)
    if background is None:
        if before():
            remove_entries(strategy, paths)
    elif strategy.is_global_zero:

        def carry_out() -> None:
            if before():
                remove_entries(strategy, paths)
                notes_of(strategy).removed.extend(paths)

        after_writes(background, carry_out)


def entries(strategy: ParallelStrategy, filepath: _PATH) -> list[str]:
    """Return what is in the folder of a checkpoint's rank files: a folder for each save, and files of old ones."""
    path = folder(filepath)
    listed = [os.path.join(path, name) for name in _names(path)]
    known = [] if has_torch_files(strategy.checkpoint_io) else list(notes_of(strategy).saves)
    return listed + [each for each in known if os.path.dirname(each) == path and each not in listed]


def remove_entries(strategy: ParallelStrategy, paths: list[str]) -> None:
    """Remove what :func:`entries` has found."""
    notes = notes_of(strategy)
    for path in paths:
        done = [
            _tried(strategy, part, partial(strategy.checkpoint_io.remove_checkpoint, part))
            for part in _parts(strategy, path)
        ]
        if all(done) and path in notes.saves:
            notes.saves.remove(path)
        if is_local(path):
            here = local_path(path)
            for name in _names(here):
                if _RANK_FILE.match(name) and name.endswith(PARTIAL):  # of a killed process
                    with suppress(OSError):
                        os.remove(os.path.join(here, name))
            remove_if_empty(here, os.path.dirname(here))


def remove_if_empty(*folders: str) -> None:
    """Remove those folders that are empty, in this order."""
    for each in folders:
        with suppress(OSError):
            os.rmdir(each)


def _parts(strategy: ParallelStrategy, path: str) -> list[str]:
    """Return the paths for ``CheckpointIO`` to remove: files, or the folder if it is known to remove folders."""
    if has_torch_files(strategy.checkpoint_io):
        return [path] if get_filesystem(path).exists(path) else []
    if (own := _RANK_FILE.match(os.path.basename(path))) is not None:  # before files had ids in their path
        return [os.path.join(os.path.dirname(path), own[0])]
    names = {found[0] for name in _names(path) if (found := _RANK_FILE.match(name)) is not None}
    if not names and strategy.is_global_zero and path in notes_of(strategy).saves:
        names = {f"rank{rank}.pt" for rank in range(strategy.world_size)}
    return [os.path.join(path, name) for name in sorted(names)]


def _names(path: str) -> list[str]:
    """Return the names in a folder; none where there is no such folder, or the file system does not know of it."""
    files = get_filesystem(path)
    files.invalidate_cache(path)
    try:
        names = [str(each).rstrip("/").rsplit("/", 1)[-1] for each in files.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in names if name]


def _tried(strategy: ParallelStrategy, path: _PATH, remove_it: Callable[[], None]) -> bool:
    """Remove a path, or warn why it stays; return whether it is gone."""
    try:
        remove_it()
    except FileNotFoundError:  # another host was faster
        return True
    except Exception as error:
        warnings.warn(
            f"{type(strategy).__name__}: {str(path)!r} was to be removed, since a newer checkpoint is there, and could "
            f"not be: {one_line(error)}. It stays, and the run goes on. Remove it by hand, or let "
            f"`remove_checkpoint` of {type(strategy.checkpoint_io).__name__} be allowed to.",
            stacklevel=2,
        )
        return False
    return True


def _move_links(strategy: ParallelStrategy, filepath: str, newest: str) -> None:
    """Let links to a checkpoint that is about to go point to the newest one."""
    if not newest or not (is_local(filepath) and is_local(newest)):
        return
    old, new = local_path(filepath), local_path(newest)
    if os.path.islink(old) or not os.path.exists(new) or os.path.realpath(old) == os.path.realpath(new):
        return
    names = last_names(strategy)
    for entry in os.scandir(os.path.dirname(old) or "."):
        if entry.is_symlink() and entry.name.startswith(names) and os.path.realpath(entry) == os.path.realpath(old):
            point_to(new, entry.path)
