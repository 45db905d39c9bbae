"""Time as the device sees it, which does its work later than the host asks for it; and numbers on their way there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """When a device has done all that the current stream was given up to here. Made by :func:`moment`.

    Args:
        host_s: The host's clock when it was asked for.
        event: What the device passes then; ``None`` on a CPU, which is never behind.

    """

    host_s: float
    event: torch.cuda.Event | None = None

    @property
    def is_past(self) -> bool:
        """Whether the device has got that far. The host does not wait."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def until(self, later: "Moment") -> float:
        """Return the seconds from here to a later moment of the same device; waits for that one if it is to come."""
        if self.event is None or later.event is None:
            return later.host_s - self.host_s
        if not later.is_past:
            later.event.synchronize()
        return float(self.event.elapsed_time(later.event)) / 1000


def moment(device: torch.device) -> Moment:
    """Mark this place in what a device does: on CUDA an event in its current stream, elsewhere the time of now.

    Example:
        >>> first = moment(torch.device("cpu"))
        >>> first.is_past, first.until(moment(torch.device("cpu"))) >= 0
        (True, True)

    """
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
    return Moment(time.monotonic(), event)


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers on a device. The host does not wait: on CUDA they leave from pinned memory."""
    row = torch.tensor(numbers, dtype=dtype)
    return row.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else row.to(device)
