"""The Lightning strategy of Cyclic Data Parallelism: a shell that hands Lightning's calls on.

Longer than other files, since Lightning needs all of it in one subclass. The work is done by the run, by its hooks and
by what all strategies share (:mod:`lightning_comm.strategies.common`).
"""

import os
from collections.abc import Iterable
from datetime import timedelta
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

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.lightning_internals import is_own_closure, load_skipped_loader_states
from lightning_comm.ondevice.cyclic.update import ClipBy
from lightning_comm.ondevice.optimizer.step_messages import FirstSteps
from lightning_comm.strategies.checkpoints.whole_files import with_default
from lightning_comm.strategies.common.hooks import has_hook_callback
from lightning_comm.strategies.common.launching import LaunchingArguments, launching_arguments
from lightning_comm.strategies.common.support import RunSupport, restore_random_state
from lightning_comm.strategies.cyclic import clipping, refusals, step_errors
from lightning_comm.strategies.cyclic.checkpoint import (
    CyclicResume,
    gathered_state,
    load_own,
    write_alone,
    write_together,
)
from lightning_comm.strategies.cyclic.hooks import CyclicHooks
from lightning_comm.strategies.cyclic.run import CyclicRun
from lightning_comm.strategies.cyclic.settings import WHERE, CyclicSettings, checked, rank_problems
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.cyclic.requests import Requests
from lightning_comm.transport.plain_data import broadcast_json
from lightning_comm.transport.recording import Recorder

_BUCKET_BYTES = 2**25  # of the broadcast at the start


