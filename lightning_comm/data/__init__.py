"""Loaders: torch.utils.data only, never Lightning."""

from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.data.resumable import ResumableLoader

__all__ = ["PartitionedLoader", "ResumableLoader"]
