"""Local updates as a Lightning strategy: a thin shell that sets up, asks `core` and calls `transport`.

Longer than other files, since Lightning wants all of it in one subclass: a third are arguments and what they mean, the
rest are hooks of a few lines each.
"""

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_comm import lightning_internals
from lightning_comm.contract import RoundInForce
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update.periods import PeriodRule
from lightning_comm.ondevice.optimizer.step_messages import FirstSteps
from lightning_comm.ondevice.random_state import set_random_state
from lightning_comm.ondevice.sparse_gradients import fault_of_ddp
from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.loading import load_together
from lightning_comm.strategies.common import checks as common_checks
from lightning_comm.strategies.common import model_checks
from lightning_comm.strategies.common import rank_status as control
from lightning_comm.strategies.common.base import PeerAwareStrategy
from lightning_comm.strategies.common.hooks import Companion
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.plateau import PlateauMonitors
from lightning_comm.strategies.common.run_length import restore_accumulation, total_steps
from lightning_comm.strategies.common.unregistered import UnregisteredState
from lightning_comm.strategies.local_update import checkpoint as rank_files
from lightning_comm.strategies.local_update import checks, period_setup, run_state, start_line
from lightning_comm.strategies.local_update.group_numbers import GroupNumbers
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.strategies.local_update.settings import Round, Settings
from lightning_comm.strategies.sparse_mask import pruned_weights
from lightning_comm.transport.averaging import Averaging, broadcast_
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.model_average import fingerprint
from lightning_comm.transport.recording import Pending, Recorder, another_group, hang_up
from lightning_comm.transport.stop_protocol import Agreement, default_store

_T = TypeVar("_T")
_fits = itertools.count()  # tells the keys of one run in the store from those of the next; equal on all ranks


