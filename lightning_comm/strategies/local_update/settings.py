"""Settings of a run under local updates, and the record of each of its rounds."""

from dataclasses import dataclass
from typing import Literal

from lightning_comm.core.local_update.periods import PeriodRule
from lightning_comm.transport.averaging import Averaging


@dataclass(frozen=True)
class Settings:
    """What the user chose; see :class:`LocalUpdateStrategy`."""

    period: PeriodRule
    gradient_steps: int | float
    warmup_steps: int | Literal["auto"]
    optimizer_state: Literal["local", "average"]
    buffers: Literal["average", "keep"]
    evaluate_weights: Literal["average", "local"]
    averaging: Averaging
    counted_optimizer: int

    @property
    def starts_with_gradients(self) -> bool:
        """Whether DDP averages gradients at first."""
        return self.gradient_steps > 0


@dataclass(frozen=True)
class Round:
    """One synchronisation, as it was.

    Args:
        index: Its number, from 1.
        step: Optimizer steps done; the axis of the loggers, batches that stepped from 0, is another one.
        period_steps: Length of the round that it ended.
        lr: Learning rate at the first step of that round, on rank 0.
        drift: How far this rank was from the mean, as a share of the norm of the mean.
        wait_s: Seconds until all ranks had arrived, from when this rank's device had done the steps of the round.
        transfer_s: Seconds of the averages, on the device; of one in the background, the seconds that training waited.

    """

    index: int
    step: int
    period_steps: int
    lr: float
    drift: float
    wait_s: float
    transfer_s: float
