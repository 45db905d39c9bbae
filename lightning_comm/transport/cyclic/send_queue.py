"""The way to the next rank on the ring: of the messages that wait for it, the one that is needed first goes first.

A link that is busy all the time decides how long a step takes, and what is needed soon must not queue behind what has
time. The queue of a socket keeps the order in which it was filled, and holds up to megabytes. So no more than two
messages are given to it: one that is on its way, and one behind it. The receiver says when a message has arrived. That
travels against the direction of the ring, where nothing else is on its way; with two ranks there is no such direction.
"""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.cyclic.schedule import TRANSFER_KINDS, CyclicSchedule, TransferKind
from lightning_comm.transport.cyclic.messages import Departure
from lightning_comm.transport.recording import Recorder

_AT_ONCE = 2  # one travels while the word of the one before it comes back
_AT_ONCE_BYTES = 2**17  # small messages: as many as this holds


class UrgentFirst:
    """Sends the messages of a rank to the next one, those first that are needed first.

    A message may go if fewer than two are on their way, or if they are small, or if it is more urgent than all of them.
    The last of these is what keeps ranks from waiting in a circle: a message may be on its way to a rank that does not
    take it yet, since it waits itself for one behind it. Such a one is always the more urgent
    (:meth:`CyclicSchedule.needed_slot`).

    Args:
        schedule: Who sends what to whom.
        recorder: Sends and records the words.
        tag: Of the words.

    Note:
        *Communication.* For each message 8 bytes from its receiver to its sender, counted as ``"control"``.

    """

    def __init__(self, schedule: CyclicSchedule, recorder: Recorder, tag: int) -> None:
        self._schedule, self._recorder, self._tag = schedule, recorder, tag
        rank, workers = recorder.rank, schedule.workers
        self._after, self._before = schedule.after(rank), (rank - 1) % workers
        self._in_step = sum(
            schedule.sends(rank, stage, kind) for stage in range(schedule.stages) for kind in TRANSFER_KINDS
        )
        self._lock = threading.Lock()
        self._count = itertools.count()
        self._waiting: list[tuple[int, int, int, Departure]] = []  # a heap: urgency, order, name
        self._on_the_way: dict[int, Departure] = {}  # by name
        self._asked: deque[tuple[Tensor, dist.Work]] = deque()  # words of the rank after this one
        self._said: deque[tuple[Tensor, dist.Work]] = deque()  # words to the rank before this one

    def begin_step(self) -> None:
        """Ask for the words on all messages of a step at once: what asks for them waits behind bulk traffic."""
        for _ in range(self._in_step):
            word = torch.empty(1, dtype=torch.int64)
            self._asked.append((word, self._recorder.receive(word, self._after, tag=self._tag)))

    def send(
        self, kind: TransferKind, stage: int, step: int, message_bytes: int, send: Callable[[], dist.Work]
    ) -> Departure:
        """Send a message when its turn comes; it must be kept until then."""
        urgency = self._schedule.needed_slot(self._recorder.rank, kind, stage, step)
        departure = Departure(urgency, message_bytes, send)
        with self._lock:
            heapq.heappush(self._waiting, (urgency, next(self._count), self._name(kind, stage, step), departure))
            self._let_go()
        return departure

    def arrived(self, kind: TransferKind, stage: int, step: int) -> None:
        """Tell the rank before this one that a message of it is here."""
        word = torch.tensor([self._name(kind, stage, step)])
        work = self._recorder.send(word, self._before, "control", word.nbytes, tag=self._tag, step=step)
        with self._lock:
            self._said.append((word, work))
            old = [self._said.popleft()[1] for _ in range(len(self._said) - 2 * self._in_step)]
        for work in old:
            work.wait()

    def handle_words(self, step: int) -> None:
        """Let messages go as word comes that others have arrived, for as many as a step has; in a thread of its own."""
        for _ in range(self._in_step):
            word, work = self._asked.popleft()
            self._recorder.wait_for(work, self._after)
            with self._lock:
                departure = self._on_the_way.pop(int(word))
                self._let_go()
            departure.end()

    def close(self) -> None:
        """Wait for what this rank has said; only where all messages have arrived."""
        for _, work in self._said:
            work.wait()

    def _let_go(self) -> None:
        while self._waiting and self._may_go(self._waiting[0][-1]):
            _, _, name, departure = heapq.heappop(self._waiting)
            self._on_the_way[name] = departure
            departure.start()

    def _may_go(self, next_one: Departure) -> bool:
        others = self._on_the_way.values()
        return (
            len(others) < _AT_ONCE
            or next_one.message_bytes + sum(each.message_bytes for each in others) <= _AT_ONCE_BYTES
            or next_one.urgency < min(each.urgency for each in others)
        )

    def _name(self, kind: TransferKind, stage: int, step: int) -> int:
        return 2 * (step * self._schedule.stages + stage) + (kind == "gradient")
