"""One ``fit`` under local updates, between `LocalUpdateStrategy`, the shell that Lightning calls, and the rounds.

The engine is in `rounds`, and knows no Lightning. Here are the batches and epochs that drive it, the phase in which DDP
still averages gradients, and the stops and saves on which ranks agree. The state for a checkpoint is in `run_state`.
Longer than other files, since all parts of a run are put together here.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_comm.contract import RoundInForce
from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import PeriodRule
from lightning_comm.lightning_internals import ends_training
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.ondevice.model_tensors import ModelTensors
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.common.run_length import may_differ
from lightning_comm.strategies.local_update.meeting import Meeting, Parts
from lightning_comm.strategies.local_update.mid_round import MidRoundAverage
from lightning_comm.strategies.local_update.round_log import RoundLog
from lightning_comm.strategies.local_update.rounds import Rounds
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.strategies.local_update.step_counter import StepCounter
from lightning_comm.strategies.local_update.training import LightningTraining
from lightning_comm.strategies.sparse_mask.pruned_weights import PrunedWeights
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.overlapped_average import OverlappedAverage
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import AFTER_A_BATCH, Agreement, Decision, Kind


class LocalUpdateRun:
    """The state of one ``fit`` under local updates.

    Args:
        trainer: The Trainer.
        module: The model.
        optimizers: Returns the optimizers of the strategy.
        settings: What the user chose.
        recorder: Sends and records, to the members of the rounds.
        agreement: The agreement of ranks on stops.
        ends: Compares where ranks end their epochs.
        leave_gradient_phase: Takes the DDP wrapper off the model.
        samples: The weight of this rank in averages.

    Attributes:
        rounds: The engine.
        model: Averages the model.
        overlapped: The average in the background.
        mid_round: Averaged weights for validations and checkpoints.
        pruned: The masks of a sparse model, if it is one.
        began_at: The step at which the run began, by the clock, which a second fit of a Trainer does not reset.
        gradient_steps: The step until which DDP averages gradients.
        active: Whether ranks train in these rounds; not in a trial run, such as that of a learning-rate finder.
        failed: Whether a rank has failed, so that ranks cannot meet any more.
        random_state: The state of the generators at the end of training, once something else has begun.

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
        samples: SampleWeights,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.optimizers = optimizers
        self.settings = settings
        self.recorder = recorder
        self.agreement = agreement
        self.ends = ends
        self.samples = samples
        self.clock = RoundClock(settings.period, None, settings.warmup_steps)
        self.log = RoundLog(trainer, recorder.ledger)
        device_clock = DeviceClock(module.device)
        self.steps = StepCounter(device_clock)
        self._training = LightningTraining(trainer, module, optimizers, settings, self.clock, self.steps)
        tensors = _tensors_of(module, settings, self._training)
        self.model = ModelAverage(tensors, recorder, settings.averaging)
        overlap_steps = settings.averaging.overlap_steps
        self.overlapped = OverlappedAverage(
            tensors.all_parameters, overlap_steps, agreement, device_clock, self.log.add, rank_zero_info
        )
        parts = Parts(
            self._training,
            self.clock,
            self.model,
            self.overlapped,
            samples,
            recorder,
            agreement,
            ends,
            device_clock,
            module.device,
        )
        self._meeting = Meeting(parts)
        self.rounds = Rounds(parts, self._meeting, self.log.add, overlaps=overlap_steps > 0)
        averages_state = settings.optimizer_state == "average"
        self.mid_round = MidRoundAverage(
            parts, self._meeting, self.rounds, self.compare_places, averages_state=averages_state
        )
        self.pruned = self.rounds.pruned = _pruned_weights(module, self.model, settings, recorder)
        if self.pruned is not None:
            # the background thread reads masks bucket by bucket: on a slow rank it would read the new ones otherwise
            self.pruned.before_change = self.overlapped.wait
        self.began_at = self.gradient_steps = 0
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.active = self.failed = False
        self.random_state: dict[str, Any] | None = None
        self._leave_gradient_phase = leave_gradient_phase

    # ---- for other parts ---------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self.clock.steps_done

    @property
    def in_gradient_phase(self) -> bool:
        """Whether DDP still averages gradients at every step."""
        return self.clock.steps_done < self.gradient_steps

    @property
    def round_in_force(self) -> RoundInForce:
        """The round that this rank is in."""
        clock = self.clock
        steps = clock.round_ends_at - clock.round_started_at if clock.in_round else 0
        return RoundInForce(steps, None if clock.total_steps is None else clock.total_steps - self.began_at)

    @property
    def gradient_phase_steps(self) -> int:
        """Optimizer steps at the start of the run at which gradients are averaged."""
        return self.gradient_steps - self.began_at

    def shorten_gradient_phase(self, steps: int) -> None:
        """Let rounds begin after this many steps, if not sooner: for trials of a few steps; on all ranks alike."""
        was_in_gradient_phase = self.in_gradient_phase
        self.gradient_steps = min(self.gradient_steps, self.began_at + steps)
        if was_in_gradient_phase and not self.in_gradient_phase:
            self._leave_gradient_phase()

    def request(self, kind: Kind, reason: str) -> None:
        """Request something that all ranks are to do at the same step."""
        self.agreement.request(kind, reason)

    def keep_random_state(self) -> None:
        """Keep the state of the generators at the end of training, for a checkpoint saved after an evaluation."""
        self.random_state = self.random_state or random_state()

    # ---- the start ---------------------------------------------------------------------------------------------------

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches in an epoch; infinity where it is not known."""
        row = RankStatus(
            batches=batches if math.isfinite(batches) else -1,
            steps_done=self.trainer.global_step,
            urgent=may_differ(self.trainer),
        )
        with self.agreement.first_error_shown():
            rows = self._meeting.exchange(row)
            rank_status.check_same_batches(rows, "LocalUpdateStrategy")
        self.ends.needed = any(row.urgent for row in rows)
        if not self.active:  # else data has been loaded again in the middle of a run
            self.began_at = self.clock.steps_done = int(rows[0].steps_done)  # with several optimizers ranks may differ

    def set_period(self, rule: PeriodRule, total_steps: int | None) -> None:
        """Begin to count, with a rule whose coefficient is known, and with the length of the run, if it is known."""
        self.settings = replace(self.settings, period=rule)
        self.clock.rule, self.clock.total_steps = rule, total_steps
        if isinstance(self.settings.warmup_steps, int):
            self.clock.warmup_steps = self.began_at + self.settings.warmup_steps
        self.active = True

    # ---- batches and epochs ------------------------------------------------------------------------------------------

    def begin_batch(self, number: int) -> None:
        """Open a round if none is open; called before every batch, with its number in the epoch."""
        self.ends.begin_batch(self.trainer.current_epoch, number)
        self.mid_round.leave_checkpoint()  # in place still where a hook made a checkpoint and did not save it
        if not self.in_gradient_phase:
            self.rounds.open()

    def count_step(self, optimizer: Optimizer) -> None:
        """Count an optimizer step, also one that a gradient scaler skipped on this rank alone."""
        if self.active and self._training.is_counted(optimizer):
            self.steps.add()

    def end_batch(self) -> None:
        """Synchronise if the round is over, and carry out what ranks agreed on; called after every batch."""
        self._end_step()
        self.log.end_batch()

    def _end_step(self) -> None:
        self.mid_round.leave_checkpoint()
        steps = self.steps.take()
        self.samples.end_batch(in_round=not self.in_gradient_phase)
        if ends_training(self.trainer):
            self._note_end(steps)  # before messages of this step, which a rank that has ended sooner would not answer
        if steps == 0:
            return
        self.steps.end(steps)
        was_in_gradient_phase = self.in_gradient_phase
        over = [self.clock.tick() for _ in range(steps)][-1]
        self.recorder.step = self.clock.steps_done
        if was_in_gradient_phase:
            self._training.note_gradients(self.recorder, steps)
            if not self.in_gradient_phase:
                self.compare_places("the end of averaged gradients")  # a rank that is behind would still average them
                self._leave_gradient_phase()
        elif over:
            self.rounds.synchronise()
        else:
            self.rounds.go_on()
        self._carry_out_if_due(self.agreement.poll(self._training.position, force=self.rounds.stopped_apart))
        self.steps.begin()

    def end_epoch(self, *, in_batch: bool = False) -> None:
        """Wait until all ranks have ended the epoch alike, where that was not certain; may be called twice.

        Args:
            in_batch: Whether its last batch is not over: then a validation or a checkpoint may still be agreed on for
                it. Once it is, a slower rank would do that right after its last batch, and this one has gone past it.

        """
        if not self.ends.needed:
            return
        self._note_end(self.steps.count)
        with self.agreement.first_error_shown():
            self.ends.wait(partial(self._meeting.answer, () if in_batch else AFTER_A_BATCH))
        # all ranks are here, after the same step, and have posted what they ask for
        if in_batch and not self.rounds.stopped_apart:
            self.agreement.poll(self._training.position, force=True)
        self.agreement.move_on()
        self._carry_out_if_due(self.agreement.decision)

    def _note_end(self, steps: int) -> None:
        if not self.rounds.stopped_apart:  # else they have agreed to stop at different steps
            if self.ends.needed:
                self.agreement.post()  # before the place, so that others find the request once all are there
            self.ends.end_epoch(self.trainer.current_epoch, self.clock.steps_done + steps)

    def compare_places(self, purpose: str) -> None:
        """Compare where ranks are, before messages that would not show it; only where they may differ."""
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.interrupted
        if self.active and trains and not self.rounds.stopped_apart:
            with self.agreement.first_error_shown():
                self.ends.meet(purpose, self.clock.steps_done, self._meeting.poll_failures)

    def meet_at_epoch_end(self) -> None:
        """Check that all ranks end the epoch after the same steps, where its length could not be compared before."""
        if not self.in_gradient_phase:
            self._meeting.check(self._meeting.meet(averages=False))

    def finish(self) -> None:
        """End the run averaged, also where its length was not known."""
        self.mid_round.leave_checkpoint()
        self.compare_places("the end of the run")
        if not self.in_gradient_phase and self.rounds.apart:
            self.rounds.finish()
        self.log.end_run()

    # ---- stopping ----------------------------------------------------------------------------------------------------

    def _carry_out_if_due(self, decision: Decision | None) -> None:
        if decision is None or not (decision.at_step is None or self.clock.steps_done >= decision.at_step):
            return
        rounds = self.rounds
        if decision.at_step is None:
            if not rounds.stopped_apart:
                self._meeting.meet(stops_apart=True)
                rounds.stop_apart()
        elif decision.kind not in AFTER_A_BATCH and rounds.apart and not self.in_gradient_phase:
            rounds.synchronise(in_full=True)
        self.agreement.settled()
        self.on_decision(decision)


def _tensors_of(module: LightningModule, settings: Settings, training: LightningTraining) -> ModelTensors:
    """Return what is averaged of a model."""
    return ModelTensors(
        module,
        average_buffers=settings.buffers == "average",
        weight_averages=training.weight_averages,
        differences=settings.averaging.difference_scope,
    )


def _pruned_weights(
    module: LightningModule, model: ModelAverage, settings: Settings, recorder: Recorder
) -> PrunedWeights | None:
    """Return what keeps pruned weights at zero, where averages are those of a sparse model."""
    codec, method = model.codec, settings.averaging.method
    if isinstance(codec, SparseMaskCodec) and isinstance(method, SparseMask):
        return PrunedWeights(module, codec, method, recorder)
    return None
