"""The record of a partitioned run: its windows, and why shares were moved."""

import time
from collections.abc import Sequence
from typing import Any

from lightning_comm.callbacks.adaptive_partition.meter import RankTimes
from lightning_comm.core.adaptive_partition.balancing import Forecast
from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.formats.adaptive_partition import Change, PartitionJournal, Window

_MOST_WINDOWS = 2000  # then every second one is dropped, so that a long run stays a small file
_KEPT_WINDOWS = 200  # by a checkpoint
_LOGGED_RANKS = 16


class PartitionRecord:
    """Collects what becomes the journal; equal on all ranks but for the seconds since the start.

    Args:
        run: The properties of the run that a replay must share.
        mode: That of the callback.
        plan: Has the changes.
        why: What each comes from, by place.
        windows: Those of the part of the run before a resume.

    """

    def __init__(
        self,
        run: dict[str, Any],
        mode: str,
        plan: PartitionPlan,
        why: dict[BatchIndex, str],
        windows: Sequence[Window],
    ) -> None:
        self.run = run
        self.why = why
        self._mode = mode
        self._plan = plan
        self._windows = list(windows)
        before_s = self._windows[-1].seconds if self._windows else None
        self._started_s = time.monotonic() - (before_s or 0.0)

    def add_window(
        self,
        place: BatchIndex,
        sizes: tuple[int, ...],
        ranks: list[RankTimes],
        step_s: float,
        forecast: Forecast | None,
    ) -> None:
        """Note the times that ranks have exchanged."""
        if len(self._windows) >= _MOST_WINDOWS:
            self._windows = self._windows[::2]
        self._windows.append(
            Window(
                epoch=place.epoch,
                batch=place.batch,
                seconds=time.monotonic() - self._started_s,
                sizes=sizes,
                busy_s=tuple(times.busy_s for times in ranks),
                fetch_s=tuple(times.fetch_s for times in ranks),
                step_s=step_s,
                gain=None if forecast is None else forecast.gain,
                best_sizes=None if forecast is None else forecast.sizes,
            )
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last window, for loggers."""
        window = self._windows[-1]
        busy = [seconds or 0.0 for seconds in window.busy_s]
        slowest = max(busy)
        metrics = {
            "adaptive_partition/step_s": window.step_s or 0.0,
            "adaptive_partition/busy_s_slowest": slowest,
            "adaptive_partition/waiting_share": 1 - sum(busy) / (len(busy) * slowest) if slowest else 0.0,
        }
        if window.gain is not None:
            metrics["adaptive_partition/possible_gain"] = window.gain
        for rank in range(min(_LOGGED_RANKS, len(busy))):
            metrics[f"adaptive_partition/samples/rank_{rank}"] = window.sizes[rank]
            metrics[f"adaptive_partition/busy_s/rank_{rank}"] = busy[rank]
        return metrics

    def journal(self) -> PartitionJournal:
        """Return the whole journal."""
        changes = [Change(*each.place, each.sizes, self.why.get(each.place, "")) for each in self._plan.changes]
        return PartitionJournal(self.run, self._mode, tuple(changes), tuple(self._windows))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run restores, in plain types."""
        why = [(*place, why) for place, why in self.why.items()]
        return {"windows": self.journal().to_dict()["windows"][-_KEPT_WINDOWS:], "why": why}
