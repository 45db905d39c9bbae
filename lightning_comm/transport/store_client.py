"""Calls to the process group's store that end at a deadline.

While the process that hosts the store is stopped, or cut off, no call to it returns, whatever time-out the store has.
So calls are made in a thread, by a client of its own, and a caller gives up at the deadline.
"""

import os
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_comm.transport.group_ends import leave_behind, note_exit_status

_PREFIX_STORE, _TCP_STORE = distributed_c10d.PrefixStore, cast(Any, dist).TCPStore


class KeyValueStore(Protocol):
    """What is needed of a process group's store."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there, without waiting for them."""
        ...

    def get(self, key: str, /) -> bytes:
        """Return a value."""
        ...

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Write ``desired`` if the value is ``expected`` (or missing, where that is empty); return the value then."""
        ...


class StoreLostError(RuntimeError):
    """The store does not answer: its host has ended, is stopped, or cannot be reached."""


@dataclass
class _Call:
    name: str
    arguments: tuple[Any, ...]
    done: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: BaseException | None = None


class StoreClient:
    """A client of a store with a thread of its own; a :class:`KeyValueStore`.

    Several threads may use it. Once a call has had no answer for ``timeout_s``, or the connection is lost, every later
    call fails at once.

    Args:
        store: The store; this client has a connection of its own to it, since a call that never returns locks the one
            that it uses.
        timeout_s: How long a call may take, in seconds.

    Note:
        *Communication.* One more connection to the host of the store.

    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._busy_since_s: float | None = None
        self._error: BaseException | None = None  # the error that ended the connection
        self._gave_up_s: float | None = None  # since when there has been no answer, where a deadline has passed
        self._thread = threading.Thread(target=self._serve, args=(store,), name="lightning_comm store", daemon=True)
        self._thread.start()

    @property
    def silent_since_s(self) -> float | None:
        """Since when a call has had no answer, on the monotonic clock; ``None`` where no call is waiting."""
        return self._busy_since_s

    @property
    def connection_lost(self) -> bool:
        """Whether the store's host has closed the connection, as when its process ends."""
        return self._error is not None

    def check(self, keys: list[str], /, within_s: float | None = None) -> bool:
        """Whether all keys are there."""
        return bool(self._call("check", keys, within_s=within_s))

    def get(self, key: str, /, within_s: float | None = None) -> bytes:
        """Return a value."""
        return bytes(self._call("get", key, within_s=within_s))

    def set(self, key: str, value: str, /, within_s: float | None = None) -> None:
        """Write a value."""
        self._call("set", key, value, within_s=within_s)

    def compare_set(self, key: str, expected: str, desired: str, /, within_s: float | None = None) -> bytes:
        """Write ``desired`` if the value is ``expected`` (or missing, where that is empty); return the value then."""
        return bytes(self._call("compare_set", key, expected, desired, within_s=within_s))

    def close(self, *, failed: bool = True) -> None:
        """End the thread, if the store lets it.

        Args:
            failed: Whether the run has failed, which decides on the exit status of a process whose thread does not end.

        """
        self._calls.put(None)
        self._thread.join(0.5)
        if self._thread.is_alive():
            note_exit_status()
            leave_behind(self._thread, failed=failed)

    def _call(self, name: str, *arguments: Any, within_s: float | None) -> Any:
        """Make a call, and wait for it.

        Args:
            name: The method of the store.
            arguments: Its arguments.
            within_s: When to give up, if sooner than at the time-out; for this call alone.

        Raises:
            StoreLostError: If there is no answer in time.

        """
        if self._error is not None:
            raise StoreLostError(f"the connection to the store is lost: {self._error}") from self._error
        started = time.monotonic()
        if self._gave_up_s is not None:
            raise StoreLostError(f"the store has not answered for {started - self._gave_up_s:.0f} s")
        call = _Call(name, arguments)
        self._calls.put(call)
        since_s = min(started, self._busy_since_s or started)  # of the call in front of it, which may be stuck
        if not call.done.wait(max(0.0, since_s + min(within_s or self._timeout_s, self._timeout_s) - started)):
            silent_s = time.monotonic() - since_s
            if silent_s >= self._timeout_s:
                self._gave_up_s = since_s
            raise StoreLostError(f"the store has not answered for {silent_s:.0f} s")
        if isinstance(call.error, dist.DistError):
            raise StoreLostError(f"the connection to the store is lost: {call.error}") from call.error
        if call.error is not None:
            raise call.error
        return call.answer

    def _serve(self, store: Any) -> None:
        client = None
        while (call := self._calls.get()) is not None:
            self._busy_since_s = time.monotonic()
            try:
                client = _another_connection(store) if client is None else client
                call.answer = getattr(client, call.name)(*call.arguments)
            except BaseException as error:  # raised where the answer is waited for
                call.error = error
                if isinstance(error, dist.DistNetworkError):
                    self._error = error
            self._busy_since_s = None
            call.done.set()


def _another_connection(store: Any) -> Any:
    return store.clone() if hasattr(store, "clone") else connect_without_clone(store)


def connect_without_clone(store: Any) -> Any:
    """Return a further client of a store, for torch 2.6 and 2.7, whose stores cannot be cloned.

    The prefix of a store's keys cannot be read there, so clients that are made here have a prefix of their own. It
    holds the attempt, since a job that torchrun has restarted must not find the keys of the attempt before in a store
    that both use.
    """
    if isinstance(store, _PREFIX_STORE):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return _PREFIX_STORE(f"lightning_comm/{attempt}", connect_without_clone(store.underlying_store))
    if isinstance(store, _TCP_STORE):
        return _TCP_STORE(store.host, store.port, is_master=False, timeout=store.timeout, wait_for_workers=False)
    return store  # in this process, or a file, so no call to it waits for another process


def default_store() -> KeyValueStore:
    """Return the store of the default process group. torch has no public name for it."""
    store: KeyValueStore = distributed_c10d._get_default_store()
    return store
