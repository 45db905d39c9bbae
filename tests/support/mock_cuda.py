"""A device that is not there: tensors of the processor that say they are on cuda:0, and a count of what the host waits for.

    with mock_cuda() as device:
        x = torch.ones(3, device="cuda")
        ...
    device.waits      # what made the host wait for the device, with file and line
    device.hazards    # what a stream read or overwrote without waiting for the stream that wrote it

torch's own ``FakeTensorMode`` has no values, and on a machine without a driver no backward either: autograd asks the
driver for the current stream of whatever says that it is on CUDA, and that is an error ("hasPrimaryContext expects a
valid device index"); for a wrapper subclass it ends the process. So here every tensor is a real one on the CPU, with
values, autograd, gloo and DDP as always, and its storage carries a label. Three parts keep up the appearance:

* a ``TorchFunctionMode`` answers ``.device`` and ``.is_cuda`` by the label, lets factories with ``device="cuda"`` label
  what they make, and makes the copies that ``.to``, ``.cpu()`` and ``.cuda()`` stand for;
* a ``TorchDispatchMode`` labels what operations return, also within autograd and DDP, refuses those that mix devices,
  and takes note of those for which the host has to wait;
* ``torch.cuda`` has streams and events that only keep order: each knows which work of the others it follows.

What counts as a wait, on the word of CUDA's documentation and of torch's source: a value that is read (``item``,
``float``, ``tolist``, ``equal``), a size that depends on values (``nonzero``, boolean masks as indices, ``unique``), a
copy between host and device unless it is ``non_blocking`` and the host's memory is pinned, and asking for it
(``synchronize``). ``Work.wait`` is none: under NCCL it lets a stream wait. Gloo sees plain tensors; it refuses to send
and to receive labelled ones, as it does on a GPU, unless ``nccl=True``, which refuses tensors of the host instead.

What it cannot show: kernels' own numerics, time, memory. A graph that crosses devices gets gradients on the wrong one.
Files are written as from the CPU.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
PACKAGE = "lightning_comm"
_TORCH = str(Path(torch.__file__).parent)

# whose results' sizes, or what Python gets, depend on values
_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "argwhere", "bincount", "is_nonzero", "_coalesce"}
_READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"copy_", "_foreach_copy_"}
_STRICT = {"cat", "stack"}  # no number of the host beside tensors of the device
_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


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


_here = _Here()


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


def _on_device(tensor: Any) -> bool:
    label = label_of(tensor)
    return label is not None and label.on_device


def _is_pinned(tensor: Tensor) -> bool:
    label = label_of(tensor)
    return label is not None and label.pinned


def _put(values: Any, on_device: bool, pinned: bool = False) -> Any:
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


def _place(package: str | None) -> str:
    """Return file and line of the innermost frame of a package, or outside of torch and of this file."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if package is not None:
            if f"/{package}/" in name:
                return f"{package}/{name.split(f'/{package}/')[-1]}:{frame.f_lineno}"
        elif name != __file__ and not name.startswith(_TORCH) and "<" not in name and "contextlib" not in name:
            short = (
                f"{PACKAGE}/{name.split(f'/{PACKAGE}/')[-1]}"
                if f"/{PACKAGE}/" in name
                else "/".join(name.split("/")[-2:])
            )
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Stream:
    """A stream of the device, as far as order goes: what of other streams its work follows."""

    _made = 0
    device, priority = CUDA, 0

    def __init__(self, device: Any = None, priority: int = 0, **ignored: Any) -> None:
        Stream._made += 1
        self.stream_id = self.cuda_stream = Stream._made
        self.seen: dict[int, int] = {}  # of each stream, up to which work this one follows; its own number too

    def wait_stream(self, stream: "Stream") -> None:
        self._follow(stream.seen)

    def wait_event(self, event: "Event") -> None:
        self._follow(event.seen)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        _active().wait("Stream.synchronize", self.seen)

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def _follow(self, seen: dict[int, int]) -> None:
        for stream, work in seen.items():
            self.seen[stream] = max(work, self.seen.get(stream, 0))