class CyclicStrategy(DDPStrategy):
    """Let ranks take turns: gradients and new parameters travel round a ring, stage by stage, beside compute.

    The model is cut into *stages* in the order in which its modules run. Once backward has passed a stage, its gradient
    joins the sum that travels round a ring of ranks; the stage's *owner* updates it, and the new version travels round
    the ring too. No rank waits for all others at the end of a step; in exchange stages are computed with parameters
    that are one update old: all under rule ``"v1"``, (N - 1) / 2N of them under ``"v2"``. Registered as ``cyclic`` and
    ``cyclic_v1``. More: ``docs/techniques/cyclic.md``.

    Args:
        rule: ``"v2"`` or ``"v1"``, as above.
        lag: For ``"v2"`` with as many stages as ranks: this many more ranks are stale at each stage.
        warmup_sync_steps: So many steps at first use the newest parameters everywhere, as under DDP.
        stages: Their number, a multiple of the number of ranks, or the name of the first module of each; ``None``:
            three a rank, if the model has enough modules.
        stagger: ``"step"``: a rank starts a batch 1/N of its time after the one before it, for ranks that share a
            memory; ``"none"``: when it can.
        clip_norm: The largest norm of a gradient, if ``Trainer(gradient_clip_val=...)`` does not set it.
        clip_by: The norm that is clipped by: ``"stage"``, of each stage's gradient, or ``"previous_norm"``, of the
            whole gradient of the step before. Required where the Trainer clips by norm.
        launching: :class:`LaunchingArguments`, as in Lightning's ``DDPStrategy``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At set-up, if the Trainer, the model or the optimizer cannot work with it.

    Note:
        *Communication.* A rank sends 2 (N - 1) / N of the model in a step, as in a ring all-reduce. Before validation,
        checkpoints and the end of training all ranks wait for the newest version of every stage, and average buffers.
        Gradients are sent during backward, so ``on_before_optimizer_step`` finds none.

        *Memory.* Optimizer state of the owned stages alone, about 1/N; a copy of these stages; up to two versions of
        other stages that wait to be used.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import CyclicStrategy
        >>> strategy = CyclicStrategy(rule="v2", warmup_sync_steps=100)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)

    References:
        L. Fournier, E. Oyallon. `Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks
        <https://arxiv.org/abs/2403.08837>`_. 2024.

    """

    def __init__(
        self,
        rule: Rule = "v2",
        *,
        lag: int = 0,
        warmup_sync_steps: int = 0,
        stages: int | list[str] | None = None,
        stagger: Literal["none", "step"] = "none",
        clip_norm: float | None = None,
        clip_by: ClipBy | None = None,
        **launching: Unpack[LaunchingArguments],
    ) -> None:
        super().__init__(**launching_arguments(WHERE, launching))
        self.settings = checked(CyclicSettings(rule, lag, warmup_sync_steps, stages, stagger, clip_norm, clip_by))
        self._support = RunSupport(self, WHERE)
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._ledger = CommLedger()
        self._run: CyclicRun | None = None
        self._hooks: CyclicHooks | None = None
        self._resume: CyclicResume | None = None
        self._warned_of_gradients = False
        self._first_steps = FirstSteps(WHERE)

    # ---- for users and callbacks ----------------------------------------------------------------------------------

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

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback refuses in its ``setup``, to raise it with what the strategy refuses."""
        self._support.set_up.refuse_in_set_up(where, problems)

    # ---- set-up --------------------------------------------------------------------------------------------------

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
        with support.set_up.refusals() as found:
            found.add(rank_problems(self.settings, self.world_size))
            device = self.root_device
            found.add(refusals.backend_problems(backend_of(device), device.type, self.world_size, os.environ))
            found.add(refusals.trainer_problems(trainer, self._layer_sync is not None))
            found.add(clipping.problems(self.settings, trainer, module))
            found.add(refusals.module_problems(module))
            support.set_up.fit(trainer, found, super().setup)
            found.add(refusals.optimizer_problems(module, self.optimizers))
        support.meet_before_groups(super().barrier)
        refusals.warn_at_start(trainer, module, self.settings, self.world_size, on_cuda=device.type == "cuda")
        failures, collectives = support.failures, support.collectives
        agreement = failures.agreement(poll_interval_s=1.0)
        store, namespace = failures.store_of_run()
        self._run = run = CyclicRun(
            trainer,
            module,
            self.optimizers[0],
            self.settings,
            self._ledger,
            agreement,
            Requests(store, self.global_rank, namespace),
            lambda names: collectives.together(
                lambda: broadcast_json(names, Recorder(self._ledger), self.root_device, "control"), names, "the cut"
            ),
            timedelta(seconds=failures.timeout_s),
            failures.epoch_ends(agreement),
        )
        collectives.compare_places = self._compare_places
        collectives.before = self._let_next_begin
        self._hooks = CyclicHooks(trainer, run, support.begin_fit(trainer, run))
        support.hooks = self._hooks.hooks

    def _let_next_begin(self) -> None:
        """Let no rank wait for its turn to begin a batch while this one, in its batch, waits for it in a collective."""
        if self._run is not None:
            self._run.steps.turns.end_batch()

    def _compare_places(self, purpose: str) -> None:
        if self._run is not None and not self._support.interrupted:
            self._run.compare_places(purpose)

    @override
    def configure_ddp(self) -> None:
        self._support.set_up.share_model(Recorder(self._ledger), _BUCKET_BYTES)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        run, trainer, interruptions = self._run, self._support.trainer, self._support.interruptions
        assert run is not None
        assert trainer is not None
        assert interruptions is not None
        assert self._hooks is not None
        if not has_hook_callback(trainer):
            refusals.check_trial(run.active, run.steps_done)
            return
        load_skipped_loader_states(trainer)
        run.check_start(float(trainer.num_training_batches))
        resume, self._resume = self._resume or CyclicResume(run_began_at=trainer.global_step), None
        steps_done = trainer.global_step if resume.steps_done is None else resume.steps_done
        run.start(steps_done, resume.stages, resume.previous_norm, resume.run_began_at)
        if resume.ledger is not None:
            self._ledger.load_state_dict(resume.ledger)
        interruptions.install()
        self._hooks.begin_training()
        self._support.watch_plateaus(run.recorder, run.agreement)
        if resume.random is not None:
            restore_random_state(trainer, resume.random, epoch_is_over=resume.epoch_is_over)

    # ---- steps ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._support.interruptions is not None and self._run is not None and self._run.active:
            self._support.interruptions.begin_batch()
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
        at_once = is_own_closure(closure)
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

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _can_meet(self) -> bool:
        """Whether ranks can meet for a checkpoint: in the last ``fit`` of this model, or after it."""
        run, support = self._run, self._support
        return run is not None and support.has_fitted(run) and not (support.interrupted or run.failed)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # here, where all ranks come for a checkpoint
        if self._hooks is not None and self._can_meet():
            self._hooks.flush("a checkpoint")
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._run is None or not self._can_meet():
            return super().optimizer_state(optimizer)
        return gathered_state(self._run, getattr(optimizer, "_optimizer", optimizer))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        by_lightning = partial(super().save_checkpoint, storage_options=storage_options)
        if self._run is not None and self._can_meet():
            write_together(self, self._run, checkpoint, filepath, by_lightning)
        else:
            write_alone(self, self._support, self._run, checkpoint, filepath, by_lightning)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        loaded = self._support.load_checkpoint(checkpoint_path, load, in_set_up=self._run is None)
        if loaded.begins_fit:
            self._resume = load_own(loaded.checkpoint, loaded.path, self.global_rank, self.world_size)
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

    # ---- the end -------------------------------------------------------------------------------------------------

    def _leave_fit(self) -> None:
        if self._hooks is not None:
            self._hooks.undo()
        if self._run is not None and self._run.active:
            self._run.abandon()
        elif self._run is not None and dist.is_initialized():
            self._run.leave()

    @override
    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        return {**super().__getstate__(), "_run": None, "_hooks": None, "_resume": None}
