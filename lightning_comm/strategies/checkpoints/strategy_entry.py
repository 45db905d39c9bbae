"""The state of a strategy in a checkpoint: an entry in the main file, and each rank's own file beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy

from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.problems import first_problem
from lightning_comm.transport.recording import Recorder


@dataclass(frozen=True)
class StrategyEntry:
    """The entry of one strategy in main files: where it is, and of which format.

    Args:
        key: Of the entry in the main file.
        version: Of its format.

    """

    key: str
    version: int

    def put(self, checkpoint: dict[str, Any], **content: Any) -> None:
        """Put the entry into a checkpoint."""
        checkpoint[self.key] = {"version": self.version, **content}

    def of(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Return the entry of a checkpoint, or ``None`` if it has none."""
        entry: dict[str, Any] | None = checkpoint.get(self.key)
        return entry

    def unusable(self, entry: dict[str, Any] | None, world_size: int) -> str | None:
        """Return why a run cannot go on exactly from an entry, or ``None`` if it may; the same on all ranks."""
        if entry is None:
            return "another strategy wrote it, or a Trainer that had not trained this model"
        if entry.get("version") != self.version:
            return f"its format is {entry.get('version')!r}, and this version reads {self.version}"
        if entry["world_size"] != world_size:
            return f"it was written by {entry['world_size']} ranks, and there are {world_size} now"
        return None

    def read_own(
        self,
        strategy: ParallelStrategy,
        recorder: Recorder,
        checkpoint: dict[str, Any],
        filepath: _PATH,
        why_not: Callable[[dict[str, Any]], str | None],
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Return this rank's file, or on all ranks why one of them cannot use its own; every rank calls this.

        Args:
            strategy: The strategy.
            recorder: Sends and records.
            checkpoint: What was read from the main file.
            filepath: Of the main file.
            why_not: Returns why there are no rank files, from the entry; ``None`` if they should be there.

        Note:
            *Communication.* A byte of each rank; and where one has a problem, 1500 more. Recorded as
            ``"checkpoint_files"``.

        """
        entry, own = self.of(checkpoint), None
        problem = self.unusable(entry, strategy.world_size)
        if entry is not None and problem is None:
            problem = why_not(entry)
            if problem is None:
                own, problem = sets.read_own(strategy, filepath, entry["token"])
        found = first_problem(strategy, recorder, problem)
        return (own, None) if found is None else (None, found[1])
