"""The engine of rounds: opens them, ends them when they are over, and averages what ranks have trained apart.

Knows neither Lightning, nor DDP, nor the default process group. It is given what to average (`ModelAverage`), over
which ranks (`Members`, which change only between two rounds, and not while an average is in flight), the weight of each
(`SampleWeights`) and the training loop (`Training`).

Order of messages, on every rank alike:

1. When a round opens, the rank status of each rank; that of rank 0 has the length of the round.
2. Optimizer steps without any message.
3. When the round is over, the rank status again: it checks that all are at the same step, and has the length of the
   next round.
4. The averages of parameters, buffers, weight averages and optimizer state, as far as they are averaged.

Under `Averaging(compression=...)` ranks still differ afterwards by what was dropped; only at the end of the run are
they averaged in full. Under `Averaging(overlap_steps=...)` the average of the parameters is sent last, on a process
group of its own, and applied some steps later; an evaluation or a checkpoint in between waits for it before it sends
anything, and does not apply it. Where averages are weighted by samples, the rank status has the counts; an average
outside of a meeting, as for a checkpoint, is preceded by a message for them.
"""

from collections.abc import Callable, Set
from functools import partial
from typing import Protocol

from lightning_comm.ondevice.device_clock import DeviceEvent
from lightning_comm.ondevice.flat import Drift
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.local_update.meeting import Meeting, Parts
from lightning_comm.transport.overlapped_average import EndedRound


class Pruned(Protocol):
    """Pruned weights: kept at zero, and pruned further where all ranks meet."""

    def before_step(self, step: int) -> None:
        """Prune what is due before an optimizer step."""

    def keep_at_zero(self) -> None:
        """Set pruned weights to zero."""