class Event:
    """An event of a stream, which has always come by the time that somebody asks."""

    def __init__(self, enable_timing: bool = False, **ignored: Any) -> None:
        self.seen: dict[int, int] = {}
        self._timed, self._at_s = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or current_stream()).seen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _active().wait("Event.synchronize", self.seen)

    def elapsed_time(self, other: "Event") -> float:
        assert self._timed and other._timed, "both events are made with `enable_timing=True`"
        return 1.0


_default = Stream()


def current_stream(device: Any = None) -> Stream:
    """Return this thread's stream."""
    return _here.stream or _default


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Give this thread another stream for a while."""
    before, _here.stream = _here.stream, stream or _here.stream
    try:
        yield
    finally:
        _here.stream = before


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """A generator of the device: its numbers are others than those of the host's from the same seed, as on a GPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return torch._C.Generator.__new__(cls if means_cuda(device) else torch._C.Generator)

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return CUDA

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed((seed + 0x5EED) % 2**63)
        return self


class MockCuda:
    """What has happened on the device."""

    def __init__(self, nccl: bool) -> None:
        self.waits: list[Wait] = []
        self.hazards: list[str] = []
        self.nccl = nccl
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
        in_backward = torch._C._current_graph_task_id() != -1
        name = threading.current_thread().name
        with self.lock:
            self.waits.append(Wait(kind, _place(PACKAGE), _place(None), in_backward, name))
            for stream, work in (current_stream().seen if seen is None else seen).items():
                self.host[stream] = max(work, self.host.get(stream, 0))

    def work(self, stream: Stream, kind: str, read: list[Label], written: list[Label]) -> None:
        """Take note of work on a stream, and of what it should have waited for."""
        with self.lock:
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

    def _check(self, stream: Stream, kind: str, what: str, before: tuple[int, int] | None) -> None:
        if before is not None and stream.seen.get(before[0], 0) < before[1]:
            place = _place(PACKAGE) or _place(None)
            self.hazards.append(f"{place}: {kind} on stream {stream.stream_id} {what} of stream {before[0]}, no wait")


_mocks: list[MockCuda] = []


def _active() -> MockCuda:
    return _mocks[-1]


