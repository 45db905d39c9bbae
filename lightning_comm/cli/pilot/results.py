"""A pilot's results on disk, written after each trial so that none is lost, and lines on its progress."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning_comm.core.quantities import duration
from lightning_comm.core.whole_files import write_text


class Results:
    """The results of a pilot so far, and the file that holds them.

    Args:
        folder: Where ``pilot.json`` is written.
        header: The command, settings and environment.

    Raises:
        OSError: If the file cannot be written.

    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.data: dict[str, Any] = {**header, "job": {}, "plans": {}, "problems": {}, "trials": [], "failures": {}}
        self.save()

    @property
    def file(self) -> Path:
        """What holds it."""
        return self.folder / "pilot.json"

    def rehearsed(self, event: dict[str, Any]) -> bool:
        """Take in what the rehearsal has found; return whether trials are now shorter than was known."""
        lengths = {name: event[name] for name in ("steps", "warmup_steps") if name in event}
        self.data["job"] = {name: value for name, value in event.items() if name not in ("event", *lengths)}
        before = self.data["settings"].get("steps")
        self.data["settings"].update(lengths)
        self.save()
        return before is not None and bool(lengths) and lengths["steps"] < before

    def add(self, event: dict[str, Any]) -> None:
        """Take in a trial. What the whole run will do is the same in each repeat, and kept once a strategy."""
        record = {name: value for name, value in event.items() if name not in ("event", "plan", "problem")}
        self.data["trials"].append(record)
        for name, of_all in (("plan", "plans"), ("problem", "problems")):
            if event.get(name) is not None:
                self.data[of_all][event["strategy"]] = event[name]
        self.save()

    def fail(self, strategy: str, repeat: int, error: str) -> None:
        """Take in that a strategy failed. Its earlier trials stay in the file, and are compared with no others."""
        self.data["failures"][strategy] = {"repeat": repeat, "error": error}
        self.save()

    def save(self) -> None:
        """Write everything. The file is whole at any time, also if the disk is full."""
        write_text(self.file, json.dumps(self.data))


class TrialProgress:
    """Shows which trial of how many is running and about how long the rest will take.

    Args:
        trials: How many there are.
        repeats: How many of each strategy.

    """

    def __init__(self, trials: int, repeats: int) -> None:
        self._trials, self._repeats, self._done = trials, repeats, 0
        self._began_s = time.monotonic()
        self._took_s: list[float] = []
        self._on_terminal = sys.stdout.isatty()

    def begin(self, strategy: str, repeat: int) -> None:
        """A trial starts."""
        self._began_s = time.monotonic()
        if self._on_terminal:
            self._show(self._label(strategy, repeat) + " ...", end="")

    def end(self, strategy: str, repeat: int, step_s: float) -> None:
        """A trial is over."""
        self._took_s.append(time.monotonic() - self._began_s)
        label = self._label(strategy, repeat)
        self._done += 1
        left = self._trials - self._done
        rest = f", about {duration(left * sum(self._took_s) / len(self._took_s))} left" if left else ""
        self._show(f"{label}: {1000 * step_s:.1f} ms a step{rest}")

    def drop(self, trials: int) -> None:
        """Leave out trials of a strategy that failed."""
        self._trials -= trials
        if self._on_terminal:
            print()

    def _label(self, strategy: str, repeat: int) -> str:
        return f"[{self._done + 1}/{self._trials}] {strategy}, repeat {repeat + 1} of {self._repeats}"

    def _show(self, text: str, end: str = "\n") -> None:
        print(f"\r{text:<79}" if self._on_terminal else text, end=end, flush=True)
