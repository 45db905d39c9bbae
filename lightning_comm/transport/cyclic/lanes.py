"""Lanes: threads beside the one that computes, each of which handles the same messages of every step in turn."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from queue import SimpleQueue

import torch

from lightning_comm.transport.group_ends import leave_behind

_END_S = 5.0  # how long lanes may take to end once nothing holds them any more
_LISTEN_S = 1.0  # seconds between looks for failed ranks in a wait; a look takes up to 70 ms on a slow link


class ClosedError(Exception):
    """Ends a lane, or what waits for one."""


class Lanes:
    """Starts lanes, hands them steps, and lets compute wait for their results; raises the error of one that failed.

    Args:
        device: Where the tensors are. On a CUDA device each lane has a stream of its own.

    Attributes:
        changed: A condition: held where a lane changes what compute waits for, and notified afterwards.

    """

    def __init__(self, device: torch.device) -> None:
        self.changed = threading.Condition()
        self._device = device
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._steps: list[SimpleQueue[int | None]] = []  # by lane

    def start(self, handle: Callable[[int], None], what: str) -> None:
        """Start a lane.

        Args:
            handle: Called with each step.
            what: What it handles.

        """
        steps: SimpleQueue[int | None] = SimpleQueue()
        # a daemon, so that a message whose other end is gone does not keep the process alive
        thread = threading.Thread(target=self._run, args=(steps, handle), name=f"lightning_comm {what}", daemon=True)
        self._steps.append(steps)
        self._threads.append(thread)
        thread.start()

    def begin_step(self, step: int) -> None:
        """Let all lanes handle a step, once they are done with those before."""
        self.raise_error()
        for steps in self._steps:
            steps.put(step)

    def wait_until(self, condition: Callable[[], bool], listen: Callable[[], None]) -> None:
        """Wait until lanes have done something.

        Args:
            condition: Whether they have.
            listen: Called about once a second; it may raise.

        Raises:
            BaseException: What went wrong in a lane.

        """
        while True:
            with self.changed:
                if self.changed.wait_for(lambda: self._error or self._closed or condition(), timeout=_LISTEN_S):
                    break
            listen()
        self.raise_error()
        if self._closed and not condition():
            raise ClosedError

    def raise_error(self) -> None:
        """Raise what went wrong in a lane, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let lanes end when they are done with all steps that they were given."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        for steps in self._steps:
            steps.put(None)

    def join(self) -> None:
        """Wait for them to end."""
        for thread in self._threads:
            thread.join()
        self.raise_error()

    def leave_behind(self) -> None:
        """Wait a little for them to end, and leave those that do not where they are."""
        until_s = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
            leave_behind(thread)

    def _run(self, steps: "SimpleQueue[int | None]", handle: Callable[[int], None]) -> None:
        on_cuda = self._device.type == "cuda"
        try:
            stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                while (step := steps.get()) is not None:
                    handle(step)
        except ClosedError:
            return
        except BaseException as error:  # raised where compute looks for it
            with self.changed:
                self._error = self._error or error
                self.changed.notify_all()
