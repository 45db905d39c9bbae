"""The entry of a checkpoint's main file about the save that wrote it."""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

KEY = "lightning_comm.save"
WRITTEN_ALONE = "it was written while a rank had failed, by one rank alone"


def _new_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Save:
    """One save: where its main file goes, and what all of its files have in common.

    Args:
        path: Of the main file; the same on all ranks where they write files beside it.
        id: The id.

    """

    path: str
    id: str = field(default_factory=_new_id)

    def write(self, checkpoint: dict[str, Any], *, incomplete: bool = False) -> None:
        """Put the entry into a checkpoint.

        Args:
            checkpoint: The content of the main file.
            incomplete: Whether it is written after a failure, when ranks cannot meet any more.

        """
        checkpoint[KEY] = {"version": 1, "id": self.id, "incomplete": incomplete}


def says_incomplete(checkpoint: dict[str, Any]) -> bool:
    """Return whether a checkpoint was written after a failure, when ranks could not meet any more."""
    return bool(checkpoint.get(KEY, {}).get("incomplete"))


def is_incomplete(path: str) -> bool:
    """Return whether a local file was written after a failure; False where it cannot be read."""
    with suppress(Exception):  # callers leave such a file as it is
        return says_incomplete(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    return False
