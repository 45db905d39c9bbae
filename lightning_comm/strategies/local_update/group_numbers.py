"""Numbers that an optimizer keeps for a whole group of parameters: they stay local where states are averaged."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_comm.ondevice.optimizer.numbers import Numbers, changed


class GroupNumbers:
    """Warns once of each optimizer whose step changes numbers of its groups, such as an estimate of its own step size.

    Whole numbers count steps, which all ranks take alike.

    Args:
        where: The strategy, for the message.

    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._warned: set[int] = set()
        self._before: Numbers = {}

    def noting(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, wrapped so that the numbers are noted after it, before the optimizer steps."""
        self._before = {}

        def run() -> Any:
            output = closure()
            self._before = _fractions(optimizer) if id(optimizer) not in self._warned else {}
            return output

        return run

    def look(self, optimizer: Optimizer) -> None:
        """Look for numbers that the step has changed; called after it."""
        before, self._before = self._before, {}
        if not before or not (names := changed(before, _fractions(optimizer))):
            return
        self._warned.add(id(optimizer))
        rank_zero_warn(
            f"{self._where}: the optimizer {type(optimizer).__name__} changes {', '.join(names[:8])} in its `step`. "
            "`optimizer_state='average'` averages what it keeps for each parameter; these numbers stay each rank's own."
            " Use 'local', or an optimizer without them."
        )


def _fractions(optimizer: Optimizer) -> Numbers:
    return {
        f"param_groups[{index}]['{key}']": value.detach().clone() if isinstance(value, Tensor) else value
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if isinstance(value, (float, Tensor))
    }
