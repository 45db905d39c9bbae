"""How fast one rank is: seconds for a batch of any size, learned from windows of a run.

Standard library only and plain floats: every rank feeds the same gathered numbers and gets the same bits.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning_comm.core.adaptive_partition import RankCost

FORGETTING = 0.8  # a window: what it weighs against the next one
DISTINCT = 0.05  # relative: sizes further apart than this tell fixed from per-sample time
CHANGED = 0.2  # relative: a window further from the model than this is no jitter of a median
_MISFIT = 0.1  # relative: a line further than this from the present size is not believed there
_LEAST_SLOPE = 0.25  # of seconds / samples: less is more likely noise than fixed cost
_LEAST_WEIGHT = 0.05  # of a size seen long ago: the one witness of the fixed cost while sizes stay as they are
_MOST_SIZES = 6


@dataclass
class _Size:
    """The smoothed seconds of one batch size, and the windows that they rest on, discounted."""

    samples: int
    seconds: float
    weight: float


@dataclass
class SpeedModel:
    """Fits ``seconds = fixed_s + per_sample_s * samples`` of one rank to windows of its steps.

    A window weighs 0.8 times the one after it. Until two sizes that differ by more than 5 % were seen, all time
    counts as per-sample time: shares that follow from it approach the optimum without overshooting. From then on the
    line is a weighted least-squares fit, within bounds: no negative fixed time, and a slope of at least a quarter of
    the seconds per sample.

    Where one size is measured again and again, the others are scaled along with it, so a rank that gets slower by and
    by keeps its proportion of fixed to per-sample time. A window more than 20 % off the model, at a size that is
    known, is held back; if the next is off to the same side, the rank has changed its speed: the model then goes
    through these two, and what came before counts only for that proportion, and little.

    Note:
        *Communication.* None. *Memory.* Six sizes at most.

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
    """Windows that the model rests on, discounted: 1 after the first, below 5 for ever."""
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
        weights = [size.weight / size.seconds**2 for size in self._sizes]
        whole = sum(weights)
        samples = sum(w * size.samples for w, size in zip(weights, self._sizes, strict=True)) / whole
        seconds = sum(w * size.seconds for w, size in zip(weights, self._sizes, strict=True)) / whole
        steepest = sum(w * size.samples * size.seconds for w, size in zip(weights, self._sizes, strict=True)) / sum(
            w * size.samples**2 for w, size in zip(weights, self._sizes, strict=True)
        )
        counts = [size.samples for size in self._sizes]
        if max(counts) <= (1 + DISTINCT) * min(counts):
            return RankCost(0.0, steepest)
        slope = sum(
            w * (size.samples - samples) * (size.seconds - seconds)
            for w, size in zip(weights, self._sizes, strict=True)
        ) / sum(w * (size.samples - samples) ** 2 for w, size in zip(weights, self._sizes, strict=True))
        if slope * samples >= seconds:
            return RankCost(0.0, steepest)
        slope = max(slope, _LEAST_SLOPE * seconds / samples)
        return RankCost(seconds - slope * samples, slope)

    def _off(self, samples: int, seconds: float) -> float:
        """Return by how much a window is off the model, relative; 0 at a size that the model has not seen."""
        cost = self.cost()
        known = any(abs(size.samples - samples) <= DISTINCT * size.samples for size in self._sizes)
        return seconds / cost.seconds(samples) - 1 if cost and known else 0.0

    def _take(self, samples: int, seconds: float) -> None:
        for size in self._sizes:
            size.weight = max(_LEAST_WEIGHT, FORGETTING * size.weight)
        self.evidence = 1 + FORGETTING * self.evidence
        same = next((size for size in self._sizes if size.samples == samples), None)
        if same is None:
            self._sizes.append(_Size(samples, seconds, 1.0))
            if len(self._sizes) > _MOST_SIZES:
                self._sizes.remove(min(self._sizes, key=lambda size: size.weight))
            return
        smoothed = (same.weight * same.seconds + seconds) / (same.weight + 1)
        drift = smoothed / same.seconds
        same.seconds, same.weight = smoothed, same.weight + 1
        self._sizes.remove(same)
        for size in self._sizes:
            if size.weight < same.weight:
                size.seconds *= drift
        self._sizes.append(same)

    def _start_anew(self, *windows: tuple[int, float]) -> None:
        """Keep the proportion of fixed to per-sample time, and take the level from these windows."""
        ratio = sum(1 + self._off(*window) for window in windows) / len(windows)
        for size in self._sizes:
            size.seconds *= ratio
            size.weight = _LEAST_WEIGHT
        self.changes += 1
        self.evidence = 0.0
        for window in windows:
            self._take(*window)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the model knows, in plain types."""
        return {
            "sizes": [[size.samples, size.seconds, size.weight] for size in self._sizes],
            "suspect": None if self._suspect is None else list(self._suspect),
            "evidence": self.evidence,
            "ignored": self.ignored,
            "changes": self.changes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of ``state_dict``."""
        self._sizes = [_Size(int(n), float(seconds), float(weight)) for n, seconds, weight in state["sizes"]]
        suspect = state["suspect"]
        self._suspect = None if suspect is None else (int(suspect[0]), float(suspect[1]))
        self.evidence = float(state["evidence"])
        self.ignored, self.changes = int(state["ignored"]), int(state["changes"])
