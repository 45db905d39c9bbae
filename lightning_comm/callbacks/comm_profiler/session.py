"""The session of one ``fit`` under `CommProfiler`: it measures steps and their messages, keeps and writes figures.

On a GPU the host is ahead of the device, so steps and messages there begin and end at moments of the device, and a step
is measured once the device has done it, some steps later, without a wait. The host decides to which step a message
belongs. On the CPU a step is measured when it ends.

It knows neither hooks nor the Trainer. All that it does to the process (functions wrapped, DDP's timing switched on, a
file held open) is undone by :meth:`Session.end_measuring`.
"""

from collections.abc import Callable

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.callbacks.comm_profiler.device_steps import DeviceSteps
from lightning_comm.callbacks.comm_profiler.drawn_steps import DrawnSteps
from lightning_comm.core.key_figures import StepFigures, StepFrame, measure_step
from lightning_comm.core.ledger import CommRecord, wire_bytes
from lightning_comm.core.rank_profile import RankProfile, belongs_to_step, beside
from lightning_comm.core.step_timeline import TimelineStep, draw
from lightning_comm.formats.profile import RankFile
from lightning_comm.instruments.collectives import Watcher
from lightning_comm.instruments.ddp_timing import DdpTiming
from lightning_comm.ondevice.device_clock import DeviceClock, DeviceEvent
from lightning_comm.transport import recording
from lightning_comm.transport.recording import MarkedRecord


