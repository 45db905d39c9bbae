"""What travels on the ring of Cyclic Data Parallelism: the tensors of a stage, and notes, in one piece of memory."""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

NOTES = 8  # numbers at the head of each message
NOTES_BYTES = 8 * NOTES


class Mark:
    """A point in the work of a device, which work elsewhere on it can be told to follow; nothing on a processor."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Let what this thread gives the device from now on follow that point. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def keep_for_this_stream(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors of another stream until what this stream does with them is done."""
        if self._event is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream())


class Departure:
    """A message that leaves when its turn comes; :meth:`wait` blocks until it has arrived."""

    def __init__(self, urgency: int, message_bytes: int, send: Callable[[], dist.Work]) -> None:
        self.urgency, self.message_bytes = urgency, message_bytes
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
    """How the tensors of a stage lie in a message: behind the notes, widest types first, so that nothing is padded.

    Args:
        tensors: The parameters of the stage.

    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.payload_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.message_bytes = NOTES_BYTES + self.payload_bytes
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._begins = [0] * len(tensors)
        begin = NOTES_BYTES
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


class Message:
    """A message of a stage: ``notes`` (float64) and ``parts`` are views of its ``memory``."""

    def __init__(self, layout: StageLayout, device: torch.device) -> None:
        self.memory = torch.empty(layout.message_bytes, dtype=torch.uint8, device=device)
        self.notes = self.memory[:NOTES_BYTES].view(torch.float64)
        self.parts = layout.parts(self.memory)
        self.sending: dist.Work | Departure | None = None
        self.written = self.read = Mark(device)

    def sent(self) -> None:
        """Wait until it has left, if it was sent. A message must be kept until then."""
        if self.sending is not None:
            self.sending.wait()
            self.sending = None

    def has_left(self) -> bool:
        """Whether it has left, as far as that is known without waiting."""
        return self.sending is None or (isinstance(self.sending, Departure) and self.sending.is_over())