class _Functions(TorchFunctionMode):
    """Answers what Python asks of a tensor, and makes what it makes elsewhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False) if "pin_memory" in kwargs else False
        if func is Tensor.new_tensor and "device" not in kwargs:
            kwargs["device"] = args[0].device if not _on_device(args[0]) else CUDA
        if kwargs.get("device") is None:
            made = self.call(func, args, kwargs)
            on_device = None
        else:
            made, on_device = self._make(func, args, kwargs)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(made, Tensor) and (type(generator) is Generator) != _on_device(made):
            raise RuntimeError(f"Expected a generator of the device of the tensor; got one of {generator.device}")
        return _put(made, False, pinned=True) if pinned and not on_device else made

    def _make(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
        device = torch.device(kwargs["device"]) if not isinstance(kwargs["device"], int) else CUDA
        if device.type not in ("cuda", "cpu"):
            return self.call(func, args, kwargs), False
        on_device = device.type == "cuda"
        if func in _FROM_VALUES:
            data = kwargs.get("data", args[-1])
            if isinstance(data, Tensor):
                if func in (torch.as_tensor, torch.asarray):
                    data = data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
                    return _move(self, data, on_device, False, False), on_device
                on_device_already = _on_device(data)
            else:
                on_device_already = False
            if on_device and not on_device_already:
                _active().wait("values from the host")
        made = _put(self.call(func, args, {**kwargs, "device": torch.device("cpu")}), on_device)
        if on_device and not func.__name__.startswith(("empty", "new_empty")):
            _active().work(current_stream(), func.__name__, [], _labels(made))
        return made, on_device

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        _here.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            _here.depth -= 1


def _move(mode: _Functions, tensor: Tensor, on_device: bool, non_blocking: bool, copy: bool, **how: Any) -> Tensor:
    """Return the tensor on the host or the device, as ``Tensor.to`` does."""
    if _on_device(tensor) == on_device:
        return mode.call(Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": copy, **how})
    _here.moving = True
    try:
        made = mode.call(Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": True, **how})
    finally:
        _here.moving = False
    _put(made, on_device)
    _transfer(made, tensor, non_blocking, on_device)
    return made


def _transfer(to: Tensor, source: Tensor, non_blocking: bool, on_device: bool) -> None:
    """Take note of a copy between host and device."""
    labels = [[label] if label is not None and label.on_device else [] for label in (label_of(source), label_of(to))]
    _active().work(current_stream(), "copy", *labels)
    free = non_blocking and _is_pinned(source if on_device else to)
    if not free:
        memory = "pinned" if _is_pinned(source if on_device else to) else "pageable"
        _active().wait(f"copy {'to' if on_device else 'from'} the device, {memory}")


def _to(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, rest = args[0], list(args[1:])
    how = dict(kwargs)
    names = ("non_blocking", "copy")
    flags = [each for each in rest if isinstance(each, bool)]
    how.update(zip(names, flags, strict=False))
    target = how.pop("device", None)
    for each in rest:
        if isinstance(each, torch.dtype):
            how["dtype"] = each
        elif isinstance(each, Tensor):
            how["dtype"], target = each.dtype, CUDA if _on_device(each) else torch.device("cpu")
        elif isinstance(each, (str, torch.device)) or (isinstance(each, int) and not isinstance(each, bool)):
            target = each
    if (other := how.pop("other", None)) is not None:
        how["dtype"], target = other.dtype, CUDA if _on_device(other) else torch.device("cpu")
    if target is not None and not means_cuda(target) and torch.device(target).type != "cpu":
        return mode.call(func, args, kwargs)
    on_device = _on_device(tensor) if target is None else means_cuda(target)
    if how.get("memory_format") is None:
        how.pop("memory_format", None)
    return _move(mode, tensor, on_device, bool(how.pop("non_blocking", False)), bool(how.pop("copy", False)), **how)


def _cpu(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return _move(mode, args[0], False, False, False, **kwargs)


def _cuda(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return _move(mode, args[0], True, non_blocking, False)


def _device(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return CUDA if _on_device(args[0]) else mode.call(func, args, kwargs)


def _answer(on_device: Any) -> Callable[..., Any]:
    return lambda mode, func, args, kwargs: on_device if _on_device(args[0]) else mode.call(func, args, kwargs)


def _pin(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if _on_device(args[0]):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return args[0] if _is_pinned(args[0]) else _put(mode.call(Tensor.clone, args, {}), False, pinned=True)


def _as_numpy(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if _on_device(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")
    return mode.call(func, args, kwargs)


def _as_list(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if _on_device(args[0]):
        _active().wait("tolist")
    return mode.call(func, args, kwargs)


def _backward(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Call it with this mode on, since hooks of others run within it."""
    with mode:
        return _plain_backward(*args, **kwargs)


def _plain_backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _deepcopy(mode: _Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return _put(mode.call(func, args, kwargs), _on_device(args[0]))


def _record_stream(mode: _Functions, func: Any, args: Any, kwargs: Any) -> None:
    assert isinstance(args[1], Stream)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: _answer(True),
    Tensor.is_cpu.__get__: _answer(False),
    Tensor.get_device: _answer(0),
    Tensor.is_pinned: lambda mode, func, args, kwargs: _is_pinned(args[0]),
    Tensor.pin_memory: _pin,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.numpy: _as_numpy,
    Tensor.__array__: _as_numpy,
    Tensor.tolist: _as_list,
    Tensor.backward: _backward,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.record_stream: _record_stream,
}


