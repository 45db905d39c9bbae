"""One ``fit`` under Cyclic Data Parallelism: which version the model holds, what is handed over, and when all meet.

`CyclicStrategy` is the shell that Lightning calls; its hooks and the companion callback call this.

In each optimizer step: `begin_forward` opens it; at the first call of a stage's modules `_enter` puts the version that
the schedule says in place; when the gradients of a stage are ready they are handed to the ring; `count_step` closes it.
In the first step of a run the forward is traced instead, and the model is cut into stages before its backward.
Parameters are written by this thread alone, between a stage's backward and its next forward.

Longer than other files, since what a step hands over and what it takes up share one state.
"""

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.content import Contents
from lightning_comm.ondevice.cyclic.optimizer_guard import OptimizerGuard
from lightning_comm.ondevice.cyclic.stages import START, ForwardTrace, Stage, not_compiled
from lightning_comm.ondevice.cyclic.update import Clipping, Number, whole_norm
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.common import rank_status as control
from lightning_comm.strategies.common.rank_status import ControlRow
from lightning_comm.strategies.common.run_length import may_differ
from lightning_comm.strategies.cyclic import (
    clipping as cyclic_clipping,
)
from lightning_comm.strategies.cyclic import (
    refusals as cyclic_checks,
)
from lightning_comm.strategies.cyclic import (
    trained as cyclic_trained,
)
from lightning_comm.strategies.cyclic.averages import averages_by_own_rule
from lightning_comm.strategies.cyclic.cut import agreed_stages
from lightning_comm.strategies.cyclic.own_steps import OwnSteps
from lightning_comm.strategies.cyclic.refusals import WHERE, CyclicSettings
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.cyclic.buffers import average_buffers
from lightning_comm.transport.cyclic.messages import StageLayout
from lightning_comm.transport.cyclic.requests import BATCH, RATE, Requests, check_finite
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.cyclic.stage_optimizer import SQUARED_NORM, StageOptimizer
from lightning_comm.transport.cyclic.stagger import Stagger
from lightning_comm.transport.cyclic.untrained import UntrainedParameters
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.recording import Pending, Recorder, another_group, hang_up
from lightning_comm.transport.stop_protocol import Agreement, Decision, Kind

_NOTED = 0  # the stage whose notes all ranks read
RUN_END = "the end of the run"
_NOTICEABLE_S = 5e-5  # shorter waits are not worth a record


