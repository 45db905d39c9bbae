"""A rank's part of an optimizer: it updates the stages that the rank owns, one at a time, beside compute."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_comm.ondevice.cyclic.update import Clipping, Number, clip_, settings_of, squared_norm
from lightning_comm.ondevice.optimizer.numbers import changed, numbers_of
from lightning_comm.ondevice.optimizer.step_messages import NoMessages
from lightning_comm.ondevice.optimizer.trial import counters_of, keeps_numbers
from lightning_comm.transport.cyclic.messages import StageMessage

_WHERE = "CyclicStrategy"

SQUARED_NORM = 7  # where a stage's squared gradient norm stands in the status of its new version


class StageOptimizer:
    """Steps the owned stages of an optimizer on copies of their parameters, by the settings of the gradient's step.

    The optimizer itself stays as its user made it: its groups hold the module's parameters and are what schedulers
    change, and it steps on nothing, since lanes have taken the gradients before. For each owned stage a twin of it
    holds copies of the parameters, and all the state that there is. Compute reads the module's parameters, and lanes
    write the copies, each those of its stage, so that no lock is needed.

    Args:
        optimizer: The user's.
        owned: The parameters of each stage that this rank owns, in the order of their gradients in a message.
        previous_norm: Returns the norm of the whole mean gradient of the step before a step, ``None`` before the first.

    Note:
        *Communication.* None.

        *Memory.* A copy of the owned parameters, beside their optimizer state.

        *On a CUDA device* the host waits for nothing in an update, however gradients are clipped: squared norms, the
        norm of the step before and the factor stay on the device, and go into the status there. The user's optimizer
        may still wait in its own ``step``.

        *Streams.* Copies and restored state are written on the stream of the thread that makes this, and updated on
        that of a lane. A lane's first update of a stage follows its own gradient's mark, which was set later. What
        reads the state for a checkpoint follows the mark of the version that came of its last update, which it has
        used.

    """

    def __init__(
        self,
        optimizer: Optimizer,
        owned: Mapping[int, Sequence[Parameter]],
        previous_norm: Callable[[int], Number | None],
    ) -> None:
        self._optimizer = optimizer
        self._previous_norm = previous_norm
        self._settings: dict[int, tuple[list[dict[str, Any]], Clipping]] = {}  # by step
        self._copies: dict[int, list[Parameter]] = {}
        self._twins: dict[int, Optimizer] = {}
        self._counters = counters_of(_WHERE, optimizer)
        self._watched: set[int] = set()  # stages whose first update is done
        self._owned: dict[int, tuple[Optimizer, Parameter]] = {}  # by number in the optimizer's `state_dict`
        numbers = {id(parameter): number for number, parameter in enumerate(_parameters(optimizer))}
        for stage, parameters in owned.items():
            copies = {id(parameter): _copy_of(parameter) for parameter in parameters}
            twin = _twin_of(optimizer, copies)
            self._copies[stage], self._twins[stage] = list(copies.values()), twin
            for parameter in parameters:
                self._owned[numbers[id(parameter)]] = twin, copies[id(parameter)]
        for number, parameter in enumerate(_parameters(optimizer)):
            if not parameter.requires_grad:
                continue  # frozen now: its state stays where it is, and goes into the next checkpoint
            state = optimizer.state.pop(parameter, None)  # restored from a checkpoint, of all parameters
            if state is not None and number in self._owned:
                twin, copy = self._owned[number]
                twin.state[copy] = state

    def note_settings(self, step: int, clipping: Clipping) -> None:
        """Note the learning rates and other settings of the groups that count for a step's gradient, and its limits."""
        self._settings[step] = settings_of(self._optimizer), clipping
        # learning rates that are tensors of the device are kept until no update can still read them: this rank has
        # the status of two steps ago, for which all updates before that are done, also on the device
        for old in [each for each in self._settings if each < step - 4]:
            del self._settings[old]

    def update(self, step: int, stage: int, message: StageMessage) -> None:
        """Take the mean gradient of a stage from a message, update the stage, and leave its new parameters there."""
        squared = squared_norm(message.parts)
        if isinstance(squared, Tensor):
            message.status[SQUARED_NORM].copy_(squared)
        else:
            message.status[SQUARED_NORM].fill_(squared)
        groups, clipping = self._settings[step]
        by_previous = clipping.norm is not None and clipping.by == "previous_norm"
        clip_(clipping, squared, self._previous_norm(step) if by_previous else None, message.parts)
        twin, copies = self._twins[stage], self._copies[stage]
        for group, settings in zip(twin.param_groups, groups, strict=True):
            group.update(settings)
        for copy, gradient in zip(copies, message.parts, strict=True):
            copy.grad = gradient
        before = numbers_of(twin, scalars_only=True)
        with nullcontext() if stage in self._watched else NoMessages(_WHERE, self._optimizer):
            twin.step()
        self._watched.add(stage)
        moved = changed(before, numbers_of(twin, scalars_only=True))
        if uncounted := [name for name in moved if name not in self._counters and not name.startswith("self.")]:
            # a trial has looked for them before training; these change only later
            raise RuntimeError(f"{_WHERE}: the optimizer {keeps_numbers(twin, uncounted)}")
        for copy, part in zip(copies, message.parts, strict=True):
            copy.grad = None
            part.copy_(copy)

    def own_state(self) -> dict[int, dict[str, Any]]:
        """Return the state of the owned parameters, by their number in the optimizer's ``state_dict``."""
        return {
            number: {key: _on_host(value) for key, value in twin.state[copy].items()}
            for number, (twin, copy) in self._owned.items()
            if copy in twin.state
        }

    def state_bytes(self) -> int:
        """Return the bytes of tensors that the state of this rank's optimizer holds."""
        states = [state for twin in self._twins.values() for state in twin.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _twin_of(optimizer: Optimizer, copies: Mapping[int, Parameter]) -> Optimizer:
    """Return an optimizer of the same kind and settings, over the copies alone and without state."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a learning-rate scheduler has wrapped the original's in a counter
    twin.param_groups = [
        {**group, "params": [copies[id(each)] for each in group["params"] if id(each) in copies]}
        for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    return twin


def _copy_of(parameter: Parameter) -> Parameter:
    return Parameter(parameter.detach().clone(memory_format=torch.preserve_format))


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
