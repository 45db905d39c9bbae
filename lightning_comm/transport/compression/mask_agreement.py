"""Agreement on masks: rank 0 sends its own, and all ranks compare fingerprints."""

import hashlib

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.pruning.base import Masks
from lightning_comm.transport.recording import Recorder


def agree(masks: Masks | None, problem: str | None, module: nn.Module, recorder: Recorder) -> Masks:
    """Give every rank the masks of rank 0, and check that all have them.

    Args:
        masks: Those of rank 0; ignored on other ranks.
        problem: Why rank 0 has none. Raised on all ranks.
        module: The model, the same on all ranks.
        recorder: Sends and records.

    Raises:
        ValueError: On all ranks, if rank 0 has a problem.
        RuntimeError: On all ranks, if they do not have the same masks.

    Note:
        *Communication.* Three small messages, and for each masked parameter one broadcast of a bit a weight.

    """
    parameters = dict(module.named_parameters())
    # with a default, since Lightning's loop would take a StopIteration for the end of an epoch
    device = next((each.device for each in parameters.values()), torch.device("cpu"))
    names = list(parameters)
    raise_problem_of_rank_0(problem, device, recorder)
    has_mask = torch.tensor([masks is not None and name in masks for name in names], dtype=torch.uint8, device=device)
    recorder.broadcast(has_mask, "masks").wait()
    agreed: Masks = {}
    for name, has in zip(names, has_mask.tolist(), strict=True):
        if has:
            numel = parameters[name].numel()
            own = masks[name].reshape(-1).to(device) if masks is not None and recorder.rank == 0 else None
            bits = pack_bits(own) if own is not None else torch.empty(-(-numel // 8), dtype=torch.uint8, device=device)
            recorder.broadcast(bits, "masks").wait()
            agreed[name] = unpack_bits(bits, numel).view(parameters[name].shape)
    check_agreement(agreed, device, recorder)
    return agreed


def raise_problem_of_rank_0(problem: str | None, device: torch.device, recorder: Recorder) -> None:
    """Raise a problem of rank 0 on all ranks.

    Raises:
        ValueError: On all ranks, if there is one.

    Note:
        *Communication.* One broadcast of 2000 bytes.

    """
    message = torch.zeros(2000, dtype=torch.uint8, device=device)
    if recorder.rank == 0 and problem is not None:
        text = problem.encode()[: message.numel()]
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    recorder.broadcast(message, "masks").wait()
    if bool(message.any()):
        raise ValueError(bytes(message[message != 0].tolist()).decode(errors="replace"))


def check_agreement(masks: Masks | None, device: torch.device, recorder: Recorder, problem: str | None = None) -> None:
    """Compare the masks of all ranks by a fingerprint of 63 bits.

    Masks that differ pass for the same with a probability of 2^-63.

    Args:
        masks: Those of this rank; ``None`` if it has none that fit.
        device: Of the model.
        recorder: Sends and records.
        problem: Why this rank has none. Raised here; the others name the rank.

    Raises:
        ValueError: On all ranks, if one of them has none.
        RuntimeError: On all ranks, if they differ.

    Note:
        *Communication.* One all-gather of 8 bytes.

    """
    mine = torch.tensor([-1 if masks is None else fingerprint(masks)], dtype=torch.int64, device=device)
    rows, pending = recorder.all_gather(mine, "masks")
    pending.wait()
    prints = rows.flatten().tolist()
    if -1 in prints:
        raise ValueError(
            problem
            or f"SparseMask: every rank must have masks that fit the model; those of rank {prints.index(-1)} do "
            "not. Its own message says why."
        )
    if len(set(prints)) > 1:
        other = next(rank for rank, each in enumerate(prints) if each != prints[0])
        raise RuntimeError(
            f"SparseMask: ranks must have the same masks, and rank {other} has others than rank 0. Give masks that "
            "depend on nothing that is rank's own: its data, its random state, or weights that were changed there."
        )


def fingerprint(masks: Masks) -> int:
    """Return the first 63 bits of the SHA-256 of the names, shapes and bits of the masks; at least 0."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name}{tuple(mask.shape)}".encode())
        digest.update(bytes(pack_bits(mask.reshape(-1)).cpu().numpy()))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def pack_bits(row: Tensor) -> Tensor:
    """Return a row of bits, eight in a byte.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]

    """
    padded = torch.zeros(-(-row.numel() // 8) * 8, dtype=torch.uint8, device=row.device)
    padded[: row.numel()] = row
    powers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=row.device)
    return (padded.view(-1, 8) * powers).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Return the row that :func:`pack_bits` packed.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
        [True, False, True]

    """
    powers = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=packed.device)
    return (packed.view(-1, 1) & powers).ne(0).view(-1)[:numel]
