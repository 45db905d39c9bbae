"""The ring of Cyclic Data Parallelism: gradients and new parameters travel from neighbour to neighbour.

Every rank has *lanes*, threads beside the one that computes, so that nothing of this is in its way. In each step

- a gradient lane divides this rank's gradient of a stage by the number of ranks, adds it to the sum that comes from the
  rank before, and passes it on; at the stage's owner it updates the stage. Divided before it is added, as under DDP, so
  that gradients near the limit of their type have a mean;
- a parameter lane takes the stage's new version from the rank before, or from its own update, passes it on, and keeps
  it until compute takes it up.

On gloo each stage has two lanes of its own, and messages are told apart by tags: a stage whose gradient is late holds
no other one up, and under rule v2 what is needed first is sent first (see
:mod:`~lightning_comm.transport.cyclic.send_queue`); both count on a link that is always busy. Memory of a CUDA device
goes through the host there: lanes wait for the copies, and compute for nothing. NCCL carries out what it is asked for
in order, so there one lane for gradients and one for parameters handle all stages in the order in which backward
finishes them, the same on all ranks. :mod:`lightning_comm.core.cyclic.proof` shows that nobody waits in a circle.

**Order under NCCL.** All that a group sends and receives is one queue on each rank: where the group was made with a
``device_id``, as Lightning does, it has one communicator and one stream. Number the messages of a group by step, by the
place of their stage in :meth:`CyclicSchedule.order`, and by their place on the stage's way round the ring. A lane asks
for them in that order on every rank, and in each stage receives before it sends. So all that stands before a message in
the queues of its two ends has a lower number, and the lowest that is not yet through stands at the head of both: the
queue never stops. Of the two groups, versions wait for sums of the same step and of no later ones, and sums for
versions of earlier steps, through compute. A receive occupies the device until it is served, so none is asked for
before this rank's own gradient of the stage has been computed: before that it could not be served anyway. What is left
is that the two groups and compute must be able to run at the same time: a device whose streams share one hardware queue
(``CUDA_DEVICE_MAX_CONNECTIONS=1``) can stop for good, and is refused.

**Hand-overs on a CUDA device**, from stream to stream, and what orders each:

- gradients and this rank's notes, from backward to the gradient lane: the mark in :meth:`CyclicRing.hand_over`, and
  ``record_stream``, since backward's stream would reuse their memory;
- a message between the lanes of its stage, and from a lane to compute: ``Message.written``, set behind the last write
  and behind what the lane gave the network; back to the lanes: ``Message.read``, set when compute has read it, and the
  wait for what was sent, in :meth:`Message.use_again`. Its memory is kept in between, and released in :meth:`close`
  when the device has nothing more to do;
- notes to the host, and to lanes that clip by the norm of the step before: the mark of :class:`Numbers`;
- through the host: what is sent is on the host before gloo is asked to (:meth:`Message.to_wire`), and what was received
  has left the host's memory before gloo may write there again (:meth:`Message.use_again`).

Only lanes wait on the host. What they wait for has been given to the device before and follows nothing that is not
on the device yet, so these waits end, whatever other ranks do.
"""

import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.cyclic.schedule import CyclicSchedule, TransferKind
from lightning_comm.transport.cyclic.messages import Mark, Message, Numbers, StageLayout
from lightning_comm.transport.cyclic.send_queue import UrgentFirst
from lightning_comm.transport.recording import Recorder, leave_behind

_END_S = 5.0  # how long lanes may take to end once nothing holds them any more
_LISTEN_S = 1.0  # how often somebody who waits looks whether a rank has failed; a look takes up to 70 ms on a slow link

Update = Callable[[int, int, Message], None]


class Gradients(NamedTuple):
    """What compute hands over: this rank's gradients of a stage, and its notes."""

    parts: Sequence[Tensor]
    notes: Tensor
    ready: Mark


class _ClosedError(Exception):
    """Ends a lane."""


