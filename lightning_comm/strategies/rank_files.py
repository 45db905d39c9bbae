"""Checkpoints in two parts: one file for everybody, and beside it one small folder with each rank's own state.

The main file is an ordinary Lightning checkpoint with averaged weights. What only one rank knows (its own weights in
the middle of a round, its optimizer, its place in the data, its random state) is in ``<checkpoint>.ranks/rank<r>.pt``.
Both carry the same token, so a rank file of another save is never mistaken for this one's.
"""

import os
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_comm.lightning_internals import close_finished_epoch
from lightning_comm.strategies import mask_files
from lightning_comm.strategies.local_update_run import LocalUpdateRun
from lightning_comm.strategies.run_state import state_of
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.random_state import random_state
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.replica import Replica

KEY = "lightning_comm.local_update"
VERSION = 1

# What Lightning restores from the checkpoint and what differs between ranks. The precision plugin's state has the
# plugin's class name for its key, and is added by name.
RANK_KEYS = ("optimizer_states", "lr_schedulers", "loops")


@dataclass(frozen=True)
class Resume:
    """How far a checkpoint can bring a run back.

    Args:
        shared: The strategy's entry of the main file, or ``None`` if another strategy wrote it.
        own: This rank's file, or ``None`` if it cannot be used; the same on all ranks.
        masks: Those in the main file, whichever of our strategies wrote it, or ``None`` without any.

    """

    shared: dict[str, Any] | None
    own: dict[str, Any] | None
    masks: dict[str, Any] | None = None


def folder(filepath: _PATH) -> str:
    """Return the folder of the rank files that belong to a checkpoint."""
    return f"{filepath}.ranks"


def rank_path(filepath: _PATH, rank: int) -> str:
    """Return the path of one rank's file."""
    return os.path.join(folder(filepath), f"rank{rank}.pt")


def shared_state(run: LocalUpdateRun, token: str, *, complete: bool, averaged: bool) -> dict[str, Any]:
    """Return the strategy's entry of the main file.

    Args:
        run: The run.
        token: That of the rank files of the same save; empty without them.
        complete: Whether there are rank files.
        averaged: Whether the file's weights are the average over the ranks.

    """
    return {
        "version": VERSION,
        "token": token,
        "world_size": run.recorder.world_size,
        "complete": complete,
        "averaged": averaged,
        "masks": mask_files.mask_state(run.replica.codec, run.settings.averaging.method),
        "run": state_of(run),
    }


def own_state(run: LocalUpdateRun, lightning_state: dict[str, Any]) -> dict[str, Any]:
    """Return what only this rank knows: the content of its file."""
    return {
        "apart": run.apart,
        "epoch_is_over": run.trainer.is_last_batch,
        "weights": run.replica.local_state() if run.apart else run.replica.local_buffers(),
        "compression": run.replica.compression_state(),
        "samples": run.samples.state_dict(),
        "run": state_of(run),
        "random": run.random_state or random_state(),
        "checkpoint": lightning_state,
    }


def write(strategy: ParallelStrategy, run: LocalUpdateRun, checkpoint: dict[str, Any], filepath: _PATH) -> _PATH:
    """Write this rank's file, and the strategy's entry into the checkpoint; every rank calls this.

    Returns:
        The path for the main file: that of rank 0 on all ranks, since it may hold the step, which differs where ranks
        stopped apart.

    """
    filepath, token = agreed_path(strategy, filepath)
    complete = "optimizer_states" in checkpoint  # not with `save_weights_only`
    if complete:
        keys = (*RANK_KEYS, type(strategy.precision_plugin).__qualname__)
        own = own_state(run, {key: checkpoint[key] for key in keys if key in checkpoint})
        write_own(strategy, filepath, token, own)
        checkpoint["optimizer_states"] = run.average_optimizer_states(checkpoint["optimizer_states"])
    checkpoint[KEY] = shared_state(run, token, complete=complete, averaged=True)
    return filepath


def kept_from_change(checkpoint: dict[str, Any], replica: Replica, io: CheckpointIO) -> dict[str, Any]:
    """Return a checkpoint that stays as it is when ranks take their own weights up again.

    Note:
        *Memory.* Nothing where the file is written before that, as Lightning's own way does. With another
        ``CheckpointIO``, which may write it later, a copy of the averaged tensors that are saved. Those that share
        memory (tied weights) share that of the copy.

    """
    changing = replica.changed_storages()
    if type(io) is TorchCheckpointIO or not changing:
        return checkpoint
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() not in changing:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
        copy = storages[storage.data_ptr()]
        return tensor.detach().new_empty(0).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    state = checkpoint["state_dict"]
    checkpoint = {key: apply_to_collection(value, Tensor, copied) for key, value in checkpoint.items()}
    if hasattr(state, "_metadata"):  # versions of modules, which a copied dictionary does not take along
        checkpoint["state_dict"]._metadata = state._metadata
    return checkpoint


def agreed_path(strategy: ParallelStrategy, filepath: _PATH) -> tuple[str, str]:
    """Return the path of rank 0 and a new token, on all ranks."""
    path, token = strategy.broadcast((str(filepath), secrets.token_hex(8)))
    return path, token


def write_own(strategy: ParallelStrategy, filepath: _PATH, token: str, content: dict[str, Any]) -> None:
    """Write this rank's file; every rank calls this."""
    own = {"version": VERSION, "token": token, **content}
    strategy.checkpoint_io.save_checkpoint(own, rank_path(filepath, strategy.global_rank))
    strategy.barrier()  # so that the file that everybody looks for appears after the folder beside it


