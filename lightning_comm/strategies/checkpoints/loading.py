"""The loading of a checkpoint's main file on all ranks: whole, or refused by all of them, with reason and way out."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.strategies.checkpoints.damage import ZIP, damage, newest_whole
from lightning_comm.strategies.checkpoints.problems import CheckpointError, first_problem, one_line
from lightning_comm.strategies.checkpoints.whole_files import has_torch_files, is_local, local_path
from lightning_comm.transport.recording import Recorder

_OF_SLURM = re.compile(r"hpc_ckpt_(\d+)\.ckpt")
_READER = ("PytorchStreamReader", "inline_container")  # in errors of torch's reader of archives


def skip_unfinished(where: str, path: _PATH) -> _PATH:
    """Return the path of a checkpoint; for one of SLURM's that was never finished, that of the one before.

    Lightning resumes from the highest number that it finds in any name, and a job that is killed while it saves for its
    requeue leaves names without a main file.
    """
    match = _OF_SLURM.fullmatch(os.path.basename(str(path)))
    if match is None or not is_local(path) or os.path.exists(local_path(path)):
        return path
    folder = os.path.dirname(local_path(path))
    numbers = (_OF_SLURM.fullmatch(each) for each in (os.listdir(folder) if os.path.isdir(folder) else []))
    earlier = max((int(each[1]) for each in numbers if each is not None), default=None)
    if earlier is None:
        return path
    found = os.path.join(folder, f"hpc_ckpt_{earlier}.ckpt")
    rank_zero_warn(f"{where}: {str(path)!r} was never finished, so the run goes on from {found!r}.")
    return found


def load_together(
    strategy: ParallelStrategy,
    where: str,
    path: _PATH,
    load: Callable[[_PATH], dict[str, Any]],
    refused: Callable[[], None],
    *,
    in_set_up: bool,
    ledger: CommLedger,
) -> tuple[_PATH, dict[str, Any]]:
    """Load the main file of a checkpoint, and see first that it is whole.

    Args:
        strategy: The strategy.
        where: Its name, for messages.
        path: The file.
        load: Lightning's way to load it.
        refused: Called before an error that all ranks raise alike, so that it does not count as a failure of one.
        in_set_up: For ``fit``: whether this is before its set-up, where Lightning loads on all ranks.
        ledger: Where messages are recorded.

    Returns:
        The path of the file that was loaded, and its content.

    Raises:
        CheckpointError: If the file is damaged, or could not be loaded on another rank: ranks may read other disks.
        Exception: Whatever this rank's own attempt raises.

    Note:
        *Communication.* A byte of each rank where Lightning loads a checkpoint, on all ranks, recorded as
        ``"checkpoint_files"``.

    """
    failure: Exception | None = None
    checkpoint: dict[str, Any] = {}
    for_all = _is_for_all(strategy, path, in_set_up)
    try:
        path = skip_unfinished(where, path)
        checkpoint = _load(strategy, where, path, load)
    except Exception as error:
        failure = error
    if for_all:
        problem = None if failure is None else one_line(failure)
        found = first_problem(strategy, Recorder(ledger), problem)
        if found is not None and failure is None:
            rank, text = found
            failure = CheckpointError(
                f"{where}: `ckpt_path`={str(path)!r} could be loaded here, and not on rank {rank}: {text}"
            )
    if failure is not None:
        if for_all:
            refused()
        raise failure
    return path, checkpoint


def _load(
    strategy: ParallelStrategy, where: str, path: _PATH, load: Callable[[_PATH], dict[str, Any]]
) -> dict[str, Any]:
    if str(path).startswith("http"):
        return load(path)
    if not has_torch_files(strategy.checkpoint_io):
        return _load_by_other(where, path, load)
    files = get_filesystem(path)
    if not files.exists(str(path)):
        begun = f"{path}.ranks"
        left = f" ({begun!r} is left of a save that was never finished, and may go)" if files.exists(begun) else ""
        raise FileNotFoundError(f"{where}: `ckpt_path`={str(path)!r}: there is no such file{left}. {_way_out(path)}")
    refuse_sharded(path, where)
    problem = damage(path)
    if problem is None:
        try:
            return load(path)
        except Exception as error:
            with files.open(str(path), "rb") as file:
                if file.read(len(ZIP)) == ZIP and not any(name in str(error) for name in _READER):
                    raise
            size = files.size(str(path))
            problem = f"it is damaged, or no file of `torch.save` ({size} bytes; {one_line(error)})"
    raise CheckpointError(f"{where}: `ckpt_path`={str(path)!r} cannot be loaded: {problem}. {_way_out(path)}")


def _load_by_other(where: str, path: _PATH, load: Callable[[_PATH], dict[str, Any]]) -> dict[str, Any]:
    """Load by a ``CheckpointIO`` that may keep files elsewhere; a file under that name is looked at after an error."""
    try:
        return load(path)
    except Exception as error:
        problem = None
        with suppress(Exception):  # the path may mean nothing to the file system
            problem = damage(path) if get_filesystem(path).isfile(str(path)) else None
        if problem is None:
            raise
        raise CheckpointError(
            f"{where}: `ckpt_path`={str(path)!r} cannot be loaded ({one_line(error)}): {problem}. {_way_out(path)}"
        ) from error


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
