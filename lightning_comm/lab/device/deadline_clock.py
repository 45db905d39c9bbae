"""The clock of an emulated device: it sleeps until deadlines, and counts real compute and late deadlines."""

import time

TOLERANCE = 0.01  # of a step's time, by which it may be late before it counts as an overrun,
TOLERANCE_S = 0.001  # or this long, which is less than a busy machine takes to wake a process


class DeadlineClock:
    """Sleeps until shares of a pass have gone by since it began.

    Example:
        >>> clock = DeadlineClock()
        >>> clock.begin_pass(0.01)
        >>> clock.wait(0.5)
        >>> clock.wait(1.0)
        >>> clock.end_pass()
        >>> clock.end_step(0.01)
        >>> clock.steps, clock.paced_s >= 0.01, clock.overruns
        (1, True, 0)

    """

    def __init__(self) -> None:
        self.steps = 0
        self.paced_s = 0.0
        self.stated_s = 0.0  # what the paced steps were to take
        self.slept_s = 0.0
        self.overruns = 0  # steps that were late by more than the tolerance
        self.late_s = 0.0  # by how much these were late, together
        self.worst_late_s = 0.0
        self._began_s = self._length_s = self._pass_late_s = self._step_late_s = 0.0

    def begin_pass(self, length_s: float) -> None:
        """Begin a pass that is to take so many seconds from now."""
        self._began_s, self._length_s, self._pass_late_s = time.perf_counter(), length_s, 0.0

    def wait(self, share: float) -> None:
        """Sleep until this share of the pass's time has gone by; not at all if it has already."""
        now = time.perf_counter()
        rest_s = self._began_s + share * self._length_s - now
        self._pass_late_s = max(0.0, -rest_s)  # of the last deadline so far: earlier ones may be made up for
        if rest_s > 0:
            time.sleep(rest_s)
            self.slept_s += time.perf_counter() - now

    def put_off(self, seconds: float) -> None:
        """Let everything else of the pass be so much later, since the device had nothing to do for so long."""
        self._began_s += seconds

    def end_pass(self) -> None:
        """End the pass, and count its time."""
        self.paced_s += time.perf_counter() - self._began_s
        self._step_late_s += self._pass_late_s

    def end_step(self, length_s: float) -> None:
        """End a step whose passes were to take so many seconds in all."""
        self.steps += 1
        self.stated_s += length_s
        if self._step_late_s > max(TOLERANCE * length_s, TOLERANCE_S):
            self.overruns += 1
            self.late_s += self._step_late_s
            self.worst_late_s = max(self.worst_late_s, self._step_late_s)
        self._step_late_s = 0.0