def read_own(
    strategy: ParallelStrategy, filepath: _PATH, token: str, weights_only: bool | None
) -> tuple[dict[str, Any] | None, str | None]:
    """Return this rank's file of a save, or why it cannot be used. Raises on no rank alone."""
    for candidate in (str(filepath), os.path.realpath(filepath)):  # `save_last="link"` leaves a link to the real one
        path = rank_path(candidate, strategy.global_rank)
        if get_filesystem(path).exists(path):
            try:
                state = strategy.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
            except Exception as error:  # a file that is damaged on one rank: the others wait for word of it
                return None, f"{path} cannot be read ({type(error).__name__}: {error})"
            if state.get("version") != VERSION:
                return None, f"{path} has format {state.get('version')!r}, and this version reads {VERSION}"
            if state.get("token") != token:
                return None, f"{path} belongs to another save"
            return state, None
    return None, f"{rank_path(filepath, strategy.global_rank)} is missing"


def unusable(shared: dict[str, Any] | None, world_size: int) -> str | None:
    """Return why rank files need not be looked for, or ``None`` if they should be there."""
    if shared is None:
        return "another strategy wrote it, or a Trainer that had not trained this model"
    if shared.get("version") != VERSION:
        return f"its format is {shared.get('version')!r}, and this version reads {VERSION}"
    if shared["world_size"] != world_size:
        return f"it was written by {shared['world_size']} ranks, and there are {world_size} now"
    return None


def load(
    strategy: ParallelStrategy,
    recorder: Recorder,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    weights_only: bool | None,
    method: Compression | None = None,
) -> Resume:
    """Put this rank's own state into a checkpoint that was read, if all ranks have theirs; every rank calls this.

    Args:
        strategy: The strategy.
        recorder: Sends and records.
        checkpoint: What was read from the main file.
        filepath: Of the main file.
        weights_only: As Lightning has it.
        method: The compression of the run, for the message: whether masks are kept.

    """
    shared, masks = checkpoint.get(KEY), mask_files.masks_in(checkpoint)
    own, problem = _read(strategy, filepath, shared, weights_only)
    problem = first_problem(strategy, recorder, problem)
    if problem is not None or own is None:
        _warn_new_round(
            filepath,
            str(problem),
            averaged=shared is None or shared["averaged"],
            masks=mask_files.fits(masks, method),
            optimizer=bool(checkpoint.get("optimizer_states")),
        )
        return Resume(shared, None, masks)
    checkpoint.update(own["checkpoint"])
    close_finished_epoch(checkpoint["loops"])
    return Resume(shared, own, masks)


def saved_alpha(resume: Resume | None) -> float | None:
    """Return the resolved coefficient of the run that is resumed, if there is one."""
    shared = resume.shared if resume is not None else None
    alpha = shared["run"]["period"]["alpha"] if shared is not None else None
    return alpha if isinstance(alpha, float) else None


def _read(
    strategy: ParallelStrategy, filepath: _PATH, shared: dict[str, Any] | None, weights_only: bool | None
) -> tuple[dict[str, Any] | None, str | None]:
    """Return this rank's file if it belongs to the checkpoint, and otherwise why it cannot be used."""
    reason = unusable(shared, strategy.world_size)
    if shared is None or reason is not None:
        return None, reason
    if not shared["complete"]:
        alone = "it was written while a rank had failed, by one rank alone"
        return None, "it was saved with `save_weights_only=True`" if shared["averaged"] else alone
    return read_own(strategy, filepath, shared["token"], weights_only)


def first_problem(strategy: ParallelStrategy, recorder: Recorder, problem: str | None) -> str | None:
    """Return, on all ranks, the problem of the first rank that has one."""
    mine = torch.tensor([problem is not None], dtype=torch.uint8, device=strategy.root_device)
    rows, pending = recorder.all_gather(mine, "control")
    pending.wait()
    troubled = rows.flatten().nonzero().flatten().tolist()
    return strategy.broadcast(problem, src=troubled[0]) if troubled else None


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


def _warn_new_round(filepath: _PATH, reason: str, averaged: bool, masks: bool, optimizer: bool) -> None:
    """Say that a run goes on from the averaged state, not from where each rank was."""
    weights = "the averaged weights" if averaged else "the weights of the rank that wrote it"
    weights += ", the masks" if masks else ""
    weights += " and the optimizer state in the file" if optimizer else " in the file, which has no optimizer state"
    rank_zero_warn(
        f"LocalUpdateStrategy: `ckpt_path`={str(filepath)!r} cannot bring every rank back to where it was: {reason}. "
        f"Training goes on with a new round from {weights}. For an exact "
        f"continuation resume with the same number of ranks and keep the folder {folder(filepath)!r} with the file."
    )


def warn_incomplete(filepath: _PATH, *, averaged: bool) -> None:
    """Say that a checkpoint is written when ranks cannot meet any more."""
    weights = "averaged, as ranks last met" if averaged else "those of rank 0 alone, in the middle of a round"
    rank_zero_warn(
        f"LocalUpdateStrategy: {str(filepath)!r} is written after an error, when ranks cannot meet any more: its "
        f"weights are {weights}, and there is nothing in it of what each rank keeps. Go on from an earlier checkpoint "
        "if there is one."
    )


def remove(io: CheckpointIO, filepath: _PATH) -> None:
    """Remove the rank files of a checkpoint. Called once for each host; on a shared disk the first one does it."""
    path = folder(filepath)
    try:
        if get_filesystem(path).exists(path):
            io.remove_checkpoint(path)
    except FileNotFoundError:
        return  # another host was faster
