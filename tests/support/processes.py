"""Real processes for tests: results and tracebacks come back, and no rank can be missing unnoticed."""

import gc
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache
from itertools import cycle, islice
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Making its first process group, torch 2.15 looks through the entry points of all installed packages, which takes
# longer than all the rest of it. What is installed does not change while tests run.
if hasattr(dist.distributed_c10d.Backend, "_ensure_backend_registered"):
    dist.distributed_c10d.Backend._ensure_backend_registered = cache(
        dist.distributed_c10d.Backend._ensure_backend_registered
    )
    dist.distributed_c10d.Backend._ensure_backend_registered("gloo")  # here, so that forked ranks have it

# Launches start side by side in threads, which share one walk through the ports. Held while ranks are forked, so that
# none of them inherits it from a thread that it does not have.
_CHOOSING = threading.Lock()
os.register_at_fork(before=_CHOOSING.acquire, after_in_parent=_CHOOSING.release, after_in_child=_CHOOSING.release)
_PORTS = range(10_000, 20_000)  # below those that the kernel gives away, to whoever connects in the meantime


def free_port() -> int:
    """Find a port that nobody else finds: each worker of pytest-xdist has ports of its own, and uses them in turn."""
    with _CHOOSING:
        for port in islice(_own_ports(os.getpid()), 1000):
            with socket.socket() as sock:
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
    raise OSError(f"free_port: not one of 1,000 ports of 127.0.0.1 in {_PORTS} could be had")


@cache
def _own_ports(process: int) -> Iterator[int]:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = _PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) :: workers]
    first = process * 97 % len(own)  # another run of the tests on this machine begins elsewhere
    return cycle([*own[first:], *own[:first]])


def start_ranks(fn: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 90.0) -> list[Any]:
    """Run ``fn(rank, *args)`` in processes that are joined by gloo already."""

    def joined(rank: int) -> Any:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        assert dist.get_world_size() == world_size
        return fn(rank, *args)

    return launch(joined, world_size=world_size, timeout_s=timeout_s)


def one_launch(fn: Callable[..., Any], cases: Iterable[Any], *, world_size: int) -> dict[Any, list[Any]]:
    """Run ``fn(rank, *case)`` for one case after the other in the same joined processes; return the answers by case."""
    cases = list(cases)
    answers = start_ranks(lambda rank: [fn(rank, *case) for case in cases], world_size=world_size, timeout_s=150)
    return {case: [of_rank[number] for of_rank in answers] for number, case in enumerate(cases)}


def launch(fn: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 90.0) -> list[Any]:
    """Run ``fn(rank, *args)`` in processes with the environment that torchrun and Lightning expect."""
    answers = outcomes(fn, *args, world_size=world_size, timeout_s=timeout_s)
    for rank, (_, error) in enumerate(answers):
        if error is not None:
            pytest.fail(f"rank {rank} failed:\n{error}")
    return [answer for answer, _ in answers]


def outcomes(
    fn: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 90.0, ends_within_s: float = 5.0
) -> list[tuple[Any, str | None]]:
    """Like :func:`launch`, for ranks that may fail: return an answer and a traceback for each.

    A process that has not ended by itself ``ends_within_s`` after all have answered is killed: one whose group has
    failed may wait for the others in the end.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_run, args=(fn, rank, world_size, port, args, results)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, tuple[Any, str | None]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < world_size:
            try:
                rank, answer, error = results.get(timeout=max(0.1, deadline - time.monotonic()))
            except Empty:
                missing = sorted(set(range(world_size)) - set(answers))
                pytest.fail(f"no answer from ranks {missing} within {timeout_s} s; others: {answers}")
            answers.setdefault(rank, (answer, error))  # what follows an answer is a group that another rank has left
    finally:
        for process in processes:
            process.join(ends_within_s)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def become(rank: int, world_size: int, port: int) -> None:
    """Give this process the environment of a rank."""
    gc.freeze()  # what the parent has loaded is no garbage; to look at half a million objects copies their memory
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }


def _run(fn: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any) -> None:
    become(rank, world_size, port)
    try:
        results.put((rank, fn(rank, *args), None))
        # The others may still need the store that rank 0 hosts.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
