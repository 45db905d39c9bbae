"""The meter of one rank: its times in a window of batches with equal shares, after the first ones with new shares."""

import math
import statistics
from typing import NamedTuple

from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.instruments.busy_time import BusyTimer
from lightning_comm.ondevice.device_clock import DeviceEvent

_SETTLE_STEPS = 2  # left out after a change: memory is allocated anew, kernels are chosen for the new shape


class RankTimes(NamedTuple):
    """The times of one rank in a window, sent as float64.

    Args:
        busy_s: Median seconds until the last local gradient; NaN if nothing was measured.
        fetch_s: Median seconds in which it waited for data; on CUDA, in which the device was idle for it.
        step_s: Median seconds from one batch to the next.
        epoch: Of the first batch that no loader of this rank has passed yet, from which a change may hold.
        batch: The number of that batch in its epoch.
        cap: The most samples that fit into its memory; -1 where that is not known or not checked.

    """

    busy_s: float
    fetch_s: float
    step_s: float
    epoch: float
    batch: float
    cap: float = -1


class PartitionMeter:
    """Measures batches, and keeps those of the present window.

    Which batches count depends on places and shares alone, so it is the same on all ranks, whatever their times.

    Args:
        timer: Measures a batch.
        warmup_steps: Batches at the start that are left out.

    Note:
        *Communication.* None.

    """

    def __init__(self, timer: BusyTimer, warmup_steps: int) -> None:
        self._timer = timer
        self.batches = 0  # of the window
        self._skip = warmup_steps
        self._sizes: tuple[int, ...] | None = None
        self._window = 0
        self._counts = False
        self._began: DeviceEvent | None = None
        self._busy_s: list[float] = []
        self._fetch_s: list[float] = []
        self._steps: list[tuple[DeviceEvent, DeviceEvent]] = []

    def begin(self, sizes: tuple[int, ...], *, full: bool, started_s: float, fetch_s: float) -> None:
        """Begin a batch with these numbers of samples by rank: a full batch, or a last one of another size."""
        last = self._began if self._counts else None
        if full and sizes != self._sizes:
            last = None
            if self._sizes is not None:
                self._skip = max(self._skip, _SETTLE_STEPS)
            self._sizes = sizes
            self.begin_window()
        self._counts = full and self._skip == 0
        self._skip = max(0, self._skip - 1)
        self._began = self._timer.begin(self._window if self._counts else None, started_s, fetch_s)
        if last is not None:
            self._steps.append((last, self._began))

    def end(self) -> None:
        """End a batch."""
        self._timer.end()
        self.batches += self._counts

    def leave_training(self) -> None:
        """Something other than training follows, so the step is over."""
        self._began = None

    def begin_window(self) -> None:
        """Forget what was measured."""
        self._window += 1
        self.batches = 0
        self._busy_s, self._fetch_s, self._steps = [], [], []

    def times(self, place: BatchIndex, cap: int | None) -> RankTimes:
        """Return the times of the window.

        Args:
            place: The first batch that no loader of this rank has passed yet.
            cap: The most samples that fit into its memory.

        """
        for busy in self._timer.take():
            if busy.key == self._window:
                self._busy_s.append(busy.seconds)
                self._fetch_s.append(busy.fetch_s)
        clock = self._timer.clock
        steps_s = [clock.seconds(*step) for step in self._steps if clock.has_passed(step[1])]
        return RankTimes(
            _median(self._busy_s),
            _median(self._fetch_s),
            _median(steps_s),
            place.epoch,
            place.batch,
            -1 if cap is None else cap,
        )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
