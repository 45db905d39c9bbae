"""The loss scale: the factor by which a gradient scaler multiplies the loss under fp16."""

from typing import Any

import torch
from torch import Tensor

from lightning_comm.lightning_internals import scale_on_device


def loss_scale(precision_plugin: Any) -> float | None:
    """Return the present loss scale; ``None`` where none is in use. On CUDA the host waits for the device."""
    scaler = _scaler(precision_plugin)
    return None if scaler is None else float(scaler.get_scale())


def loss_scale_on(precision_plugin: Any, device: torch.device) -> Tensor | None:
    """Return the present loss scale as a number on a device, for which the host does not wait; ``None`` without one."""
    scaler = _scaler(precision_plugin)
    if scaler is None:
        return None
    scaled: Tensor = scaler.scale(torch.ones((), device=device))
    return scaled.detach()


def take_smallest_scale(precision_plugin: Any, scales: list[float], own: float) -> None:
    """Set the smallest loss scale of the ranks, each of which adjusts its own to its gradients; 0 is none.

    Args:
        precision_plugin: Has the scaler.
        scales: Those of all ranks.
        own: That of this rank.

    Note:
        *Host.* It does not wait for a device, where the scaler has made its scale there.

    """
    smallest, scaler = min(scales), _scaler(precision_plugin)
    if scaler is None or not 0 < smallest != own:
        return
    scale = scale_on_device(scaler)
    if scale is not None:
        scale.fill_(smallest)  # as `load_state_dict` does, whose state is read off the device
    else:  # a scaler that has not scaled a loss yet, as in a run that has just been resumed
        scaler.load_state_dict({**scaler.state_dict(), "scale": smallest})


def _scaler(precision_plugin: Any) -> Any:
    scaler = getattr(precision_plugin, "scaler", None)
    return None if scaler is None or not scaler.is_enabled() else scaler
