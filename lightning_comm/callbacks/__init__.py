"""Callbacks for runs with the strategies of this package, or with plain DDP."""

from lightning_comm.callbacks.adaptive_partition.callback import AdaptivePartition
from lightning_comm.callbacks.batch_norm import BatchNormReestimation
from lightning_comm.callbacks.comm_profiler.callback import CommProfiler
from lightning_comm.callbacks.emulated_device import EmulatedDevice

__all__ = ["AdaptivePartition", "BatchNormReestimation", "CommProfiler", "EmulatedDevice"]
