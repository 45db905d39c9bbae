"""What a device that is not there knows: labels of memory, the order of streams, and what the host has waited for."""

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import lightning_comm

CUDA = torch.device("cuda", 0)

PACKAGE = "lightning_comm"
_HOME = f"{Path(lightning_comm.__file__).parent}/"  # a checkout may have the same name as the package
# files that only pass on what others ask for; a warning of C++ comes through Python's own module
_NOT_CALLERS = (
    f"{Path(torch.__file__).parent}/",
    *("/support/mock_cuda", "/gpu_check/waits.py", "/warnings.py", "/_py_warnings.py", "/contextlib.py", "<"),
)


class Wait(NamedTuple):
    """Something that the host waited for.

    Args:
        kind: What it was: an operation of torch, or a copy.
        where: File and line of the innermost frame of the package; ``""`` where there is none.
        by: File and line of the innermost frame outside of torch: who called it.
        in_backward: Whether a backward was under way in this thread.
        thread: The name of the thread.

    """

    kind: str
    where: str
    by: str
    in_backward: bool
    thread: str

    @property
    def own(self) -> bool:
        """Whether the package itself asked for it, and not what it called: a model, Lightning, a test."""
        return self.where != "" and self.where == self.by


class Label:
    """What a storage carries: where it says it is, and which work wrote and read it last."""

    __slots__ = ("on_device", "pinned", "reads", "written")

    def __init__(self, on_device: bool, pinned: bool = False) -> None:
        self.on_device, self.pinned = on_device, pinned
        self.written: tuple[int, int] | None = None  # a stream and the number of its work
        self.reads: dict[int, int] = {}


class _Here(threading.local):
    """What each thread has of its own."""

    depth = 0  # calls of torch from Python under way; tensors made at depth 0 are made by C++ on its own account
    moving = False  # a copy between devices is being made
    made_by_ddp = False
    calling_dist = False
    stream: Any = None
    message: Any = None  # the last one that was handed to a process group


here = _Here()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Return all tensors among values, which may lie in lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from tensors_in(each)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _storages(tensor: Tensor) -> list[Any]:
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return []


def label_of(tensor: Tensor) -> Label | None:
    """Return the label of a tensor's memory."""
    with torch._C.DisableTorchFunction():
        storages = _storages(tensor)
    return getattr(storages[-1], "mock_label", None) if storages else None


def is_on_device(tensor: Any) -> bool:
    label = label_of(tensor)
    return label is not None and label.on_device


def is_pinned(tensor: Tensor) -> bool:
    label = label_of(tensor)
    return label is not None and label.pinned


def put(values: Any, on_device: bool, pinned: bool = False) -> Any:
    """Label all tensors among the values."""
    with torch._C.DisableTorchFunction():
        for storage in (each for tensor in tensors_in(values) for each in _storages(tensor)):
            label = getattr(storage, "mock_label", None)
            if label is not None:
                label.on_device, label.pinned = on_device, pinned
            elif on_device or pinned:
                storage.mock_label = Label(on_device, pinned)
    return values


def means_cuda(device: Any) -> bool:
    """Whether a device, by whatever name, is of CUDA."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


def place(package: str | None) -> str:
    """Return file and line of the innermost frame of a package, or of the innermost outside of torch and the mock."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        at_home = name.startswith(_HOME)
        if at_home if package is not None else not any(each in name for each in _NOT_CALLERS):
            short = f"{PACKAGE}/{name[len(_HOME) :]}" if at_home else "/".join(name.split("/")[-2:])
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def wait_of_now(kind: str) -> Wait:
    """Return a wait that whoever called is at."""
    in_backward = torch._C._current_graph_task_id() != -1
    return Wait(kind, place(PACKAGE), place(None), in_backward, threading.current_thread().name)


class Stream:
    """A stream of the device, as far as order goes: what of other streams its work follows."""

    _numbers = itertools.count(1)
    device, priority = CUDA, 0

    def __init__(self, device: Any = None, priority: int = 0, **ignored: Any) -> None:
        self.stream_id = self.cuda_stream = next(self._numbers)
        self.seen: dict[int, int] = {}  # of each stream, up to which work this one follows; its own number too
        self.host_as_of: tuple[Any, int] = (None, 0)  # which waits of the host its work follows: a device, their number

    def wait_stream(self, stream: "Stream") -> None:
        self._follow(stream.seen)

    def wait_event(self, event: "Event") -> None:
        self._follow(event.seen)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        active().wait("Stream.synchronize", self.seen)

    def query(self) -> bool:
        return active().is_done(self.seen)

    def is_capturing(self) -> bool:
        return False

    def _follow(self, seen: dict[int, int]) -> None:
        for stream, work in seen.items():
            self.seen[stream] = max(work, self.seen.get(stream, 0))


