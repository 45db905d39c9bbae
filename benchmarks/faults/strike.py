"""A fault inside a rank: told of every place that the rank comes to, it strikes at the one that its case names.

Where every rank stands is kept in a file that all of them and the driver have mapped, so that the driver sees progress
and can say afterwards where everybody was. A rank that strikes, or that the driver is to hurt from outside, writes down
when and where first.
"""

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.plan import PLACES

PROGRESS, STRUCK, GO = "progress.bin", "struck.jsonl", "go"
_ROW = struct.Struct("iiiq")  # step, place, process, how many places it came through
_WAIT_S = 120.0  # for the driver; longer than it ever takes, so that a rank whose driver died does not stay
_TORN_BYTES = 16 * 1024  # of a file that is written when the rank dies; the files here are larger
_ALL_PLACES = (*PLACES, "worker", "exhausted", "file", "none")
_FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "pause": signal.SIGSTOP,
    "sigterm": signal.SIGTERM,
    "sigint": signal.SIGINT,
    "sigusr1": signal.SIGUSR1,
}
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError, "MemoryError": MemoryError}


class Progress:
    """The mapped file in which ranks say where they stand.

    Args:
        folder: Of the run.
        ranks: How many there are.

    """

    def __init__(self, folder: str | Path, ranks: int) -> None:
        path = Path(folder, PROGRESS)
        if not path.exists():
            path.write_bytes(_ROW.pack(-1, len(_ALL_PLACES) - 1, 0, 0) * ranks)
        self._ranks = ranks
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def put(self, rank: int, place: str, step: int | None = None) -> None:
        """Write down where a rank is."""
        before, _, pid, count = _ROW.unpack_from(self._map, rank * _ROW.size)
        now = (before if step is None else step, _ALL_PLACES.index(place), pid or os.getpid(), count + 1)
        _ROW.pack_into(self._map, rank * _ROW.size, *now)

    def rows(self) -> list[tuple[int, str, int, int]]:
        """Return step, place, process and number of places of every rank."""
        rows = [_ROW.unpack_from(self._map, rank * _ROW.size) for rank in range(self._ranks)]
        return [(step, _ALL_PLACES[place], pid, count) for step, place, pid, count in rows]


class Fault:
    """What happens to this rank.

    Args:
        case: The case as JSON holds it; ``None`` for a run without a fault.
        folder: Of the run.
        rank: This one.
        ranks: How many there are.
        how: What is to happen; ``"wait"`` and ``"mark"`` leave it to the driver.

    """

    def __init__(self, case: dict[str, Any] | None, folder: str, rank: int, ranks: int, how: str = "none") -> None:
        self._case = case or {}
        self._folder = folder
        self._rank = rank
        self._progress = Progress(folder, ranks)
        self._how = how
        self._mine = bool(case) and (how.endswith("_all") or rank == self._case["rank"])
        self._done = False
        self._operations = 0

    @property
    def step(self) -> int:
        """The optimizer steps done, as last told; known to loading processes too."""
        return self._progress.rows()[self._rank][0]

    def at(self, place: str, step: int | None = None) -> str | None:
        """Note that the rank has come to a place, and strike if it is the one.

        Returns:
            ``"nan"`` or ``"should_stop"`` where the caller is to do it.

        """
        if place != "worker":
            self._progress.put(self._rank, place, step)
        if self._done or not self._mine or place != self._case["place"]:
            return None
        before_steps = place in ("start", "setup", "train_start")
        at_the_end = place in ("train_end", "finish", "exhausted", "epoch_end")
        if not before_steps and not at_the_end and self.step < self._case["step"]:
            return None
        self._done = True
        return self.strike(place)

    def mark(self, place: str) -> None:
        """Write down that it happens now, in one write, so that the driver never reads half of it."""
        line = {"rank": self._rank, "place": place, "step": self.step, "time": time.time()}
        file = os.open(Path(self._folder, STRUCK), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, (json.dumps(line) + "\n").encode())
        os.close(file)

    def strike(self, place: str) -> str | None:
        """Do it."""
        self.mark(place)
        how = self._how.removesuffix("_all")
        if how == "raise":
            raise _ERRORS[self._case["detail"]["error"]](f"fault: boom in {place} of rank {self._rank}")
        if how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[how])
        elif how == "exit0":
            sys.exit(0)
        elif how == "os_exit":
            os._exit(3)
        elif how == "segv":
            ctypes.string_at(0)
        elif how == "wait":
            self._wait()
        return how if how in ("nan", "should_stop") else None

    def _wait(self) -> None:
        """Stay here until the driver has done its part."""
        deadline = time.monotonic() + _WAIT_S
        while not Path(self._folder, GO).exists() and time.monotonic() < deadline:
            time.sleep(0.005)

    # ---- files ---------------------------------------------------------------------------------------------------

    def watch_files(self, folder: str) -> None:
        """From the step of the case on, let the process die at an operation on the files in a folder.

        Python's audit hooks see every file that is opened for writing, renamed, removed and so on, whoever does it.
        """
        if not self._mine or self._how not in ("kill_operation", "kill_write", "fail_write"):
            return

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if (event in _FILE_EVENTS or event == "open") and not self._done and self.step >= self._case["step"]:
                self._on_operation(event, arguments, folder)

        sys.addaudithook(hook)

    def _on_operation(self, event: str, arguments: tuple[Any, ...], folder: str) -> None:
        named = arguments[:1] if event == "open" else arguments[:2]
        paths = [os.fspath(each) for each in named if isinstance(each, (str, os.PathLike))]
        if not any(isinstance(path, str) and path.startswith(folder) for path in paths):
            return
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        wanted = self._how == "kill_operation" or event == "open"
        if not writes or not wanted:
            return
        self._operations += 1
        if self._operations < self._case["detail"].get("operation", 1):
            return
        self._done = True
        self.mark(f"file: {event} {Path(paths[-1]).name}")
        if self._how == "kill_operation":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._how == "kill_write":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGXFSZ])
            # what the kernel then does in the middle of the write; without it the write fails as on a full disk
            ctypes.CDLL(None).signal(int(signal.SIGXFSZ), None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_TORN_BYTES, _TORN_BYTES))
