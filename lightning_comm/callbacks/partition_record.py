"""What is noted of a partitioned run while it goes on: the windows, and why shares were moved."""

import time
from collections.abc import Sequence
from typing import Any

from lightning_comm.callbacks.partition_meter import Row
from lightning_comm.core.balancing import Forecast
from lightning_comm.core.partition_plan import PartitionPlan, Place
from lightning_comm.planning.partition_journal import PartitionJournal

_MOST_WINDOWS = 2000  # then every second one is dropped, so that a long run stays a small file


class PartitionRecord:
    """Collects what becomes the journal; equal on all ranks but for the seconds since the start.

    Args:
        run: What a replay must agree with.
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
        why: dict[Place, str],
        windows: Sequence[dict[str, Any]],
    ) -> None:
        self.run = run
        self.why = why
        self._mode = mode
        self._plan = plan
        self._windows = list(windows)
        before_s = float(self._windows[-1]["seconds"]) if self._windows else 0.0
        self._started_s = time.monotonic() - before_s

    def add_window(
        self, place: Place, sizes: tuple[int, ...], rows: list[Row], step_s: float, forecast: Forecast | None
    ) -> None:
        """Note what the ranks have told each other."""
        if len(self._windows) >= _MOST_WINDOWS:
            self._windows = self._windows[::2]
        self._windows.append(
            {
                "epoch": place.epoch,
                "batch": place.batch,
                "seconds": time.monotonic() - self._started_s,
                "sizes": list(sizes),
                "busy_s": [row.busy_s for row in rows],
                "fetch_s": [row.fetch_s for row in rows],
                "step_s": step_s,
                "gain": None if forecast is None else forecast.gain,
                "best_sizes": None if forecast is None else list(forecast.sizes),
            }
        )

    def metrics(self, most_ranks: int) -> dict[str, float]:
        """Return what loggers are told of the last window."""
        window = self._windows[-1]
        busy, slowest = window["busy_s"], max(window["busy_s"])
        metrics = {
            "adaptive_partition/step_s": window["step_s"],
            "adaptive_partition/busy_s_slowest": slowest,
            "adaptive_partition/waiting_share": 1 - sum(busy) / (len(busy) * slowest) if slowest else 0.0,
        }
        if window["gain"] is not None:
            metrics["adaptive_partition/possible_gain"] = window["gain"]
        for rank in range(min(most_ranks, len(busy))):
            metrics[f"adaptive_partition/samples/rank_{rank}"] = window["sizes"][rank]
            metrics[f"adaptive_partition/busy_s/rank_{rank}"] = busy[rank]
        return metrics

    def journal(self) -> PartitionJournal:
        """Return all of it."""
        changes = [
            {
                "epoch": change.place.epoch,
                "batch": change.place.batch,
                "sizes": list(change.sizes),
                "why": self.why.get(change.place, ""),
            }
            for change in self._plan.changes
        ]
        return PartitionJournal(run=self.run, mode=self._mode, changes=tuple(changes), windows=tuple(self._windows))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, in plain types."""
        return {"windows": list(self._windows), "why": [(*place, why) for place, why in self.why.items()]}
