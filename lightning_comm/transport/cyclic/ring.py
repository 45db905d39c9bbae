"""The ring of Cyclic Data Parallelism: gradients and new parameters are passed from neighbour to neighbour.

Every rank has *lanes*, threads beside the one that computes, so that messages do not hold up compute. In each step

- a gradient lane divides this rank's gradient of a stage by the number of ranks, adds it to the sum that comes from the
  rank before, and passes it on; at the stage's owner it updates the stage. It divides before it adds, as DDP does, so
  that the sum of gradients near the limit of their type does not overflow;
- a parameter lane takes the stage's new version from the rank before, or from its own update, passes it on, and keeps
  it until compute uses it.

On gloo each stage has two lanes of its own, and messages are matched by tags: a stage whose gradient is late holds up
no other one, and under rule v2 the message that is needed first is sent first (see
:mod:`~lightning_comm.transport.cyclic.send_queue`); both matter on a link that is always busy. Memory of a CUDA device
goes through the host there: lanes wait for the copies, and compute does not. NCCL carries out messages in the order in
which they were posted, so there one lane for gradients and one for parameters handle all stages in the order in which
backward finishes them, the same on all ranks. There is no deadlock, whatever the send window: that is proven in
:mod:`lightning_comm.core.cyclic.link_proof` for gloo and in :mod:`lightning_comm.core.cyclic.proof` for NCCL.

**Order under NCCL.** All that a group sends and receives is one queue on each rank: where the group was made with a
``device_id``, as Lightning does, it has one communicator and one stream. Number the messages of a group by step, by the
place of their stage in :meth:`CyclicSchedule.order`, and by their place on the stage's way round the ring. A lane posts
them in that order on every rank, and in each stage receives before it sends. So whatever precedes a message in the
queues of its sender and its receiver has a lower number, and the unfinished message with the lowest number is at the
head of both queues: it can always be carried out, and the queues never stop. Between the two groups, versions wait for
sums of the same step but of no later one, and sums wait, through compute, for versions of earlier steps: no circle.

A receive occupies the device until its message comes, so none is posted before this rank's own gradient of the stage
has been computed; the message could not be used earlier. It remains that the two groups and compute must be able to run
at the same time: a device whose streams share one hardware queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``) can deadlock, and
is refused.

**Hand-overs between streams of a CUDA device**, and what puts each in order:

- gradients and this rank's status, from backward to the gradient lane: the mark in :meth:`CyclicRing.hand_over`, and
  ``record_stream``, since backward's stream would reuse their memory;
- a message between the lanes of its stage, and from a lane to compute: ``StageMessage.written``, set behind the last
  write and behind what the lane gave the network; back to the lanes: ``StageMessage.read``, set when compute has read
  it, and the wait for what was sent, in :meth:`StageMessage.use_again`. Its memory is kept in between, and released in
  :meth:`close` when the device has nothing more to do;
- status to the host, and to lanes that clip by the norm of the step before: the mark of :class:`Numbers`;
- through the host: what is sent is on the host before gloo is asked to (:meth:`StageMessage.to_wire`), and what was
  received has left the host's memory before gloo may write there again (:meth:`StageMessage.use_again`).

Only lanes wait on the host. The work that they wait for is on the device already, and depends on nothing that is still
to be given to it, so these waits end, whatever other ranks do.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_comm.core.cyclic.schedule import CyclicSchedule, TransferKind
from lightning_comm.transport.cyclic.lanes import ClosedError, Lanes
from lightning_comm.transport.cyclic.messages import Mark, Numbers, StageLayout, StageMessage
from lightning_comm.transport.cyclic.neighbours import Neighbours
from lightning_comm.transport.recording import Recorder

Update = Callable[[int, int, StageMessage], None]


class Gradients(NamedTuple):
    """This rank's gradients of a stage and its status, as compute hands them over."""

    parts: Sequence[Tensor]
    status: Tensor
    ready: Mark


