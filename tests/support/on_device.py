"""Ranks on a device of the tests' choice, which stay up and carry out one call after the other.

A process that has used CUDA once must not fork, and a CUDA context costs a second. So the process of the tests never
touches the device: it only asks how many there are, which needs no context. Ranks are forked from it, loaded as they
are, and keep their context for many calls. A call that fails ends its ranks, and the next one has fresh ones.
"""

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from support.processes import free_port

VARIABLE = "LIGHTNING_COMM_TEST_DEVICE"  # "cuda" or "cpu": what tests/gpu run on, whatever is found
MOCKED = "LIGHTNING_COMM_MOCK_CUDA"  # "1": "cuda" is a device that is not there, to run all lines once


def chosen_device() -> str | None:
    """What tests/gpu run on: what the environment says, else a GPU that is there, else nothing."""
    return os.environ.get(VARIABLE) or ("cuda" if torch.cuda.device_count() else None)


@contextmanager
def the_device() -> Iterator[None]:
    """Let there be a GPU in this process, if it is to be a mock."""
    if os.environ.get(MOCKED) != "1":
        yield
        return
    from support.mock_cuda import mock_cuda

    with mock_cuda(), ExitStack() as stack:
        for name, answer in (("_sleep", None), ("set_sync_debug_mode", None), ("empty_cache", None)):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(dist, "init_process_group", _by_gloo(dist.init_process_group)))
        yield


def _by_gloo(plain: Callable[..., None]) -> Callable[..., None]:
    def init(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        plain("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return init


def backend_of(device: str) -> str:
    """What joins one rank on a device, as Lightning chooses it."""
    return "nccl" if device == "cuda" and os.environ.get(MOCKED) != "1" else "gloo"


def exact_numbers(device: str) -> None:
    """Let products depend on their factors alone: no tf32, no sums in an order that chance decides."""
    if device != "cpu":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        if os.environ.get(MOCKED) != "1":  # which fills new memory behind the back of the mock
            torch.use_deterministic_algorithms(True, warn_only=True)


def spin(device: Any, milliseconds: float = 20.0) -> None:
    """Keep the current stream busy, so that whoever does not wait for it reads what is not there yet.

    A CPU has no stream: there the host sleeps a tenth of that.
    """
    if torch.device(device).type == "cuda":
        torch.cuda._sleep(int(milliseconds * 2e6))  # cycles, at some 2 GHz
    else:
        time.sleep(milliseconds / 1e4)


@cache
def forks(device: str) -> bool:
    """Whether a process forked from this one can use the device; found out by one that tries."""
    if device == "cpu" or os.environ.get(MOCKED) == "1":
        return True
    trial = multiprocessing.get_context("fork").Process(target=_touch, args=(device,))
    trial.start()
    trial.join(60)
    if trial.is_alive():
        trial.kill()
    return trial.exitcode == 0


def _touch(device: str) -> None:
    torch.zeros(1, device=device).add_(1).item()


class Ranks:
    """Processes with the environment of torchelastic: each a host of its own, all with the device of number 0.

    Args:
        world_size: How many.
        device: ``"cuda"`` or ``"cpu"``.
        backend: Joins them in a process group before the first call; ``None`` leaves that to the calls, and each has an
            address of its own and leaves the group that it has made.
        exact: Whether results count, and not times: see :func:`exact_numbers`.

    """

    def __init__(self, world_size: int, device: str, backend: str | None = None, *, exact: bool = True) -> None:
        self.world_size, self.device, self.backend, self.exact = world_size, device, backend, exact
        self._context = multiprocessing.get_context("fork" if forks(device) else "spawn")
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def call(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0, **kwargs: Any) -> list[Any]:
        """Run ``fn(rank, *args)`` in all of them, and return the answers in order of rank.

        Raises:
            AssertionError: If one of them fails, with its traceback, or does not answer.

        """
        if not self._processes:
            self._start()
        order = pickle.dumps((fn, args, kwargs, free_port()))
        answers: list[Any] = []
        try:
            for pipe in self._pipes:
                pipe.send_bytes(order)
            deadline = time.monotonic() + timeout_s
            for rank, answer in enumerate(self._answers(deadline)):
                went_well, value = answer
                assert went_well, f"rank {rank} failed:\n{value}"
                answers.append(value)
        except BaseException:
            self.close()
            raise
        return answers

    def _answers(self, deadline: float) -> list[tuple[bool, Any]]:
        """Wait for all; as soon as one has failed the others are not waited for any longer than a second."""
        found: dict[int, tuple[bool, Any]] = {}
        while len(found) < self.world_size:
            missing = [rank for rank in range(self.world_size) if rank not in found]
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                break
            for rank in missing:
                if self._pipes[rank] in ready:
                    found[rank] = self._answer_of(rank)
                    if not found[rank][0]:
                        deadline = min(deadline, time.monotonic() + 1)
        failed = [answer for answer in found.values() if not answer[0]]
        nothing = (False, failed[0][1] if failed else "no answer in time")
        return [found.get(rank, nothing) for rank in range(self.world_size)]

    def _answer_of(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(5)
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world_size):
            here, there = self._context.Pipe()
            process = self._context.Process(
                target=_serve,
                args=(there, rank, self.world_size, self.device, self.backend, port, self.exact),
                daemon=True,
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            with suppress(OSError):  # whoever has ended by itself
                pipe.send_bytes(b"")  # to close the pipe is not enough: ranks that were forked later hold it open
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._processes, self._pipes = [], []


def _serve(pipe: Any, rank: int, world_size: int, device: str, backend: str | None, port: int, exact: bool) -> None:
    gc.freeze()  # as in `processes.py`
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "GROUP_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "on_device",
    }  # fmt: skip
    torch.set_num_threads(1)
    with the_device():
        if exact:
            exact_numbers(device)
        _answer(pipe, world_size, device, backend)
    os._exit(0)  # threads of gloo may outlive the interpreter, and nothing is left to be written


def _answer(pipe: Any, world_size: int, device: str, backend: str | None) -> None:
    if device != "cpu":
        torch.cuda.set_device(0)
    for chatty in ("lightning.pytorch", "lightning.fabric", "lightning_comm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if backend is not None:
        dist.init_process_group(backend, timeout=timedelta(seconds=60))
        assert dist.get_world_size() == world_size
    while True:
        try:
            order = pipe.recv_bytes()
        except EOFError:
            break
        if not order:
            break
        fn, args, kwargs, port = pickle.loads(order)
        if backend is None:
            os.environ["MASTER_PORT"] = str(port)
        try:
            answer = True, fn(int(os.environ["RANK"]), *args, **kwargs)
            if backend is None and dist.is_initialized():
                dist.barrier()  # the others may still need the store that rank 0 hosts
                dist.destroy_process_group()
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
