"""The process that starts a command on an emulated host and represents it outside: a signal to one reaches both.

Run by file path, with the standard library alone, so that it costs milliseconds. ``nsenter`` of util-linux enters
namespaces as well, but does not pass signals on, leaves the command running when it is killed, and freezes with a
command that is stopped, for good where the host then dies.

Arguments: the number of the host's first process, ``user`` where its user namespace is to be entered too or ``root``,
the number of an open file that is closed as soon as the command is a process of the host, and the command.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from types import FrameType

_CANNOT_RUN, _NOT_FOUND = 126, 127  # as a shell exits
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def _enter(libc: ctypes.CDLL, pid: str, name: str) -> None:
    with open(f"/proc/{pid}/ns/{name}") as namespace:
        if libc.setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the {name} namespace of process {pid}")


def _become(libc: ctypes.CDLL, command: list[str], started: int) -> int:
    """Run the command in place of this process; return an exit code where that cannot be done."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # when the process that represents it outside is killed
    os.close(started)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and an ignored signal stays so
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]!r}: {error.strerror}\n")
        sys.stderr.flush()
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_RUN


def _end_as(status: int) -> int:
    """Return the exit code of a process with this status, or end by the signal that ended it."""
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def main(pid: str, user: str, started: int, *command: str) -> int:
    """Enter the host, start the command, and return its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for name in ("user", "net", "pid") if user == "user" else ("net", "pid"):
            _enter(libc, pid, name)
    except OSError as error:
        sys.stderr.write(f"the host is gone: {error}\n")
        return _CANNOT_RUN
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is somebody to pass them on to
    child = os.fork()
    if child == 0:
        os._exit(_become(libc, list(command), started))
    os.close(started)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    return _end_as(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
