"""DDP whose gradients travel compressed: a thin shell around torch's hook and a codec.

Longer than other files, since Lightning wants all of it in one subclass: a third are arguments and what they mean, the
rest are hooks of a few lines each.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update.periods import is_number
from lightning_comm.errors import refuse
from lightning_comm.lightning_internals import (
    close_finished_epoch,
    load_skipped_loader_states,
    sees_to_infinities,
    unused_by_all_ranks,
)
from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.entry import Save
from lightning_comm.strategies.checkpoints.loading import load_together
from lightning_comm.strategies.common import checks, model_checks
from lightning_comm.strategies.common.base import PeerAwareStrategy
from lightning_comm.strategies.common.hooks import Companion
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.loss_scale import loss_scale
from lightning_comm.strategies.common.plateau import PlateauMonitors
from lightning_comm.strategies.common.run_length import restore_accumulation
from lightning_comm.strategies.compression import checkpoint as compression_files
from lightning_comm.strategies.compression import start_line as compression_line
from lightning_comm.strategies.compression.loss_scale_cache import KnownScale
from lightning_comm.strategies.compression.run import CompressionRun, Unread
from lightning_comm.strategies.sparse_mask.pruned_weights import PrunedWeights, optimizer_problems
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import Agreement, default_store

_WHERE = "CompressedDDPStrategy"
_fits = itertools.count()  # the same on all ranks, which make the same calls
_BEFORE_STEP = ("backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")


class CompressedDDPStrategy(PeerAwareStrategy):
    """Train as under ``ddp``, and send gradients compressed.

    Torch's DistributedDataParallel goes on cutting gradients into buckets and handing them over while the backward
    runs; what of a bucket is sent, and how, the compression says. The hook is registered on every device (Lightning's
    own ``ddp_comm_hook`` is left out without a word on all but CUDA).

    Registered as ``ddp_bf16``, ``ddp_fp16``, ``ddp_int8``, ``ddp_powersgd``, ``ddp_topk``, ``ddp_sparse_mask`` and
    ``pactrain`` (a mask, then bf16), each also with ``_spawn``, ``_fork`` and ``_notebook`` for the way processes are
    started.

    Args:
        compression: What to send: a :class:`Compression`, such as ``Cast("bf16")``, or its word: ``"bf16"``,
            ``"fp16"``, ``"int8"``, ``"powersgd"``, ``"topk"``, ``"ternary"``, ``"sparse_mask"``, ``"no_sync"``; or a
            list of a mask and one more, ``[SparseMask(…), Cast("bf16")]``.
        seed: Where methods that round at random start from.
        bucket_cap_mb: Size of DDP's buckets in MB; torch's default if left out. On slow networks small buckets, 0.5 to
            1, often win.
        find_unused_parameters: As in DDP.
        gradient_as_bucket_view: As in DDP.
        static_graph: As in DDP; not together with gradient accumulation, where torch 2.15 fails.
        ddp_comm_hook: Refused: a bucket has one hook, and ``compression`` takes its place.
        accelerator: As in Lightning's ``DDPStrategy``, like the arguments that follow.
        parallel_devices: As there.
        cluster_environment: As there.
        checkpoint_io: As there.
        precision_plugin: As there.
        process_group_backend: As there.
        timeout: As there.
        start_method: As there.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At set-up, if the Trainer asks for what cannot work together.

    Note:
        *Communication.* What the compression sends, once a bucket and step; :attr:`ledger` has every message. Buffers
        are broadcast by DDP as ever and are not compressed. At the end of every batch ranks meet in an all-reduce of 5
        bytes, in place of the broadcast with which Lightning begins a batch; a second one before the forward where a
        rank may leave its epoch unseen: under the module's ``on_train_batch_start``, or a stream or a sampler with a
        ``__len__`` of its own.

        *Stops.* What one rank asks for, by SIGTERM, SLURM's signal, ``should_stop``, ``max_time`` or a checkpoint by
        the clock, all ranks do after the same batch.

        *Resume.* What a method keeps on each rank (residuals) is saved in a folder beside the checkpoint, by the names
        of parameters. On 2 ranks a resumed run repeats the one that was never stopped bit for bit; on 3 and more, the
        order of sums in an all-reduce follows DDP's buckets, which start over.

        *Non-finite gradients.* Show on all ranks alike, are counted (:attr:`non_finite_steps`), and leave kept
        residuals as they were.

        *Memory.* What the compression keeps; and a second residual as large as the model, from a backward until the
        optimizer has stepped, where averaged gradients may be thrown away: under ``find_unused_parameters`` or
        ``static_graph``, a gradient scaler, manual optimization, or code of your own between a backward and the
        optimizer's step: the module's ``optimizer_step``, ``backward`` or ``configure_gradient_clipping``, or
        ``on_after_backward`` or ``on_before_optimizer_step`` of the module or a callback.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import Cast, CompressedDDPStrategy
        >>> strategy = CompressedDDPStrategy(Cast("bf16"), bucket_cap_mb=1)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    """

    def __init__(  # noqa: PLR0913  (the last eight are Lightning's)
        self,
        compression: Compression | str | list[Compression | str],
        *,
        seed: int = 0,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        ddp_comm_hook: Any = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        refuse(_WHERE, _setting_problems(compression, bucket_cap_mb, ddp_comm_hook))
        self._compression = compression_of(compression, _WHERE)
        self._seed = seed
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
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
            bucket_cap_mb=bucket_cap_mb,
        )
        self._ledger = CommLedger()
        self._sync: GradientSync | None = None
        self._recorder: Recorder | None = None
        self._resume: dict[str, Any] | None = None
        self._trainer: Trainer | None = None
        self._pruned: PrunedWeights | None = None
        self._fitted: LightningModule | None = None  # the model of the last fit
        self._run: CompressionRun | None = None
        self._failures: Agreement | None = None  # of the fit or evaluation under way
        self._warned = False
        self._stepping: Optimizer | None = None  # the one that `optimizer_step` sees to
        self._has_stepped = False  # whether its own `step` has been called meanwhile
        self._steps_watched: RemovableHandle | None = None
        self._known_scale: KnownScale | None = None

    @property
    def compression(self) -> Compression:
        """What is sent of the gradients, and how."""
        return self._compression

    @property
    def ledger(self) -> CommLedger:
        """Every message of the last or current ``fit``, on this rank, but DDP's own of buffers."""
        return self._ledger

    @property
    def non_finite_steps(self) -> int:
        """How many synchronised gradients of the last or current ``fit`` had an entry that was not finite."""
        return self._sync.non_finite_steps if self._sync is not None else 0

    @property
    def dense_steps(self) -> int:
        """How many steps of the last or current ``fit`` sent gradients in full since the model's masks had changed.

        Those that :meth:`request_dense` asked for do not count.
        """
        return self._pruned.dense_steps if self._pruned is not None else 0

    def when_gradients_are_ready(self, call: Callable[[float], None]) -> None:
        """Let a function be called when this rank's gradients of a backward are ready, before it waits for others.

        It is given the seconds of that backward that were spent on messages. For callbacks that measure how fast ranks
        are; from ``on_train_start`` on, until the fit ends.
        """
        if self._sync is not None:
            self._sync.on_last_bucket = call

    def install_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Use other masks from the next step on, for methods that let masks grow.

        Weights and the optimizer's state are set to zero where they are pruned; what comes back starts at zero.

        Args:
            masks: Tensors of ``bool`` by parameter name, True where a weight is kept, the same on all ranks. Call this
                on all of them, between two steps of the same number.

        Raises:
            ValueError: On all ranks, if the masks of one do not fit the model.
            RuntimeError: On all ranks, if they differ; or outside of a fit with a SparseMask.

        Note:
            *Communication.* An all-gather of 8 bytes.

        """
        pruned = self._masks_of_run("install_masks")
        with self._own_changes(), self._first_error_shown("a comparison of masks"):
            pruned.install(masks)

    def request_dense(self, n_steps: int) -> None:
        """Send the gradients of the next steps in full and leave them whole, also where weights are pruned.

        A callback can read them in ``on_before_optimizer_step``. Pruned weights stay at zero nevertheless.

        Args:
            n_steps: How many optimizer steps. Call this on all ranks, between two steps of the same number.

        Raises:
            ValueError: If the number is negative.
            RuntimeError: Outside of a fit with a SparseMask.

        """
        self._masks_of_run("request_dense").request_dense(n_steps)

    def _masks_of_run(self, name: str) -> PrunedWeights:
        if self._pruned is None:
            raise RuntimeError(
                f"{_WHERE}: `{name}` is for a fit with a SparseMask, and there is none under way with "
                f"{self.compression!r}. Call it from a callback, such as in `on_train_batch_end`."
            )
        return self._pruned

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._trainer = model.trainer
        callbacks: list[Any] = getattr(model.trainer, "callbacks", [])
        checks.check_twin_callbacks(callbacks, _WHERE)
        callbacks[:] = [Companion(self), *(each for each in callbacks if not isinstance(each, Companion))]
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._sync = self._pruned = self._resume = self._run = None  # those of an earlier fit

    @property
    @override
    def _agreement(self) -> Agreement | None:
        return self._failures

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        # already here, since a rank may fail while it sets the model up
        namespace = f"lightning_comm/compressed/{next(_fits)}"
        store = default_store() if self._peers is None else self._peers.store
        self._failures = Agreement(store, self.global_rank, self.world_size, namespace, peers=self._peers)

    @override
    def setup(self, trainer: Trainer) -> None:
        self._trainer = trainer
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        module = self.lightning_module
        assert module is not None
        assert self._failures is not None
        self._ledger = CommLedger()
        self._warned = False
        self._fitted = module
        with self._refusals(_WHERE) as refusals:
            refusals.add(_trainer_problems(trainer, bool(self._ddp_kwargs["static_graph"])))
            refusals.add(checks.replica_problems(module))
            refusals.add(model_checks.trained_problems(module))
            self._set_up(trainer, refusals)
            if module.automatic_optimization:
                refusals.add(_optimizer_problems(module, self.optimizers))
            if self._pruned is not None:
                refusals.add(optimizer_problems(self.optimizers))
        _warn_at_start(self.compression, self.world_size)
        self._run = CompressionRun(trainer, module, Recorder(self._ledger), self._failures, _WHERE, self._beside())
        self._interruptions = Interruptions(
            trainer, self._run, lambda vote: self.reduce_boolean_decision(vote, all=False), _WHERE
        )
        self._interruptions.install_signal_handlers()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer, run = self._trainer, self._run
        assert trainer is not None
        assert run is not None
        assert self._interruptions is not None
        load_skipped_loader_states(trainer)
        restore_accumulation(trainer)
        pruned = self._pruned is not None and self._pruned.is_due(trainer.global_step)  # which has a line of its own
        if self.world_size > 1 and not pruned:
            plan = compression_line.plan_of(self.compression, trainer.lightning_module, self.world_size)
            rank_zero_info(f"{_WHERE}: {plan}")
        if self._pruned is not None:
            with self._own_changes(), self._first_error_shown("a comparison of masks", waits=False):
                self._pruned.start(trainer, self.optimizers)  # here, since optimizer states have been restored
                self._pruned.before_step(trainer.global_step)
        if not any(isinstance(callback, Companion) for callback in getattr(trainer, "callbacks", [])):
            return  # a trial run of a learning-rate finder, which sets callbacks aside and undoes all that it did
        run.check_start(float(trainer.num_training_batches))
        self._interruptions.install(in_step=run)
        assert self._failures is not None
        patches, recorder = self._interruptions.patches, Recorder(self._ledger)
        PlateauMonitors(trainer, patches, recorder, self._failures, self.root_device, _WHERE)
        run.settle()

    @override
    def begin_evaluation(self) -> None:
        if self._run is not None and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._run.validated()

    @override
    def report_failure(self, exception: BaseException) -> None:
        if self._run is not None and self._run.refused:
            self._refuse_together()
        super().report_failure(exception)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._pruned is not None:
            self._pruned.finish()

    @override
    def teardown(self) -> None:
        self._watch_steps(False)
        if self._interruptions is not None:
            self._interruptions.undo()
            self._interruptions = None
        super().teardown()

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        module = self.lightning_module
        assert isinstance(self.model, DistributedDataParallel)
        assert module is not None
        self._recorder = Recorder(self._ledger, beside_compute=True)
        self._known_scale = KnownScale(self.precision_plugin)
        context = Context(self._recorder, "gradients", self._seed, revocable=self._may_throw_away(module))
        codec = self.compression.codec(context)
        unused = unused_by_all_ranks(self.model)
        self._sync = GradientSync(codec, self._recorder, module.named_parameters(), self._loss_scale, unused)
        self._watch_steps(context.revocable)
        if self._resume is not None:
            self._sync.load_state_dict(self._resume)
            self._resume = None
        self.model.register_comm_hook(None, self._sync.hook)
        self._pruned = None
        if isinstance(self.compression, SparseMask) and isinstance(codec, SparseMaskCodec):
            self._pruned = PrunedWeights(module, codec, self.compression, Recorder(self._ledger))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._recorder is not None and self._trainer is not None:
            # here too: under manual optimization the backward, and its messages, come before the optimizer's step
            self._recorder.step = self._trainer.global_step
        if self._run is not None:
            self._run.begin_step()
        with self._first_error_shown("a training step under DDP", waits=False):
            if self._pruned is not None and self._trainer is not None:
                with self._own_changes():
                    self._pruned.before_step(self._trainer.global_step)
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._first_error_shown("a validation step under DDP", waits=False):
            return super().validation_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._first_error_shown("a backward under DDP", waits=False):
            return super().backward(closure_loss, *args, **kwargs)

    def _may_throw_away(self, module: LightningModule) -> bool:
        """Whether an averaged gradient may be thrown away: by DDP, by a gradient scaler, or by the user's own code."""
        callbacks: list[Callback] = getattr(module.trainer, "callbacks")  # noqa: B009  (mypy does not see it)
        return (
            bool(self._ddp_kwargs["find_unused_parameters"] or self._ddp_kwargs["static_graph"])
            or loss_scale(self.precision_plugin) is not None
            or not module.automatic_optimization
            or is_overridden("optimizer_step", module)
            or any(map(_has_own_hook, [module, *callbacks]))
        )

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._sync is not None:
            self._sync.take_back_cleared()

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._sync is not None:
            self._sync.end_backward()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take note of a step of any optimizer, except the one that :meth:`optimizer_step` is about to judge."""
        if optimizer is self._stepping:
            self._has_stepped = True
        elif self._sync is not None:
            self._sync.stepped(_parameters_of(optimizer))

    def _has_skipped(self, optimizer: Optimizer, scale: float) -> bool:
        """Whether a gradient scaler has skipped a step; it lowers its scale there, and only there.

        The scale is read only where it may have: on CUDA that waits for the device.
        """
        return (not self._has_stepped or sees_to_infinities(optimizer)) and self._loss_scale() < scale

    def _beside(self) -> list[Unread]:
        """Return what has numbers to read in each step."""
        keeps = self._sync is not None and self._sync.codec.is_local
        wanted = (self._pruned, self._known_scale if keeps else None)
        return [each for each in wanted if each is not None]

    def _watch_steps(self, watch: bool) -> None:
        if self._steps_watched is not None:
            self._steps_watched.remove()
        self._steps_watched = register_optimizer_step_post_hook(self._stepped) if watch else None

    def _own_changes(self) -> AbstractContextManager[None]:
        return self._sync.own_changes() if self._sync is not None else nullcontext()

    def _step_recorder(self) -> Recorder:
        """Return what sends and records the few messages of a save."""
        recorder = Recorder(self._ledger)
        recorder.step = 0 if self._trainer is None else self._trainer.global_step
        return recorder

    def _loss_scale(self) -> float:
        return (self._known_scale() if self._known_scale is not None else None) or 1.0

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if self._recorder is not None and self._trainer is not None:
            self._recorder.step = self._trainer.global_step
        keeps = self._sync is not None and self._sync.codec.is_local  # for others nothing depends on the scale
        scale = self._loss_scale() if keeps else 1.0
        self._stepping, self._has_stepped = optimizer, False
        try:
            with self._first_error_shown("a step under DDP", waits=False):
                output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._stepping = None
        if self._sync is not None and keeps and self._sync.codec.unapplied:
            told = self._sync.thrown_away if self._has_skipped(optimizer, scale) else self._sync.stepped
            told(_parameters_of(optimizer))
        if self._pruned is not None:
            with self._own_changes():
                self._pruned.keep_at_zero()
        if not self._warned and self.root_device.type == "cpu" and self.non_finite_steps:
            self._warned = True
            rank_zero_warn(
                f"{_WHERE}: the gradient of optimizer step {self._recorder.step if self._recorder else 0} is not "
                "finite (NaN or infinity), alike on all ranks. Later ones are counted in `strategy.non_finite_steps` "
                "without a word. A lower learning rate, gradient clipping or bf16 instead of fp16 may help."
                f"{self._pruned.suspects() if self._pruned is not None else ''}"
            )
        return output

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        sync, trainer = self._sync, self._trainer
        fitted = self._fitted is not None and self._fitted is self.lightning_module  # now, or before an evaluation
        save = Save(str(filepath))
        if sync is not None and trainer is not None and fitted and "optimizer_states" in checkpoint:
            with self._first_error_shown("a checkpoint", waits=False):
                save = compression_files.write(
                    self,
                    sync,
                    self.compression,
                    checkpoint,
                    filepath,
                    self._step_recorder(),
                    interrupted=trainer.interrupted,
                )
        elif trainer is not None and trainer.interrupted:
            save = Save(sets.incomplete_path(self, _WHERE, filepath))
        elif self._fitted is not None and not fitted:
            checks.leave_out_other_model(_WHERE, checkpoint, filepath)
        write = partial(super().save_checkpoint, checkpoint, save.path, storage_options)
        if sync is None or trainer is None or not fitted or trainer.interrupted:
            write()
        else:
            with self._first_error_shown("a checkpoint", waits=False):
                sets.write_main(self, self._step_recorder(), _WHERE, save, write)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        checkpoint_path, checkpoint = load_together(
            self, _WHERE, checkpoint_path, load, self._refuse_together, in_set_up=self._sync is None
        )
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            state = compression_files.load(self, self.compression, checkpoint, checkpoint_path)
            if self._sync is None:
                self._resume = state  # taken up at set-up
                close_finished_epoch(checkpoint.get("loops"))
            elif state is not None:
                self._sync.load_state_dict(state)  # a tuner within `fit` puts back what its trial run has changed
        return checkpoint

    @override
    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        return {
            **super().__getstate__(),
            "_run": None,
            "_failures": None,
            "_interruptions": None,
            "_sync": None,
            "_fitted": None,
            "_recorder": None,
            "_resume": None,
            "_trainer": None,
            "_pruned": None,
            "_stepping": None,
            "_steps_watched": None,
            "_known_scale": None,
        }


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _has_own_hook(owner: object) -> bool:
    """Whether code of the user's own runs between a backward and the optimizer's step, where it may clear gradients."""
    hooks = (getattr(owner, name, None) for name in _BEFORE_STEP)
    modules = (getattr(hook, "__module__", None) or "" for hook in hooks if hook is not None)
    return any(module.partition(".")[0] not in ("lightning", "lightning_comm") for module in modules)


def _setting_problems(compression: Any, bucket_cap_mb: object, ddp_comm_hook: object) -> Iterator[str]:
    if ddp_comm_hook is not None:
        yield (
            "`ddp_comm_hook` cannot be used, since a bucket of gradients has one hook and `compression` takes its "
            f"place; got {ddp_comm_hook!r}. Say what to send by `compression`, such as 'bf16' or 'powersgd', or use "
            "Lightning's DDPStrategy with your hook."
        )
    try:
        compression_of(compression, _WHERE)
    except ValueError as error:
        yield str(error).removeprefix(f"{_WHERE}: ")
    if bucket_cap_mb is not None and not (is_number(bucket_cap_mb) and bucket_cap_mb > 0):
        yield (
            f"`bucket_cap_mb` is a size in MB, so it must be a number > 0; got {bucket_cap_mb!r}. Leave it out for "
            "torch's default."
        )


def _trainer_problems(trainer: Trainer, static_graph: bool) -> Iterator[str]:
    """Yield what of the Trainer cannot work together with DDP's settings."""
    if static_graph and trainer.accumulate_grad_batches > 1:
        yield (
            f"`static_graph=True` does not go with `accumulate_grad_batches`="
            f"{trainer.accumulate_grad_batches}: torch's DDP fails in the first window, or no longer averages "
            "gradients. Leave out one of the two."
        )


def _optimizer_problems(module: LightningModule, optimizers: list[Optimizer]) -> Iterator[str]:
    """Yield that automatic optimization has nothing to step; where None was returned, Lightning steps a stand-in."""
    if not optimizers:
        yield model_checks.no_optimizer(module, "automatic optimization has none to step")
    yield from model_checks.trained_problems(module, optimizers)


def _warn_at_start(compression: Compression, world_size: int) -> None:
    """Say what will run but probably not as meant."""
    if isinstance(compression, NoSync):
        rank_zero_warn(
            f"{_WHERE}: NoSync averages nothing, so every rank trains a model of its own. Use it to see how fast a "
            "step would be without communication, never for a model that you keep."
        )
    if world_size == 1:
        rank_zero_warn(
            f"{_WHERE}: one process only, so there is nothing to send; what the compression rounds or leaves out is "
            "lost for nothing. Give the Trainer `devices=2` or more."
        )
