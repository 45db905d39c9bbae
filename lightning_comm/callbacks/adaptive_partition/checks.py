"""Checks for strategies, loaders and orders of samples with which a partitioned run cannot work."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.contract import GradientsCompressed
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.lightning_internals import model_averaging_period
from lightning_comm.transport.compression.no_sync import NoSync

_WHERE = "AdaptivePartition"


def set_up_problems(trainer: Trainer, module: LightningModule, settings: PartitionSettings) -> Iterator[str]:
    """Yield what cannot work together with shares, as far as that is known without the data."""
    yield from _strategy_problems(trainer)
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        yield (
            "`training_step` takes `dataloader_iter`, so it fetches batches after their samples are counted and "
            "weighted. Let it take `batch`."
        )
    yield from settings.rank_problems(trainer.world_size)


def _strategy_problems(trainer: Trainer) -> Iterator[str]:
    """Yield a strategy that does not average whole gradients, or parameters, over all ranks."""
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        yield (
            "the strategy must average whole gradients over the ranks, so that each can be weighted by its "
            f"samples; got {type(strategy).__name__}. Use 'ddp', one of the 'ddp_…' of this package, or 'local_sgd', "
            "'post_local_sgd' or 'qsr'."
        )
        return
    period = model_averaging_period(strategy)
    if period is not None:
        yield (
            f"DDPStrategy with `model_averaging_period`={period} averages parameters over ranks alike, "
            "whatever their samples. Use LocalUpdateStrategy, whose averages are weighted by samples."
        )
    if isinstance(strategy, GradientsCompressed) and isinstance(strategy.compression, NoSync):
        yield (
            f"{type(strategy).__name__} with NoSync() averages nothing, so shares of a global batch mean "
            "nothing. Use another compression, or leave the callback out."
        )


def has_batch_norm(module: LightningModule) -> bool:
    """Whether a layer normalises by the statistics of each rank's own samples."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm) for part in module.modules())


def loaders_of(trainer: Trainer) -> list[Any]:
    """Return the loaders of the training data, of any kind."""
    return list(_leaves(trainer.train_dataloader))


def check_same_order(fingerprints: list[int | None]) -> None:
    """Refuse orders of samples that differ between ranks.

    Args:
        fingerprints: Of the order of each rank; ``None`` of one whose sampler has failed.

    Raises:
        ValueError: On all ranks, if they differ.

    """
    if None in fingerprints:
        raise ValueError(
            f"{_WHERE}: the sampler failed on rank {fingerprints.index(None)}, whose own message says why. It must "
            "draw the same order on all ranks."
        )
    different = [rank for rank, each in enumerate(fingerprints) if each != fingerprints[0]]
    if different:
        raise ValueError(
            f"{_WHERE}: the sampler gives ranks {different} another order than rank 0, so samples would be seen twice "
            "or never. It must be global: what it yields may depend on its epoch and on random numbers, which are "
            "seeded alike on all ranks, but not on the rank or on what the rank has computed."
        )


def _leaves(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, dict):
        for each in loaders.values():
            yield from _leaves(each)
    elif isinstance(loaders, (list, tuple)):
        for each in loaders:
            yield from _leaves(each)
    else:
        yield loaders


def loader_problem(loaders: list[Any]) -> str | None:
    """Return the problem of the loaders of the training data, if there is one."""
    for loader in loaders:
        if not isinstance(loader, PartitionedLoader):
            return _not_partitioned(loader)
    if len({loader.settings["global_batch_size"] for loader in loaders}) > 1:
        sizes = [loader.settings["global_batch_size"] for loader in loaders]
        return (
            "several loaders follow one plan, so `global_batch_size` must be the same for all of them; got "
            f"{sizes}. Give them one size, or train with one loader over a ConcatDataset."
        )
    with_tail = [len(loader.dataset) for loader in loaders if _has_tail(loader)]
    if len(loaders) > 1 and with_tail:
        return (
            f"several loaders follow one plan, so each step of each must be a full batch; got a loader of "
            f"{with_tail[0]} samples whose last batch is not. Give all of them `tail='drop'`."
        )
    return None


def _not_partitioned(loader: Any) -> str:
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    what = type(loader).__name__
    if isinstance(dataset, IterableDataset):
        return (
            f"the training data must be a PartitionedLoader; got a {what} over the IterableDataset "
            f"{type(dataset).__name__}, which has no order that ranks could take slices of. Give a dataset with "
            "`__len__` and `__getitem__`; for a stream that is too large for that, use equal batches and plain DDP."
        )
    if isinstance(sampler, DistributedSampler):
        what += " with a DistributedSampler, which gives each rank as many samples as the others"
    if getattr(loader, "batch_size", 0) is None and getattr(loader, "batch_sampler", None) is not None:
        return (
            f"the training data must be a PartitionedLoader, which makes batches that ranks share; got a {what} whose "
            f"batches are made by {type(loader.batch_sampler).__name__}. Give "
            "`PartitionedLoader(dataset, global_batch_size=…)`, and an order of the single samples as `sampler`."
        )
    of_its_own = type(loader).__iter__ is not DataLoader.__iter__ if isinstance(loader, DataLoader) else True
    way_out = (
        "Make one of its dataset, `PartitionedLoader(dataset, global_batch_size=…)`; the examples' DigitsData does so "
        "if it is given `global_batch_size`."
        if of_its_own
        else "`PartitionedLoader.from_dataloader(loader, global_batch_size=…)` makes one from a DataLoader whose "
        "sampler is left out."
    )
    return f"the training data must be a PartitionedLoader; got a {what}. {way_out}"


def _has_tail(loader: PartitionedLoader) -> bool:
    settings = loader.settings
    return settings["tail"] != "drop" and int(settings["samples"]) % int(settings["global_batch_size"]) != 0
