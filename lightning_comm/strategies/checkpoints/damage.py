"""Damage of checkpoint files: cut off, overwritten, a bit that has flipped; found before anything is loaded.

Files of ``torch.save`` are zip archives with a checksum (CRC-32) of every record, which ``torch.load`` does not check.
What lies between the records is checked by the readers of archives, torch's and Python's, except for one bit: for a
record that is marked as a folder torch returns uninitialised memory.
"""

import os
import zipfile
from contextlib import suppress
from typing import IO

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH

from lightning_comm.strategies.checkpoints.entry import is_incomplete
from lightning_comm.strategies.checkpoints.problems import one_line
from lightning_comm.strategies.checkpoints.whole_files import is_local, local_path

ZIP = b"PK\x03\x04"
_FOLDER = 0x10  # in the attributes of a record
_LOOKED_AT = 5  # files that may be whole, where one is damaged


def damage(path: _PATH) -> str | None:
    """Return how a file of ``torch.save`` is damaged, or ``None``.

    A file that is no zip archive (from before torch 1.6, or another tool's) has no checksums and shows at the latest
    when it is loaded; nor has one that was written under ``torch.serialization.set_crc32_options(False)``.
    """
    if str(path).startswith("http"):
        return None  # loaded through the cache of torch.hub
    try:
        with get_filesystem(path).open(str(path), "rb") as file:
            return _damage_of(file)
    except OSError as error:
        return f"it cannot be read ({one_line(error)})"


def _damage_of(file: IO[bytes]) -> str | None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return "it is empty"
    file.seek(0)
    if file.read(len(ZIP)) != ZIP:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return None
            marked = (record.filename for record in records if record.is_dir() or record.external_attr & _FOLDER)
            bad = next(marked, None) or archive.testzip()
    except OSError:
        raise
    except zipfile.BadZipFile as error:
        return f"it is cut off or overwritten ({size} bytes; {error})"
    except Exception as error:  # a damaged directory may cause any error in the reader
        return f"it is damaged ({size} bytes; {one_line(error)})"
    return None if bad is None else f"it is damaged ({size} bytes; the record {bad!r} does not match its checksum)"


def newest_whole(path: _PATH) -> str | None:
    """Return the newest other checkpoint in the same local folder that is whole and complete, if one is found soon."""
    if not is_local(path):
        return None
    here, suffix = local_path(path), os.path.splitext(str(path))[1] or ".ckpt"
    found: dict[str, float] = {}
    with suppress(OSError):
        for entry in os.scandir(os.path.dirname(here) or "."):
            same = os.path.exists(here) and os.path.samefile(entry.path, here)
            if entry.name.endswith(suffix) and entry.is_file() and not entry.is_symlink() and not same:
                found[entry.path] = entry.stat().st_mtime
    newest = sorted(found, key=lambda each: -found[each])[:_LOOKED_AT]
    return next((each for each in newest if damage(each) is None and not is_incomplete(each)), None)
