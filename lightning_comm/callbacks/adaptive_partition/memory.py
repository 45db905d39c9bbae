"""The free memory of a rank's GPU: how many samples fit, estimated from batches of other sizes."""

import socket

import torch

from lightning_comm.core.adaptive_partition.balancing import memory_cap


def card_of(device: torch.device) -> str | None:
    """Return the identity of a GPU, by which ranks know with whom they share it; ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(uuid) if uuid is not None else f"{socket.gethostname()}/{device}"


class MemoryRoom:
    """The most samples that fit into the memory of a rank's GPU, as far as that is known.

    Memory that other processes hold is not free, and these include other ranks. Ranks on one card share the free memory
    in equal parts, since all of them may grow at once. What the allocator keeps beyond what tensors need, because it is
    fragmented or was needed before, counts as needed again.

    Args:
        device: Where the model computes.
        sharers: How many ranks have that card.

    Note:
        *Communication.* None. *Cost.* The driver is asked for free memory, once a window; nothing waits for the device.

    """

    def __init__(self, device: torch.device, sharers: int) -> None:
        self._device = device
        self._sharers = max(1, sharers)
        self._peaks: dict[int, int] = {}  # bytes of tensors, at each size that was the largest so far

    def cap(self, own: int) -> int | None:
        """Return the most samples that fit, at least ``own``, the present ones; ``None`` on the CPU."""
        device = self._device
        if device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(device)
        if own >= max(self._peaks, default=0):  # the peak so far is that of the largest batch so far
            self._peaks[own] = peak
        kept = max(0, torch.cuda.max_memory_reserved(device) - peak)
        free, _ = torch.cuda.mem_get_info(device)
        room = torch.cuda.memory_reserved(device) + free // self._sharers - kept
        # the memory of the present batch is this process's already
        return max(own, memory_cap(list(self._peaks.items()), room, present=own))