class Rounds:
    """The rounds of one run.

    Args:
        parts: The parts of the run.
        meeting: Where ranks meet.
        ended: Called with each round whose average is done, and how far this rank was from it.
        overlaps: Whether averages travel while the next round trains.

    Attributes:
        done: How often ranks have synchronised since the run was started or resumed.
        apart: Whether ranks may differ; they do not between an average in full and the next batch.
        stopped_apart: Whether ranks have stopped at different steps.
        lr: The learning rate at the first step of the round.
        pruned: Keeps pruned weights at zero; ``None`` where nothing is pruned.

    """

    def __init__(
        self, parts: Parts, meeting: Meeting, ended: Callable[[EndedRound, Drift], None], *, overlaps: bool
    ) -> None:
        self.clock = parts.clock
        self._meeting = meeting
        self._members = parts.recorder.members
        self._training = parts.training
        self._model = parts.model
        self._overlapped = parts.overlapped
        self._samples = parts.samples
        self._agreement = parts.agreement
        self._ends = parts.ends
        self._device_clock = parts.device_clock
        self._ended = ended
        self._overlaps = overlaps
        self.pruned: Pruned | None = None
        self.done = 0
        self.apart = self.stopped_apart = False
        self.lr = 0.0

    def open(self) -> None:
        """Open a round if none is open; called before every batch."""
        if not self.clock.in_round:
            self._open()
        self._members.begin_round()
        self.apart = True

    def _open(self) -> None:
        if self.clock.round_started_at < self.clock.round_ends_at:
            self.synchronise(answering=False)  # resumed at the end of a round, before its synchronisation
            if self.clock.in_round:
                return
        if self._run_is_over():
            self.clock.total_steps = None  # the run goes on beyond its estimate; its end is averaged by `finish`
        rows = self._meeting.meet(decide=True, averages=False)
        self._meeting.check(rows)
        self._begin(rows)

    def go_on(self) -> None:
        """Go on within a round after an optimizer step: apply an average in flight if it is due."""
        self._overlapped.land_if_due(self.clock.steps_done)
        self.keep_pruned_at_zero()

    def synchronise(self, *, answering: bool = True, in_full: bool = False) -> None:
        """Average what is to be averaged, and begin the next round.

        Args:
            answering: Whether requests may be agreed on here; only at the end of a step.
            in_full: Whether ranks must be equal afterwards, so that nothing is compressed.

        """
        self._overlapped.wait()
        started = self._device_clock.mark()  # when the device has done the steps of the round
        in_full = in_full or self._run_is_over()
        with self._agreement.first_error_shown():
            decide = self._training.goes_on and not self._run_is_over()
            rows = self._meeting.meet(decide=decide, answering=answering)
            met = self._device_clock.mark()
            if any(row.stops_apart for row in rows):
                self.stop_apart()
                return
            self._meeting.check(rows)
            weight = self._meeting.weight(rows)
            moderate = rank_status.moderate(rows)
            if self._overlaps and not in_full:
                self._depart(self._device_clock.seconds(started, met), weight, moderate)
            else:
                drift, averaged = self._average(weight, moderate, in_full=in_full)
                self._note(drift, started, met, averaged)
        scales = [row.loss_scale for row in rows]
        self._training.take_loss_scale(scales, scales[self._members.rank])
        self._end(weight)
        if rows[0].next_steps != rank_status.UNDECIDED:
            self._begin(rows)
        if answering and any(row.urgent for row in rows):
            self._agreement.poll(self._training.position, force=True)

    def finish(self) -> None:
        """End the run averaged, also where its length was not known."""
        self._overlapped.wait()
        started = self._device_clock.mark()
        with self._agreement.first_error_shown():
            weight = self._meeting.exchange_weight()
            drift, averaged = self._average(weight, frozenset(), in_full=True)
        self._note(drift, started, started, averaged)
        self._end(weight)

    def stop_apart(self) -> None:
        """Leave the round open: ranks stop at different steps, and only copies of their weights are averaged."""
        self.stopped_apart = self.apart = True
        self._ends.count_anew()

    def keep_pruned_at_zero(self) -> None:
        """Set pruned weights to zero: after an optimizer step, or after applying an average sent before the pruning."""
        if self.pruned is not None:
            self.pruned.keep_at_zero()

    def _begin(self, rows: list[RankStatus]) -> None:
        self.lr = rows[0].lr
        self.clock.begin(int(rows[0].next_steps), lr=self.lr)
        self._overlapped.begin_round(self.clock.steps_done, int(rows[0].next_steps))
        if self.pruned is not None:
            self.pruned.before_step(self.clock.steps_done)  # here, where all ranks have just met
        self.keep_pruned_at_zero()
        self._model.begin_round(equal=not self.apart)

    def _end(self, weight: float | None) -> None:
        self.clock.end_round()
        self._members.end_round()
        self._samples.begin_round(weight)
        self.done += 1

    def _average(self, weight: float | None, moderate: Set[str], *, in_full: bool) -> tuple[Drift, DeviceEvent]:
        """Average; return how far this rank was from the mean, and the moment when its device is done."""
        self._overlapped.land()
        self.keep_pruned_at_zero()
        drift = self._model.average(weight, moderate, in_full=in_full)
        state = self._training.averaged_state()
        self._model.average_optimizer_state(state, weight, moderate="optimizer_state" in moderate)
        self.apart, self.stopped_apart = self._model.compresses and not in_full, False
        averaged = self._device_clock.mark()
        return drift.read(), averaged  # here the host waits for a device

    def _depart(self, wait_s: float, weight: float | None, moderate: Set[str]) -> None:
        ended = EndedRound(self.clock.steps_done, self.clock.steps_into_round, self.lr, wait_s)
        self._overlapped.depart(partial(self._model.depart, weight, moderate), ended)
        self.apart, self.stopped_apart = True, False

    def _note(self, drift: Drift, started: DeviceEvent, met: DeviceEvent, averaged: DeviceEvent) -> None:
        clock, seconds = self.clock, self._device_clock.seconds
        self._ended(
            EndedRound(
                step=clock.steps_done,
                period_steps=clock.steps_into_round,
                lr=self.lr,
                wait_s=seconds(started, met),
                transfer_s=seconds(met, averaged),
            ),
            drift,
        )

    def _run_is_over(self) -> bool:
        return self.clock.total_steps is not None and self.clock.steps_done >= self.clock.total_steps
