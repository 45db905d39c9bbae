"""A clock of a device's work: when the device reached a point, on this process's clock, without waiting for it.

On a GPU the host runs ahead: it returns from a forward, a backward or a message as soon as that is queued, so its clock
tells when work was queued, not when it ran. A point of the work is therefore marked by an event on the current stream,
and its time is read once the device has passed it.

A GPU's clock drifts against the host's, and an event gives only the time since another event. So each reading continues
the previous one, within certain bounds: an event happens no earlier than it was queued, and no later than it was seen
to have happened.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class DeviceEvent:
    """A point of the work.

    Args:
        asked_s: When the host queued it, on the monotonic clock.
        event: An event of the device; ``None`` where the host does the work itself.

    """

    asked_s: float
    event: Any = None
    at_s: float | None = None  # when the device reached it, once known
    seen_s: float | None = None  # when the host first saw that it had passed


class DeviceClock:
    """Marks points of a device's work, and returns when the device reached them.

    Args:
        device: Where the model computes. On the CPU every point passes when it is marked.

    Note:
        *Communication.* None. *Cost.* On CUDA one event a point. The host waits only in :meth:`wait_for` and
        :meth:`seconds`.

    Example:
        >>> clock = DeviceClock(torch.device("cpu"))
        >>> first, second = DeviceEvent(1.0), DeviceEvent(1.5)
        >>> clock.has_passed(second), clock.seconds(first, second), clock.at_s(second)
        (True, 0.5, 1.5)

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on_cuda = device.type == "cuda"
        self._last: DeviceEvent | None = None  # of those whose time is known

    def mark(self) -> DeviceEvent:
        """Return the present point of the work: on CUDA the end of what is queued on this thread's current stream."""
        point = DeviceEvent(time.monotonic())
        if self.on_cuda:
            point.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            point.event.record(torch.cuda.current_stream(self._device))
        return point

    def has_passed(self, point: DeviceEvent) -> bool:
        """Whether the device has reached it; does not wait."""
        if point.event is None or point.seen_s is not None:
            return True
        if point.event.query():
            point.seen_s = time.monotonic()
        return point.seen_s is not None

    def wait_for(self, point: DeviceEvent) -> None:
        """Wait until the device has reached it."""
        if not self.has_passed(point):
            point.event.synchronize()
            point.seen_s = time.monotonic()

    def seconds(self, began: DeviceEvent, ended: DeviceEvent) -> float:
        """Return the time between two points; waits until the second one has passed."""
        if began.event is None or ended.event is None:
            return ended.asked_s - began.asked_s
        self.wait_for(ended)
        return float(began.event.elapsed_time(ended.event)) / 1e3

    def at_s(self, point: DeviceEvent) -> float:
        """Return when the device reached a point that has passed, on the host's monotonic clock."""
        if point.event is None:
            return point.asked_s
        if point.at_s is None:
            assert point.seen_s is not None, "`has_passed` or `wait_for` has seen it"
            last = self._last
            expected_s = point.seen_s if last is None or last.at_s is None else last.at_s + self.seconds(last, point)
            point.at_s = min(max(expected_s, point.asked_s), point.seen_s)
            if last is None or last.at_s is None or point.at_s >= last.at_s:
                self._last = point
        return point.at_s
