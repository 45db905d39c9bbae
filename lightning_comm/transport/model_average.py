"""An average of a whole model over ranks: its parameters in full or compressed, and all else that goes with them.

Order of messages: the parameters, then the buffers and the weight averages, then what has no mean and comes from rank
0. State of optimizers is averaged behind them, on its own. An average that departs sends its parameters last. Longer
than other files, since every way to average has to decide the same: what is sent in full, and what is compressed.
"""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from lightning_comm.ondevice.flat import DriftSum
from lightning_comm.ondevice.model_tensors import ModelTensors, fingerprint
from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.averaging import Average, Averaging, FullAverage, broadcast_
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import Codec
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.departed_average import DepartedAverage
from lightning_comm.transport.recording import Recorder


class ModelAverage:
    """Averages the ranks' copies of a model.

    Args:
        tensors: Which tensors of the model are averaged.
        recorder: Sends and records, to the members. Where these have a process group for it, a background thread sends
            the parameters of averages that depart.
        averaging: How averages are carried out.

    Note:
        *On CUDA* the host reads no value here, so it does not wait for the device, unless :meth:`ModelTensors.look` has
        found a large value, or a frozen parameter has changed.

        *Frozen parameters* that have changed since the last synchronisation are averaged once; those without a mean are
        then taken from rank 0.

        *With a compression* trained parameters are averaged by a :class:`CompressedAverage`, and ranks are not
        equal afterwards. One that has no reference yet (it was unfrozen since) and one that is no longer trained are
        averaged in full, once, and the first has a reference from then on. Complex parameters are always sent in full,
        and so do those that share entries with others in a way that none of them has all.

        *Weights.* An average takes this rank's ``weight`` in the mean, for everything that the call averages; the
        weights of all ranks sum to 1. ``None`` on all ranks: equal weights.

        *Large entries.* ``moderate`` names the purposes of averages for which no rank has found by
        :meth:`ModelTensors.look` that an entry may be large.

    """

    def __init__(
        self,
        tensors: ModelTensors,
        recorder: Recorder,
        averaging: Averaging,
    ) -> None:
        device = next((tensor.device for tensor in tensors.all_parameters().values()), torch.device("cpu"))
        method = averaging.method
        self.tensors = tensors
        self._recorder = recorder
        self._method = method
        self._bucket_bytes = averaging.bucket_bytes_under(backend_of(device))
        self._full = FullAverage(recorder, self._bucket_bytes)
        self._background: Recorder | None = None
        self._compressed: CompressedAverage | None = None
        if method is not None:
            if averaging.overlap_steps and recorder.members.background is not None:
                self._background = Recorder(recorder.ledger, recorder.members, background=True)
            sender = self._background or recorder
            self._compressed = CompressedAverage(sender, method, self._bucket_bytes, tensors.references)

    @property
    def compresses(self) -> bool:
        """Whether a synchronisation can send less than the parameters in full."""
        return self._compressed is not None

    @property
    def codec(self) -> Codec | None:
        """What sends differences; ``None`` where parameters are averaged as they are."""
        return None if self._compressed is None else self._compressed.codec

    def begin_round(self, *, equal: bool = False) -> None:
        """Note which parameters are trained from here on.

        Args:
            equal: Whether all ranks hold the same weights, from which a common reference can be made.

        """
        self.tensors.begin_round()
        if equal and self._compressed is not None:
            self._compressed.references.restart(self.tensors.with_reference(self.tensors.parameters()))

    @torch.no_grad()
    def agree_on_moved(self, *, any_moved: bool = True) -> None:
        """Learn which frozen parameters have changed on any rank since they were averaged; where all ranks meet.

        Args:
            any_moved: Whether one may have on any rank: the result of :meth:`ModelTensors.look` over all ranks, where
                they have just exchanged it.

        Note:
            *Communication.* A byte for each frozen parameter in an all-reduce; none without any, and none where ranks
            have exchanged that none has changed.

            *Cost.* Frozen parameters are read once more.

        """
        frozen = self.tensors.frozen
        flags = frozen.changed_here() if any_moved else {}
        if not flags:
            frozen.changed = set()
            return
        changed = torch.stack(list(flags.values())).to(torch.uint8)
        self._recorder.all_reduce(changed, "control", ReduceOp.MAX).wait()
        frozen.changed = {name for name, flag in zip(flags, changed.tolist(), strict=True) if flag}

    # ---- averages ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def average(
        self, weight: float | None = None, moderate: Set[str] = frozenset(), *, in_full: bool = False
    ) -> DriftSum:
        """Average everything, in place: parameters as far as a compression sends them, and all else in full.

        Args:
            weight: This rank's weight in the mean.
            moderate: As for all averages; see *Large entries*.
            in_full: Whether ranks must be equal afterwards, so that nothing is compressed.

        Returns:
            How far this rank's parameters were from the mean, as far as that is known.

        """
        groups, drift = self.tensors.averaged(), DriftSum()
        parameters = groups.pop("parameters")
        compressed = {} if in_full else self.tensors.sent_as_differences()
        rest = _without(parameters, compressed)
        methods: list[tuple[Average, Mapping[str, Tensor]]] = [(self._full, rest)]
        if self._compressed is not None and not in_full:
            methods.insert(0, (self._compressed, compressed))
        for average, tensors in methods:
            drift.extend(average.average_(tensors, weight, moderate="parameters" in moderate))
        if not in_full:
            self._refer_to(rest)
        self._average_others(groups, None, weight, moderate)
        self.tensors.frozen.note()
        return drift

    @torch.no_grad()
    def depart(self, weight: float | None = None, moderate: Set[str] = frozenset()) -> DepartedAverage:
        """Average everything but the parameters now, and copy these for an average in the background."""
        assert self._compressed is not None
        groups, compressed = self.tensors.averaged(), self.tensors.sent_as_differences()
        rest = _without(groups.pop("parameters"), compressed)
        self._full.average_(rest, weight, moderate="parameters" in moderate)
        self._refer_to(rest)
        # before the parameters depart: behind them these would wait for the link
        self._average_others(groups, None, weight, moderate)
        self.tensors.frozen.note()
        if self._background is not None:
            self._background.step = self._recorder.step  # what its thread sends belongs to the round that ends here
        return self._compressed.depart(compressed, weight, moderate="parameters" in moderate)

    def average_for(
        self,
        purpose: str,
        parameters: Mapping[str, Tensor],
        weight: float | None,
        moderate: Set[str],
        *,
        broadcast: bool = True,
    ) -> None:
        """Average everything for another purpose than to go on training from it.

        Args:
            purpose: The purpose of the messages in the ledger.
            parameters: The parameters that are averaged.
            weight: This rank's weight in the mean.
            moderate: As for all averages.
            broadcast: Whether what has no mean is taken from rank 0; not needed where only rank 0 looks.

        """
        groups = self.tensors.averaged()
        del groups["parameters"]
        self._full.average_(parameters, weight, moderate="parameters" in moderate, purpose=purpose)
        self._average_others(groups, purpose, weight, moderate, broadcast=broadcast)

    def _refer_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Make references of parameters that are equal on all ranks now, and still trained; the others need none."""
        if self._compressed is not None:
            self._compressed.references.drop(set(parameters))
            self._compressed.references.add(self.tensors.with_reference(parameters))

    def _average_others(
        self,
        groups: Mapping[str, Mapping[str, Tensor]],
        purpose: str | None,
        weight: float | None,
        moderate: Set[str],
        *,
        broadcast: bool = True,
    ) -> None:
        for name, group in groups.items():
            self._full.average_(group, weight, moderate=name in moderate, purpose=purpose or name)
        if broadcast:
            self._take_from_rank_0(self.tensors.buffers_without_mean(), purpose or "buffers")
            self._take_from_rank_0(list(self.tensors.frozen.without_mean().values()), purpose or "parameters")

    # ---- state of optimizers -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def average_optimizer_state(
        self,
        state: list[Tensor],
        weight: float | None = None,
        purpose: str = "optimizer_state",
        *,
        moderate: bool = False,
    ) -> None:
        """Average the state of the optimizers, as ``optimizer_tensors`` returns it, in place."""
        named = {str(k): tensor for k, tensor in enumerate(state)}
        self._full.average_(named, weight, moderate=moderate, purpose=purpose)

    def average_copies(self, state: list[Tensor], weight: float | None, device: torch.device) -> bool:
        """Average copies of optimizers' state for a checkpoint.

        Args:
            state: The copies.
            weight: This rank's weight.
            device: The device from which the backend sends.

        Returns:
            Whether it was done: not where ranks hold states of different layouts, as before a first step.

        """
        layout = uploaded(torch.tensor([fingerprint(("", tensor) for tensor in state)]), device)
        rows, pending = self._recorder.all_gather(layout, "checkpoint")
        pending.wait()
        alike = bool((rows == layout).all())
        if alike:
            self.average_optimizer_state(state, weight, "checkpoint")
        return alike

    @torch.no_grad()
    def take_optimizer_state(self, state: list[Tensor]) -> None:
        """Give every rank the optimizer state of rank 0."""
        self._take_from_rank_0(state, "start")

    def _take_from_rank_0(self, tensors: list[Tensor], purpose: str) -> None:
        broadcast_(tensors, self._recorder, purpose, self._bucket_bytes)

    # ---- what a compression keeps ------------------------------------------------------------------------------------

    def zero_pruned_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set pruned entries to zero, which an average that departed before the pruning has moved."""
        codec, method = self.codec, self._method
        if isinstance(codec, SparseMaskCodec) and isinstance(method, SparseMask) and not method.pruning.is_watched:
            for name in parameters.keys() & codec.masks.keys():
                parameters[name].masked_fill_(~codec.masks[name], 0)

    def compression_state(self, in_flight: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the compression's state, with what is in flight; ``None`` without a compression."""
        return None if self._compressed is None else {"in_flight": in_flight, **self._compressed.state_dict()}

    def load_compression_state(self, state: Mapping[str, Any] | None, *, same: bool) -> DepartedAverage | None:
        """Restore :meth:`compression_state` and return what was in flight.

        Where it was saved without a compression, parameters are first averaged in full.

        Args:
            state: That of this rank.
            same: Whether it was saved under the same compression, as all ranks agree.

        """
        if self._compressed is None or state is None:
            return None
        self._compressed.load_state_dict(state, self.tensors.all_parameters(), same=same)
        return self._compressed.departed_before(state)


def _without(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in parameters.items() if name not in others}
