"""One error with everything in a set-up that cannot work, instead of one error a start."""

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import Self


class RefusedSetUp(MisconfigurationException, ValueError):
    """What cannot work together, all of it; raised before training.

    Args:
        problems: For each, who refuses it, and a sentence or more: argument, value, rule, way out.

    Example:
        >>> lag = ("CyclicStrategy", "`lag`=3 is too much. Leave it out.")
        >>> print(RefusedSetUp([lag]))
        CyclicStrategy: `lag`=3 is too much. Leave it out.
        >>> print(RefusedSetUp([lag, ("CyclicStrategy", "LBFGS cannot be cut. Use SGD.")]))
        CyclicStrategy: 2 things in this set-up cannot work:
          1. `lag`=3 is too much. Leave it out.
          2. LBFGS cannot be cut. Use SGD.

    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__(_text(self.problems))

    def __reduce__(self) -> tuple[type["RefusedSetUp"], tuple[list[tuple[str, str]]]]:
        return type(self), (self.problems,)  # a process that is started for a rank hands it to its parent


def _text(problems: list[tuple[str, str]]) -> str:
    if len(problems) == 1:
        return ": ".join(problems[0])
    by_one = len({where for where, _ in problems}) == 1
    lines = (text if by_one else f"{where}: {text}" for where, text in problems)
    numbered = [f"  {number}. {line}" for number, line in enumerate(lines, start=1)]
    head = problems[0][0] if by_one else "lightning_comm"
    return "\n".join([f"{head}: {len(problems)} things in this set-up cannot work:", *numbered])


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise one error with all problems, if there are any.

    Raises:
        RefusedSetUp: If there are.

    """
    found = [(where, problem) for problem in problems]
    if found:
        raise RefusedSetUp(found)


@runtime_checkable
class TakesRefusals(Protocol):
    """A strategy that raises what callbacks refuse together with what it refuses itself."""

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback has found in its own ``setup``, which comes before the strategy's."""


def refuse_with_strategy(trainer: Trainer, where: str, problems: Iterable[str]) -> None:
    """Let the strategy raise what a callback refuses in its ``setup``, where it is one of ours; otherwise raise it.

    Raises:
        RefusedSetUp: If there are problems, and nobody else to raise them.

    """
    strategy: object = trainer.strategy
    if isinstance(strategy, TakesRefusals):
        strategy.refuse_in_set_up(where, problems)
    else:
        refuse(where, problems)


class Refusals:
    """What is found during a set-up, raised at its end as one error.

    A step of the set-up that fails behind a problem, as it may because of it, is not reported in its place. All steps
    are taken, whatever was found before, since every rank must take part in the messages of each.

    Args:
        where: Who refuses.
        found: What others have found before.

    Example:
        >>> with Refusals("CyclicStrategy") as refusals:
        ...     refusals.add([])

    """

    def __init__(self, where: str, found: Iterable[tuple[str, str]] = ()) -> None:
        self._where = where
        self._problems = list(found)

    @property
    def found(self) -> bool:
        """Whether there are problems so far."""
        return bool(self._problems)

    def add(self, problems: Iterable[str]) -> None:
        """Note problems; none is fine."""
        self._problems += [(self._where, problem) for problem in problems]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._problems and (error is None or isinstance(error, Exception)):
            found = error.problems if isinstance(error, RefusedSetUp) else []
            raise RefusedSetUp([*self._problems, *found]) from error
