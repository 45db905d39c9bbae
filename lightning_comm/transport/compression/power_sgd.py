"""PowerSGD: each gradient as a product of two thin matrices, of low rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.compression.base import (
    Codec,
    Compression,
    Context,
    Conversation,
    Layout,
    Slot,
    StartedMessage,
)
from lightning_comm.transport.compression.feedback import Feedback
from lightning_comm.transport.compression.rounding import scale_type

_DEPENDENT = 1e-10  # relative to the largest column: a rest below this is rounding, so the columns before explain it
_ALIGNED_BYTES = 64
_ALIGNED_ENTRIES = 16  # of float32

_Row = tuple[Slot, Tensor]


@dataclass(frozen=True)
class PowerSGD(Compression):
    """Send two thin matrices for each parameter's gradient, and keep what they miss for later (error feedback).

    The gradient of a parameter is taken as a matrix ``M`` (its first dimension by all others) and approximated by
    ``P Q^T`` of rank ``rank``, with one step of power iteration that starts where the last one ended. ``P`` and the
    ``Q`` that the next step starts from have orthonormal columns, so the scale of gradients does not matter.

    Args:
        rank: Columns of the two matrices; at least 1. 1 to 4 are usual.

    Raises:
        ValueError: If the rank is out of range.

    Note:
        *Communication.* Two all-reduces a bucket: of ``P`` with all parameters that are vectors or would not become
        smaller, then of ``Q``; 4 bytes a number (8 where gradients are float64).

        *Overlap.* The second all-reduce needs what the first one brings. It is started when the next bucket is ready,
        so all but the last one go on beside the backward.

        *Memory.* A residual as large as the model, and ``Q``.

        How it differs from torch's ``powerSGD_hook``: ``docs/techniques/compression.md``.

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
        self._bases: dict[str, Tensor] = {}  # Q of the step before, one direction a row
        self._starts: dict[str, Tensor] = {}  # that of the first step, which also gives spare ones

    def _directions(self, slot: Slot) -> int:
        """Return the rank that a parameter is sent with; 0 if it is sent in full."""
        rows, columns = _matrix(slot)
        rank = min(self._rank, rows, columns)
        return rank if (rows + columns) * rank < slot.numel else 0

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        return self._mean(values, layout, sent, None)

    @override
    def mean_and_rest(self, entries: Tensor, layout: Layout, means: Tensor) -> Conversation:
        return self._mean(means, layout, None, entries)

    def _mean(self, values: Tensor, layout: Layout, sent: Tensor | None, rest: Tensor | None) -> Conversation:
        """Write into the values their mean; or that of the rest, if there is one, and leave in it what is not sent."""
        recorder, purpose, ranks = self.context.recorder, self.context.purpose, self.world_size
        low, full = self._divided(layout, values if rest is None else rest)
        workspace = _Workspace(values, [slot for slot, _ in low])
        old = [self._basis(slot, values) for slot, _ in low]
        # one direction a row throughout: of the ways to multiply by so thin a matrix the one that reads along memory
        lefts = [workspace.matrix(slot, row) @ _small(basis).T for (slot, row), basis in zip(low, old, strict=True)]
        numbers = [each.reshape(-1).to(workspace.dtype) for each in [*lefts, *(row for _, row in full)]]
        first = torch.cat(numbers).mul_(1 / ranks)
        if sent is not None:
            _copy(full, self._divided(layout, sent)[1])
        yield StartedMessage(recorder.all_reduce(first, purpose), more=bool(low))

        parts = torch.split(first, [each.numel() for each in numbers])
        low_means, full_means = self._divided(layout, values)
        _copy([(slot, part) for (slot, _), part in zip(full, parts[len(low) :], strict=True)], full_means)
        if rest is not None:
            for _, row in full:
                row.zero_()
        if not low:
            return
        lefts = _by_shape(orthonormal_rows, [part.view_as(left).T for left, part in zip(lefts, parts, strict=False)])
        bases = [_limited(left @ workspace.matrix(slot, row)) for (slot, row), left in zip(low, lefts, strict=True)]
        if sent is not None:
            _multiply(lefts, bases, self._divided(layout, sent)[0])
        if rest is not None:
            _multiply(lefts, bases, low, subtract=True)
        second = torch.cat([base.reshape(-1) for base in bases]).mul_(1 / ranks)
        yield StartedMessage(recorder.all_reduce(second, purpose))

        parts = torch.split(second, [base.numel() for base in bases])
        bases = [_aligned(part.view_as(base)) for part, base in zip(parts, bases, strict=True)]
        _multiply(lefts, bases, low_means)
        # another one in each step: all of them together reach everywhere
        spare = [self._start(slot, values).roll(self.step + 1, -1) for slot, _ in low]
        self._bases.update(zip((slot.name for slot, _ in low), _by_shape(_next_bases, bases, spare, old), strict=True))

    def _divided(self, layout: Layout, values: Tensor) -> tuple[list[_Row], list[_Row]]:
        """Return the parameters' rows, those that are sent with a low rank and those that are sent in full."""
        rows = list(zip(layout.slots, layout.split(values), strict=True))
        low = [(slot, row) for slot, row in rows if self._directions(slot)]
        return low, [(slot, row) for slot, row in rows if not self._directions(slot)]

    def _basis(self, slot: Slot, values: Tensor) -> Tensor:
        """Return the directions that a parameter's iteration starts from; at first, or in another shape, at random."""
        start, kept = self._start(slot, values), self._bases.get(slot.name)
        if kept is None or kept.shape != start.shape:
            return start
        if (kept.dtype, kept.device) != (start.dtype, start.device):  # read from a file, there and in its width
            kept = self._bases[slot.name] = _aligned(uploaded(kept.to(start.dtype), start.device))
        return kept

    def _start(self, slot: Slot, values: Tensor) -> Tensor:
        """Return random directions, the same on all ranks and in all steps.

        Drawn and made orthonormal on the host: a GPU's random numbers depend on its kind, and ranks whose directions
        differ would add up products of different bases.
        """
        shape, dtype = (self._directions(slot), _matrix(slot)[1]), scale_type(values)
        start = self._starts.get(slot.name)
        if start is None or (start.shape, start.dtype, start.device) != (shape, dtype, values.device):
            generator = self.context.generator(slot.name, 0, torch.device("cpu"), shared=True)
            drawn = orthonormal_rows(torch.randn(shape, generator=generator, dtype=dtype))
            start = self._starts[slot.name] = _aligned(uploaded(drawn, values.device))
        return start

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": {name: basis.clone() for name, basis in self._bases.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._bases = {name: _aligned(basis) for name, basis in state["bases"].items()}


