"""Bytes that a rank sends to average a model, in full and compressed, for the log lines at the start of a run."""

import math
from collections.abc import Sequence

from torch import nn

from lightning_comm.core.compression.payload import Part, parts
from lightning_comm.core.ledger import wire_bytes
from lightning_comm.core.quantities import data_size, percent
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK

_METHODS = {Int8: "int8", NoSync: "no_sync", PowerSGD: "powersgd", Ternary: "ternary", TopK: "topk"}


def compressed_bytes(
    compression: Compression, shapes: Sequence[tuple[int, ...]], ranks: int, itemsize: int = 4
) -> int | None:
    """Return the bytes that a rank sends to average entries of these shapes; under a mask, the kept entries.

    Args:
        compression: What sends them.
        shapes: Of the entries of each parameter.
        ranks: How many.
        itemsize: Bytes of an entry that is sent in full.

    Returns:
        ``None`` for a compression of the user's own.

    """
    made = _parts(compression, shapes, ranks, itemsize)
    return None if made is None else sum(wire_bytes(part.kind, part.payload_bytes, ranks) for part in made)


def handed_over_bytes(compression: Compression, entries: int, ranks: int) -> int:
    """Return the payload bytes to average this many entries of one row; in full for a compression of the user's own."""
    made = _parts(compression, [(entries,)], ranks, 4)
    return 4 * entries if made is None else sum(part.payload_bytes for part in made)


def _parts(compression: Compression, shapes: Sequence[tuple[int, ...]], ranks: int, itemsize: int) -> list[Part] | None:
    sender = compression.sender if type(compression) is SparseMask else compression
    if type(sender) is Full:
        return [Part("all_reduce", itemsize * sum(map(math.prod, shapes)))]
    method = sender.dtype if type(sender) is Cast else _METHODS.get(type(sender))
    if method is None:
        return None  # also for a class of the user's own that derives from one of ours
    ratio = sender.ratio if isinstance(sender, TopK) else 1.0
    rank = sender.rank if isinstance(sender, PowerSGD) else 1
    return parts(method, shapes, ranks, ratio=ratio, rank=rank)


def all_reduced_bytes(module: nn.Module, ranks: int) -> int:
    """Return the bytes that a rank sends when all gradients are averaged in full."""
    gradients = sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
    return wire_bytes("all_reduce", gradients, ranks)


def entry_bytes(module: nn.Module) -> int:
    """Return the bytes of an entry that is sent in full."""
    return max((each.element_size() for each in module.parameters() if each.requires_grad), default=4)


def share_sent(sent: int | None, full: int, when: str) -> str:
    """Return a clause with the bytes sent and their share of plain DDP's; empty where that is not known."""
    if sent is None or full == 0:
        return ""
    return f": each rank sends {data_size(sent)} {when}, {percent(sent / full)} of the {data_size(full)} under DDP"