class Session:
    """Measures one ``fit`` on one rank.

    Args:
        profile: Where the figures are kept.
        file: Where they are written, or ``None``.
        timeline_steps: How many steps are kept to be drawn.
        steps_done: Returns the optimizer steps done.
        safely: Calls a function, and keeps its exceptions out of training.
        clock: That of the device.

    Note:
        *Communication.* None. *Cost.* On CUDA three events a step and three a message.

    """

    def __init__(
        self,
        profile: RankProfile,
        file: RankFile | None,
        timeline_steps: int,
        steps_done: Callable[[], int],
        safely: Callable[[Callable[[], None]], None],
        clock: DeviceClock,
    ) -> None:
        self.profile = profile
        self.dense_bytes = 0  # of one backward that communicates; set by the caller, who knows the parameters
        self.automatic = True  # optimization, so a batch without an optimizer step accumulates; set along with it
        self._new: list[StepFigures] = []
        self._file = file
        self._steps_done = steps_done
        self._safely = safely
        self._clock = clock
        self._unmeasured = DeviceSteps(clock)
        self._records: list[CommRecord] = []
        self._batch = 0
        self._backwards = 0  # in the step under way
        self._began: tuple[int, DeviceEvent] | None = None  # optimizer steps done and when, while a step is open
        self._batch_ended: DeviceEvent | None = None
        self._timing: DdpTiming | None = None
        self._drawn = DrawnSteps(timeline_steps, profile.header["warmup_steps"])
        self._watcher = Watcher(self._records_append, steps_done, safely, self._mark if clock.on_cuda else None)
        self._end_observing: Callable[[], None] = lambda: None

    # ---- begin and end -------------------------------------------------------------------------------------------

    def begin_measuring(self) -> None:
        """Begin to record what is sent."""
        start = self._clock.mark()
        self._clock.wait_for(start)  # the one place where both clocks are compared, before training
        self._clock.at_s(start)
        self._watcher.install()
        self._end_observing = recording.observe(
            lambda record: self._safely(lambda: self._recorded(record)), self._mark if self._clock.on_cuda else None
        )

    def end_measuring(self) -> None:
        """Undo all that was done to the process, except for the file."""
        self._watcher.remove()
        self._end_observing()
        if self._timing is not None:
            self._timing.end()
            self._timing = None

    def close_file(self) -> None:
        """Write the rest and close the file, at the regular end of a run."""
        if self._file is not None:
            if not self._drawn.are_chosen:
                self._file.timeline(self.profile.timeline)
            for point in self.profile.clock[1:]:
                self._file.clock(point)
            self._file.close()

    def abandon_file(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.abandon()

    # ---- called by Lightning's hooks -----------------------------------------------------------------------------

    def begin_step(self, model: Module | None) -> None:
        """A training batch begins; the one before it is over."""
        now = self._clock.mark()
        self._close_step(now)
        self._put_beside()
        self._measure_what_is_over()
        self._began, self._batch_ended, self._backwards = (self._steps_done(), now), None, 0
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
            record = CommRecord(
                "all_reduce", "gradients", time_of.payload_bytes, sent, self._steps_done(), *time_of[:3]
            )
            # DDP's times are the device's, except for the start: its all-reduces are over where the stream goes on
            ended = self._mark() if self._clock.on_cuda and time_of.duration_s > 0 else None
            self._records_append(record if ended is None else MarkedRecord.of(record, None, None, ended))

    def end_batch(self) -> None:
        """A training batch is over; its step lasts until the next one begins, or until training is left."""
        self._batch_ended = self._clock.mark()

    def leave_training(self) -> None:
        """Something other than training begins: the step ended with its batch."""
        self._close_step(self._batch_ended)

    def finish(self) -> None:
        """End the session: measure the remaining steps, and undo what was done to the process."""
        self.leave_training()
        self._put_beside()
        self._unmeasured.wait()
        self._measure_what_is_over()
        self.end_measuring()

    def take_new(self) -> list[StepFigures]:
        """Return the steps that were measured since the last call."""
        new, self._new = self._new, []
        return new

    # ---- inside --------------------------------------------------------------------------------------------------

    def _recorded(self, record: CommRecord) -> None:
        if (
            record.duration_s > 0 or record.kind == "send" or isinstance(record, MarkedRecord)
        ):  # otherwise others send and time it: DDP
            self._records_append(record)

    def _records_append(self, record: CommRecord) -> None:
        self._records.append(record)

    def _mark(self) -> DeviceEvent | None:
        """Mark a moment of a message, in whichever thread it is, and keep failures away from the sender."""
        marks: list[DeviceEvent] = []
        self._safely(lambda: marks.append(self._clock.mark()))
        return marks[0] if marks else None

    def _close_step(self, ended: DeviceEvent | None) -> None:
        if self._began is None or self._batch_ended is None or ended is None:
            return  # no step, or one that was skipped before it was trained on
        steps_done, began = self._began
        self._began = None
        stepped = self._steps_done() - steps_done
        backwards = 0 if self.automatic and not stepped else self._backwards
        end_s = ended.asked_s
        frame = StepFrame(self._batch, steps_done, stepped, began.asked_s, end_s, backwards * self.dense_bytes)
        self._batch += 1
        records, self._records = self._records, []
        within = [record for record in records if record.start_s <= end_s and belongs_to_step(record)]
        self._records += [record for record in records if record.start_s > end_s or not belongs_to_step(record)]
        self._unmeasured.add(frame, began, ended, within)
        if not self._clock.on_cuda:
            self._measure_what_is_over()

    def _measure_what_is_over(self) -> None:
        """Measure steps in their order, up to the first that the device has not done."""
        for frame, within in self._unmeasured.take():
            step = measure_step(frame, within)
            self.profile.add_step(step)
            self._new.append(step)
            if self._file is not None:
                self._file.step(step)
            if not self._drawn.are_chosen:
                self._keep_to_draw(draw(frame, within))

    def _put_beside(self) -> None:
        records, self._records = self._records, []
        if records:
            counts = beside(records)
            self.profile.add_beside(counts)
            if self._file is not None:
                self._file.beside(counts)

    def _keep_to_draw(self, drawn: TimelineStep) -> None:
        self._drawn.add(drawn)
        self.profile.timeline = self._drawn.steps
        if self._drawn.are_chosen and self._file is not None:
            self._file.timeline(self.profile.timeline)
