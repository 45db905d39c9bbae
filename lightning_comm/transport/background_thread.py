"""A thread that works beside training, and the stream that such threads share on a device."""

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch

from lightning_comm.transport.group_ends import leave_behind


class BackgroundThread:
    """Runs a function in a thread, without gradients; on CUDA in a stream of its own.

    Args:
        work: What to do. It must touch nothing that others change before :meth:`join`.
        device: The device of its tensors.
        stream: The stream to use on CUDA; ``None``: a new one. See :class:`BackgroundStreams`.

    """

    def __init__(
        self, work: Callable[[], None], device: torch.device, stream: "torch.cuda.Stream | None" = None
    ) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._stream = _new_stream(device) if stream is None else stream
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        # a daemon, so that a message whose other end is gone does not keep the process alive
        self._thread = threading.Thread(target=self._run, name="lightning_comm background", daemon=True)
        self._thread.start()
        leave_behind(self._thread)

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                self._work()
        except BaseException as error:  # raised in `join`
            self._error = error

    def join(self) -> None:
        """Wait until the work is done.

        Raises:
            BaseException: What the work raised.

        """
        self._thread.join()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if self._error is not None:
            raise self._error

    def is_over(self, timeout_s: float) -> bool:
        """Wait for so long at most, and return whether the work is done or has failed."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class BackgroundStreams:
    """Starts one background thread after the other, all of a device in the same stream.

    The memory that a stream has freed is kept for that stream alone, and torch has 32 streams for a device, which it
    hands out in turn: with a new stream for each thread there would be as much memory kept for 31 others.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream | None] = {}

    def start(self, work: Callable[[], None], device: torch.device) -> BackgroundThread:
        """Start a thread; the one before must have been waited for."""
        if device not in self._streams:
            self._streams[device] = _new_stream(device)
        return BackgroundThread(work, device, self._streams[device])


def _new_stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
