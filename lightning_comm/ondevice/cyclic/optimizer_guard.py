"""Changes of an optimizer between two steps that do not reach the stages' own copies of it."""

from collections import defaultdict
from typing import Any

from torch.optim import Optimizer

from lightning_comm.ondevice.optimizer.numbers import changed, numbers_of


class _State(defaultdict[Any, Any]):
    """The state of an optimizer whose stages keep it elsewhere; notes that it was to be cleared."""

    cleared = False

    def clear(self) -> None:
        self.cleared = True
        super().clear()


class OptimizerGuard:
    """Notes how an optimizer is after its own step, and what is different before the next one.

    Learning rates and other settings in the groups may change: they are noted for each step. What may not is the
    division into groups, `requires_grad`, the state, and numbers on the optimizer itself.

    Args:
        optimizer: The user's, whose state of trained parameters has been handed to the stages.

    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        optimizer.state = _State(dict, optimizer.state)
        self._state = optimizer.state
        self._groups = self._trained()
        self.note()

    def note(self) -> None:
        """Note how it is; after its own step."""
        self._had_state = self._having_state()
        self._numbers = self._own_numbers()

    @property
    def parameters(self) -> int:
        """How many parameters it trained at first."""
        return sum(map(len, self._groups))

    def trains_others(self) -> bool:
        """Whether it trains other parameters than at first, or in other groups."""
        return self._trained() != self._groups

    def changed(self) -> list[str]:
        """Return what else has been changed since it was noted."""
        state = self._optimizer.state
        lost = state is not self._state or self._state.cleared
        found = ["state"] if lost or self._having_state() != self._had_state else []
        return [*found, *changed(self._numbers, self._own_numbers())]

    def _trained(self) -> list[list[int]]:
        groups = self._optimizer.param_groups
        return [[id(each) for each in group["params"] if each.requires_grad] for group in groups]

    def _having_state(self) -> set[int]:
        return {id(parameter) for parameter, state in self._optimizer.state.items() if state}

    def _own_numbers(self) -> dict[str, Any]:
        numbers = numbers_of(self._optimizer, scalars_only=True)
        return {name.removeprefix("self."): value for name, value in numbers.items() if name.startswith("self.")}
