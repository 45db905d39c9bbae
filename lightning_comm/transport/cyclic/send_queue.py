"""The way to the next rank on the ring: of the messages that wait for it, the one that is needed first goes first.

A link that is busy all the time decides how long a step takes, and what is needed soon must not queue behind what has
time. The queue of a socket keeps the order in which it was filled, and holds up to megabytes. So no more than two
messages are given to it: one that is on its way, and one behind it (:mod:`lightning_comm.core.cyclic.send_window`). The
receiver acknowledges each when it has arrived. That travels against the direction of the ring, where nothing else is on
its way; with two ranks there is no such direction.
"""

import threading
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.cyclic.schedule import TRANSFER_KINDS, CyclicSchedule, TransferKind
from lightning_comm.core.cyclic.send_window import SendWindow
from lightning_comm.transport.cyclic.messages import Departure
from lightning_comm.transport.recording import Recorder


class UrgentFirst:
    """Sends the messages of a rank to the next one, those first that are needed first.

    Args:
        schedule: Who sends what to whom, and how urgent it is.
        recorder: Sends and records the acknowledgements.
        tag: Of the acknowledgements.

    Attributes:
        flushed_at: Steps done at the last flush. What is sent from now on waits behind all from before it: a rank that
            has not passed the flush does not receive it yet.

    Note:
        *Communication.* For each message 8 bytes from its receiver to its sender, counted as ``"control"``.

    """

    def __init__(self, schedule: CyclicSchedule, recorder: Recorder, tag: int) -> None:
        self.flushed_at = 0
        self._schedule, self._recorder, self._tag = schedule, recorder, tag
        rank, workers = recorder.rank, schedule.workers
        self._after, self._before = schedule.after(rank), (rank - 1) % workers
        self._in_step = sum(
            schedule.sends(rank, stage, kind) for stage in range(schedule.stages) for kind in TRANSFER_KINDS
        )
        self._lock = threading.Lock()
        self._window = SendWindow()
        self._departures: dict[int, Departure] = {}  # those that wait or are on their way, by number
        self._expected: deque[tuple[Tensor, dist.Work]] = deque()  # acknowledgements of the rank after this one
        self._given: deque[tuple[Tensor, dist.Work]] = deque()  # acknowledgements to the rank before this one

    def begin_step(self) -> None:
        """Ask for the acknowledgements of a whole step at once: what asks for them waits behind bulk traffic."""
        for _ in range(self._in_step):
            number = torch.empty(1, dtype=torch.int64)
            self._expected.append((number, self._recorder.receive(number, self._after, tag=self._tag)))

    def send(
        self, kind: TransferKind, stage: int, step: int, message_bytes: int, send: Callable[[], dist.Work]
    ) -> Departure:
        """Send a message when its turn comes; it must be kept until then."""
        number = self._schedule.number(kind, stage, step)
        urgency = self._schedule.urgency(self._recorder.rank, kind, stage, step, self.flushed_at)
        departure = Departure(send)
        with self._lock:
            self._departures[number] = departure
            self._window.add(number, urgency, message_bytes)
            self._let_go()
        return departure

    def acknowledge(self, kind: TransferKind, stage: int, step: int) -> None:
        """Tell the rank before this one that a message of it is here."""
        number = torch.tensor([self._schedule.number(kind, stage, step)])
        work = self._recorder.send(number, self._before, "control", number.nbytes, tag=self._tag, step=step)
        with self._lock:
            self._given.append((number, work))
            old = [self._given.popleft()[1] for _ in range(len(self._given) - 2 * self._in_step)]
        for work in old:
            work.wait()

    def handle_acknowledgements(self, step: int) -> None:
        """Let messages go as others are acknowledged, for as many as a step has; in a thread of its own."""
        for _ in range(self._in_step):
            number, work = self._expected.popleft()
            self._recorder.wait_for(work, self._after)
            with self._lock:
                departure = self._departures.pop(int(number))
                self._window.arrived(int(number))
                self._let_go()
            departure.end()

    def close(self) -> None:
        """Wait for the acknowledgements that this rank has given; only where all messages have arrived."""
        for _, work in self._given:
            work.wait()

    def _let_go(self) -> None:
        for number in self._window.let_go():
            self._departures[number].start()
