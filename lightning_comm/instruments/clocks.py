"""Clocks of ranks compared with rank 0's, and what ranks gather from each other outside of training."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.rank_profile import ClockPoint
from lightning_comm.transport import plain_data
from lightning_comm.transport.recording import Recorder, another_group, counted_elsewhere

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


def compare_clocks(group: dist.ProcessGroup | None = None) -> ClockPoint:
    """Return how far rank 0's monotonic clock is ahead of this rank's. Every rank has to call it.

    Each rank in turn asks rank 0 for the time, a few times. The answer of the shortest round trip counts: rank 0 read
    its clock somewhere within it, so half of it bounds the error.

    Args:
        group: All ranks, and it sends from the CPU; ``None`` for the default group.

    Note:
        *Communication.* 16 round trips of 8 bytes between each rank and rank 0, one rank after the other.

    """
    with counted_elsewhere():
        note = torch.zeros(1, dtype=torch.float64)
        rank = dist.get_rank()
        if rank == 0:
            for other in range(1, dist.get_world_size()):
                for _ in range(_ROUND_TRIPS):
                    dist.recv(note, src=other, group=group)
                    dist.send(note.fill_(time.monotonic()), dst=other, group=group)
            return ClockPoint(time.monotonic(), 0.0, 0.0)
        return min((_ask(note, group) for _ in range(_ROUND_TRIPS)), key=lambda point: point.error_s)


def _ask(note: torch.Tensor, group: dist.ProcessGroup | None) -> ClockPoint:
    started = time.monotonic()
    dist.send(note, dst=0, group=group)
    dist.recv(note, src=0, group=group)
    there = float(note)
    ended = time.monotonic()
    middle = (started + ended) / 2
    return ClockPoint(middle, there - middle, (ended - started) / 2)


def number_from_rank_0(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return rank 0's number on all ranks. *Communication*: one broadcast of 8 bytes."""
    with counted_elsewhere():
        row = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(row, src=0, group=group)
        return int(row)


def json_from_rank_0(value: Any, device: torch.device) -> Any:
    """Return rank 0's value on all ranks, as JSON brings it back.

    Note:
        *Communication.* Two broadcasts, of 8 bytes and of the text; none in a single process.

    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    return plain_data.broadcast_json(value, _not_counted(), device_of_group(device), "instruments")


def gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of every rank, in order of rank. Every rank has to call it.

    Note:
        *Communication.* Two all-gathers: 8 bytes a rank, then the longest value from each.

    """
    return plain_data.gather_json(value, _not_counted(group), device, "instruments")


def _not_counted(group: dist.ProcessGroup | None = None) -> Recorder:
    """Return a recorder for what instruments send of their own, which is no part of what they measure."""
    return Recorder(CommLedger(), group, hold=True)


def device_of_group(preferred: torch.device) -> torch.device:
    """Return a device from which the default process group sends: the CPU if it can."""
    return torch.device("cpu") if _can_send_from_the_host() else preferred


def _can_send_from_the_host() -> bool:
    return "gloo" in str(dist.get_backend_config())
