"""One error with everything in a set-up that cannot work, instead of one error a start."""

from collections.abc import Iterable
from types import TracebackType

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import Self


class RefusedSetUp(MisconfigurationException, ValueError):
    """What cannot work together, all of it; raised before training.

    Args:
        where: Who refuses it.
        problems: One sentence or more for each: argument, value, rule, way out.

    Example:
        >>> print(RefusedSetUp("CyclicStrategy", ["`lag`=3 is too much. Leave it out."]))
        CyclicStrategy: `lag`=3 is too much. Leave it out.
        >>> print(RefusedSetUp("CyclicStrategy", ["`lag`=3: leave it out.", "LBFGS: use SGD."]))
        CyclicStrategy: 2 things in this set-up cannot work:
          1. `lag`=3: leave it out.
          2. LBFGS: use SGD.

    """

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems = list(dict.fromkeys(problems))
        super().__init__(self._text())

    def also(self, problems: Iterable[str]) -> None:
        """Add what was found later, before anybody reads the message."""
        self.problems = list(dict.fromkeys([*self.problems, *problems]))
        self.args = (self._text(),)

    def __reduce__(self) -> tuple[type["RefusedSetUp"], tuple[str, list[str]]]:
        return type(self), (self.where, self.problems)

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.where}: {self.problems[0]}"
        lines = (f"  {number}. {problem}" for number, problem in enumerate(self.problems, start=1))
        return "\n".join([f"{self.where}: {len(self.problems)} things in this set-up cannot work:", *lines])


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise one error with all problems, if there are any.

    Raises:
        RefusedSetUp: If there are.

    """
    found = list(problems)
    if found:
        raise RefusedSetUp(where, found)


class Refusals:
    """What is found during a set-up, raised at its end as one error.

    A step of the set-up that fails behind a problem, as it may because of it, is not reported in its place. All steps
    are taken, whatever was found before, since every rank must take part in the messages of each.

    Args:
        where: Who refuses.

    Example:
        >>> with Refusals("CyclicStrategy") as refusals:
        ...     refusals.add([])

    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._problems: list[str] = []

    def add(self, problems: Iterable[str]) -> None:
        """Note problems; none is fine."""
        self._problems += problems

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._problems and (error is None or isinstance(error, Exception)):
            found = error.problems if isinstance(error, RefusedSetUp) else []
            raise RefusedSetUp(self._where, [*self._problems, *found]) from error
