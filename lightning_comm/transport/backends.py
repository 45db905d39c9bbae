"""Which backend of a process group sends the tensors of which kind of device."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def backends(group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Return the backend by type of device, as of ``"cpu:gloo,cuda:nccl"``; no other device is served.

    Args:
        group: Which; ``None`` for the default group.

    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {pair[0]: pair[1] for pair in pairs}


def backend_of(device: torch.device, group: dist.ProcessGroup | None = None) -> str | None:
    """Return the backend that sends what lies on a device; ``None`` if none does."""
    return backends(group).get(device.type)


def unsent_problems(
    named: Iterable[tuple[str, Tensor]], way_out: str, group: dist.ProcessGroup | None = None
) -> Iterator[str]:
    """Yield why tensors cannot be sent that lie where no backend of the process group sends from.

    Args:
        named: The tensors, each with what it is for people.
        way_out: What else than another backend would help.
        group: Which; ``None`` for the default group.

    """
    served = backends(group)
    found = [f"{name} on {tensor.device}" for name, tensor in named if tensor.device.type not in served]
    if found:
        config = ",".join(f"{device}:{backend}" for device, backend in served.items())
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield (
            f"`process_group_backend` is {config!r}, which sends nothing from elsewhere, and what is averaged lies "
            f"there: {', '.join(found[:3])}{more}. Give `process_group_backend='cpu:gloo,cuda:nccl'`, or {way_out}."
        )
