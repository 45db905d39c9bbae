"""Matrices of low rank."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, Message, Slot
from lightning_comm.transport.compression.feedback import Feedback

_TINY = 1e-8  # added to the norm of a column, so that a gradient of zeros does not become NaN


@dataclass(frozen=True)
class PowerSGD(Compression):
    """Send two thin matrices for each parameter's gradient, and keep what they miss for later (error feedback).

    The gradient of a parameter is taken as a matrix ``M`` (its first dimension by all others) and approximated by
    ``P Q^T`` of rank ``rank``, with one step of power iteration that starts where the last one ended.

    Args:
        rank: Columns of the two matrices; at least 1. 1 to 4 are usual.

    Raises:
        ValueError: If the rank is out of range.

    Note:
        *Communication.* Two all-reduces a bucket: of ``P`` with all parameters that are vectors or would not become
        smaller, then of ``Q``; 4 bytes a number.

        *Overlap.* The second all-reduce needs what the first one brings. It is started when the next bucket is ready,
        so all but the last one go on beside the backward.

        *Memory.* A residual as large as the model, and ``Q``.

        *Beside torch's hook.* ``powerSGD_hook`` starts its second all-reduce from a callback of the first, which on
        gloo hangs or aborts with two buckets, and keeps its residuals by the number of the bucket, which does not
        survive a resume. The arithmetic here is the same, but everything is kept by the parameter's name, and the
        residual is what this rank itself did not send.

    Example:
        >>> PowerSGD(rank=2)
        PowerSGD(rank=2)

    References:
        T. Vogels, S. P. Karimireddy, M. Jaggi. `PowerSGD <https://arxiv.org/abs/1905.13727>`_. NeurIPS 2019.

    """

    rank: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"PowerSGD: `rank` must be a whole number >= 1; got {self.rank!r}. 1 to 4 are usual.")

    @override
    def codec(self, context: Context) -> Codec:
        codec = PowerSGDCodec(context, self.rank)
        return Feedback(codec) if context.feedback else codec


class PowerSGDCodec(Codec):
    """One step of power iteration, over all ranks."""

    def __init__(self, context: Context, rank: int) -> None:
        super().__init__(context)
        self._rank = rank
        self._bases: dict[str, Tensor] = {}  # Q of the step before

    def _columns(self, slot: Slot) -> int:
        """Return the rank that a parameter is sent with; 0 if it is sent in full."""
        rows, columns = _matrix(slot)
        rank = min(self._rank, rows, columns)
        return rank if (rows + columns) * rank < slot.numel else 0

    @override
    def payload_bytes(self, layout: Layout) -> int:
        return 4 * sum(sum(_matrix(slot)) * self._columns(slot) or slot.numel for slot in layout.slots)

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        recorder, purpose, ranks = self.context.recorder, self.context.purpose, self.world_size
        rows = list(zip(layout.slots, layout.split(values), strict=True))
        low = [(slot, _aligned(row.view(_matrix(slot)))) for slot, row in rows if self._columns(slot)]
        full = [row for slot, row in rows if not self._columns(slot)]
        if sent is not None:
            sent.copy_(values)  # low-rank parameters are overwritten below
        lefts = [matrix @ self._basis(slot, values.device) for slot, matrix in low]
        first = torch.cat([each.reshape(-1).float() for each in [*lefts, *full]]).mul_(1 / ranks)
        yield Message(recorder.all_reduce(first, purpose), more=bool(low))

        parts = torch.split(first, [each.numel() for each in [*lefts, *full]])
        for row, part in zip(full, parts[len(low) :], strict=True):
            row.copy_(part)
        if not low:
            return
        parts = parts[: len(low)]
        lefts = [orthogonal_columns(_aligned(part.view_as(left))) for left, part in zip(lefts, parts, strict=True)]
        bases = [matrix.T @ left for (_, matrix), left in zip(low, lefts, strict=True)]
        if sent is not None:
            _put(
                layout,
                sent,
                {slot.name: left @ base.T for (slot, _), left, base in zip(low, lefts, bases, strict=True)},
            )
        second = torch.cat([base.reshape(-1) for base in bases]).mul_(1 / ranks)
        yield Message(recorder.all_reduce(second, purpose))

        products = {}
        for (slot, _), left, base in zip(low, lefts, torch.split(second, [b.numel() for b in bases]), strict=True):
            basis = _aligned(base.view(-1, left.shape[1]))
            products[slot.name] = left @ basis.T
            usable = torch.isfinite(basis).all() & (basis != 0).any()  # else it would stay so for ever
            self._bases[slot.name] = torch.where(usable, basis, self._basis(slot, values.device))
        _put(layout, values, products)

    def _basis(self, slot: Slot, device: torch.device) -> Tensor:
        kept = self._bases.get(slot.name)
        if kept is not None:
            return kept
        generator = self.context.generator(slot.name, 0, device, shared=True)
        return torch.randn(_matrix(slot)[1], self._columns(slot), generator=generator, device=device)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": dict(self._bases)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._bases = dict(state["bases"])


def orthogonal_columns(matrix: Tensor) -> Tensor:
    """Return the matrix with orthogonal columns of length 1, one after the other (Gram-Schmidt); zeros stay zero.

    Example:
        >>> columns = orthogonal_columns(torch.tensor([[3.0, 1.0], [4.0, 1.0]]))
        >>> torch.allclose(columns.T @ columns, torch.eye(2), atol=1e-5)
        True

    """
    columns: list[Tensor] = []
    for column in matrix.unbind(1):
        for earlier in columns:
            column = column - (earlier @ column) * earlier
        columns.append(column / (torch.linalg.vector_norm(column) + _TINY))
    return torch.stack(columns, 1)


def _aligned(matrix: Tensor) -> Tensor:
    """Return a copy in memory of its own, in float32.

    On some processors the last bits of a product depend on where in memory its factors begin, and so on which other
    parameters lie before them in a bucket.
    """
    return matrix.to(torch.float32, copy=True)


def _matrix(slot: Slot) -> tuple[int, int]:
    rows = slot.shape[0] if len(slot.shape) > 1 and slot.numel else 1
    return rows, slot.numel // rows


def _put(layout: Layout, into: Tensor, matrices: dict[str, Tensor]) -> None:
    for slot, row in zip(layout.slots, layout.split(into), strict=True):
        if slot.name in matrices:
            row.copy_(matrices[slot.name].reshape(-1))
