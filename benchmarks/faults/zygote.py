"""A process that has imported everything once and forks ranks: a rank then costs a tenth of a second, not six.

    python -m benchmarks.faults.zygote ORDERS NEWS

Orders and news are JSON, one a line, over two open files. Each rank has a session, a log and an exit code of its own,
and ends as any Python program does, through the interpreter's own end: what a library leaves to that moment is part of
what is tested.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.kit.hosts import program

_POLL_S = 0.01
_FORK_S = 300.0  # until the first fork, on a machine that is busy, everything is imported


def serve(orders: int, news: int) -> dict[str, Any] | None:
    """Fork ranks as ordered; return the order in a rank, and ``None`` here when there are no more orders."""
    alive: set[int] = set()
    begun = b""
    _say(news, {"ready": os.getpid()})
    while True:
        ready = select.select([orders], [], [], _POLL_S)[0]
        if ready:
            chunk = os.read(orders, 65536)
            if not chunk:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                return None
            *lines, begun = (begun + chunk).split(b"\n")
            for order in map(json.loads, lines):
                if "signal" in order:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(order["pid"], order["signal"])
                    continue
                pid = os.fork()
                if pid == 0:
                    os.close(orders)
                    os.close(news)
                    _become_rank(order)
                    return dict(order["job"])
                alive.add(pid)
                _say(news, {"forked": pid, "tag": order["tag"]})
        for pid in sorted(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.discard(pid)
                _say(news, {"ended": pid, "code": os.waitstatus_to_exitcode(status), "time": time.time()})


def _say(news: int, what: dict[str, Any]) -> None:
    os.write(news, (json.dumps(what) + "\n").encode())


def _become_rank(order: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    tempfile.tempdir = order["environment"]["TMPDIR"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass
class Rank:
    """A process that was forked: its number and, once it has ended, how and when."""

    zygote: "Zygote"
    pid: int

    @property
    def code(self) -> int | None:
        """The exit code, as ``subprocess`` has it, or ``None`` while it runs."""
        return self.zygote.ends.get(self.pid, (None, None))[0]

    @property
    def ended_at(self) -> float | None:
        """The time of its end."""
        return self.zygote.ends.get(self.pid, (None, None))[1]

    def signal(self, number: int) -> None:
        """Send it a signal; nothing if it has ended."""
        self.zygote.tell({"pid": self.pid, "signal": int(number)})


class Zygote:
    """The driver's end of a process that forks ranks.

    Args:
        orders: An open file to write orders to.
        news: An open file to read news from.
        wait: Called when it is closed; waits for the process.

    """

    def __init__(self, orders: int, news: int, wait: Callable[[], Any]) -> None:
        self.ends: dict[int, tuple[int, float]] = {}
        self._orders, self._wait = orders, wait
        self._forked: dict[int, int] = {}
        self._tags = 0
        self._ready = False
        self._news = threading.Condition()
        threading.Thread(target=self._read, args=(news,), daemon=True).start()

    @classmethod
    def started(cls, popen: Callable[..., "subprocess.Popen[Any]"] = subprocess.Popen) -> "Zygote":
        """Start one as a program of its own.

        Args:
            popen: Starts it; another one puts it on an emulated host.

        """
        words = program("faults.zygote", "0", "1")
        process = popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        assert process.stdin is not None
        assert process.stdout is not None
        orders, news = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
        process.stdin.close()
        process.stdout.close()
        return cls(orders, news, process.wait)

    @classmethod
    def forked(cls) -> "Zygote":
        """Fork one from this process, which has imported everything and has no threads that matter."""
        from benchmarks.faults.job import run

        (order_end, orders), (news, news_end) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(orders)
            os.close(news)
            atexit._clear()  # what this process had registered is not for its children
            warnings.resetwarnings()
            warnings.showwarning = _print_warning  # pytest collects those of its tests
            order = serve(order_end, news_end)
            _end_as_a_program(lambda: None if order is None else run(order))
        os.close(order_end)
        os.close(news_end)
        return cls(orders, news, lambda: os.waitpid(pid, 0))

    def start(self, **order: Any) -> Rank:
        """Fork a rank: ``job``, ``folder``, ``log`` and ``environment`` say what for and where."""
        with self._news:
            self._tags += 1
            tag = self._tags
        self.tell({**order, "tag": tag})
        with self._news:
            if not self._news.wait_for(lambda: tag in self._forked, _FORK_S):
                raise RuntimeError(f"faults: no rank was forked within {_FORK_S:.0f} s.")
            return Rank(self, self._forked[tag])

    def tell(self, order: dict[str, Any]) -> None:
        """Give an order."""
        os.write(self._orders, (json.dumps(order) + "\n").encode())

    def close(self) -> None:
        """End it, and whatever it forked."""
        os.close(self._orders)
        self._wait()

    def _read(self, news: int) -> None:
        with open(news) as lines:
            for line in lines:
                said = json.loads(line)
                with self._news:
                    if "forked" in said:
                        self.ends.pop(said["forked"], None)  # of an earlier process with the same number
                        self._forked[said["tag"]] = said["forked"]
                    if "ended" in said:
                        self.ends[said["ended"]] = (said["code"], said["time"])
                    self._news.notify_all()


def _environment() -> dict[str, str]:
    """Return this process's environment without what would tell Lightning of another job."""
    other = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "NODE_RANK", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _end_as_a_program(call: Callable[[], None]) -> None:
    """Call a function and end the process as the interpreter would, without going back to who forked it."""
    code = 0
    try:
        call()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    try:
        threading._shutdown()  # waits for threads, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    """Import everything, then fork ranks; each goes on from here as a program of its own."""
    orders, news = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
    os.dup2(2, 1)  # what imports print is no news
    from benchmarks.faults.job import run

    order = serve(orders, news)
    if order is not None:
        run(order)


if __name__ == "__main__":
    main()