class _Workspace:
    """Memory for one matrix at a time, small enough to stay in the processor's cache.

    On some processors the last bits of a product depend on where in memory its factors begin, and so on which other
    parameters lie before them in a bucket, or are stacked with them. So matrices that begin in an odd place, or are of
    a narrow type, are copied.

    Args:
        values: The bucket.
        slots: Its parameters that are taken as matrices.

    """

    def __init__(self, values: Tensor, slots: list[Slot]) -> None:
        self.dtype = scale_type(values)
        entries = max((slot.numel for slot in slots), default=0)
        self._memory = torch.empty(entries, dtype=self.dtype, device=values.device)

    def matrix(self, slot: Slot, row: Tensor) -> Tensor:
        """Return a parameter's entries as a matrix, valid until the next call."""
        if row.dtype == self.dtype and row.data_ptr() % _ALIGNED_BYTES == 0:
            return row.view(_matrix(slot))
        return self._memory[: slot.numel].copy_(row).view(_matrix(slot))


def _copy(rows: list[_Row], into: list[_Row]) -> None:
    for (_, row), (_, target) in zip(rows, into, strict=True):
        target.copy_(row)


def _multiply(lefts: list[Tensor], bases: list[Tensor], rows: list[_Row], *, subtract: bool = False) -> None:
    """Write the products of two thin matrices, given as directions, into the rows of their parameters.

    Args:
        lefts: The directions of the one matrix.
        bases: Those of the other.
        rows: Where the products go.
        subtract: Whether they are subtracted from what is there.

    """
    for left, base, (slot, row) in zip(lefts, bases, rows, strict=True):
        matrix = row.view(_matrix(slot))
        if matrix.dtype != base.dtype:
            product = left.T @ base
            matrix.copy_(matrix - product if subtract else product)
        elif subtract:
            matrix.addmm_(left.T, base, alpha=-1)
        else:
            torch.mm(left.T, base, out=matrix)


