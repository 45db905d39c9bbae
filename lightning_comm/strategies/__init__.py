"""Strategies: shells that Lightning calls, and the runs that do their work by `core` and `transport`."""

from lightning_comm.strategies.compression.strategy import CompressedDDPStrategy
from lightning_comm.strategies.cyclic.strategy import CyclicStrategy
from lightning_comm.strategies.local_update.strategy import LocalUpdateStrategy
from lightning_comm.strategies.registration import register_strategies

__all__ = ["CompressedDDPStrategy", "CyclicStrategy", "LocalUpdateStrategy", "register_strategies"]
