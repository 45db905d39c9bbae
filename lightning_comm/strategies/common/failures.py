"""Failures of ranks in a run: the watch over other ranks, the report to them, and errors that name the failed rank."""

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy

from lightning_comm.lightning_internals import timeout_of
from lightning_comm.strategies.common import earlier_failures
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.failures import Peers, is_lost_connection
from lightning_comm.transport.group_ends import hang_up, note_exit_status
from lightning_comm.transport.recording import has_unfinished_messages
from lightning_comm.transport.stop_protocol import Agreement, PeerFailure, default_store
from lightning_comm.transport.store_client import StoreLostError

_runs = itertools.count()  # separates the keys of one run in the store from those of the next; equal on all ranks


class RunFailures:
    """Hears of failures of other ranks in a run (a ``fit`` or another), and reports this rank's own.

    Args:
        strategy: Has the ranks and the time-out.
        where: The strategy, for messages.

    """

    def __init__(self, strategy: ParallelStrategy, where: str) -> None:
        self._strategy = strategy
        self._where = where
        self._namespace = ""
        self._peers: Peers | None = None  # from the set-up of a run to its teardown
        self._refused = False  # whether all ranks have found alike that they cannot go on
        self._run_failed = False  # whether that run has ended by an exception on this rank

    def begin(self, steps_done: Callable[[], int]) -> None:
        """Watch the other ranks from the set-up of a run on.

        Args:
            steps_done: Returns how many optimizer steps this rank has done; called from another thread.

        Raises:
            RuntimeError: If an earlier run has left the process group unusable.

        """
        self._end()  # of a run without a teardown
        self._run_failed = self._refused = False
        self._namespace = f"lightning_comm/{next(_runs)}"
        if self._strategy.world_size > 1:
            self._peers = Peers(
                default_store(),
                self._strategy.global_rank,
                self._strategy.world_size,
                f"{self._namespace}/peers",
                self.timeout_s,
                store_on_rank_0=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",  # as torch itself looks
                steps_done=steps_done,
            )
            self._peers.begin("`prepare_data`, or what comes before the set-up")
            earlier_failures.refuse_broken_group(self._peers.store, self._where)

    def end_start(self) -> None:
        """Watch from now on only in waits that are announced, since the strategy's own set-up begins."""
        if self._peers is not None:
            self._peers.end_start()

    def end(self) -> None:
        """End the watch, at the end of a run."""
        self._end(failed=self._run_failed)

    def _end(self, *, failed: bool = True) -> None:
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close(failed=failed)

    def note_failed(self) -> None:
        """Note that the run has failed on this rank, so that no rank waits for it at the end."""
        self._run_failed = True

    def first_error_shown(self, where: str, *, waits: bool = True) -> AbstractContextManager[None]:
        """Turn the loss of a connection during a wait into an error that names the rank that failed."""
        return nullcontext() if self._peers is None else self._peers.first_error_shown(where, waits=waits)

    def refuse_together(self) -> None:
        """Note that all ranks raise the same error now: none of them has failed, and none waits for another."""
        self._refused = True

    def agreement(self, **timing: float) -> Agreement:
        """Return the agreement on stops of this run, which learns of failures as this does.

        Args:
            timing: As in :class:`Agreement`.

        """
        store = default_store() if self._peers is None else self._peers.store
        strategy, peers = self._strategy, self._peers
        return Agreement(store, strategy.global_rank, strategy.world_size, self._namespace, peers=peers, **timing)

    def store_of_run(self) -> tuple[Any, str]:
        """Return the store of the process group, and what keys of this run begin with."""
        return default_store() if self._peers is None else self._peers.store, self._namespace

    def epoch_ends(self, agreement: Agreement) -> EpochEnds:
        """Return the comparison of where ranks end their epochs."""
        store, namespace = self.store_of_run()
        return EpochEnds(
            store,
            self._strategy.global_rank,
            self._strategy.world_size,
            namespace,
            self._where,
            agreement,
            self.close_group,
            self.timeout_s,
        )

    def close_group(self) -> None:
        """Close the connections to the other ranks, which may wait for messages of this one."""
        if self._peers is not None:
            earlier_failures.mark_group_broken(self._peers.store)
        if dist.is_initialized():
            hang_up(None)

    @property
    def timeout_s(self) -> float:
        """How long ranks wait for each other."""
        return timeout_of(self._strategy).total_seconds()

    def part(self) -> None:
        """Wait for the others before leaving, as all ranks have agreed: rank 0 may host the store."""
        if self._peers is not None:
            self._peers.part()

    def report(self, exception: BaseException) -> None:
        """Tell the others that this rank ends by an exception, without a collective.

        A rank that has lost a connection did not fail: its error is changed to name the rank that did. Then this rank
        waits a few seconds for the others to learn of it and to leave as well. Those that do not leave may wait for it
        in a collective, and its process may live on, as in a notebook: so their connections are closed.
        """
        peers = self._peers
        if peers is None:
            return
        self._run_failed = True
        note_exit_status()
        if self._refused:
            peers.part()
            return
        broken = has_unfinished_messages() or any(
            error is not None and is_lost_connection(error) for error in (exception, exception.__cause__)
        )
        if is_lost_connection(exception):
            exception.args = (f"{peers.who_failed(exception)} ({exception})",)
        elif not isinstance(exception, PeerFailure):
            with suppress(StoreLostError):  # the store is gone with rank 0, which all ranks notice
                peers.report(f"{type(exception).__name__}: {exception}")
        earlier_failures.note(peers.failure or f"{type(exception).__name__}: {exception}")
        if broken:
            earlier_failures.mark_group_broken(peers.store)  # before the others can see that this rank has left
        if not peers.part():
            self.close_group()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_peers": None}
