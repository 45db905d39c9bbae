"""Communication-efficient training for PyTorch Lightning.

Importing this package registers its strategies, so that ``Trainer(strategy="qsr")`` finds them.
"""

from lightning_comm.callbacks import AdaptivePartition, BatchNormReestimation, CommProfiler, EmulatedDevice
from lightning_comm.core.compression.pruning_schedule import PruningSchedule
from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.ledger import CommLedger, CommRecord
from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod
from lightning_comm.data import PartitionedLoader, ResumableLoader
from lightning_comm.formats.profile import load_profile
from lightning_comm.ondevice.activation_meter import ActivationMeter, SharedCounter
from lightning_comm.ondevice.cyclic.delay import DelayedRun, simulate_delay
from lightning_comm.ondevice.cyclic.engine import CyclicEngine
from lightning_comm.ondevice.pruning import (
    GraSPPruning,
    MagnitudePruning,
    MaskFile,
    MaskFunction,
    ModulePruning,
    Pruning,
)
from lightning_comm.strategies import CompressedDDPStrategy, CyclicStrategy, LocalUpdateStrategy, register_strategies
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK

__all__ = [
    "ActivationMeter",
    "AdaptivePartition",
    "Averaging",
    "BatchNormReestimation",
    "Cast",
    "CommLedger",
    "CommProfiler",
    "CommRecord",
    "CompressedDDPStrategy",
    "Compression",
    "CyclicEngine",
    "CyclicSchedule",
    "CyclicStrategy",
    "DelayedRun",
    "EmulatedDevice",
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
    "PeriodRule",
    "PowerPeriod",
    "PowerSGD",
    "Pruning",
    "PruningSchedule",
    "QuadraticPeriod",
    "ResumableLoader",
    "RoundClock",
    "SharedCounter",
    "SparseMask",
    "Ternary",
    "TopK",
    "load_profile",
    "simulate_delay",
]
__version__ = "0.1.0"

register_strategies()