class LocalUpdateStrategy(PeerAwareStrategy):
    """Train ranks apart, and average their parameters once a round.

    No gradient is sent. Every rank takes optimizer steps on its own data; when a round is over, the parameters are
    averaged in place. How long a round is, a :class:`PeriodRule` says: a constant period is Local SGD, and
    :class:`QuadraticPeriod` is QSR, whose rounds grow as the learning rate falls.

    Registered as ``local_sgd`` (period 8), ``post_local_sgd`` (gradients for the first half of the run, then period 8)
    and ``qsr``, each also with ``_spawn``, ``_fork`` and ``_notebook`` for the way processes are started.

    Args:
        period: How long rounds are, in optimizer steps.
        gradient_steps: Until then gradients are averaged by DDP at every step, exactly as under ``ddp``. A number of
            steps of the counted optimizer, or a float from 0.0 to 1.0: a share of the steps that the run takes. A run
            is one ``fit`` with those that resume it by ``ckpt_path``; any other ``fit``, also of the same Trainer,
            counts from its own start. Under manual optimization the length of a run is not known, so give a number.
        warmup_steps: How long rounds keep the rule's shortest period: a number of optimizer steps, or ``"auto"``: the
            first round, and as long as rounds start at ever higher learning rates.
        optimizer_state: ``"local"``: every rank keeps its momenta, as the authors of QSR do; ``"average"``: they are
            averaged with the parameters.
        buffers: ``"average"``: floating-point buffers (BatchNorm statistics) are averaged with the parameters and
            others taken from rank 0; ``"keep"``: every rank keeps its own.
        evaluate_weights: What validation within ``fit`` sees in the middle of a round: ``"average"``, a temporary
            average, or ``"local"``, each rank its own weights. Checkpoints always hold averaged weights.
        averaging: How averages are carried out, in full or compressed; ``None`` for the defaults of :class:`Averaging`.
        counted_optimizer: Under manual optimization with several optimizers, the index of the one whose steps count.
            All parameters are averaged, whichever optimizer they belong to.
        find_unused_parameters: For DDP in the gradient phase.
        accelerator: As in Lightning's ``DDPStrategy``, and so are the arguments below.
        parallel_devices: Set by the Trainer.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: How files are written.
        precision_plugin: Set by the Trainer.
        process_group_backend: ``"gloo"`` or ``"nccl"``; chosen by the device if left out. Where something that is
            averaged lies on the CPU and the model on a GPU: ``"cpu:gloo,cuda:nccl"``.
        timeout: How long a rank waits for the others in a synchronisation. Ranks of unequal speed drift apart within a
            round, so long rounds may want more than the default half hour. When the job starts, ten minutes at least.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* In a round: none. At its end one all-reduce for each bucket of parameters, then of buffers and
        of optimizer state where these are averaged, and one row of 8 numbers from each rank. Mid-round validation and
        checkpoints average as well, recorded as ``"evaluation"`` and ``"checkpoint"``.

        *Weights.* All ranks count equally, unless a callback asks with :meth:`weigh_by_samples` that each counts for
        its share of the samples that all trained on since the last synchronisation. Then rows have 9 numbers, and
        before the average for a checkpoint, or at an end of unknown length, there is one more row. Where the length of
        an epoch is not sure, or the module steps by itself, ranks tell each other through the store of the process
        group which batch they begin and where an epoch ends; that is no collective and not in the ledger.

        *Memory.* Three buckets of scratch, which are kept. A second copy of the averaged tensors exists only while
        averaged weights are evaluated or saved in the middle of a round; where a ``CheckpointIO`` that is not
        Lightning's own writes the file, rank 0 has a third copy of those that are saved, until it is written.

        *Resuming* is exact, on CPU bit for bit; in a gradient phase on 2 ranks. On 3 and more the first step after a
        resume there may differ by rounding, since DDP fills its first buckets in another order than later ones.

        *What is set meanwhile stays.* Parameters and buffers that the module, a callback or an optimizer sets while
        averaged weights are in place, as a threshold or restored weights at the end of a validation, keep their new
        values; all others get this rank's own back. To see that the model is read twice a validation in mid-round, and
        once more for a full checkpoint.

        *Where to look.* ``strategy.ledger`` has every message, ``strategy.history`` every synchronisation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import LocalUpdateStrategy, QuadraticPeriod
        >>> strategy = LocalUpdateStrategy(QuadraticPeriod(alpha=0.0175, h_base=4, h_max=1000))
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    References:
        X. Gu et al. `A Quadratic Synchronization Rule for Distributed Deep Learning
        <https://arxiv.org/abs/2310.14423>`_. ICLR 2024.
        T. Lin et al. `Don't Use Large Mini-Batches, Use Local SGD <https://arxiv.org/abs/1808.07217>`_. ICLR 2020.

    """

    def __init__(  # noqa: PLR0913  (the last eight are Lightning's)
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
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
        )
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
        self._ledger = CommLedger()
        self._samples = SampleWeights()
        self._run: LocalUpdateRun | None = None
        self._resume: rank_files.Resume | None = None
        self._logs_checked = 0
        self._group: dist.ProcessGroup | None = None
        self._unregistered: UnregisteredState | None = None
        self._first_steps = FirstSteps("LocalUpdateStrategy")
        self._group_numbers = GroupNumbers("LocalUpdateStrategy")

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
        return self._run.rounds_done if self._run is not None else 0

    @property
    def averages_gradients(self) -> bool:
        """Whether DDP averages gradients at every step now; before training starts, whether it does so at first."""
        if self._run is None or not self._run.active:
            return self.settings.starts_with_gradients
        return self._run.in_gradient_phase

    @property
    def round_in_force(self) -> RoundInForce:
        """The round that this rank is in."""
        run = self._run
        if run is None or not run.active:
            return RoundInForce(0, None)
        clock = run.clock
        steps = clock.round_ends_at - clock.round_started_at if clock.in_round else 0
        return RoundInForce(steps, None if clock.total_steps is None else clock.total_steps - run.began_at)

    @property
    def gradient_phase_steps(self) -> int:
        """Optimizer steps at the start of the run at which gradients are averaged; 0 before training starts."""
        run = self._run
        return max(0, run.gradient_steps - run.began_at) if run is not None and run.active else 0

    def shorten_gradient_phase(self, steps: int) -> None:
        """Let rounds begin after so many steps of the run, if that is sooner; from the first batch on, before its step.

        For trials of a few steps, on all ranks alike.

        Raises:
            RuntimeError: Outside of training.
            ValueError: If that is not a whole number >= 0.

        """
        run = self._run
        if run is None or not run.active:
            raise RuntimeError(
                f"LocalUpdateStrategy: `shorten_gradient_phase({steps!r})` is for a fit that trains, and none does. "
                "Call it from a callback, from its first `on_train_batch_start` on."
            )
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(
                "LocalUpdateStrategy: `steps` of `shorten_gradient_phase` counts optimizer steps, so it must be a "
                f"whole number >= 0; got {steps!r}. 0 begins with rounds."
            )
        was_in_gradient_phase = run.in_gradient_phase
        run.gradient_steps = min(run.gradient_steps, run.began_at + steps)
        if was_in_gradient_phase and not run.in_gradient_phase:
            self._unwrap_ddp()

    def weigh_by_samples(self) -> None:
        """Let each rank count for its share of the samples of a round, in all that is averaged in this ``fit``.

        For callbacks, in ``setup`` for ``fit``, on all ranks.
        """
        self._samples.begin()

    def count_samples(self, samples: int) -> None:
        """Count the samples that this rank trains on in the batch that has begun; 0 for one that keeps it in step.

        For callbacks, at every training batch before its end.

        Raises:
            ValueError: If that is not a whole number >= 0.

        """
        self._samples.count(samples)

    def take_into_average(self, tensors: Iterable[Tensor]) -> None:
        """Let buffers or parameters that were renewed for a validation be taken out with the average that it sees.

        For callbacks, within a validation. Without this, what is set while an average is in place stays.
        """
        if self._run is not None:
            self._run.replica.take_into_average(tensors)

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        callbacks: list[Any] = getattr(model.trainer, "callbacks", [])
        common_checks.check_twin_callbacks(callbacks, "LocalUpdateStrategy")
        callbacks[:] = [
            Companion(self),
            *(callback for callback in callbacks if not isinstance(callback, Companion)),
        ]
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._run = self._resume = None
            self._ledger = CommLedger()
            self._samples = SampleWeights()
            self._logs_checked = 0
            self._unregistered = None
            self._first_steps = FirstSteps("LocalUpdateStrategy")
            self._group_numbers = GroupNumbers("LocalUpdateStrategy")
        elif self._run is not None:
            self._run.keep_random_state()  # an evaluation draws from the generators

    @property
    @override
    def _agreement(self) -> Agreement | None:
        return self._run.agreement if self._run is not None else None

    @override
    def setup(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        module = self.lightning_module
        assert module is not None
        with self._refusals("LocalUpdateStrategy") as refusals:
            refusals.add(common_checks.trainer_problems(trainer, self._layer_sync is not None))
            refusals.add(common_checks.module_problems(module))
            if self.settings.starts_with_gradients:
                refusals.add(model_checks.trained_problems(module))
            refusals.add(checks.length_problems(trainer, module, self.settings))
            self._set_up(trainer, refusals)
            refusals.add(common_checks.device_problems(trainer, module))
            refusals.add(checks.optimizer_problems(module, self.optimizers, self.settings))
            refusals.add(
                period_setup.period_problems(self.optimizers, self.settings, rank_files.saved_alpha(self._resume))
            )
            if isinstance(self.settings.averaging.method, SparseMask):
                refusals.add(pruned_weights.optimizer_problems(self.optimizers))
        if self.settings.starts_with_gradients and (fault := fault_of_ddp(module, self.world_size)) is not None:
            rank_zero_warn(f"LocalUpdateStrategy, in its gradient phase: {fault}")
        store = default_store() if self._peers is None else self._peers.store
        namespace = f"lightning_comm/{next(_fits)}"
        agreement = Agreement(store, self.global_rank, self.world_size, namespace, peers=self._peers)
        ends = self._epoch_ends(agreement, store, namespace, "LocalUpdateStrategy")
        recorder, background = Recorder(self._ledger), None
        if self.settings.averaging.overlap_steps:
            self._meet_before_groups()
            with self._first_error_shown("the set-up of a process group"):
                self._group = another_group(self._timeout)
            background = Recorder(self._ledger, self._group, beside_compute=True, hold=True)
        self._run = LocalUpdateRun(
            trainer,
            module,
            lambda: self.optimizers,
            self.settings,
            recorder,
            agreement,
            ends,
            self._unwrap_ddp,
            background,
        )
        self._run.samples = self._samples
        self._interruptions = Interruptions(
            trainer, self._run, lambda vote: self.reduce_boolean_decision(vote, all=False), "LocalUpdateStrategy"
        )
        self._interruptions.install_signal_handlers()

    @override
    def configure_ddp(self) -> None:
        if self.settings.starts_with_gradients or model_checks.lazy_names(self.lightning_module):
            super().configure_ddp()  # DDP compares the models and gives all ranks the weights of rank 0
            return
        assert self.model is not None
        recorder = Recorder(self._ledger)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        row = control.ControlRow(layout=fingerprint(named))
        with self._first_error_shown("the set-up"):
            rows = control.exchange(row, recorder, self.root_device, Pending.wait)
        control.check_same_model(rows, "LocalUpdateStrategy")
        with self._first_error_shown("the set-up"), torch.no_grad():
            bucket_bytes = self.settings.averaging.bucket_bytes_under(backend_of(self.root_device))
            broadcast_([tensor for _, tensor in named], recorder, "start", bucket_bytes)

    def _unwrap_ddp(self) -> None:
        """End the gradient phase. Dropping the wrapper frees its buckets and takes its hooks off the parameters."""
        self.model = self.lightning_module

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        run, trainer = self._run, self._trainer
        assert run is not None
        assert trainer is not None
        assert self._interruptions is not None
        if not any(isinstance(callback, Companion) for callback in getattr(trainer, "callbacks", [])):
            return  # a trial run of a learning-rate finder, which sets callbacks aside and undoes all that it did
        lightning_internals.load_skipped_loader_states(trainer)
        restore_accumulation(trainer)
        run.check_start(float(trainer.num_training_batches))
        resume = self._resume or rank_files.Resume(None, None)
        run_state.begin_count(run, resumed=self._resume is not None, shared=resume.shared)
        total = total_steps(trainer, run.clock.steps_done)
        length = None if total is None else total - run.began_at
        alpha = rank_files.saved_alpha(self._resume)
        run.set_period(period_setup.resolved_period(trainer, run.settings, length, alpha), total)
        automatic = trainer.lightning_module.automatic_optimization
        run.gradient_steps = run.began_at + checks.gradient_steps(run.settings, length, automatic=automatic)
        checks.warn_at_start(trainer, run.settings, length, self.world_size)
        self._unregistered = UnregisteredState("LocalUpdateStrategy", trainer, trainer.lightning_module)
        run.replica.begin_round()
        own = resume.own
        run_state.take_up(run, resume.shared, own, resume.masks)
        if run.pruned is not None:
            run.pruned.start(trainer, self.optimizers)  # here, since optimizer states have been restored
            run.recorder.step = run.clock.steps_done
        if self.settings.starts_with_gradients and not run.in_gradient_phase:
            self._unwrap_ddp()
        if self.world_size > 1:
            rank_zero_info(f"LocalUpdateStrategy: {start_line.plan_of(trainer, run)}")
        self._interruptions.install(after_save=run.leave_checkpoint)
        patches = self._interruptions.patches
        PlateauMonitors(
            trainer,
            patches,
            run.recorder,
            run.agreement,
            self.root_device,
            "LocalUpdateStrategy",
            run.before_other_messages,
        )
        self._resume = None
        if own is not None:
            set_random_state(own["random"])  # last, since what comes before may draw from the generators
            if own["epoch_is_over"]:
                lightning_internals.begin_loaders_again(trainer)

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
        run.keep_pruned_at_zero()
        run.count_step(optimizer)
        return output

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # behind all callbacks and the module, so that a learning rate set there counts for the round that begins
        if self._run is not None and self._interruptions is not None and self._run.active:
            self._interruptions.begin_batch()
            self._run.begin_batch(batch_idx + 1)

    def end_batch(self) -> None:
        """Called by the companion after every training batch and its schedulers, before any other callback."""
        assert self._run is not None
        assert self._trainer is not None
        logged = lightning_internals.number_of_logged_metrics(self._trainer)
        if logged > self._logs_checked:
            self._logs_checked = logged
            common_checks.warn_of_per_step_sync(self._trainer, "LocalUpdateStrategy")
        rounds = self._run.rounds_done
        self._run.end_batch()
        if self._run.active and self._trainer.is_last_batch:
            self._run.end_epoch()  # here, since it ends with a validation
        if self._unregistered is not None and (self._run.rounds_done > rounds or self._unregistered.is_new):
            self._unregistered.look()

    def end_epoch(self) -> None:
        """Called by the companion at the end of a training epoch."""
        assert self._run is not None
        assert self._trainer is not None
        if self._run.active:
            self._run.end_epoch()  # where the last batch was not known to be the last
        checks.warn_of_uncounted_steps(self._run.clock.steps_done)
        if self._trainer.num_training_batches == float("inf"):
            self._run.meet_at_epoch_end()

    def finish(self) -> None:
        """Called by the companion when training ends, before any other callback."""
        if self._run is not None:
            self._run.finish()

    def begin_evaluation(self) -> None:
        """Called by the companion when validation starts: puts averaged weights in place."""
        run, trainer = self._run, self._trainer
        if run is None or trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._interruptions is not None:
            self._interruptions.remember_random_state()
            self._interruptions.met |= run.apart and run.settings.evaluate_weights == "average"
        run.compare_places("a validation")
        if run.settings.evaluate_weights == "average":
            run.enter_average("evaluation")

    @override
    def on_validation_end(self) -> None:
        # after all callbacks, so that a checkpoint saved at the end of validation finds the averaged weights in place
        super().on_validation_end()
        if self._run is not None:
            self._run.replica.leave_average()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # here, where all ranks come for a checkpoint; the average stays in place until the file is written, so that
        # whatever the module and the hooks of a save make of the weights is made of averaged ones
        run, trainer = self._run, self._trainer
        if run is not None and trainer is not None and self._is_fitting() and not (trainer.interrupted or run.failed):
            run.enter_checkpoint()
        return super().lightning_module_state_dict()

    @override
    def _compare_places(self, purpose: str) -> None:
        if self._run is not None:
            self._run.compare_places(purpose)

    @override
    def _together(self, collective: Callable[[], _T], alone: _T, where: str) -> _T:
        if self._run is not None and not (self._run.failed or self._run.trainer.interrupted):
            self._run.before_other_messages()
        return super()._together(collective, alone, where)

    def _is_fitting(self) -> bool:
        """Whether ranks run under the strategy's rounds, or did in the last ``fit``; not in a tuner's trial run."""
        run = self._run
        return self._has_fitted(run) and run is not None and run.active

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        run, trainer = self._run, self._trainer
        failed = trainer is not None and (trainer.interrupted or (run is not None and run.failed))
        if failed:  # and no collective would end
            filepath = sets.incomplete_path(self, rank_files.WHERE, filepath)
            if run is not None and self._is_fitting():
                rank_files.mark_incomplete(run, checkpoint, filepath)
        if run is None or trainer is None or failed or not self._is_fitting():
            if run is not None and run.module is not self.lightning_module:
                common_checks.leave_out_other_model("LocalUpdateStrategy", checkpoint, filepath)
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        try:
            with run.agreement.first_error_shown("a checkpoint", waits=False):  # rank 0 writes in there
                save = rank_files.write(self, run, checkpoint, filepath)
                if self.is_global_zero:
                    checkpoint = rank_files.kept_from_change(checkpoint, run.replica, self.checkpoint_io)
                write = partial(super().save_checkpoint, checkpoint, save.path, storage_options)
                sets.write_main(self, run.recorder, rank_files.WHERE, save, write)
        finally:
            run.leave_checkpoint()

    @override
    def report_failure(self, exception: BaseException) -> None:
        if self._run is not None:
            self._run.replica.leave_average()
        super().report_failure(exception)
        if self._run is not None:
            self._run.failed = True

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        checkpoint_path, checkpoint = load_together(
            self, rank_files.WHERE, checkpoint_path, load, self._refuse_together, in_set_up=self._run is None
        )
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self._run is not None:
            return checkpoint  # not for `fit`, or a tuner within it puts back what it has changed
        recorder, method = Recorder(self._ledger), self.settings.averaging.method
        self._resume = rank_files.load(self, recorder, checkpoint, checkpoint_path, method)
        return checkpoint

    @override
    def teardown(self) -> None:
        if self._interruptions is not None:
            self._interruptions.undo()
            self._interruptions = None
        if self._run is not None:
            self._run.replica.leave_average()
        quiet = self._run is None or self._run.replica.is_quiet(timeout_s=0.0)
        if not quiet and self._run is not None and dist.is_initialized():
            # other ranks are gone; a thread that wakes up while Python shuts down would take the whole process with it
            hang_up(self._group)
            quiet = self._run.replica.is_quiet(timeout_s=5.0)
        if self._group is not None and dist.is_initialized() and quiet:
            dist.destroy_process_group(self._group)
        self._group = None
        super().teardown()

    @override
    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        return {
            **super().__getstate__(),
            "_run": None,
            "_interruptions": None,
            "_trainer": None,
            "_resume": None,
            "_group": None,
            "_unregistered": None,
        }
