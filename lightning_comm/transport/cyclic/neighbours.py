"""The two neighbours of a rank on the ring: messages from the one before it and to the one after it."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from lightning_comm.core.cyclic.schedule import CyclicSchedule, TransferKind
from lightning_comm.transport.cyclic.messages import StageLayout, StageMessage
from lightning_comm.transport.cyclic.send_queue import UrgentFirst
from lightning_comm.transport.recording import Recorder


class Neighbours:
    """Receives, sends and records messages of stages, in memory that is used again.

    Args:
        schedule: The order of messages on the ring.
        layouts: The layout of each stage in a message.
        gradients: Sends and records sums of gradients.
        parameters: Sends and records new versions.
        device: Where the tensors are.
        in_any_order: Whether the backend matches messages by their tags, as gloo does and NCCL does not. Such a backend
            is only given memory of the host.

    Attributes:
        queue: What waits for the link to the next rank, most urgent first; ``None`` where all is sent at once.

    """

    def __init__(
        self,
        schedule: CyclicSchedule,
        layouts: Sequence[StageLayout],
        gradients: Recorder,
        parameters: Recorder,
        device: torch.device,
        *,
        in_any_order: bool,
    ) -> None:
        self._schedule, self._layouts, self._device = schedule, layouts, device
        self._rank = gradients.rank
        self._recorders: dict[TransferKind, Recorder] = {"gradient": gradients, "parameters": parameters}
        # On gloo a sender waits until the receive is posted, which it learns by a small message that waits behind bulk
        # traffic. So all receives of a step are posted at its beginning.
        self._ask_at_once = in_any_order
        self._through_host = in_any_order and device.type != "cpu"
        urgent_first = in_any_order and schedule.sends_urgent_first
        self.queue = UrgentFirst(schedule, parameters, tag=2 * schedule.stages) if urgent_first else None
        # Memory to use again, a pool for each kind of lane. A lane that takes memory waits until its last message has
        # left, which a lane of the same kind sent in an earlier step. With one pool for both kinds, two ranks could
        # wait for each other to receive.
        self._free: dict[TransferKind, list[deque[StageMessage]]] = {
            kind: [deque() for _ in layouts] for kind in self._recorders
        }

    def begin_step(self) -> None:
        """Expect the acknowledgements of a step."""
        if self.queue is not None:
            self.queue.begin_step()

    def receive(self, kind: TransferKind, step: int, stages: Sequence[int]) -> Iterator[StageMessage]:
        """Post the receives of these stages in a step; yield each message when it has arrived."""
        before = (self._rank - 1) % self._schedule.workers
        to_come = [stage for stage in stages if self._schedule.receives(self._rank, stage, kind)]

        def ask(stage: int) -> tuple[int, StageMessage, dist.Work]:
            message = self.empty(kind, stage)
            return stage, message, self._recorders[kind].receive(message.wire, before, tag=self._tag(kind, stage))

        asked = list(map(ask, to_come)) if self._ask_at_once else map(ask, to_come)

        def arrivals() -> Iterator[StageMessage]:
            for stage, message, work in asked:
                self._recorders[kind].wait_for(work, before)
                if self.queue is not None:
                    self.queue.acknowledge(kind, stage, step)
                message.from_wire()
                yield message

        return arrivals()

    def send(self, kind: TransferKind, step: int, stage: int, message: StageMessage) -> None:
        """Send a message to the next rank, at once or when its turn comes; it must be kept until it has left."""
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

        if self.queue is None:
            message.sending = send()
        else:
            message.sending = self.queue.send(kind, stage, step, self._layouts[stage].message_bytes, send)

    def empty(self, kind: TransferKind, stage: int) -> StageMessage:
        """Return memory for a message of a stage: that of an old one, once it has left."""
        free = self._free[kind][stage]
        try:
            message = free.popleft()
        except IndexError:
            return self._new(stage)
        if self.queue is not None and not message.has_left():
            # not waited for: it leaves when the next rank acknowledges others, which may itself wait for what this
            # rank is about to receive
            free.append(message)
            return self._new(stage)
        message.use_again()
        return message

    def give_back(self, kind: TransferKind, stage: int, message: StageMessage) -> None:
        """Let the memory of a message be used again by a kind of lane, once it has left."""
        self._free[kind][stage].append(message)

    def close(self) -> None:
        """Wait for all that was sent; only where the next rank receives all messages."""
        for message in itertools.chain(*itertools.chain(*self._free.values())):
            message.sent()
        if self.queue is not None:
            self.queue.close()

    def _tag(self, kind: TransferKind, stage: int) -> int:
        return stage if kind == "gradient" else self._schedule.stages + stage

    def _new(self, stage: int) -> StageMessage:
        return StageMessage(self._layouts[stage], self._device, through_host=self._through_host)
