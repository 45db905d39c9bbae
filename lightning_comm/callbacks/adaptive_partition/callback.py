"""The callback that gives each rank a share of the global batch by its speed: it passes hooks to a session."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_comm.callbacks.adaptive_partition.session import PartitionSession, prepare_fit
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings, plain
from lightning_comm.core.ledger import CommLedger
from lightning_comm.formats.adaptive_partition import PartitionJournal


class AdaptivePartition(Callback):
    """Let fast ranks take more of the global batch than slow ones, with the gradient of the whole batch unchanged.

    Each rank takes a share of the same global batch that fits its speed, and its gradient counts by its samples, so
    learning rate, schedule and number of steps stay as they were. It needs a :class:`PartitionedLoader`, and ``ddp``,
    :class:`CompressedDDPStrategy` or :class:`LocalUpdateStrategy`. More: ``docs/techniques/adaptive_partition.md``.

    Args:
        mode: ``"balance"`` moves shares by measured speeds; ``"observe"`` only measures; ``"fixed"`` only splits.
        shares: Ratios by rank, such as ``[1, 3]``, at the start, or with ``"fixed"`` in the whole run; ``None``: equal.
        batch_sizes: The same in samples by rank, such as ``[16, 48]``; they sum to the global batch.
        min_per_rank: The least that a rank takes, one number or one for each; ``None``: 1, or 2 with BatchNorm.
        max_per_rank: The most that a rank takes, one number or one for each.
        window_steps: After how many batches ranks compare their times.
        min_gain: The expected gain, as a part of the best step time, from which shares move.
        warmup_steps: Batches at the start that are not measured.
        loss_reduction: ``"mean"`` or ``"sum"``: what the loss is over the samples of a rank.
        replay: The ``journal.json`` of an earlier run, whose shares are used again at the same steps.
        folder: Where journal and page go; ``None``: ``adaptive_partition`` in the ``default_root_dir``.

    Raises:
        ValueError: If an argument is out of range, or when ``fit`` begins, if data, bounds or journal do not fit.
        MisconfigurationException: When ``fit`` begins, if the strategy or the training data does not fit.

    Note:
        *Communication.* An all-gather of 48 bytes a rank every ``window_steps`` batches (``"fixed"``: none), and the
        loaders' settings at the start; :attr:`ledger` has all of it.

        *Memory.* Activations of more samples on fast ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import AdaptivePartition, PartitionedLoader
        >>> loader = PartitionedLoader(range(1024), global_batch_size=64)
        >>> partition = AdaptivePartition(min_per_rank=4, max_per_rank=48)
        >>> trainer = Trainer(callbacks=[partition], strategy="ddp", accelerator="cpu", devices=2, logger=False)

    References:
        Vineeth S. `Distributed Optimization using Heterogeneous Compute Systems
        <https://arxiv.org/abs/2110.08941>`_. 2021.

    """

    def __init__(  # noqa: PLR0913  (each is one word in a config)
        self,
        mode: Literal["balance", "observe", "fixed"] = "balance",
        shares: Sequence[float] | None = None,
        batch_sizes: Sequence[int] | None = None,
        min_per_rank: int | Sequence[int] | None = None,
        max_per_rank: int | Sequence[int] | None = None,
        window_steps: int = 20,
        min_gain: float = 0.05,
        warmup_steps: int = 5,
        loss_reduction: Literal["mean", "sum"] = "mean",
        replay: str | None = None,
        folder: str | None = None,
    ) -> None:
        self.settings = PartitionSettings(
            mode=mode,
            shares=plain(shares),
            batch_sizes=plain(batch_sizes),
            min_per_rank=plain(min_per_rank),
            max_per_rank=plain(max_per_rank),
            window_steps=window_steps,
            min_gain=min_gain,
            warmup_steps=warmup_steps,
            loss_reduction=loss_reduction,
            replay=str(replay) if isinstance(replay, Path) else replay,
            folder=str(folder) if isinstance(folder, Path) else folder,
        )
        self._ledger = CommLedger()
        self._session: PartitionSession | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def ledger(self) -> CommLedger:
        """Every message of this callback in the last or current ``fit``, on this rank."""
        return self._ledger

    @property
    def weight(self) -> float:
        """The weight of this rank's loss in the present batch: its samples, times ranks, over those of the step.

        The plain mean over the ranks of ``weight * value`` is the mean of ``value`` over the samples of the step.
        """
        return self._session.weight if self._session is not None else 1.0

    @staticmethod
    def weight_of(trainer: Trainer) -> float:
        """Return the weight of the present batch in a Trainer, for a ``LightningModule``; 1.0 without this callback.

        Example:
            >>> from lightning.pytorch import Trainer
            >>> AdaptivePartition.weight_of(Trainer(logger=False))
            1.0

        """
        found = (each for each in getattr(trainer, "callbacks", []) if isinstance(each, AdaptivePartition))
        return next((each.weight for each in found), 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples by rank of the present batch; empty before the first one."""
        return self._session.sizes if self._session is not None else ()

    @property
    def journal(self) -> PartitionJournal | None:
        """The journal of the last or current ``fit``: shares, and the times of all ranks."""
        return self._session.journal() if self._session is not None else None

    @property
    def run_folder(self) -> Path | None:
        """The folder in which rank 0 writes the journal and the page of the last or current ``fit``."""
        return self._session.folder if self._session is not None else None

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None  # the state of a checkpoint that was read to validate or test
        if stage != "fit":
            return
        self._session, self._ledger = None, CommLedger()
        prepare_fit(trainer, pl_module, self.settings, self._ledger)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session = PartitionSession(trainer, pl_module, self.settings, self._loaded, self._ledger)
        if self._loaded is not None and "ledger" in self._loaded:
            self._ledger.load_state_dict(self._loaded["ledger"])
        self._loaded = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.begin_epoch()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._session is not None:
            self._session.begin_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._session is not None:
            self._session.before_backward(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.after_backward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._session is not None:
            self._session.end_batch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.leave_training()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.leave_training()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._session is not None:
            self._session.abandon()

    # ---- what a checkpoint keeps -------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the shares, what is known of speeds, what was measured and sent; loaders save their own place."""
        if self._session is None:
            return {}
        return {**self._session.state_dict(), "ledger": self._ledger.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned, until training starts."""
        self._loaded = state_dict or None
