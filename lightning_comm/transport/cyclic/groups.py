"""The process groups of a ring, each with the recorder of its messages."""

from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.backends import backend_of
from lightning_comm.transport.group_ends import hang_up
from lightning_comm.transport.recording import Recorder, another_group
from lightning_comm.transport.stop_protocol import Agreement

_WHERE = "the set-up of a process group"


class RingGroups:
    """Groups of their own for the messages of a ring, so that these are not ordered with Lightning's.

    Where messages are matched by tags, gradients and parameters share a group, since two connections would compete for
    the link. Otherwise each kind has its own group, so that the two are not ordered with each other either.

    Args:
        ledger: Where messages are recorded.
        device: Of the rank.
        agreement: Publishes and raises failures.
        timeout: How long messages wait for other ranks.
        staggered: Whether ranks pass a token round, whose holder may begin a batch.

    Attributes:
        tagged: Whether the backend matches messages by their tags, as gloo does and NCCL does not.
        gradients: Sends and records sums of gradients.
        parameters: Sends and records new versions.
        tokens: Sends and records the tokens, in a group on the hosts' processors; ``None`` without them.

    """

    def __init__(
        self, ledger: CommLedger, device: torch.device, agreement: Agreement, timeout: timedelta, *, staggered: bool
    ) -> None:
        self.tagged = backend_of(device) == "gloo"
        with agreement.first_error_shown(_WHERE):
            self._groups = [another_group(timeout) for _ in range(1 if self.tagged else 2)]
        self.gradients = Recorder(ledger, self._groups[0], hold=True)
        self.parameters = Recorder(ledger, self._groups[-1], hold=True)
        with agreement.first_error_shown(_WHERE):
            if staggered:
                self._groups.append(another_group(timeout, "gloo"))
        # held back, since backward passes the token on in a thread of its own
        self.tokens = Recorder(ledger, self._groups[-1], hold=True) if staggered else None

    def write_held(self) -> None:
        """Write the records that were kept back; called by the thread that trains, to which the ledger belongs."""
        self.gradients.write_held()
        self.parameters.write_held()

    def leave(self) -> None:
        """Leave the groups of a run that has ended as it should."""
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups, self.tokens = [], None

    def hang_up(self) -> None:
        """Let every wait for another rank end, where the run has not ended as it should."""
        if dist.is_initialized():
            for group in self._groups:
                hang_up(group)
