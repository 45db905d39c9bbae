"""Named cases in ranks, run in their order when the first answer is asked for; who fails is named."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pytest

from support.processes import NoAnswer, Outcome, run_cases


class SharedRanks:
    """Answers of several named calls, one after the other.

    All run when the first answer is asked for, so that a test of each reads its own, and a case may go on from the
    files of one before it.

    Args:
        cases: For each name a function, which is called as ``fn(rank, *args)``, and the arguments.
        world_size: The number of ranks.
        timeout_s: How long a case may take.

    """

    def __init__(
        self,
        cases: Mapping[Any, tuple[Any, ...]],
        *,
        world_size: int,
        timeout_s: float = 90.0,
    ) -> None:
        self._cases, self._world_size, self._timeout_s = dict(cases), world_size, timeout_s
        self._outcomes: dict[Hashable, list[Outcome]] = {}

    def __getitem__(self, name: Hashable) -> list[Any]:
        """The answers of a case in order of rank; a failure of that case fails the test that asks."""
        for rank, (_, error) in enumerate(self.outcomes(name)):
            if error is not None:
                pytest.fail(f"case {name!r}: rank {rank} failed:\n{error}")
        return [answer for answer, _ in self.outcomes(name)]

    def outcomes(self, name: Hashable) -> list[Outcome]:
        """Like the answers, with a traceback for each rank that failed."""
        if not self._outcomes:
            self._outcomes = {each: self._run(*case) for each, case in self._cases.items()}
        return self._outcomes[name]

    def _run(self, fn: Callable[..., Any], *args: Any) -> list[Outcome]:
        try:
            return run_cases(fn, args, self._world_size, self._timeout_s, ends_within_s=0.0)
        except NoAnswer as problem:
            return [problem.answers.get(rank, (None, problem.reasons.get(rank))) for rank in range(self._world_size)]
