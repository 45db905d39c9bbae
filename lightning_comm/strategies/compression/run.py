"""One ``fit`` whose ranks are in step: they agree on requests, and on ends of epochs, by one small message a batch.

Lightning broadcasts on every batch whether rank 0 has received SIGTERM, and leaves all else to each rank. In place of
that broadcast all ranks reduce their status: a request, a stop, the end of an epoch. So all of them do the same after
the same batch, whichever rank has asked for it, and if the data of one ends sooner no other rank is left waiting.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm import lightning_internals
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.transport.epoch_ends import same_batches
from lightning_comm.transport.plain_data import gather_json
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement, Decision, Kind

_TRAINS_ON, _AT_LAST_BATCH, _LEFT = range(3)  # where a rank is in its epoch
_PAUSE_S = 0.0001


class Unread(Protocol):
    """An object with numbers on the device that the host is to read later."""

    def unread(self) -> Tensor | None:
        """Return the numbers, of which float32 holds each; ``None`` if they have been read."""

    def note_read(self, values: Sequence[float]) -> None:
        """Keep the numbers that :meth:`unread` has returned, once they have been read."""


class CompressionRun:
    """The agreement of ranks that average gradients: requests, stops and ends of epochs.

    Args:
        trainer: The Trainer.
        module: The model.
        recorder: Sends and records.
        agreement: How ranks learn of failures.
        where: The strategy, for messages.
        beside: Objects with further numbers to read in each step. They are read together with those of a meeting, since
            on CUDA each separate read is a wait for the device.

    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        recorder: Recorder,
        agreement: Agreement,
        where: str,
        beside: Sequence[Unread] = (),
    ) -> None:
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.refused = False  # whether all ranks raise the same error now, so that none has failed alone
        self._trainer = trainer
        self._module = module
        self._recorder = recorder
        self.agreement = agreement
        self._where = where
        self._beside = beside
        self._wanted: list[tuple[Kind, str]] = []
        self._decided: list[Decision] = []  # to be carried out between two batches
        self._validated = False  # whether ranks have validated since they met
        self._epoch_is_over = True
        self._confirmed = 0  # the last batch of the run that all ranks have announced
        self._confirms = False  # whether each batch is confirmed by all ranks before its forward

    # ---- requests ------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self._trainer.global_step

    def request(self, kind: Kind, reason: str) -> None:
        """Request something that all ranks are to do; also from a signal handler, since nothing is sent here."""
        if all(kind != wanted for wanted, _ in self._wanted):
            self._wanted.append((kind, f"rank {self._recorder.rank}: {reason}"))

    def validated(self) -> None:
        """Note that ranks validate, after which one of them may request a stop."""
        self._validated = True

    # ---- where ranks meet ----------------------------------------------------------------------------------------

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches, where these are known before training.

        Note:
            *Communication.* Two all-gathers of a few bytes.

        """
        mine = {
            "batches": int(batches) if math.isfinite(batches) else -1,
            "confirms": self._may_leave_unseen(lightning_internals.training_loaders(self._trainer)),
        }
        with self.agreement.first_error_shown():
            rows = gather_json(mine, self._recorder, self._module.device, "control")
        self.refused = True
        rank_status.check_same_batches([RankStatus(batches=row["batches"]) for row in rows], self._where)
        self.refused = False
        self._confirms = any(row["confirms"] for row in rows)

    def _may_leave_unseen(self, loaders: list[Any]) -> bool:
        """Whether this rank may leave its epoch, or end it, within a batch in which others train on."""
        if is_overridden("on_train_batch_start", self._module) or any(map(_may_be_shorter, loaders)):
            return True
        # Lightning reads a stream ahead only without a limit; and in its last batch gradients are averaged, also where
        # others accumulate them
        trainer = self._trainer
        seen_late = lightning_internals.accumulates(trainer) or math.isfinite(trainer.num_training_batches)
        return seen_late and any(_length(each) is None for each in loaders)

    def settle(self) -> None:
        """Agree on requests where all ranks are between two batches."""
        self._meet(_TRAINS_ON)
        self._carry_out()

    def begin_step(self) -> None:
        """Let all ranks announce that they train on this batch, if one may have left its epoch without a message.

        Note:
            *Communication.* None, unless :meth:`check_start` found that this may be; then that of a meeting.

        """
        batch = lightning_internals.batches_begun(self._trainer)
        if self._confirms and batch != self._confirmed:  # once a batch, also for an optimizer with several closures
            self._confirmed = batch
            self._meet(self._place())

    def after_batch(self, end_of_batch: Callable[[], None]) -> None:
        """Agree on requests at the end of a batch, before a validation; carry them out afterwards."""
        place = self._place()
        self._validated = False
        self._meet(place)
        self._epoch_is_over = last = place == _AT_LAST_BATCH
        end_of_batch()
        if self._validated:
            self._meet(place)
        if not last:  # else when the epoch is over, so that a checkpoint shows that it is
            self._carry_out()

    def around_epoch_start(self, start: Callable[[], None]) -> None:
        """Agree on requests from the hooks at the start of an epoch."""
        start()
        if getattr(self._trainer, "reload_dataloaders_every_n_epochs", 0):
            self.check_start(float(self._trainer.num_training_batches))
        self._epoch_is_over = False
        self.settle()

    def around_epoch_end(self, end: Callable[[], None]) -> None:
        """Agree on requests from the hooks at the end of an epoch."""
        if self._confirms and not self._epoch_is_over:
            self._meet(_LEFT)
        end()
        self._meet(_LEFT)
        self._carry_out()

    def _place(self) -> int:
        return _AT_LAST_BATCH if lightning_internals.is_last_batch(self._trainer) else _TRAINS_ON

    def _meet(self, place: int) -> None:
        """Tell the other ranks where this one is and whether it has a request; learn the same of them.

        Note:
            *Communication.* An all-reduce of 5 bytes, recorded as ``"control"``; more if there is a request. On CUDA
            the host waits for the device here, once a step.

        """
        flags = [bool(self._wanted), bool(self._trainer.should_stop), *(place == each for each in range(3))]
        if self._recorder.world_size > 1:
            # filled there: a copy from ordinary memory to CUDA waits for the device
            tensor = torch.zeros(len(flags), dtype=torch.uint8, device=self._module.device)
            for number, is_up in enumerate(flags):
                if is_up:
                    tensor[number].fill_(1)
            self._recorder.step = self._trainer.global_step
            with self.agreement.first_error_shown():
                pending = self._recorder.all_reduce(tensor, "control", dist.ReduceOp.MAX)
                _wait(pending, self.agreement, tensor.device)
                flags = self._read(tensor)
        wanted, stop, *places = map(bool, flags)
        if sum(places) > 1:
            self._refuse_unequal_epochs(place)
        if wanted:
            self._decide()
        if stop:
            self._trainer.should_stop = True

    def _read(self, flags: Tensor) -> list[bool]:
        """Return what ranks have sent, and pass on the further numbers that were read with it."""
        found = [(each, tensor.reshape(-1)) for each in self._beside if (tensor := each.unread()) is not None]
        if not found:
            return flags.tolist()
        rows = [flags, *(tensor for _, tensor in found)]
        read = torch.cat([row.to(flags.device, torch.float32) for row in rows]).tolist()
        for each, tensor in reversed(found):
            each.note_read(read[-len(tensor) :])
            del read[-len(tensor) :]
        return read

    def _decide(self) -> None:
        mine, self._wanted = self._wanted, []
        with self.agreement.first_error_shown():
            rows = gather_json(mine, self._recorder, self._module.device, "control")
        for kind, reason in {kind: reason for row in reversed(rows) for kind, reason in row}.items():
            decision = Decision(kind, reason, self._trainer.global_step)
            if kind in ("stop", "validate"):  # which count for the end of this batch
                self.on_decision(decision)
            elif all(each.kind != kind for each in self._decided):
                self._decided.append(decision)

    def _carry_out(self) -> None:
        decided, self._decided = self._decided, []
        for decision in sorted(decided, key=lambda each: each.kind == "terminate"):
            self.on_decision(Decision(decision.kind, decision.reason, self._trainer.global_step))
            if decision.kind == "terminate":
                raise SIGTERMException

    def _refuse_unequal_epochs(self, place: int) -> None:
        row = [lightning_internals.batches_of_epoch(self._trainer), place != _TRAINS_ON]
        with self.agreement.first_error_shown():
            rows = gather_json(row, self._recorder, self._module.device, "control")
        over = [rank for rank, (_, is_over) in enumerate(rows) if is_over]
        batches = {rank: rows[rank][0] for rank in over}
        self.refused = True
        raise RuntimeError(
            f"{self._where}: epoch {self._trainer.current_epoch} is over on ranks {over} after {min(batches.values())} "
            f"batches and goes on on the others, which would wait forever. {same_batches(batches)} Or cut a stream to "
            "one length on all ranks, or take a DistributedSampler, which pads. What `on_train_batch_start` returns "
            "must be the same on all ranks."
        )


def _wait(pending: Pending, agreement: Agreement, device: torch.device) -> None:
    """Wait for a message: on a CPU backend a failed rank closes its connections, elsewhere its report is read here."""
    while device.type != "cpu" and not pending.done():
        agreement.poll_failures()
        time.sleep(_PAUSE_S)
    pending.wait()


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # as Lightning asks, which then reads one batch ahead
        return None


def _may_be_shorter(loader: Any) -> bool:
    """Whether a loader may yield less than its length: a stream, or a sampler of the user's, with a ``__len__``."""
    if _length(loader) is None:
        return False
    if not isinstance(loader, DataLoader):
        return not _is_known(loader)
    parts = [each for each in (loader.sampler, loader.batch_sampler) if each is not None]
    return isinstance(loader.dataset, IterableDataset) or not all(map(_is_known, parts))


def _is_known(part: object) -> bool:
    return type(part).__module__.partition(".")[0] in ("torch", "lightning", "lightning_comm", "builtins")
