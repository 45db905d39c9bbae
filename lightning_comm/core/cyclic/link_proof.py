"""A proof that workers cannot deadlock where each stage has threads of its own and messages share a send window.

That is how the ring works on gloo. On each worker every stage has two lanes, one for sums and one for new versions, and
compute. A lane asks for the message of a step once this worker has begun the step and the lane is done with the step
before. What a worker sends waits for its one link to the next worker, on which
:class:`~lightning_comm.core.cyclic.send_window.SendWindow` lets a message go if fewer than ``w`` are on their way, or
if it is more urgent than all of these. A message is on its way until the receiver has asked for it, taken it, and
acknowledged it.

What may go depends on what happens to be on the way, so waits are no fixed graph. But let every link send strictly in
the order of urgency, each message after the one before it was taken. If *these* waits have no cycle, then no window
``w >= 1`` makes workers wait in a circle. For suppose that nothing can happen any more and not all is done. Take the
first event, in an order that follows the waits, that has not happened. All that it waits for has. So it must be a send
that the window holds back. But all more urgent messages of its link have been taken, so it is the most urgent that
waits, and more urgent than all on the way: the window lets it go.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from lightning_comm.core.cyclic.proof import Event, ScheduleError, put_in_order, stage_pass
from lightning_comm.core.cyclic.schedule import TRANSFER_KINDS, CyclicSchedule, TransferKind

__all__ = ["ScheduleError", "check_links"]


def check_links(
    schedule: CyclicSchedule,
    steps: int = 6,
    flush_after: Collection[int] = (),
    *,
    asked_late: bool = False,
    previous_norm: bool = False,
) -> int:
    """Prove that no send window makes workers wait in a circle; raise with the circle if one does.

    Under ``"v1"`` and with two workers there is no window: all is sent at once, and memory is written again when the
    receiver has asked for what was sent from it. That is what is checked then.

    Args:
        schedule: The rules.
        steps: How many steps.
        flush_after: After how many steps each worker waits for the newest version of everything. They need not meet
            there: a model without buffers sends nothing else at a flush.
        asked_late: Whether a step begins, for its messages, behind its backward only, as where the module steps by hand
            or gradients are accumulated; otherwise before its forward.
        previous_norm: Whether an update waits for the gradient norm of the step before, which comes with its versions.

    Returns:
        How many events were put in order.

    Raises:
        ScheduleError: If events wait for each other in a circle, which it names.

    Note:
        *Communication.* None.

    Example:
        >>> check_links(CyclicSchedule(workers=3, stages=3), steps=4)
        336

    """
    waits = _Waits(schedule, steps, frozenset(flush_after), asked_late, previous_norm).of_all()
    put_in_order(waits)
    return len(waits)


@dataclass(slots=True)
class _Waits:
    """For each event, the events it waits for."""

    schedule: CyclicSchedule
    steps: int
    flush_after: frozenset[int]
    asked_late: bool
    previous_norm: bool
    waits: dict[Event, list[Event]] = field(default_factory=dict)

    def of_all(self) -> dict[Event, list[Event]]:
        for worker in range(self.schedule.workers):
            self._compute(worker)
            for stage in range(self.schedule.stages):
                for step in range(self.steps):
                    self._gradient(worker, stage, step)
                    self._parameters(worker, stage, step)
            self._link(worker)
        return self.waits

    def _compute(self, worker: int) -> None:
        schedule = self.schedule
        before: list[Event] = []
        for step in range(self.steps):
            if step in self.flush_after:
                flush = Event("flush", worker, 0, step - 1)
                self.waits[flush] = before + self._held(worker, step - 1)
                before = [flush]
            begins = before
            flushed_at = self._flushed_at(step)
            for number in range(2 * schedule.stages):
                event = stage_pass(schedule, worker, step, number)
                self.waits[event] = before
                if event.what == "forward" and (version := schedule.version(worker, event.stage, step, flushed_at)):
                    self.waits[event] = [*before, Event("parameters held", worker, event.stage, version - 1)]
                before = [event]
            self.waits[Event("begun", worker, 0, step)] = before if self.asked_late else begins

    def _gradient(self, worker: int, stage: int, step: int) -> None:
        """The events of a lane that adds this worker's gradient to the sum, and updates the stage at its owner."""
        added = Event("gradient added", worker, stage, step)
        is_owner = worker == self.schedule.owner(stage)
        done = added._replace(what="update") if is_owner else added
        self.waits[added] = [
            self._arrival("gradient", worker, stage, step, lane_done=done),
            Event("backward", worker, 0 if self.asked_late else stage, step),
        ]
        if is_owner:
            self.waits[done] = [added, *(self._held(worker, step - 1) if self.previous_norm and step else [])]

    def _parameters(self, worker: int, stage: int, step: int) -> None:
        """The events of a lane that keeps a new version and passes it on."""
        held = Event("parameters held", worker, stage, step)
        self.waits[held] = [self._arrival("parameters", worker, stage, step, lane_done=held)]
        if worker == self.schedule.owner(stage):
            self.waits[held].append(Event("update", worker, stage, step))

    def _arrival(self, kind: TransferKind, worker: int, stage: int, step: int, lane_done: Event) -> Event:
        """Let a lane ask for a message and take it, if there is one; return the last event of this."""
        schedule = self.schedule
        asked = Event(f"{kind} asked", worker, stage, step)
        self.waits[asked] = [Event("begun", worker, 0, step)]
        if step:
            self.waits[asked].append(lane_done._replace(step=step - 1))
            if not schedule.sends_urgent_first:
                # memory is used again: what was sent from it has left, since its receiver has asked for it
                self.waits[asked] += [
                    Event(f"{each} asked", schedule.after(worker), stage, step - 1)
                    for each in TRANSFER_KINDS
                    if schedule.sends(worker, stage, each)
                ]
        if not schedule.receives(worker, stage, kind):
            return asked
        taken = asked._replace(what=f"{kind} taken")
        sent = Event(f"{kind} sent", (worker - 1) % schedule.workers, stage, step)
        self.waits[taken] = [asked, sent]
        return taken

    def _link(self, worker: int) -> None:
        """Let a worker send: in the order of urgency, each after the one before it was taken; or all at once."""
        schedule, order = self.schedule, []
        for step in range(self.steps):
            for stage in range(schedule.stages):
                for kind in TRANSFER_KINDS:
                    if schedule.sends(worker, stage, kind):
                        urgency = schedule.urgency(worker, kind, stage, step, self._flushed_at(step))
                        order.append((urgency, schedule.number(kind, stage, step), kind, stage, step))
        before: list[Event] = []
        for _, _, kind, stage, step in sorted(order):
            sent = Event(f"{kind} sent", worker, stage, step)
            what = "gradient added" if kind == "gradient" else "parameters held"
            self.waits[sent] = [sent._replace(what=what), *(before if schedule.sends_urgent_first else [])]
            before = [Event(f"{kind} taken", schedule.after(worker), stage, step)]

    def _held(self, worker: int, step: int) -> list[Event]:
        return [Event("parameters held", worker, stage, step) for stage in range(self.schedule.stages)]

    def _flushed_at(self, step: int) -> int:
        return max((point for point in self.flush_after if point <= step), default=0)
