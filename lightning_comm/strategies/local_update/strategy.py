"""The Lightning strategy of local updates: a shell that hands Lightning's calls on.

Longer than other files, since Lightning needs all of it in one subclass. The work is done by the run, by its hooks and
by what all strategies share (:mod:`lightning_comm.strategies.common`).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from lightning_comm.contract import RoundInForce, RoundRule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update.periods import PeriodRule
from lightning_comm.ondevice.optimizer.step_messages import FirstSteps
from lightning_comm.strategies.checkpoints.whole_files import with_default
from lightning_comm.strategies.common.hooks import has_hook_callback
from lightning_comm.strategies.common.launching import LaunchingArguments, launching_arguments
from lightning_comm.strategies.common.support import RunSupport, restore_random_state
from lightning_comm.strategies.local_update import checks, set_up
from lightning_comm.strategies.local_update.checkpoint import WHERE, Resume, can_meet, load_own, save
from lightning_comm.strategies.local_update.group_numbers import GroupNumbers
from lightning_comm.strategies.local_update.hooks import LocalUpdateHooks
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.strategies.local_update.settings import Round, Settings
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.group_ends import hang_up
from lightning_comm.transport.recording import Recorder, another_group


class LocalUpdateStrategy(DDPStrategy):
    """Train ranks apart, and average their parameters once a round.

    Each rank takes optimizer steps with its own gradients. At the end of a round the parameters are averaged in place.
    A :class:`PeriodRule` gives the length of a round: a constant period is Local SGD, and :class:`QuadraticPeriod` is
    QSR, whose rounds grow as the learning rate falls. Registered as ``local_sgd``, ``post_local_sgd`` (gradients for
    the first half of the run) and ``qsr``. The card ``docs/techniques/local_update.md`` has the details.

    Args:
        period: The length of rounds, in optimizer steps.
        gradient_steps: How long DDP averages gradients at first: steps of the counted optimizer, or a float from 0.0 to
            1.0, a share of the run.
        warmup_steps: How many steps rounds keep the rule's shortest period; ``"auto"``: the first round, and as long as
            each round starts at a higher learning rate than the last.
        optimizer_state: ``"local"``: each rank keeps its momenta; ``"average"``: they are averaged too.
        buffers: ``"average"``: floating-point buffers are averaged too, others taken from rank 0; ``"keep"``: each rank
            keeps its own.
        evaluate_weights: What a validation in the middle of a round sees: ``"average"``, or ``"local"``, each rank its
            own weights. Checkpoints always hold averaged weights.
        averaging: How averages are carried out; ``None``: the defaults of :class:`Averaging`.
        counted_optimizer: The index of the optimizer whose steps count, under manual optimization.
        find_unused_parameters: For DDP, while it averages gradients.
        launching: :class:`LaunchingArguments`, as in Lightning's ``DDPStrategy``. Long rounds may need a ``timeout`` of
            more than half an hour, since ranks of unequal speed drift apart in time.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None within a round. At its end one all-reduce for each bucket of what is averaged, and 8
        numbers from each rank. Validations and checkpoints in the middle of a round average as well.

        *Memory.* Three buckets. A second copy of the averaged tensors, while averaged weights are evaluated or saved in
        the middle of a round.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import LocalUpdateStrategy, QuadraticPeriod
        >>> strategy = LocalUpdateStrategy(QuadraticPeriod(alpha=0.0175, h_base=4, h_max=1000))
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    References:
        X. Gu et al., `arXiv:2310.14423 <https://arxiv.org/abs/2310.14423>`_ (QSR). T. Lin et al.,
        `arXiv:1808.07217 <https://arxiv.org/abs/1808.07217>`_ (post-local SGD).

    """

    def __init__(  # noqa: PLR0913  (each is a setting of its own)
        self,
        period: PeriodRule,
        *,
        gradient_steps: int | float = 0,
        warmup_steps: int | Literal["auto"] = "auto",
        optimizer_state: Literal["local", "average"] = "local",
        buffers: Literal["average", "keep"] = "average",
        evaluate_weights: Literal["average", "local"] = "average",
        averaging: Averaging | None = None,
        counted_optimizer: int = 0,
        find_unused_parameters: bool = False,
        **launching: Unpack[LaunchingArguments],
    ) -> None:
        super().__init__(**launching_arguments(WHERE, launching), find_unused_parameters=find_unused_parameters)
        self.settings = checks.checked(
            Settings(
                period=period,
                gradient_steps=gradient_steps,
                warmup_steps=warmup_steps,
                optimizer_state=optimizer_state,
                buffers=buffers,
                evaluate_weights=evaluate_weights,
                averaging=averaging or Averaging(),
                counted_optimizer=counted_optimizer,
            )
        )
        self._support = RunSupport(self, WHERE)
        self._group: dist.ProcessGroup | None = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._ledger = CommLedger()
        self._samples = SampleWeights()
        self._run: LocalUpdateRun | None = None
        self._hooks: LocalUpdateHooks | None = None
        self._resume: Resume | None = None
        self._first_steps = FirstSteps(WHERE)
        self._group_numbers = GroupNumbers(WHERE)

    # ---- for users and callbacks (:mod:`lightning_comm.contract`) ----------------------------------------------------

    @property
    def ledger(self) -> CommLedger:
        """Every message of the last or current run, on this rank."""
        return self._ledger

    @property
    def history(self) -> list[Round]:
        """Every synchronisation of the last or current ``fit``, on this rank."""
        return list(self._run.log.history) if self._run is not None else []

    @property
    def rounds_done(self) -> int:
        """How often ranks have synchronised in this ``fit``; up to date when callbacks see the end of a batch."""
        return self._run.rounds.done if self._run is not None else 0

    @property
    def averages_landed(self) -> int:
        """How many averages are in the weights in this ``fit``; less than ``rounds_done`` while one is in flight."""
        return self._run.log.rounds if self._run is not None else 0

    @property
    def averages_gradients(self) -> bool:
        """Whether DDP averages gradients at every step now; before training starts, whether it does so at first."""
        if self._run is None or not self._run.active:
            return self.settings.starts_with_gradients
        return self._run.in_gradient_phase

    @property
    def round_in_force(self) -> RoundInForce:
        """The round that this rank is in."""
        return self._run.round_in_force if self._run is not None and self._run.active else RoundInForce(0, None)

    @property
    def round_rule(self) -> RoundRule:
        """The rule by which its rounds are planned; the coefficient is known from ``on_train_start`` on."""
        settings = self.settings if self._run is None else self._run.settings
        return RoundRule(settings.period, settings.warmup_steps)

    @property
    def gradient_phase_steps(self) -> int:
        """Optimizer steps at the start of the run at which gradients are averaged; 0 before training starts."""
        run = self._run
        return max(0, run.gradient_phase_steps) if run is not None and run.active else 0

    def shorten_gradient_phase(self, steps: int) -> None:
        """Let rounds begin after this many steps of the run, if that is sooner; in a batch, before its step."""
        set_up.shorten_gradient_phase(self._run, steps)

    def weigh_by_samples(self) -> None:
        """Weight each rank by its share of the samples of a round; call it in ``setup`` for ``fit``, on all ranks."""
        self._samples.begin()

    def count_samples(self, samples: int) -> None:
        """Count the samples of the batch that has begun; 0 for one that only keeps this rank in step."""
        self._samples.count(samples)

    def take_into_average(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, which a validation has renewed, as part of the average, which is removed after it."""
        if self._run is not None:
            self._run.mid_round.weights.include(tensors)

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback refuses in its ``setup``, to raise it with what the strategy refuses."""
        self._support.set_up.refuse_in_set_up(where, problems)

    # ---- set-up ------------------------------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if self._support.connect(model.trainer):
            self._forget_fit()
        elif self._run is not None:
            self._run.keep_random_state()  # an evaluation draws from the generators

    @override
    def setup(self, trainer: Trainer) -> None:
        support, module = self._support, self.lightning_module
        if not support.is_fit:
            support.set_up.evaluation(trainer, super().setup)
            return
        assert module is not None
        with support.set_up.refusals() as refusals:
            sync_batchnorm = self._layer_sync is not None
            refusals.add(
                set_up.problems_of_trainer_and_model(trainer, module, self.settings, sync_batchnorm=sync_batchnorm)
            )
            support.set_up.fit(trainer, refusals, super().setup)
            refusals.add(set_up.problems_of_optimizers(trainer, self.optimizers, self.settings, self._resume))
        set_up.warn_of_gradients(module, self.settings, self.world_size)
        agreement = support.failures.agreement()
        recorder, background_recorder = Recorder(self._ledger), None
        if self.settings.averaging.overlap_steps:
            support.meet_before_groups(super().barrier)
            with support.failures.first_error_shown("the set-up of a process group"):
                self._group = another_group(self._timeout)
            background_recorder = Recorder(self._ledger, self._group, beside_compute=True, hold=True)
        self._run = run = LocalUpdateRun(
            trainer,
            module,
            lambda: self.optimizers,
            self.settings,
            recorder,
            agreement,
            support.failures.epoch_ends(agreement),
            self._unwrap_ddp,
            self._samples,
            background_recorder,
        )
        support.collectives.compare_places = run.compare_places
        support.collectives.before = run.overlapped.make_way
        self._hooks = LocalUpdateHooks(trainer, run, support.begin_fit(trainer, run))
        support.hooks = self._hooks.hooks

    @override
    def configure_ddp(self) -> None:
        if self.settings.starts_with_gradients:
            self._support.set_up.wrap_in_ddp(super().configure_ddp)
        else:
            bucket_bytes = self.settings.averaging.bucket_bytes_under(backend_of(self.root_device))
            self._support.set_up.share_model(Recorder(self._ledger), bucket_bytes)

    def _unwrap_ddp(self) -> None:
        """End the gradient phase. Dropping the wrapper frees its buckets and takes its hooks off the parameters."""
        self.model = self.lightning_module

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        run, trainer, interruptions = self._run, self._support.trainer, self._support.interruptions
        assert run is not None
        assert trainer is not None
        assert interruptions is not None
        assert self._hooks is not None
        if not has_hook_callback(trainer):
            return
        self._hooks.begin_training()
        resume, self._resume = self._resume, None
        set_up.begin_run(trainer, run, resume)
        if self.settings.starts_with_gradients and not run.in_gradient_phase:
            self._unwrap_ddp()
        set_up.say_plan(trainer, run)
        interruptions.install(after_save=run.mid_round.leave_checkpoint)
        self._support.watch_plateaus(run.recorder, run.agreement, run.overlapped.make_way)
        if resume is not None and resume.own is not None:
            restore_random_state(trainer, resume.own["random"], epoch_is_over=resume.own["epoch_is_over"])

    # ---- steps -------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # after all callbacks and the module, so that a learning rate set there counts for the round that begins
        if self._run is not None and self._support.interruptions is not None and self._run.active:
            self._support.interruptions.begin_batch()
            self._run.begin_batch(batch_idx + 1)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._failures_shown():  # in the gradient phase the forward takes buffers from rank 0
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._failures_shown():  # in the gradient phase it waits for other ranks
            return super().backward(closure_loss, *args, **kwargs)

    def _failures_shown(self) -> AbstractContextManager[None]:
        run = self._run
        if run is None or not run.in_gradient_phase:
            return nullcontext()
        return run.agreement.first_error_shown("a step under DDP", waits=False)  # the module's own work is in there

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if run.pruned is not None:
            closure = run.pruned.masking(closure)
        if run.settings.optimizer_state == "average":
            closure = self._group_numbers.noting(optimizer, closure)
        with self._first_steps.watch(optimizer):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._group_numbers.look(optimizer)
        run.rounds.keep_pruned_at_zero()
        run.count_step(optimizer)
        return output

    @override
    def on_validation_end(self) -> None:
        # after all callbacks, so that a checkpoint saved at the end of validation finds the averaged weights in place
        super().on_validation_end()
        if self._run is not None:
            self._run.mid_round.weights.leave()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # here, where all ranks come for a checkpoint; the average stays in place until the file is written, so that
        # whatever the module and the hooks of a save make of the weights is made of averaged ones
        if self._run is not None and can_meet(self._support, self._run):
            self._run.mid_round.enter_checkpoint()
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        by_lightning = partial(super().save_checkpoint, storage_options=storage_options)
        save(self, self._support, self._run, checkpoint, filepath, by_lightning)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        loaded = self._support.load_checkpoint(checkpoint_path, load, in_set_up=self._run is None)
        if loaded.begins_fit:
            recorder, method = Recorder(self._ledger), self.settings.averaging.method
            self._resume = load_own(self, recorder, loaded.checkpoint, loaded.path, method)
        return loaded.checkpoint

    # ---- Lightning's methods, each with what all strategies of ours do around it -------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._support.begin_run()

    @override
    def setup_distributed(self) -> None:
        self._support.set_up.join_ranks(super().setup_distributed)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        self._support.set_up.optimizers(partial(super().setup_optimizers, trainer))

    @override
    def teardown(self) -> None:
        self._support.tear_down(self._leave_fit, super().teardown)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._support.collectives.barrier(partial(super().barrier, *args, **kwargs))

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._support.collectives.broadcast(partial(super().broadcast, obj, src), obj)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        return self._support.collectives.reduce(partial(super().reduce, tensor, group, reduce_op), tensor)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return self._support.collectives.decide(partial(super().reduce_boolean_decision, decision, all))

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self._support.collectives.gather(partial(super().all_gather, tensor, group, sync_grads), tensor)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        self._support.remove_checkpoint(filepath, partial(super().remove_checkpoint, filepath))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _leave_fit(self) -> None:
        if self._run is not None:
            self._run.mid_round.weights.leave()
        quiet = self._run is None or self._run.overlapped.is_quiet(timeout_s=0.0)
        if not quiet and self._run is not None and dist.is_initialized():
            # other ranks are gone; a thread that wakes up while Python shuts down would take the whole process with it
            hang_up(self._group)
            quiet = self._run.overlapped.is_quiet(timeout_s=5.0)
        if self._group is not None and dist.is_initialized() and quiet:
            dist.destroy_process_group(self._group)
        self._group = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        return {**super().__getstate__(), "_run": None, "_hooks": None, "_resume": None, "_group": None}