class _Operations(TorchDispatchMode):
    """Labels what operations return, and takes note of what they do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _here.moving:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            namespace, name = func._schema.name.split("::")
            tensors = [each for each in tensors_in((args, kwargs))]
            there = [_on_device(each) for each in tensors]
            if namespace == "c10d":
                return self._message(func, name, args, kwargs, list(zip(tensors, there, strict=True)))
            if not tensors:
                by_cpp = _here.depth == 0 and (_here.made_by_ddp or torch._C._current_graph_task_id() != -1)
                if (asked := kwargs.get("device")) is not None and asked.type == "cuda":  # as for a barrier
                    kwargs, by_cpp = {**kwargs, "device": torch.device("cpu")}, True
                made = func(*args, **kwargs)
                return _put(made, True) if by_cpp else made
            if not any(there):
                return func(*args, **kwargs)
            self._look(func, name, args, kwargs, list(zip(tensors, there, strict=True)))
            made = func(*args, **kwargs)
            if name not in _COPIES:
                _put(made, True)
            self._order(func, args, kwargs, made)
            return made

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[tuple[Tensor, bool]]) -> None:
        device = _active()
        if name in _READS:
            device.wait(name)
        elif name in _COPIES:
            pairs = [(args[0], args[1])] if name == "copy_" else list(zip(args[0], args[1], strict=True))
            non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            for to, source in pairs:
                if _on_device(to) != _on_device(source):
                    _transfer(to, source, non_blocking, _on_device(to))
        elif name in _INDEXING:
            self._look_at_indices(name, args)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            device.wait(name)
        elif any(not there and (each.dim() or name in _STRICT) for each, there in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func._schema.name} at {_place(PACKAGE) or _place(None)})"
            )

    def _look_at_indices(self, name: str, args: Any) -> None:
        indices = [each for each in args[1] if each is not None]
        if not _on_device(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        filled = name.startswith(("index_put", "_index_put")) and args[2].numel() == 1 and not _on_device(args[2])
        for each in indices:
            if not _on_device(each):
                _active().wait("indices from the host")
            elif each.dtype in (torch.bool, torch.uint8) and not (filled and len(indices) == 1):
                _active().wait("a mask as an index")

    def _order(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Keep the order of reading and writing. A view is neither."""
        schema = func._schema
        if func.is_view or schema.name in ("aten::lift_fresh", "aten::set_", "aten::resize_", "aten::detach"):
            return
        read, written = [], []
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(each, kwargs[each.name]) for each in schema.arguments if each.name in kwargs]
        for argument, value in given:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            (written if changed else read).extend(_labels(value))
        fresh = [each for each in _labels(made) if each not in read and each not in written]
        _active().work(current_stream(), schema.name, [each for each in read if each not in written], written + fresh)

    def _message(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[tuple[Tensor, bool]]) -> Any:
        device = _active()
        on_device = [each for each, there in tensors if there]
        if device.nccl and len(on_device) < len(tensors):
            raise RuntimeError("No backend type associated with device type cpu")
        if not device.nccl and on_device and name in ("send", "recv_", "recv_any_source_"):
            raise RuntimeError(f"gloo: {name} of a CUDA tensor: writev: Bad address")
        made = func(*args, **kwargs)
        if on_device:
            stream = _here.message = Stream()
            stream._follow(current_stream().seen)
            device.work(stream, f"{name} (message)", [], _labels(on_device))
            if not _here.calling_dist:  # DDP's own, which waits where Python does not see it
                current_stream()._follow(stream.seen)
        return made


def _labels(values: Any) -> list[Label]:
    found = {id(label): label for each in tensors_in(values) if (label := label_of(each)) is not None}
    return [label for label in found.values() if label.on_device]


# of torch.distributed, what starts messages
_STARTS = (
    "all_reduce broadcast reduce all_gather all_gather_into_tensor all_to_all_single reduce_scatter_tensor".split()
)
_STARTS += "isend irecv send recv gather scatter".split()


