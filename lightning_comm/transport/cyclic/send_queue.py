"""A priority queue in front of the link to the next rank on the ring: the message that is needed first is sent first.

Where a link is always busy, it decides how long a step takes, so a message that is needed soon must not wait behind one
that is needed later. A socket sends in the order in which it was filled, and buffers up to megabytes. So it is given no
more than two messages at a time, one under way and one behind it, or as many small ones as fit
(:mod:`lightning_comm.core.cyclic.send_window`); the others wait here, where a more urgent one can still overtake them.
The receiver acknowledges each message when it has arrived. Acknowledgements go against the direction of the ring, where
nothing else is sent; with two ranks there is no such direction.
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
    """Sends the messages of a rank to the next one, the most urgent first.

    Args:
        schedule: The order of messages on the ring, and how urgent each is.
        recorder: Sends and records the acknowledgements.
        tag: The tag of the acknowledgements.

    Attributes:
        flushed_at: Steps done at the last flush. Messages of later steps are less urgent than all from before it: a
            rank that has not passed the flush does not receive them yet.

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
        self._departures: dict[int, Departure] = {}  # messages that wait or are on their way, by number
        self._expected: deque[tuple[Tensor, dist.Work]] = deque()  # acknowledgements by the rank after this one
        self._given: deque[tuple[Tensor, dist.Work]] = deque()  # acknowledgements sent to the rank before this one

    def begin_step(self) -> None:
        """Post the receives of all acknowledgements of a step at once.

        On gloo a receive is announced to the sender by a small message, which here would wait behind the bulk traffic
        to the next rank. Announced early, it is there in time.
        """
        for _ in range(self._in_step):
            number = torch.empty(1, dtype=torch.int64)
            self._expected.append((number, self._recorder.receive(number, self._after, tag=self._tag)))

    def send(
        self, kind: TransferKind, stage: int, step: int, message_bytes: int, send: Callable[[], dist.Work]
    ) -> Departure:
        """Send a message when its turn comes; its memory must be kept until it has left."""
        number = self._schedule.number(kind, stage, step)
        urgency = self._schedule.urgency(self._recorder.rank, kind, stage, step, self.flushed_at)
        departure = Departure(send)
        with self._lock:
            self._departures[number] = departure
            self._window.add(number, urgency, message_bytes)
            self._start_released()
        return departure

    def acknowledge(self, kind: TransferKind, stage: int, step: int) -> None:
        """Acknowledge a message of the rank before this one."""
        number = torch.tensor([self._schedule.number(kind, stage, step)])
        work = self._recorder.send(number, self._before, "control", number.nbytes, tag=self._tag, step=step)
        with self._lock:
            self._given.append((number, work))
            # those of more than two steps ago have long been received, so that this does not wait
            old = [self._given.popleft()[1] for _ in range(len(self._given) - 2 * self._in_step)]
        for work in old:
            work.wait()

    def handle_acknowledgements(self, step: int) -> None:
        """Take the acknowledgements of a step, and send what waits as each arrives; in a thread of its own."""
        for _ in range(self._in_step):
            number, work = self._expected.popleft()
            self._recorder.wait_for(work, self._after)
            with self._lock:
                departure = self._departures.pop(int(number))
                self._window.arrived(int(number))
                self._start_released()
            departure.end()

    def close(self) -> None:
        """Wait until this rank's acknowledgements have left; only where all messages have arrived."""
        for _, work in self._given:
            work.wait()

    def _start_released(self) -> None:
        for number in self._window.release():
            self._departures[number].start()
