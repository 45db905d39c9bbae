"""Meetings of ranks: the exchange of rank status, what follows from it, and how a rank waits for the others.

Knows neither Lightning nor DDP: what it needs of the training loop is in :class:`Training`.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.overlapped_average import OverlappedAverage
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement, Kind, PeerFailure, RankPosition

_LOOK_S = 0.0002  # how often a waiting rank looks whether the others have arrived


class Training(Protocol):
    """The training loop, as rounds see it."""

    @property
    def goes_on(self) -> bool:
        """Whether the epoch has further batches."""
        ...

    @property
    def position(self) -> RankPosition:
        """Where this rank is."""
        ...

    def learning_rate(self) -> float:
        """Return the learning rate by which the length of a round is chosen."""
        ...

    def averaged_state(self) -> list[Tensor]:
        """Return the state of optimizers that is averaged with the model; none where it is local."""
        ...

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Return the loss scale as a number on a device, for which the host does not wait; ``None`` without one."""
        ...

    def take_loss_scale(self, scales: list[float], own: float) -> None:
        """Take the smallest loss scale of the ranks."""

    def warn(self, message: str) -> None:
        """Tell the user, once for all ranks."""


@dataclass(frozen=True)
class Parts:
    """The parts of which the rounds of a run are made.

    Args:
        training: The training loop.
        clock: Counts steps and knows when a round is over.
        model: Averages the model.
        overlapped: The average in the background.
        samples: The weight of this rank.
        recorder: Sends and records, to the members of the rounds.
        agreement: The agreement of ranks on stops.
        ends: Compares where ranks end their epochs.
        device_clock: Takes times.
        device: Where the backend wants its messages.

    """

    training: Training
    clock: RoundClock
    model: ModelAverage
    overlapped: OverlappedAverage
    samples: SampleWeights
    recorder: Recorder
    agreement: Agreement
    ends: EpochEnds
    device_clock: DeviceClock
    device: torch.device


class Meeting:
    """The exchange in which all ranks of a round meet.

    Args:
        parts: Those of the run.

    Note:
        *Communication.* The rank status of each rank; that of rank 0 has the length of the next round.

    """

    def __init__(self, parts: Parts) -> None:
        self._clock = parts.clock
        self._training = parts.training
        self._model = parts.model
        self._overlapped = parts.overlapped
        self._samples = parts.samples
        self._recorder = parts.recorder
        self._agreement = parts.agreement
        self._device = parts.device
        self._warned_of_rates = False

    def meet(
        self, *, decide: bool = False, stops_apart: bool = False, answering: bool = False, averages: bool = True
    ) -> list[RankStatus]:
        """Exchange the rank status; return that of all ranks.

        Args:
            decide: Whether rank 0 chooses the length of the next round.
            stops_apart: Whether to announce that ranks stop at different steps, each where it is.
            answering: Whether this rank agrees to requests while it waits. Only at the end of a step, where it can
                still carry them out at that step.
            averages: Whether an average may follow; then the tensors to average are read once, to inspect them.

        """
        self._overlapped.wait()  # on CUDA, two groups that send at once may wait for each other
        self._agreement.post()  # before the rows, so that others find the request right after them
        error, steps = None, rank_status.UNDECIDED
        if decide and self._recorder.members.rank == 0:
            try:
                steps = self._clock.decide(self._training.learning_rate())
            except ValueError as caught:
                error, steps = caught, rank_status.FAILED
        row = RankStatus(
            next_steps=steps,
            lr=self._training.learning_rate(),
            steps_done=self._clock.steps_done,
            layout=self._model.tensors.layout(self._training.averaged_state()),
            urgent=self._agreement.urgent,
            stops_apart=stops_apart,
            samples=self._samples.sent,
        )
        wait = self._wait_answering if answering else self._wait
        scale = self._training.loss_scale(self._device)
        found = self._look() if averages else rank_status.NOT_LOOKED
        rows = rank_status.exchange(row, self._recorder, self._device, wait, loss_scale=scale, found=found)
        if error is not None:
            raise error
        if rows[0].next_steps == rank_status.FAILED:
            raise PeerFailure("rank 0 could not choose the next period; its own message says why")
        return rows

    def exchange(self, row: RankStatus) -> list[RankStatus]:
        """Exchange a rank status of other content, without answering requests meanwhile."""
        return rank_status.exchange(row, self._recorder, self._device, Pending.wait)

    def _look(self) -> dict[str, bool | Tensor]:
        overlapped = self._overlapped
        state = self._training.averaged_state()
        return self._model.tensors.look(state, overlapped.corrections, sending=overlapped.is_sending)

    def check(self, rows: list[RankStatus]) -> None:
        """Refuse ranks that would average different tensors, and agree on frozen parameters that have changed.

        Raises:
            RuntimeError: On every rank alike.

        """
        rank_status.check_same_work(rows)
        self._model.agree_on_moved(any_moved="moved" in rank_status.seen(rows))
        if not self._warned_of_rates and (warning := _different_rates(rows)) is not None:
            self._warned_of_rates = True
            self._training.warn(warning)

    def weight(self, rows: list[RankStatus]) -> float | None:
        """Return the weight of this rank in an average now; ``None`` if all weights are equal."""
        return self._samples.weight_of(self._recorder.members, rows)

    def exchange_weight(self) -> float | None:
        """Return the same where no meeting came before; if averages are weighted, ranks exchange their counts here."""
        self._overlapped.wait()
        self._model.agree_on_moved()
        return self._samples.exchange(self._recorder, self._device, self._wait)

    def answer(self, cannot: Collection[Kind] = ()) -> bool:
        """Answer requests while this rank waits, and learn of failures; return whether each rank stops where it is.

        Args:
            cannot: What this rank could not do where it waits, and so does not agree to.

        """
        decision = self._agreement.poll_while_blocked(self._training.position, cannot=cannot)
        return decision is not None and decision.at_step is None

    def poll_failures(self) -> bool:
        """Learn of failures while this rank waits; return False, since no request is answered."""
        self._agreement.poll_failures()
        return False

    def _wait(self, pending: Pending) -> None:
        """Wait for the slower ranks, and meanwhile learn of failures."""
        self._wait_for(pending, self.poll_failures)

    def _wait_answering(self, pending: Pending) -> None:
        """Wait for the slower ranks, and meanwhile answer requests and learn of failures."""
        self._wait_for(pending, self.answer)
        self._agreement.move_on()

    def _wait_for(self, pending: Pending, meanwhile: Callable[[], bool]) -> None:
        while not pending.done():
            meanwhile()
            time.sleep(_LOOK_S)
        pending.wait()


def _different_rates(rows: list[RankStatus]) -> str | None:
    """Return a warning if learning rates differ between ranks; ``None`` if they do not."""
    lrs = [row.lr for row in rows]
    if max(lrs) - min(lrs) <= 1e-9 * abs(max(lrs)):
        return None
    return (
        f"LocalUpdateStrategy: learning rates differ between ranks at step {int(rows[0].steps_done)}: {lrs} by "
        "rank. The period follows rank 0. Where a scheduler is stepped by hand with a metric, give it the mean: "
        "`scheduler.step(self.trainer.strategy.reduce(metric))`."
    )
