"""Cyclic Data Parallelism as a Lightning strategy: a thin shell that sets up, asks `core` and calls `transport`.

Longer than other files, since Lightning wants all of it in one subclass: a third are arguments and what they mean, the
rest are hooks of a few lines each.
"""

import itertools
import os
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_comm import lightning_internals
from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.cyclic.update import ClipBy
from lightning_comm.ondevice.optimizer.step_messages import FirstSteps
from lightning_comm.ondevice.random_state import set_random_state
from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.entry import Save
from lightning_comm.strategies.checkpoints.loading import load_together
from lightning_comm.strategies.common import checks
from lightning_comm.strategies.common import rank_status as control
from lightning_comm.strategies.common.base import PeerAwareStrategy
from lightning_comm.strategies.common.hooks import Companion
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.model_checks import lazy_names
from lightning_comm.strategies.common.plateau import PlateauMonitors
from lightning_comm.strategies.common.unregistered import UnregisteredState
from lightning_comm.strategies.cyclic import (
    checkpoint as cyclic_files,
)
from lightning_comm.strategies.cyclic import (
    clipping as cyclic_clipping,
)
from lightning_comm.strategies.cyclic import (
    refusals as cyclic_checks,
)
from lightning_comm.strategies.cyclic import step_errors
from lightning_comm.strategies.cyclic.averages import WeightAverages
from lightning_comm.strategies.cyclic.checkpoint import CyclicResume
from lightning_comm.strategies.cyclic.run import RUN_END, CyclicRun
from lightning_comm.strategies.cyclic.settings import WHERE, CyclicSettings, checked, rank_problems
from lightning_comm.transport.averaging import broadcast_
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.cyclic.requests import Requests
from lightning_comm.transport.model_average import fingerprint
from lightning_comm.transport.plain_data import broadcast_json
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.stop_protocol import Agreement, default_store

_BUCKET_BYTES = 2**25  # of the broadcast at the start
_fits = itertools.count()  # tells the keys of one run in the store from those of the next; equal on all ranks


