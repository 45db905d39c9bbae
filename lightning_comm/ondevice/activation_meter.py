"""Counts the bytes that autograd keeps for the backward pass, while they are kept."""

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
    """Another thread of the parent may have held the lock, and is not there to free it."""
    global _in_this_process
    _in_this_process = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


class SharedCounter:
    """A sum that the processes of one machine have in common, and the largest that it was.

    Args:
        path: A file of 16 bytes, made if it is not there; all processes name the same one. On a file system in memory,
            such as ``/dev/shm``, nothing is written to a disk.

    Raises:
        OSError: On systems without file locks of the POSIX kind.

    Note:
        *Communication.* None but through that file. It can be pickled, and used after a fork. What a process added and
        did not take off before it died stays in the sum.

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
            os.ftruncate(self._file, _NUMBERS.size)  # to zeros; twice does no harm
        self._map = mmap.mmap(self._file, _NUMBERS.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedCounter, (self.path,)

    def add(self, amount: int) -> int:
        """Add to the sum, or take off from it, and return what it is now."""
        with self._locked():
            value, peak = _NUMBERS.unpack_from(self._map)
            value += amount
            _NUMBERS.pack_into(self._map, 0, value, max(peak, value))
        return int(value)

    @property
    def value(self) -> int:
        """What the sum is now."""
        with self._locked():
            return int(_NUMBERS.unpack_from(self._map)[0])

    @property
    def peak(self) -> int:
        """The largest that the sum was since the file was made, or since :meth:`reset_peak`."""
        with self._locked():
            return int(_NUMBERS.unpack_from(self._map)[1])

    def reset_peak(self) -> None:
        """Forget larger sums than the one of now."""
        with self._locked():
            value, _ = _NUMBERS.unpack_from(self._map)
            _NUMBERS.pack_into(self._map, 0, value, value)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # the lock of a file keeps out other processes, not other threads of this one
        with _in_this_process:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


class _Kept:
    """A saved tensor, and what is to be done when autograd lets go of it."""

    __slots__ = ("_key", "_meter", "tensor")

    def __init__(self, tensor: Tensor, meter: "ActivationMeter", key: int) -> None:
        self.tensor = tensor
        self._meter = meter
        self._key = key

    def __del__(self) -> None:
        self._meter._let_go(self._key, self.tensor.untyped_storage().nbytes())


class ActivationMeter:
    """Measures the bytes of the tensors that autograd saves for backward: what the peak of memory is mostly made of.

    Used as a context around forward and backward, on any device. Memory is counted by storage: several saved tensors
    often share one, which then counts once, as a whole. It counts from when it is first saved to when autograd lets
    go of the last of them.

    Args:
        sources: What is kept anyway and does not count: modules, whose parameters and buffers these are, and functions
            that return tensors, such as :meth:`CyclicEngine.tensors`. Both are asked anew while the context lasts, so
            that parameters may move; but their sizes are those of its beginning.
        shared: Counts in it as well, so that several processes have one sum and one peak.
        timeline: Whether to note every change.

    Note:
        *Communication.* None. *Time.* A call of Python for each saved tensor, and a look at all parameters for each
        new storage that is as large as one of theirs; so measure times without it.

        *What it leaves out.* Tensors that no backward needs, such as outputs that are only passed on, gradients, and
        what kernels use while they run. What was saved before the context began does not count.

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
        self._lock = threading.RLock()  # on CUDA autograd has threads of its own; a collection may come in between
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
        """Begin to look for the peak anew, from what is kept now; the timeline starts over as well."""
        with self._lock:
            self.peak_bytes = self.live_bytes
            if self.timeline is not None:
                self.timeline = [(time.monotonic(), self.live_bytes)]

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata  # its address, which no other storage has while this one lives
        with self._lock:
            if not self._holders[key]:
                size = storage.nbytes()
                if size in self._sizes and any(key == each._cdata for each in self._kept_anyway()):
                    return tensor
                self._change(size)
            self._holders[key] += 1
            # an output comes with the function that saves it: kept whole, the two would keep each other alive
            return _Kept(tensor.detach(), self, key)

    def _let_go(self, key: int, size_bytes: int) -> None:
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
