"""An observer of the messages that Python code sends through ``torch.distributed``; it changes none of them.

For as long as a :class:`Watcher` is on, the functions of ``torch.distributed`` are wrapped; afterwards they are as
before. A call is counted once: what our own `Recorder` sends is recorded there, and a function that calls another of
them (``broadcast_object_list`` calls ``broadcast``) is counted by what it calls.

Not seen are calls from C++ (DDP's own all-reduce of gradients, which `ddp_timing` measures), calls through a name that
was imported before (``from torch.distributed import all_reduce``), calls inside a graph of ``torch.compile``, and
single calls of ``isend`` and ``irecv``, which torch compares by identity so that they cannot be wrapped.
"""

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lightning_comm.core.ledger import CommRecord, wire_bytes
from lightning_comm.transport.recording import MarkedRecord, counted_elsewhere, is_counted_elsewhere

# function: kind of message, and the argument that this rank hands over
FUNCTIONS: dict[str, tuple[str, str | None]] = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_reduce_coalesced": ("all_reduce", "tensors"),
    "broadcast": ("broadcast", "tensor"),
    "reduce": ("reduce", "tensor"),
    "all_gather": ("all_gather", "tensor"),
    "all_gather_into_tensor": ("all_gather", "input_tensor"),
    "all_gather_coalesced": ("all_gather", "input_tensor_list"),
    "gather": ("gather", "tensor"),
    "scatter": ("scatter", "tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "all_to_all": ("all_to_all", "input_tensor_list"),
    "all_to_all_single": ("all_to_all", "input"),
    "send": ("send", "tensor"),
    "recv": ("receive", "tensor"),
    "batch_isend_irecv": ("send", "p2p_op_list"),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
}
NEWER = {  # names that releases of torch after 2.6 have added, and through which they pass the older ones
    "all_gather_single": ("all_gather", "input_tensor"),
    "gather_single": ("gather", "tensor"),
    "reduce_scatter_single": ("reduce_scatter", "input"),
}
COALESCED = "_broadcast_coalesced"  # private; DDP broadcasts buffers with it before a forward

# who asked for a call: the first module on the stack, outside of torch but for these parts of it
_PARTS_OF_TORCH = {
    "torch.distributed.algorithms.ddp_comm_hooks": "gradients",
    "torch.distributed.algorithms.model_averaging": "parameters",
    "torch.distributed.fsdp": "parameters",
    "torch.nn.modules._functions": "batch_norm",
}
_PACKAGES = {
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "lightning_fabric": "lightning",
    "torchmetrics": "metrics",
}
_NBYTES = attrgetter("nbytes")
_LOOKED_THROUGH = ("torch", "contextlib", "functools")


class Watcher:
    """Reports each call of a collective as a record.

    Several may be on at once; each is passed every call.

    Args:
        report: Called with each record.
        step: Returns the optimizer steps done.
        safely: Calls what it is given, and lets no exception of it into the code that is watched.
        mark: Marks the present moment of a device that the host may be ahead of, and records become `MarkedRecord`.

    Note:
        *Communication.* None of its own.

        *Times.* A record lasts as long as the call. An asynchronous call is over before its message has arrived, so
        its duration is 0.0, which means not known.

    """

    def __init__(
        self,
        report: Callable[[CommRecord], None],
        step: Callable[[], int],
        safely: Callable[[Callable[[], None]], None],
        mark: Callable[[], Any] | None = None,
    ) -> None:
        self.in_backward = False  # set by the owner; calls during it are a hook's, whatever thread makes them
        self._report = report
        self._step = step
        self._safely = safely
        self.mark: Callable[[], Any] = mark or _no_mark

    def install(self) -> None:
        """Begin to observe; the first watcher to do so wraps the functions."""
        if not _WRAPPERS.listeners:
            _WRAPPERS.put_on()
        _WRAPPERS.listeners.append(self)

    def remove(self) -> None:
        """Stop observing; the last watcher to do so restores the functions."""
        if self in _WRAPPERS.listeners:
            _WRAPPERS.listeners.remove(self)
            if not _WRAPPERS.listeners:
                _WRAPPERS.take_off()

    def report_call(
        self, kind: str, frame: Any, read: Callable[[], tuple[int, Any]], times: tuple[float, float], began: Any
    ) -> None:
        """Report a call that was made from a frame; without one, it was DDP's own of its buffers.

        Args:
            kind: Of message.
            frame: Where it was called.
            read: Returns the bytes and the group.
            times: When it began, and how long it took the host; 0.0 where it is not over.
            began: What :attr:`mark` gave before it.

        """
        ended = self.mark()

        def note() -> None:
            payload_bytes, group = read()
            world_size = dist.get_world_size(group)
            if world_size > 1:  # -1 where this rank is not in the group
                purpose = "buffers" if frame is None else self._purpose(frame)
                sent = wire_bytes(kind, payload_bytes, world_size)
                record = CommRecord(kind, purpose, payload_bytes, sent, self._step(), *times)
                is_over = began is not None and times[1] > 0
                self._report(MarkedRecord.of(record, began, began, ended) if is_over else record)

        self._safely(note)

    def _purpose(self, frame: Any) -> str:
        while frame is not None:
            module = str(frame.f_globals.get("__name__", ""))
            for part, purpose in _PARTS_OF_TORCH.items():
                if module.startswith(part):
                    return purpose
            package = module.partition(".")[0]
            if package not in _LOOKED_THROUGH:
                return "gradients" if self.in_backward else _PACKAGES.get(package, "user")
            frame = frame.f_back
        return "gradients"  # nothing but torch on the stack: one of its threads, which runs a hook


