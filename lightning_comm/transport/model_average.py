"""What one rank holds of the model, and what of it is averaged.

Longer than other files, since every way to average asks the same question: which tensors belong to it.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.nn import Module

from lightning_comm.ondevice.content import content, differ
from lightning_comm.ondevice.flat import DriftSum, Flat
from lightning_comm.ondevice.limits import MODERATE, MODERATE_DIFFERENCES, are_moderate
from lightning_comm.ondevice.optimizer.state import is_averageable
from lightning_comm.ondevice.own_values import OwnValues, copy_into
from lightning_comm.ondevice.shared_memory import SharedMemory
from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.averaging import Averaging, FullAverage, broadcast_
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import Codec
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.recording import Recorder

Shadows = Callable[[], Mapping[str, Module]]
_Groups = Mapping[str, Mapping[str, Tensor]]  # by purpose, then by name


class Replica:
    """The tensors of one rank's copy of the model, in an order that is the same on all ranks.

    Args:
        module: The model.
        recorder: Sends and records.
        averaging: How averages are carried out.
        buffers: ``"average"``: floating-point buffers are averaged with the parameters and others are taken from rank
            0; ``"keep"``: every rank keeps its own.
        shadows: Returns further copies of the model that follow it linearly, such as an exponential moving average of
            its weights. They are averaged with it, so they stay averages of the averaged weights.
        background: Sends parameters while training goes on, on a process group of its own.

    Note:
        *On CUDA* the host looks at no value here, but where :meth:`look` has found a large one, or a frozen parameter
        has changed. What is averaged is read once by :meth:`look`.

        *Which parameters.* Those that are trained now or were at the last synchronisation, found by their
        ``requires_grad`` and never by whether they have a gradient, so that a parameter that one rank did not use
        changes nothing for the others. Frozen parameters are equal on all ranks from the start and are not sent,
        unless they have changed since the last synchronisation, as those of a teacher that follows its student do;
        that is seen from their bits, and ranks agree on what has changed on any of them. Those without a mean are then
        taken from rank 0.

        *With a compression* trained parameters are brought together by a :class:`CompressedAverage` and ranks are not
        equal afterwards. One that has no reference yet (it was unfrozen since) and one that is no longer trained are
        averaged in full, once, and the first has a reference from then on. Complex parameters always travel in full,
        and so do those that share entries with others in a way that none of them has all.

        *Shared memory.* A parameter that is a view of another one is averaged with that one, once.

        *Weights.* Averages take what this rank counts for in the mean (``weight``; those of all ranks sum to 1), for
        everything that one call averages; ``None`` on all ranks: equally.

    """

    def __init__(
        self,
        module: Module,
        recorder: Recorder,
        averaging: Averaging,
        buffers: Literal["average", "keep"],
        shadows: Shadows = dict,
        background: Recorder | None = None,
    ) -> None:
        self._module = module
        self._recorder = recorder
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        self._bucket_bytes = averaging.bucket_bytes_under(backend_of(device))
        self._averager = FullAverage(recorder, self._bucket_bytes)
        self._method = averaging.method
        self._differences = (
            CompressedAverage(background or recorder, self._method, self._bucket_bytes) if self._method else None
        )
        self._average_buffers = buffers == "average"
        self._shadows = shadows
        self._trained: set[str] = set()
        self._frozen: dict[str, Tensor] = {}  # what frozen parameters contained when ranks had the same
        self._moved: set[str] = set()  # those that have changed since, on any rank
        self._kept: OwnValues | None = None
        self._shared_memory = SharedMemory()

    def begin_round(self, *, equal: bool = False) -> None:
        """Note which parameters are trained from here on.

        Args:
            equal: Whether all ranks hold the same weights, from which a common reference can be made.

        """
        parameters = dict(self._module.named_parameters())
        self._trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._frozen = {
            name: self._frozen[name] if name in self._frozen else content(parameter)
            for name, parameter in parameters.items()
            if name not in self._trained
        }
        if equal and self._differences is not None:
            self._differences.restart(self._sent_as_differences(self.parameters()))

    @torch.no_grad()
    def agree_on_moved(self, *, any_moved: bool = True) -> None:
        """Learn which frozen parameters have changed on any rank since they were averaged; where all ranks meet.

        Args:
            any_moved: Whether one may have on any rank: what :meth:`look` says of all of them, where ranks have just
                told each other.

        Note:
            *Communication.* A byte for each frozen parameter in an all-reduce; none without any, and none where ranks
            have told each other that none has changed.

            *Cost.* Frozen parameters are read once more.

        """
        if not self._frozen or not any_moved:
            self._moved = set()
            return
        frozen = self._moved_here()
        if not frozen:
            return
        moved = torch.stack(list(frozen.values())).to(torch.uint8)
        self._recorder.all_reduce(moved, "control", ReduceOp.MAX).wait()
        self._moved = {name for name, flag in zip(frozen, moved.tolist(), strict=True) if flag}

    def _moved_here(self) -> dict[str, Tensor]:
        """Return for each frozen parameter whether it has changed on this rank, as a boolean on one device."""
        named = self._module.named_parameters()
        flags = {name: differ(self._frozen[name], content(p)) for name, p in named if name in self._frozen}
        return {name: flag.to(next(iter(flags.values())).device) for name, flag in flags.items()}

    @torch.no_grad()
    def look(self, momenta: Iterable[Tensor] = ()) -> dict[str, bool | Tensor]:
        """Return what ranks tell each other of their tensors where they meet, as flags that the host need not read.

        Args:
            momenta: State of the optimizers, where that is averaged too.

        Returns:
            ``"moved"``: whether a frozen parameter has changed since ranks had the same. By purpose of an average:
            whether an entry may be so large, or not finite, that the host has to look at each bucket of it. On a CPU
            that always is so, since looking costs less there than this pass; and of parameters also while an average
            of them is on its way in the background.

        """
        found: dict[str, bool | Tensor] = {}
        if flags := list(self._moved_here().values()):
            found["moved"] = torch.stack(flags).any()
        groups = {purpose: list(group.values()) for purpose, group in self.averaged().items()}
        groups["optimizer_state"] = list(momenta)
        for purpose, tensors in groups.items():
            rows, limit = [Flat.of(tensor).entries for tensor in tensors], MODERATE
            if purpose == "parameters" and self._differences is not None:
                rows, limit = rows + self._differences.references, MODERATE_DIFFERENCES
                if self.in_flight:  # what has arrived may be added to the parameters before they are averaged
                    rows, limit = rows + self._differences.corrections, limit / 2
            on_its_way = purpose == "parameters" and self.is_sending
            found[purpose] = bool(rows) if on_its_way else _is_not_moderate(rows, limit)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters that are averaged, by name."""
        # one with a reference may differ between ranks, also when it has been frozen between two rounds
        apart = self._trained if self._differences is None else self._trained | self._differences.names
        changed = {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad or name in apart or (name in self._moved and is_averageable(parameter))
        }
        return {name: p for name, p in changed.items() if name not in self._shared_memory.covered(changed)}

    def _compressed(self) -> dict[str, Tensor]:
        """Return the parameters of which only differences are sent, by name."""
        names = set() if self._differences is None else self._differences.names
        return {name: p for name, p in self._sent_as_differences(self.parameters()).items() if name in names}

    def _sent_as_differences(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the parameters that have a reference, or are to have one."""
        in_full = self._shared_memory.shared(parameters)  # a correction would be added more than once
        if not isinstance(self._method, Full):
            in_full |= {name for name, parameter in parameters.items() if parameter.is_complex()}
        return {name: p for name, p in parameters.items() if p.requires_grad and name not in in_full}

    def _note_frozen(self) -> None:
        """Note what frozen parameters contain that have just been brought together."""
        parameters = dict(self._module.named_parameters())
        self._frozen |= {name: content(parameters[name]) for name in self._moved}
        self._moved = set()

    def _without_mean(self) -> dict[str, Tensor]:
        """Return frozen parameters that have changed and can only be taken from one rank, by name."""
        named = self._module.named_parameters()
        return {name: p for name, p in named if name in self._moved and not is_averageable(p)}

    def float_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that can be averaged, by name."""
        return {name: buffer for name, buffer in self._module.named_buffers() if is_averageable(buffer)}

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors that a synchronisation averages: by purpose, then by name."""
        groups: dict[str, dict[str, Tensor]] = {"parameters": self.parameters()}
        if self._average_buffers:
            groups["buffers"] = self.float_buffers()
        shadows = {
            f"{label}.{name}": tensor
            for label, module in self._shadows().items()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if is_averageable(tensor)
        }
        if shadows:
            groups["weight_averages"] = shadows
        return groups

    def layout(self, momenta: Iterable[Tensor] = ()) -> int:
        """Return a number that is equal on ranks that would average the same tensors, and only there.

        Args:
            momenta: State of the optimizers, where that is averaged too.

        """
        groups = self.averaged().items()
        named = [(f"{purpose}:{name}", tensor) for purpose, group in groups for name, tensor in group.items()]
        named += [(f"compressed:{name}", tensor) for name, tensor in self._compressed().items()]
        return fingerprint([*named, *(("momentum", tensor) for tensor in momenta)])

    @torch.no_grad()
    def average(
        self, purpose: str | None = None, weight: float | None = None, moderate: Set[str] = frozenset()
    ) -> DriftSum:
        """Replace the tensors by their means over the ranks, in place.

        Args:
            purpose: What the records say; left out, ``parameters``, ``buffers`` and ``weight_averages``, each its own.
            weight: What this rank counts for in the mean.
            moderate: For which of these three no rank has found by :meth:`look` that an entry may be large.

        Returns:
            How far this rank's parameters were from the mean.

        """
        groups = self.averaged()
        drift = self._average_parameters(groups.pop("parameters"), purpose or "parameters", weight, moderate)
        self._average_others(groups, purpose, weight, moderate)
        self._note_frozen()
        return drift

    @torch.no_grad()
    def average_differences(self, weight: float | None = None, moderate: Set[str] = frozenset()) -> DriftSum:
        """Bring parameters together as far as the compression sends them, and average everything else.

        Returns:
            How far this rank's parameters were from the mean, as far as that is known.

        """
        assert self._differences is not None
        groups = self.averaged()
        parameters, compressed = groups.pop("parameters"), self._compressed()
        drift = self._differences.average_(compressed, weight, moderate="parameters" in moderate)
        drift.extend(self._average_in_full(parameters, compressed, weight, moderate))
        self._average_others(groups, None, weight, moderate)
        self._note_frozen()
        return drift

    def _average_parameters(
        self, parameters: Mapping[str, Tensor], purpose: str, weight: float | None, moderate: Set[str]
    ) -> DriftSum:
        tensors = list(parameters.values())
        return self._averager.average_(tensors, purpose, weight, moderate="parameters" in moderate)

    def _average_in_full(
        self,
        parameters: Mapping[str, Tensor],
        compressed: Mapping[str, Tensor],
        weight: float | None,
        moderate: Set[str],
    ) -> DriftSum:
        """Average what has no reference, or needs none any more, and make references of it where it is trained."""
        assert self._differences is not None
        in_full = {name: parameter for name, parameter in parameters.items() if name not in compressed}
        drift = self._average_parameters(in_full, "parameters", weight, moderate)
        self._differences.forget(set(in_full))
        self._differences.refer_to(self._sent_as_differences(in_full))
        return drift

    @property
    def in_flight(self) -> bool:
        """Whether an average of the parameters has departed and not landed."""
        return self._differences is not None and self._differences.in_flight

    @torch.no_grad()
    def depart(self, weight: float | None = None, moderate: Set[str] = frozenset()) -> None:
        """Start to average the parameters in the background, and average everything else now."""
        assert self._differences is not None
        groups = self.averaged()
        parameters, compressed = groups.pop("parameters"), self._compressed()
        self._average_in_full(parameters, compressed, weight, moderate)
        self._average_others(
            groups, None, weight, moderate
        )  # before the parameters, behind which it would wait on the network
        self._note_frozen()
        self._differences.depart(compressed, weight, moderate="parameters" in moderate)

    @torch.no_grad()
    def land(self) -> DriftSum:
        """Wait for the average in the background and move the parameters by it.

        Returns:
            How far this rank's parameters were from the mean when they departed, as far as that is known.

        """
        assert self._differences is not None
        return self._differences.land_(dict(self._module.named_parameters()))

    @property
    def is_sending(self) -> bool:
        """Whether something may be on its way in the background, or has arrived and nobody has waited for it."""
        return self._differences is not None and self._differences.is_sending

    def is_quiet(self, timeout_s: float) -> bool:
        """Wait for so long at most, and return whether nothing is on its way in the background any more."""
        return self._differences is None or self._differences.is_quiet(timeout_s)

    def wait_for_background(self) -> None:
        """Let nothing else be on its way: on CUDA, two groups that send at once may wait for each other."""
        if self._differences is not None:
            self._differences.arrive()

    def _average_others(
        self,
        groups: _Groups,
        purpose: str | None,
        weight: float | None,
        moderate: Set[str],
        *,
        broadcast: bool = True,
    ) -> None:
        for name, group in groups.items():
            self._averager.average_(list(group.values()), purpose or name, weight, moderate=name in moderate)
        if not broadcast:
            return
        if self._average_buffers:
            others = [buffer for buffer in self._module.buffers() if not is_averageable(buffer)]
            broadcast_(others, self._recorder, purpose or "buffers", self._bucket_bytes)
        broadcast_(self._without_mean().values(), self._recorder, purpose or "parameters", self._bucket_bytes)

    @property
    def average_is_for(self) -> str | None:
        """What the average is in place for, between :meth:`enter_average` and :meth:`leave_average`; else ``None``."""
        return None if self._kept is None else self._kept.purpose

    @torch.no_grad()
    def enter_average(
        self,
        purpose: str,
        weight: float | None = None,
        moderate: Set[str] = frozenset(),
        *,
        broadcast: bool = True,
    ) -> None:
        """Average in place and keep this rank's own values aside, until :meth:`leave_average`.

        Args:
            purpose: What the records say.
            weight: What this rank counts for in the mean.
            moderate: As in :meth:`average`.
            broadcast: Whether buffers that have no mean are taken from rank 0; not needed where only rank 0 looks.

        Note:
            *Memory.* A second copy of the averaged tensors in between.

            *Cost.* They are read here and once more at the end, to see what somebody sets in between.

        """
        self.wait_for_background()
        self._kept = OwnValues(purpose, weight, self._changed_by_average())
        groups = self.averaged()
        parameters = groups.pop("parameters")
        self._correct(parameters, weight)
        self._average_parameters(parameters, purpose, weight, moderate)
        self._average_others(groups, purpose, weight, moderate, broadcast=broadcast)
        self._kept.note()

    @torch.no_grad()
    def take_into_average(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors that have been renewed for an evaluation go with it, if an average is in place."""
        if self._kept is not None:
            self._kept.note(tensors)

    def _correct(self, parameters: Mapping[str, Tensor], weight: float | None) -> None:
        """Move parameters, or copies of them, by what is in flight, if ranks count for different shares of a mean.

        What is in flight departed under other weights than those of now. An equal mean does not move where it lands.
        """
        if weight is None or self._differences is None or not self._differences.in_flight:
            return
        self._differences.correct_(parameters)
        codec, method = self._differences.codec, self._method
        if isinstance(codec, SparseMaskCodec) and isinstance(method, SparseMask) and not method.pruning.is_watched:
            for name in parameters.keys() & codec.masks.keys():
                parameters[name].masked_fill_(~codec.masks[name], 0)  # some have been pruned since it departed

    @torch.no_grad()
    def leave_average(self) -> None:
        """Put this rank's own values back, if an average is in place, but for what somebody has set since."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.put_back()

    def changed_storages(self) -> set[int]:
        """Return the addresses of the memory that :meth:`leave_average` may write to."""
        return set() if self._kept is None else self._kept.storages

    def local_state(self) -> dict[str, Tensor]:
        """Return what this rank alone holds: its own weights and buffers, also while averaged ones are in place.

        Then it is what :meth:`leave_average` would leave: new values where somebody has set some.
        """
        now = self._changed_by_average() | {f"buffer:{name}": buffer for name, buffer in self._module.named_buffers()}
        own = now if self._kept is None else self._kept.goes_on_with(now)
        return {name: tensor.detach() for name, tensor in own.items()}

    def local_buffers(self) -> dict[str, Tensor]:
        """Return the part of :meth:`local_state` that may differ right after a synchronisation too."""
        return {name: tensor for name, tensor in self.local_state().items() if name.startswith("buffer:")}

    @torch.no_grad()
    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up the weights and buffers of :meth:`local_state`.

        Raises:
            ValueError: If the state is that of another model.

        """
        now = self._changed_by_average() | {f"buffer:{name}": buffer for name, buffer in self._module.named_buffers()}
        now |= {f"parameters:{name}": parameter for name, parameter in self._module.named_parameters()}
        if unknown := sorted(set(state) - set(now)):
            raise ValueError(
                f"LocalUpdateStrategy: this rank's file of the checkpoint has weights that the model does not have: "
                f"{unknown[:5]}. Resume with the model that was saved, or load the checkpoint's weights alone."
            )
        for name, value in state.items():
            copy_into(now[name], value)

    @property
    def compresses(self) -> bool:
        """Whether a synchronisation can send less than the parameters in full."""
        return self._differences is not None

    @property
    def codec(self) -> Codec | None:
        """What sends differences; ``None`` where parameters are averaged as they are."""
        return None if self._differences is None else self._differences.codec

    def compression_state(self) -> dict[str, Any] | None:
        """Return what the compression goes on from; ``None`` without one."""
        return None if self._differences is None else self._differences.state_dict()

    def load_compression_state(self, state: Mapping[str, Any] | None) -> None:
        """Take up :meth:`compression_state`; where it was saved without one, parameters are first averaged in full."""
        if self._differences is not None and state is not None:
            self._differences.load_state_dict(state, dict(self._module.named_parameters()))

    @torch.no_grad()
    def broadcast_momenta(self, momenta: list[Tensor]) -> None:
        """Give every rank the optimizer state of rank 0."""
        broadcast_(momenta, self._recorder, "start", self._bucket_bytes)

    @torch.no_grad()
    def average_momenta(
        self,
        momenta: list[Tensor],
        weight: float | None = None,
        purpose: str = "optimizer_state",
        *,
        moderate: bool = False,
    ) -> None:
        """Average the state of the optimizers, as ``optimizer_tensors`` returns it, in place."""
        self._averager.average_(momenta, purpose, weight, moderate=moderate)

    @torch.no_grad()
    def average_copies(self, momenta: list[Tensor]) -> bool:
        """Average copies of optimizers' state for a checkpoint, weighted as the weights that are in place for it.

        Returns:
            Whether it was done: not where ranks hold states of different layouts, as before a first step.

        """
        assert self._kept is not None
        layout = uploaded(torch.tensor([fingerprint(("", tensor) for tensor in momenta)]), self._kept.device)
        rows, pending = self._recorder.all_gather(layout, "checkpoint")
        pending.wait()
        alike = bool((rows == layout).all())
        if alike:
            self.average_momenta(momenta, self._kept.weight, "checkpoint")
        return alike

    def _changed_by_average(self) -> dict[str, Tensor]:
        changed = {f"{purpose}:{name}": t for purpose, group in self.averaged().items() for name, t in group.items()}
        changed = {name.replace("buffers:", "buffer:", 1): tensor for name, tensor in changed.items()}
        if self._average_buffers:
            changed |= {f"buffer:{name}": buffer for name, buffer in self._module.named_buffers()}
        return changed | {f"parameters:{name}": parameter for name, parameter in self._without_mean().items()}


def _is_not_moderate(rows: list[Tensor], limit: float) -> bool | Tensor:
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
