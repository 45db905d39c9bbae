"""One ``fit`` under Cyclic Data Parallelism, as all of its parts see it: shared objects, and its progress."""

from dataclasses import dataclass, field

from lightning.pytorch import LightningModule, Trainer

from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.cyclic.settings import CyclicSettings
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement


@dataclass
class FitProgress:
    """The progress of a run, in optimizer steps of this Trainer, which counts on over several fits.

    Args:
        active: Whether it is under way: not before its start, nor in a trial of a learning-rate finder.
        steps_done: Optimizer steps done.
        began_at: The count when this ``fit`` began.
        run_began_at: The count when the run began, with this ``fit`` or with the one that it resumes.
        flushed_at: The count when all ranks last had the newest version of every stage.

    """

    active: bool = False
    steps_done: int = 0
    began_at: int = 0
    run_began_at: int = 0
    flushed_at: int = 0


@dataclass(frozen=True)
class Fit:
    """The objects that all parts of one ``fit`` share.

    Args:
        trainer: The Trainer.
        module: The model.
        settings: What the user chose.
        agreement: Reports failures of other ranks.
        recorder: Sends and records messages in which all ranks meet.
        progress: How far it is.

    """

    trainer: Trainer
    module: LightningModule
    settings: CyclicSettings
    agreement: Agreement
    recorder: Recorder
    progress: FitProgress = field(default_factory=FitProgress)

    def meet(self) -> None:
        """Wait for all ranks, which have come to the same place by the same summed status."""
        with self.agreement.first_error_shown():
            rank_status.exchange(RankStatus(), self.recorder, self.module.device, Pending.wait)

    def poll_failures(self) -> bool:
        """Raise an error if another rank has failed; return False, so that a wait goes on."""
        self.agreement.poll_failures()
        return False
