"""The first process of an emulated host: everything on the host lives and dies with it.

Run by file path, with the standard library alone, so that a host starts in milliseconds. As process 1 of a PID
namespace it takes up orphans, and signals reach every process of the host and no other. It obeys one word a line. When
its standard input ends, because the lab has closed it or was killed, it ends too; the kernel then kills what still runs
on the host and takes its network away. So nothing can be left behind, whatever happened to the lab.
"""

import os
import signal
import sys

SIGNALS = {
    "stop": signal.SIGSTOP,
    "resume": signal.SIGCONT,
    "terminate": signal.SIGTERM,
    "kill": signal.SIGKILL,
}


def _take_up_orphans(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def _tell_all(number: int) -> None:
    try:
        os.kill(-1, number)  # every process of this namespace but this one
    except ProcessLookupError:
        return  # nothing runs on the host


def main() -> None:
    """Say which process this is outside of the host, then obey until there is nobody to command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole terminal; the lab decides what it means
    signal.signal(signal.SIGCHLD, _take_up_orphans)
    print(os.readlink("/proc/self"), flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "exit":
            return
        _tell_all(SIGNALS[word])
        print("done", flush=True)


if __name__ == "__main__":
    main()
