"""Several ranks of a partitioned loader in one process, in lock step."""

from lightning_comm.core.adaptive_partition.plan import PartitionPlan
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader


def ranks(plan: PartitionPlan, new) -> list[PartitionedLoader]:
    """One loader for each rank of a plan, all in this process; ``new(rank)`` makes them."""
    loaders = [new(rank) for rank in range(plan.ranks)]
    for rank, loader in enumerate(loaders):
        loader.follow(plan, rank)
    return loaders


def draw(loaders: list[PartitionedLoader], before_step=lambda step: None, steps: int | None = None):
    """Yield for each step what every rank was given, as lists, and its slice."""
    passes = [iter(loader) for loader in loaders]
    for step in range(len(loaders[0]) if steps is None else steps):
        before_step(step)
        batches = [next(each).tolist() for each in passes]
        yield batches, [loader.latest for loader in loaders]


def union(batches, slices) -> list[int]:
    """The global batch: what the ranks were given, one behind the other, without dummies."""
    return [each for batch, part in zip(batches, slices, strict=True) for each in batch[: part.samples]]


def single(*args, epochs=1, **kwargs) -> list[list[int]]:
    """The global batches, from a loader of one rank."""
    loader, whole = PartitionedLoader(*args, **kwargs), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        whole += [batch.tolist() for batch in loader]
    return whole
