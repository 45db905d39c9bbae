"""Damage of checkpoint files: cut off, overwritten, a bit that has flipped; found before anything is loaded.

Files of ``torch.save`` are zip archives with a checksum (CRC-32) of every record, which ``torch.load`` does not look
at. What lies between the records is checked by the readers of archives, torch's own and Python's, but for one bit: a
record that is marked as a folder is handed over by torch with memory that nobody has written to.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_comm.core.ledger import CommLedger
from lightning_comm.lightning_internals import inner_io, is_wrapping_io
from lightning_comm.strategies.checkpoints.entry import is_incomplete
from lightning_comm.strategies.checkpoints.problems import CheckpointError, first_problem, told
from lightning_comm.strategies.checkpoints.whole_files import is_local, is_plain, local_path
from lightning_comm.transport.recording import Recorder

_ZIP = b"PK\x03\x04"
_FOLDER = 0x10  # in the attributes of a record
_READER = ("PytorchStreamReader", "inline_container")  # in errors of torch's reader of archives
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
        return f"it cannot be read ({told(error)})"


def _damage_of(file: IO[bytes]) -> str | None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return "it is empty"
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:
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
    except Exception as error:  # whatever a damaged directory makes of the reader
        return f"it is damaged ({size} bytes; {told(error)})"
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


def load_together(
    strategy: ParallelStrategy, where: str, path: _PATH, load: Callable[[], dict[str, Any]], *, in_set_up: bool
) -> dict[str, Any]:
    """Load the main file of a checkpoint, and see first that it is whole.

    Args:
        strategy: The strategy.
        where: Its name, for messages.
        path: The file.
        load: Lightning's way to load it.
        in_set_up: For ``fit``: whether this is before its set-up, where Lightning loads on all ranks.

    Raises:
        CheckpointError: If the file is damaged, or could not be loaded on another rank: ranks may read other disks.
        Exception: Whatever this rank's own attempt raises.

    Note:
        *Communication.* A byte of each rank where Lightning loads a checkpoint, on all ranks.

    """
    failure: Exception | None = None
    checkpoint: dict[str, Any] = {}
    try:
        checkpoint = _load(strategy, where, path, load)
    except Exception as error:
        failure = error
    if _is_for_all(strategy, path, in_set_up):
        recorder = Recorder(CommLedger())
        found = first_problem(strategy, recorder, None if failure is None else told(failure))
        if found is not None and failure is None:
            rank, text = found
            failure = CheckpointError(
                f"{where}: `ckpt_path`={str(path)!r} could be loaded here, and not on rank {rank}: {text}"
            )
    if failure is not None:
        raise failure
    return checkpoint


def _load(strategy: ParallelStrategy, where: str, path: _PATH, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    io = strategy.checkpoint_io
    while is_wrapping_io(io) and (inner := inner_io(io)) is not None:
        io = inner
    if not is_plain(io) or str(path).startswith("http"):
        return load()
    files = get_filesystem(path)
    if not files.exists(str(path)):
        raise FileNotFoundError(f"{where}: `ckpt_path`={str(path)!r}: there is no such file. {_way_out(path)}")
    refuse_sharded(path, where)
    problem = damage(path)
    if problem is None:
        try:
            return load()
        except Exception as error:
            with files.open(str(path), "rb") as file:
                if file.read(len(_ZIP)) == _ZIP and not any(name in str(error) for name in _READER):
                    raise
            size = files.size(str(path))
            problem = f"it is damaged, or no file of `torch.save` ({size} bytes; {told(error)})"
    raise CheckpointError(f"{where}: `ckpt_path`={str(path)!r} cannot be loaded: {problem}. {_way_out(path)}")


def _way_out(path: _PATH) -> str:
    other = newest_whole(path)
    if other is None:
        return "Give the path of an earlier checkpoint."
    return f"Give the path of an earlier checkpoint: the newest whole one in that folder is {other!r}."


def _is_for_all(strategy: ParallelStrategy, path: _PATH, in_set_up: bool) -> bool:
    """Return whether Lightning loads the checkpoint it was given, so on all ranks; others may load on one."""
    module = strategy.lightning_module
    trainer = module.trainer if module is not None else None
    if trainer is None or not dist.is_initialized() or trainer.state.status != TrainerStatus.RUNNING:
        return False
    return trainer.ckpt_path == path and (in_set_up or trainer.state.fn != TrainerFn.FITTING)


def refuse_sharded(filepath: _PATH, where: str) -> None:
    """Refuse the checkpoint of a strategy that shards the model: a folder.

    Raises:
        MisconfigurationException: If the path is a folder.

    """
    if get_filesystem(filepath).isdir(str(filepath)):
        raise MisconfigurationException(
            f"{where}: `ckpt_path`={str(filepath)!r} is a folder, as sharded strategies (FSDP, DeepSpeed, "
            "ModelParallel) write it, and every rank here needs the whole model from one file. Make one with `python "
            "-m lightning.pytorch.utilities.consolidate_checkpoint` (DeepSpeed: "
            "`convert_zero_checkpoint_to_fp32_state_dict`) and give its path."
        )
