"""Clocks of ranks compared with rank 0's, and values that ranks gather from each other outside of training."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.rank_profile import ClockPoint
from lightning_comm.transport import plain_data
from lightning_comm.transport.recording import Recorder, another_group

_ROUND_TRIPS = 16


def group_on_the_host(timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Return a group of all ranks that sends from the CPU: ``None``, the default group, if it can, or one of its own.

    A GPU's backend returns before its messages have arrived, so a clock that is read then is read too early.

    Args:
        timeout: How long messages of an own group wait for other ranks.

    Note:
        *Communication.* Where a group is made, all ranks meet.

    """
    return None if _can_send_from_the_host() else another_group(timeout, backend="gloo")


def compare_clocks(ledger: CommLedger, group: dist.ProcessGroup | None = None) -> ClockPoint:
    """Return how far rank 0's monotonic clock is ahead of this rank's. Every rank has to call it.

    Each rank in turn asks rank 0 for the time, a few times. The answer of the shortest round trip counts: rank 0 read
    its clock somewhere within it, so half of it bounds the error.

    Args:
        ledger: Where messages are written down, as ``"instruments"``.
        group: All ranks, and it sends from the CPU; ``None`` for the default group.

    Note:
        *Communication.* 16 round trips of 8 bytes between each rank and rank 0, one rank after the other.

    """
    recorder = Recorder(ledger, group, hold=True)  # written down when the times have been taken
    note = torch.zeros(1, dtype=torch.float64)
    point = ClockPoint(time.monotonic(), 0.0, 0.0)
    if recorder.rank == 0:
        for other in range(1, recorder.world_size):
            for _ in range(_ROUND_TRIPS):
                recorder.receive(note, other, tag=0).wait()
                _send(recorder, note.fill_(time.monotonic()), other)
    else:
        point = min((_ask(note, recorder) for _ in range(_ROUND_TRIPS)), key=lambda each: each.error_s)
    recorder.write_held()
    return point


def _ask(note: torch.Tensor, recorder: Recorder) -> ClockPoint:
    started = time.monotonic()
    _send(recorder, note, 0)
    recorder.receive(note, 0, tag=0).wait()
    there = float(note)
    ended = time.monotonic()
    middle = (started + ended) / 2
    return ClockPoint(middle, there - middle, (ended - started) / 2)


def _send(recorder: Recorder, note: torch.Tensor, target: int) -> None:
    recorder.send(note, target, "instruments", note.nbytes, tag=0, step=0).wait()


def number_from_rank_0(number: int, ledger: CommLedger, group: dist.ProcessGroup | None = None) -> int:
    """Return rank 0's number on all ranks. *Communication*: one broadcast of 8 bytes, as ``"instruments"``."""
    row = torch.tensor([number], dtype=torch.int64)
    Recorder(ledger, group).broadcast(row, "instruments").wait()
    return int(row)


def json_from_rank_0(value: Any, device: torch.device, ledger: CommLedger, purpose: str = "instruments") -> Any:
    """Return rank 0's value on all ranks, as JSON brings it back.

    Args:
        value: Anything that JSON can hold; that of rank 0 counts.
        device: That of the model.
        ledger: Where messages are written down.
        purpose: What they are for.

    Note:
        *Communication.* Two broadcasts, of 8 bytes and of the text; none in a single process.

    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    return plain_data.broadcast_json(value, Recorder(ledger), device_of_group(device), purpose)


def gather_json(
    value: Any,
    device: torch.device,
    ledger: CommLedger,
    purpose: str = "instruments",
    group: dist.ProcessGroup | None = None,
) -> list[Any]:
    """Return the value of every rank, in order of rank. Every rank has to call it.

    Args:
        value: Anything that JSON can hold.
        device: From which the group sends.
        ledger: Where messages are written down.
        purpose: What they are for.
        group: The ranks; ``None`` for the default group.

    Note:
        *Communication.* Two all-gathers: 8 bytes a rank, then the longest value from each.

    """
    return plain_data.gather_json(value, Recorder(ledger, group), device, purpose)


def device_of_group(preferred: torch.device) -> torch.device:
    """Return a device from which the default process group sends: the CPU if it can."""
    return torch.device("cpu") if _can_send_from_the_host() else preferred


def _can_send_from_the_host() -> bool:
    return "gloo" in str(dist.get_backend_config())
