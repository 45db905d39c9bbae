"""Masks of pruned weights, and the rules by which they are chosen.

A mask has the shape of a parameter and is True where a weight is kept. Masks are chosen on rank 0 and broadcast, so
ties, random numbers or samples that only one rank has seen cannot make them differ. Ranks then compare a fingerprint of
all their bits; if it differs, all raise an error.
"""

from lightning_comm.ondevice.pruning.base import Masks, Pruning, PruningContext, checked_masks, prunable
from lightning_comm.ondevice.pruning.existing_masks import MaskFile, MaskFunction, ModulePruning
from lightning_comm.ondevice.pruning.grasp import GraSPPruning
from lightning_comm.ondevice.pruning.magnitude import MagnitudePruning
from lightning_comm.ondevice.pruning.scores import erk_shares, keep_largest

__all__ = [
    "GraSPPruning",
    "MagnitudePruning",
    "MaskFile",
    "MaskFunction",
    "Masks",
    "ModulePruning",
    "Pruning",
    "PruningContext",
    "checked_masks",
    "erk_shares",
    "keep_largest",
    "prunable",
]
