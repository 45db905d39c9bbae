"""Which weights are pruned: masks, where they come from, and how ranks agree on them.

A mask has the shape of a parameter and is True where a weight is kept. Masks are chosen on rank 0 and broadcast, so no
tie, no random number and no sample that one rank alone has seen can make them differ; ranks then compare a fingerprint
of all their bits, and disagreement is an error on all of them.
"""

from lightning_comm.transport.pruning.agreement import agree, check_agreement, fingerprint, pack_bits, unpack_bits
from lightning_comm.transport.pruning.base import Masks, Moment, Pruning, checked_masks, prunable
from lightning_comm.transport.pruning.given import MaskFile, MaskFunction, ModulePruning
from lightning_comm.transport.pruning.grasp import GraSPPruning
from lightning_comm.transport.pruning.magnitude import MagnitudePruning
from lightning_comm.transport.pruning.scores import erk_shares, keep_largest

__all__ = [
    "GraSPPruning",
    "MagnitudePruning",
    "MaskFile",
    "MaskFunction",
    "Masks",
    "ModulePruning",
    "Moment",
    "Pruning",
    "agree",
    "check_agreement",
    "checked_masks",
    "erk_shares",
    "fingerprint",
    "keep_largest",
    "pack_bits",
    "prunable",
    "unpack_bits",
]
