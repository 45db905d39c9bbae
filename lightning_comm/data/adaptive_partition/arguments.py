"""Checks of the arguments of :class:`~lightning_comm.data.adaptive_partition.loader.PartitionedLoader`."""

import operator
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_comm.core.adaptive_partition.plan import PartitionPlan
from lightning_comm.data.global_order import TAILS, GlobalBatches

_WAYS_OUT = {
    "generator": "Randomness follows from `seed`.",
    "batch_sampler": "Give `global_batch_size`, and the order of the single samples as `sampler`.",
    "batch_size": "Give `global_batch_size`, of all ranks together.",
    "drop_last": 'Give `tail`: "keep" for False, "drop" for True, or "merge".',
}
_COPIED = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "persistent_workers")
_COPIED_IF_SET = ("multiprocessing_context", "prefetch_factor", "pin_memory_device")


def whole_number(name: str, value: Any, least: int) -> int:
    """Return an argument as an ``int``.

    Raises:
        ValueError: If it is none, or less than ``least``.

    Example:
        >>> whole_number("seed", 3, least=0)
        3

    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        what = "counts the samples of all ranks together" if name == "global_batch_size" else "decides the order"
        raise ValueError(
            f"PartitionedLoader: `{name}` {what}, so it must be a whole number >= {least}; got {value!r}. "
            + (
                "It is the batch of one rank times the ranks."
                if name == "global_batch_size"
                else "0 is as good as any."
            )
        )
    return number


def checked_samples(dataset: Any, sampler: Any, shuffle: bool | None) -> int:
    """Return how many samples an epoch has.

    Raises:
        TypeError: If there is no global order of them that ranks could share.

    """
    if isinstance(dataset, IterableDataset) or (sampler is None and not hasattr(dataset, "__len__")):
        raise TypeError(
            f"PartitionedLoader: `dataset` must have a length and give samples by their index, so that all ranks can "
            f"share one order of them; got {type(dataset).__name__}. Make it a map-style dataset, or keep a DataLoader "
            "whose stream each rank splits by itself, with equal batches."
        )
    if sampler is None:
        return len(dataset)
    name = type(sampler).__name__
    if shuffle is not None:
        raise TypeError(
            f"PartitionedLoader: `shuffle` must be left out with a `sampler`, which decides the order; got {shuffle!r} "
            f"and {name}. Leave out one of them."
        )
    if hasattr(sampler, "num_replicas") or hasattr(sampler, "rank"):
        raise TypeError(
            f"PartitionedLoader: `sampler` must draw the order of all ranks together, which share it out by the plan; "
            f"got {name}, which draws that of one rank. Leave it out and use `shuffle` and `seed`, or give the sampler "
            "that it wraps."
        )
    if isinstance(sampler, BatchSampler) or not hasattr(sampler, "__len__"):
        raise TypeError(
            f"PartitionedLoader: `sampler` must yield single indices and have a length, by which all ranks count steps;"
            f" got {name}. Give it `__len__`, or in place of a batch sampler that of the single samples "
            "(`batch_sampler.sampler`); batches of the size `global_batch_size` are made by the loader."
        )
    return len(sampler)


def check_batches(batches: GlobalBatches, sampler: Any = None) -> None:
    """Refuse data that make no batch, as a sampler counts them if there is one.

    Raises:
        ValueError: If there is none, or ``tail`` is none of its values.

    """
    if batches.tail not in TAILS:
        raise ValueError(
            f"PartitionedLoader: `tail` says what becomes of samples that fill no global batch, so it must be one of "
            f'{TAILS}; got {batches.tail!r}. "keep" loses none and has a smaller last step.'
        )
    if batches.number == 0:
        counted = (
            "" if sampler is None else f" (by the length of {type(sampler).__name__}, which must not yield batches)"
        )
        raise ValueError(
            f"PartitionedLoader: `dataset` must make at least one global batch; got {batches.samples} samples{counted}"
            f" for `global_batch_size`={batches.size}, `tail`={batches.tail!r}. "
            + ('Take a smaller batch or `tail="keep"`.' if batches.samples else "Give a dataset with samples.")
        )


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse what would replace the order or the batches.

    Raises:
        TypeError: If there is something.

    """
    for name, way_out in _WAYS_OUT.items():
        if name in options:
            raise TypeError(
                f"PartitionedLoader: `{name}` cannot be given, since the loader keeps one global order and cuts it "
                f"itself; got {options[name]!r}. {way_out}"
            )
    if not options.get("in_order", True):
        raise TypeError(
            "PartitionedLoader: `in_order` must be True, since step t is the same global batch on every rank; got "
            "False. Leave it out, and give `prefetch_factor` if single batches are slow."
        )


