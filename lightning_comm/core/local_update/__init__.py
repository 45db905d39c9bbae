"""Local updates as arithmetic: the rules for a period, and the clock that counts steps and ends rounds."""

from lightning_comm.core.local_update.clock import RoundClock, ends_of_equal_rounds, ends_to_come
from lightning_comm.core.local_update.periods import (
    ENDLESS,
    FixedPeriod,
    PeriodRule,
    PowerPeriod,
    QuadraticPeriod,
)

__all__ = [
    "ENDLESS",
    "FixedPeriod",
    "PeriodRule",
    "PowerPeriod",
    "QuadraticPeriod",
    "RoundClock",
    "ends_of_equal_rounds",
    "ends_to_come",
]
