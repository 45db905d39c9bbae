"""The measuring of one ``fit`` by `CommProfiler`: steps are framed, messages put into them, figures kept and written.

It knows neither hooks nor the Trainer. Whatever it does to the process (functions wrapped, DDP asked for times, a file
held open) is undone by :meth:`Session.end_measuring`.
"""

import time
from collections import deque
from collections.abc import Callable

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.core.key_figures import StepFigures, StepFrame, measure_step
from lightning_comm.core.ledger import CommRecord, wire_bytes
from lightning_comm.core.rank_profile import RankProfile, belongs_to_step, beside
from lightning_comm.core.step_timeline import TimelineStep, draw
from lightning_comm.planning.profile_files import RankFile
from lightning_comm.transport import recording
from lightning_comm.transport.ddp_timing import DdpTiming
from lightning_comm.transport.watching import Watcher


class Session:
    """Measures one ``fit`` on one rank.

    Args:
        profile: Where the figures are kept.
        file: Where they are written, or ``None``.
        timeline_steps: How many steps are kept to be drawn.
        steps_done: Returns the optimizer steps done.
        safely: Calls what it is given, and lets no exception of it into training.

    Note:
        *Communication.* None.

    """

    def __init__(
        self,
        profile: RankProfile,
        file: RankFile | None,
        timeline_steps: int,
        steps_done: Callable[[], int],
        safely: Callable[[Callable[[], None]], None],
    ) -> None:
        self.profile = profile
        self.dense_bytes = 0  # of one backward that communicates; whoever knows the parameters sets it
        self.automatic = True  # optimization, so a batch without an optimizer step accumulates; set along with it
        self._latest: StepFigures | None = None
        self._file = file
        self._steps_done = steps_done
        self._safely = safely
        self._records: list[CommRecord] = []
        self._batch = 0
        self._backwards = 0  # in the open step
        self._began: tuple[int, float] | None = None  # optimizer steps done and time, while a step is open
        self._batch_ended_s: float | None = None
        self._timing: DdpTiming | None = None
        self._recent: deque[TimelineStep] = deque(maxlen=timeline_steps)
        self._drawn = timeline_steps == 0
        self._watcher = Watcher(self._records_append, steps_done, safely)
        self._end_observing: Callable[[], None] = lambda: None

    # ---- begin and end -------------------------------------------------------------------------------------------

    def begin_measuring(self) -> None:
        """Start to listen to what is sent."""
        self._watcher.install()
        self._end_observing = recording.observe(lambda record: self._safely(lambda: self._recorded(record)))

    def end_measuring(self) -> None:
        """Undo whatever was done to the process, but for the file."""
        self._watcher.remove()
        self._end_observing()
        if self._timing is not None:
            self._timing.end()
            self._timing = None

    def close_file(self) -> None:
        """Write what is left and close the file of a run that came to its end."""
        if self._file is not None:
            if not self._drawn:
                self._draw()
            for point in self.profile.clock[1:]:
                self._file.clock(point)
            self._file.close()

    def abandon_file(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.abandon()

    # ---- what Lightning's hooks say ------------------------------------------------------------------------------

    def begin_step(self, model: Module | None) -> None:
        """A training batch begins; the one before it is over."""
        now = time.monotonic()
        self._close_step(now)
        self._put_beside()
        self._began, self._batch_ended_s, self._backwards = (self._steps_done(), now), None, 0
        if self._timing is not None and not self._timing.reads(model):
            self._timing.end()
            self._timing = None
        if self._timing is None and isinstance(model, DistributedDataParallel):
            self._timing = DdpTiming(model)

    def begin_backward(self) -> None:
        """A backward begins."""
        self._watcher.in_backward = True

    def end_backward(self) -> None:
        """A backward is over, and so are DDP's all-reduces."""
        self._watcher.in_backward = False
        self._backwards += 1
        time_of = self._timing.after_backward() if self._timing is not None else None
        if time_of is not None:
            sent = wire_bytes("all_reduce", time_of.payload_bytes, int(self.profile.header["world_size"]))
            self._records_append(
                CommRecord(
                    "all_reduce",
                    "gradients",
                    time_of.payload_bytes,
                    sent,
                    self._steps_done(),
                    time_of.start_s,
                    time_of.duration_s,
                    time_of.hidden_s,
                )
            )

    def end_batch(self) -> None:
        """A training batch is over; its step lasts until the next one begins, or until training is left."""
        self._batch_ended_s = time.monotonic()

    def leave_training(self) -> None:
        """Something other than training begins: the step ended with its batch."""
        self._close_step(self._batch_ended_s)

    def finish(self) -> None:
        """Training has ended: take in what is left, and let go of the process."""
        self.leave_training()
        self._put_beside()
        self.end_measuring()

    def take_latest(self) -> StepFigures | None:
        """Return the step that was closed last, once."""
        latest, self._latest = self._latest, None
        return latest

    # ---- inside --------------------------------------------------------------------------------------------------

    def _recorded(self, record: CommRecord) -> None:
        if record.duration_s > 0 or record.kind == "send":  # otherwise others send and time it: DDP
            self._records_append(record)

    def _records_append(self, record: CommRecord) -> None:
        self._records.append(record)

    def _close_step(self, end_s: float | None) -> None:
        if self._began is None or self._batch_ended_s is None or end_s is None:
            return  # no step, or one that was skipped before it was trained on
        steps_done, start_s = self._began
        self._began = None
        stepped = self._steps_done() - steps_done
        backwards = 0 if self.automatic and not stepped else self._backwards
        frame = StepFrame(self._batch, steps_done, stepped, start_s, end_s, backwards * self.dense_bytes)
        self._batch += 1
        records, self._records = self._records, []
        within = [record for record in records if record.start_s <= end_s and belongs_to_step(record)]
        self._records += [record for record in records if record.start_s > end_s or not belongs_to_step(record)]
        step = measure_step(frame, within)
        self.profile.add_step(step)
        self._latest = step
        if self._file is not None:
            self._file.step(step)
        if not self._drawn:
            self._keep_to_draw(draw(frame, within))

    def _put_beside(self) -> None:
        records, self._records = self._records, []
        if records:
            counts = beside(records)
            self.profile.add_beside(counts)
            if self._file is not None:
                self._file.beside(counts)

    def _keep_to_draw(self, drawn: TimelineStep) -> None:
        """Keep the first steps after the warm-up, one before the last of which has communicated."""
        full = len(self._recent) == self._recent.maxlen
        if full and self._recent[0].batch >= self.profile.header["warmup_steps"] and self._shows_communication():
            self._draw()
            return
        self._recent.append(drawn)
        self.profile.timeline = list(self._recent)

    def _shows_communication(self) -> bool:
        looked_at = self._recent[-2 if len(self._recent) > 1 else -1]
        return any(span.name in ("exposed", "hidden") for span in looked_at.spans)

    def _draw(self) -> None:
        self._drawn = True
        if self._file is not None:
            self._file.timeline(self.profile.timeline)
