"""A fault of DDP with sparse gradients, and the warning for those who compare with it.

DDP divides gradients in place. The values of a sparse gradient may share memory with the incoming gradient, where the
embedding is added to something else, as position to word embeddings: then the gradients that flow on from there are
divided by the number of ranks as well, and again when it is their turn. Seen in torch 2.15, with its own hook too.
"""

import torch
from torch import nn

_NAMED = 4  # at most, in the message


def sparse_embeddings(module: nn.Module) -> list[str]:
    """Return the names of trained embeddings whose gradients are sparse."""
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad
    ]


def fault_of_ddp(module: nn.Module, ranks: int) -> str | None:
    """Return the warning about gradients that DDP averages without our hook; ``None`` if there is nothing to warn of.

    Args:
        module: The model.
        ranks: The number of ranks.

    """
    names = sparse_embeddings(module)
    if not names or ranks == 1:
        return None
    more = ", …" if len(names) > _NAMED else ""
    return (
        f"DDP averages gradients here, and those of {', '.join(map(repr, names[:_NAMED]))}{more} are sparse. torch "
        f"{torch.__version__.partition('+')[0]} divides such a gradient in place; where the embedding is added to "
        f"something else, the gradients behind that are divided by the {ranks} ranks twice, and so are too small. "
        "Leave out `sparse=True`, or add `1 * embedding(...)`, which has memory of its own. CompressedDDPStrategy, and "
        "local updates without a gradient phase, do not have this fault."
    )
