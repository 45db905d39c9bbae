"""Where a model is cut into stages: modules in the order in which they run, with what each takes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_comm.core.cyclic_stages import balanced_cuts

START = ""  # in place of a module's name: the start of the step


@dataclass(frozen=True)
class Unit:
    """What is never cut: a module that ran, with the parameters that it needs first.

    Args:
        module: Its name. A parameter whose own module is not called (an attention's projection) belongs to the nearest
            module above that is; what none is above of belongs to the start of the step.
        parameters: Their names.
        cost: Seconds of forward from its first call to that of the next unit.

    """

    module: str
    parameters: tuple[str, ...]
    cost: float


class ForwardTrace:
    """Notes which modules run in a forward pass, in which order, and what they take. Ends with :meth:`units`.

    Args:
        module: The model.
        parameters: Those that are to be cut into stages.

    Note:
        *Communication.* None. On CUDA :meth:`units` waits for the device once.

    """

    def __init__(self, module: nn.Module, parameters: Iterable[Parameter]) -> None:
        self._module = module
        self._wanted = {id(parameter) for parameter in parameters}
        self._device = next(module.parameters()).device
        self._called: dict[str, float | torch.cuda.Event] = {}
        self._handles: list[RemovableHandle] = [
            part.register_forward_pre_hook(lambda part, inputs, name=name: self._note(name), prepend=True)
            for name, part in module.named_modules()
            if name and any(id(parameter) in self._wanted for parameter in part.parameters())
        ]

    def begin(self) -> None:
        """Note the start of a step; the first time counts."""
        self._note(START)

    def _note(self, name: str) -> None:
        if name not in self._called:
            self._called[name] = self._now()

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def units(self) -> list[Unit]:
        """Take the hooks away, and return the units in the order in which they ran."""
        end = self._now()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        place = {name: k for k, name in enumerate(self._called)}
        first_use: dict[int, str] = {}
        names: dict[int, str] = {}
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if id(parameter) not in self._wanted:
                continue
            names.setdefault(id(parameter), name)
            guard = self._guard(name)
            other = first_use.setdefault(id(parameter), guard)
            if place[guard] < place[other]:
                first_use[id(parameter)] = guard  # a tied weight: its gradient is ready after its earliest use
        guards = sorted(set(first_use.values()), key=lambda guard: place[guard])
        marks = [*(self._called[guard] for guard in guards), end]
        return [
            Unit(
                guard,
                tuple(names[key] for key, its_guard in first_use.items() if its_guard == guard),
                self._seconds(marks[k], marks[k + 1]),
            )
            for k, guard in enumerate(guards)
        ]

    def _guard(self, parameter: str) -> str:
        module = parameter.rpartition(".")[0]
        while module and module not in self._called:
            module = module.rpartition(".")[0]
        return module

    def _seconds(self, begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            torch.cuda.synchronize(self._device)
            return float(begin.elapsed_time(end)) / 1000
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin


@dataclass(frozen=True)
class Stage:
    """One stage: the modules at whose first call its version must be there, and its parameters, by name."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def cut(units: Sequence[Unit], stages: int) -> list[Stage]:
    """Cut units into so many stages of about equal cost."""
    return _joined(units, balanced_cuts([unit.cost for unit in units], stages))


def cut_at(units: Sequence[Unit], names: Sequence[str], where: str) -> list[Stage]:
    """Cut units in front of the modules with these names.

    Args:
        units: In the order in which they ran.
        names: The first module of each stage. What runs before the first of them belongs to it.
        where: Who asks, for the message.

    Raises:
        ValueError: If a name is not there, or they are not in the order in which modules run.

    """
    firsts: list[int] = []
    for name in names:
        found = [k for k, unit in enumerate(units) if unit.module == name or unit.module.startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"{where}: `stages` names {name!r}, and no module of that name with trainable parameters ran in the "
                f"first step. These did, in this order: {', '.join(unit.module or '(none)' for unit in units)}."
            )
        if firsts and found[0] <= firsts[-1]:
            raise ValueError(
                f"{where}: `stages` must name modules in the order in which they run; got {name!r}, which does not run "
                f"after {units[firsts[-1]].module!r}. The order is: "
                f"{', '.join(unit.module or '(none)' for unit in units)}."
            )
        firsts.append(found[0])
    return _joined(units, [0, *firsts[1:]])


def _joined(units: Sequence[Unit], firsts: Sequence[int]) -> list[Stage]:
    ends = [*firsts[1:], len(units)]
    return [
        Stage(
            tuple(unit.module for unit in units[first:end]),
            tuple(name for unit in units[first:end] for name in unit.parameters),
        )
        for first, end in zip(firsts, ends, strict=True)
    ]
