"""The loss scale of a run, as the host last read it: residuals are scaled by it, and on CUDA each read is a wait."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_comm.lightning_internals import scale_on_device
from lightning_comm.strategies.common.loss_scale import loss_scale


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
        tensor = self._on_device()
        if tensor is None:
            return loss_scale(self._precision_plugin)  # not on the device yet, or none
        if self.unread() is not None:
            self.note_read([float(tensor)])
        return self._scale

    def unread(self) -> Tensor | None:
        """Return the scale if it may have changed since it was read, to be read together with other numbers."""
        tensor = self._on_device()
        if tensor is None or self._read_from is None:
            return tensor
        earlier, version = self._read_from
        return None if tensor is earlier and tensor._version == version else tensor

    def note_read(self, values: Sequence[float]) -> None:
        """Keep the value that :meth:`unread` has returned, once it has been read."""
        tensor = self._on_device()
        assert tensor is not None
        (self._scale,), self._read_from = values, (tensor, tensor._version)

    def _on_device(self) -> Tensor | None:
        return scale_on_device(getattr(self._precision_plugin, "scaler", None))
