"""The tensors of one rank's copy of a model that are averaged over ranks, by purpose and in the same order on all."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from lightning_comm.ondevice.flat import Flat
from lightning_comm.ondevice.frozen_parameters import FrozenParameters
from lightning_comm.ondevice.limits import MODERATE, MODERATE_DIFFERENCES, are_moderate
from lightning_comm.ondevice.optimizer.state import is_averageable
from lightning_comm.ondevice.own_values import copy_into
from lightning_comm.ondevice.references import References
from lightning_comm.ondevice.shared_memory import SharedMemory

WeightAverages = Callable[[], Mapping[str, Module]]
DifferenceScope = Literal["none", "real", "all"]  # of which parameters differences to a common reference can be sent


class ModelTensors:
    """Which tensors of a model belong to an average of it; sends nothing.

    Args:
        module: The model.
        average_buffers: Whether floating-point buffers are averaged with the parameters.
        weight_averages: Returns further copies of the model that follow it linearly, such as an exponential moving
            average of its weights. They are averaged with it, so they stay averages of the averaged weights.
        differences: Of which parameters differences can be sent: ``"none"``, where all are averaged as they are,
            ``"real"`` or ``"all"``.

    Attributes:
        frozen: What frozen parameters contain.
        references: What differences are taken from.

    Note:
        *Which parameters.* Those that are trained now or were at the last synchronisation, found by their
        ``requires_grad`` and never by whether they have a gradient, so that a parameter that one rank did not use
        changes nothing for the others. Frozen parameters are not among them, unless they have changed on any rank since
        ranks had the same of them. Those with a reference may differ between ranks also when they have been frozen
        since.

        *Shared memory.* A parameter that is a view of another one is averaged with that one, once.

        *On CUDA* the host looks at no value here.

    """

    def __init__(
        self,
        module: Module,
        *,
        average_buffers: bool = True,
        weight_averages: WeightAverages = dict,
        differences: DifferenceScope = "none",
    ) -> None:
        self._module = module
        self._average_buffers = average_buffers
        self._weight_averages = weight_averages
        self._differences = differences
        self._trained: set[str] = set()
        self._shared_memory = SharedMemory()
        self.frozen = FrozenParameters(module)
        self.references = References()

    def begin_round(self) -> None:
        """Note which parameters are trained from here on."""
        self._trained = {name for name, parameter in self._module.named_parameters() if parameter.requires_grad}
        self.frozen.begin_round(self._trained)

    def all_parameters(self) -> dict[str, Tensor]:
        """Return all parameters, by name."""
        return dict(self._module.named_parameters())

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters that are averaged, by name."""
        # one with a reference may differ between ranks, also when it has been frozen between two rounds
        apart = self._trained | self.references.names
        changed = {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad or name in apart or (name in self.frozen.changed and is_averageable(parameter))
        }
        return {name: p for name, p in changed.items() if name not in self._shared_memory.covered(changed)}

    def sent_as_differences(self) -> dict[str, Tensor]:
        """Return the parameters of which only differences are sent, by name."""
        names = self.references.names
        return {name: p for name, p in self.with_reference(self.parameters()).items() if name in names}

    def with_reference(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the parameters that have a reference, or are to have one."""
        in_full = self._shared_memory.shared(parameters)  # a correction would be added more than once
        if self._differences != "all":
            in_full |= {name for name, parameter in parameters.items() if parameter.is_complex()}
        return {name: p for name, p in parameters.items() if p.requires_grad and name not in in_full}

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors that a synchronisation averages: by purpose, then by name."""
        groups: dict[str, dict[str, Tensor]] = {"parameters": self.parameters()}
        if self._average_buffers:
            groups["buffers"] = {name: b for name, b in self._module.named_buffers() if is_averageable(b)}
        copies = {
            f"{label}.{name}": tensor
            for label, module in self._weight_averages().items()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if is_averageable(tensor)
        }
        if copies:
            groups["weight_averages"] = copies
        return groups

    def buffers_without_mean(self) -> list[Tensor]:
        """Return the buffers that can only be taken from one rank, where buffers are averaged."""
        return [buffer for buffer in self._module.buffers() if self._average_buffers and not is_averageable(buffer)]

    def layout(self, optimizer_state: Iterable[Tensor] = ()) -> int:
        """Return a number that is equal on ranks that would average the same tensors, and only there.

        Args:
            optimizer_state: That of the optimizers, where it is averaged too.

        """
        groups = self.averaged().items()
        named = [(f"{purpose}:{name}", tensor) for purpose, group in groups for name, tensor in group.items()]
        named += [(f"compressed:{name}", tensor) for name, tensor in self.sent_as_differences().items()]
        return fingerprint([*named, *(("momentum", tensor) for tensor in optimizer_state)])

    @torch.no_grad()
    def look(
        self, optimizer_state: Iterable[Tensor] = (), corrections: Iterable[Tensor] = (), *, sending: bool = False
    ) -> dict[str, bool | Tensor]:
        """Return what ranks tell each other of their tensors where they meet, as flags that the host need not read.

        Args:
            optimizer_state: That of the optimizers, where it is averaged too.
            corrections: What may be added to the parameters before they are averaged.
            sending: Whether an average of the parameters is on its way.

        Returns:
            ``"moved"``: whether a frozen parameter has changed since ranks had the same. By purpose of an average:
            whether an entry may be so large, or not finite, that the host has to look at each bucket of it. On a CPU
            that always is so, since looking costs less there than this pass; and of parameters also while an average
            of them is on its way.

        """
        found: dict[str, bool | Tensor] = {}
        if flags := list(self.frozen.changed_here().values()):
            found["moved"] = torch.stack(flags).any()
        groups = {purpose: list(group.values()) for purpose, group in self.averaged().items()}
        groups["optimizer_state"] = list(optimizer_state)
        for purpose, tensors in groups.items():
            rows, limit = [Flat.of(tensor).entries for tensor in tensors], MODERATE
            if purpose == "parameters" and self._differences != "none":
                rows, limit = rows + self.references.rows, MODERATE_DIFFERENCES
                if moves := list(corrections):
                    rows, limit = rows + moves, limit / 2
            on_its_way = purpose == "parameters" and sending
            found[purpose] = bool(rows) if on_its_way else _may_be_large(rows, limit)
        return found

    def changed_by_average(self) -> dict[str, Tensor]:
        """Return all that an average writes to, by name, as :meth:`state` names it."""
        changed = {f"{purpose}:{name}": t for purpose, group in self.averaged().items() for name, t in group.items()}
        changed = {name.replace("buffers:", "buffer:", 1): tensor for name, tensor in changed.items()}
        if self._average_buffers:
            changed |= self._buffers()
        return changed | {f"parameters:{name}": parameter for name, parameter in self.frozen.without_mean().items()}

    def state(self) -> dict[str, Tensor]:
        """Return what this rank alone holds: its weights in the middle of a round, and its buffers."""
        return self.changed_by_average() | self._buffers()

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights and buffers of :meth:`state`.

        Raises:
            ValueError: If the state is that of another model.

        """
        now = self.state() | {f"parameters:{name}": parameter for name, parameter in self.all_parameters().items()}
        if unknown := sorted(set(state) - set(now)):
            raise ValueError(
                f"LocalUpdateStrategy: this rank's file of the checkpoint has weights that the model does not have: "
                f"{unknown[:5]}. Resume with the model that was saved, or load the checkpoint's weights alone."
            )
        for name, value in state.items():
            copy_into(now[name], value)

    def _buffers(self) -> dict[str, Tensor]:
        return {f"buffer:{name}": buffer for name, buffer in self._module.named_buffers()}


def _may_be_large(rows: list[Tensor], limit: float) -> bool | Tensor:
    devices = {row.device for row in rows}
    if {device.type for device in devices} != {"cuda"} or len(devices) > 1:
        return bool(devices)
    return ~are_moderate(rows, limit)


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> int:
    """Return a number for names, shapes, memory formats and types: 48 bits, which a float64 holds exactly.

    Example:
        >>> fingerprint([("a", torch.zeros(2, 3))]) == fingerprint([("a", torch.ones(2, 3))])
        True
        >>> fingerprint([("a", torch.zeros(2, 3))]) == fingerprint([("a", torch.zeros(3, 2))])
        False

    """
    text = repr([(name, tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) for name, tensor in named])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
