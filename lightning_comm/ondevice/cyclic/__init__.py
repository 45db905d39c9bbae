"""Cyclic Data Parallelism within one device: the engine, the delay, stages and their updates."""

from lightning_comm.ondevice.cyclic.delay import DelayedRun, simulate_delay
from lightning_comm.ondevice.cyclic.engine import CyclicEngine

__all__ = ["CyclicEngine", "DelayedRun", "simulate_delay"]
