"""A codec as the communication hook of torch's DistributedDataParallel.

DDP hands over its buckets one by one, in an order that is the same on all ranks, and the backward goes on while a
bucket's messages are under way. Everything here happens in the hook's body, in that order: nothing is done in a
callback, so that no message is ever started from a thread of the backend, where two buckets would cross each other. For
each bucket in turn: its first message is started; then those before it that need what a first message brought get their
second one. With the last bucket of a backward all that is still under way is waited for, decoded, and handed back.

DDP rebuilds its buckets after the first steps. The state of a parameter is therefore found by the parameters that lie
in a bucket, never by the bucket's number.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn import Parameter

from lightning_comm.ondevice.parameter_snapshots import ParameterSnapshots, read_flags, shape_in_memory
from lightning_comm.transport.compression.base import Codec, Conversation, Layout, Slot, StartedMessage
from lightning_comm.transport.compression.concurrent import Talk
from lightning_comm.transport.recording import Recorder


class _Bucket:
    """A bucket whose messages are under way."""

    def __init__(self, conversation: Conversation, buffer: Tensor, layout: Layout | None) -> None:
        self.buffer = buffer
        self.layout = layout  # None where the bucket is sent in full, without the codec
        self.arrived: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.is_cuda else []
        )
        self.talk = Talk(conversation)

    def finish(self) -> None:
        """Wait for all that is under way and hand the bucket back."""
        self.talk.finish()
        self.arrived.set_result(self.buffer)


class _NonFinite:
    """Counts steps whose means have NaN or infinity, on the device and without a wait for it."""

    def __init__(self) -> None:
        self._steps: Tensor | None = None
        self._now: Tensor | None = None  # whether a bucket of the present step has one

    def begin_step(self) -> None:
        """Forget what a backward that failed has left."""
        self._now = None

    def look(self, means: Tensor) -> None:
        """Look at the means of a bucket."""
        if means.layout == torch.strided and means.numel():
            bad = _is_spoilt(means)
            self._now = bad if self._now is None else self._now | bad.to(self._now.device)

    def end_step(self) -> None:
        """Count the step if any bucket had one."""
        if self._now is not None:
            self._steps = self._now.long() if self._steps is None else self._steps + self._now
            self._now = None

    @property
    def steps(self) -> int:
        """How many steps there were. On CUDA this waits for the device."""
        return int(self._steps) if self._steps is not None else 0


class _Layouts:
    """Layouts of buckets, by the parameters that lie in them."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._known: dict[tuple[int, ...], Layout] = {}

    def of(self, parameters: list[Tensor]) -> Layout:
        """Return the layout of a bucket with these parameters."""
        key = tuple(map(id, parameters))
        layout = self._known.get(key)
        if layout is None:
            slots = (Slot(self._names[id(each)], each.numel(), shape_in_memory(each)) for each in parameters)
            layout = self._known[key] = Layout(tuple(slots))
        return layout