class Event:
    """An event of a stream. It has come once the host has waited for it, or for something later; not before."""

    def __init__(self, enable_timing: bool = False, **ignored: Any) -> None:
        self.seen: dict[int, int] = {}
        self._timed, self._at_s = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or current_stream()).seen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return active().is_done(self.seen)

    def synchronize(self) -> None:
        active().wait("Event.synchronize", self.seen)

    def elapsed_time(self, other: "Event") -> float:
        if not (self._timed and other._timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return 1.0


default_stream = Stream()


def current_stream(device: Any = None) -> Stream:
    """Return this thread's stream."""
    return here.stream or default_stream


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Give this thread another stream for a while."""
    before, here.stream = here.stream, stream or here.stream
    try:
        yield
    finally:
        here.stream = before


class MockCuda:
    """What has happened on the device."""

    def __init__(self, nccl: bool, p2p: bool) -> None:
        self.waits: list[Wait] = []
        self.hazards: list[str] = []
        self.nccl, self.p2p = nccl, p2p
        self.host: dict[int, int] = {}  # what the host knows to be done, of each stream
        self.lock = threading.RLock()
        self.messages: WeakKeyDictionary[Any, Stream] = WeakKeyDictionary()

    @contextmanager
    def counting(self) -> Iterator[list[Wait]]:
        """Collect the waits of a passage."""
        first, found = len(self.waits), []
        yield found
        found += self.waits[first:]

    def wait(self, kind: str, seen: dict[int, int] | None = None) -> None:
        """Take note of a wait, for the current stream unless it is told for what."""
        with self.lock:
            self.waits.append(wait_of_now(kind))
            for stream, work in (current_stream().seen if seen is None else seen).items():
                self.host[stream] = max(work, self.host.get(stream, 0))

    def work(self, stream: Stream, kind: str, read: list[Label], written: list[Label]) -> None:
        """Take note of work on a stream, and of what it should have waited for."""
        with self.lock:
            if stream.host_as_of != (as_of := (self, len(self.waits))):  # to follow all streams at each work takes half
                stream.host_as_of = as_of  # of a test's time, since every message has a stream
                stream._follow(self.host)
            own = stream.seen[stream.stream_id] = stream.seen.get(stream.stream_id, 0) + 1
            for label in read:
                self._check(stream, kind, "reads", label.written)
                label.reads[stream.stream_id] = own
            for label in written:
                self._check(stream, kind, "overwrites", label.written)
                for other in label.reads.items():
                    self._check(stream, kind, "overwrites what is read", other)
                label.written, label.reads = (stream.stream_id, own), {}

    def is_done(self, seen: dict[int, int]) -> bool:
        """Whether the host knows work of streams to be done, since it has waited for it."""
        with self.lock:
            return all(self.host.get(stream, 0) >= work for stream, work in seen.items())

    def touch(self, kind: str, read: list[Label], written: list[Label]) -> None:
        """Take note of what the host does with pinned memory, which copies may still read and write."""
        for label in read + written:
            if label.written is not None and not self.is_done(dict([label.written])):
                self._report(f"the host's {kind} of what stream {label.written[0]} may not have written yet")
        for label in written:
            if not self.is_done(label.reads):
                self._report(f"the host's {kind} overwrites what streams {sorted(label.reads)} may still read")

    def _check(self, stream: Stream, kind: str, what: str, before: tuple[int, int] | None) -> None:
        if before is not None and stream.seen.get(before[0], 0) < before[1]:
            self._report(f"{kind} on stream {stream.stream_id} {what} of stream {before[0]}, no wait")

    def _report(self, hazard: str) -> None:
        self.hazards.append(f"{place(PACKAGE) or place(None)}: {hazard}")


mocks: list[MockCuda] = []


def active() -> MockCuda:
    return mocks[-1]


def labels_in(values: Any) -> list[Label]:
    found = {id(label): label for each in tensors_in(values) if (label := label_of(each)) is not None}
    return [label for label in found.values() if label.on_device]


def pinned_in(values: Any) -> list[Label]:
    """Return the labels of pinned memory of the host among the values."""
    labels = (label_of(each) for each in tensors_in(values))
    return [label for label in labels if label is not None and label.pinned and not label.on_device]
