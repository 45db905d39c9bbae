"""The Lightning strategy of compressed gradients: a shell around DDP, with a communication hook and a codec.

Longer than other files, since Lightning needs all of it in one subclass. The work is done by the communication hook, by
the run and by what all strategies share (:mod:`lightning_comm.strategies.common`).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from lightning_comm.core.ledger import CommLedger
from lightning_comm.errors import refuse
from lightning_comm.lightning_internals import load_skipped_loader_states, unused_by_all_ranks
from lightning_comm.strategies.checkpoints.whole_files import with_default
from lightning_comm.strategies.common import model_checks
from lightning_comm.strategies.common.checks import replica_problems
from lightning_comm.strategies.common.hooks import FitHooks, has_hook_callback
from lightning_comm.strategies.common.launching import LaunchingArguments, launching_arguments
from lightning_comm.strategies.common.run_length import restore_accumulation
from lightning_comm.strategies.common.support import RunSupport
from lightning_comm.strategies.compression import checks
from lightning_comm.strategies.compression.applied_steps import AppliedSteps, may_throw_away
from lightning_comm.strategies.compression.checkpoint import CompressionResume, Saved, load_own, save
from lightning_comm.strategies.compression.checks import WHERE
from lightning_comm.strategies.compression.loss_scale_cache import KnownScale
from lightning_comm.strategies.compression.run import CompressionRun, Unread
from lightning_comm.strategies.compression.start_line import plan_of
from lightning_comm.strategies.sparse_mask.pruned_weights import PrunedWeights, optimizer_problems
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder


class CompressedDDPStrategy(DDPStrategy):
    """Train as under ``ddp``, and send gradients compressed.

    DDP cuts gradients into buckets during the backward, as ever; the compression decides what is sent of each bucket.
    Registered as ``ddp_bf16``, ``ddp_fp16``, ``ddp_int8``, ``ddp_powersgd``, ``ddp_topk``, ``ddp_sparse_mask`` and
    ``pactrain`` (a mask, then bf16). The card ``docs/techniques/compression.md`` has the details: which one to choose,
    stops, resuming, and gradients that are not finite.

    Args:
        compression: A :class:`Compression`, such as ``Cast("bf16")``, or its name: ``"bf16"``, ``"fp16"``, ``"int8"``,
            ``"powersgd"``, ``"topk"``, ``"ternary"``, ``"sparse_mask"``, ``"no_sync"``; or a list of a mask and one
            more, ``[SparseMask(…), Cast("bf16")]``.
        seed: The seed of methods that round at random.
        bucket_cap_mb: Size of DDP's buckets in MB; torch's default if left out. On slow networks small buckets, 0.5 to
            1, are often faster.
        find_unused_parameters: As in DDP.
        gradient_as_bucket_view: As in DDP.
        static_graph: As in DDP; not together with gradient accumulation.
        ddp_comm_hook: Refused: a bucket has one hook, and ``compression`` takes its place.
        launching: :class:`LaunchingArguments`, as in Lightning's ``DDPStrategy``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At set-up, if settings of the Trainer cannot work together with it.

    Note:
        *Communication.* What the compression sends, for each bucket and step. DDP broadcasts buffers, uncompressed. At
        the end of every batch an all-reduce of 5 bytes, in place of Lightning's broadcast at its beginning.

        *Memory.* What the compression keeps. Where averaged gradients may be discarded, also a second residual as large
        as the model, from a backward until the optimizer has stepped.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import Cast, CompressedDDPStrategy
        >>> strategy = CompressedDDPStrategy(Cast("bf16"), bucket_cap_mb=1)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    """

    def __init__(
        self,
        compression: Compression | str | list[Compression | str],
        *,
        seed: int = 0,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        ddp_comm_hook: Any = None,
        **launching: Unpack[LaunchingArguments],
    ) -> None:
        refuse(WHERE, checks.setting_problems(compression, bucket_cap_mb, ddp_comm_hook))
        self._compression = compression_of(compression, WHERE)
        self._seed = seed
        super().__init__(
            **launching_arguments(WHERE, launching),
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
            bucket_cap_mb=bucket_cap_mb,
        )
        self._support = RunSupport(self, WHERE)
        self._fitted: LightningModule | None = None  # the model of the last fit
        self._ledger = CommLedger()
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._run: CompressionRun | None = None
        self._sync: GradientSync | None = None
        self._pruned: PrunedWeights | None = None
        self._steps: AppliedSteps | None = None
        self._recorder: Recorder | None = None
        self._resume: CompressionResume | None = None
        self._warned = False

    # ---- for users and callbacks (:mod:`lightning_comm.contract`) ----------------------------------------------------

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
        """Call a function after each backward when this rank's gradients are ready, before it waits for other ranks.

        The function receives the seconds of that backward that were spent on messages. For callbacks that measure how
        fast ranks are; from ``on_train_start`` on, until the fit ends.
        """
        if self._sync is not None:
            self._sync.on_last_bucket = call

    def install_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Use other masks from the next step on, for methods that let masks grow.

        Weights and the optimizer's state are set to zero where they are pruned. Weights that come back start at zero.

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
        with self._own_changes(), self._support.failures.first_error_shown("a comparison of masks"):
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
                f"{WHERE}: `{name}` is for a fit with a SparseMask, and there is none under way with "
                f"{self.compression!r}. Call it from a callback, such as in `on_train_batch_end`."
            )
        return self._pruned

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback refuses in its ``setup``, to raise it with what the strategy refuses."""
        self._support.set_up.refuse_in_set_up(where, problems)

    # ---- set-up ------------------------------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if self._support.connect(model.trainer):
            self._forget_fit()
            self._ledger = CommLedger()  # here, since a checkpoint is loaded before the set-up

    @override
    def setup(self, trainer: Trainer) -> None:
        support, module = self._support, self.lightning_module
        if not support.is_fit:
            support.set_up.evaluation(trainer, super().setup)
            return
        assert module is not None
        self._fitted = module
        with support.set_up.refusals() as refusals:
            refusals.add(checks.trainer_problems(trainer, bool(self._ddp_kwargs["static_graph"])))
            refusals.add(replica_problems(module))
            refusals.add(model_checks.trained_problems(module))
            support.set_up.fit(trainer, refusals, super().setup)
            if module.automatic_optimization:
                refusals.add(checks.optimizer_problems(module, self.optimizers))
            if self._pruned is not None:
                refusals.add(optimizer_problems(self.optimizers))
        checks.warn_at_start(self.compression, self.world_size)
        agreement = support.failures.agreement()
        self._run = run = CompressionRun(trainer, module, Recorder(self._ledger), agreement, WHERE, self._beside())
        support.begin_fit(trainer, run)
        support.hooks = FitHooks(begin_evaluation=self._begin_evaluation, note_failure=self._note_failure)

    @override
    def configure_ddp(self) -> None:
        self._support.set_up.wrap_in_ddp(super().configure_ddp)
        module = self.lightning_module
        if not isinstance(self.model, DistributedDataParallel):
            return  # refused when the set-up ends, with what else there is
        assert module is not None
        self._recorder = Recorder(self._ledger, beside_compute=True)
        self._steps = AppliedSteps(KnownScale(self.precision_plugin))
        revocable = may_throw_away(module, self.precision_plugin, self._ddp_kwargs)
        codec = self.compression.codec(Context(self._recorder, "gradients", self._seed, revocable=revocable))
        unused = unused_by_all_ranks(self.model)
        self._sync = GradientSync(codec, self._recorder, module.named_parameters(), self._steps.loss_scale, unused)
        self._steps.begin(self._sync, watch=revocable)
        if self._resume is not None and self._resume.sync is not None:
            self._sync.load_state_dict(self._resume.sync)
        self.model.register_comm_hook(None, self._sync.hook)
        if isinstance(self.compression, SparseMask) and isinstance(codec, SparseMaskCodec):
            self._pruned = PrunedWeights(module, codec, self.compression, Recorder(self._ledger))

    def _beside(self) -> list[Unread]:
        """Return what has numbers to read in each step."""
        keeps = self._sync is not None and self._sync.codec.is_local
        wanted = (self._pruned, self._steps.scale if self._steps is not None and keeps else None)
        return [each for each in wanted if each is not None]

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer, run, interruptions = self._support.trainer, self._run, self._support.interruptions
        assert trainer is not None
        assert run is not None
        assert interruptions is not None
        load_skipped_loader_states(trainer)
        restore_accumulation(trainer)
        pruned = self._pruned is not None and self._pruned.is_due(trainer.global_step)  # which has a line of its own
        if self.world_size > 1 and not pruned:
            rank_zero_info(f"{WHERE}: {plan_of(self.compression, trainer.lightning_module, self.world_size)}")
        if self._pruned is not None:
            with self._own_changes(), self._support.failures.first_error_shown("a comparison of masks", waits=False):
                self._pruned.start(trainer, self.optimizers)  # here, after optimizer states were restored
        if has_hook_callback(trainer):
            run.check_start(float(trainer.num_training_batches))
            interruptions.install(in_step=run)
            self._support.watch_plateaus(Recorder(self._ledger), run.agreement)
            run.settle()
        resume, self._resume = self._resume, None
        if resume is not None and resume.ledger is not None:  # once everything that a start sends has been sent
            self._ledger.load_state_dict(resume.ledger)
        if self._pruned is not None:
            with self._own_changes(), self._support.failures.first_error_shown("a comparison of masks", waits=False):
                self._pruned.before_step(trainer.global_step)

    def _begin_evaluation(self) -> None:
        if self._run is not None and self._support.is_fit:
            self._run.validated()

    def _note_failure(self) -> None:
        if self._run is not None and self._run.refused:
            self._support.failures.refuse_together()

    # ---- steps -------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self._begin_step()
        if self._run is not None:
            self._run.begin_step()
        with self._support.failures.first_error_shown("a training step under DDP", waits=False):
            if self._pruned is not None and step is not None:
                with self._own_changes():
                    self._pruned.before_step(step)
            return super().training_step(*args, **kwargs)

    def _begin_step(self) -> int | None:
        """Record messages under the present step: under manual optimization they come before the optimizer's step."""
        step = None if self._support.trainer is None else self._support.trainer.global_step
        if self._recorder is not None and step is not None:
            self._recorder.step = step
        return step

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._support.failures.first_error_shown("a validation step under DDP", waits=False):
            return super().validation_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._sync is not None:
            self._sync.take_back_cleared()

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._support.failures.first_error_shown("a backward under DDP", waits=False):
            return super().backward(closure_loss, *args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._sync is not None:
            self._sync.end_backward()

    def _own_changes(self) -> AbstractContextManager[None]:
        return self._sync.own_changes() if self._sync is not None else nullcontext()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self._begin_step()
        judged = self._steps.judged(optimizer) if self._steps is not None else nullcontext()
        with judged, self._support.failures.first_error_shown("a step under DDP", waits=False):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._pruned is not None:
            with self._own_changes():
                self._pruned.keep_at_zero()
        if not self._warned and self.root_device.type == "cpu" and self.non_finite_steps:
            self._warned = True
            suspects = self._pruned.suspects() if self._pruned is not None else ""
            checks.warn_of_non_finite(self._recorder.step if self._recorder else 0, suspects)
        return output

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._pruned is not None:
            self._pruned.finish()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        by_lightning = partial(super().save_checkpoint, storage_options=storage_options)
        state = Saved(self._sync, self.compression, self._fitted)
        save(self, self._support, state, checkpoint, filepath, by_lightning)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        load = partial(super().load_checkpoint, weights_only=weights_only)
        loaded = self._support.load_checkpoint(checkpoint_path, load, in_set_up=self._sync is None)
        if self._support.is_fit:
            resume = load_own(self, self.compression, loaded.checkpoint, loaded.path, self._ledger)
            if self._sync is None:
                self._resume = resume  # restored at set-up, and when training starts
            elif resume.sync is not None:
                self._sync.load_state_dict(resume.sync)  # a tuner within `fit` puts back what its trial run has changed
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
        if self._steps is not None:
            self._steps.end()

    @override
    def __getstate__(self) -> dict[str, Any]:
        # for start methods that pickle: what exists before processes start, without a run's handles
        handles = ("_run", "_sync", "_pruned", "_steps", "_recorder", "_resume", "_fitted")
        return {**super().__getstate__(), **dict.fromkeys(handles)}
