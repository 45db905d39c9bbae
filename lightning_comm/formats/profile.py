"""The files of a profile: one for each rank with a line for each step, readable during a run and after a kill."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_comm.core.key_figures import RunFigures, StepFigures
from lightning_comm.core.rank_profile import SCHEMA, ClockPoint, RankProfile, combine
from lightning_comm.core.step_timeline import TimelineStep

_FLUSH_EVERY_S = 1.0
_PATTERN = "rank_*.jsonl"


def run_folder(folder: Path, number: int) -> Path:
    """Return the folder of one ``fit`` within that of the profiler."""
    return folder / f"run_{number}"


def next_run(folder: Path) -> int:
    """Return the number of the next ``fit``: one more than the largest that exists."""
    numbers = [int(path.name[4:]) for path in folder.glob("run_*") if path.name[4:].isdigit()]
    return max(numbers, default=-1) + 1


class RankFile:
    """The writer of one rank's file: a header, then a line for each record.

    Args:
        path: The file. Its folder is created if missing.
        header: The fields of the first line: rank, host, versions and so on.

    Raises:
        OSError: If the file cannot be created; from the methods, if the disk is full.

    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._flushed_s = time.monotonic()
        self._write({"schema": SCHEMA, **header})
        self._file.flush()

    def step(self, step: StepFigures) -> None:
        """Write the figures of a step."""
        self._write({"step": {name: _short(value) for name, value in vars(step).items()}})
        if time.monotonic() - self._flushed_s > _FLUSH_EVERY_S:
            self._file.flush()
            self._flushed_s = time.monotonic()

    def beside(self, wire_bytes: dict[str, int]) -> None:
        """Write the bytes sent outside of steps."""
        self._write({"beside": wire_bytes})

    def timeline(self, steps: Sequence[TimelineStep]) -> None:
        """Write the steps to draw."""
        self._write({"timeline": steps})

    def clock(self, point: ClockPoint) -> None:
        """Write a comparison of clocks."""
        self._write({"clock": point})

    def close(self) -> None:
        """Write that the run ended, and close the file."""
        self._write({"end": True})
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is, also on a full disk."""
        with suppress(OSError):  # what could not be written has been reported before
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Profile:
    """A run that was profiled, from its files or from the profiler itself.

    Args:
        ranks: The figures of each rank.

    """

    ranks: list[RankProfile]

    @property
    def figures(self) -> RunFigures:
        """The key figures of the run."""
        return combine(self.ranks)


def load_profile(folder: str | Path) -> Profile:
    """Read back what :class:`CommProfiler` wrote, also of a run that was killed.

    Args:
        folder: That of one run, ``.../run_0``. The files of several hosts can be put together in it.

    Raises:
        FileNotFoundError: If there is no profile in it.
        ValueError: If a file is not a profile, or is one of another version.

    Note:
        *Communication.* None. *Memory.* The files as they are read.

    Example:
        >>> load_profile("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: load_profile: `folder` must hold rank_*.jsonl, which CommProfiler writes; got 'nowhere'. ...

    """
    paths = sorted(Path(folder).glob(_PATTERN))
    if not paths:
        raise FileNotFoundError(
            f"load_profile: `folder` must hold {_PATTERN}, which CommProfiler writes; got {str(folder)!r}. Each `fit` "
            "has a folder of its own, such as comm_profile/run_0."
        )
    return Profile(sorted((_load_rank(path) for path in paths), key=lambda rank: rank.rank))


def _load_rank(path: Path) -> RankProfile:
    lines = _complete_lines(path)
    header = lines[0] if lines else {}
    if header.get("schema") != SCHEMA:
        raise ValueError(
            f'load_profile: {path} must begin with a line that says "schema": {SCHEMA!r}; got '
            f"{header.get('schema')!r}. Read it with the version of lightning_comm that wrote it."
        )
    profile = RankProfile({name: value for name, value in header.items() if name != "schema"})
    for line in lines[1:]:
        if "step" in line:
            profile.add_step(StepFigures(**line["step"]))
        elif "beside" in line:
            profile.add_beside(line["beside"])
        elif "timeline" in line:
            profile.timeline = [TimelineStep.from_row(row) for row in line["timeline"]]
        elif "clock" in line:
            profile.clock.append(ClockPoint(*line["clock"]))
    return profile


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; a last one that was cut off, when the process was killed, is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _short(value: Any) -> Any:
    return round(value, 7) if isinstance(value, float) else value
