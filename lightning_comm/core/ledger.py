"""The ledger of what was sent: one record a message, and sums of them by purpose.

Standard library only. Strategies, callbacks and instruments write these records. Projections and tests use the same
formulas (:func:`wire_bytes`), so a prediction can be subtracted from a measurement.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

#: The purposes of messages, each with what is sent under it.
PURPOSES: Mapping[str, str] = {
    # what training sends
    "gradients": "Gradients, as they are or compressed; also those that DDP sends by itself, where nothing else does.",
    "parameters": "Averages of parameters, what they have moved by, or new versions of them.",
    "buffers": "Buffers, such as BatchNorm's: averages, or those of rank 0.",
    "weight_averages": "Averages of moving averages of the weights.",
    "optimizer_state": "Averages of momenta and the like.",
    "control": "What ranks tell each other where they meet: steps, learning rates, requests, acknowledgements.",
    "stops": "Whether a rank wants to stop, where all have just met for a validation or a checkpoint.",
    "masks": "Which weights are pruned, and what that is decided by.",
    "mask flags": "Whether the model's own masks have changed.",
    "stagger": "Whose turn it is to begin a batch.",
    "partition": "The times that ranks compare to share the batch, and the order of a sampler.",
    "wait": "No message: seconds in which compute stood still for what others send.",
    # beside training
    "set_up": "What ranks compare before training, and where they wait for each other.",
    "start": "Weights, buffers and momenta of rank 0, at the start.",
    "evaluation": "Averages of weights for a validation.",
    "batch_norm_statistics": "BatchNorm's statistics, estimated anew for a validation.",
    "checkpoint": "Averages, and states of other ranks, for a checkpoint.",
    "checkpoint_files": "Which files belong to a checkpoint, whether all ranks have theirs, and changed settings.",
    "instruments": "Clocks, and figures at the end of a run.",
    "probe": "The messages whose time a probe measures, and those by which it does.",
    # what others send, which `CommProfiler` sees
    "lightning": "The Trainer's own: barriers, reduced logs, flags.",
    "metrics": "Those of torchmetrics.",
    "batch_norm": "Those of SyncBatchNorm.",
    "user": "The user's own.",
}
_OF_EACH_PROCESS = ("set_up", "checkpoint_files")  # which a run that is resumed has once more than one that is not


@dataclass(frozen=True)
class CommRecord:
    """One message that this rank took part in.

    Args:
        kind: The collective or transfer, one of those of :func:`wire_bytes`.
        purpose: What it was for, one of ``PURPOSES``.
        payload_bytes: The bytes that this rank passed to the call.
        wire_bytes: What this rank sends for it, on average over the ranks (:func:`wire_bytes`).
        step: Optimizer steps done when it started, not a step of the loggers: those count batches.
        start_s: When it started, in seconds on this process's monotonic clock.
        duration_s: How long it took, in seconds. 0.0 where it is timed elsewhere (gradients, which DDP sends).
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

    def add(self, other: "_Total") -> None:
        self.messages += other.messages
        self.payload_bytes += other.payload_bytes
        self.wire_bytes += other.wire_bytes
        self.duration_s += other.duration_s


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
        one = _Total(1, record.payload_bytes, record.wire_bytes, record.duration_s)
        self._totals.setdefault(record.purpose, _Total()).add(one)

    @property
    def purposes(self) -> list[str]:
        """Every purpose seen so far, in the order of its first message."""
        return list(self._totals)

    def messages(self, *purposes: str) -> int:
        """Return how many messages there were, for the given purposes or for all."""
        return sum(total.messages for total in self._select(purposes))

    def payload_bytes(self, *purposes: str) -> int:
        """Return the payload bytes, for the given purposes or for all."""
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
        """Restore the sums that ``state_dict`` returned, as if the run had never stopped.

        What this process has sent until now to set up and to load is added; anything else stands in ``records`` alone.
        """
        own = {purpose: total for purpose, total in self._totals.items() if purpose in _OF_EACH_PROCESS}
        self._totals = {
            purpose: _Total(
                int(total["messages"]), int(total["payload_bytes"]), int(total["wire_bytes"]), total["duration_s"]
            )
            for purpose, total in state.items()
        }
        for purpose, total in own.items():
            self._totals.setdefault(purpose, _Total()).add(total)

    def _select(self, purposes: tuple[str, ...]) -> Iterator[_Total]:
        for purpose in purposes or tuple(self._totals):
            yield self._totals.get(purpose, _Total())


# Bytes that one rank sends for a payload of 1, on average over n ranks.
_SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,  # a ring
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,  # each rank's part is sent to all others
    "all_to_all": lambda n: (n - 1) / n,  # all but the part that stays
    "broadcast": lambda n: (n - 1) / n,  # n-1 copies in all
    "reduce": lambda n: (n - 1) / n,
    "gather": lambda n: (n - 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "receive": lambda n: 0.0,  # counted where it is sent
    "barrier": lambda n: 0.0,  # a few bytes of no tensor
}


def wire_bytes(kind: str, payload_bytes: int, world_size: int) -> int:
    """Return the bytes that one rank sends for a collective, on average over the ranks.

    A ring all-reduce sends ``2(n-1)/n`` times its payload from every rank, a reduce-scatter half of that; a broadcast
    sends its payload ``n-1`` times in all; in an all-gather each rank's part is sent to ``n-1`` others.

    Args:
        kind: ``"all_reduce"``, ``"reduce_scatter"``, ``"all_gather"``, ``"all_to_all"``, ``"broadcast"``, ``"reduce"``,
            ``"gather"``, ``"scatter"``, ``"send"``, ``"receive"`` or ``"barrier"``.
        payload_bytes: The bytes that one rank passes to the call: its whole input. For ``"scatter"`` its own part.
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
