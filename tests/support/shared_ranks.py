"""Named cases that share their ranks, since a launch costs more than most fits; who fails is named all the same."""

import multiprocessing
import random
import time
import traceback
from collections.abc import Hashable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from support.processes import become, free_port

Outcome = tuple[Any, str | None]


class SharedRanks:
    """Answers of several named calls, one after the other in the same processes.

    All cases run when the first answer is asked for, so that a test of each reads its own. Every case begins with the
    random state of the first. A case that fails on any rank ends these processes, since their group may be left
    anyhow, and the cases behind it go on in new ones.

    Args:
        cases: For each name a function, which is called as ``fn(rank, *args)``, and the arguments.
        world_size: The number of ranks.
        timeout_s: How long a case may take.

    """

    def __init__(
        self,
        cases: Mapping[Any, tuple[Any, ...]],
        *,
        world_size: int,
        timeout_s: float = 90.0,
    ) -> None:
        self._cases, self._world_size, self._timeout_s = dict(cases), world_size, timeout_s
        self._outcomes: dict[Hashable, list[Outcome]] = {}

    def __getitem__(self, name: Hashable) -> list[Any]:
        """The answers of a case in order of rank; a failure of that case fails the test that asks."""
        for rank, (_, error) in enumerate(self.outcomes(name)):
            if error is not None:
                pytest.fail(f"case {name!r}: rank {rank} failed:\n{error}")
        return [answer for answer, _ in self.outcomes(name)]

    def outcomes(self, name: Hashable) -> list[Outcome]:
        """Like the answers, with a traceback for each rank that failed."""
        while name not in self._outcomes:
            self._launch([each for each in self._cases if each not in self._outcomes])
        return self._outcomes[name]

    def _launch(self, names: list[Hashable]) -> None:
        """Run cases until one fails; at least one of them has outcomes then."""
        context = multiprocessing.get_context("fork")
        port, ranks = free_port(), []
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._rank, args=(rank, port, names, theirs))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            for name in names:
                for _, pipe in ranks:
                    pipe.send(True)
                self._outcomes[name] = self._collect(ranks)
                if any(error is not None for _, error in self._outcomes[name]):
                    return
            for _, pipe in ranks:
                pipe.send(False)
            for process, _ in ranks:
                process.join(5)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()

    def _collect(self, ranks: list[tuple[Any, Connection]]) -> list[Outcome]:
        until_s = time.monotonic() + self._timeout_s
        found: list[Outcome] = []
        for process, pipe in ranks:
            wait([pipe, process.sentinel], timeout=max(0.0, until_s - time.monotonic()))
            try:
                found.append(pipe.recv() if pipe.poll() else self._without_answer(process))
            except EOFError:  # closed by its end
                found.append(self._without_answer(process))
        return found

    def _without_answer(self, process: Any) -> Outcome:
        process.join(1)
        if process.is_alive():
            return None, f"no answer within {self._timeout_s} s"
        return None, f"ended with status {process.exitcode} and without an answer"

    def _rank(self, rank: int, port: int, names: list[Hashable], pipe: Connection) -> None:
        become(rank, self._world_size, port)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        for name in names:
            pipe.recv()
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            try:
                fn, *args = self._cases[name]
                pipe.send((fn(rank, *args), None))
            except BaseException:
                # the end of this process is what others notice that wait for it in a collective
                pipe.send((None, traceback.format_exc()))
                return
        pipe.recv()
        # the others may still need the store that rank 0 hosts
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
