"""The session of one ``fit`` with a partitioned global batch, between Lightning's hooks and the parts that do the work.

It alone talks to the strategy, the loaders and, through its messages, to other ranks. Its parts (windows, record,
files, gradients) know neither them nor the Trainer, and call nothing back. The one value that all of them share is the
plan: windows change it, and loaders read it when they yield a batch.

Order of messages, on every rank alike:

1. In ``setup`` the problems of loaders that ``fit`` was given.
2. When training starts the loaders' settings, and with ``replay`` the journal from rank 0.
3. With a sampler of the user's own a fingerprint of the order, with the first batch of each epoch.
4. Every ``window_steps`` batches of unchanged shares one row from each rank, in ``on_train_batch_end``: under DDP all
   ranks have just met in the all-reduce of gradients; under local updates right after a synchronisation.

All ranks feed the same rows to the same arithmetic, so no decision needs a message. A change holds from the first batch
that no rank's loader has passed to its workers yet; until then nothing is exchanged.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_comm import lightning_internals
from lightning_comm.callbacks.adaptive_partition import agreement, checks
from lightning_comm.callbacks.adaptive_partition.files import PartitionFiles
from lightning_comm.callbacks.adaptive_partition.gradients import GradientScaling
from lightning_comm.callbacks.adaptive_partition.logs import PartitionLogs
from lightning_comm.callbacks.adaptive_partition.memory import MemoryRoom
from lightning_comm.callbacks.adaptive_partition.messages import PartitionMessages
from lightning_comm.callbacks.adaptive_partition.record import PartitionRecord
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.callbacks.adaptive_partition.start import (
    StartOfRun,
    chosen_start,
    replayed_start,
    resumed_start,
    state_of,
    warn_of_single_samples,
)
from lightning_comm.callbacks.adaptive_partition.windows import PartitionWindows
from lightning_comm.contract import GradientsAnnounced, SamplesWeighed, SynchronisesInRounds, refuse_with_strategy
from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.core.ledger import CommLedger
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.formats.adaptive_partition import PartitionJournal
from lightning_comm.instruments.busy_time import BusyTimer

_DEFAULT_FOLDER = "adaptive_partition"


def prepare_fit(trainer: Trainer, module: LightningModule, settings: PartitionSettings, ledger: CommLedger) -> None:
    """Refuse what cannot work together with shares, and let the strategy weight averages by samples.

    Note:
        *Communication.* The problems of loaders that ``fit`` was given, from each rank.

    """
    problems = [*checks.set_up_problems(trainer, module, settings), *agreement.given_loader_problems(trainer, ledger)]
    refuse_with_strategy(trainer, "AdaptivePartition", problems)
    if isinstance(trainer.strategy, SamplesWeighed):
        trainer.strategy.weigh_by_samples()


class PartitionSession:
    """Splits, measures and balances during one ``fit``.

    Args:
        trainer: The Trainer, when training starts.
        module: The model.
        settings: What the user chose.
        loaded: The state from a checkpoint.
        ledger: Where messages are recorded.

    Note:
        *Communication.* See the head of the file.

    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: PartitionSettings,
        loaded: dict[str, Any] | None,
        ledger: CommLedger,
    ) -> None:
        self._trainer = trainer
        self._settings = settings
        self._ledger = ledger
        self._loaders, sharers = agreement.agreed_loaders(trainer, settings, ledger)
        start = self._start(module, loaded)
        self.plan = start.plan
        self._record = PartitionRecord(start.run, settings.mode, start.plan, start.why, start.windows)
        self._files = PartitionFiles(
            Path(settings.folder or Path(trainer.default_root_dir) / _DEFAULT_FOLDER),
            writes=trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False),  # nor does Lightning, there
        )
        self._gradients = GradientScaling(module)
        self._logs = PartitionLogs(trainer)
        self._timer: BusyTimer | None = None
        self._windows: PartitionWindows | None = None
        if settings.mode != "fixed":
            device = trainer.strategy.root_device
            self._timer = BusyTimer(device)
            self._windows = PartitionWindows(settings, start, self._record, self._timer, MemoryRoom(device, sharers))
        has_messages = self._timer is not None or _have_samplers(self._loaders)
        self._messages = PartitionMessages(
            lightning_internals.timeout_of(trainer.strategy), ledger, needed=trainer.world_size > 1 and has_messages
        )
        self._compared_epoch = -1
        self._rounds_seen = 0
        self.weight = 1.0
        self.sizes: tuple[int, ...] = ()
        self._place = BatchIndex(0, 0)
        self._let_loaders_follow()
        if self._timer is not None:
            self._timer.watch()  # last, since it would stay on after a failure of the others

    # ---- the start ---------------------------------------------------------------------------------------------------

    def _start(self, module: LightningModule, loaded: dict[str, Any] | None) -> StartOfRun:
        """Return the plan that the run begins with, and the state of an earlier part of it."""
        trainer, settings, loaders = self._trainer, self._settings, self._loaders
        with_norm = checks.has_batch_norm(module)
        start = chosen_start(settings, loaders, trainer.world_size, with_norm)
        lightning_internals.load_skipped_loader_states(trainer)
        if settings.replay is not None:
            journal = agreement.journal_of_rank_0(trainer, settings.replay, self._ledger)
            start = replayed_start(start, journal, settings.replay)
        elif loaded is not None:
            place = max(BatchIndex(trainer.current_epoch, 0), *(loader.dispatched for loader in loaders))
            start = resumed_start(start, loaded, place, fixed=settings.mode == "fixed")
        if with_norm and trainer.world_size > 1:
            rank_zero_info(
                "AdaptivePartition: the model has BatchNorm, which normalises by each rank's own samples, so results "
                "depend on the split, and DDP keeps the running statistics of rank 0. SyncBatchNorm (on GPUs) has "
                "neither effect."
            )
        if with_norm:
            warn_of_single_samples(loaders, trainer.world_size)
        return start

    def _let_loaders_follow(self) -> None:
        for loader in self._loaders:
            loader.follow(self.plan, self._trainer.global_rank)
            if getattr(self._trainer, "overfit_batches", 0):
                loader.repeat_first_epoch()
        strategy = self._trainer.strategy
        if isinstance(strategy, GradientsAnnounced) and self._timer is not None:
            strategy.when_gradients_are_ready(self._timer.gradients_ready)

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Follow loaders that the Trainer has made anew, and compare orders before any rank has drawn from them."""
        if checks.loaders_of(self._trainer) != self._loaders:
            self._loaders, _ = agreement.agreed_loaders(self._trainer, self._settings, self._ledger)
            self._let_loaders_follow()
        self._compare_orders(self._trainer.current_epoch)

    def _compare_orders(self, epoch: int) -> None:
        """Compare the orders that the user's samplers draw on the ranks; one that fails on a rank fails on all."""
        self._compared_epoch = epoch
        if not self._messages.needed or not _have_samplers(self._loaders):
            return
        own, failure = None, None
        try:
            own = sum(loader.order_fingerprint() for loader in self._loaders) % 2**48
        except Exception as error:  # any error: the others wait for the result
            failure = error
        fingerprints = self._messages.gather_fingerprints(own)
        if failure is not None:
            raise failure
        checks.check_same_order(fingerprints)

    # ---- a batch -----------------------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """Note the share of each rank in a batch, before it is trained on."""
        slices = [loader.latest for loader in self._loaders if loader.latest is not None]
        if not slices:
            return
        latest = max(slices, key=lambda each: each.place)
        if latest.place.epoch != self._compared_epoch:  # resumed in the middle of one
            self._compare_orders(latest.place.epoch)
        self.sizes, self.weight = latest.sizes, latest.weight
        if isinstance(self._trainer.strategy, SamplesWeighed):
            self._trainer.strategy.count_samples(latest.samples)
        if self._windows is not None:
            self._windows.begin_batch([each for each in slices if each.place == latest.place])
        self._place = latest.place
        self._gradients.begin_batch()

    def before_backward(self, loss: Tensor) -> None:
        """Weight the gradient of a loss by the samples that it is the mean of; its value does not change."""
        self._gradients.before_backward(loss, self._gradient_factor())
        if self._timer is not None:
            self._timer.before_backward(loss)

    def after_backward(self) -> None:
        """Note that a backward has returned."""
        self._gradients.after_backward()
        if self._timer is not None:
            self._timer.after_backward()

    def end_batch(self) -> None:
        """End a batch; compare times and move shares, where a window is over."""
        self._gradients.end_batch(self._gradient_factor())
        self._logs.warn_of_plain_means()
        if self._windows is not None:
            self._windows.end_batch()
            if self._have_just_met() and self._windows.is_over(self._place):
                self._compare(self._windows)
        self._logs.log()

    def _compare(self, windows: PartitionWindows) -> None:
        dispatched = max(loader.dispatched for loader in self._loaders)
        own = windows.own_times(self._place, dispatched, self._trainer.global_rank)
        if windows.compare(self._messages.gather_times(own, self._trainer.global_step), self._place):
            self._logs.put(self._record.metrics())
            if self._files.is_due:
                self._files.save(self._record.journal())

    def leave_training(self) -> None:
        """Something other than training follows."""
        if self._windows is not None:
            self._windows.leave_training()

    # ---- questions to the strategy -----------------------------------------------------------------------------------

    def _averages_gradients(self) -> bool:
        strategy = self._trainer.strategy
        return not isinstance(strategy, SynchronisesInRounds) or strategy.averages_gradients

    def _gradient_factor(self) -> float:
        if self.weight == 0.0:  # a sample that only fills the batch of a rank that has none
            return 0.0
        return self.weight if self._averages_gradients() and self._settings.loss_reduction == "mean" else 1.0

    def _have_just_met(self) -> bool:
        strategy = self._trainer.strategy
        if not isinstance(strategy, SynchronisesInRounds) or strategy.averages_gradients:
            return True
        seen, self._rounds_seen = self._rounds_seen, strategy.rounds_done
        return strategy.rounds_done != seen

    # ---- the end -----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """The folder in which rank 0 writes the journal and the page."""
        return self._files.folder

    def journal(self) -> PartitionJournal:
        """Return the journal so far."""
        return self._record.journal()

    def finish(self) -> None:
        """Write the journal and the page, and log the results."""
        if self._timer is not None:
            self._timer.close()
        self._files.finish(self._record.journal())
        self._messages.close()

    def abandon(self) -> None:
        """Write the journal of a run that failed, without a message to other ranks."""
        if self._timer is not None:
            self._timer.close()
        self._files.save(self._record.journal())

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run restores; alike on all ranks, in plain types."""
        balancer = self._windows.state_dict() if self._windows is not None else None
        return state_of(self._record.run, self.plan, balancer, self._record.state_dict())


def _have_samplers(loaders: list[PartitionedLoader]) -> bool:
    return any(loader.settings["sampler"] for loader in loaders)
