"""Failed runs of the same process: they may have left its process group unusable, and a later run is refused then."""

import weakref
from contextlib import suppress

import torch.distributed as dist

from lightning_comm.transport.store_client import StoreClient, StoreLostError

_KEY = "lightning_comm/broken"
_CALL_S = 2.0  # for a call to the store
_noted: list[tuple["weakref.ref[dist.ProcessGroup]", str]] = []  # the group in which a run failed, and how


def note(text: str) -> None:
    """Note that a run has failed in the default group; the first failure in a group is kept."""
    group = dist.group.WORLD
    if group is not None and not (_noted and _noted[0][0]() is group):
        _noted[:] = [(weakref.ref(group), text)]


def mark_group_broken(store: StoreClient) -> None:
    """Tell the other ranks that the default group cannot be used any more; before connections are closed."""
    with suppress(StoreLostError):  # without the store no run can begin anyway
        store.set(_KEY, "", within_s=_CALL_S)


def refuse_broken_group(store: StoreClient, where: str) -> None:
    """Refuse to begin a run in a group that a failed one has left unusable.

    Args:
        store: The process group's.
        where: The strategy, for the message.

    Raises:
        RuntimeError: On all ranks whose earlier run in this group has failed, if one has marked the group as broken.

    """
    if _noted and _noted[0][0]() is dist.group.WORLD and store.check([_KEY], within_s=_CALL_S):
        raise RuntimeError(
            f"{where}: an earlier run in this process failed ({_noted[0][1]}), and has left messages of its group "
            "unfinished or connections closed, so no other run can use it. Restart the processes of all ranks."
        )
