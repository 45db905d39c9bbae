"""Checkpoint files that are there whole or not at all, whatever ends the process that writes them.

Lightning writes to the folder for temporary files, and moves the file from there. If that is another disk, the move is
a copy, and a process that is killed during the copy leaves half a file under the final name.
"""

import os
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from typing_extensions import override

from lightning_comm.core.whole_files import write_whole
from lightning_comm.lightning_internals import give_inner_io, inner_io, is_wrapping_io


class WholeFileIO(TorchCheckpointIO):
    """Lightning's way to write checkpoints, with files on a local disk that appear whole or not at all.

    A file is written in the same folder, under a name that ends in ``.partial``, flushed to the disk, and renamed. A
    partial file of a killed run is overwritten by the next save of the same path. Remote paths (``s3://…``) are written
    as Lightning does: object stores show an object whole or not at all.
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


class _Watched:
    """A file that keeps the error of a failed write, which torch replaces by a less clear one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:
            return memoryview(data).nbytes  # torch goes on writing as it closes its archive, and prints its errors
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
    """Return the user's ``CheckpointIO``, or ours if there is none, also within one that wraps another."""
    if io is None:
        return WholeFileIO()
    if is_wrapping_io(io):
        give_inner_io(io, WholeFileIO())
    return io


def is_plain(io: CheckpointIO) -> bool:
    """Return whether files are those of ``torch.save``, and on the disk when ``save_checkpoint`` returns."""
    return type(io) in (TorchCheckpointIO, WholeFileIO)


def has_torch_files(io: CheckpointIO) -> bool:
    """Return whether files are those of ``torch.save``, under the paths that the ``CheckpointIO`` is given.

    Only then can the file system be asked about them: another ``CheckpointIO``, also one derived from Lightning's, may
    keep them anywhere, in any form.
    """
    while type(io) is AsyncCheckpointIO and (inner := inner_io(io)) is not None:
        io = inner
    return is_plain(io)
