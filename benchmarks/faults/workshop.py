"""Where runs are made: the processes that fork ranks, emulated hosts, and runs without a fault to compare with."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.plan import Case
from benchmarks.faults.strike import Progress
from benchmarks.faults.zygote import Rank, Zygote
from lightning_comm.lab.cluster import Lab

LAB_HOSTS, LAB_LINK = 3, "100mbit"
_PORT_RANGE = (20000, 32000)  # below what the kernel gives to connections that ask for any port
_END_S = 10.0


class Run:
    """A job under way.

    Args:
        ranks: Its processes.
        folder: Of its logs.

    """

    def __init__(self, ranks: list[Rank], folder: Path, logs: list[Path]) -> None:
        self.ranks, self.folder, self._logs = ranks, folder, logs
        self.began_at = time.time()
        self.progress = Progress(folder, len(ranks))

    @property
    def alive(self) -> set[int]:
        """The ranks that have not ended."""
        return {index for index, rank in enumerate(self.ranks) if rank.code is None}

    def texts(self) -> list[str]:
        """Return what each rank has printed."""
        return [log.read_text(errors="replace") if log.exists() else "" for log in self._logs]

    def show_stacks(self) -> None:
        """Let every rank that is alive print where all of its threads are."""
        for index in self.alive:
            self.ranks[index].signal(signal.SIGUSR2)
        time.sleep(1.0)

    def end(self) -> None:
        """Kill what is alive."""
        for index in self.alive:
            self.ranks[index].signal(signal.SIGKILL)
        deadline = time.monotonic() + _END_S
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait(self, limit_s: float, still_s: float) -> bool:
        """Wait until all have ended; return whether they did.

        Args:
            limit_s: At most so long.
            still_s: And at most so long while no rank comes to another place.

        """
        limit, counts, moved = time.monotonic() + limit_s, None, time.monotonic()
        while self.alive:
            now = time.monotonic()
            latest = [row[3] for row in self.progress.rows()]
            if latest != counts:
                counts, moved = latest, now
            if now > limit or now > moved + still_s:
                return False
            time.sleep(0.01)
        return True

    def finals(self) -> list[dict[str, Any] | None]:
        """Return each rank's weights at the end, where it came there."""
        paths = [self.folder / f"final{rank}.npz" for rank in range(len(self.ranks))]
        return [dict(np.load(path)) if path.exists() else None for path in paths]


