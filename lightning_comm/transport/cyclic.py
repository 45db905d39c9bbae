"""The ring of Cyclic Data Parallelism: gradients and new parameters travel from neighbour to neighbour.

Every rank has two *lanes*, each a thread with a process group of its own, so that nothing of this is in the way of
compute. For each step, and within it for each stage in the order in which backward finishes them:

- the gradient lane adds this rank's gradient to the sum that comes from the rank before, and passes it on; at the
  stage's owner it divides by the number of ranks and updates the stage;
- the parameter lane takes the new version from the rank before, or from its own update, passes it on, and keeps it
  until compute takes it up.

That order is the same on all ranks and does not depend on timing; :mod:`lightning_comm.core.cyclic_check` shows that
nobody waits in a circle, also where a message lasts until the other end has asked for it, as under NCCL.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_comm.core.cyclic import CyclicSchedule
from lightning_comm.transport.cyclic_messages import Mark, Message, StageLayout
from lightning_comm.transport.recording import Recorder

# Receives that a gradient lane has asked for ahead. On gloo a sender waits until it was told of the request, and that
# small message waits behind bulk traffic. NCCL carries out what is asked for in order, so there none is.
_AHEAD = 4
_LISTEN_S = 1.0  # how often somebody who waits looks whether a rank has failed; a look takes up to 70 ms on a slow link

Kind = Literal["gradient", "parameters"]
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

    Note:
        *Communication.* For each stage and step N - 1 messages of its size for the gradient and N - 1 for the new
        version, over all N ranks, each with 64 bytes of notes that are counted as ``"control"``.

        *Memory.* Up to two versions of each stage that wait to be taken up, and a few stages' gradients on their way.

    """

    def __init__(
        self,
        schedule: CyclicSchedule,
        layouts: Sequence[StageLayout],
        update: Update,
        gradients: Recorder,
        parameters: Recorder,
        device: torch.device,
    ) -> None:
        self._schedule, self._layouts, self._update, self._device = schedule, layouts, update, device
        self._rank = gradients.rank
        self._recorders: dict[Kind, Recorder] = {"gradient": gradients, "parameters": parameters}
        one_at_a_time = device.type != "cpu"
        self._ahead: dict[Kind, int] = {
            "gradient": 0 if one_at_a_time else _AHEAD,
            "parameters": 0 if one_at_a_time else schedule.stages,
        }
        self._free: list[deque[Message]] = [deque() for _ in layouts]
        self._own: list[SimpleQueue[Gradients | None]] = [SimpleQueue() for _ in layouts]
        self._updated: list[SimpleQueue[Message | None]] = [SimpleQueue() for _ in layouts]
        self._arrived: list[dict[int, Message]] = [{} for _ in layouts]
        self._notes: dict[int, dict[int, list[float]]] = defaultdict(dict)  # by version and stage
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._steps: dict[Kind, SimpleQueue[int | None]] = {"gradient": SimpleQueue(), "parameters": SimpleQueue()}
        self._lanes = [self._lane("gradient", self._gradients), self._lane("parameters", self._parameters)]

    # ---- called by compute ---------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Let the lanes ask for the messages of a step; called on every rank, for each step in turn."""
        self._raise_error()
        for steps in self._steps.values():
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
        with self._changed:
            arrived = self._arrived[stage]
            for old in [each for each in arrived if each <= version]:
                message = arrived.pop(old)
                message.read = Mark(self._device)
                self._free[stage].append(message)

    def notes(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> list[list[float]]:
        """Wait for the notes that came with a version of some stages, and return them."""
        self._wait(lambda: all(stage in self._notes[version] for stage in stages), listen)
        with self._changed:
            return [self._notes[version][stage] for stage in stages]

    def close(self) -> None:
        """End the lanes and wait for what they have sent; only where all ranks have taken up the last version."""
        self._stop()  # behind all that is under way
        for lane in self._lanes:
            lane.join()
        self._raise_error()
        for messages in self._free:
            for message in messages:
                message.sent()

    def abandon(self) -> None:
        """End the lanes without waiting, where another rank may be gone."""
        self._stop()

    # ---- the lanes -----------------------------------------------------------------------------------------------

    def _gradients(self, step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._receive("gradient")
        for stage in schedule.order():
            own = self._own[stage].get()
            if own is None:
                raise _ClosedError
            if schedule.receives(rank, stage, "gradient"):
                message = next(incoming)
                own.ready.wait()
                message.notes.add_(own.notes)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    part.add_(gradient)
            else:
                message = self._empty(stage)
                own.ready.wait()
                message.notes.copy_(own.notes)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    part.copy_(gradient)
            own.ready.keep_for_this_stream(own.parts)
            if schedule.sends(rank, stage, "gradient"):
                self._send("gradient", stage, message)
                self._free[stage].append(message)
                continue
            for part in message.parts:
                part.div_(schedule.workers)
            self._update(step, stage, message)
            message.written = Mark(self._device)
            self._updated[stage].put(message)

    def _parameters(self, step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._receive("parameters")
        for stage in schedule.order():
            if schedule.owner(stage) == rank:
                updated = self._updated[stage].get()
                if updated is None:
                    raise _ClosedError
                message = updated
                message.written.wait()
            else:
                message = next(incoming)
            if schedule.sends(rank, stage, "parameters"):
                self._send("parameters", stage, message)
            message.written = Mark(self._device)
            notes = message.notes.tolist()
            with self._changed:
                self._arrived[stage][step + 1] = message
                self._notes[step + 1][stage] = notes
                for old in [version for version in self._notes if version < step - 2]:
                    del self._notes[old]
                self._changed.notify_all()

    def _receive(self, kind: Kind) -> Iterator[Message]:
        """Ask for the messages of a step, some of them ahead; yield each when it has arrived."""
        schedule, before = self._schedule, (self._rank - 1) % self._schedule.workers
        to_come = [stage for stage in schedule.order() if schedule.receives(self._rank, stage, kind)]
        asked: deque[tuple[Message, torch.distributed.Work]] = deque()

        def ask() -> None:
            if to_come:
                stage = to_come.pop(0)
                message = self._empty(stage)
                asked.append((message, self._recorders[kind].receive(message.memory, before, tag=stage)))

        for _ in range(self._ahead[kind]):
            ask()

        def arrivals() -> Iterator[Message]:
            while asked or to_come:
                if not asked:
                    ask()
                message, work = asked.popleft()
                work.wait()
                if self._ahead[kind]:
                    ask()
                yield message

        return arrivals()

    def _send(self, kind: Kind, stage: int, message: Message) -> None:
        payload_bytes = self._layouts[stage].payload_bytes
        purpose = "gradients" if kind == "gradient" else "parameters"
        message.sending = self._recorders[kind].send(
            message.memory, self._schedule.after(self._rank), purpose, payload_bytes, tag=stage
        )

    def _empty(self, stage: int) -> Message:
        """Return memory for a message of a stage: that of an old one, once it has left."""
        try:
            message = self._free[stage].popleft()
        except IndexError:
            return Message(self._layouts[stage], self._device)
        message.sent()
        message.read.wait()
        return message

    # ---- threads -------------------------------------------------------------------------------------------------

    def _lane(self, kind: Kind, handle: Callable[[int], None]) -> threading.Thread:
        # a daemon, so that a message whose other end is gone does not keep the process alive
        lane = threading.Thread(target=self._run, args=(kind, handle), name=f"lightning_comm {kind} lane", daemon=True)
        lane.start()
        return lane

    def _run(self, kind: Kind, handle: Callable[[int], None]) -> None:
        on_cuda = self._device.type == "cuda"
        try:
            stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                while (step := self._steps[kind].get()) is not None:
                    self._recorders[kind].step = step
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
        for steps in self._steps.values():
            steps.put(None)
        for own in self._own:
            own.put(None)
        for updated in self._updated:
            updated.put(None)
