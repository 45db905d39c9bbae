"""Ports of this machine that no two launches of the tests share."""

import os
import socket
import threading
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice

# Launches start side by side in threads, which share one walk through the ports. Held while ranks are forked, so that
# none of them inherits it from a thread that it does not have.
_CHOOSING = threading.Lock()
os.register_at_fork(before=_CHOOSING.acquire, after_in_parent=_CHOOSING.release, after_in_child=_CHOOSING.release)
_PORTS = range(10_000, 20_000)  # below those that the kernel gives away, to whoever connects in the meantime


def free_port() -> int:
    """Find a port that nobody else finds: each worker of pytest-xdist has ports of its own, and uses them in turn."""
    with _CHOOSING:
        for port in islice(_own_ports(os.getpid()), 1000):
            with socket.socket() as sock:
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
    raise OSError(f"free_port: not one of 1,000 ports of 127.0.0.1 in {_PORTS} could be had")


@cache
def _own_ports(process: int) -> Iterator[int]:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = _PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) :: workers]
    first = process * 97 % len(own)  # another run of the tests on this machine begins elsewhere
    return cycle([*own[first:], *own[:first]])
