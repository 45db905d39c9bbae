"""Where the model of a run is cut into stages, the same on all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_comm.core.cyclic.cuts import default_stages
from lightning_comm.ondevice.cyclic.stages import Stage, Unit, cut, cut_at
from lightning_comm.strategies.cyclic.refusals import WHERE, CyclicSettings


def agreed_stages(
    units: Sequence[Unit], settings: CyclicSettings, rank: int, workers: int, broadcast: Callable[[Any], Any]
) -> list[Stage]:
    """Cut the model as rank 0 saw it run.

    Raises:
        ValueError: On all ranks, if the settings do not fit the model.

    Note:
        *Communication.* One broadcast of names.

    """
    problem, found = None, []
    if rank == 0:
        try:
            found = _stages(units, settings, workers)
        except ValueError as error:
            problem = str(error)
    problem, sent = broadcast((problem, [(stage.modules, stage.parameters) for stage in found]))
    if problem is not None:
        raise ValueError(problem)
    return [Stage(tuple(modules), tuple(parameters)) for modules, parameters in sent]


def _stages(units: Sequence[Unit], settings: CyclicSettings, workers: int) -> list[Stage]:
    if isinstance(settings.stages, list):
        return cut_at(units, settings.stages, WHERE)
    if not units:
        raise ValueError(
            f"{WHERE}: no parameter that the optimizer trains requires a gradient in the first batch, so there is "
            "nothing to train. Freeze a part of the model only."
        )
    if len(units) < workers:
        raise ValueError(
            f"{WHERE}: the model has {len(units)} module(s) with trainable parameters that ran, and each of the "
            f"{workers} ranks needs a stage of at least one. Use fewer ranks, or build the model of more modules."
        )
    count = settings.stages or default_stages(len(units), workers, settings.lag)
    if count > len(units):
        raise ValueError(
            f"{WHERE}: `stages`={count} is more than the {len(units)} modules with trainable parameters that ran: "
            f"{', '.join(unit.module or '(none)' for unit in units)}. Leave `stages` out, or give a multiple of the "
            f"number of ranks, {workers}, that is not above {len(units)}."
        )
    return cut(units, count)
