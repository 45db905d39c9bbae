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
class Moment:
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
        device: Where the model computes. On the CPU every moment passes when it is marked.

    Note:
        *Communication.* None. *Cost.* On CUDA one event a moment. The host waits only in :meth:`wait_for` and
        :meth:`seconds`.

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
        """Return the present point of the work: on CUDA the end of what is queued on this thread's current stream."""
        moment = Moment(time.monotonic())
        if self.on_cuda:
            moment.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.event.record(torch.cuda.current_stream(self._device))
        return moment

    def has_passed(self, moment: Moment) -> bool:
        """Whether the device has reached it; does not wait."""
        if moment.event is None or moment.seen_s is not None:
            return True
        if moment.event.query():
            moment.seen_s = time.monotonic()
        return moment.seen_s is not None

    def wait_for(self, moment: Moment) -> None:
        """Wait until the device has reached it."""
        if not self.has_passed(moment):
            moment.event.synchronize()
            moment.seen_s = time.monotonic()

    def seconds(self, began: Moment, ended: Moment) -> float:
        """Return the time between two moments; waits until the second one has passed."""
        if began.event is None or ended.event is None:
            return ended.asked_s - began.asked_s
        self.wait_for(ended)
        return float(began.event.elapsed_time(ended.event)) / 1e3

    def at_s(self, moment: Moment) -> float:
        """Return when the device reached a moment that has passed, on the host's monotonic clock."""
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