class CyclicStrategy(PeerAwareStrategy):
    """Let ranks take turns: gradients and new parameters travel round a ring, stage by stage, beside compute.

    The model is cut into *stages* in the order in which its modules run. As soon as backward has passed a stage, its
    gradient is added to the sum that comes round the ring; at its end the stage's *owner* updates it, and the new
    version goes on round the ring. No rank waits for all others at the end of a step. Instead some compute with
    parameters that are one update old: under rule ``"v2"`` a rank uses the newest version where its turn comes late
    enough for it, (N - 1) / 2N of all stages and ranks are stale, and under ``"v1"`` all are.

    Registered as ``cyclic`` and ``cyclic_v1``, each also with ``_spawn``, ``_fork`` and ``_notebook`` for the way
    processes are started.

    Args:
        rule: ``"v2"`` or ``"v1"``, as above.
        lag: For rule ``"v2"`` with as many stages as ranks: so many ranks more are stale at each stage. 1 takes away
            the messages without slack, and the number of ranks gives ``"v1"``.
        warmup_sync_steps: So many optimizer steps at first all compute with the newest parameters, as under DDP. They
            count from the beginning of the run: a ``fit`` and those that resume it.
        stages: How many, a multiple of the number of ranks; or the name of the first module of each
            (:attr:`stages_by_first_module` of an earlier run); ``None`` for three for each rank where the model has as
            many modules. A number is cut so that stages share the multiply-adds and the bytes about equally, counted in
            the first forward.
        stagger: ``"step"``: each rank starts a batch 1/N of its time after the one before it, which lowers the sum of
            activations where ranks share a memory, and costs about what a barrier costs; ``"none"``: ranks start when
            they can.
        clip_norm: The largest norm of a gradient, where the Trainer does not say it; ``None`` leaves it to
            ``Trainer(gradient_clip_val=...)``.
        clip_by: By which norm, since that of the whole gradient is not known when the first stages are updated.
            ``"stage"``: each stage's gradient is clipped by its own; ``"previous_norm"``: by the norm of the whole
            gradient of the step before, and in the first step by stage. ``None`` takes ``"stage"`` for ``clip_norm``,
            and is refused where the Trainer clips by norm. ``gradient_clip_algorithm="value"`` needs no choice.
        accelerator: As in Lightning's ``DDPStrategy``, and so are the arguments below.
        parallel_devices: Set by the Trainer.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: How files are written.
        precision_plugin: Set by the Trainer.
        process_group_backend: ``"gloo"`` or ``"nccl"``; chosen by the device if left out. With ``"gloo"`` messages of
            CUDA devices go through pinned memory of the host.
        timeout: How long a rank waits for the others; when the job starts, ten minutes at least.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At set-up, if the Trainer, the model or the optimizer cannot work with it.

    Note:
        *Communication.* For each stage and step the gradient goes from rank to rank in N - 1 messages, and so does the
        new version: 2 (N - 1) / N of the model a rank and step, as in a ring all-reduce, from neighbour to neighbour.
        Each message has 64 bytes of notes, by which ranks agree on stops and hear of losses that are not finite.

        *Flush.* Before validation, checkpoints and the end of training all ranks take up the newest version of
        everything, and average buffers (BatchNorm) and what has changed of parameters that no stage has (a teacher).
        The step after a flush computes with it everywhere, so where flushes fall is a part of the run.

        *Gradients.* Are handed over during backward, so ``on_after_backward`` and ``on_before_optimizer_step`` find
        none; under manual optimization they are when the optimizer's ``step`` is called, and this rank's own before.
        Hooks of parameters see those of this rank.

        *Averages of weights.* Before one of Lightning's callbacks takes the weights into its average, all ranks flush.

        *Weights between steps* are those that this rank computed with. If something else than the optimizer changes
        them, or changes the optimizer's state, the run ends with an error that names it.

        *Memory.* Optimizer state of the owned stages only, 1/N; a copy of these stages; and up to two versions of
        other stages that wait to be taken up. Gradients live until their stage is sent.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import CyclicStrategy
        >>> strategy = CyclicStrategy(rule="v2", warmup_sync_steps=100)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)

    References:
        L. Fournier, E. Oyallon. `Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks
        <https://arxiv.org/abs/2403.08837>`_. 2024.

    """

    def __init__(  # noqa: PLR0913  (the last eight are Lightning's)
        self,
        rule: Rule = "v2",
        *,
        lag: int = 0,
        warmup_sync_steps: int = 0,
        stages: int | list[str] | None = None,
        stagger: Literal["none", "step"] = "none",
        clip_norm: float | None = None,
        clip_by: ClipBy | None = None,
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
        )
        self.settings = checked(CyclicSettings(rule, lag, warmup_sync_steps, stages, stagger, clip_norm, clip_by))
        self._ledger = CommLedger()
        self._run: CyclicRun | None = None
        self._resume: CyclicResume | None = None
        self._logs_checked = 0
        self._warned_of_gradients = False
        self._unregistered: UnregisteredState | None = None
        self._first_steps = FirstSteps(WHERE)
        self._patches = lightning_internals.Patches()
        self._averages = WeightAverages()

    # ---- what can be seen ----------------------------------------------------------------------------------------

    @property
    def ledger(self) -> CommLedger:
        """Every message of the last or current run that this rank sent, and how long compute waited for others."""
        return self._ledger

    @property
    def schedule(self) -> CyclicSchedule | None:
        """The rules of the last or current ``fit``, once the model is cut into stages."""
        return self._run.schedule if self._run is not None else None

    @property
    def stage_names(self) -> list[list[str]]:
        """The names of the parameters of each stage, once the model is cut."""
        return [list(stage.parameters) for stage in self._run.stages] if self._run is not None else []

    @property
    def stages_by_first_module(self) -> list[str]:
        """The name of the first module of each stage, once the model is cut: for ``stages`` of another run."""
        return [stage.modules[0] for stage in self._run.stages] if self._run is not None else []

    @property
    def optimizer_state_bytes(self) -> int:
        """The bytes of optimizer state that this rank holds."""
        optimizer = self._run.optimizer if self._run is not None else None
        return optimizer.state_bytes() if optimizer is not None else 0

    # ---- set-up --------------------------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        callbacks: list[Any] = getattr(model.trainer, "callbacks", [])
        checks.check_twin_callbacks(callbacks, WHERE)
        callbacks[:] = [Companion(self), *(each for each in callbacks if not isinstance(each, Companion))]
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._run = self._resume = None
            self._ledger = CommLedger()
            self._logs_checked = 0
            self._warned_of_gradients = False
            self._unregistered = None
            self._first_steps = FirstSteps(WHERE)
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
        with self._refusals(WHERE) as refusals:
            refusals.add(rank_problems(self.settings, self.world_size))
            device = self.root_device
            refusals.add(cyclic_checks.backend_problems(backend_of(device), device.type, self.world_size, os.environ))
            refusals.add(cyclic_checks.trainer_problems(trainer, self._layer_sync is not None))
            refusals.add(cyclic_clipping.problems(self.settings, trainer, module))
            refusals.add(cyclic_checks.module_problems(module))
            self._set_up(trainer, refusals)
            refusals.add(cyclic_checks.optimizer_problems(module, self.optimizers))
        self._meet_before_groups()
        optimizer = self.optimizers[0]
        cyclic_checks.warn_of_one_process(self.world_size)
        cyclic_checks.warn_of_gradient_hooks(trainer, module)
        cyclic_checks.warn_of_finetuning(trainer)
        cyclic_checks.warn_of_memory(self.settings, self.world_size, self.root_device.type == "cuda")
        namespace = f"lightning_comm/cyclic/{next(_fits)}"
        store = default_store() if self._peers is None else self._peers.store
        agreement = Agreement(
            store, self.global_rank, self.world_size, namespace, poll_interval_s=1.0, peers=self._peers
        )
        self._run = CyclicRun(
            trainer,
            module,
            optimizer,
            self.settings,
            self._ledger,
            agreement,
            Requests(store, self.global_rank, namespace),
            lambda names: self._together(
                lambda: broadcast_json(names, Recorder(self._ledger), self.root_device, "control"), names, "the cut"
            ),
            self._timeout or timedelta(minutes=30),
            self._epoch_ends(agreement, store, namespace, WHERE),
        )
        self._interruptions = Interruptions(
            trainer, self._run, lambda vote: self.reduce_boolean_decision(vote, all=False), WHERE
        )
        self._interruptions.install_signal_handlers()

    @override
    def configure_ddp(self) -> None:
        if lazy_names(self.lightning_module):
            return  # refused when the set-up ends, with what else there is
        assert self.model is not None
        recorder = Recorder(self._ledger)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        row = control.ControlRow(layout=fingerprint(named))
        with self._first_error_shown("the set-up"):
            rows = control.exchange(row, recorder, self.root_device, Pending.wait)
        control.check_same_model(rows, WHERE)
        with self._first_error_shown("the set-up"), torch.no_grad():
            broadcast_([tensor for _, tensor in named], recorder, "start", _BUCKET_BYTES)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        run, trainer = self._run, self._trainer
        assert run is not None
        assert trainer is not None
        assert self._interruptions is not None
        if not any(isinstance(callback, Companion) for callback in getattr(trainer, "callbacks", [])):
            # a trial run of a learning-rate finder, which sets callbacks aside and undoes all that it did
            cyclic_checks.check_trial(run.active, run.steps_done)
            return
        lightning_internals.load_skipped_loader_states(trainer)
        run.check_start(float(trainer.num_training_batches))
        resume, self._resume = self._resume or CyclicResume(run_began_at=trainer.global_step), None
        steps_done = trainer.global_step if resume.steps_done is None else resume.steps_done
        run.start(steps_done, resume.stages, resume.previous_norm, resume.run_began_at)
        self._averages = WeightAverages()
        self._unregistered = UnregisteredState(WHERE, trainer, run.module)
        if resume.ledger is not None:
            self._ledger.load_state_dict(resume.ledger)
        self._interruptions.install()
        self._interruptions.before_validation(self.begin_evaluation)
        PlateauMonitors(trainer, self._interruptions.patches, run.recorder, run.agreement, self.root_device, WHERE)
        lightning_internals.clip_what_is_there(trainer, self._patches)
        lightning_internals.before_weight_averages(trainer, self._patches, self._before_average)
        if resume.random is not None:
            set_random_state(resume.random)  # last, since what comes before may draw from the generators
            if resume.epoch_is_over:
                lightning_internals.begin_loaders_again(trainer)

    # ---- steps ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._interruptions is not None and self._run is not None and self._run.active:
            self._interruptions.begin_batch()
            self._run.begin_batch(batch_idx + 1)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return super().training_step(*args, **kwargs)
        self._run.steps.begin_forward()
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            if self._run.active and step_errors.is_of_whole_graph(error):
                raise step_errors.compiled_whole_graph(error) from error
            raise
        finally:
            self._run.steps.end_forward()

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._run is not None:
            self._run.steps.begin_backward(closure_loss)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(closure_loss, *args, **kwargs)
        except RuntimeError as error:
            if self._run is not None and self._run.active and "modified by an inplace operation" in str(error):
                raise step_errors.used_before_its_module(error) from error
            raise

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._run is not None:
            self._run.steps.end_backward()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        at_once = lightning_internals.is_own_closure(closure)
        if not at_once and run.active and not self._warned_of_gradients and self.lightning_module is not None:
            self._warned_of_gradients = True
            step_errors.warn_of_own_gradients(self.lightning_module)
        run.steps.step_is_due(getattr(optimizer, "_optimizer", optimizer), at_once=at_once)
        # the closure hands all gradients over, so that the optimizer itself finds nothing to step on
        closure = step_errors.once(run.steps.complete(closure), optimizer)
        try:
            with self._first_steps.watch(optimizer):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
        except BaseException:
            run.steps.step_failed()
            raise
        run.steps.count_step()
        return output

    def end_batch(self) -> None:
        """Called by the companion after every training batch and its schedulers, before any other callback."""
        assert self._run is not None
        assert self._trainer is not None
        logged = lightning_internals.number_of_logged_metrics(self._trainer)
        if logged > self._logs_checked:
            self._logs_checked = logged
            checks.warn_of_per_step_sync(self._trainer, WHERE)
        self._run.end_batch()
        if self._run.active and self._trainer.is_last_batch:
            self._run.end_epoch()  # here, since it ends with a validation
        if self._unregistered is not None and self._unregistered.is_new:
            self._unregistered.look()

    def end_epoch(self) -> None:
        """Called by the companion at the end of a training epoch."""
        assert self._run is not None
        assert self._trainer is not None
        if self._run.active:
            self._run.end_epoch()  # where the last batch was not known to be the last

    # ---- meeting -------------------------------------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """Called by the companion when validation starts: all ranks take up the newest parameters."""
        run, trainer = self._run, self._trainer
        if run is None or trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._interruptions is not None:
            self._interruptions.remember_random_state()
            self._interruptions.met |= not run.flushed
        self._flush(run, "a validation")

    def finish(self) -> None:
        """Called by the companion when training ends, before any other callback."""
        if self._run is not None:
            self._flush(self._run, RUN_END)
            self._run.finish()

    def _before_average(self, callback: Callback) -> None:
        """Take up the newest parameters for an average of weights, of one version and the same on all ranks."""
        run = self._run
        if run is not None and run.active:
            self._averages.count(callback, run.steps_done)
            with self._averages.explained(callback, run.steps_done):
                self._flush(run, f"an update of the average of {type(callback).__name__}")

    def _flush(self, run: CyclicRun, purpose: str) -> None:
        if run.active:
            newest = run.flushed
            run.flush(purpose)
            if self._unregistered is not None and not newest:
                self._unregistered.look()

    @override
    def _compare_places(self, purpose: str) -> None:
        if self._run is not None and self._trainer is not None and not self._trainer.interrupted:
            self._run.compare_places(purpose)

    def _can_meet(self) -> bool:
        """Whether ranks can be brought together for a checkpoint: in the last ``fit`` of this model, or after it."""
        run, trainer = self._run, self._trainer
        return (
            run is not None
            and trainer is not None
            and self._has_fitted(run)
            and not (trainer.interrupted or run.failed)
        )

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # here, where all ranks come for a checkpoint
        if self._run is not None and self._can_meet():
            self._flush(self._run, "a checkpoint")
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        run = self._run
        if run is None or not self._can_meet():
            return super().optimizer_state(optimizer)
        return cyclic_files.gathered_state(run, getattr(optimizer, "_optimizer", optimizer))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        run, trainer = self._run, self._trainer
        meets = run is not None and self._can_meet()
        if meets and run is not None and "optimizer_states" in checkpoint:
            cyclic_files.write(run, checkpoint)
        elif not meets and trainer is not None and (trainer.interrupted or (run is not None and run.failed)):
            filepath = sets.incomplete_path(self, WHERE, filepath)
            if run is not None and self._has_fitted(run) and run.stages:
                cyclic_files.mark_incomplete(checkpoint, filepath)
        elif run is not None and run.module is not self.lightning_module:
            checks.leave_out_other_model(WHERE, checkpoint, filepath)
        if not meets or run is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        save = Save(str(filepath))
        save.write(checkpoint)
        write = partial(super().save_checkpoint, checkpoint, filepath, storage_options)
        with run.agreement.first_error_shown("a checkpoint", waits=False):  # rank 0 writes in there
            sets.write_main(self, run.recorder, WHERE, save, write)

    @override
    def report_failure(self, exception: BaseException) -> None:
        super().report_failure(exception)
        if self._run is not None:
            self._run.failed = True

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        checkpoint_path, checkpoint = load_together(
            self, WHERE, checkpoint_path, load, self._refuse_together, in_set_up=self._run is None
        )
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self._run is not None:
            return checkpoint  # not for `fit`, or a tuner within it puts back what it has changed
        self._resume = cyclic_files.load(checkpoint, checkpoint_path, self.global_rank, self.world_size)
        return checkpoint

    @override
    def teardown(self) -> None:
        self._patches.undo()
        if self._interruptions is not None:
            self._interruptions.undo()
            self._interruptions = None
        if self._run is not None and self._run.active:
            self._run.abandon()
        elif self._run is not None and dist.is_initialized():
            self._run.leave()
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
            "_unregistered": None,
            "_patches": lightning_internals.Patches(),
        }
