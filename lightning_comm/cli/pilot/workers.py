"""The processes of a pilot: one a rank, started here or on emulated hosts; their events, and their end."""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_comm.cli.fresh_python import fresh_python
from lightning_comm.cli.pilot.rank import EVENT, TrialJob
from lightning_comm.lab.cluster import Lab

_GRACE_S = 5.0  # for the others to report their errors, once one has failed
_SHOWN_OF_A_FAILURE = 15  # lines
_PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}


class WorkerFailed(Exception):
    """A rank failed; the message is the first error, with the rank that had it."""


class ThisMachine:
    """Starts ranks on this machine, joined over its loopback interface.

    Args:
        ranks: How many.

    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[subprocess.Popen[str]] = []
        self._port = ""

    def start(self, command: list[str], rank: int) -> "subprocess.Popen[str]":
        """Start one of them."""
        if rank == 0:
            self._port = str(find_free_network_port())  # a new one each time, since an old one is not free at once
        launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        threads = str(max(1, (os.cpu_count() or 1) // self.ranks))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **launch}
        self._processes.append(subprocess.Popen(command, env=environment, **_PIPES))
        return self._processes[-1]

    def end(self) -> None:
        """End whatever still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


class LabHosts:
    """Starts ranks on emulated hosts.

    Args:
        lab: The hosts.

    """

    def __init__(self, lab: Lab) -> None:
        self.ranks = lab.hosts * lab.devices_per_host
        self._lab = lab

    def start(self, command: list[str], rank: int) -> "subprocess.Popen[str]":
        """Start one of them."""
        host, local_rank = divmod(rank, self._lab.devices_per_host)
        return self._lab.start(host, ["env", f"LOCAL_RANK={local_rank}", *command], **_PIPES)

    def end(self) -> None:
        """End whatever still runs."""
        for host in range(self._lab.hosts):
            self._lab.end(host, grace_s=1.0)


WorkerHosts = ThisMachine | LabHosts


@dataclass
class _Worker:
    rank: int
    process: "subprocess.Popen[str]"
    error: str | None = None
    error_of_another: bool = False  # whether it is only that another rank has failed
    last: list[str] = field(default_factory=list)  # lines of its output

    def own_end(self) -> str | None:
        """Return how the process ended, if it failed and could not report that itself."""
        code = self.process.poll()
        if code is None or code == 0 or self.error is not None:
            return None
        end = "\n".join(self.last)
        if code < 0:
            name = signal.Signals(-code).name
            hint = " Was the memory used up?" if name == "SIGKILL" else ""
            return f"rank {self.rank} was ended by {name}.{hint} The end of its output:\n{end}"
        return f"rank {self.rank} ended with exit code {code}. The end of its output:\n{end}"


def run_workers(
    job: TrialJob, hosts: WorkerHosts, logs: Path, timeout_s: float
) -> Generator[dict[str, Any], None, None]:
    """Start all ranks and yield their events, until all have ended; end them all when this is left.

    Args:
        job: What each has to do.
        hosts: Where they are.
        logs: A folder. Whatever else they print is added to one file a rank.
        timeout_s: How long all of them may report nothing.

    Raises:
        WorkerFailed: If one fails, or no rank reports anything in time.

    """
    command = fresh_python("lightning_comm.cli.pilot.rank", json.dumps(asdict(job)))
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    workers: list[_Worker] = []
    try:
        for rank in range(hosts.ranks):
            workers.append(_Worker(rank, hosts.start(command, rank)))
            threading.Thread(target=_read_output, args=(workers[-1], lines, logs), daemon=True).start()
        running = hosts.ranks
        while running:
            try:
                rank, event = _next(lines, timeout_s)
            except queue.Empty:
                raise WorkerFailed(
                    f"no rank answered for {timeout_s:g} s. `--timeout` allows more; what they printed is in {logs}."
                ) from None
            if event is None:
                running -= 1
            # in the order in which they came: what was measured before a failure is measured
            failed = workers[rank].process.returncode != 0 if event is None else event["event"] == "failed"
            if failed:
                _wait_for_others(workers)
                raise WorkerFailed(_first_error(workers, rank))
            if event is not None:
                yield event
    finally:
        hosts.end()


def _next(lines: "queue.Queue[tuple[int, str | None]]", timeout_s: float) -> tuple[int, dict[str, Any] | None]:
    rank, line = lines.get(timeout=timeout_s)
    return rank, None if line is None else json.loads(line)


def _read_output(worker: _Worker, lines: "queue.Queue[tuple[int, str | None]]", logs: Path) -> None:
    """Sort the lines of a process into events and its log, until it closes its output."""
    assert worker.process.stdout is not None
    log = None
    with suppress(OSError):  # a full disk must not keep the pilot from reading its ranks' output
        log = (logs / f"rank{worker.rank}.log").open("a", buffering=1)
    for line in worker.process.stdout:
        if line.startswith(EVENT):
            text = line.removeprefix(EVENT)
            event = json.loads(text)
            if event["event"] == "failed":
                worker.error = f"rank {worker.rank}: {event['error']}"
                worker.error_of_another = event.get("of_another", False)
            lines.put((worker.rank, text))
            continue
        if line.strip():
            worker.last = [*worker.last[-_SHOWN_OF_A_FAILURE + 1 :], line.rstrip("\n")]
        with suppress(OSError, ValueError):
            if log is not None:
                log.write(line)
    worker.process.wait()
    if log is not None:
        with suppress(OSError):
            log.close()
    lines.put((worker.rank, None))


def _wait_for_others(workers: list[_Worker]) -> None:
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until and any(worker.process.poll() is None for worker in workers):
        time.sleep(0.05)


def _first_error(workers: list[_Worker], first: int) -> str:
    """Return the cause: a rank that died silently, which the others only saw disconnect, or else the first error."""
    for worker in workers:
        if (end := worker.own_end()) is not None:
            return end
    failed = [worker for worker in (workers[first], *workers) if worker.error is not None]
    # a rank that fails stays until the others have learned of it, so their errors may come first
    return str(min(failed, key=lambda worker: worker.error_of_another).error)
