"""Refusals that several strategies share, of what cannot work together: argument, value, rule, way out.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it.
"""

import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_comm.lightning_internals import logged_metrics, weight_average_of
from lightning_comm.ondevice.flat import distinct
from lightning_comm.strategies.common.model_checks import lazy_problems
from lightning_comm.transport.backends import unsent_problems

_WRAPPERS = ("FullyShardedDataParallel", "DeepSpeedEngine")

# Optimizers that communicate in their `step`, by class name: some exist only in builds with distributed support.
COMMUNICATING = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")


def module_problems(module: LightningModule) -> Iterator[str]:
    """Yield why replicas of a model cannot be averaged, and whether it communicates in its forward."""
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            yield (
                f"module {name!r} is a SyncBatchNorm, which talks to all ranks in every forward, so nothing "
                "would be saved and ranks could not run apart. Use BatchNorm; its statistics are averaged with the "
                "weights, and BatchNormReestimation brings them up to date before evaluation."
            )
    yield from replica_problems(module)


def device_problems(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """Yield tensors to average on devices that the process group cannot send from; once the model is in place."""
    models: list[tuple[str, nn.Module | None]] = [("", module)]
    models += [(" of a weight average", weight_average_of(each)) for each in getattr(trainer, "callbacks", [])]
    named = [
        (f"{name!r}{label}", tensor)
        for label, model in models
        if model is not None
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    yield from unsent_problems(named, "keep it where the model is (`device=None` of a weight average)")


def replica_problems(module: LightningModule) -> Iterator[str]:
    """Yield parts of a model that are not whole on each rank, or that synchronise themselves."""
    yield from lazy_problems(module)
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel) or type(part).__name__ in _WRAPPERS:
            yield (
                f"module {name!r} is wrapped in {type(part).__name__}, which communicates on its own. Hand "
                "over the plain module."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            yield (
                f"parameter {name!r} is sharded (a DTensor), and this needs the whole model on each rank. "
                "Leave out `fully_shard` and other sharding, or use FSDPStrategy, which synchronises at every step."
            )
        if parameter.requires_grad and not is_lazy(parameter) and distinct(parameter).numel() < parameter.numel():
            yield (
                f"parameter {name!r} of shape {tuple(parameter.shape)} is an expanded view, in which several "
                "entries are one place in memory, and no optimizer can change it in place. Keep the small tensor as "
                "the parameter and expand it in `forward`, or make it whole with `.clone()`."
            )


def trainer_problems(trainer: Trainer, sync_batchnorm: bool, *, one_version: bool = False) -> Iterator[str]:
    """Yield settings and callbacks of the Trainer that communicate, or that decide on each rank separately.

    Args:
        trainer: The Trainer.
        sync_batchnorm: Whether the Trainer synchronises BatchNorm over all ranks.
        one_version: Whether callbacks that average weights find the same ones on all ranks.

    """
    if sync_batchnorm:
        yield (
            "`Trainer(sync_batchnorm=True)` talks to all ranks in every forward, so nothing would be saved "
            "and ranks could not run apart. Leave it out; BatchNorm statistics are averaged with the weights."
        )
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, ModelPruning):
            yield (
                "the callback ModelPruning chooses a mask from each rank's own weights, so ranks would "
                "prune differently. Prune before training, alike on all ranks, or use plain DDP."
            )
        if isinstance(callback, StochasticWeightAveraging) and not one_version:
            yield (
                "the callback StochasticWeightAveraging averages each rank's own weights and swaps them in "
                "at the end of the run, so ranks would end with different models. Average checkpoints, or under "
                "LocalUpdateStrategy use WeightAveraging or EMAWeightAveraging, whose copies are averaged there."
            )


def check_twin_callbacks(callbacks: list[Any], where: str) -> None:
    """Refuse callbacks of the package ``pytorch_lightning``, which the Trainer of ``lightning`` takes unnoticed."""
    twin = sys.modules.get("pytorch_lightning")
    for callback in callbacks:
        if twin is not None and isinstance(callback, twin.Callback) and not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"{where}: the callback {type(callback).__name__} comes from `pytorch_lightning`, and this Trainer "
                "from `lightning.pytorch`: two packages with classes of their own. Import everything from one: `from "
                "lightning.pytorch.callbacks import ...` instead of `from pytorch_lightning.callbacks import ...`."
            )


def leave_out_other_model(where: str, checkpoint: dict[str, Any], filepath: object) -> None:
    """Leave the optimizers of the last ``fit`` out of a checkpoint of another model, and warn of it.

    Lightning keeps them when another model is evaluated, and would save them with its weights.
    """
    if "optimizer_states" not in checkpoint:
        return  # a save of weights only
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
    rank_zero_warn(
        f"{where}: {str(filepath)!r} has the weights of the model that was evaluated last, and neither optimizer state "
        "nor what this strategy keeps, since the last `fit` of this Trainer was that of another model. To save the "
        "trained model, call `save_checkpoint` before another one is evaluated."
    )


def warn_of_per_step_sync(trainer: Trainer, where: str) -> None:
    """Warn of values that are logged with a collective on every step, which makes ranks wait for each other."""
    names = sorted({metric.name for metric in logged_metrics(trainer) if metric.synchronised and metric.on_step})
    if names:
        rank_zero_warn(
            f"{where}: {', '.join(map(repr, names))} is logged with `sync_dist=True` on every step. That is a "
            "collective a step, so ranks cannot run apart and most of the time saved is lost. Log it with "
            "`on_step=False, on_epoch=True`, or without `sync_dist`."
        )
