"""Copies between a device that is not there and the host, and what they wait for."""

from typing import Any

import torch
from torch import Tensor

from support.mock_cuda_record import (
    CUDA,
    active,
    current_stream,
    here,
    is_on_device,
    is_pinned,
    label_of,
    labels_in,
    means_cuda,
    put,
)


def move(mode: Any, tensor: Tensor, on_device: bool, non_blocking: bool, copy: bool, **how: Any) -> Tensor:
    """Return the tensor on the host or the device, as ``Tensor.to`` does."""
    if is_on_device(tensor) == on_device:
        return mode.call(Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": copy, **how})
    made = _moving(mode, Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": True, **how})
    put(made, on_device, pinned=non_blocking and not on_device)  # torch takes pinned memory for it by itself
    transfer(made, tensor, non_blocking, on_device)
    return made


def _moving(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    here.moving = True
    try:
        return mode.call(func, args, kwargs)
    finally:
        here.moving = False


def transfer(to: Tensor, source: Tensor, non_blocking: bool, on_device: bool) -> None:
    """Take note of a copy between host and device."""
    labels = [[label] if label is not None else [] for label in (label_of(source), label_of(to))]
    active().work(current_stream(), "copy", *labels)  # pinned memory is read and written in the stream's order too
    free = non_blocking and is_pinned(source if on_device else to)
    if not free:
        memory = "pinned" if is_pinned(source if on_device else to) else "pageable"
        active().wait(f"copy {'to' if on_device else 'from'} the device, {memory}")


def to(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
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
            how["dtype"], target = each.dtype, CUDA if is_on_device(each) else torch.device("cpu")
        elif isinstance(each, (str, torch.device)) or (isinstance(each, int) and not isinstance(each, bool)):
            target = each
    if (other := how.pop("other", None)) is not None:
        how["dtype"], target = other.dtype, CUDA if is_on_device(other) else torch.device("cpu")
    if target is not None and not means_cuda(target) and torch.device(target).type != "cpu":
        return mode.call(func, args, kwargs)
    on_device = is_on_device(tensor) if target is None else means_cuda(target)
    if how.get("memory_format") is None:
        how.pop("memory_format", None)
    return move(mode, tensor, on_device, bool(how.pop("non_blocking", False)), bool(how.pop("copy", False)), **how)


def cpu(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    return move(mode, args[0], False, False, False, **kwargs)


def cuda(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return move(mode, args[0], True, non_blocking, False)


def deepcopy(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Copy within the device, where the host waits for nothing."""
    made = put(_moving(mode, func, args, kwargs), is_on_device(args[0]))
    if is_on_device(args[0]):
        active().work(current_stream(), "copy", labels_in(args[0]), labels_in(made))
    return made


def pickled(plain: Any) -> Any:
    """Pickle a tensor, for which it is copied to the host."""

    def reduce(tensor: Tensor, protocol: Any) -> Any:
        if is_on_device(tensor):
            active().wait("copy from the device, pageable")
        return plain(tensor, protocol)

    return reduce


def storage_on_host(plain: Any) -> Any:
    """Copy a storage to the host, for which the host waits."""

    def cpu(storage: Any) -> Any:
        label = getattr(storage, "mock_label", None)
        if label is None or not label.on_device:
            return plain(storage)
        return torch.UntypedStorage(storage.nbytes()).copy_(storage)

    return cpu
