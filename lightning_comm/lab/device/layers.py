"""The layers of a module: which can be slowed down, which ran, and how much work a call was."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_comm.lab.device.layer_times import Call, CallKey, Pass, Weights


class PassRecorder:
    """A pass that is under way: its calls as they end, and the gradients that are ready."""

    def __init__(self) -> None:
        self.seen = Pass(calls=[], gradients=set())
        self._begun: dict[str, list[int]] = defaultdict(list)  # for each layer its open calls, the innermost last
        self._ended: Counter[str] = Counter()

    def begin(self, name: str) -> None:
        """Note that a layer begins."""
        self._begun[name].append(len(self.seen.calls))

    def end(self, name: str, layer: nn.Module, entries: Tensor | None) -> CallKey:
        """Note that a layer has given these entries; return which call of it that was."""
        elements = 0 if entries is None else entries.numel()
        self.seen.calls.append(Call(name, self._begun[name].pop(), elements, _positions(layer, entries)))
        self._ended[name] += 1
        return name, self._ended[name] - 1


def _positions(layer: nn.Module, entries: Tensor | None) -> int:
    if entries is None or entries.ndim == 0 or isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    channels = layer.out_channels if isinstance(layer, _ConvNd) else entries.shape[-1]
    return entries.numel() // channels if channels else 0


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in what a layer gave: a tensor, or lists, tuples or dicts of them."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def weights_of(module: nn.Module) -> dict[str, Weights]:
    """Return every parameter of a module by its first name, with all modules that own it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, layer in module.named_modules():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return {
        name: Weights(tuple(owners[id(parameter)]), parameter.numel() if parameter.ndim >= 2 else 0)
        for name, parameter in module.named_parameters()
    }


def check_can_be_paced(module: nn.Module) -> None:
    """Refuse a module that sleeping on the host would not pace, layer by layer.

    Raises:
        ValueError: If a parameter is not on the CPU, or the module or a part of it is compiled.

    """
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"DevicePacer: `module` must be on the CPU; got parameter {name!r} on {str(parameter.device)!r}. "
                "Sleeping on the host does not slow an accelerator down: use accelerator='cpu', or leave the emulated "
                "device out."
            )
    for name, layer in module.named_modules():
        if getattr(layer, "_compiled_call_impl", None) is not None or hasattr(layer, "_orig_mod"):
            raise ValueError(
                f"DevicePacer: `module` must not be compiled, since it then runs as one piece; got a compiled "
                f"{name or 'module'!r}. Leave torch.compile out where devices are emulated."
            )
