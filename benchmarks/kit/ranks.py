"""Ranks on this machine, which are forked and say nothing, and the arguments of a Trainer that only trains."""

import logging
import multiprocessing
import os
import queue
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_LOUD = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning_comm",
)


def quiet() -> None:
    """Let Lightning, and what it warns of, say nothing."""
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def run_ranks(fn: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Run ``fn(rank, *args)`` in processes with the environment that torchrun and Lightning expect.

    Raises:
        RuntimeError: If a process ends without an answer; the others are ended then.

    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = [context.Process(target=_rank, args=(fn, rank, ranks, port, args, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    while len(answers) < ranks:
        try:
            rank, answer = results.get(timeout=1)
            answers[rank] = answer
        except queue.Empty:
            failed = [rank for rank, process in enumerate(processes) if process.exitcode]
            if failed:
                for process in processes:
                    process.kill()
                raise RuntimeError(
                    f"rank {failed[0]} ended with exit code {processes[failed[0]].exitcode}; its error is above"
                ) from None
    for process in processes:
        process.join()
    return [answers[rank] for rank in range(ranks)]


def _rank(fn: Callable[..., Any], rank: int, ranks: int, port: int, args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    results.put((rank, fn(rank, *args)))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
