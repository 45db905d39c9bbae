"""Callbacks for runs with communication-efficient strategies."""

from lightning_comm.callbacks.batch_norm import BatchNormReestimation

__all__ = ["BatchNormReestimation"]
