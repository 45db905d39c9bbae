"""Optimizer steps of one rank: how many each batch brought, and how long a step takes."""

from collections import deque

from lightning_comm.ondevice.device_clock import DeviceClock, DeviceEvent

_KEPT = 0.8  # of the time so far; the latest step has the rest
_MOST = 4  # the latest step counts as at most this many times the time so far: it may contain a pause of another rank


class StepCounter:
    """Counts the optimizer steps of a batch, and measures their time.

    Args:
        clock: Marks moments of the device's work.

    Attributes:
        seconds: The recent time of a step; 0 as long as none is known.

    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._began = clock.mark()
        self._steps: deque[tuple[DeviceEvent, DeviceEvent, int]] = deque()  # the device may not have done them
        self._count = 0
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """Steps since :meth:`take`."""
        return self._count

    def add(self) -> None:
        """Count a step."""
        self._count += 1

    def take(self) -> int:
        """Return the steps of the batch that ends here, and count anew."""
        count, self._count = self._count, 0
        return count

    def begin(self) -> None:
        """Note that the next step begins now, after everything that ranks do at the end of one."""
        self._began = self._clock.mark()

    def end(self, count: int) -> None:
        """Note that this many steps end now, and read the times of those that the device has done."""
        self._steps.append((self._began, self._clock.mark(), count))
        while self._steps and self._clock.has_passed(self._steps[0][1]):
            began, ended, count = self._steps.popleft()
            latest = self._clock.seconds(began, ended) / count
            if self.seconds > 0:
                latest = _KEPT * self.seconds + (1 - _KEPT) * min(latest, _MOST * self.seconds)
            self.seconds = latest
