"""Refusals of Cyclic Data Parallelism: of what cannot work together, before training where that can be known.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it.

Longer than other files, since it is a list of refusals.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_comm.core.cyclic.schedule import RULES, CyclicSchedule, Rule
from lightning_comm.errors import refuse
from lightning_comm.ondevice.cyclic.update import ClipBy, clips_by_itself, why_not_by_stage
from lightning_comm.ondevice.optimizer.trial import why_not_by_parameter
from lightning_comm.ondevice.shared_memory import shared
from lightning_comm.strategies.common import checks, model_checks

WHERE = "CyclicStrategy"
_ANOTHER_FIT = (
    "Freeze, unfreeze, add and replace parameters before `fit`; to change them later, end this `fit`, save a "
    "checkpoint and start another `fit` from its weights."
)
_BACKENDS = ("gloo", "nccl")
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_STREAMS = 5
_CHOICES = {"rule": RULES, "stagger": ("none", "step"), "clip_by": ("stage", "previous_norm")}


@dataclass(frozen=True)
class CyclicSettings:
    """The arguments of ``CyclicStrategy``, which explains them."""

    rule: Rule
    lag: int
    warmup_sync_steps: int
    stages: int | list[str] | None
    stagger: Literal["none", "step"]
    clip_norm: float | None
    clip_by: ClipBy | None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked(settings: CyclicSettings) -> CyclicSettings:
    """Return the settings if each is in range, as far as that can be said without the number of ranks.

    Raises:
        ValueError: If one is not.

    """
    refuse(WHERE, _setting_problems(settings))
    return settings


def _setting_problems(settings: CyclicSettings) -> Iterator[str]:
    for name, choices in _CHOICES.items():
        if getattr(settings, name) not in choices and (name, getattr(settings, name)) != ("clip_by", None):
            yield (f"`{name}` must be one of {', '.join(map(repr, choices))}; got {getattr(settings, name)!r}.")
    for name, what in (("lag", "workers"), ("warmup_sync_steps", "optimizer steps")):
        if not _is_count(getattr(settings, name), 0):
            yield (
                f"`{name}` counts {what}, so it must be a whole number >= 0; got {getattr(settings, name)!r}. "
                "0 is the default."
            )
    if settings.rule == "v1" and settings.lag:
        yield (
            f"`lag`={settings.lag} is for rule 'v2'; under 'v1' all workers are one update behind already. "
            "Leave it out."
        )
    stages = settings.stages
    names = isinstance(stages, list) and bool(stages) and all(isinstance(name, str) for name in stages)
    if stages is not None and not names and not _is_count(stages, 1):
        yield (
            f"`stages` must be a number of stages, a multiple of the number of ranks, or a list with the name "
            f"of the first module of each; got {stages!r}. None takes three for each rank, where the model has as many "
            "modules."
        )
    if isinstance(stages, list) and len(set(stages)) < len(stages):
        yield f"`stages` names a module twice: {stages!r}. Name each stage's first module once."
    clip = settings.clip_norm
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not (number and math.isfinite(clip) and clip > 0):
        yield f"`clip_norm` must be a finite number > 0; got {clip!r}. None does not clip."


def rank_problems(settings: CyclicSettings, world_size: int) -> Iterator[str]:
    """Yield stages and a lag that do not fit the number of ranks."""
    stages = settings.stages
    count = len(stages) if isinstance(stages, list) else stages
    if count is None:
        count = world_size if settings.lag else 3 * world_size
    if count % world_size:
        yield (
            f"`stages`={stages!r} makes {count} stages, and with {world_size} ranks it must be a multiple of "
            f"{world_size}. Give {world_size}, {2 * world_size} or {3 * world_size}, or leave it out."
        )
        return
    try:
        CyclicSchedule(world_size, count, settings.rule, settings.lag, settings.warmup_sync_steps)
    except ValueError as error:
        yield str(error).removeprefix("CyclicSchedule: ")


def backend_problems(
    backend: str | None, device: str, world_size: int, environment: Mapping[str, str]
) -> Iterator[str]:
    """Yield why the process group cannot carry the ring.

    Args:
        backend: That of the process group for the ranks' devices; ``None`` if it has none.
        device: The kind of these devices.
        world_size: How many ranks there are.
        environment: The variables of this process.

    """
    if world_size == 1:
        return
    if backend not in _BACKENDS or (backend == "nccl" and device != "cuda") or device not in ("cpu", "cuda"):
        yield (
            f"`process_group_backend` gives devices of kind {device!r} the backend {backend!r}, and gradients go round "
            "the ring by messages from rank to rank, which are known to work by 'gloo' for 'cpu' and 'cuda', and by "
            "'nccl' for 'cuda'. Use one of these, such as `CyclicStrategy(process_group_backend='gloo')`, or 'nccl' "
            "with `Trainer(accelerator='gpu')`."
        )
    queues = environment.get(_QUEUES, "")
    if backend == "nccl" and queues.isdecimal() and int(queues) < _STREAMS:
        yield (
            f"the environment variable {_QUEUES}={queues} makes a device take the work of its streams through so few "
            f"queues, and under NCCL {_STREAMS} must not hold each other up: that of compute, two of lanes, and two of "
            f"the process groups. A receive that waits could keep back what other ranks wait for, for good. Leave the "
            f"variable out (8 is the default), or set it to 32."
        )


def warn_of_one_process(world_size: int) -> None:
    """Say that there is nobody to take turns with."""
    if world_size == 1:
        rank_zero_warn(
            f"{WHERE}: one process only, so there is nobody to take turns with; training goes on as without the "
            "strategy, one update late under rule 'v1' and with a lag. Give the Trainer `devices=2` or more; to see on "
            "one device what the delay does, use `simulate_delay`."
        )


def trainer_problems(trainer: Trainer, sync_batchnorm: bool) -> Iterator[str]:
    """Yield settings and callbacks of the Trainer that this cannot honour."""
    yield from checks.trainer_problems(trainer, sync_batchnorm, one_version=True)
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield (
            "`Trainer(precision='16-mixed')` needs a gradient scaler, which skips a step when any stage "
            "overflows, and stages are updated before that is known. Use 'bf16-mixed' or '32-true'."
        )
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, BackboneFinetuning) and _thaws(callback, trainer):
            yield (
                f"the callback {type(callback).__name__} unfreezes the backbone in epoch "
                f"{callback.unfreeze_backbone_at_epoch}, in the middle of the run, and stages are cut once, of the "
                f"parameters that are trained then. Leave it out. {_ANOTHER_FIT}"
            )
        if type(callback).__name__ == "AdaptivePartition":
            yield (
                "the callback AdaptivePartition measures how long ranks wait for each other at the end of a "
                "step, and here they wait inside it. Leave it out, or use DDPStrategy."
            )


def _thaws(callback: BackboneFinetuning, trainer: Trainer) -> bool:
    at, last = callback.unfreeze_backbone_at_epoch, trainer.max_epochs
    return at > 0 and (last is None or last < 0 or at < last)  # at 0 it does so before the model is cut


def warn_of_finetuning(trainer: Trainer) -> None:
    """Say what will happen if a callback thaws parameters later, which only the callback knows."""
    callbacks = [each for each in getattr(trainer, "callbacks", []) if isinstance(each, BaseFinetuning)]
    if names := [type(each).__name__ for each in callbacks if not isinstance(each, BackboneFinetuning)]:
        rank_zero_warn(
            f"{WHERE}: the callback {', '.join(names)} may unfreeze parameters in the middle of the run. It can freeze "
            "them for all of it; where it unfreezes parameters after the first batch, the run ends there with an "
            f"error, since stages are cut once, of the parameters that are trained then. {_ANOTHER_FIT}"
        )


def check_trial(active: bool, step: int) -> None:
    """Refuse a trial run in the middle of a run, whose ring and stages know nothing of what it puts back.

    Args:
        active: Whether a run is under way.
        step: At which step.

    """
    if active:
        raise MisconfigurationException(
            f"{WHERE}: a learning-rate finder was started in the middle of a run, at step {step}. Its trial steps "
            "change weights and optimizer state that stages keep on other ranks. Start it in `on_fit_start`, as the "
            "callback `LearningRateFinder` does by itself, or before: `Tuner(trainer).lr_find(model)`; for a later "
            "one, end this `fit` and start another."
        )


def module_problems(module: LightningModule) -> Iterator[str]:
    """Yield why hooks cannot follow a module, or that it communicates in its forward."""
    yield from checks.module_problems(module)
    if is_overridden("configure_gradient_clipping", module):
        yield (
            f"`{type(module).__name__}.configure_gradient_clipping` would clip nothing: gradients are handed "
            "over during backward. Take it out, give the Trainer `gradient_clip_val`, and for a limit of the norm the "
            "strategy `clip_by='stage'` or `clip_by='previous_norm'`."
        )
    yield from _memory_problems(module)
    for name, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            yield (
                f"{type(part).__name__} {name!r} has `max_norm={part.max_norm}`, so its forward changes its "
                "weight in place, and the rank that owns it would not know. Leave `max_norm` out, and bound the norm "
                "of the rows that were looked up instead."
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            yield (
                f"{type(part).__name__} {name!r} has `sparse=True`, and a sparse gradient cannot be added up "
                "along the ring. Leave `sparse` out."
            )


def _memory_problems(module: LightningModule) -> Iterator[str]:
    """Yield trained parameters that share memory: each of their owners would write into it."""
    trained = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
    for names in shared(trained):
        yield (
            f"the parameters {' and '.join(map(repr, names))} share memory (one is a view of the other), and "
            "each would be updated by itself, on ranks that may not be the same. Register one parameter in both "
            "modules (`second.weight = first.weight`), or compute the one from the other in the forward."
        )


def optimizer_problems(module: LightningModule, optimizers: list[Optimizer]) -> Iterator[str]:
    """Yield why there is not one optimizer that can update stages one by one."""
    if model_checks.has_no_optimizer(optimizers):
        yield model_checks.no_optimizer(module, "there are no stages to update")
        return
    if len(optimizers) != 1:
        yield (
            f"`configure_optimizers` must return one optimizer; got {len(optimizers)}, and a rank would not know which "
            "of them the gradient that comes round the ring is for. Use one with parameter groups for parts with other "
            "settings; where parts are trained by losses of their own (a GAN), LocalUpdateStrategy (`local_sgd`) or "
            "CompressedDDPStrategy (`ddp_bf16`), which work with several."
        )
        yield from (f"the optimizer {problem}" for problem in map(why_not_by_stage, optimizers) if problem is not None)
        return
    yield from _one_optimizer_problems(module, optimizers[0])


def _one_optimizer_problems(module: LightningModule, optimizer: Optimizer) -> Iterator[str]:
    names = [base.__name__ for base in type(optimizer).__mro__]
    if any(name in checks.COMMUNICATING for name in names):
        yield (
            f"the optimizer {names[0]} communicates in its `step`, and here each rank updates other stages. "
            "Use the plain optimizer inside it; its state is sharded by the strategy."
        )
    if (problem := why_not_by_stage(optimizer)) is not None:
        yield f"the optimizer {problem}"
    if clips_by_itself(optimizer):
        rank_zero_warn(
            f"{WHERE}: the optimizer {names[0]} bounds the norm of the gradients that it is given (`max_grad_norm`), "
            "and it is given those of one stage at a time, so it clips by stage. Give it `max_grad_norm=None`, and the "
            "strategy `clip_norm` and `clip_by`, which say by which norm."
        )
    in_model = {id(parameter) for parameter in module.parameters()}
    strangers = sum(id(each) not in in_model for group in optimizer.param_groups for each in group["params"])
    if strangers:
        yield (
            f"the optimizer {names[0]} has {strangers} parameter(s) that are not in the model, so no rank "
            "would own them. Register them in the LightningModule (`self.part = ...`), or leave them out of it."
        )
    if not any(each.requires_grad for group in optimizer.param_groups for each in group["params"]):
        yield (
            f"no parameter of the optimizer {names[0]} requires a gradient, so there is nothing to train. "
            "Check `requires_grad` and what `configure_optimizers` passes on."
        )
        return
    if problem is None and (problem := why_not_by_parameter(WHERE, optimizer, coupling=not clips_by_itself(optimizer))):
        yield f"the optimizer {problem}"


def warn_of_gradient_hooks(trainer: Trainer, module: LightningModule) -> None:
    """Say which hooks look for gradients where there are none any more."""
    callbacks = [each for each in getattr(trainer, "callbacks", []) if not _is_ours(each)]
    hooks: tuple[str, ...] = ("on_before_optimizer_step",)  # by hand, gradients are there until the optimizer steps
    if module.automatic_optimization:
        hooks = ("backward", "on_after_backward", *hooks, "on_before_zero_grad")
    found = [
        f"{type(each).__name__}.{hook}"
        for each, parent in [(module, LightningModule), *((each, Callback) for each in callbacks)]
        for hook in hooks
        if hasattr(parent, hook) and is_overridden(hook, each, parent)
    ]
    if found:
        rank_zero_warn(
            f"{WHERE}: gradients are handed over during backward, so {', '.join(found)} finds none: `.grad` is None, "
            "and what is done to gradients there (clipping, noise, logging of norms) has no effect or fails. To clip "
            "by value, give `Trainer(gradient_clip_val=..., gradient_clip_algorithm='value')`; by norm, "
            "`Trainer(gradient_clip_val=...)` and `CyclicStrategy(clip_by='stage')` or `clip_by='previous_norm'`. To "
            "change or see this rank's own gradients, use hooks of the parameters (`parameter.register_hook`), "
            "registered before the first batch."
        )


def _is_ours(callback: Callback) -> bool:
    return type(callback).__module__.startswith("lightning_comm.")


def used_before_its_module(error: RuntimeError) -> RuntimeError:
    """Return the error of a parameter that was read before its stage's version was in place."""
    return RuntimeError(
        f"{WHERE}: a parameter was used in this batch before the module that it belongs to was called, and the version "
        "with which this step computes is put in place at that call. Compute penalties on weights behind the forward, "
        "and use a weight that two modules share through the module that runs first. If the model changes a tensor in "
        f"place itself, that is the reason instead: {error}"
    )


