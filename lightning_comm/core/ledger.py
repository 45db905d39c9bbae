"""The ledger: one record a message, and the sums that people ask for.

Standard library only. Whatever sends writes these records, and the profiler reads them; a prediction of the same type
could be subtracted from them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class CommRecord:
    """One message that this rank took part in.

    Args:
        kind: The collective or transfer, one of those of :func:`wire_bytes`.
        purpose: What it was for: ``"parameters"``, ``"buffers"``, ``"gradients"``, ``"evaluation"``, …
        payload_bytes: What was handed over on this rank.
        wire_bytes: What this rank sends for it, on average over the ranks (:func:`wire_bytes`).
        step: Optimizer steps done when it started, not a step of the loggers: those count batches.
        start_s: When it started, in seconds on this process's monotonic clock.
        duration_s: How long it took, in seconds. 0.0 where others time it (gradients, which DDP sends).
        hidden_s: How much of that compute went on beside it. 0.0 where the sender waits until it has arrived.

    """

    kind: str
    purpose: str
    payload_bytes: int
    wire_bytes: int
    step: int
    start_s: float
    duration_s: float
    hidden_s: float = 0.0


@dataclass
class _Total:
    messages: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    duration_s: float = 0.0


@dataclass
class CommLedger:
    """The messages of a run: the last ``capacity`` of them one by one, and the sums of all.

    Args:
        capacity: How many records are kept; older ones only count in the sums.

    Example:
        >>> ledger = CommLedger()
        >>> ledger.add(CommRecord("all_reduce", "parameters", 1000, 1500, step=8, start_s=0.0, duration_s=0.01))
        >>> ledger.payload_bytes("parameters"), ledger.wire_bytes(), ledger.messages()
        (1000, 1500, 1)

    """

    capacity: int = 10_000
    records: deque[CommRecord] = field(init=False)
    _totals: dict[str, _Total] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"CommLedger: `capacity` must be >= 1; got {self.capacity!r}. It counts kept records.")
        self.records = deque(maxlen=self.capacity)

    def add(self, record: CommRecord) -> None:
        """Write down one message."""
        self.records.append(record)
        total = self._totals.setdefault(record.purpose, _Total())
        total.messages += 1
        total.payload_bytes += record.payload_bytes
        total.wire_bytes += record.wire_bytes
        total.duration_s += record.duration_s

    @property
    def purposes(self) -> list[str]:
        """Every purpose seen so far, in the order of its first message."""
        return list(self._totals)

    def messages(self, *purposes: str) -> int:
        """Return how many messages there were, for the given purposes or for all."""
        return sum(total.messages for total in self._select(purposes))

    def payload_bytes(self, *purposes: str) -> int:
        """Return the bytes handed over, for the given purposes or for all."""
        return sum(total.payload_bytes for total in self._select(purposes))

    def wire_bytes(self, *purposes: str) -> int:
        """Return the bytes this rank sends, for the given purposes or for all."""
        return sum(total.wire_bytes for total in self._select(purposes))

    def duration_s(self, *purposes: str) -> float:
        """Return the seconds spent in messages, for the given purposes or for all."""
        return sum(total.duration_s for total in self._select(purposes))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the sums, so that a resumed run goes on counting. The single records are not saved."""
        return {purpose: asdict(total) for purpose, total in self._totals.items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore the sums that ``state_dict`` returned."""
        self._totals = {
            purpose: _Total(
                int(total["messages"]), int(total["payload_bytes"]), int(total["wire_bytes"]), total["duration_s"]
            )
            for purpose, total in state.items()
        }

    def _select(self, purposes: tuple[str, ...]) -> Iterator[_Total]:
        for purpose in purposes or tuple(self._totals):
            yield self._totals.get(purpose, _Total())


# Bytes that one rank sends for a payload of 1, on average over n ranks.
_SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,  # a ring
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,  # each rank's part travels to all others
    "all_to_all": lambda n: (n - 1) / n,  # all but the part that stays
    "broadcast": lambda n: (n - 1) / n,  # n-1 copies in all
    "reduce": lambda n: (n - 1) / n,
    "gather": lambda n: (n - 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "receive": lambda n: 0.0,  # counted where it is sent
    "barrier": lambda n: 0.0,  # a few bytes that nobody hands over
}


def wire_bytes(kind: str, payload_bytes: int, world_size: int) -> int:
    """Return the bytes that one rank sends for a collective, on average over the ranks.

    A ring all-reduce sends ``2(n-1)/n`` times its payload from every rank, a reduce-scatter half of that; a broadcast
    sends its payload ``n-1`` times in all; in an all-gather each rank's part travels to ``n-1`` others.

    Args:
        kind: ``"all_reduce"``, ``"reduce_scatter"``, ``"all_gather"``, ``"all_to_all"``, ``"broadcast"``, ``"reduce"``,
            ``"gather"``, ``"scatter"``, ``"send"``, ``"receive"`` or ``"barrier"``.
        payload_bytes: What one rank hands over: its whole input. For ``"scatter"`` its own part.
        world_size: The number of ranks.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> wire_bytes("all_reduce", 1000, world_size=4), wire_bytes("reduce_scatter", 1000, world_size=4)
        (1500, 750)

    """
    if kind not in _SENT:
        raise ValueError(f"wire_bytes: `kind` must be one of {', '.join(map(repr, _SENT))}; got {kind!r}.")
    return round(payload_bytes * _SENT[kind](world_size))
