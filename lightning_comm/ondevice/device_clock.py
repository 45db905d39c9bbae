"""The time at which a device comes to a point of its work, in seconds of this process's clock, without waiting for it.

On a GPU the host runs ahead: it returns from a forward, a backward or a message as soon as that is queued. What the
host's clock says there is when work was asked for. So a point of the work is marked by an event on the current stream,
and read when the device has passed it.

A GPU's clock drifts against the host's, and an event knows only how long it came after another one. So each reading
continues the one before it, and is kept within what is sure: an event never comes before it is asked for, nor after it
is seen to have come.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class Moment:
    """A point of the work.

    Args:
        asked_s: When the host was there, on the monotonic clock.
        event: An event of the device; ``None`` where the host does the work itself.

    """

    asked_s: float
    event: Any = None
    at_s: float | None = None  # when it came to pass, once that is known
    seen_s: float | None = None  # when it was first seen to have passed


class DeviceClock:
    """Marks points of the work of a device, and tells when they came to pass.

    Args:
        device: Where the model computes. On the CPU every moment passes when it is marked.

    Note:
        *Communication.* None. *Cost.* On CUDA one event a moment. The host waits in :meth:`wait_for` and
        :meth:`seconds` alone.

    Example:
        >>> clock = DeviceClock(torch.device("cpu"))
        >>> first, second = Moment(1.0), Moment(1.5)
        >>> clock.has_passed(second), clock.seconds(first, second), clock.at_s(second)
        (True, 0.5, 1.5)

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on_cuda = device.type == "cuda"
        self._last: Moment | None = None  # of those whose time is known

    def mark(self) -> Moment:
        """Return the present point of the work: on CUDA where the current stream of this thread is told to go next."""
        moment = Moment(time.monotonic())
        if self.on_cuda:
            moment.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.event.record(torch.cuda.current_stream(self._device))
        return moment

    def has_passed(self, moment: Moment) -> bool:
        """Whether the device has come to it. Asks, and does not wait."""
        if moment.event is None or moment.seen_s is not None:
            return True
        if moment.event.query():
            moment.seen_s = time.monotonic()
        return moment.seen_s is not None

    def wait_for(self, moment: Moment) -> None:
        """Wait until the device has come to it, where it has not."""
        if not self.has_passed(moment):
            moment.event.synchronize()
            moment.seen_s = time.monotonic()

    def seconds(self, began: Moment, ended: Moment) -> float:
        """Return the time between two moments; waits for the second one if it is to come."""
        if began.event is None or ended.event is None:
            return ended.asked_s - began.asked_s
        self.wait_for(ended)
        return float(began.event.elapsed_time(ended.event)) / 1e3

    def at_s(self, moment: Moment) -> float:
        """Return when a moment that has passed came to pass, on the monotonic clock of the host."""
        if moment.event is None:
            return moment.asked_s
        if moment.at_s is None:
            assert moment.seen_s is not None, "`has_passed` or `wait_for` has seen it"
            last = self._last
            expected_s = moment.seen_s if last is None or last.at_s is None else last.at_s + self.seconds(last, moment)
            moment.at_s = min(max(expected_s, moment.asked_s), moment.seen_s)
            if last is None or last.at_s is None or moment.at_s >= last.at_s:
                self._last = moment
        return moment.at_s
