"""Work that goes on beside training, in a thread of its own."""

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch

from lightning_comm.transport.recording import leave_behind


class Errand:
    """Runs a function in a thread, without gradients; on CUDA in a stream of its own.

    Args:
        work: What to do. It must touch nothing that others change before :meth:`join`.
        device: Where its tensors are.

    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        # a daemon, so that a message whose other end is gone does not keep the process alive
        self._thread = threading.Thread(target=self._run, name="lightning_comm errand", daemon=True)
        self._thread.start()
        leave_behind(self._thread)

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                self._work()
        except BaseException as error:  # raised where somebody waits for it
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
