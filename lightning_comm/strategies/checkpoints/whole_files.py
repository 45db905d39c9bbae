"""Checkpoint files that are there whole or not at all, whatever ends the process that writes them.

Lightning's own way writes to the folder for temporary files, and moves the file from there: where that is another disk,
the move is a copy, and a process that is killed within it leaves half a file under the final name.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_comm.lightning_internals import give_inner_io, is_wrapping_io

PARTIAL = ".partial"  # behind the name of a file that is being written, in the same folder
_TRIES = 5


class WholeFileIO(TorchCheckpointIO):
    """Lightning's way to write checkpoints, with files on a local disk that appear whole or not at all.

    A file is written beside its place, under a name that ends in ``.partial``, brought to the disk, and renamed. What a
    killed run leaves of it is overwritten by the next save of the same path. Remote paths (``s3://…``) are written as
    Lightning does: object stores show an object whole or not at all.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_whole(local_path(path), lambda file: _save(checkpoint, file))


def is_local(path: _PATH) -> bool:
    """Return whether a path is one of the file system of this machine."""
    return bool(getattr(get_filesystem(path), "local_file", False))


def local_path(path: _PATH) -> str:
    """Return a local path without ``file://``."""
    return os.fspath(path).removeprefix("file://").removeprefix("local://")


def write_whole(path: str, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file so that whoever looks sees the old one or the new one, whole.

    Args:
        path: The file. Its folder is made if it is not there.
        write: Writes the content.

    Raises:
        OSError: If it cannot be written; the error names the file, and the old one stays.

    """
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe cannot be replaced, nor a folder
        with open(path, "wb") as file:
            write(file)
        return
    partial = path + PARTIAL
    try:
        with _opened(partial) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _bring_to_disk(os.path.dirname(path) or ".")
    except OSError as error:
        with suppress(OSError):
            os.remove(partial)
        raise OSError(error.errno, error.strerror, path) from error  # where the disk is full it names no file


def _opened(path: str) -> IO[bytes]:
    """Open a file for writing in a folder that is made first, and may be removed meanwhile since it is empty."""
    for _ in range(_TRIES - 1):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with suppress(FileNotFoundError):
            return open(path, "wb")
    return open(path, "wb")


def _bring_to_disk(folder: str) -> None:
    """Let the names in a folder outlast a loss of power, where the file system can do that for folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Watched:
    """A file that remembers why it could not be written, which torch tells in words of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:
            return memoryview(data).nbytes  # torch writes on as it closes its archive, and says so on the screen
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    watched = _Watched(file)
    try:
        torch.save(checkpoint, cast(IO[bytes], watched))
    except Exception:
        if watched.error is not None:
            raise watched.error from None
        raise


def with_default(io: CheckpointIO | None) -> CheckpointIO:
    """Return what a strategy writes with: what the user gave, or else, also within what wraps another, our own."""
    if io is None:
        return WholeFileIO()
    if is_wrapping_io(io):
        give_inner_io(io, WholeFileIO())
    return io


def is_plain(io: CheckpointIO) -> bool:
    """Return whether files are those of ``torch.save``, and on the disk when ``save_checkpoint`` returns."""
    return type(io) in (TorchCheckpointIO, WholeFileIO)