class GradientSync:
    """Replaces the gradients of DDP's buckets by their mean over the ranks, as a codec sends them.

    Args:
        codec: Does the work.
        recorder: Sends what a codec cannot take: gradients that are sparse tensors, or complex.
        named_parameters: The parameters of the model, with the names that state is kept by.
        loss_scale: Returns the factor by which gradients are scaled at the moment; asked where a codec keeps residuals.
        unused: Returns the parameters that no rank has used in the last backward, whose means DDP throws away. Asked
            after a backward, on any rank at any time.

    Attributes:
        on_last_bucket: Called when the last bucket of a backward has come, so all local gradients are there, before its
            messages are waited for; with the seconds that the backward has spent on messages of earlier buckets.

    Note:
        *Communication.* What the codec sends, once a bucket.

        *On CUDA.* In a step the host does not wait for the device, except as described in :meth:`settle` and
        :meth:`take_back_cleared`, and where ``loss_scale`` does. The hook's body runs in the stream of the
        backward, which is where messages are waited for; the future that DDP gets has an event of that stream, for
        which DDP lets the stream wait in which the backward was called.

    """

    def __init__(
        self,
        codec: Codec,
        recorder: Recorder,
        named_parameters: Iterable[tuple[str, Parameter]],
        loss_scale: Callable[[], float] = lambda: 1.0,
        unused: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self.codec = codec
        self._recorder = recorder
        self._parameters = dict(named_parameters)
        self._snapshots = ParameterSnapshots(self._parameters)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._loss_scale = loss_scale
        self._unused = unused
        self._settled = True
        self._looked = False  # whether means that were thrown away have been looked for since the last backward
        self.on_last_bucket: Callable[[float], None] = lambda waited_s: None
        self._waited_s = 0.0
        self._scale: float | None = None
        self._under_way: deque[_Bucket] = deque()
        self._layouts = _Layouts(self._names)
        self._non_finite = _NonFinite()

    def hook(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start the messages of a bucket; the function that is registered with DDP."""
        if isinstance(cast(object, bucket), tuple):  # not what it is annotated as, and DDP wants that annotation
            raise RuntimeError(
                "CompressedDDPStrategy: the reducer of `torch.compile` (`python_reducer`) hands over single gradients, "
                "and a compression works on buckets. Leave `torch._dynamo.config.optimize_ddp` at its default."
            )
        if bucket.index() == 0:
            self._begin_step()
        if bucket.is_last():
            self.on_last_bucket(self._waited_s)
        buffer = bucket.buffer()
        begun = self._begin(bucket, buffer)
        started = time.monotonic()
        for earlier in self._under_way:
            if earlier.talk.more:
                earlier.talk.go_on()
        self._waited_s += time.monotonic() - started
        self._under_way.append(begun)
        if bucket.is_last():
            self._end_step()
        return begun.arrived

    def _begin(self, bucket: GradBucket, buffer: Tensor) -> _Bucket:
        parameters = bucket.parameters()
        # DDP hands over complex gradients as pairs of real numbers, in buckets of their own
        if buffer.layout != torch.strided or any(each.is_complex() for each in parameters):
            return _Bucket(self._in_full(buffer), buffer, None)
        layout = self._layouts.of(parameters)
        return _Bucket(self.codec.mean(buffer, layout), buffer, layout)

    def _in_full(self, buffer: Tensor) -> Conversation:
        yield StartedMessage(self._recorder.all_reduce(buffer.mul_(1 / self._recorder.world_size), "gradients"))

    def settle(self) -> None:
        """Restore what was kept of parameters whose means DDP has thrown away, since no rank has used them.

        Called after a backward; nothing is done where that has been settled already.

        Note:
            *Communication.* None. On CUDA it waits for the device, where a codec remembers what it had kept.

        """
        if self._settled:
            return
        self._settled = True
        if self.codec.unapplied:  # or nothing could be restored
            self.codec.take_back([self._names[id(each)] for each in self._unused()], last_only=True)

    def end_backward(self) -> None:
        """Settle what a backward has brought; one that sent nothing, as in mid-accumulation, is over as well."""
        self.settle()
        self._looked = False

    def stepped(self, parameters: Iterable[Tensor]) -> None:
        """Take note that an optimizer has stepped: with the means of these parameters, or without those cleared before.

        The mean of a parameter without a gradient that has not changed was thrown away.
        """
        open_ = self._unapplied(parameters)
        if not open_:
            return
        self.settle()
        without = [name for name in open_ if self._parameters[name].grad is None]
        changed = set(self._snapshots.changed(without))
        if cleared := [name for name in without if name not in changed]:
            self.codec.take_back(cleared)
        self.codec.applied(open_)

    def thrown_away(self, parameters: Iterable[Tensor]) -> None:
        """Restore what was kept of these parameters, since an optimizer's step with their means was skipped."""
        self.codec.take_back(self._unapplied(parameters))

    def take_back_cleared(self) -> None:
        """Restore what was kept of parameters whose gradients were cleared before anything has stepped with them.

        Called before a backward.

        Note:
            *Communication.* None. On CUDA it waits for the device, once, after a backward with whose means no
            optimizer has stepped.

        """
        self.settle()
        self._forget_changed(self._snapshots.certainly_changed(sorted(self.codec.unapplied)))
        open_ = {name: self._parameters[name].grad for name in sorted(self.codec.unapplied)}
        doubts = {f"changed/{name}": flag for name, flag in self._snapshots.doubts(open_).items()}
        doubts |= {f"used/{name}": gradient.any() for name, gradient in open_.items() if gradient is not None}
        up = read_flags(doubts)  # together, since each of them waits for the device
        self._forget_changed([name for name in open_ if f"changed/{name}" in up])
        cleared = [name for name in open_ if f"changed/{name}" not in up and f"used/{name}" not in up]
        if cleared:
            self.codec.take_back(cleared)
        self._looked = True

    @contextmanager
    def own_changes(self) -> Iterator[None]:
        """Keep the changes of parameters within the block, such as zeros under a mask, from counting as steps."""
        self._find_changed()
        yield
        self._snapshots.renew()

    def _unapplied(self, parameters: Iterable[Tensor]) -> list[str]:
        unapplied = self.codec.unapplied
        names = (self._names.get(id(each)) for each in parameters) if unapplied else ()
        return [name for name in names if name in unapplied]

    def _find_changed(self) -> None:
        """Mark means as applied whose parameters have changed since, without a step of an optimizer of torch's."""
        self._forget_changed(self._snapshots.changed(sorted(self.codec.unapplied)))

    def _forget_changed(self, names: Iterable[str]) -> None:
        self.codec.applied(names)
        self._snapshots.keep(self.codec.unapplied)

    def _begin_step(self) -> None:
        self._waited_s = 0.0
        self._under_way.clear()  # what a backward that failed has left
        self._non_finite.begin_step()
        self.settle()
        if self._looked:  # before this very backward; what torch counts costs nothing
            self._forget_changed(self._snapshots.certainly_changed(sorted(self.codec.unapplied)))
        else:
            self._find_changed()
        self._looked = False
        if self.codec.is_local:  # a codec that keeps residuals
            self._follow_scale()
        self.codec.begin_step()

    def _follow_scale(self) -> None:
        scale = self._loss_scale()
        if self._scale is not None and scale != self._scale:
            self.codec.rescale(scale / self._scale)
        self._scale = scale

    def _end_step(self) -> None:
        while self._under_way:
            bucket = self._under_way.popleft()
            bucket.finish()
            self._non_finite.look(bucket.buffer)
            if bucket.layout is not None and self.codec.unapplied:
                self._take_snapshots(bucket.layout, bucket.buffer)
        self._non_finite.end_step()
        self.codec.end_step()
        self._settled = False  # only after the backward does DDP know which means it discards

    def _take_snapshots(self, layout: Layout, means: Tensor) -> None:
        unapplied = self.codec.unapplied
        for slot, mean in zip(layout.slots, layout.split(means), strict=True):
            if slot.name in unapplied:
                self._snapshots.take(slot.name, mean)

    @property
    def non_finite_steps(self) -> int:
        """How many steps brought a gradient with NaN or infinity. On CUDA this waits for the device."""
        return self._non_finite.steps

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, by parameter name. Tensors belong to this rank alone."""
        self.settle()
        self._find_changed()
        return {"codec": self.codec.state_dict(), "loss_scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.codec.load_state_dict(state["codec"])
        self._snapshots.keep(())
        self._scale = state["loss_scale"]
        self._settled = True


def _is_spoilt(means: Tensor) -> Tensor:
    """Return whether an entry is NaN or infinite: in one pass, whatever their sum is, and without a wait for a device.

    The least and the largest entry are NaN if any is.
    """
    least, largest = means.aminmax()
    return ~(torch.isfinite(least) & torch.isfinite(largest))
