"""Refusals of Cyclic Data Parallelism before training, and warnings of settings that bring nothing.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it. What only a
step can show is in :mod:`lightning_comm.strategies.cyclic.step_errors`.
"""

from collections.abc import Iterator, Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_comm.ondevice.cyclic.update import clips_by_itself, why_not_by_stage
from lightning_comm.ondevice.optimizer.trial import why_not_by_parameter
from lightning_comm.ondevice.shared_memory import shared
from lightning_comm.strategies.common import checks, model_checks
from lightning_comm.strategies.cyclic.settings import ANOTHER_FIT, WHERE, CyclicSettings

_BACKENDS = ("gloo", "nccl")
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_STREAMS = 5


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
    """Warn that there is no other rank to take turns with."""
    if world_size == 1:
        rank_zero_warn(
            f"{WHERE}: one process only, so there is nobody to take turns with; training goes on as without the "
            "strategy, one update late under rule 'v1' and with a lag. Give the Trainer `devices=2` or more; to see on "
            "one device what the delay does, use `simulate_delay`."
        )


def trainer_problems(trainer: Trainer, sync_batchnorm: bool) -> Iterator[str]:
    """Yield settings and callbacks of the Trainer that cannot work with this strategy."""
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
                f"parameters that are trained then. Leave it out. {ANOTHER_FIT}"
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
    """Warn of what happens if a callback unfreezes parameters later, which only the callback knows."""
    callbacks = [each for each in getattr(trainer, "callbacks", []) if isinstance(each, BaseFinetuning)]
    if names := [type(each).__name__ for each in callbacks if not isinstance(each, BackboneFinetuning)]:
        rank_zero_warn(
            f"{WHERE}: the callback {', '.join(names)} may unfreeze parameters in the middle of the run. It can freeze "
            "them for all of it; where it unfreezes parameters after the first batch, the run ends there with an "
            f"error, since stages are cut once, of the parameters that are trained then. {ANOTHER_FIT}"
        )


def warn_of_memory(settings: CyclicSettings, devices_here: int, on_cuda: bool) -> None:
    """Warn if a stagger is set where it saves no memory."""
    if settings.stagger == "step" and on_cuda:
        rank_zero_warn(
            f"{WHERE}: `stagger='step'` lowers the sum of activations over the ranks. On {devices_here} devices with a "
            "memory of their own each, none of them needs less. It costs what a barrier a step costs; leave it out "
            "unless ranks share a memory."
        )


def check_trial(active: bool, step: int) -> None:
    """Refuse a trial run in the middle of a run: it restores weights, of which ring and stages do not know.

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
    """Yield why hooks cannot follow a module, and whether it communicates in its forward."""
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
    """Warn of hooks that look for gradients where there are none any more."""
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


def warn_at_start(
    trainer: Trainer, module: LightningModule, settings: CyclicSettings, world_size: int, *, on_cuda: bool
) -> None:
    """Warn of settings that will run, but probably not as intended."""
    warn_of_one_process(world_size)
    warn_of_gradient_hooks(trainer, module)
    warn_of_finetuning(trainer)
    warn_of_memory(settings, world_size, on_cuda)


def _is_ours(callback: Callback) -> bool:
    return type(callback).__module__.startswith("lightning_comm.")