def equal(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two ranks ended with the same weights, bit for bit."""
    if one is None or other is None:
        return False
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k], equal_nan=True) for k in one)


class Workshop:
    """Makes runs.

    Args:
        folder: Where they write.
        timeout_s: That of the process group.
        slack: Multiplies every limit of the driver's, for a machine that is busy.
        compares: Whether runs are compared with one that nothing happened to.
        zygote: Forks ranks on this machine; ``None`` starts one.

    """

    def __init__(
        self,
        folder: Path,
        *,
        timeout_s: float = 6.0,
        slack: float = 1.0,
        compares: bool = True,
        zygote: Zygote | None = None,
    ) -> None:
        self.folder, self.timeout_s, self.slack, self._compares = folder, timeout_s, slack, compares
        self._zygote = zygote
        self._turn = threading.Lock()
        self._references: dict[str, Future[list[dict[str, Any] | None]]] = {}
        self._port = _PORT_RANGE[0] + os.getpid() % 4000
        self.lab_turn = threading.Lock()  # held by the run that has the emulated hosts
        self._lab: Lab | None = None
        self._lab_zygotes: list[Zygote] = []

    @property
    def hang_s(self) -> float:
        """How long after a fault processes may last."""
        return (self.timeout_s + 10.0) * self.slack

    @property
    def run_s(self) -> float:
        """How long a run without a fault may take."""
        return 120.0 * self.slack

    def compares_with(self, case: Case) -> bool:
        """Whether a run is compared with one that nothing happened to."""
        return self._compares and case.repeats_exactly

    @property
    def lab(self) -> Lab:
        """The emulated hosts; whoever uses them has ``lab_turn``."""
        if self._lab is None:
            self._lab = lab = Lab(LAB_HOSTS, LAB_LINK)

            def on_host(host: int) -> Zygote:
                return Zygote.started(lambda words, **more: lab.start(host, words, **more))

            with ThreadPoolExecutor(LAB_HOSTS) as pool:
                self._lab_zygotes = list(pool.map(on_host, range(LAB_HOSTS)))
        return self._lab

    def mend_lab(self) -> None:
        """Make all links whole."""
        for host in range(LAB_HOSTS):
            self.lab.restore(host)
            self.lab.set_link(host, LAB_LINK)

    def start(self, order: dict[str, Any], folder: Path, *, in_lab: bool = False, slurm: bool = False) -> Run:
        """Start the ranks of a job; its logs and marks are in the folder."""
        ranks: int = order["ranks"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        Progress(folder, ranks)
        job = {**order, "folder": str(folder), "timeout_s": self.timeout_s, "nodes": ranks if in_lab else 1}
        port, logs, started = self._free_port(), [], []
        for rank in range(ranks):
            log = folder / f"rank{rank}.log"
            environment = self._environment(rank, ranks, port, in_lab=in_lab)
            if slurm:
                environment = _slurm(environment, rank, ranks, folder)
            environment["TMPDIR"] = order.get("tmpdir") or str(folder)
            zygote = self._lab_zygotes[rank] if in_lab else self._the_zygote()
            started.append(zygote.start(job=job, folder=str(folder), log=str(log), environment=environment))
            logs.append(log)
        return Run(started, folder, logs)

    def reference(self, order: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Return the weights of a run like this one that nothing happens to; made once.

        Raises:
            RuntimeError: If it fails, which says that the machine cannot run the benchmark.

        """
        kept = {name: order[name] for name in ("strategy", "ranks", "partition", "loader", "fewer")}
        key = json.dumps(kept, sort_keys=True)
        with self._turn:
            found = self._references.get(key)
            mine = found is None
            future = self._references.setdefault(key, Future())
        if mine:
            try:
                future.set_result(self._make_reference(order, f"reference{len(self._references)}"))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _make_reference(self, order: dict[str, Any], name: str) -> list[dict[str, Any] | None]:
        folder = self.folder / name
        plain = {"case": None, "how": "none", "saves": "top1", "resume": None, "workers": 0, "tmpdir": None}
        run = self.start({**order, **plain, "files": str(folder / "files")}, folder)
        run.wait(self.run_s, self.hang_s)
        run.end()
        if any(rank.code != 0 for rank in run.ranks):
            raise RuntimeError(f"faults: a run without a fault failed; see {folder}:\n{run.texts()[0][-2000:]}")
        return run.finals()

    def close(self) -> None:
        """End all processes and hosts."""
        for zygote in (*self._lab_zygotes, *([self._zygote] if self._zygote else [])):
            zygote.close()
        if self._lab is not None:
            self._lab.close()

    def _the_zygote(self) -> Zygote:
        with self._turn:
            if self._zygote is None:
                self._zygote = Zygote.started()
            return self._zygote

    def _free_port(self) -> int:
        with self._turn:
            while True:
                self._port = self._port + 1 if self._port < _PORT_RANGE[1] else _PORT_RANGE[0]
                with socket.socket() as sock:
                    try:
                        sock.bind(("127.0.0.1", self._port))
                    except OSError:
                        continue
                return self._port

    def _environment(self, rank: int, ranks: int, port: int, *, in_lab: bool) -> dict[str, str]:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        if in_lab:
            variables |= self.lab.environment(rank)
            variables |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NNODES": str(ranks)}
        return variables


def _slurm(environment: dict[str, str], rank: int, ranks: int, folder: Path) -> dict[str, str]:
    """Return the environment of a task of SLURM, with an ``scontrol`` that writes down what it is told."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n')
    scontrol.chmod(0o755)
    kept = {name: value for name, value in environment.items() if name.startswith("MASTER_")}
    tasks = {"NTASKS": ranks, "PROCID": rank, "LOCALID": rank, "NTASKS_PER_NODE": ranks, "JOB_ID": 4242}
    more = {"NODEID": 0, "NNODES": 1, "JOB_NUM_NODES": 1, "JOB_NAME": "train"}
    variables = {f"SLURM_{name}": str(value) for name, value in (tasks | more).items()}
    return {**kept, **variables, "PATH": f"{programs}:{os.environ['PATH']}"}
