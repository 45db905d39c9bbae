"""The mode of torch's that answers what Python asks of a tensor on a device that is not there, and makes others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from support.mock_cuda_copies import cpu, cuda, deepcopy, move, to
from support.mock_cuda_record import (
    CUDA,
    active,
    current_stream,
    here,
    is_on_device,
    is_pinned,
    labels_in,
    means_cuda,
    pinned_in,
    put,
    tensors_in,
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


def _data(func: Any, args: Any, kwargs: Any) -> Any:
    first = 1 if func is Tensor.new_tensor else 0
    return args[first] if len(args) > first else kwargs.get("data", kwargs.get("obj"))


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
        if func in _FROM_VALUES and not isinstance(data := _data(func, args, kwargs), Tensor):
            for _ in range(sum(each.numel() for each in tensors_in(data) if is_on_device(each))):
                active().wait("_local_scalar_dense")  # a number after the other
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
            data = _data(func, args, kwargs)
            if isinstance(data, Tensor):
                if func in (torch.as_tensor, torch.asarray):
                    data = data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
                    return move(self, data, on_device, False, False), on_device
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
    active().touch("numpy", pinned_in(args[0]), [])
    return mode.call(func, args, kwargs)


def _reads(kind: str) -> Callable[..., Any]:
    """Answer with what lies in a tensor, which is read where dispatch does not see it."""

    def read(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
        if is_on_device(args[0]):
            active().wait(kind)
        active().touch(kind, pinned_in(args[0]), [])
        return mode.call(func, args, kwargs)

    return read


def _where(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Choose between tensors: one number of the host is copied to the device, unless it is no tensor."""
    if any(is_on_device(each) for each in tensors_in(args)):
        args = [
            move(mode, each, True, False, False) if isinstance(each, Tensor) and each.dim() == 0 else each
            for each in args
        ]
    return mode.call(func, args, kwargs)


def _backward(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Call it with this mode on, since hooks of others run within it."""
    with mode:
        return _plain_backward(*args, **kwargs)


def _plain_backward(
    tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _setitem(mode: Functions, func: Any, args: Any, kwargs: Any) -> Any:
    """Assign to entries; those of the device may be chosen by numbers from the host, which are copied to it."""
    tensor, index, value = args
    if not is_on_device(tensor):
        return mode.call(func, args, kwargs)
    places = list(index) if isinstance(index, tuple) else [index]
    for k, chosen in enumerate(places):
        numbers = torch.tensor(chosen) if isinstance(chosen, list) else chosen
        if isinstance(numbers, Tensor) and numbers.dim() and not is_on_device(numbers):
            places[k] = move(mode, numbers, True, False, False)
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
    Tensor.to: to,
    Tensor.cpu: cpu,
    Tensor.cuda: cuda,
    Tensor.numpy: _as_numpy,
    Tensor.__array__: _as_numpy,
    Tensor.tolist: _reads("tolist"),
    Tensor.backward: _backward,
    Tensor.__setitem__: _setitem,
    Tensor.__repr__: _reads("repr"),
    torch.where: _where,
    Tensor.where: _where,
    Tensor.__deepcopy__: deepcopy,
}
