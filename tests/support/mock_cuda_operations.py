"""The mode of torch's that labels what operations return on a device that is not there, and notes what they do."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.mock_cuda_copies import transfer
from support.mock_cuda_record import (
    PACKAGE,
    Stream,
    active,
    current_stream,
    here,
    is_on_device,
    labels_in,
    pinned_in,
    place,
    put,
    tensors_in,
)

# whose results' sizes, or what Python gets, depend on values
_READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "argwhere", "bincount", "is_nonzero", "_coalesce"}
_READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "allclose"}
_READS |= {"_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "linalg_lstsq"}  # whether it has converged
_FILLS = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}  # with a number, which is read off a tensor
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"copy_", "_foreach_copy_"}
_WITHOUT_VALUES = {"aten::lift_fresh", "aten::set_", "aten::resize_", "aten::detach"}
_STRICT = {"cat", "stack"}  # no number of the host beside tensors of the device


class Operations(TorchDispatchMode):
    """Labels what operations return, and takes note of what they do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if here.moving:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            namespace, name = func._schema.name.split("::")
            tensors = list(tensors_in((args, kwargs)))
            there = [is_on_device(each) for each in tensors]
            if namespace == "c10d":
                return self._message(func, name, args, kwargs, list(zip(tensors, there, strict=True)))
            if not tensors:
                by_cpp = here.depth == 0 and (here.made_by_ddp or torch._C._current_graph_task_id() != -1)
                if (asked := kwargs.get("device")) is not None and asked.type == "cuda":  # as for a barrier
                    kwargs, by_cpp = {**kwargs, "device": torch.device("cpu")}, True
                made = func(*args, **kwargs)
                return put(made, True) if by_cpp else made
            if not any(there):
                if pinned_in(tensors):
                    self._touch(func, name, args, kwargs)
                return func(*args, **kwargs)
            self._look(func, name, args, kwargs, list(zip(tensors, there, strict=True)))
            made = func(*args, **kwargs)
            if name not in _COPIES:
                put(made, True)
            self._order(func, args, kwargs, made)
            return made

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[tuple[Tensor, bool]]) -> None:
        device = active()
        if name in _FILLS and isinstance(value := kwargs.get("value", args[-1]), Tensor) and is_on_device(value):
            device.wait("_local_scalar_dense")
        if name in _READS:
            device.wait(name)
        elif name in _COPIES:
            pairs = [(args[0], args[1])] if name == "copy_" else list(zip(args[0], args[1], strict=True))
            non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            for to, source in pairs:
                if is_on_device(to) != is_on_device(source):
                    transfer(to, source, non_blocking, is_on_device(to))
        elif name in _INDEXING:
            self._look_at_indices(name, args)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            device.wait(name)
        elif any(not there and (each.dim() or name in _STRICT) for each, there in tensors) or not all(
            map(is_on_device, tensors_in(_read_and_written(func, args, kwargs)[1]))
        ):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func._schema.name} at {place(PACKAGE) or place(None)})"
            )

    def _look_at_indices(self, name: str, args: Any) -> None:
        indices = [each for each in args[1] if each is not None]
        if not is_on_device(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        filled = name.startswith(("index_put", "_index_put")) and args[2].numel() == 1 and not is_on_device(args[2])
        for each in indices:
            if not is_on_device(each):
                active().wait("indices from the host")
            elif each.dtype in (torch.bool, torch.uint8) and not (filled and len(indices) == 1):
                active().wait("a mask as an index")

    def _order(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Keep the order of reading and writing. A view is neither."""
        if not _has_values(func):
            return
        read, written = (labels_in(each) for each in _read_and_written(func, args, kwargs))
        fresh = [each for each in labels_in(made) if each not in read and each not in written]
        read = [each for each in read if each not in written]
        active().work(current_stream(), func._schema.name, read, written + fresh)

    def _touch(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if _has_values(func):
            active().touch(name, *(pinned_in(each) for each in _read_and_written(func, args, kwargs)))

    def _message(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[tuple[Tensor, bool]]) -> Any:
        device = active()
        on_device = [each for each, there in tensors if there]
        if device.nccl and len(on_device) < len(tensors):
            raise RuntimeError("No backend type associated with device type cpu")
        if not device.p2p and on_device and name in ("send", "recv_", "recv_any_source_"):
            raise RuntimeError(f"gloo: {name} of a CUDA tensor: writev: Bad address")
        on_host = pinned_in([each for each, there in tensors if not there])
        device.touch(name, on_host, [] if name == "send" else on_host)
        made = func(*args, **kwargs)
        if on_device:
            stream = here.message = Stream()
            stream._follow(current_stream().seen)
            read, written = (labels_in(on_device), []) if name == "send" else ([], labels_in(on_device))
            device.work(stream, f"{name} (message)", read, written)
            if not here.calling_dist:  # DDP's own, which waits where Python does not see it
                current_stream()._follow(stream.seen)
        return made


def _has_values(func: Any) -> bool:
    """Whether an operation reads or writes entries: one that only looks at them in another way does not."""
    return not func.is_view and func._schema.name not in _WITHOUT_VALUES


def _read_and_written(func: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any]]:
    """Return the arguments that an operation reads, and those that it changes."""
    schema = func._schema
    read: list[Any] = []
    written: list[Any] = []
    given = [*zip(schema.arguments, args, strict=False)]
    given += [(each, kwargs[each.name]) for each in schema.arguments if each.name in kwargs]
    for argument, value in given:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        (written if changed else read).append(value)
    return read, written
