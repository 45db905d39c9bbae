"""The recorder, from which all messages are sent: each is issued here and written to the ledger."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.ledger import CommLedger, CommRecord, wire_bytes
from lightning_comm.transport.failure_messages import LostConnectionError
from lightning_comm.transport.members import Members

_T = TypeVar("_T")

_observers: list[Callable[[CommRecord], None]] = []
_markers: list[Callable[[], Any]] = []
_under_way: "WeakSet[Pending]" = WeakSet()  # of the default group; each is held by its waiter, also after an error
_nesting = threading.local()


@dataclass(frozen=True)
class MarkedRecord(CommRecord):
    """A record with marks of the device at the moments whose times on the host it holds.

    Args:
        began: Before the message was started.
        waited: Before the wait for it.
        ended: After it arrived, in the thread and stream that waited for it.

    """

    began: Any = None
    waited: Any = None
    ended: Any = None

    @classmethod
    def of(cls, record: CommRecord, began: Any, waited: Any, ended: Any) -> "MarkedRecord":
        """Return a record with marks."""
        return cls(**vars(record), began=began, waited=waited, ended=ended)


def observe(observer: Callable[[CommRecord], None], mark: Callable[[], Any] | None = None) -> Callable[[], None]:
    """Pass every record to a function when it is written, to whatever ledger; return a function that stops this.

    Args:
        observer: Receives the records.
        mark: Returns a mark of the device's present moment, which may lag behind the host. It is called where a message
            is started, waited for and has arrived, in the thread that does so, and records become `MarkedRecord`.

    """
    _observers.append(observer)
    if mark is not None:
        _markers.append(mark)

    def end() -> None:
        if observer in _observers:
            _observers.remove(observer)
        if mark in _markers:
            _markers.remove(mark)

    return end


def mark() -> Any:
    """Return a mark of the present moment if an observer asked for marks, otherwise ``None``."""
    markers = tuple(_markers)
    return markers[-1]() if markers else None


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """Mark the block for observers of ``torch.distributed``: its messages are counted already."""
    _nesting.depth = getattr(_nesting, "depth", 0) + 1
    try:
        yield
    finally:
        _nesting.depth -= 1


def is_counted_elsewhere() -> bool:
    """Whether this thread is within :func:`counted_elsewhere`."""
    return getattr(_nesting, "depth", 0) > 0


@dataclass(eq=False)  # compared by identity, as members of a set
class Pending:
    """A message in flight. :meth:`wait` blocks until it has arrived and records it."""

    work: dist.Work
    written: Callable[[float, Any], None]

    def wait(self) -> None:
        """Block until the message has arrived, then record it."""
        since, waited = time.monotonic(), mark()
        self.work.wait()
        self.written(since, waited)

    def done(self) -> bool:
        """Whether the message has arrived. Does not record it."""
        return bool(self.work.is_completed())


class Recorder:
    """Issues collectives over the members of a group and records each in a ledger.

    Args:
        ledger: Where the records go.
        group: The ranks that take part: a process group, or members that others ask as well; ``None`` for all ranks of
            the default group.
        background: Whether messages are sent by a background thread, and so by the members' group for it. Then both
            of what follows holds.
        beside_compute: Whether compute goes on between the start of a message and the wait for it. That time is
            recorded as hidden. On CUDA, where its arrival is not seen, a message lasts until the wait for it ends.
        hold: Whether records are kept back until :meth:`write_held`, because a background thread sends the messages,
            and the ledger and its observers belong to the training thread.

    Note:
        *Communication.* One message for each call. Every rank has to make the same calls in the same order.

        *Times.* On a CPU backend a record lasts from the call to the arrival. On CUDA the host does not wait for the
        device, so a record's duration is the host's share only; see :func:`observe` for those of the device.

    """

    def __init__(
        self,
        ledger: CommLedger,
        group: dist.ProcessGroup | Members | None = None,
        *,
        background: bool = False,
        beside_compute: bool = False,
        hold: bool = False,
    ) -> None:
        self.ledger = ledger
        self.step = 0  # optimizer steps done; the owner of the recorder keeps this up to date
        self.members = group if isinstance(group, Members) else Members(group)
        if background and self.members.background is None:
            raise ValueError(
                "Recorder: `background` needs members with a process group for a background thread, whose messages "
                "would mix with the others; got none. Make them by `Members(group, another_group(timeout))`."
            )
        self._background = background
        self._beside_compute = beside_compute or background
        self._hold = hold or background
        self._held: deque[tuple[CommRecord, tuple[Any, Any, Any] | None]] = (
            deque()
        )  # one thread may add while another writes down

    @property
    def world_size(self) -> int:
        """The number of members."""
        return self.members.size

    @property
    def rank(self) -> int:
        """The place of this rank among the members."""
        return self.members.rank

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.members.background if self._background else self.members.group

    def all_reduce(self, tensor: Tensor, purpose: str, op: Any = dist.ReduceOp.SUM) -> Pending:
        """Start summing ``tensor`` over the ranks, or reducing it otherwise, in place."""
        group = self._group
        return self._issue("all_reduce", purpose, tensor, lambda: dist.all_reduce(tensor, op, group, async_op=True))

    def all_to_all(self, rows: Tensor, purpose: str) -> tuple[Tensor, Pending]:
        """Start sending row ``i`` to the member at place ``i``; row ``i`` of the result is what that one sent here."""
        arrived, group = torch.empty_like(rows), self._group

        def start() -> dist.Work | None:
            return dist.all_to_all_single(arrived, rows, group=group, async_op=True)

        return arrived, self._issue("all_to_all", purpose, rows, start)

    def broadcast(self, tensor: Tensor, purpose: str, src: int = 0) -> Pending:
        """Start replacing ``tensor`` on every rank by that of the member at place ``src``."""
        group, source = self._group, self.members.ranks[src]
        return self._issue("broadcast", purpose, tensor, lambda: dist.broadcast(tensor, source, group, async_op=True))

    def all_gather(self, row: Tensor, purpose: str) -> tuple[Tensor, Pending]:
        """Start collecting ``row`` of every rank; the result has shape ``(world_size, *row.shape)``."""
        rows = torch.empty((self.world_size, *row.shape), dtype=row.dtype, device=row.device)
        # as bytes, since backends do not know every type (gloo: int16, complex)
        flat, group = rows.view(-1).view(torch.uint8), self._group

        def start() -> dist.Work | None:
            own = row.contiguous().view(-1).view(torch.uint8)
            return dist.all_gather_into_tensor(flat, own, group, async_op=True)

        return rows, self._issue("all_gather", purpose, row, start)

    def barrier(self, purpose: str) -> Pending:
        """Start waiting until all ranks have called this; no data is sent."""
        group = self._group
        return self._issue("barrier", purpose, torch.empty(0), lambda: dist.barrier(group, async_op=True))

    def sent_by_others(self, kind: str, purpose: str, payload_bytes: int, send: Callable[[], _T]) -> _T:
        """Let a function of another library send a message of ours, and record it.

        Args:
            kind: The collective or transfer.
            purpose: What it is for.
            payload_bytes: The bytes that this rank passes to it.
            send: Sends it, and returns when it has arrived.

        """
        started = time.monotonic()
        with counted_elsewhere():
            result = send()
        self._write(kind, purpose, payload_bytes, started, time.monotonic() - started)
        return result

    def send(self, memory: Tensor, target: int, purpose: str, payload_bytes: int, *, tag: int, step: int) -> dist.Work:
        """Start sending to one rank, and record it with a duration of zero, since the sender does not wait.

        Args:
            memory: What to send; keep it, and the result, until the result has been waited for.
            target: The place of the receiver among the members.
            purpose: What it is for, one of ``PURPOSES``.
            payload_bytes: How much of the memory is payload; the rest is recorded as ``"control"``.
            tag: Identifies the message, on backends that support tags; messages are received in the order of sending.
            step: Optimizer steps done before the one that the message belongs to.

        """
        with counted_elsewhere():
            work = dist.isend(memory, self.members.ranks[target], self._group, tag)
        assert work is not None  # `None` is for ranks outside the group, and this one is a member
        self._write("send", purpose, payload_bytes, time.monotonic(), 0.0, step=step)
        if control_bytes := memory.numel() * memory.element_size() - payload_bytes:
            self._write("send", "control", control_bytes, time.monotonic(), 0.0, step=step)
        return work

    def receive(self, memory: Tensor, source: int, *, tag: int) -> dist.Work:
        """Start receiving from the member at place ``source``; its bytes are counted there."""
        with counted_elsewhere():
            work = dist.irecv(memory, self.members.ranks[source], self._group, tag)
        assert work is not None
        return work

    def wait_for(self, work: dist.Work, source: int) -> None:
        """Wait for a message of the member at place ``source``.

        Raises:
            LostConnectionError: If it does not arrive; the error names the rank.

        """
        try:
            work.wait()
        except RuntimeError as error:
            raise LostConnectionError(
                f"The connection to rank {self.members.ranks[source]} is lost, or nothing came from it within "
                f"`timeout`, which need not be its own fault. ({error})"
            ) from error

    def waited(self, purpose: str, since_s: float) -> None:
        """Record that compute has waited until now for messages of other ranks."""
        self._write("receive", purpose, 0, since_s, time.monotonic() - since_s)

    def note(self, kind: str, purpose: str, payload_bytes: int) -> None:
        """Record a message that another library sends (such as DDP its gradients), whose duration is not known."""
        self._write(kind, purpose, payload_bytes, time.monotonic(), 0.0)

    def _issue(self, kind: str, purpose: str, tensor: Tensor, start: Callable[[], dist.Work | None]) -> Pending:
        started, began = time.monotonic(), mark()
        payload_bytes = tensor.numel() * tensor.element_size()

        arrived: list[float] = []

        def written(waited_since: float, waited: Any) -> None:
            ended = min([time.monotonic(), *arrived])
            hidden_s = min(waited_since, ended) - started if self._beside_compute else 0.0
            marks = None if began is None else (began, waited if self._beside_compute else began, mark())
            self._write(kind, purpose, payload_bytes, started, ended - started, hidden_s, marks=marks)

        with counted_elsewhere():
            work = start()
        assert work is not None  # `None` is for ranks outside the group, and this one is a member
        if self._beside_compute and not tensor.is_cuda:
            work.get_future().add_done_callback(lambda _: arrived.append(time.monotonic()))
        pending = Pending(work, written)
        if self._group is None:
            _under_way.add(pending)
        return pending

    def _write(
        self,
        kind: str,
        purpose: str,
        payload_bytes: int,
        start_s: float,
        duration_s: float,
        hidden_s: float = 0.0,
        step: int | None = None,
        marks: tuple[Any, Any, Any] | None = None,
    ) -> None:
        sent = wire_bytes(kind, payload_bytes, self.world_size)
        step = self.step if step is None else step
        record = CommRecord(kind, purpose, payload_bytes, sent, step, start_s, duration_s, hidden_s)
        self._held.append((record, marks))
        if not self._hold:
            self.write_held()

    def write_held(self) -> None:
        """Write the records that were kept back; called by the thread that trains, when the other one is done."""
        while self._held:
            record, marks = self._held.popleft()
            self.ledger.add(record)
            shown = record if marks is None else MarkedRecord.of(record, *marks)
            for observer in tuple(_observers):
                observer(shown)


def another_group(timeout: timedelta | None, backend: str | None = None) -> dist.ProcessGroup:
    """Return another process group of all ranks, whose messages are not ordered with those of the default group.

    Args:
        timeout: How long its messages wait for other ranks.
        backend: ``"gloo"`` for small messages between CPUs; ``None`` for that of the default group.

    Note:
        *Communication.* Blocking: all ranks must call it.

    """
    return cast(
        dist.ProcessGroup, dist.new_group(timeout=timeout, backend=backend)
    )  # a group and not torch's number for non-members


def has_unfinished_messages() -> bool:
    """Whether a message of the default group is in flight. If a rank abandons it, later ones no longer match."""
    return any(not pending.done() for pending in tuple(_under_way))
