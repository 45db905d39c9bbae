"""The cut of a model into stages, by its first forward and the same on all ranks."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Parameter

from lightning_comm.core.cyclic.cuts import default_stages
from lightning_comm.ondevice.cyclic.stages import ForwardTrace, Stage, Unit, cut, cut_at
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.settings import WHERE, CyclicSettings


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


class ModelCutter:
    """The trace of the first forward of a run, by which the model is cut.

    Args:
        fit: What all parts of the run share.
        broadcast: Sends an object of rank 0's to all ranks.

    """

    def __init__(self, fit: Fit, broadcast: Callable[[Any], Any]) -> None:
        self._fit = fit
        self._broadcast = broadcast
        self._trace: ForwardTrace | None = None

    def watch(self, trained: Sequence[Parameter]) -> None:
        """Trace the forward that begins now; calls of modules by callbacks before it do not count.

        Args:
            trained: The parameters that are to be cut into stages.

        """
        self.close()  # of a forward without a backward, whose error the module may have caught
        self._trace = ForwardTrace(self._fit.module, trained)

    def stages(self) -> list[Stage] | None:
        """Return the stages of the forward that was traced, the same on all ranks; ``None`` if none was."""
        if self._trace is None:
            return None
        trace, self._trace = self._trace, None
        recorder = self._fit.recorder
        return agreed_stages(trace.units(), self._fit.settings, recorder.rank, recorder.world_size, self._broadcast)

    def close(self) -> None:
        """Take the hooks of a trace away."""
        if self._trace is not None:
            self._trace.units()
