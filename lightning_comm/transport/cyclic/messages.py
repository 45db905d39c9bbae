"""Messages on the ring of Cyclic Data Parallelism: the tensors of a stage and the status of ranks, as one row.

Gloo cannot send or receive CUDA memory. There a message has a second piece of memory, pinned on the host, that
is sent and received in its place, and the lanes copy between the two (:meth:`StageMessage.to_wire`, :meth:`from_wire`).
"""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

STATUS_NUMBERS = 8  # numbers of the status at the head of each message
STATUS_BYTES = 8 * STATUS_NUMBERS


class Mark:
    """A point in the work of a device, which work elsewhere on it can be made to follow; on a CPU it does nothing.

    Args:
        device: Which; the point is set in the stream that this thread has there.

    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # the host sleeps while it waits: there are many lanes, and each would keep a processor busy
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Let what this thread gives the device from now on follow that point. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def reached(self) -> None:
        """Let the host wait for that point; for lanes, and where a step is over."""
        if self._event is not None:
            self._event.synchronize()

    def keep_for_this_stream(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors of another stream until what this stream does with them is done."""
        if self._event is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream())


class Departure:
    """A message that leaves when its turn comes; :meth:`wait` blocks until it has arrived."""

    def __init__(self, send: Callable[[], dist.Work]) -> None:
        self._send, self._arrived = send, threading.Event()
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Hand the message to the socket."""
        self._work = self._send()

    def end(self) -> None:
        """Note that the message has arrived."""
        assert self._work is not None
        self._work.wait()
        self._arrived.set()

    def wait(self) -> None:
        """Block until the message has arrived."""
        self._arrived.wait()

    def is_over(self) -> bool:
        """Whether the message has arrived."""
        return self._arrived.is_set()


class StageLayout:
    """The layout of a stage's tensors in a message: behind the status, widest types first, so that nothing is padded.

    Args:
        tensors: The parameters of the stage.

    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.payload_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.message_bytes = STATUS_BYTES + self.payload_bytes
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._begins = [0] * len(tensors)
        begin = STATUS_BYTES
        for k in sorted(range(len(tensors)), key=lambda k: -tensors[k].element_size()):
            self._begins[k] = begin
            begin += tensors[k].numel() * tensors[k].element_size()

    def parts(self, memory: Tensor) -> list[Tensor]:
        """Return the tensors of a stage as views of the bytes of a message, in the order of the parameters."""
        parts = []
        for begin, (shape, dtype) in zip(self._begins, self._shapes, strict=True):
            size = shape.numel() * dtype.itemsize
            parts.append(memory[begin : begin + size].view(dtype).view(shape))
        return parts


class StageMessage:
    """A message of a stage: ``status`` (float64) and ``parts`` are views of its ``memory``; ``wire`` is what is sent.

    Args:
        layout: The layout of the stage in it.
        device: Where it is.
        through_host: Whether what is sent lies in pinned memory of the host, as large as the message, and not on the
            device: for backends that cannot send memory of the device.

    """

    def __init__(self, layout: StageLayout, device: torch.device, *, through_host: bool = False) -> None:
        self.memory = torch.empty(layout.message_bytes, dtype=torch.uint8, device=device)
        self.wire = self.memory
        if through_host:
            self.wire = torch.empty(layout.message_bytes, dtype=torch.uint8, pin_memory=True)
        self.status = self.memory[:STATUS_BYTES].view(torch.float64)
        self.parts = layout.parts(self.memory)
        self.sending: dist.Work | Departure | None = None
        self.written = self.read = self._unloaded = Mark(device)

    def to_wire(self) -> None:
        """Put into the memory that is sent what this stream has made of the message; the host waits for it."""
        if self.wire is not self.memory:
            self.wire.copy_(self.memory, non_blocking=True)
            Mark(self.memory.device).reached()  # the network reads it as soon as it is sent

    def from_wire(self) -> None:
        """Let this stream take what has been received into the memory of the device; the host does not wait."""
        if self.wire is not self.memory:
            self.memory.copy_(self.wire, non_blocking=True)
            self._unloaded = Mark(self.memory.device)

    def use_again(self) -> None:
        """Wait until it may be written, by this stream and by the network."""
        self.sent()
        self.read.wait()
        if self.wire is not self.memory:
            self._unloaded.reached()  # the network writes without regard to the device

    def sent(self) -> None:
        """Wait until it has left, if it was sent. A message must be kept until then."""
        if self.sending is not None:
            self.sending.wait()
            self.sending = None

    def has_left(self) -> bool:
        """Whether it has left, as far as that is known without waiting."""
        return self.sending is None or (isinstance(self.sending, Departure) and self.sending.is_over())


class Numbers:
    """The status in a message as it is now: for the host, when it needs it, and for lanes on the device.

    The host need not wait when this is made, so it may give the device more work before. A read two steps later
    does not wait at all, as a rule.

    Args:
        status: That of the message, whose memory is used again.

    """

    def __init__(self, status: Tensor) -> None:
        self._here = self._on_host = status.clone()
        if status.is_cuda:
            self._on_host = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
            self._on_host.copy_(self._here, non_blocking=True)
        self._there = Mark(status.device)

    def tolist(self) -> list[float]:
        """Return them on the host, which waits until the device has computed them."""
        self._there.reached()
        numbers: list[float] = self._on_host.tolist()
        return numbers

    def on_device(self) -> Tensor:
        """Return them where they are, for what this thread gives the device from now on."""
        self._there.wait()
        self._there.keep_for_this_stream([self._here])
        return self._here