class CyclicRing:
    """Sums gradients around the ring, lets owners update, and passes new versions on, beside compute.

    Args:
        schedule: The order of messages on the ring.
        layouts: The layout of each stage in a message.
        update: Called in the gradient lane at a stage's owner with the step, the stage and the message that holds the
            mean gradient; it leaves the new parameters there.
        gradients: Sends and records gradients, on a process group of its own.
        parameters: Sends and records new versions, on another one.
        device: Where the tensors are.
        in_any_order: Whether the backend matches messages by their tags, as gloo does and NCCL does not. Such a backend
            is only given memory of the host.

    Note:
        *Communication.* For each stage and step N - 1 messages of its size for the gradient and N - 1 for the new
        version, over all N ranks, each with 64 bytes of status, which are counted as ``"control"``. On gloo, under
        rule v2 with three ranks and more, 8 bytes come back for each.

        *Memory.* Up to two versions of each stage that wait to be used, and what waits for the link. On a CUDA
        device with gloo each of these messages has as much pinned memory of the host, which is used again with it.

        *Host.* On a CUDA device compute waits in :meth:`take` and :meth:`status` for lanes, and in :meth:`status` for
        the device; in :meth:`begin_step`, :meth:`hand_over` and :meth:`release`, which backward calls, for nothing.

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
        self.stages = schedule.stages
        self._schedule, self._layouts, self._update, self._device = schedule, layouts, update, device
        self._rank = gradients.rank
        self._in_any_order = in_any_order
        self._lanes = Lanes(device)
        self._neighbours = Neighbours(schedule, layouts, gradients, parameters, device, in_any_order=in_any_order)
        # One queue a stage, from thread to thread; `None` ends the lane that reads it.
        self._own: list[SimpleQueue[Gradients | None]] = [SimpleQueue() for _ in layouts]  # compute to gradient lane
        self._updated: list[SimpleQueue[StageMessage | None]] = [
            SimpleQueue() for _ in layouts
        ]  # gradient to parameters
        self._passed_on: list[SimpleQueue[Mark | None]] = [SimpleQueue() for _ in layouts]  # likewise; NCCL alone
        self._arrived: list[dict[int, StageMessage]] = [{} for _ in layouts]  # by stage and version, until released
        self._status: dict[int, dict[int, Numbers]] = defaultdict(dict)  # by version and stage
        self._left_out: int | None = None  # the last step, if it has begun but never comes: no update
        for own_stages in [[stage] for stage in schedule.order()] if in_any_order else [list(schedule.order())]:
            self._lanes.start(partial(self._gradients, own_stages), f"gradients of stages {own_stages}")
            self._lanes.start(partial(self._parameters, own_stages), f"parameters of stages {own_stages}")
        if self._neighbours.queue is not None:
            self._lanes.start(self._neighbours.queue.handle_acknowledgements, "acknowledgements of the next rank")

    # ---- called by compute ---------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Let the lanes post the receives of a step; called on every rank, for each step in turn."""
        self._lanes.raise_error()
        self._neighbours.begin_step()
        self._lanes.begin_step(step)

    def hand_over(self, stage: int, gradients: Sequence[Tensor], status: Tensor) -> None:
        """Hand this rank's gradients of a stage to its lane, once in each step; the lane only reads them."""
        self._lanes.raise_error()
        self._own[stage].put(Gradients(gradients, status, Mark(self._device)))

    def take(self, stage: int, version: int, listen: Callable[[], None]) -> StageMessage:
        """Wait for a version of a stage, and return it until :meth:`release`.

        Args:
            stage: The stage.
            version: The version.
            listen: Called about once a second while waiting; it may raise.

        Raises:
            BaseException: What went wrong in a lane.

        """
        self._lanes.wait_until(lambda: version in self._arrived[stage], listen)
        message = self._arrived[stage][version]
        message.written.wait()
        return message

    def release(self, stage: int, version: int) -> None:
        """Give back the memory of a version that is in place, and of older ones."""
        # The memory goes back to the kind of lane that took it: an owner's version lies in the message of its gradient.
        receives_it: TransferKind = "gradient" if self._schedule.owner(stage) == self._rank else "parameters"
        with self._lanes.changed:
            arrived = self._arrived[stage]
            for old in [each for each in arrived if each <= version]:
                message = arrived.pop(old)
                message.read = Mark(self._device)
                self._neighbours.give_back(receives_it, stage, message)

    def status(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> list[list[float]]:
        """Wait for the status that came with a version of some stages, and return it."""
        return [numbers.tolist() for numbers in self._numbers(version, stages, listen)]

    def status_on_device(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> Tensor:
        """Return the status of some stages, a row each, on the device, without a wait of the host for their values."""
        return torch.stack([numbers.on_device() for numbers in self._numbers(version, stages, listen)])

    def _numbers(self, version: int, stages: Sequence[int], listen: Callable[[], None]) -> list[Numbers]:
        self._lanes.wait_until(lambda: all(stage in self._status[version] for stage in stages), listen)
        with self._lanes.changed:
            return [self._status[version][stage] for stage in stages]

    def flushed(self, steps_done: int) -> None:
        """Note a flush: after these steps all ranks wait for the newest version of every stage; this rank has it."""
        if self._neighbours.queue is not None:
            self._neighbours.queue.flushed_at = steps_done

    def leave_out(self, step: int, listen: Callable[[], None]) -> list[list[float]]:
        """End a step that has begun but will not be taken: without an update, on all ranks, as the last step.

        Args:
            step: The step.
            listen: As in :meth:`take`.

        Returns:
            The status of all stages: zeros, unless another rank has taken the step.

        """
        self._left_out = step
        for stage, layout in enumerate(self._layouts):
            nothing = StageMessage(layout, self._device)
            nothing.memory.zero_()
            self.hand_over(stage, nothing.parts, nothing.status)
        return self.status(step + 1, range(len(self._layouts)), listen)

    def close(self) -> None:
        """End the lanes and wait for what they have sent; only where all ranks have the last version."""
        self._end()  # the queues are in order, so lanes first finish all that is under way
        self._lanes.join()
        self._neighbours.close()
        if self._device.type == "cuda":  # compute may still read memory of the lanes, which is about to be freed
            torch.cuda.synchronize(self._device)

    def abandon(self) -> None:
        """End the lanes where another rank is gone, or this one is about to go, once the group has been hung up."""
        self._end()
        if self._schedule.workers > 1:
            self._lanes.leave_behind()

    def _end(self) -> None:
        self._lanes.close()
        for own in self._own:
            own.put(None)
        for updated in self._updated:
            updated.put(None)
        for passed_on in self._passed_on:
            passed_on.put(None)

    # ---- the lanes -----------------------------------------------------------------------------------------------

    def _gradients(self, stages: Sequence[int], step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._neighbours.receive("gradient", step, stages)
        for stage in stages:
            receives = schedule.receives(rank, stage, "gradient")
            # On gloo the receive is posted already. To take the message now, before this rank's own gradient is there,
            # acknowledges it, so that the rank before may send its next one.
            arrived = next(incoming) if receives and self._in_any_order else None
            own = self._own[stage].get()
            if own is None:
                raise ClosedError
            own.ready.wait()
            if receives:
                message = arrived or next(incoming)
                message.status.add_(own.status)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    part.add_(gradient / schedule.workers)
            else:
                message = self._neighbours.empty("gradient", stage)  # the first rank on the stage's way round the ring
                message.status.copy_(own.status)
                for part, gradient in zip(message.parts, own.parts, strict=True):
                    torch.div(gradient, schedule.workers, out=part)
            own.ready.keep_for_this_stream([*own.parts, own.status])
            if schedule.sends(rank, stage, "gradient"):
                message.to_wire()
                self._neighbours.send("gradient", step, stage, message)
                self._neighbours.give_back("gradient", stage, message)  # used again once it has left
                if not self._in_any_order:
                    self._passed_on[stage].put(own.ready)
                continue
            # here the sum is complete: this rank owns the stage
            if step != self._left_out:
                self._update(step, stage, message)
            message.written = Mark(self._device)
            self._updated[stage].put(message)

    def _parameters(self, stages: Sequence[int], step: int) -> None:
        schedule, rank = self._schedule, self._rank
        incoming = self._neighbours.receive("parameters", step, stages)
        for stage in stages:
            if schedule.owner(stage) == rank:
                updated = self._updated[stage].get()
                if updated is None:
                    raise ClosedError
                message = updated
                message.written.wait()
                if schedule.sends(rank, stage, "parameters"):
                    message.to_wire()
            else:
                self._keep_order(stage)
                message = next(incoming)
            if schedule.sends(rank, stage, "parameters"):
                self._neighbours.send("parameters", step, stage, message)
            status = Numbers(message.status)
            message.written = Mark(self._device)
            with self._lanes.changed:
                self._arrived[stage][step + 1] = message
                self._status[step + 1][stage] = status
                # the status is read up to two steps late
                for old in [version for version in self._status if version < step - 2]:
                    del self._status[old]
                self._lanes.changed.notify_all()

    def _keep_order(self, stage: int) -> None:
        """On NCCL, wait until this rank's gradient of the stage is on its way, before a receive occupies the device."""
        ready = self._passed_on[stage].get() if not self._in_any_order else None
        if ready is not None:
            ready.wait()
        elif not self._in_any_order:
            raise ClosedError
