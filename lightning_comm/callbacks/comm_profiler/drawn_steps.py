"""The few steps of a run that its page draws: early ones, around one that has communicated."""

from collections import deque

from lightning_comm.core.step_timeline import TimelineStep


class DrawnSteps:
    """Keeps the newest steps until they show communication, and then those.

    Args:
        number: How many are drawn; with 0 none.
        warmup_steps: Batches at the start that are not drawn if others are.

    """

    def __init__(self, number: int, warmup_steps: int) -> None:
        self._recent: deque[TimelineStep] = deque(maxlen=number)
        self._warmup_steps = warmup_steps
        self.are_chosen = number == 0

    @property
    def steps(self) -> list[TimelineStep]:
        """The steps to draw, as far as is known now."""
        return list(self._recent)

    def add(self, drawn: TimelineStep) -> None:
        """Take a step, or choose those that are kept: after the warm-up, the last but one of which communicated."""
        full = len(self._recent) == self._recent.maxlen
        if full and self._recent[0].batch >= self._warmup_steps and self._show_communication():
            self.are_chosen = True
            return
        self._recent.append(drawn)

    def _show_communication(self) -> bool:
        looked_at = self._recent[-2 if len(self._recent) > 1 else -1]
        return any(span.name in ("exposed", "hidden") for span in looked_at.spans)