def orthonormal_rows(directions: Tensor, spare: Tensor | None = None) -> Tensor:
    """Return rows that span what the given ones span, each of length 1 and orthogonal to the others.

    A row that the rows before it explain, up to rounding in float64, becomes zeros, or the new part of a spare one. A
    QR decomposition would put a direction there that rounding has chosen, which processors do differently. So rows are
    taken one after the other (Gram-Schmidt), twice, in float64. What is not finite stays so.

    Args:
        directions: Matrices of float32 or float64 that have no more rows than columns.
        spare: Others of the same shape.

    Example:
        >>> rows = orthonormal_rows(torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
        >>> torch.allclose(rows @ rows.T, torch.eye(2))
        True
        >>> orthonormal_rows(torch.tensor([[0.0, 3e-20, 4e-20], [0.0, 6e-20, 8e-20]])).abs().tolist()
        [[0.0, 0.6000000238418579, 0.800000011920929], [0.0, 0.0, 0.0]]

    """
    padded = pad(directions.to(torch.float64), (0, -directions.shape[-1] % _ALIGNED_ENTRIES))
    spares = None if spare is None else pad(spare.to(torch.float64), (0, padded.shape[-1] - spare.shape[-1])).unbind(-2)
    done: list[Tensor] = []
    for place, row in enumerate(padded.unbind(-2)):
        new = _new_in(row, done)
        if spares is not None:
            explained = (new == 0).all(-1, keepdim=True)
            new = torch.where(explained, _new_in(spares[place], done), new)
        done.append(new)
    spoilt = padded - padded  # zeros, and NaN where an entry is not finite
    rows = torch.stack(done, -2) + spoilt
    return rows.to(directions.dtype).contiguous()[..., : directions.shape[-1]]


def _new_in(row: Tensor, done: list[Tensor]) -> Tensor:
    """Return the part of a row that is orthogonal to the others, with length 1; zeros where there is none."""
    largest = row.abs().amax(-1, keepdim=True)
    row = row / torch.where(largest > 0, largest, 1)  # so that no square is too large or too small
    length = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    for other in [*done, *done]:
        row = row - torch.linalg.vecdot(row, other).unsqueeze(-1) * other
    left = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return torch.where(left > _DEPENDENT * length, row / torch.where(left > 0, left, 1), 0)


def _next_bases(bases: Tensor, spare: Tensor, before: Tensor) -> Tensor:
    """Return the directions for the next step.

    Where there is nothing to see, as in the second direction of a matrix of rank 1, or in all of one that is orthogonal
    to those of before, other directions are tried: zeros would stay zeros. What is not finite is left out.
    """
    finite = torch.isfinite(bases).flatten(1).all(1)
    return torch.where(finite[:, None, None], orthonormal_rows(bases, spare), before)


def _by_shape(function: Callable[..., Tensor], *rows: list[Tensor]) -> list[Tensor]:
    """Call a function once for all matrices of one shape, stacked; return its results in the order of the matrices."""
    places: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(rows[0]):
        places.setdefault(matrix.shape, []).append(place)
    found: dict[int, Tensor] = {}
    for same in places.values():
        results = function(*(torch.stack([matrices[place] for place in same]) for matrices in rows))
        found.update(zip(same, map(_aligned, results), strict=True))
    return [found[place] for place in range(len(rows[0]))]


def _small(basis: Tensor) -> Tensor:
    """Return the directions times a power of two, so that no product with finite entries overflows.

    Of the products only the directions count, which stay the same.
    """
    return basis * 2.0 ** -basis.shape[1].bit_length()


def _limited(products: Tensor) -> Tensor:
    """Replace infinite products by the largest finite number: where an entry itself is infinite, they are NaN."""
    largest = torch.finfo(products.dtype).max
    return products.clamp_(-largest, largest)


def _aligned(matrix: Tensor) -> Tensor:
    """Return the matrix with rows that all begin in an even place in memory, as a copy where they do not."""
    padded = matrix.shape[1] + -matrix.shape[1] % _ALIGNED_ENTRIES
    if matrix.stride() == (padded, 1) and matrix.data_ptr() % _ALIGNED_BYTES == 0:
        return matrix
    memory = matrix.new_zeros(matrix.shape[0], padded)
    return memory[:, : matrix.shape[1]].copy_(matrix)


def _matrix(slot: Slot) -> tuple[int, int]:
    rows = slot.shape[0] if len(slot.shape) > 1 and slot.numel else 1
    return rows, slot.numel // rows
