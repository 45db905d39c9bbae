"""The factor by which a gradient scaler multiplies the loss under fp16, wherever a strategy must know it."""

from typing import Any

from torch import Tensor

from lightning_comm.lightning_internals import scale_on_device


def loss_scale(precision_plugin: Any) -> float | None:
    """Return the present loss scale; ``None`` where none is in use."""
    scaler = getattr(precision_plugin, "scaler", None)
    return None if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def take_smallest_scale(precision_plugin: Any, scales: list[float]) -> None:
    """Take the smallest loss scale of the ranks, which each adjusts to its own gradients; 0 stands for none."""
    smallest, present = min(scales), loss_scale(precision_plugin)
    if present is not None and smallest > 0 and present != smallest:
        precision_plugin.scaler.update(smallest)


class KnownScale:
    """The loss scale, read again only where its scaler may have changed it: on CUDA a read waits for the device.

    Args:
        precision_plugin: Has the scaler, if there is one.

    """

    def __init__(self, precision_plugin: Any) -> None:
        self._precision_plugin = precision_plugin
        self._read_from: tuple[Tensor, int] | None = None  # torch's own count of changes in place with it
        self._scale: float | None = None

    def __call__(self) -> float | None:
        """Return the present loss scale; ``None`` where none is in use."""
        tensor = scale_on_device(getattr(self._precision_plugin, "scaler", None))
        now = None if tensor is None else (tensor, tensor._version)
        if now is None or self._read_from is None or now[0] is not self._read_from[0] or now[1] != self._read_from[1]:
            self._scale, self._read_from = loss_scale(self._precision_plugin), now
        return self._scale
