"""The start of a job: all ranks meet before their process group is made, however long one of them takes to start.

torch bounds that meeting by the time-out of the group's collectives. That is meant for ranks that are there: on a busy
machine, or with a cold disk, a process needs longer than that to start.
"""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented there, and made elsewhere

START_S = 600.0  # at least; where collectives may wait longer than that, the start may as well
_LOOK_S, _LINGER_S = 0.02, 0.5  # between looks; how long a rank that gives up stays, so that the others see it
_CHECKS = (
    "Check that the processes of all ranks run, on every host (one that failed before says so in its own output), that "
    "`num_nodes` and `devices` are the same for all of them, and that no firewall closes that port."
)
_starts = itertools.count()  # keeps the keys of one start apart from those of the next; equal on all ranks


@contextmanager
def all_ranks_started(
    where: str, address: str, port: int, rank: int, world_size: int, *, timeout_s: float, start_s: float = START_S
) -> Iterator[None]:
    """Wait until all ranks have come, then let the process group be made at the same address.

    The store that torch makes for the group at this address is that of this meeting, so no rank waits a second time.

    Args:
        where: What begins, for messages.
        address: Of rank 0.
        port: Of the process group's store there.
        rank: This rank.
        world_size: How many there are.
        timeout_s: How long collectives may wait.
        start_s: How long the start may take, where collectives may not wait longer.

    Raises:
        TimeoutError: If a rank has not come in that time; the message names it.
        ConnectionError: If rank 0 cannot host the store.

    Note:
        *Communication.* A small value from each rank, and looks at those of the others, in the store.

    """
    patience_s = max(timeout_s, start_s)
    began_s = time.monotonic()
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # as torch itself looks
    try:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=is_host,
            timeout=timedelta(seconds=patience_s),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",  # as torch itself looks
        )
        namespace = _namespace()
        store.set(f"{namespace}/{rank}", "")
        _wait(where, store, namespace, world_size, f"{address}:{port}", began_s + patience_s)
    except RuntimeError as error:  # of torch's own classes; of none in torch 2.6, where the port is taken
        if is_host:
            raise ConnectionError(
                f"{where}: rank 0 must host the job's store at {address}:{port}, and cannot ({error}). Check that the "
                "address is this host's, and that no other process uses the port; MASTER_PORT names another."
            ) from error
        raise TimeoutError(
            f"{where}: rank {rank} cannot reach rank 0, which hosts the job's store at {address}:{port}, "
            f"{time.monotonic() - began_s:.0f} s after it has begun to try ({error}). {_CHECKS}"
        ) from error
    yield  # while the store is there


def _namespace() -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives its workers
    return f"lightning_comm/start/{attempt}/{next(_starts)}"


def _wait(where: str, store: TCPStore, namespace: str, world_size: int, place: str, until_s: float) -> None:
    """Poll until all ranks are there; a single blocking call to the store would not react to Ctrl-C.

    A rank whose time is up publishes its message, so that all raise the same.
    """
    keys, end = [f"{namespace}/{rank}" for rank in range(world_size)], f"{namespace}/end"
    while not store.check(keys):
        if store.check([end]):
            raise TimeoutError(f"{where}: {store.get(end).decode()}")
        if time.monotonic() > until_s:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if not missing:
                return
            store.set(end, _missing_text(missing, world_size, place))
            time.sleep(_LINGER_S)
        time.sleep(_LOOK_S)


def _missing_text(missing: list[int], world_size: int, place: str) -> str:
    which = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    return (
        f"all {world_size} ranks must start, and {world_size - len(missing)} have come to {place}; no sign of {which}. "
        f"{_CHECKS} If starting takes longer, give a longer `timeout`."
    )
