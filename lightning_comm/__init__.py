"""Communication-efficient training for PyTorch Lightning.

Importing this package registers its strategies, so that ``Trainer(strategy="qsr")`` finds them.
"""

from lightning_comm.callbacks import AdaptivePartition, BatchNormReestimation, CommProfiler
from lightning_comm.core.compression.pruning_schedule import PruningSchedule
from lightning_comm.core.local_update.periods import FixedPeriod, PowerPeriod, QuadraticPeriod
from lightning_comm.data import PartitionedLoader, ResumableLoader
from lightning_comm.formats.profile import load_profile
from lightning_comm.ondevice.pruning import (
    GraSPPruning,
    MagnitudePruning,
    MaskFile,
    MaskFunction,
    ModulePruning,
)
from lightning_comm.strategies import CompressedDDPStrategy, CyclicStrategy, LocalUpdateStrategy, register_strategies
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK

__all__ = [
    "AdaptivePartition",
    "Averaging",
    "BatchNormReestimation",
    "Cast",
    "CommProfiler",
    "CompressedDDPStrategy",
    "CyclicStrategy",
    "FixedPeriod",
    "GraSPPruning",
    "Int8",
    "LocalUpdateStrategy",
    "MagnitudePruning",
    "MaskFile",
    "MaskFunction",
    "ModulePruning",
    "NoSync",
    "PartitionedLoader",
    "PowerPeriod",
    "PowerSGD",
    "PruningSchedule",
    "QuadraticPeriod",
    "ResumableLoader",
    "SparseMask",
    "Ternary",
    "TopK",
    "load_profile",
]
__version__ = "0.1.0"

register_strategies()
