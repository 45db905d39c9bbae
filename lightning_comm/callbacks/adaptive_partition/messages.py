"""Messages between ranks while a partitioned run trains: the times of a window, and the order that samplers draw."""

from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_comm.callbacks.adaptive_partition.meter import RankTimes
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.recording import Recorder, another_group

_NO_ORDER = -1  # in place of a fingerprint, from a rank whose sampler has failed


class PartitionMessages:
    """Gathers values from all ranks, in a gloo group of its own; a single rank gets its own value.

    Args:
        timeout: How long a rank waits for the others; ``None`` for torch's own.
        ledger: Where messages are recorded, as ``"set_up"`` and ``"partition"``.
        needed: Whether there are other ranks, and something to send; the same on all of them.

    Note:
        *Communication.* A barrier and the making of a group, if there will be messages; 48 bytes a rank for a window, 8
        for an order.

    """

    def __init__(self, timeout: timedelta | None, ledger: CommLedger, *, needed: bool) -> None:
        self.needed = needed
        self._group: dist.ProcessGroup | None = None
        self._recorder: Recorder | None = None
        if self.needed:
            Recorder(ledger).barrier(
                "set_up"
            ).wait()  # learns of the failure of another rank, which the making of a group would not
            self._group = another_group(timeout, backend="gloo")
            self._recorder = Recorder(ledger, self._group)

    def gather_times(self, own: RankTimes, step: int) -> list[RankTimes]:
        """Return the times of all ranks, in order of rank.

        Args:
            own: Those of this rank.
            step: Optimizer steps done, for the ledger.

        """
        if self._recorder is None:
            return [own]
        self._recorder.step = step
        rows, pending = self._recorder.all_gather(torch.tensor(own, dtype=torch.float64), "partition")
        pending.wait()
        return [RankTimes(*each) for each in rows.tolist()]

    def gather_fingerprints(self, own: int | None) -> list[int | None]:
        """Return the fingerprints of the order that ranks have drawn; ``None`` of a rank whose sampler has failed."""
        if self._recorder is None:
            return [own]
        number = _NO_ORDER if own is None else own
        rows, pending = self._recorder.all_gather(torch.tensor([number], dtype=torch.float64), "partition")
        pending.wait()
        found = (int(each) for each in rows.view(-1).tolist())
        return [None if each == _NO_ORDER else each for each in found]

    def close(self) -> None:
        """Destroy the group; every rank does so when training has ended."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = self._recorder = None
