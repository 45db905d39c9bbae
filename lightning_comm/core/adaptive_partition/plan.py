"""The plan of a partitioned run: which shares of the global batch hold from which batch on.

The session of the callback changes it, on all ranks alike; loaders read it as they hand out a batch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_comm.core.adaptive_partition.shares import UNBOUNDED, proportional_sizes


class BatchIndex(NamedTuple):
    """A training batch of a run: the ``batch``-th of an epoch, both from 0. Places are in the order of a run.

    Example:
        >>> BatchIndex(epoch=0, batch=99) < BatchIndex(epoch=1, batch=0)
        True

    """

    epoch: int
    batch: int


class Shares(NamedTuple):
    """The samples of each rank of a global batch, from a place on."""

    place: BatchIndex
    sizes: tuple[int, ...]


@dataclass
class PartitionPlan:
    """Shares of the global batch by place, the same on all ranks.

    Args:
        sizes: Samples by rank at the start; their sum is the global batch.
        hi: The most that each rank takes, also of a last batch that is larger than the others.
        lo: The least that each rank takes of a smaller last batch, where that has as many for all.

    Note:
        *Communication.* None.

    Example:
        >>> plan = PartitionPlan((8, 8))
        >>> plan.change_at(BatchIndex(0, 20), (12, 4))
        >>> plan.sizes_at(BatchIndex(0, 19)), plan.sizes_at(BatchIndex(1, 0))
        ((8, 8), (12, 4))
        >>> plan.split(BatchIndex(1, 0), 8)  # a last batch of 8 samples
        (6, 2)

    """

    sizes: tuple[int, ...]
    hi: tuple[int, ...] | int = UNBOUNDED
    lo: tuple[int, ...] | int = 0

    def __post_init__(self) -> None:
        self._changes = [Shares(BatchIndex(0, 0), tuple(self.sizes))]

    @property
    def changes(self) -> tuple[Shares, ...]:
        """The journal: the shares at the start, and each change."""
        return tuple(self._changes)

    @property
    def ranks(self) -> int:
        """How many ranks share the batch."""
        return len(self.sizes)

    def sizes_at(self, place: BatchIndex) -> tuple[int, ...]:
        """Return samples by rank of a full global batch."""
        index = bisect_right(self._changes, place, key=lambda change: change.place) - 1
        return self._changes[max(0, index)].sizes

    def split(self, place: BatchIndex, total: int) -> tuple[int, ...]:
        """Return samples by rank of a batch of ``total`` samples: of a last one, in proportion to the full ones.

        A rank may get none of a small one.
        """
        sizes = self.sizes_at(place)
        if total == sum(sizes):
            return sizes
        least = self.lo * self.ranks if isinstance(self.lo, int) else sum(self.lo)
        return proportional_sizes(total, sizes, self.lo if least <= total else 0, self.hi)

    def change_at(self, place: BatchIndex, sizes: Sequence[int]) -> None:
        """Let other shares hold from a place on, which comes after all earlier changes or replaces the last one.

        Raises:
            ValueError: If the place comes before a change that is in the plan, or the sizes do not fit.

        """
        last = self._changes[-1]
        if place < last.place or len(sizes) != self.ranks or sum(sizes) != sum(last.sizes):
            raise ValueError(
                f"PartitionPlan: `sizes` {tuple(sizes)} at {place} must be those of {self.ranks} ranks, sum to "
                f"{sum(last.sizes)}, and come after the last change at {last.place}."
            )
        if place == last.place:
            self._changes.pop()
        self._changes.append(Shares(BatchIndex(*place), tuple(sizes)))
        self.sizes = self._changes[0].sizes

    def restart_at(self, place: BatchIndex, sizes: Sequence[int]) -> None:
        """Let other shares hold from a place on, and forget changes that were to come there or later."""
        before = [change for change in self._changes if change.place < place]
        self._changes = before or [Shares(place, tuple(sizes))]
        self.change_at(place, sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return the journal in plain types."""
        return {"changes": [(*change.place, list(change.sizes)) for change in self._changes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the journal."""
        self._changes = list(_read(state["changes"]))
        self.sizes = self._changes[0].sizes


def _read(changes: Iterable[Sequence[Any]]) -> Iterable[Shares]:
    for epoch, batch, sizes in changes:
        yield Shares(BatchIndex(int(epoch), int(batch)), tuple(map(int, sizes)))
