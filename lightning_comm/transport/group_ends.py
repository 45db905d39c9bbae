"""The end of process groups: waits for lost ranks that end, threads that are left behind, and a process that exits."""

import atexit
import logging
import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.recording import counted_elsewhere

_NEVER_SENT = 2**30  # the tag of a message that no rank sends
_ABORT_S = 5.0  # how long ending what is under way on a device may take

_left_behind: "WeakKeyDictionary[threading.Thread, bool]" = WeakKeyDictionary()  # whether their run failed
_noting: list[bool] = []  # filled once `sys.exit` is watched
_exit_status: list[int] = []  # what it was called with


def hang_up(group: dist.ProcessGroup | None) -> None:
    """Close this rank's connections of a group, so that waits on them end with an error; nothing can be sent then.

    On gloo this ends waits on this rank and on others. With NCCL it ends this rank's kernels that wait for other ranks,
    so that the device is free and the group can be destroyed, for which torch waits for all kernels; the other ranks
    have to close theirs. On other backends nothing happens.

    Args:
        group: The group; ``None`` for the default group.

    """
    _abort_kernels(group)
    # torch has no call that ends a wait of gloo. But a receive that times out closes all connections of its rank. It
    # times out only where its own connection is intact, so this starts one from every other rank.
    whole = dist.group.WORLD
    for source in dist.get_process_group_ranks(group or whole):  # torch 2.6 does not take `None` for the default group
        if source != dist.get_rank():
            with counted_elsewhere(), suppress(RuntimeError, ValueError):
                work = dist.irecv(torch.empty(1), source, group, _NEVER_SENT)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))


def _abort_kernels(group: dist.ProcessGroup | None) -> None:
    """Abort the kernels that a group has running with NCCL on this rank's device."""
    if backend_of(torch.device("cuda"), group) != "nccl":
        return
    # not torch's `_abort_process_group`: for the default group it aborts all groups of this process
    group = group or dist.group.WORLD
    assert group is not None
    backend: Any = group._get_backend(torch.device("cuda"))

    def abort() -> None:
        with suppress(RuntimeError):  # as after an earlier error of its own, when the group is unusable too
            backend.abort()

    # torch waits up to the time-out of a message, and in some versions of NCCL until the other ranks abort too
    thread = threading.Thread(target=abort, name="lightning_comm abort", daemon=True)
    thread.start()
    thread.join(_ABORT_S)
    leave_behind(thread)


def leave_behind(thread: threading.Thread, *, failed: bool = True) -> None:
    """Let the process end while a thread still waits for a rank that is lost or cannot be reached.

    Nothing can end such a wait. A thread that wakes up from it while Python shuts down aborts the whole process
    (SIGABRT). So if it still runs at the end of the program, the process ends without Python's shutdown: with the
    status that was given to ``sys.exit`` after :func:`note_exit_status`, with 1 after an uncaught error, and otherwise
    with 1 after a run that failed and 0 after one that did not.

    Args:
        thread: The thread.
        failed: Whether the run has failed.

    """
    _left_behind[thread] = failed


def note_exit_status() -> None:
    """Record the status passed to ``sys.exit`` from now on; called after a failure, when a thread may be left behind.

    Functions that Python calls at exit cannot find out the status.
    """
    if _noting:
        return
    _noting.append(True)
    leave = sys.exit

    def note_and_leave(status: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            _exit_status[:] = [0 if status is None else status & 0xFF if isinstance(status, int) else 1]
        leave(status)

    sys.exit = note_and_leave


@atexit.register  # at import: what is registered later is called before it
def _end_without_shutting_down() -> None:
    if any(thread.is_alive() for thread in _left_behind):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
                stream.flush()
        uncaught = getattr(sys, "last_value", None) is not None
        status = _exit_status or [int(any(_left_behind.values()))]
        os._exit(1 if uncaught else status[0])


def leave_group_at_exit() -> None:
    """Leave the process group before Python shuts down.

    Threads of gloo may outlive the interpreter and abort the process after a successful run; Lightning leaves the group
    at exit under NCCL alone. After a failed run, kernels of NCCL may wait for lost ranks, and torch would wait for the
    kernels, so they are aborted first. This is called before the function that Lightning registered, which would wait.
    """
    atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        if _noting:
            _abort_all_kernels()
        # torch 2.6 joins gloo's threads with Python's lock held when it frees a group. A thread that frees an abandoned
        # message, as after an error, needs the lock for its tensors: a deadlock. Backend objects release the lock
        # before they join. So the backend objects must be freed last, and no name here may hold a group.
        backends = _backend_objects()
        dist.destroy_process_group()
        del backends


def _backend_objects() -> list[Any]:
    groups = tuple(distributed_c10d._world.pg_map)  # torch has no public list of them
    return [group._get_backend(device) for group in groups for device in group._device_types]


def _abort_all_kernels() -> None:
    for group in tuple(distributed_c10d._world.pg_map):
        _abort_kernels(group)
