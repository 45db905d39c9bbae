"""A loader with which a stopped run continues on exactly the next sample.

torch.utils.data only. Lightning calls the loader's ``state_dict``, saves the state with its checkpoints, and passes it
to ``load_state_dict`` when a run is resumed in the middle of an epoch.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_comm.data.global_order import Draws

T_co = TypeVar("T_co", covariant=True)
_OWN_OPTIONS = ("sampler", "batch_sampler", "generator")
_ELSEWHERE = (
    "an order of your own is resumed by `PartitionedLoader(dataset, global_batch_size, sampler=...)`, whose sampler "
    "yields single samples, and batches of your own by torchdata's StatefulDataLoader."
)
_WAYS_OUT = {
    "sampler": f"Use `shuffle` and `seed`; {_ELSEWHERE}",
    "batch_sampler": f"Use `batch_size`, `shuffle` and `seed`; {_ELSEWHERE}",
    "generator": "Use `shuffle` and `seed`.",
}


class ResumedEpoch(NamedTuple):
    """An epoch in which a Trainer goes on, at the first batch that it asks for.

    Args:
        batches_done: Batches of the epoch that were done before the stop.
        state_is_pending: Whether the Trainer has a saved state of its loaders that it has not handed to them.

    """

    batches_done: int
    state_is_pending: bool


# This module does not import Lightning, so the module that does installs the function that finds the Trainer.
_finders: list[Callable[[], ResumedEpoch | None]] = []


def find_resumed_epoch_by(finder: Callable[[], ResumedEpoch | None]) -> None:
    """Let loaders ask ``finder``, as a pass begins, whether the code that asks for the batch resumes an epoch."""
    _finders[:] = [finder]


def warn_of_repeated_batches(loader: str, epoch: int) -> None:
    """Warn that a pass begins an epoch again in the middle of which a run is resumed.

    For a loader that begins a pass and has been given no state to go on from.

    Args:
        loader: Its class, for the message.
        epoch: The epoch of the pass.

    """
    resumed = _finders[0]() if _finders else None
    if resumed is None:
        return
    if resumed.state_is_pending:
        why = (
            "Lightning read the place of this loader from the checkpoint and never handed it over: the loader was "
            "built too early, by `trainer.estimated_stepping_batches` in `configure_optimizers` (Lightning issue "
            "20550). Give the schedule a number of steps of your own there, or train with a strategy of "
            "lightning_comm or the callback AdaptivePartition, which hand it over"
        )
    else:
        why = (
            "the checkpoint has no place for it, as one that was written with another kind of loader. Resume with the "
            "loader that the run was begun with, or from a checkpoint of the end of an epoch"
        )
    warnings.warn(
        f"{loader}: the run is resumed after {resumed.batches_done} batches of epoch {epoch}, and this loader begins "
        f"the epoch again, so batches come twice and others not at all. The reason: {why}.",
        stacklevel=4,
    )


class ResumableSampler(DistributedSampler[T_co]):
    """Draws the indices of one rank as ``DistributedSampler`` does, and can leave out the first of them.

    Being a ``DistributedSampler``, it is left alone by Lightning, which calls ``set_epoch`` before every epoch. Its
    length stays the full number of samples, since Lightning counts a resumed epoch from its start.

    Note:
        *Communication.* None.

    """

    skip_samples: int = 0

    @override
    def __iter__(self) -> Iterator[T_co]:
        return iter(list(super().__iter__())[self.skip_samples :])


class ResumableLoader(DataLoader[T_co]):
    """A ``DataLoader`` for training that continues a stopped run on the sample where it stopped.

    The order is that of ``DistributedSampler``: a new shuffle each epoch from ``seed + epoch``, whatever the global
    random state, dealt out to the ranks in turn. Every rank has the same number of batches. What was done before the
    stop is skipped without being loaded.

    Args:
        dataset: What the samples come from; it has a length.
        batch_size: Samples per batch on this rank; at least 1.
        shuffle: Whether each epoch has an order of its own; otherwise all have that of the dataset.
        seed: Decides the order; at least 0, and the same on every rank.
        drop_last: Whether samples that do not fill a batch on every rank are left out. If not, the last batch may be
            smaller, and some samples come twice in an epoch where the dataset does not divide by the ranks.
        num_replicas: Number of ranks. ``None`` asks the process group; without one it is 1. Lightning joins the ranks
            in ``fit``, so build the loader in ``train_dataloader``.
        rank: Which of them this is. ``None`` asks the process group; without one it is 0.
        **options: What else a ``DataLoader`` takes, such as ``num_workers`` and ``collate_fn``.

    Raises:
        ValueError: If an argument is out of range, or no batch is left. With the first batch, if the run is resumed in
            the middle of an epoch that was begun with other data, another order or another split of it, or if the ranks
            were joined after the loader was built, without ``num_replicas``.
        TypeError: If ``options`` holds a sampler or a generator, or ``dataset`` has no length.

    Note:
        *Exactness.* The samples are those of the run that was never stopped; random augmentation is not, since workers
        draw their seeds when a pass begins. ``docs/how-to/resume.md`` lists where Lightning itself loses the place.

        *Communication.* None. The state is the same on all ranks, so that of rank 0 serves them all. *Memory.* The
        order of an epoch, as in ``DistributedSampler``.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2, shuffle=False)
        >>> next(iter(loader)).tolist()
        [0, 1]
        >>> resumed = ResumableLoader(range(6), batch_size=2, shuffle=False)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in resumed]
        [[2, 3], [4, 5]]
        >>> [batch.tolist() for batch in resumed]
        [[0, 1], [2, 3], [4, 5]]

    """

    def __init__(
        self,
        dataset: Dataset[T_co],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        # Whether it takes itself for the only rank because it found no others, which may be joined later.
        self._found_no_group = not _in_group() and num_replicas is None
        if num_replicas is None:
            num_replicas = dist.get_world_size() if _in_group() else 1
        if rank is None:
            rank = dist.get_rank() if _in_group() else 0
        samples = _check_arguments(dataset, batch_size, seed, num_replicas, rank, options)
        self._order: ResumableSampler[T_co] = ResumableSampler(
            dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last
        )
        # Every pass draws a number from the generator. An own one leaves the global random state where it is.
        self._draws = Draws()
        super().__init__(
            dataset, batch_size, sampler=self._order, drop_last=drop_last, generator=self._draws, **options
        )
        if len(self) == 0:
            raise ValueError(
                f"ResumableLoader: `dataset` must fill a batch on each of {num_replicas} ranks; got {samples} samples "
                f"for `batch_size`={batch_size}, `drop_last`={drop_last}. Take a smaller batch or `drop_last=False`."
            )
        # What the meaning of "so many batches into epoch e" depends on.
        self._plan = {
            "samples": samples,
            "batch_size": batch_size,
            "num_replicas": num_replicas,
            "shuffle": int(shuffle),
            "seed": seed,
            "drop_last": int(drop_last),
        }
        self._epoch = 0
        self._batches_done = 0
        self._loaded_plan: dict[str, int] | None = None
        self._loaded_epoch: int | None = None

    @override
    def __iter__(self) -> Iterator[T_co]:  # type: ignore[override]  # torch promises its own class of iterator
        # A generator, so that nothing is drawn before the first `next`: Lightning makes the iterator of its first epoch
        # before it calls `set_epoch`, and workers would by then be loading samples of another epoch.
        self._begin_pass()
        for batch in super().__iter__():
            # Counted where batches are handed out: the workers and the sampler are several batches ahead.
            self._batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return where the current pass stands, as plain numbers that are equal on all ranks."""
        return {**self._plan, "epoch": self._epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on where ``state_dict`` was called, if it is a pass through the same epoch."""
        self._epoch, self._batches_done = state["epoch"], state["batches_done"]
        self._loaded_plan = {name: state[name] for name in self._plan}
        self._loaded_epoch = self._epoch
        self._order.set_epoch(self._epoch)

    def _begin_pass(self) -> None:
        if self._found_no_group and _in_group() and dist.get_world_size() > 1:
            raise ValueError(
                f"ResumableLoader: `num_replicas` must be the number of ranks, {dist.get_world_size()}; got none, and "
                "the loader was built before the ranks were joined, so each would train on all samples. Build it in "
                "`train_dataloader` of the module or of a data module, or give `num_replicas` and `rank` (1 and 0 for "
                "all samples on each rank)."
            )
        plan, self._loaded_plan = self._loaded_plan, None
        if self._loaded_epoch != self._order.epoch:
            self._loaded_epoch = None
            if self._order.rank == 0:
                warn_of_repeated_batches("ResumableLoader", self._order.epoch)
        # Lightning also hands back the state of an epoch that was over, and has called `set_epoch` for the next one.
        if plan is None or self._epoch != self._order.epoch:
            self._batches_done = 0
        elif plan != self._plan:
            changed = [f"{name} was {plan[name]} and is {now}" for name, now in self._plan.items() if plan[name] != now]
            raise ValueError(
                f"ResumableLoader: a run that stopped after {self._batches_done} batches of epoch {self._epoch} can "
                f"only go on with the same order of samples; {', '.join(changed)}. Restore these, or resume from a "
                "checkpoint of the end of an epoch."
            )
        self._epoch = self._order.epoch
        self._order.skip_samples = self._batches_done * self._plan["batch_size"]
        self._draws.manual_seed((self._plan["seed"] + self._epoch) * self._order.num_replicas + self._order.rank)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_arguments(
    dataset: object, batch_size: int, seed: int, num_replicas: int, rank: int, options: dict[str, Any]
) -> int:
    """Return the number of samples."""
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"ResumableLoader: `dataset` must have a length, to be split over ranks and resumed; got "
            f"{type(dataset).__name__}. Iterable datasets keep their own place: torchdata's StatefulDataLoader is made "
            "for them."
        )
    if refused := [name for name in _OWN_OPTIONS if name in options]:
        names = " and ".join(f"`{name}`" for name in refused)
        given = " and ".join(repr(options[name]) for name in refused)
        raise TypeError(
            f"ResumableLoader: {names} cannot be given, since the loader keeps an order that it can resume; got "
            f"{given}. {_WAYS_OUT[refused[0]]} Lightning's `overfit_batches` "
            "replaces samplers: take `limit_train_batches` and `shuffle=False` instead."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"ResumableLoader: `batch_size` counts the samples of a batch on one rank, so it must be >= 1; got "
            f"{batch_size!r}. The global batch is `num_replicas` times as large."
        )
    if seed < 0:
        raise ValueError(f"ResumableLoader: `seed` must be >= 0; got {seed!r}. 0 is as good as any other.")
    if num_replicas < 1:
        raise ValueError(f"ResumableLoader: `num_replicas` counts ranks, so it must be >= 1; got {num_replicas!r}.")
    if not 0 <= rank < num_replicas:
        raise ValueError(
            f"ResumableLoader: `rank` must be >= 0 and < `num_replicas`={num_replicas}; got {rank!r}. Leave both out "
            "to take them from the process group."
        )
    return len(dataset)
