"""Communication-efficient training for PyTorch Lightning.

Importing this package registers its strategies, so that ``Trainer(strategy="qsr")`` finds them.
"""

from lightning_comm.callbacks import BatchNormReestimation, CommProfiler, EmulatedDevice
from lightning_comm.core.ledger import CommLedger, CommRecord
from lightning_comm.core.local_update import FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod, RoundClock
from lightning_comm.planning.profile_files import load_profile
from lightning_comm.strategies import LocalUpdateStrategy, register_strategies
from lightning_comm.transport.averaging import Averaging

__all__ = [
    "Averaging",
    "BatchNormReestimation",
    "CommLedger",
    "CommProfiler",
    "CommRecord",
    "EmulatedDevice",
    "FixedPeriod",
    "LocalUpdateStrategy",
    "PeriodRule",
    "PowerPeriod",
    "QuadraticPeriod",
    "RoundClock",
    "load_profile",
]
__version__ = "0.1.0"

register_strategies()