def _following(start: Callable[..., Any]) -> Callable[..., Any]:
    """Let whoever waits for a message follow it, and nobody else."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _here.calling_dist, _here.message = True, None
        try:
            work = start(*args, **kwargs)
        finally:
            _here.calling_dist = False
        if work is not None and _here.message is not None:
            _active().messages[work] = _here.message
        return work

    return call


def _wait_for_work(plain: Callable[..., Any]) -> Callable[..., Any]:
    def wait(work: Any, *args: Any) -> Any:
        done = plain(work, *args)
        message = _active().messages.get(work, _here.message if _here.calling_dist else None)
        if message is not None:
            current_stream()._follow(message.seen)
        return done

    return wait


def _future_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Who takes a future is taken to wait for it: where it does so cannot be seen."""

    def get_future(work: Any) -> Any:
        if _here.message is not None:
            current_stream()._follow(_here.message.seen)
        return plain(work)

    return get_future


def _within_ddp(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let what C++ makes of its own accord within a method of DDP's, its buckets, be on the device."""

    def call(ddp: Any, *args: Any, **kwargs: Any) -> Any:
        before, _here.made_by_ddp = _here.made_by_ddp, any(each.is_cuda for each in ddp.module.parameters())
        try:
            return plain(ddp, *args, **kwargs)
        finally:
            _here.made_by_ddp = before

    return call


@contextmanager
def _modes() -> Iterator[None]:
    with _Functions(), _Operations():
        yield


def _start_thread(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let threads that are started meanwhile be within as well."""

    def start(thread: threading.Thread) -> None:
        run = thread.run

        def within() -> None:
            with _modes():
                run()

        thread.run = within  # type: ignore[method-assign]
        plain(thread)

    return start


def _properties(device: Any = None) -> Any:
    return SimpleNamespace(name="mock", total_memory=2**36, major=9, minor=0, multi_processor_count=132)


_STUBS: dict[str, Any] = {
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "stream": on_stream,
    "current_stream": current_stream,
    "default_stream": lambda device=None: _default,
    "set_stream": lambda stream: setattr(_here, "stream", stream),
    "synchronize": lambda device=None: _active().wait("torch.cuda.synchronize"),
    "device": lambda device: nullcontext(),
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device_count": lambda: 1,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device="cuda": torch.arange(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.arange(16, dtype=torch.uint8)],
    "set_rng_state": lambda state, device="cuda": None,
    "set_rng_state_all": lambda states: None,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: "mock",
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (2**36, 2**36),
    "memory_stats": lambda device=None: {},
    **{name: lambda device=None: 0 for name in ("memory_allocated", "memory_reserved")},
    **{name: lambda device=None: 0 for name in ("max_memory_allocated", "max_memory_reserved")},
    **{name: lambda device=None: None for name in ("reset_peak_memory_stats", "empty_cache", "ipc_collect")},
}


@contextmanager
def mock_cuda(nccl: bool = False) -> Iterator[MockCuda]:
    """Let this process have a CUDA device for a while.

    Args:
        nccl: Take what NCCL takes: tensors of the device alone, sending and receiving too.

    """
    device = MockCuda(nccl)
    ddp = torch.nn.parallel.DistributedDataParallel
    with ExitStack() as stack:
        for name, stub in _STUBS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for module, name, stub in [
            (torch, "Generator", Generator),
            (torch.autograd, "has_torch_function", lambda tensors: False),  # hooks of a backward run with the mode on
            (threading.Thread, "start", _start_thread(threading.Thread.start)),
            (dist.Work, "wait", _wait_for_work(dist.Work.wait)),
            (dist.Work, "get_future", _future_of(dist.Work.get_future)),
            *((ddp, name, _within_ddp(getattr(ddp, name))) for name in ("_ddp_init_helper", "_pre_forward")),
            *((dist, name, _following(getattr(dist, name))) for name in _STARTS),
        ]:
            stack.enter_context(mock.patch.object(module, name, stub))
        if hasattr(torch, "accelerator"):
            for name in ("current_stream", "synchronize", "is_available"):
                stack.enter_context(mock.patch.object(torch.accelerator, name, _STUBS[name]))
        _mocks.append(device)
        stack.callback(_mocks.remove, device)
        stack.enter_context(_modes())
        yield device
