"""The busy time of a rank in a batch: until its own gradients are ready, without messages that wait for others.

A backward under DDP returns at the same moment on all ranks, since it ends with an all-reduce. A slow rank differs
from a fast one in when its *last local gradient* is there. Torch's autograd engine calls what is queued during a
backward when all gradients have been computed, in the order of queueing. DDP queues its wait for the messages when
the last bucket is full; a hook on the loss runs first of all, so what it queues is called before that wait.

On CUDA a hook runs when work is enqueued, not when it is done. There events are recorded on the stream and read some
batches later, once they have passed: the host never waits for the device. What the host fetches while the device is
still at the batch before costs nothing, so of the time for data that part counts in which the device stood still.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_comm.core.ledger import CommRecord
from lightning_comm.instruments.collectives import Watcher
from lightning_comm.ondevice.device_clock import DeviceClock, DeviceEvent


class Busy(NamedTuple):
    """The busy time of one batch on this rank.

    Args:
        key: What the batch was announced by.
        seconds: Fetching and computing, until the last local gradient.
        fetch_s: The part of it in which compute waited for data.

    """

    key: Any
    seconds: float
    fetch_s: float


@dataclass
class _Batch:
    key: Any
    fetch_s: float
    before: DeviceEvent | None  # when the device was done with the batch before; on CUDA
    began: DeviceEvent
    spans: list[tuple[DeviceEvent, DeviceEvent]] = field(default_factory=list)
    waited_s: float = 0.0  # within the spans


class BusyTimer:
    """Measures the busy time of each batch on this rank.

    Messages in the forward (a metric that is reduced on each step, DDP's broadcast of buffers, SyncBatchNorm) make all
    ranks wait for the slowest, and so hide which one that is. Between :meth:`listen` and :meth:`close` the calls of
    ``torch.distributed`` are watched, and on the CPU the time in them is left out. On CUDA it cannot be
    separated from compute; :attr:`messages_within` counts such messages. Nor can it there for a compression that waits
    within the backward for messages of earlier buckets.

    A batch may have several backward passes, as under manual optimization; the time in which one returns late, because
    it waits for other ranks, is left out, and so is what follows the last one.

    Args:
        device: Where the model computes.

    Note:
        *Communication.* None. *Cost.* Some microseconds a batch; on CUDA two events a batch and two a backward.

    Example:
        >>> import time
        >>> timer = BusyTimer(torch.device("cpu"))
        >>> began = timer.begin("batch 0", started_s=time.monotonic(), fetch_s=0.0)
        >>> loss = torch.ones(2, requires_grad=True).sum()
        >>> timer.before_backward(loss)
        >>> loss.backward()
        >>> timer.after_backward()
        >>> timer.end()
        >>> [(busy.key, busy.seconds > 0) for busy in timer.take()]
        [('batch 0', True)]

    """

    def __init__(self, device: torch.device) -> None:
        self.clock = DeviceClock(device)
        self._on_cuda = self.clock.on_cuda
        self._batch: _Batch | None = None
        self._began = DeviceEvent(0.0)  # of the part of a batch that is measured now
        self._ended: DeviceEvent | None = None  # the last batch, on CUDA
        self._in_backward = False
        self._watching: RemovableHandle | None = None
        self._waits: list[tuple[float, float]] = []  # start and duration of messages since the last span
        self._watcher = Watcher(self._add_message, lambda: 0, lambda call: call())
        self.messages_within = 0  # in the busy times so far
        self._measured: deque[_Batch] = deque()

    def watch(self) -> None:
        """Begin to watch messages."""
        self._watcher.install()

    def close(self) -> None:
        """Stop watching messages."""
        self._watcher.remove()

    def _add_message(self, record: CommRecord) -> None:
        self._waits.append((record.start_s, record.duration_s))

    def begin(self, key: Any, started_s: float, fetch_s: float) -> DeviceEvent:
        """Begin a batch whose data were asked for at ``started_s`` (monotonic clock) and came ``fetch_s`` later.

        On CUDA the device's time counts from here, and what it stood still for ``fetch_s`` is added to it.

        Returns:
            The moment from which the batch counts.

        """
        self._began = self.clock.mark() if self._on_cuda else DeviceEvent(started_s)
        self._batch = _Batch(key, fetch_s, self._ended, self._began)
        self._waits = [] if self._on_cuda else [wait for wait in self._waits if wait[0] >= started_s]
        self._in_backward = False
        return self._began

    def before_backward(self, loss: Tensor) -> None:
        """Watch the backward that starts from a loss."""
        if self._batch is not None and loss.requires_grad:
            self._watching = loss.register_hook(self._queue)  # type: ignore[no-untyped-call]

    def _queue(self, gradient: Tensor) -> None:
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self.gradients_ready)

    def gradients_ready(self, waited_s: float = 0.0) -> None:
        """Note that all local gradients of the present backward are there. Of several calls the first counts.

        For callers that know of it earlier than the autograd engine: a hook of DDP's that waits for messages in its
        body. The time for which it has done so in this backward is left out; on CUDA not, where it is the host's alone.
        """
        if self._batch is not None and self._in_backward:
            self._in_backward = False
            self._batch.waited_s += self._waited_since(self._began) + (0.0 if self._on_cuda else waited_s)
            self._batch.spans.append((self._began, self.clock.mark()))

    def _waited_since(self, began: DeviceEvent) -> float:
        within = [seconds for start_s, seconds in self._waits if self._on_cuda or start_s >= began.asked_s]
        self.messages_within += len(within)
        self._waits.clear()
        return 0.0 if self._on_cuda else sum(within)

    def after_backward(self) -> None:
        """Note that a backward has returned; what is computed from here on counts, if another one follows."""
        self._in_backward = False
        if self._watching is not None:  # the same loss may be part of another backward
            self._watching.remove()
            self._watching = None
        self._waits.clear()
        self._began = self.clock.mark()

    def end(self) -> None:
        """End a batch. One without a backward was not measured."""
        if self._batch is not None and self._batch.spans:
            self._measured.append(self._batch)
        self._batch = None
        if self._on_cuda:
            self._ended = self.clock.mark()

    def take(self) -> list[Busy]:
        """Return the batches measured since the last call; on CUDA those that the device is done with."""
        done: list[Busy] = []
        while self._measured and self.clock.has_passed(self._measured[0].spans[-1][1]):
            batch = self._measured.popleft()
            seconds = sum(self.clock.seconds(*span) for span in batch.spans) - batch.waited_s
            fetch_s = batch.fetch_s
            if self._on_cuda and batch.before is not None:
                fetch_s = min(fetch_s, max(0.0, self.clock.seconds(batch.before, batch.began)))
            done.append(Busy(batch.key, seconds + (fetch_s if self._on_cuda else 0.0), fetch_s))
        return done
