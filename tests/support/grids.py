"""Grids of cases: few of them in `make test`, that meet every value of every axis; the others are exhaustive."""

from collections.abc import Iterable
from typing import Any

import pytest


def few_of(cases: Iterable[tuple[Any, ...]], *kept: int) -> list[Any]:
    """Return cases for ``pytest.mark.parametrize``, of which all but those of some numbers are exhaustive."""
    return [
        pytest.param(*case, marks=() if number in kept else pytest.mark.exhaustive) for number, case in enumerate(cases)
    ]
