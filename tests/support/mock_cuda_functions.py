"""The mode of torch's that answers what Python asks of a tensor on a device that is not there, and makes others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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

_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


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


class Functions(TorchFunctionMode):
    """Answers what Python asks of a tensor, and makes what it makes elsewhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN:
            return func(*args, **kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False) if "pin_memory" in kwargs else False
        if func is Tensor.new_tensor and "device" not in kwargs:
            kwargs["device"] = args[0].device if not is_on_device(args[0]) else CUDA
        if kwargs.get("device") is None:
            made = self.call(func, args, kwargs)
            on_device = None
        else:
            made, on_device = self._make(func, args, kwargs)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(made, Tensor) and (type(generator) is Generator) != is_on_device(made):
            raise RuntimeError(f"Expected a generator of the device of the tensor; got one of {generator.device}")
        return put(made, False, pinned=True) if pinned and not on_device else made

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
                on_device_already = is_on_device(data)
            else:
                on_device_already = False
            if on_device and not on_device_already:
                active().wait("values from the host")
        made = put(self.call(func, args, {**kwargs, "device": torch.device("cpu")}), on_device)
        if on_device and not func.__name__.startswith(("empty", "new_empty")):
            active().work(current_stream(), func.__name__, [], labels_in(made))
        return made, on_device

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        here.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            here.depth -= 1


def _move(mode: Functions, tensor: Tensor, on_device: bool, non_blocking: bool, copy: bool, **how: Any) -> Tensor:
    """Return the tensor on the host or the device, as ``Tensor.to`` does."""
    if is_on_device(tensor) == on_device:
        return mode.call(Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": copy, **how})
    here.moving = True
    try:
        made = mode.call(Tensor.to, (tensor,), {"device": torch.device("cpu"), "copy": True, **how})
    finally:
        here.moving = False
    put(made, on_device)
    transfer(made, tensor, non_blocking, on_device)
    return made


def transfer(to: Tensor, source: Tensor, non_blocking: bool, on_device: bool) -> None:
    """Take note of a copy between host and device."""
    labels = [[label] if label is not None and label.on_device else [] for label in (label_of(source), label_of(to))]
    active().work(current_stream(), "copy", *labels)
    free = non_blocking and is_pinned(source if on_device else to)
    if not free:
        memory = "pinned" if is_pinned(source if on_device else to) else "pageable"
        active().wait(f"copy {'to' if on_device else 'from'} the device, {memory}")


def _to(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
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
    return _move(mode, tensor, on_device, bool(how.pop("non_blocking", False)), bool(how.pop("copy", False)), **how)


def _cpu(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return _move(mode, args[0], False, False, False, **kwargs)


def _cuda(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return _move(mode, args[0], True, non_blocking, False)


def _device(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return CUDA if is_on_device(args[0]) else mode.call(func, args, kwargs)


def _answer(on_device: Any) -> Callable[..., Any]:
    return lambda mode, func, args, kwargs: on_device if is_on_device(args[0]) else mode.call(func, args, kwargs)


def _pin(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if is_on_device(args[0]):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return args[0] if is_pinned(args[0]) else put(mode.call(Tensor.clone, args, {}), False, pinned=True)


def _as_numpy(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if is_on_device(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")
    return mode.call(func, args, kwargs)


def _as_list(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    if is_on_device(args[0]):
        active().wait("tolist")
    return mode.call(func, args, kwargs)


def _backward(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Call it with this mode on, since hooks of others run within it."""
    with mode:
        return _plain_backward(*args, **kwargs)


def _plain_backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _deepcopy(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    return put(mode.call(func, args, kwargs), is_on_device(args[0]))


def _setitem(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Assign to entries; those of the device may be chosen by numbers from the host, which are copied to it."""
    tensor, index, value = args
    if not is_on_device(tensor):
        return mode.call(func, args, kwargs)
    places = list(index) if isinstance(index, tuple) else [index]
    for k, chosen in enumerate(places):
        numbers = torch.tensor(chosen) if isinstance(chosen, list) else chosen
        if isinstance(numbers, Tensor) and numbers.dim() and not is_on_device(numbers):
            places[k] = _move(mode, numbers, True, False, False)
    return mode.call(func, (tensor, tuple(places) if isinstance(index, tuple) else places[0], value), kwargs)


# what is answered without a look at entries, and alike on all devices
_PLAIN = {Tensor.data_ptr, Tensor.stride, Tensor.size, Tensor.numel, Tensor.dim, Tensor.element_size}
_PLAIN |= {Tensor.is_contiguous, Tensor.storage_offset, Tensor.is_complex, Tensor.is_floating_point}
_PLAIN |= {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "layout", "requires_grad", "grad", "is_leaf")}
_PLAIN |= {getattr(Tensor, name).__get__ for name in ("is_sparse", "is_meta", "ndim", "grad_fn", "_version", "data")}

_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: _answer(True),
    Tensor.is_cpu.__get__: _answer(False),
    Tensor.get_device: _answer(0),
    Tensor.is_pinned: lambda mode, func, args, kwargs: is_pinned(args[0]),
    Tensor.pin_memory: _pin,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.numpy: _as_numpy,
    Tensor.__array__: _as_numpy,
    Tensor.tolist: _as_list,
    Tensor.backward: _backward,
    Tensor.__setitem__: _setitem,
    Tensor.__deepcopy__: _deepcopy,
}