class CyclicRun:
    """The state of one ``fit``.

    Args:
        trainer: The Trainer.
        module: The model.
        optimizer: Its optimizer.
        settings: What the user chose.
        ledger: Where messages are written down.
        agreement: Tells of failures.
        requests: What ranks ask for.
        broadcast: Gives all ranks an object of rank 0's.
        timeout: How long messages wait for other ranks.
        ends: Compares where ranks end their epochs.

    """

    def __init__(  # noqa: PLR0913  (each is made by the strategy)
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        settings: CyclicSettings,
        ledger: CommLedger,
        agreement: Agreement,
        requests: Requests,
        broadcast: Callable[[Any], Any],
        timeout: timedelta,
        ends: EpochEnds,
    ) -> None:
        self.trainer = trainer
        self.settings = settings
        self.agreement = agreement
        self.ends = ends
        self.recorder = Recorder(ledger)
        self.steps_done = 0
        self.flushed_at = 0  # steps done when all ranks last took up the newest version of everything
        self.stages: list[Stage] = []  # empty until the model is cut
        self.schedule: CyclicSchedule | None = None
        self.optimizer: StageOptimizer | None = None
        self.active = False  # not in a trial run, such as that of a learning-rate finder
        self.on_decision: Callable[[Decision], None] = lambda decision: None
        self.module = module
        self.failed = False  # whether a rank has failed, so that ranks cannot be brought together any more
        self.random_state: dict[str, Any] | None = None  # as training left it, once something else has begun
        self._user_optimizer = optimizer
        self._requests = requests
        self._broadcast = broadcast
        # Messages keep no order with those of Lightning. Where tags tell them apart, gradients and parameters share a
        # group, since two connections would get in each other's way on a link; otherwise they keep no order either.
        self._tagged = backend_of(module.device) == "gloo"
        with agreement.first_error_shown("the set-up of a process group"):
            self._groups = [another_group(timeout) for _ in range(1 if self._tagged else 2)]
        self._lanes = [Recorder(ledger, self._groups[k], hold=True) for k in (0, 0 if self._tagged else 1)]
        staggered = settings.stagger == "step" and self.recorder.world_size > 1
        with agreement.first_error_shown("the set-up of a process group"):
            self._tokens = another_group(timeout, "gloo") if staggered else None
        self._stagger: Stagger | None = None
        self._uncut = False  # the model is to be cut in the first forward
        self._trace: ForwardTrace | None = None
        self._ring: CyclicRing | None = None
        self._handles: list[RemovableHandle] = []
        self._parameters: list[list[Parameter]] = []  # by stage
        self._versions: list[int] = []  # which the module holds, by stage
        self._contents = Contents([])  # of these versions
        self._guard: OptimizerGuard | None = None
        self._untrained: UntrainedParameters | None = None
        self._own_steps: OwnSteps | None = None
        self._began_at = self.run_began_at = 0
        self._saved_norm: float | None = None
        self._manual = not module.automatic_optimization
        self._training = False  # whether the module's `training_step` runs
        self._limits: tuple[object, object] | None = None  # of the Trainer, and what they come to
        self._clipping = Clipping()
        self._open = False  # whether there was a forward since the last step
        self._moved = False  # whether a forward may have changed buffers since ranks last met
        self._awaited = False  # whether what a forward has computed waits for its backward
        self._due = False  # whether the optimizer's step is being taken
        self._stepping = False  # whether this backward hands gradients over as they come
        self._asked = False  # whether the ring knows that there will be this step
        self._torn = False  # whether a step ended in an error when some of its gradients had been sent
        self._counted = False  # whether there was a step since the last batch ended
        self._batch = 0  # of this fit
        self._decided: list[Decision] = []
        self._batch_of: dict[int, int] = {}  # by step
        self._rate_of: dict[int, Number] = {}  # by step, the sum over the groups
        self._rates_then: list[object] = []  # when the first gradients of a step were handed over
        self._warned_of_rates = self._warned_of_late_rate = False
        self._entered: set[int] = set()
        self._ready: list[int] = []
        self._streams: set[torch.cuda.Stream] = (
            set()
        )  # in which backward has computed gradients that are not handed over
        self._handed: set[int] = set()
        self._non_finite: Tensor | None = None

    # ---- set-up --------------------------------------------------------------------------------------------------

    def start(
        self, steps_done: int, stages: Sequence[Stage], previous_norm: float | None, run_began_at: int = 0
    ) -> None:
        """Begin at a step, with the stages of the run that is resumed, or without: then the first forward is traced.

        Args:
            steps_done: Optimizer steps done, in this Trainer's count, which goes on over several fits.
            stages: Those of the run that is resumed.
            previous_norm: Of its last gradient.
            run_began_at: The step at which the run began, with this fit or with the one that it resumes.

        """
        self.active = True
        self.steps_done = self.flushed_at = self._began_at = steps_done
        self._saved_norm = previous_norm
        self.run_began_at = run_began_at
        self.recorder.step = steps_done
        self._untrained = UntrainedParameters(self.module, _trained(self._user_optimizer))
        groups = self._user_optimizer.param_groups
        self._own_steps = OwnSteps(self.module, [each for group in groups for each in group["params"]])
        if hasattr(self._user_optimizer, "register_step_pre_hook"):
            self._handles.append(self._user_optimizer.register_step_pre_hook(self._on_optimizer))
        if stages and cyclic_trained.are_of(stages, self.module, _trained(self._user_optimizer)):
            self._build(stages)
            return
        self._uncut = True
        if stages:
            cyclic_checks.warn_of_another_cut()

    def check_start(self, batches: float) -> None:
        """Refuse ranks with different numbers of training batches in an epoch; infinity where it is not known."""
        urgent = may_differ(self.trainer) or averages_by_own_rule(self.trainer)
        row = ControlRow(batches=batches if math.isfinite(batches) else -1, urgent=urgent)
        with self.agreement.first_error_shown():
            rows = control.exchange(row, self.recorder, self.module.device, Pending.wait)
            control.check_same_batches(rows, WHERE)
        self.ends.needed = any(row.urgent for row in rows)

    def _build(self, stages: Sequence[Stage]) -> None:
        settings, rank = self.settings, self.recorder.rank
        self.stages = list(stages)
        cyclic_trained.check(stages, self.module, _trained(self._user_optimizer), self.steps_done)
        warmup_ends_at = self.run_began_at + settings.warmup_sync_steps
        self.schedule = schedule = CyclicSchedule(
            self.recorder.world_size, len(stages), settings.rule, settings.lag, warmup_ends_at
        )
        parameters = dict(self.module.named_parameters())
        self._parameters = [[parameters[name] for name in stage.parameters] for stage in stages]
        self._versions = [self.steps_done] * len(stages)
        self._ready = [0] * len(stages)
        owned = {stage: self._parameters[stage] for stage in schedule.owned(rank)}
        self.optimizer = StageOptimizer(self._user_optimizer, owned, self._previous_norm)
        self._guard = OptimizerGuard(self._user_optimizer)
        self._contents = Contents([{name: parameters[name] for name in stage.parameters} for stage in stages])
        for number in range(len(stages)):
            self._contents.note(number)
        if self._untrained is not None:
            self._untrained.leave_out(each for parameters in self._parameters for each in parameters)
        layouts = [StageLayout(each) for each in self._parameters]
        sums, versions = self._lanes
        self._ring = CyclicRing(
            schedule,
            layouts,
            self.optimizer.update,
            sums,
            versions,
            self.module.device,
            in_any_order=self._tagged,
        )
        modules = dict(self.module.named_modules())
        for number, stage in enumerate(stages):
            for name in stage.modules:
                if name != START:
                    enter = not_compiled(partial(self._on_forward, number))
                    # in front of hooks that read parameters, such as those of weight normalisation
                    self._handles.append(modules[name].register_forward_pre_hook(enter, prepend=True))
            for parameter in self._parameters[number]:
                ready = partial(self._on_gradient, number)
                handle = parameter.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        if self._tokens is not None:
            recorder = Recorder(self.recorder.ledger, self._tokens, hold=True)
            self._stagger = Stagger(schedule, recorder, self.agreement.listen)

    # ---- a step --------------------------------------------------------------------------------------------------

    def begin_batch(self, number: int) -> None:
        """Count a batch of the fit, and say which one of its epoch; called before every one."""
        self._batch += 1
        if self._own_steps is not None:
            self._own_steps.look()
        self.ends.begin_batch(self.trainer.current_epoch, number)

    def end_epoch(self) -> None:
        """Wait until all ranks have ended the epoch alike, where that is not sure before."""
        self.ends.end_epoch(self.trainer.current_epoch, self.steps_done)
        self.ends.wait(self._hear)

    def compare_places(self, purpose: str) -> None:
        """Compare where ranks are, before they meet in messages that do not tell; only where they may come apart."""
        if self.active:
            self.ends.meet(purpose, self.steps_done, self._hear)

    def _hear(self) -> bool:
        self.agreement.listen()
        return False

    def begin_forward(self) -> None:
        """Open the step, if this is its first batch; called before every training step of the module's."""
        if not self.active:
            return
        self._refuse_torn()
        self._training = self._open = self._awaited = self._moved = True
        if self._uncut or self._trace is not None:
            if self._trace is not None:
                self._trace.units()  # of a forward without a backward, whose error the module may have caught
            # only from here: callbacks may call modules before, in another order
            self._trace, self._uncut = ForwardTrace(self.module, _trained(self._user_optimizer)), False
            return
        assert self._ring is not None
        if self._stagger is not None:
            self._end_turn()
            with self.agreement.first_error_shown():
                self._stagger.begin_batch(self.steps_done)
        if self._stepping:
            self._ask()
        self._enter_start()

    def end_forward(self) -> None:
        """Note that the module's training step is over, and under manual optimization all steps of the batch."""
        self._training = False

    def _enter_start(self) -> None:
        if START in self.stages[0].modules:
            self._enter(0)

    def begin_backward(self, loss: Tensor) -> None:
        """Note whether the loss is finite; in the first step, cut the model into stages."""
        if not self.active:
            return
        if not loss.requires_grad and self._guard is not None and self._guard.trains_others():
            raise self._other_parameters()  # all are frozen, since the forward of this batch began
        if self._non_finite is not None and all(each.grad is None for each in _trained(self._user_optimizer)):
            self._non_finite = None  # what was computed before has been cleared, and reaches no parameter
        bad = (~torch.isfinite(loss.detach()).all()).to(torch.float64)
        self._non_finite = bad if self._non_finite is None else torch.maximum(self._non_finite, bad)
        self._cut()
        if self._stagger is not None:
            self._stagger.reach(len(self.stages))

    def _cut(self) -> None:
        """Cut the model into stages, by the forward that was traced."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        rank, workers = self.recorder.rank, self.recorder.world_size
        self._build(agreed_stages(trace.units(), self.settings, rank, workers, self._broadcast))
        self._say_stages()
        self._entered = set(range(len(self.stages)))

    def step_is_due(self, optimizer: Optimizer, *, at_once: bool) -> None:
        """Note that this batch ends in an optimizer step.

        Args:
            optimizer: The one that Lightning steps.
            at_once: Whether gradients are handed over as backward brings them. Otherwise they are when the closure is
                done, as where the module's own `optimizer_step` has called it before, or changes gradients in it.

        """
        if self.active:
            self._refuse_torn()
            if optimizer is not self._user_optimizer:
                raise cyclic_checks.another_optimizer(optimizer, self.steps_done)
            self._due, self._stepping = True, at_once
            self._check_optimizer()

    def complete(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure; when it is done, what no hook has is handed over."""

        def evaluate() -> Any:
            output = closure()
            if self.active and self._due:
                self._hand_over_rest()
            return output

        return evaluate

    def _hand_over_rest(self) -> None:
        cleared = not self._handed and all(each.grad is None for each in _trained(self._user_optimizer))
        if self._open and cleared:
            self._due = False  # by a hook, or by Lightning before a validation: such a step changes nothing anywhere
        elif self._open:
            self._cut()  # where no backward of Lightning's has: `loss.backward()` under manual optimization
            for stage in reversed(range(len(self.stages))):
                if stage not in self._handed:
                    self._hand_over(stage)
        elif self._open or self.steps_done > self._began_at:
            raise cyclic_checks.without_backward(self.steps_done, self._batch)
        else:
            self._due = False  # a step before the first backward of all changes nothing and does not count

    def step_failed(self) -> None:
        """Note that the step ended in an error, which the module's own `optimizer_step` may catch."""
        self._due = self._stepping = self._awaited = False
        self._torn = bool(self._handed)

    def _refuse_torn(self) -> None:
        if self._torn:
            raise cyclic_checks.torn_step(self.steps_done)

    def _on_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        # stages have copies of it, which call this as well
        if self.active and optimizer is self._user_optimizer and not self._due:
            raise cyclic_checks.stepped_past(optimizer, self.steps_done, self._batch)

    def _ask(self) -> None:
        """Let the ring ask for the messages of this step, once it is sure to be taken."""
        assert self._ring is not None
        if not self._asked:
            self._asked = True
            with self.agreement.first_error_shown():
                self._ring.begin_step(self.steps_done)

    def _check_optimizer(self) -> None:
        if self._guard is None:
            return
        if self._guard.trains_others():
            raise self._other_parameters()
        if found := self._guard.changed():
            raise cyclic_checks.changed_optimizer(self._user_optimizer, self.steps_done, found)

    def _rate(self) -> Number:
        """Return the sum of the learning rates, on the device where one of them is: the host does not wait for it."""
        rates = [group.get("lr", 0.0) for group in self._user_optimizer.param_groups]
        there = [rate.detach().to(torch.float64) for rate in rates if isinstance(rate, Tensor) and rate.is_cuda]
        here = sum(float(rate) for rate in rates if not (isinstance(rate, Tensor) and rate.is_cuda))
        return torch.stack(there).sum() + here if there else here

    def _rates(self) -> list[object]:
        """Return what is another one when a learning rate is; tensors are not read, but how often they were written."""
        rates = [group.get("lr", 0.0) for group in self._user_optimizer.param_groups]
        return [(id(rate), rate._version) if isinstance(rate, Tensor) else rate for rate in rates]

    def _other_parameters(self) -> RuntimeError:
        return cyclic_trained.others(self.stages, self.module, _trained(self._user_optimizer), self.steps_done)

    def _note_settings(self) -> None:
        if self.optimizer is not None:
            limits = (self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm)
            if limits != self._limits:  # at first, and where a callback has changed them
                changed = self._limits is not None
                self._clipping = cyclic_clipping.clipping_of(self.settings, self.trainer, self.module, changed=changed)
                self._limits = limits
            self.optimizer.note_settings(self.steps_done, self._clipping)

    def end_backward(self) -> None:
        """Hand over what no hook has, and refuse parameters that had no part in the step."""
        self._end_turn()
        self._awaited = False
        if not self.active or not self._stepping:
            return
        for stage in reversed(range(len(self.stages))):
            if stage not in self._handed:
                self._hand_over(stage)

    def count_step(self) -> None:
        """Close the step; called after what Lightning takes for the optimizer's step."""
        self._end_turn()
        if not self.active or not self._due:
            return
        if self._counted:
            self._read_notes()  # of an earlier step in this batch
        if not self._warned_of_late_rate and self._rates() != self._rates_then:
            self._warned_of_late_rate = True
            cyclic_checks.warn_of_late_rate(self.steps_done)
        self.steps_done += 1
        self.recorder.step = self.steps_done
        if self._guard is not None:
            self._guard.note()
        self._open = self._due = self._stepping = self._asked = False
        self._counted = True
        self._handed.clear()
        self._entered.clear()
        self._ready = [0] * len(self.stages)
        self._non_finite = None
        if self._manual:
            self._enter_start()  # its parameters may be used for a further step of this batch, before any module is

    def end_batch(self) -> None:
        """Do what ranks agreed on, if a step is over; called after every batch, before other callbacks."""
        self._end_turn()
        self._awaited = False  # without a backward: its error was caught, or `training_step` returned None
        if not self._counted:
            return
        self._counted = False
        self._check_contents()
        for lane in self._lanes:
            lane.write_held()
        self._read_notes()
        decided, self._decided = self._decided, []
        for decision in decided:
            if decision.kind in ("terminate", "requeue"):
                self._meet()  # whoever ends at once takes along the store, in which others still read the reason
            self.on_decision(decision)

    def _end_turn(self) -> None:
        """Let the next rank begin a batch, also where this one's ended in an error that the module has caught."""
        if self._stagger is not None:
            self._stagger.end_batch(2 * len(self.stages))

    def _read_notes(self) -> None:
        """Read what ranks have noted two steps ago, once after each step."""
        version = self.steps_done - 2  # the newest that every rank has, whatever it computes with
        if version > self._began_at:
            notes = self._notes_of(version)
            self._check_finite(version, notes)
            self._check_batch(version - 1, notes)
            self._compare_rates(version - 1, notes)
            del self._batch_of[version - 1]
            self._decided += self._requests.decided(version - 1, notes, self.steps_done)

    def _on_forward(self, stage: int, *_: Any) -> None:
        if self._manual and not self._open and (self._training or self._trains_in_a_hook()):
            # a further step in this batch
            self._open = self._moved = True
            self._awaited = self._training and torch.is_grad_enabled()
        if self._open and self._ring is not None:
            self._enter(stage)

    def _trains_in_a_hook(self) -> bool:
        return bool(self.trainer.training) and torch.is_grad_enabled()

    def _enter(self, stage: int) -> None:
        """Put the version in place with which this step computes; at the first call of each step."""
        if stage in self._entered or self.schedule is None:
            return
        self._entered.add(stage)
        if self._stagger is not None:
            self._stagger.reach(stage)
        version = self.schedule.version(self.recorder.rank, stage, self.steps_done, self.flushed_at)
        if version > self._versions[stage]:
            self._contents.compare(stage)
            self._check_contents()
            with self.agreement.first_error_shown():
                self._take_up(stage, version)

    def _check_contents(self, *, wait: bool = False) -> None:
        """Refuse parameters that somebody else has changed since their version was put in place."""
        if self._contents.changed(wait=wait):
            for stage in range(len(self.stages)):
                self._contents.compare(stage)  # to name those of other stages as well
            raise cyclic_checks.changed_parameters(self.steps_done, self._contents.changed(wait=True))

    def _take_up(self, stage: int, version: int) -> None:
        assert self._ring is not None
        since_s = time.monotonic()
        message = self._ring.take(stage, version, self.agreement.listen)
        if time.monotonic() - since_s > _NOTICEABLE_S:
            self.recorder.waited("wait", since_s)
        with torch.no_grad():
            for parameter, part in zip(self._parameters[stage], message.parts, strict=True):
                parameter.copy_(part)
        self._ring.release(stage, version)
        self._versions[stage] = version
        self._contents.note(stage)

    def _on_gradient(self, stage: int, parameter: Tensor) -> None:
        self._awaited = False
        if not self._stepping:
            self._open |= self._manual
            return
        if stage in self._handed:
            raise cyclic_checks.late_gradient(stage, self.stages[stage].modules)
        if parameter.is_cuda:
            self._streams.add(torch.cuda.current_stream(parameter.device))
        self._ready[stage] += 1
        if self._ready[stage] == len(self._parameters[stage]):
            self._hand_over(stage)

    def _follow_backward(self) -> None:
        """Let this thread's stream follow those in which backward computed gradients, where a model uses several."""
        if self._streams:
            here = torch.cuda.current_stream(self.module.device)
            for stream in self._streams - {here}:
                here.wait_stream(stream)
            self._streams.clear()

    def _hand_over(self, stage: int) -> None:
        """Hand over the gradients of a stage. The host waits for nothing here: backward calls this."""
        assert self._ring is not None
        self._follow_backward()
        parameters = self._parameters[stage]
        names = self.stages[stage].parameters
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) < len(parameters):
            named = dict(zip(names, parameters, strict=True))
            raise cyclic_trained.without_gradient(named, self.module, self.steps_done) or self._other_parameters()
        if any(gradient.layout != torch.strided for gradient in gradients):
            pairs = zip(names, gradients, strict=True)
            raise cyclic_checks.sparse_gradient([name for name, each in pairs if each.layout != torch.strided])
        for parameter in parameters:
            parameter.grad = None
        if not self._handed and self.optimizer is not None:  # as late as can be: the module may change them before
            self._note_settings()
            self._rate_of[self.steps_done], self._rates_then = self._rate(), self._rates()
        self._handed.add(stage)
        notes = self._requests.notes(
            self.steps_done,
            self._non_finite,
            self.module.device,
            asking=stage == _NOTED,
            batch=self._batch,
            rate=self._rate_of[self.steps_done],
        )
        self._batch_of[self.steps_done] = self._batch
        self._ask()
        with self.agreement.first_error_shown():
            self._ring.hand_over(stage, gradients, notes)

    # ---- meeting -------------------------------------------------------------------------------------------------

    @property
    def flushed(self) -> bool:
        """Whether this rank holds the newest version of everything."""
        return self.flushed_at == self.steps_done

    def flush(self, purpose: str) -> None:
        """Take up the newest version of everything, and average what no stage has; on all ranks after the same step.

        Args:
            purpose: For what, in words.

        """
        self._refuse_torn()
        self.compare_places(purpose)
        if self._ring is None or self.flushed:
            return
        if self._awaited:
            raise cyclic_checks.saved_within_step(self.steps_done)
        for stage in range(len(self.stages)):
            self._contents.compare(stage)
        self._check_contents(wait=True)
        with self.agreement.first_error_shown():
            for stage in reversed(range(len(self.stages))):
                if self._versions[stage] < self.steps_done:
                    self._take_up(stage, self.steps_done)
            versions = [each for each in (self.steps_done - 1, self.steps_done) if each > self._began_at]
            notes = {version: self._notes_of(version) for version in versions}
        for version in versions:
            self._check_finite(version, notes[version])  # every rank's own error, not that of the first to find it
            self._check_batch(version - 1, notes[version])
        self._bring_together()
        self.flushed_at = self.steps_done

    def _bring_together(self) -> None:
        """Average what no stage has."""
        with self.agreement.first_error_shown():
            average_buffers(self.module, self.recorder)
            if self._untrained is not None:
                self._untrained.bring_together(self.recorder)
        self._moved = False

    def finish(self) -> None:
        """End the run: all ranks hold the newest parameters, and nothing is under way."""
        if self._ring is None:
            self._end_hooks()
            self.active = False
            return
        self.flush(RUN_END)
        if self._asked:  # of a step that nobody takes, such as one whose error the module has caught
            self._batch_of[self.steps_done] = 0
            with self.agreement.first_error_shown():
                notes = self._ring.leave_out(self.steps_done, self.agreement.listen)
            self._check_batch(self.steps_done, notes[_NOTED])
        if self._moved:
            self._bring_together()  # forwards without a step behind the last one
        if self._stagger is not None:
            with self.agreement.first_error_shown():
                self._stagger.close()
        self._ring.close()
        for lane in self._lanes:
            lane.write_held()
        self._end_hooks()
        self.active = False

    def leave(self) -> None:
        """Leave the process groups of a run that has ended as it should."""
        for group in (*self._groups, *([] if self._tokens is None else [self._tokens])):
            dist.destroy_process_group(group)
        self._groups, self._tokens = [], None

    def abandon(self) -> None:
        """Take the hooks away and end the lanes, where the run has not ended as it should."""
        self._end_hooks()
        if self.recorder.world_size > 1 and dist.is_initialized():
            # A thread that wakes up while Python shuts down takes the whole process with it, so none is left waiting.
            for group in (*self._groups, *([] if self._tokens is None else [self._tokens])):
                hang_up(group)
        if self._ring is not None:
            self._ring.abandon()
        if self._stagger is not None:
            self._stagger.abandon()
        self.active = False

    def request(self, kind: Kind, reason: str) -> None:
        """Ask for something that all ranks are to do at the same step."""
        self._requests.ask(kind, reason)

    def keep_random_state(self) -> None:
        """Note the generators as training has left them, for a checkpoint that is saved after an evaluation."""
        self.random_state = self.random_state or random_state()

    def previous_norm(self) -> float | None:
        """Return the gradient norm of the last step, after a flush; ``None`` where it is not known."""
        norm = self._previous_norm(self.steps_done)
        return None if norm is None else float(norm)

    def _say_stages(self) -> None:
        assert self.schedule is not None
        counts = [sum(each.numel() for each in parameters) for parameters in self._parameters]
        begins = ", ".join(stage.modules[0] or "(start)" for stage in self.stages)
        in_step = self.run_began_at + self.settings.warmup_sync_steps - self.steps_done
        first = f"; the first {in_step:,} steps are in step, as under DDP, and after them" if in_step > 0 else ", and"
        rank_zero_info(
            f"{WHERE}: {len(counts)} stages of {min(counts):,} to {max(counts):,} parameters on "
            f"{self.recorder.world_size} ranks, which begin at {begins}; a rank updates {len(self.schedule.owned(0))} "
            f"of them{first} parameters are {self.schedule.mean_delay:.3g} updates old on average."
        )

    def _notes_of(self, version: int) -> list[float]:
        assert self._ring is not None
        return self._ring.notes(version, [_NOTED], self.agreement.listen)[0]

    def _check_finite(self, version: int, notes: list[float]) -> None:
        try:
            check_finite(version - 1, notes, WHERE)
        except RuntimeError:
            self._meet()  # whoever left at once would take along what others wait for
            raise

    def _check_batch(self, step: int, notes: list[float]) -> None:
        """Refuse ranks that take a step in different batches, since one of them has left a step out."""
        own = self._batch_of[step]
        others = notes[BATCH] - own
        if others != own * (self.recorder.world_size - 1):
            raise self.ends.told(cyclic_checks.different_batches(step, own, others, self.recorder.world_size))

    def _compare_rates(self, step: int, notes: list[float]) -> None:
        """Say that learning rates differ between ranks, where each would use its own for the stages that it owns."""
        own = float(self._rate_of.pop(step))
        others = (notes[RATE] - own) / max(1, self.recorder.world_size - 1)
        differ = self.recorder.world_size > 1 and not math.isclose(own, others, rel_tol=1e-9)
        if differ and not self._warned_of_rates:
            self._warned_of_rates = True
            cyclic_checks.warn_of_different_rates(step, own, others)

    def _meet(self) -> None:
        """Wait for all ranks, where the same notes have brought them to the same place."""
        with self.agreement.first_error_shown():
            control.exchange(ControlRow(), self.recorder, self.module.device, Pending.wait)

    def _previous_norm(self, step: int) -> Number | None:
        if step == self._began_at or self._ring is None:
            return self._saved_norm
        # in a lane, which need not hear of failures: compute does
        stages = range(len(self.stages))
        if self.module.device.type == "cuda":
            return whole_norm(list(self._ring.notes_on_device(step, stages, lambda: None)[:, SQUARED_NORM]))
        return whole_norm([row[SQUARED_NORM] for row in self._ring.notes(step, stages, lambda: None)])

    def _end_hooks(self) -> None:
        if self._trace is not None:
            self._trace.units()
        if self._own_steps is not None:
            self._own_steps.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _trained(optimizer: Optimizer) -> list[Parameter]:
    return [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
