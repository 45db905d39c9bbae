"""Failures of ranks: each is published before its rank leaves, all ranks learn of it, silent ranks are named.

A rank that has lost a connection, or whose wait has timed out, is not the rank that failed. It looks for a published
failure. If there is none, it *calls the roll*: it writes a number into the process group's store, which every rank
answers from a thread of its own, also while it computes. Ranks that have not answered after a few seconds are named as
the cause. That is published as well, so that all ranks name the same ones.

The same thread watches the thread that trains. Nearly all waits of torch end at their time-out, but a call to a store
whose host is stopped does not, and no exception can be raised in it from outside. Where such a wait is overdue, and a
rank has not answered all that time, the watching thread prints the cause and ends the process, as NCCL's watchdog does.
"""

import faulthandler
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch.distributed as dist

from lightning_comm.transport.failure_messages import LostConnectionError, PeerFailure, store_text, verdict
from lightning_comm.transport.roll_call import CALL_S, LAST_ROLL, RollCall
from lightning_comm.transport.store_client import StoreClient, StoreLostError

# Seconds between looks into the store; the share of the time that looks may take; the longest pause between them.
_LOOK_S, _SHARE, _LONGEST_S = 0.5, 0.01, 2.0
_GRACE_S = 4.0  # how long answers to a roll are waited for: two looks of a rank whose looks are slow
_LEAVE_S = 3.0  # how long a rank that leaves waits for the others to leave as well
_GONE_S = 2.0  # how long a rank goes on after its store is lost: the host's last message may still arrive
_OVERDUE_S = 5.0  # how long beyond the time-out a wait may last before the process is ended
_STAY_S = 4.0  # how long rank 0, which hosts the store, waits for the others' last looks

