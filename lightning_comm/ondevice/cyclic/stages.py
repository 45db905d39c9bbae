"""Stages of a model: modules in the order in which they run, cut by how much work each is."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_comm.core.cyclic.cuts import balanced_cuts

START = ""  # in place of a module's name: the start of the step


@dataclass(frozen=True)
class Unit:
    """What is never cut: a module that ran, with the parameters that it needs first.

    Args:
        module: Its name. A parameter whose own module is not called (an attention's projection) belongs to the nearest
            module above that is; what none is above of belongs to the start of the step.
        parameters: Their names.
        work: Multiply-adds of a forward with these parameters.
        size_bytes: Of the parameters.

    """

    module: str
    parameters: tuple[str, ...]
    work: int
    size_bytes: int


def not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook out of what `torch.compile` makes of the module that it is on."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return hook
    outside: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return outside


class ForwardTrace:
    """Notes which modules run in a forward pass, in which order, and how much work it is. Ends with :meth:`units`.

    Work is counted, not timed: the first forward of a run is full of what happens only once, and a cut that depended on
    the clock would let two runs of the same job differ in rounding and staleness.

    Args:
        module: The model.
        parameters: Those that are to be cut into stages.

    Note:
        *Communication.* None.

    """

    def __init__(self, module: nn.Module, parameters: Iterable[Parameter]) -> None:
        self._module = module
        self._wanted = {id(parameter) for parameter in parameters}
        self._called = {START: 0}  # positions of what each module has given so far, in the order of first calls
        self._handles: list[RemovableHandle] = []
        for name, part in module.named_modules():
            if type(part).__name__ == "RecursiveScriptModule":
                continue  # from `torch.jit.script`, and takes no hooks: its parameters belong to what is above it
            if name and any(id(parameter) in self._wanted for parameter in part.parameters()):
                self._handles += [
                    part.register_forward_pre_hook(not_compiled(partial(self._begin, name)), prepend=True),
                    part.register_forward_hook(not_compiled(partial(self._end, name))),
                ]

    def _begin(self, name: str, *_: Any) -> None:
        self._called.setdefault(name, 0)

    def _end(self, name: str, part: nn.Module, inputs: Any, output: Any) -> None:
        self._called[name] += _positions(part, output)

    def units(self) -> list[Unit]:
        """Take the hooks away, and return the units in the order in which they ran."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        place = {name: k for k, name in enumerate(self._called)}
        first_use: dict[int, str] = {}
        names: dict[int, str] = {}
        work: dict[int, int] = defaultdict(int)
        sizes: dict[int, int] = {}
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            key, guard = id(parameter), self._guard(name)
            if key not in self._wanted:
                continue
            names.setdefault(key, name)
            sizes[key] = parameter.numel() * parameter.element_size()
            work[key] += self._called[guard] * parameter.numel() if parameter.ndim > 1 else 0
            if place[guard] < place[first_use.setdefault(key, guard)]:
                first_use[key] = guard  # a tied weight: its gradient is ready after its earliest use
        units = []
        for guard in sorted(set(first_use.values()), key=lambda guard: place[guard]):
            keys = [key for key, its_guard in first_use.items() if its_guard == guard]
            parameters = tuple(names[key] for key in keys)
            units.append(Unit(guard, parameters, sum(work[key] for key in keys), sum(sizes[key] for key in keys)))
        return units

    def _guard(self, parameter: str) -> str:
        module = parameter.rpartition(".")[0]
        while module and module not in self._called:
            module = module.rpartition(".")[0]
        return module


def _positions(part: nn.Module, output: Any) -> int:
    """Return how often a module has used each weight for what it has given."""
    while isinstance(output, (list, tuple)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.ndim or isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    channels = int(getattr(part, "out_channels", output.shape[-1]))
    return output.numel() // channels if channels else 0


@dataclass(frozen=True)
class Stage:
    """One stage: the modules at whose first call its version must be there, and its parameters, by name."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def cut(units: Sequence[Unit], stages: int) -> list[Stage]:
    """Cut units into so many stages that share work and bytes about equally: compute wants one, messages the other."""
    work, size = (max(1, sum(each)) for each in zip(*((unit.work, unit.size_bytes) for unit in units), strict=True))
    return _joined(units, balanced_cuts([unit.work / work + unit.size_bytes / size for unit in units], stages))


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
