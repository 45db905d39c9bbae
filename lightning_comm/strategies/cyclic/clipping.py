"""Limits of the gradient under Cyclic Data Parallelism: the Trainer's, or the strategy's own."""

import math
from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer

from lightning_comm.errors import refuse
from lightning_comm.ondevice.cyclic.update import Clipping
from lightning_comm.strategies.cyclic.settings import WHERE, CyclicSettings


def clipping_of(settings: CyclicSettings, trainer: Trainer, module: LightningModule, *, changed: bool) -> Clipping:
    """Return the limits in force.

    Args:
        settings: Of the strategy.
        trainer: The Trainer.
        module: The model.
        changed: Whether this run has begun with other limits of the Trainer's.

    Raises:
        RefusedSetUp: If they cannot work, such as after a callback has changed the Trainer's in the middle of a run.

    """
    when = "the Trainer's limit of the gradient was changed in mid-run: " if changed else ""
    refuse(WHERE, (f"{when}{problem}" for problem in problems(settings, trainer, module)))
    limit, by = _limit(trainer), settings.clip_by or "stage"
    if limit is not None and _by_value(trainer):
        return Clipping(value=limit)
    return Clipping(settings.clip_norm if limit is None else limit, by)


def problems(settings: CyclicSettings, trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """Yield why gradients cannot be clipped as Trainer and strategy require."""
    limit = trainer.gradient_clip_val
    if limit is not None and math.isnan(limit):
        yield f"`Trainer(gradient_clip_val={limit!r})` is no limit. Give a number > 0, or None, which does not clip."
    limit = _limit(trainer)
    if limit is None:
        return
    if _by_value(trainer):
        yield from _problems_by_value(settings, limit, module)
        return
    if settings.clip_by is None and settings.clip_norm is None:
        yield (
            f"`Trainer(gradient_clip_val={limit!r})` bounds the norm of the whole gradient, which is not known when "
            "the first stages are updated. Choose by one argument of the strategy what takes its place: "
            "`CyclicStrategy(clip_by='stage')` clips each stage by its own norm, and `clip_by='previous_norm'` clips "
            "all by the norm of the whole gradient one step before. `Trainer(gradient_clip_algorithm='value')` needs "
            "no choice."
        )
    if settings.clip_norm is not None and settings.clip_norm != limit:
        yield (
            f"`clip_norm`={settings.clip_norm!r} and `Trainer(gradient_clip_val={limit!r})` are two limits of the same "
            "norm. Leave one of them out."
        )


def _problems_by_value(settings: CyclicSettings, limit: float, module: LightningModule) -> Iterator[str]:
    trainers = f"`Trainer(gradient_clip_val={limit!r}, gradient_clip_algorithm='value')`"
    if settings.clip_norm is not None:
        yield f"`clip_norm`={settings.clip_norm!r} and {trainers} are two ways to clip. Leave one of them out."
    elif settings.clip_by is not None:
        yield (
            f"`clip_by`={settings.clip_by!r} says by which norm to clip, and {trainers} clips each entry by itself. "
            "Leave one of them out."
        )
    turned = [name for name, each in module.named_parameters() if each.requires_grad and each.is_complex()]
    if turned:
        yield (
            f"{trainers} has no meaning for complex entries, which have no order: {', '.join(turned[:8])}. Clip by the "
            "norm: `gradient_clip_algorithm='norm'`, with `CyclicStrategy(clip_by='stage')` or `'previous_norm'`."
        )


def _limit(trainer: Trainer) -> float | None:
    """Return the Trainer's limit, if there is one; as in Lightning, 0 and less are none."""
    limit = trainer.gradient_clip_val
    return limit if limit is not None and 0 < limit < math.inf else None


def _by_value(trainer: Trainer) -> bool:
    return bool(trainer.gradient_clip_algorithm == "value")
