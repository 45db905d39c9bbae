"""Errors of a set-up: all that cannot work is collected and raised as one error, instead of one at each start."""

from collections.abc import Iterable
from types import TracebackType

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import Self


class RefusedSetUp(MisconfigurationException, ValueError):
    """The error that lists everything in a set-up that cannot work together; raised before training.

    Args:
        problems: For each, the class that refuses it, and a text: argument, value, rule, way out.

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
        return type(self), (self.problems,)  # the process of a rank pickles it for its parent


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


class Refusals:
    """The problems found during a set-up, raised at its end as one error.

    The set-up goes on after a problem, since every rank must take part in the messages of each step. If a later step
    then raises an error, as it may because of the problem, the problems are raised instead, with that error as their
    cause.

    Args:
        where: The class that refuses.
        found: Problems found before, such as those of callbacks.

    Example:
        >>> with Refusals("CyclicStrategy") as refusals:
        ...     refusals.add([])

    """

    def __init__(self, where: str, found: Iterable[tuple[str, str]] = ()) -> None:
        self._where = where
        self._problems = list(found)

    @property
    def found(self) -> bool:
        """Whether there are any problems so far."""
        return bool(self._problems)

    def add(self, problems: Iterable[str]) -> None:
        """Add problems; there may be none."""
        self._problems += [(self._where, problem) for problem in problems]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._problems and (error is None or isinstance(error, Exception)):
            found = error.problems if isinstance(error, RefusedSetUp) else []
            raise RefusedSetUp([*self._problems, *found]) from error
