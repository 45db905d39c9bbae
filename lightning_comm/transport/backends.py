"""Backends of a process group, by the kind of device whose tensors they send."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def backends(group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Return the backend by type of device, as of ``"cpu:gloo,cuda:nccl"``; no other device is served.

    Args:
        group: The group; ``None`` for the default group.

    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {pair[0]: pair[1] for pair in pairs}


def backend_of(device: torch.device, group: dist.ProcessGroup | None = None) -> str | None:
    """Return the backend that sends tensors from a device; ``None`` if none does."""
    return backends(group).get(device.type)


def unsent_problems(
    named: Iterable[tuple[str, Tensor]], way_out: str, group: dist.ProcessGroup | None = None
) -> Iterator[str]:
    """Yield a problem if tensors are on devices from which no backend of the process group can send.

    Args:
        named: The tensors, each with its name in the message.
        way_out: An alternative to another backend, for the message.
        group: The group; ``None`` for the default group.

    """
    served = backends(group)
    found = [f"{name} on {tensor.device}" for name, tensor in named if tensor.device.type not in served]
    if found:
        config = ",".join(f"{device}:{backend}" for device, backend in served.items())
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield (
            f"`process_group_backend` is {config!r}, which cannot send from other devices, and what is averaged "
            f"lies there: {', '.join(found[:3])}{more}. Give `process_group_backend='cpu:gloo,cuda:nccl'`, or "
            f"{way_out}."
        )
