"""One line at the start of a run that says what a compression leaves of the gradients, and of the weights."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

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


def plan_of(compression: Compression, module: nn.Module, ranks: int) -> str:
    """Return the line of a run under DDP with compressed gradients, as long as nothing is pruned."""
    trained = [each for each in module.parameters() if each.requires_grad]
    shapes, full = [tuple(each.shape) for each in trained], all_reduced_bytes(module, ranks)
    sent = compressed_bytes(compression, shapes, ranks, _itemsize(module))
    return (
        f"{compression!r} for the gradients of {len(shapes)} parameters on {ranks} ranks{_sent(sent, full, 'a step')}."
    )


def share_pruned(masks: Mapping[str, Tensor], compression: SparseMask, module: nn.Module, ranks: int) -> str:
    """Return how many weights are pruned, and what it takes to average the others."""
    shapes = {name: tuple(each.shape) for name, each in module.named_parameters() if each.requires_grad}
    kept = {name: (int(masks[name].sum()),) if name in masks else shape for name, shape in shapes.items()}
    weights = sum(each.numel() for each in module.parameters())
    zero = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    sent = compressed_bytes(compression, list(kept.values()), ranks, _itemsize(module))
    return (
        f"{zero:,} of {weights:,} weights are pruned ({percent(zero / weights)}), in {len(masks)} of {len(shapes)} "
        f"parameters{_sent(sent, all_reduced_bytes(module, ranks), 'to average the others')}."
    )


def _sent(sent: int | None, full: int, when: str) -> str:
    if sent is None or full == 0:
        return ""
    return f": each rank sends {data_size(sent)} {when}, {percent(sent / full)} of the {data_size(full)} under DDP"


def compressed_bytes(
    compression: Compression, shapes: Sequence[tuple[int, ...]], ranks: int, itemsize: int = 4
) -> int | None:
    """Return the bytes that a rank sends to average entries of these shapes; of a mask the kept entries'.

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
    """Return the bytes that a rank hands over to average so many entries of one row; in full for a user's own."""
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


def _itemsize(module: nn.Module) -> int:
    return max((each.element_size() for each in module.parameters() if each.requires_grad), default=4)
