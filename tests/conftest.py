"""Real processes for tests: `run_ranks` starts them, carries results and tracebacks back, and misses none."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _rank(fn: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        assert dist.get_world_size() == world_size
        # Answers go to the parent before the group goes down: rank 0 hosts the store that the others still need.
        results.put((rank, fn(rank, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """Run ``fn(rank, *args)`` in ``world_size`` processes joined by gloo, and return the answers in order of rank."""

    def run(fn: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 90.0) -> list[Any]:
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        port = free_port()
        processes = [
            context.Process(target=_rank, args=(fn, rank, world_size, port, args, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        try:
            while len(answers) < world_size:
                try:
                    rank, answer, error = results.get(timeout=timeout_s)
                except Empty:
                    missing = sorted(set(range(world_size)) - set(answers))
                    pytest.fail(f"no answer from ranks {missing} within {timeout_s} s")
                if error is not None:
                    pytest.fail(f"rank {rank} failed:\n{error}")
                answers[rank] = answer
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
        return [answers[rank] for rank in range(world_size)]

    return run
