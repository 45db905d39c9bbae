"""Errors and warnings of a step under Cyclic Data Parallelism, which only training itself can show."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_comm.strategies.cyclic.settings import ANOTHER_FIT, WHERE


def used_before_its_module(error: RuntimeError) -> RuntimeError:
    """Return the error of a parameter that was read before its stage's version was in place."""
    return RuntimeError(
        f"{WHERE}: a parameter was used in this batch before the module that it belongs to was called, and the version "
        "with which this step computes is put in place at that call. Compute penalties on weights behind the forward, "
        "and use a weight that two modules share through the module that runs first. If the model changes a tensor in "
        f"place itself, that is the reason instead: {error}"
    )


def once(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """Return the closure, wrapped to refuse a second evaluation in a step: the first hands the gradients over."""
    calls = itertools.count()

    def evaluate() -> Any:
        if next(calls):
            raise RuntimeError(
                f"{WHERE}: the optimizer {type(optimizer).__name__} evaluates the closure more than once a step, and "
                "gradients are handed over the first time. Use one that takes a step from one gradient, such as SGD or "
                "AdamW."
            )
        return closure()

    return evaluate


def without_backward(step: int, batch: int) -> RuntimeError:
    """Return the error of a step without a gradient: that of the step before has been handed over."""
    return RuntimeError(
        f"{WHERE}: the optimizer's `step` was called in batch {batch} of this `fit`, for optimizer step {step}, with "
        "no backward since the step before, whose gradients are handed over and not kept. Compute gradients once for "
        "each step: `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` and then `optimizer.step()`; "
        "under manual optimization `self.manual_backward(loss)` before each `optimizer.step()`."
    )


def torn_step(step: int) -> RuntimeError:
    """Return the error of a step of which only a part of the gradients was handed over."""
    return RuntimeError(
        f"{WHERE}: optimizer step {step} ended in an error that `optimizer_step` has caught, when a part of its "
        "gradients had been sent already, so the step can neither be left out nor repeated. Call `optimizer_closure()` "
        "first, inside of the `try`, and `optimizer.step()` behind it: then nothing is sent before the closure is done."
    )


def saved_within_step(step: int) -> RuntimeError:
    """Return the error of a save or a validation between a forward and its backward."""
    return RuntimeError(
        f"{WHERE}: in optimizer step {step} a checkpoint or a validation came between forward and backward, as in "
        "`on_before_backward`. All ranks flush for it, to the newest parameters, and the backward needs those of the "
        "forward. Save in `on_train_batch_end`, when the step is done."
    )


def stepped_past(optimizer: Optimizer, step: int, batch: int) -> RuntimeError:
    """Return the error of an optimizer that is stepped without the strategy."""
    return RuntimeError(
        f"{WHERE}: the optimizer {type(optimizer).__name__} was stepped by itself in batch {batch} of this `fit`, at "
        f"optimizer step {step} (`optimizer.optimizer.step()`, or one of `self.optimizers(use_pl_optimizer=False)`), "
        "so this rank alone would change its copy of the parameters. Call `step` of the optimizer that "
        "`optimizer_step` is given, or that `self.optimizers()` returns."
    )


def different_batches(step: int, own: int, others: float, world_size: int) -> RuntimeError:
    """Return the error of ranks of which one has left out a step that others took."""
    what = (
        f"{others:.0f} on the other rank" if world_size == 2 else f"{others / (world_size - 1):g} in the others' mean"
    )
    return RuntimeError(
        f"{WHERE}: ranks do not take optimizer step {step} in the same batch of this `fit`: batch {own} on this rank, "
        f"{what}. A rank has left out a step that others took, or has ended an epoch before them. Step on all ranks "
        "alike: where `optimizer_step` or manual optimization skips a step, decide it with "
        "`self.trainer.strategy.reduce_boolean_decision(skip, all=False)`; and give all the same number of batches "
        "(`limit_train_batches`)."
    )


def warn_of_own_gradients(module: LightningModule) -> None:
    """Warn that a module's own `optimizer_step`, or its manual optimization, finds this rank's own gradients."""
    name = type(module).__name__
    if not module.automatic_optimization:
        rank_zero_warn(
            f"{WHERE}: the gradients that `{name}.training_step` finds before `optimizer.step()` are this rank's own, "
            "not the mean over the ranks; to clip the mean, give the strategy `clip_norm`."
        )
        return
    rank_zero_warn(
        f"{WHERE}: `{name}.optimizer_step` computes gradients before it calls the optimizer's `step`, or in a closure "
        "of its own. They are those of this rank, not the mean over the ranks, which does not exist in one place: what "
        "is done to them there (clipping, noise, checks) is done on each rank by itself, before the mean. They are "
        "gone after the step, cleared or not. Skip a step on all ranks alike, and use `clip_norm` to clip."
    )


def warn_of_late_rate(step: int) -> None:
    """Warn that a learning rate was changed after a part of the step's gradients had been sent."""
    rank_zero_warn(
        f"{WHERE}: the learning rate was changed during the backward of optimizer step {step} or behind it, as in "
        "`on_after_backward` or `on_before_optimizer_step`, when stages may have been updated already, so it counts "
        "from the next step. Change it between steps, with a scheduler, or before the backward."
    )


def warn_of_different_rates(step: int, own: float, others: float) -> None:
    """Warn that ranks update their stages with different learning rates."""
    rank_zero_warn(
        f"{WHERE}: learning rates differ between ranks at optimizer step {step}: {own:g} on this one, {others:g} in "
        "the others' mean, summed over the parameter groups. Each rank updates the stages that it owns with its own "
        "rate. Where a scheduler is stepped by hand with a metric, give it the mean: "
        "`scheduler.step(self.trainer.strategy.reduce(metric))`."
    )


def sparse_gradient(names: Sequence[str]) -> RuntimeError:
    """Return the error of gradients that cannot be added up along the ring."""
    return RuntimeError(
        f"{WHERE}: the gradient of {', '.join(names)} is sparse, and a sparse gradient cannot be added up along the "
        "ring. Leave out `sparse=True`."
    )


def other_parameters(step: int, before: int, now: int, frozen: Sequence[str], new: Sequence[str]) -> RuntimeError:
    """Return the error of parameters that began, or ceased, to be trained in the middle of a run."""
    which = [f" {what}: {', '.join(names[:8])}." for what, names in (("Not any more", frozen), ("New", new)) if names]
    what = f"{now} parameters" if now != before else "other parameters, or in other groups,"
    than = f", and {before} when" if now != before else " than when"
    return RuntimeError(
        f"{WHERE}: the optimizer trains {what} at step {step}{than} the model was cut into stages, so others "
        f"would wait for gradients that do not come.{''.join(which)} {ANOTHER_FIT}"
    )


def warn_of_another_cut() -> None:
    """Warn that a checkpoint's stages do not fit the model as it is now."""
    rank_zero_warn(
        f"{WHERE}: the run that wrote the checkpoint trained other parameters than this one, so the model is cut into "
        "stages anew."
    )


def replaced_parameters(step: int, names: Sequence[str]) -> RuntimeError:
    """Return the error of a module that has other parameters in the places of those that the optimizer has."""
    return RuntimeError(
        f"{WHERE}: {len(names)} parameter(s) that the optimizer trains are not those of the module any more at step "
        f"{step}: {', '.join(names[:8])}. A layer, or a weight, was put in the place of another, and other ranks wait "
        f"for the gradient of the old one. {ANOTHER_FIT}"
    )


def another_optimizer(optimizer: Optimizer, step: int) -> RuntimeError:
    """Return the error of an optimizer that has taken the place of the one whose copies update the stages."""
    return RuntimeError(
        f"{WHERE}: the optimizer {type(optimizer).__name__} that is to take step {step} is not the one with which this "
        "`fit` began, and stages are updated by copies of that one. Change learning rates and other settings in its "
        "`param_groups`; for another optimizer, save a checkpoint and start another `fit`."
    )


def changed_parameters(step: int, names: Sequence[str]) -> RuntimeError:
    """Return the error of parameters that were changed in place since their version was put in place."""
    return RuntimeError(
        f"{WHERE}: {len(names)} parameter(s) were changed outside of the optimizer before step {step}, and their next "
        f"version knows nothing of it: {', '.join(names[:8])}. Ranks hold copies of versions that the owners of stages "
        "make, so weights cannot be set, clamped, normalised or loaded between steps. Do it in the optimizer's `step`, "
        "for each parameter by itself; or by a parametrization (`torch.nn.utils.parametrize`), in the forward; or "
        "before `fit`; or use DDPStrategy."
    )


def changed_optimizer(optimizer: Optimizer, step: int, what: Sequence[str]) -> RuntimeError:
    """Return the error of an optimizer that was changed where the stages' own copies do not see it."""
    return RuntimeError(
        f"{WHERE}: {', '.join(f'`{each}`' for each in what[:8])} of the optimizer {type(optimizer).__name__} was set, "
        f"loaded or cleared before step {step}, and stages are updated by copies of it, on the ranks that own them, "
        "which know nothing of it. Settings in `param_groups` may change between steps; to begin with another state, "
        "start another `fit`."
    )


def is_of_whole_graph(error: Exception) -> bool:
    """Whether an error is that of a compiled module that must be one graph, and in which a stage begins."""
    return type(error).__module__.startswith("torch._dynamo") and "torch.compiler.disable" in str(error)


def compiled_whole_graph(error: Exception) -> RuntimeError:
    """Return the error of a module that was compiled as one graph, though a stage begins in it."""
    return RuntimeError(
        f"{WHERE}: a module was compiled with `fullgraph=True`, and at the start of each stage its parameters are put "
        "in place, where the graph must end. Leave out `fullgraph=True`; what lies between the starts of stages is "
        f"compiled all the same. torch said: {str(error).splitlines()[0]}"
    )


def late_gradient(stage: int, modules: Sequence[str]) -> RuntimeError:
    """Return the error of a gradient that is computed after those of its stage have been sent."""
    return RuntimeError(
        f"{WHERE}: a gradient of stage {stage} (modules {', '.join(modules)}) came after the stage's gradients had "
        "been sent: there was a second backward in the batch, or a part of the model under reentrant checkpointing "
        "runs twice. Let one backward a batch compute all gradients, and use `checkpoint(..., use_reentrant=False)`."
    )


def without_gradient(step: int, names: Sequence[str]) -> RuntimeError:
    """Return the error of parameters that took no part in a step."""
    return RuntimeError(
        f"{WHERE}: {len(names)} parameter(s) had no part in the loss of step {step}, so their gradient, which other "
        f"ranks wait for, does not exist: {', '.join(names[:8])}. Use them in every step, or freeze them with "
        "`requires_grad_(False)` and leave them out of the optimizer; DDPStrategy(find_unused_parameters=True) can do "
        "with parameters that are sometimes unused."
    )
