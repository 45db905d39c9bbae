"""Processes of the check: a part runs in one, with children of its own, and all of them end when it has to.

Whoever is ended while a part computes must not leave its processes behind, since they would hold the card. A signal
that can be caught becomes an exception, which ends the part's group on its way; after one that cannot, the kernel ends
each process whose parent has gone.
"""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from benchmarks.gpu_check.report import WHOLE, Check

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_forking: list[int] = [0]  # the process whose main thread forks: the kernel goes by the thread that forked


class ToldToEnd(BaseException):
    """A signal that asks this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Raise `ToldToEnd` at the first signal that asks for an end, and pass over those after it."""

    def end(number: int, _: Any) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise ToldToEnd(number)

    before = {each: signal.signal(each, end) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # which has ended before the kernel was told
        os._exit(1)


def _note_who_forks() -> None:
    _forking[0] = os.getpid() if threading.current_thread() is threading.main_thread() else 0


def _end_with_who_forked() -> None:
    if _forking[0]:
        _end_with(_forking[0])


def _carry_out(function: str, check: Check, parent: int) -> None:
    """Run a part in a process of its own, whose children belong to its group and end with it."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    os.setsid()
    _end_with(parent)
    os.register_at_fork(before=_note_who_forks, after_in_child=_end_with_who_forked)
    log = os.open(check.out / f"part{check.part}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.environ.pop("CUDA_LAUNCH_BLOCKING", None)  # it hides what happens when nobody waits
    (check.out / "scratch").mkdir(exist_ok=True)
    os.chdir(check.out / "scratch")
    try:
        module, name = function.split(":")
        run: Callable[[Check], None] = getattr(import_module(module), name)
        run(check)
    except BaseException as error:
        traceback.print_exc()
        check.note(WHOLE, f"{type(error).__name__}: {error}"[:300], "it ends", "no error", verdict="fails")
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run_part(function: str, check: Check, expected_s: float, limit_s: float, context: Any) -> None:
    """Run a part, and end it with all its processes when its time is over, or this program is told to end."""
    began = time.monotonic()
    expected = f"{expected_s:.0f} s"
    process = context.Process(target=_carry_out, args=(function, check, os.getpid()))
    try:
        process.start()
        process.join(limit_s)
        slow = process.exitcode is None
    finally:
        _end_group(process)
    if slow:
        check.note(WHOLE, f"ended after {limit_s:.0f} s", expected, "ends", verdict="fails")
    elif process.exitcode == 0:
        check.note(WHOLE, f"{time.monotonic() - began:.0f} s", expected, "ends", verdict="ok")
    elif process.exitcode != 1:  # which has noted itself what went wrong
        check.note(WHOLE, f"exit code {process.exitcode}", 0, "==", verdict="fails")


def _end_group(process: Any) -> None:
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have a group of its own yet
    process.join(10)
