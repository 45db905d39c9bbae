"""Temporary."""

from collections.abc import Sequence


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Temporary."""
    total = sum(costs)
    firsts = [0]
    acc = 0.0
    for k, c in enumerate(costs):
        if k and len(firsts) < parts and (acc >= total * len(firsts) / parts or len(costs) - k == parts - len(firsts)):
            firsts.append(k)
        acc += c
    return firsts


def default_stages(units: int, workers: int, lag: int) -> int:
    """Temporary."""
    if lag:
        return workers
    return workers * max(1, min(3, units // workers))
