"""The interval between two logs: means of the steps since the last time."""

from lightning_comm.core.key_figures import StepFigures
from lightning_comm.core.rank_profile import Sums


class LogInterval:
    """Adds up steps, and returns their means under the names that loggers show."""

    def __init__(self) -> None:
        self._sums = Sums()

    def add(self, step: StepFigures) -> None:
        """Add one step."""
        self._sums.add(step)

    def take(self) -> dict[str, float]:
        """Return the means, and begin again. Times only where they are known."""
        sums, self._sums = self._sums, Sums()
        if sums.steps == 0:
            return {}
        metrics = {
            "comm/bytes_sent": sums.sent_bytes / sums.steps,
            "comm/bytes_dense": sums.dense_bytes / sums.steps,
        }
        if sums.timed_steps == 0:
            return metrics
        step_s = sums.duration_s / sums.steps
        metrics |= {
            "comm/time_s": sums.mean_s("comm_s"),
            "comm/exposed_s": sums.mean_s("exposed_s"),
            "comm/share_busy": sums.mean_s("comm_s") / step_s,
            "comm/share_exposed": sums.mean_s("exposed_s") / step_s,
            "comm/lightning_s": sums.mean_s("lightning_s"),
        }
        if sums.inferred_steps < sums.timed_steps:  # ranks have met, where waiting is measured
            metrics["comm/wait_s"] = sums.mean_s("wait_s")
        if sums.comm_s > sums.wait_s:
            metrics["comm/bandwidth"] = sums.timed_sent_bytes / (sums.comm_s - sums.wait_s)
        return metrics
