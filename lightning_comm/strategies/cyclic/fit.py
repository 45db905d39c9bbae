"""One ``fit`` under Cyclic Data Parallelism as all of its parts see it: whom they ask, and how far it is."""

from dataclasses import dataclass, field

from lightning.pytorch import LightningModule, Trainer

from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.cyclic.settings import CyclicSettings
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement


@dataclass
class Progress:
    """How far a run is, in optimizer steps of this Trainer, whose count goes on over several fits.

    Args:
        active: Whether it is under way: not before its start, nor in a trial of a learning-rate finder.
        steps_done: Optimizer steps done.
        began_at: Those that were done when this ``fit`` began.
        run_began_at: Those when the run began, with this ``fit`` or with the one that it resumes.
        flushed_at: Those when all ranks last had the newest version of everything.

    """

    active: bool = False
    steps_done: int = 0
    began_at: int = 0
    run_began_at: int = 0
    flushed_at: int = 0


@dataclass(frozen=True)
class Fit:
    """What all parts of one ``fit`` share.

    Args:
        trainer: The Trainer.
        module: The model.
        settings: What the user chose.
        agreement: Tells of failures.
        recorder: Sends and records what all ranks meet for.
        progress: How far it is.

    """

    trainer: Trainer
    module: LightningModule
    settings: CyclicSettings
    agreement: Agreement
    recorder: Recorder
    progress: Progress = field(default_factory=Progress)

    def meet(self) -> None:
        """Wait for all ranks, where the same notes have brought them to the same place."""
        with self.agreement.first_error_shown():
            rank_status.exchange(RankStatus(), self.recorder, self.module.device, Pending.wait)

    def listen(self) -> bool:
        """Raise what was heard of the failure of another rank; for waits, which go on while this is false."""
        self.agreement.listen()
        return False
