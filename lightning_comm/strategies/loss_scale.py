"""The factor by which a gradient scaler multiplies the loss under fp16, wherever a strategy must know it."""

from typing import Any


def loss_scale(precision_plugin: Any) -> float | None:
    """Return the present loss scale; ``None`` where none is in use."""
    scaler = getattr(precision_plugin, "scaler", None)
    return None if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def take_smallest_scale(precision_plugin: Any, scales: list[float]) -> None:
    """Take the smallest loss scale of the ranks, which each adjusts to its own gradients; 0 stands for none."""
    smallest, present = min(scales), loss_scale(precision_plugin)
    if present is not None and smallest > 0 and present != smallest:
        precision_plugin.scaler.update(smallest)
