"""A meter of the bytes that autograd keeps for the backward pass."""

import mmap
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NUMBERS = struct.Struct("qq")
_in_this_process = threading.RLock()


def _renew_after_fork() -> None:
    """Replace the lock: another thread of the parent may have held it, and does not exist in the child."""
    global _in_this_process
    _in_this_process = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


class SharedCounter:
    """A sum that the processes of one machine share, and its peak.

    Args:
        path: A file of 16 bytes, created if missing, the same one for all processes. On a file system in memory,
            such as ``/dev/shm``, nothing is written to a disk.

    Raises:
        OSError: On systems without file locks of the POSIX kind.

    Note:
        *Communication.* Only through that file. It can be pickled, and used after a fork. What a process added and
        did not subtract before it died stays in the sum.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     counter, same = SharedCounter(f"{folder}/bytes"), SharedCounter(f"{folder}/bytes")
        ...     _ = counter.add(100), same.add(20), counter.add(-100)
        ...     counter.value, counter.peak
        (20, 120)

    """

    def __init__(self, path: str | Path) -> None:
        if fcntl is None:
            raise OSError("SharedCounter: this system has no `fcntl`, which locks the file. Linux and macOS have it.")
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self._file).st_size < _NUMBERS.size:
            os.ftruncate(self._file, _NUMBERS.size)  # with zeros; a second process may do the same
        self._map = mmap.mmap(self._file, _NUMBERS.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedCounter, (self.path,)

    def add(self, amount: int) -> int:
        """Add a positive or negative amount, and return the new sum."""
        with self._locked():
            value, peak = _NUMBERS.unpack_from(self._map)
            value += amount
            _NUMBERS.pack_into(self._map, 0, value, max(peak, value))
        return int(value)

    @property
    def value(self) -> int:
        """The present sum."""
        with self._locked():
            return int(_NUMBERS.unpack_from(self._map)[0])

    @property
    def peak(self) -> int:
        """The largest sum since the file was created, or since :meth:`reset_peak`."""
        with self._locked():
            return int(_NUMBERS.unpack_from(self._map)[1])

    def reset_peak(self) -> None:
        """Set the peak to the present sum."""
        with self._locked():
            value, _ = _NUMBERS.unpack_from(self._map)
            _NUMBERS.pack_into(self._map, 0, value, value)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # the lock of a file excludes other processes, not other threads of this one
        with _in_this_process:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


class _Kept:
    """A saved tensor that tells the meter when autograd frees it."""

    __slots__ = ("_key", "_meter", "tensor")

    def __init__(self, tensor: Tensor, meter: "ActivationMeter", key: int) -> None:
        self.tensor = tensor
        self._meter = meter
        self._key = key

    def __del__(self) -> None:
        self._meter._drop_holder(self._key, self.tensor.untyped_storage().nbytes())


class ActivationMeter:
    """Measures the bytes of the tensors that autograd saves for backward: most of the memory peak.

    Used as a context around forward and backward, on any device. Memory is counted by storage: several saved tensors
    often share one, which then counts once, as a whole. It counts from when it is first saved until autograd frees the
    last of them.

    Args:
        sources: Tensors that exist anyway and do not count: modules, for their parameters and buffers, and functions
            that return tensors, such as :meth:`CyclicEngine.tensors`. Both are read again while the context lasts, so
            that parameters may move; but their sizes must stay as they are at its beginning.
        shared: A counter in which to count as well, so that several processes have one sum and one peak.
        timeline: Whether to record every change.

    Note:
        *Communication.* None. *Time.* A Python call for each saved tensor, and a search through all parameters for each
        new storage that is as large as one of theirs; so measure times without it.

        *Not counted* are tensors that no backward needs, such as outputs that are only passed on, gradients, the
        workspace of kernels, and what was saved before the context began.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with ActivationMeter(network) as meter:
        ...     loss = network(torch.ones(16, 4)).sum()  # saves the input, and the output of Tanh, twice
        ...     before = meter.live_bytes
        ...     loss.backward()
        >>> before, meter.live_bytes, meter.peak_bytes
        (768, 0, 768)

    """

    def __init__(
        self,
        *sources: nn.Module | Callable[[], Iterable[Tensor]],
        shared: SharedCounter | None = None,
        timeline: bool = False,
    ) -> None:
        self._sources = sources
        self._shared = shared
        self._holders: Counter[int] = Counter()
        self._lock = (
            threading.RLock()
        )  # on CUDA autograd has its own threads; reentrant, since a garbage collection may interrupt
        self._sizes: set[int] = set()
        self._hooks: Any = None
        self.live_bytes = 0
        self.peak_bytes = 0
        self.timeline: list[tuple[float, int]] | None = [] if timeline else None

    def __enter__(self) -> Self:
        self._sizes = {storage.nbytes() for storage in self._kept_anyway()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def reset_peak(self) -> None:
        """Restart peak and timeline from the bytes that are kept now."""
        with self._lock:
            self.peak_bytes = self.live_bytes
            if self.timeline is not None:
                self.timeline = [(time.monotonic(), self.live_bytes)]

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata  # its address, unique while it lives
        with self._lock:
            if not self._holders[key]:
                size = storage.nbytes()
                if size in self._sizes and any(key == each._cdata for each in self._kept_anyway()):
                    return tensor
                self._change(size)
            self._holders[key] += 1
            # detached: an output refers to the function that saves it, so the two would keep each other alive
            return _Kept(tensor.detach(), self, key)

    def _drop_holder(self, key: int, size_bytes: int) -> None:
        with self._lock:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._change(-size_bytes)

    def _change(self, size_bytes: int) -> None:
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._shared is not None:
            self._shared.add(size_bytes)
        if self.timeline is not None:
            self.timeline.append((time.monotonic(), self.live_bytes))

    def _kept_anyway(self) -> Iterator[torch.UntypedStorage]:
        for source in self._sources:
            tensors = chain(source.parameters(), source.buffers()) if isinstance(source, nn.Module) else source()
            for tensor in tensors:
                yield tensor.untyped_storage()


def _unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
    return tensor
