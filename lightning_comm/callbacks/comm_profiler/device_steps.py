"""Steps that have ended on the host, kept until the device has done them and their times are known."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_comm.core.key_figures import StepFrame
from lightning_comm.core.ledger import CommRecord
from lightning_comm.ondevice.device_clock import DeviceClock, DeviceEvent
from lightning_comm.transport.recording import MarkedRecord


@dataclass
class _Step:
    """A step that has ended on the host."""

    frame: StepFrame
    began: DeviceEvent
    ended: DeviceEvent
    records: list[CommRecord]


class DeviceSteps:
    """Replaces the host's times by the device's, step by step in their order, without waiting for the device.

    Args:
        clock: That of the device.

    """

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._steps: deque[_Step] = deque()

    def add(self, frame: StepFrame, began: DeviceEvent, ended: DeviceEvent, records: list[CommRecord]) -> None:
        """Keep a step, with the messages in it."""
        self._steps.append(_Step(frame, began, ended, records))

    def take(self) -> Iterator[tuple[StepFrame, list[CommRecord]]]:
        """Yield steps by the device's times, up to the first one that the device is not done with."""
        while self._steps and all(map(self._clock.has_passed, _moments(self._steps[0]))):
            step = self._steps.popleft()
            frame = replace(step.frame, start_s=self._clock.at_s(step.began), end_s=self._clock.at_s(step.ended))
            yield frame, [self._on_device(record) for record in step.records]

    def wait(self) -> None:
        """Wait until the device is done with all of them."""
        for step in self._steps:
            for moment in _moments(step):
                self._clock.wait_for(moment)

    def _on_device(self, record: CommRecord) -> CommRecord:
        """Return a record with the times of the device, as far as they are known."""
        if not self._clock.on_cuda:
            return record
        if not isinstance(record, MarkedRecord) or record.ended is None:
            return replace(record, duration_s=0.0, hidden_s=0.0)  # a time of the host, which is none of the device
        ended_s = self._clock.at_s(record.ended)
        if record.began is None:
            return replace(record, start_s=ended_s - record.duration_s)
        began_s, waited_s = self._clock.at_s(record.began), self._clock.at_s(record.waited)
        hidden_s = min(waited_s, ended_s) - began_s
        return replace(record, start_s=began_s, duration_s=ended_s - began_s, hidden_s=hidden_s)


def _moments(step: _Step) -> list[DeviceEvent]:
    """Return all moments by which a step is measured."""
    marked = [record for record in step.records if isinstance(record, MarkedRecord)]
    of_records: list[Any] = [mark for each in marked for mark in (each.began, each.waited, each.ended)]
    return [step.began, step.ended, *(mark for mark in of_records if mark is not None)]
