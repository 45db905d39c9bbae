"""A loader that slices a fixed global batch by shares that may change while training runs.

torch.utils.data only. It is not a ``DataLoader``, so that Lightning leaves it as it is, and owns one. Lightning calls
its ``set_epoch``, ``state_dict`` and ``load_state_dict``.
"""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from torch.utils.data import DataLoader

from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.data.adaptive_partition.arguments import (
    arguments_of,
    check_batches,
    check_plan,
    checked_samples,
    refuse_options,
    whole_number,
)
from lightning_comm.data.adaptive_partition.position import LoaderPosition
from lightning_comm.data.adaptive_partition.slices import LatestSlice, SeededSamples, Slice, SliceDispatcher, even_plan
from lightning_comm.data.global_order import Draws, GlobalBatches, GlobalOrder, Tail, mixed_seed


class PartitionedLoader:
    """A loader for training in which the ranks share each global batch by a plan, evenly if there is none.

    Step ``t`` of an epoch is always the same samples, ``order(seed, epoch)[t * B : (t + 1) * B]``, of which the ranks
    take slices. So each sample comes once in an epoch, and neither the plan nor the number of ranks changes a step; a
    resumed run continues with exactly the samples that are left.

    Where ranks have unequal numbers of samples, :class:`AdaptivePartition` corrects the gradient; in a loop of your own
    multiply the loss by ``loader.latest.weight``. More: ``docs/techniques/adaptive_partition.md``.

    Args:
        dataset: A map-style dataset: it has a length, and ``dataset[index]`` returns a sample.
        global_batch_size: Samples per step of all ranks together; at least one for each rank.
        shuffle: Whether each epoch has an order of its own; ``None``: yes, unless there is a ``sampler``.
        seed: Decides the order; at least 0, and the same on every rank.
        tail: What becomes of samples that fill no global batch: ``"keep"``, a smaller last step; ``"drop"``, none;
            ``"merge"``, they are added to the last step.
        sampler: Draws the order of all samples instead; it has a length, and draws alike on all ranks.
        seed_samples: Whether random augmentation is seeded by sample, so that it depends on no rank, plan or worker.
        **options: What else a ``DataLoader`` takes, such as ``num_workers`` and ``collate_fn``.

    Raises:
        ValueError: If an argument is out of range, or no batch is left; with the first batch, if there are too many
            ranks, or if a sampler or a resumed run does not keep to the order.
        TypeError: If ``dataset`` or ``sampler`` has no global order, or ``options`` holds what would replace it.

    Note:
        *Communication.* None. *Memory.* The order of the present pass: 8 bytes per sample, more with a ``sampler``.

    Example:
        >>> loader = PartitionedLoader(range(10), global_batch_size=4, shuffle=False)
        >>> loader.follow(PartitionPlan((1, 3)), rank=1)
        >>> [batch.tolist() for batch in loader]
        [[1, 2, 3], [5, 6, 7], [8, 9]]
        >>> loader.latest.sizes, loader.latest.weight
        ((0, 2), 2.0)

    """

    batch_size: None = None  # the batches of a rank have no fixed size; see `global_batch_size`

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        *,
        shuffle: bool | None = None,
        seed: int = 0,
        tail: Tail = "keep",
        sampler: Any = None,
        seed_samples: bool = False,
        **options: Any,
    ) -> None:
        refuse_options(options)
        samples = checked_samples(dataset, sampler, shuffle)
        self.global_batch_size = whole_number("global_batch_size", global_batch_size, 1)
        seed = whole_number("seed", seed, 0)
        self._batches = GlobalBatches(samples, self.global_batch_size, tail)
        check_batches(self._batches, sampler)
        self.dataset = dataset
        self._order = GlobalOrder(samples, shuffle=sampler is None and shuffle is not False, seed=seed, sampler=sampler)
        self._position = LoaderPosition(self._order, self._batches)
        self._dispatcher = SliceDispatcher(self._order, self._batches, tagged=seed_samples)
        # Every pass draws a number from the generator. An own one leaves the global random state where it is.
        self._draws = Draws()
        self._inner: DataLoader[Any] = DataLoader(
            SeededSamples(dataset, seed) if seed_samples else dataset,
            batch_sampler=self._dispatcher,
            generator=self._draws,
            **options,
        )
        self._followed = False
        self._latest = LatestSlice()

    @classmethod
    def from_dataloader(
        cls, loader: DataLoader[Any], global_batch_size: int | None = None, seed: int = 0
    ) -> "PartitionedLoader":
        """Return a loader with the dataset, sampler, workers and other options of a ``DataLoader``.

        Args:
            loader: A plain one, made for a single process. Its ``generator`` is not used.
            global_batch_size: Samples per step of all ranks together; ``None`` takes the loader's ``batch_size`` times
                the ranks of the process group.
            seed: Decides the order.

        Raises:
            ValueError: If the size of the global batch is not known.
            TypeError: If the loader has no global order that could be shared.

        Example:
            >>> loader = PartitionedLoader.from_dataloader(DataLoader(range(6), batch_size=3), global_batch_size=4)
            >>> [batch.tolist() for batch in loader]
            [[0, 1, 2, 3], [4, 5]]

        """
        return cls(seed=seed, **arguments_of(loader, global_batch_size))

    def __len__(self) -> int:
        return self._batches.number

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn before the first `next`: Lightning makes the iterator of its first epoch
        # before it calls `set_epoch`, and workers would by then be loading samples of another epoch.
        started_s = time.monotonic()
        if not self._followed:
            self._dispatcher.follow(*even_plan(self.global_batch_size))
        begun = self._position.begin_pass(warns=self._dispatcher.rank == 0)
        now = self._position.now
        self._draws.manual_seed(mixed_seed(self._order.seed, now.epoch, now.passes, self._dispatcher.rank))
        self._dispatcher.begin(*now)
        batches = iter(self._inner)
        while True:
            self._position.check_alone(begun)
            if not self._followed:  # code that follows a plan applies the weights
                self._latest.warn_if_unread()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._latest.put(self._dispatcher.hand_out(), started_s, time.monotonic() - started_s)
            # Counted where batches are handed out: the workers and the plan are several batches ahead.
            self._position.count(begun)
            yield batch
            started_s = time.monotonic()

    def follow(self, plan: PartitionPlan, rank: int) -> None:
        """Slice by this plan, as this rank, from the next index list on.

        Raises:
            ValueError: If the plan is for another global batch, or has no such rank.

        """
        check_plan(plan, rank, self.global_batch_size)
        self._dispatcher.follow(plan, rank)
        self._followed = True

    @property
    def dispatched(self) -> BatchIndex:
        """The first place of which no index list has been handed to the workers: where a change of plan may start."""
        if self._position.has_begun:
            return self._dispatcher.dispatched
        epoch, passes, done = self._position.now
        return BatchIndex(epoch, passes * len(self) + done)

    @property
    def latest(self) -> Slice | None:
        """What this rank took in the batch that was handed out last."""
        return self._latest.read()

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning looks for ``sampler.set_epoch``. A ``sampler`` of its own would let it rebuild the loader."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch with the next pass, or go on in it, if a state from the middle of it has been loaded."""
        self._position.begin_epoch(epoch)

    def repeat_first_epoch(self) -> None:
        """Let all epochs be alike, in the order of the dataset (of a sampler: that of its first), for overfitting."""
        self._order.repeat()

    @property
    def settings(self) -> dict[str, int | str]:
        """What the meaning of "so many batches into an epoch" depends on; it must be the same on all ranks."""
        return self._position.settings

    def order_fingerprint(self) -> int:
        """Return 48 bits that identify the order of the present pass, to compare ranks."""
        return self._position.order_fingerprint()

    def state_dict(self) -> dict[str, int | str]:
        """Return where the present pass stands, in plain types that are equal on all ranks."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where ``state_dict`` was called, unless ``set_epoch`` asks for another epoch.

        Raises:
            ValueError: If the state was written by another version of this loader.

        """
        self._position.load_state_dict(state)

    @property
    def num_workers(self) -> int:
        """How many worker processes load samples."""
        return self._inner.num_workers

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any]:
        """What makes a batch of a list of samples."""
        return self._inner.collate_fn

    @property
    def worker_init_fn(self) -> Callable[[int], None] | None:
        """What each worker calls when it starts. Lightning sets it after ``seed_everything(workers=True)``."""
        return self._inner.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Callable[[int], None] | None) -> None:
        self._inner.worker_init_fn = function

    @property
    def _iterator(self) -> Any:
        # By this name Lightning finds persistent workers on a `DataLoader`, and stops them when training is over.
        return self._inner._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._inner._iterator = iterator
