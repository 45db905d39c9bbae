"""One ``fit`` under local updates: counts steps, synchronises, and keeps what there is to keep.

`LocalUpdateStrategy` is the shell that Lightning calls; the companion callback and the strategy's hooks call this. What
a checkpoint keeps of it is in `run_state`. Longer than other files, since counting, meeting, averaging and stopping
share one state, and their order is what must be read in one place.

Order of messages, on every rank alike. When a round opens: one *control* row from each rank (a few numbers), of which
rank 0's says how long the round is. Then optimizer steps without any message. When the round is over: one control row
from each rank, which checks that all are at the same step and carries the length of the next round; then the averages
of the parameters, of the buffers, of weight averages and of the optimizer state, as far as they are asked for. Under
`Averaging(compression=...)` ranks stay apart by what it drops; only where the run ends are they averaged in full. Under
`Averaging(overlap_steps=...)` the parameters depart there, last of all, on a process group of their own, and land some
steps later; an evaluation or a checkpoint in between waits for them before it sends anything, and lets them fly on.
Where averages are weighted by samples, counts are known from those rows, and an average outside of a meeting, as for a
checkpoint, has one of its own before it.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import PeriodRule
from lightning_comm.errors import refuse
from lightning_comm.lightning_internals import weight_average_of
from lightning_comm.ondevice.device_clock import DeviceClock, Moment
from lightning_comm.ondevice.flat import Drift
from lightning_comm.ondevice.optimizer.state import optimizer_tensors, saved_tensors
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.common import rank_status as control
from lightning_comm.strategies.common.loss_scale import loss_scale_on, take_smallest_scale
from lightning_comm.strategies.common.rank_status import ControlRow
from lightning_comm.strategies.common.run_length import may_differ
from lightning_comm.strategies.local_update.overlap import BackgroundAverage
from lightning_comm.strategies.local_update.round_log import RoundLog
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.strategies.sparse_mask.pruned_weights import PrunedWeights
from lightning_comm.transport.backends import unsent_problems
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.model_average import Replica
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement, Decision, Kind, PeerFailure, Position


class LocalUpdateRun:
    """The state of one ``fit`` under local updates.

    Args:
        trainer: The Trainer.
        module: The model.
        optimizers: Returns the optimizers of the strategy.
        settings: What the user chose.
        recorder: Sends and records.
        agreement: How single ranks ask for a stop.
        ends: Compares where ranks end their epochs.
        leave_gradient_phase: Takes the DDP wrapper off the model.
        background: Sends and records what travels while training goes on.

    """

    def __init__(  # noqa: PLR0913  (each is made by the strategy)
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizers: Callable[[], list[Optimizer]],
        settings: Settings,
        recorder: Recorder,
        agreement: Agreement,
        ends: EpochEnds,
        leave_gradient_phase: Callable[[], None],
        background: Recorder | None = None,
    ) -> None:
        self.trainer = trainer
        self.settings = settings
        self.recorder = recorder
        self.agreement = agreement
        self.ends = ends
        self.clock = RoundClock(settings.period, None, settings.warmup_steps)
        self.log = RoundLog(trainer, recorder.ledger)
        self.replica = Replica(
            module, recorder, settings.averaging, settings.buffers, self._weight_averages, background
        )
        self._control_device = module.device
        self.device_clock = DeviceClock(module.device)
        self.background = BackgroundAverage(
            self.replica, self.log, agreement, settings.averaging.overlap_steps, self.device_clock
        )
        codec, method = self.replica.codec, settings.averaging.method
        self.pruned: PrunedWeights | None = None
        if isinstance(codec, SparseMaskCodec) and isinstance(method, SparseMask):
            self.pruned = PrunedWeights(module, codec, method, recorder)
            # its thread reads the masks bucket by bucket, and a rank whose thread is late would read the new ones
            self.pruned.before_change = self.background.wait
        self._background_recorder = background
        self.samples = SampleWeights()  # equal ones, unless a callback has asked the strategy for others
        self.began_at = 0  # what the clock showed when the run began; a second fit of a Trainer goes on counting
        self.gradient_steps = 0  # until when gradients are averaged
        self.rounds_done = 0  # since this run was started or resumed
        self.apart = False  # whether ranks may differ: not from an average in full until the next batch
        self.standing = False  # whether ranks stopped at different steps
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.module = module
        self.failed = False  # whether a rank has failed, so that ranks cannot be brought together any more
        self.random_state: dict[str, Any] | None = None  # as training left it, once something else has begun
        self.optimizers = optimizers
        self._leave_gradient_phase = leave_gradient_phase
        self.active = False  # not in a trial run, such as that of a learning-rate finder
        self._ticks = 0
        self.round_lr = self._step_time_s = 0.0
        self._step_began = self.device_clock.mark()
        self._steps: deque[tuple[Moment, Moment, int]] = deque()  # that the device may not have done yet
        self._warned_about_lr = False

    # ---- counting ------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self.clock.steps_done

    def request(self, kind: Kind, reason: str) -> None:
        """Ask for something that all ranks are to do at the same step."""
        self.agreement.request(kind, reason)

    @property
    def in_gradient_phase(self) -> bool:
        """Whether DDP still averages gradients at every step."""
        return self.clock.steps_done < self.gradient_steps

    def begin_batch(self, number: int) -> None:
        """Open a round if none is open; called before every batch, with its number in the epoch."""
        self.ends.begin_batch(self.trainer.current_epoch, number)
        self.leave_checkpoint()  # still there where a user's hook made a checkpoint's content and saved none
        if self.in_gradient_phase:
            return
        if not self.clock.in_round:
            self._open_round()
        self.apart = True

    def count_step(self, optimizer: Optimizer) -> None:
        """Count an optimizer step, also one that a gradient scaler skipped on this rank alone."""
        counted = self.optimizers()[self.settings.counted_optimizer] if self.active else None
        if optimizer is counted or optimizer is getattr(counted, "_optimizer", None):
            self._ticks += 1

    def end_batch(self) -> None:
        """Synchronise if the round is over, and carry out what ranks agreed on; called after every batch."""
        self._end_step()
        self.log.end_batch()

    def _end_step(self) -> None:
        self.leave_checkpoint()
        ticks, self._ticks = self._ticks, 0
        self.samples.end_batch(in_round=not self.in_gradient_phase)
        if self.trainer.is_last_batch:
            self._note_end(ticks)  # before messages of this step, which a rank without it will not answer
        if ticks == 0:
            return
        self._measure_step(ticks)
        was_in_gradient_phase = self.in_gradient_phase
        over = [self.clock.tick() for _ in range(ticks)][-1]
        self.recorder.step = self.clock.steps_done
        if was_in_gradient_phase:
            self._note_gradients(ticks)
            if not self.in_gradient_phase:
                self.compare_places("the end of averaged gradients")  # a rank that is behind would still average them
                self._leave_gradient_phase()
        elif over:
            self.synchronise()
        else:
            self.background.go_on(self.clock.steps_done)
            self.keep_pruned_at_zero()
        decision = self.agreement.poll(self._position(), force=self.standing)
        if decision is not None and (decision.at_step is None or self.clock.steps_done >= decision.at_step):
            self._carry_out(decision)
        self._step_began = self.device_clock.mark()

    def end_epoch(self) -> None:
        """Wait until all ranks have ended the epoch alike, where that is not sure before; may be called twice."""
        if not self.ends.needed:
            return
        self._note_end(self._ticks)
        with self.agreement.first_error_shown():
            self.ends.wait(self._answer)
        self.agreement.move_on()
        decision = self.agreement.decision
        if decision is not None and (decision.at_step is None or self.clock.steps_done >= decision.at_step):
            self._carry_out(decision)

    def compare_places(self, purpose: str) -> None:
        """Compare where ranks are, before they meet in messages that do not tell; only where they may come apart."""
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.interrupted
        if self.active and trains and not self.standing:
            with self.agreement.first_error_shown():
                self.ends.meet(purpose, self.clock.steps_done, self._hear)

    def _hear(self) -> bool:
        self.agreement.listen()
        return False

    def _note_end(self, ticks: int) -> None:
        if not self.standing:  # ranks that stop where they stand have agreed to
            self.ends.end_epoch(self.trainer.current_epoch, self.clock.steps_done + ticks)

    def _answer(self) -> bool:
        """Answer requests while this rank waits, and hear of failures; return whether ranks stop where they stand."""
        decision = self.agreement.poll_while_blocked(self._position())
        return decision is not None and decision.at_step is None

    # ---- synchronising -------------------------------------------------------------------------------------------

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches in an epoch; infinity where it is not known."""
        row = ControlRow(
            batches=batches if math.isfinite(batches) else -1,
            steps_done=self.trainer.global_step,
            urgent=may_differ(self.trainer),
        )
        with self.agreement.first_error_shown():
            rows = control.exchange(row, self.recorder, self._control_device, Pending.wait)
            control.check_same_batches(rows, "LocalUpdateStrategy")
        self.ends.needed = any(row.urgent for row in rows)
        if not self.active:  # in the middle of a run, data has been loaded again
            self.began_at = self.clock.steps_done = int(rows[0].steps_done)  # with several optimizers ranks may differ

    def set_period(self, rule: PeriodRule, total_steps: int | None) -> None:
        """Begin to count, with a rule whose coefficient is known and the length of the run, if that is."""
        self.settings = replace(self.settings, period=rule)
        self.clock.rule, self.clock.total_steps = rule, total_steps
        if isinstance(self.settings.warmup_steps, int):
            self.clock.warmup_steps = self.began_at + self.settings.warmup_steps
        self.active = True

    def synchronise(self, *, answering: bool = True, in_full: bool = False) -> None:
        """Average what is to be averaged, and begin the next round.

        Args:
            answering: Whether requests may be agreed on here; only at the end of a step.
            in_full: Whether ranks must be equal afterwards, so that nothing is compressed.

        """
        self.background.wait()
        started = self.device_clock.mark()  # when the device has done the steps of the round
        with self.agreement.first_error_shown():
            rows = self._meet(decide=not self.trainer.is_last_batch, answering=answering)
            met = self.device_clock.mark()
            if any(row.stands for row in rows):
                self.stand()
                return
            self._check(rows)
            weight = self.samples.weight_of(self.recorder.rank, rows)
            moderate = control.moderate(rows)
            if self.settings.averaging.overlap_steps and not in_full and not self._run_is_over():
                self._depart(self.device_clock.seconds(started, met), weight, moderate)
            else:
                drift, averaged = self._average(weight, moderate, in_full=in_full or self._run_is_over())
                self._note(drift, started, met, averaged)
        scales = [row.loss_scale for row in rows]
        take_smallest_scale(self.trainer.precision_plugin, scales, scales[self.recorder.rank])
        self._end_round(weight)
        if rows[0].next_steps != control.UNDECIDED:
            self._begin(rows)
        if answering and any(row.urgent for row in rows):
            self.agreement.poll(self._position(), force=True)

    def enter_average(self, purpose: str) -> None:
        """Put averaged weights in place for an evaluation, after checking that all ranks are here for it."""
        self.leave_checkpoint()
        if not self.apart:
            return
        with self.agreement.first_error_shown():
            rows = self._meet()
            if self.standing:
                self.replica.agree_on_moved()
            else:
                self._check(rows)
            weight = self.samples.weight_of(self.recorder.rank, rows)
            self.replica.enter_average(purpose, weight, control.moderate(rows))

    def meet_at_epoch_end(self) -> None:
        """Check that all ranks end the epoch after the same steps, where its length could not be compared before."""
        if not self.in_gradient_phase:
            self._check(self._meet(averages=False))

    def finish(self) -> None:
        """End the run averaged, also where its length was not known."""
        self.leave_checkpoint()
        self.compare_places("the end of the run")
        if not self.in_gradient_phase and self.apart:
            self.background.wait()
            started = self.device_clock.mark()
            with self.agreement.first_error_shown():
                weight = self._weight()
                drift, averaged = self._average(weight, frozenset(), in_full=True)
            self._note(drift, started, started, averaged)
            self._end_round(weight)
        self.log.end_run()

    def keep_pruned_at_zero(self) -> None:
        """Set pruned weights to zero: after an optimizer step, or where an average of before the pruning has landed."""
        if self.pruned is not None:
            self.pruned.keep_at_zero()

    def stand(self) -> None:
        """Leave the round open: ranks stop at different steps and only their copies are averaged."""
        self.standing = self.apart = True
        self.ends.count_anew()

    def _end_round(self, weight: float | None) -> None:
        self.clock.end_round()
        self.samples.begin_round(weight)
        self.rounds_done += 1

    def _average(self, weight: float | None, moderate: Set[str], *, in_full: bool) -> tuple[Drift, Moment]:
        """Average; return how far this rank was from the mean, and when its device has done it."""
        self.background.land()
        self.keep_pruned_at_zero()
        compressed = self.replica.compresses and not in_full
        replica = self.replica
        drift = replica.average_differences(weight, moderate) if compressed else replica.average(None, weight, moderate)
        replica.average_momenta(self._momenta(), weight, moderate="optimizer_state" in moderate)
        self.apart, self.standing = compressed, False
        averaged = self.device_clock.mark()
        return drift.read(), averaged  # which is where the host waits for a device

    def _depart(self, wait_s: float, weight: float | None, moderate: Set[str]) -> None:
        clock = self.clock
        if self._background_recorder is not None:
            self._background_recorder.step = clock.steps_done
        self.background.depart(
            step=clock.steps_done,
            period_steps=clock.steps_into_round,
            lr=self.round_lr,
            wait_s=wait_s,
            weight=weight,
            moderate=moderate,
        )
        self.apart, self.standing = True, False

    def _note(self, drift: Drift, started: Moment, met: Moment, averaged: Moment) -> None:
        clock, seconds = self.clock, self.device_clock.seconds
        self.log.add(
            step=clock.steps_done,
            period_steps=clock.steps_into_round,
            lr=self.round_lr,
            wait_s=seconds(started, met),
            transfer_s=seconds(met, averaged),
            drift=drift,
        )

    # ---- meeting ---------------------------------------------------------------------------------------------------

    def _open_round(self) -> None:
        if self.clock.round_started_at < self.clock.round_ends_at:
            self.synchronise(answering=False)  # resumed at the end of a round, in front of its synchronisation
            if self.clock.in_round:
                return
        if self.clock.total_steps is not None and self.clock.steps_done >= self.clock.total_steps:
            self.clock.total_steps = None  # the run goes on beyond its estimate; its end is averaged by `finish`
        rows = self._meet(decide=True, averages=False)
        self._check(rows)
        self._begin(rows)

    def _begin(self, rows: list[ControlRow]) -> None:
        self.round_lr = rows[0].lr
        self.clock.begin(int(rows[0].next_steps), lr=self.round_lr)
        self.background.begin_round(self.clock.steps_done, int(rows[0].next_steps))
        if self.pruned is not None:
            self.pruned.before_step(self.clock.steps_done)  # where all ranks have just met
        self.keep_pruned_at_zero()
        self.replica.begin_round(equal=not self.apart)

    def _meet(
        self, *, decide: bool = False, stand: bool = False, answering: bool = False, averages: bool = True
    ) -> list[ControlRow]:
        """Exchange one control row a rank; return all of them.

        Args:
            decide: Whether rank 0 chooses the length of the next round.
            stand: Whether to say that ranks stop where they stand.
            answering: Whether this rank agrees to requests while it waits. Only at the end of a step, where it can
                still carry them out at that step.
            averages: Whether an average may follow, for which tensors are looked at: what is averaged is read once.

        """
        self.background.wait()  # on CUDA, two groups that send at once may wait for each other
        self.agreement.post()  # before the rows, so that others find the request right after them
        error, steps = None, control.UNDECIDED
        if decide and self.recorder.rank == 0 and not self._run_is_over():
            try:
                steps = self.clock.decide(self.lr())
            except ValueError as caught:
                error, steps = caught, control.FAILED
        row = ControlRow(
            next_steps=steps,
            lr=self.lr(),
            steps_done=self.clock.steps_done,
            layout=self.replica.layout(self._momenta()),
            urgent=self.agreement.urgent,
            stands=stand,
            samples=self.samples.sent,
        )
        wait = self._wait_answering if answering else self._wait
        device = self._control_device
        scale = loss_scale_on(self.trainer.precision_plugin, device)
        found = self.replica.look(self._momenta()) if averages else control.NOT_LOOKED
        rows = control.exchange(row, self.recorder, device, wait, loss_scale=scale, found=found)
        if error is not None:
            raise error
        if rows[0].next_steps == control.FAILED:
            raise PeerFailure("rank 0 could not choose the next period; its own message says why")
        return rows

    def before_other_messages(self) -> None:
        """Let nothing be on its way in the background, where that may hold up what others send in mid-round.

        On CUDA, two groups that send at once may wait for each other. On a CPU they do not, and both go on.
        """
        if self._control_device.type != "cpu":
            self.background.wait()

    def _weight(self) -> float | None:
        """Return what this rank counts for in an average now; where counts matter, ranks exchange them here."""
        self.background.wait()
        self.replica.agree_on_moved()
        return self.samples.exchange(self.recorder, self._control_device, self._wait)

    def _wait(self, pending: Pending) -> None:
        """Wait for the slower ranks, and meanwhile hear of failures."""
        while not pending.done():
            self.agreement.listen()
            time.sleep(0.0002)
        pending.wait()

    def _wait_answering(self, pending: Pending) -> None:
        """Wait for the slower ranks, and meanwhile answer requests and hear of failures."""
        while not pending.done():
            self.agreement.poll_while_blocked(self._position())
            time.sleep(0.0002)
        pending.wait()
        self.agreement.move_on()

    def _check(self, rows: list[ControlRow]) -> None:
        control.check_same_work(rows)
        self.replica.agree_on_moved(any_moved="moved" in control.seen(rows))
        self._warned_about_lr = self._warned_about_lr or control.warn_of_different_rates(rows)

    # ---- stopping ------------------------------------------------------------------------------------------------

    def _carry_out(self, decision: Decision) -> None:
        if decision.at_step is None:
            if not self.standing:
                self._meet(stand=True)
                self.stand()
        elif decision.kind not in ("checkpoint", "validate") and self.apart and not self.in_gradient_phase:
            self.synchronise(in_full=True)
        self.agreement.settled()
        self.on_decision(decision)

    def _position(self) -> Position:
        return Position(self.clock.steps_done, self.trainer.current_epoch, self._step_time_s)

    def _measure_step(self, ticks: int) -> None:
        self._steps.append((self._step_began, self.device_clock.mark(), ticks))
        while self._steps and self.device_clock.has_passed(self._steps[0][1]):
            began, ended, ticks = self._steps.popleft()
            latest = self.device_clock.seconds(began, ended) / ticks
            if self._step_time_s > 0:  # a single slow step may be a pause of another rank's
                latest = 0.8 * self._step_time_s + 0.2 * min(latest, 4 * self._step_time_s)
            self._step_time_s = latest

    def lr(self) -> float:
        """Return the largest learning rate over the groups of the counted optimizer."""
        return max(float(group["lr"]) for group in self.optimizers()[self.settings.counted_optimizer].param_groups)

    def _run_is_over(self) -> bool:
        return self.clock.total_steps is not None and self.clock.steps_done >= self.clock.total_steps

    def _momenta(self) -> list[Tensor]:
        if self.settings.optimizer_state != "average":
            return []
        tensors = optimizer_tensors(self.optimizers())
        way_out = "keep optimizer states 'local', or where the parameters are"
        refuse("LocalUpdateStrategy", unsent_problems((("optimizer state", each) for each in tensors), way_out))
        return tensors

    def _weight_averages(self) -> dict[str, torch.nn.Module]:
        models = [weight_average_of(callback) for callback in getattr(self.trainer, "callbacks", [])]
        return {str(k): model for k, model in enumerate(model for model in models if model is not None)}

    def _note_gradients(self, ticks: int) -> None:
        """Record what DDP sends in the gradient phase: the gradients and, before each forward, the buffers."""
        gradients = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        buffers = sum(b.numel() * b.element_size() for b in self.module.buffers())
        for _ in range(ticks):
            self.recorder.note("all_reduce", "gradients", gradients)
            if buffers:
                self.recorder.note("broadcast", "buffers", buffers)

    # ---- what is shown and saved ---------------------------------------------------------------------------------

    def enter_checkpoint(self) -> None:
        """Put averaged weights in place for a checkpoint, unless they are there anyway."""
        self.compare_places("a checkpoint")
        if not self.apart or self.replica.average_is_for is not None:
            return
        with self.agreement.first_error_shown():
            # only what rank 0 holds is saved
            self.replica.enter_average("checkpoint", self._weight(), broadcast=False)

    def average_optimizer_states(self, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return averaged copies of the optimizers' states, if these are averaged and the weights are now.

        Note:
            *Memory.* A second copy of the states.

        """
        if self.settings.optimizer_state != "average" or not self.apart or self.replica.average_is_for is None:
            return states
        copies = apply_to_collection(states, Tensor, lambda tensor: tensor.detach().clone())
        alike = self.replica.average_copies(saved_tensors(copies))
        return copies if alike else states

    def keep_random_state(self) -> None:
        """Note the generators as training has left them, for a checkpoint that is saved after an evaluation."""
        self.random_state = self.random_state or random_state()

    def leave_checkpoint(self) -> None:
        """Put each rank's own weights back, if an average is in place for a checkpoint."""
        if self.replica.average_is_for == "checkpoint":
            self.replica.leave_average()