class CyclicRing:
    """Sums gradients around the ring, lets owners update, and passes new versions on, beside compute.

    Args:
        schedule: Who sends what to whom.
        layouts: How each stage lies in a message.
        update: Called in the gradient lane at a stage's owner with the step, the stage and the message that holds the
            mean gradient; it leaves the new parameters there.
        gradients: Sends and records gradients, on a process group of its own.
        parameters: Sends and records new versions, on another one.
        device: Where the tensors are.
        in_any_order: Whether the backend tells messages by their tags, as gloo does and NCCL does not. Such a backend
            is given memory of the host alone.

    Note:
        *Communication.* For each stage and step N - 1 messages of its size for the gradient and N - 1 for the new
        version, over all N ranks, each with 64 bytes of notes that are counted as ``"control"``. On gloo, under
        rule v2 with three ranks and more, 8 bytes come back for each.

        *Memory.* Up to two versions of each stage that wait to be taken up, and what waits for the link. On a CUDA
        device with gloo each of these messages has as much pinned memory of the host, which is used again with it.

        *Host.* On a CUDA device compute waits in :meth:`take` and :meth:`notes` for lanes, and in :meth:`notes` for the
        device; in :meth:`begin_step`, :meth:`hand_over` and :meth:`release`, which backward calls, for nothing.

    """

    def __init__(
        self,
        schedule: CyclicSchedule,
        layouts: Sequence[StageLayout],
        update: Update,
        gradients: Recorder,
        parameters: Recorder,
        device: torch.device,
        *,
        in_any_order: bool = True,
    ) -> None:
        self._schedule, self._layouts, self._update, self._device = schedule, layouts, update, device
        self._rank = gradients.rank
        self._recorders: dict[TransferKind, Recorder] = {"gradient": gradients, "parameters": parameters}
        # On gloo a sender waits until it was told that it may send, by a small message that waits behind bulk traffic:
        # so what a step will bring is asked for at once.
        self._ask_at_once = in_any_order
        # with two ranks there is no quiet way back, and under v1 nothing is urgent
        self._through_host = in_any_order and device.type != "cpu"
        urgent_first = in_any_order and schedule.workers > 2 and schedule.rule == "v2"
        self._link = UrgentFirst(schedule, parameters, tag=2 * schedule.stages) if urgent_first else None
        # Memory to use again, for each kind of lane. What a lane waits for there was sent in an earlier step by a lane
        # of this kind; with one pool for both, two ranks could wait for each other to receive.
        self._free: dict[TransferKind, list[deque[Message]]] = {
            kind: [deque() for _ in layouts] for kind in self._recorders
        }
        self._own: list[SimpleQueue[Gradients | None]] = [SimpleQueue() for _ in layouts]
        self._updated: list[SimpleQueue[Message | None]] = [SimpleQueue() for _ in layouts]
        self._passed_on: list[SimpleQueue[Mark | None]] = [SimpleQueue() for _ in layouts]  # where order is kept
        self._arrived: list[dict[int, Message]] = [{} for _ in layouts]
        self._notes: dict[int, dict[int, Numbers]] = defaultdict(dict)  # by version and stage
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._left_out: int | None = None
        self._lanes: list[threading.Thread] = []
        self._steps: list[SimpleQueue[int | None]] = []  # by lane
        for stages in [[stage] for stage in schedule.order()] if in_any_order else [list(schedule.order())]:
            self._start(partial(self._gradients, stages), f"gradients of stages {stages}")
            self._start(partial(self._parameters, stages), f"parameters of stages {stages}")
        if self._link is not None:
            self._start(self._link.handle_words, "words of the next rank")

    # ---- called by compute ---------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Let the lanes ask for the messages of a step; called on every rank, for each step in turn."""
        self._raise_error()
        if self._link is not None:
            self._link.begin_step()
        for steps in self._steps:
            steps.put(step)

    def hand_over(self, stage: int, gradients: Sequence[Tensor], notes: Tensor) -> None:
        """Give this rank's gradients of a stage away, once in each step; the lane may write into nothing of them."""
        self._raise_error()
        self._own[stage].put(Gradients(gradients, notes, Mark(self._device)))

    def take(self, stage: int, version: int, listen: Callable[[], None]) -> Message:
        """Wait for a version of a stage, and return it until :meth:`release`.

        Args:
            stage: Which.
            version: Which.
            listen: Called about once a second while waiting; it may raise.

        Raises:
            BaseException: What went wrong in a lane.

        """
        self._wait(lambda: version in self._arrived[stage], listen)
        message = self._arrived[stage][version]
        message.written.wait()
        return message

    def release(self, stage: int, version: int) -> None:
        """Give back the memory of a version that has been taken up, and of older ones."""
        receives_it: TransferKind = "gradient" if self._schedule.owner(stage) == self._rank else "parameters"
        with self._changed:
            arrived = self._arrived[stage]
            for old in [each for each in arrived if each <= version]:
                message = arrived.pop(old)
                message.read = Mark(self._device)
                self._free[receives_it][stage].append(message)

    def notes(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> list[list[float]]:
        """Wait for the notes that came with a version of some stages, and return them."""
        return [numbers.tolist() for numbers in self._numbers(version, stages, listen)]

    def notes_on_device(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> Tensor:
        """Wait until the notes of some stages are sure to come, and return them, a row each, on the device."""
        return torch.stack([numbers.on_device() for numbers in self._numbers(version, stages, listen)])

    def _numbers(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> list[Numbers]:
        self._wait(lambda: all(stage in self._notes[version] for stage in stages), listen)
        with self._changed:
            return [self._notes[version][stage] for stage in stages]

    def leave_out(self, step: int, listen: Callable[[], None]) -> list[list[float]]:
        """Let a step that has begun pass without an update, where it never comes; on all ranks, as the last one.

        Args:
            step: Which.
            listen: As in :meth:`take`.

        Returns:
            The notes of all stages: zeros, unless another rank has taken the step.

        """
        self._left_out = step
        for stage, layout in enumerate(self._layouts):
            nothing = Message(layout, self._device)
            nothing.memory.zero_()
            self.hand_over(stage, nothing.parts, nothing.notes)
        return self.notes(step + 1, range(len(self._layouts)), listen)

    def close(self) -> None:
        """End the lanes and wait for what they have sent; only where all ranks have taken up the last version."""
        self._stop()  # behind all that is under way
        for lane in self._lanes:
            lane.join()
        self._raise_error()
        for message in itertools.chain(*itertools.chain(*self._free.values())):
            message.sent()
        if self._link is not None:
            self._link.close()
        if self._device.type == "cuda":  # memory of lanes is about to be given back that compute may still read
            torch.cuda.synchronize(self._device)

    def abandon(self) -> None:
        """End the lanes where another rank is gone, or this one is about to go, once the group has been hung up."""
        self._stop()
        if self._schedule.workers == 1:
            return
        until_s = time.monotonic() + _END_S
        for lane in self._lanes:
            lane.join(max(0.0, until_s - time.monotonic()))
            leave_behind(lane)

    # ---- the lanes -----------------------------------------------------------------------------------------------

    def _gradients(self, stages: Sequence[int], step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._receive("gradient", step, stages)
        for stage in stages:
            receives = schedule.receives(rank, stage, "gradient")
            # where it is asked for already, its arrival is noted at once, so that the next one may be sent
            arrived = next(incoming) if receives and self._ask_at_once else None
            own = self._own[stage].get()
            if own is None:
                raise _ClosedError
            own.ready.wait()
            if receives:
                message = arrived or next(incoming)
                message.notes.add_(own.notes)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    part.add_(gradient / schedule.workers)
            else:
                message = self._empty("gradient", stage)
                message.notes.copy_(own.notes)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    torch.div(gradient, schedule.workers, out=part)
            own.ready.keep_for_this_stream([*own.parts, own.notes])
            if schedule.sends(rank, stage, "gradient"):
                message.to_wire()
                self._send("gradient", step, stage, message)
                self._free["gradient"][stage].append(message)
                if not self._ask_at_once:
                    self._passed_on[stage].put(own.ready)
                continue
            if step != self._left_out:
                self._update(step, stage, message)
            message.written = Mark(self._device)
            self._updated[stage].put(message)

    def _parameters(self, stages: Sequence[int], step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._receive("parameters", step, stages)
        for stage in stages:
            if schedule.owner(stage) == rank:
                updated = self._updated[stage].get()
                if updated is None:
                    raise _ClosedError
                message = updated
                message.written.wait()
                if schedule.sends(rank, stage, "parameters"):
                    message.to_wire()
            else:
                self._keep_order(stage)
                message = next(incoming)
            if schedule.sends(rank, stage, "parameters"):
                self._send("parameters", step, stage, message)
            notes = Numbers(message.notes)
            message.written = Mark(self._device)
            with self._changed:
                self._arrived[stage][step + 1] = message
                self._notes[step + 1][stage] = notes
                for old in [version for version in self._notes if version < step - 2]:
                    del self._notes[old]
                self._changed.notify_all()

    def _keep_order(self, stage: int) -> None:
        """Wait with a version until this rank's gradient is on its way, where a receive holds the device."""
        ready = self._passed_on[stage].get() if not self._ask_at_once else None
        if ready is not None:
            ready.wait()
        elif not self._ask_at_once:
            raise _ClosedError

    def _receive(self, kind: TransferKind, step: int, stages: Sequence[int]) -> Iterator[Message]:
        """Ask for the messages of these stages in a step; yield each when it has arrived."""
        schedule, before = self._schedule, (self._rank - 1) % self._schedule.workers
        to_come = [stage for stage in stages if schedule.receives(self._rank, stage, kind)]

        def ask(stage: int) -> tuple[int, Message, dist.Work]:
            message = self._empty(kind, stage)
            return stage, message, self._recorders[kind].receive(message.wire, before, tag=self._tag(kind, stage))

        asked = list(map(ask, to_come)) if self._ask_at_once else map(ask, to_come)

        def arrivals() -> Iterator[Message]:
            for stage, message, work in asked:
                self._recorders[kind].wait_for(work, before)
                if self._link is not None:
                    self._link.arrived(kind, stage, step)
                message.from_wire()
                yield message

        return arrivals()

    def _send(self, kind: TransferKind, step: int, stage: int, message: Message) -> None:
        payload_bytes = self._layouts[stage].payload_bytes
        purpose = "gradients" if kind == "gradient" else "parameters"

        def send() -> dist.Work:
            return self._recorders[kind].send(
                message.wire,
                self._schedule.after(self._rank),
                purpose,
                payload_bytes,
                tag=self._tag(kind, stage),
                step=step,
            )

        if self._link is None:
            message.sending = send()
        else:
            message.sending = self._link.send(kind, stage, step, self._layouts[stage].message_bytes, send)

    def _tag(self, kind: TransferKind, stage: int) -> int:
        return stage if kind == "gradient" else self._schedule.stages + stage

    def _empty(self, kind: TransferKind, stage: int) -> Message:
        """Return memory for a message of a stage: that of an old one, once it has left."""
        free = self._free[kind][stage]
        try:
            message = free.popleft()
        except IndexError:
            return self._new(stage)
        if self._link is not None and not message.has_left():
            # nobody waits for it: what lets it go may itself wait for what this rank is to receive
            free.append(message)
            return self._new(stage)
        message.use_again()
        return message

    def _new(self, stage: int) -> Message:
        return Message(self._layouts[stage], self._device, through_host=self._through_host)

    # ---- threads -------------------------------------------------------------------------------------------------

    def _start(self, handle: Callable[[int], None], what: str) -> None:
        steps: SimpleQueue[int | None] = SimpleQueue()
        # a daemon, so that a message whose other end is gone does not keep the process alive
        lane = threading.Thread(target=self._run, args=(steps, handle), name=f"lightning_comm {what}", daemon=True)
        self._steps.append(steps)
        self._lanes.append(lane)
        lane.start()

    def _run(self, steps: "SimpleQueue[int | None]", handle: Callable[[int], None]) -> None:
        on_cuda = self._device.type == "cuda"
        try:
            stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                while (step := steps.get()) is not None:
                    handle(step)
        except _ClosedError:
            return
        except BaseException as error:  # raised where compute looks for it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], listen: Callable[[], None]) -> None:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._error or self._closed or condition(), timeout=_LISTEN_S):
                    break
            listen()
        self._raise_error()
        if self._closed and not condition():
            raise _ClosedError

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for steps in self._steps:
            steps.put(None)
        for own in self._own:
            own.put(None)
        for updated in self._updated:
            updated.put(None)
        for passed_on in self._passed_on:
            passed_on.put(None)
