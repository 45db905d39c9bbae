"""One ``fit`` with a partitioned global batch: who takes how much, how long that takes, and what follows from it.

Order of messages, on every rank alike. At the start one gathering of the loaders' settings, and with ``replay`` the
journal from rank 0. With a sampler of the user's a fingerprint of the order with the first batch of each epoch. Every
``window_steps`` batches of unchanged shares one row from each rank, in ``on_train_batch_end``, where under DDP all
ranks have just met in the all-reduce of gradients; under local updates right after a synchronisation. All ranks feed
the same rows to the same arithmetic, so no decision needs a message. A change holds from the first batch that no rank's
loader has passed to its workers yet; until it does, nothing is exchanged.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_comm import lightning_internals as internals
from lightning_comm.callbacks.adaptive_partition import checks
from lightning_comm.callbacks.adaptive_partition.files import PartitionFiles
from lightning_comm.callbacks.adaptive_partition.memory import MemoryRoom
from lightning_comm.callbacks.adaptive_partition.meter import PartitionMeter, Row
from lightning_comm.callbacks.adaptive_partition.record import PartitionRecord
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.callbacks.adaptive_partition.start import StartOfRun
from lightning_comm.contract import GradientsAnnounced, SamplesWeighed, SynchronisesInRounds
from lightning_comm.core.adaptive_partition.balancing import Balancer
from lightning_comm.core.adaptive_partition.plan import Place
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.quantities import times_as_fast
from lightning_comm.formats.adaptive_partition import PartitionJournal
from lightning_comm.transport.recording import Recorder, another_group

_DATA_BOUND = 0.2  # of the busy time
_LOGGED_RANKS = 16
_FAILED = -1  # in place of a fingerprint


class PartitionSession:
    """Splits, measures and balances during one ``fit``.

    Args:
        trainer: The Trainer, when training starts.
        module: The model.
        settings: What the user chose.
        loaded: What a checkpoint kept.

    Note:
        *Communication.* See the head of the file.

    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, settings: PartitionSettings, loaded: dict[str, Any] | None
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._settings = settings
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        self._loaders, sharers = checks.agreed_loaders(trainer, settings)
        start = StartOfRun(trainer, module, settings, self._loaders, loaded)
        self.plan, self._replays = start.plan, start.replays
        self.record = PartitionRecord(start.run, settings.mode, start.plan, start.why, start.windows)
        self.files = PartitionFiles(trainer, settings.folder)
        self._meter: PartitionMeter | None = None
        self._balancer: Balancer | None = None
        if settings.mode != "fixed":
            self._meter = PartitionMeter(trainer.strategy.root_device, settings.warmup_steps)
            self._balancer = Balancer(self._ranks, sum(self.plan.sizes), start.lo, start.hi, min_gain=settings.min_gain)
            if start.balancer is not None:
                self._balancer.load_state_dict(start.balancer)
        self._group: dist.ProcessGroup | None = None
        self._recorder: Recorder | None = None
        self._meet_in_a_group()
        self._scaling: list[RemovableHandle] = []  # hooks of the present backward
        self._memory = MemoryRoom(trainer.strategy.root_device, sharers)
        self._compared_epoch = -1
        self._rounds_seen = 0
        self._warned_of_data = self._warned_of_waits = False
        self._logs_checked = 0
        self._metrics: dict[str, float] = {}  # of the newest window, not logged yet
        self.weight = 1.0
        self.sizes: tuple[int, ...] = ()
        self._place = Place(0, 0)
        self._hears_of_backward = self._warned_of_backward = False
        self._attach()
        if self._meter is not None:
            self._meter.timer.listen()  # last, since what fails before it would leave it on

    def _meet_in_a_group(self) -> None:
        """Make a group for the messages of windows and orders, if there are any."""
        has_sampler = any(loader.settings["sampler"] for loader in self._loaders)
        if self._ranks > 1 and (self._meter is not None or has_sampler):
            dist.barrier()  # hears of the failure of another rank, which the making of a group would not
            self._group = another_group(internals.timeout_of(self._trainer.strategy), backend="gloo")
            self._recorder = Recorder(CommLedger(), self._group)

    # ---- following ---------------------------------------------------------------------------------------------------

    def follow_new_loaders(self) -> None:
        """Follow loaders that the Trainer has made anew."""
        if checks.loaders_of(self._trainer) != self._loaders:
            self._loaders, _ = checks.agreed_loaders(self._trainer, self._settings)
            self._attach()

    def _attach(self) -> None:
        for loader in self._loaders:
            loader.follow(self.plan, self._rank)
            if getattr(self._trainer, "overfit_batches", 0):
                loader.repeat_first_epoch()
        strategy = self._trainer.strategy
        if isinstance(strategy, GradientsAnnounced) and self._meter is not None:
            strategy.when_gradients_are_ready(self._meter.timer.gradients_ready)

    def begin_epoch(self) -> None:
        """Compare the order of a new epoch, before any rank has drawn from it."""
        self.follow_new_loaders()
        self._compare_orders(self._trainer.current_epoch)

    # ---- a batch -----------------------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """Take note of whose samples a batch has, before it is trained on."""
        slices = [loader.latest for loader in self._loaders if loader.latest is not None]
        if not slices:
            return
        latest = max(slices, key=lambda each: each.place)
        if latest.place.epoch != self._compared_epoch:  # resumed in the middle of one
            self._compare_orders(latest.place.epoch)
        self.sizes, self.weight = latest.sizes, latest.weight
        if isinstance(self._trainer.strategy, SamplesWeighed):
            self._trainer.strategy.count_samples(latest.samples)
        if self._meter is not None:
            now = [each for each in slices if each.place == latest.place]
            self._meter.begin(
                latest.sizes,
                full=latest.total == sum(self.plan.sizes),
                started_s=min(each.fetch_started_s for each in now),
                fetch_s=sum(each.fetch_s for each in now),
            )
        self._place = latest.place
        self._hears_of_backward = False

    def before_backward(self, loss: Tensor) -> None:
        """Let the gradient of a loss count by the samples that it is the mean of; its value stays as it is."""
        self._hears_of_backward = True
        factor = self._gradient_factor()
        if factor == 0.0:  # of a dummy, whose gradient may be anything, also NaN, which 0.0 times is NaN
            trained = [each for each in self._module.parameters() if each.requires_grad]
            self._scaling = [each.register_hook(torch.zeros_like) for each in trained]  # type: ignore[no-untyped-call]
        elif factor != 1.0 and loss.requires_grad:
            self._scaling = [loss.register_hook(lambda gradient: gradient * factor)]  # type: ignore[no-untyped-call]
        if self._meter is not None:
            self._meter.timer.before_backward(loss)

    def _gradient_factor(self) -> float:
        if self.weight == 0.0:  # a sample that only fills the batch of a rank that has none
            return 0.0
        return self.weight if self._averages_gradients() and self._settings.loss_reduction == "mean" else 1.0

    def _averages_gradients(self) -> bool:
        strategy = self._trainer.strategy
        return not isinstance(strategy, SynchronisesInRounds) or strategy.averages_gradients

    def after_backward(self) -> None:
        """Note that a backward has returned."""
        for handle in self._scaling:  # the same loss may be part of another backward
            handle.remove()
        self._scaling = []
        if self._meter is not None:
            self._meter.timer.after_backward()

    def end_batch(self) -> None:
        """End a batch; compare times and move shares, where a window is full."""
        self._end_batch()
        self._log()

    def _end_batch(self) -> None:
        if not self._hears_of_backward and not self._warned_of_backward and self._gradient_factor() != 1.0:
            self._warn_of_own_backward()
        logged = internals.number_of_logged_metrics(self._trainer)
        if logged > self._logs_checked:
            self._logs_checked = logged
            self._warn_of_plain_means()
        meter, balancer = self._meter, self._balancer
        if meter is None or balancer is None:
            return
        meter.end()
        have_met = self._have_just_met()
        in_flight = not self._replays and self.plan.changes[-1].place > self._place
        if have_met and not in_flight and meter.batches >= self._settings.window_steps:
            self._compare(meter, balancer)
            meter.begin_window()

    def _have_just_met(self) -> bool:
        strategy = self._trainer.strategy
        if not isinstance(strategy, SynchronisesInRounds) or strategy.averages_gradients:
            return True
        seen, self._rounds_seen = self._rounds_seen, strategy.rounds_done
        return strategy.rounds_done != seen

    def leave_training(self) -> None:
        """Something other than training follows."""
        if self._meter is not None:
            self._meter.leave_training()

    # ---- a window ----------------------------------------------------------------------------------------------------

    def _compare(self, meter: PartitionMeter, balancer: Balancer) -> None:
        place = max(loader.dispatched for loader in self._loaders)
        rows = self._exchange(meter.row(place, self._memory.cap(self.plan.sizes_at(self._place)[self._rank])))
        if any(math.isnan(row.busy_s) for row in rows):
            return  # a rank has nothing to compare with: no backward, or a device that is far behind
        sizes = self.plan.sizes_at(self._place)
        step_s = max(row.busy_s if math.isnan(row.step_s) else row.step_s for row in rows)
        caps = [None if row.cap < 0 else int(row.cap) for row in rows]
        balancer.observe(sizes, [row.busy_s for row in rows], step_s=step_s, caps=caps)
        forecast = balancer.forecast()
        self.record.add_window(self._place, sizes, rows, step_s, forecast)
        self._warn_of_slow_data(rows)
        self._warn_of_hidden_waits(meter)
        proposal = balancer.propose() if self._settings.mode == "balance" and not self._replays else None
        if proposal is not None and forecast is not None and proposal != sizes:
            start = max(Place(int(row.epoch), int(row.batch)) for row in rows)
            self.plan.change_at(start, proposal)
            why = f"a step is expected to become {times_as_fast(1 / (1 - forecast.gain))}"
            self.record.why[start] = why
            rank_zero_info(
                f"AdaptivePartition: from batch {start.batch} of epoch {start.epoch} on, ranks take {list(proposal)} "
                f"samples; {why}."
            )
        self._metrics = self.record.metrics(_LOGGED_RANKS)
        self.files.save_now_and_then(self.record.journal)

    def _exchange(self, row: Row) -> list[Row]:
        if self._recorder is None:
            return [row]
        self._recorder.step = self._trainer.global_step
        rows, pending = self._recorder.all_gather(torch.tensor(row, dtype=torch.float64), "partition")
        pending.wait()
        return [Row(*each) for each in rows.tolist()]

    def _compare_orders(self, epoch: int) -> None:
        """Compare what samplers of the user's draw on the ranks; one that fails on a rank fails on all."""
        self._compared_epoch = epoch
        if self._recorder is None or not any(loader.settings["sampler"] for loader in self._loaders):
            return
        own, failure = _FAILED, None
        try:
            own = sum(loader.order_fingerprint() for loader in self._loaders) % 2**48
        except Exception as error:  # whatever it is, the others wait for word of it
            failure = error
        rows, pending = self._recorder.all_gather(torch.tensor([own], dtype=torch.float64), "partition")
        pending.wait()
        if failure is not None:
            raise failure
        checks.check_same_order([int(each) for each in rows.view(-1).tolist()], _FAILED)

    # ---- what is said ------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        """Hand the loggers the newest window, where Lightning logs the metrics of a batch, and at the same step."""
        step = internals.logged_step(self._trainer) if self._metrics and self._trainer.is_global_zero else None
        if step is None:
            return
        metrics, self._metrics = self._metrics, {}
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _warn_of_slow_data(self, rows: list[Row]) -> None:
        slow = [rank for rank, row in enumerate(rows) if row.fetch_s > _DATA_BOUND * row.busy_s]
        if slow and not self._warned_of_data:
            self._warned_of_data = True
            share = max(row.fetch_s / row.busy_s for row in rows)
            rank_zero_warn(
                f"AdaptivePartition: ranks {slow} wait for data for up to {100 * share:.0f} % of their busy time. "
                "Shares follow that too, but more loader workers (`num_workers`) may help more."
            )

    def _warn_of_hidden_waits(self, meter: PartitionMeter) -> None:
        on_cuda = self._trainer.strategy.root_device.type == "cuda"
        if on_cuda and meter.timer.messages_within and not self._warned_of_waits:
            self._warned_of_waits = True
            rank_zero_warn(
                "AdaptivePartition: there are messages between ranks in the forward (a metric that is reduced on each "
                "step, BatchNorm's buffers or SyncBatchNorm, `all_gather`). On a GPU the wait in them cannot be told "
                "from compute, so ranks look more alike than they are. Log with `on_step=False`, and gather after the "
                "backward."
            )

    def _warn_of_plain_means(self) -> None:
        logged = internals.logged_metrics(self._trainer)
        names = sorted({each.name for each in logged if each.synchronised and each.on_step and not each.is_metric})
        if names and self._ranks > 1:
            rank_zero_warn(
                f"AdaptivePartition: {', '.join(map(repr, names))} is logged with `sync_dist=True` on every step, as "
                "the plain mean over ranks, which is not the mean over samples where shares differ. Log it times "
                "`AdaptivePartition.weight_of(self.trainer)`, if it is not, or with `on_step=False, on_epoch=True`, "
                "which weighs by `batch_size`."
            )

    def _warn_of_own_backward(self) -> None:
        self._warned_of_backward = True
        rank_zero_warn(
            "AdaptivePartition: no backward through `self.manual_backward(loss)` was seen in a batch whose gradient "
            "has to be weighted by samples. `loss.backward()` is not seen, and its gradient is wrong where shares "
            "differ."
        )

    # ---- the end -----------------------------------------------------------------------------------------------------

    def journal(self) -> PartitionJournal:
        """Return what has happened so far."""
        return self.record.journal()

    def finish(self) -> None:
        """Write the journal and the page, and say what was seen."""
        self._close_meter()
        self.files.finish(self.record.journal())
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = self._recorder = None

    def abandon(self) -> None:
        """Write the journal of a run that failed, without a word to other ranks."""
        self._close_meter()
        self.files.save(self.record.journal())

    def _close_meter(self) -> None:
        if self._meter is not None:
            self._meter.timer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; alike on all ranks, in plain types."""
        return {
            "version": 1,
            "run": dict(self.record.run),
            "plan": self.plan.state_dict(),
            "balancer": self._balancer.state_dict() if self._balancer is not None else None,
            "record": self.record.state_dict(),
        }
