"""A device that is not there: tensors of the CPU that say they are on cuda:0, and a count of what the host waits for.

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
and to receive labelled ones, as it does on a GPU, unless ``p2p=True``; ``nccl=True`` takes tensors of the device alone.

Pinned memory that a copy may still read or write is kept apart from what the host does with it: that is a hazard too,
until the host has waited for the copy. An event has come once the host has waited for it, or for something later.

What it cannot show: kernels' own numerics, time, memory. Memory that the allocator hands out again while another stream
still reads it: ``record_stream`` is only called. The device's default generator, whose numbers are the host's. Waits in
C++ that no operation stands for. A graph that crosses devices gets gradients on the wrong one. Files are written as
from the CPU.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # modes load it at their first use: here once, for all ranks that are forked
import torch.distributed as dist
from torch import Tensor

from support.mock_cuda_copies import pickled, storage_on_host
from support.mock_cuda_functions import Functions, Generator
from support.mock_cuda_operations import Operations
from support.mock_cuda_record import (
    CUDA,
    Event,
    MockCuda,
    Stream,
    Wait,
    active,
    current_stream,
    default_stream,
    here,
    mocks,
    on_stream,
)

__all__ = ["CUDA", "MockCuda", "Wait", "mock_cuda"]

# of torch.distributed, what starts messages
_STARTS = [
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "reduce_scatter_tensor",
]
_STARTS += ["isend", "irecv", "send", "recv", "gather", "scatter"]


def _following(start: Callable[..., Any]) -> Callable[..., Any]:
    """Let whoever waits for a message follow it, and nobody else."""

    def call(*args: Any, **kwargs: Any) -> Any:
        here.calling_dist, here.message = True, None
        try:
            work = start(*args, **kwargs)
        finally:
            here.calling_dist = False
        if isinstance(work, dist.Work) and here.message is not None:
            active().messages[work] = here.message
        return work

    return call


def _wait_for_work(plain: Callable[..., Any]) -> Callable[..., Any]:
    def wait(work: Any, *args: Any) -> Any:
        done = plain(work, *args)
        message = active().messages.get(work, here.message if here.calling_dist else None)
        if message is not None:
            current_stream()._follow(message.seen)
        return done

    return wait


def _future_of(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Who takes a future is taken to wait for it: where it does so cannot be seen."""

    def get_future(work: Any) -> Any:
        if here.message is not None:
            current_stream()._follow(here.message.seen)
        return plain(work)

    return get_future


def _record_stream(tensor: Tensor, stream: Stream) -> None:
    assert isinstance(stream, Stream)


def _without_devices(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return futures that ask no driver for streams."""
    return lambda future, *, devices=None: plain(future)


def _within_ddp(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let what C++ makes of its own accord within a method of DDP's, its buckets, be on the device."""

    def call(ddp: Any, *args: Any, **kwargs: Any) -> Any:
        before, here.made_by_ddp = here.made_by_ddp, any(each.is_cuda for each in ddp.module.parameters())
        try:
            return plain(ddp, *args, **kwargs)
        finally:
            here.made_by_ddp = before

    return call


@contextmanager
def _modes() -> Iterator[None]:
    with Functions(), Operations():
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
    "default_stream": lambda device=None: default_stream,
    "set_stream": lambda stream: setattr(here, "stream", stream),
    "synchronize": lambda device=None: active().wait("torch.cuda.synchronize"),
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
def mock_cuda(nccl: bool = False, p2p: bool = False) -> Iterator[MockCuda]:
    """Let this process have a CUDA device for a while.

    Args:
        nccl: Take what NCCL takes: tensors of the device alone, sending and receiving too.
        p2p: Let gloo send and receive tensors of the device, which it cannot on a GPU.

    """
    device = MockCuda(nccl, p2p or nccl)
    ddp = torch.nn.parallel.DistributedDataParallel
    with ExitStack() as stack:
        for name, stub in _STUBS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for module, name, stub in [
            (torch, "Generator", Generator),
            (torch.autograd, "has_torch_function", lambda tensors: False),  # hooks of a backward run with the mode on
            (threading.Thread, "start", _start_thread(threading.Thread.start)),
            (dist.Work, "wait", _wait_for_work(dist.Work.wait)),
            (Tensor, "record_stream", _record_stream),
            (Tensor, "_reduce_ex_internal", pickled(Tensor._reduce_ex_internal)),
            (torch.UntypedStorage, "cpu", storage_on_host(torch.UntypedStorage.cpu)),
            (torch.futures.Future, "__init__", _without_devices(torch.futures.Future.__init__)),
            (dist.Work, "get_future", _future_of(dist.Work.get_future)),
            *((ddp, name, _within_ddp(getattr(ddp, name))) for name in ("_ddp_init_helper", "_pre_forward")),
            *((dist, name, _following(getattr(dist, name))) for name in _STARTS),
        ]:
            stack.enter_context(mock.patch.object(module, name, stub))
        if hasattr(torch, "accelerator"):
            for name in ("current_stream", "synchronize", "is_available"):
                stack.enter_context(mock.patch.object(torch.accelerator, name, _STUBS[name]))
        mocks.append(device)
        stack.callback(mocks.remove, device)
        stack.enter_context(_modes())
        yield device
