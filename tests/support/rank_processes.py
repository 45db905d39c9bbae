"""Ranks that are forked from the process of the tests and run one function after the other."""

import gc
import multiprocessing
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from support.ports import free_port
from support.process_state import ProcessState, RandomStates

Outcome = tuple[Any, str | None]
Job = tuple[Callable[..., Any], tuple[Any, ...]]
_LOOKS_FOR_ITS_PARENT_EVERY_S = 2.0


class NoAnswer(Exception):
    """Ranks that have ended, or go on for too long, without an answer; with what the others have answered."""

    def __init__(self, answers: dict[int, Outcome], reasons: dict[int, str]) -> None:
        super().__init__(f"{'; '.join(f'rank {rank} {why}' for rank, why in reasons.items())}; others: {answers}")
        self.answers, self.reasons = answers, reasons


class RankProcesses:
    """Processes with the environment of ranks.

    They begin with one function, which they have by the fork, so it may be any. Later ones are sent by cloudpickle,
    which sends functions of functions by value. Each begins with the random states of the first, with the environment
    and the folder that the process of the tests has by then, and outside of any group.

    Args:
        world_size: How many.
        parent: What the process of the tests is as they are forked.
        first: The first function, which is called as ``fn(rank, *args)``, and its arguments.

    """

    def __init__(self, world_size: int, parent: ProcessState, first: Job) -> None:
        self._parent = parent
        context = multiprocessing.get_context("fork")
        port = free_port()
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, first, theirs, parent, os.getpid()))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def are_as_new_ones_would_be(self) -> bool:
        """Whether they live, and the process of the tests is what it was."""
        return self._parent.holds() and all(process.is_alive() for process, _ in self._ranks)

    def message(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes | None:
        """Return what sends a function to these ranks, or ``None`` if it cannot be sent."""
        try:
            return cloudpickle.dumps(((fn, args), free_port(), dict(os.environ), os.getcwd()))
        except Exception:  # whatever an object of a test does on being pickled
            return None

    def begin(self, message: bytes) -> None:
        for _, pipe in self._ranks:
            pipe.send_bytes(message)

    def answers(self, timeout_s: float) -> list[Outcome]:
        """Wait for what the function has returned, or a traceback, of every rank.

        Raises:
            NoAnswer: If a rank ends, or goes on for longer, without one.

        """
        until_s = time.monotonic() + timeout_s
        found: dict[int, Outcome] = {}
        reasons: dict[int, str] = {}
        for rank, (process, pipe) in enumerate(self._ranks):
            wait([pipe, process.sentinel], timeout=max(0.0, until_s - time.monotonic()))
            with suppress(EOFError, OSError):  # closed by its end
                if pipe.poll():
                    found[rank] = pipe.recv()
            if rank not in found:
                process.join(0.1)  # one that has closed its pipe is about to end
                reasons[rank] = (
                    f"no answer within {timeout_s} s"
                    if process.is_alive()
                    else f"ended with status {process.exitcode} and without an answer"
                )
        if reasons:
            raise NoAnswer(found, reasons)
        return [found[rank] for rank in range(len(self._ranks))]

    def are_as_before(self, timeout_s: float) -> bool:
        """Wait until all have tidied up; return whether all live, and nothing is changed that can be looked up."""
        until_s = time.monotonic() + timeout_s
        for process, pipe in self._ranks:
            wait([pipe, process.sentinel], timeout=max(0.0, until_s - time.monotonic()))
            try:
                if not (pipe.poll() and pipe.recv()):
                    return False
            except (EOFError, OSError):
                return False
        return True

    def end(self, within_s: float = 0.0) -> None:
        """End them; those that have failed end by themselves, if that is waited for."""
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(within_s)
            process.kill()
        for process, _ in self._ranks:
            process.join()


def _serve(rank: int, world_size: int, port: int, job: Job, pipe: Connection, began: ProcessState, parent: int) -> None:
    """Run functions until one fails or leaves something behind, or the process of the tests has no more."""
    gc.freeze()  # what the parent has loaded is no garbage; to look at half a million objects copies their memory
    torch.set_num_threads(1)
    randomness, environment, folder = RandomStates(), dict(os.environ), os.getcwd()
    while True:
        _become(rank, world_size, port, environment, folder)
        randomness.restore()
        if not _answer(rank, *job, pipe):
            return
        del job
        # the others may still need the store that rank 0 hosts
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        gc.collect()
        changes = _changes(began)
        pipe.send(not changes)
        if changes:
            return
        while not pipe.poll(_LOOKS_FOR_ITS_PARENT_EVERY_S):
            if os.getppid() != parent:
                return
        try:
            job, port, environment, folder = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:
            return


def _answer(rank: int, fn: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> bool:
    """Send what the function returns, or its traceback; return whether this process can go on."""
    try:
        with warnings.catch_warnings():  # which also forgets what was warned of before, and so not again
            answer = fn(rank, *args)
        pipe.send((answer, None))
    except BaseException:
        # the end of this process is what others notice that wait for it in a collective
        pipe.send((None, traceback.format_exc()))
        return False
    return True


def _changes(began: ProcessState) -> list[str]:
    """What a function has left behind; ``RANK_CHANGES`` names a file that says by which test."""
    changes = [
        *([] if began.holds() else began.changes()),
        *(f"thread {thread.name}" for thread in threading.enumerate()[1:]),
    ]
    changes += [f"process {child.name}" for child in multiprocessing.active_children()]
    if changes and "RANK_CHANGES" in os.environ:
        with open(os.environ["RANK_CHANGES"], "a") as file:
            print(os.environ.get("PYTEST_CURRENT_TEST"), changes, file=file)
    return changes


def _become(rank: int, world_size: int, port: int, environment: dict[str, str], folder: str) -> None:
    """Give this process the environment of a rank."""
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