def _no_mark() -> None:
    """In place of what marks moments, where the host does the work itself."""


class _Wrappers:
    """The functions of ``torch.distributed`` while there is a watcher."""

    def __init__(self) -> None:
        self.listeners: list[Watcher] = []
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def put_on(self) -> None:
        """Wrap the functions."""
        there = {name: entry for name, entry in NEWER.items() if hasattr(dist, name)}
        for name, (kind, argument) in {**FUNCTIONS, **there}.items():
            original = getattr(dist, name)
            wrapper = self._wrapped(original, kind, _reader(original, argument))
            for owner in (dist, distributed_c10d):
                self._replace(owner, name, wrapper)
        self._replace(dist, COALESCED, self._wrapped_coalesced(getattr(dist, COALESCED)))

    def take_off(self) -> None:
        """Restore the functions, but for those that others have wrapped since."""
        while self._replaced:
            owner, name, original, wrapper = self._replaced.pop()
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, wrapper: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name), wrapper))
        setattr(owner, name, wrapper)

    def _wrapped(
        self, original: Callable[..., Any], kind: str, read: Callable[..., tuple[int, Any]]
    ) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.listeners or is_counted_elsewhere():
                return original(*args, **kwargs)
            started, heard_by = time.monotonic(), [(each, each.mark()) for each in self.listeners]
            with counted_elsewhere():
                result = original(*args, **kwargs)
            is_over = not isinstance(result, (dist.Work, list))
            duration_s = time.monotonic() - started if is_over else 0.0
            frame = sys._getframe(1)
            for listener, began in heard_by:
                listener.report_call(kind, frame, lambda: read(args, kwargs), (started, duration_s), began)
            return result

        return call

    def _wrapped_coalesced(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
            started, heard_by = time.monotonic(), [(each, each.mark()) for each in self.listeners]
            result = original(group, tensors, *args, **kwargs)
            times = started, time.monotonic() - started
            for listener, began in heard_by:
                listener.report_call("broadcast", None, lambda: (sum(map(_NBYTES, tensors)), group), times, began)
            return result

        return call


_WRAPPERS = _Wrappers()


def _reader(function: Callable[..., Any], argument: str | None) -> Callable[..., tuple[int, Any]]:
    """Return what finds, in the arguments of a call, the bytes handed over and the group."""
    names = list(inspect.signature(function).parameters)
    at = {name: names.index(name) for name in (argument, "group") if name in names}

    def find(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[at[name]] if name in at and at[name] < len(args) else None

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Any]:
        handed_over = find(argument, args, kwargs) if argument else None
        if argument == "p2p_op_list" and handed_over:
            return _size(each.tensor for each in handed_over if each.op is dist.isend), handed_over[0].group
        return _size(handed_over), find("group", args, kwargs)

    return read


def _size(handed_over: Tensor | Iterable[Any] | None) -> int:
    if isinstance(handed_over, Tensor):
        return handed_over.nbytes
    return sum(each.nbytes if isinstance(each, Tensor) else _size(each) for each in handed_over or ())
