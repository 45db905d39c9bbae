"""Turns: each rank starts a batch 1/N of a batch's time after the rank before it."""

import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
import torch.distributed as dist

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.cyclic.stagger import token_boundary
from lightning_comm.transport.group_ends import leave_behind
from lightning_comm.transport.recording import Recorder

_LISTEN_S = 1.0
_END_S = 5.0  # how long the thread may take to end once nothing holds it any more


class Turns(Protocol):
    """The rule by which ranks begin their batches."""

    def begin_batch(self, step: int) -> None:
        """Wait for this rank's turn to begin a batch, after so many optimizer steps."""

    def reach(self, passes: int) -> None:
        """Note that so many passes of a stage, forward or backward, are done in this batch."""

    def end_batch(self) -> None:
        """Note that a batch is over, however it ended."""

    def close(self) -> None:
        """End, where the run has ended as it should."""

    def abandon(self) -> None:
        """End, where it has not."""


class NoTurns:
    """Ranks that begin when they can."""

    def begin_batch(self, step: int) -> None:
        """Do not wait."""

    def reach(self, passes: int) -> None:
        """Tell nobody."""

    def end_batch(self) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """End nothing."""

    def abandon(self) -> None:
        """End nothing."""


class Stagger:
    """Passes a token on to the next rank when 1/N of a batch's time is over, and waits for one before the next batch.

    Rank 0 begins; from its second batch on it waits for the token of the last rank in the batch before. The time that
    has passed is taken from the number of stages done, with a forward that takes half as long as a backward.

    Args:
        schedule: How many ranks and stages there are.
        recorder: Sends and records over a process group of its own, on the hosts' processors. Its records are held
            back, since backward passes the token on in a thread of its own.
        listen: Called about once a second while waiting; it may raise.

    Note:
        *Communication.* One message of 8 bytes a batch and rank, recorded as ``"stagger"``.

    """

    def __init__(self, schedule: CyclicSchedule, recorder: Recorder, listen: Callable[[], None]) -> None:
        self._recorder, self._listen = recorder, listen
        self._rank, self._workers = recorder.rank, schedule.workers
        self._boundary = token_boundary(schedule.workers, schedule.stages)
        self._passes = 2 * schedule.stages
        self._batches = 0  # begun
        self._passed_on = True
        self._expected: SimpleQueue[bool] = SimpleQueue()
        self._tokens: SimpleQueue[BaseException | None] = SimpleQueue()
        self._sent: deque[tuple[dist.Work, torch.Tensor]] = deque(maxlen=4)
        self._thread = threading.Thread(target=self._receive, name="lightning_comm tokens", daemon=True)
        self._thread.start()

    def begin_batch(self, step: int) -> None:
        """Wait for this rank's turn to begin a batch, after so many optimizer steps."""
        if self._rank > 0 or self._batches > 0:
            self._wait()
        self._recorder.step = step
        self._batches += 1
        self._passed_on = False

    def reach(self, passes: int) -> None:
        """Note that so many passes of a stage, forward or backward, are done in this batch."""
        if not self._passed_on and passes >= self._boundary:
            self._passed_on = True
            token = torch.tensor([self._batches])
            target = (self._rank + 1) % self._workers
            work = self._recorder.send(token, target, "stagger", token.nbytes, tag=0, step=self._recorder.step)
            self._sent.append((work, token))  # a message must be kept until it has left

    def end_batch(self) -> None:
        """Let the next rank begin, also where this one's batch ended in an error that the module has caught."""
        self.reach(self._passes)
        self._recorder.write_held()

    def close(self) -> None:
        """Receive the last token, so that none is in flight, and end."""
        if self._rank == 0 and self._batches > 0:
            self._wait()
        self._expected.put(False)
        for work, _ in self._sent:
            work.wait()
        self._recorder.write_held()

    def abandon(self) -> None:
        """End the thread where another rank is gone, or this one is about to go, once the group has been hung up."""
        self._expected.put(False)
        self._thread.join(_END_S)
        leave_behind(self._thread)

    def _wait(self) -> None:
        self._expected.put(True)
        while True:
            try:
                error = self._tokens.get(timeout=_LISTEN_S)
                break
            except Empty:
                self._listen()
        if error is not None:
            raise error

    def _receive(self) -> None:
        try:
            while self._expected.get():
                token = torch.empty(1, dtype=torch.int64)
                self._recorder.receive(token, (self._rank - 1) % self._workers, tag=0).wait()
                self._tokens.put(None)
        except BaseException as error:  # raised where compute waits
            self._tokens.put(error)
