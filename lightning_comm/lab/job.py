"""A job: one command on every host of a lab, its output, its end, and which host failed first."""

import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from lightning_comm.lab.output_lines import LineSplitter

TIMED_OUT = 124  # as `timeout` of coreutils exits
_READ_BYTES = 65_536
_NOT_SHOWN = 1  # ends a job whose lines could not be passed on
_KEPT_LINES = 100_000  # of each host


@dataclass
class LabResult:
    """How a command ended.

    Args:
        returncode: 0, or how the first host that failed ended: its exit code, 128 plus the number of a signal, or 124
            when time was up.
        host: The first host that failed; ``None`` where all went well, or time was up.
        why: That as text; empty where all went well.
        output: What each host printed, standard error included, in the order in which it came; the last 100,000 lines.

    """

    returncode: int = 0
    host: int | None = None
    why: str = ""
    output: list[str] = field(default_factory=list)


class Hosts(Protocol):
    """What a job needs of a lab: hosts on which commands are started and ended."""

    @property
    def hosts(self) -> int:
        """The number of hosts."""

    def start(
        self, host: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command on a host, as ``subprocess.Popen`` would."""

    def end(self, host: int) -> None:
        """End what runs on a host."""


class Job:
    """Runs a command on every host of a lab.

    Args:
        lab: The lab.
        command: The program and its arguments.
        env: As in :meth:`Lab.start`.
        on_line: Called with host, line and whether it came from standard error; one call at a time. An error in it
            ends the job and is raised.

    """

    def __init__(
        self,
        lab: Hosts,
        command: Sequence[str],
        env: Mapping[str, str] | None,
        on_line: Callable[[int, str, bool], None] | None,
    ) -> None:
        self._lab = lab
        self._command = command
        self._env = env
        self._on_line = on_line
        self._lines = [deque[str](maxlen=_KEPT_LINES) for _ in range(lab.hosts)]
        self._turn = threading.Lock()
        self._ends: queue.Queue[tuple[int, int]] = queue.Queue()  # in the order in which they came
        self._error: Exception | None = None  # of `on_line`

    def run(self, timeout_s: float | None) -> LabResult:
        """Run it to its end, or until time is up, and return how it ended."""
        processes: list[subprocess.Popen[Any]] = []
        readers: list[threading.Thread] = []
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            for host in range(self._lab.hosts):
                processes.append(
                    self._lab.start(
                        host,
                        self._command,
                        env=self._env,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                    )
                )
                readers += self._readers(host, processes[-1])
            result = self._wait(processes, deadline)
        finally:
            self._end_all()
            for reader in readers:
                reader.join(5)
        if self._error is not None:
            raise self._error
        result.output = ["".join(lines) for lines in self._lines]
        return result

    def _wait(self, processes: "list[subprocess.Popen[Any]]", deadline: float | None) -> LabResult:
        for host, process in enumerate(processes):
            threading.Thread(target=_report_end, args=(host, process, self._ends), daemon=True).start()
        running = set(range(len(processes)))
        while running:
            rest_s = None if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            try:
                host, code = self._ends.get(timeout=rest_s)
            except queue.Empty:
                return LabResult(TIMED_OUT, None, f"time was up while hosts {sorted(running)} were still running")
            if code != 0:
                return LabResult(code if code > 0 else 128 - code, host, f"host {host} {_ending(code)}")
            running.remove(host)
        return LabResult()

    def _end_all(self) -> None:
        """End what still runs, on all hosts at once."""
        enders = [threading.Thread(target=self._lab.end, args=(host,)) for host in range(self._lab.hosts)]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()

    def _readers(self, host: int, process: "subprocess.Popen[Any]") -> list[threading.Thread]:
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=self._read, args=(host, pipe, is_error), daemon=True)
            for pipe, is_error in ((process.stdout, False), (process.stderr, True))
        ]
        for reader in readers:
            reader.start()
        return readers

    def _read(self, host: int, pipe: IO[bytes], is_error: bool) -> None:
        splitter = LineSplitter()
        with pipe:
            while chunk := pipe.read1(_READ_BYTES):  # type: ignore[attr-defined]
                self._say(host, splitter.feed(chunk), is_error)
        self._say(host, splitter.end(), is_error)

    def _say(self, host: int, lines: list[str], is_error: bool) -> None:
        with self._turn:
            for line in lines:
                self._lines[host].append(line + "\n")
                if self._on_line is None or self._error is not None:
                    continue
                try:
                    self._on_line(host, line, is_error)
                except Exception as error:  # read on all the same: a host whose output is not read would block
                    self._error = error
                    self._ends.put((host, _NOT_SHOWN))


def _report_end(host: int, process: "subprocess.Popen[Any]", ends: "queue.Queue[tuple[int, int]]") -> None:
    ends.put((host, process.wait()))


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    known = [each.name for each in signal.Signals if each == -code]
    return f"was ended by {known[0] if known else f'signal {-code}'}"
