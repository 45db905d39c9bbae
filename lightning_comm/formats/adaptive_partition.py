"""The journal of a partitioned run: shares of the global batch, when and why they changed, and measured times.

A run writes it, ``replay=`` reads it, and the reports are made from it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from lightning_comm.core.adaptive_partition.plan import BatchIndex, PartitionPlan
from lightning_comm.core.adaptive_partition.shares import UNBOUNDED
from lightning_comm.core.whole_files import write_text

FORMAT = 1
MODES = ("balance", "observe", "fixed")
RUN_FIELDS = {
    "samples": "samples of the data set",
    "global_batch_size": "samples of the global batch",
    "ranks": "ranks",
    "seed": "seed of the order",
    "shuffle": "shuffle",
    "tail": "tail",
    "sampler": "sampler",
    "steps_per_epoch": "steps of an epoch",
    "min_per_rank": "least samples by rank",
    "max_per_rank": "most samples by rank",
}
_WAY_OUT = "Give the journal of a whole run, or leave `replay` out."


@dataclass(frozen=True)
class Change:
    """Shares that hold from a place of the run on.

    Args:
        epoch: The epoch of the first batch under them, from 0.
        batch: The batch in it, from 0.
        sizes: Samples of a full global batch by rank.
        why: The reason in few words, such as "start", "balance: 1.12 times as fast", "replay".

    """

    epoch: int
    batch: int
    sizes: tuple[int, ...]
    why: str

    def __post_init__(self) -> None:
        _put(self, epoch=index(self.epoch), batch=index(self.batch), sizes=_whole(self.sizes), why=str(self.why))

    @property
    def place(self) -> BatchIndex:
        """The first batch under these shares."""
        return BatchIndex(self.epoch, self.batch)


@dataclass(frozen=True)
class Window:
    """The times measured over a window of batches with the same shares.

    A number that is not finite is stored as ``None``, which means unknown.

    Args:
        epoch: The epoch of the batch at which the ranks exchanged it, from 0.
        batch: That batch, from 0.
        seconds: When that was, in seconds since training started.
        sizes: Samples of a full global batch by rank.
        busy_s: Median seconds by rank from asking for a batch to its last local gradient.
        fetch_s: The part of ``busy_s`` in which the rank waited for its data.
        step_s: Median seconds of a whole step.
        gain: Share of the step's time that the best shares would save; ``None`` while that is unknown.
        best_sizes: Those shares.

    """

    epoch: int
    batch: int
    seconds: float | None
    sizes: tuple[int, ...]
    busy_s: tuple[float | None, ...]
    fetch_s: tuple[float | None, ...]
    step_s: float | None
    gain: float | None = None
    best_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _put(self, epoch=index(self.epoch), batch=index(self.batch), sizes=_whole(self.sizes))
        _put(self, seconds=_known(self.seconds), step_s=_known(self.step_s), gain=_known(self.gain))
        _put(self, busy_s=tuple(map(_known, self.busy_s)), fetch_s=tuple(map(_known, self.fetch_s)))
        _put(self, best_sizes=None if self.best_sizes is None else _whole(self.best_sizes))

    @property
    def wait_s(self) -> tuple[float | None, ...]:
        """Seconds that each rank waited for the one that was busy longest."""
        longest_s = max((seconds for seconds in self.busy_s if seconds is not None), default=0.0)
        return tuple(None if seconds is None else longest_s - seconds for seconds in self.busy_s)


@dataclass(frozen=True)
class PartitionJournal:
    """The journal of a run.

    Args:
        run: What must be equal for a replay: ``samples``, ``global_batch_size``, ``ranks``, ``seed``, ``shuffle``,
            ``tail``, ``sampler``, ``steps_per_epoch``, ``min_per_rank``, ``max_per_rank``.
        mode: ``"balance"``, ``"observe"`` or ``"fixed"``.
        changes: The shares at the start, which is epoch 0, batch 0, and each change, in the order of the run.
        windows: What was measured, in the order of the run. None in mode ``"fixed"``.

    Raises:
        ValueError: If the parts contradict each other.

    Note:
        *Communication.* None.

    Example:
        >>> run = {"samples": 640, "global_batch_size": 64, "ranks": 2, "seed": 0, "shuffle": True, "tail": "keep"}
        >>> run |= {"sampler": "none", "steps_per_epoch": 10, "min_per_rank": [1, 1], "max_per_rank": [None, None]}
        >>> journal = PartitionJournal(run, "balance", (Change(0, 0, (32, 32), "start"), Change(2, 4, (48, 16), "…")))
        >>> journal.plan().sizes_at(BatchIndex(2, 5))
        (48, 16)
        >>> journal.mismatch(run | {"ranks": 3})
        ['ranks: 2 in the journal, 3 in this run']

    """

    run: Mapping[str, Any]
    mode: str
    changes: tuple[Change, ...]
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        _put(self, run=dict(self.run), changes=tuple(self.changes), windows=tuple(self.windows))
        if (problem := self._problem()) is not None:
            raise ValueError(f"PartitionJournal: {problem}.")

    @property
    def ranks(self) -> int:
        """The number of ranks that shared the batch."""
        return int(self.run["ranks"])

    @property
    def global_batch_size(self) -> int:
        """Samples of a full global batch."""
        return int(self.run["global_batch_size"])

    def plan(self, hi: tuple[int, ...] | int = UNBOUNDED, lo: tuple[int, ...] | int = 0) -> PartitionPlan:
        """Return the plan that these changes make, for a loader to follow.

        Args:
            hi: The most that each rank takes, also of a last batch that is larger than the others.
            lo: The least that each rank takes of a smaller last batch, where that has as many for all.

        """
        plan = PartitionPlan(self.changes[0].sizes, hi, lo)
        for change in self.changes[1:]:
            plan.change_at(change.place, change.sizes)
        return plan

    def mismatch(self, run: Mapping[str, Any]) -> list[str]:
        """Return a text for each field in which this run differs from another; empty if it can be replayed."""
        return [
            f"{name}: {shown(self.run.get(field))} in the journal, {shown(run.get(field))} in this run"
            for field, name in RUN_FIELDS.items()
            if self.run.get(field) != run.get(field)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the journal in plain types, as in the file."""
        return {
            "format": FORMAT,
            "run": dict(self.run),
            "mode": self.mode,
            "changes": [_plain(change) for change in self.changes],
            "windows": [_plain(window) for window in self.windows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PartitionJournal":
        """Return the journal that :meth:`to_dict` turned into plain types.

        Raises:
            ValueError: If it is something else.

        """
        if not isinstance(data, Mapping) or not {"format", "run", "mode", "changes", "windows"} <= set(data):
            raise ValueError("PartitionJournal: it is no journal: it must hold format, run, mode, changes and windows.")
        if data["format"] != FORMAT:
            raise ValueError(f"PartitionJournal: it has format {data['format']!r}, and this version reads {FORMAT}.")
        try:
            changes = tuple(Change(**change) for change in data["changes"])
            windows = tuple(Window(**window) for window in data["windows"])
            return cls(data["run"], data["mode"], changes, windows)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"PartitionJournal: it is damaged ({type(error).__name__}: {error}).") from error

    def save(self, path: str | Path) -> None:
        """Write the journal as JSON. An existing file stays as it is until the new one is complete.

        Raises:
            OSError: If the file cannot be written.

        """
        write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PartitionJournal":
        """Read a journal that :meth:`save` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not a journal, or damaged, or of another format.

        """
        where = f"PartitionJournal: `path` must be a journal that AdaptivePartition wrote; {str(path)!r}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where} is not there. {_WAY_OUT}") from error
        except ValueError as error:
            raise ValueError(f"{where} is no JSON, or cut off ({error}). {_WAY_OUT}") from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('PartitionJournal: ')} {_WAY_OUT}") from error

    def _problem(self) -> str | None:
        """Return what does not fit, or ``None``."""
        if missing := sorted(set(RUN_FIELDS) - set(self.run)):
            return f"`run` must hold {', '.join(RUN_FIELDS)}; it lacks {', '.join(missing)}"
        if self.mode not in MODES:
            return f"`mode` must be one of {', '.join(MODES)}; got {self.mode!r}"
        places = [change.place for change in self.changes]
        if not places or places[0] != BatchIndex(0, 0) or places != sorted(set(places)):
            found = ", ".join(f"epoch {place.epoch} batch {place.batch}" for place in places) or "none"
            return f"`changes` must begin at epoch 0, batch 0, and come one after the other; got {found}"
        parts: dict[str, Sequence[Change | Window]] = {"changes": self.changes, "windows": self.windows}
        for name, part in parts.items():
            for number, entry in enumerate(part):
                if (problem := self._wrong_sizes(entry)) is not None:
                    return f"`{name}[{number}]` {problem}"
        return None

    def _wrong_sizes(self, entry: Change | Window) -> str | None:
        all_sizes = [entry.sizes]
        if isinstance(entry, Window):
            if len(entry.busy_s) != self.ranks or len(entry.fetch_s) != self.ranks:
                return f"must have `busy_s` and `fetch_s` of {self.ranks} ranks; got {entry.busy_s}, {entry.fetch_s}"
            all_sizes += [] if entry.best_sizes is None else [entry.best_sizes]
        for sizes in all_sizes:
            if len(sizes) != self.ranks or min(sizes, default=-1) < 0 or sum(sizes) != self.global_batch_size:
                return (
                    f"must share {self.global_batch_size} samples among {self.ranks} ranks, at least 0 each; got "
                    f"{sizes}, which sum to {sum(sizes)}"
                )
        return None


def _put(value: Any, **fields: Any) -> None:
    for name, field in fields.items():
        object.__setattr__(value, name, field)  # normalises the fields of a frozen value


def _whole(numbers: Iterable[Any]) -> tuple[int, ...]:
    return tuple(index(number) for number in numbers)


def _known(number: Any) -> float | None:
    if number is None:
        return None
    if isinstance(number, str):  # `float` would read it
        raise TypeError(f"{number!r} is not a number")
    return float(number) if math.isfinite(number) else None


def _plain(entry: Change | Window) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(entry).items()}


def shown(value: Any) -> str:
    """Return a value of ``run`` as text for people."""
    if type(value) is int:
        return f"{value:,}"
    return "not recorded" if value is None else str(value) or "none"
