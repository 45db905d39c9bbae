"""One line at the start of a run: the bytes that a compression sends of the gradients."""

from torch import nn

from lightning_comm.strategies.common.sent_bytes import all_reduced_bytes, compressed_bytes, entry_bytes, share_sent
from lightning_comm.transport.compression.base import Compression


def plan_of(compression: Compression, module: nn.Module, ranks: int) -> str:
    """Return the line of a run under DDP with compressed gradients, as long as nothing is pruned."""
    trained = [each for each in module.parameters() if each.requires_grad]
    shapes, full = [tuple(each.shape) for each in trained], all_reduced_bytes(module, ranks)
    sent = compressed_bytes(compression, shapes, ranks, entry_bytes(module))
    said = share_sent(sent, full, "a step")
    return f"{compression!r} for the gradients of {len(shapes)} parameters on {ranks} ranks{said}."
