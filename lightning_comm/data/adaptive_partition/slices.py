"""Slices of global batches: the index lists of one rank, for an inner ``DataLoader``."""

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.core.adaptive_partition.shares import proportional_sizes
from lightning_comm.data.adaptive_partition.arguments import check_ranks, in_group
from lightning_comm.data.global_order import GlobalBatches, GlobalOrder, mixed_seed, seeded


class Slice(NamedTuple):
    """What a rank took of a global batch, and how long it waited for it.

    Args:
        place: Which batch of the run it is.
        sizes: Samples by rank.
        rank: Which of the ranks took it.
        fetch_started_s: When it was asked for, on ``time.monotonic``'s clock.
        fetch_s: How long it took to be there.

    Example:
        >>> part = Slice(BatchIndex(0, 3), sizes=(12, 4), rank=1)
        >>> part.samples, part.total, part.weight
        (4, 16, 0.5)

    """

    place: BatchIndex
    sizes: tuple[int, ...]
    rank: int
    fetch_started_s: float = 0.0
    fetch_s: float = 0.0

    @property
    def samples(self) -> int:
        """How many samples of the rank count; 0 where its batch is a single dummy."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """How many samples the ranks have together."""
        return sum(self.sizes)

    @property
    def weight(self) -> float:
        """What to multiply the rank's mean loss by, so that the mean over the ranks is the mean over the samples."""
        return self.samples * len(self.sizes) / self.total


class LatestSlice:
    """The slice of the batch that was handed out last, and whether anyone has asked for its weight.

    Example:
        >>> latest = LatestSlice()
        >>> latest.put(Slice(BatchIndex(0, 0), sizes=(12, 4), rank=1), fetch_started_s=0.0, fetch_s=0.0)
        >>> latest.read().weight
        0.5

    """

    def __init__(self) -> None:
        self._slice: Slice | None = None
        self._was_read = self._warned = False

    def put(self, part: Slice, fetch_started_s: float, fetch_s: float) -> None:
        """Keep the slice of a batch that is handed out, with how long its samples took."""
        self._slice = part._replace(fetch_started_s=fetch_started_s, fetch_s=fetch_s)
        self._was_read = False

    def read(self) -> Slice | None:
        """Return it."""
        self._was_read = True
        return self._slice

    def warn_if_unread(self) -> None:
        """Warn, once, of a batch that ranks shared unevenly and whose weight has not been read."""
        last = self._slice
        if last is None or self._was_read or self._warned or len(set(last.sizes)) == 1:
            return
        self._warned = True
        warnings.warn(
            f"PartitionedLoader: {len(last.sizes)} ranks had {last.sizes} samples, so the mean of their gradients is "
            "not that over the samples. Multiply the loss by `loader.latest.weight` before `backward`, or let the "
            "callback AdaptivePartition do it.",
            stacklevel=3,
        )


class SliceDispatcher:
    """The batch sampler of the inner loader: hands out one rank's part of each global batch of a pass.

    The plan is read when a list is handed out, which torch does in the main process, ahead of the batch by
    ``prefetch_factor * num_workers`` lists.

    Args:
        order: Of all samples.
        batches: Where the order is cut.
        tagged: Whether each index comes with the epoch and the pass, for :class:`SeededSamples`.

    Note:
        *Communication.* None.

    Example:
        >>> order = GlobalOrder(10, shuffle=False, seed=0)
        >>> dispatcher = SliceDispatcher(order, GlobalBatches(10, 4, "keep"))
        >>> dispatcher.follow(PartitionPlan((1, 3)), rank=1)
        >>> dispatcher.begin(epoch=0, passes=0, batch=1)
        >>> list(dispatcher)
        [[5, 6, 7], [8, 9]]

    """

    plan: PartitionPlan
    rank: int

    def __init__(self, order: GlobalOrder, batches: GlobalBatches, *, tagged: bool = False) -> None:
        self._order, self._batches, self._tagged = order, batches, tagged
        self.begin(0, 0, 0)

    def follow(self, plan: PartitionPlan, rank: int) -> None:
        """Slice by this plan, as this rank, from the next list on."""
        self.plan, self.rank = plan, rank

    def begin(self, epoch: int, passes: int, batch: int) -> None:
        """Start a pass at its ``batch``-th global batch; what was handed out before is forgotten."""
        self._epoch, self._passes, self._next = epoch, passes, batch
        self._waiting: deque[Slice] = deque()

    @property
    def dispatched(self) -> BatchIndex:
        """The place of the next list."""
        return BatchIndex(self._epoch, self._passes * self._batches.number + self._next)

    def hand_out(self) -> Slice:
        """Return what was taken for the oldest list whose batch has not been handed out."""
        return self._waiting.popleft()

    def __len__(self) -> int:
        return self._batches.number

    def __iter__(self) -> Iterator[list[Any]]:
        while self._next < self._batches.number:
            place, (start, stop) = self.dispatched, self._batches.bounds(self._next)
            part = Slice(place, self.plan.split(place, stop - start), self.rank)
            first = start + sum(part.sizes[: part.rank])
            # A rank that gets nothing takes a sample all the same, since every rank must come to the all-reduce.
            first, last = (first, first + part.samples) if part.samples else (start, start + 1)
            indices = self._order.part(self._epoch, self._passes, first, last)
            self._waiting.append(part)
            self._next += 1
            yield (
                [(index, *self._order.key(self._epoch, self._passes)) for index in indices] if self._tagged else indices
            )


def even_plan(global_batch_size: int) -> tuple[PartitionPlan, int]:
    """Return the plan by which the ranks of the process group share alike, and this rank; one rank without a group.

    Raises:
        ValueError: If there are more ranks than samples.

    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if in_group() else (1, 0)
    check_ranks(ranks, global_batch_size)
    return PartitionPlan(proportional_sizes(global_batch_size, [1] * ranks)), rank


class SeededSamples(Dataset[Any]):
    """Gives samples whose random augmentation follows from seed, epoch, pass and index alone.

    So it depends on no rank, plan or worker. A sample that is drawn twice in a pass is augmented alike.

    Args:
        dataset: Where the samples come from, by ``dataset[index]``.
        seed: Another one gives other augmentations.

    Note:
        *Communication.* None. Saving and putting back the state of the generators costs some 100 microseconds a sample.

    Example:
        >>> import random
        >>> class Noise:
        ...     def __getitem__(self, index):
        ...         return random.random()
        >>> noise = SeededSamples(Noise(), seed=0)
        >>> noise[7, 0, 0] == noise[7, 0, 0], noise[7, 0, 0] == noise[7, 1, 0]
        (True, False)

    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    @override
    def __getitem__(self, index: tuple[Any, int, int]) -> Any:
        of_dataset, epoch, passes = index
        with seeded(mixed_seed(self.seed, epoch, passes, of_dataset)):
            return self.dataset[of_dataset]
