"""Files on a local disk that are there whole or not at all, whatever ends the process that writes them."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO

PARTIAL = ".partial"  # behind the name of a file that is being written, in the same folder
_TRIES = 5
_LONGEST = 255  # bytes of a name, on most file systems


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; as :func:`write_whole` does."""
    write_whole(os.fspath(path), lambda file: file.write(text.encode()))


def write_whole(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that readers see the old one or the new one, whole.

    It is written beside its place, brought to the disk, and renamed. What a killed process leaves of it ends in
    ``.partial`` and is overwritten the next time. A device or a pipe, which cannot be replaced, is written as it is.

    Args:
        path: The file. Its folder is made if it is not there.
        write: Writes the content.

    Raises:
        OSError: If it cannot be written; the error names the file, and the old one stays.

    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            write(file)
        return
    partial = partial_path(path)
    try:
        with _opened(partial) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from error  # where the disk is full it names no file
        raise
    _bring_to_disk(os.path.dirname(path) or ".")


def partial_path(path: str) -> str:
    """Return where a file is written before it is renamed: under its name and ``.partial``, shortened where need be."""
    parent, name = os.path.split(path)
    data = os.fsencode(name)
    if len(data) + len(PARTIAL) > _LONGEST:
        mark = "-" + hashlib.sha256(data).hexdigest()[:16]  # so that long names which begin alike stay apart
        name = os.fsdecode(data[: _LONGEST - len(PARTIAL) - len(mark)]) + mark
    return os.path.join(parent, name + PARTIAL)


def _opened(path: str) -> IO[bytes]:
    """Open a file for writing in a folder that is made first, and may be removed meanwhile since it is empty."""
    for _ in range(_TRIES):
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
