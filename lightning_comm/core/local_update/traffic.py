"""The traffic of a run of local updates, and of DDP in its place: counts of averages, and the bytes of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalUpdateTraffic:
    """Averages to come in a run, and the bytes that one rank sends for each.

    Args:
        gradient_bytes: Of a step that averages gradients.
        sync_bytes: Of a synchronisation.
        average_bytes: Of an average in full, as for an evaluation, a checkpoint, and the last synchronisation.
        gradient_steps: Steps to come that average gradients.
        steps: Other steps to come.
        synchronisations: Averages at the ends of rounds.
        evaluations: Averages for validations in mid-round.
        checkpoints: Averages for checkpoints in mid-round.

    Example:
        >>> traffic = LocalUpdateTraffic(100, 50, 110, steps=80, synchronisations=10, evaluations=4, checkpoints=2)
        >>> traffic.wire_bytes, traffic.ddp_bytes
        (1220, 8000)

    """

    gradient_bytes: int
    sync_bytes: int
    average_bytes: int
    gradient_steps: int = 0
    steps: int = 0
    synchronisations: int = 0
    evaluations: int = 0
    checkpoints: int = 0

    @property
    def wire_bytes(self) -> int:
        """Bytes that one rank sends; the last synchronisation is in full, whatever the compression."""
        in_full = self.evaluations + self.checkpoints + min(1, self.synchronisations)
        compressed = max(0, self.synchronisations - 1)
        return self.gradient_steps * self.gradient_bytes + compressed * self.sync_bytes + in_full * self.average_bytes

    @property
    def ddp_bytes(self) -> int:
        """Bytes that one rank would send under DDP."""
        return (self.gradient_steps + self.steps) * self.gradient_bytes