def check_ranks(ranks: int, size: int) -> None:
    """Refuse more ranks than there are samples in a global batch.

    Raises:
        ValueError: If there are.

    """
    if size < ranks:
        raise ValueError(
            f"PartitionedLoader: `global_batch_size` must be >= the number of ranks, {ranks}, so that each has a "
            f"sample; got {size}. It counts the samples of all ranks together."
        )


def check_plan(plan: PartitionPlan, rank: int, size: int) -> None:
    """Refuse a plan that shares out something else than ``size`` samples, or has no such rank.

    Raises:
        ValueError: If it is one.

    """
    if sum(plan.sizes) != size:
        raise ValueError(
            f"PartitionedLoader: `plan` must share out the global batch of {size} samples; got {plan.sizes}, which sum "
            f"to {sum(plan.sizes)}. Make one for `loader.global_batch_size`."
        )
    check_ranks(plan.ranks, size)
    if not 0 <= rank < plan.ranks:
        raise ValueError(
            f"PartitionedLoader: `rank` must be >= 0 and < {plan.ranks}, the ranks of `plan`; got {rank!r}. Give the "
            "rank of this process in the group that the plan is for."
        )


def check_resumed(state: dict[str, Any], now: Mapping[str, int | str]) -> None:
    """Refuse to go on in the middle of a pass that was begun with other settings.

    Raises:
        ValueError: If one of ``now`` is another in the state.

    """
    if changed := [f"{name} was {state[name]!r} and is {now[name]!r}" for name in now if state[name] != now[name]]:
        raise ValueError(
            f"PartitionedLoader: a run that stopped after {state['batches_done']} batches of epoch {state['epoch']} "
            f"can only go on with the same order of samples; {', '.join(changed)}. Restore these, or resume from a "
            "checkpoint of the end of an epoch."
        )


def arguments_of(loader: Any, global_batch_size: int | None) -> dict[str, Any]:
    """Return the arguments that make a PartitionedLoader of a ``DataLoader``.

    Raises:
        TypeError: If it is not a plain one, whose samples could be dealt out in another way.
        ValueError: If the size of the global batch is not known.

    """
    _check_plain(loader)
    if global_batch_size is None:
        if not in_group():
            raise ValueError(
                "PartitionedLoader.from_dataloader: `global_batch_size` must be given where there is no process group "
                f"to ask for the number of ranks; got None. It is `batch_size`={loader.batch_size} times the ranks."
            )
        global_batch_size = loader.batch_size * dist.get_world_size()
    options = {name: getattr(loader, name) for name in _COPIED}
    options |= {name: value for name in _COPIED_IF_SET if (value := getattr(loader, name))}
    return {
        "dataset": loader.dataset,
        "global_batch_size": global_batch_size,
        "tail": "drop" if loader.drop_last else "keep",
        "in_order": getattr(loader, "in_order", True),
        **options,
        **_order_of(loader),
    }


def _check_plain(loader: Any) -> None:
    where, kind = "PartitionedLoader.from_dataloader: `loader` must be", type(loader).__name__
    way_out = "Construct PartitionedLoader from its dataset and, if it has one, a global sampler."
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(f"{where} a DataLoader that iterates as torch's own does; got {kind}. {way_out}")
    if isinstance(loader.dataset, IterableDataset):
        checked_samples(loader.dataset, None, None)
    if loader.batch_size is None:
        made_by = type(loader.batch_sampler).__name__ if loader.batch_sampler else "nobody"
        raise TypeError(
            f"{where} one that makes batches of `batch_size` samples, which can be shared anew; got {kind} with "
            f"`batch_size`=None, whose batches are made by {made_by}. {way_out}"
        )


def _order_of(loader: Any) -> dict[str, Any]:
    sampler = loader.sampler
    of_torch = type(sampler) in (RandomSampler, SequentialSampler) and not getattr(sampler, "replacement", False)
    if of_torch and len(sampler) == len(loader.dataset):
        return {"shuffle": isinstance(sampler, RandomSampler)}
    return {"sampler": sampler}


def in_group() -> bool:
    """Return whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def batches_of(state: dict[str, Any]) -> int:
    """Return how many batches a pass had in the run that a state is from."""
    return GlobalBatches(state["samples"], state["global_batch_size"], state["tail"]).number
