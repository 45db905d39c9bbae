"""The first process of an emulated host: everything on the host lives and dies with it.

Run by file path, with the standard library alone, so that a host starts in milliseconds. As process 1 of a PID
namespace it adopts orphans, and signals reach every process of the host and no other. It obeys one command a line, and
answers whether anything runs on the host. It ends when its standard input does, or the process that owns the lab,
because the lab was closed or killed; the kernel then kills what still runs on the host and takes its network away. So
nothing can be left behind, whatever happened to the lab.

Arguments: the number of an open file that becomes readable when the lab's process ends (``pidfd_open``), or -1 for
none. A child of that process, forked while the lab is open, holds the other end of the standard input too; this one
not.
"""

import os
import select
import signal
import sys
from collections.abc import Iterator

SIGNALS = {
    "look": 0,  # signals nothing, and answers
    "stop": signal.SIGSTOP,
    "resume": signal.SIGCONT,
    "terminate": signal.SIGTERM,
    "kill": signal.SIGKILL,
}


def _adopt_orphans(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def _tell_all(number: int) -> bool:
    try:
        os.kill(-1, number)  # every process of this namespace but this one
    except ProcessLookupError:
        return False  # nothing runs on the host
    return True


def _commands(owner: int) -> Iterator[str]:
    """Yield the lab's commands until there can be no more."""
    poll = select.poll()
    for each in (0, owner):
        if each >= 0:
            poll.register(each, select.POLLIN)
    begun = b""
    while True:
        ready = [each for each, _ in poll.poll()]
        if owner in ready or not (chunk := os.read(0, 4096)):
            return
        *lines, begun = (begun + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def main(owner: int) -> None:
    """Say which process this is outside of the host, then obey."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole terminal; the lab decides what it means
    signal.signal(signal.SIGCHLD, _adopt_orphans)
    print(os.readlink("/proc/self"), flush=True)
    for command in _commands(owner):
        if command == "exit":
            return
        print("some" if _tell_all(SIGNALS[command]) else "none", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
