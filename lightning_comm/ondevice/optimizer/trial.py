"""A trial of an optimizer on a few entries of its parameters: whether it updates each of them by its gradient alone."""

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_comm.ondevice.optimizer.numbers import Numbers, changed, is_number, numbers_of
from lightning_comm.ondevice.optimizer.step_messages import NoMessages, SendsInStepError

_log = logging.getLogger(__name__)

_STEPS = 3  # some numbers, and the updates that depend on them, are still equal after the first step
_ENTRIES = 64  # of each dimension
_GRADIENT = 10.0  # the scale of an entry, large enough that an optimizer that clips by norm does so
_ALIKE = 1e-3  # relative: how much two updates of the same parameter may differ
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True)
class _Outcome:
    """The result of some steps: copies of parameters, and the optimizer's numbers before and after."""

    parameters: list[Tensor]
    before: Numbers
    after: Numbers

    @property
    def changed(self) -> list[str]:
        return changed(self.before, self.after)


@torch.no_grad()
def counters_of(where: str, optimizer: Optimizer) -> set[str]:
    """Return the names of numbers that a step changes even without gradients: counters, equal in every copy."""
    try:
        return set(_try(where, optimizer, _samples(optimizer), []).changed)
    except SendsInStepError:
        raise
    except Exception as error:
        _say_later(optimizer, error)
        return set()


@torch.no_grad()
def why_not_by_parameter(where: str, optimizer: Optimizer, *, coupling: bool = True) -> str | None:
    """Return why an optimizer cannot update some of its parameters without the others; ``None`` if it can.

    A few entries of its smallest parameters are copied, and copies of the optimizer take steps on these: with all
    gradients, with that of the first or the last alone, and with none.

    Args:
        where: The class that asks, for the messages.
        optimizer: The optimizer; it is not changed.
        coupling: Whether to compare updates, or only to look for messages and numbers.

    Returns:
        A sentence that begins with the optimizer's name, and the way out.

    Raises:
        SendsInStepError: If a step would send a message to other ranks.

    Note:
        *Communication.* None.

        *Random numbers.* The generators are restored.

    """
    samples = _samples(optimizer)
    if not samples:
        return None
    try:
        return _problem(where, optimizer, samples, coupling)
    except SendsInStepError:
        raise
    except Exception as error:
        if names := _tensors_on_itself(optimizer):
            return keeps_tensors(optimizer, names)
        _say_later(optimizer, error)
        return None


def _say_later(optimizer: Optimizer, error: Exception) -> None:
    _log.debug("%s failed in a trial step, and will say so in its first one: %r", type(optimizer).__name__, error)


def _problem(where: str, optimizer: Optimizer, samples: Sequence["_Sample"], coupling: bool) -> str | None:
    everything = _try(where, optimizer, samples, range(len(samples)))
    nothing = _try(where, optimizer, samples, [])
    # what a step without gradients changes as well is a counter, which the real optimizer will count too
    unlike = set(changed(everything.after, nothing.after))
    moved = [name for name in everything.changed if name in unlike]
    # a single number in an attribute may be for display only: it matters if updates depend on it
    shown = [name for name in moved if name.startswith("self.") and is_number(everything.after.get(name))]
    if kept := [name for name in moved if name not in shown]:
        return keeps_numbers(optimizer, kept)
    # also the last parameter, where a number may be for display: it may depend on the first one alone
    alone = () if not coupling or len(samples) == 1 else (0, len(samples) - 1) if shown else (0,)
    if not any(_depends_on_others(where, optimizer, samples, everything, number) for number in alone):
        return None
    if shown:
        return keeps_numbers(optimizer, shown)
    return (
        f"{type(optimizer).__name__} updates a parameter by the gradients of others too (such as their norm), and is "
        "given those of one stage at a time. Use one that treats each parameter by itself, such as SGD or AdamW."
    )


def _depends_on_others(
    where: str, optimizer: Optimizer, samples: Sequence["_Sample"], everything: _Outcome, number: int
) -> bool:
    """Whether a parameter's update differs if it alone has a gradient."""
    alone = _try(where, optimizer, samples, [number])
    update = everything.parameters[number] - samples[number].copy
    gap = float((everything.parameters[number] - alone.parameters[number]).abs().max())
    return gap > _ALIKE * float(update.abs().max())