def once(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """Return the closure, and refuse to evaluate it twice in a step: the first time hands the gradients over."""
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
    """Return the error of a step that finds no gradient: that of the step before has been handed over."""
    return RuntimeError(
        f"{WHERE}: the optimizer's `step` was called in batch {batch} of this `fit`, for optimizer step {step}, with "
        "no backward since the step before, whose gradients are handed over and not kept. Compute gradients once for "
        "each step: `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` and then `optimizer.step()`; "
        "under manual optimization `self.manual_backward(loss)` before each `optimizer.step()`."
    )


def torn_step(step: int) -> RuntimeError:
    """Return the error of a step of which one part of the gradients was handed over, and the other never will be."""
    return RuntimeError(
        f"{WHERE}: optimizer step {step} ended in an error that `optimizer_step` has caught, when a part of its "
        "gradients had been sent already, so the step can neither be left out nor repeated. Call `optimizer_closure()` "
        "first, inside of the `try`, and `optimizer.step()` behind it: then nothing is sent before the closure is done."
    )


def saved_within_step(step: int) -> RuntimeError:
    """Return the error of a save or a validation while what a forward has computed waits for its backward."""
    return RuntimeError(
        f"{WHERE}: in optimizer step {step} a checkpoint or a validation came between forward and backward, as in "
        "`on_before_backward`. All ranks take up the newest parameters for it, and the backward needs those of the "
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
    """Say what the gradients are that the module's own `optimizer_step`, or its manual optimization, finds."""
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
    """Say that a learning rate was changed when a part of the step's gradients had been sent."""
    rank_zero_warn(
        f"{WHERE}: the learning rate was changed during the backward of optimizer step {step} or behind it, as in "
        "`on_after_backward` or `on_before_optimizer_step`, when stages may have been updated already, so it counts "
        "from the next step. Change it between steps, with a scheduler, or before the backward."
    )


def warn_of_different_rates(step: int, own: float, others: float) -> None:
    """Say that the stages of each rank are updated with another learning rate."""
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
        f"would wait for gradients that do not come.{''.join(which)} {_ANOTHER_FIT}"
    )


def warn_of_another_cut() -> None:
    """Say that a checkpoint's stages are not those of the model as it is now."""
    rank_zero_warn(
        f"{WHERE}: the run that wrote the checkpoint trained other parameters than this one, so the model is cut into "
        "stages anew."
    )


def replaced_parameters(step: int, names: Sequence[str]) -> RuntimeError:
    """Return the error of a module that has other parameters in the places of those that the optimizer has."""
    return RuntimeError(
        f"{WHERE}: {len(names)} parameter(s) that the optimizer trains are not those of the module any more at step "
        f"{step}: {', '.join(names[:8])}. A layer, or a weight, was put in the place of another, and other ranks wait "
        f"for the gradient of the old one. {_ANOTHER_FIT}"
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
    """Return the error of a gradient that comes when its stage's have been sent."""
    return RuntimeError(
        f"{WHERE}: a gradient of stage {stage} (modules {', '.join(modules)}) came after the stage's gradients had "
        "been sent: there was a second backward in the batch, or a part of the model under reentrant checkpointing "
        "runs twice. Let one backward a batch compute all gradients, and use `checkpoint(..., use_reentrant=False)`."
    )


def without_gradient(step: int, names: Sequence[str]) -> RuntimeError:
    """Return the error of parameters that had no part in a step."""
    return RuntimeError(
        f"{WHERE}: {len(names)} parameter(s) had no part in the loss of step {step}, so their gradient, which other "
        f"ranks wait for, does not exist: {', '.join(names[:8])}. Use them in every step, or freeze them with "
        "`requires_grad_(False)` and leave them out of the optimizer; DDPStrategy(find_unused_parameters=True) can do "
        "with parameters that are sometimes unused."
    )


def warn_of_memory(settings: CyclicSettings, devices_here: int, on_cuda: bool) -> None:
    """Say where turns in time are asked for and bring no memory."""
    if settings.stagger == "step" and on_cuda:
        rank_zero_warn(
            f"{WHERE}: `stagger='step'` lowers the sum of activations over the ranks. On {devices_here} devices with a "
            "memory of their own each, none of them needs less. It costs what a barrier a step costs; leave it out "
            "unless ranks share a memory."
        )


def warn_at_start(
    trainer: Trainer, module: LightningModule, settings: CyclicSettings, world_size: int, *, on_cuda: bool
) -> None:
    """Say what will run, but probably not as meant."""
    warn_of_one_process(world_size)
    warn_of_gradient_hooks(trainer, module)
    warn_of_finetuning(trainer)
    warn_of_memory(settings, world_size, on_cuda)
