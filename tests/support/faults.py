"""Jobs in which ranks stop, die or fail: when each process ends, and what it says."""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch

from support.processes import free_port


@dataclass
class Fate:
    """What became of a rank.

    Args:
        text: Type and text of the exception that left the rank's function, or ``"ended"``; empty if there was none.
        seconds: From the fault, or the start without one, to the end of the process; infinity if it did not end.
        status: Its exit status.

    """

    text: str
    seconds: float
    status: int | None


class Job(NamedTuple):
    """A function of a rank, called in so many processes."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def vanish() -> None:
    os._exit(3)


def boom() -> None:
    raise ValueError("boom")


def out_of_memory() -> None:
    raise MemoryError


def leave() -> None:
    raise SystemExit(0)


def interrupt() -> None:
    raise KeyboardInterrupt


class Fault:
    """Happens once, and notes when; the same object in all processes of a job."""

    def __init__(self, what: Callable[[], None], rank: int, *, lives_on: bool = False) -> None:
        self.what, self.rank = what, rank
        self.lives_on = lives_on or what is stop  # so that the end of its process is not waited for
        self.at_s = multiprocessing.get_context("fork").Value("d", 0.0, lock=False)

    def strike(self, rank: int) -> None:
        if rank == self.rank and self.at_s.value == 0.0:
            self.at_s.value = time.monotonic()
            self.what()


def fates(jobs: Sequence[tuple[Job, Fault]], within_s: float) -> list[list[Fate]]:
    """Run jobs side by side, each in forked processes.

    Waits until all have ended, except those that live on, or ``within_s`` after the last fault.
    """
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    running = []
    for job, fault in jobs:
        port, ranks = free_port(), []
        for rank in range(job.world_size):
            says, hears = context.Pipe()
            process = context.Process(target=_run, args=(job, rank, port, hears))
            process.start()
            hears.close()
            ranks.append((process, says))
        running.append((fault, ranks))
    try:
        ended = _ends(running, started, within_s)
        return [[_fate(fault, *rank, ended, started) for rank in ranks] for fault, ranks in running]
    finally:
        for _, ranks in running:
            for process, _ in ranks:
                process.kill()
                process.join()


def _ends(running: Any, started: float, within_s: float) -> dict[int, float]:
    awaited = {
        process.sentinel
        for fault, ranks in running
        for rank, (process, _) in enumerate(ranks)
        if not (fault.lives_on and rank == fault.rank)
    }
    ended: dict[int, float] = {}
    while awaited - set(ended):
        last_s = max(fault.at_s.value or started for fault, _ in running)
        if time.monotonic() > last_s + within_s:
            break
        for sentinel in wait(list(awaited - set(ended)), timeout=0.5):
            ended[sentinel] = time.monotonic()
    return ended


def _fate(fault: Fault, process: Any, says: Any, ended: dict[int, float], started: float) -> Fate:
    try:
        text = says.recv() if says.poll() else ""
    except EOFError:  # it ended without a word
        text = ""
    if process.sentinel not in ended:
        return Fate(text, float("inf"), None)
    process.join()
    return Fate(text, ended[process.sentinel] - (fault.at_s.value or started), process.exitcode)


def _run(job: Job, rank: int, port: int, says: Any) -> None:
    atexit._clear()
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(job.world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    status = 0
    try:
        job.fn(rank, *job.args)
        says.send("ended")
    except BaseException as error:
        says.send(f"{type(error).__name__}: {error}")
        status = 1
    # what runs when an interpreter ends, but not its slow end itself: the forked memory would be copied to be freed
    atexit._run_exitfuncs()
    os._exit(status)
