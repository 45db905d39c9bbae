"""Settings of Cyclic Data Parallelism, checked as far as is possible without a model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_comm.core.cyclic.schedule import RULES, CyclicSchedule, Rule
from lightning_comm.errors import refuse
from lightning_comm.ondevice.cyclic.update import ClipBy

WHERE = "CyclicStrategy"
ANOTHER_FIT = (
    "Freeze, unfreeze, add and replace parameters before `fit`; to change them later, end this `fit`, save a "
    "checkpoint and start another `fit` from its weights."
)
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
    """Return the settings if each is in range, as far as that is known without the number of ranks.

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
