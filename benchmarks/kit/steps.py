"""Repeats of several arms: interleaved, in an order that rotates, so that what disturbs the machine falls on all."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any


def rotated(names: Sequence[str], repeat: int) -> list[str]:
    """Return the names in the order of a repeat: one after the other comes first.

    >>> [rotated("abc", repeat) for repeat in range(3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b']]
    """
    at = repeat % len(names)
    return [*names[at:], *names[:at]]


def interleaved(names: Iterable[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Yield each repeat with each name, in the order of that repeat."""
    names = list(names)
    for repeat in range(repeats):
        for name in rotated(names, repeat):
            yield repeat, name


def seconds_of(
    arms: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Time arms again and again, interleaved; return the seconds of each by repeat.

    Args:
        arms: What is timed.
        repeats: How many times are returned.
        warm_up: Repeats before those.
        clock: What is read before and after.
        before: Called before each, and not timed.

    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _, name in interleaved(arms, warm_up + repeats):
        before()
        began = clock()
        arms[name]()
        times[name].append(clock() - began)
    return {name: each[warm_up:] for name, each in times.items()}


def left_s(began: float, done: int, total: int) -> float:
    """Return about how long the rest takes, where so many of all are done since a time of the monotonic clock."""
    return (time.monotonic() - began) / done * (total - done)
