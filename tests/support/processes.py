"""Real processes for tests: results and tracebacks come back, and no rank can be missing unnoticed.

A new rank costs a tenth of a second of the processor, and as much again for its first fit. So ranks stay, and run one
function after the other (see :class:`support.rank_processes.RankProcesses`), where nobody can tell the difference:
only as long as the process of the tests is what it was when they were forked from it, and they are what they were then.
"""

import os
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch.distributed as dist

from support.ports import free_port
from support.process_state import ProcessState, process_state
from support.rank_processes import NoAnswer, Outcome, RankProcesses

__all__ = [
    "NoAnswer",
    "Outcome",
    "end_idle_ranks",
    "free_port",
    "launch",
    "one_launch",
    "outcomes",
    "run_cases",
    "start_ranks",
]

# Making its first process group, torch 2.15 looks through the entry points of all installed packages, which takes
# longer than all the rest of it. What is installed does not change while tests run.
if hasattr(dist.distributed_c10d.Backend, "_ensure_backend_registered"):
    dist.distributed_c10d.Backend._ensure_backend_registered = cache(
        dist.distributed_c10d.Backend._ensure_backend_registered
    )
    dist.distributed_c10d.Backend._ensure_backend_registered("gloo")  # here, so that forked ranks have it

_LAST_STATE: list[ProcessState] = []
_IDLE: dict[int, RankProcesses] = {}  # by number of ranks; of this process, and not of those that it forks
_TIDY_WITHIN_S = 10.0
_TAKING = threading.Lock()  # launches run side by side in threads
os.register_at_fork(after_in_child=_IDLE.clear)


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
    if errors := [f"rank {rank} failed:\n{error}" for rank, (_, error) in enumerate(answers) if error is not None]:
        pytest.fail("\n".join(errors))
    return [answer for answer, _ in answers]


def outcomes(
    fn: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 90.0, ends_within_s: float = 5.0
) -> list[Outcome]:
    """Like :func:`launch`, for ranks that may fail: return an answer and a traceback for each.

    A process that has not ended by itself ``ends_within_s`` after all have answered is killed: one whose group has
    failed may wait for the others in the end.
    """
    try:
        return run_cases(fn, args, world_size, timeout_s, ends_within_s)
    except NoAnswer as problem:
        pytest.fail(str(problem))


def run_cases(
    fn: Callable[..., Any], args: tuple[Any, ...], world_size: int, timeout_s: float, ends_within_s: float
) -> list[Outcome]:
    """Run a function in ranks that are idle, or else in new ones, which are kept if all goes well.

    Raises:
        NoAnswer: If a rank ends, or goes on for too long, without an answer.

    """
    with _TAKING:
        ranks = _IDLE.pop(world_size, None)
    job = None
    if ranks is not None and (not ranks.are_as_new_ones_would_be() or (job := ranks.message(fn, args)) is None):
        ranks.end()
        ranks = None
    if ranks is None:
        ranks = RankProcesses(world_size, _state_now(), (fn, args))
    else:
        ranks.begin(job)
    try:
        answers = ranks.answers(timeout_s)
        stays = all(error is None for _, error in answers) and ranks.are_as_before(_TIDY_WITHIN_S)
    except BaseException:
        ranks.end()
        raise
    with _TAKING:
        other = _IDLE.pop(world_size, None)
        if stays:
            _IDLE[world_size] = ranks
    if not stays:
        ranks.end(ends_within_s)
    if other is not None:
        other.end()
    return answers


def _state_now() -> ProcessState:
    """The state of this process, looked up only if something of it has changed."""
    if not (_LAST_STATE and _LAST_STATE[0].holds()):
        _LAST_STATE[:] = [process_state()]
    return _LAST_STATE[0]


def end_idle_ranks() -> None:
    """End the ranks that wait for a function, as at the end of a file: the next file's functions are not theirs."""
    with _TAKING:
        ended = list(_IDLE.values())
        _IDLE.clear()
    for ranks in ended:
        ranks.end()
