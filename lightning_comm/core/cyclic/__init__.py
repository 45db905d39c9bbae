"""Cyclic Data Parallelism as arithmetic: the schedule, its proof, the cuts of a model, and the stagger."""

from lightning_comm.core.cyclic.schedule import CyclicSchedule

__all__ = ["CyclicSchedule"]
