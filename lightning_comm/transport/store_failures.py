"""Failures published in the store, for ranks without a watching thread: they look for them where they poll anyway."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch.distributed as dist

from lightning_comm.transport.failure_messages import PeerFailure, store_text
from lightning_comm.transport.store_client import KeyValueStore, StoreLostError


class Failures(Protocol):
    """The interface by which a rank learns of failures of others, and publishes its own."""

    def report(self, message: str) -> None:
        """Tell the other ranks that this one failed. The first report stays."""

    def raise_failure(self) -> None:
        """Look whether a failure was published, and raise :class:`PeerFailure` if so."""

    def first_error_shown(self, where: str = ..., *, waits: bool = ...) -> AbstractContextManager[None]:
        """Turn the loss of a connection into the error of the rank that failed, as far as that is known."""

    def who_failed(self, error: BaseException) -> str:
        """Return a message that names the cause of a lost connection."""


class StoreFailures:
    """Failures of ranks that have no :class:`Peers`.

    Args:
        store: The process group's.
        rank: This rank.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.

    """

    def __init__(self, store: KeyValueStore, rank: int, namespace: str) -> None:
        self._store, self._rank = store, rank
        self._failed, self._news = f"{namespace}/failed", f"{namespace}/news"

    def report(self, message: str) -> None:
        """Tell the other ranks that this one failed. The first report stays."""
        self._store.compare_set(self._failed, "", f"rank {self._rank} failed: {message}")
        self._store.set(self._news, "")

    def raise_failure(self) -> None:
        """Look whether a failure was published, and raise :class:`PeerFailure` if so, or if the store is gone."""
        try:
            if self._store.check([self._failed]):
                raise PeerFailure(self._store.get(self._failed).decode())
        except (dist.DistNetworkError, dist.DistStoreError, StoreLostError) as error:
            raise PeerFailure(self.who_failed(error)) from error

    @contextmanager
    def first_error_shown(self, where: str = "a synchronisation", *, waits: bool = True) -> Iterator[None]:
        """Turn an error into that of the rank that failed, as far as that is known."""
        try:
            yield
        except PeerFailure:
            raise
        except RuntimeError:
            self.raise_failure()
            raise

    def who_failed(self, error: BaseException) -> str:
        """Return a message that names the cause of a lost connection: the host of the store."""
        return store_text(self._rank, ended=True, on_rank_0=True)