def keeps_numbers(optimizer: Optimizer, names: Sequence[str]) -> str:
    """Return the problem of numbers that are kept for all parameters together."""
    return (
        f"{type(optimizer).__name__} changes {', '.join(names[:8])} in its `step` by what it finds in the gradients of "
        "all parameters, and is given those of one stage at a time. Use one that treats each parameter by itself, such "
        "as SGD or AdamW, or DDPStrategy."
    )


def keeps_tensors(optimizer: Optimizer, names: Sequence[str]) -> str:
    """Return the problem of tensors that belong to parameters but are not in the optimizer's state."""
    return (
        f"{type(optimizer).__name__} keeps tensors in {', '.join(names[:8])}, beside its `state`, and a step on some "
        "of the parameters fails. Let it keep in `state[parameter]` what belongs to a parameter, or use DDPStrategy."
    )


def _tensors_on_itself(optimizer: Optimizer) -> list[str]:
    numbers = numbers_of(optimizer)
    return [name for name, value in numbers.items() if name.startswith("self.") and _holds_tensor(value)]


def _holds_tensor(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Tensor) or any(map(_holds_tensor, parts))


@dataclass(frozen=True)
class _Sample:
    parameter: Parameter
    copy: Tensor
    gradients: list[Tensor]


def _samples(optimizer: Optimizer) -> list[_Sample]:
    """Return some entries of the smallest trained parameter of each number of dimensions in each group."""
    chosen: list[Parameter] = []
    for group in optimizer.param_groups:
        trained = [each for each in group["params"] if each.requires_grad and each.numel()]
        smallest: dict[int, list[Parameter]] = defaultdict(list)
        for parameter in sorted(trained, key=Tensor.numel):
            smallest[parameter.ndim].append(parameter)
        taken = {id(parameter) for same in smallest.values() for parameter in same[:2]}
        chosen += [parameter for parameter in trained if id(parameter) in taken]  # in the optimizer's order
    generator = torch.Generator().manual_seed(0)
    return [_sample(parameter, generator) for parameter in chosen[:24]]


def _sample(parameter: Parameter, generator: torch.Generator) -> _Sample:
    entries = parameter.detach()[(slice(0, _ENTRIES),) * parameter.ndim].clone()
    drawn = [torch.randn(entries.shape, generator=generator) * _GRADIENT for _ in range(_STEPS)]
    return _Sample(parameter, entries, [each.to(entries) for each in drawn])


def _try(where: str, optimizer: Optimizer, samples: Sequence[_Sample], with_gradient: Sequence[int]) -> _Outcome:
    copies = [Parameter(sample.copy.clone()) for sample in samples]
    twin = _twin(optimizer, {id(each.parameter): mine for each, mine in zip(samples, copies, strict=True)})
    before = numbers_of(twin)
    devices = list({each.device for each in copies if each.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for step in range(_STEPS):
            _seed(step, devices)  # a parameter gets the same random numbers whether or not others have a gradient
            for number in with_gradient:
                copies[number].grad = samples[number].gradients[step].clone()
            with NoMessages(where, optimizer):
                twin.step()
    return _Outcome([each.detach().clone() for each in copies], before, numbers_of(twin))


def _seed(seed: int, devices: Sequence[torch.device]) -> None:
    """Seed only the generators whose states are saved, unlike ``torch.manual_seed``, which seeds all devices."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _twin(optimizer: Optimizer, copies: Mapping[int, Parameter]) -> Optimizer:
    """Return a copy of the optimizer for these parameter copies, without state or hooks and with its own numbers."""
    twin: Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(each): each for group in optimizer.param_groups for each in group["params"]}
    memo |= copies
    for name, value in vars(optimizer).items():
        if name not in ("step", "state", "param_groups"):
            vars(twin)[name] = OrderedDict() if name in _HOOKS else _copied(value, memo)
    twin.param_groups = [
        {
            **{key: _copied(value, memo) for key, value in group.items() if key != "params"},
            "params": [copies[id(each)] for each in group["params"] if id(each) in copies],
        }
        for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, AttributeError):  # a handle, such as of a process group
        return value
