"""BatchNorm's running statistics, re-estimated for averaged weights before these are evaluated."""

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_comm.contract import AveragesTakenOut, refuse_with_strategy
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.recording import Recorder


class BatchNormReestimation(Callback):
    """Re-estimate the running statistics of BatchNorm before every validation within ``fit``.

    After an average of weights the running statistics, which followed each rank's own weights, fit less well. This
    callback passes training batches through the model without gradients and replaces the statistics by their plain mean
    over these batches and over the ranks, as the authors of QSR do. Weights are not touched. In the middle of a round
    of local updates the statistics go with the average that the validation sees; each rank has its own back after it.

    The batches come from a fresh ``train_dataloader()`` of the data module or of the model; rank r takes each
    world-size-th batch from the r-th on.

    Args:
        num_batches: How many batches are used, over all ranks together; at least 1.

    Raises:
        ValueError: If ``num_batches`` is less than 1.
        MisconfigurationException: At set-up, if the model has no BatchNorm with running statistics, or if the loader
            was handed to ``fit`` directly, where a second pass would disturb the first.

    Note:
        *Communication.* One all-reduce of the running statistics, in float64, before each validation, through the
        strategy; :attr:`ledger` has it, as ``"batch_norm_statistics"``.
        *Memory.* A copy of the running statistics in float64.

    Example:
        >>> BatchNormReestimation(num_batches=100).num_batches
        100

    """

    def __init__(self, num_batches: int = 100) -> None:
        if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1:
            raise ValueError(
                f"BatchNormReestimation: `num_batches` counts training batches, so it must be a whole number >= 1; got "
                f"{num_batches!r}. The authors of QSR use about 100."
            )
        self.num_batches = num_batches
        self._ledger = CommLedger()
        self._loaded: dict[str, Any] | None = None

    @property
    def ledger(self) -> CommLedger:
        """Every message of this callback in the last or current ``fit``, on this rank."""
        return self._ledger

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None  # the state of a checkpoint that was read to validate or test
        if stage != "fit":
            return
        self._ledger = CommLedger()
        refuse_with_strategy(trainer, "BatchNormReestimation", self._problems(trainer, pl_module))

    def _problems(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[str]:
        if not _tracking_norms(pl_module):
            yield (
                "the model has no BatchNorm layer with running statistics, so there is nothing "
                "to re-estimate. Leave the callback out."
            )
        if not is_overridden("forward", pl_module):
            yield (
                f"{type(pl_module).__name__} has no `forward`, through which batches are "
                "passed. Define one that takes the first part of a batch."
            )
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None and not is_overridden("train_dataloader", pl_module):
            yield (
                "`fit(train_dataloaders=...)` hands over a loader that training is passing "
                "through, and a second pass would disturb the first. Give a LightningDataModule, or `train_dataloader` "
                "in the LightningModule, from which a fresh loader can be made."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            self._ledger.load_state_dict(self._loaded)
            self._loaded = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the ledger."""
        return {"ledger": self._ledger.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned, until training starts."""
        self._loaded = state_dict.get("ledger")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after the hook callback of the strategy, which is first in the list, so averaged weights are in place
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._reestimate(trainer, pl_module)

    @torch.no_grad()
    def _reestimate(self, trainer: Trainer, module: LightningModule) -> None:
        norms = _tracking_norms(module)
        kept = [(norm.momentum, norm.training) for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        seen = 0
        for batch in self._batches(trainer):
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                module.forward(*_inputs(batch))
            seen += 1
        for norm, (momentum, training) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.train(training)
        _average_over_batches(trainer, norms, seen, self._ledger)
        if isinstance(trainer.strategy, AveragesTakenOut):
            trainer.strategy.take_into_average([each for norm in norms for each in norm.buffers(recurse=False)])

    def _batches(self, trainer: Trainer) -> Iterable[Any]:
        source = getattr(trainer, "datamodule", None) or trainer.lightning_module
        loader = source.train_dataloader()
        return itertools.islice(loader, trainer.global_rank, self.num_batches, trainer.world_size)


def _average_over_batches(trainer: Trainer, norms: list[_BatchNorm], seen: int, ledger: CommLedger) -> None:
    """Replace the statistics by their mean over all batches of all ranks; ``seen`` is this rank's number of batches."""
    statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
    flat = torch.cat([each.flatten().double() for each in statistics]) * seen
    counted = torch.cat([flat, flat.new_tensor([float(seen)])])
    add_up = partial(trainer.strategy.reduce, counted, reduce_op="sum")
    if trainer.world_size > 1:
        recorder = Recorder(ledger)
        recorder.step = trainer.global_step
        recorder.note("barrier", "batch_norm_statistics", 0)  # before Lightning's reduction
        total = recorder.sent_by_others("all_reduce", "batch_norm_statistics", counted.nbytes, add_up)
    else:
        total = add_up()
    for each, mean in zip(
        statistics, (total[:-1] / total[-1]).split([each.numel() for each in statistics]), strict=True
    ):
        each.copy_(mean.view(each.shape))


def _tracking_norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def _inputs(batch: Any) -> tuple[Any, ...]:
    """Return the arguments of ``forward``: the first of a pair, as in ``(images, labels)``, otherwise the batch."""
    return (batch[0],) if isinstance(batch, (tuple, list)) else (batch,)
