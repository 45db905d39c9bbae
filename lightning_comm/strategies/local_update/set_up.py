"""The set-up of a ``fit`` under local updates: what cannot work, and how a run begins or goes on from a checkpoint."""

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_comm.lightning_internals import load_skipped_loader_states
from lightning_comm.ondevice.sparse_gradients import fault_of_ddp
from lightning_comm.strategies.common import checks as common_checks
from lightning_comm.strategies.common.model_checks import trained_problems
from lightning_comm.strategies.common.run_length import restore_accumulation, total_steps
from lightning_comm.strategies.local_update import checks, period_setup, run_state, start_line
from lightning_comm.strategies.local_update.checkpoint import WHERE, Resume, saved_alpha
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.strategies.sparse_mask import pruned_weights
from lightning_comm.transport.compression.sparse_mask import SparseMask


def problems_of_trainer_and_model(
    trainer: Trainer, module: LightningModule, settings: Settings, *, sync_batchnorm: bool
) -> Iterator[str]:
    """Yield what cannot work, as far as that is known before the model is set up."""
    yield from common_checks.trainer_problems(trainer, sync_batchnorm)
    yield from common_checks.module_problems(module)
    if settings.starts_with_gradients:
        yield from trained_problems(module)
    yield from checks.length_problems(trainer, module, settings)


def problems_of_optimizers(
    trainer: Trainer, optimizers: list[Optimizer], settings: Settings, resume: Resume | None
) -> Iterator[str]:
    """Yield what cannot work with the optimizers and the model's devices; once both are set up."""
    module = trainer.lightning_module
    yield from common_checks.device_problems(trainer, module)
    yield from checks.optimizer_problems(module, optimizers, settings)
    yield from period_setup.period_problems(optimizers, settings, saved_alpha(resume))
    if isinstance(settings.averaging.method, SparseMask):
        yield from pruned_weights.optimizer_problems(optimizers)


def warn_of_gradients(module: LightningModule, settings: Settings, world_size: int) -> None:
    """Warn of gradients of this model that DDP averages wrongly, if there is a gradient phase."""
    if settings.starts_with_gradients and (fault := fault_of_ddp(module, world_size)) is not None:
        rank_zero_warn(f"{WHERE}, in its gradient phase: {fault}")


def begin_run(trainer: Trainer, run: LocalUpdateRun, resumed: Resume | None) -> None:
    """Begin to count steps, or go on from a checkpoint: rounds, weights, masks; when training starts, on all ranks."""
    load_skipped_loader_states(trainer)
    restore_accumulation(trainer)
    run.check_start(float(trainer.num_training_batches))
    resume = resumed or Resume(None, None)
    run_state.begin_count(run, resumed=resumed is not None, shared=resume.shared)
    total = total_steps(trainer, run.clock.steps_done)
    length = None if total is None else total - run.began_at
    run.set_period(period_setup.resolved_period(trainer, run.settings, length, saved_alpha(resumed)), total)
    automatic = trainer.lightning_module.automatic_optimization
    run.gradient_steps = run.began_at + checks.gradient_steps(run.settings, length, automatic=automatic)
    checks.warn_at_start(trainer, run.settings, length, run.recorder.members.size)
    run.model.begin_round()
    run_state.restore(run, resume.shared, resume.own, resume.masks, resume.found)
    if run.pruned is not None:
        run.pruned.start(trainer, run.optimizers())  # here, since optimizer states have been restored
        run.recorder.step = run.clock.steps_done


def say_plan(trainer: Trainer, run: LocalUpdateRun) -> None:
    """Log how often ranks will synchronise."""
    if run.recorder.members.size > 1:
        rank_zero_info(f"{WHERE}: {start_line.plan_of(trainer, run)}")


def shorten_gradient_phase(run: LocalUpdateRun | None, steps: int) -> None:
    """Let rounds begin after this many steps of the run, if that is sooner.

    For trials of a few steps, on all ranks alike.

    Raises:
        RuntimeError: Outside of training.
        ValueError: If that is not a whole number >= 0.

    """
    if run is None or not run.active:
        raise RuntimeError(
            f"{WHERE}: `shorten_gradient_phase({steps!r})` is for a fit that trains, and none does. Call it from a "
            "callback, from its first `on_train_batch_start` on."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(
            f"{WHERE}: `steps` of `shorten_gradient_phase` counts optimizer steps, so it must be a whole number >= 0; "
            f"got {steps!r}. 0 begins with rounds."
        )
    run.shorten_gradient_phase(steps)
