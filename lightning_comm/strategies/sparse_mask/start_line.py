"""One log line: how many weights are pruned, and the bytes to average the others."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_comm.core.quantities import percent
from lightning_comm.strategies.common.sent_bytes import all_reduced_bytes, compressed_bytes, entry_bytes, share_sent
from lightning_comm.transport.compression.sparse_mask import SparseMask


def share_pruned(masks: Mapping[str, Tensor], compression: SparseMask, module: nn.Module, ranks: int) -> str:
    """Return the line: how many weights are pruned, and the bytes to average the others."""
    shapes = {name: tuple(each.shape) for name, each in module.named_parameters() if each.requires_grad}
    kept = {name: (int(masks[name].sum()),) if name in masks else shape for name, shape in shapes.items()}
    weights = sum(each.numel() for each in module.parameters())
    zero = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    sent = compressed_bytes(compression, list(kept.values()), ranks, entry_bytes(module))
    return (
        f"{zero:,} of {weights:,} weights are pruned ({percent(zero / weights)}), in {len(masks)} of {len(shapes)} "
        f"parameters{share_sent(sent, all_reduced_bytes(module, ranks), 'to average the others')}."
    )