# Texts of gloo and NCCL that an error of the user's own does not contain. Most errors of NCCL are `DistError`.
_LOST = re.compile(
    r"gloo/(transport|rendezvous)/|Application timeout caused pair closure|Gloo connectFullMesh failed|"
    r"monitoredBarrier|NCCL error|NCCL communicator was aborted|Watchdog caught collective operation timeout"
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank cannot be reached, rather than what is wrong on this one."""
    if isinstance(error, (dist.DistError, StoreLostError, LostConnectionError)):
        return True
    if isinstance(error, PeerFailure):
        return False  # the cause has been found already; this names it
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


class _Wait(NamedTuple):
    where: str
    since_s: float


class Peers:
    """The other ranks, from the process group's set-up to the end of a ``fit``, or of another run of the Trainer.

    Args:
        store: The process group's store.
        rank: This rank.
        world_size: The number of ranks.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.
        timeout_s: How long ranks wait for each other.
        store_on_rank_0: Whether rank 0 hosts the store, and not the agent that launched the ranks.
        steps_done: Returns how many optimizer steps this rank has done; called from another thread.

    Note:
        *Communication.* One look into the store every half second, or less often where that takes more than a hundredth
        of the time. Only where a rank has failed, or a wait takes more than half the time-out, a few small values more
        from each rank. None of this is counted in the ledger.

    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        namespace: str,
        timeout_s: float,
        *,
        store_on_rank_0: bool = True,
        steps_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store = StoreClient(store, timeout_s)
        self._roll_call = RollCall(self.store, rank, world_size, namespace)
        self._rank, self._timeout_s = rank, timeout_s
        self._store_on_rank_0, self._steps_done = store_on_rank_0, steps_done
        self._wait: _Wait | None = None
        self._start: _Wait | None = None  # the start of the run: watched as a wait, though this rank may compute
        self._host_left = False  # whether rank 0, which hosts the store, has finished: it may end at any time
        self._asking = False  # whether the thread that trains has lost a connection, and is looking for the cause
        self._lost_s: float | None = None  # when the store was found to be lost
        self._own_roll, self._called_s = 0, 0.0  # the last roll that the watching thread has called, and when
        self._answered_s: dict[int, float] = {}  # when each rank last answered, during the present wait
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lightning_comm peers", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """The published failure, once it is known here."""
        return self._roll_call.failure

    # ---- called by the thread that trains ------------------------------------------------------------------------

    def begin(self, where: str) -> None:
        """Connect to the store while all ranks are there, and watch this rank as if it waited, until :meth:`end_start`.

        Lightning lets ranks wait without a limit while one of them prepares data, unknown to the strategy.

        Args:
            where: What this rank may wait for until then, for the message.

        Raises:
            PeerFailure: If the store does not answer within the time-out.

        """
        try:
            self._roll_call.connect(self._timeout_s)
        except StoreLostError as error:
            raise PeerFailure(self._store_text()) from error
        self._wait = self._start = _Wait(where, time.monotonic())

    def end_start(self) -> None:
        """From now on, watch only the waits that :meth:`first_error_shown` marks."""
        self._wait = self._start = None

    @contextmanager
    def first_error_shown(self, where: str = "a synchronisation", *, waits: bool = True) -> Iterator[None]:
        """Turn the loss of a connection into :class:`PeerFailure`, which names the rank that failed.

        Args:
            where: What this rank waits for, for the message.
            waits: Whether the block does nothing but wait for other ranks, so that it may be watched as one wait.

        """
        outer = self._wait
        # a wait inside another one belongs to it: the outer one has the earlier start, and the deadline
        if waits and (outer is None or outer is self._start):
            self._answered_s.clear()
            self._wait = _Wait(where, time.monotonic())
        try:
            yield
        except PeerFailure:
            raise
        except RuntimeError as error:
            if is_lost_connection(error):
                raise PeerFailure(self.who_failed(error)) from error
            self.raise_failure()  # an error of its own may still follow from another rank's failure
            raise
        finally:
            if outer is not None and outer is self._start:
                outer = self._start = outer._replace(since_s=time.monotonic())  # a message has just come
            self._wait = outer

    def raise_known_failure(self) -> None:
        """Raise :class:`PeerFailure` if a failure is known here. Sends nothing, so it may be called at any time."""
        if self.failure is not None:
            raise PeerFailure(self.failure)
        if self._lost_s is not None and time.monotonic() > self._lost_s + _GONE_S:
            raise PeerFailure(self._store_text())

    def raise_failure(self) -> None:
        """Look whether a failure was published, and raise :class:`PeerFailure` if so."""
        try:
            self._roll_call.look_for_failure()
        except StoreLostError as error:
            raise PeerFailure(self.failure or self._store_text()) from error
        self.raise_known_failure()

    def report(self, message: str) -> None:
        """Tell the other ranks that this one failed. The first report stays."""
        self._roll_call.publish(f"rank {self._rank} failed: {message}", [])

    def who_failed(self, error: BaseException) -> str:
        """Find and publish the cause of a lost connection or a wait that timed out; takes some seconds."""
        self._asking = True
        try:
            return self._ask(str(error))
        except StoreLostError:
            return self.failure or self._store_text()
        finally:
            self._asking = False

    def part(self) -> bool:
        """Leave because of a failure: wait some seconds for other ranks to learn of it and leave as well.

        Returns:
            Whether all that are alive have left. Others may wait in a collective that this rank would take part in.

        """
        until_s = time.monotonic() + _LEAVE_S
        try:
            self._roll_call.say_left(self._step())
            staying = [rank for rank in self._roll_call.others if rank not in self._roll_call.silent]
            while staying and time.monotonic() < until_s:
                staying = [rank for rank in staying if not self._roll_call.has_left(rank)]
                time.sleep(0.02 if staying else 0.0)
        except StoreLostError:
            return False
        return not staying and not self._roll_call.silent

    def close(self, *, failed: bool = True) -> None:
        """End the threads. Other ranks may go on for a while.

        Args:
            failed: Whether the run has failed. If not, and this rank hosts the store, it stays for a moment, until the
                others look into it no more: where a store ends during a look, torch prints a trace.

        """
        with suppress(StoreLostError):
            self._roll_call.say_left(self._step())
            if not failed and self._store_on_rank_0 and self._rank == 0:
                self._wait_for_last_looks()
        self._closed.set()
        self._thread.join(2 * CALL_S)
        self.store.close(failed=failed)

    def _wait_for_last_looks(self) -> None:
        self._roll_call.tell_news()
        until_s = time.monotonic() + _STAY_S
        while len(self._roll_call.answers(LAST_ROLL)) < len(self._roll_call.others) and time.monotonic() < until_s:
            time.sleep(0.02)

    # ---- the cause of a failure ----------------------------------------------------------------------------------

    def _ask(self, reason: str) -> str:
        # A published failure goes before the roll: the rank that failed knows the cause, and may be gone by now.
        until_s = time.monotonic() + _GRACE_S
        roll = self._roll_call.call()
        while True:
            if (failure := self._roll_call.look_for_failure()) is not None:
                return failure
            answers = self._roll_call.answers(roll)
            if len(answers) == len(self._roll_call.others) or time.monotonic() > until_s:
                break
            time.sleep(0.05)
        silent = [rank for rank in self._roll_call.others if rank not in answers]
        cause = verdict(self._rank, silent, {**answers, self._rank: self._status()}, reason)
        return self._roll_call.publish(cause, silent)  # or what another rank has published first

    def _status(self) -> dict[str, Any]:
        wait = self._wait
        where = "" if wait is None or wait is self._start else wait.where
        waits = where or ("a message" if self._asking else "")
        return {"roll": self._roll_call.answered, "waits": waits, "step": self._step()}

    def _step(self) -> int:
        try:
            return self._steps_done()
        except Exception:  # the Trainer may be in the middle of anything
            return -1

    def _store_text(self) -> str:
        return store_text(self._rank, ended=self.store.connection_lost, on_rank_0=self._store_on_rank_0)

    # ---- the thread that watches ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        interval_s = _LOOK_S
        while not self._closed.wait(interval_s):
            began = time.monotonic()
            with suppress(StoreLostError):  # noted below
                if not self._host_left:
                    self._look()
                interval_s = max(_LOOK_S, min((time.monotonic() - began) / _SHARE, _LONGEST_S))
            if self.store.connection_lost and self._lost_s is None:
                self._lost_s = time.monotonic()
            with suppress(StoreLostError):  # seen again the next time
                self._check_wait()

    def _look(self) -> None:
        if not self._roll_call.has_news():
            return
        # Asked before the failure is looked for: rank 0 publishes a failure before it leaves, so once it is seen to
        # have left, that look finds the failure, if there was one.
        self._host_left = self._store_on_rank_0 and self._rank != 0 and self._roll_call.has_left(0)
        self._roll_call.look_for_failure()
        roll = LAST_ROLL if self._host_left else self._roll_call.last_called()
        if roll > self._roll_call.answered:
            self._roll_call.answered = roll
            self._roll_call.answer(self._status())

    def _check_wait(self) -> None:
        """End the process if the thread that trains is in a wait that is overdue and cannot end.

        Three causes, in this order: a failure is known but the wait has not ended with it; the store does not answer; a
        rank has not answered rolls during the whole wait. The first rolls are called after half of the time-out.
        """
        wait, now = self._wait, time.monotonic()
        if wait is None or self._asking or now - wait.since_s < self._timeout_s / 2:
            return  # the look for a cause has a deadline of its own
        overdue = self._timeout_s + _OVERDUE_S
        if self.failure is not None:
            if now - max(wait.since_s, self._roll_call.failed_s) > overdue:
                self._end(wait, self.failure)
        elif (silent_s := self._lost_s or self.store.silent_since_s) is not None:
            if now - max(wait.since_s, silent_s) > overdue:
                self._end(wait, self._store_text())
        else:
            self._answered_s |= dict.fromkeys(self._roll_call.answers(self._own_roll) if self._own_roll else [], now)
            last_s = {rank: max(wait.since_s, self._answered_s.get(rank, 0.0)) for rank in self._roll_call.others}
            silent = [rank for rank, answered_s in last_s.items() if now - answered_s > overdue]
            if silent and self._own_roll:
                self._end(wait, verdict(self._rank, silent, {}, ""))
            if now - self._called_s > _LONGEST_S:
                self._own_roll, self._called_s = self._roll_call.call(), now

    def _end(self, wait: _Wait, text: str) -> None:
        seconds = time.monotonic() - wait.since_s
        message = f"rank {self._rank} has waited for {seconds:.0f} s in {wait.where}, and ends. {text}\n"
        os.write(2, message.encode())
        faulthandler.dump_traceback(file=2)
        os._exit(1)
