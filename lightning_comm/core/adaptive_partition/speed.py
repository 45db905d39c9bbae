"""The speed of one rank: seconds for a batch of any size, learned from windows of a run.

Standard library only and plain floats: every rank feeds the same gathered numbers and gets the same bits.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_comm.core.adaptive_partition.shares import RankCost

FORGETTING = 0.8  # the weight of a window relative to the next one
DISTINCT = 0.05  # relative: from sizes further apart than this, fixed and per-sample time are told apart
# Relative: a window further from the model than this is no jitter. The median of 20 steps that jitter by 10 % itself
# spreads by 1.25 * 10 % / sqrt(20) = 2.8 %, and the model by less, so this is about four times the spread.
# Of 864 simulated changes of speed, without noise, 9 were more than 5 % off the optimum 3 windows later; 27 with 0.2.
CHANGED = 0.12
_MISFIT = 0.1  # relative: a line further than this from the present size is not believed there
_LEAST_SLOPE = 0.25  # of seconds / samples: less is more likely noise than fixed cost
_LEAST_WEIGHT = 0.05  # a size that weighs less is forgotten, 14 to 21 windows after it was last measured
_BORROWED_WEIGHT = 0.5  # of a size measured before a change of speed


@dataclass
class _Size:
    """The smoothed seconds of one batch size, and the discounted number of windows behind them."""

    samples: int
    seconds: float
    weight: float
    borrowed: bool = False  # measured before a change of speed, and scaled by that change


@dataclass
class SpeedModel:
    """Fits ``seconds = fixed_s + per_sample_s * samples`` of one rank to windows of its steps.

    A window weighs 0.8 times the one after it. Until two sizes that differ by more than 5 % were seen, all time
    counts as per-sample time: shares that follow from it approach the optimum without overshooting. From then on the
    line is a weighted least-squares fit, within bounds: no negative fixed time, and a slope of at least a quarter of
    the seconds per sample.

    Where one size is measured again and again, the others are scaled along with it, so a rank that gets slower by and
    by keeps its proportion of fixed to per-sample time; after some 20 windows they are forgotten. A window more than
    12 % off the model, at a size that is known, is held back. If the next is off to the same side, the rank has changed
    its speed: the model then goes through these two, and of what came before only that proportion counts, until two
    sizes have been measured again.

    Note:
        *Communication.* None. *Memory.* The sizes of some 20 windows.

    Example:
        >>> model = SpeedModel()
        >>> model.add(32, 0.42)
        True
        >>> model.cost().fixed_s
        0.0
        >>> model.add(16, 0.22)
        True
        >>> [round(value, 6) for value in model.cost()]
        [0.02, 0.0125]

    """

    ignored: int = field(default=0, init=False)
    """Windows that were no measurement: samples or seconds not finite or not above 0."""
    changes: int = field(default=0, init=False)
    """How often the rank was found to have changed its speed."""
    evidence: float = field(default=0.0, init=False)
    """Windows that the model rests on, discounted: 1 after the first, below 5 forever."""
    _sizes: list[_Size] = field(default_factory=list, init=False)  # the present size is the last
    _suspect: tuple[int, float] | None = field(default=None, init=False)

    def add(self, samples: int, seconds: float) -> bool:
        """Take in one window; return whether it was a measurement, which a rank without samples has none of."""
        if not (samples > 0 and math.isfinite(seconds) and seconds > 0):
            self.ignored += 1
            return False
        off = self._off(samples, seconds)
        before, self._suspect = self._suspect, None
        if abs(off) <= CHANGED:
            self._take(samples, seconds)
        elif before is not None and self._off(*before) * off > 0:
            self._start_anew(before, (samples, seconds))
        else:
            self._suspect = (samples, seconds)
        return True

    def cost(self) -> RankCost | None:
        """Return what a batch costs, or None before the first window."""
        if not self._sizes:
            return None
        present = self._sizes[-1]
        cost = self._line()
        misfit = present.seconds / cost.seconds(present.samples)
        if abs(misfit - 1) <= _MISFIT:
            return cost
        return RankCost(cost.fixed_s * misfit, cost.per_sample_s * misfit)

    def _line(self) -> RankCost:
        """Return the weighted fit of relative errors within the bounds of the slope."""
        sizes = [size for size in self._sizes if not size.borrowed]
        if not _differ(sizes):
            sizes = self._sizes
        weights = [size.weight / size.seconds**2 for size in sizes]
        whole = sum(weights)
        samples = sum(w * size.samples for w, size in zip(weights, sizes, strict=True)) / whole
        seconds = sum(w * size.seconds for w, size in zip(weights, sizes, strict=True)) / whole
        steepest = sum(w * size.samples * size.seconds for w, size in zip(weights, sizes, strict=True)) / sum(
            w * size.samples**2 for w, size in zip(weights, sizes, strict=True)
        )
        if not _differ(sizes):
            return RankCost(0.0, steepest)
        slope = sum(
            w * (size.samples - samples) * (size.seconds - seconds) for w, size in zip(weights, sizes, strict=True)
        ) / sum(w * (size.samples - samples) ** 2 for w, size in zip(weights, sizes, strict=True))
        if slope * samples >= seconds:
            return RankCost(0.0, steepest)
        slope = max(slope, _LEAST_SLOPE * seconds / samples)
        return RankCost(seconds - slope * samples, slope)

    def _off(self, samples: int, seconds: float) -> float:
        """Return by how much a window is off the model, relative; 0 at a size that the model has not seen."""
        cost = self.cost()
        known = any(abs(size.samples - samples) <= DISTINCT * size.samples for size in self._sizes if not size.borrowed)
        return seconds / cost.seconds(samples) - 1 if cost and known else 0.0

    def _take(self, samples: int, seconds: float) -> None:
        self.evidence = 1 + FORGETTING * self.evidence
        for size in self._sizes:
            size.weight *= FORGETTING
        present = next((size for size in self._sizes if size.samples == samples), None)
        others = [size for size in self._sizes if size is not present and size.weight >= _LEAST_WEIGHT]
        if present is None or present.borrowed:
            present = _Size(samples, seconds, 1.0)
        else:
            smoothed = (present.weight * present.seconds + seconds) / (present.weight + 1)
            drift = smoothed / present.seconds
            present.seconds, present.weight = smoothed, present.weight + 1
            for size in others:
                size.seconds *= drift if size.weight < present.weight else 1.0
        self._sizes = [*others, present]

    def _start_anew(self, *windows: tuple[int, float]) -> None:
        """Keep the proportion of fixed to per-sample time, and take the level from these windows."""
        ratio = sum(1 + self._off(*window) for window in windows) / len(windows)
        self._sizes = [_Size(size.samples, size.seconds * ratio, _BORROWED_WEIGHT, True) for size in self._sizes]
        self.changes += 1
        self.evidence = 0.0
        for window in windows:
            self._take(*window)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the model knows, in plain types."""
        return {
            "sizes": [[size.samples, size.seconds, size.weight, size.borrowed] for size in self._sizes],
            "suspect": None if self._suspect is None else list(self._suspect),
            "evidence": self.evidence,
            "ignored": self.ignored,
            "changes": self.changes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of ``state_dict``."""
        self._sizes = [_Size(int(n), float(s), float(weight), bool(old)) for n, s, weight, old in state["sizes"]]
        suspect = state["suspect"]
        self._suspect = None if suspect is None else (int(suspect[0]), float(suspect[1]))
        self.evidence = float(state["evidence"])
        self.ignored, self.changes = int(state["ignored"]), int(state["changes"])


def _differ(sizes: list[_Size]) -> bool:
    """Return whether sizes are far enough apart to separate fixed from per-sample time."""
    counts = [size.samples for size in sizes]
    return bool(counts) and max(counts) > (1 + DISTINCT) * min(counts)
