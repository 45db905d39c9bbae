"""Checkpoints in two parts: one file for everybody, and beside it one small folder with each rank's own state.

The main file is an ordinary Lightning checkpoint with averaged weights. What only one rank knows (its own weights in
the middle of a round, its optimizer, its place in the data, its random state) is in ``<checkpoint>.ranks/rank<r>.pt``.
Both carry the same token, so a rank file of another save is never mistaken for this one's.
"""

import os
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

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

    """

    shared: dict[str, Any] | None
    own: dict[str, Any] | None


def folder(filepath: _PATH) -> str:
    """Return the folder of the rank files that belong to a checkpoint."""
    return f"{filepath}.ranks"


def rank_path(filepath: _PATH, rank: int) -> str:
    """Return the path of one rank's file."""
    return os.path.join(folder(filepath), f"rank{rank}.pt")


def read(io: CheckpointIO, filepath: _PATH, rank: int, shared: dict[str, Any], weights_only: bool | None) -> Any:
    """Return this rank's file if it belongs to the checkpoint, otherwise why it cannot be used, as text."""
    for candidate in (str(filepath), os.path.realpath(filepath)):  # `save_last="link"` leaves a link to the real one
        path = rank_path(candidate, rank)
        if not get_filesystem(path).exists(path):
            continue
        state = io.load_checkpoint(path, weights_only=weights_only)
        if state.get("version") != VERSION:
            return f"{path} has format {state.get('version')!r}, and this version reads {VERSION}"
        if state.get("token") != shared["token"]:
            return f"{path} belongs to another save"
        return state
    return f"{rank_path(filepath, rank)} is missing"


def unusable(shared: dict[str, Any] | None, world_size: int) -> str | None:
    """Return why rank files need not be looked for, or ``None`` if they should be there."""
    if shared is None:
        return "another strategy wrote it"
    if shared.get("version") != VERSION:
        return f"its format is {shared.get('version')!r}, and this version reads {VERSION}"
    if not shared["complete"]:
        return "it was written while a rank had failed, by one rank alone"
    if shared["world_size"] != world_size:
        return f"it was written by {shared['world_size']} ranks, and there are {world_size} now"
    return None


def warn_new_round(filepath: _PATH, reason: str, averaged: bool) -> None:
    """Say that a run goes on from the averaged state, not from where each rank was."""
    weights = "averaged weights" if averaged else "the weights of the rank that wrote it"
    rank_zero_warn(
        f"LocalUpdateStrategy: `ckpt_path`={str(filepath)!r} cannot bring every rank back to where it was: {reason}. "
        f"Training goes on with a new round from the {weights} and the optimizer state in the file. For an exact "
        f"continuation resume with the same number of ranks and keep the folder {folder(filepath)!r} with the file."
    )


def remove(io: CheckpointIO, filepath: _PATH) -> None:
    """Remove the rank files of a checkpoint. Called once for each host; on a shared disk the first one does it."""
    path = folder(filepath)
    try:
        if get_filesystem(path).exists(path):
            io.remove_checkpoint(path)
    except FileNotFoundError:
        return  # another host was faster
